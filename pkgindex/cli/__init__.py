"""The `pkgindex` command: finds the subcommand, runs it, turns what it raises into one line.

A subcommand lives in a module of its own that is imported only when it is wanted, so that
`pkgindex query` starts without the server and without what draws progress bars. A subcommand
returns its exit code (None is 0) or raises PkgindexError, whose message is printed and whose
`exit_code` is the code.
"""

import importlib
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

import click

from pkgindex import __version__
from pkgindex.errors import PkgindexError

__all__ = ["main"]

# Each section of `pkgindex --help`: its commands, and the module that has them.
SECTIONS: Final[dict[str, dict[str, str]]] = {
    "The server and its store": {
        "serve": "pkgindex.cli.serve",
        "check": "pkgindex.cli.check",
        "dump": "pkgindex.cli.dump",
    },
    "Several servers on one store": {
        "status": "pkgindex.cli.cluster",
        "handover": "pkgindex.cli.cluster",
    },
    "Talking to a server": {
        "index": "pkgindex.cli.client",
        "remove": "pkgindex.cli.client",
        "query": "pkgindex.cli.client",
        "load": "pkgindex.cli.load",
    },
}
MODULES: Final = {name: module for part in SECTIONS.values() for name, module in part.items()}

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 128 + signal.SIGINT


class _Commands(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in MODULES:
            return None
        command = getattr(importlib.import_module(MODULES[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                if command is not None:
                    rows.append((name, command.get_short_help_str(limit=70)))
            with formatter.section(title):
                formatter.write_dl(rows)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run one command line; exits the process unless `standalone_mode` is off."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except PkgindexError as error:
            _stop(str(error), error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "pkgindex"
            _stop(f"{error.format_message().rstrip('.')}; see {path} --help", USAGE_ERROR)
        except click.ClickException as error:
            _stop(error.format_message(), error.exit_code)
        except click.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> NoReturn:
    click.echo(f"pkgindex: {message}", err=True)
    sys.exit(code)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  pkgindex serve                        keep an index in ./pkgindex-data, on port 8080
  pkgindex index emacs elisp gtk+       emacs depends on elisp and gtk+
  pkgindex query emacs && echo is there
  pkgindex load /var/lib/apt/lists/*_Packages*

\b
The protocol is plain text:
  printf 'INDEX|elisp|\\nQUERY|elisp|\\n' | nc -N 127.0.0.1 8080

`pkgindex COMMAND --help` tells more of each.""",
)
@click.version_option(__version__, prog_name="pkgindex", message="%(prog)s %(version)s")
def main() -> None:
    """Keep a durable index of packages and of what they depend on.

    A package enters the index only after all its dependencies, and leaves it only when nothing
    depends on it any more.
    """
