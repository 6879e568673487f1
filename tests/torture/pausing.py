"""Servers that stop in the middle of what they do, at a call that the test chooses.

    server = Pausable(url, stop=Stop("renameat", 3), trace=…, paths=…)       # in its start, or
    with Pause(server.pid, Stop("fdatasync", 2), folder) as pause:           # once it serves
        pause.wait(2.0)
        …
        pause.wake()

Two kinds of pause. A *stop* is what a debugger, a frozen container or a swapping machine does: SIGSTOP for
the whole process, which takes effect at the return of the call, so that everything after it happens late. A
*hold* is what a hung mount does: the call itself happens late, its arguments fixed long before; the rest of
the process is stopped meanwhile, or it would notice first. strace makes both (`inject=…:signal=SIGSTOP` and
`delay_enter=`). It counts the calls of each thread by themselves; the first that comes to the number is the
one. Another may come to it later: whoever waits for the end of a server wakes it again and again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers import Server
from tests.store.tracing import parse

__all__ = ["Pausable", "Pause", "Stop"]

#: What a writer that was deposed must never again succeed in.
CHANGES_OF_NAMES = "rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,truncate,ftruncate"

STOPPED = "--- stopped by SIGSTOP ---"
POLLS_OF_A_HOLD = 8  # in a row, a hundredth of a second apart
ATTACHED = 5.0  # seconds: strace attaches at once, on a quiet machine


@dataclass(frozen=True)
class Stop:
    """The place of a pause: the n-th call of a kind in a thread, of those about one of `paths` if given."""

    call: str
    number: int
    held: float = 0.0  # seconds for which the call is held; 0: the process is stopped after it
    paths: tuple[str, ...] = ()

    @property
    def injection(self) -> str:
        """The place in strace's words."""
        how = f"delay_enter={int(self.held * 1e6)}" if self.held else "signal=SIGSTOP"
        return f"inject={self.call}:{how}:when={self.number}"

    def __str__(self) -> str:
        how = "held before" if self.held else "stopped after"
        where = f" below {os.path.commonpath(self.paths)}" if self.paths else ""
        return f"{how} {self.call} number {self.number}{where}"


class Pause:
    """strace on a server that runs, until one of its threads comes to a place."""

    def __init__(self, pid: int, stop: Stop | None, folder: Path) -> None:
        """No `stop`: strace stays out of it, for it slows a server down; there is only wake()."""
        self._pid = pid
        self._stop = stop
        self.trace = folder / f"pause-{pid}.trace"
        self._until = 0.0
        self._strace: subprocess.Popen[bytes] | None = None

    @property
    def stops(self) -> bool:
        """Whether there is a place, at which the server sleeps until wake()."""
        return self._stop is not None

    def __enter__(self) -> Self:
        if self._stop is None:
            return self
        command = ["setpriv", "--pdeathsig", "KILL", "strace", "-f", "-q", "-y", "-ttt"]
        command += ["-p", str(self._pid), "-o", str(self.trace)]
        command += ["-e", f"trace={CHANGES_OF_NAMES},{self._stop.call}"]
        command += ["-e", self._stop.injection]
        for path in self._stop.paths:
            command += ["-P", path]
        self._strace = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + ATTACHED
        while not _all_traced(self._pid) and time.monotonic() < deadline:
            time.sleep(0.002)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._strace is not None:
            self._strace.terminate()  # it lets go of what it follows
            self._strace.wait()

    def wait(self, seconds: float) -> bool:
        """Wait until the server has come to the place; stop it where it is if that takes too long.

        Returns whether it was the place."""
        deadline = time.monotonic() + seconds
        there = False
        if self._stop is not None and self._stop.held:
            there = self._wait_for_hold(deadline)
        elif self._stop is not None:
            there = _wait_for_stop(self.trace, seconds)
        if not there or (self._stop and self._stop.held):
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGSTOP)
        return there

    def _wait_for_hold(self, deadline: float) -> bool:
        """Wait for a thread that strace does not let go on; one that it only looks at waits microseconds."""
        seen: dict[str, int] = {}
        while time.monotonic() < deadline:
            held = set(_threads_in(self._pid, "t"))
            seen = {thread: seen.get(thread, 0) + 1 for thread in held}
            if any(count >= POLLS_OF_A_HOLD for count in seen.values()):
                self._until = time.monotonic() + (self._stop.held if self._stop else 0)
                return True
            time.sleep(0.01)
        return False

    def end_hold(self) -> None:
        """Wait until the call that was held has happened."""
        time.sleep(max(0.0, self._until - time.monotonic()))

    def wake(self) -> None:
        """Let the server go on."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)

    def changes_since(self, when: float) -> list[str]:
        """What the ended server has changed in the store since then (time.time()), and could change."""
        lines = self.trace.read_text(errors="replace").splitlines() if self.trace.exists() else []
        names = CHANGES_OF_NAMES.split(",")
        found = []
        begun: dict[str, float] = {}
        for line in lines:
            thread, at, rest = (*line.split(maxsplit=2), "", "")[:3]
            if rest.endswith("<unfinished ...>"):
                begun[thread] = float(at)
            elif match := re.match(
                r"(?:<\.\.\. )?(\w+)(?:\(| resumed>).* = 0(?: \(DELAYED\))?$", rest
            ):
                # The time is that of a call's entry; one that was under way may have been in time.
                entered = begun.pop(thread, float(at)) if "resumed>" in rest else float(at)
                happened = entered + (self._stop.held if self._stop and "(DELAYED)" in rest else 0)
                if match[1] in names and happened > when:
                    found.append(rest)
        return found


class Pausable(Server):
    """A server that may be wrong on purpose (see unfenced.py), and may stop in its own start."""

    def __init__(
        self,
        store: str,
        *options: str,
        mutant: str = "",
        stop: Stop | None = None,
        calls: Iterable[str] = (),
        paths: Sequence[str] = (),
        trace: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`stop`: where, among the calls about one of `paths`. `calls`: which of those are written down
        in `trace`, if there is one."""
        super().__init__(store, *options, environment=environment)
        self.root = Path(store.removeprefix("file:"))
        if mutant:
            at = self._command.index("pkgindex")
            self._command[at : at + 1] = ["tests.torture.unfenced", mutant]
        self.trace = trace
        if trace is not None:
            traced = ",".join(dict.fromkeys([*calls, *([stop.call] if stop else [])]))
            strace = ["strace", "-D", "-f", "-q", "-y", "-o", str(trace), "-e", f"trace={traced}"]
            for path in paths:
                strace += ["-P", path]
            strace += ["-e", stop.injection] if stop else []
            at = self._command.index("KILL") + 1 if "KILL" in self._command else 0
            self._command[at:at] = strace

    def begin(self) -> Self:
        """Start the process and wait for nothing."""
        wait_for, self.wait_for = self.wait_for, lambda *_: {}  # type: ignore[method-assign]
        try:
            return self.start()
        finally:
            self.wait_for = wait_for  # type: ignore[method-assign]

    def wait_until_stopped(self, seconds: float) -> bool:
        """Wait until it has stopped at its place; False if it did not come there, and serves or ended."""
        assert self.trace is not None
        return _wait_for_stop(self.trace, seconds, self)

    def let_go(self) -> None:
        """Let it live without strace from now on: it cannot stop once more, and others can follow it."""
        if self.exit_code is not None:
            return
        if tracer := tracer_of(self.pid):
            os.kill(
                tracer, signal.SIGKILL
            )  # with -o it heeds nothing less; what it follows lives on
        while tracer_of(self.pid):
            time.sleep(0.002)
        self.send_signal(signal.SIGCONT)

    def places(self) -> list[tuple[str, int]]:
        """Every call that the trace of an ended server has, as (kind, number in its thread)."""
        assert self.trace is not None
        found: list[tuple[str, int]] = []
        counts: dict[tuple[str, str], int] = {}
        for line in self.trace.read_text(errors="replace").splitlines():
            thread = line.split(" ", 1)[0]
            for call in parse(line.replace(" <unfinished ...>", ") = 0")):
                counts[thread, call.name] = number = counts.get((thread, call.name), 0) + 1
                if (call.name, number) not in found:
                    found.append((call.name, number))
        return found


def _wait_for_stop(trace: Path, seconds: float, server: Server | None = None) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if trace.exists() and STOPPED in trace.read_text(errors="replace"):
            return True
        if server is not None and (server.exit_code is not None or server.events("serving")):
            return False
        time.sleep(0.01)
    return False


def _threads_in(pid: int, state: str) -> Iterator[str]:
    """Give the threads of a process that are in this state, as in /proc/PID/stat."""
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if (thread / "stat").read_text().rsplit(")", 1)[1].split()[0] == state:
                yield thread.name


def tracer_of(pid: int) -> int:
    """The process that follows this one; 0: none."""
    with suppress(OSError):  # it has ended
        match = re.search(r"TracerPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(match[1]) if match else 0
    return 0


def _all_traced(pid: int) -> bool:
    """Whether every thread of a process is followed by a tracer."""
    with suppress(OSError):
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return all("TracerPid:\t0\n" not in (t / "status").read_text() for t in threads)
    return False
