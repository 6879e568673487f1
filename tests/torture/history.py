"""What every client sent and was told, and when: the evidence that `linearizability` judges.

    history = History()
    client = await history.connect(address)
    assert await client.ask(["INDEX|zlib|", "QUERY|zlib|"]) == ["OK", "OK"]

Times are CLOCK_MONOTONIC in nanoseconds, which no clock jump moves and which is one for all processes
of a machine. A call's are never too narrow: `sent` is taken before its first byte leaves, `replied`
after its reply has arrived, so what truly came first may look concurrent, and never the other way.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.servers import Address

__all__ = ["NEVER", "Call", "Client", "History"]

NEVER = 1 << 63  # later than any time: the reply did not come

#: Seconds for one pipeline's replies: only a hang reaches it.
PATIENCE = 60.0


@dataclass(slots=True)
class Call:
    """One message, given without its line feed, and its reply, without its own."""

    client: int  # the connection; its calls take effect in the order in which they were sent
    line: str
    sent: int
    reply: str | None = None
    replied: int = NEVER

    def __str__(self) -> str:
        return f"{self.line} → {self.reply or 'unanswered'} (client {self.client})"


@dataclass
class History:
    """The calls of any number of connections, in the order in which they were sent."""

    calls: list[Call] = field(default_factory=list)
    clients: int = 0

    async def connect(self, address: Address) -> Client:
        """Open one more recorded connection. OSError if nobody listens."""
        loop = asyncio.get_running_loop()
        self.clients += 1
        number = self.clients
        if isinstance(address, str):
            _, client = await loop.create_unix_connection(lambda: Client(self, number), address)
        else:
            _, client = await loop.create_connection(lambda: Client(self, number), *address)
        return client

    @property
    def answered(self) -> int:
        """How many calls have their reply."""
        return sum(call.reply is not None for call in self.calls)


class Client(asyncio.Protocol):
    """One recorded connection. What it raises when the server goes is ConnectionError."""

    def __init__(self, history: History, number: int) -> None:
        self.number = number
        self.stray: list[str] = []  # replies that answer nothing
        self.lost = False
        self._history = history
        self._open: deque[Call] = deque()
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._all_answered: asyncio.Future[None] | None = None

    @property
    def waiting(self) -> int:
        """Messages that wait for their reply."""
        return len(self._open)

    async def ask(self, lines: Iterable[str]) -> list[str]:
        """Send a pipeline and return its replies. ConnectionError if the connection ends before,
        TimeoutError if the replies do not come."""
        calls = self.send(lines)
        if self._open:
            self._all_answered = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(PATIENCE):
                await self._all_answered
        return [call.reply or "" for call in calls]

    def send(self, lines: Iterable[str]) -> list[Call]:
        """Send a pipeline and return its calls, to be answered later."""
        if self.lost or self._transport is None:
            raise ConnectionResetError("the server has closed the connection")
        now = time.monotonic_ns()
        calls = [Call(self.number, line, now) for line in lines]
        self._history.calls += calls
        self._open += calls
        self._transport.write("".join(call.line + "\n" for call in calls).encode())
        return calls

    @property
    def unanswered(self) -> list[str]:
        """What was sent and is not answered, in its order."""
        return [call.line for call in self._open]

    @property
    def is_within_a_reply(self) -> bool:
        """Whether a part of a reply has arrived whose rest has not."""
        return bool(self._received)

    def send_raw(self, data: bytes) -> None:
        """Send bytes that are no whole message, unrecorded."""
        if self._transport is not None:
            self._transport.write(data)

    def reset(self) -> None:
        """Break the connection off, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        *replies, self._received = (self._received + data).split(b"\n")
        for reply in replies:
            if not self._open:
                self.stray.append(reply.decode(errors="replace"))
                continue
            call = self._open.popleft()
            call.reply, call.replied = reply.decode(errors="replace"), now
        waiting = self._all_answered
        if not self._open and waiting is not None and not waiting.done():
            waiting.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        waiting = self._all_answered
        if waiting is not None and not waiting.done():
            waiting.set_exception(ConnectionResetError("the connection ended before the replies"))
            waiting.exception()  # looked at, if nobody waits any more
