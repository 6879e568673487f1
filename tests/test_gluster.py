"""`file:` on a real GlusterFS volume that is mounted twice, as on two machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import read_files, read_index, reversed_index
from tests.torture.gluster import EVERY_CACHE, Volume, why_absent

LINES = [b"INDEX|zlib|", b"INDEX|gettext|", b"INDEX|wget|zlib,gettext", b"REMOVE|gettext|"]
WGET = {
    "zlib": frozenset[str](),
    "gettext": frozenset[str](),
    "wget": frozenset({"zlib", "gettext"}),
}


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    if reason := why_absent():
        pytest.skip(reason)
    with Volume(tmp_path / "volume") as made:
        made.mount("a")
        made.mount("b", EVERY_CACHE)
        yield made


def server(volume: Volume, mount: str, *options: str) -> Server:
    return Server(f"file:{volume.mounts[mount] / 'index'}", *options)


def test_what_one_machine_was_told_before_a_kill_another_one_serves(volume: Volume) -> None:
    with server(volume, "a") as first:
        with Wire(first.address) as wire:
            assert wire.ask_all(LINES) == [b"OK\n"] * 3 + [b"FAIL\n"]
            many = wire.ask_all(b"INDEX|many-%d|wget" % n for n in range(300))
            assert many == [b"OK\n"] * 300
        first.kill()
    expected = WGET | {f"many-{n}": frozenset({"wget"}) for n in range(300)}
    assert read_index(volume.brick / "index") == expected
    with server(volume, "b") as second:
        with Wire(second.address) as wire:
            assert wire.ask(b"QUERY|many-299|") == b"OK\n"
            assert wire.ask(b"REMOVE|wget|") == b"FAIL\n"
            gone = wire.ask_all(b"REMOVE|many-%d|" % n for n in range(300))
            assert gone == [b"OK\n"] * 300
        assert second.stop() == 0
    assert read_files(volume.brick / "index", "forward") == WGET
    assert read_files(volume.brick / "index", "reverse") == reversed_index(WGET)
    checked = subprocess.run(
        [sys.executable, "-m", "pkgindex", "check", str(volume.mounts["a"] / "index")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_second_server_is_refused_on_another_mount_while_the_first_lives(volume: Volume) -> None:
    with server(volume, "a") as first:
        with Wire(first.address) as wire:
            wire.ask_all(LINES)
            refused = server(volume, "b")
            with pytest.raises(ServerFailed, match="in use by process"):
                refused.start()
            assert refused.exit_code == 3
            assert wire.ask(b"INDEX|more|wget") == b"OK\n"
        assert first.stop() == 0


def test_a_takeover_on_another_mount_ends_the_first_server(volume: Volume) -> None:
    with server(volume, "a") as first, Wire(first.address) as wire:
        wire.ask_all(LINES)
        with server(volume, "b", "--takeover") as second:
            wire.send(b"REMOVE|unknown|\n")
            assert wire.receive_until_closed() == b""
            assert first.wait() == 5
            assert "another server has taken over" in "\n".join(first.lines)
            with Wire(second.address) as other:
                assert other.ask(b"REMOVE|gettext|") == b"FAIL\n"
                assert other.ask(b"QUERY|gettext|") == b"OK\n"
            assert second.stop() == 0


def test_a_brick_that_dies_under_load_ends_the_server_and_loses_nothing(volume: Volume) -> None:
    with server(volume, "a") as first:
        with Wire(first.address) as wire:
            wire.ask_all(LINES)
            volume.kill_brick()
            wire.send(b"INDEX|more|wget\n")
            assert wire.receive_until_closed() == b""
        assert first.wait() == 5
    volume.start_brick()
    with server(volume, "b") as second:
        with Wire(second.address) as wire:
            for package in WGET:
                assert wire.ask(b"QUERY|%s|" % package.encode()) == b"OK\n"
        assert second.stop() == 0
