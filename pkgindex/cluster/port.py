"""The cluster port: who connects, and connecting to others.

Strangers cost little: MOST_STRANGERS connections at once that have not proved yet that they belong to the
store; one more is closed unheard.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from pkgindex.cluster.frames import Message
from pkgindex.cluster.stream import Stream
from pkgindex.cluster.trust import Dials, Listens
from pkgindex.config import parse_address, show_address
from pkgindex.errors import ConfigError, ListenError

__all__ = ["Port", "bind"]

MOST_STRANGERS = 64

EVERY_ADDRESS = ("", "0.0.0.0", "::")


class Port:
    """Of one server."""

    def __init__(self, address: str, secret: bytes, store: str) -> None:
        """Bind `address`, HOST:PORT. Raises ConfigError, ListenError."""
        self._secret = secret
        self._store = store
        self._socket, self.address = bind(address)
        self._streams: set[Stream] = set()  # of which no role is known yet, and commands
        self._strangers = 0
        self._server: asyncio.Server | None = None

    async def listen(self, heard: Callable[[Stream, Message], None]) -> None:
        """Begin; `heard` is told what whoever is trusted says, until it takes the stream over."""
        self._heard = heard
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, sock=self._socket)

    def _accept(self) -> Stream:
        stream = Stream(Listens(self._secret, self._store), self._trusted)
        if self._strangers >= MOST_STRANGERS:
            asyncio.get_running_loop().call_soon(stream.abort)
            return stream
        self._strangers += 1
        self._streams.add(stream)
        stream.ended = partial(self._ended, stream)
        return stream

    def _trusted(self, stream: Stream) -> None:
        self._strangers -= 1
        stream.heard = partial(self._heard, stream)

    def _ended(self, stream: Stream) -> None:
        self._streams.discard(stream)
        if not stream.is_trusted:
            self._strangers -= 1

    def hand_over(self, stream: Stream) -> Stream:
        """Give a stream away: who asked for it minds its end."""
        self._streams.discard(stream)
        stream.ended = lambda: None
        return stream

    async def dial(
        self,
        address: str,
        trusted: Callable[[Stream], None],
        ended: Callable[[], None],
        timeout: float,
    ) -> None:
        """Connect to another server: `trusted` is told when it belongs to the store, `ended` when it does
        not, cannot be reached within `timeout` seconds, or goes away later."""
        stream = Stream(Dials(self._secret, self._store), trusted)
        stream.ended = ended
        host, _, port = address.rpartition(":")
        connected = None
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(timeout):
                loop = asyncio.get_running_loop()
                connected = await loop.create_connection(
                    lambda: stream, host.strip("[]"), int(port)
                )
        if connected is None:
            stream.abort()
            ended()

    def close(self) -> None:
        """Listen no more, and end what nobody has taken over."""
        if self._server is not None:
            self._server.close()
        self._socket.close()
        for stream in tuple(self._streams):
            stream.close()


def bind(address: str) -> tuple[socket.socket, str]:
    """A socket, and its address as others are to use it. Raises ConfigError, ListenError.

    Not listened on, it keeps a port for a server that will bind it, too."""
    found = parse_address(address)
    assert isinstance(found, tuple)
    host, port = found
    if host in EVERY_ADDRESS:
        raise ConfigError(
            f"cluster: {address!r} is every address of this machine: name one that the other servers reach"
        )
    listener: socket.socket | None = None
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ListenError(
            f"cluster: {address}: cannot listen for other servers: {error.strerror}"
        ) from None
    return listener, show_address(host, listener.getsockname()[1])
