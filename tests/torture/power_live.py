"""Power loss under a real server on a real file system: clients talk, the power goes, it comes back.

A world as of kill.py, on a disk with a power switch (power_disks.py). At a moment that the seed chooses,
while the server serves, writes a round, stops, recovers or starts, the power goes. The server must find
that out by itself and end with one line; when the power is back the files must be explained by what the
clients were told. A server without the syncs of files, or of folders, must be found out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.servers import Server
from tests.torture.campaign import Run
from tests.torture.kill import FAILURES, KINDS, World
from tests.torture.power_disks import Cached, Ext4, Forgetful, PoweredDisk, shim

__all__ = ["cached", "ext4", "forgetful"]

#: Of a server that finds its storage failed (errors.StoreFailed), or that was asked to stop.
ENDS = (5, 0)

#: Seconds in which it must have found it out: its clients keep talking.
FINDS_OUT = 10.0

#: Of a forgetful disk everything volatile is lost in every other round, in the others a part of it.
WHOLE_LOSS = 2

#: Rounds within which a server that leaves out syncs must have been found out.
MUTANT_ROUNDS = 12
CONTROL_SECONDS = 25.0  # of the campaign's time, for all of those


class PowerWorld(World):
    """One store on a disk that loses its power at the end of each life."""

    def __init__(
        self, folder: Path, seed: int, disk: PoweredDisk, environment: Mapping[str, str]
    ) -> None:
        super().__init__(folder, seed, environment=lambda: environment)
        self.disk = disk
        self.root = disk.mount / "index"
        self.finds_out = (
            True  # one that leaves out syncs need not; it must be found out by what is lost
        )

    async def disturb(self, server: Server, kind: str) -> None:
        """Let the power go, and wait until the server has found out."""
        await super().disturb(server, kind)
        self.disk.cut()
        if not self.finds_out:
            return
        deadline = time.monotonic() + FINDS_OUT
        while server.exit_code is None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        code = server.exit_code
        if code is None or code not in ENDS[: 2 if kind == "stopping" else 1]:
            self.failures.append(
                f"without power a server ({kind}) ended with {code}, not {ENDS[0]}"
            )
        else:
            self.counts["servers that ended by themselves, in one line"] += 1

    def killed_while(self, server: Server | None, before: int) -> str:
        """What the server was doing, which is read from what is left: so lose what is volatile first."""
        self.disk.cut()
        rounds = self.counts["power losses"] = self.counts["power losses"] + 1
        seed = None if rounds % WHOLE_LOSS else self.random.randrange(1 << 30)
        self.counts["volatile changes at a power loss"] += self.disk.restore(seed)
        return super().killed_while(server, before).replace("kills", "power lost")


def live(
    run: Run, kind: type[Cached | Ext4 | Forgetful], rounds: int, forgets: tuple[str, ...]
) -> None:
    """The campaign on one kind of disk: so many rounds, and each control."""
    worlds: list[PowerWorld] = []
    library = shim(run.folder)
    if library is None:
        run.skipped.append("the controls: there is no C compiler to leave out syncs with")

    def go_on(number: int) -> None:
        folder = run.folder / f"world-{number}"
        with kind(folder) as disk:
            world = PowerWorld(folder, run.seed + number, disk, {})
            worlds.append(world)
            world.prepare()
            while not run.is_late(CONTROL_SECONDS) and len(world.failures) < FAILURES:
                done = sum(other.counts["power losses"] for other in worlds)
                run.progress(min(done, rounds), rounds)
                if done >= rounds:
                    break
                world.live_and_die(world.random.choices(list(KINDS), list(KINDS.values()))[0])
            if not world.failures:
                world.check()
                world.stop_cleanly()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go_on, range(2)))
        if library is not None:
            caught = pool.map(lambda what: find_out(run, kind, library, what), forgets)
            run.counts["controls caught"] += sum(caught)
    for world in worlds:
        run.counts.update({k: n for k, n in world.counts.items() if k != "kills"})
        for failure in world.failures:
            run.fail(failure)
        run.skipped += [f"a part of a history: {one}" for one in world.undecided]
    if run.counts["power losses"] < rounds:
        run.skipped.append(f"{rounds - run.counts['power losses']} of {rounds}: the time was up")


def find_out(run: Run, kind: type[Cached | Ext4 | Forgetful], library: Path, what: str) -> bool:
    """Whether a server that leaves these syncs out is found out, as it must be."""
    folder = run.folder / f"without-{what.replace(',', '-')}"
    environment = {"LD_PRELOAD": str(library), "POWER_FORGETS": what}
    with kind(folder) as disk:
        world = PowerWorld(folder, run.seed, disk, {})
        world.prepare()
        world.environment, world.finds_out = lambda: environment, False
        while world.counts["power losses"] < MUTANT_ROUNDS and not world.failures:
            try:
                world.live_and_die(world.random.choice(("serving", "rounds")))
            except (OSError, AssertionError, ValueError) as error:  # nothing is left to judge by
                world.failures.append(f"the store cannot be read: {error}")
    if not world.failures:
        run.fail(f"a server without the syncs of {what} lived through {MUTANT_ROUNDS} power losses")
    return bool(world.failures)


def ext4(run: Run) -> None:
    """On ext4 every sync commits the whole of the file system's own journal, in its order: there only a
    server without any sync of files is found out, for that of the journal commits the folders as well."""
    live(run, Ext4, run.scale(60, 6), ("files", "files,folders"))


def forgetful(run: Run) -> None:
    """On the forgetful file system each sync counts for itself."""
    live(run, Forgetful, run.scale(120, 8), ("files", "folders"))


def cached(run: Run) -> None:
    """On ext4 whose disk forgets what was not flushed: as `ext4`, with what is lost drawn by the block."""
    live(run, Cached, run.scale(60, 6), ("files", "files,folders"))
