"""Servers that are wrong on purpose: the product with one mistake, each for a campaign that must see it.

    python -m tests.torture.mutants acknowledges-first serve --store …

is `pkgindex serve --store …` with that mistake. A campaign that lets one pass proves nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.servers import PATIENCE, Server

__all__ = ["MUTANTS", "Mutant"]


class Mutant(Server):
    """A server with a mistake, by name; the empty name is the product as it is."""

    def __init__(
        self,
        name: str,
        store: str,
        *options: str,
        log_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(
            store, *options, log_file=log_file, environment=environment, patience=patience
        )
        if name:
            at = self._command.index("pkgindex")
            self._command[at : at + 1] = ["tests.torture.mutants", name]


def part(name: str) -> Any:
    """Return a module or a class of the product, to be changed."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(f"pkgindex.{module}")
    return getattr(found, attribute) if attribute else found


def acknowledges_first() -> None:
    """A change is acknowledged at once, and given to the journal a little later."""

    def commit(self: Any) -> None:
        self._scheduled = False
        if self._committing or self._commit_failed:
            return
        ticket, lines, number = self._graph.seal()
        batch = memoryview(bytes(lines)), number, self._graph.changes - number + 1
        self._committing = True
        if self._quiet:
            self._quiet.clear()
        self.settled = ticket
        self._tell_settled()
        self._loop.call_later(0.02, self._journal.submit, *batch)

    part("index.file:FileIndex")._commit = commit


def forgets_the_last_change() -> None:
    """A recovery does not replay the last line of the journal's last batch."""
    recovery = part("store.recovery")
    replay_lines = recovery.replay_lines

    def short(*arguments: Any) -> Any:
        parts, *rest = replay_lines(*arguments)
        if parts:
            first, count, lines = parts[-1]
            parts[-1] = first, count, b"".join(lines.splitlines(keepends=True)[:-1])
        return parts, *rest

    recovery.replay_lines = short


def drops_the_journal_first() -> None:
    """A round takes the journal's old segments away before it has written the files."""
    behind = part("store.packages:WriteBehind")
    write = behind._write

    def early(self: Any, pieces: Any) -> Any:
        self._journal.written = self._graph.changes
        self._journal.rotate()
        self._journal.drop_covered()
        time.sleep(0.02)
        return write(self, pieces)

    behind._write = early


class _WallClockLoop:
    """An event loop that tells the time by the clock that somebody may set."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def time(self) -> float:
        return time.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


def measures_by_the_wall_clock() -> None:
    """How long a client has said nothing is measured by the clock that somebody may set."""
    server = part("server")
    hub = server.Hub
    server.Hub = lambda loop, *rest: hub(_WallClockLoop(loop), *rest)


def numbers_reigns_by_the_clock() -> None:
    """A writer's epoch is the time at which it claimed."""
    part("store.claim").highest_epoch = lambda mount: int(time.time())


def leaks() -> None:
    """Something of every commit is never let go, and something that every round opens never closed."""
    index, behind = part("index.file:FileIndex"), part("store.packages:WriteBehind")
    committed, run_round = index._committed, behind._round
    kept = []

    def keep_memory(self: Any) -> None:
        kept.append(bytearray(b"x" * 32768))
        committed(self)

    def keep_descriptor(self: Any) -> Any:
        os.dup(2)
        return run_round(self)

    index._committed, behind._round = keep_memory, keep_descriptor


MUTANTS: dict[str, Callable[[], None]] = {
    "acknowledges-first": acknowledges_first,
    "forgets-the-last-change": forgets_the_last_change,
    "drops-the-journal-first": drops_the_journal_first,
    "measures-by-the-wall-clock": measures_by_the_wall_clock,
    "numbers-reigns-by-the-clock": numbers_reigns_by_the_clock,
    "leaks": leaks,
}


if __name__ == "__main__":
    from pkgindex.cli import main

    MUTANTS[sys.argv[1]]()
    main(sys.argv[2:], prog_name="pkgindex")
