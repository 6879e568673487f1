"""A member at work: the decisions of takeover.py, driven by a clock, a mount, and the cluster port.

    what happened --> Takeover --> actions --> the mount (in threads), streams, the index (parts)

Whatever touches the mount runs in a thread of its own, for the mount may hang; its result comes back to
the event loop as an event. What hangs is left behind: the threads are daemons, and what they return to a
reign that is over is thrown away, its claim let go.

Errors: failed() of the parts is told once, when this server can go on no longer.
"""

import asyncio
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from pkgindex import __version__, log
from pkgindex._core import Graph
from pkgindex.cluster import actions as act
from pkgindex.cluster import frames
from pkgindex.cluster.blocking import Blocking
from pkgindex.cluster.feed import Backlog, Feed
from pkgindex.cluster.follower import Follower
from pkgindex.cluster.members import Member
from pkgindex.cluster.members import Role as Shown
from pkgindex.cluster.parts import Parts
from pkgindex.cluster.pending import Chunk
from pkgindex.cluster.port import Port
from pkgindex.cluster.stream import Stream
from pkgindex.cluster.takeover import BEATS, Role, Sight, Takeover
from pkgindex.cluster.writer import Writer
from pkgindex.config import Settings
from pkgindex.errors import PkgindexError, StoreFailed, StoreUnreachable, reason_of
from pkgindex.index.file import Deposed
from pkgindex.store.claim import GONE, Claim, Withdrawn
from pkgindex.store.format import Format
from pkgindex.store.mount import Mount

__all__ = ["Node"]

# Takeover hears of commits and batches at most so often, and before it hears of anything else.
SETTLED_SECONDS = 0.02

SILENT_BEATS = 3  # of the other side of a stream, after which it is taken for dead

OFFER_SECONDS = 0.01  # how often a writer that has offered its place looks whether it was taken
COMMAND_SECONDS = 5.0

ROLES = {
    Role.FOLLOWER: Shown.FOLLOWER,
    Role.CLAIMING: Shown.CLAIMING,
    Role.RECOVERING: Shown.CLAIMING,
    Role.WRITER: Shown.WRITER,
    Role.HUNG: Shown.HUNG,
    Role.ENDED: Shown.FOLLOWER,
}

logger = log.get_logger()


class Node:
    """This server among the others. Everything but the work of threads happens on the event loop."""

    def __init__(
        self, mount: Mount, fmt: Format, port: Port, settings: Settings, data: tuple[str, ...]
    ) -> None:
        """`data`: where this server's clients connect. Raises StoreUnreachable."""
        self.id = secrets.token_hex(16)
        self._root = mount.root
        self._store = fmt.id
        self._port = port
        self._data = data
        self._after = settings.takeover_after
        self._step = self._after / BEATS
        self._blocking = Blocking(mount, fmt, settings, self.id)
        self.machine = Takeover(self.id, self._after, random.random)
        self._addresses: dict[str, Member] = {}
        self._reached: dict[str, float] = {}  # members that were dialled: when they last answered
        self._trials: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at = float("inf")
        self._dialling = 0
        self._follower: Follower | None = None
        self._claim: Claim | None = None
        self._writer: Writer | None = None
        self._feed: Feed | None = None
        self._graph: Graph | None = None  # what a follower shows
        self.backlog = Backlog()
        self._beat = 0
        self._told_at = 0.0
        self._untold: Callable[[], list[act.Action]] | None = (
            None  # a commit or a batch, not told yet
        )
        self._why: PkgindexError | None = None
        self._complained: dict[str, float] = {}
        self._over = False
        self._offering = ""
        self._ended = asyncio.Event()

    # --- beginning and end ------------------------------------------------------------------------

    async def start(self, parts: Parts) -> None:
        """Listen on the cluster port, and take part."""
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        await self._port.listen(self._heard)
        logger.info("cluster member", member=self.id, cluster=self._port.address, store=self._root)
        self._happened(self.machine.tick)
        self._loop.call_later(self._step, self._ping)

    def stop(self) -> None:
        """Leave: a writer hands over first, if a follower is there to take its place."""
        if not self._over:
            self._happened(self.machine.stop)

    async def left(self, timeout: float) -> None:
        """Wait until this member has left, or `timeout` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout)

    async def close(self) -> None:
        """Take no part any more; the file on the mount goes, if the mount answers in time."""
        self._over = True
        if self._wake is not None:
            self._wake.cancel()
        self._port.close()
        if self._feed is not None:
            self._feed.close()
        if self._follower is not None:
            self._follower.stream.close()
        gone = self._loop.create_future()

        def withdrawn(_result: object) -> None:
            if not gone.done():
                gone.set_result(None)

        self._thread(self._blocking.withdraw, withdrawn, always=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(gone, COMMAND_SECONDS)

    # --- events in, actions out -------------------------------------------------------------------

    def _happened(self, event: Callable[..., list[act.Action]], *args: Any, **kwargs: Any) -> None:
        """Tell the machine, and do what it says."""
        if self._over:
            return
        self._tell_untold()
        before = self.machine.role
        self._do(event(time.monotonic(), *args, **kwargs))
        if self.machine.role is not before:
            logger.info("role", role=self.machine.role.value, epoch=self.machine.epoch or None)

    def _tell_untold(self) -> None:
        untold, self._untold = self._untold, None
        if untold is not None:
            self._do(untold())

    def _went_on(self, event: Callable[..., list[act.Action]], *args: Any) -> None:
        """As _happened(), of what happens thousands of times a second and asks for nothing, as a rule."""
        now = time.monotonic()
        self._untold = lambda: event(now, *args)
        if now - self._told_at >= SETTLED_SECONDS or self.machine.role is Role.HUNG:
            self._told_at = now
            self._tell_untold()

    def _do(self, actions: list[act.Action]) -> None:
        for action in actions:
            logger.debug("action", action=repr(action))
            _DO[type(action)](self, action)
        at = self.machine.wake_at
        if at < self._wake_at or self._wake is None:
            if self._wake is not None:
                self._wake.cancel()
            self._wake_at = at
            if at != float("inf") and not self._over:
                self._wake = self._loop.call_later(
                    max(0.0, at - time.monotonic()) + 0.001, self._tick
                )

    def _tick(self) -> None:
        self._wake, self._wake_at = None, float("inf")
        self._happened(self.machine.tick)

    def _thread(
        self, work: Callable[[], Any], then: Callable[[Any], None], *, always: bool = False
    ) -> None:
        """Run `work` in a thread, then `then` here with what it returned or raised."""

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001  # it is told to `then`
                result = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                self._loop.call_soon_threadsafe(come_back, result)

        def come_back(result: Any) -> None:
            if always or not self._over:
                then(result)

        threading.Thread(target=run, name="mount", daemon=True).start()

    def _complain(self, what: str, error: Exception) -> None:
        """Log a trouble with the mount, once a minute for each kind; from any thread."""
        now = time.monotonic()
        if now >= self._complained.get(what, 0.0):
            self._complained[what] = now + 60.0
            reason = str(error)
            if isinstance(error, OSError):
                reason = reason_of(error, self._root)
            logger.warning("mount in trouble", what=what, reason=reason)

    # --- looking and beating ----------------------------------------------------------------------

    def _look(self, _action: act.Look) -> None:
        self._thread(partial(self._blocking.look, self._complain), self._looked)

    def _looked(self, result: Any) -> None:
        if isinstance(result, Exception):
            raise result
        locks, members = result
        self._addresses = {each.id: each for each in members}
        sights = [_sight(each) for each in members]
        self._happened(self.machine.looked, locks, sights)

    def _publish(self, action: act.Beat) -> None:
        self._beat += 1
        member = self._member()
        mine = self._claim if action.epoch else None
        if action.epoch and (mine is None or mine.epoch != action.epoch):
            return
        work = partial(self._blocking.beat, member, mine, self._complain)
        self._thread(work, partial(self._beaten, action.epoch))

    def _beaten(self, epoch: int, result: Any) -> None:
        if isinstance(result, OSError) and epoch:
            if result.errno in GONE:
                work = partial(self._blocking.is_above, epoch)
                self._thread(work, partial(self._fell, epoch, result))
            else:
                self._failed(epoch, StoreFailed(f"{self._root}: heartbeat: {result.strerror}"))
            return
        self._happened(self.machine.proven, epoch)

    def _fell(self, epoch: int, why: OSError, deposed: Any) -> None:
        if deposed is True:
            self._happened(self.machine.deposed, epoch)
        else:
            self._failed(epoch, StoreFailed(reason_of(why, self._root)))

    def _member(self) -> Member:
        machine = self.machine
        position = machine.position or act.Position(0, 0)
        change = (
            self._feed.settled if self._feed else self._follower.change if self._follower else 0
        )
        since = self._loop.time() - self._after
        reaches = {member for member, at in self._reached.items() if at > since}
        if self._feed is not None:
            reaches.update(self._feed.members)
        elif self._follower is not None and self._follower.is_live:
            reaches.add(self._follower.member)
        return Member(
            self.id,
            self._port.address,
            self._data,
            ROLES[machine.role],
            machine.epoch if machine.role is not Role.FOLLOWER else position.epoch,
            change or position.change,
            __version__,
            tuple(sorted(reaches)),
            self._beat,
        )

    # --- claiming and recovering ------------------------------------------------------------------

    def _claims(self, _action: act.Claim) -> None:
        self._thread(self._blocking.claim, self._claimed)

    def _claimed(self, result: Any) -> None:
        if isinstance(result, Exception):
            if not isinstance(result, Withdrawn):
                self._complain("cannot claim the store", result)
            logger.debug("claim withdrawn", reason=str(result))
            self._happened(self.machine.withdrawn)
            return
        mine, base = result
        self._let_go_of_claim()
        self._claim = mine
        self._happened(self.machine.claimed, mine.epoch, base)

    def _abandon(self, action: act.Abandon) -> None:
        if self._claim is not None and self._claim.epoch == action.epoch:
            self._let_go_of_claim()

    def _let_go_of_claim(self) -> None:
        mine, self._claim = self._claim, None
        if mine is not None:
            self._release(mine)

    def _release(self, mine: Claim) -> None:
        self._thread(partial(self._blocking.release, mine), lambda _result: None)

    def _recover(self, action: act.Recover) -> None:
        assert self._claim is not None
        graph = self._graph if action.own else None
        self._show(None)
        logger.info("taking over", epoch=action.epoch, own_graph=action.own)
        work = partial(self._blocking.recover, self._claim, graph)
        self._thread(work, partial(self._recovered, self._claim), always=True)

    def _recovered(self, mine: Claim, result: Any) -> None:
        is_due = mine is self._claim and self.machine.epoch == mine.epoch and not self._over
        if isinstance(result, Writer):
            if not is_due:
                result.abandon(partial(self._blocking.unlock, mine.epoch))
                return
            self._writer = result
            self._happened(self.machine.recovered, mine.epoch, result.change)
            return
        if not is_due:
            self._release(mine)
            return
        if isinstance(result, Withdrawn | StoreUnreachable) or (
            isinstance(result, OSError) and result.errno in GONE
        ):
            if not isinstance(result, Withdrawn):
                self._complain("cannot recover the store", result)
            self._let_go_of_claim()
            self._happened(self.machine.withdrawn, mine.epoch)
            return
        if isinstance(result, PkgindexError):
            self._failed(mine.epoch, result)
        elif isinstance(result, OSError):
            self._failed(mine.epoch, StoreFailed(reason_of(result, self._root)))
        else:
            self._failed(mine.epoch, StoreFailed(f"{self._root}: recovery failed: {result!r}"))

    # --- writing ----------------------------------------------------------------------------------

    def _serve(self, action: act.Serve) -> None:
        writer = self._writer
        assert writer is not None
        for batch in writer.batches:
            self.backlog.add(*batch)
        feed = Feed(writer, self.id, action.epoch, self.backlog, self._is_current)
        self._feed = feed
        self._parts.writes(writer, feed)
        logger.info("writer", epoch=action.epoch, packages=len(writer), change=writer.change)

    def settled(self, change: int) -> None:
        """The writer of this server has made changes durable up to this one."""
        self._went_on(self.machine.settled, self.machine.epoch, change)

    def writer_failed(self, error: PkgindexError) -> None:
        """The writer of this server can go on no longer."""
        if isinstance(error, Deposed):
            self._happened(self.machine.deposed, self.machine.epoch)
        else:
            self._failed(self.machine.epoch, error)

    def _failed(self, epoch: int, error: PkgindexError) -> None:
        self._why = error
        self._happened(self.machine.failed, epoch, str(error))

    def _is_current(self, member: str, current: bool) -> None:
        self._happened(self.machine.follower, member, current=current)

    def _step_down(self, action: act.StepDown) -> None:
        logger.warning("deposed", epoch=action.epoch, highest=self.machine.highest)
        self._untold = None
        writer, mine = self._writer, self._claim
        self._writer = self._claim = None
        self._offering = ""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        self._show(None)
        self._parts.steps_down()
        if writer is not None and mine is not None:
            writer.abandon(partial(self._blocking.unlock, mine.epoch))
        # Without a writer, a recovery is under way, and lets the claim go when it ends: see _recovered().

    def _hold(self, _action: act.Hold) -> None:
        assert self._writer is not None
        self._writer.hurry()
        self._writer.holds = True

    def _resume(self, _action: act.Resume) -> None:
        self._offering = ""
        if self._writer is not None:
            self._writer.holds = False
            self._writer.go_on()
            self._parts.goes_on()
        logger.warning("nobody took the writer's place")

    def _offer(self, action: act.Offer) -> None:
        self._offering = action.member
        logger.info("handing over", to=action.member)
        self._offer_when_quiet(action.member, is_sent=False)

    def _offer_when_quiet(self, member: str, *, is_sent: bool) -> None:
        """Offer; then prove oneself again and again, to hear at once that the place was taken."""
        writer, feed = self._writer, self._feed
        if self._offering != member or writer is None or feed is None or self._over:
            return
        if not is_sent and writer.is_quiet:
            is_sent = feed.offer(member)
        elif is_sent and writer.is_quiet:
            writer.graph.ask()
        self._loop.call_later(
            OFFER_SECONDS, partial(self._offer_when_quiet, member, is_sent=is_sent)
        )

    # --- following --------------------------------------------------------------------------------

    def _follow(self, action: act.Follow) -> None:
        self._dialling += 1
        known = self._addresses.get(action.member)
        ended = partial(self._lost, action.member, self._dialling)
        if known is None:
            self._loop.call_soon(ended)
            return
        trusted = partial(self._greets, action.member, self._dialling)
        self._dial = self._loop.create_task(
            self._port.dial(known.cluster, trusted, ended, self._after)
        )

    def _greets(self, member: str, number: int, stream: Stream) -> None:
        """The one that was dialled is trusted: ask it for its stream."""
        if number != self._dialling or self._over:
            stream.close()
            return
        position, graph = self.machine.position, self._graph
        if position is None or graph is None:
            position, graph = act.Position(0, 0), None
        pending = self._parts.pending
        self._follower = Follower(
            stream, member, graph, position.change, self.backlog, pending, self
        )
        stream.send(
            frames.Hello(
                self._store,
                self.id,
                *position,
                self.machine.shown.change,
                pending.answered,
                self.machine.highest,
            )
        )

    def _lost(self, member: str, number: int) -> None:
        if number == self._dialling and not self._over:
            self._follower = None
            self._parts.follows(None)
            self._happened(self.machine.lost, member)

    def _show(self, graph: Graph | None) -> None:
        self._graph = graph
        self._parts.shows(graph)

    # What the stream tells: see Ears.

    def welcomed(self, follower: Follower, welcome: frames.Welcome) -> bool:
        """See Ears."""
        machine, member = self.machine, follower.member
        self._happened(machine.welcomed, member, welcome.epoch, welcome.change, fresh=welcome.fresh)
        if self._follower is not follower or not machine.streams:
            return False
        if welcome.fresh:
            self._show(None)
        logger.info(
            "following", writer=follower.stream.peer, epoch=welcome.epoch, change=welcome.change
        )
        self._parts.pending.retract()
        return True

    def applied(self, follower: Follower) -> bool:
        """See Ears."""
        event = self._went_on if follower.is_good else self._happened
        event(self.machine.applied, follower.member, follower.epoch, follower.change)
        return self.machine.position is not None

    def snapshot_ended(self, follower: Follower, change: int) -> bool:
        """See Ears."""
        self._happened(self.machine.snapshot_ended, follower.member, follower.epoch, change)
        return self.machine.position is not None

    def good(self, graph: Graph) -> None:
        """See Ears."""
        self._show(graph)

    def resumed(self, follower: Follower, lost: list[int]) -> None:
        """See Ears."""
        self._parts.forsakes(lost)
        self._parts.follows(follower)

    def answered(self) -> None:
        """See Ears."""
        self._parts.gives_out()

    def checked(self, reads: Iterable[Chunk]) -> None:
        """See Ears."""
        self._parts.checked(reads)

    def offered(self, follower: Follower, epoch: int) -> None:
        """See Ears."""
        self._happened(self.machine.offered, follower.member, epoch)

    def elsewhere(self, highest: int) -> None:
        """See Ears."""
        self._happened(self.machine.told, highest)

    def _disconnect(self, _action: act.Disconnect) -> None:
        self._dialling += 1
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.stream.close()
        self._parts.follows(None)

    # --- the cluster port -------------------------------------------------------------------------

    def _heard(self, stream: Stream, message: frames.Message) -> None:
        """The first message of a connection that somebody made to this server."""
        match message:
            case frames.Hello():
                self._port.hand_over(stream)
                self._happened(self.machine.told, message.highest)
                if self._feed is None or self.machine.role not in (Role.WRITER, Role.HUNG):
                    stream.send(frames.Elsewhere(self.machine.highest))
                    stream.close()
                    return
                self._feed.hello(stream, message)
            case frames.Status():
                stream.send(frames.State(json.dumps(self.state())))
            case frames.HandOver():
                self._hand_over(stream, message)
            case _:
                stream.close(f"{type(message).__name__.upper()} out of turn")

    def _hand_over(self, stream: Stream, message: frames.HandOver) -> None:
        to = message.to if int(message.to, 16) else ""
        if self._feed is None:
            stream.close("this server does not write: ask the writer")
            return
        self._happened(self.machine.handover, to)
        if self._offering:
            stream.send(frames.Done())
        else:
            stream.close(
                "no follower is ready to take over" if not to else "that follower is not ready"
            )

    def _ping(self) -> None:
        if self._over:
            return
        patience = SILENT_BEATS * self._step
        if self._feed is not None:
            self._feed.beat(patience)
        else:
            stream = self._follower.stream if self._follower is not None else None
            silent = self._loop.time() - stream.heard_at if stream is not None else 0.0
            if stream is None or silent > 2 * self._step:
                self._try_others()
            if stream is not None and silent > patience:
                logger.warning("writer silent", server=stream.peer)
                stream.abort()
                stream.ended()
        self._loop.call_later(self._step, self._ping)

    def _try_others(self) -> None:
        """Find out whom this member reaches: if not the writer, that decides who may replace it (F5)."""
        for other in self._addresses.values():
            if other.id != self.id:
                dial = self._port.dial(
                    other.cluster, partial(self._reaches, other.id), lambda: None, self._after / 2
                )
                trial = self._loop.create_task(dial)
                self._trials.add(trial)
                trial.add_done_callback(self._trials.discard)

    def _reaches(self, member: str, stream: Stream) -> None:
        self._reached[member] = self._loop.time()
        stream.close()

    # --- what is known ----------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """For an operator: this member, and its followers if it writes."""
        mine = self._member()
        follower, feed = self._follower, self._feed
        known: dict[str, object] = {
            "id": mine.id,
            "cluster": mine.cluster,
            "data": list(mine.data),
            "role": mine.role.value,
            "epoch": mine.epoch,
            "position": mine.change,
            "current": feed is not None,
            "version": mine.version,
            "takeover_after": self._after,
            "unanswered": self._parts.pending.messages,
        }
        if feed is not None:
            return {"self": known | {"hands_over": bool(self._offering)}} | feed.state()
        if follower is not None:
            known["writer"] = follower.member
            known["current"] = follower.is_live and follower.is_good
            known["lag_changes"] = max(0, follower.settled - follower.change)
        return {"self": known}

    # --- clients and the end ----------------------------------------------------------------------

    def _open_clients(self, _action: act.OpenClients) -> None:
        self._parts.admits(True)

    def _close_clients(self, _action: act.CloseClients) -> None:
        logger.warning("clients closed", reason="this server can do nothing for them now")
        self._parts.admits(False)

    def _end(self, action: act.End) -> None:
        self._ended.set()
        if action.failure:
            self._parts.fails(self._why or StoreFailed(action.failure))
        else:
            self._parts.fails(None)


def _sight(member: Member) -> Sight:
    """A member's file, as Takeover wants to know it."""
    serves = member.role in (Shown.WRITER, Shown.HUNG)
    epoch = member.epoch if serves or member.role is Shown.CLAIMING else 0
    return Sight(member.id, epoch, serves, member.beat, frozenset(member.reaches))


_DO: dict[type, Callable[[Node, Any], None]] = {
    act.Look: Node._look,
    act.Beat: Node._publish,
    act.Claim: Node._claims,
    act.Abandon: Node._abandon,
    act.Recover: Node._recover,
    act.Serve: Node._serve,
    act.StepDown: Node._step_down,
    act.Follow: Node._follow,
    act.Disconnect: Node._disconnect,
    act.OpenClients: Node._open_clients,
    act.CloseClients: Node._close_clients,
    act.Hold: Node._hold,
    act.Offer: Node._offer,
    act.Resume: Node._resume,
    act.End: Node._end,
}
