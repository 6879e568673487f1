"""Each call to the storage that can fail is made to fail once, or to be the last one before a SIGKILL.

A short life of a server: it recovers what a killed one left, answers changes, writes package files,
stops. strace lets the n-th call of a kind fail, or kills the server as it makes it. Then: nothing is
acknowledged after a failed commit; the server ends by itself, soon, with one line; the next one has
everything that was acknowledged, and its package files agree with one another.

A run takes one place of each kind, always the same; give `fail_each` no number and it takes them all.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import read_files, read_index, reversed_index
from tests.store.tracing import Call, Traced, require_strace

# Kinds of calls by whether a file, a name or a journal depends on them.
CALLS = (
    "fdatasync",
    "writev",
    "renameat",
    "fsync",
    "syncfs",
    "openat",
    "mkdir",
    "mkdirat",
    "unlinkat",
    "rmdir",
)
EVERY = ",".join((*CALLS, "write"))
PLACES = 1  # of each kind
SECONDS_TO_END = 10.0

CHANGES = [
    b"INDEX|a|",
    b"INDEX|b|a",
    b"REMOVE|left|",
    b"INDEX|c|a,b",
    b"INDEX|b|",
    b"REMOVE|c|",
    b"INDEX|d|b,a",
]


@dataclass
class Life:
    """What one life of a server acknowledged, and how it ended."""

    acknowledged: list[bytes] = field(default_factory=list)
    exit_code: int = 0
    lines: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    text: str = ""

    @property
    def injected(self) -> list[str]:
        return [line for line in self.text.splitlines() if "(INJECTED)" in line]


@pytest.fixture(scope="module")
def left_by_a_kill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with package files, a journal over them, and an epoch to fence."""
    require_strace()
    root = tmp_path_factory.mktemp("before") / "the-store"
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|left|", b"INDEX|kept|"])
        assert server.stop() == 0
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|under|kept", b"INDEX|left|kept"])
        server.kill()
    return root


def live(before: Path, root: Path, *inject: str, only: Sequence[str] = ()) -> Life:
    """Live once on a copy of the store."""
    shutil.copytree(before, root)
    life = Life()
    server = Traced(f"file:{root}", root.parent / "trace", calls=EVERY, inject=inject, only=only)
    begun = time.monotonic()
    with suppress(ServerFailed):
        server.start()
        with suppress(EOFError, ConnectionError), Wire(server.address, patience=20) as wire:
            for line in CHANGES:
                assert wire.ask(line) == b"OK\n"
                life.acknowledged.append(line)
        with suppress(ProcessLookupError):
            server.send_signal(15)
    life.exit_code = server.wait(20)
    assert time.monotonic() - begun < SECONDS_TO_END + 20
    life.calls = server.calls()
    life.text = server.trace.read_text(errors="replace")
    life.lines = server.lines
    server.log_file.unlink(missing_ok=True)
    return life


@pytest.fixture(scope="module")
def clean(left_by_a_kill: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    life = live(left_by_a_kill, tmp_path_factory.mktemp("clean") / "the-store")
    assert life.exit_code == 0
    assert life.acknowledged == CHANGES
    return life


def places(life: Life, kind: str) -> list[int]:
    """Which calls of a kind, counted in each thread as strace counts them, touch the store."""
    counts: dict[str, int] = {}
    found = set()
    for line in life.text.splitlines():
        match = re.match(rf"(\d+) +{kind}\((.*)", line)
        if match:
            counts[match[1]] = counts.get(match[1], 0) + 1
            if "/the-store/" in match[2] and "O_RDONLY|O_NONBLOCK" not in match[2]:
                found.add(counts[match[1]])
    return sorted(found)


def expected(lines: list[bytes]) -> dict[str, frozenset[str]]:
    """The index after these changes of the store that the fixture left."""
    index = {"kept": frozenset[str](), "under": frozenset({"kept"}), "left": frozenset({"kept"})}
    for line in lines:
        command, package, dependencies = line.decode().split("|")
        if command == "INDEX":
            index[package] = frozenset(dependencies.split(",")) - {""}
        else:
            index.pop(package, None)
    return index


def judge(root: Path, life: Life, what: str) -> None:
    """Nothing acknowledged is lost, at most the next change is there too, and the files agree."""
    done = len(life.acknowledged)
    allowed = [expected(CHANGES[:n]) for n in (done, done + 1)]
    assert read_index(root) in allowed, what
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            for package in ("kept", "under", "left", "a", "b", "c", "d"):
                there = wire.ask(f"QUERY|{package}|".encode()) == b"OK\n"
                assert there in {package in index for index in allowed}, (what, package)
        assert server.stop() == 0
    forward = read_files(root, "forward")
    assert forward in allowed, what
    assert read_files(root, "reverse") == reversed_index(forward), what


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


def assert_ended_well(life: Life, what: str) -> None:
    """An exit code that tells, and one line."""
    text = "\n".join(life.lines)
    assert life.exit_code in (3, 5), (what, life.injected, text)
    assert "Traceback" not in text, (what, text)
    said = [line for line in life.lines if "pkgindex: " in line or "storage failed" in line]
    assert len(said) == 1, (what, text)


def assert_silent_after(life: Life, what: str) -> None:
    """After a failed call of the commit thread no client hears an OK."""
    lines = life.text.splitlines()
    (at, failed) = next(
        (n, line) for n, line in enumerate(lines) if "(INJECTED)" in line and "/the-store/" in line
    )
    if re.search(r"(fdatasync|writev)\(|proof-", failed):
        later = [line for line in lines[at + 1 :] if "socket:" in line and '"OK\\n' in line]
        assert not later, (what, failed, later)


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
