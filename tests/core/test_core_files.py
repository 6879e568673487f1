"""Rounds, redo lines and their replay: what reaches package files, and what recovery makes of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pkgindex._core import Graph
from tests.core.talk import (
    Contents,
    commit,
    decode,
    expected_contents,
    forward_lines,
    model_of,
    packages,
    put,
    tell,
    write_round,
)
from tests.reference import OK

#: Dependents from which on a reverse file is owed: `LARGE` in _graph.pxi.
LARGE = 4096


def some_lines(seed: int, count: int = 400) -> list[bytes]:
    """Messages about few packages, most of which have an effect."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        name = b"p%d" % draw.randrange(40)
        if draw.random() < 0.25:
            lines.append(b"REMOVE|%b|" % name)
        else:
            needed = {b"p%d" % draw.randrange(40) for _ in range(draw.choice([0, 0, 1, 3]))}
            lines.append(b"INDEX|%b|%b" % (name, b",".join(needed)))
    return lines


def popular(dependents: int) -> Graph:
    """Return a graph in which so many packages, d0 and on, need `lib`; its files are written."""
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|lib|", b"INDEX|lib2|", *[b"INDEX|d%d|lib" % i for i in range(dependents)])
    commit(graph)
    write_round(graph, {})
    return graph


# --- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_files_written_in_rounds_hold_the_whole_index(seed: int) -> None:
    graph = Graph(journalled=True)
    contents: Contents = {}
    lines = some_lines(seed)
    for at in range(0, len(lines), 50):
        tell(graph, *lines[at : at + 50])
        commit(graph)
        write_round(graph, contents, limit=100 * seed + 1, count=seed + 1)
    assert contents == expected_contents(model_of(lines))


def test_many_changes_of_a_package_cost_one_file_each_round() -> None:
    graph = Graph(journalled=True)
    tell(graph, *[b"INDEX|a|", b"REMOVE|a|", b"INDEX|a|"] * 100)
    commit(graph)
    assert graph.take_dirty() == 1
    assert decode(graph.render(1 << 20, 100) or b"") == [("forward", b"a", frozenset())]
    assert graph.render(1 << 20, 100) is None


def test_a_new_list_without_change_writes_nothing() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|", b"INDEX|b|a")
    commit(graph)
    write_round(graph, {})
    tell(graph, b"INDEX|b|a,a", b"INDEX|a|", b"REMOVE|c|", b"REMOVE|a|")
    assert (graph.dirty, graph.redo_bytes) == (0, 0)


def test_only_the_reverse_files_of_what_came_and_went_are_written() -> None:
    graph = Graph(journalled=True)
    tell(graph, *[b"INDEX|%c|" % c for c in b"abc"], b"INDEX|x|a,b")
    commit(graph)
    write_round(graph, {})
    tell(graph, b"INDEX|x|b,c")
    graph.take_dirty()
    records = {
        (kind, name): entries for kind, name, entries in decode(graph.render(9999, 99) or b"")
    }
    assert records == {
        ("forward", b"x"): frozenset([b"b", b"c"]),
        ("reverse", b"a"): None,
        ("reverse", b"c"): frozenset([b"x"]),
    }


def test_a_removed_package_is_rendered_as_a_file_that_is_no_more_and_then_forgotten() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|", b"REMOVE|a|")
    commit(graph)
    assert graph.stats()["names"] == 1
    graph.take_dirty()
    assert decode(graph.render(9999, 99) or b"") == [("forward", b"a", None)]
    assert graph.stats()["names"] == 0


def test_a_change_after_its_file_was_rendered_belongs_to_the_next_round() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|", b"INDEX|b|")
    graph.take_dirty()
    first = decode(graph.render(9999, 1) or b"")
    tell(graph, b"REMOVE|a|", b"REMOVE|b|")
    second = decode(graph.render(9999, 9) or b"")
    assert [entries for _, _, entries in first + second] == [frozenset(), None]
    assert graph.dirty == 1


def test_a_round_must_be_rendered_before_the_next_begins() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|")
    graph.take_dirty()
    for refused in (graph.take_dirty, graph.effect):
        with pytest.raises(RuntimeError, match="render"):
            refused()
    graph.render(9999, 9)
    assert graph.take_dirty() == 0


# --- large reverse files --------------------------------------------------------------------------


def test_a_large_reverse_file_is_owed_and_not_written_each_round() -> None:
    graph = popular(LARGE)
    tell(graph, b"INDEX|one-more|lib")
    commit(graph)
    graph.take_dirty()
    names = [(kind, name) for kind, name, _ in decode(graph.render(1 << 20, 99) or b"")]
    assert names == [("forward", b"one-more")]
    assert graph.owed_reverses() == [("lib", LARGE + 1)]
    assert graph.owed_lines() == b"*lib\n"
    assert graph.effect() == b"*lib\n"
    assert graph.dirty_reverses() == ["lib"]
    graph.verify()


def test_a_large_reverse_file_is_rendered_in_slices() -> None:
    graph = popular(LARGE + 100)
    tell(graph, b"REMOVE|d7|")
    commit(graph)
    graph.write_owed(["lib"])
    graph.take_dirty()
    slices = []
    while (records := graph.render(1 << 20, 500)) is not None:
        slices.append(records)
    assert len(slices) >= LARGE // 500
    found = {(kind, name): entries for kind, name, entries in decode(b"".join(slices))}
    expected = frozenset(b"d%d" % i for i in range(LARGE + 100) if i != 7)
    assert found["reverse", b"lib"] == expected
    assert (graph.dirty, graph.owed, graph.taken) == (0, 0, 0)


CHANGES_MEANWHILE = {
    "one that is not copied yet goes": [b"REMOVE|d1|"],
    "one that is copied goes": [b"REMOVE|d4100|"],
    "all that are not copied go": [b"REMOVE|d%d|" % i for i in range(3700)],
    "all go": [b"REMOVE|d%d|" % i for i in range(LARGE + 100)],
    "one comes": [b"INDEX|new|lib"],
    "those that are next go, and others get their edges": [
        *[b"REMOVE|d%d|" % i for i in range(3980, 4010)],
        *[b"INDEX|other%d|lib2" % i for i in range(30)],
    ],
    "one goes and comes": [b"REMOVE|d1|", b"INDEX|d1|lib"],
    "one that is not copied yet keeps it in a new list": [b"INDEX|d1|lib,lib2"],
    "one that is copied keeps it in a new list": [b"INDEX|d4100|lib,lib2"],
    "the package itself goes": [
        *[b"REMOVE|d%d|" % i for i in range(LARGE + 100)],
        b"REMOVE|x|",
        b"REMOVE|lib|",
    ],
}


@pytest.mark.parametrize("meanwhile", CHANGES_MEANWHILE)
def test_a_large_reverse_file_is_right_in_the_end_if_meanwhile(meanwhile: str) -> None:
    graph = popular(LARGE + 100)
    contents: Contents = {}
    tell(graph, b"INDEX|x|lib")
    before = {name.encode() for name in graph.dependents("lib")}
    graph.write_owed(["lib"])
    graph.take_dirty()
    for _ in range(2):
        put(contents, graph.render(1 << 20, 200) or b"")
    assert ("reverse", b"lib") not in contents
    assert set(tell(graph, *CHANGES_MEANWHILE[meanwhile])) == {OK}
    graph.verify()
    while (records := graph.render(1 << 20, 200)) is not None:
        put(contents, records)
    graph.verify()
    dependents = frozenset(name.encode() for name in graph.dependents("lib"))
    # As it is written now it has all who needed `lib` throughout, and nobody who never did.
    touched = {line.split(b"|")[1] for line in CHANGES_MEANWHILE[meanwhile]}
    written = contents.get(("reverse", b"lib"), frozenset())
    assert before - touched <= written <= before | dependents
    commit(graph)
    write_round(graph, contents)
    assert contents.get(("reverse", b"lib"), frozenset()) == dependents
    assert graph.stats()["names"] == len(graph)
    graph.verify()


# --- redo lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_replaying_the_redo_lines_gives_the_same_graph_and_again_the_same(seed: int) -> None:
    graph = Graph(journalled=True)
    lines = some_lines(seed)
    tell(graph, *lines)
    redo = commit(graph)
    other = Graph(journalled=True)
    for _ in range(2):
        assert other.replay(redo) == redo.count(b"\n")
        assert packages(other) == packages(graph) == model_of(lines).packages
        assert other.dangling() == []
        other.verify()


@pytest.mark.parametrize("seed", range(3))
def test_replaying_over_newer_files_gives_the_same_graph(seed: int) -> None:
    """A file may be newer than the journal's beginning (rule W4)."""
    lines = some_lines(seed)
    graph = Graph(journalled=True)
    tell(graph, *lines)
    redo = commit(graph)
    contents: Contents = {}
    write_round(graph, contents)
    other = Graph(journalled=True)
    other.replay(forward_lines(contents), track=False)
    other.replay(redo)
    assert packages(other) == packages(graph)
    other.verify()


def test_files_are_loaded_in_any_order_and_are_not_dirty() -> None:
    lines = [b"INDEX|p%d|%b" % (i, b"p%d" % (i - 1) if i else b"") for i in range(1000)]
    contents = expected_contents(model_of(lines))
    shuffled = forward_lines(contents).splitlines(keepends=True)
    random.Random(1).shuffle(shuffled)
    graph = Graph(journalled=True)
    graph.replay(b"".join(shuffled[:500]), track=False)
    assert graph.dangling() != []
    graph.replay(b"".join(shuffled[500:]), track=False)
    assert graph.dangling() == []
    assert packages(graph) == model_of(lines).packages
    assert (graph.dirty, graph.effect(), graph.redo_bytes, graph.changes) == (0, b"", 0, 0)
    graph.verify()


def test_dangling_names_the_package_and_the_dependency_that_is_missing() -> None:
    graph = Graph(journalled=True)
    graph.replay(b"+a|x,y|\n+b|x|\n")
    assert sorted(graph.dangling()) == [("a", "x"), ("a", "y"), ("b", "x")]
    assert len(graph.dangling(2)) == 2
    assert "x" not in graph


def test_what_a_line_took_away_owes_its_reverse_file_even_if_nothing_else_knows_of_it() -> None:
    graph = Graph(journalled=True)
    graph.replay(b"+a||b\n-c|d,e\n*f\n")
    assert sorted(graph.dirty_reverses()) == ["b", "d", "e", "f"]
    assert sorted(graph.dirty_packages()) == ["a", "c"]
    assert packages(graph) == {b"a": frozenset()}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"+", b"+a", b"+a|", b"+a|b", b"a||", b"+|b|", b"+a||b,", b"+a|,b|",
        b"+a|b|c|d", b"-a", b"-a|b|", b"-|", b"*", b"*a|", b"?a||", b"+a b||", b"+a||\r",
        b"+" + b"x" * 256 + b"||", b"+a|" + b"x" * 256 + b"|", b"-a|" + b"x" * 256,
    ],
)  # fmt: skip
def test_what_is_no_redo_line_is_named_by_its_offset(line: bytes) -> None:
    graph = Graph(journalled=True)
    with pytest.raises(ValueError, match="not a redo line at byte 6"):
        graph.replay(b"+ok||\n" + line + b"\n+never||\n")
    assert packages(graph) == {b"ok": frozenset()}
    graph.verify()


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_redo_line_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="at byte 0"):
        Graph(journalled=True).replay(memoryview(b"+a|b|c\n")[:-cut])


bits = st.sampled_from([b"+", b"-", b"*", b"|", b",", b"\n", b"a", b"bb", b"c" * 255, b"\0", b" "])


@given(st.lists(bits, max_size=60).map(b"".join))
@example(b"+a|a|a\n-a|a\n*a\n")
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_replayed_up_to_the_first_that_are_no_line(data: bytes) -> None:
    graph = Graph(journalled=True)
    try:
        assert graph.replay(data) == data.count(b"\n")
    except ValueError as error:
        good = data[: int(str(error).rpartition(" ")[2])]
        assert graph.replay(good) == good.count(b"\n")
    graph.verify()


def test_numbers_of_changes_go_on_where_the_journal_ended() -> None:
    graph = Graph(journalled=True)
    graph.continue_at(41)
    tell(graph, b"INDEX|a|")
    assert graph.changes == 42
