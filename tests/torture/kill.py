"""SIGKILL at random moments, under clients that contradict one another: nothing acknowledged is lost.

A world is one store and the lives of its servers, one after another, each ended by SIGKILL: while it
serves 50 clients, while a round of package files is being written, while it stops, while it recovers,
before it has claimed the store. When it is over, the files are read by the tests' own reader, and the
history must explain them (`linearizability`); what they say is where the next history begins, whose first
questions ask the recovered server after every package. `pkgindex check` and clean stops come between.

When a life has ended is chosen from the seed; what it was then about is told by the log and the files,
and counted by that. How far a server comes in a time is the machine's, so a seed shows the same kinds of
lives again, not the same interleaving: what is needed to judge a failure is written down beside the store.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.servers import Server, ServerFailed
from tests.store.reading import is_temporary, read_files, read_index, reversed_index
from tests.torture.campaign import Campaign, Run
from tests.torture.clients import Crowd
from tests.torture.history import Call, History
from tests.torture.linearizability import Index, judge
from tests.torture.mutants import Mutant

__all__ = ["CAMPAIGNS", "World"]

KILLS = (1000, 100)  # full, quick
CHECKED_EVERY = 10  # kills, and then `pkgindex check`
STOPPED_EVERY = 25  # kills, and then a clean stop, whose files are compared with each other
WORLDS = 2  # at a time
FAILURES = 10  # of a world, after which it has nothing more to say
MUTANT_KILLS = 60  # within which a wrong server must have been found out
MUTANT_SECONDS = 30.0  # of the campaign's time, for all of them

LONGEST_LIFE = 0.25  # seconds under load
LONGEST_STOP = 0.06  # from SIGTERM; an undisturbed stop takes about as long
LONGEST_ROUND = 0.004  # from the rotation that begins it; a small one takes about twice as long
LONGEST_WAIT = 2.0  # for that rotation
LONGEST_START = 0.5  # about what a start takes on a busy machine
LONGEST_RECOVERY = 0.03  # from the claim; an undisturbed recovery takes about as long

#: The kinds of lives, and how often each is chosen.
KINDS = {"serving": 35, "rounds": 25, "stopping": 15, "recovering": 15, "starting": 10}

#: Mistakes of the product that this campaign must find.
WRONG = ("acknowledges-first", "forgets-the-last-change", "drops-the-journal-first")


class World:
    """One store, its servers' lives, and what is known of it."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        mutant: str = "",
        environment: Callable[[], Mapping[str, str]] = dict,
        options: tuple[str, ...] = (),
    ) -> None:
        """`environment` and `options` are those of each server that is started."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.root = folder / "index"
        self.random = random.Random(seed)
        self.crowd = Crowd(random.Random(seed))  # it draws as often as the machine lets it
        self.mutant = mutant
        self.environment = environment
        self.options = options
        self.known: Index = {}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.undecided: list[str] = []

    # --- lives ------------------------------------------------------------------------------------

    def server(self, journal_limit: str = "1g") -> Server:
        """Return a server for this store, not started. The smallest limit makes rounds incessant."""
        return Mutant(
            self.mutant,
            f"file:{self.root}",
            *("--journal-limit", journal_limit),
            *self.options,
            environment=self.environment(),
        )

    def prepare(self) -> None:
        """Make the store, with what every life may depend on."""

        async def prepare(server: Server) -> None:
            await self.crowd.prepare(await History().connect(server.address))

        with self.server() as server:
            asyncio.run(prepare(server))
            server.stop()
        self.known = read_index(self.root)

    def go_on(self) -> None:
        """One more life of a kind that the seed chooses, and now and then a check and a clean stop."""
        self.live_and_die(self.random.choices(list(KINDS), list(KINDS.values()))[0])
        if self.counts["kills"] % CHECKED_EVERY == 0:
            self.check()
        if self.counts["kills"] % STOPPED_EVERY == 0:
            self.stop_cleanly()

    def live_and_die(self, kind: str) -> None:
        """One life of this kind, and its judgement."""
        before = self.claimed()
        if kind in ("recovering", "starting"):
            history, server = self.begin_and_die(kind), None
        else:
            history, server = self.serve_and_die(kind)
        self.counts["kills"] += 1
        self.counts[self.killed_while(server, before)] += 1
        self.judge(history)

    def serve_and_die(self, kind: str) -> tuple[History, Server | None]:
        """Serve the crowd, and be killed while that goes on, or while it stops."""
        history = History()
        try:
            with self.server("64k" if kind == "rounds" else "1g") as server:
                asyncio.run(self.serve(server, history, kind))
                self.look_at_log(server)
                return history, server
        except ServerFailed as error:
            self.failures.append(f"a server of the store did not start, or not end: {error}")
        return history, None

    async def serve(self, server: Server, history: History, kind: str) -> None:
        """Ask the server what it has recovered, let the crowd talk to it, and kill it."""
        auditor = await history.connect(server.address)
        await auditor.ask(f"QUERY|{name}|" for name in sorted({*self.known, *self.crowd.names}))
        clients = [await history.connect(server.address) for _ in range(self.crowd.clients)]
        talking = [
            asyncio.create_task(self.crowd.talk(client, number))
            for number, client in enumerate(clients)
        ]
        await self.disturb(server, kind)
        server.kill()
        for ended in await asyncio.gather(*talking, return_exceptions=True):
            if isinstance(ended, TimeoutError):
                self.failures.append("a client waited for its replies without end")
            elif ended is not None:
                raise ended
        self.failures += [f"{len(c.stray)} replies too many" for c in clients if c.stray]

    async def disturb(self, server: Server, kind: str) -> None:
        """What befalls the server under load, before it is killed."""
        await asyncio.sleep(self.random.uniform(0.01, LONGEST_LIFE))
        if kind == "stopping":
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(self.random.uniform(0, LONGEST_STOP))
        elif kind == "rounds":
            deadline = time.monotonic() + LONGEST_WAIT
            while not self.is_in_a_round() and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.0005)
            await asyncio.sleep(self.random.uniform(0, LONGEST_ROUND))
        if server.exit_code is not None and kind != "stopping":
            self.failures.append(f"a server ended by itself, with exit code {server.exit_code}")

    def begin_and_die(self, kind: str) -> History:
        """Start, and be killed before, in or after the recovery."""
        server = self.server()
        before = self.claimed()
        if kind == "starting":
            delay, claims = self.random.uniform(0.02, LONGEST_START), 0
        else:
            delay, claims = self.random.uniform(0, LONGEST_RECOVERY), 1

        def kill() -> None:
            deadline = time.monotonic() + server.patience
            while claims and self.claimed() <= before and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(delay)
            server.kill()

        # A server dies with the thread that started it, so that must be this one.
        killer = threading.Thread(target=kill)
        killer.start()
        with suppress(ServerFailed):
            server.start()
        killer.join()
        self.look_at_log(server)
        server.log_file.unlink(missing_ok=True)
        return History()

    # --- what it was about when it died ------------------------------------------------------------

    def claimed(self) -> int:
        """The highest epoch that anybody has claimed."""
        staging = self.root / "staging"
        names = [p.name for p in staging.iterdir()] if staging.is_dir() else []
        return max((int(name, 16) for name in names), default=0)

    def killed_while(self, server: Server | None, before: int) -> str:
        """What the server was doing when it was killed, by its log and its files."""
        if server is None or not server.events("serving"):
            return (
                "kills while it recovered" if self.claimed() > before else "kills while it started"
            )
        if server.events("stopped"):
            return "kills after it had stopped"
        if server.events("stopping"):
            return "kills while it stopped"
        return "kills with a round under way" if self.is_in_a_round() else "kills while it served"

    def is_in_a_round(self) -> bool:
        """Whether files of the highest epoch are on their way."""
        staging = self.root / "staging" / f"{self.claimed():08x}"
        try:
            return any(is_temporary(path.name) for path in staging.iterdir())
        except FileNotFoundError:
            return False

    def look_at_log(self, server: Server) -> None:
        """No server has anything to say of itself that is not one line."""
        if any(line.startswith("Traceback") for line in server.lines):
            self.failures.append("a traceback in the log:\n" + "\n".join(server.lines[-30:]))

    # --- judgement --------------------------------------------------------------------------------

    def judge(self, history: History) -> None:
        """Compare the files with what everybody was told; what they say is known from now on."""
        found = read_index(self.root)
        self.counts["calls"] += len(history.calls)
        self.counts["answers judged"] += history.answered
        wrong = [
            f"{package} depends on what is not there"
            for package, dependencies in found.items()
            if not dependencies <= found.keys()
        ]
        for violation in judge(history.calls, self.known, found):
            (self.undecided if violation.is_undecided else wrong).append(str(violation))
        if wrong:
            kept = self.folder / f"life-{self.counts['kills']}.json"
            keep(kept, history.calls, self.known, found)
            self.failures += [f"{one} (kill {self.counts['kills']}, {kept})" for one in wrong]
        self.known = found

    def check(self) -> None:
        """The product's own judgement of the files: `pkgindex check`."""
        command = [sys.executable, "-m", "pkgindex", "check", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.counts["checks"] += 1
        if done.returncode:
            self.failures.append(f"pkgindex check: {done.returncode}: {done.stdout}{done.stderr}")

    def stop_cleanly(self) -> None:
        """A server that is asked to stop leaves all of it in package files, each other's mirror."""
        try:
            with self.server() as server:
                code = server.stop()
                self.look_at_log(server)
        except ServerFailed as error:
            self.failures.append(f"a server of the store did not start, or not stop: {error}")
            return
        self.counts["clean stops"] += 1
        if code:
            self.failures.append(f"a clean stop ended with {code}")
        forward, reverse = (read_files(self.root, kind) for kind in ("forward", "reverse"))
        if forward != self.known:
            self.failures.append("the package files after a clean stop are not the index")
        if reverse != reversed_index(forward):
            self.failures.append("the reverse files after a clean stop do not mirror the others")


def keep(path: Path, calls: list[Call], before: Index, after: Index) -> None:
    """Write a history down, with the indexes around it, for whoever has to explain it."""
    facts = {
        "before": {name: sorted(needs) for name, needs in before.items()},
        "after": {name: sorted(needs) for name, needs in after.items()},
        "calls": [[c.client, c.line, c.sent, c.reply, c.replied] for c in calls],
    }
    path.write_text(json.dumps(facts))


def kill(run: Run) -> None:
    """The campaign: two worlds at a time, for a server that starts leaves a core free."""
    goal = run.scale(*KILLS)
    worlds = [World(run.folder / f"world-{n}", run.seed + n) for n in range(WORLDS)]

    def go_on(world: World) -> None:
        world.prepare()
        while not run.is_late(MUTANT_SECONDS) and len(world.failures) < FAILURES:
            if sum(other.counts["kills"] for other in worlds) >= goal:
                break
            world.go_on()
            run.progress(min(goal, sum(other.counts["kills"] for other in worlds)), goal)
        world.stop_cleanly()

    # Each server dies with the thread that started it; these last as long as their worlds.
    with ThreadPoolExecutor(WORLDS) as pool:
        list(pool.map(go_on, worlds))
        run.counts["mutants caught"] += sum(pool.map(partial(find_out, run), WRONG))
    for world in worlds:
        run.counts.update(world.counts)
        for failure in world.failures:
            run.fail(failure)
        run.skipped += [f"a part of a history: {one}" for one in world.undecided]
    if run.counts["kills"] < goal:
        run.skipped.append(f"{goal - run.counts['kills']} of {goal} kills: the time was up")


def find_out(run: Run, mutant: str) -> bool:
    """Whether a wrong server is found out, as it must be."""
    world = World(run.folder / mutant, run.seed, mutant)
    world.prepare()
    while world.counts["kills"] < MUTANT_KILLS and not world.failures:
        world.live_and_die(world.random.choice(("serving", "rounds")))
    if not world.failures:
        run.fail(f"the mutant {mutant} lived through {MUTANT_KILLS} kills unnoticed")
    return bool(world.failures)


CAMPAIGNS = (
    Campaign(
        "kill",
        "SIGKILL at random moments under 50 clients that contradict one another: serving, in a round "
        "of package files, stopping, recovering, starting; after each the history must explain the files.",
        kill,
        seconds=(200.0, 960.0),
    ),
)
