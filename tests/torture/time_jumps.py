"""The clock jumps, by seconds and by decades, while a server works: nothing in the promise depends on it.

libfaketime stands between the server and its clocks, and is told of each jump through a file. In one
world only the time of day jumps, forth and back, as when somebody sets it; then no client may notice: those
that say nothing, or have said half a line, are not taken for late ones. In the other world the clock that
no one can set jumps forward too, as after a machine was held for years: what was promised holds even then,
though time-outs may strike. The clients' own clock, by which their histories are judged, is untouched.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from tests.servers import Server
from tests.torture.campaign import Campaign, Run
from tests.torture.history import Client, History
from tests.torture.kill import World

__all__ = ["CAMPAIGNS"]

LIVES = (70, 8)  # full, quick
MUTANT_LIVES = 8  # within which a wrong server must have been found out
LIFE_SECONDS = (1.2, 2.5)  # longer than the second after which the server looks for late clients
STOPS_WITHIN = 30.0  # seconds: an undisturbed stop under this load takes a fraction of one

#: Seconds between two pipelines of a client, so that a life of seconds stays quick to judge.
PAUSE = 0.05

#: Seconds that a client's time-outs allow: none of them is ever reached, but by a clock that jumps.
TIMEOUT = 600

#: Seconds for an answer that takes milliseconds on a quiet machine.
LONGEST_ANSWER = 20.0

YEAR = 365 * 86400
#: Where the clock may jump to, in seconds from the true time; 0 is back to it.
JUMPS = (0, 1, -1, 60, -60, 3600, -3600, 86400, -86400, YEAR, -YEAR, 15 * YEAR, -20 * YEAR)
FARTHEST = (
    200 * YEAR
)  # from the true time, where jumps add up: beyond 292 years Python has no clock

#: Mistakes of the product that this campaign must find.
WRONG = ("measures-by-the-wall-clock", "numbers-reigns-by-the-clock")


def library() -> Path | None:
    """Return libfaketime, in the form for programs with threads."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def absent() -> str | None:
    """Why this machine cannot run it."""
    return None if library() else "no libfaketime (on Debian: apt-get install faketime)"


class Clock:
    """The clock of the servers of one world."""

    def __init__(self, folder: Path, *, all_clocks: bool) -> None:
        self._file = folder / "clock"
        self._all_clocks = all_clocks
        self.offset = 0
        self.jumps = 0
        self.jump_to(0)

    def jump_to(self, offset: int) -> None:
        """Let the server's time be the true one and `offset` seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset:+d}\n")
        new.replace(self._file)  # at once: a server that reads it now sees one or the other
        self.offset = offset
        self.jumps += 1

    def environment(self) -> Mapping[str, str]:
        """What a server needs to be under this clock."""
        variables = {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",  # by default it looks at the file every ten seconds
        }
        return variables if self._all_clocks else variables | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}


class JumpingWorld(World):
    """A world in which servers live under a clock that jumps."""

    def __init__(self, folder: Path, seed: int, mutant: str = "", *, all_clocks: bool) -> None:
        folder.mkdir(parents=True)
        self.all_clocks = all_clocks
        self.clock = Clock(folder, all_clocks=all_clocks)
        options = ("--idle-timeout", str(TIMEOUT), "--line-timeout", str(TIMEOUT))
        super().__init__(folder, seed, mutant, self.clock.environment, options)
        self.crowd.pause = PAUSE

    def jump(self) -> None:
        """Jump anywhere; forward only where the clock is one that cannot go back."""
        to = self.random.choice(JUMPS)
        if self.all_clocks:
            to = self.clock.offset + abs(to)
        self.clock.jump_to(to if to < FARTHEST else self.clock.offset + 1)

    def live(self) -> None:
        """One life, and its judgement."""
        self.clock.jump_to(0 if self.all_clocks else self.random.choice(JUMPS))
        kind = self.random.choice(("killed", "stopped"))
        began = self.counts["clock jumps"]
        history, server = self.serve_and_die(kind)
        self.counts["lives"] += 1
        if server is not None and self.counts["clock jumps"] > began:
            slowest = max((c.replied - c.sent for c in history.calls if c.reply), default=0)
            if slowest > LONGEST_ANSWER * 1e9:
                self.failures.append(f"an answer took {slowest / 1e9:.1f} s")
        self.judge(history)

    async def disturb(self, server: Server, kind: str) -> None:
        """Let the clock jump for a while; then stop, while it goes on, or be killed."""
        self.see_jump(server, "serving", self.clock.offset)
        patient = [await History().connect(server.address) for _ in range(2)]
        patient[1].send_raw(b"INDEX|near-0-0")
        jumping = asyncio.create_task(self.jump_about())
        await asyncio.sleep(self.random.uniform(*LIFE_SECONDS))
        if not self.all_clocks:
            self.hear(patient)
        server.send_signal(signal.SIGUSR1)
        await asyncio.to_thread(server.wait_for, "counters")
        if server.exit_code is not None:
            self.failures.append(f"a server ended by itself, with exit code {server.exit_code}")
        elif kind == "stopped":
            code = await asyncio.to_thread(server.stop, signal.SIGTERM, STOPS_WITHIN)
            self.counts["clean stops"] += 1
            if code:
                self.failures.append(f"a clean stop ended with {code}")
        else:
            server.kill()
            self.counts["kills"] += 1
        jumping.cancel()

    async def jump_about(self) -> None:
        """Jump, every few milliseconds."""
        while True:
            self.jump()
            self.counts["clock jumps"] += 1
            await asyncio.sleep(self.random.expovariate(1 / 0.03))

    def hear(self, patient: list[Client]) -> None:
        """Clients that say nothing for two seconds are not late, whatever the clock says."""
        self.counts["silent clients"] += len(patient)
        if lost := sum(client.lost for client in patient):
            self.failures.append(f"{lost} clients were taken for late: only the clock had jumped")

    def see_jump(self, server: Server, event: str, offset: int) -> None:
        """The fault is real: the log's own time is where the clock was told to be."""
        said = datetime.fromisoformat(server.wait_for(event)["ts"]).timestamp()
        if not math.isclose(said - time.time(), offset, abs_tol=120):
            self.failures.append(f"the clock did not jump by {offset} s: the log says {said:.0f}")


def jumps(run: Run) -> None:
    """The campaign: one world where the time of day jumps, one where every clock does."""
    goal = run.scale(*LIVES)
    for mutant in WRONG:
        world = JumpingWorld(run.folder / mutant, run.seed, mutant, all_clocks=False)
        world.prepare()
        while world.counts["lives"] < MUTANT_LIVES and not world.failures:
            world.live()
        run.counts["mutants caught"] += bool(world.failures)
        if not world.failures:
            run.fail(f"the mutant {mutant} went unnoticed through {MUTANT_LIVES} lives")
    worlds = [JumpingWorld(run.folder / "time-of-day", run.seed, all_clocks=False)]
    worlds.append(JumpingWorld(run.folder / "all-clocks", run.seed, all_clocks=True))
    for world in worlds:
        world.prepare()
    while not run.is_late() and not any(world.failures for world in worlds):
        done = sum(world.counts["lives"] for world in worlds)
        run.progress(done, goal)
        if done >= goal:
            break
        worlds[done % len(worlds)].live()
    for world in worlds:
        world.check()
        run.counts.update(world.counts)
        for failure in world.failures:
            run.fail(failure)
        run.skipped += [f"a part of a history: {one}" for one in world.undecided]
    if run.counts["lives"] < goal:
        run.skipped.append(f"{goal - run.counts['lives']} of {goal} lives: the time was up")


CAMPAIGNS = (
    Campaign(
        "time-jumps",
        "The clock jumps by seconds and decades under 50 clients: histories, stops, starts and time-outs "
        "must not notice; nor the promise where even the clock that no one can set jumps forward.",
        jumps,
        absent,
        seconds=(90.0, 300.0),
    ),
)
