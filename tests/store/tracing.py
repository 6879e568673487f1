"""A real server under strace: the system calls that it made, in their order, and calls made to fail.

    with Traced(store, log, "fdatasync,renameat") as server: ...
    calls = server.calls()

strace runs as a child of the process that it follows (`-D`), so signals reach the server itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.servers import Server

#: What the store asks of the system, and what leaves to clients.
STORE_CALLS = (
    "open,openat,openat2,creat,write,writev,pwrite64,pwritev,truncate,ftruncate,fallocate,unlink,unlinkat,"
    "rename,renameat,renameat2,link,linkat,mkdir,mkdirat,rmdir,fsync,fdatasync,syncfs,sync_file_range,"
    "sendto,sendmsg"
)

MAIN = "from pkgindex.cli import main; main()"


@dataclass(frozen=True)
class Call:
    """One system call: `begun` and `ended` are the places of its two ends in the order of all."""

    name: str
    arguments: str
    result: str
    begun: int
    ended: int

    @property
    def succeeded(self) -> bool:
        return not self.result.startswith("-1")

    def names(self, *parts: str) -> bool:
        """Whether all of these stand in the arguments."""
        return all(part in self.arguments for part in parts)

    @property
    def paths(self) -> list[str]:
        """What it is about: the path of each descriptor, or of each name below a descriptor."""
        if self.name in ("write", "writev", "pwritev", "sendto", "sendmsg"):
            return re.findall(r"^\d+<([^>]*)>", self.arguments)
        found = []
        for folder, name, plain, descriptor in _PATH.findall(self.arguments):
            path = plain or descriptor or (name if name.startswith("/") else f"{folder}/{name}")
            found.append(path)
        return found

    def __str__(self) -> str:
        return f"{self.name}({self.arguments}) = {self.result}"


# 4</a/b>, "name"   or   "name"   or   4</a/b>
_PATH = re.compile(r'(?:-?\w+(?:<([^>]*)>)?, "([^"]*)")|(?:^|, )"([^"]*)"|(?:\d+<([^>]*)>)')


@cache
def strace_works() -> str:
    """Why strace cannot be used here; "" if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True)
    return "" if tried.returncode == 0 else "this process may not trace others"


def require_strace() -> None:
    """Skip the test that calls this where strace cannot be used."""
    if reason := strace_works():
        pytest.skip(reason)


class Traced(Server):
    """A server whose system calls are written down, and made to fail where the test says."""

    def __init__(
        self,
        store: str,
        trace: Path,
        *options: str,
        calls: str = STORE_CALLS,
        inject: Sequence[str] = (),
        only: Sequence[str] = (),
        mutation: str = "",
    ) -> None:
        """`inject` as strace's option of that name; `mutation`: Python that breaks the product first.

        `only`: paths; calls that are about none of them are neither seen nor made to fail."""
        super().__init__(store, *options)
        if mutation:
            place = self._command.index("-m")
            self._command[place : place + 2] = ["-c", f"{mutation}\n{MAIN}"]
        self.trace = trace
        strace = [
            "strace",
            "-D",
            "-f",
            "-y",
            "-q",
            "-s",
            "256",
            "-o",
            str(trace),
            "-e",
            f"trace={calls}",
        ]
        for path in only:
            strace += ["-P", path]
        for one in inject:
            strace += ["-e", f"inject={one}"]
        place = self._command.index("KILL") + 1 if "KILL" in self._command else 0
        self._command[place:place] = strace

    def calls(self) -> list[Call]:
        """Return the calls of the ended process."""
        deadline = time.monotonic() + self.patience
        end = re.compile(rf"^{self.pid} +\+\+\+ ", re.MULTILINE)
        while not end.search(text := self.trace.read_text(errors="replace")):
            assert time.monotonic() < deadline, "strace has not written the end"
            time.sleep(0.01)
        return list(parse(text))


def parse(text: str) -> list[Call]:
    """Read strace's lines, those of calls that another thread's interrupted joined together."""
    calls: list[Call] = []
    unfinished: dict[str, tuple[str, int]] = {}
    for place, line in enumerate(text.splitlines()):
        match = re.match(r"(\d+) +(.*)", line)
        if match is None or match[2].startswith(("+++", "---")):
            continue
        thread, rest = match[1], match[2]
        begun = place
        if rest.endswith("<unfinished ...>"):
            unfinished[thread] = (rest.removesuffix("<unfinished ...>"), place)
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            first, begun = unfinished.pop(thread)
            rest = first + resumed[1]
        whole = re.match(r"(\w+)\((.*)\) += (.*)", rest)
        if whole:
            calls.append(Call(whole[1], whole[2], whole[3], begun, place))
    return calls
