"""Power loss, enumerated: every crash point of a recorded story, every state that may be left, recovered.

    with Recoveries(folder) as recoveries:
        trial = Trial(story, story.operations, seed=1)
        trial.run(recoveries)
    assert not trial.failures

A crash point is the moment after each operation that changes what a crash may leave, or what was
promised. At each one the states of crash_states() are recovered from by the product's own code, and the
index that comes out must be one that the messages explain: all that were answered by then, and at most
all that had arrived. A state that comes again is recovered once and judged each time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.torture.crash_states import Disk, Layout, crash_states
from tests.torture.operations import (
    SAYING,
    Do,
    Heard,
    Operation,
    Recording,
    Told,
    replay,
)
from tests.torture.power_lives import Life, is_heard, states_after
from tests.torture.power_recovery import Outcome, canonical, recover_each
from tests.torture.power_story import Progress, Story

__all__ = ["Recoveries", "Trial", "after_a_crash", "after_a_kill", "disk_at"]

#: States go to a worker so many at a time, and wait there at most so many at a time.
BATCH, WAITING = 32, 8

#: Every so many-th distinct state is recovered to the end: a change, a round, a stop, `check`.
TO_THE_END = 8

#: These are always recovered to the end.
WHOLE = ("nothing", "all", "[]")

#: States in memory, where no fsync takes time: it is not their laying out that is tested.
MEMORY = Path("/dev/shm")


class Recoveries:
    """Worker processes that recover from states."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self.known: dict[int, Outcome] = {}  # of each layout, by its hash: for all trials
        self._parent = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else folder
        self._workers = workers or min(4, len(os.sched_getaffinity(0)))

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="pkgindex-power-", dir=self._parent))
        self._pool = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def submit(self, states: list[tuple[int, Layout, bool]]) -> Future[list[tuple[int, Outcome]]]:
        """Recover from these; see recover_each."""
        return self._pool.submit(recover_each, self._folder, states)


@dataclass
class Trial:
    """The crash points of a story, or of what is left of it when some syncs are forgotten."""

    story: Story
    operations: Iterable[Operation]
    seed: int
    thorough: bool = True
    #: Of a second life: vary only what the first left volatile, and recover to the end more often.
    inherited: bool = False
    until_a_failure: bool = False
    #: Crash points before this place in the operations are passed over.
    begin: int = 0
    points: int = 0
    states: int = 0  # with those that came again
    distinct: int = 0
    to_the_end: int = 0
    failures: list[str] = field(default_factory=list)
    #: A few of the states, drawn at random: what they are, and their layouts.
    samples: list[tuple[str, Layout]] = field(default_factory=list)
    wanted_samples: int = 0

    def run(
        self,
        recoveries: Recoveries,
        is_late: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda place: None,
    ) -> None:
        """Enumerate, recover, judge. `progress` is told the place of each crash point."""
        self._recoveries = recoveries
        self._is_late = is_late
        self._progress_told = progress
        self._rng, self._draws = random.Random(self.seed), random.Random(self.seed)
        self._demands: dict[int, set[tuple[int, int]]] = {}
        self._first: dict[int, str] = {}
        self._batch: list[tuple[int, Layout, bool]] = []
        self._running: set[Future[list[tuple[int, Outcome]]]] = set()
        self._clients: dict[str, Progress] = {}
        self._disk = Disk.holding(self.story.before)
        self._varied = disk_at(self.story, self.begin).serial if self.inherited else None
        try:
            replay(self._disk, self.operations, self._at)
            self._send()
            while self._running:
                self._collect()
        except _Enough:
            pass
        finally:
            for future in self._running:
                future.cancel()
            wait(self._running)

    def _at(self, place: int, operation: Operation) -> None:
        self.story.follow(self._clients, operation)
        if place < self.begin or (self.inherited and not _destroys_or_promises(operation)):
            return
        if self._is_late():
            raise _Enough
        self.points += 1
        self._progress_told(place)
        mine = self._clients.get("", Progress())
        demand = (max(mine.told, mine.revealed), mine.heard)
        for what, layout in crash_states(
            self._disk, self._rng, thorough=self.thorough, varied=self._varied
        ):
            self.states += 1
            key = hash(frozenset(layout.items()))
            where = f"after operation {place} ({operation}), kept: {what}"
            if key not in self._demands:
                self._demands[key] = {demand}
                self._first[key] = where
                self.distinct += 1
                self._draw(where, layout)
                if key in self._recoveries.known:
                    self._judge(key, demand, where)
                    continue
                to_the_end = (
                    (self.inherited and self.thorough)
                    or what in WHOLE
                    or self.distinct % (TO_THE_END // 2 if self.inherited else TO_THE_END) == 0
                )
                self.to_the_end += to_the_end
                self._batch.append((key, layout, to_the_end))
                if len(self._batch) >= BATCH:
                    self._send()
            elif demand not in self._demands[key]:
                self._demands[key].add(demand)
                if key in self._recoveries.known:
                    self._judge(key, demand, where)

    def _draw(self, where: str, layout: Layout) -> None:
        """Algorithm R of Vitter: each state has the same chance."""
        if len(self.samples) < self.wanted_samples:
            self.samples.append((where, layout))
        elif self.wanted_samples:
            place = self._draws.randrange(self.distinct)
            if place < self.wanted_samples:
                self.samples[place] = (where, layout)

    def _send(self) -> None:
        if self._batch:
            self._running.add(self._recoveries.submit(self._batch))
            self._batch = []
        while len(self._running) >= WAITING:
            self._collect()

    def _collect(self) -> None:
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        for key, outcome in itertools.chain.from_iterable(future.result() for future in done):
            self._recoveries.known[key] = outcome
            for demand in sorted(self._demands[key]):
                self._judge(key, demand, self._first[key])

    def _judge(self, key: int, demand: tuple[int, int], where: str) -> None:
        outcome = self._recoveries.known[key]
        told, heard = demand
        if outcome.error:
            wrong = outcome.error
        elif not self.story.explains(outcome.index, told, heard):
            place = self.story.places.get(outcome.index)
            found = (
                f"the index after {place} messages"
                if place
                else f"an index that never was: {outcome.index!r}"
            )
            wrong = (
                f"{told} messages were answered, {heard} had arrived, and recovery gives {found}"
            )
        else:
            return
        self.failures.append(f"{self.story.name}: {where}: {wrong}")
        if self.until_a_failure or len(self.failures) >= 20:
            raise _Enough


def _destroys_or_promises(operation: Operation) -> bool:
    """Whether this takes away what a crash might need, or raises what is owed."""
    return isinstance(operation, Told) or (
        isinstance(operation, Do) and operation.method in ("rename", "remove")
    )


class _Enough(Exception):
    """No more states are needed."""


# --- a second life -----------------------------------------------------------------------------------


def disk_at(story: Story, place: int) -> Disk:
    """The disk when the first `place` operations of a story are done."""
    disk = Disk.holding(story.before)
    replay(disk, story.operations[:place], lambda place, operation: None)
    return disk


def after_a_kill(story: Story, place: int, life: Life) -> Story:
    """The story whose server was killed before the operation at `place`, with the life that followed.

    AssertionError if the life found what the messages do not explain."""
    clients: dict[str, Progress] = {}
    for operation in story.operations[:place]:
        story.follow(clients, operation)
    mine = clients.get("", Progress())
    index = canonical(life.index)
    assert story.explains(index, mine.told, mine.heard), f"{story.name}, killed at {place}: {index}"
    found = max(n for n in story.places[index] if n <= mine.heard)
    second = _recorded(life, disk_at(story, place), found - mine.told)
    return Story(
        f"{story.name}, killed at operation {place}, second life",
        story.before,
        [*story.operations[:place], *second],
        [*story.states[: found + 1], *states_after(life.index)],
        story.asked,
    )


def after_a_crash(what: str, layout: Layout, life: Life) -> Story:
    """The story of a life on what a power loss has left, all of which is durable."""
    second = _recorded(life, Disk.holding(layout), 0)
    states = [canonical(life.index), *states_after(life.index)]
    return Story(f"{what}, second life", layout, second, states, {})


def _recorded(life: Life, disk: Disk, untold: int) -> list[Operation]:
    """A life's operations, the first answer standing for `untold` messages of before as well."""
    recording = Recording.over(life.top, disk)
    recording.add(life.calls)
    recording.check()
    found: list[Operation] = []
    for operation in recording.operations:
        if not isinstance(operation, Told):
            found.append(operation)
        elif is_heard(operation):
            found.append(Heard(SAYING, b"\n"))
        else:
            found.append(Told(SAYING, b"\n" * (untold + 1)))
            untold = 0
    return found
