"""What the takeover protocol asks of its driver: one class an action, done in the order it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "Abandon",
    "Action",
    "Beat",
    "Claim",
    "CloseClients",
    "Disconnect",
    "End",
    "Follow",
    "Hold",
    "Look",
    "Offer",
    "OpenClients",
    "Position",
    "Recover",
    "Resume",
    "Serve",
    "StepDown",
]


class Position(NamedTuple):
    """A state of the index: the epoch that it was got from, and the number of its last change."""

    epoch: int
    change: int


@dataclass(frozen=True, slots=True)
class Look:
    """List staging/, try the locks, read the members' files; then looked()."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Publish one's own file. For an epoch: a proof, by a rename out of its staging directory (F5)."""

    epoch: int  # 0: as a follower


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim the next epoch (C1, C2); then claimed() or withdrawn()."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Let go of an epoch that was claimed too late to be of use."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Recover:
    """Read the store for a claimed epoch, publish and prove the head; then recovered(), or withdrawn().

    `own`: over the core that is there, else from the files into a fresh one. Nothing of either is shown
    before Serve."""

    epoch: int
    own: bool


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer changes as the writer of this epoch; stream to followers."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StepDown:
    """Stop writing, drop the core and whatever was not settled; keep the clients' unanswered changes."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Follow:
    """Connect to a writer and ask for the stream from `position` on, None: for a snapshot."""

    member: str
    position: Position | None


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop the stream from this member; nothing of it is applied any more."""

    member: str


@dataclass(frozen=True, slots=True)
class OpenClients:
    """Take clients' connections."""


@dataclass(frozen=True, slots=True)
class CloseClients:
    """Close the clients' connections and take no new ones: another server can do more for them."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Take no more changes: settle those that are there, keep the others unanswered."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Once all that was taken is settled and streamed, offer the place to this follower."""

    member: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Take changes again: the offer came to nothing."""


@dataclass(frozen=True, slots=True)
class End:
    """Leave: answer what can be answered, close, exit. A `failure` is told, with an exit code."""

    failure: str = ""


Action = (
    Look
    | Beat
    | Claim
    | Abandon
    | Recover
    | Serve
    | StepDown
    | Follow
    | Disconnect
    | OpenClients
    | CloseClients
    | Hold
    | Offer
    | Resume
    | End
)
