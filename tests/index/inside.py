"""The server's protocol in a thread of the test, before an Index that the test steers.

with Inside(HandIndex(), window=10) as inside, Wire(inside.address) as wire:
    wire.send(b"INDEX|a|\\n")
    inside.wait_until(lambda: inside.index.waiting)
    inside.settle()
    assert wire.receive() == [b"OK\\n"]
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from pkgindex._core import Batch, Graph
from pkgindex.config import Settings
from pkgindex.errors import PkgindexError
from pkgindex.index import Answers, Index, Progress
from pkgindex.index.base import Clients
from pkgindex.protocol import Connection, Hub
from tests.servers import PATIENCE, Address

T = TypeVar("T")


class HandIndex(Index):
    """A journalled graph without a journal: a commit is settled when the test says so."""

    def __init__(self) -> None:
        self.graph = Graph(journalled=True)
        self.tell: Callable[[], None] = lambda: None
        self.failed: Callable[[PkgindexError], None] = lambda error: None

    @classmethod
    def open(cls, location: str, settings: Settings, progress: Progress | None = None) -> Self:
        return cls()

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None],
        failed: Callable[[PkgindexError], None],
    ) -> None:
        self.tell = settled
        self.failed = failed

    def apply(self, batch: Batch) -> Answers:
        return self.graph.apply(batch)

    def settle(self) -> None:
        """Make everything that was applied durable. On the loop's thread only."""
        ticket, _, _ = self.graph.seal()
        self.graph.settle(ticket)
        self.settled = ticket
        self.tell()

    def asked(self) -> int:
        """Return the number of messages answered so far, sent or not."""
        return sum(self.graph.stats()["messages"].values())

    async def stop(self, timeout: float) -> dict[str, object]:
        return {}

    def stats(self) -> dict[str, object]:
        return self.graph.stats()

    def __len__(self) -> int:
        return len(self.graph)


class Inside:
    """A listening hub in a thread with an event loop of its own."""

    def __init__(
        self, index: Index, between: Callable[[Hub], Clients] | None = None, **settings: Any
    ) -> None:
        """`between` gives what the Index is to take for the hub."""
        self.index = index
        self._between = between
        self.settings = Settings(store="memory:", **settings)
        self.failures: list[PkgindexError] = []
        self.unhandled: list[dict[str, Any]] = []  # what reached the loop's exception handler
        self.last_facts: dict[str, object] | None = None  # what the Index said at its stop
        self.hub: Hub
        self.address: Address
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda loop, context: self.unhandled.append(context))
        self._stop = asyncio.Event()
        self.hub = Hub(self._loop, self.index, self.settings)
        self.hub.failed = self.failures.append
        if self._between is not None:
            self.index.clients = self._between(self.hub)
        self.index.start(self._loop, self.hub.settled, self.failures.append)
        await self.index.ready()
        server = await self._loop.create_server(lambda: Connection(self.hub), "127.0.0.1", 0)
        self.address = server.sockets[0].getsockname()[:2]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in tuple(self.hub.connections):
            connection.abort()
        await asyncio.sleep(0.01)
        self.last_facts = await self.index.stop(PATIENCE)

    def do(self, action: Callable[[], T]) -> T:
        """Run `action` on the loop's thread and return what it returns."""

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE)

    def settle(self) -> None:
        """Settle what a HandIndex has applied."""
        assert isinstance(self.index, HandIndex)
        self.do(self.index.settle)

    def wait_until(self, holds: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait until this holds, looking from the loop's thread."""
        deadline = time.monotonic() + patience
        while not self.do(holds):
            assert time.monotonic() < deadline, "it never came to hold"
            time.sleep(0.002)

    def wait_while_it_moves(self, figure: Callable[[], T], quiet: float = 0.15) -> T:
        """Wait until a figure has stayed the same for so many seconds, and return it."""
        last, since = self.do(figure), time.monotonic()
        while time.monotonic() < since + quiet:
            time.sleep(0.01)
            now = self.do(figure)
            if now != last:
                last, since = now, time.monotonic()
        return last

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        if kind is None:
            assert self.unhandled == [], "an exception reached the loop"
