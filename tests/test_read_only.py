"""A store that may only be read: `check` and `dump` read it, and still know a server that writes it.

Beside a real read-only bind mount of the store, its files are made read-only for one who may not pass
over that: a process without CAP_DAC_OVERRIDE.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Server, Wire

DROPPED = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
UNGUARDED = "no lock guards what is read here"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of four packages: the files of two, and a journal with two more."""
    root = tmp_path / "index"
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            assert wire.ask_all([b"INDEX|y|", b"INDEX|z|y"]) == [b"OK\n"] * 2
        assert server.stop() == 0
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            assert wire.ask_all([b"INDEX|a|", b"INDEX|b|a"]) == [b"OK\n"] * 2
        server.kill()
    return root


@pytest.fixture(params=["mount", "rights"])
def read_only(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[Path]:
    """The same store, to be read only."""
    if request.param == "mount":
        point = tmp_path / "snapshot"
        point.mkdir()
        bound = subprocess.run(
            ["mount", "--bind", str(store), str(point)], capture_output=True, text=True
        )
        if bound.returncode:
            pytest.skip(f"this process may not mount: {bound.stderr.strip()}")
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(point)], check=True)
            with pytest.raises(OSError, match="Read-only"):
                (point / "LOCK").open("r+")
            yield point
        finally:
            subprocess.run(["umount", "--lazy", str(point)], check=True)
        return
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everything, and there is no setpriv (util-linux) to forbid it")
    for path in [store, *store.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield store
    for path in [store, *store.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    without = DROPPED if os.geteuid() == 0 else ()
    return subprocess.run(
        [*without, sys.executable, "-m", "pkgindex", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def contents(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_check_and_dump_read_it_and_change_nothing(read_only: Path) -> None:
    before = contents(read_only)
    checked, dumped = run("check", read_only), run("dump", read_only)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "4 packages" in checked.stdout
    assert (dumped.returncode, dumped.stderr) == (0, "")
    assert [json.loads(line) for line in dumped.stdout.splitlines()] == [
        {"name": "a", "depends": []},
        {"name": "b", "depends": ["a"]},
        {"name": "y", "depends": []},
        {"name": "z", "depends": ["y"]},
    ]
    assert contents(read_only) == before


def test_a_server_that_writes_it_meanwhile_is_known_by_its_lock(
    store: Path, read_only: Path
) -> None:
    if read_only == store:
        pytest.skip("a server of this user cannot write it either")
    with Server(f"file:{store}") as server:
        for command in ("check", "dump"):
            refused = run(command, read_only)
            assert refused.returncode == 2
            assert f"in use by process {server.pid}" in refused.stderr
            assert not refused.stdout
        assert server.stop() == 0
    assert run("check", read_only).returncode == 0


def test_without_a_lock_it_is_read_and_one_line_says_what_that_means(
    store: Path, read_only: Path
) -> None:
    store.chmod(0o750)
    (store / "LOCK").unlink()
    store.chmod(0o550)
    for command, printed in (("check", "nothing is wrong"), ("dump", '"name": "b"')):
        done = run(command, read_only)
        assert done.returncode == 0
        assert printed in done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"pkgindex: {read_only}: ")
        assert UNGUARDED in line
    store.chmod(0o750)


def test_what_is_wrong_in_it_is_named_and_cannot_be_repaired(store: Path, read_only: Path) -> None:
    (wrong,) = store.glob("reverse/*/y")
    wrong.chmod(0o640)
    wrong.write_text("wrong\n")
    done = run("check", read_only, "--repair")
    assert done.returncode == 2, done.stdout
    assert f"reverse/{wrong.parent.name}/y" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "LOCK: cannot open it" in line
