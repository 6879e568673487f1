"""`pkgindex index`, `remove` and `query`: one message, its answer printed and told by the exit code.

They are made for scripts, and start in the time that Python and click need: nothing that only the
server or the loader wants is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from pkgindex.client import DEFAULT_SERVER, DEFAULT_TIMEOUT, Answer, Client

__all__ = ["index", "query", "remove", "server_options"]

EXIT_CODES = """\b
Exit codes:
  0  the server answered OK
  1  the server answered FAIL
  2  the server answered ERROR, could not be reached, or was silent
"""

_Command = TypeVar("_Command", bound=Callable[..., object])


def server_options(command: _Command) -> _Command:
    """Give a command the options that say which server to talk to, and for how long."""
    timeout = click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        default=DEFAULT_TIMEOUT,
        show_default=True,
        help="Give up when nothing moves on the connection for so long.",
    )
    server = click.option(
        "--server",
        metavar="HOST:PORT",
        envvar="PKGINDEX_SERVER",
        show_envvar=True,
        default=DEFAULT_SERVER,
        show_default=True,
        help="The server: HOST:PORT, [IPV6]:PORT or unix:PATH.",
    )
    return server(timeout(command))


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
def index(package: str, dependencies: tuple[str, ...], server: str, timeout: float) -> int:
    """Index PACKAGE with exactly these dependencies, in place of any older list.

    The server answers FAIL, and changes nothing, if one of them is not indexed. Its OK means that
    the change is on stable storage.
    """
    return _answered(server, timeout, lambda client: client.index(package, dependencies))


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
def remove(package: str, server: str, timeout: float) -> int:
    """Remove PACKAGE from the index.

    The server answers FAIL, and changes nothing, if another package depends on it; OK if it is not
    indexed, now or already before.
    """
    return _answered(server, timeout, lambda client: client.remove(package))


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
def query(package: str, server: str, timeout: float) -> int:
    """Ask whether PACKAGE is indexed: OK if it is, FAIL if not."""
    return _answered(server, timeout, lambda client: client.query(package))


def _answered(server: str, timeout: float, ask: Callable[[Client], bool]) -> int:
    """Ask a server, print its answer, and return the exit code for it."""
    with Client(server, timeout=timeout) as client:
        try:
            answer = Answer.OK if ask(client) else Answer.FAIL
        except ValueError as error:
            raise click.UsageError(str(error), click.get_current_context()) from error
    click.echo(answer)
    return 0 if answer is Answer.OK else 1
