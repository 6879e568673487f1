"""The world of one schedule: virtual time, the network, the faults, and when peace has to return."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from pkgindex.cluster.takeover import Role, Takeover
from tests.simulation.judge import Judge, Violation
from tests.simulation.member import WRITING, Member, Stream
from tests.simulation.mount import Mount

__all__ = ["World"]

AFTER = 1.0  # takeover_after (seconds)
LOOK_EVERY = 0.2
RECOVERS_WITHIN = 2.0  # seconds after takeover_after (I6)
UNANSWERED = 0.4  # seconds without a sign of the other side, after which a connection is dropped
ANSWERS_WITHIN = 1.0  # seconds from the first client's first change, once a writer serves
JOINS_WITHIN = (
    1.5  # seconds from a new writer's first to every other member's first, on a slow mount
)
NO_PEACE = 25.0  # seconds: no schedule's faults and slow recoveries last so long
LOCK_LINGERS = 3.0  # seconds that the mount keeps the lock of a machine that died

#: What may happen, and how often.
FAULTS = ("kill",) * 4 + (
    "crash",
    "pause",
    "pause",
    "pause",
    "hang",
    "hang",
    "cut",
    "cut",
    "isolate",
)
FAULTS += ("power", "locks", "handover", "stop", "join", "join")


class World:
    """One schedule, from its seed.

    `takeover` and `member` are what a mutant changes; `faults` and `slowness` (the share of recoveries
    that take long) are what its schedules should be full of."""

    def __init__(
        self,
        seed: int,
        *,
        takeover: type[Takeover] = Takeover,
        member: type[Member] = Member,
        faults: tuple[str, ...] = FAULTS,
        slowness: float | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng = Random(seed)
        self.trace = trace
        self.after = AFTER
        self.now = 0.0
        self.mount = Mount(rng)
        self.judge = Judge()
        self.members: dict[str, Member] = {}
        self.cuts: set[frozenset[str]] = set()  # pairs of members that cannot talk
        self.disturbed_at = 0.0
        self.network_at = -9.0  # when it last changed
        self.steps = 0
        self._takeover, self._member, self._faults = takeover, member, faults
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._pushed = 0
        self._streams: list[Stream] = []
        self._lives = 0
        # What this schedule is like.
        self.is_lockstep = rng.random() < 0.1  # everything takes equally long
        self._mean = rng.choice((0.002, 0.01, 0.02))
        self._spikes = rng.choice((0.0, 0.01, 0.05))
        self.staleness = rng.choice((0.0, 0.3))  # looks answered from a cache
        self.slowness = rng.choice((0.0, 0.0, 0.5)) if slowness is None else slowness
        self.is_quiet = False  # no client sends anything
        self._pace = rng.choice((0.08, 0.2))

    # --- time -------------------------------------------------------------------------------------

    def at(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self._pushed += 1
        heappush(self._queue, (self.now + delay, self._pushed, call, args))

    def latency(self) -> float:
        """Seconds that an operation of the mount takes."""
        if self.is_lockstep:
            return 0.01
        rng = self.rng
        if self._spikes and rng.random() < self._spikes:
            return 0.2 * rng.random()
        return 2 * self._mean * rng.random()

    def delay(self) -> float:
        """Seconds that a message travels."""
        return 0.005 if self.is_lockstep else self.latency()

    def pace(self) -> float:
        """Seconds until a client sends its next change."""
        return self._pace * (0.5 + self.rng.random())

    def run_until(self, end: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end:
            self.now, _, call, args = heappop(queue)
            self.steps += 1
            call(*args)
        self.now = end

    def run_into_commit(self, member: Member) -> None:
        """Let it come to the middle of a commit, where a fault hurts most."""
        for _ in range(self.rng.randint(0, 80)):
            if member.is_busy or not self._queue:
                break
            self.run_until(self._queue[0][0])
        if member.is_busy:
            self.run_until(self.now + 2 * self.latency() * self.rng.random())

    def say(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:8.4f}  {text}")

    # --- members ----------------------------------------------------------------------------------

    def takeover(self, name: str) -> Takeover:
        """The decisions of a new member."""
        draw = self.rng.random
        return self._takeover(name, AFTER, draw, LOOK_EVERY)

    def join(self) -> Member:
        """A new process, under a name that nobody had before."""
        self._lives += 1
        member = self._member(self, f"m{self._lives}")
        self.members[member.name] = member
        self.at(0.3 * self.rng.random(), self.call, member, member.start)
        return member

    def living(self) -> list[Member]:
        return [m for m in self.members.values() if not m.is_dead]

    def healthy(self) -> list[Member]:
        """Members that could write, as far as process and mount go."""
        return [m for m in self.living() if not m.is_paused and not m.is_hung]

    def writer(self) -> Member | None:
        """The one that holds the epoch and serves."""
        return self._reigning(WRITING)

    def _reigning(self, roles: tuple[Role, ...]) -> Member | None:
        for member in self.living():
            if member.machine.role in roles and self.mount.lives(member.directory):
                return member
        return None

    def call(self, member: Member, call: Callable[..., None], *args: Any) -> None:
        """Something reaches a process: when it wakes, if it is paused."""
        if member.is_paused:
            member.parked.append((call, *args))
        elif not member.is_dead:
            call(*args)

    # --- the network ------------------------------------------------------------------------------

    def is_cut(self, one: Member, other: Member) -> bool:
        return bool(self.cuts) and frozenset((one.name, other.name)) in self.cuts

    def reached_by(self, member: Member) -> frozenset[str]:
        """Whom a member has a live connection with."""
        return frozenset(
            m.name
            for m in self.members.values()
            if m is not member and not m.is_dead and not m.is_paused and not self.is_cut(m, member)
        )

    def connect(self, stream: Stream) -> None:
        self._streams = [s for s in self._streams if s.is_open]
        self._streams.append(stream)
        if self.is_cut(stream.writer, stream.follower) or stream.writer.is_paused:
            self.at(UNANSWERED, self._drop_if_silent, stream)

    def send(self, stream: Stream, to: Member, call: Callable[..., None], *args: Any) -> None:
        """One message, behind all that were sent on this connection."""
        if not stream.is_open:
            return
        if self.is_cut(stream.writer, stream.follower):
            stream.held.append((to, call, *args))
            return
        stream.last = arrives = max(stream.last, self.now + self.delay())
        self.at(arrives - self.now, self.call, to, call, to, stream, *args)

    def break_off(self, stream: Stream) -> None:
        """Both sides learn that a connection has ended; what was on its way may still arrive."""
        if stream.is_open:
            stream.is_open = False
            for side in (stream.writer, stream.follower):
                self.at(self.delay(), self.call, side, side.hung_up, stream)

    def _drop_if_silent(self, stream: Stream) -> None:
        silent = self.is_cut(stream.writer, stream.follower)
        if silent or any(m.is_paused or m.is_dead for m in (stream.writer, stream.follower)):
            self.break_off(stream)

    def _drop_silent(self, of: Member | None = None) -> None:
        for stream in self._streams:
            if stream.is_open and (of is None or of in (stream.writer, stream.follower)):
                self.at(UNANSWERED, self._drop_if_silent, stream)

    def cut(self, pairs: list[frozenset[str]]) -> None:
        self.cuts.update(pairs)
        self.network_at = self.now
        self._drop_silent()

    def heal(self, pairs: list[frozenset[str]]) -> None:
        self.cuts.difference_update(pairs)
        self.network_at = self.now
        for stream in self._streams:
            if stream.held and not self.is_cut(stream.writer, stream.follower):
                held, stream.held = stream.held, []
                for to, call, *args in held:
                    self.send(stream, to, call, *args)
        self.disturb()

    # --- faults -----------------------------------------------------------------------------------

    def disturb(self, seconds: float = 0.0) -> None:
        """The world is not at peace, for some time: what I6 promises counts from its end."""
        self.disturbed_at = max(self.disturbed_at, self.now + seconds)

    def trouble(self, member: Member) -> None:
        member.troubled_at = self.now
        self.disturb()

    def kill(self, member: Member, *, with_machine: bool = False) -> None:
        """The process dies. With its machine: no connection says so, and its lock lingers."""
        self.trouble(member)
        member.is_dead = True
        if with_machine:
            self._drop_silent(member)
            self.at(LOCK_LINGERS, self._unlock, member)
            return
        self._unlock(member)
        for stream in self._streams:
            if member in (stream.writer, stream.follower):
                self.break_off(stream)

    def _unlock(self, member: Member) -> None:
        for epoch in [e for e, name in self.mount.locks.items() if name == member.name]:
            del self.mount.locks[epoch]

    def ends(self, member: Member, failure: str) -> None:
        """A process has ended by itself."""
        if "settled" in failure:
            raise Violation(f"I2: {member.name} ends: {failure}")
        self.kill(member)

    def pause(self, member: Member, seconds: float) -> None:
        self.trouble(member)
        member.is_paused = True
        self._drop_silent(member)
        self.at(seconds, self.wake, member)

    def wake(self, member: Member) -> None:
        if not member.is_paused:
            return
        self.say(f"{member.name} wakes")
        self.trouble(member)
        member.is_paused = False
        member.woke_at = self.now
        parked, member.parked = member.parked, []
        if self.rng.random() < 0.5:  # which of its threads comes first is anybody's guess
            parked.sort(key=lambda entry: entry[0].__name__ == "_step")
        for number, (call, *args) in enumerate(parked):
            self.at(number * 1e-6, self.call, member, call, *args)

    def hang(self, member: Member, seconds: float) -> None:
        self.trouble(member)
        member.is_hung, member.hung_at = True, self.now
        self.at(seconds, self.unhang, member)

    def unhang(self, member: Member) -> None:
        if not member.is_hung:
            return
        self.say(f"{member.name}'s mount answers")
        self.trouble(member)
        member.is_hung, member.hung_at = False, self.now
        stuck, member.stuck = member.stuck, []
        for thread in stuck:
            self.at(self.latency(), member._step, thread)

    def _victim(self) -> Member | None:
        living = self.living()
        reigning = self._reigning((*WRITING, Role.RECOVERING))
        if reigning is not None and self.rng.random() < 0.6:
            return reigning
        return self.rng.choice(living) if living else None

    def fault(self) -> None:
        """One of FAULTS, to somebody, for some time."""
        rng = self.rng
        kind, victim = rng.choice(self._faults), self._victim()
        lasts = rng.choice((0.1, 0.5, 1.5, 4.0)) * (0.5 + rng.random())
        if victim is None:
            self.join()
            self.disturb()
            return
        if victim.machine.role is Role.WRITER:
            self.run_into_commit(victim)
        if victim.is_dead:
            return
        self.say(f"FAULT {kind} {victim.name} ({lasts:.2f} s)")
        self.disturb()
        getattr(self, f"_fault_{kind}")(victim, lasts)

    def _fault_join(self, victim: Member, lasts: float) -> None:
        self.join()

    def _fault_kill(self, victim: Member, lasts: float) -> None:
        self.kill(victim)

    def _fault_crash(self, victim: Member, lasts: float) -> None:
        self.kill(victim, with_machine=True)

    def _fault_pause(self, victim: Member, lasts: float) -> None:
        if not victim.is_paused:
            self.pause(victim, lasts)

    def _fault_hang(self, victim: Member, lasts: float) -> None:
        if not victim.is_hung:
            self.hang(victim, lasts)

    def _fault_cut(self, victim: Member, lasts: float) -> None:
        others = [m.name for m in self.living() if m is not victim]
        self._cut_for(victim, self.rng.sample(others, min(1, len(others))), lasts)

    def _fault_isolate(self, victim: Member, lasts: float) -> None:
        self._cut_for(victim, [m.name for m in self.living() if m is not victim], lasts)

    def _cut_for(self, victim: Member, others: list[str], lasts: float) -> None:
        pairs = [frozenset((victim.name, other)) for other in others]
        self.cut(pairs)
        self.at(lasts, self.heal, pairs)

    def _fault_power(self, victim: Member, lasts: float) -> None:
        self.mount.lose_power()
        for member in self.living():
            if not member.is_hung:
                self.hang(member, 0.3 * self.rng.random())

    def _fault_locks(self, victim: Member, lasts: float) -> None:
        self.mount.locks.clear()

    def _fault_handover(self, victim: Member, lasts: float) -> None:
        self.trouble(victim)
        self.call(victim, lambda: victim.do(victim.machine.handover(self.now)))

    def _fault_stop(self, victim: Member, lasts: float) -> None:
        self.trouble(victim)
        self.call(victim, lambda: victim.do(victim.machine.stop(self.now)))

    # --- what must hold ---------------------------------------------------------------------------

    def claims(self, member: Member) -> None:
        """I7: a claim is made for a reason."""
        writer = self._reigning((*WRITING, Role.RECOVERING))
        if writer is None or writer is member or member.was_offered:
            return
        calm_since = self.now - AFTER
        if writer.is_paused or writer.is_hung or writer.troubled_at > calm_since:
            return
        streams = member.machine.streams and member.machine.follows == writer.name
        if writer.reigns_since > calm_since:
            return
        if writer.machine.epoch not in self.mount.locks and not streams:
            return
        if self.network_at > calm_since or (
            self.is_cut(member, writer) and self._outreaches(member, writer)
        ):
            return
        raise Violation(
            f"I7: {member.name} claims, though {writer.name} writes, beats and is reached"
        )

    def closes(self, member: Member) -> None:
        """I7: a writer that only slept does not close its clients."""
        has_slept = (
            member.woke_at > self.now - AFTER / 4 and member.hung_at < member.woke_at - 6 * AFTER
        )
        if has_slept and member is self.writer():
            raise Violation(f"I7: {member.name} closes its clients after its own pause")

    def _outreaches(self, member: Member, writer: Member) -> bool:
        others = [m for m in self.members.values() if m not in (member, writer)]
        if any(m.troubled_at > self.now - 1.5 * AFTER for m in others):
            return True  # their files may still say what was
        others = [m for m in others if not (m.is_dead or m.is_paused or m.is_hung)]
        mine = sum(not self.is_cut(m, member) for m in others)
        return mine > sum(not self.is_cut(m, writer) for m in others)

    def peace(self) -> None:
        """I6: long enough after the last fault, all is well again."""
        healthy, writer = self.healthy(), self.writer()
        is_settled = writer in healthy and writer.reigns_since < self.now - JOINS_WITHIN
        if self.judge.answered_at < self.now - 1.5:
            raise Violation(f"I6: no change was answered since {self.judge.answered_at:.2f}")
        for member in self.living():
            machine = member.machine
            is_well = member in healthy
            if machine.role in WRITING and member is not writer and is_well:
                raise Violation(f"I6: {member.name} still takes itself for the writer")
            if (
                machine.role in WRITING
                and member.is_hung
                and machine.is_open
                and not member.is_paused
            ):
                raise Violation(f"I6: clients wait at {member.name}, whose mount hangs")
            if not is_well or writer is None:
                continue
            is_joined = machine.role is Role.WRITER or machine.streams
            if self.is_cut(member, writer):
                self._check_reach(member, writer)
                if machine.is_open and self.now - member.turned_at > 1.7 * AFTER:
                    raise Violation(
                        f"I6: clients wait at {member.name}, cut off from {writer.name}"
                    )
            elif is_settled and not (is_joined and machine.is_open):
                raise Violation(f"I6: {member.name} does not serve: {machine.role}")

    def _check_reach(self, member: Member, writer: Member) -> None:
        """F5: whom more cannot reach than can another does not stay the writer."""
        calm_since = self.now - AFTER - RECOVERS_WITHIN + 0.01
        others = [m for m in self.members.values() if m not in (member, writer)]
        is_calm = self.network_at <= calm_since and all(m.troubled_at <= calm_since for m in others)
        if is_calm and self._outreaches(member, writer):
            raise Violation(f"I6: {writer.name} is not replaced, though more reach {member.name}")

    # --- the schedule -----------------------------------------------------------------------------

    def run(self) -> int:
        """Run the whole schedule; the number of steps it took. Raises Violation."""
        rng = self.rng
        for _ in range(rng.choice((2, 3, 3, 4))):
            self.join()
        self.run_until(0.3 + rng.random() + rng.choice((0.0, 4 * self.slowness)))
        for _ in range(rng.choice((1, 1, 2))):
            for _ in range(rng.choice((1, 1, 2, 3))):
                self.fault()
                self.run_until(self.now + rng.random() ** 2 * rng.choice((1.0, 2.0)))
            self._calm()
        return self.steps

    def _calm(self) -> None:
        """Let things end, and wait for peace; faults that last long may outlast it."""
        if not self.healthy():
            self.join()
            self.disturb()
        self.is_quiet = self.rng.random() < 0.2
        at_last = self.now + NO_PEACE
        in_full = self.rng.random() < 0.4  # nothing happens any more once all serve
        while True:
            until = self.disturbed_at + AFTER + RECOVERS_WITHIN
            if self.now >= until:
                break
            if self.now > at_last:
                raise Violation("I6: takeovers without an end")
            if self.is_quiet and self.now >= until - ANSWERS_WITHIN:
                self._check_pretenders()
                self.is_quiet = False
            step = until - ANSWERS_WITHIN if self.is_quiet else until
            self.run_until(step if in_full else min(step, self.now + 0.4))
            if not self.healthy():
                self.join()
                self.disturb()
            elif not in_full and self._all_serve():
                self.is_quiet = False
                return
        self.peace()

    def _check_pretenders(self) -> None:
        """F5: a writer without a client learns from its beats that it was deposed."""
        writer = self.writer()
        if writer is None or writer.reigns_since > self.now - AFTER / 2:
            return
        for member in self.healthy():
            if member.machine.role in WRITING and member is not writer:
                raise Violation(f"I6: {member.name} still takes itself for the writer")

    def _all_serve(self) -> bool:
        """Nothing is amiss, and changes go on."""
        return (
            self.judge.answered_at > self.disturbed_at
            and not self.cuts
            and all(
                member.machine.is_open
                and not (member.is_paused or member.is_hung)
                and (member.machine.role is Role.WRITER or member.machine.streams)
                for member in self.living()
            )
        )
