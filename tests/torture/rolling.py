"""HAProxy in front of three servers of one mount, which are all restarted, one after the other, under load.

    with Balanced(folder) as balanced:
        fleet = Fleet(balanced.address, random)
        balanced.restart("one")
        fleet.end()

HAProxy runs with packaging/haproxy.cfg as it is, but for the addresses. The clients contradict one another
(clients.py), on connections that they keep for as long as they last; when one ends, its client connects anew
and sends again what was not answered, and counts as failed if that was in the middle of an answer. All of it
is judged as one history: --reads strong makes the servers one, whichever a client is led to.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from pkgindex.store.offline import Offline
from tests.servers import Server, ServerFailed
from tests.torture.campaign import Campaign, Run
from tests.torture.clients import Crowd
from tests.torture.history import Client, History
from tests.torture.linearizability import Index, judge

__all__ = ["CAMPAIGNS", "CONFIGURATION", "Balanced", "Fleet", "configured", "roll", "why_absent"]

CONFIGURATION = Path(__file__).resolve().parents[2] / "packaging" / "haproxy.cfg"

#: Seconds for a server to be told up or down: some times what the checks take.
PATIENCE = 30.0

#: Seconds that no client may wait for an answer, its way to another server included. On a quiet machine
#: a tenth; the checks of a campaign are not what should find this machine busy.
LONGEST_WAIT = 5.0

#: Seconds of load between two restarts.
UNDISTURBED = (0.2, 1.0)


def why_absent() -> str | None:
    """Why this machine cannot run it; None if it can."""
    if shutil.which("haproxy") is None:
        return "haproxy is not installed"
    if not CONFIGURATION.exists():
        return "no packaging/haproxy.cfg beside the tests"
    if os.geteuid() != 0:
        return "haproxy gives up root's rights, and has none to give up"
    return None


def configured(port: int, servers: dict[str, int]) -> str:
    """Return the configuration with these ports of this machine in place of its addresses."""
    text = CONFIGURATION.read_text().replace("bind :8080", f"bind 127.0.0.1:{port}")
    for name, number in servers.items():
        text, replaced = re.subn(
            rf"^( +server {name}) \S+$", rf"\1 127.0.0.1:{number}", text, flags=re.MULTILINE
        )
        assert replaced == 1, f"no server {name} in {CONFIGURATION}"
    return text


class Balanced:
    """Three servers of one store, and HAProxy in front of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "index"
        self.servers: dict[str, Server] = {}
        self._ports = dict(zip(("one", "two", "three", "front"), _free_ports(4), strict=True))
        self.address = ("127.0.0.1", self._ports.pop("front"))
        self._haproxy: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            for name in self._ports:
                self.begin(name)
            for server in self.servers.values():
                server.wait_for("serving")
            self._start_haproxy()
            for name in self._ports:
                self.wait_until(name, up=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs."""
        if self._haproxy is not None:
            self._haproxy.kill()
            self._haproxy.wait()
        for server in self.servers.values():
            server.__exit__(None, None, None)

    def begin(self, name: str) -> Server:
        """Start a server, and wait for nothing."""
        server = Server(
            f"file:{self.store}",
            *("--cluster", "127.0.0.1:0", "--takeover-after", "1", "--reads", "strong"),
            listen=f"127.0.0.1:{self._ports[name]}",
        )
        server.launch()
        self.servers[name] = server
        return server

    def restart(self, name: str) -> None:
        """Stop a server as systemd does, start it, and wait until it serves. ServerFailed."""
        self.stop(name)
        self.begin(name).wait_for("serving")

    def stop(self, *names: str) -> None:
        """Stop servers, all of them at once. ServerFailed if one does not end well."""
        for name in names:
            self.servers[name].send_signal(signal.SIGTERM)
        for name in names:
            server = self.servers[name]
            if code := server.wait():
                said = "\n".join(server.lines[-5:])
                raise ServerFailed(f"{name} ended with {code}: {said}")
            server.__exit__(None, None, None)

    def wait_until(self, name: str, *, up: bool) -> None:
        """Wait until HAProxy says so of a server. TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while (self.state()[name] == "UP") is not up:
            if time.monotonic() > deadline:
                raise TimeoutError(f"HAProxy finds {name} {self.state()[name]}")
            time.sleep(0.02)

    def state(self) -> dict[str, str]:
        """Return what HAProxy says of each server: "UP", "DOWN" and what lies between."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._control))
            control.sendall(b"show stat\n")
            answer = b"".join(iter(lambda: control.recv(65536), b"")).decode()
        head, *rows = (line.split(",") for line in answer.lstrip("# ").splitlines() if line)
        found = (dict(zip(head, row, strict=False)) for row in rows)
        return {row["svname"]: row["status"] for row in found if row["svname"] in self._ports}

    def _answers(self) -> bool:
        try:
            return bool(self.state())
        except OSError:
            return False

    def _start_haproxy(self) -> None:
        file = self.folder / "haproxy.cfg"
        file.write_text(configured(self.address[1], self._ports))
        self._control = self.folder / "haproxy.sock"
        asked = self.folder / "asked.cfg"
        asked.write_text(f"global\n    stats socket {self._control}\n")
        self._said = self.folder / "haproxy.log"
        with self._said.open("wb") as log:
            self._haproxy = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "haproxy", "-db"),
                    *("-f", str(file), "-f", str(asked)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if self._haproxy.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"haproxy did not start: {self._said.read_text()}")
            time.sleep(0.02)


@dataclass
class Fleet:
    """Clients that go on whatever becomes of their connections, in a thread of their own."""

    address: tuple[str, int]
    random: random.Random
    clients: int = 16
    history: History = field(default_factory=History)
    failures: list[str] = field(default_factory=list)
    reconnects: int = 0
    repeated: int = 0  # messages that a connection's end had left unanswered
    longest: float = 0.0  # seconds that a client waited for the answers of a pipeline

    def __post_init__(self) -> None:
        self.crowd = Crowd(
            self.random,
            clients=self.clients,
            watchers=4,
            neighbourhoods=16,
            neighbours=3,
            owned=5,
            pause=0.01,
        )
        self.before: Index = dict.fromkeys(self.crowd.mark_names, frozenset())
        self._prepared = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._prepared.wait()

    def end(self) -> None:
        """Send no more pipelines, and wait for the last answers."""
        self.crowd.silent = True
        self._thread.join()

    def judge(self, after: Index, budget: int = 20_000) -> None:
        """Add to `failures` what no order of all calls explains."""
        for violation in judge(self.history.calls, self.before, after, budget):
            if not violation.is_undecided:
                self.failures.append(str(violation))

    async def _run(self) -> None:
        try:
            client = await History().connect(self.address)
            await self.crowd.prepare(client)
            client.reset()
        finally:
            self._prepared.set()
        ended = await asyncio.gather(
            *(self._talk(number) for number in range(self.clients)), return_exceptions=True
        )
        self.failures += [f"a client failed: {error!r}" for error in ended if error is not None]

    async def _talk(self, number: int) -> None:
        """Be one client, to the last answer."""
        crowd, pause = self.crowd, self.random.expovariate
        client = await self.history.connect(self.address)
        while not crowd.silent:
            lines = crowd.pipeline(number)
            began = time.monotonic()
            while lines:
                try:
                    if client.lost:
                        self._look_at(client)
                        client = await self.history.connect(self.address)
                        self.reconnects += 1
                    await client.ask(lines)
                    lines = []
                except ConnectionError:
                    # One that was lost before any of it was sent has nothing unanswered.
                    lines = client.unanswered or lines
                    self.repeated += len(client.unanswered)
            self.longest = max(self.longest, time.monotonic() - began)
            await asyncio.sleep(pause(1 / crowd.pause))
        self._look_at(client)
        client.reset()

    def _look_at(self, client: Client) -> None:
        """Look at what a connection has brought that is no answer."""
        if client.stray:
            self.failures.append(f"answers to nothing: {client.stray}")
        if client.is_within_a_reply:
            self.failures.append("a connection ended in the middle of an answer")


def roll(balanced: Balanced, fleet: Fleet, names: list[str]) -> None:
    """Restart servers one after the other, each when the one before takes clients again."""
    for name in names:
        time.sleep(fleet.random.uniform(*UNDISTURBED))
        balanced.restart(name)
        balanced.wait_until(name, up=True)


def index_of(store: Path) -> Index:
    """Read the index of a store that nobody serves."""
    with Offline(str(store)) as stopped:
        graph = stopped.read().graph
        return {name: frozenset(graph.dependencies(name)) for name in graph}


def torture(run: Run) -> None:
    """The campaign: rounds of restarts, each in another order and judged by itself."""
    rounds = run.scale(40, 1)
    done = 0
    while done < rounds and not run.is_late(left=30.0) and not run.failures:
        done += 1
        folder = run.folder / f"round-{done}"
        folder.mkdir()
        with Balanced(folder) as balanced:
            fleet = Fleet(balanced.address, run.random)
            names = [*balanced.servers] * 2
            run.random.shuffle(names)
            try:
                roll(balanced, fleet, names)
                fleet.end()
                balanced.stop(*balanced.servers)
                fleet.judge(index_of(balanced.store))
            except (ServerFailed, TimeoutError) as error:
                run.fail(f"round {done}: {error}")
            finally:
                fleet.end()
        if fleet.longest > LONGEST_WAIT:
            run.fail(f"round {done}: a client waited {fleet.longest:.1f} s")
        for failure in fleet.failures:
            run.fail(f"round {done}: {failure}")
        run.counts["restarts"] += len(names)
        run.counts["answers judged"] += fleet.history.answered
        run.counts["connections made anew"] += fleet.reconnects
        run.counts["messages repeated"] += fleet.repeated
        run.counts["ms longest wait"] = max(
            run.counts["ms longest wait"], round(fleet.longest * 1000)
        )
        run.progress(done, rounds)
    if done < rounds and not run.failures:
        run.skipped.append(f"{rounds - done} of {rounds} rounds: the time was up")


def _free_ports(count: int) -> list[int]:
    """Return ports that were free just now, all different."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


CAMPAIGNS = (
    Campaign(
        "rolling",
        "Behind HAProxy all three servers are restarted, one after the other and in any order: no answer is "
        "wrong, doubled or out of order, and connections end only between answers.",
        torture,
        why_absent,
        seconds=(60.0, 600.0),
        form="cluster",
    ),
)
