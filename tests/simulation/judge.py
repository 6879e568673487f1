"""The judge: sees every proof, answer and shown state of all members, and knows what must hold.

I1  one member answers for an epoch, and no proof of a lower epoch succeeds once a higher one has read.
I2  whatever was answered, streamed or shown is in every later writer's state, in its place.
I4  no client of a member is shown an older state than before.
I6  with a mount that answers and a member that lives, changes go on within takeover_after + 2 s of
    any fault, and every member that can serves its clients by then; one that cannot has closed them.
I7  nobody claims against a writer that lives, beats and is reached (safety does not need it: peace does).

I3 (exactly once) and I5 (strong reads) rest on forwarding, which the model does not carry yet: `answered`
and `shown` are where they will be judged.
"""

from __future__ import annotations

__all__ = ["Judge", "Violation"]


class Violation(AssertionError):
    """An invariant does not hold."""


class Judge:
    """The history as it was told to anybody, and who has read, answered and seen it."""

    def __init__(self) -> None:
        self.history: list[str] = []  # settled changes: the place is the number
        self.answered_at = -1.0  # when a change was last answered
        self._writers: dict[int, str] = {}
        self._read_by = 0  # the highest epoch that has read the store
        self._floors: dict[str, int] = {}  # by member: the state that its clients have seen

    def reads(self, epoch: int) -> None:
        """A claimant of this epoch reads the store."""
        self._read_by = max(self._read_by, epoch)

    def proves(self, member: str, epoch: int) -> None:
        """A proof succeeds on the mount's server."""
        if epoch < self._read_by:
            raise Violation(
                f"I1: {member} proves epoch {epoch}, but epoch {self._read_by} has read"
            )
        if self._writers.setdefault(epoch, member) != member:
            raise Violation(f"I1: {member} and {self._writers[epoch]} both prove epoch {epoch}")

    def serves(self, member: str, epoch: int, state: list[str]) -> None:
        """A new writer begins to serve this state, which its head has made durable."""
        told = self.history
        if state[: len(told)] != told:
            raise Violation(f"I2: {member} (epoch {epoch}) serves {state}; it was told {told}")
        self.history = list(state)
        self._floors[member] = len(state)

    def answered(self, now: float, member: str, first: int, changes: list[str]) -> None:
        """A writer answers changes (I3 will be judged here)."""
        for number, change in enumerate(changes, first):
            if number > len(self.history) + 1:
                raise Violation(f"I2: {member} answers change {number} after {len(self.history)}")
            if number == len(self.history) + 1:
                self.history.append(change)
            elif self.history[number - 1] != change:
                was = self.history[number - 1]
                raise Violation(f"I2: {member} answers {change} as change {number}, which is {was}")
        self.answered_at = now
        self._floors[member] = max(self._floors.get(member, 0), first + len(changes) - 1)

    def shown(self, member: str, state: list[str]) -> None:
        """A member's clients can see this state now (I5 will be judged here)."""
        if state != self.history[: len(state)]:
            raise Violation(f"I2: {member} shows {state}; settled is {self.history}")
        if len(state) < self._floors.get(member, 0):
            raise Violation(f"I4: {member} shows change {len(state)} after {self._floors[member]}")
        self._floors[member] = len(state)
