"""Clients of a whole cluster, in a thread of their own: each stays on one server as long as it may.

    fleet = Fleet(crowd)
    fleet.add(life)                      # clients connect to it, and a probe
    fleet.go_on(); …; fleet.be_quiet()   # all is answered, or TimeoutError
    calls = fleet.take()                 # what was said since the last time

Every connection that ends is accounted for: unless its server was doomed, or might close it and has said
why, that is an error that a client of a surviving server has seen, and a failure.

A *probe* is one client of each server that changes something all the time, one message at a time: when its
changes are acknowledged tells for how long none were.

*Ratchets* are clients whose changes cannot be run twice unnoticed. Each pipeline of theirs has a message
that is refused before one that takes effect: were both run again, the first would be accepted.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.servers import Address, Server
from tests.torture.clients import Crowd
from tests.torture.history import Call, Client, History

__all__ = ["Fleet", "Life", "Ratchets"]

Result = TypeVar("Result")

QUIET_WITHIN = 30.0  # seconds in which everything is answered once nobody asks any more
PROBE_SECONDS = 0.005  # from a probe's answer to its next change
LATE = 0.05  # seconds until one that was refused a connection tries again


@dataclass(eq=False)
class Life:
    """A server process, and what its clients may expect of it."""

    number: int  # of its seat
    server: Server
    address: Address
    is_open: bool = True  # to clients that look for a server
    is_doomed: bool = False  # killed or told to stop: its connections end
    may_close: bool = False  # its connections may end, if it says why
    closed: int = 0  # connections that did
    clients: set[Client] = field(default_factory=set)
    told: set[Client] = field(default_factory=set)  # those that it closed, who may hear of it late
    coming: int = 0  # clients that are about to connect
    acknowledged: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=20_000)
    )  # (sent, replied) of the probe's changes, seconds of CLOCK_MONOTONIC

    def flows_since(self, when: float) -> bool:
        """Whether a change that was sent after this moment is acknowledged."""
        return bool(self.acknowledged) and self.acknowledged[-1][0] > when

    def stood_still(self, since: float) -> float:
        """The longest time from then until now without an acknowledged change."""
        times = [since, *(at for _, at in tuple(self.acknowledged) if at > since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


@dataclass
class Ratchets(Crowd):
    """A crowd, of which every fifth client is a ratchet; those that only ask ask after probes, too."""

    probes: int = 3  # one for each server
    probe_pause: float = PROBE_SECONDS
    wheels: dict[int, Iterator[list[str]]] = field(default_factory=dict)

    def pipeline(self, number: int) -> list[str]:
        """Return the next messages of one client."""
        if number >= self.watchers and number % 5 == 0:
            return next(self._ratchet(number))
        if number < self.watchers and self.random.random() < 0.5:
            return self.question()
        return super().pipeline(number)

    def question(self) -> list[str]:
        """Ask after what a probe changes all the time."""
        return [f"QUERY|{probed(self.random.randrange(self.probes), self.random.choice('ab'))}|"]

    def begin(self, number: int) -> None:
        """This client has a new connection: what became of its last messages is not known."""
        self.wheels.pop(number, None)

    def _ratchet(self, number: int) -> Iterator[list[str]]:
        if number not in self.wheels:
            self.wheels[number] = ratchet(self.own(number, 0), self.own(number, 1))
        return self.wheels[number]


def probed(number: int, which: str) -> str:
    """One of the two packages that the probe of a server changes."""
    return f"probe-{number}-{which}"


def ratchet(a: str, b: str) -> Iterator[list[str]]:
    """Pipelines that answer otherwise if they are run twice."""
    yield [f"REMOVE|{b}|", f"REMOVE|{a}|"]
    while True:
        yield [f"INDEX|{b}|{a}", f"INDEX|{a}|"]  # FAIL, OK; again: OK, OK
        yield [f"QUERY|{a}|"]  # its own change is what it sees
        yield [f"INDEX|{b}|{a}"]
        yield [f"REMOVE|{a}|", f"REMOVE|{b}|"]  # FAIL, OK; again: OK, OK
        yield [f"QUERY|{b}|"]
        yield [f"REMOVE|{a}|"]


class Fleet:
    """The clients, and what befell them."""

    def __init__(self, crowd: Ratchets) -> None:
        self.crowd = crowd
        self.history = History()
        self.failures: list[str] = []
        self.is_quiet = True
        self.silent: set[Life] = set()  # whose clients say nothing
        self.asking: set[Life] = set()  # whose clients only ask, and change nothing
        self._lives: list[Life] = []
        self._over = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._ready.wait()

    # --- from the director's thread ---------------------------------------------------------------

    def prepare(self, life: Life) -> None:
        """Index, alone and unrecorded, what every package may depend on."""

        async def prepare() -> None:
            client = await History().connect(life.address)
            await self.crowd.prepare(client)
            client.reset()

        self._call(prepare())

    def add(self, *lives: Life) -> None:
        """Clients without a server may go to these, and so may those of crowded ones when all is quiet."""

        async def add() -> None:
            for life in lives:
                self._lives.append(life)
                self._tasks.append(asyncio.create_task(self._probe(life)))

        self._call(add())

    def go_on(self) -> None:
        """Talk."""
        self.is_quiet = False

    def be_quiet(self) -> None:
        """Ask nothing more, and wait until all is answered. TimeoutError: it is not."""
        self.is_quiet = True
        self.wait(QUIET_WITHIN, lambda: not self.unanswered())

    def changes(self, life: Life) -> bool:
        """Whether clients of this server change anything."""
        return life not in self.silent and life not in self.asking

    def unanswered(self, life: Life | None = None) -> int:
        """Messages that wait for their reply: of one server, or all."""
        lives = tuple(self._lives) if life is None else (life,)
        return sum(client.waiting for each in lives for client in tuple(each.clients))

    def wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Wait. TimeoutError: in vain."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.005)

    def take(self) -> list[Call]:
        """What was said since the last time; nobody talks now."""

        async def take() -> list[Call]:
            calls, self.history.calls = self.history.calls, []
            return calls

        return self._call(take())

    def ask(self, life: Life, lines: list[str]) -> list[str]:
        """Ask a server over a connection of its own. ConnectionError, TimeoutError."""

        async def ask() -> list[str]:
            client = await History().connect(life.address)
            try:
                return await client.ask(lines)
            finally:
                client.reset()

        return self._call(ask())

    def end(self) -> None:
        """Close everything; harmless once more."""
        self._over = True
        self._thread.join()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- in the clients' thread -------------------------------------------------------------------

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            asyncio.create_task(self._client(number)) for number in range(self.crowd.clients)
        ]
        self._ready.set()
        while not self._over:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                self.failures.append(f"a client failed: {ended!r}")

    async def _client(self, number: int) -> None:
        """Go to the server with the fewest clients, stay, and go to another when that ends."""
        crowd = self.crowd
        pause = crowd.pause / 4 if number < crowd.watchers else crowd.pause
        while True:
            life = min(
                (life for life in self._lives if life.is_open),
                key=lambda life: len(life.clients) + life.coming,
                default=None,
            )
            client = await self._connect(life) if life else None
            if life is None or client is None:
                await asyncio.sleep(LATE)
                continue
            crowd.begin(number)
            with suppress(ConnectionError):
                while not client.lost:
                    if not (self.is_quiet or life in self.silent):
                        only_asks = life in self.asking
                        lines = crowd.question() if only_asks else crowd.pipeline(number)
                        await self._ask(life, client, lines)
                    elif self._is_crowded(life):
                        life.clients.discard(client)
                        client.reset()
                        break
                    await asyncio.sleep(crowd.random.expovariate(1 / pause))
            if client in life.clients:
                self._lost(life, client)
                await asyncio.sleep(LATE)

    def _is_crowded(self, life: Life) -> bool:
        """Whether a server has more clients than its share."""
        others = [len(each.clients) for each in self._lives if each.is_open]
        return bool(others) and len(life.clients) > min(others) + 2

    async def _probe(self, life: Life) -> None:
        """Change something all the time, as long as the server lives."""
        a, b = probed(life.number, "a"), probed(life.number, "b")
        while not life.is_doomed:
            client = await self._connect(life)
            if client is None:
                await asyncio.sleep(LATE)
                continue
            wheel = ratchet(a, b)
            with suppress(ConnectionError):
                while not client.lost:
                    if not self.is_quiet and self.changes(life):
                        sent, lines = time.monotonic(), next(wheel)
                        await self._ask(life, client, lines)
                        if not lines[0].startswith("QUERY"):
                            life.acknowledged.append((sent, time.monotonic()))
                    await asyncio.sleep(self.crowd.probe_pause)
            self._lost(life, client)
            await asyncio.sleep(LATE)

    async def _ask(self, life: Life, client: Client, lines: list[str]) -> None:
        try:
            await client.ask(lines)
        except TimeoutError:
            self.failures.append(f"no answer from server {life.number} to {lines[0]!r}")
            client.reset()
            raise ConnectionResetError from None

    async def _connect(self, life: Life) -> Client | None:
        life.coming += 1
        try:
            client = await self.history.connect(life.address)
        except OSError as error:
            if not (life.is_doomed or life.may_close):
                self.failures.append(f"server {life.number} lives, and refuses clients: {error}")
            return None
        finally:
            life.coming -= 1
        life.clients.add(client)
        try:  # a server that takes no clients now closes this one: it is to have no change in hand then
            await self._ask(life, client, self.crowd.question())
        except ConnectionError:
            self._lost(life, client)
            return None
        return client

    def _lost(self, life: Life, client: Client) -> None:
        life.clients.discard(client)
        if client.stray:
            self.failures.append(f"server {life.number}: {len(client.stray)} replies too many")
        if life.may_close or client in life.told:
            life.closed += 1
        elif not life.is_doomed:
            self.failures.append(f"server {life.number} lives, and closed a client's connection")
