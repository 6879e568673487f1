"""The index of a server among others: a Graph to answer reads from, and everything else by one writer.

Data flow. What a graph may answer by itself, it answers in one call, as without a cluster. Of every other
batch the rest comes to _take(): on the writer it is evaluated here and now, else it goes, in the order of
all clients' messages, to the writer's stream; either way its answers wait in Pending for being durable. A
connection that waits for anything has all its messages go that way, so it sees its own changes and never
an older state than before; and a change waits for the strong reads before it, which would see it if they
were evaluated again.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Self

from pkgindex import log
from pkgindex._core import Batch, Graph
from pkgindex.cluster.feed import Feed
from pkgindex.cluster.follower import Follower
from pkgindex.cluster.members import FOLDER
from pkgindex.cluster.node import Node
from pkgindex.cluster.pending import Chunk, Pending
from pkgindex.cluster.port import Port
from pkgindex.cluster.trust import secret_of
from pkgindex.cluster.writer import Durable, Run, Writer, replies_in
from pkgindex.config import Settings
from pkgindex.errors import ConfigError, PkgindexError
from pkgindex.index.base import Answers, Index, Piece, Progress
from pkgindex.index.file import Deposed, path_of
from pkgindex.store import format as store_format
from pkgindex.store.mount import Mount, reached
from pkgindex.store.origins import replies_of

__all__ = ["ClusterIndex"]

# A commit, which is one frame, may hold this beyond REDO_LIMIT, and as much again that the line takes away.
LONGEST_LINE = 32 << 20

logger = log.get_logger()


class ClusterIndex(Index):
    """See Index; `clients` is told of more than other indexes have to tell."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._strong = settings.reads == "strong"
        self.pending = Pending()
        self._graph: Graph | None = None
        self._writer: Writer | None = None
        self._feed: Feed | None = None
        self._follower: Follower | None = None
        self._batch = Batch(settings.max_line)
        self._flushing = False
        self._runs = 0  # chunks that the writer here has not evaluated to their end
        self._open = asyncio.Event()
        self._proven_reads: list[Chunk] = []  # that wait for a graph
        self.apply = self._take_all  # type: ignore[method-assign]

    # --- opening ----------------------------------------------------------------------------------

    @classmethod
    def open(cls, location: str, settings: Settings, progress: Progress | None = None) -> Self:  # noqa: ARG003
        """Make sure that the store is there, and bind the cluster port. See Index."""
        if settings.takeover:
            raise ConfigError(
                "takeover: servers of a cluster replace each other by themselves; leave it out"
            )
        if settings.max_line > LONGEST_LINE:
            raise ConfigError(
                f"max-line: at most {LONGEST_LINE >> 20}m in a cluster, whose servers hand messages on whole"
            )
        mount = Mount(path_of(location))
        with reached(mount.root):
            fmt = store_format.opened(mount, insist=settings.create, also=(FOLDER,))
        data = tuple(each.address for each in settings.listen) or ("127.0.0.1:8080",)
        port = Port(settings.cluster, secret_of(mount), fmt.id)
        try:
            return cls(Node(mount, fmt, port, settings, data), settings)
        except BaseException:
            port.close()
            raise

    # --- serving ----------------------------------------------------------------------------------

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None],
        failed: Callable[[PkgindexError], None],
    ) -> None:
        """See Index."""
        self._loop = loop
        self._tell_settled = settled
        self._tell_failed = failed
        self._starting = loop.create_task(self._node.start(self))

    async def ready(self) -> None:
        """See Index."""
        await self._starting
        await self._open.wait()

    def apply(self, batch: Batch) -> Answers:
        """See Index."""
        return self._take_all(batch)

    def _take_all(self, batch: Batch) -> Answers:
        return self._take(batch, b"")

    def _take(self, batch: Batch, front: bytes) -> Answers:
        """Take what a graph must not answer by itself; `front` has the replies to what came before."""
        before: list[Piece] = [(0, front, 0)] if front else []
        pending, writer, start = self.pending, self._writer, batch.start
        room = pending.room
        if room <= 0:
            self.congested = True
            return before
        # Without a graph a read waits for the writer's answer like any message: the graph to come may have
        # what its client sends behind it.
        if batch.waits and pending.reads_wait(batch.waits) and not _is_read(batch):
            return before
        may_read = self._strong and self._graph is not None and not batch.waits
        is_read = batch.read_only or (may_read and _is_read(batch))
        replies = b""
        if (
            writer is None
            or self._graph is None
            or writer.holds
            or pending.fresh
            or self._runs
            or (batch.stop - start > room and batch.buffer.count(b"\n", start, batch.stop) > room)
        ):
            count = batch.take(room)
        else:
            replies = replies_in(self._graph.apply(batch, True))
            count = replies.count(b"\n")
        if not count:
            return before
        lines = bytes(memoryview(batch.buffer)[start : batch.start])
        chunk = pending.add(lines, count, reads=is_read)
        if replies and writer is not None:
            pending.handed()
            if chunk.first:
                writer.ran(self._node.id, chunk.first, replies)
            chunk.answer, chunk.rests = replies, writer.rest()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        before.append((chunk.ticket, chunk.box, batch.changes))
        return before

    def _flush(self) -> None:
        """Hand over what is fresh, to whoever writes."""
        self._flushing = False
        if self._writer is not None:
            self._run_fresh(self._writer)
        elif self._follower is not None:
            self._follower.flush()

    def _run_fresh(self, writer: Writer) -> None:
        while self.pending.fresh:
            self._run(self.pending.handed(), writer)

    def _run(self, chunk: Chunk, writer: Writer) -> None:
        """Have the writer evaluate a chunk, or what another has not answered of it."""
        if not chunk.first:
            chunk.answer, chunk.rests = self._read(chunk.lines, writer.graph), writer.rest()
            return
        done = len(chunk.letters)
        parts: list[bytes] = []

        def told(replies: bytes, ticket: int) -> None:
            parts.append(replies)
            if sum(part.count(b"\n") for part in parts) + done == chunk.count:
                chunk.answer = replies_of(chunk.letters) + b"".join(parts)
                chunk.rests = ticket
                self._runs -= 1

        self._runs += 1
        writer.run(Run(self._node.id, chunk.first + done, bytearray(chunk.after(done)), told=told))

    def _read(self, lines: bytes, graph: Graph) -> bytes:
        """The replies to messages that change nothing."""
        batch = self._batch
        batch.load(bytearray(lines), 0, len(lines), 0, True)
        return replies_in(graph.apply(batch, True))

    # --- what becomes of answers ------------------------------------------------------------------

    def gives_out(self) -> None:
        """Pending has answers that may be given out."""
        if self.pending.give_out():
            self._settle()

    def _settle(self) -> None:
        self.settled = self.pending.settled
        self._steer()
        self._tell_settled()

    def _steer(self) -> None:
        writer = self._writer
        self.congested = self.pending.room <= 0 or (writer is not None and writer.congested)

    def goes_on(self) -> None:
        """See Parts."""
        self._flush()

    def checked(self, reads: Iterable[Chunk]) -> None:
        """See Ears: these may be evaluated, as soon as there is a graph."""
        self._proven_reads += reads
        self._answer_reads()

    def _answer_reads(self) -> None:
        if self._graph is None or not self._proven_reads:
            return
        due, self._proven_reads = self._proven_reads, []
        replies = self._read(b"".join([chunk.lines for chunk in due]), self._graph)
        each = replies.splitlines(keepends=True)
        at = 0
        for chunk in due:
            chunk.box += each[at] if chunk.count == 1 else b"".join(each[at : at + chunk.count])
            chunk.is_done = True
            at += chunk.count
        self.gives_out()

    def _durable(self, commit: Durable) -> None:
        """The writer here has made a commit durable: the followers hear of it first."""
        if self._feed is not None:
            self._feed.durable(commit)
        pending = self.pending
        before = pending.answered
        if pending.settle(commit.ticket):
            self.settled = pending.settled
        if self._writer is not None:
            if pending.answered != before:
                self._writer.confirm(self._node.id, pending.answered)
            if commit.count:
                self._node.settled(commit.first + commit.count - 1)

    def _writer_settled(self) -> None:
        """The writer has let its own answers go, or changes may go on."""
        self._steer()
        self._tell_settled()

    # --- roles (node.Parts) -----------------------------------------------------------------------

    def shows(self, graph: Graph | None) -> None:
        """See Parts."""
        if self._graph is not None:
            self._graph.defer = None
        self._graph = graph
        if graph is None:
            self.apply = self._take_all  # type: ignore[method-assign]
        else:
            graph.defer = self._take
            graph.defers_all = self._strong
            self.apply = graph.apply  # type: ignore[method-assign]
        self.clients.applies(self.apply)
        self._answer_reads()

    def follows(self, follower: Follower | None) -> None:
        """See Parts."""
        self._follower = follower
        self._proven_reads = []
        self._flush()

    def writes(self, writer: Writer, feed: Feed) -> None:
        """See Parts: first what is unanswered, in its order, then the rest."""
        self._writer, self._feed = writer, feed
        pending = self.pending
        pending.retract()
        writer.durable = self._durable
        writer.start(self._loop, self._writer_settled, self._node.writer_failed)
        self.shows(writer.graph)
        resumed = writer.resume(self._node.id, pending.answered, self._node.machine.shown.change)
        if resumed is None:
            self.forsakes(pending.forsake())
        else:
            first = resumed.mark - len(resumed.letters) + 1
            pending.answer(first, resumed.letters)
        writer.confirm(self._node.id, pending.answered)
        for chunk in tuple(pending.sent):
            if not chunk.is_done:
                self._run(chunk, writer)
        self._run_fresh(writer)
        self.gives_out()
        self._steer()

    def steps_down(self) -> None:
        """See Parts."""
        self._writer = self._feed = None
        self._runs = 0
        self.pending.retract()
        self._steer()

    def forsakes(self, tickets: list[int]) -> None:
        """Nobody knows what became of these: their clients are not to take silence for an answer."""
        if tickets:
            logger.error("unanswered clients closed", messages=len(tickets))
            self.clients.forsake(tickets[0], tickets[-1])
            self.gives_out()

    def admits(self, clients: bool) -> None:
        """See Parts."""
        self.clients.admit(clients)
        if clients:
            self._open.set()

    def fails(self, error: PkgindexError | None) -> None:
        """See Parts."""
        if error is not None:
            self._tell_failed(error)
            self._open.set()

    # --- the end ----------------------------------------------------------------------------------

    async def stop(self, timeout: float) -> dict[str, object]:
        """See Index: a writer hands over to a follower, if there is one."""
        began, packages = self._loop.time(), len(self)
        self._node.stop()
        await self._node.left(timeout / 2)
        await self._node.close()
        if self._writer is not None:
            left = max(0.1, timeout - (self._loop.time() - began))
            with suppress(Deposed):  # whoever took over has its journal, and writes what is left
                return await self._writer.stop(left)
        return {"packages": packages, "role": "follower"}

    def stats(self) -> dict[str, object]:
        """See Index."""
        mine = {"unanswered": self.pending.messages, "cluster": self._node.state()}
        if self._writer is not None:
            return self._writer.stats() | mine
        return (self._graph.stats() if self._graph is not None else {}) | mine

    def __len__(self) -> int:
        return len(self._graph) if self._graph is not None else 0

    @property
    def beyond_limit(self) -> int:
        """See Index."""
        return self._writer.beyond_limit if self._writer is not None else 0


def _is_read(batch: Batch) -> bool:
    """Whether all that is left of a batch changes nothing, whoever sent it."""
    buffer, start, stop = batch.buffer, batch.start, batch.stop
    return not (
        buffer.startswith((b"INDEX|", b"REMOVE|"), start, stop)
        or buffer.find(b"\nINDEX|", start, stop) >= 0
        or buffer.find(b"\nREMOVE|", start, stop) >= 0
    )
