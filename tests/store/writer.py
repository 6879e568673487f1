"""A writer without its server: the parts of `file:` driven step by step, in the test's own thread.

    with Writer(root) as writer:
        assert writer.ask("INDEX|a|") == ["OK"]
        writer.write_files()

Nothing of it runs between two calls, so a test pauses it by not calling it, and kills it by leaving
it. It takes no lock: those are a process's, and here several writers share one. What goes wrong is
raised as it comes: OSError or Withdrawn.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Self

from pkgindex._core import Batch, Graph
from pkgindex.store import format as store_format
from pkgindex.store.claim import Claim, claim
from pkgindex.store.journal import Journal
from pkgindex.store.mount import Mount
from pkgindex.store.packages import WriteBehind
from pkgindex.store.recovery import recover

PATIENCE = 30.0


def made(mount: Mount) -> store_format.Format:
    """Return the store's FORMAT, made if there is none, with its folders."""
    return store_format.opened(mount, insist=False)


class Writer:
    """One reign: claimed, recovered and ready when it is made."""

    def __init__(
        self,
        root: Path | Mount,
        mine: Claim | None = None,
        *,
        rebuild: bool = False,
        graph: Graph | None = None,
    ) -> None:
        """`graph`: a follower's own, which the journal continues without a gap."""
        self.mount = root if isinstance(root, Mount) else Mount(str(root))
        self.format = made(self.mount)
        self.claim = mine or claim(self.mount, None)
        recovered = recover(self.mount, self.format, self.claim, rebuild=rebuild, graph=graph)
        self.batches = recovered.batches
        self.graph = recovered.graph
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        self.journal = Journal(self.mount, self.claim, self.graph.owed_lines, self.event)
        recovered.open(self.journal)

    @property
    def epoch(self) -> int:
        return self.claim.epoch

    @property
    def index(self) -> dict[str, list[str]]:
        """The index, as this writer knows it."""
        return index_of(self.graph)

    def apply(self, *lines: str) -> list[str]:
        """Apply messages and give their replies, which nobody may be told before commit()."""
        data = bytearray("".join(line + "\n" for line in lines).encode())
        batch = Batch()
        batch.load(data, 0, len(data), len(lines))
        answers = self.graph.apply(batch)
        pieces = [answers] if isinstance(answers, bytes) else [replies for _, replies, _ in answers]
        return b"".join(pieces).decode().split()

    def commit(self) -> tuple[int, int, bytes]:
        """Commit what was applied; its first change, their number, its redo lines.

        OSError if it is not durable and proven."""
        ticket, lines, number = self.graph.seal()
        first = self.graph.changes - number + 1
        self.journal.submit(lines, number, first)
        deadline = time.monotonic() + PATIENCE
        while not self.journal.completed():
            assert time.monotonic() < deadline, "the commit does not end"
            time.sleep(0.0005)
        self.graph.settle(ticket)
        return first, number, bytes(lines)

    def ask(self, *lines: str) -> list[str]:
        """Give the replies of messages once they may be given."""
        replies = self.apply(*lines)
        if self.graph.asked:
            self.commit()
        return replies

    def write_files(self) -> None:
        """One round, to its end, and the removal of what earlier writers left."""
        behind = self.write_behind()
        behind.start()
        behind.stop(math.inf)
        behind.join(PATIENCE)
        if behind.last_error is not None:
            raise behind.last_error

    def write_behind(self) -> WriteBehind:
        """What writes package files, not started; it knows what is settled."""
        behind = WriteBehind(
            self.mount,
            self.claim.staging,
            self.format.shards,
            self.graph,
            self.journal,
            lambda error: None,
        )
        behind.settled(self.graph.settled)
        return behind

    def stop(self) -> None:
        """Let go of everything, as a killed process would: nothing more is written."""
        self.journal.stop(PATIENCE)
        os.close(self.event)
        self.claim.staging.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def index_of(graph: Graph) -> dict[str, list[str]]:
    """Return every package with its dependencies."""
    return {package: graph.dependencies(package) for package in graph}


def recovered_index(root: Path | Mount) -> dict[str, list[str]]:
    """Claim the store, read it as its next writer would, and go without writing anything."""
    mount = root if isinstance(root, Mount) else Mount(str(root))
    mine = claim(mount, None)
    try:
        return index_of(recover(mount, made(mount), mine).graph)
    finally:
        mine.staging.close()
