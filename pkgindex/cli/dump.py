"""`pkgindex dump`: the whole index of a stopped store, as JSON lines."""

import json
import os
import sys

import click

from pkgindex.cli.store import STORE, opened
from pkgindex.errors import StoreDamaged

__all__ = ["dump"]

LINES_AT_ONCE = 10_000


@click.command(
    short_help="Write a stopped store's index as JSON lines.",
    epilog="""\b
Exit codes:
  0  all of it was written
  2  the store is in use, damaged, or cannot be read

\b
Examples:
  pkgindex dump > index.jsonl
  pkgindex dump /srv/pkgindex | pkgindex load --server other:8080 -""",
)
@STORE
def dump(store: str) -> int:
    """Write the whole index to standard output, a line for each package, sorted by name:

    \b
      {"name": "wget", "depends": ["gettext", "libidn2"]}

    STORE is a folder or a URL (file:PATH); the server on it must be stopped. `pkgindex load` reads
    these lines, cycles and packages that depend on themselves included.
    """
    with opened(store) as (offline, progress):
        contents = offline.read(progress("reading"))
        if contents.problems:
            raise StoreDamaged(f"{offline.mount.root}: {contents.problems[0]}; see pkgindex check")
        graph = contents.graph
        lines = []
        try:
            for name in sorted(graph):
                lines.append(json.dumps({"name": name, "depends": graph.dependencies(name)}) + "\n")
                if len(lines) == LINES_AT_ONCE:
                    sys.stdout.write("".join(lines))
                    lines.clear()
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader had enough. Nothing more may be flushed into the pipe at the interpreter's end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0
