"""Clients of a pkgindex server: `Client` blocks, `AsyncClient` is for asyncio.

    with Client("127.0.0.1:8080") as client:
        client.index("libc", [])                        # True: OK, False: FAIL
        client.index("bash", ["libc"])
        client.query("bash")
        client.remove("libc")                           # False: bash depends on it
        client.batch([index_message("zsh", ["libc"]), query_message("zsh")])

What they promise:

- `index`, `remove` and `query` return True for OK and False for FAIL; ERROR raises `Rejected`.
- `batch` pipelines: it writes and reads at the same time, so no number of messages can fill the
  buffers of both sides and stop it. It returns one `Answer` a message, in order, ERROR among them.
- A name that would change the meaning of its message (it holds `|`, `,` or a newline, or is empty)
  raises `ValueError`, and nothing is sent. Every other name is the server's to judge.
- Nothing is ever sent twice. When a connection breaks or falls silent, `ConnectionLost` says which
  messages were answered, which were sent and are unanswered (each may or may not have been carried
  out), and which were never sent. The client is then disconnected; `connect()` makes a new
  connection, and what to repeat on it is the caller's choice.

A server is named `HOST:PORT`, `[IPV6]:PORT`, `HOST` (port 8080) or `unix:PATH`; with `tls://` before it,
or with `tls=` an ssl.SSLContext, the client speaks TLS: it checks the server's certificate, by default
against the CAs that the system trusts, and shows its own if the context has one.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from pkgindex.errors import ClientError
from pkgindex.transport import CLOSED, Endpoint, TLSSocket

if TYPE_CHECKING:
    # Its import takes longer than a whole `pkgindex query`; only AsyncClient needs it.
    import asyncio
    import ssl

__all__ = [
    "DEFAULT_SERVER",
    "Answer",
    "AsyncClient",
    "Client",
    "ConnectionLost",
    "NotConnected",
    "Rejected",
    "index_message",
    "is_name",
    "query_message",
    "remove_message",
]

_T = TypeVar("_T")

DEFAULT_SERVER = "127.0.0.1:8080"
# Seconds. A change waits for the server's storage, and a busy network mount may take many seconds.
DEFAULT_TIMEOUT = 60.0
DEFAULT_CONNECT_TIMEOUT = 10.0

# Messages joined for one write: about 64 KiB of typical ones, few enough to report progress often.
_SLICE = 1024
_READ_SIZE = 256 * 1024
# The longest answer is "ERROR": more bytes without a newline are not an answer.
_LONGEST_ANSWER = 5
_UNASKED = "it answered more often than it was asked"

_PROTOCOL_NAME = re.compile(r"[!-+\--{}~]{1,255}")
_FRAMED_NAME = re.compile(r"[^|,\n]+")


class Answer(StrEnum):
    """What the server says to one message."""

    OK = "OK"
    FAIL = "FAIL"
    ERROR = "ERROR"


_ANSWERS = {answer.encode(): answer for answer in Answer}


class NotConnected(ClientError):
    """There is no connection: it was never made, was closed, or was lost. Call `connect()`."""


class Rejected(ClientError):
    """The server answered ERROR: it holds the message to be malformed."""


class ConnectionLost(ClientError):
    """The connection broke, or was silent for too long, before every message was answered.

    answers     of the first messages, in order
    unanswered  the messages after those that were sent: each may or may not have been carried out
    unsent      the rest: none of them was sent, or none as a whole line, so none was carried out
    """

    def __init__(
        self, server: str, why: str, messages: list[str], answers: list[Answer], sent: int
    ) -> None:
        self.answers = answers
        self.unanswered = messages[len(answers) : sent]
        self.unsent = messages[sent:]
        super().__init__(
            f"lost the connection to {server}: {why} "
            f"({len(answers)} messages answered, {len(self.unanswered)} sent and unanswered, "
            f"{len(self.unsent)} not sent)"
        )


def is_name(name: str) -> bool:
    """Whether the protocol can carry `name`: 1 to 255 visible ASCII characters but `|` and `,`."""
    return _PROTOCOL_NAME.fullmatch(name) is not None


def index_message(package: str, dependencies: Iterable[str] = ()) -> str:
    """The line that indexes `package`, without its newline. Raises ValueError as above."""
    return f"INDEX|{_framed(package)}|{','.join(map(_framed, dependencies))}"


def remove_message(package: str) -> str:
    """The line that removes `package`, without its newline. Raises ValueError as above."""
    return f"REMOVE|{_framed(package)}|"


def query_message(package: str) -> str:
    """The line that asks for `package`, without its newline. Raises ValueError as above."""
    return f"QUERY|{_framed(package)}|"


def _framed(name: str) -> str:
    if _FRAMED_NAME.fullmatch(name) is None:
        raise ValueError(f"no package can be named {name!r}: empty, or with '|', ',' or a newline")
    return name


def _encoded(messages: list[str]) -> bytes:
    # surrogateescape: a name that came from undecodable bytes goes out as the same bytes.
    return ("\n".join(messages) + "\n").encode("utf-8", "surrogateescape")


def _checked(messages: list[str]) -> list[str]:
    """The same messages; raises ValueError if one of them would be more than one line."""
    if "\n" in "".join(messages):
        culprit = next(message for message in messages if "\n" in message)
        raise ValueError(f"a message is one line without its newline: {culprit!r}")
    return messages


class _Outgoing:
    """Messages on their way into a non-blocking socket, joined to one write a slice."""

    def __init__(self, messages: Iterable[str]) -> None:
        self._source = iter(messages)
        self._chunk = memoryview(b"")  # bytes of what was taken that are still to be written
        self.taken: list[str] = []
        self.exhausted = False
        self._take()

    @property
    def written(self) -> bool:
        """Whether the socket has taken everything."""
        return self.exhausted and not self._chunk

    @property
    def sent(self) -> int:
        """How many messages the socket has taken up to their newline.

        The server drops what a broken connection leaves without one, so the others are not sent.
        """
        return len(self.taken) - bytes(self._chunk).count(b"\n")

    def write(self, sock: socket.socket | TLSSocket) -> None:
        """Writes as much of one slice as the socket takes without waiting."""
        if not self._chunk and not self.exhausted:
            self._take()
        if self._chunk:
            with contextlib.suppress(BlockingIOError):
                self._chunk = self._chunk[sock.send(self._chunk) :]

    def _take(self) -> None:
        upcoming = _checked(list(islice(self._source, _SLICE)))
        self.exhausted = len(upcoming) < _SLICE
        self.taken += upcoming
        if upcoming:
            self._chunk = memoryview(_encoded(upcoming))


class _AnswerReader:
    """Cuts received bytes into answers; an incomplete last one waits for its rest."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Answer]:
        """The answers completed by `data`. Raises _ForeignAnswer for what is none."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        try:
            answers = [_ANSWERS[line] for line in lines]
        except KeyError as error:
            raise _ForeignAnswer(f"it answered {error.args[0][:40]!r}") from None
        if len(self._rest) > _LONGEST_ANSWER:
            raise _ForeignAnswer(f"it answered {self._rest[:40]!r}")
        return answers

    def check_empty(self) -> None:
        """Raises _ForeignAnswer if the beginning of one more answer was received."""
        if self._rest:
            raise _ForeignAnswer(_UNASKED)


class _ForeignAnswer(OSError):
    """What the other side sent is not this protocol; handled like a broken connection."""


class _Commands:
    """What both clients know of themselves: server, time-outs, and how an answer is judged."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        connect_timeout: float | None = DEFAULT_CONNECT_TIMEOUT,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Only notes where the server is; `connect()`, or entering the context, connects.

        timeout          seconds without a byte sent or received while answers are due, after
                         which the connection counts as lost; None waits for ever
        connect_timeout  seconds for making the connection; None leaves it to the system
        tls              speak TLS by this context, whatever `server` begins with; without one, and
                         with `tls://`, by ssl.create_default_context()
        Raises ClientError if `server` is malformed, or a Unix socket that is to speak TLS.
        """
        self.server = server
        self._endpoint = Endpoint(server, tls)
        self._answered = False  # something, on this connection
        self._timeout = timeout
        self._connect_timeout = connect_timeout

    def _judged(self, message: str, answer: Answer) -> bool:
        if answer is Answer.ERROR:
            shown = message if len(message) <= 100 else message[:97] + "..."
            raise Rejected(f"{self.server} answered ERROR to {shown!r}")
        return answer is Answer.OK

    def _not_connected(self) -> NotConnected:
        return NotConnected(f"not connected to {self.server}: call connect() first")

    def _silence(self) -> str:
        return f"nothing moved for {self._timeout:g} seconds"


class Client(_Commands):
    """A blocking client. One thread at a time may use it."""

    _socket: socket.socket | TLSSocket | None = None

    def connect(self) -> Self:
        """Connects, after closing what was connected. Raises ClientError if it cannot."""
        self.close()
        self._socket = self._endpoint.connect(self._connect_timeout)
        self._answered = False
        return self

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this side knows."""
        return self._socket is not None

    def close(self) -> None:
        """Closes the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self if self.connected else self.connect()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def index(self, package: str, dependencies: Iterable[str] = ()) -> bool:
        """Indexes `package` with these dependencies, replacing an older list.

        True once that is on the server's stable storage, False if a dependency is not indexed.
        Raises Rejected, ConnectionLost, NotConnected or ValueError.
        """
        return self._ask(index_message(package, dependencies))

    def remove(self, package: str) -> bool:
        """Removes `package`: True once it is not indexed, False if another one depends on it.

        Raises Rejected, ConnectionLost, NotConnected or ValueError.
        """
        return self._ask(remove_message(package))

    def query(self, package: str) -> bool:
        """Whether `package` is indexed.

        Raises Rejected, ConnectionLost, NotConnected or ValueError.
        """
        return self._ask(query_message(package))

    def batch(
        self, messages: Iterable[str], progress: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """Sends all messages without waiting between them; returns one answer each, in order.

        A message is a line without its newline, as `index_message`, `remove_message` and
        `query_message` make them. They are taken from an iterator as they are sent. `progress` is
        called with the number of answers so far. Raises ConnectionLost, whose `unsent` has only
        what was taken; NotConnected; and ValueError for a message of more than one line. An error
        that comes after the first were sent leaves the client disconnected.
        """
        return self._exchange(messages, progress)

    def _ask(self, message: str) -> bool:
        return self._judged(message, self._exchange([message], None)[0])

    def _exchange(
        self, messages: Iterable[str], progress: Callable[[int], object] | None
    ) -> list[Answer]:
        sock = self._socket
        if sock is None:
            raise self._not_connected()
        patience = None if self._timeout is None else self._timeout * 1000
        poll = select.poll()
        outgoing = _Outgoing(messages)
        reader = _AnswerReader()
        answers: list[Answer] = []
        try:
            # What comes before anything is asked is no answer, or the end: then nothing is sent.
            with contextlib.suppress(BlockingIOError):
                raise _ForeignAnswer(_UNASKED) if sock.recv(1) else ConnectionResetError(0, CLOSED)
            while True:
                outgoing.write(sock)
                if outgoing.exhausted and len(answers) == len(outgoing.taken):
                    break
                poll.register(sock, select.POLLIN | (0 if outgoing.written else select.POLLOUT))
                events = poll.poll(patience)
                if not events:
                    raise TimeoutError(0, self._silence())
                if events[0][1] & ~select.POLLOUT:
                    try:
                        data = sock.recv(_READ_SIZE)
                    except BlockingIOError:
                        continue  # TLS: a record of which not all is here, or one of its own
                    if not data:
                        raise ConnectionResetError(0, CLOSED)
                    answers += reader.feed(data)
                    self._answered = True
                    if len(answers) > outgoing.sent:
                        del answers[outgoing.sent :]
                        raise _ForeignAnswer(_UNASKED)
                    if progress is not None:
                        progress(len(answers))
            reader.check_empty()
        except OSError as error:
            self.close()
            why = self._endpoint.why_lost(error, self._answered)
            raise ConnectionLost(
                self.server, why, outgoing.taken, answers, outgoing.sent
            ) from error
        except BaseException:
            # Interrupted with answers still to come: the next question would get the wrong ones.
            self.close()
            raise
        return answers


class _Due:
    """Messages of one call of AsyncClient and the answers that they got so far."""

    def __init__(self, messages: list[str], done: asyncio.Future[list[Answer]]) -> None:
        self.messages = messages
        self.sent = 0
        self.answers: list[Answer] = []
        self.done = done

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.messages)


class AsyncClient(_Commands):
    """A client for asyncio, on any event loop. Its methods mean what those of `Client` mean.

    Several tasks may use one client at once: their messages are pipelined over its connection, and
    the messages of one call stay together. A call that is cancelled does not take back what it has
    sent; the answers to that are read and dropped.
    """

    _writer: asyncio.StreamWriter | None = None
    _reading: asyncio.Task[None]
    _turn: asyncio.Lock

    async def connect(self) -> Self:
        """Connects, after closing what was connected. Raises ClientError if it cannot."""
        import asyncio

        await self.close()
        reader, writer = await self._endpoint.open(self._connect_timeout)
        self._answered = False
        self._writer = writer
        self._turn = asyncio.Lock()
        self._due: deque[_Due] = deque()
        self._moved = 0  # Grows with all that is sent or received: proof that it is not silent.
        self._reading = asyncio.create_task(self._read_answers(reader, writer))
        return self

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as this side knows."""
        return self._writer is not None

    async def close(self) -> None:
        """Closes the connection, if there is one; calls still waiting raise ConnectionLost."""
        writer = self._writer
        if writer is None:
            return
        self._disconnect(ConnectionAbortedError(0, "this side closed it"))
        self._reading.cancel()
        with contextlib.suppress(OSError):  # Broken already, which is as closed as it gets.
            await writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self if self.connected else await self.connect()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def index(self, package: str, dependencies: Iterable[str] = ()) -> bool:
        """As `Client.index`."""
        return await self._ask(index_message(package, dependencies))

    async def remove(self, package: str) -> bool:
        """As `Client.remove`."""
        return await self._ask(remove_message(package))

    async def query(self, package: str) -> bool:
        """As `Client.query`."""
        return await self._ask(query_message(package))

    async def batch(self, messages: Iterable[str]) -> list[Answer]:
        """As `Client.batch`, but takes all messages first.

        Of a lost connection, all that was handed to the event loop counts as sent.
        """
        return await self._exchange(_checked(list(messages)))

    async def _ask(self, message: str) -> bool:
        return self._judged(message, (await self._exchange([message]))[0])

    async def _exchange(self, messages: list[str]) -> list[Answer]:
        import asyncio

        writer = self._writer
        if writer is None:
            raise self._not_connected()
        if not messages:
            return []
        due = _Due(messages, asyncio.get_running_loop().create_future())
        try:
            async with self._turn:
                await self._write(due, writer)
            return await self._patiently(due.done)
        except asyncio.CancelledError:
            due.done.cancel()
            due.messages = messages[: due.sent]
            self._drop_complete()
            raise

    async def _write(self, due: _Due, writer: asyncio.StreamWriter) -> None:
        """Writes the messages of `due`, as fast as they leave."""
        if self._writer is not writer:  # Lost, and perhaps replaced, while this call had to wait.
            raise self._not_connected()
        self._due.append(due)
        while due.sent < len(due.messages) and not due.done.done():
            upcoming = due.messages[due.sent : due.sent + _SLICE]
            writer.write(_encoded(upcoming))
            due.sent += len(upcoming)
            self._moved += 1
            if writer.transport.get_write_buffer_size():
                try:
                    await self._patiently(writer.drain())
                except OSError as error:
                    self._disconnect(error)

    async def _patiently(self, what: Awaitable[_T]) -> _T:
        """Awaits it; ends the connection when nothing moves on it for the time-out."""
        import asyncio

        future = asyncio.ensure_future(what)
        try:
            while True:
                before = self._moved
                await asyncio.wait({future}, timeout=self._timeout)
                if future.done():
                    return future.result()
                if self._moved == before:
                    self._disconnect(TimeoutError(0, self._silence()))
        finally:
            future.cancel()

    async def _read_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Hands each answer to the call that it belongs to, until the connection ends."""
        parse = _AnswerReader()
        try:
            while data := await reader.read(_READ_SIZE):
                self._moved += 1
                answers = parse.feed(data)
                self._answered = True
                while answers:
                    if not self._due or self._due[0].sent == len(self._due[0].answers):
                        raise _ForeignAnswer(_UNASKED)
                    due = self._due[0]
                    wanted = due.sent - len(due.answers)
                    due.answers += answers[:wanted]
                    del answers[:wanted]
                    self._drop_complete()
                if not self._due:
                    parse.check_empty()
            raise ConnectionResetError(0, CLOSED)
        except OSError as error:
            if self._writer is writer:
                self._disconnect(error)

    def _drop_complete(self) -> None:
        while self._due and self._due[0].complete:
            due = self._due.popleft()
            if not due.done.done():
                due.done.set_result(due.answers)

    def _disconnect(self, error: OSError) -> None:
        """Ends the connection; every waiting call raises ConnectionLost for its own messages."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.transport.abort()
        why = self._endpoint.why_lost(error, self._answered)
        while self._due:
            due = self._due.popleft()
            if not due.done.done():
                due.done.set_exception(
                    ConnectionLost(self.server, why, due.messages, due.answers, due.sent)
                )
