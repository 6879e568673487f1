"""A member as a model: it does what its Takeover says, one operation on the mount at a time.

A generator is a thread: what stands before a `yield` takes effect on the mount's server in one step, and
between two yields anything may happen to the member, the mount and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from pkgindex.cluster import actions as act
from pkgindex.cluster.takeover import Role, Sight, Takeover
from tests.simulation.mount import Directory, Journal

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["Member", "Stream"]

Thread = Generator[float | None, None, None]  # yields how long its next operation takes; None: any

BACKLOG = 4  # changes that a writer keeps for a follower that comes again
WRITING = (Role.WRITER, Role.HUNG)


class Stream:
    """A connection from a follower to the one that it takes for the writer."""

    __slots__ = ("ended", "follower", "fresh", "held", "is_open", "last", "writer")

    def __init__(self, follower: Member, writer: Member) -> None:
        self.follower = follower
        self.writer = writer
        self.is_open = True
        self.fresh = self.ended = False  # it begins with a snapshot; that is over
        self.held: list[tuple[Any, ...]] = []  # sent while the two were cut from each other
        self.last = 0.0  # arrival of what was sent last: one order


class Member:
    """A process: its decisions, its core, its threads."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.machine: Takeover = world.takeover(name)
        self.core: list[str] = []
        self.directory: Directory | None = None
        self.proven: dict[int, int] = {}
        self.stream: Stream | None = None
        self.streams: list[Stream] = []  # as writer
        self.is_dead = self.is_paused = self.is_hung = self.is_holding = self.is_busy = False
        self.parked: list[tuple[Any, ...]] = []
        self.stuck: list[Thread] = []
        self.troubled_at = -9.0  # when something last happened to it, or ended
        self.reigns_since = self.woke_at = self.hung_at = -9.0
        self.turned_to, self.turned_at = "", -9.0  # the writer that it asked last, since when
        self.was_offered = False
        self.beat = 0
        self.looked_at = -9.0
        self.seen: list[Sight] = []
        self.tick_at = float("inf")
        self.changes = 0

    # --- what drives it ---------------------------------------------------------------------------

    def start(self) -> None:
        """The process begins."""
        self.do(self.machine.tick(self.world.now))

    def do(self, actions: list[act.Action]) -> None:
        """Do what the machine says, and be there when it wants to be woken."""
        world = self.world
        for action in actions:
            if world.trace is not None:
                world.say(f"{self.name}: {action}")
            DO[type(action)](self, action)
        at = self.machine.wake_at
        if at < self.tick_at:
            self.tick_at = at
            world.at(max(0.0, at - world.now) + 1e-6, self._tick, at)  # timers are late

    def _tick(self, at: float) -> None:
        if self.is_dead or at != self.tick_at:
            return
        if self.is_paused:
            self.parked.append((self._tick, at))
            return
        self.tick_at = float("inf")
        self.do(self.machine.tick(self.world.now))

    def spawn(self, thread: Thread) -> None:
        self.world.at(self.world.latency(), self._step, thread)

    def _step(self, thread: Thread) -> None:
        if self.is_dead:
            return
        if self.is_paused:
            self.parked.append((self._step, thread))
        elif self.is_hung:
            self.stuck.append(thread)
        else:
            for delay in thread:
                self.world.at(self.world.latency() if delay is None else delay, self._step, thread)
                return

    # --- looking and beating ----------------------------------------------------------------------

    def look(self, action: act.Look) -> None:
        self.spawn(self._look())

    def _look(self) -> Thread:
        world, mount = self.world, self.world.mount
        is_stale = world.now - self.looked_at < 0.4 and world.rng.random() < world.staleness
        if not is_stale:
            self.seen, self.looked_at = list(mount.sights.values()), world.now
        locks, sights = {epoch: epoch in mount.locks for epoch in mount.staging}, self.seen
        yield None
        self.do(self.machine.looked(world.now, locks, sights))

    def publish(self, action: act.Beat) -> None:
        self.spawn(self._publish(action.epoch, self.machine.role in WRITING))

    def _publish(self, epoch: int, serves: bool) -> Thread:
        world = self.world
        if epoch and self.proves_beats(epoch):
            if not world.mount.lives(self.directory) or self.directory.epoch != epoch:
                self.do(self.machine.deposed(world.now, epoch))
                return
            world.judge.proves(self.name, epoch)
        self.beat += 1
        reaches = world.reached_by(self)
        world.mount.sights[self.name] = Sight(self.name, epoch, serves, self.beat, reaches)
        self.do(self.machine.proven(world.now, epoch))
        return
        yield

    def proves_beats(self, epoch: int) -> bool:
        """F5: a heartbeat is a rename out of staging."""
        return True

    # --- claiming and recovering ------------------------------------------------------------------

    def claim(self, action: act.Claim) -> None:
        self.world.claims(self)
        self.spawn(self._claim())

    def _claim(self) -> Thread:
        mount = self.world.mount
        epoch = mount.highest() + 1
        yield None
        if not mount.make(epoch):
            return self._withdraw(0)
        yield None
        mine = mount.staging.get(epoch)
        if mine is None or not mount.own(mine, self.name):
            return self._withdraw(0)
        yield None
        mount.sync()
        yield None
        if mount.staging.get(epoch) is not mine or mine.owner != self.name:
            return self._withdraw(0)
        mount.locks.setdefault(epoch, self.name)
        proven: dict[int, int] = {}
        is_synced = False
        while True:
            yield None
            there = sorted(mount.staging)
            if not mount.lives(mine) or there[-1] > epoch:
                return self._withdraw(epoch)
            if there == [epoch] and is_synced:
                break
            for older in reversed(there[:-1]):  # newest first (X7)
                yield None
                old = mount.staging.get(older)
                if old is None:
                    continue
                if not mount.lives(mine):
                    return self._withdraw(epoch)
                for of, change in mount.take(mine, old).items():
                    proven[of] = max(change, proven.get(of, 0))
                yield None
                mount.remove(old)
            yield None
            mount.sync()
            is_synced = True
        journals = mount.journals
        base = journals[max(journals)].base if journals else 0
        yield None
        self.directory, self.proven = mine, proven
        self.do(self.machine.claimed(self.world.now, epoch, base))
        return None

    def _withdraw(self, epoch: int, of: int = 0) -> None:
        self._unlock(epoch)
        self.do(self.machine.withdrawn(self.world.now, of))
        self._show()

    def _unlock(self, epoch: int) -> None:
        if self.world.mount.locks.get(epoch) == self.name:
            del self.world.mount.locks[epoch]

    def abandon(self, action: act.Abandon) -> None:
        self._unlock(action.epoch)

    def recover(self, action: act.Recover) -> None:
        self.reigns_since = self.world.now
        self.spawn(self._recover(action.epoch, action.own, self.directory))

    def _recover(self, epoch: int, own: bool, mine: Directory) -> Thread:
        world, mount = self.world, self.world.mount
        yield from self._work()
        if not mount.lives(mine):
            return self._withdraw(epoch, epoch)
        newest = max(mount.journals, default=0)
        journal = mount.journals.get(newest) or Journal(0, [])
        end, base = mount.seen_end(journal, self.proven.get(newest, 0)), journal.base
        world.judge.reads(epoch)
        known = self.core if own else mount.files[:base]
        self.core = known + journal.changes[max(0, len(known) - base) : end - base]
        state = list(self.core)
        yield from self._work()
        if not mount.lives(mine):
            return self._withdraw(epoch, epoch)
        journal = Journal(base, state[base:])
        mount.publish(epoch, journal)
        yield None
        mount.sync()
        yield None
        if mount.journals.get(epoch) is not journal or not mount.lives(mine):
            return self._withdraw(epoch, epoch)
        mine.proofs[epoch] = len(state)
        world.judge.proves(self.name, epoch)
        world.judge.serves(self.name, epoch, state)
        mount.remove_journals_below(epoch)
        yield None
        self.do(self.machine.recovered(world.now, epoch, len(state)))
        return None

    def _work(self) -> Thread:
        """Reading and writing a whole index may take long; that is no fault."""
        world = self.world
        for _ in range(2 if world.rng.random() < world.slowness else 0):
            takes = world.rng.random() * world.after
            world.disturb(takes)
            yield takes
        yield None

    # --- writing ----------------------------------------------------------------------------------

    def serve(self, action: act.Serve) -> None:
        self.is_holding = self.is_busy = False
        self.reigns_since, self.turned_to = self.world.now, ""
        journal = self.world.mount.journals.get(action.epoch) or Journal(len(self.core), [])
        self.world.at(0.0, self._step, self._write(action.epoch, self.directory, journal))

    def _write(self, epoch: int, mine: Directory, journal: Journal) -> Thread:
        """Take changes of one's clients, commit, answer, stream; at times a round (W2, W5)."""
        world, mount, machine = self.world, self.world.mount, self.machine
        rng = world.rng
        while True:
            yield world.pace()
            if machine.epoch != epoch:
                return
            if self.is_holding or not machine.is_open or world.is_quiet:
                continue
            self.is_busy = True
            first = len(self.core) + 1
            changes = [self._change() for _ in range(1 + (rng.random() < 0.3))]
            self.core += changes
            last = len(self.core)
            yield None
            journal.changes += changes
            yield None
            if journal.end != last:
                self.do(machine.failed(world.now, epoch, "fdatasync: an input/output error"))
                return
            journal.durable = len(journal.changes)
            mount.sync()
            yield None
            if not mount.lives(mine):
                self.do(machine.deposed(world.now, epoch))
                return
            world.judge.proves(self.name, epoch)
            mine.proofs[epoch] = last
            yield None
            if machine.epoch != epoch:
                return
            world.judge.answered(world.now, self.name, first, changes)
            self.is_busy = False
            self.do(machine.settled(world.now, epoch, last))
            for stream in self.streams:
                world.send(stream, stream.follower, Member.batch, epoch, first, changes)
            if rng.random() < 0.15:
                yield None
                if mount.lives(mine) and mount.journals.get(epoch) is journal:
                    mount.round(journal, last)

    def _change(self) -> str:
        self.changes += 1
        return f"{self.name}.{self.changes}"

    def step_down(self, action: act.StepDown) -> None:
        self._unlock(action.epoch)
        self.directory = None
        self.turned_at = self.world.now
        for stream in list(self.streams):
            self.world.break_off(stream)
        self.streams.clear()
        if self.machine.position is None:
            self.core = []
        self._show()

    # --- streams: the writer's side ---------------------------------------------------------------

    def hello(self, stream: Stream, position: act.Position | None, highest: int) -> None:
        """A follower asks for the stream."""
        world, machine = self.world, self.machine
        self.do(machine.told(world.now, highest))
        if machine.role not in WRITING or machine.position is None:
            world.send(stream, stream.follower, Member.refused, machine.highest)
            return
        settled = machine.position.change
        stream.fresh = position is None or not 0 <= settled - position.change <= BACKLOG
        world.send(stream, stream.follower, Member.welcome, machine.epoch, settled, stream.fresh)
        self.streams.append(stream)
        if stream.fresh:
            world.at(world.latency() * 3, self._slices, stream, machine.epoch)
        elif position.change < settled:
            changes = self.core[position.change : settled]
            world.send(
                stream, stream.follower, Member.batch, machine.epoch, position.change + 1, changes
            )

    def _slices(self, stream: Stream, epoch: int) -> None:
        """The last slice of a snapshot: the core as it is, settled or not."""
        if self.is_dead or not stream.is_open or self.machine.epoch != epoch:
            return
        if self.is_paused:
            self.parked.append((self._slices, stream, epoch))
            return
        self.world.send(stream, stream.follower, Member.snapshot, epoch, list(self.core))

    def is_current(self, stream: Stream) -> None:
        """A follower says that it has caught up."""
        if stream in self.streams:
            self.do(self.machine.follower(self.world.now, stream.follower.name, current=True))

    def hold(self, action: act.Hold) -> None:
        self.is_holding = True

    def resume(self, action: act.Resume) -> None:
        self.is_holding = False

    def offer(self, action: act.Offer) -> None:
        self.spawn(self._offer(action.member, self.machine.epoch))

    def _offer(self, member: str, epoch: int) -> Thread:
        while self.is_busy:
            yield None
        for stream in self.streams:
            if stream.follower.name == member and self.machine.epoch == epoch:
                self.world.send(stream, stream.follower, Member.offered, epoch)

    # --- streams: the follower's side -------------------------------------------------------------

    def follow(self, action: act.Follow) -> None:
        writer = self.world.members.get(action.member)
        if self.turned_to != action.member:
            self.turned_to, self.turned_at = action.member, self.world.now
        if writer is None or writer.is_dead:
            self.world.at(self.world.delay(), self._refused_by, action.member)
            return
        self.stream = Stream(self, writer)
        self.world.connect(self.stream)
        self.world.send(self.stream, writer, Member.hello, action.position, self.machine.highest)

    def _refused_by(self, name: str) -> None:
        self.world.call(self, lambda: self.do(self.machine.lost(self.world.now, name)))

    def refused(self, stream: Stream, highest: int) -> None:
        self.do(self.machine.told(self.world.now, highest))
        self.world.break_off(stream)

    def welcome(self, stream: Stream, epoch: int, settled: int, fresh: bool) -> None:
        machine, writer = self.machine, stream.writer.name
        if stream is not self.stream and machine.follows == writer:
            return  # another connection to the same member is the one that counts
        self.do(machine.welcomed(self.world.now, writer, epoch, settled, fresh=fresh))
        if machine.streams and machine.follows == writer:
            self.stream = stream
            self._caught_up(stream)

    def batch(self, stream: Stream, epoch: int, first: int, changes: list[str]) -> None:
        if stream is not self.stream:
            return
        if not stream.fresh or stream.ended:
            self.core[first - 1 : first - 1 + len(changes)] = changes
        last = first + len(changes) - 1
        self.do(self.machine.applied(self.world.now, stream.writer.name, epoch, last))
        self._show()

    def snapshot(self, stream: Stream, epoch: int, state: list[str]) -> None:
        if stream is not self.stream:
            return
        self.core, stream.ended = state, True
        self.do(self.machine.snapshot_ended(self.world.now, stream.writer.name, epoch, len(state)))
        self._caught_up(stream)

    def _caught_up(self, stream: Stream) -> None:
        if self.machine.position is not None and self.stream is stream:
            self.world.send(stream, stream.writer, Member.is_current)
            self._show()

    def _show(self) -> None:
        if self.machine.position is not None and not self.machine.epoch:
            self.world.judge.shown(self.name, self.core)

    def offered(self, stream: Stream, epoch: int) -> None:
        self.was_offered = True
        self.do(self.machine.offered(self.world.now, stream.writer.name, epoch))
        self.was_offered = False

    def disconnect(self, action: act.Disconnect) -> None:
        if self.stream is not None and self.stream.writer.name == action.member:
            self.world.break_off(self.stream)
            self.stream = None

    def hung_up(self, stream: Stream) -> None:
        """The other side, or the network between, has ended this connection."""
        if stream.follower is self:
            if stream is self.stream:
                self.stream = None
                self.do(self.machine.lost(self.world.now, stream.writer.name))
        elif stream in self.streams:
            self.streams.remove(stream)
            name = stream.follower.name
            self.do(self.machine.follower(self.world.now, name, current=False))

    # --- clients and the end ----------------------------------------------------------------------

    def open_clients(self, action: act.OpenClients) -> None:
        """The machine knows by itself whether clients are served."""

    def close_clients(self, action: act.CloseClients) -> None:
        self.world.closes(self)

    def end(self, action: act.End) -> None:
        self.world.ends(self, action.failure)


DO: dict[type, Callable[[Member, Any], None]] = {
    act.Look: Member.look,
    act.Beat: Member.publish,
    act.Claim: Member.claim,
    act.Abandon: Member.abandon,
    act.Recover: Member.recover,
    act.Serve: Member.serve,
    act.StepDown: Member.step_down,
    act.Follow: Member.follow,
    act.Disconnect: Member.disconnect,
    act.OpenClients: Member.open_clients,
    act.CloseClients: Member.close_clients,
    act.Hold: Member.hold,
    act.Offer: Member.offer,
    act.Resume: Member.resume,
    act.End: Member.end,
}
