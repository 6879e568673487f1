"""LOCK as who looks on sees it (rule L1): other processes' bytes, and none of them is taken for that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount

HOLDER = """
import sys
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount
lease = Lease(Mount(sys.argv[1]))
print(lease.hold(int(sys.argv[2])), flush=True)
sys.stdin.read()
"""


@contextmanager
def held(root: Path, epoch: int) -> Iterator[str]:
    """Another process takes the byte of an epoch and goes on to live; what it says of that."""
    command = [sys.executable, "-c", HOLDER, str(root), str(epoch)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        try:
            yield holder.stdout.readline().strip()
        finally:
            holder.kill()


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    with Lease(Mount(str(tmp_path))) as lease:
        yield lease


def test_a_byte_is_held_as_long_as_its_process_lives(lease: Lease, tmp_path: Path) -> None:
    assert not lease.is_held(7)
    with held(tmp_path, 7) as said:
        assert said == "True"
        assert lease.is_held(7)
        assert not lease.is_held(6)
        assert not lease.is_held(8)
    assert not lease.is_held(7)


def test_who_looks_holds_nobody_up(lease: Lease, tmp_path: Path) -> None:
    assert not lease.is_held(7)
    with held(tmp_path, 7) as said:
        assert said == "True"


def test_ones_own_byte_is_no_other_processs(lease: Lease, tmp_path: Path) -> None:
    assert lease.hold(7)
    assert not lease.is_held(7)
    with held(tmp_path, 7) as said:
        assert said == "False"
