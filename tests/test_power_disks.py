"""The disks of the fault campaigns lose what was not synced, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture.power_disks import Cached, Ext4, Forgetful


@pytest.mark.parametrize("kind", [Cached, Ext4, Forgetful])
def test_a_power_loss_takes_what_was_not_synced_and_leaves_what_was(
    kind: type[Cached | Ext4 | Forgetful], tmp_path: Path
) -> None:
    if reason := kind.why_not():
        pytest.skip(reason)
    with kind(tmp_path) as disk:
        for round_ in range(2):
            put(disk.mount / f"synced-{round_}", b"s" * 10_000, sync=True)
            put(disk.mount / f"lost-{round_}", b"l" * 10_000, sync=False)
            disk.cut()
            with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
                put(disk.mount / "later", b"", sync=True)
            disk.restore(None)
            found = sorted(path.name for path in disk.mount.iterdir() if path.is_file())
            assert found == [f"synced-{n}" for n in range(round_ + 1)]
            assert (disk.mount / f"synced-{round_}").read_bytes() == b"s" * 10_000


def put(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a file, and perhaps make it and its name durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.write(fd, data)
        if sync:
            os.fsync(fd)
            os.fsync(folder)
    finally:
        os.close(fd)
        os.close(folder)
