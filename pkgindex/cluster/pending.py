"""The messages of this server's own clients that are not answered yet, in one order: its origin's stream.

Terms. A *chunk* is what one connection sent in one read and could not be answered at once. Its messages
are *counted*: each has a number of this origin, by which the writer, whoever it is and however often it
changes, runs it once (rule F2). A chunk of *reads* is not counted: it changes nothing, so it is simply
evaluated here, once the writer has proved itself (F4), and again by the next if that one could not.

    add() --> fresh --handed()--> sent --answered(), evaluated(), read()--> done, in order --> `settled`

The answers are given out strictly in the order of the chunks, so tickets grow as Index wants them.
"""

from collections import deque
from collections.abc import Iterator

from pkgindex.cluster.frames import Forward
from pkgindex.store.origins import WINDOW, replies_of

__all__ = ["Chunk", "Pending"]

# Unanswered messages and their bytes, past which clients' messages are left in their sockets. The origin's
# window is twice as large: what was answered may be unconfirmed for a while.
MOST_MESSAGES = WINDOW // 2
MOST_BYTES = 32 << 20

CONFIRM_EVERY = WINDOW // 8

REPLIES = {"O": b"OK\n", "F": b"FAIL\n", "E": b"ERROR\n"}


class Chunk:
    """Messages of one connection that wait together."""

    __slots__ = (
        "answer",
        "box",
        "count",
        "first",
        "is_done",
        "letters",
        "lines",
        "rests",
        "ticket",
    )

    def __init__(self, ticket: int, first: int, count: int, lines: bytes) -> None:
        self.ticket = ticket  # of ClusterIndex
        self.first = first  # counter of its first message; 0: these are reads
        self.count = count
        self.lines = lines
        self.box = bytearray()  # where the connection will find the replies
        self.letters = ""  # of the messages that another writer has answered so far
        self.answer = b""  # replies that this server has evaluated as the writer,
        self.rests = 0  # and the commit that they wait for
        self.is_done = False

    @property
    def last(self) -> int:
        """Counter of its last message."""
        return self.first + self.count - 1

    def after(self, messages: int) -> bytes:
        """Its lines without so many of the first."""
        return self.lines.split(b"\n", messages)[-1]


class Pending:
    """Of one server, for all its life."""

    def __init__(self) -> None:
        self.fresh: deque[Chunk] = deque()  # in nobody's hands yet
        self.sent: deque[Chunk] = deque()  # with a writer, or evaluated by this one
        self.counter = 0  # of the last message counted
        self.answered = 0  # of the last one whose answer is known for good
        self.settled = 0  # ticket
        self.messages = self.bytes = 0
        self._ticket = 0
        self._unanswered: deque[Chunk] = deque()  # those of `sent` that are counted
        self._reads: deque[Chunk] = deque()  # in order; a done one stays until the next comes

    @property
    def room(self) -> int:
        """How many more messages may wait; none: clients have to."""
        return MOST_MESSAGES - self.messages if self.bytes < MOST_BYTES else 0

    def add(self, lines: bytes, count: int, *, reads: bool = False) -> Chunk:
        """Take a chunk in; it is `fresh`."""
        self._ticket += 1
        chunk = Chunk(self._ticket, 0 if reads else self.counter + 1, count, lines)
        if not reads:
            self.counter += count
        else:
            self._drop_done_reads()
            self._reads.append(chunk)
        self.messages += count
        self.bytes += len(lines)
        self.fresh.append(chunk)
        return chunk

    def handed(self) -> Chunk:
        """Hand the first fresh chunk over."""
        chunk = self.fresh.popleft()
        self.sent.append(chunk)
        if chunk.first:
            self._unanswered.append(chunk)
        return chunk

    # --- as a follower ----------------------------------------------------------------------------

    def forwards(self, mark: int) -> Iterator[Forward]:
        """What another writer, which has results up to `mark`, is to be sent (again) of what was sent."""
        for chunk in self._unanswered:
            if chunk.last > mark:
                skipped = max(0, mark + 1 - chunk.first)
                yield Forward(chunk.first + skipped, chunk.count - skipped, chunk.after(skipped))

    def answer(self, first: int, letters: str) -> None:
        """The writer has answered messages from the counter `first` on. What is known is passed over.

        Raises ValueError if answers are left out, or to messages never sent."""
        known = max(0, self.answered + 1 - first)
        if known >= len(letters):
            return
        if first > self.answered + 1:
            raise ValueError(
                f"answers from {first} on, though {self.answered + 1} is to be answered next"
            )
        at = known
        while at < len(letters):
            if not self._unanswered:
                raise ValueError("answers to messages that were never sent")
            chunk = self._unanswered[0]
            part = letters[at : at + chunk.count - len(chunk.letters)]
            at += len(part)
            self.answered += len(part)
            if chunk.count == 1:
                chunk.box += REPLIES[part]
            else:
                chunk.letters += part
                if len(chunk.letters) < chunk.count:
                    break
                chunk.box += replies_of(chunk.letters)
            chunk.is_done = True
            self._unanswered.popleft()

    def reads_wait(self, ticket: int) -> bool:
        """Whether reads of this ticket or before are not answered yet."""
        self._drop_done_reads()
        return bool(self._reads) and self._reads[0].ticket <= ticket

    def _drop_done_reads(self) -> None:
        while self._reads and self._reads[0].is_done:
            self._reads.popleft()

    def reads(self) -> Iterator[Chunk]:
        """The reads that were handed over and are not done."""
        return (chunk for chunk in self.sent if not chunk.first and not chunk.is_done)

    def forsake(self) -> list[int]:
        """Nobody will ever know what became of what was sent: the tickets of those that must not wait on."""
        gone = list(self._unanswered)
        for chunk in gone:
            chunk.is_done = True
            self.answered = chunk.last
        self._unanswered.clear()
        return [chunk.ticket for chunk in gone]

    # --- as the writer ----------------------------------------------------------------------------

    def settle(self, ticket: int) -> bool:
        """The writer's commit `ticket` is durable and proven: whether anything was answered by that."""
        sent = self.sent
        before = self.settled
        while sent and (sent[0].is_done or (sent[0].rests and sent[0].rests <= ticket)):
            chunk = sent.popleft()
            if not chunk.is_done:
                chunk.box += chunk.answer
                if chunk.first:
                    self._unanswered.popleft()
                    self.answered = chunk.last
            self._done(chunk)
        return self.settled != before

    def retract(self) -> None:
        """What this server has evaluated as the writer will never be durable."""
        for chunk in self.sent:
            chunk.answer, chunk.rests = b"", 0

    # --- either way -------------------------------------------------------------------------------

    def give_out(self) -> bool:
        """Let `settled` go on over all that is done; whether it did."""
        return self.settle(0)

    def _done(self, chunk: Chunk) -> None:
        chunk.is_done = True
        self.settled = chunk.ticket
        self.messages -= chunk.count
        self.bytes -= len(chunk.lines)
