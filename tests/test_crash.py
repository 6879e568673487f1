"""SIGKILL at random moments under load: every acknowledged change is there again, and no half change.

Each life of the server is killed at a moment that the seed chooses: while it serves clients that
contradict one another, while it recovers, while it stops, before it has begun. After each, three
kinds of witnesses are heard:

- *owners* change packages that nobody else touches: one of the states between the last answer and
  the last message sent must be found, whole;
- *rivals* change the same packages at once: what is found was written by a change that no later one,
  begun after its answer and answered too, replaces;
- a *watcher* only asks: what it was told stays so.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.reference import Model
from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import Index, read_files, read_index, reversed_index

KILLS = 13  # of each seed: 52 in all
LONGEST_LIFE = 0.3  # seconds under load, from the first answer
MARKS = 8  # packages that are always there, to be depended on
RIVALS = 3
OWNERS = 2
SHARED = [f"shared-{n}" for n in range(4)]


@dataclass
class Sent:
    """One change of a rival: what it would leave, and when it was under way."""

    package: str
    leaves: frozenset[str] | None
    begun: float
    ended: float = float("inf")
    answer: bytes = b""


@dataclass
class Owner:
    """Whoever alone changes its packages: it knows its answers beforehand."""

    number: int
    random: random.Random
    sure: Model = field(default_factory=Model)
    possible: list[Index] = field(default_factory=list)

    def __post_init__(self) -> None:
        for mark in marks():
            self.sure.apply(b"INDEX|%s|" % mark.encode())

    def state(self, model: Model) -> Index:
        """Return this owner's packages, less the marks."""
        return {
            name.decode(): frozenset(d.decode() for d in dependencies)
            for name, dependencies in model.packages.items()
            if name.startswith(b"own-%d-" % self.number)
        }

    def line(self) -> bytes:
        """Return one message about one of this owner's packages."""
        mine = [f"own-{self.number}-{n}" for n in range(12)]
        package = self.random.choice(mine)
        what = self.random.choices(["INDEX", "REMOVE", "QUERY"], [6, 3, 1])[0]
        among = mine + marks()
        dependencies = self.random.sample(among, self.random.randrange(4))
        return f"{what}|{package}|{','.join(dependencies) if what == 'INDEX' else ''}".encode()

    def run(self, wire: Wire) -> None:
        """Send pipelines until the server is gone; keep what may have happened since the last answer."""
        while True:
            lines = [self.line() for _ in range(self.random.choice((1, 5, 60)))]
            model = Model()
            model.packages = dict(self.sure.packages)
            expected, states = [], [self.state(model)]
            for line in lines:
                expected.append(model.apply(line))
                states.append(self.state(model))
            self.possible = states
            wire.send(b"".join(line + b"\n" for line in lines))
            for line, reply in zip(lines, expected, strict=True):
                assert wire.receive() == [reply], line
                self.sure.apply(line)
                self.possible = self.possible[1:]


@dataclass
class Rival:
    """One of several that change the same packages."""

    number: int
    random: random.Random
    sent: list[Sent] = field(default_factory=list)

    def run(self, wire: Wire) -> None:
        """Send small pipelines until the server is gone."""
        while True:
            batch, lines = [], []
            for _ in range(self.random.choice((1, 4))):
                package = self.random.choice(SHARED)
                if self.random.random() < 0.3:
                    leaves = None
                    lines.append(f"REMOVE|{package}|\n")
                else:
                    leaves = frozenset(self.random.sample(marks(), self.random.randrange(3)))
                    lines.append(f"INDEX|{package}|{','.join(leaves)}\n")
                batch.append(Sent(package, leaves, time.monotonic()))
            if self.random.random() < 0.3:
                # What depends on a shared package makes some REMOVE fail, and some INDEX of this too.
                lines.append(f"INDEX|upon-{self.number}|{self.random.choice(SHARED)}\n")
                lines.append(f"REMOVE|upon-{self.number}|\n")
            self.sent += batch
            wire.send("".join(lines).encode())
            for one in batch:
                (one.answer,) = wire.receive()
                one.ended = time.monotonic()
            wire.receive(len(lines) - len(batch))


@dataclass
class Watcher:
    """Asks after packages that are indexed once and removed once; remembers what it was told."""

    life: int = 0
    told: dict[str, int] = field(default_factory=dict)  # 1: is there, 2: is gone again

    def write(self, wire: Wire) -> None:
        """Index one package after another; each third is removed again."""
        n = 0
        while True:
            wire.send(f"INDEX|log-{self.life}-{n}|\n".encode())
            if n % 3 == 2:
                wire.send(f"REMOVE|log-{self.life}-{n}|\n".encode())
                wire.receive()
            wire.receive()
            n += 1

    def run(self, wire: Wire) -> None:
        """Ask after the newest package until it is seen, then after the next."""
        n = 0
        while True:
            name = f"log-{self.life}-{n}"
            reply = wire.ask(b"QUERY|%s|" % name.encode())
            if reply == b"OK\n":
                self.told[name] = 1
            elif name in self.told:
                self.told[name] = 2
            if name in self.told and (n % 3 != 2 or self.told[name] == 2):
                n += 1


def marks() -> list[str]:
    return [f"mark-{n}" for n in range(MARKS)]


def explained(sent: list[Sent], package: str, found: frozenset[str] | None, before: object) -> bool:
    """Whether some order of the changes, each within its time, ends with what was found."""
    took = [one for one in sent if one.package == package and one.answer != b"FAIL\n"]
    answered = [one for one in took if one.answer == b"OK\n"]
    if found == before and not answered:
        return True
    return any(
        one.leaves == found and not any(other.begun > one.ended for other in answered)
        for one in took
    )


class World:
    """One store, its server's lives, and everybody who uses it."""

    def __init__(self, root: Path, seed: int, mutation: str = "") -> None:
        """`mutation`: Python that breaks the product first."""
        self.root = root
        self.mutation = mutation
        self.random = random.Random(seed)
        self.owners = [Owner(n, random.Random(seed * 100 + n)) for n in range(OWNERS)]
        self.rivals = [Rival(n, random.Random(seed * 100 + 50 + n)) for n in range(RIVALS)]
        self.watcher = Watcher()
        self.shared: Index = {}
        self.kills = 0

    def server(self) -> Server:
        # The smallest limit makes rounds begin every few milliseconds, a large one none at all.
        limit = self.random.choice(("64k", "1g"))
        server = Server(f"file:{self.root}", "--journal-limit", limit)
        if self.mutation:
            place = server._command.index("-m")
            run = f"{self.mutation}\nfrom pkgindex.cli import main; main()"
            server._command[place : place + 2] = ["-c", run]
        return server

    def kill_at_start(self) -> None:
        """Kill a server some time after its start: before, in or after its recovery."""
        server = self.server()
        delay = self.random.uniform(0.05, 0.5)

        def kill() -> None:
            time.sleep(delay)
            server.kill()

        # The process is killed with the thread that started it, so that must be this one.
        killer = threading.Thread(target=kill)
        killer.start()
        with suppress(ServerFailed, AssertionError):
            server.start()
        killer.join()
        server.kill()
        server.log_file.unlink(missing_ok=True)
        self.kills += 1

    def live_and_die(self) -> None:
        """Serve everybody for a while, hear the witnesses of the life before, and kill."""
        with self.server() as server:
            with Wire(server.address) as wire:
                self.ask_witnesses(wire)
                wire.ask_all(b"INDEX|%s|" % mark.encode() for mark in marks())
            self.watcher.life += 1
            self.watcher.told = {}
            jobs = [actor.run for actor in (*self.owners, *self.rivals, self.watcher)]
            jobs.append(self.watcher.write)
            failures: list[Exception] = []
            threads = [
                threading.Thread(target=work, args=(job, server.address, failures)) for job in jobs
            ]
            for thread in threads:
                thread.start()
            time.sleep(self.random.uniform(0.01, LONGEST_LIFE))
            if self.random.random() < 0.3:  # in the middle of a stop
                server.send_signal(signal.SIGTERM)
                time.sleep(self.random.uniform(0, 0.08))
            server.kill()
            for thread in threads:
                thread.join()
            self.kills += 1
            assert not failures, failures
        self.hear_witnesses(read_index(self.root))

    def live_and_die_often(self, times: int) -> None:
        for _ in range(times):
            self.live_and_die()

    def hear_witnesses(self, index: Index) -> None:
        """Judge what the files hold against what everybody was told."""
        for package, dependencies in index.items():
            assert dependencies <= index.keys(), f"{package} depends on what is not there"
        for owner in self.owners:
            mine = f"own-{owner.number}-"
            found = {name: deps for name, deps in index.items() if name.startswith(mine)}
            assert found in (owner.possible or [owner.state(owner.sure)])
            kept = {k: v for k, v in owner.sure.packages.items() if k.startswith(b"mark-")}
            owner.sure.packages = kept | {
                name.encode(): frozenset(d.encode() for d in deps) for name, deps in found.items()
            }
            owner.possible = []
        sent = [one for rival in self.rivals for one in rival.sent]
        for package in SHARED:
            found_one = index.get(package)
            assert explained(sent, package, found_one, self.shared.get(package)), (
                package,
                found_one,
            )
        for rival in self.rivals:
            rival.sent = []
        self.shared = {package: index[package] for package in SHARED if package in index}
        for package, stage in self.watcher.told.items():
            if stage == 2 or int(package.split("-")[2]) % 3 != 2:
                assert (package in index) == (stage == 1), f"{package}: was told {stage}"
        self.index = index

    def ask_witnesses(self, wire: Wire) -> None:
        """The server that has recovered must say what the files said."""
        names = {*getattr(self, "index", {}), *SHARED, *self.watcher.told}
        asked = sorted(names)
        replies = wire.ask_all(b"QUERY|%s|" % name.encode() for name in asked)
        for name, reply in zip(asked, replies, strict=True):
            assert (reply == b"OK\n") == (name in getattr(self, "index", {})), name

    def stop_at_last(self) -> None:
        """A clean stop: forward/ and reverse/ alone hold it all, and each other's mirror."""
        with self.server() as server:
            with Wire(server.address) as wire:
                self.ask_witnesses(wire)
            assert server.stop() == 0
        forward = read_files(self.root, "forward")
        assert forward == self.index
        assert read_files(self.root, "reverse") == reversed_index(forward)


def work(job: object, address: tuple[str, int], failures: list[Exception]) -> None:
    """Run one client until its connection ends, by the kill or by the stop before it."""
    try:
        with Wire(address) as wire:
            job(wire)  # type: ignore[operator]
    except (EOFError, ConnectionError, TimeoutError) as error:
        if isinstance(error, TimeoutError):
            failures.append(error)
    except Exception as error:  # noqa: BLE001  (told by the thread that joins this one)
        failures.append(error)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_nothing_acknowledged_is_lost_and_nothing_is_half_there_after_a_kill(
    seed: int, tmp_path: Path
) -> None:
    world = World(tmp_path / "index", seed)
    while world.kills < KILLS:
        if world.random.random() < 0.25:
            world.kill_at_start()
        else:
            world.live_and_die()
    world.stop_at_last()


BREACHES = {
    "the last batch is not replayed": (
        "import pkgindex.store.recovery as r\n"
        "def replay(*where, whole=r.replay_lines):\n"
        "    parts, *rest = whole(*where)\n"
        "    return (parts[:-1], *rest)\n"
        "r.replay_lines = replay"
    ),
    "half of the last batch is replayed": (
        "import pkgindex.store.recovery as r\n"
        "def replay(*where, whole=r.replay_lines):\n"
        "    parts, *rest = whole(*where)\n"
        "    first, count, lines = parts[-1] if parts else (1, 0, b'')\n"
        "    lines = lines.splitlines(True)\n"
        "    half = first, count, b''.join(lines[: len(lines) // 2])\n"
        "    return ([*parts[:-1], half], *rest)\n"
        "r.replay_lines = replay"
    ),
}


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES)
def test_the_witnesses_notice_a_server_that_loses_something(breach: str, tmp_path: Path) -> None:
    world = World(tmp_path / "index", 1, breach)
    with pytest.raises(AssertionError) as noticed:
        world.live_and_die_often(8)
    assert not isinstance(noticed.value, ServerFailed), noticed.value
