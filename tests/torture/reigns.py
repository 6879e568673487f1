"""A line of reigns: one store and its writers, each deposed by the next, and what is then looked at.

    reigns = Reigns(place, folder, seed)
    reigns.depose("stopped", Stop("fdatasync", 2), None)     # and any number of times more
    reigns.end()
    print(reigns.failures)

Each writer is under clients that contradict one another. It is busy, idle, frozen, stopped after a call of
its commit or round or held before one (pausing.py); then the next one claims, recovers and serves; it may be
stopped in its claim, for the first to wake in between, or for a third to overtake both. Then who slept wakes.
From the moment when the next one serves

- the first answers no change any more, not even one without effect, and ends by itself with exit code 5
  (a claimant that never served: 3);
- it changes no name in the store (its own trace tells, and a picture of the whole store before and after);
- the index that the next one serves explains every answer that the first ever gave (`linearizability`).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tests.servers import Address, ServerFailed, Wire
from tests.store.reading import nothing_is_behind, read_files, read_index
from tests.torture.clients import Crowd
from tests.torture.gluster import Volume
from tests.torture.history import Call, Client, History
from tests.torture.linearizability import Index, judge
from tests.torture.pausing import Pausable, Pause, Stop

__all__ = ["HELD", "INCESSANT_ROUNDS", "NO_ROUNDS", "READING_CALLS", "Place", "Reigns"]

#: What a writer asks of the store while it serves: kinds of calls, and the first and last number to stop at.
COMMIT_CALLS = {
    "pwritev": (1, 4),
    "fdatasync": (1, 4),
    "renameat": (1, 16),
    "openat": (1, 16),
    "fsync": (1, 8),
    "syncfs": (1, 4),
    "unlinkat": (1, 2),
    "getdents64": (1, 4),
}

#: Of these, what is about package files alone, whose folders are named to strace.
ROUND_CALLS = {"renameat": (1, 6), "openat": (1, 2), "fsync": (1, 3)}

#: What a claimant asks of the store in its main thread, from the mkdir of its own staging directory on.
CLAIM_CALLS = {
    "mkdir": (5, 5),
    "openat": (7, 25),
    "fsync": (2, 11),
    "renameat": (1, 6),
    "rmdir": (1, 1),
    "getdents64": (5, 14),
    "write": (1, 2),
}

#: Of these, what comes once it has begun to read the journal.
READING_CALLS = {"openat": (17, 25), "getdents64": (11, 14)}

#: Where it has found the store, and has not yet claimed it.
BEFORE_THE_CLAIM = Stop("openat", 3)

INCESSANT_ROUNDS, NO_ROUNDS = "64k", "1g"  # limits of the journal that lead to that

OWNED = 3  # the exit code of a server that finds another in the store

LONGEST_UNDISTURBED = 0.2  # seconds under load, before the pause is asked for
LONGEST_WAIT = 1.5  # for a call to come; then the writer is frozen where it is
LONGEST_CLAIM = 5.0  # for a claimant to start and come to a call
HELD = 3.0  # seconds that a call is held: some times what the next one's start takes
TO_END = 15.0  # within which a deposed writer has noticed and ended; a trip to a mount takes milliseconds
LONGEST_END_OF_A_ROUND = (
    3.0  # from its last file on: it takes segments away, and then counts itself
)
TO_SETTLE = 20.0  # for the next writer's first round
LATE_WAKES = 0.3  # how often the first sleeps until the second has written all files
BUDGET = 10_000  # orders of the calls of a few packages that are looked at: some seconds

#: A package that is there from the beginning, and that nothing has to do with.
STILL = "still"

#: What clients ask of the first once the second serves: changes without effect, refused, and real ones.
LATE = ("REMOVE|unknown|", "INDEX|refused|unknown", f"INDEX|{STILL}|", "INDEX|too-late|")
WITHOUT_EFFECT = LATE[:2]

Calls = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """Where a store is: the paths that writers reach it by, in turn, and where its files truly are."""

    roots: Sequence[Path]
    truth: Path
    volume: Volume | None = None


class Load:
    """Clients of one writer, in a thread of their own, until their connections end."""

    def __init__(self, address: Address, crowd: Crowd, *, prepare: bool = False) -> None:
        """`prepare`: index first, alone and unrecorded, what every package may depend on."""
        self.history = History()
        self.is_quiet = False
        self._late: Client | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed: list[BaseException] = []
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(address, crowd, prepare))
        )
        self._thread.start()
        self._ready.wait()

    async def _run(self, address: Address, crowd: Crowd, prepare: bool) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            if prepare:
                client = await History().connect(address)
                await crowd.prepare(client)
                await client.ask([f"INDEX|{STILL}|"])
            self._late = await self.history.connect(address)
            clients = [await self.history.connect(address) for _ in range(crowd.clients)]
        finally:
            self._ready.set()
        talking = [self._talk(crowd, client, number) for number, client in enumerate(clients)]
        for ended in await asyncio.gather(*talking, return_exceptions=True):
            if ended is not None:
                self.failed.append(ended)
        while not self._late.lost:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _talk(self, crowd: Crowd, client: Client, number: int) -> None:
        with suppress(ConnectionError):
            while not client.lost:
                if not self.is_quiet:
                    await client.ask(crowd.pipeline(number))
                await asyncio.sleep(crowd.random.expovariate(1 / crowd.pause))

    def be_quiet(self) -> None:
        """Send nothing more, and wait until everything is answered."""
        self.is_quiet = True
        calls = self.history.calls
        deadline = time.monotonic() + TO_END
        while any(c.reply is None for c in calls[-1000:]) and time.monotonic() < deadline:
            time.sleep(0.01)

    def go_on(self) -> None:
        """Send again."""
        self.is_quiet = False

    def ask_late(self, lines: Iterable[str]) -> list[Call]:
        """Send one more pipeline, on a connection that was opened before; give its calls."""
        sent: list[Call] = []
        done = threading.Event()

        def send() -> None:
            with suppress(ConnectionError):
                assert self._late is not None
                sent.extend(self._late.send(lines))
            done.set()

        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended, with the server
            self._loop.call_soon_threadsafe(send)
            done.wait(1.0)
        return sent

    def join(self) -> None:
        """Wait until every connection has ended."""
        self._thread.join()


def warm(root: Path) -> None:
    """List, look at and read a whole store, twice, so that a mount's caches know all of it."""
    for _ in range(2):
        for folder, _, names in os.walk(root):
            for name in names:
                with suppress(OSError):
                    Path(folder, name).read_bytes()
                    Path(folder, name).stat()


class Reigns:
    """One store and its writers, each deposed by the next."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        seed: int,
        mutant: str = "",
        limits: Sequence[str] = (INCESSANT_ROUNDS, NO_ROUNDS),
    ) -> None:
        """`limits`: of the journal, one of them for each server."""
        folder.mkdir(parents=True)
        self.place = place
        self.folder = folder
        self.random = random.Random(seed)
        self.crowd = Crowd(
            random.Random(seed),
            clients=10,
            watchers=2,
            neighbourhoods=10,
            neighbours=3,
            owned=5,
            pause=0.005,
        )
        self.mutant = mutant
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.undecided: list[str] = []
        self.what = "the first start"
        self._started: list[Pausable] = []
        self._decks: dict[int, list[tuple[str, int]]] = {}
        self.writer = self.server().start()
        self.epoch = claimed(place.truth)
        self.load = Load(self.writer.address, self.crowd, prepare=True)
        self.known: Index = dict.fromkeys([STILL, *self.crowd.mark_names], frozenset())

    # --- servers ----------------------------------------------------------------------------------

    @property
    def next_root(self) -> Path:
        """The path by which the next server reaches the store."""
        return self.place.roots[len(self._started) % len(self.place.roots)]

    def server(self, *options: str, stop: Stop | None = None, traced: bool = False) -> Pausable:
        """Return the next server, not started. `stop`: where in its claim it stops; `traced`: the calls
        of its claim are written down."""
        root, number = self.next_root, len(self._started)
        limit = self.random.choice(self.limits)
        server = Pausable(
            f"file:{root}",
            *("--journal-limit", limit),
            *options,
            mutant=self.mutant,
            stop=stop,
            calls=CLAIM_CALLS if traced else (),
            paths=self.claimed_paths(root) if stop or traced else (),
            trace=self.folder / f"claim-{number}.trace" if stop or traced else None,
        )
        self._started.append(server)
        return server

    def claimed_paths(self, root: Path) -> list[str]:
        """What the next claim will be about, by the paths of the claimant's mount."""
        below = ["staging", "journal", "forward", "reverse", "LOCK", "FORMAT"]
        highest = claimed(self.place.truth)
        for epoch in range(highest, highest + 2):
            below += [f"staging/{epoch:08x}{name}" for name in ("", "/owner", "/segment")]
            below += [f"journal/{epoch:08x}-{segment:08x}" for segment in range(3)]
        return [str(root), *(str(root / one) for one in below)]

    def end(self) -> None:
        """End every server; harmless once more."""
        for server in self._started:
            with suppress(AssertionError):
                server.send_signal(signal.SIGCONT)
            with suppress(AssertionError):
                server.kill()
            server.log_file.unlink(missing_ok=True)
        self.load.join()

    # --- one change of writers --------------------------------------------------------------------

    def go_on(self, kinds: dict[str, int]) -> None:
        """Depose the writer in one of these ways, which the seed chooses."""
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        at = claim = None
        if kind in ("stopped", "held", "between"):
            if self.random.random() < 0.3:
                at = self.draw(ROUND_CALLS, self.package_folders())
            else:
                at = self.draw(COMMIT_CALLS)
            if kind == "held" or (kind == "between" and self.random.random() < 0.3):
                at = replace(at, held=HELD)
        if kind in ("between", "claimant"):
            claim = self.draw(CLAIM_CALLS)
        if kind == "warm":
            self.deceive()
        elif kind.startswith("brick"):
            self.lose_brick(idle=kind.endswith("idle"))
        else:
            self.depose(kind, at, claim)

    def lose_brick(self, *, idle: bool) -> None:
        """Kill the brick and start it again under the writer, and start the next one without `--takeover`.

        A writer that is busy finds out, and ends. One that is idle does not, and its lock is gone."""
        volume, first = self.place.volume, self.writer
        assert volume is not None
        self.counts["take-overs"] += 1
        under = "an idle" if idle else "a busy"
        self.what = f"take-over {self.counts['take-overs']}, the brick dies under {under} writer"
        time.sleep(self.random.uniform(0.02, LONGEST_UNDISTURBED))
        if idle:
            self.load.be_quiet()
            self.settle(first, read_index(self.place.truth))  # it asks the store for nothing more
        volume.kill_brick()
        if not idle:
            self.expect_end("the writer whose brick is gone", first, (5,))
        volume.start_brick()
        self.counts["bricks killed"] += 1
        second = self.server()
        try:
            second.start()
            self.counts["locks lost with the brick"] += idle
        except ServerFailed:
            if not idle or second.exit_code != OWNED:
                raise
            second = self.server("--takeover").start()
        with Pause(first.pid, None, self.folder) as pause:
            self.judge_takeover(pause, second, None, time.time())

    def deceive(self) -> None:
        """Let the next one's mount know the whole store, then let the writer write more, then depose it."""
        self.counts["take-overs"] += 1
        self.what = f"take-over {self.counts['take-overs']}, through caches that are warm and wrong"
        first, load = self.writer, self.load
        time.sleep(self.random.uniform(0.02, LONGEST_UNDISTURBED))
        root = self.next_root
        claimant = self.begin_claim(BEFORE_THE_CLAIM)
        load.be_quiet()
        warm(root)
        load.go_on()
        time.sleep(self.random.uniform(0.02, LONGEST_UNDISTURBED))
        claimant.let_go()
        claimant.wait_for("serving")
        self.counts["caches warm and wrong"] += 1
        with Pause(first.pid, None, self.folder) as pause:
            self.judge_takeover(pause, claimant, None, time.time())

    def draw(self, calls: Calls, paths: tuple[str, ...] = ()) -> Stop:
        """Draw a place out of all of a kind; each is drawn once before one is drawn again."""
        deck = self._decks.setdefault(id(calls), [])
        if not deck:
            deck += [(call, n) for call, (a, b) in calls.items() for n in range(a, b + 1)]
            self.random.shuffle(deck)
        return Stop(*deck.pop(), paths=paths)

    def package_folders(self) -> tuple[str, ...]:
        """Where the writer's package files are, by the paths of its mount."""
        root = self.writer.root
        return tuple(
            f"{root}/{kind}/{n:02x}" for kind in ("forward", "reverse") for n in range(256)
        )

    def depose(self, kind: str, at: Stop | None, claim: Stop | None) -> None:
        """One change of writers, and its judgement.

        `at`: where the first is stopped or held; `claim`: where the next one is stopped in its claim,
        for the first to wake in between, or for a third to take over from both ("claimant")."""
        self.counts["take-overs"] += 1
        self.what = f"take-over {self.counts['take-overs']}, {kind}: {at or 'anywhere'}"
        self.what += f", claim {claim}" if claim else ""
        time.sleep(self.random.uniform(0.02, LONGEST_UNDISTURBED))
        first, load = self.writer, self.load
        with Pause(first.pid, at, self.folder) as pause:
            if at:
                there = pause.wait(LONGEST_WAIT)
                how = "held at a call" if at.held else "stopped at a call"
                self.counts[f"writers {how if there else 'stopped anywhere'}"] += 1
            elif kind == "frozen":
                first.send_signal(signal.SIGSTOP)
                self.counts["writers stopped anywhere"] += 1
            elif kind == "idle":
                load.be_quiet()
                self.counts["writers deposed when idle"] += 1
            else:
                self.counts["writers deposed under load"] += 1
            claimant = self.begin_claim(claim) if claim else None
            if claimant and (kind == "between" or claimed(self.place.truth) == self.epoch):
                deposed = self.wake_between(pause, claimant)
                claimant.wait_for("serving")
                second, claimant = claimant, None
            else:
                second, deposed = self.server("--takeover").start(), 0.0
            self.judge_takeover(pause, second, claimant, deposed or time.time())

    def begin_claim(self, claim: Stop) -> Pausable:
        """Start a server that stops in its claim."""
        claimant = self.server("--takeover", stop=claim).begin()
        there = claimant.wait_until_stopped(LONGEST_CLAIM)
        self.counts[f"claimants {'stopped at a call' if there else 'not stopped'}"] += 1
        return claimant

    def wake_between(self, pause: Pause, claimant: Pausable) -> float:
        """Let the first go on in the middle of the next one's claim, or before it; give the time when the
        first was seen to be deposed, 0 if it was not yet."""
        gone = not (self.place.truth / "staging" / f"{self.epoch:08x}").exists()
        deposed = time.time() if gone else 0.0
        pause.end_hold()
        pause.wake()
        time.sleep(0.1)
        claimant.let_go()
        return deposed

    def judge_takeover(
        self, pause: Pause, second: Pausable, claimant: Pausable | None, deposed: float
    ) -> None:
        """Wake the first, see it end, and judge what it has said and done."""
        first, load = self.writer, self.load
        found = self.look(second)
        # Alone, what has no effect is not carried by a change that fails.
        late = load.ask_late(WITHOUT_EFFECT if load.is_quiet else LATE)
        sleeps = self.random.random() < LATE_WAKES
        picture = self.settle(second, found) if pause.stops and sleeps else None
        ended = self.rounds(second) if picture else 0
        pause.end_hold()
        pause.wake()
        self.expect_end("the deposed writer", first, (5,), late)
        if claimant:
            self.judge_claimant(claimant)
        load.join()
        self.failures += [f"{self.what}: a client failed: {error!r}" for error in load.failed]
        if answered := [call for call in late if call.reply is not None]:
            self.fail(f"answered after it was deposed: {', '.join(map(str, answered))}")
        if changes := pause.changes_since(deposed):
            self.fail(f"changed {len(changes)} names after it was deposed, first: {changes[0]}")
        if self.look(second) != found:
            self.fail("the index is another one after the deposed writer woke")
        if picture is not None:
            now = picture_of(self.place.truth)
            if picture != now:
                time.sleep(LONGEST_END_OF_A_ROUND)
            if self.rounds(second) != ended:
                self.counts["pictures that a round spoiled"] += 1
                picture = now
            else:
                self.counts["stores compared file by file"] += 1
            if other := sorted({path for path, _ in picture.items() ^ now.items()}):
                self.fail(f"not as before the deposed writer woke: {', '.join(other[:8])}")
        self.judge(load.history, found)
        if ask(second, ["REMOVE|unknown|"]) != [b"OK\n"]:
            self.fail("the server that took over does not acknowledge")
        self.writer, self.epoch, self.known = second, claimed(self.place.truth), found
        self.load = Load(second.address, self.crowd)

    def judge_claimant(self, claimant: Pausable) -> None:
        """Wake one that was stopped in its claim, and has been overtaken: it must withdraw."""
        claimant.let_go()
        with suppress(ServerFailed):
            claimant.wait_for("serving", TO_END)
        if claimant.events("serving"):
            # It was all but ready, and learns that it is deposed when somebody asks it.
            with suppress(EOFError, ConnectionError), Wire(claimant.address, TO_END) as wire:
                reply = wire.ask(b"REMOVE|unknown|")
                self.fail(f"a claimant that was overtaken answered {reply!r}")
        self.expect_end("the overtaken claimant", claimant, (3, 5))

    def expect_end(
        self, who: str, server: Pausable, codes: tuple[int, ...], late: Sequence[Call] = ()
    ) -> None:
        """Wait for a server's end, and wake it if it stops once more; answers to `late` are the other end."""
        deadline = time.monotonic() + TO_END
        while server.exit_code is None and time.monotonic() < deadline:
            if any(call.reply is not None for call in late):
                break
            server.send_signal(signal.SIGCONT)
            time.sleep(0.02)
        try:
            code = server.wait(2.0)
        except ServerFailed as error:
            self.fail(f"{who} did not end: {error}")
            return
        text = "\n".join(server.lines[-20:])
        if code not in codes or "Traceback" in text:
            self.fail(f"{who} ended with {code}: {text}")

    # --- judgement --------------------------------------------------------------------------------

    def fail(self, what: str) -> None:
        """Note what went wrong, and in which take-over."""
        self.failures.append(f"{self.what}: {what}")

    def look(self, server: Pausable) -> Index:
        """Read the index out of the files, and ask the server whether it has just that."""
        deadline = time.monotonic() + TO_END
        found: Index | None = None
        while found is None:
            assert time.monotonic() < deadline, "the store does not hold still"
            with suppress(FileNotFoundError):  # a round of the server goes on meanwhile
                found = read_index(self.place.truth)
        names = sorted({*found, *self.known, *self.crowd.names, "unknown", "refused", "too-late"})
        replies = ask(server, [f"QUERY|{name}|" for name in names])
        for name, reply in zip(names, replies, strict=True):
            if (reply == b"OK\n") != (name in found):
                self.fail(f"the files and the server that took over disagree about {name}")
        return found

    def settle(self, server: Pausable, index: Index) -> dict[str, tuple[int, int, int]]:
        """Wait until the server's rounds are over, and return a picture of the store."""
        deadline = time.monotonic() + TO_SETTLE
        picture = None
        while time.monotonic() < deadline:
            before = self.rounds(server)
            time.sleep(0.2)
            with suppress(FileNotFoundError, AssertionError):
                now = picture_of(self.place.truth)
                quiet = picture == now and nothing_is_behind(self.place.truth)
                quiet = quiet and read_files(self.place.truth, "forward") == index
                if quiet and before == self.rounds(server):
                    return now
                picture = now
        self.fail(f"the package files lag behind after {TO_SETTLE} s")
        return picture_of(self.place.truth)

    def rounds(self, server: Pausable) -> int:
        """How many rounds it has ended. AssertionError if it does not say so."""
        told = len(server.events("counters"))
        server.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + TO_END
        while len(events := server.events("counters")) == told:
            assert time.monotonic() < deadline, "no counters"
            time.sleep(0.01)
        return int(events[-1]["rounds"])

    def judge(self, history: History, found: Index) -> None:
        """Compare everything that clients were told with what the next one serves."""
        self.counts["answers judged"] += history.answered
        for violation in judge(history.calls, self.known, found, BUDGET):
            (self.undecided if violation.is_undecided else self.failures).append(
                f"{self.what}: {violation}"
            )


def ask(server: Pausable, lines: list[str]) -> list[bytes]:
    """Ask a server that has just taken over. ServerFailed if it does not serve any more."""
    try:
        with Wire(server.address) as wire:
            return wire.ask_all(line.encode() for line in lines)
    except (ConnectionError, EOFError) as error:
        said = "\n".join(server.lines[-3:])
        raise ServerFailed(f"it does not serve any more ({error}): {said}") from None


def claimed(root: Path) -> int:
    """The highest epoch that anybody has claimed."""
    return max((int(path.name, 16) for path in (root / "staging").iterdir()), default=0)


def picture_of(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of a store: which it is, its size and when it was changed."""
    found = {}
    for path in root.rglob("*"):
        if path.is_file():
            facts = path.stat()
            found[str(path.relative_to(root))] = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return found
