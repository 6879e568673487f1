"""What a follower that comes again is sent: what it lacks, or a snapshot, and nothing between."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex.cluster import feed
from pkgindex.cluster.feed import Backlog

Kept = tuple[int, int, bytes]


def batch(first: int, last: int) -> Kept:
    """A batch of the changes from `first` to `last`, which says so."""
    return first, last - first + 1, b"".join(b"%d\n" % n for n in range(first, last + 1))


def test_it_begins_with_what_its_writer_has_itself_followed_and_read() -> None:
    backlog = Backlog(
        [batch(4, 6), batch(5, 8)]
    )  # the journal's pieces may overlap with the stream's
    backlog.add(*batch(9, 9))
    assert backlog.after(3, 9) == [batch(4, 6), batch(5, 8), batch(9, 9)]
    assert backlog.after(6, 9) == [batch(5, 8), batch(9, 9)]
    assert backlog.after(9, 9) == []
    assert backlog.after(2, 9) is None


def test_who_has_more_than_is_settled_cannot_go_on_from_it() -> None:
    backlog = Backlog([batch(1, 3)])
    assert backlog.after(4, 3) is None


def test_nothing_is_lacking_where_nothing_is_kept() -> None:
    assert Backlog().after(0, 0) == []
    assert Backlog().after(7, 7) == []
    assert Backlog().after(6, 7) is None


def test_a_batch_that_is_not_next_takes_the_place_of_all() -> None:
    backlog = Backlog([batch(1, 3)])
    backlog.add(*batch(5, 6))
    assert backlog.after(3, 6) is None
    assert backlog.after(4, 6) == [batch(5, 6)]
    assert backlog.bytes == len(batch(5, 6)[2])


def test_its_memory_is_bounded_but_for_the_newest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "BACKLOG_BYTES", 10)
    backlog = Backlog()
    for n in range(1, 10):
        backlog.add(*batch(n, n))
    assert backlog.bytes == 10
    assert backlog.after(4, 9) == [batch(n, n) for n in range(5, 10)]
    assert backlog.after(3, 9) is None
    backlog.add(*batch(10, 99))
    assert backlog.after(9, 99) == [batch(10, 99)]
    assert backlog.after(8, 99) is None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12),
    st.integers(0, 60),
    st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_what_it_gives_leads_from_a_position_to_the_newest_without_a_gap(
    steps: list[tuple[int, int]], position: int, limit: int
) -> None:
    """`steps`: how far each batch reaches back over those before it, and how many changes are new."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feed, "BACKLOG_BYTES", limit)
        backlog, settled = Backlog(), 0
        for back, new in steps:
            first = max(1, settled + 1 - back)
            settled += new
            backlog.add(*batch(first, settled))
    batches = backlog.after(position, settled)
    if batches is None:
        assert position > settled or backlog.after(settled - 1, settled) != []
        return
    at = position
    for first, count, lines in batches:
        assert first <= at + 1
        assert lines == batch(first, first + count - 1)[2]
        at = max(at, first + count - 1)
    assert at == settled
