"""One question to one member, for a command: connect to its cluster port, prove oneself, ask, hear, close.

Blocks, but for no longer than it is told to. Errors: NoAnswer, with what an operator is to read.
"""

import socket
import time

from pkgindex.cluster.frames import LARGE, FrameError, Message, Reader, Refused, encode
from pkgindex.cluster.trust import Dials, NotTrusted

__all__ = ["NoAnswer", "ask"]


class NoAnswer(Exception):
    """The member did not answer, and why; or it refused, and why."""


def ask(address: str, secret: bytes, store: str, question: Message, seconds: float) -> Message:
    """Ask the member at HOST:PORT; its answer. Raises NoAnswer."""
    deadline = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as wire:
            return _talk(wire, Dials(secret, store), question, deadline)
    except TimeoutError:
        raise NoAnswer(f"no answer within {seconds:g} s") from None
    except (NotTrusted, FrameError) as error:
        raise NoAnswer(str(error)) from None
    except (OSError, ValueError) as error:
        raise NoAnswer(getattr(error, "strerror", None) or str(error)) from None


def _talk(wire: socket.socket, handshake: Dials, question: Message, deadline: float) -> Message:
    reader = Reader()

    def send(*messages: Message) -> None:
        wire.sendall(b"".join(part for message in messages for part in encode(message)))

    asked = False
    send(*handshake.begin())
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wire.settimeout(left)
        size = wire.recv_into(reader.get_buffer())
        if not size:
            raise NoAnswer("it closed the connection")
        for message in reader.received(size):
            if isinstance(message, Refused):
                raise NoAnswer(f"it refuses: {message.reason}")
            if asked:
                return message
            send(*handshake.heard(message))
            if handshake.trusted:
                asked, reader.limit = True, LARGE
                send(question)
