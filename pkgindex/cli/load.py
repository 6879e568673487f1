"""`pkgindex load`: reads package lists, loads them into a server, and shows what became of them."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pkgindex.cli.client import Server, server_options
from pkgindex.cli.progress import bar
from pkgindex.errors import ClientError

if TYPE_CHECKING:
    from pkgindex.load.loader import Report

__all__ = ["load"]

# The keys of pkgindex.load.formats.FORMATS, which is too slow to import for a page of help.
FORMATS = ("homebrew", "debian", "jsonlines")
# Failures that the table names: as many as one sees without scrolling. --verbose names all.
SHOWN = 10


@click.command(
    short_help="Load package lists, dependencies first.",
    epilog="""\b
Formats, told by what a file begins with, else by its name:
  homebrew   a line a package:  emacs: elisp gtk+
  debian     an archive's Packages file; Depends and Pre-Depends count
  jsonlines  a line a package:  {"name": "emacs", "depends": ["elisp"]}
Each may be compressed with gzip, xz, zstd or lz4.

\b
For Debian, of alternatives the first counts that the input has, as a package
or by a package that provides it; a virtual name stands for its provider whose
name sorts first; of several versions the newest counts.

\b
Exit codes:
  0  everything is indexed
  1  some packages failed; the table says which and why
  2  an input is broken, or the server could not be reached or was lost

\b
Examples:
  pkgindex load /var/lib/apt/lists/*_Packages*
  pkgindex load --missing add brew-dependencies.txt
  pkgindex dump file:./old-data | pkgindex load -
""",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    help="The format of all inputs, if not to be told from each.",
)
@click.option(
    "--missing",
    type=click.Choice(("fail", "add")),
    default="fail",
    show_default=True,
    help="What a dependency does that neither the inputs nor the server has:"
    " fail those that need it, or be added, without dependencies.",
)
@click.option("--verbose", "-v", is_flag=True, help="Name every failed and added package.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@server_options
def load(
    files: tuple[str, ...],
    format_name: str | None,
    missing: str,
    verbose: bool,
    as_json: bool,
    server: Server,
) -> int:
    """Load the packages of each FILE into a server; "-" is standard input.

    Every package is indexed after those that it depends on, and packages that depend on each other
    are loaded too. Nothing is sent before all inputs are read. What the server has besides stays
    as it is, and the same load can be repeated at any time.
    """
    try:
        from pkgindex.load import formats, loader
    except ModuleNotFoundError as error:
        raise ClientError(
            f"load needs the Python package {error.name}: pip install 'pkgindex[load]'"
        ) from error
    # Millions of objects that all live to the end: looking for garbage among them is in vain.
    gc.disable()
    began = time.monotonic()
    # Before the inputs are read: a wrong address should not take that long to show.
    with server.client() as client, bar() as progress:
        show_read, size, done = _unhurried(progress("reading")), _size(files), 0

        def on_read(count: int) -> None:
            nonlocal done
            done += count
            show_read(done, max(size, done))

        packages = formats.read(files, format_name, on_read)
        read = time.monotonic()
        show_sent = _unhurried(progress("loading"))
        report = loader.load(
            packages,
            client,
            add_missing=missing == "add",
            progress=lambda answered: show_sent(answered, len(packages)),
        )
    seconds = {"reading": read - began, "loading": time.monotonic() - read}
    (_print_json if as_json else _print_tables)(report, seconds, verbose)
    return 1 if report.failed else 0


def _unhurried(show: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """The same, but at most ten times a second: drawing takes time, too."""
    shown = 0.0

    def show_sometimes(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 0.1:
            shown = now
            show(done, total)

    return show_sometimes


def _size(files: tuple[str, ...]) -> int:
    """The bytes of all files, as far as one can know them before they are read."""
    size = 0
    for file in files:
        with suppress(OSError):
            size += Path(file).stat().st_size
    return size


def _print_json(report: Report, seconds: dict[str, float], _verbose: bool) -> None:
    outcome = {
        "packages": report.packages,
        "indexed": report.indexed,
        "failed": report.failed,
        "added": report.added,
        "cycles": report.cycles,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    click.echo(json.dumps(outcome))


def _print_tables(report: Report, seconds: dict[str, float], verbose: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    outcome = Table(box=box.SIMPLE, show_header=False)
    outcome.add_column(style="bold")
    outcome.add_column(justify="right")
    outcome.add_column(overflow="fold")
    outcome.add_row("read", f"{report.packages:,}", f"in {seconds['reading']:.1f} s")
    outcome.add_row("indexed", f"{report.indexed:,}", f"in {seconds['loading']:.1f} s")
    if report.cycles:
        largest = max(map(len, report.cycles))
        outcome.add_row("cycles", f"{len(report.cycles):,}", f"of up to {largest:,} packages")
    if report.added:
        outcome.add_row("added", f"{len(report.added):,}", _some(report.added, verbose))
    outcome.add_row("failed", f"{len(report.failed):,}")
    console.print(outcome)
    if not report.failed:
        return
    failures = Table("failed", "why", box=box.SIMPLE)
    failures.columns[0].overflow = failures.columns[1].overflow = "fold"
    for name, reason in list(report.failed.items())[: None if verbose else SHOWN]:
        failures.add_row(_printable(name), _printable(reason))
    console.print(failures)
    if not verbose and len(report.failed) > SHOWN:
        console.print(f"  and {len(report.failed) - SHOWN:,} more; --verbose names all of them")


def _some(names: list[str], verbose: bool) -> str:
    shown = names if verbose else names[:SHOWN]
    return _printable(", ".join(shown) + (", …" if len(shown) < len(names) else ""))


def _printable(text: str) -> str:
    """The text without control characters, undecodable bytes, and what rich takes for markup."""
    from rich.markup import escape

    return escape(
        "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )
