"""What two servers say to each other on the cluster port: messages to bytes, and bytes to messages.

    u8 kind | u32 size of the rest | fields of fixed width | body

Numbers are big-endian. The body is raw: redo lines, lines of the data protocol, or letters of answers. It
is not copied on the way out, and is read from the socket into the very buffer that the message then holds.

Calling sequence. encode() gives the buffers to hand to a transport's writelines(). A Reader stands behind
a BufferedProtocol: get_buffer(), then run through received(), which gives each message once it is whole,
wherever the bytes were cut. Between two messages the caller may raise `limit`: a stranger's frames are
small, and no memory is set aside for a larger one.

Errors: FrameError, one line that says what was wrong. The stream is then of no more use: close it.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

from pkgindex.store.origins import WINDOW

__all__ = [
    "LARGE",
    "SMALL",
    "VERSION",
    "Answers",
    "Batch",
    "Challenge",
    "Check",
    "Checked",
    "Confirm",
    "Current",
    "Done",
    "Elsewhere",
    "End",
    "Forward",
    "FrameError",
    "HandOver",
    "Hello",
    "Message",
    "Offer",
    "Ping",
    "Pong",
    "Proof",
    "Reader",
    "Refused",
    "Snapshot",
    "State",
    "Status",
    "Welcome",
    "encode",
]

# Of all that is said here; a server speaks one.
VERSION = 1

SMALL = 4096  # bytes of a frame from one who has not proved yet that it belongs to the store
LARGE = 128 << 20  # a commit holds 32 MiB of redo lines and what the message that filled it adds
SCRATCH = 1 << 16  # bytes read at once where the rest of a body is less

HEADER = struct.Struct("!BI")
NONCE_BYTES = 32
MAC_BYTES = 32  # SHA-256

Buffer: TypeAlias = bytes | bytearray | memoryview


class FrameError(Exception):
    """These bytes are no message that this release knows."""


@dataclass(frozen=True, slots=True)
class Message:
    """What both sides may say. Its fields are numbers of fixed width, and then perhaps a body."""

    kind: ClassVar[int]
    fixed: ClassVar[struct.Struct] = struct.Struct("")
    most: ClassVar[int] = 0  # bytes that its body may have

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """Its fields as they are packed, and its body."""
        return tuple(self._values()), b""

    def _values(self) -> list[Any]:
        names: tuple[str, ...] = self.__match_args__
        return [getattr(self, name) for name in names]

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:  # noqa: ARG003  # it is empty here
        """The message; `body` is its own from now on. Raises ValueError, which says what is wrong."""
        return cls._made(*fields)

    @classmethod
    def _made(cls, *values: Any) -> Self:
        make: Callable[..., Self] = cls
        return make(*values)


@dataclass(frozen=True, slots=True)
class _Lines(Message):
    """A message whose last field, `lines`, is its body."""

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        *fields, lines = self._values()
        return tuple(fields), lines

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:
        """See Message."""
        return cls._made(*fields, body)


@dataclass(frozen=True, slots=True)
class _Letters(Message):
    """A message whose last field, `letters`, is its body: O, F or E for each answer."""

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        *fields, letters = self._values()
        return tuple(fields), letters.encode("ascii")

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:
        """See Message."""
        if body.translate(None, b"OFE"):
            raise ValueError("an answer that is not O, F or E")
        return cls._made(*fields, body.decode("ascii"))


# --- who is there: the challenge both ways (trust.py) ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Challenge(Message):
    """Prove with this nonce that you know the secret. The first message of each side.

    Of another version only the number is read; whatever follows it is not looked at."""

    version: int
    nonce: bytes

    kind = 1
    fixed = struct.Struct("!H")
    most = 1024

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        return (self.version,), self.nonce

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:
        """See Message."""
        if fields[0] == VERSION and len(body) != NONCE_BYTES:
            raise ValueError("a nonce of another length")
        return cls(fields[0], bytes(body))


@dataclass(frozen=True, slots=True)
class Proof(Message):
    """What only one who knows the secret can say to both nonces."""

    mac: bytes

    kind = 2
    fixed = struct.Struct(f"!{MAC_BYTES}s")


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The other side wants nothing of it, for a reason that its operator may read."""

    reason: str

    kind = 3
    most = 1024

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        return (), self.reason.encode()[: self.most].decode(errors="ignore").encode()

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:  # noqa: ARG003  # it has none
        """See Message."""
        return cls(body.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """A follower begins: who it is, how far it is, and what it has given out of its answers."""

    store: str  # 32 hexadecimal digits, as are all names here
    member: str
    epoch: int  # the position of its graph (F1); 0 and 0: it has none, or must not go on from it
    change: int
    seen: int  # the newest change that it has ever had, durable: see Origins.resume()
    confirmed: int  # the last counter of its origin that is answered
    highest: int  # epoch that it knows to have served
    version: int = VERSION

    kind = 10
    fixed = struct.Struct("!H")
    most = 1024

    _rest: ClassVar[struct.Struct] = struct.Struct("!16s16sQQQQQ")

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        names = bytes.fromhex(self.store), bytes.fromhex(self.member)
        numbers = self.epoch, self.change, self.seen, self.confirmed, self.highest
        return (self.version,), self._rest.pack(*names, *numbers)

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:
        """See Message."""
        if fields[0] != VERSION:
            raise ValueError(f"version {fields[0]} of the cluster protocol, not {VERSION}")
        if len(body) != cls._rest.size:
            raise ValueError("of another length")
        store, member, *numbers = cls._rest.unpack(body)
        return cls(store.hex(), member.hex(), *numbers)


# --- from the writer to a follower ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The writer's position, and where the follower's origin goes on (see Resumed).

    Results after those that HELLO has confirmed follow as ANSWERS, behind the batches that they rest on."""

    epoch: int
    change: int  # that the writer has settled
    mark: int  # everything after this counter is to be sent, again or for the first time
    lost: bool  # what became of its unanswered messages is forgotten: the mark says nothing
    fresh: bool  # a snapshot comes; else the batches from its own position on

    kind = 20
    fixed = struct.Struct("!QQQBB")

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:  # noqa: ARG003  # it is empty here
        """See Message."""
        *numbers, lost, fresh = fields
        if lost > 1 or fresh > 1:
            raise ValueError("neither true nor false")
        return cls._made(*numbers, bool(lost), bool(fresh))


@dataclass(frozen=True, slots=True)
class Batch(_Lines):
    """A durable, proven batch as it was committed, its notes included."""

    first: int  # the number of its first change
    count: int  # of its changes
    lines: Buffer

    kind = 21
    fixed = struct.Struct("!QI")
    most = LARGE


@dataclass(frozen=True, slots=True)
class Snapshot(_Lines):
    """A slice of the graph as redo lines, between which the graph may have gone on."""

    lines: Buffer

    kind = 22
    most = LARGE


@dataclass(frozen=True, slots=True)
class End(Message):
    """The last slice was before this; the whole may be served once the stream has passed this change."""

    change: int

    kind = 23
    fixed = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Answers(_Letters):
    """To forwarded messages from the counter `first` on; the change they rest on was streamed before."""

    first: int
    letters: str

    kind = 24
    fixed = struct.Struct("!Q")
    most = WINDOW


@dataclass(frozen=True, slots=True)
class Checked(Message):
    """A proof was issued after CHECK `number` had come; every change before that was streamed already."""

    number: int

    kind = 25
    fixed = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """All that was taken is settled and streamed: the follower may claim the writer's place."""

    epoch: int  # of the writer

    kind = 26
    fixed = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Elsewhere(Message):
    """Who is asked does not write."""

    highest: int  # epoch that it knows to have served

    kind = 27
    fixed = struct.Struct("!Q")


# --- from a follower to the writer ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forward(_Lines):
    """Complete lines of the data protocol, to be evaluated in order; each has a counter of the origin."""

    first: int
    count: int
    lines: Buffer

    kind = 30
    fixed = struct.Struct("!QI")
    most = LARGE

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:
        """See Message."""
        first, count = fields
        if not count or body.count(b"\n") != count or not body.endswith(b"\n"):
            raise ValueError(f"not {count} complete lines")
        return cls(first, count, body)


@dataclass(frozen=True, slots=True)
class Confirm(Message):
    """Every answer up to this counter has been given out, and will not be asked for again."""

    counter: int

    kind = 31
    fixed = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Check(Message):
    """Reads wait for the proof that they need (F4)."""

    number: int

    kind = 32
    fixed = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Current(Message):
    """Its graph is whole, and has all that was streamed."""

    kind = 33


# --- from an operator's command, and back ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status(Message):
    """How is it?"""

    kind = 50


@dataclass(frozen=True, slots=True)
class State(Message):
    """What a member knows of itself, and of the others if it is the writer: a JSON object."""

    text: str

    kind = 51
    most = 1 << 20

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        return (), self.text.encode()

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:  # noqa: ARG003  # it has none
        """See Message."""
        return cls(body.decode())


@dataclass(frozen=True, slots=True)
class HandOver(Message):
    """Let a follower become the writer."""

    to: str  # its id; zeros: any that is current

    kind = 52
    fixed = struct.Struct("!16s")

    def parts(self) -> tuple[tuple[Any, ...], Buffer]:
        """See Message."""
        return (bytes.fromhex(self.to),), b""

    @classmethod
    def of(cls, fields: tuple[Any, ...], body: bytearray) -> Self:  # noqa: ARG003  # it is empty here
        """See Message."""
        return cls(fields[0].hex())


@dataclass(frozen=True, slots=True)
class Done(Message):
    """The command is under way."""

    kind = 53


# --- either way -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? And the newest durable change that the sender has."""

    number: int
    change: int

    kind = 40
    fixed = struct.Struct("!QQ")


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """To the PING of that number."""

    number: int
    change: int

    kind = 41
    fixed = struct.Struct("!QQ")


KINDS: dict[int, type[Message]] = {
    each.kind: each
    for each in (
        *(Challenge, Proof, Refused, Hello),
        *(Welcome, Batch, Snapshot, End, Answers, Checked, Offer, Elsewhere),
        *(Forward, Confirm, Check, Current, Ping, Pong),
        *(Status, State, HandOver, Done),
    )
}


def encode(message: Message) -> list[Buffer]:
    """The frame, as buffers to be written one after the other; the last may be the message's own body."""
    fields, body = message.parts()
    size = len(body) if isinstance(body, bytes | bytearray) else body.nbytes
    if size > message.most:
        raise FrameError(
            f"{type(message).__name__.upper()}: {size} bytes of body, {message.most} at most"
        )
    head = HEADER.pack(message.kind, message.fixed.size + size) + message.fixed.pack(*fields)
    return [head, body] if size else [head]


class Reader:
    """Puts together the messages of one stream."""

    def __init__(self, limit: int = SMALL) -> None:
        """`limit`: bytes that a frame may have behind its header. May be raised between two messages."""
        self.limit = limit
        self._scratch = bytearray(SCRATCH)
        self._head = bytearray()  # of the frame that is being read: its header and its fields
        self._type: type[Message] | None = None  # known once its header is there
        self._body: bytearray | None = None  # there once its fields are
        self._have = 0  # bytes of the body
        self._straight = False  # whether get_buffer() gave a part of the body itself

    def get_buffer(self, sizehint: int = -1) -> memoryview:  # noqa: ARG002  # the loop's guess is not better
        """Where to receive the next bytes; good until received()."""
        body = self._body
        self._straight = body is not None and len(body) - self._have >= SCRATCH
        if body is not None and self._straight:
            return memoryview(body)[self._have :]
        return memoryview(self._scratch)

    def received(self, size: int) -> Iterator[Message]:
        """The messages that are whole now that so many bytes were received; to be run to its end.

        Raises FrameError at the first that is none, when all before it have been given."""
        if self._straight:
            self._have += size
            if self._body is not None and self._have == len(self._body):
                yield self._finish()
            return
        view = memoryview(self._scratch)[:size]
        while True:
            if self._body is None:
                fields = self._type.fixed.size if self._type else 0
                missing = HEADER.size + fields - len(self._head)
                self._head += view[:missing]
                view = view[missing:]
                if len(self._head) < HEADER.size + fields:
                    return
                if self._type is None:
                    self._type = self._begin()
                    continue
                self._body = bytearray(HEADER.unpack_from(self._head)[1] - fields)
            missing = len(self._body) - self._have
            part = view[:missing]
            self._body[self._have : self._have + len(part)] = part
            self._have += len(part)
            view = view[missing:]
            if self._have < len(self._body):
                return
            yield self._finish()

    def _begin(self) -> type[Message]:
        kind, size = HEADER.unpack(self._head)
        found = KINDS.get(kind)
        if found is None:
            raise FrameError(f"no message of the cluster protocol: kind {kind}")
        name, least = found.__name__.upper(), found.fixed.size
        if not least <= size <= least + found.most:
            raise FrameError(f"{name}: {size} bytes, not {least} to {least + found.most}")
        if size > self.limit:
            raise FrameError(f"{name}: {size} bytes, {self.limit} at most here")
        return found

    def _finish(self) -> Message:
        found, head, body = self._type, self._head, self._body
        assert found is not None
        assert body is not None
        self._head, self._type, self._body, self._have = bytearray(), None, None, 0
        try:
            return found.of(found.fixed.unpack_from(head, HEADER.size), body)
        except ValueError as error:
            raise FrameError(f"{found.__name__.upper()}: {error}") from None
