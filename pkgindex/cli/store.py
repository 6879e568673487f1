"""What the commands on a stopped store share: naming it, opening it, showing how far reading has come."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from pkgindex.cli.progress import bar
from pkgindex.errors import ConfigError, PkgindexError, StoreUnreachable

if TYPE_CHECKING:
    from pkgindex.store.offline import Offline
    from pkgindex.store.recovery import Progress

__all__ = ["STORE", "TROUBLE", "folder_of", "opened"]

TROUBLE = 2

STORE = click.argument(
    "store", metavar="[STORE]", envvar="PKGINDEX_STORE", default="file:./pkgindex-data"
)


def folder_of(store: str) -> str:
    """The folder that a path or a URL (file:PATH) names. Raises ConfigError."""
    from pkgindex.index.file import path_of

    scheme = re.match(r"([a-z][a-z0-9+.-]*):", store)
    if scheme and scheme[1] != "file":
        raise ConfigError(f"{store}: only a file: store has files to read")
    return path_of(store.removeprefix("file:")) if scheme else store


@contextmanager
def opened(store: str) -> Iterator[tuple["Offline", Callable[[str], "Progress"]]]:
    """A stopped store, and what makes progress bars; whatever goes wrong ends in exit code 2."""
    # What they make is for the server: as it would make it, whatever this shell's mask is.
    os.umask(0o027)
    from pkgindex.store.offline import Offline

    try:
        with bar() as progress, Offline(folder_of(store)) as offline:
            if not offline.is_guarded:
                click.echo(
                    f"pkgindex: {offline.mount.root}: no lock guards what is read here: if a server writes "
                    "it from elsewhere, what follows mixes two moments",
                    err=True,
                )
            yield offline, progress
    except PkgindexError as error:
        error.exit_code = TROUBLE
        raise
    except OSError as error:
        unreachable = StoreUnreachable(
            f"{error.filename or store}: cannot read it: {error.strerror}"
        )
        unreachable.exit_code = TROUBLE
        raise unreachable from None
