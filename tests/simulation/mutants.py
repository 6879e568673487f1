"""The protocol with one rule left out, each for the simulation to catch: what passes them proves nothing."""

from __future__ import annotations

from typing import Any

from pkgindex.cluster.actions import Claim
from pkgindex.cluster.takeover import Role, Takeover
from tests.simulation.member import Member

__all__ = ["MUTANTS"]


class FollowsAny(Takeover):
    """F1: asks any member that says it serves, and follows it, to whatever epoch and state."""

    def _served(self, epoch: int) -> None:
        pass

    def _may_follow(self, member: str, epoch: int, change: int) -> bool:
        return not self.epoch

    def _turn_to(self, member: str) -> None:
        serving = sorted(name for name, m in self._members.items() if m.sight.serves)
        if self.streams:
            member = self.follows
        elif member != self.follows or self._now >= self._call_at:
            member = serving[int(self._draw() * len(serving))]
        super()._turn_to(member)


class OwnCoreAlways(Takeover):
    """F1: uses its own core though the journal does not continue it."""

    def _continues(self, base: int) -> bool:
        return self.position is not None


class KeepsWhatWasDeposed(Takeover):
    """F1: a deposed writer goes on from its own core."""

    def _deposed_writer_drops(self) -> None:
        pass


class KeepsWhatItRead(Takeover):
    """F1, C6: a claimant that withdraws goes on from what it merely read."""

    def _claimant_reads(self) -> None:
        pass

    def _deposed_writer_drops(self) -> None:
        if self.role is not Role.RECOVERING:
            super()._deposed_writer_drops()


class SnapshotAtOnce(Takeover):
    """F1: serves a snapshot before the stream has passed its end."""

    def _good_from(self, end: int) -> float:
        return 0


class SilentRecovery(Takeover):
    """F5: no heartbeat during recovery."""

    def _look_and_beat(self) -> None:
        if self.role is Role.RECOVERING:
            self._beat_at = self._now + self._step
        super()._look_and_beat()


class BeatsAlways(Member):
    """F5: the heartbeat is written past staging, so that a deposed writer can."""

    def proves_beats(self, epoch: int) -> bool:
        return False


class ReplacesUnreachable(Takeover):
    """F5: replaces a writer that it cannot reach, whoever else can."""

    def _outreaches(self, writer: str) -> bool:
        return True


class NeverOutreaches(Takeover):
    """F5: never replaces a writer that beats, though nobody reaches it."""

    def _outreaches(self, writer: str) -> bool:
        return False


class StaysDeposed(Takeover):
    """Goes on as writer though its proof has failed."""

    def _step_down(self) -> None:
        pass


class ClaimsAgainAtOnce(Takeover):
    """C8: claims again as soon as it had to withdraw, without back-off or a look."""

    def _withdraw(self) -> None:
        super()._withdraw()
        self.role = Role.CLAIMING
        self._out.append(Claim())


class ClaimsUnlooked(Takeover):
    """C8: claims on what it saw before its back-off."""

    def _has_looked_since(self, due: float) -> bool:
        return self._now >= due


class KeepsClients(Takeover):
    """A hung writer keeps its clients."""

    def _is_hung(self) -> bool:
        return False


class KeepsClientsCutOff(Takeover):
    """A follower that cannot get to the writer keeps its clients."""

    def _is_cut_off(self, seconds: float) -> bool:
        return False


class TrustsFreeLocks(Takeover):
    """L1: takes a lock found free for a death, though the stream is there."""

    def _lives(self, reign: Any) -> bool:
        return self._silence(reign) < self._after and not reign.free_looks


class CountsItsOwnAbsence(Takeover):
    """Takes the time of its own pause, or of its mount's, for the writer's silence."""

    def _age(self, now: float) -> None:
        self._now += min(now - self._told_at, 1e6)
        self._told_at = now


#: By name: what World is to be made with.
MUTANTS: dict[str, dict[str, Any]] = {
    "FollowsAny": {"takeover": FollowsAny, "faults": ("pause", "hang", "join")},
    "OwnCoreAlways": {"takeover": OwnCoreAlways, "faults": ("cut", "isolate", "kill")},
    "KeepsWhatWasDeposed": {"takeover": KeepsWhatWasDeposed, "faults": ("pause", "hang")},
    "KeepsWhatItRead": {
        "takeover": KeepsWhatItRead,
        "faults": ("kill", "pause", "hang", "join"),
        "slowness": 1.0,
    },
    "SnapshotAtOnce": {"takeover": SnapshotAtOnce},
    "SilentRecovery": {"takeover": SilentRecovery, "faults": ("kill",), "slowness": 1.0},
    "BeatsAlways": {"member": BeatsAlways, "faults": ("pause", "hang")},
    "ReplacesUnreachable": {"takeover": ReplacesUnreachable, "faults": ("cut",)},
    "NeverOutreaches": {"takeover": NeverOutreaches, "faults": ("isolate",)},
    "StaysDeposed": {"takeover": StaysDeposed, "faults": ("pause", "hang")},
    "ClaimsAgainAtOnce": {"takeover": ClaimsAgainAtOnce, "faults": ("kill",)},
    "ClaimsUnlooked": {"takeover": ClaimsUnlooked, "faults": ("pause", "hang")},
    "KeepsClients": {"takeover": KeepsClients, "faults": ("hang",)},
    "KeepsClientsCutOff": {"takeover": KeepsClientsCutOff, "faults": ("cut", "isolate")},
    "TrustsFreeLocks": {"takeover": TrustsFreeLocks, "faults": ("locks",)},
    "CountsItsOwnAbsence": {"takeover": CountsItsOwnAbsence, "faults": ("pause",)},
}
