"""One connection of the cluster port, either side of it: handshake, messages in, messages out.

Guarantee: nothing is handed on before the other side has proved that it belongs to the store (trust.py),
and nothing at all after close(). A stranger has HANDSHAKE_SECONDS, and may send frames of SMALL bytes.

Errors: what the other side does wrong closes the connection, with a line in the log and a reason sent to
it where it may have one; nothing is raised.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from pkgindex import log
from pkgindex.cluster.frames import LARGE, SMALL, FrameError, Message, Reader, Refused, encode
from pkgindex.cluster.trust import HANDSHAKE_SECONDS, Dials, Listens, NotTrusted
from pkgindex.config import show_address

__all__ = ["Stream"]

UNREAD = 256 * 1024  # bytes on their way to the other side, from which on the stream is full

logger = log.get_logger()


class Stream(asyncio.BufferedProtocol):
    """A connection to another server. Its owner sets `heard` and `ended` at the latest in `trusted`."""

    def __init__(self, handshake: Dials | Listens, trusted: Callable[["Stream"], None]) -> None:
        """`trusted` is called when both sides know each other."""
        self._handshake = handshake
        self._trusted = trusted
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.heard: Callable[[Message], None] = lambda _message: None
        self.ended: Callable[[], None] = lambda: None
        self.writable: Callable[[], None] = lambda: None  # the other side reads again
        self.is_open = False
        self.is_full = False  # what was sent has not been read yet
        self.peer = "?"
        self.heard_at = 0.0  # loop.time() when anything came last

    # --- from the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._transport = cast("asyncio.Transport", transport)
        loop = asyncio.get_running_loop()
        self._loop_time = loop.time
        self.heard_at = loop.time()
        self.peer = show_address(*(transport.get_extra_info("peername") or ("?", 0))[:2])
        self.is_open = True
        self._timer = loop.call_later(HANDSHAKE_SECONDS, self._too_late)
        if isinstance(self._handshake, Dials):
            self.send(*self._handshake.begin())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Tell the owner, unless it was the one who closed."""
        if self.is_open:
            self._over()
            self.ended()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived there."""
        self.heard_at = self._loop_time()
        try:
            for message in self._reader.received(nbytes):
                if not self.is_open:
                    return
                if self._handshake.trusted:
                    if isinstance(message, Refused):
                        logger.warning(
                            "refused by a server", server=self.peer, reason=message.reason
                        )
                    self.heard(message)
                else:
                    self._shake_hands(message)
        except NotTrusted as error:
            logger.warning("server not trusted", server=self.peer, reason=str(error))
            self.send(*error.reply)
            self._break()
        except FrameError as error:
            logger.warning("server not understood", server=self.peer, reason=str(error))
            self._break()

    def _shake_hands(self, message: Message) -> None:
        if isinstance(message, Refused):
            raise NotTrusted(f"refuses this server: {message.reason}")
        self.send(*self._handshake.heard(message))
        if self._handshake.trusted:
            if self._timer is not None:
                self._timer.cancel()
            self._reader.limit = LARGE
            if self._transport is not None:
                self._transport.set_write_buffer_limits(UNREAD)
            self._trusted(self)

    def eof_received(self) -> bool:
        """The other side ends it."""
        return False

    def pause_writing(self) -> None:
        """The other side does not read."""
        self.is_full = True

    def resume_writing(self) -> None:
        """The other side reads again."""
        self.is_full = False
        self.writable()

    # --- from its owner ---------------------------------------------------------------------------

    @property
    def is_trusted(self) -> bool:
        """Whether both sides know each other."""
        return self._handshake.trusted

    def send(self, *messages: Message) -> None:
        """Send messages, in this order."""
        if self._transport is not None and self.is_open and messages:
            parts = [part for message in messages for part in encode(message)]
            if len(parts) == 1:
                self._transport.write(parts[0])
            elif len(parts[-1]) < SMALL:
                self._transport.write(b"".join(parts))
            else:
                self._transport.writelines(parts)

    @property
    def unsent(self) -> int:
        """Bytes that wait for the other side to read."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def pause(self) -> None:
        """Read no further for now."""
        if self._transport is not None and self.is_open:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self.is_open:
            self._transport.resume_reading()

    def close(self, reason: str = "") -> None:
        """Send what is unsent, and `reason` for the other side's log; then end it. `ended` is not called."""
        if self.is_open:
            if reason:
                self.send(Refused(reason))
            self._over()
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """End it at once, whatever is unsent. `ended` is not called."""
        self._over()
        if self._transport is not None:
            self._transport.abort()

    def _break(self) -> None:
        """End it for the other side's fault."""
        if self.is_open:
            self.close()
            self.ended()

    def _too_late(self) -> None:
        logger.warning("server not trusted", server=self.peer, reason="no handshake in time")
        self._break()

    def _over(self) -> None:
        self.is_open = False
        if self._timer is not None:
            self._timer.cancel()
