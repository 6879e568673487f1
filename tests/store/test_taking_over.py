"""A follower becomes the writer over its own graph (rule F1), as well as one that reads everything."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pkgindex._core import Graph
from pkgindex.cluster.blocking import Blocking
from pkgindex.cluster.feed import Backlog
from pkgindex.config import Settings
from pkgindex.store import packages
from pkgindex.store.check import check
from pkgindex.store.claim import Claim
from pkgindex.store.mount import Mount
from pkgindex.store.offline import Offline
from tests.store.writer import PATIENCE, Writer, index_of, made

NAMES = [f"p{n}" for n in range(9)]
MEMBERS = range(3)

#: Thousands of syncs: in memory, where that can be had.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

ORIGIN = "7" * 32

Change = tuple[int, int, bytes]

messages = st.builds(
    lambda command, name, needed: f"{command}|{name}|{','.join(needed)}",
    st.sampled_from(["INDEX", "INDEX", "REMOVE"]),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(NAMES), max_size=3),
)


class Follower:
    """A graph that applies what it is streamed, and how far it has come."""

    def __init__(self, writer: Writer) -> None:
        """Take a snapshot in slices."""
        self.graph = Graph(journalled=True)
        self.change = writer.graph.changes
        self.backlog = Backlog()
        after = 0
        while True:
            lines, _, after = writer.graph.walk(after, 40, 2)
            self.graph.replay(lines, track=False)
            if not after:
                break

    def apply(self, batch: Change) -> None:
        first, count, lines = batch
        assert first <= self.change + 1
        if first + count - 1 > self.change:
            self.graph.replay(lines, track=False, notes=[])
            self.backlog.add(*batch)
            self.change = first + count - 1


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    return Mount(str(tmp_path / "index"))


def claimed(mount: Mount) -> tuple[Claim, float]:
    """Claim the store as a member does: the claim, and from which change on its own graph will do."""
    return Blocking(mount, made(mount), Settings(), "0" * 32).claim()


def test_a_graph_that_lacks_what_only_package_files_have_is_not_taken_over(mount: Mount) -> None:
    """The first head of a reign has what package files lacked, and not all that came before."""
    with Writer(mount) as writer:
        behind = Follower(writer)
        writer.ask("INDEX|a|", "INDEX|b|")
        writer.write_files()
        there = Follower(writer)
    Writer(mount).stop()  # one that has read these, and has nothing to add
    _, base = claimed(mount)
    assert behind.change < base <= there.change


class Takeovers(RuleBasedStateMachine):
    """One writer after the other on one store; the others follow, some of them behind."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="takeovers-", dir=MEMORY))
        self.mount = Mount(str(self.root))
        self.writer: Any = Writer(self.mount)
        self.followers = {member: Follower(self.writer) for member in MEMBERS}
        self.backlog = Backlog()
        self.durable: dict[str, list[str]] = {}
        self.notes = 0

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.stop()
            with Offline(str(self.root)) as offline:
                report = check(offline)
            shutil.rmtree(self.root)
            assert report.is_sound, report

    def stop(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.stop()

    # --- the writer -------------------------------------------------------------------------------

    @rule(lines=st.lists(messages, min_size=1, max_size=6))
    def change(self, lines: list[str]) -> None:
        """Commit changes, with a note of whose they were, as a batch has."""
        graph = self.writer.graph
        self.writer.apply(*lines)
        changes = graph.redo_bytes > 0
        if changes:
            self.notes += 1
            graph.note(b"@%b %d O\n" % (ORIGIN.encode(), self.notes))
        batch = self.writer.commit()
        if changes:
            self.writer.journal.origins.record(ORIGIN, self.notes, "O")
            self.backlog.add(*batch)
        self.durable = self.writer.index

    @rule()
    def write_files(self) -> None:
        self.writer.write_files()

    @rule(
        lines=st.lists(messages, min_size=1, max_size=4), pieces=st.integers(0, 6), data=st.data()
    )
    def die_in_a_round(self, lines: list[str], pieces: int, data: st.DataObject) -> None:
        """Some files are written and some are not, and the last commit was never synced."""
        behind = self.writer.write_behind()
        calls = iter([False] * pieces)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(packages, "FILES_AT_ONCE", 1)
            patched.setattr(packages, "PIECE_PACKAGES", 1)
            patched.setattr(behind, "_late", lambda: next(calls, True))
            behind.start()
            behind.stop(0.0)
            behind.join(PATIENCE)
        assert behind.last_error is None
        self.writer.apply(*lines)
        self.become(data.draw(st.sampled_from([None, *sorted(self.followers)])))

    # --- followers --------------------------------------------------------------------------------

    @rule(member=st.sampled_from(MEMBERS))
    def join(self, member: int) -> None:
        self.followers[member] = Follower(self.writer)

    @precondition(lambda self: self.followers)
    @rule(data=st.data(), count=st.integers(1, 3))
    def catch_up(self, data: st.DataObject, count: int) -> None:
        """Apply the next batches, or take a snapshot where they are not kept any more."""
        member = data.draw(st.sampled_from(sorted(self.followers)))
        follower = self.followers[member]
        batches = self.backlog.after(follower.change, self.writer.graph.changes)
        if batches is None:
            self.followers[member] = Follower(self.writer)
            return
        for batch in batches[:count]:
            follower.apply(batch)
        if count >= len(batches):
            assert index_of(follower.graph) == self.durable

    # --- takeovers --------------------------------------------------------------------------------

    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        self.become(data.draw(st.sampled_from([None, *sorted(self.followers)])))

    def become(self, member: int | None) -> None:
        """The writer dies, and another claims: over its own graph if it may (F1)."""
        follower = None if member is None else self.followers.pop(member)
        self.stop()
        mine, base = claimed(self.mount)
        own, backlog = None, Backlog()
        if follower is not None and base <= follower.change:
            note(f"own graph at {follower.change}, journal from {base}")
            own, backlog = follower.graph, follower.backlog
        self.writer = Writer(self.mount, mine, graph=own)
        for batch in self.writer.batches:
            backlog.add(*batch)
        self.backlog = backlog
        self.writer.graph.verify()
        assert self.writer.index == self.durable
        assert self.writer.graph.dangling(1) == []
        assert self.writer.journal.origins.mark(ORIGIN) == self.notes


TestTakeovers = Takeovers.TestCase
TestTakeovers.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
