"""Run the fault campaigns and report what each tried and what held.

\b
    python -m tests.torture                         # every campaign in its reduced form, as CI does
    python -m tests.torture --full                  # the whole of those that end within the hour
    python -m tests.torture --long                  # the whole of those that take longer
    python -m tests.torture --cluster               # the whole of those of several servers
    python -m tests.torture --only kill --seed 7    # one again, from its seed
    python -m tests.torture --failed --jobs 1       # what failed in the last run of this form, alone

Each campaign runs in a process of its own, so that one that crashes or hangs is a failure of that one;
the next runs all the same. Exit code 1 if anything failed, 2 for a wrong command line.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

import tests.torture
from tests.torture.campaign import Campaign, Run
from tests.torture.report import Outcome, Report

__all__ = ["campaigns", "main"]

BUILD = Path("build/torture")

#: A campaign that has taken this many times what it may, and GRACE seconds, hangs.
HANGS_AFTER = 2.0
GRACE = 60.0
ENDS_WITHIN = 10.0  # after it has said what came out

#: Campaigns at a time: each keeps a server and its clients busy, and their waits leave a core to another.
JOBS = min(2, len(os.sched_getaffinity(0)))

#: What runs the whole of a campaign, by its form.
COMMANDS = {
    "full": "make torture",
    "long": "make torture-long",
    "cluster": "make torture-cluster",
}

#: How a campaign's process begins: with nothing of the ones before it.
START = "spawn"

PR_SET_PDEATHSIG = 1  # prctl(2)

#: Progress is told at most this often (seconds); a campaign may count in millions.
SAY_EVERY = 0.1


def campaigns() -> dict[str, Campaign]:
    """Find every campaign of this package, by name, in the order of the modules' names."""
    found: dict[str, Campaign] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(tests.torture.__path__)):
        if module.startswith("__"):
            continue
        for campaign in getattr(
            importlib.import_module(f"tests.torture.{module}"), "CAMPAIGNS", ()
        ):
            if campaign.name in found:
                raise ValueError(f"two campaigns are named {campaign.name!r}")
            found[campaign.name] = campaign
    return found


def _inside(name: str, seed: int, full: bool, folder: Path, pipe: Connection) -> None:
    """Run one campaign, in its own process; tell how far it is, and at last what came out."""
    # It ends with the runner, however that ends: its servers would go on for nobody.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    campaign = campaigns()[name]
    said = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_EVERY or done >= total:
            said = time.monotonic()
            pipe.send((done, total))

    run = Run(seed, full, folder, campaign.seconds[full], progress)
    try:
        campaign.run(run)
    except Exception:  # noqa: BLE001  (whatever it was, it is this campaign's failure)
        run.fail(f"the campaign itself failed:\n{traceback.format_exc()}")
    pipe.send(Outcome.of(campaign, run))


def _run(
    campaign: Campaign, seed: int, full: bool, folder: Path, bar: Progress, grace: float = GRACE
) -> Outcome:
    """Run one campaign to its end, or to its limit."""
    began = time.monotonic()
    if reason := campaign.absent():
        return Outcome(campaign.name, campaign.what, seed, skipped=[f"all of it: {reason}"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    task = bar.add_task(campaign.name, total=None)
    context: Any = multiprocessing.get_context(START)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_inside, args=(campaign.name, seed, full, folder.resolve(), theirs)
    )
    process.start()
    theirs.close()
    limit = campaign.seconds[full] * HANGS_AFTER + grace
    outcome = None
    try:
        while outcome is None and ours.poll(max(0.0, began + limit - time.monotonic())):
            said = ours.recv()
            if isinstance(said, Outcome):
                outcome = said
            else:
                bar.update(task, completed=said[0], total=said[1])
        if outcome is not None:
            process.join(ENDS_WITHIN)
    except EOFError:
        process.join()
    finally:
        if process.is_alive():
            process.kill()  # what it has started goes with it: see Server
            process.join()
    bar.stop_task(task)
    if outcome is None:
        ended = process.exitcode if process.exitcode != -9 else f"hangs after {limit:.0f} s"
        failure = f"the campaign did not end: {ended} (seed {seed})"
        outcome = Outcome(campaign.name, campaign.what, seed, failures=[failure])
    outcome.seconds = time.monotonic() - began
    if not outcome.failures:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _chosen(
    known: dict[str, Campaign], only: tuple[str, ...], form: str
) -> tuple[list[Campaign], list[Campaign]]:
    """Return the campaigns of a form, and those that it leaves to others."""
    if unknown := set(only) - known.keys():
        raise click.BadParameter(f"no campaign {', '.join(sorted(unknown))}; see --list")
    ours: list[Campaign] = []
    others: list[Campaign] = []
    for campaign in known.values():
        # The reduced form has all of them, the others each its own.
        fits = campaign.name in only if only else form in ("quick", campaign.form)
        (ours if fits else others).append(campaign)
    return ours, others


def _outcomes(report: Path) -> list[Outcome]:
    """Return what a report says of each campaign."""
    try:
        return [Outcome(**each) for each in json.loads(report.read_text())["outcomes"]]
    except FileNotFoundError:
        raise click.BadParameter(f"no report {report}: run the campaigns first") from None


def _failed(outcomes: list[Outcome], report: Path) -> tuple[str, ...]:
    """Return the campaigns that failed."""
    names = tuple(outcome.name for outcome in outcomes if outcome.failures)
    if not names:
        raise click.BadParameter(f"nothing failed in {report}")
    return names


@click.command(help=__doc__)
@click.option("--full", "form", flag_value="full", help="Whole campaigns, not the reduced ones.")
@click.option("--long", "form", flag_value="long", help="The campaigns that take longer than all.")
@click.option("--cluster", "form", flag_value="cluster", help="The campaigns of several servers.")
@click.option("--quick", "form", flag_value="quick", default="quick", help="The default.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this campaign; repeatable.")
@click.option("--failed", is_flag=True, help="Only what the last report of this form says failed.")
@click.option("--seed", type=int, help="Run again what a report names; else a new one.")
@click.option(
    "--report", "folder", type=click.Path(path_type=Path), default=BUILD, show_default=True
)
@click.option("--jobs", default=JOBS, show_default=True, metavar="N", help="How many at a time.")
@click.option("--list", "listing", is_flag=True, help="Name the campaigns and end.")
def main(
    form: str,
    only: tuple[str, ...],
    failed: bool,
    seed: int | None,
    folder: Path,
    jobs: int,
    listing: bool,
) -> None:
    console = Console(soft_wrap=True)
    known = campaigns()
    before: list[Outcome] = []
    if failed:
        before = _outcomes(folder / f"{form}.json")
        only = _failed(before, folder / f"{form}.json")
    ours, others = _chosen(known, only, form)
    if listing:
        for campaign in known.values():
            quick, full = campaign.seconds
            console.print(f"{campaign.name:16} {quick:5.0f} s {full:6.0f} s  {campaign.what}")
        return
    seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    report, began = Report.begun(form, seed), time.monotonic()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )

    def run(campaign: Campaign) -> Outcome:
        outcome = _run(campaign, seed, form != "quick", folder / "work" / campaign.name, bar)
        console.print(outcome.line(), highlight=False, markup=False)
        for failure in outcome.failures:
            console.print(f"  FAILED: {failure}", highlight=False, markup=False)
        return outcome

    # What measures times first, by itself; of the others the longest, so that none is left over in the end.
    together = [campaign for campaign in ours if not campaign.alone]
    together.sort(key=lambda campaign: campaign.seconds[form != "quick"], reverse=True)
    with bar, ThreadPoolExecutor(jobs) as pool:
        done = {campaign.name: run(campaign) for campaign in ours if campaign.alone}
        done |= zip((campaign.name for campaign in together), pool.map(run, together), strict=True)
    # What held in the run before stands; the report says what was run again.
    held = {outcome.name: outcome for outcome in before if not outcome.failures}
    report.again = list(only) if failed else []
    report.outcomes += [(held | done)[name] for name in known if name in held | done]
    report.seconds = time.monotonic() - began
    report.elsewhere = {c.name: COMMANDS[c.form] for c in others if c.name not in held}
    text, data = report.write(folder)
    console.print(report.summary(), highlight=False, markup=False)
    console.print(f"{text}\n{data}", highlight=False, markup=False)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    # By its importable name: what it sends between processes must not be of a module named __main__.
    from tests.torture.__main__ import main as run

    run()
