"""`pkgindex index`, `remove` and `query`: one message, its answer printed and told by the exit code.

They are made for scripts, and start in the time that Python and click need: nothing that only the
server or the loader wants is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from pkgindex.client import DEFAULT_SERVER, DEFAULT_TIMEOUT, Answer, Client
from pkgindex.errors import ClientError

if TYPE_CHECKING:
    import ssl

__all__ = ["Server", "index", "query", "remove", "server_options"]

EXIT_CODES = """\b
Exit codes:
  0  the server answered OK
  1  the server answered FAIL
  2  the server answered ERROR, could not be reached, or was silent
"""


@dataclass(frozen=True)
class Server:
    """The server that a command talks to, as its options say."""

    name: str
    timeout: float
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None

    def client(self) -> Client:
        """A client of it, not connected yet. Raises ClientError for files of TLS that are wrong."""
        return Client(self.name, timeout=self.timeout, tls=self._tls())

    def _tls(self) -> ssl.SSLContext | None:
        files = [self.tls_ca, self.tls_cert, self.tls_key]
        if not self.name.startswith("tls://"):
            if any(files):
                raise ClientError(
                    f"{self.name}: a certificate is named, but no TLS: write tls://{self.name}"
                )
            return None
        if not any(files):
            return None  # as the system trusts
        import ssl

        if self.tls_key and not self.tls_cert:
            raise ClientError(
                f"{self.tls_key}: a key without its certificate: name that with --tls-cert"
            )
        for path in filter(None, files):
            try:
                with open(path, "rb") as file:  # noqa: PTH123  # pathlib loads longer than this command
                    file.read(1)
            except OSError as error:
                raise ClientError(f"{path}: cannot read it: {error.strerror}") from None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
        except ssl.SSLError:
            raise ClientError(f"{self.tls_ca}: not the certificate of a CA, in PEM") from None
        if self.tls_cert:
            try:
                context.load_cert_chain(self.tls_cert, self.tls_key, _no_password)
            except ssl.SSLError as error:
                both = f"{self.tls_cert} and {self.tls_key}" if self.tls_key else self.tls_cert
                why = (
                    "this key is not that certificate's"
                    if error.reason == "KEY_VALUES_MISMATCH"
                    else "not a certificate and its key, in PEM"
                )
                raise ClientError(f"{both}: {why}") from None
        return context


def _no_password() -> str:
    raise ClientError("the key of the certificate has a password; store it without one (mode 0600)")


def server_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options that say which server to talk to; it gets them as `server`."""

    @wraps(command)
    def with_server(
        server: str,
        timeout: float,
        tls_ca: str | None,
        tls_cert: str | None,
        tls_key: str | None,
        **others: Any,
    ) -> int:
        return command(server=Server(server, timeout, tls_ca, tls_cert, tls_key), **others)

    options = [
        click.option(
            "--server",
            metavar="HOST:PORT",
            envvar="PKGINDEX_SERVER",
            show_envvar=True,
            default=DEFAULT_SERVER,
            show_default=True,
            help="The server: HOST:PORT, [IPV6]:PORT or unix:PATH; tls://HOST:PORT with TLS.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            default=DEFAULT_TIMEOUT,
            show_default=True,
            help="Give up when nothing moves on the connection for so long.",
        ),
        # Names of their own: PKGINDEX_TLS_CERT and PKGINDEX_TLS_KEY are the server's.
        *(
            click.option(f"--{name}", metavar="FILE", envvar=variable, show_envvar=True, help=text)
            for name, variable, text in (
                ("tls-ca", "PKGINDEX_TLS_CA", "Trust servers whose certificate this CA signed."),
                ("tls-cert", "PKGINDEX_CLIENT_CERT", "Show this certificate to the server."),
                ("tls-key", "PKGINDEX_CLIENT_KEY", "The key to it, if it is in another file."),
            )
        ),
    ]
    decorated: Callable[..., int] = with_server
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


@click.command(
    short_help="Index a package with its dependencies.",
    epilog=EXIT_CODES
    + """
\b
Examples:
  pkgindex index elisp
  pkgindex index emacs elisp gtk+
""",
)
@click.argument("package")
@click.argument("dependencies", metavar="[DEPENDENCY]...", nargs=-1)
@server_options
def index(package: str, dependencies: tuple[str, ...], server: Server) -> int:
    """Index PACKAGE with exactly these dependencies, in place of any older list.

    The server answers FAIL, and changes nothing, if one of them is not indexed. Its OK means that
    the change is on stable storage.
    """
    return _answered(server, lambda client: client.index(package, dependencies))


@click.command(
    short_help="Remove a package.",
    epilog=EXIT_CODES
    + """
\b
Example:
  pkgindex remove emacs
""",
)
@click.argument("package")
@server_options
def remove(package: str, server: Server) -> int:
    """Remove PACKAGE from the index.

    The server answers FAIL, and changes nothing, if another package depends on it; OK if it is not
    indexed, now or already before.
    """
    return _answered(server, lambda client: client.remove(package))


@click.command(
    short_help="Ask whether a package is indexed.",
    epilog=EXIT_CODES
    + """
\b
Example:
  pkgindex query emacs && echo it is there
""",
)
@click.argument("package")
@server_options
def query(package: str, server: Server) -> int:
    """Ask whether PACKAGE is indexed: OK if it is, FAIL if not."""
    return _answered(server, lambda client: client.query(package))


def _answered(server: Server, ask: Callable[[Client], bool]) -> int:
    """Ask a server, print its answer, and return the exit code for it."""
    with server.client() as client:
        try:
            answer = Answer.OK if ask(client) else Answer.FAIL
        except ValueError as error:
            raise click.UsageError(str(error), click.get_current_context()) from error
    click.echo(answer)
    return 0 if answer is Answer.OK else 1
