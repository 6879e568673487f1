"""Any sequence of messages, commits, rounds and crashes: the core does what the dict model does."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pkgindex._core import Graph
from tests.core.talk import (
    Contents,
    expected_contents,
    forward_lines,
    packages,
    pieces,
    put,
)
from tests.reference import MESSAGE, OK, Model

#: Few enough that they meet; one as long as names may be, two that differ in the last byte.
NAMES = [b"a", b"b", b"c", b"d", b"e", b"libstdc++6", b"libstdc++7", b"n" * 255]

names = st.sampled_from(NAMES)
dependencies = st.lists(names, max_size=4).map(b",".join)
messages = st.one_of(
    st.builds(b"INDEX|%b|%b".__mod__, st.tuples(names, dependencies)),
    st.builds(b"INDEX|%b|".__mod__, names),
    st.builds(b"REMOVE|%b|".__mod__, names),
    st.builds(b"QUERY|%b|".__mod__, names),
    st.sampled_from([b"", b"LIZARD", b"INDEX|a|b,", b"QUERY|a", b"REMOVE||"]),
)


class Writer(RuleBasedStateMachine):
    """A graph beside the model, the files and journal segments of a disk, and what each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph(journalled=True)
        self.model = Model()
        self.settled = 0
        self.rests: dict[bytes, int] = {}  # the ticket of each package's last coming or going
        self.sealed: tuple[int, bytes, list[bytes]] | None = None  # and the segment it goes to
        self.durable: dict[bytes, frozenset[bytes]] = {}  # the model as of the last settled commit
        self.as_sealed: dict[bytes, frozenset[bytes]] = {}
        self.contents: Contents = {}
        self.rendered: list[tuple[int, bytes]] = []  # (ticket it rests on, records) to be written
        self.segments: list[list[bytes]] = [[]]
        self.covers: int | None = None  # segments that the round under way will take away

    # --- messages ---------------------------------------------------------------------------------

    @rule(lines=st.lists(messages, min_size=1, max_size=40))
    def messages(self, lines: list[bytes]) -> None:
        expected = []
        resting = 0
        changes = 0
        for line in lines:
            before = self.model.packages.keys() & NAMES
            reply = self.model.apply(line)
            message = MESSAGE.fullmatch(line)
            if message and message[1] == b"QUERY":
                need = self.rests.get(message[2], 0)
            elif message:
                need = self.graph.ticket
                changes += 1
            else:
                need = 0
            for name in before ^ (self.model.packages.keys() & NAMES):
                self.rests[name] = self.graph.ticket
            resting = max(resting, need if need > self.settled else 0)
            expected.append((resting, reply))
        answers = pieces(self.graph, b"".join(line + b"\n" for line in lines))
        got = [(t, reply) for t, part, _ in answers for reply in part.splitlines(keepends=True)]
        assert got == expected
        assert sum(count for _, _, count in answers) == changes
        assert [ticket for ticket, _, _ in answers] == sorted({t for t, _, _ in answers})
        assert self.graph.asked or not changes

    # --- commits ----------------------------------------------------------------------------------

    @precondition(lambda self: self.sealed is None)
    @rule()
    def seal(self) -> None:
        ticket, lines, number = self.graph.seal()
        assert bytes(lines).count(b"\n") == number
        self.sealed = ticket, bytes(lines), self.segments[-1]
        self.as_sealed = dict(self.model.packages)
        assert not self.graph.asked
        assert self.graph.redo_bytes == 0

    @precondition(lambda self: self.sealed is not None)
    @rule()
    def settle(self) -> None:
        assert self.sealed is not None
        self.settled, lines, segment = self.sealed
        self.graph.settle(self.settled)
        self.sealed = None
        segment.append(lines)
        self.durable = self.as_sealed
        while self.rendered and self.rendered[0][0] <= self.settled:
            put(self.contents, self.rendered.pop(0)[1])

    # --- rounds -----------------------------------------------------------------------------------

    @precondition(lambda self: self.covers is None)
    @rule()
    def begin_round(self) -> None:
        self.covers = len(self.segments)
        self.segments.append([])
        assert self.graph.take_dirty() == self.graph.taken

    @precondition(lambda self: self.graph.taken)
    @rule(limit=st.integers(1, 200), count=st.integers(1, 8))
    def render(self, limit: int, count: int) -> None:
        records = self.graph.render(limit, count)
        rests_on = self.graph.ticket - (0 if self.graph.redo_bytes else 1)
        if rests_on <= self.settled:
            put(self.contents, records)
        else:
            self.rendered.append((rests_on, records))

    @precondition(
        lambda self: self.covers is not None and not self.graph.taken and not self.rendered
    )
    @rule()
    def end_round(self) -> None:
        assert self.graph.render(1, 1) is None
        del self.segments[: self.covers]
        self.covers = None

    # --- the crash --------------------------------------------------------------------------------

    @rule()
    def crash(self) -> None:
        """What was not settled is lost with the process; a new one reads the disk."""
        self.graph = Graph(journalled=True)
        self.graph.replay(forward_lines(self.contents), track=False)
        for lines in itertools.chain(*self.segments):
            self.graph.replay(lines)
        self.model.packages = dict(self.durable)
        assert packages(self.graph) == self.durable
        assert self.graph.dangling() == []
        self.check_what_is_dirty()
        self.segments = [[self.graph.effect()]]
        self.sealed = None
        self.rendered = []
        self.covers = None
        self.settled = 0
        self.rests = {}

    @precondition(lambda self: not self.graph.taken and not self.rendered)
    @rule()
    def read_back_from_the_net_effect(self) -> None:
        """The files and effect() alone give this graph (rule C6)."""
        other = Graph(journalled=True)
        other.replay(forward_lines(self.contents), track=False)
        other.replay(self.graph.effect())
        assert packages(other) == packages(self.graph)
        other.verify()
        self.check_what_is_dirty()

    def check_what_is_dirty(self) -> None:
        """Every file that is not as it should be is known to lag behind."""
        expected = expected_contents(self.model)
        wrong = {
            key
            for key in self.contents.keys() | expected.keys()
            if self.contents.get(key) != expected.get(key)
        }
        dirty = {("forward", name.encode()) for name in self.graph.dirty_packages()}
        dirty |= {("reverse", name.encode()) for name in self.graph.dirty_reverses()}
        assert wrong <= dirty

    # --- always -----------------------------------------------------------------------------------

    @initialize()
    def empty(self) -> None:
        assert len(self.graph) == 0

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        self.graph.verify()
        assert packages(self.graph) == self.model.packages
        assert len(self.graph) == len(self.model.packages)
        for name in NAMES:
            assert (name.decode() in self.graph) == (name in self.model.packages)
            dependents = {n for n, needed in self.model.packages.items() if name in needed}
            assert {n.encode() for n in self.graph.dependents(name.decode())} == dependents

    @invariant()
    def forgets_the_names_that_nothing_needs(self) -> None:
        quiet = self.sealed is None and not self.graph.redo_bytes
        if quiet and not self.graph.taken and not self.graph.dirty and not self.rendered:
            assert self.graph.stats()["names"] == len(self.model.packages)
            assert self.contents == expected_contents(self.model)


TestWriter = Writer.TestCase
TestWriter.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Keeper(RuleBasedStateMachine):
    """A graph that is not journalled: every answer may go at once, nothing is kept for files."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.model = Model()

    @rule(lines=st.lists(messages, min_size=1, max_size=40))
    def messages(self, lines: list[bytes]) -> None:
        ((ticket, replies, _),) = pieces(self.graph, b"".join(line + b"\n" for line in lines))
        assert ticket == 0
        assert replies == b"".join(self.model.apply(line) for line in lines)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        self.graph.verify()
        assert packages(self.graph) == self.model.packages
        assert self.graph.stats()["names"] == len(self.model.packages)


TestKeeper = Keeper.TestCase
TestKeeper.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_the_model_and_the_core_agree_that_a_package_may_need_itself() -> None:
    graph, model = Graph(), Model()
    for line in (b"INDEX|a|a", b"INDEX|a|", b"INDEX|a|a", b"REMOVE|a|", b"QUERY|a|", b"INDEX|a|a"):
        (reply,) = [replies for _, replies, _ in pieces(graph, line + b"\n")]
        assert reply == model.apply(line)
        graph.verify()
    assert graph.stats()["names"] == 0
    assert model.apply(b"REMOVE|a|") == OK
