"""A replicated GlusterFS volume, and what becomes of the index when one of its bricks is away."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.servers import Server, Wire
from tests.store.reading import read_index
from tests.torture.failover import CopiesStory, start
from tests.torture.gluster import Volume, why_absent
from tests.torture.reigns import Place


@pytest.fixture(autouse=True)
def gluster() -> None:
    if reason := why_absent():
        pytest.skip(reason)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Volume]:
    """Two bricks, of which the first decides."""
    with Volume(tmp_path / "volume", bricks=2, quorum="auto") as volume:
        yield volume


def test_of_two_bricks_the_second_may_die_under_load_and_the_first_ends_the_writer(
    two: Volume, tmp_path: Path
) -> None:
    place = Place([two.mount(str(n)) / "index" for n in range(3)], two.brick / "index", two)
    story = CopiesStory(place, tmp_path / "work", 1, partial(start, "", place), strong=True)
    with story:
        story.act("second brick killed", lambda s: s.lose_copy(1))
        assert (story.counts["faults"], story.failures) == (1, [])
        # It has all that the first has, and yet does not decide alone.
        story.act("first brick killed", lambda s: s.lose_brick())
    assert (story.failures, story.undecided) == ([], [])
    assert story.counts["faults"] == 2


@pytest.mark.parametrize("quorum", ["auto", "none"])
def test_a_brick_that_missed_a_takeover_proves_nothing_to_a_deposed_writer_unless_without_quorum(
    tmp_path: Path, quorum: str
) -> None:
    with Volume(tmp_path / "volume", bricks=2, quorum=quorum, heals=False) as volume:
        a, b = volume.mount("a"), volume.mount("b")
        with Server(f"file:{a / 'index'}") as first, Wire(first.address) as wire:
            assert wire.ask(b"INDEX|kept|") == b"OK\n"
            first.send_signal(signal.SIGSTOP)
            wire.send(b"INDEX|lost|\n")
            volume.kill_brick(1)
            with Server(f"file:{b / 'index'}", "--takeover") as second:
                volume.start_brick(1)  # where the first still has its folder
                first.send_signal(signal.SIGCONT)
                if quorum == "none":
                    # Why the manual forbids it: an acknowledged change that no later writer has.
                    assert wire.receive() == [b"OK\n"]
                    first.kill()
                else:
                    assert wire.receive_until_closed() == b""
                    assert first.wait() == 5
                assert second.stop() == 0
        assert read_index(volume.brick / "index") == {"kept": frozenset()}


def test_what_two_writers_rest_on_holds_while_a_brick_has_not_healed(tmp_path: Path) -> None:
    with Volume(tmp_path / "volume", bricks=3, arbiter=True, heals=False) as volume:
        a, b = volume.mount("a"), volume.mount("b")
        (a / "new").mkdir()
        (a / "old").mkdir()
        (a / "old" / "proof").write_bytes(b"")
        old = os.open(a / "old", os.O_RDONLY)
        try:
            volume.kill_brick(0)
            (b / "third").mkdir()
            (b / "old" / "proof").rename(b / "new" / "taken")
            (b / "old").rmdir()
            volume.start_brick(0)
            assert (volume.brick / "old" / "proof").exists()
            with pytest.raises(OSError, match=r"Stale file handle|No such file"):
                os.rename("proof", "proof-2", src_dir_fd=old, dst_dir_fd=old)
            with pytest.raises(FileExistsError):
                (a / "third").mkdir()
            # The one rule that GlusterFS breaks: it says yes. A claimant lists again, and nothing is gone.
            (a / "new").rmdir()
            assert [path.name for path in (b / "new").iterdir()] == ["taken"]
        finally:
            os.close(old)
