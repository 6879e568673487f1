"""Two servers on one store: whatever the first was about when the second took over, nothing is lost.

Lines of reigns (reigns.py) with every kind of pause: each place of the writer's commit and round and of a
claim is drawn once before one is drawn again. Locally both servers are in one folder. On GlusterFS each is on
another mount than the one before (gluster.py). There the next one's mount may have listed and read the whole
store just before the first wrote on, so that its caches are warm and wrong; and the brick is killed and
started under the holder of the lock, which holds it no longer and is not told.

The mutants of unfenced.py break a rule each; a line of reigns must find each of them out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import ServerFailed
from tests.store.tracing import strace_works
from tests.torture import gluster
from tests.torture.campaign import Campaign, Run
from tests.torture.pausing import Stop
from tests.torture.reigns import (
    HELD,
    INCESSANT_ROUNDS,
    NO_ROUNDS,
    READING_CALLS,
    Place,
    Reigns,
)

__all__ = ["CAMPAIGNS"]

#: How the first is found when it is deposed, and how often each is chosen.
KINDS = {"busy": 4, "idle": 1, "frozen": 2, "stopped": 5, "held": 2, "between": 4, "claimant": 4}
KINDS_ON_MOUNTS = KINDS | {"warm": 6, "brick dies": 1, "brick dies idle": 1}

#: How many take-overs: full, quick.
TAKEOVERS = {"two-writers": (220, 16), "two-mounts": (120, 14)}
MUTANT_TAKEOVERS = 40  # within which a wrong server must have been found out
FAILURES = 5  # after which a run has nothing more to say


@contextmanager
def local(folder: Path) -> Iterator[Place]:
    """Both writers in one folder."""
    yield Place((folder / "index",), folder / "index")


@contextmanager
def on_gluster(folder: Path) -> Iterator[Place]:
    """Each on another mount than the one before, with other caches."""
    with gluster.Volume(folder / "volume") as volume:
        usual = volume.mount("usual")
        every = volume.mount("every", gluster.EVERY_CACHE)
        trusting = volume.mount("trusting", gluster.TRUSTING_CACHES, gluster.TRUSTING)
        roots = [mount / "index" for mount in (usual, trusting, every, trusting)]
        yield Place(roots, volume.brick / "index", volume)


def reign(run: Run, name: str) -> None:
    """Writers after writers, until there were enough take-overs."""
    make, kinds = PLACES[name]
    goal = run.scale(*TAKEOVERS[name])
    line = 0
    while run.counts["take-overs"] < goal and not run.is_late() and len(run.failures) < FAILURES:
        line += 1
        folder = run.folder / f"line-{line}"
        folder.mkdir()
        with make(folder) as place:
            live(run, Reigns(place, folder / "work", run.seed + line), kinds, goal)
    if run.counts["take-overs"] < goal and not run.failures:
        left = goal - run.counts["take-overs"]
        run.skipped.append(f"{left} of {goal} take-overs: the time was up")


def live(run: Run, reigns: Reigns, kinds: dict[str, int], goal: int) -> None:
    """One line of reigns, until it has failed or there were enough take-overs."""
    before = run.counts["take-overs"]
    try:
        while before + (done := reigns.counts["take-overs"]) < goal and not run.is_late():
            # Each kind once, whatever the chances are.
            reigns.go_on({list(kinds)[done]: 1} if done < len(kinds) else kinds)
            run.progress(min(goal, before + reigns.counts["take-overs"]), goal)
            if reigns.failures:
                break
    except ServerFailed as error:
        reigns.fail(f"the server that took over failed: {error}")
    finally:
        reigns.end()
    run.counts.update(reigns.counts)
    for failure in reigns.failures:
        run.fail(failure)
    run.skipped += [f"a part of a history: {one}" for one in reigns.undecided]


@dataclass(frozen=True)
class Wrong:
    """A server that a line of reigns must find out: how, and by what."""

    mutant: str
    depose: Callable[[Reigns], None]
    seen: str  # an expression for what stands in the failure
    limit: str = INCESSANT_ROUNDS


def find_out(run: Run, name: str, wrong: Wrong) -> None:
    """Depose servers with a mistake until it is seen."""
    folder = run.folder / wrong.mutant
    folder.mkdir()
    with PLACES[name][0](folder) as place:
        reigns = Reigns(place, folder / "work", run.seed, wrong.mutant, [wrong.limit])
        try:
            while reigns.counts["take-overs"] < MUTANT_TAKEOVERS and not reigns.failures:
                wrong.depose(reigns)
        except ServerFailed as error:
            reigns.fail(f"the server that took over failed: {error}")
        finally:
            reigns.end()
    if any(re.search(wrong.seen, failure) for failure in reigns.failures):
        run.counts["mutants caught"] += 1
    else:
        run.fail(f"the mutant {wrong.mutant} was not found out, but: {reigns.failures}")


WRONG = {
    "two-writers": (
        Wrong(
            "fences-nothing",
            lambda r: r.depose("busy", None, None),
            "is lost|answered after it was deposed|missing, though it is listed",
        ),
        Wrong("proves-nothing", lambda r: r.depose("frozen", None, None), "after it was deposed"),
        Wrong(
            "answers-without-a-proof",
            lambda r: r.depose("idle", None, None),
            "answered after it was deposed",
        ),
        Wrong(
            "publishes-from-elsewhere",
            lambda r: r.depose("held", Stop("renameat", 1, HELD, r.package_folders()), None),
            "after it was deposed, first: ",
        ),
        Wrong(
            "removes-in-place",
            lambda r: r.depose("between", Stop("unlink", 1, HELD), Stop("rmdir", 1)),
            "after it was deposed, first: ",
        ),
        Wrong("carries-nothing", lambda r: r.depose("busy", None, None), "disagree about"),
        Wrong(
            "cries-damage",
            lambda r: r.depose("claimant", None, r.draw(READING_CALLS)),
            "the overtaken claimant ended with 4",
        ),
    ),
    "two-mounts": (
        Wrong("believes-sizes", lambda r: r.deceive(), "is lost", NO_ROUNDS),
        Wrong("believes-at-once", lambda r: r.deceive(), "damaged", NO_ROUNDS),
        Wrong("trusts-the-lock", lambda r: r.lose_brick(idle=True), "after it was deposed"),
    ),
}

PLACES: dict[str, tuple[Callable[[Path], AbstractContextManager[Place]], dict[str, int]]] = {
    "two-writers": (local, KINDS),
    "two-mounts": (on_gluster, KINDS_ON_MOUNTS),
}


def torture(run: Run, name: str) -> None:
    """The campaign: the line of reigns, and at the same time one mutant after the other."""

    def find_all_out() -> None:
        for wrong in WRONG[name]:
            find_out(run, name, wrong)

    # Each server dies with the thread that started it; these last as long as their lines.
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(reign, run, name), pool.submit(find_all_out)]
    for job in jobs:
        job.result()


CAMPAIGNS = (
    Campaign(
        "two-writers",
        "A writer, busy, frozen, stopped at or held before a call of its commit, round or claim, is "
        "deposed by another: then it answers and changes nothing, and nothing it ever answered is lost.",
        lambda run: torture(run, "two-writers"),
        lambda: strace_works() or None,
        seconds=(80.0, 420.0),
    ),
    Campaign(
        "two-mounts",
        "The same with each writer on a mount of its own of a GlusterFS volume, the next one's caches warm "
        "and wrong; and with the brick killed and started under the holder of the lock.",
        lambda run: torture(run, "two-mounts"),
        lambda: strace_works() or gluster.why_absent(),
        seconds=(80.0, 420.0),
    ),
)
