"""Run random schedules of the takeover protocol.

    python -m tests.simulation                        # 100,000 of them, on all cores
    python -m tests.simulation --seed 7 --trace       # one, step by step
    python -m tests.simulation --mutant NAME          # until one is caught that breaks a rule

Exit code 1 if an invariant was broken, with the seeds that do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable

from tests.simulation.judge import Violation
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import World

SCHEDULES = 100_000
SLICE = 250  # schedules at a time, for each process
SHOWN = 5  # broken seeds that are told


def broken(
    seed: int,
    mutant: str = "",
    trace: Callable[[str], None] | None = None,
    *,
    is_whole: bool = False,
) -> str:
    """Run one schedule: what broke, or nothing. `is_whole`: the mutant's kind of schedule, but no mutant."""
    made_with = dict(MUTANTS[mutant]) if mutant else {}
    if is_whole:
        made_with = {name: it for name, it in made_with.items() if name in ("faults", "slowness")}
    world = World(seed, trace=trace, **made_with)
    try:
        world.run()
    except Violation as violation:
        return f"at {world.now:.4f} s: {violation}"
    return ""


def run_slice(job: tuple[int, int, str]) -> list[tuple[int, str]]:
    """Run the schedules of some seeds: those that broke, and how."""
    first, number, mutant = job
    found = [(seed, broken(seed, mutant)) for seed in range(first, first + number)]
    return [(seed, what) for seed, what in found if what]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first; alone: only this one")
    parser.add_argument("--schedules", type=int, default=0)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), default="")
    parser.add_argument("--trace", action="store_true", help="tell every step of one schedule")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.trace or (args.seed and not args.schedules):
        what = broken(args.seed, args.mutant, print if args.trace else None)
        print(what or f"seed {args.seed}: every invariant held")
        return bool(what)
    number = args.schedules or SCHEDULES
    jobs = [
        (at, min(SLICE, args.seed + number - at), args.mutant)
        for at in range(args.seed, args.seed + number, SLICE)
    ]
    began, bad = time.monotonic(), []
    with multiprocessing.Pool(args.jobs) as pool:
        for found in pool.imap(run_slice, jobs):
            bad += found
            if len(bad) >= SHOWN:
                pool.terminate()
                break
    for seed, what in bad[:SHOWN]:
        print(f"seed {seed}: {what}")
    seconds = time.monotonic() - began
    if not bad:
        print(
            f"{number} schedules in {seconds:.0f} s ({number / seconds:.0f} a second): every invariant held"
        )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
