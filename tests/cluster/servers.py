"""Real servers of one store, as many as a test wants.

    with Cluster(folder) as cluster:
        writer, follower = cluster.start(2)
        writer.kill()
        with Wire(follower.address) as wire:
            assert wire.ask(b"INDEX|a|") == OK

Whoever becomes the writer is the first that start() returns.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers import PATIENCE, Server

#: Seconds without a heartbeat until a writer is replaced: long, so that a busy machine replaces none.
TAKEOVER_AFTER = 10.0


class Member(Server):
    """A `pkgindex serve --cluster`."""

    def __init__(
        self, store: str, *options: str, cluster: str = "127.0.0.1:0", **more: Any
    ) -> None:
        super().__init__(store, "--cluster", cluster, *options, **more)

    @property
    def id(self) -> str:
        """Its name among the others."""
        return str(self.wait_for("cluster member")["member"])

    @property
    def cluster(self) -> tuple[str, int]:
        """Where the other servers reach it."""
        host, port = self.wait_for("cluster member")["cluster"].split(":")
        return host, int(port)

    @property
    def role(self) -> str:
        """By its last word on it."""
        return str(next((e["role"] for e in reversed(self.events("role"))), "follower"))

    def wait_for_role(self, role: str, patience: float = PATIENCE) -> None:
        """Wait until that is its role."""
        wait_until(lambda: self.role == role, patience, what=f"{role}, but it is {self.role}")

    def counters(self) -> dict[str, Any]:
        """The counters that it logs when it is asked to, as of now."""
        known = len(self.events("counters"))
        self.send_signal(signal.SIGUSR1)
        return self.wait_for("counters", after=known)

    def pause(self) -> None:
        """Stop it in its tracks."""
        self.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self.send_signal(signal.SIGCONT)


class Cluster:
    """The servers of one folder; all are gone when it is left."""

    def __init__(self, folder: Path, *options: str, takeover_after: float = TAKEOVER_AFTER) -> None:
        """`options` are each server's."""
        self.folder = folder
        self.options = ("--takeover-after", str(takeover_after), *options)
        self.members: list[Member] = []

    def launch(self, *options: str, **more: Any) -> Member:
        """Start a server, and do not wait."""
        member = Member(f"file:{self.folder}", *self.options, *options, **more)
        member.launch()
        self.members.append(member)
        return member

    def start(self, count: int, *options: str) -> list[Member]:
        """Start servers at once and wait until they serve: the writer first, if one is among them."""
        started = [self.launch(*options) for _ in range(count)]
        for member in started:
            member.wait_for("serving")
        return sorted(started, key=lambda member: member.role != "writer")

    def add(self, *options: str, **more: Any) -> Member:
        """Start one more and wait until it serves."""
        member = self.launch(*options, **more)
        member.wait_for("serving")
        return member

    def check(self) -> str:
        """What `pkgindex check` says of the folder, once no server uses it any more; it must be content."""
        for member in self.members:
            member.kill()
        done = subprocess.run(
            [sys.executable, "-m", "pkgindex", "check", str(self.folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for member in self.members:
            member.__exit__(kind, error, _)
        if error is None:
            for member in self.members:
                log = "\n".join(member.lines)
                assert "Traceback" not in log, log


def wait_until(condition: Any, patience: float = PATIENCE, what: str = "") -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what or condition}"
        time.sleep(0.01)
