"""The index while this server writes it: a FileIndex that runs each origin's messages once (rule F2).

Every change runs on behalf of an origin: a follower, whose messages come in FORWARDs, or this server's own
clients. What became of them is noted in the batch that holds their changes, so that both are durable
together, and told to `durable` once they are.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pkgindex import log
from pkgindex._core import Batch, Graph
from pkgindex.errors import StoreFailed
from pkgindex.index.base import Answers
from pkgindex.index.file import FileIndex
from pkgindex.store.origins import Origins, Recorded, Resumed, letters_of

__all__ = ["Durable", "Run", "Writer", "replies_in"]

logger = log.get_logger()

ROOM = 1 << 30  # of a run: its origin bounds what is unanswered


def replies_in(answers: Answers) -> bytes:
    """All replies of an answer, whatever each piece of it rests on."""
    return answers if isinstance(answers, bytes) else b"".join(piece[1] for piece in answers)


@dataclass(slots=True)
class Run:
    """Complete lines of an origin that are to be evaluated."""

    origin: str
    first: int  # counter of the first that is not evaluated yet
    lines: bytearray
    start: int = 0
    told: Callable[[bytes, int], None] | None = None  # replies, and the ticket that they rest on
    ended: Callable[[], None] | None = None  # all of it is evaluated


@dataclass(frozen=True, slots=True)
class Durable:
    """A commit that is durable and proven."""

    ticket: int
    first: int  # number of its first change
    count: int
    lines: bytes
    results: list[Recorded]


class Writer(FileIndex):
    """One reign of this server."""

    durable: Callable[[Durable], None]

    def prepare(self, max_line: int, batches: list[tuple[int, int, bytes]]) -> None:
        """Take up the table of origins that was recovered. `batches`: those that were replayed last."""
        self.batches = batches
        recorded = self._journal.origins
        self.evaluated = Origins(recorded.entries(), recorded.forgotten)
        self.given: dict[str, int] = {each.origin: each.mark for each in recorded.entries()}
        self.holds = False  # no change is taken
        self.runs: deque[Run] = deque()
        self._running = False
        self._batch = Batch(max_line)
        self._open: dict[str, tuple[int, list[bytes]]] = {}
        self._results: list[Recorded] = []
        self._notes: list[Recorded] = []

    @property
    def graph(self) -> Graph:
        """The index, with what is not durable yet."""
        return self._graph

    @property
    def change(self) -> int:
        """The number of the newest change, durable or not."""
        return self._graph.changes

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits for a commit."""
        return not (self._committing or self._graph.asked)

    def hurry(self) -> None:
        """Bring package files up to date soon: whoever takes over has less to read."""
        self._behind.hurry()

    # --- messages ---------------------------------------------------------------------------------

    def ran(self, origin: str, first: int, replies: bytes) -> None:
        """These replies were evaluated; they belong to the open commit."""
        if origin in self._open:
            self._open[origin][1].append(replies)
        else:
            self._open[origin] = first, [replies]

    def rest(self) -> int:
        """The open commit's ticket. Reads too rest on it: its proof says that this still writes (F4)."""
        return self._graph.ticket if self._graph.asked else self._graph.ask()

    def run(self, run: Run) -> None:
        """Evaluate messages, in the order of these calls, now or as soon as changes are taken."""
        self.runs.append(run)
        self.go_on()

    def go_on(self) -> None:
        """Evaluate what waits."""
        if not self._running and self.runs and self._loop:
            self._running = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._running = False
        batch, graph = self._batch, self._graph
        while self.runs and not (self.holds or self.congested or graph.full or self._commit_failed):
            run = self.runs[0]
            batch.load(run.lines, run.start, len(run.lines), ROOM)
            replies = replies_in(graph.apply(batch, True))
            if replies:
                ticket = self.rest()
                self.ran(run.origin, run.first, replies)
                run.first += replies.count(b"\n")
                if run.told:
                    run.told(replies, ticket)
            run.start = batch.start
            if run.start < len(run.lines):
                self.go_on()  # it had enough work for one turn of the loop
                return
            self.runs.popleft()
            if run.ended:
                run.ended()

    def resume(self, origin: str, confirmed: int, seen: int) -> Resumed | None:
        """Where an origin goes on that comes (again), and what it is known to have got; see Origins."""
        self._fold(origin)
        resumed = self.evaluated.resume(origin, confirmed, seen)
        if resumed is not None:
            self._journal.origins.confirm(origin, confirmed)
        return resumed

    def confirm(self, origin: str, counter: int) -> None:
        """The origin will not ask again for results up to this one."""
        self.evaluated.confirm(origin, counter)
        self._journal.origins.confirm(origin, counter)

    def forget(self, now: float, connected: set[str]) -> None:
        """Drop the origins that have been away for long; see Origins."""
        for table in (self.evaluated, self._journal.origins):
            table.forget(now, connected, self._graph.changes)

    def forsake(self, origin: str) -> None:
        """Its connection has ended: what waits of it will come again."""
        self.runs = deque(run for run in self.runs if run.origin != origin)

    # --- commits ----------------------------------------------------------------------------------

    def _seal(self) -> None:
        for origin in tuple(self._open):
            self._fold(origin)
        if self._graph.redo_bytes:
            self._notes = self.evaluated.beyond(self._journal.origins)
            self._graph.note(b"".join(note.line() for note in self._notes))
        super()._seal()

    def _fold(self, origin: str) -> None:
        """Record what the open commit has of an origin."""
        if origin in self._open:
            first, replies = self._open.pop(origin)
            recorded = Recorded(origin, first, letters_of(b"".join(replies)))
            self.evaluated.record(*recorded)
            self._results.append(recorded)

    def _made_durable(self, ticket: int) -> None:
        # Before anything can count as written: a segment may go then, and with it these notes.
        self._journal.origins.record_all(self._notes)
        self._notes = []
        results, self._results = self._results, []
        for each in results:
            self.given[each.origin] = each.mark
        lines, count, first = self._sealed
        self.durable(Durable(ticket, first, count, bytes(lines), results))

    def _commit(self, before: int = 0, until: float | None = None) -> None:
        self._or_end(super()._commit, before, until)

    def _committed(self) -> None:
        self._or_end(super()._committed)
        self.go_on()

    def _uncongest(self) -> None:
        super()._uncongest()
        self.go_on()

    def _or_end(self, step: Callable[..., None], *args: float | None) -> None:
        """What goes wrong in between a commit and its answers must not leave them waiting for ever."""
        try:
            step(*args)
        except Exception as error:
            logger.exception("commit failed by a mistake of pkgindex")
            self._commit_failed = True
            if self._quiet:
                self._quiet.set()
            self._behind.stop(0.0)
            self._tell_failed(
                StoreFailed(
                    f"{self._mount.root}: a commit was not told ({error!r}), by a mistake of pkgindex: "
                    "report it, with the log; what was acknowledged is safe, start again"
                )
            )

    # --- the end ----------------------------------------------------------------------------------

    def abandon(self, released: Callable[[], None]) -> None:
        """See FileIndex."""
        self.runs.clear()
        super().abandon(released)
