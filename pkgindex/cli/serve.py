"""`pkgindex serve`: the table of options as flags, then `server.run`.

The flags, their sections and their help are made from the rows of `config.Settings`; nothing about
an option is said here a second time.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from pkgindex import config, log
from pkgindex.errors import ConfigError, PkgindexError

__all__ = ["serve"]


class _BySection(click.Command):
    """A command whose help has its options in the sections of the table."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        section_of = {option.name: option.section for option in config.OPTIONS}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                sections.setdefault(section_of.get(param.name or "", "Other"), []).append(row)
        # One column for all sections: the first row of each is as wide as the widest of all.
        widest = max(len(flag) for rows in sections.values() for flag, _ in rows)
        for title, ((flag, text), *rest) in sections.items():
            with formatter.section(title):
                formatter.write_dl([(flag.ljust(widest), text), *rest])


def _flags(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command every option of the table as a flag; one not given is absent or None."""
    for option in reversed(config.OPTIONS):
        kind = option.kind
        form: dict[str, Any] = {"metavar": kind.metavar}
        if kind is config.SWITCH:
            form = {"is_flag": True, "default": None}
        elif kind is config.LISTENERS:
            form["multiple"] = True
        text = option.help
        if kind is not config.SWITCH:
            text = f"{text}  [{option.shown_default}]"
        command = click.option(f"--{option.key}", option.name, help=text, **form)(command)
    return command


@click.command(
    cls=_BySection,
    short_help="Run the server.",
    epilog="""\b
Each option is also an environment variable (PKGINDEX_MAX_LINE for --max-line)
and a key of the file (max-line = "1m"). A flag beats the environment, which
beats the file. Sizes take k, m and g behind the number.

\b
Signals:
  TERM, INT  answer what was received, write what is unwritten, exit 0;
             a second one stops at once and loses nothing acknowledged
  HUP        read the log level again from the file, and the files of TLS
  USR1       log the counters

\b
Exit codes:
  0  stopped as asked
  2  usage or configuration
  3  the store is owned or out of reach, or an address is not to be had
  4  the store is damaged, or of an unknown format
  5  the storage failed while running

\b
Examples:
  pkgindex serve
  pkgindex serve --store file:/srv/pkgindex --listen :8080
  pkgindex serve --store memory: --listen 127.0.0.1:0 --listen unix:./socket
  pkgindex serve --listen :8080,read-only --listen unix:./socket,mode=0600
  pkgindex serve --listen :8443,tls,allow=192.0.2.0/24 --tls-cert server.pem
  PKGINDEX_MAX_LINE=64k pkgindex serve --config serve.toml --check-config""",
)
@_flags
@click.option(
    "--config",
    "file",
    metavar="FILE.toml",
    help="Read settings from a file.  [PKGINDEX_CONFIG]",
)
@click.option(
    "--check-config",
    is_flag=True,
    help="Check the settings, show each with where it came from, and exit.",
)
def serve(file: str | None, check_config: bool, **given: Any) -> int:
    """Serve an index on port 8080 until a signal ends it.

    Every change that was answered OK is on stable storage. With nothing given, the index is kept in
    ./pkgindex-data and only this machine can connect.
    """
    flags = {name: value for name, value in given.items() if value not in (None, ())}
    found = config.gather(flags, file=file)
    settings = config.Settings(**{name: one.value for name, one in found.items()})
    if check_config:
        from pkgindex.listeners import Tls

        Tls.of(settings)
        click.echo(config.show(found))
        return 0
    reread = partial(_read_log_level_again, flags, file)
    _hold_standard_descriptors()
    log.configure(settings.log_level, settings.log_format)
    # Before the server starts: a hangup during a long recovery must not end it.
    signal.signal(signal.SIGHUP, lambda *_: reread())

    from pkgindex import server, supervisor
    from pkgindex.cli.progress import bar

    try:
        if settings.workers > 1:
            return supervisor.run(settings, bar, reread)
        return server.run(settings, bar, reread)
    except PkgindexError as error:
        # Not by the interpreter's usual end, which takes longer than all the rest of a start that fails.
        click.echo(f"pkgindex: {error}", err=True)
        os._exit(error.exit_code)


def _read_log_level_again(flags: dict[str, Any], file: str | Path | None) -> None:
    logger = log.get_logger()
    try:
        level = config.load(flags, file=file).log_level
    except ConfigError as error:
        logger.error("configuration not read again", reason=str(error))
        return
    log.set_level(level)
    logger.info("configuration read again", log_level=level)


def _hold_standard_descriptors() -> None:
    """Make sure that descriptors 0 to 2 are open, if only on /dev/null.

    Started with one closed, the process would get that number for its next file: the journal could
    become descriptor 2, and whatever writes to standard error would write into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
