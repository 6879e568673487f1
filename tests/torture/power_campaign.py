"""The campaign of enumerated power losses: which stories, which controls, in what order.

1. The stories are recorded (power_story.py) and every crash point of each is tried (power_states.py).
2. Controls: the same recordings with some syncs left out, as of a product that forgets them. Each must
   be found out, or the enumeration proves nothing.
3. Second lives (power_lives.py): a server is killed, another starts on what it left, and then the power
   goes; or the power goes, a server starts, and it goes again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.torture.campaign import Run
from tests.torture.crash_states import Layout
from tests.torture.operations import Do, Operation, SyncBegun, narrowed, without
from tests.torture.power_lives import Life, second_lives
from tests.torture.power_states import (
    Recoveries,
    Trial,
    after_a_crash,
    after_a_kill,
    disk_at,
)
from tests.torture.power_story import Story, tell, tell_of_a_large_file

__all__ = ["states"]

Forgetting = Callable[[SyncBegun], SyncBegun | None]


@dataclass(frozen=True)
class Control:
    """A product that forgets some syncs, and the story that shows it."""

    name: str
    story: str
    forgets: Forgetting


def is_file(sync: SyncBegun) -> bool:
    """Whether a sync is one of a file; the paths are the store's (docs/storage.md)."""
    return bool(FILES.fullmatch(sync.path))


FILES = re.compile(r"index/(FORMAT.*|journal/.+|staging/[^/]+/.+|(forward|reverse)/../.+)")


def no_files(sync: SyncBegun) -> SyncBegun | None:
    if sync.node is None:
        return narrowed(sync, data=False, names=True)
    return None if is_file(sync) else sync


def no_folders(sync: SyncBegun) -> SyncBegun | None:
    if sync.node is None:
        return narrowed(sync, data=True, names=False)
    return sync if is_file(sync) else None


def none_of(pattern: str) -> Forgetting:
    """Forget the syncs of what has such a path."""
    compiled = re.compile(pattern)
    return lambda sync: None if sync.node is not None and compiled.fullmatch(sync.path) else sync


#: What is left out, and on which path through the store that shows.
CONTROLS = (
    Control("of files", "local", no_files),
    Control("of files", "careful", no_files),
    Control("of folders", "local", no_folders),
    Control("of folders", "careful", no_folders),
    Control("of the file system", "local", lambda sync: sync if sync.node is not None else None),
    Control("of FORMAT", "local", none_of(r"index/FORMAT.*")),
    Control("of the store's own folder", "local", none_of(r"index")),
    Control("of the folder above it", "local", none_of(r"\.")),
    Control("of the journal's segments", "local", none_of(r"index/journal/.+")),
    Control("of the journal's folder", "local", none_of(r"index/journal")),
    Control("of the shards' folders", "careful", none_of(r"index/(forward|reverse)/..")),
    Control("of new shards' names", "careful", none_of(r"index/(forward|reverse)")),
    Control("of package files", "careful", none_of(r".*/t\d+|index/(forward|reverse)/../.+")),
)

#: Quick: every so many-th of the points where a server is killed after it has made a name. Full: all of
#: those, and every so many-th of all its syncs.
KILLED_QUICK, KILLED_FULL = 6, 4

#: States of a power loss on which a second life begins.
CRASHED = (8, 1)


def states(run: Run) -> None:
    """The campaign."""
    with Recoveries(run.folder) as recoveries:
        _States(run, recoveries).run_all()


class _States:
    """One run of it."""

    def __init__(self, run: Run, recoveries: Recoveries) -> None:
        self.run = run
        self.recoveries = recoveries

    def run_all(self) -> None:
        self.stories = self.record()
        trials = [self.try_out(s, self.run.scale(*CRASHED)) for s in self.stories.values()]
        self.controls()
        self.second_after_a_kill(self.stories["careful"], careful=True)
        if self.run.full:
            self.second_after_a_kill(self.stories["local"], careful=False)
        for trial in trials:
            self.second_after_a_crash(trial.story, trial.samples)
        if self.run.is_late():
            self.run.skipped.append("the last of the states: the time was up")

    def record(self) -> dict[str, Story]:
        """The stories, recorded at the same time: much of it is waiting."""
        folder = self.run.folder
        with ThreadPoolExecutor(2) as pool:
            # Each server dies with the thread that started it: so a thread tells one story.
            jobs = [
                pool.submit(tell, folder / "local", careful=False),
                pool.submit(tell, folder / "careful", careful=True),
            ]
            if self.run.full:
                jobs.append(pool.submit(tell_of_a_large_file, folder / "large"))
            told = [job.result() for job in jobs]
        if not self.run.full:
            self.run.skipped.append("a large reverse file that is owed: only in the full run")
        for story in told:
            self.run.counts["operations recorded"] += len(story.operations)
        return {story.name: story for story in told}

    def try_out(self, story: Story, samples: int) -> Trial:
        """Every crash point of a story."""
        is_large = len(story.before) > 1000  # its states take a hundred times as long
        trial = Trial(
            story,
            story.operations,
            self.run.seed,
            thorough=self.run.full and not is_large,
            wanted_samples=0 if is_large else samples,
        )
        total = len(story.operations)
        trial.run(self.recoveries, self.run.is_late, lambda place: self.run.progress(place, total))
        self.count(trial)
        self.run.counts["crash points"] += trial.points
        return trial

    def count(self, trial: Trial) -> None:
        """Add a trial's figures, and its failures."""
        self.run.counts["states built"] += trial.states
        self.run.counts["different states recovered from"] += trial.distinct
        self.run.counts["of those, to a clean stop and check"] += trial.to_the_end
        for failure in trial.failures[:3]:
            self.run.fail(failure)
        if len(trial.failures) > 3:
            self.run.fail(f"{trial.story.name}: {len(trial.failures) - 3} more states like these")

    # --- second lives -----------------------------------------------------------------------------

    def second_after_a_crash(self, story: Story, samples: list[tuple[str, Layout]]) -> None:
        """The power goes, a server starts, and the power goes again."""
        if not samples:
            return
        folder = self.folder(f"after-crashes-{story.name}")
        layouts = [layout for _, layout in samples]
        careful = story.name == "careful"
        lives = second_lives(folder, layouts, careful=careful)
        for (where, layout), life in zip(samples, lives, strict=True):
            if self.run.is_late():
                break
            if self.is_dead(where, life):
                continue
            second = after_a_crash(f"{story.name}: {where}", layout, life)
            trial = Trial(second, second.operations, self.run.seed, thorough=False)
            trial.run(self.recoveries, self.run.is_late)
            self.count(trial)
            self.run.counts["second lives after a power loss"] += 1
            self.run.counts["crash points of second lives"] += trial.points

    def second_after_a_kill(self, story: Story, *, careful: bool) -> None:
        """A server is killed, another starts, and the power goes."""
        places = killed_at(story, full=self.run.full)
        folder = self.folder(f"after-kills-{story.name}")
        lives = second_lives(folder, [disk_at(story, p).seen() for p in places], careful=careful)
        trusting: list[str] = []
        for place, life in zip(places, lives, strict=True):
            if self.run.is_late() and trusting:
                break
            if self.is_dead(f"{story.name}, killed at operation {place}", life):
                continue
            second = after_a_kill(story, place, life)
            trial = self.inherited(second, second.operations, place)
            self.count(trial)
            self.run.counts["second lives after a kill"] += 1
            self.run.counts["crash points of second lives"] += trial.points
            if careful and not trusting:
                # The control: one that takes for durable what it finds.
                left = without(
                    second.operations, none_of(r"\.|index|index/(forward|reverse)"), place
                )
                trusting += self.inherited(second, left, place, until_a_failure=True).failures
        if careful:
            self.caught("of what a killed server had made", bool(trusting))

    def inherited(
        self,
        story: Story,
        operations: Iterable[Operation],
        place: int,
        *,
        until_a_failure: bool = False,
    ) -> Trial:
        """What a second life took over from the first, in every way it may be lost."""
        trial = Trial(
            story,
            operations,
            self.run.seed,
            begin=place,
            inherited=True,
            thorough=self.run.full,
            until_a_failure=until_a_failure,
        )
        trial.run(self.recoveries)
        return trial

    def is_dead(self, where: str, life: Life) -> bool:
        """Whether a life failed, which is a failure of the product."""
        if life.error:
            self.run.fail(f"{where}: the next writer: {life.error}")
        return bool(life.error)

    def folder(self, name: str) -> Path:
        folder = self.run.folder / name
        folder.mkdir()
        return folder.resolve()

    # --- controls ---------------------------------------------------------------------------------

    def controls(self) -> None:
        """Each must be found out."""
        for control in CONTROLS:
            story = self.stories[control.story]
            trial = Trial(
                story,
                without(story.operations, control.forgets),
                self.run.seed,
                thorough=False,
                until_a_failure=True,
            )
            trial.run(self.recoveries)
            self.caught(f"{control.name} ({control.story})", bool(trial.failures))

    def caught(self, name: str, found: bool) -> None:
        """Note what became of a control."""
        self.run.counts["controls caught"] += found
        if not found:
            self.run.fail(f"a store without its syncs {name} was not found out")


def killed_at(story: Story, *, full: bool) -> list[int]:
    """The places in a story where its server is killed: at the beginning of a sync, which is not done."""
    syncs = [n for n, o in enumerate(story.operations) if isinstance(o, SyncBegun)]
    names = [n for n in syncs if n and _makes_a_name(story.operations[n - 1])]
    if not full:
        return sorted({*names[:2], *names[2::KILLED_QUICK]})  # the first two make the store
    return sorted({*names, *syncs[::KILLED_FULL]})


def _makes_a_name(operation: Operation) -> bool:
    return isinstance(operation, Do) and operation.method in ("make_folder", "link")
