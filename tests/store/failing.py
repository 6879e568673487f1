"""One short life of a server in which a call to the storage fails, or is the last, and its judgement.

The server recovers what a killed one left, answers changes, writes package files, stops. strace lets the
n-th call of a kind fail, or kills the server as it makes it. Then: nothing is acknowledged after a failed
commit; the server ends by itself, soon, with one line; the next one has everything that was acknowledged,
and its package files agree with one another.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import read_files, read_index, reversed_index
from tests.store.tracing import Call, Traced

# Kinds of calls by whether a file, a name or a journal depends on them.
CALLS = (
    "fdatasync",
    "pwritev",
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
    seconds_to_end: float = (
        0.0  # from the first failure of a call on the store, or else from SIGTERM
    )

    @property
    def injected(self) -> list[str]:
        return [line for line in self.text.splitlines() if "(INJECTED)" in line]


def leave_by_a_kill(root: Path) -> Path:
    """Make a store with package files, a journal over them, and an epoch to fence."""
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|left|", b"INDEX|kept|"])
        assert server.stop() == 0
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|under|kept", b"INDEX|left|kept"])
        server.kill()
    return root


class Timed(Traced):
    """A traced server that knows when each of its calls was made."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._command.insert(self._command.index("strace") + 1, "-ttt")

    def unstamp(self) -> float:
        """Take the times out of the trace; how long it lived on after a failure, or else after SIGTERM."""
        deadline = time.monotonic() + self.patience
        end = re.compile(rf"^{self.pid} +([0-9.]+) \+\+\+ ", re.MULTILINE)
        while not (ended := end.search(text := self.trace.read_text(errors="replace"))):
            assert time.monotonic() < deadline, "strace has not written the end"
            time.sleep(0.01)
        failed = re.search(r"^\d+ +([0-9.]+) .*/the-store/.*\(INJECTED\)", text, re.MULTILINE)
        failed = failed or re.search(r"^\d+ +([0-9.]+) --- SIGTERM ", text, re.MULTILINE)
        self.trace.write_text(re.sub(r"^(\d+ +)[0-9.]+ ", r"\1", text, flags=re.MULTILINE))
        return float(ended[1]) - float(failed[1]) if failed else 0.0


def live(
    before: Path, root: Path, *inject: str, only: Sequence[str] = (), mutation: str = ""
) -> Life:
    """Live once on a copy of the store. `mutation`: Python that breaks the product first."""
    shutil.copytree(before, root)
    life = Life()
    trace = root.parent / "trace"
    server = Timed(f"file:{root}", trace, calls=EVERY, inject=inject, only=only, mutation=mutation)
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
    assert time.monotonic() - begun < SECONDS_TO_END + 20, "it did not end"
    life.seconds_to_end = server.unstamp()
    life.calls = server.calls()
    life.text = server.trace.read_text(errors="replace")
    life.lines = server.lines
    server.log_file.unlink(missing_ok=True)
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


def assert_ended_well(life: Life, what: str) -> None:
    """An exit code that tells, and one line."""
    text = "\n".join(life.lines)
    assert life.exit_code in (3, 5), (what, life.injected, text)
    assert "Traceback" not in text, (what, text)
    said = [line for line in life.lines if "pkgindex: " in line or "storage failed" in line]
    assert len(said) == 1, (what, text)


def assert_silent_after(life: Life, what: str) -> None:
    """After a failed call of the commit thread no client hears an OK.

    The thread that writes package files takes away an older writer's proofs: that rests on no answer."""
    lines = life.text.splitlines()
    (at, failed) = next(
        (n, line) for n, line in enumerate(lines) if "(INJECTED)" in line and "/the-store/" in line
    )
    if re.search(r"(fdatasync|pwritev)\(|rename\w*\(.*proof-", failed):
        later = [line for line in lines[at + 1 :] if "socket:" in line and '"OK\\n' in line]
        assert not later, (what, failed, later)
