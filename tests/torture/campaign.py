"""What a fault campaign is, so that one runner can run them all, and report what each tried and found.

A module of this package that has campaigns lists them in `CAMPAIGNS`. A campaign is re-runnable from its
seed, tells how far it has come, counts what it did, and ends with the failures it found: each one a
sentence, with the seed and step that show it again.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Campaign", "Run"]


@dataclass
class Run:
    """One run of a campaign: what it is given, and what it says of itself."""

    seed: int
    full: bool  # the whole campaign, or the reduced form for CI
    folder: Path  # its own, empty; on a real disk
    seconds: float  # after which it should begin nothing new
    progress: Callable[[int, int], None] = lambda done, total: None
    counts: Counter[str] = field(default_factory=Counter)  # "kills": 100, "mutants caught": 5
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # parts that this machine cannot run, and why
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def scale(self, full: int, quick: int) -> int:
        """How many of something to do."""
        return full if self.full else quick

    def is_late(self, left: float = 0.0) -> bool:
        """Whether the time is up, but for `left` seconds that something else needs."""
        return time.monotonic() - self.began > self.seconds - left

    def fail(self, what: str) -> None:
        """Note a failure: what was promised, what was seen, and how to see it again."""
        self.failures.append(f"{what} (seed {self.seed})")


@dataclass(frozen=True)
class Campaign:
    """A named way of trying to break a promise."""

    name: str  # as on the command line: "kill"
    what: str  # one sentence for the report
    run: Callable[[Run], None]
    absent: Callable[[], str | None] = lambda: None  # why this machine cannot run it
    seconds: tuple[float, float] = (60.0, 600.0)  # what it may take: quick, full
    form: str = "full"  # which run has the whole of it: "full", "long" or "cluster"
    alone: bool = False  # it measures times, so nothing runs beside it
