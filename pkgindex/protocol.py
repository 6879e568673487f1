# cython: annotation_typing=False
"""One client's connection: bytes in, complete lines to the Index, replies out in order.

Rules:

1. A connection's replies leave in the order of its messages, each exactly once.
2. What a client can make the server keep is bounded: one unfinished line, one window of unanswered
   changes, one chunk of lines that wait for room in it, replies that wait for durability up to HELD,
   and the transport's own buffer. Past any of these the connection is read no further.
3. One connection has the loop for one chunk at a time, however much it has sent.

Theory of operation. All connections receive into one shared buffer, behind the short unfinished line
that one may have kept from its last chunk; only a long line, or lines that wait for room, get a buffer
that grows. So an idle connection costs none. The complete lines of a chunk go to the Index in one
call. Answers that rest on a change which is not durable yet wait in pieces; the hub calls release()
when more of them are settled. Many replies at once leave at the end of the loop's turn, one
connection's right after another's: see _send().

The state of the receiving side:

    LINES      between lines, or within one
    SKIPPING   within a line longer than the limit, which was answered ERROR: dropped up to its end
    ENDED      the client has shut down its sending side: answer what it sent, then close
    DRAINING   the server is stopping: what was received is answered, then the connection closes

Reading is on exactly while nothing is in its way: see _steer().
"""

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import cast

from pkgindex._core import Batch, lines_end
from pkgindex.config import Listener, Settings
from pkgindex.errors import PkgindexError, StoreFailed
from pkgindex.index import Answers, Index, Piece

__all__ = ["SWEEP_SECONDS", "Connection", "Hub"]

# What one read takes at most: about 3,000 messages, well under a millisecond of the loop's time.
CHUNK = 64 * 1024

# An unfinished line up to this length is copied into the shared buffer at each read; a longer one is
# received where it is, so that it is copied a few times in all however small its pieces are.
SHORT = 4 * 1024

SWEEP_SECONDS = 1.0  # how coarse the clock of the time-outs is; they are late by up to as much

# Replies of so many bytes leave at the end of the loop's turn: what a message waits is little beside what
# the chunk's others took.
MANY = 1024

# Bytes of replies that may wait for durability behind a change, before reading stops.
HELD = 256 * 1024


class Hub:
    """What all connections of a server share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, index: Index, settings: Settings) -> None:
        self.loop = loop
        self.index = index
        self._apply: Callable[[Batch], Answers] = index.apply
        self.window = settings.window
        self.max_line = settings.max_line
        self.max_clients = settings.max_clients
        self.batch = Batch(settings.max_line)
        self.shared = bytearray(SHORT + CHUNK)
        self.shared_view = memoryview(self.shared)
        self.first_view = self.shared_view[:CHUNK]
        self.now = loop.time()  # as of the last sweep: coarse, and free to read
        self.connections: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}  # replies wait to be settled, or lines for room
        self.unfinished: dict[Connection, float] = {}  # since when a line has been unfinished
        self.leaving: list[Connection] = []  # have replies that leave at the end of this turn
        self.accepted = self.refused = self.late = self.idle = self.skipped = 0
        self.strangers = self.unsecured = self.no_memory = 0
        self.failed: Callable[[PkgindexError], None] = lambda _error: None
        self.admits = True
        index.clients = self

    def applies(self, apply: Callable[[Batch], Answers]) -> None:
        """See Clients."""
        self._apply = apply

    def forsake(self, first: int, last: int) -> None:
        """See Clients."""
        for connection in tuple(self.waiting):
            if connection.awaits(first, last):
                connection.abort()

    def admit(self, admitted: bool) -> None:
        """See Clients."""
        self.admits = admitted
        if not admitted:
            for connection in tuple(self.connections):
                connection.abort()

    def join(self, connection: "Connection") -> bool:
        """Take a new connection in; False if there are too many."""
        if len(self.connections) >= self.max_clients or not self.admits:
            self.refused += 1
            return False
        self.accepted += 1
        self.connections.add(connection)
        return True

    def leave(self, connection: "Connection") -> None:
        """Forget a connection."""
        self.connections.discard(connection)
        self.waiting.pop(connection, None)
        self.unfinished.pop(connection, None)

    def send(self) -> None:
        """The turn is at its end."""
        leaving, self.leaving = self.leaving, []
        for connection in leaving:
            connection.send()

    def settled(self) -> None:
        """More tickets are settled, or there is room again: let the answers go."""
        settled = self.index.settled
        waiting = self.waiting
        try:
            for connection in tuple(waiting):
                if not connection.release(settled):
                    waiting.pop(connection, None)
        except MemoryError as error:
            self.out_of_memory(error)

    def sweep(self, line_timeout: float, idle_timeout: float) -> None:
        """Close what has left a line unfinished, or sent nothing, for too long (seconds; 0: never).

        Called every SWEEP_SECONDS. Times are as of a sweep, so they may be that much too early."""
        self.now = self.loop.time()
        now = self.now - SWEEP_SECONDS
        if line_timeout:
            for connection in [c for c in self.unfinished if c.is_late(now - line_timeout)]:
                self.late += 1
                connection.abort()
        if idle_timeout:
            for connection in [c for c in self.connections if c.is_idle(now - idle_timeout)]:
                self.idle += 1
                connection.abort()

    def out_of_memory(self, error: MemoryError) -> None:
        """There was no memory in the middle of a chunk, or for its answers: they are lost, so end."""
        what = str(error) or "no room for answers"
        self.failed(StoreFailed(f"out of memory: {what}; give the server more, and start it again"))

    def stats(self) -> dict[str, object]:
        """Counters for the log."""
        return {
            "clients": len(self.connections),
            "accepted": self.accepted,
            "refused": self.refused,
            "strangers": self.strangers,
            "no_handshake": self.unsecured,
            "closed_late": self.late,
            "closed_idle": self.idle,
            "skipped_lines": self.skipped,
            "no_memory": self.no_memory,
        }


class State(Enum):
    """Of the receiving side."""

    LINES = "lines"
    SKIPPING = "skipping"
    ENDED = "ended"
    DRAINING = "draining"


LINES, SKIPPING, ENDED, DRAINING = State


class Connection:
    """A client, from connection_made to connection_lost: an asyncio.BufferedProtocol.

    Not by inheritance: where compiled (protocol.pxd), it is a C structure with typed fields.
    """

    def __init__(self, hub: "Hub", listener: Listener | None = None) -> None:
        self._hub = hub
        self._listener = listener
        self._read_only = listener is not None and listener.read_only
        self._transport: asyncio.Transport | None = None
        self._write: Callable[[bytes | bytearray], None]
        self._buffer: bytearray | None = None  # own, while something is pending
        self._filled = 0  # bytes in it
        self._lines = 0  # how many of these are complete lines that wait for room in the window
        self._state = LINES
        self._replies: bytes | bytearray | None = None  # the first that wait,
        self._ticket = 0  # for this to be settled,
        self._newest = 0  # ticket that was waited for
        self._changes = 0  # and answer so many INDEX and REMOVE
        self._behind: deque[Piece] = deque()  # what waits behind them
        self._held = 0  # bytes of replies that wait
        self._unanswered = 0  # INDEX and REMOVE that they answer
        self._leaving: bytes | bytearray | None = None  # replies for the end of this turn
        self._error_due = False  # an overlong line stands behind lines that wait
        self._blocked = False  # the client does not read what it is sent
        self._yielding = False  # it had its chunk in this turn of the loop
        self._paused = False
        self.seen = hub.now  # when it last sent something, by the hub's coarse clock

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the hub, or be closed without a byte: a stranger, or one too many."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own are not subclasses
        self._write = self._transport.write
        if self._listener is not None and self._listener.allow:
            peer = transport.get_extra_info("peername")
            if not self._listener.admits(peer[0] if peer else None):
                self._hub.strangers += 1
                self._transport.abort()
                return
        if not self._hub.join(self):
            self._transport.abort()

    def secured(self, transport: asyncio.Transport) -> None:
        """The TLS handshake is done: speak through `transport`, which stands on the one before."""
        if self._transport is not None:
            self._transport = transport
            self._write = transport.write

    def not_secured(self) -> None:
        """There is no TLS handshake, and so no client."""
        self._hub.unsecured += 1
        self.abort()
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget everything; changes that were applied stay applied."""
        self._transport = None
        self._buffer = None
        self._replies = self._leaving = None
        self._behind.clear()
        self._hub.leave(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next bytes go: the shared buffer, or behind a long unfinished line."""
        if not self._filled:
            return self._hub.first_view
        try:
            return self._behind_the_line()
        except MemoryError:
            self._let_go()
            return self._hub.first_view

    def _behind_the_line(self) -> memoryview:
        """Where the rest of an unfinished line goes. Raises MemoryError."""
        filled = self._filled
        own = self._buffer
        assert own is not None
        if filled <= SHORT:
            self._hub.shared[:filled] = own
            return self._hub.shared_view[filled : filled + CHUNK]
        if len(own) - filled < SHORT:
            own = _moved(own, 0, filled, min(2 * len(own), self._hub.max_line + 2 * CHUNK))
            self._buffer = own
        return memoryview(own)[filled : filled + CHUNK]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived there."""
        hub = self._hub
        self.seen = hub.now
        before = self._filled
        buffer = hub.shared if before <= SHORT else self._buffer
        assert buffer is not None
        end = before + nbytes
        start = 0
        if self._state is not LINES:
            if self._state is not SKIPPING:
                return  # draining: dropped unread
            start = buffer.find(b"\n", before, end) + 1
            if not start:
                return
            self._state = LINES
            hub.unfinished.pop(self, None)
        if nbytes == CHUNK:
            # It filled the buffer, so there is more: let the others have their turn first.
            self._yielding = True
            hub.loop.call_soon(self._go_on)
        cut = lines_end(buffer, start or before, end)
        stop = self._process(buffer, start, cut) if cut else start
        if stop == end and not self._filled:
            if hub.unfinished:
                hub.unfinished.pop(self, None)
        else:
            self._keep(buffer, stop, end, cut)
        if self._yielding or self._lines or self._paused or self._held > HELD:
            self._steer()

    def eof_received(self) -> bool:
        """The client sends no more: answer what it sent, then close; whether it can be answered yet.

        Over TLS it cannot: the transport sends what it was given before, and closes."""
        self._state = ENDED
        self._hub.unfinished.pop(self, None)
        half_closed = self._transport is not None and self._transport.can_write_eof()
        self._finish()
        return half_closed

    def pause_writing(self) -> None:
        """The client does not read: read nothing from it either."""
        self._blocked = True
        self._steer()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._blocked = False
        self._steer()

    # --- messages ---------------------------------------------------------------------------------

    def _process(self, buffer: bytearray, start: int, stop: int) -> int:
        """Give complete lines to the Index; where it stopped for lack of room."""
        batch = self._hub.batch
        index = self._hub.index
        room = 0 if index.congested else self._hub.window - self._unanswered
        waits = 0 if self._replies is None else self._newest
        batch.load(buffer, start, stop, room, self._read_only, waits)
        try:
            answers = self._hub._apply(batch)
            if isinstance(answers, bytes):
                self._answer(batch.ticket, answers, batch.changes)
            else:
                for ticket, replies, changes in answers:
                    self._answer(ticket, replies, changes)
        except MemoryError as error:
            self._hub.out_of_memory(error)
            return stop
        return batch.start

    def _answer(self, ticket: int, replies: bytes | bytearray, changes: int) -> None:
        """Send replies, unless they have to wait for their ticket, or behind others that do."""
        if self._replies is not None:
            self._behind.append((ticket, replies, changes))
        elif ticket > self._hub.index.settled:
            self._ticket, self._replies, self._changes = ticket, replies, changes
        else:
            if replies:
                self._send(replies)
            return
        if ticket:
            self._newest = ticket
        self._held += len(replies) if type(replies) is bytes else 0
        self._unanswered += changes
        self._hub.waiting[self] = None

    def _keep(self, buffer: bytearray, start: int, end: int, cut: int) -> None:
        """Keep buffer[start:end] for the next time; complete lines in it end at `cut`."""
        hub = self._hub
        lines = max(0, cut - start)
        partial = end - start - lines
        if partial and (cut or self not in hub.unfinished) and self._state is not ENDED:
            hub.unfinished[self] = hub.now
        elif not partial and self._state is not SKIPPING:
            hub.unfinished.pop(self, None)
        if partial > hub.max_line:
            # The rest of this line will be dropped as it comes. Its answer may have to wait its turn.
            hub.skipped += 1
            self._state = SKIPPING
            end -= partial
            if lines:
                self._error_due = True
            else:
                self._answer(0, b"ERROR\n", 0)
        left = end - start
        if not left:
            self._buffer = None
        elif left <= SHORT or buffer is not self._buffer or start:
            size = left if left <= SHORT else min(2 * left, left + 2 * CHUNK)
            try:
                self._buffer = _moved(buffer, start, end, size)
            except MemoryError:
                self._let_go()
                return
        self._filled = left
        self._lines = lines
        if lines:
            hub.waiting[self] = None
            if not (self._yielding or hub.index.congested or self._unanswered >= hub.window):
                # The Index had enough of this chunk: go on in the next turn of the loop.
                self._yielding = True
                hub.loop.call_soon(self._go_on)

    def _let_go(self) -> None:
        """There is no memory for what this client has sent: close it, for the others' sake."""
        self._hub.no_memory += 1
        self._hub.unfinished.pop(self, None)
        self._buffer, self._filled, self._lines = None, 0, 0
        self._state = DRAINING  # what still comes is dropped
        # Not at once: uvloop asks for a buffer in the middle of a read, where closing would crash it.
        self._hub.loop.call_soon(self.abort)

    def release(self, settled: int) -> bool:
        """Send the replies whose ticket is settled; whether anything still waits."""
        replies = self._next(settled)
        if replies is not None:
            if self._replies is not None:
                ready = [replies]
                while (more := self._next(settled)) is not None:
                    ready.append(more)
                replies = b"".join(ready)
            self._send(replies)
        if self._lines or self._paused or self._state is not LINES:
            self._steer()
        return self._replies is not None or self._lines > 0

    def _send(self, replies: bytes | bytearray) -> None:
        """Send replies, many of them only at the end of the loop's turn.

        A client that waits is woken by them, which takes the kernel about as long as to copy them. One
        whose connections are many is woken once so, by the first of several writes in a row."""
        if self._leaving is not None:
            self._leaving = self._leaving + replies
        elif len(replies) < MANY:
            if self._transport is not None:
                self._write(replies)
        else:
            self._leaving = replies
            leaving = self._hub.leaving
            leaving.append(self)
            if len(leaving) == 1:
                self._hub.loop.call_soon(self._hub.send)

    def send(self) -> None:
        """Send what was to leave at the end of this turn."""
        replies, self._leaving = self._leaving, None
        if replies is not None and self._transport is not None:
            self._write(replies)

    def _next(self, settled: int) -> bytes | bytearray | None:
        """Take the first of the replies that wait; None if they have to wait on."""
        replies = self._replies
        if replies is None or self._ticket > settled:
            return None
        self._held -= len(replies) if type(replies) is bytes else 0
        self._unanswered -= self._changes
        if self._behind:
            self._ticket, self._replies, self._changes = self._behind.popleft()
        else:
            self._replies = None
        return replies

    # --- flow -------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._yielding = False
        self._steer()

    def _steer(self) -> None:
        """Take up lines that waited for room, then read on, or not: the one place that decides."""
        if self._transport is None:
            return
        if (
            self._lines
            and not self._blocked
            and not self._yielding
            and not self._hub.index.congested
        ):
            self._take_up()
        if self._state in (ENDED, DRAINING):
            self._finish()
            return
        stop = self._blocked or self._yielding or self._lines > 0 or self._held > HELD
        if stop is not self._paused:
            self._paused = stop
            if stop:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
                if self in self._hub.unfinished:
                    self._hub.unfinished[self] = self._hub.now  # it could not go on before

    def _take_up(self) -> None:
        """Process the complete lines that had to wait."""
        if self._unanswered >= self._hub.window:
            return
        self._hub.waiting.pop(self, None)  # if it has to wait again, then behind the others
        buffer, end, cut = self._buffer, self._filled, self._lines
        assert buffer is not None
        stop = self._process(buffer, 0, cut)
        if self._transport is None:
            return
        self._keep(buffer, stop, end, cut)
        if self._error_due and not self._lines:
            self._error_due = False
            self._answer(0, b"ERROR\n", 0)

    def _finish(self) -> None:
        """Close once all is answered; a client that ended its side needs no more than that."""
        if self._lines or self._replies is not None or self._transport is None:
            return
        if self._state is ENDED:
            self.send()
            self._transport.close()

    # --- from the hub -----------------------------------------------------------------------------

    def drain(self) -> None:
        """The server stops: answer what was received, then end the connection."""
        self._hub.unfinished.pop(self, None)
        if self._state is not ENDED:
            self._state = DRAINING
        self._steer()

    def drained(self) -> bool:
        """Whether everything received is answered and sent. Then the sending side is shut down: closing
        with unread bytes in the socket would reset it, and could take the last replies away."""
        if self._transport is None:
            return True
        self.send()
        if self._lines or self._replies is not None or self._transport.get_write_buffer_size():
            return False
        if not self._transport.is_closing():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()  # TLS says goodbye, and reads up to the client's
            if self._paused:
                self._paused = False
                self._transport.resume_reading()
        return True

    def awaits(self, first: int, last: int) -> bool:
        """Whether it waits for any of these tickets."""
        tickets = [self._ticket, *(piece[0] for piece in self._behind)]
        return self._replies is not None and any(first <= each <= last for each in tickets)

    def is_late(self, before: float) -> bool:
        """Whether the client, free to send, has left a line unfinished since `before`."""
        return not self._paused and self._hub.unfinished.get(self, before) < before

    def is_idle(self, before: float) -> bool:
        """Whether it has sent nothing since `before` and is owed nothing."""
        return (
            self.seen < before and self._replies is None and not self._lines and not self._blocked
        )

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()


def _moved(buffer: bytearray, start: int, end: int, size: int) -> bytearray:
    """buffer[start:end] in a new one of `size` bytes: a transport may still hold a view of the old one."""
    own = bytearray(size)
    own[: end - start] = memoryview(buffer)[start:end]
    return own
