"""Who writes: one member's decisions, as a state machine that sees and does nothing itself.

The rules that govern it:

1. What a member *does* as writer is kept right by the mount alone: each answer rests on a proof (W3).
   What it decides here may be late or wrong, and still no change is lost or answered twice.
2. Time only ever passes as the argument `now`, in seconds of this process's own monotonic clock, and no
   two members' clocks are compared. Time that this process slept through does not count, and no claim is
   made without a look after the back-off: one that was paused, or whose mount hung, does not take its
   own absence for the writer's.

Theory of operation. The caller tells what happened (the methods below "events") and does, in their
order, the actions that each returns; it asks `wake_at` when to call tick() at the latest. Operations on
the mount may take for ever; of looks and of beats at most one of each is under way.

    FOLLOWER ---- Claim ----> CLAIMING --claimed: Recover--> RECOVERING --recovered: Serve--> WRITER
        ^                        |                               |                              |
        +----- withdrawn --------+------ withdrawn, deposed -----+-- deposed, told of a higher -+

A *reign* is an epoch as seen from outside. It lives while its beats change (F5) and its lock is not seen
free, and the highest living one is the leader. A writer that was deposed cannot beat, so a living reign
is one that nobody has fenced. Without any, the place is vacant, and a member claims it after a back-off
(C8). A leader that beats, but that this member cannot reach, is replaced only if more members reach this
one than that one (F5).

A member's own core is worth continuing only while all in it is settled: `position` says how far, and is
None from the moment that anything may be in it which no proof has settled (F1): while it is written to,
while a claimant replays what it merely read, while a snapshot has not passed its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from pkgindex.cluster.actions import (
    Abandon,
    Action,
    Beat,
    Claim,
    CloseClients,
    Disconnect,
    End,
    Follow,
    Hold,
    Look,
    Offer,
    OpenClients,
    Position,
    Recover,
    Resume,
    Serve,
    StepDown,
)

__all__ = ["Role", "Sight", "Takeover"]

LOOK_SECONDS = 0.1  # from one look to the next: what a killed writer's clients wait for at least
BEATS = 5  # in takeover_after: several may be late, on a busy mount, before anybody minds

#: Looks in a row that find a lock free: a claimant makes its directory a moment before it locks.
FREE_LOOKS = 2

#: Of takeover_after, before a member without a writer sends its clients away. One that may replace a writer
#: whom nobody reaches finds that out after takeover_after, and its clients are to see a delay, no more.
PATIENCE = 1.5

#: Seconds before a claim (C8); the longest has to fit into "takeover_after and two seconds".
FIRST_BACKOFF, LONGEST_BACKOFF = 0.05, 1.0


class Sight(NamedTuple):
    """A member's file on the mount, as a look found it."""

    member: str
    epoch: int  # that it writes for, or recovers for; 0: it follows
    serves: bool  # its head is proven (C6)
    beat: int  # another with every beat
    reaches: frozenset[str]  # members that it has a live connection with, both ways


class Role(Enum):
    """What a member is; HUNG is a writer whose proofs do not return."""

    FOLLOWER = "follower"
    CLAIMING = "claiming"
    RECOVERING = "recovering"
    WRITER = "writer"
    HUNG = "hung"
    ENDED = "ended"


class _Reign:
    """An epoch, as this member has seen it."""

    __slots__ = ("beat_at", "free_looks", "member", "serves")

    def __init__(self, now: float) -> None:
        self.member = ""  # as long as no beat of it was seen
        self.serves = False
        self.beat_at = now  # when a look had ended that showed another beat than before
        self.free_looks = 0  # looks in a row that found its lock free


class _Member:
    """Another member, as its file shows it."""

    __slots__ = ("beat_at", "sight")

    def __init__(self, sight: Sight, now: float) -> None:
        self.sight = sight
        self.beat_at = now


class Takeover:
    """One member's part in the takeover protocol.

    `member`: its id; `takeover_after`: seconds of silence before a writer is replaced; `draw`: a random
    number in [0, 1) at each call; `look_every`: seconds from one look to the next. Any time may be the
    first; times never go back."""

    def __init__(
        self,
        member: str,
        takeover_after: float,
        draw: Callable[[], float],
        look_every: float = LOOK_SECONDS,
    ) -> None:
        self.member = member
        self.role = Role.FOLLOWER
        self.epoch = 0  # one's own, from `claimed` to stepping down
        self.highest = 0  # epoch known to have served (F1)
        self.position: Position | None = None  # of one's own core, if all in it is settled
        self.shown = Position(0, 0)  # the highest state that a client may have seen
        self.follows = ""  # the member whose stream is taken, or asked for
        self.streams = False  # that stream is there
        self.is_open = False  # clients are served
        self._after = takeover_after
        self._step = takeover_after / BEATS  # from beat to beat; at most from event to event
        self._draw = draw
        self._look_every = look_every
        self._told_at = -math.inf  # the caller's time at the last event
        self._now = 0.0  # seconds that this process was awake
        self._reigns: dict[int, _Reign] = {}
        self._members: dict[str, _Member] = {}
        self._current: set[str] = set()  # followers that are up to date, while writer
        self._is_vacant = False  # nobody writes, or one whom more cannot reach than can this member
        self._blind = True  # nothing was looked at since what was known was overturned
        self._looking = self._late_look = self._beating = self._calling = False
        self._look_at = self._beat_at = self._call_at = 0.0
        self._looked_at = self._well_at = 0.0
        self._asked_at = self._saw_at = (
            0.0  # when the look under way, and the last that ended, began
        )
        self._claim_at = self._offer_until = math.inf
        self._offered = ""  # the follower that the place is offered to
        self._claims = 0  # in vain, since anybody served
        self._passes = 0.0  # the change that the stream must pass before the core is settled
        self._streamed = 0
        self._leaving = False
        self._out: list[Action] = []

    # --- events -----------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Time passed."""
        self._age(now)
        return self._decide()

    def looked(
        self, now: float, locks: Mapping[int, bool], sights: Iterable[Sight]
    ) -> list[Action]:
        """A look has ended: the epochs in staging/, each with whether its lock is held (or cannot be
        known), and the members' files."""
        self._age(now)
        self._looking = False
        if self._late_look:  # it began before a pause, or before all was overturned
            self._late_look = False
            return self._decide()
        self._saw_at, self._looked_at = self._asked_at, self._now
        self._look_at = self._now + self._look_every
        self._blind = False
        for epoch, held in locks.items():
            reign = self._reign_of(epoch)
            reign.free_looks = 0 if held else reign.free_looks + 1
        there = set()
        for sight in sights:
            if sight.member != self.member:
                there.add(sight.member)
                self._saw(sight)
        self._forget_gone(there)
        self._forget_fenced()
        return self._decide()

    def told(self, now: float, epoch: int) -> list[Action]:
        """Another member says that this epoch has served."""
        self._age(now)
        self._served(epoch)
        return self._decide()

    def claimed(self, now: float, epoch: int, base: int) -> list[Action]:
        """The claim was won. `base`: the change after which the journal begins, so that it continues any
        core that has reached that."""
        self._age(now)
        if self.role is not Role.CLAIMING or epoch <= self.highest:
            self._out.append(Abandon(epoch))
            if self.role is Role.CLAIMING:
                self._withdraw()
            return self._decide()
        self._leave_stream()
        self.role, self.epoch = Role.RECOVERING, epoch
        own = self._continues(base)
        self._claimant_reads()
        self._is_vacant = False
        self._well_at = self._now
        self._beating, self._beat_at = False, self._now
        self._out.append(Recover(epoch, own))
        return self._decide()

    def withdrawn(self, now: float, epoch: int = 0) -> list[Action]:
        """The claim (0), or the recovery of this epoch, ended without success: another has claimed
        meanwhile, or the mount failed."""
        self._age(now)
        if self.role is (Role.RECOVERING if epoch else Role.CLAIMING) and epoch == self.epoch:
            self._withdraw()
        return self._decide()

    def recovered(self, now: float, epoch: int, change: int) -> list[Action]:
        """The store is read up to `change`, and one's own head is durable and proven (C6)."""
        self._age(now)
        if self.role is not Role.RECOVERING or epoch != self.epoch:
            return self._decide()
        if change < self.shown.change:
            was = self.shown.change
            return self._end(f"the store ends at change {change}, though change {was} was settled")
        self.role = Role.WRITER
        self._claims = 0
        self._well_at = self._now
        self._served(epoch)
        self._settle(epoch, change)
        self._beat_at = self._now  # the others are waiting to hear of it
        self._out.append(Serve(epoch))
        return self._decide()

    def proven(self, now: float, epoch: int) -> list[Action]:
        """A beat of this epoch has succeeded (0: that of a follower)."""
        self._age(now)
        if epoch == self.epoch:
            self._beating = False
            self._is_well()
        return self._decide()

    def settled(self, now: float, epoch: int, change: int) -> list[Action]:
        """This writer's changes up to this one are durable and proven."""
        self._age(now)
        if epoch == self.epoch and epoch:
            self._settle(epoch, change)
            self._is_well()
        return self._decide()

    def deposed(self, now: float, epoch: int) -> list[Action]:
        """A proof of this epoch found its staging directory gone."""
        self._age(now)
        if epoch == self.epoch and epoch:
            self._step_down()
        return self._decide()

    def failed(self, now: float, epoch: int, why: str) -> list[Action]:
        """A write, sync or proof of this epoch failed otherwise: final (W7)."""
        self._age(now)
        return self._end(why) if epoch == self.epoch and epoch else self._decide()

    def welcomed(
        self, now: float, member: str, epoch: int, change: int, *, fresh: bool
    ) -> list[Action]:
        """The writer of `epoch`, who has settled up to `change`, sends its stream: `fresh` with a snapshot
        before it, else from one's own position on."""
        self._age(now)
        if not self._may_follow(member, epoch, change):
            self._out.append(Disconnect(member))
            return self._gone(member)
        self.follows, self.streams, self._calling = member, True, False
        self._served(epoch)
        self._claims = 0
        self._streamed = change
        self._passes = math.inf if fresh else 0
        if fresh:
            self.position = None
        elif self.position is not None and self.position.change == change:
            self._settle(epoch, change)  # it lacks nothing, and perhaps nothing comes for long
        return self._decide()

    def snapshot_ended(self, now: float, member: str, epoch: int, change: int) -> list[Action]:
        """The snapshot's last slice was taken when the writer's core was at `change`, settled or not."""
        self._age(now)
        if member == self.follows and self.streams:
            self._passes = self._good_from(change)
            self._advance(epoch)
        return self._decide()

    def applied(self, now: float, member: str, epoch: int, change: int) -> list[Action]:
        """Settled changes from the stream, up to this one, are in the core."""
        self._age(now)
        if member == self.follows and self.streams:
            self._streamed = change
            self._advance(epoch)
        return self._decide()

    def lost(self, now: float, member: str) -> list[Action]:
        """The stream from this member, or the attempt to get one, came to its end."""
        self._age(now)
        return self._gone(member)

    def follower(self, now: float, member: str, *, current: bool) -> list[Action]:
        """A follower of this writer is up to date, or is not (any more)."""
        self._age(now)
        (self._current.add if current else self._current.discard)(member)
        if member == self._offered and not current:
            # It has claimed, as a proof will tell in a moment, or it has left as well.
            self._offer_until = min(self._offer_until, self._now + self._step)
        return self._decide()

    def handover(self, now: float, to: str = "") -> list[Action]:
        """Somebody asks this writer to hand over: to a member, or to any that is up to date."""
        self._age(now)
        self._hand_over(to)
        return self._decide()

    def offered(self, now: float, member: str, epoch: int) -> list[Action]:
        """The writer that is followed has settled and streamed everything, and offers its place."""
        self._age(now)
        is_current = self.position is not None and self.position.epoch == epoch == self.highest
        if self.role is Role.FOLLOWER and member == self.follows and self.streams and is_current:
            self._claim()
        return self._decide()

    def stop(self, now: float) -> list[Action]:
        """This process is asked to end: a writer hands over first, if anybody is there to take it."""
        self._age(now)
        self._leaving = True
        self._hand_over("")
        return self._decide() if self._offered else self._end("")

    @property
    def wake_at(self) -> float:
        """The time by which tick() is to be called, if nothing else happens before."""
        if self.role is Role.ENDED:
            return math.inf
        at = min(self._offer_until, self._now + self._step)
        if self._now < self._claim_at < at:
            at = self._claim_at
        if self._look_at < at and not self._looking and not self.epoch:
            at = self._look_at
        if self._beat_at < at and not self._beating:
            at = self._beat_at
        return self._told_at + max(0.0, at - self._now)

    # --- decisions --------------------------------------------------------------------------------

    def _decide(self) -> list[Action]:
        """Say what is due, by all that is known."""
        if self.role in (Role.FOLLOWER, Role.CLAIMING):
            self._seek()
        elif self.role in (Role.WRITER, Role.HUNG):
            self._reign()
        if self.role is not Role.ENDED:
            self._mind_clients()
            self._look_and_beat()
        return self._taken()

    def _seek(self) -> None:
        """A follower looks for its writer, and for a vacant place."""
        if self._blind:
            return
        leader = self._leader()
        if leader is not None and leader.serves:
            self._turn_to(leader.member)
        if self.streams:
            self._well_at = self._now
        elif leader is None or not leader.serves:
            self._well_at = (
                self._looked_at
            )  # there is nowhere better to be, while the mount answers
        is_cut_off = self._is_cut_off(self._after)
        self._is_vacant = leader is None or (is_cut_off and self._outreaches(leader.member))
        if not self._is_vacant:
            self._claim_at = math.inf
        elif self.role is Role.FOLLOWER:
            if self._claim_at == math.inf:
                self._claim_at = self._now + self._backoff()
            if self._has_looked_since(self._claim_at):
                self._claim()
            elif self._now >= self._claim_at:
                self._look_at = self._now

    def _turn_to(self, member: str) -> None:
        if member != self.follows:
            self._leave_stream()
            self.follows, self._call_at = member, self._now
            self._well_at = self._now  # it is this one that it is to be cut off from
        if not self.streams and not self._calling and self._now >= self._call_at:
            self._calling = True
            self._out.append(Follow(member, self.position))

    def _reign(self) -> None:
        """A writer minds whether its proofs return, and what became of its offer."""
        if self._is_hung():
            self.role = Role.HUNG
        if self._now >= self._offer_until:
            in_vain, self._offered, self._offer_until = self._offered, "", math.inf
            if not self._leaving:
                self._out.append(Resume())
                return
            self._current.discard(in_vain)
            if not self._hand_over(""):
                self._leave("")

    def _mind_clients(self) -> None:
        """Clients stay while their changes go on here, or may soon; they go when only elsewhere they can."""
        if self.role is Role.HUNG:
            helps = False
        elif self.role is Role.WRITER or (self.streams and self.position is not None):
            helps = True
        else:
            is_claimant = self._is_vacant or self.role is Role.CLAIMING
            may_claim = is_claimant and self._now - self._looked_at < self._after
            helps = self.is_open and (may_claim or not self._is_cut_off(PATIENCE * self._after))
        if helps != self.is_open:
            self.is_open = helps
            self._out.append(OpenClients() if helps else CloseClients())

    def _look_and_beat(self) -> None:
        """On time, one of each under way. Who has an epoch need not look: its proofs tell it. Every
        member beats in every role, during recovery and idle too (F5)."""
        if self._now >= self._look_at and not self._looking and not self.epoch:
            self._looking, self._asked_at = True, self._now
            self._out.append(Look())
        if self._now >= self._beat_at and not self._beating:
            self._beating = True
            self._beat_at = self._now + self._step
            self._out.append(Beat(self.epoch))

    # --- the rules, each in one place -------------------------------------------------------------

    def _leader(self) -> _Reign | None:
        """The reign of the highest epoch that lives."""
        leader, highest = None, 0
        for epoch, reign in self._reigns.items():
            if epoch > highest and self._lives(reign):
                leader, highest = reign, epoch
        return leader

    def _lives(self, reign: _Reign) -> bool:
        """F5: whether an epoch's process is there and gets to the mount, as far as this member can tell.

        A lock found free means nothing while the stream is there: a mount's server that was started
        again has forgotten its locks (L1)."""
        streams = self.streams and reign.member == self.follows
        return self._silence(reign) < self._after and (reign.free_looks < FREE_LOOKS or streams)

    def _silence(self, of: _Reign | _Member) -> float:
        """Seconds that it has surely not beaten: until the last look *began*, at least as old as what it
        showed, from when the one *ended* that showed its last beat."""
        return self._saw_at - of.beat_at

    def _may_follow(self, member: str, epoch: int, change: int) -> bool:
        """F1: never a lower epoch than the highest seen, nor a state below one's own; nor a member that
        one has turned away from, and that welcomes late."""
        is_asked = member == self.follows and not self.epoch
        return is_asked and epoch >= self.highest and change >= self.shown.change

    def _continues(self, base: int) -> bool:
        """F1: one's own core is used only if the journal continues it without a gap."""
        return self.position is not None and base <= self.position.change

    def _good_from(self, end: int) -> float:
        """F1: a snapshot taken in slices is good once the stream has passed the core's last change."""
        return end

    def _claimant_reads(self) -> None:
        """F1, C6: what a claimant replays into its core may be lost yet, until its own head is proven."""
        self.position = None

    def _deposed_writer_drops(self) -> None:
        """F1: what a deposed writer has in its core may never have become durable: a fresh snapshot."""
        self.position = None

    def _is_cut_off(self, seconds: float) -> bool:
        """Whether another serves, or may, and this member could not get to it for so long."""
        return self._now - self._well_at >= seconds

    def _outreaches(self, writer: str) -> bool:
        """F5: whether more of the others reach this member than reach the writer."""
        others = [
            other.sight.reaches
            for name, other in self._members.items()
            if name != writer and self._silence(other) < self._after
        ]
        mine = sum(self.member in reaches for reaches in others)
        return mine > sum(writer in reaches for reaches in others)

    def _is_hung(self) -> bool:
        """Whether no proof has returned for takeover_after: by now another may have taken over."""
        return self._now - self._well_at >= self._after

    def _has_looked_since(self, due: float) -> bool:
        """C8: whether a look that began after the back-off has found the place still vacant. What one
        brings that has hung for long was true once."""
        return self._saw_at >= due and self._looked_at - self._saw_at < self._after

    def _backoff(self) -> float:
        """C8: seconds before the next claim: random, and growing with each in vain."""
        return self._draw() * min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0**self._claims)

    def _withdraw(self) -> None:
        """C8: look again before anything else: whoever won is to be followed."""
        self._begin_again()

    # --- changes of what is known -----------------------------------------------------------------

    def _age(self, now: float) -> None:
        """Let the time pass that this process was awake: a longer step was a pause."""
        passed = now - self._told_at
        self._now += min(self._step, passed)
        self._told_at = now
        if passed > 2 * self._step:  # timers are late by less
            self._late_look = self._looking

    def _taken(self) -> list[Action]:
        out, self._out = self._out, []
        return out

    def _claim(self) -> None:
        self.role = Role.CLAIMING
        self._claim_at = math.inf
        self._claims += 1
        self._out.append(Claim())

    def _begin_again(self) -> None:
        self.role, self.epoch = Role.FOLLOWER, 0
        self._blind, self._late_look, self._is_vacant = True, self._looking, False
        self._claim_at = math.inf
        self._well_at = self._look_at = self._looked_at = self._saw_at = self._now
        self._beating, self._beat_at = False, self._now
        self._reigns.clear()

    def _step_down(self) -> None:
        self._out.append(StepDown(self.epoch))
        self._deposed_writer_drops()
        self._begin_again()
        self._offered, self._offer_until = "", math.inf
        self._current.clear()
        if self._leaving:
            self._leave("")

    def _is_well(self) -> None:
        """A proof has returned."""
        if self.epoch:
            self._well_at = self._now
        if self.role is Role.HUNG:
            self.role = Role.WRITER

    def _hand_over(self, to: str) -> bool:
        """Offer the place to this follower, or to any, unless that was done; whether anybody is there."""
        ready = min(self._current, default="") if not to else to if to in self._current else ""
        if self.role is Role.WRITER and ready and not self._offered:
            self._offered, self._offer_until = ready, self._now + self._after
            self._out += (Hold(), Offer(ready))
        return bool(self._offered)

    def _settle(self, epoch: int, change: int) -> None:
        self.position = Position(epoch, change)
        self.shown = max(self.shown, self.position)

    def _advance(self, epoch: int) -> None:
        if self._streamed >= self._passes:
            self._settle(epoch, self._streamed)

    def _served(self, epoch: int) -> None:
        """An epoch is known to have served: all below it are fenced for ever."""
        if epoch <= self.highest:
            return
        self.highest = epoch
        if 0 < self.epoch < epoch:
            self._step_down()
        self._forget_fenced()

    def _reign_of(self, epoch: int) -> _Reign:
        if epoch not in self._reigns:
            self._reigns[epoch] = _Reign(self._now)
        return self._reigns[epoch]

    def _saw(self, sight: Sight) -> None:
        known = self._members.get(sight.member)
        if known is not None and sight.beat == known.sight.beat:
            return
        self._members[sight.member] = _Member(sight, self._now)
        if sight.epoch:
            reign = self._reign_of(sight.epoch)
            reign.member, reign.serves, reign.beat_at = sight.member, sight.serves, self._now
            if sight.serves:
                self._served(sight.epoch)

    def _forget_fenced(self) -> None:
        for epoch in [epoch for epoch in self._reigns if epoch < self.highest]:
            del self._reigns[epoch]

    def _forget_gone(self, there: set[str]) -> None:
        """Let go of the members whose files are gone. As long as a file is there, that it is silent is
        remembered: it would count as a newcomer's, and so as alive, once more."""
        for name in self._members.keys() - there:
            del self._members[name]

    def _leave_stream(self) -> None:
        if self.follows:
            self._out.append(Disconnect(self.follows))
        self.follows, self.streams, self._calling = "", False, False

    def _gone(self, member: str) -> list[Action]:
        if member == self.follows:
            self.streams = self._calling = False
            self._call_at = self._now + self._look_every
        return self._decide()

    def _leave(self, failure: str) -> None:
        self.role = Role.ENDED
        self.is_open = False
        self._out.append(End(failure))

    def _end(self, failure: str) -> list[Action]:
        self._leave(failure)
        return self._taken()
