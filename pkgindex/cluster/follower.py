"""The follower's side of a stream: durable changes come in and are shown, this server's messages go out.

Terms. The *graph* is what clients are shown. A follower that cannot go on from its own takes a snapshot:
it then shows none, and has every message answered by the writer, until the stream has passed the change
that makes the snapshot good (F1).

Guarantee: an answer of the writer is given out once the changes it rests on are in the graph (F3), since
both come in one order.
"""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from pkgindex import log
from pkgindex._core import Graph
from pkgindex.cluster import frames
from pkgindex.cluster.feed import Backlog
from pkgindex.cluster.pending import CONFIRM_EVERY, Chunk, Pending
from pkgindex.cluster.stream import Stream

__all__ = ["Follower"]

logger = log.get_logger()

FORWARD_BYTES = 1 << 20  # of one FORWARD, or one chunk if that is more


class Ears(Protocol):
    """What a follower's owner is told."""

    def welcomed(self, follower: "Follower", welcome: frames.Welcome) -> bool:
        """The writer takes this server in; whether it is still the one to follow."""

    def resumed(self, follower: "Follower", lost: list[int]) -> None:
        """All that is unanswered is in the writer's hands, but for the `lost` tickets: nobody knows."""

    def applied(self, follower: "Follower") -> bool:
        """`change` has grown; whether the graph is good."""

    def snapshot_ended(self, follower: "Follower", change: int) -> bool:
        """The graph is good from this change on; whether it is."""

    def good(self, graph: Graph) -> None:
        """This graph may be shown from now on."""

    def answered(self) -> None:
        """There are answers to be given out."""

    def checked(self, reads: Iterable[Chunk]) -> None:
        """The writer has proved itself for these reads."""

    def offered(self, follower: "Follower", epoch: int) -> None:
        """The writer offers its place."""

    def elsewhere(self, highest: int) -> None:
        """The one that was asked does not write."""


class Follower:
    """One stream from the writer."""

    def __init__(
        self,
        stream: Stream,
        member: str,
        graph: Graph | None,
        change: int,
        backlog: Backlog,
        pending: Pending,
        ears: Ears,
    ) -> None:
        """`graph` at `change`, or None; `backlog` gets what comes, for when this server writes itself."""
        self.stream = stream
        self.member = member  # the writer
        self.epoch = 0  # its
        self.is_live = False  # welcomed
        self.change = change
        self.settled = change  # the writer's newest, as far as known
        self._graph = graph
        self.is_good = graph is not None
        self._backlog = backlog
        self._pending = pending
        self._ears = ears
        self._confirmed = pending.answered
        self._check = 0
        self._checks: deque[tuple[int, list[Chunk]]] = deque()  # asked for, with their reads
        stream.heard = self._heard

    # --- what the writer says ---------------------------------------------------------------------

    def _heard(self, message: frames.Message) -> None:
        try:
            self._take(message)
        except ValueError as error:
            logger.error("writer not understood", server=self.stream.peer, reason=str(error))
            self.stream.close(str(error))
            self.stream.ended()

    def _take(self, message: frames.Message) -> None:
        match message:
            case frames.Batch() if self.is_live:
                self._batch(message)
            case frames.Answers() if self.is_live:
                self._pending.answer(message.first, message.letters)
                self._ears.answered()
                self.confirm(CONFIRM_EVERY)
            case frames.Checked() if self.is_live:
                self._checked(message.number)
            case frames.Ping():
                self.settled = max(self.settled, message.change)
                self.confirm(1)
                self.stream.send(frames.Pong(message.number, self.change if self.is_good else 0))
            case frames.Snapshot() if self.is_live and self._graph is not None:
                self._graph.replay(message.lines, track=False)
            case frames.End() if self.is_live:
                if self._ears.snapshot_ended(self, message.change):
                    self._good()
            case frames.Offer():
                self._ears.offered(self, message.epoch)
            case frames.Elsewhere():
                self._ears.elsewhere(message.highest)
            case frames.Welcome():
                self._welcome(message)
            case _:
                raise ValueError(f"{type(message).__name__.upper()} out of turn")

    def _welcome(self, welcome: frames.Welcome) -> None:
        self.epoch = welcome.epoch
        if not self._ears.welcomed(self, welcome):
            return
        self.is_live = True
        self.settled = welcome.change
        if welcome.fresh:
            self.is_good = False
            self._graph = Graph(journalled=True)
            self.change = welcome.change
        lost = self._pending.forsake() if welcome.lost else []
        self.stream.send(*self._pending.forwards(welcome.mark))
        self._ask(list(self._pending.reads()))
        self._ears.resumed(self, lost)
        if not welcome.fresh:
            self.stream.send(frames.Current())

    def _batch(self, batch: frames.Batch) -> None:
        if batch.first > self.change + 1:
            raise ValueError(f"a batch from {batch.first} on, though {self.change + 1} is the next")
        last = batch.first + batch.count - 1
        if last <= self.change and self.is_good:
            return
        assert self._graph is not None
        self._graph.replay(batch.lines, track=False, notes=[])
        lines = batch.lines
        self._backlog.add(
            batch.first, batch.count, lines if isinstance(lines, bytes) else bytes(lines)
        )
        self.change = max(self.change, last)
        self.settled = max(self.settled, self.change)
        if self._ears.applied(self) and not self.is_good:
            self._good()

    def _good(self) -> None:
        assert self._graph is not None
        self.is_good = True
        self._ears.good(self._graph)
        self.stream.send(frames.Current())
        logger.info("snapshot taken", packages=len(self._graph), change=self.change)

    # --- what it is told --------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand over all fresh messages."""
        if not self.is_live:
            return
        pending = self._pending
        gathered: list[bytes] = []
        first = count = size = 0
        reads: list[Chunk] = []
        said: list[frames.Message] = []
        while pending.fresh:
            chunk = pending.handed()
            if not chunk.first:
                reads.append(chunk)
                continue
            if gathered and size + len(chunk.lines) > FORWARD_BYTES:
                said.append(frames.Forward(first, count, b"".join(gathered)))
                gathered, count, size = [], 0, 0
            if not gathered:
                first = chunk.first
            gathered.append(chunk.lines)
            count += chunk.count
            size += len(chunk.lines)
        if gathered:
            said.append(frames.Forward(first, count, b"".join(gathered)))
        self.stream.send(*said)
        self._ask(reads)

    def _ask(self, reads: list[Chunk]) -> None:
        """Let the writer prove itself for these reads."""
        if reads:
            self._check += 1
            self._checks.append((self._check, reads))
            self.stream.send(frames.Check(self._check))

    def _checked(self, number: int) -> None:
        while self._checks and self._checks[0][0] <= number:
            self._ears.checked(self._checks.popleft()[1])

    def confirm(self, least: int) -> None:
        """Tell the writer which results need not be kept, if they are so many."""
        if self.is_live and self._pending.answered - self._confirmed >= least:
            self._confirmed = self._pending.answered
            self.stream.send(frames.Confirm(self._confirmed))
