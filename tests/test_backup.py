"""The backup recipes of docs/operating.md, run as they stand there, restore what was acknowledged.

A recipe calls `systemctl`; a script of that name does what the real one would, to one server of the
test. Clients go on changing the index while a running server is copied.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pkgindex.store.check import check
from pkgindex.store.offline import Offline
from tests.servers import Server, ServerFailed, Wire

PAGE = Path(__file__).resolve().parent.parent / "docs/operating.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no docs/ beside the tests")

#: Does to process $PID what systemd would do to the unit; `start` is the test's own.
SYSTEMCTL = """#!/bin/sh
case "$*" in
    "stop pkgindex") kill -TERM $PID; while kill -0 $PID 2>/dev/null; do
        case $(ps -o stat= -p $PID) in Z*) break;; esac; sleep 0.05; done;;
    "start pkgindex") ;;
    "kill -s STOP pkgindex") kill -STOP $PID;;
    "kill -s CONT pkgindex") kill -CONT $PID;;
    *) echo "unexpected: systemctl $*" >&2; exit 1;;
esac
"""

BASE = [f"base-{n}" for n in range(3000)]


def recipe(name: str) -> str:
    match = re.search(rf"<!-- backup: {name} -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match, f"no recipe {name!r}"
    return match[1]


def follow(steps: str, folder: Path, server: Server, **variables: Path) -> None:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: str(value) for name, value in variables.items()}
    subprocess.run(
        ["bash", "-euc", steps],
        env=os.environ | environment | {"PATH": path, "PID": str(server.pid)},
        check=True,
        timeout=90,
    )


class Writer(threading.Thread):
    """A client that indexes one package after another, each needing the one before."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.address = server.address
        self.acknowledged = 0
        self.ended = threading.Event()

    def run(self) -> None:
        with Wire(self.address) as wire:
            while not self.ended.is_set():
                n = self.acknowledged
                needed = f"chain-{n - 1}" if n else ""
                if wire.ask(f"INDEX|chain-{n}|{needed}".encode()) != b"OK\n":
                    return
                self.acknowledged = n + 1


def index_base(server: Server) -> None:
    with Wire(server.address) as wire:
        lines = [f"INDEX|{name}|{BASE[n - 1] if n else ''}" for n, name in enumerate(BASE)]
        assert set(wire.ask_all(line.encode() for line in lines)) == {b"OK\n"}


def wait_for_a_snapshot(store: Path) -> None:
    # The segment that names it is the only one left once a round is over.
    patience = time.monotonic() + 60
    while not any((store / "snapshot").iterdir()) or len([*(store / "journal").iterdir()]) > 1:
        assert time.monotonic() < patience
        time.sleep(0.05)


def packages_of(backup: Path) -> set[str]:
    """Return the packages of a copy, which must be sound."""
    with Offline(str(backup)) as store:
        report = check(store)
        assert report.is_sound, [str(one) for one in report.problems + report.derived]
        return set(store.read().graph)


def assert_served(url: str, packages: set[str]) -> None:
    with Server(url) as server:
        assert server.wait_for("serving")["packages"] == len(packages)
        with Wire(server.address) as wire:
            asked = wire.ask_all(f"QUERY|{name}|".encode() for name in sorted(packages))
        assert set(asked) == {b"OK\n"}
        assert server.stop() == 0


def test_a_copy_of_a_stopped_store_has_everything(tmp_path: Path) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"
    with Server(f"file:{store}") as server:
        index_base(server)
        follow(recipe("stopped"), tmp_path, server, STORE=store, BACKUP=backup)
        assert server.wait() == 0
    assert packages_of(backup) == set(BASE)
    assert_served(f"file:{backup}", set(BASE))


@pytest.mark.parametrize("name", ["paused", "linked"])
def test_a_copy_of_a_paused_store_has_all_that_was_acknowledged(name: str, tmp_path: Path) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"
    with Server(f"file:{store}") as server:
        index_base(server)
        wait_for_a_snapshot(store)
        writer = Writer(server)
        writer.start()
        while writer.acknowledged < 20:
            assert writer.is_alive()
            writer.ended.wait(0.01)
        before = writer.acknowledged
        follow(recipe(name), tmp_path, server, STORE=store, BACKUP=backup)
        copied = writer.acknowledged
        while writer.acknowledged < copied + 20:  # it went on, and nobody was told FAIL
            assert writer.is_alive()
            writer.ended.wait(0.01)
        writer.ended.set()
        writer.join()
        after = writer.acknowledged
        assert server.stop() == 0
    found = packages_of(backup)
    chain = len(found) - len(BASE)
    assert before <= chain <= after + 1
    assert found == {*BASE, *(f"chain-{n}" for n in range(chain))}
    assert_served(f"file:{backup}", found)
    # The backup shares files with the store, if linked: neither has changed the other's.
    assert packages_of(store) == {*BASE, *(f"chain-{n}" for n in range(after))}
    assert packages_of(backup) == found


def test_a_restored_store_is_as_it_was(tmp_path: Path) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"
    with Server(f"file:{store}") as server:
        index_base(server)
        follow(recipe("paused"), tmp_path, server, STORE=store, BACKUP=backup)
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|later|") == b"OK\n"
            assert wire.ask(f"REMOVE|{BASE[-1]}|".encode()) == b"OK\n"
        aside = tmp_path / "aside"
        follow(recipe("restore"), tmp_path, server, STORE=store, BACKUP=backup, ASIDE=aside)
    assert packages_of(aside) == {*BASE[:-1], "later"}
    assert_served(f"file:{store}", set(BASE))
    assert packages_of(backup) == set(BASE)  # the backup itself is as it was


def test_a_dump_loads_into_another_store(tmp_path: Path) -> None:
    pytest.importorskip("msgspec", reason="load's extra is not installed")
    store = tmp_path / "store"
    with Server(f"file:{store}") as server:
        index_base(server)
        with Wire(server.address) as wire:
            lines = [b"INDEX|self|", b"INDEX|self|self", b"INDEX|a|", b"INDEX|b|a", b"INDEX|a|b"]
            assert wire.ask_all(lines) == [b"OK\n"] * 5
        assert server.stop() == 0
    with Server(f"file:{tmp_path / 'other'}") as server:
        assert not isinstance(server.address, str)
        address = "{}:{}".format(*server.address)
        command = f"{sys.executable} -m pkgindex"
        subprocess.run(
            ["bash", "-ec", f"{command} dump {store} | {command} load --server {address} -"],
            check=True,
            timeout=60,
            stdout=subprocess.DEVNULL,
        )
        assert server.stop() == 0
    with Offline(str(store)) as one, Offline(str(tmp_path / "other")) as other:
        before, after = one.read().graph, other.read().graph
        assert set(before) == set(after)
        assert all(before.dependencies(name) == after.dependencies(name) for name in before)


def test_a_server_refuses_a_restored_store_without_its_journal(tmp_path: Path) -> None:
    """Why a backup is the whole folder: what is left out is missed, and said."""
    store = tmp_path / "store"
    with Server(f"file:{store}") as server:
        index_base(server)
        assert server.stop() == 0
    for segment in (store / "journal").iterdir():
        segment.unlink()
    with pytest.raises(ServerFailed, match="acknowledged"), Server(f"file:{store}"):
        pass
