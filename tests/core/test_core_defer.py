"""What a graph answers by itself and what it hands on, for an index that is not alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex._core import Batch, Graph
from tests.core.talk import commit, tell
from tests.reference import ERROR, FAIL, MESSAGE, OK

#: (ticket, replies, changes)
Piece = tuple[int, bytes | bytearray, int]


class Deferring:
    """A graph with `settled` indexed for good and `open` not yet, that hands everything else on."""

    def __init__(self) -> None:
        self.graph = Graph(journalled=True)
        tell(self.graph, b"INDEX|settled|")
        commit(self.graph)
        tell(self.graph, b"INDEX|open|")
        self.handed: list[tuple[bytes, bytes]] = []  # what was left, the replies before it
        self.graph.defer = self.defer

    def defer(self, batch: Batch, front: bytes) -> list[Piece]:
        self.handed.append((bytes(memoryview(batch.buffer)[batch.start : batch.stop]), front))
        return [(7, b"handed", 0)]

    def apply(self, lines: bytes, **how: bool) -> bytes | list[Piece]:
        data = bytearray(lines)
        batch = Batch()
        batch.load(data, 0, len(data), 10, **how)
        return self.graph.apply(batch)


@pytest.fixture
def deferring() -> Deferring:
    return Deferring()


@pytest.mark.parametrize("command", [b"INDEX|new|", b"REMOVE|absent|", b"QUERY|open|"])
def test_from_the_first_that_rests_on_something_on_all_is_handed_on(
    deferring: Deferring, command: bytes
) -> None:
    rest = command + b"\nQUERY|settled|\nLIZARD\n"
    answers = deferring.apply(b"QUERY|settled|\nQUERY|absent|\nLIZARD\n" + rest)
    assert answers == [(7, b"handed", 0)]
    assert deferring.handed == [(rest, OK + FAIL + ERROR)]
    assert (deferring.graph.changes, "new" in deferring.graph) == (2, False)


def test_what_rests_on_nothing_is_answered(deferring: Deferring) -> None:
    assert deferring.apply(b"QUERY|settled|\nQUERY|absent|\nx\n") == OK + FAIL + ERROR
    assert deferring.handed == []


def test_all_of_a_connection_that_waits_is_handed_on(deferring: Deferring) -> None:
    assert deferring.apply(b"QUERY|settled|\n", waits=True) == [(7, b"handed", 0)]
    assert deferring.handed == [(b"QUERY|settled|\n", b"")]


def test_it_hands_everything_on_where_it_is_told_to(deferring: Deferring) -> None:
    deferring.graph.defers_all = True
    assert deferring.apply(b"QUERY|settled|\n") == [(7, b"handed", 0)]
    assert deferring.handed == [(b"QUERY|settled|\n", b"")]


def test_who_may_change_nothing_is_told_so_here_and_now(deferring: Deferring) -> None:
    answers = deferring.apply(b"INDEX|new|\nREMOVE|settled|\nQUERY|settled|\n", read_only=True)
    assert answers == FAIL + FAIL + OK
    assert deferring.handed == []


def test_a_whole_batch_is_answered_in_spite_of_that(deferring: Deferring) -> None:
    deferring.graph.defers_all = True
    data = bytearray(b"QUERY|settled|\nINDEX|new|\n")
    batch = Batch()
    batch.load(data, 0, len(data), 10, False, True)
    assert deferring.graph.apply(batch, True) == [(0, OK, 0), (2, OK, 1)]
    assert deferring.handed == []


# --- an answer more on the open commit ----------------------------------------------------------------


def test_who_asks_has_the_open_commit_made_if_only_as_a_proof() -> None:
    graph = Graph(journalled=True)
    woken: list[int] = []
    graph.wake = lambda: woken.append(graph.asked)
    assert [graph.ask(), graph.ask()] == [1, 1]
    assert woken == [1], "once for a commit"
    assert graph.seal()[2] == 0
    assert (graph.ask(), graph.asked, woken) == (2, 1, [1, 1])
    graph.settle(1)
    assert graph.settled == 1


def test_a_change_that_joins_who_asked_wakes_nobody_again() -> None:
    graph = Graph(journalled=True)
    woken: list[int] = []
    graph.wake = lambda: woken.append(graph.asked)
    ticket = graph.ask()
    tell(graph, b"INDEX|a|")
    assert (woken, graph.ticket, graph.asked) == ([1], ticket, 2)


# --- messages that others answer ----------------------------------------------------------------------


@given(
    lines=st.lists(
        st.sampled_from([b"INDEX|a|", b"REMOVE|a|b", b"QUERY|a|", b"", b"LIZARD", b"QUERY|a|b|c"]),
        min_size=1,
        max_size=12,
    ),
    room=st.integers(0, 5),
    most=st.integers(0, 12),
    read_only=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_messages_are_taken_as_far_as_there_is_room_for_their_changes(
    lines: list[bytes], room: int, most: int, read_only: bool
) -> None:
    taken = changes = 0
    for line in lines[:most]:
        message = MESSAGE.fullmatch(line)
        if message and message[1] != b"QUERY" and not read_only:
            if changes == room:
                break
            changes += 1
        taken += 1
    data = bytearray(b"".join(line + b"\n" for line in lines))
    batch = Batch()
    batch.load(data, 0, len(data), room, read_only)
    assert batch.take(most) == taken
    assert batch.changes == changes
    assert bytes(data[: batch.start]) == b"".join(line + b"\n" for line in lines[:taken])
    assert batch.take(most - taken) == 0


def test_a_line_beyond_the_limit_is_one_message() -> None:
    data = bytearray(b"INDEX|" + b"x" * 100 + b"|\nQUERY|a|\n")
    batch = Batch(50)
    batch.load(data, 0, len(data), 10)
    assert (batch.take(9), batch.changes) == (2, 0)


def test_names_that_a_stream_brought_and_took_leave_nothing_behind() -> None:
    """A follower lives as long as its writer, and has no package files to wait for."""
    writer, follower = Graph(journalled=True), Graph(journalled=True)
    for n in range(500):
        tell(writer, b"INDEX|base%d|" % n)
        tell(writer, b"INDEX|top%d|base%d" % (n, n))
        tell(writer, b"REMOVE|top%d|" % n)
        tell(writer, b"REMOVE|base%d|" % n)
        ticket, lines, _ = writer.seal()
        follower.replay(lines, track=False)
        writer.settle(ticket)
    assert (len(follower), follower.stats()["names"], follower.dirty) == (0, 0, 0)
