"""Each call to the storage that can fail is made to fail once, or to be the last one before a SIGKILL.

A short life of a server: it recovers what a killed one left, answers changes, writes package files,
stops. strace lets the n-th call of a kind fail, or kills the server as it makes it. Then: nothing is
acknowledged after a failed commit; the server ends by itself, soon, with one line; the next one has
everything that was acknowledged, and its package files agree with one another.

A run takes one place of each kind, always the same; give `fail_each` no number and it takes them all.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.store.failing import (
    CALLS,
    CHANGES,
    Life,
    assert_ended_well,
    assert_silent_after,
    judge,
    leave_by_a_kill,
    live,
    places,
)
from tests.store.tracing import require_strace

PLACES = 1  # of each kind


@pytest.fixture(scope="module")
def left_by_a_kill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with package files, a journal over them, and an epoch to fence."""
    require_strace()
    return leave_by_a_kill(tmp_path_factory.mktemp("before") / "the-store")


@pytest.fixture(scope="module")
def clean(left_by_a_kill: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    life = live(left_by_a_kill, tmp_path_factory.mktemp("clean") / "the-store")
    assert life.exit_code == 0
    assert life.acknowledged == CHANGES
    return life


def sample(clean: Life, kind: str, number: int | None) -> Iterator[int]:
    found = places(clean, kind)
    assert found, f"the server never calls {kind} on its store"
    if number is not None:
        found = random.Random(kind).sample(found, min(number, len(found)))
    yield from sorted(found)


def fail_each(before: Path, clean: Life, folder: Path, kind: str, number: int | None) -> None:
    for place in sample(clean, kind, number):
        error = ("EIO", "ENOSPC")[place % 2]
        what = f"{kind} number {place} fails with {error}"
        root = folder / f"{kind}-{place}" / "the-store"
        root.parent.mkdir()
        life = live(before, root, f"{kind}:error={error}:when={place}")
        stored = ["/the-store/" in line for line in life.injected]
        if any(stored):
            # Another thread's call of that number may have been Python's own, as it loaded a module.
            if all(stored):
                assert_ended_well(life, what)
            assert_silent_after(life, what)
        elif life.injected:
            continue  # the store was not touched
        judge(root, life, what)
        shutil.rmtree(root.parent)


def kill_at_each(before: Path, clean: Life, folder: Path, kind: str, number: int | None) -> None:
    for place in sample(clean, kind, number):
        what = f"killed in {kind} number {place}"
        root = folder / f"{kind}-{place}" / "the-store"
        root.parent.mkdir()
        life = live(before, root, f"{kind}:signal=KILL:when={place}")
        judge(root, life, what)
        shutil.rmtree(root.parent)


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_that_fails_once_ends_the_writer_and_loses_nothing_acknowledged(
    kind: str, left_by_a_kill: Path, clean: Life, tmp_path: Path
) -> None:
    fail_each(left_by_a_kill, clean, tmp_path, kind, PLACES)


@pytest.mark.parametrize("kind", ["renameat", "fdatasync", "syncfs"])
def test_a_kill_at_a_call_loses_nothing_acknowledged(
    kind: str, left_by_a_kill: Path, clean: Life, tmp_path: Path
) -> None:
    kill_at_each(left_by_a_kill, clean, tmp_path, kind, PLACES)


@pytest.mark.parametrize("name", ["owner", "segment", "t1"])
def test_a_file_that_cannot_be_written_ends_the_writer_and_loses_nothing_acknowledged(
    name: str, left_by_a_kill: Path, tmp_path: Path
) -> None:
    """By its path: a thread's n-th write(2) may as well be one that wakes the event loop."""
    root = tmp_path / "life" / "the-store"
    root.parent.mkdir()
    path = f"{root}/staging/00000003/{name}"
    life = live(left_by_a_kill, root, "write:error=ENOSPC:when=1", only=[path])
    assert len(life.injected) == 1
    assert_ended_well(life, name)
    judge(root, life, name)


SIGNAL_AT_A_FAILURE = """
from pkgindex import server
fail = server._Server._fail
def told(self, error):
    fail(self, error)
    self._stop(15)
server._Server._fail = told
"""


def test_a_signal_in_the_moment_of_a_failure_does_not_make_a_good_end_of_it(
    left_by_a_kill: Path, tmp_path: Path
) -> None:
    """The event loop may hand over a signal between the failure and the end that it asks for."""
    root = tmp_path / "life" / "the-store"
    root.parent.mkdir()
    failing = "unlinkat:error=EIO:when=1"
    life = live(left_by_a_kill, root, failing, mutation=SIGNAL_AT_A_FAILURE)
    assert_ended_well(life, "a signal in the moment of a failure")
    judge(root, life, "a signal in the moment of a failure")


@pytest.mark.parametrize(
    ("failed", "matters"),
    [
        ('renameat(5<S>, "proof-00000000-0-1", 5<S>, "proof-00000000-1-2")', True),
        ("fdatasync(9<S/journal/00000003-00000000>)", True),
        ('unlinkat(5<S>, "from-00000002-proof-00000000-1-2", 0)', False),
    ],
)
def test_an_answer_after_a_failed_call_is_wrong_where_it_rests_on_that_call(
    failed: str, matters: bool
) -> None:
    text = f"""7 {failed.replace("S", "/a/the-store/staging/00000003")} = -1 EIO (INJECTED)
6 write(8<socket:[1]>, "OK\\n", 3) = 3"""
    with pytest.raises(AssertionError) if matters else nullcontext():
        assert_silent_after(Life(text=text), failed)
