"""Which answer waits for which commit (promises 1 and 2, rule W3)."""

from __future__ import annotations

import pytest

from pkgindex._core import Graph
from tests.core.talk import commit, pieces, tell, write_round
from tests.reference import ERROR, FAIL, OK


@pytest.fixture
def graph() -> Graph:
    """A journalled graph whose commit 1, of `settled`, is settled."""
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|settled|")
    commit(graph)
    return graph


def test_the_open_commit_is_one_more_than_the_settled_one(graph: Graph) -> None:
    assert (graph.settled, graph.ticket, graph.asked) == (1, 2, False)


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        (b"INDEX|new|", OK),
        (b"REMOVE|settled|", OK),
        (b"INDEX|settled|", OK),  # no effect
        (b"REMOVE|absent|", OK),  # no effect
        (b"INDEX|new|absent", FAIL),
    ],
)
def test_every_answer_to_a_change_rests_on_the_open_commit(
    graph: Graph, line: bytes, reply: bytes
) -> None:
    assert pieces(graph, line + b"\n") == [(2, reply, 1)]
    assert graph.asked == 1


def test_a_failing_remove_rests_on_the_open_commit(graph: Graph) -> None:
    tell(graph, b"INDEX|needs|settled")
    commit(graph)
    assert pieces(graph, b"REMOVE|settled|\n") == [(3, FAIL, 1)]
    assert graph.redo_bytes == 0


def test_a_commit_without_lines_is_a_proof_alone(graph: Graph) -> None:
    tell(graph, b"REMOVE|absent|")
    ticket, lines, number = graph.seal()
    assert (ticket, bytes(lines), number) == (2, b"", 0)


def test_queries_and_errors_wait_for_nothing(graph: Graph) -> None:
    assert pieces(graph, b"QUERY|settled|\nQUERY|absent|\nLIZARD\n") == [(0, OK + FAIL + ERROR, 0)]
    assert not graph.asked


def test_a_query_waits_for_the_coming_of_its_package(graph: Graph) -> None:
    tell(graph, b"INDEX|new|")
    assert pieces(graph, b"QUERY|new|\n") == [(2, OK, 0)]
    graph.seal()
    assert pieces(graph, b"QUERY|new|\n") == [(2, OK, 0)]
    graph.settle(2)
    assert pieces(graph, b"QUERY|new|\n") == [(0, OK, 0)]


def test_a_query_waits_for_the_going_of_its_package(graph: Graph) -> None:
    """A FAIL too reveals a change that a crash could undo."""
    tell(graph, b"REMOVE|settled|")
    assert pieces(graph, b"QUERY|settled|\n") == [(2, FAIL, 0)]
    graph.seal()
    assert pieces(graph, b"QUERY|settled|\n") == [(2, FAIL, 0)]
    graph.settle(2)
    assert pieces(graph, b"QUERY|settled|\n") == [(0, FAIL, 0)]


def test_a_query_does_not_wait_for_a_new_list_of_an_indexed_package(graph: Graph) -> None:
    """Its answer was OK before and is OK after a crash."""
    tell(graph, b"INDEX|other|")
    commit(graph)
    tell(graph, b"INDEX|settled|other")
    assert pieces(graph, b"QUERY|settled|\nQUERY|other|\n") == [(0, OK + OK, 0)]


def test_a_query_of_a_package_that_went_and_came_waits_for_its_coming(graph: Graph) -> None:
    tell(graph, b"REMOVE|settled|")
    graph.seal()
    tell(graph, b"INDEX|settled|")
    assert pieces(graph, b"QUERY|settled|\n") == [(3, OK, 0)]
    graph.settle(2)
    assert pieces(graph, b"QUERY|settled|\n") == [(3, OK, 0)]
    graph.verify()
    commit(graph)
    assert pieces(graph, b"QUERY|settled|\n") == [(0, OK, 0)]


def test_a_package_removed_in_two_commits_is_remembered_until_the_second(graph: Graph) -> None:
    tell(graph, b"REMOVE|settled|")
    graph.seal()
    tell(graph, b"INDEX|settled|", b"REMOVE|settled|")
    graph.settle(2)
    graph.verify()
    assert pieces(graph, b"QUERY|settled|\n") == [(3, FAIL, 0)]
    commit(graph)
    assert pieces(graph, b"QUERY|settled|\n") == [(0, FAIL, 0)]
    graph.verify()


@pytest.mark.parametrize("removals", [1, 2, 3])
def test_a_removed_package_is_remembered_though_its_file_is_written(
    graph: Graph, removals: int
) -> None:
    """Written files, which rest on the commit under way, do not make it durable."""
    tell(graph, b"REMOVE|settled|")
    graph.seal()
    for _ in range(removals - 1):
        tell(graph, b"INDEX|settled|", b"REMOVE|settled|")
    write_round(graph, {})
    asked = pieces(graph, b"QUERY|settled|\n")
    assert asked == [(3 if removals > 1 else 2, FAIL, 0)]
    graph.settle(2)
    graph.verify()
    asked = pieces(graph, b"QUERY|settled|\n")
    assert asked == [(3 if removals > 1 else 0, FAIL, 0)]
    # Were its node given away too early, this one would get it, and lose it at the next settle().
    tell(graph, b"INDEX|another|")
    commit(graph)
    graph.verify()
    assert pieces(graph, b"QUERY|settled|\nQUERY|another|\n") == [(0, FAIL + OK, 0)]
    write_round(graph, {})
    assert graph.stats()["names"] == 1


def test_one_chunk_is_answered_in_up_to_three_pieces_with_growing_tickets(graph: Graph) -> None:
    tell(graph, b"INDEX|sealed|")
    graph.seal()
    tell(graph, b"INDEX|open|")
    asked = pieces(
        graph,
        b"QUERY|settled|\nLIZARD\nQUERY|sealed|\nQUERY|settled|\nQUERY|open|\nREMOVE|absent|\n"
        b"QUERY|sealed|\nQUERY|settled|\nLIZARD\n",
    )
    assert asked == [
        (0, OK + ERROR, 0),
        (2, OK + OK, 0),
        (3, OK + OK + OK + OK + ERROR, 1),
    ]


def test_pieces_are_never_empty_and_count_their_changes(graph: Graph) -> None:
    asked = pieces(graph, b"INDEX|a|\nINDEX|b|\nQUERY|a|\nREMOVE|a|\n")
    assert asked == [(2, OK * 4, 3)]


def test_a_seal_must_wait_for_the_commit_before_to_settle(graph: Graph) -> None:
    graph.seal()
    with pytest.raises(RuntimeError, match="under way"):
        graph.seal()
    graph.settle(2)
    graph.seal()


@pytest.mark.parametrize("ticket", [0, 1, 3, 2**63])
def test_only_the_commit_under_way_can_settle(graph: Graph, ticket: int) -> None:
    graph.seal()
    with pytest.raises(ValueError, match="no such commit"):
        graph.settle(ticket)


def test_the_sealed_lines_stay_as_they_are_while_the_next_commit_fills(graph: Graph) -> None:
    tell(graph, b"INDEX|one|settled")
    _, lines, number = graph.seal()
    for i in range(1000):
        tell(graph, b"INDEX|%d|" % i)
    assert (bytes(lines), number) == (b"+one|settled|\n", 1)


def test_without_a_journal_nothing_ever_waits() -> None:
    graph = Graph()
    assert pieces(graph, b"INDEX|a|\nQUERY|a|\nREMOVE|a|\n") == [(0, OK * 3, 2)]
    assert (graph.ticket, graph.settled, graph.asked, graph.redo_bytes) == (0, 0, False, 0)


def test_each_effective_change_has_a_number(graph: Graph) -> None:
    before = graph.changes
    tell(graph, b"INDEX|a|", b"INDEX|a|", b"REMOVE|b|", b"INDEX|b|c", b"INDEX|a|a", b"REMOVE|a|")
    assert graph.changes - before == 3
    _, lines, number = graph.seal()
    assert bytes(lines) == b"+a||\n+a|a|\n-a|a\n"
    assert number == 3


def test_a_redo_line_names_the_whole_list_and_what_was_taken_away(graph: Graph) -> None:
    tell(graph, b"INDEX|a|", b"INDEX|b|", b"INDEX|c|", b"INDEX|x|a,b,b,a")
    commit(graph)
    tell(graph, b"INDEX|x|c,a", b"REMOVE|x|")
    _, lines, _ = graph.seal()
    first, second = bytes(lines).splitlines()
    assert first == b"+x|c,a|b"
    assert second[:3] == b"-x|"
    assert set(second[3:].split(b",")) == {b"a", b"c"}
