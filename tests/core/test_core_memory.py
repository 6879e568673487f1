"""Memory: how much a package takes, that it comes back, and what happens when there is none."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pkgindex._core import Batch, Graph, fail_allocation, matching_slots
from tests.core.hunger import hungry_lines, refuse_each
from tests.core.talk import ROOMY, chunk, commit, pieces, tell, write_round
from tests.reference import FAIL, OK


def index_lines(table: dict[bytes, list[bytes]]) -> Iterator[bytes]:
    for name, needed in table.items():
        yield b"INDEX|%b|%b\n" % (name, b",".join(needed))


def debian_like(seed: int = 1) -> dict[bytes, list[bytes]]:
    """Return as many packages, dependencies and bytes of names as Debian 12's main has."""
    draw = random.Random(seed)
    names = [
        b"lib%b-%d" % (bytes(draw.choices(b"abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 20))), i)
        for i in range(63_436)
    ]
    table: dict[bytes, list[bytes]] = {}
    for i, name in enumerate(names):
        # A few are needed by very many.
        wanted = {names[int(i * draw.random() ** 4)] for _ in range(draw.randint(0, 10)) if i}
        table[name] = list(wanted)
    return table


@pytest.mark.parametrize("journalled", [False, True])
def test_a_package_of_a_distribution_takes_at_most_200_bytes(journalled: bool) -> None:
    graph = Graph(journalled=journalled)
    data = list(index_lines(debian_like()))
    for at in range(0, len(data), 1000):
        pieces(graph, b"".join(data[at : at + 1000]))
        if journalled:
            commit(graph)
    if journalled:
        write_round(graph, {})
        for _ in range(2):
            commit(graph)
    stats = graph.stats()
    assert len(graph) == len(data)
    assert stats["dependencies"] > 270_000
    assert stats["bytes"] / len(data) <= 200, stats["memory"]


def test_stats_count_what_there_is() -> None:
    graph = Graph()
    tell(graph, b"INDEX|a|", b"INDEX|b|a", b"INDEX|b|c", b"QUERY|a|", b"QUERY|c|", b"x")
    tell(graph, b"REMOVE|a|", b"REMOVE|b|")
    stats = graph.stats()
    assert (stats["packages"], stats["names"], stats["dependencies"], stats["changes"]) == (
        1,
        1,
        0,
        3,
    )
    assert stats["messages"] == {
        "index_ok": 2,
        "index_fail": 1,
        "remove_ok": 1,
        "remove_fail": 1,
        "query_ok": 1,
        "query_fail": 1,
        "error": 1,
    }
    assert stats["bytes"] == sum(stats["memory"].values())


def test_a_small_chunk_cannot_make_the_core_do_much_at_once() -> None:
    """A REMOVE of 13 bytes takes thousands of dependencies away, and names each in the journal."""
    graph = Graph(journalled=True)
    names = [b"%04d" % i + b"x" * 251 for i in range(4000)]
    tell(graph, *[b"INDEX|%b|" % name for name in names])
    for i in range(200):
        tell(graph, b"INDEX|top%d|%b" % (i, b",".join(names)))
        commit(graph)
    data = bytearray(b"".join(b"REMOVE|top%d|\n" % i for i in range(200)))
    batch = Batch()
    start = calls = 0
    while start < len(data):
        batch.load(data, start, len(data), ROOMY)
        graph.apply(batch)
        calls += 1
        # Some thousands of dependencies a call; and no more once the commit is full.
        assert start < batch.start < start + 200 or graph.full
        assert graph.redo_bytes < 34 << 20
        if graph.full:
            commit(graph)
        start = batch.start
    assert calls > 20
    assert len(graph) == 4000
    graph.verify()


# --- it comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize("journalled", [False, True])
def test_what_is_freed_is_used_again(journalled: bool) -> None:
    graph = Graph(journalled=journalled)
    table = [[b"%d-%d" % (i, j) for j in range(i)] for i in (1, 7, 64, 65, 100, 1000)]
    sizes = []
    for _ in range(6):
        for needed in table:
            pieces(graph, b"".join(b"INDEX|%b|\n" % name for name in needed))
            for i in range(5):
                tell(graph, b"INDEX|top%d|%b" % (i, b",".join(needed)))
            tell(graph, *[b"REMOVE|top%d|" % i for i in range(5)])
            pieces(graph, b"".join(b"REMOVE|%b|\n" % name for name in needed))
            if journalled:
                commit(graph)
                write_round(graph, {})
        assert len(graph) == graph.stats()["names"] == 0
        graph.verify()
        sizes.append(graph.stats()["bytes"])
    assert sizes[1] == sizes[-1]


def test_failing_messages_leave_no_names_behind() -> None:
    graph = Graph(journalled=True)
    tell(graph, *[b"INDEX|a%d|b%d" % (i, i) for i in range(100)])
    tell(graph, *[b"QUERY|c%d|x,y" % i for i in range(100)])
    tell(graph, *[b"REMOVE|d%d|x,y" % i for i in range(100)])
    assert graph.stats()["names"] == 0


def test_removals_that_never_pause_take_no_more_and_more_memory() -> None:
    """With a change in every commit there is no moment at which nothing is unsettled."""
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|a|", b"REMOVE|a|")
    sizes = []
    for i in range(4000):
        graph.seal()
        names = [b"a", *[b"%d-%d" % (i, j) for j in range(i % 5)]]
        lines = [b"%b|%b|" % (command, name) for name in names for command in (b"INDEX", b"REMOVE")]
        tell(graph, *lines * 2)
        graph.settle(graph.ticket - 1)
        if i % 1000 == 999:
            write_round(graph, {})
            # Only what the open commit removed is still remembered.
            assert graph.stats()["names"] == len(names)
            graph.verify()
            sizes.append(graph.stats()["memory"]["journal"])
    assert sizes[0] == sizes[-1]
    commit(graph)
    assert graph.stats()["names"] == 0


# --- the hash table -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_names_are_found_while_the_table_grows_and_packages_go(seed: int) -> None:
    """The table doubles at 768, 1,536, 3,072 … names and moves 16 slots an insertion."""
    draw = random.Random(seed)
    graph, there = Graph(), set[bytes]()
    for i in range(0, 7000, 50):
        fresh = [b"name-%d-%d" % (seed, j) for j in range(i, i + 50)]
        leaving = draw.sample(sorted(there), min(len(there), draw.choice([0, 5, 40])))
        lines = [b"INDEX|%b|" % name for name in fresh] + [b"REMOVE|%b|" % name for name in leaving]
        draw.shuffle(lines)
        assert set(tell(graph, *lines)) == {OK}
        there = (there | set(fresh)) - set(leaving)
        some = draw.sample(sorted(there), 20) + leaving + [b"name-%d-%d" % (seed, i + 50)]
        expected = [OK if name in there else FAIL for name in some]
        assert tell(graph, *[b"QUERY|%b|" % name for name in some]) == expected
        assert len(graph) == graph.stats()["names"] == len(there)
    assert {name.encode() for name in graph} == there
    graph.verify()
    assert set(tell(graph, *[b"REMOVE|%b|" % name for name in sorted(there)])) == {OK}
    assert graph.stats()["names"] == 0


@pytest.mark.parametrize("portable", [False, True])
def test_each_slot_with_the_hash_is_found(portable: bool) -> None:
    for sought in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        for chosen in range(256):
            slots = [i for i in range(8) if chosen >> i & 1]
            hashes = [sought if i in slots else sought ^ 1 << 8 * (i % 4) for i in range(8)]
            assert matching_slots(hashes, sought, portable) == slots


@pytest.mark.parametrize("seed", range(20))
def test_names_are_found_in_a_crowded_table_whatever_goes(seed: int) -> None:
    """Just before it grows, every seventh bucket is full and has sent names on."""
    graph = Graph(journalled=False)
    draw = random.Random(seed)
    there: set[bytes] = set()
    for turn in range(3):
        while len(there) < 768:  # three quarters of the first table
            there.add(b"%d-%d" % (turn, draw.randrange(10 ** draw.randrange(1, 18))))
        assert set(tell(graph, *[b"INDEX|%b|" % name for name in there])) == {OK}
        graph.verify()
        for name in draw.sample(sorted(there), 500):
            there.remove(name)
            assert tell(graph, b"REMOVE|%b|" % name, b"QUERY|%b|" % name) == [OK, FAIL]
        assert set(tell(graph, *[b"QUERY|%b|" % name for name in there])) == {OK}
        graph.verify()


def test_a_table_that_has_begun_to_grow_goes_on_with_queries_alone() -> None:
    graph = Graph(journalled=False)
    tell(graph, *[b"INDEX|p%d|" % i for i in range(769)])
    both = graph.stats()["memory"]["names"]
    for _ in range(128):  # buckets of the old one
        assert tell(graph, b"QUERY|p1|", b"QUERY|p768|", b"QUERY|p769|") == [OK, OK, FAIL]
    assert graph.stats()["memory"]["names"] == both - 1024 * 8
    assert set(tell(graph, *[b"QUERY|p%d|" % i for i in range(769)])) == {OK}
    graph.verify()


def test_a_package_with_10000_dependencies_comes_changes_and_goes() -> None:
    graph = Graph(journalled=True)
    names = [b"dependency-%d" % i for i in range(10_000)]
    pieces(graph, b"".join(b"INDEX|%b|\n" % name for name in names))
    assert tell(graph, b"INDEX|top|" + b",".join(names)) == [OK]
    assert graph.dependencies("top") == sorted(name.decode() for name in names)
    assert tell(graph, b"INDEX|top|" + b",".join(names[::-2])) == [OK]
    graph.verify()
    assert tell(graph, b"REMOVE|dependency-1|", b"REMOVE|dependency-0|") == [FAIL, OK]
    assert tell(graph, b"REMOVE|top|", b"REMOVE|dependency-1|") == [OK, OK]
    graph.verify()


def test_a_package_that_10000_need_is_freed_when_they_go() -> None:
    graph = Graph(journalled=True)
    tell(graph, b"INDEX|lib|")
    pieces(graph, b"".join(b"INDEX|p%d|lib\n" % i for i in range(10_000)))
    assert tell(graph, b"REMOVE|lib|") == [FAIL]
    order = list(range(10_000))
    random.Random(1).shuffle(order)
    pieces(graph, b"".join(b"REMOVE|p%d|\n" % i for i in order))
    assert tell(graph, b"REMOVE|lib|") == [OK]
    commit(graph)
    write_round(graph, {})
    assert graph.stats()["names"] == 0


def test_cycles_block_each_other_until_one_needs_nothing() -> None:
    graph = Graph()
    tell(graph, b"INDEX|a|", b"INDEX|b|a", b"INDEX|c|b", b"INDEX|a|c,a")
    assert tell(graph, b"REMOVE|a|", b"REMOVE|b|", b"REMOVE|c|") == [FAIL] * 3
    graph.verify()
    assert tell(graph, b"INDEX|a|a", b"REMOVE|c|", b"REMOVE|b|", b"REMOVE|a|") == [OK] * 4
    assert graph.stats()["names"] == graph.stats()["dependencies"] == 0


def test_a_name_that_is_not_ascii_is_not_found() -> None:
    graph = Graph()
    tell(graph, b"INDEX|na?ve|")
    assert "na?ve" in graph
    assert "na\u00efve" not in graph
    assert "" not in graph
    assert "x" * 256 not in graph
    assert graph.dependencies("na\u00efve") == []


# --- when there is none ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _memory_again() -> Iterator[None]:
    yield
    fail_allocation(-1)


@pytest.mark.parametrize("journalled", [False, True])
def test_a_change_for_which_there_is_no_memory_leaves_the_graph_as_it_was(journalled: bool) -> None:
    """Whichever allocation fails; and with memory again the same change succeeds."""
    assert refuse_each(Graph(journalled=journalled), hungry_lines()) > 8


def test_an_empty_graph_needs_memory_too() -> None:
    for n in range(2):
        fail_allocation(n)
        with pytest.raises(MemoryError):
            Graph()


def test_a_chunk_that_runs_out_of_memory_says_so_and_keeps_what_it_did() -> None:
    graph = Graph()
    fail_allocation(5)
    with pytest.raises(MemoryError, match="no memory"):
        graph.apply(chunk(b"".join(b"INDEX|p%d|\n" % i for i in range(100_000))))
    fail_allocation(-1)
    assert 0 < len(graph) < 100_000
    graph.verify()


@pytest.mark.parametrize("n", range(8))
def test_a_replay_that_runs_out_of_memory_raises(n: int) -> None:
    source = Graph(journalled=True)
    tell(source, *hungry_lines())
    redo = commit(source)
    redo += b"".join(b"*%b\n" % name.encode() for name in source)
    graph = Graph(journalled=True)
    fail_allocation(n)
    with pytest.raises(MemoryError, match="replay"):
        graph.replay(redo)


def test_an_owed_reverse_file_is_not_forgotten_for_lack_of_memory() -> None:
    lines = b"".join(b"*%d\n" % i for i in range(50_000))
    for n in range(100):
        fail_allocation(-1)
        graph = Graph(journalled=True)
        fail_allocation(n)
        try:
            graph.replay(lines)
        except MemoryError:
            continue
        fail_allocation(-1)
        assert len(graph.dirty_reverses()) == 50_000
        return


@pytest.mark.parametrize("n", range(4))
def test_a_round_that_runs_out_of_memory_loses_no_file(n: int) -> None:
    graph = Graph(journalled=True)
    tell(graph, *[b"INDEX|%b%d|" % (b"n" * 200, i) for i in range(2000)])
    graph.take_dirty()
    seen = 0
    fail_allocation(n)
    try:
        while (records := graph.render(1 << 20, 1000)) is not None:
            seen += records.count(b"n" * 200)
    except MemoryError:
        fail_allocation(-1)
        while (records := graph.render(1 << 20, 1000)) is not None:
            seen += records.count(b"n" * 200)
    assert seen == 2000
