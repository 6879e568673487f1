"""Servers that are wrong about who may write: each breaks one rule of the store's protocol.

    python -m tests.torture.unfenced fences-nothing serve --store …

is `pkgindex serve --store …` with that mistake, for the campaigns of two_writers.py, which must see it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.mutants import part

__all__ = ["MUTANTS"]


def fences_nothing() -> None:
    """C2: the writer before is not deposed."""
    part("store.claim")._fence = lambda mount, mine: None


def trusts_the_lock() -> None:
    """L1: whoever has got the lock believes that nobody else writes, and fences nobody."""
    index, claims = part("index.file"), part("store.claim")
    claim, fence = index._claim, claims._fence

    def trusting(mount: Any, lease: Any, *, takeover: bool) -> Any:
        claims._fence = fence if takeover else lambda mount, mine: None
        return claim(mount, lease, takeover=takeover)

    index._claim = trusting


def proves_nothing() -> None:
    """W2: the proof is a rename that nobody can make fail."""
    journals = part("store.journal")
    committer = journals.Committer

    class Proofless(committer):  # type: ignore[misc, valid-type]
        """Proves in a folder of its own."""

        def __new__(cls, staging: int, *others: Any) -> Any:
            beside = Path(f"/proc/self/fd/{staging}").readlink().parents[2]
            aside = tempfile.mkdtemp(dir=beside)
            fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
            made = super().__new__(cls, fd, *others)
            made.aside = aside
            return made

        def continue_in(self, *arguments: Any) -> Any:
            if arguments[-1] is not None:
                with open(os.path.join(self.aside, arguments[-1]), "x"):  # noqa: PTH123, PTH118
                    pass
            return super().continue_in(*arguments)

    journals.Committer = Proofless


def answers_without_a_proof() -> None:
    """W3: what changes nothing is answered from memory."""
    index = part("index.file:FileIndex")
    commit = index._commit

    def quick(self: Any, *put_off: Any) -> None:
        if self._graph.redo_bytes or self._committing or self._commit_failed:
            commit(self, *put_off)
            return
        self._scheduled = False
        ticket, _, _ = self._graph.seal()
        self._graph.settle(ticket)
        self.settled = ticket
        self._tell_settled()

    index._commit = quick


def publishes_from_elsewhere() -> None:
    """W1: package files are renamed from a folder that nobody takes away."""
    packages = part("store.packages")
    behind = packages.WriteBehind
    init = behind.__init__

    def elsewhere(self: Any, mount: Any, staging: Any, *rest: Any) -> None:
        aside = tempfile.mkdtemp(dir=os.path.dirname(mount.root))  # noqa: PTH120
        fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
        init(self, mount, type(staging)(mount, staging.epoch, fd), *rest)

    behind.__init__ = elsewhere


def removes_in_place() -> None:
    """W1: segments are unlinked where they are, by their path."""
    journal = part("store.journal:Journal")

    def drop(self: Any, epoch: int, number: int) -> None:
        name = part("store.journal").segment_name(epoch, number)
        os.unlink(self._mount.path("journal", name))  # noqa: PTH108
        self._mount.sync_removal("journal", name)

    journal._drop = drop


def believes_sizes() -> None:
    """C3: how far the journal was proven is not asked; it ends where the client says it ends."""
    recovery = part("store.recovery")
    load = recovery.load_journal
    recovery.load_journal = lambda mount, graph, proven, *rest, **more: load(
        mount, graph, {}, *rest, **more
    )


def believes_at_once() -> None:
    """C3, C4: what is short or missing is damage at once, for no cache is thought of."""
    part("store.recovery").PATIENCE_SECONDS = -1.0


def carries_nothing() -> None:
    """C6: what was replayed is not carried by the new writer's own journal."""
    journal = part("store.journal:Journal")
    begin = journal.open
    journal.open = lambda self, lines, next_change, *_: begin(self, b"", next_change)


def cries_damage() -> None:
    """C8: a claimant that finds gaps does not ask whether it has been fenced itself."""
    part("store.recovery").prove = lambda mine: None


MUTANTS: dict[str, Callable[[], None]] = {
    "fences-nothing": fences_nothing,
    "trusts-the-lock": trusts_the_lock,
    "proves-nothing": proves_nothing,
    "answers-without-a-proof": answers_without_a_proof,
    "publishes-from-elsewhere": publishes_from_elsewhere,
    "removes-in-place": removes_in_place,
    "believes-sizes": believes_sizes,
    "believes-at-once": believes_at_once,
    "carries-nothing": carries_nothing,
    "cries-damage": cries_damage,
}

if __name__ == "__main__":
    from pkgindex.cli import main

    MUTANTS[sys.argv[1]]()
    main(sys.argv[2:], prog_name="pkgindex")
