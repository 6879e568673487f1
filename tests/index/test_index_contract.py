"""The contract, kept by each Index that comes with pkgindex, and by one that another package adds."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pkgindex._core import Batch
from pkgindex.cluster.index import ClusterIndex
from pkgindex.config import Settings
from pkgindex.errors import ConfigError
from pkgindex.index import Index, open_index
from pkgindex.index.file import FileIndex
from tests.index.contract import IndexContract
from tests.index.inside import Inside
from tests.reference import FAIL, OK
from tests.servers import PATIENCE, Server, Wire

ROOT = Path(__file__).parent.parent.parent


class TestMemoryIndex(IndexContract):
    """`memory:`."""

    @pytest.fixture
    def url(self) -> str:
        return "memory:"


class TestFileIndex(IndexContract):
    """`file:`."""

    durable = True

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file:{tmp_path / 'index'}"


class TestServerOfAClusterThatIsAlone(IndexContract):
    """`file:` with --cluster."""

    durable = True
    reads = "local"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file:{tmp_path / 'index'}"

    def opened(self, url: str) -> Index:
        settings = Settings(store=url, cluster="127.0.0.1:0", reads=self.reads)
        return ClusterIndex.open(url.partition(":")[2], settings)


class TestServerOfAClusterWithStrongReads(TestServerOfAClusterThatIsAlone):
    """`file:` with --cluster and --reads strong."""

    reads = "strong"


def test_a_journal_over_its_limit_is_shortened_also_if_no_file_lags_behind(tmp_path: Path) -> None:
    """Else changes would wait for a round, and the round for a change."""
    url = f"file:{tmp_path / 'index'}"
    index = open_index(Settings(store=url, journal_limit=64 * 1024))
    assert isinstance(index, FileIndex)
    journal = index._journal
    rotate, rotated, go_on = journal.rotate, threading.Event(), threading.Event()

    def rotate_slowly() -> int:
        segment = rotate()
        rotated.set()
        assert go_on.wait(PATIENCE)
        return segment

    journal.rotate = rotate_slowly  # type: ignore[method-assign]
    with Inside(index) as inside, Wire(inside.address) as wire, Wire(inside.address) as other:
        assert wire.ask(b"INDEX|a|") == OK
        assert rotated.wait(PATIENCE)
        # These are in the new segment and in the round: nothing lags behind when it is written.
        lines = [b"INDEX|%b%d|" % (b"n" * 200, i) for i in range(2000)]
        answers: list[bytes] = []
        asker = threading.Thread(target=lambda: answers.extend(wire.ask_all(lines)))
        asker.start()
        inside.wait_until(lambda: index.congested)
        assert other.ask(b"QUERY|a|") == OK
        go_on.set()
        asker.join(PATIENCE)
        assert answers == [OK] * 2000


@pytest.mark.parametrize(
    ("first", "second", "commits"),
    [
        (b"REMOVE|a|\nREMOVE|b|\n", b"REMOVE|c|\n", 1),
        (b"INDEX|a|\nINDEX|b|\n", b"INDEX|c|\n", 1),
        (b"REMOVE|a|\n", b"REMOVE|c|\n", 2),
        (b"INDEX|a|\n", b"INDEX|c|\n", 2),
        (b"QUERY|a|\n" * 6 + b"REMOVE|a|\n", b"REMOVE|c|\n", 2),
        (b"QUERY|a|\n" * 6 + b"INDEX|a|\n", b"INDEX|c|\n", 1),
    ],
    ids=[
        "many without effect",
        "many changes",
        "one without effect",
        "one change",
        "one without effect beside many queries",
        "one change beside many queries",
    ],
)
def test_a_commit_waits_a_moment_for_more_answers_if_many_share_it_or_keep_the_server_busy(
    tmp_path: Path, first: bytes, second: bytes, commits: int
) -> None:
    """One client alone is not kept waiting."""
    index = open_index(Settings(store=f"file:{tmp_path / 'index'}"))
    assert isinstance(index, FileIndex)

    async def tell_in_two_turns() -> int:
        settled = asyncio.Event()
        index.start(asyncio.get_running_loop(), settled.set, lambda error: None)
        before = index.stats()["commits"]
        tickets = []
        for lines in (first, second):
            batch = Batch()
            batch.load(bytearray(lines), 0, len(lines), 10)
            index.apply(batch)
            tickets.append(batch.ticket)
            await asyncio.sleep(0)
        while index.settled < tickets[-1]:
            settled.clear()
            await asyncio.wait_for(settled.wait(), PATIENCE)
        made = index.stats()["commits"] - before  # type: ignore[operator]
        await index.stop(PATIENCE)
        return int(made)

    assert asyncio.run(tell_in_two_turns()) == commits


# --- a scheme of another package ------------------------------------------------------------------

#: A whole package: as small as an Index can be that does not stand on the core's Graph, and as late
#: as one on a database. It answers in an order of its own making only where it may.
LATE_DICT = '''
"""An Index in a dict, which answers a millisecond later."""

import asyncio
from collections import deque

from pkgindex.errors import ConfigError
from pkgindex.index import Index

MOST_PENDING = 64


class LateDict(Index):
    def __init__(self):
        self.packages = {}
        self.pending = deque()
        self.ticket = 0

    @classmethod
    def open(cls, location, settings, progress=None):
        if location:
            raise ConfigError(f"{settings.store}: latedict: has no place; write just latedict:")
        return cls()

    def start(self, loop, settled, failed):
        self.loop, self.tell = loop, settled

    def apply(self, batch):
        if len(self.pending) >= MOST_PENDING:
            self.congested = True
            return b""
        messages = list(batch)
        if not messages:
            return b""
        self.ticket += 1
        replies = bytearray()
        if not self.pending:
            self.loop.call_later(0.001, self.answer)
        self.pending.append((self.ticket, messages, replies))
        return [(self.ticket, replies, batch.changes)]

    def answer(self):
        while self.pending:
            self.settled, messages, replies = self.pending.popleft()
            for message in messages:
                replies += self.reply(message)
        self.congested = False
        self.tell()

    def reply(self, message):
        if message is None:
            return b"ERROR\\n"
        command, name, needed = message
        if command == "QUERY":
            done = name in self.packages
        elif command == "INDEX":
            done = self.packages.keys() >= set(needed)
            if done:
                self.packages[name] = set(needed)
        else:
            done = not any(name in n for other, n in self.packages.items() if other != name)
            if done:
                self.packages.pop(name, None)
        return b"OK\\n" if done else b"FAIL\\n"

    async def stop(self, timeout):
        self.answer()
        return {"packages": len(self)}

    def stats(self):
        return {"packages": len(self), "tickets": self.ticket}

    def __len__(self):
        return len(self.packages)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a package with another scheme is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "latedict.py").write_text(LATE_DICT)
    described = folder / "latedict-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: latedict\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[pkgindex.stores]\nlatedict = latedict:LateDict\nabsent = latedict:Absent\n"
    )
    return folder


class TestAnIndexOfAnotherPackage(IndexContract):
    """`latedict:`, found by its entry point."""

    @pytest.fixture
    def url(self, installed: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.syspath_prepend(installed)
        importlib.invalidate_caches()
        return "latedict:"


def test_a_server_serves_the_scheme_of_another_package(installed: Path) -> None:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    with Server("latedict:", environment={"PYTHONPATH": path}) as server:
        with Wire(server.address) as wire:
            assert wire.ask_all([b"INDEX|a|", b"QUERY|a|", b"REMOVE|b|"]) == [OK, OK, OK]
            # Far more than it lets wait.
            assert wire.exchange_bytes(b"QUERY|b|\n" * 500_000, 500_000) == FAIL * 500_000
        assert server.stop() == 0
        assert server.wait_for("stopped")["packages"] == 1


def test_the_conformance_suite_runs_against_it(installed: Path) -> None:
    """The wire alone: what any server that speaks the protocol must do."""
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    with Server("latedict:", environment={"PYTHONPATH": path}) as server:
        host, port = server.address
        files = [f"tests/conformance/test_{part}.py" for part in ("commands", "cycles")]
        options = [
            "-k",
            "not random and not thousands",
            "-q",
            "-p",
            "no:cacheprovider",
            "--server",
            f"{host}:{port}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:]


# --- how a URL finds its index --------------------------------------------------------------------


@pytest.mark.parametrize("url", ["postgresql://host/base", "plain-path", "", "Memory:"])
def test_an_unknown_scheme_names_those_that_are_installed(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_index(Settings(store=url))
    assert "file:" in str(refused.value)
    assert "memory:" in str(refused.value)


def test_a_scheme_whose_package_is_broken_is_refused_in_one_line(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="absent"):
        open_index(Settings(store="absent:"))
