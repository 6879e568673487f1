"""Which messages go where, by what a member is at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkgindex._core import Batch, Graph
from pkgindex.cluster.index import ClusterIndex
from pkgindex.config import Settings
from pkgindex.index.base import Answers


class Nobody:
    """Clients that are not told anything."""

    def applies(self, apply: Callable[[Batch], Answers]) -> None:
        """The test gives its messages to the index itself."""

    def forsake(self, first: int, last: int) -> None:
        """None wait."""

    def admit(self, admitted: bool) -> None:
        """None come."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[ClusterIndex]:
    """One with strong reads, that has no graph yet and knows no writer."""
    settings = Settings(store="file:", cluster="127.0.0.1:0", reads="strong")
    index = ClusterIndex.open(str(tmp_path / "index"), settings)
    index._loop = asyncio.new_event_loop()
    index.clients = Nobody()
    yield index
    index._loop.run_until_complete(asyncio.sleep(0))
    index._loop.close()
    index._node._port.close()


def given(index: ClusterIndex, lines: bytes, **how: int) -> bytes:
    """Give it a batch; what it has left of that."""
    data = bytearray(lines)
    batch = Batch()
    batch.load(data, 0, len(data), 10, **how)
    index.apply(batch)
    return bytes(data[batch.start :])


def taken(index: ClusterIndex, lines: bytes, **how: int) -> list[int]:
    """Give it a batch; the counters of the chunks that wait."""
    assert given(index, lines, **how) == b""
    return [chunk.first for chunk in index.pending.fresh]


def test_a_strong_read_keeps_its_place_among_messages_while_there_is_no_graph(
    index: ClusterIndex,
) -> None:
    """Read from the graph that comes, it would see what its client has changed behind it."""
    assert taken(index, b"QUERY|a|\n") == [1]
    assert taken(index, b"INDEX|a|\n", waits=1) == [1, 2]
    assert index.pending.messages == 2


def test_a_change_waits_for_the_strong_reads_before_it(index: ClusterIndex) -> None:
    """They are evaluated once more if the writer dies, and would see what stands behind them."""
    index.shows(Graph(journalled=True))
    assert taken(index, b"QUERY|a|\n") == [0]
    read = index.pending.fresh[0]
    assert given(index, b"INDEX|a|\n", waits=read.ticket) == b"INDEX|a|\n"
    assert taken(index, b"INDEX|b|\n") == [0, 1], "another connection's need not wait"
    assert taken(index, b"QUERY|c|\n", waits=read.ticket) == [0, 1, 2]
    index._flush()
    for _ in range(3):
        index.pending.handed()
    index._tell_settled = lambda: None
    index.checked(tuple(index.pending.reads()))
    assert read.box == b"FAIL\n"
    assert given(index, b"INDEX|a|\n", waits=read.ticket) == b""


def test_what_may_change_nothing_is_never_handed_to_a_writer(index: ClusterIndex) -> None:
    assert taken(index, b"INDEX|a|\nREMOVE|a|\n", read_only=True) == [0]
    assert taken(index, b"QUERY|a|\n", read_only=True, waits=1) == [0, 0]
