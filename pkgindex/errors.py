"""Every exception that pkgindex raises on purpose, grouped by when it happens.

The message is the one line that the user sees: what, where, what to do. `exit_code` is what the
command then exits with, so that a supervisor can tell what a restart may cure from what it cannot.
This module imports nothing, and any module may import it.
"""


class PkgindexError(Exception):
    """Anything that pkgindex reports in one line, without a traceback."""

    exit_code = 1


# --- before anything runs: usage and configuration ------------------------------------------------


class ConfigError(PkgindexError):
    """A flag, an environment variable or a configuration file is wrong; a restart will not help."""

    exit_code = 2


class ClientError(PkgindexError):
    """A client cannot reach its server, lost it, or got an answer that is not of the protocol."""

    exit_code = 2


# --- at the start: what the server needs is taken or out of reach ---------------------------------


class StoreOwned(PkgindexError):
    """Another server that lives owns the mount; the message names its host, process and epoch."""

    exit_code = 3


class StoreUnreachable(PkgindexError):
    """The mount is absent, read-only, not permitted, or does not answer."""

    exit_code = 3


class ListenError(PkgindexError):
    """An address cannot be listened on: in use, not permitted, or not of this machine."""

    exit_code = 3


# --- while reading a store: what is on it is not what was written ---------------------------------


class StoreDamaged(PkgindexError):
    """A file of the store is damaged; the message names it. Nothing was guessed or changed."""

    exit_code = 4


class UnknownFormat(PkgindexError):
    """The store was written by something else, or by a later pkgindex."""

    exit_code = 4


# --- while running --------------------------------------------------------------------------------


class StoreFailed(PkgindexError):
    """A write, sync or proof failed: the writer has stopped, and nothing was acknowledged since."""

    exit_code = 5


def reason_of(error: OSError, place: str) -> str:
    """How a line about an error of the system begins: where (at `place`, if it does not say) and what."""
    return f"{error.filename or place}: {error.strerror}"
