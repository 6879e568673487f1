"""Notes: what became of origins' messages, carried in a batch beside its changes and by no graph."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pkgindex._core import Graph, fail_allocation
from tests.core.talk import commit, packages, tell

X, Y = "0123456789abcdef" * 2, "f" * 32


def note(origin: str = X, first: object = 1, letters: str = "OFE") -> bytes:
    return f"@{origin} {first} {letters}\n".encode()


def test_a_note_goes_with_the_open_commit_and_is_no_change() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|", b"INDEX|b|a")
    graph.note(note() + note(Y, 7, "O"))
    tell(graph, b"REMOVE|b|")
    ticket, lines, number = graph.seal()
    assert bytes(lines) == b"+a||\n+b|a|\n" + note() + note(Y, 7, "O") + b"-b|a\n"
    assert (number, graph.changes) == (3, 3)
    graph.settle(ticket)
    tell(graph, b"INDEX|c|")
    assert commit(graph) == b"+c||\n"


def test_replay_collects_notes_in_order_and_the_graph_is_as_without_them() -> None:
    graph = Graph(journalled=True)
    notes: list[tuple[str, int, str]] = []
    lines = note() + b"+a||\n+b|a|\n" + note(Y, 10**18 - 1, "E") + note(X, 4, "O") + b"*a\n"
    assert graph.replay(lines, notes=notes) == 3
    assert notes == [(X, 1, "OFE"), (Y, 10**18 - 1, "E"), (X, 4, "O")]
    assert packages(graph) == {b"a": frozenset(), b"b": frozenset({b"a"})}
    graph.replay(note(Y, 2, "F"), notes=notes)
    assert notes[3:] == [(Y, 2, "F")]
    graph.verify()


def test_a_note_is_damage_where_none_may_be() -> None:
    """In package files, snapshots and heads."""
    with pytest.raises(ValueError, match="not a redo line at byte 5"):
        Graph(journalled=True).replay(b"+a||\n" + note())


WRONG = [
    b"@\n", b"@" + X.encode() + b"\n", note(X[:-1]), note(X + "0"), note(X.upper()), note("g" * 32),
    note(first=""), note(first=0), note(first="01"), note(first=-1), note(first="1x"),
    note(first=10**18), note(letters=""), note(letters="o"), note(letters="OK"),
    note(letters="O O"), note(letters="O|"), note(letters="O\r"), b"@" + X.encode() + b"  1 O\n",
    b" " + note(), b"+a||\n",
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_what_is_no_note_is_refused_and_adds_nothing(line: bytes) -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|")
    for lines in (line, note() + line, note() + line[:-1], note()[:-1]):
        with pytest.raises(ValueError, match="not a note"):
            graph.note(lines)
    assert commit(graph) == b"+a||\n"
    if line.startswith(b"@"):
        with pytest.raises(ValueError, match="not a redo line at byte 5"):
            graph.replay(b"+b||\n" + line, notes=[])


def test_a_note_alone_is_refused_for_a_batch_without_a_change_would_be_lost() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"QUERY|a|", b"REMOVE|a|")
    with pytest.raises(RuntimeError, match="needs a change"):
        graph.note(note())
    tell(graph, b"INDEX|a|")
    commit(graph)
    with pytest.raises(RuntimeError, match="needs a change"):
        graph.note(note())


def test_a_note_that_finds_no_memory_adds_nothing() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|")
    fail_allocation(0)
    try:
        with pytest.raises(MemoryError):
            graph.note(note(letters="O" * (8 << 20)))
    finally:
        fail_allocation(-1)
    assert commit(graph) == b"+a||\n"


bits = st.sampled_from([b"@", X.encode(), b" ", b"1", b"0", b"O", b"FE", b"\n", b"+a||\n", b"\0"])


@given(st.lists(bits, max_size=40).map(b"".join))
@example(note() + note(Y)[:-1])
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_up_to_the_first_that_are_no_line(data: bytes) -> None:
    notes: list[tuple[str, int, str]] = []
    graph = Graph(journalled=True)
    good = data
    try:
        graph.replay(data, notes=notes)
    except ValueError as error:
        good = data[: int(str(error).rpartition(" ")[2])]
    lines = good.splitlines(keepends=True)
    assert b"".join(note(*each) for each in notes) == b"".join(
        line for line in lines if line.startswith(b"@")
    )
    assert {line for line in lines if not line.startswith(b"@")} <= {b"+a||\n"}
