"""The protocol as a model: what any server must answer, in as few lines as it takes to say it.

`Model` is the whole specification of the three commands, by the protocol's table: pure, without
I/O, slow on purpose where that keeps it short (a `REMOVE` looks at every package). Tests compare
real servers and the compiled core with it. `Conversation` puts it behind a socket: framing, reply
order, back-pressure. So the conformance suite can be tried, and shown to fail, without pkgindex:

    python -m tests.reference --port 0       # prints the address that it listens on
    pytest tests/conformance --server 127.0.0.1:PORT
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from collections.abc import Callable

OK, FAIL, ERROR = b"OK\n", b"FAIL\n", b"ERROR\n"

#: A longer line, its line feed not counted, is answered with one ERROR: pkgindex's default.
MAX_LINE = 1024 * 1024

#: Visible ASCII without the two separators `,` (0x2C) and `|` (0x7C).
NAME = rb"[!-+\--{}~]{1,255}"
MESSAGE = re.compile(rb"(INDEX|REMOVE|QUERY)\|(%b)\|((?:%b(?:,%b)*)?)" % (NAME, NAME, NAME))


class Model:
    """An index of packages; `packages` maps each indexed name to the names it depends on."""

    def __init__(self) -> None:
        self.packages: dict[bytes, frozenset[bytes]] = {}

    def apply(self, line: bytes) -> bytes:
        """Carry out one message, given without its line feed; return the reply with its own."""
        message = MESSAGE.fullmatch(line)
        if message is None:
            return ERROR
        command, package, listed = message.groups()
        dependencies = frozenset(listed.split(b",")) if listed else frozenset()
        if command == b"QUERY":
            return OK if package in self.packages else FAIL
        if command == b"INDEX":
            if not dependencies <= self.packages.keys():
                return FAIL
            self.packages[package] = dependencies
        if command == b"REMOVE":
            dependents = {name for name, needed in self.packages.items() if package in needed}
            if dependents - {package}:
                return FAIL
            self.packages.pop(package, None)
        return OK


class Conversation(asyncio.Protocol):
    """One connection of the reference server: lines in, replies out, in order.

    What the client leaves unread is bounded: its messages are not read while its replies wait.
    A client that shuts down its sending side gets every reply, then the connection is closed;
    that is what asyncio does when `eof_received` is left alone.
    """

    transport: asyncio.Transport

    def __init__(self, model: Model) -> None:
        self.model = model
        self.begun = b""  # the line whose line feed has not arrived yet
        self.skipping = False  # within a line that was too long, and is already answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, begun = (self.begun + data).split(b"\n")
        replies = []
        for line in lines:
            if not self.skipping:
                replies.append(self.answer(line))
            self.skipping = False
        if not self.skipping and len(begun) > MAX_LINE:
            replies.append(ERROR)
            self.skipping = True
        self.begun = b"" if self.skipping else begun
        self.reply(replies)

    def answer(self, line: bytes) -> bytes:
        """Return the reply to one complete line."""
        return ERROR if len(line) > MAX_LINE else self.model.apply(line)

    def reply(self, replies: list[bytes]) -> None:
        """Send what one chunk of received bytes is answered with."""
        self.transport.write(b"".join(replies))

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def listen(
    model: Model, port: int, conversation: Callable[[Model], Conversation] = Conversation
) -> asyncio.Server:
    """Serve `model` on a port of 127.0.0.1 (0: a free one). OSError if the port is taken."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: conversation(model), "127.0.0.1", port, backlog=1024)


async def main() -> None:
    """Serve an empty model until SIGTERM or SIGINT, then say how many packages are left in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="the port; 0, the default: a free one")
    model = Model()
    server = await listen(model, parser.parse_args().port)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    server.close()
    print(f"{len(model.packages)} packages left", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
