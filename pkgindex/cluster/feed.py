"""The writer's side of its followers' streams: what is durable goes out, what they forward comes in.

Guarantee: on a stream, an answer comes behind every change that it rests on (F3); a CHECKED comes behind
every change that was acknowledged before its CHECK came (F4), and before those that were made after it. And
nothing comes that is not durable, but for snapshots: their last END says from which change on they are good.

What a follower costs is bounded: it continues from the backlog of batches, which all share, or takes a
snapshot, of which a slice is copied only when it has read the one before; and one whose unread bytes have
come to MOST_UNREAD is cut off, and may come again.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from pkgindex import log
from pkgindex.cluster import frames
from pkgindex.cluster.stream import Stream
from pkgindex.cluster.writer import Durable, Run, Writer

__all__ = ["Backlog", "Feed"]

BACKLOG_BYTES = 64 << 20
MOST_UNREAD = 64 << 20
MOST_UNRUN = 64 << 20  # bytes that a follower has forwarded and that are not evaluated yet

# A slice of a snapshot: copied in a third of a millisecond, so that no client minds.
SLICE_BYTES, SLICE_PACKAGES = 32 * 1024, 256

LATE_SECONDS = 0.25  # a PONG is not awaited, but missed

FORGET_EVERY = 60.0  # seconds between two looks for origins that have been away too long

logger = log.get_logger()


class Backlog:
    """The newest durable batches, for a follower that comes again. A new writer begins with what it has
    itself followed and replayed: two batches may overlap, none is left out."""

    def __init__(self, batches: Iterable[tuple[int, int, bytes]] = ()) -> None:
        """`batches`: (first change, number of them, redo lines), ascending."""
        self._batches: deque[tuple[int, int, bytes]] = deque()
        self._bytes = 0
        for batch in batches:
            self.add(*batch)

    def add(self, first: int, count: int, lines: bytes) -> None:
        """The next batch. One that is not next to those before it takes their place."""
        if self._batches and first > self._batches[-1][0] + self._batches[-1][1]:
            self._batches.clear()
            self._bytes = 0
        self._batches.append((first, count, lines))
        self._bytes += len(lines)
        while self._bytes > BACKLOG_BYTES and len(self._batches) > 1:
            self._bytes -= len(self._batches.popleft()[2])

    def after(self, change: int, settled: int) -> list[tuple[int, int, bytes]] | None:
        """The batches that lead from `change` to `settled`; None if some are not kept any more."""
        if change == settled:
            return []
        if change > settled or not self._batches or change + 1 < self._batches[0][0]:
            return None
        return [batch for batch in self._batches if batch[0] + batch[1] - 1 > change]

    @property
    def bytes(self) -> int:
        """Bytes of redo lines that are kept."""
        return self._bytes


class _Following:
    """A follower."""

    def __init__(self, stream: Stream, member: str) -> None:
        self.stream = stream
        self.member = member
        self.next: int | None = None  # counter that its next FORWARD begins with; None: any
        self.is_current = False
        self.change = 0  # that it said it had
        self.walk: int | None = None  # where its snapshot has come to
        self.unrun = 0  # bytes
        self.checks: list[tuple[int, int]] = []  # (number, ticket that it rests on)
        # A PING comes behind all changes before it, so its way there and back is a bound of the lag.
        self.asked: tuple[int, float, int] | None = (
            None  # the oldest without a PONG: number, when, change
        )
        self.lag_seconds = 0.0
        self.lag_changes = 0


class Feed:
    """Of one reign."""

    def __init__(
        self,
        writer: Writer,
        me: str,
        epoch: int,
        backlog: Backlog,
        current: Callable[[str, bool], None],
    ) -> None:
        """`me`: the origin of this server's own clients. `current` is told when a follower has caught up,
        or is gone."""
        self._writer = writer
        self._me = me
        self._epoch = epoch
        self._backlog = backlog
        self._current = current
        self._followers: dict[str, _Following] = {}
        self._loop = asyncio.get_running_loop()
        self.settled = writer.change
        self._forget_at = self._loop.time() + FORGET_EVERY
        self._began = self._loop.time()
        self._changed_at: float | None = None  # when a change became durable in this reign
        self._beats = 0

    # --- a follower comes and goes ----------------------------------------------------------------

    def hello(self, stream: Stream, hello: frames.Hello) -> None:
        """A follower asks for the stream."""
        old = self._followers.get(hello.member)
        if old is not None:
            old.stream.close("another connection of this server has taken its place")
            self._gone(old)
        following = _Following(stream, hello.member)
        resumed = self._writer.resume(hello.member, hello.confirmed, hello.seen)
        if resumed is not None:
            following.next = resumed.mark + 1
        batches = self._backlog.after(hello.change, self.settled) if hello.epoch else None
        mark = resumed.mark if resumed else 0
        fresh = batches is None
        stream.send(frames.Welcome(self._epoch, self.settled, mark, resumed is None, fresh))
        for first, count, lines in batches or ():
            stream.send(frames.Batch(first, count, lines))
        following.change = hello.change if not fresh else 0
        following.lag_changes = self.settled - following.change
        if resumed is not None:
            # What is evaluated but not settled yet is told when it is.
            known = self._writer.given.get(hello.member, 0) - (mark - len(resumed.letters))
            if known > 0:
                first = mark - len(resumed.letters) + 1
                stream.send(frames.Answers(first, resumed.letters[:known]))
        self._followers[hello.member] = following
        stream.heard = lambda message: self._heard(following, message)
        stream.ended = lambda: self._gone(following)
        stream.writable = lambda: self._slices(following)
        logger.info(
            "follower joins",
            server=stream.peer,
            member=hello.member,
            change=hello.change,
            snapshot=fresh,
        )
        if fresh:
            following.walk = 0
            self._slices(following)

    def _gone(self, following: _Following) -> None:
        if self._followers.get(following.member) is following:
            del self._followers[following.member]
            logger.info("follower gone", server=following.stream.peer, member=following.member)
        following.stream.ended = lambda: None
        following.walk = None
        self._writer.forsake(following.member)
        if following.is_current:
            self._current(following.member, False)

    def _cut_off(self, following: _Following) -> None:
        following.stream.abort()
        self._gone(following)

    def close(self) -> None:
        """This reign is over: the followers are to look for another writer."""
        for following in tuple(self._followers.values()):
            following.stream.ended = lambda: None
            following.stream.close()
        self._followers.clear()

    @property
    def members(self) -> tuple[str, ...]:
        """The followers' ids."""
        return tuple(self._followers)

    # --- snapshots --------------------------------------------------------------------------------

    def _slices(self, following: _Following) -> None:
        """Send the next slice, then let the clients have their turn; wait while the last is unread."""
        stream = following.stream
        if following.walk is None or not stream.is_open or stream.is_full:
            return
        lines, _, following.walk = self._writer.graph.walk(
            following.walk, SLICE_BYTES, SLICE_PACKAGES
        )
        if lines:
            stream.send(frames.Snapshot(lines))
        if following.walk:
            self._loop.call_soon(self._slices, following)
        else:
            following.walk = None
            stream.send(frames.End(self._writer.change))

    # --- what followers say -----------------------------------------------------------------------

    def _heard(self, following: _Following, message: frames.Message) -> None:
        stream, writer = following.stream, self._writer
        match message:
            case frames.Forward():
                if following.next not in (None, message.first):
                    logger.error(
                        "follower out of step",
                        server=stream.peer,
                        member=following.member,
                        expected=following.next,
                        got=message.first,
                    )
                    stream.close("messages are missing")
                    self._gone(following)
                    return
                following.next = message.first + message.count
                lines = message.lines
                assert isinstance(lines, bytearray)
                following.unrun += len(lines)
                if following.unrun > MOST_UNRUN:
                    stream.pause()
                ended = partial(self._ran, following, len(lines))
                writer.run(Run(following.member, message.first, lines, ended=ended))
            case frames.Check():
                following.checks.append((message.number, writer.graph.ask()))
            case frames.Confirm():
                writer.confirm(following.member, message.counter)
            case frames.Current():
                following.is_current = True
                self._current(following.member, True)
            case frames.Pong():
                self._measure(following, message)
            case _:
                pass

    def _ran(self, following: _Following, size: int) -> None:
        if following.unrun > MOST_UNRUN >= following.unrun - size:
            following.stream.resume()
        following.unrun -= size

    # --- what they are told -----------------------------------------------------------------------

    def durable(self, commit: Durable) -> None:
        """A commit is durable and proven."""
        batch = None
        if commit.count:
            self.settled = commit.first + commit.count - 1
            self._changed_at = self._loop.time()
            self._backlog.add(commit.first, commit.count, commit.lines)
            batch = frames.Batch(commit.first, commit.count, commit.lines)
        if not self._followers:
            return
        results: dict[str, list[frames.Message]] = {}
        for each in commit.results:
            results.setdefault(each.origin, []).append(frames.Answers(each.first, each.letters))
        for following in tuple(self._followers.values()):
            said: list[frames.Message] = []
            if following.checks and following.checks[0][1] <= commit.ticket:
                # Before the batch: it may hold changes that their clients sent behind these reads.
                said += (frames.Checked(n) for n, t in following.checks if t <= commit.ticket)
                following.checks = [c for c in following.checks if c[1] > commit.ticket]
            if batch is not None:
                said.append(batch)
            said += results.get(following.member, ())
            following.stream.send(*said)
            if following.stream.unsent > MOST_UNREAD:
                logger.warning("follower too slow", server=following.stream.peer)
                self._cut_off(following)

    def beat(self, patience: float) -> None:
        """Ask everybody how far it is; let go of who has said nothing for `patience` seconds.

        Called every so often."""
        now = self._loop.time()
        for following in tuple(self._followers.values()):
            if following.stream.heard_at < now - patience:
                logger.warning("follower silent", server=following.stream.peer)
                self._cut_off(following)
        if now >= self._forget_at:
            self._forget_at = now + FORGET_EVERY
            self._writer.forget(now, {self._me, *self._followers})
        self._beats += 1
        for following in self._followers.values():
            if following.asked is None:
                following.asked = self._beats, now, self.settled
            following.stream.send(frames.Ping(self._beats, self.settled))

    def offer(self, member: str) -> bool:
        """Offer the place to a follower; whether it is there."""
        following = self._followers.get(member)
        if following is None:
            return False
        following.stream.send(frames.Offer(self._epoch))
        return True

    # --- what an operator is told -----------------------------------------------------------------

    def _measure(self, following: _Following, pong: frames.Pong) -> None:
        following.change = pong.change
        if following.asked is not None and pong.number >= following.asked[0]:
            _, at, change = following.asked
            following.asked = None
            following.lag_seconds = self._loop.time() - at
            following.lag_changes = max(0, change - pong.change)

    def state(self) -> dict[str, object]:
        """What was made durable when, in this reign, and by follower how far it is behind."""
        now = self._loop.time()
        found: dict[str, dict[str, object]] = {}
        for member, following in self._followers.items():
            seconds, behind = following.lag_seconds, following.lag_changes
            if following.asked is not None and now - following.asked[1] > LATE_SECONDS:
                seconds = max(seconds, now - following.asked[1])
                behind = max(0, self.settled - following.change)
            found[member] = {
                "lag_changes": behind,
                "lag_seconds": round(seconds, 3),
                "unsent_bytes": following.stream.unsent,
                "current": following.is_current,
            }
        since = None if self._changed_at is None else round(now - self._changed_at, 3)
        return {
            "reign_seconds": round(now - self._began, 3),
            "change_seconds": since,
            "backlog_bytes": self._backlog.bytes,
            "followers": found,
        }
