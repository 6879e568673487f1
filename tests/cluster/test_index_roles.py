"""Which messages go where, by what a member is at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkgindex._core import Batch
from pkgindex.cluster.index import ClusterIndex
from pkgindex.config import Settings


@pytest.fixture
def index(tmp_path: Path) -> Iterator[ClusterIndex]:
    """One with strong reads, that has no graph yet and knows no writer."""
    settings = Settings(store="file:", cluster="127.0.0.1:0", reads="strong")
    index = ClusterIndex.open(str(tmp_path / "index"), settings)
    index._loop = asyncio.new_event_loop()
    yield index
    index._loop.run_until_complete(asyncio.sleep(0))
    index._loop.close()
    index._node._port.close()


def taken(index: ClusterIndex, lines: bytes, **how: bool) -> list[int]:
    """Give it a batch; the counters of the chunks that wait."""
    data = bytearray(lines)
    batch = Batch()
    batch.load(data, 0, len(data), 10, **how)
    index.apply(batch)
    assert batch.start == len(data)
    return [chunk.first for chunk in index.pending.fresh]


def test_a_strong_read_keeps_its_place_among_messages_while_there_is_no_graph(
    index: ClusterIndex,
) -> None:
    """Read from the graph that comes, it would see what its client has changed behind it."""
    assert taken(index, b"QUERY|a|\n") == [1]
    assert taken(index, b"INDEX|a|\n", waits=True) == [1, 2]
    assert index.pending.messages == 2


def test_what_may_change_nothing_is_never_handed_to_a_writer(index: ClusterIndex) -> None:
    assert taken(index, b"INDEX|a|\nREMOVE|a|\n", read_only=True) == [0]
    assert taken(index, b"QUERY|a|\n", read_only=True, waits=True) == [0, 0]
