"""A long life under mixed load and random faults: answers stay right, memory and descriptors stay flat.

One server serves 50 clients at a measured pace, while faults befall it: connections reset in the middle of
a pipeline, lines without end, clients that read nothing, floods of connections, half-closes, signals, a
process that is held and goes on. The history is judged in chapters. Between two of them the crowd falls
silent and one client levels the index, so that each chapter begins from what is known; and in that quiet the
server's memory and descriptors are read. At the end it is killed, and its files are judged as ever.

Flat means: no more descriptors in any quiet moment than in the first, and a line through the memory of the
quiet moments (least squares; the first fifth left out, in which tables still grow to their size) that rises
by less than GROWTH over the whole run.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import socket
import statistics
import time
from contextlib import suppress
from pathlib import Path

from pkgindex.store._disk import shard
from tests.servers import Server
from tests.store.reading import read_index
from tests.torture.campaign import Campaign, Run
from tests.torture.clients import Crowd
from tests.torture.history import Client, History
from tests.torture.kill import keep
from tests.torture.linearizability import Index, judge
from tests.torture.mutants import Mutant

__all__ = ["CAMPAIGNS", "LongLife"]

RUN_SECONDS = (1800.0, 40.0)  # full, quick
MUTANT_SECONDS = 15.0  # for a server that leaks
CHAPTER_SECONDS = (10.0, 3.0)  # full, quick: what one judgement covers
FEWEST = 5  # quiet moments, from which a slope can be told
FAULTS_A_SECOND = 4.0
PAUSE = 0.05  # seconds between two pipelines of a client: about 2,000 messages a second

#: What memory may rise by over a run, as its line has it: noise, where a leak of 32 bytes a message is not.
GROWTH = 0.05, 2 << 20  # a share of it, or bytes if that is more

LONGEST_ROUND = 60.0  # seconds, of a thousand files, on a disk that others keep busy
LONGEST_HOLD = 0.3  # of the whole process
MAX_LINE = 64 << 10
SHARDS = 256  # folders of packages, and as many of dependents
CHURN = 20  # names a pipeline that are new, and are removed again

#: A mistake of the product that this campaign must find.
WRONG = "leaks"


class LongLife:
    """One server and all that happens to it."""

    def __init__(self, run: Run, seconds: float, mutant: str = "") -> None:
        self.run = run
        self.seconds = seconds
        self.random = random.Random(run.seed)
        self.crowd = Crowd(random.Random(run.seed), pause=PAUSE)
        self.folder = run.folder / (mutant or "long")
        self.root = self.folder / "index"
        options = ("--max-line", str(MAX_LINE), "--journal-limit", "4m")
        self.server: Server = Mutant(mutant, f"file:{self.root}", *options)
        self.failures: list[str] = []
        self.memory: list[tuple[float, int]] = []  # minutes, bytes: in quiet moments
        self.descriptors: list[int] = []
        self.clients: list[Client] = []
        self.churned = 0
        self.slope = 0.0  # bytes a minute

    def live(self) -> None:
        """Live to the end, be killed, and be judged."""
        self.folder.mkdir(parents=True)
        with self.server as server:
            history, before = asyncio.run(self.serve(server))
            server.kill()
            if any(line.startswith("Traceback") for line in server.lines):
                self.failures.append("a traceback in the log:\n" + "\n".join(server.lines[-30:]))
        self.judge(history, before, read_index(self.root))
        self.fit()

    async def serve(self, server: Server) -> tuple[History, Index]:
        """Chapter after chapter; the last one's history, which the files must end."""
        # Not of any history: it outlasts all of them, and is never at work beside the crowd.
        leveller = await History().connect(server.address)
        await self.warm_up(leveller)
        began = time.monotonic()
        chapter = CHAPTER_SECONDS[0 if self.run.full else 1]
        while True:
            before = await self.crowd.level(leveller)
            await self.measure(server, (time.monotonic() - began) / 60)
            history = History()
            await self.serve_chapter(server, history, chapter)
            self.run.counts["calls"] += len(history.calls)
            self.run.counts["answers judged"] += history.answered
            self.run.progress(int(time.monotonic() - began), int(self.seconds))
            ended = server.exit_code is not None
            if ended:
                self.failures.append(f"the server ended by itself, with {server.exit_code}")
            over = time.monotonic() - began > self.seconds and len(self.memory) >= FEWEST
            if ended or self.failures or over:
                return history, before
            self.judge(history, before, None)

    async def serve_chapter(self, server: Server, history: History, seconds: float) -> None:
        """Let the crowd talk for a while, with faults; return when it is silent again."""
        self.crowd.silent = False
        numbers = range(self.crowd.clients)
        self.clients = [await history.connect(server.address) for _ in numbers]
        talking = [asyncio.create_task(self.talk(server, history, number)) for number in numbers]
        talking.append(asyncio.create_task(self.churn(await history.connect(server.address))))
        faults: set[asyncio.Task[None]] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self.random.choice(FAULTS)
            faults.add(asyncio.create_task(fault(self, server)))
            await asyncio.sleep(self.random.expovariate(FAULTS_A_SECOND))
        for ended in await asyncio.gather(*faults, return_exceptions=True):
            if ended is not None and not isinstance(ended, ConnectionError):
                self.failures.append(f"a client that should be served was not: {ended!r}")
        self.crowd.silent = True
        for ended in await asyncio.gather(*talking, return_exceptions=True):
            if ended is not None:
                self.failures.append(f"a client waited, or was sent away: {ended!r}")
        for client in self.clients:
            client.reset()

    async def talk(self, server: Server, history: History, number: int) -> None:
        """A client of the crowd, and its successors when its connection is reset."""
        while not self.crowd.silent:
            await self.crowd.talk(self.clients[number], number)
            if not self.crowd.silent:
                self.clients[number] = await history.connect(server.address)

    async def churn(self, client: Client) -> None:
        """Index names that never were before, and remove them again."""
        while not self.crowd.silent:
            names = [f"new-{self.churned + n}" for n in range(CHURN)]
            self.churned += CHURN
            await client.ask(f"INDEX|{name}|" for name in names)
            await client.ask(f"REMOVE|{name}|" for name in names)
            await asyncio.sleep(PAUSE)
        client.reset()

    async def warm_up(self, client: Client) -> None:
        """Touch every folder of the store once, for a writer keeps them open."""
        names: dict[str, str] = {}
        for number in itertools.count():
            names.setdefault(shard(f"warm-{number}", SHARDS), f"warm-{number}")
            if len(names) == SHARDS:
                break
        first, *others = names.values()
        chain = [f"INDEX|{above}|{below}" for below, above in itertools.pairwise(names.values())]
        await client.ask([f"INDEX|{first}|", *chain, f"INDEX|{first}|{others[-1]}"])
        await self.written()
        await client.ask(f"INDEX|{name}|" for name in names.values())
        await client.ask(f"REMOVE|{name}|" for name in names.values())

    async def written(self) -> None:
        """Wait until no client is left but the leveller, and no file lags behind: no round is under way."""
        deadline = time.monotonic() + LONGEST_ROUND
        while time.monotonic() < deadline:
            told = len(self.server.events("counters"))
            self.server.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.2)
            counters = self.server.events("counters")[told:]
            if counters and counters[-1]["behind"] == 0 and counters[-1]["clients"] == 1:
                return
        self.failures.append(
            f"package files lag behind after {LONGEST_ROUND:.0f} s without a change"
        )

    # --- faults -----------------------------------------------------------------------------------

    async def reset(self, server: Server) -> None:
        """A client breaks off, perhaps in the middle of a pipeline."""
        self.run.counts["resets"] += 1
        self.random.choice(self.clients).reset()

    async def flood(self, server: Server) -> None:
        """A hundred connections that say nothing."""
        self.run.counts["connections in floods"] += 100
        opened = [await asyncio.open_connection(*server.address) for _ in range(100)]
        for _, writer in opened:
            writer.close()

    async def endless_line(self, server: Server) -> None:
        """Half a megabyte without a line feed: one ERROR, and the connection goes on."""
        self.run.counts["lines without end"] += 1
        reader, writer = await asyncio.open_connection(*server.address)
        for _ in range(8):
            writer.write(b"x" * MAX_LINE)
            await asyncio.sleep(0.01)
        writer.write(b"\nQUERY|new-|\n")
        async with asyncio.timeout(30):
            replies = await reader.readline(), await reader.readline()
        if replies != (b"ERROR\n", b"FAIL\n"):
            self.failures.append(f"a line without end, then a QUERY: {replies}")
        writer.close()

    async def read_nothing(self, server: Server) -> None:
        """Tens of thousands of questions, and no interest in the answers."""
        self.run.counts["clients that read nothing"] += 1
        loop = asyncio.get_running_loop()
        with socket.socket() as deaf:
            deaf.setblocking(False)
            await loop.sock_connect(deaf, server.address)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await loop.sock_sendall(deaf, b"QUERY|new-|\n" * 200_000)

    async def half_close(self, server: Server) -> None:
        """Everything that was sent before the half-close is answered, then the connection ends."""
        self.run.counts["half-closes"] += 1
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"QUERY|new-|\n" * 1000)
        writer.write_eof()
        async with asyncio.timeout(30):
            told = await reader.read(1 << 20)
            while more := await reader.read(1 << 20):
                told += more
        if told != b"FAIL\n" * 1000:
            self.failures.append(f"a half-close was answered with {len(told)} bytes, not 5000")
        writer.close()

    async def hold(self, server: Server) -> None:
        """The whole process is held for a while, as by a machine without time for it."""
        self.run.counts["holds"] += 1
        server.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.uniform(0, LONGEST_HOLD))
        server.send_signal(signal.SIGCONT)

    async def signal(self, server: Server) -> None:
        """A signal that an operator sends: write the counters, read the log's level again."""
        self.run.counts["signals"] += 1
        server.send_signal(self.random.choice((signal.SIGUSR1, signal.SIGHUP)))

    # --- judgement --------------------------------------------------------------------------------

    async def measure(self, server: Server, minutes: float) -> None:
        """Read memory and descriptors in the quiet, when all files are written."""
        await self.written()
        self.descriptors.append(descriptors_of(server.pid))
        self.memory.append((minutes, memory_of(server.pid)))

    def judge(self, history: History, before: Index, after: Index | None) -> None:
        """Is there an order of this chapter's calls that explains its answers?"""
        self.run.counts["chapters"] += 1
        wrong = []
        for violation in judge(history.calls, before, after):
            if violation.is_undecided:
                self.run.skipped.append(f"a part of a history: {violation}")
            else:
                wrong.append(str(violation))
        if wrong:
            kept = self.folder / f"chapter-{self.run.counts['chapters']}.json"
            keep(kept, history.calls, before, after or {})
            self.failures += [f"{one} ({kept})" for one in wrong]

    def fit(self) -> None:
        """Judge what was measured."""
        if max(self.descriptors) > self.descriptors[0]:
            self.failures.append(f"descriptors in the quiet: {self.descriptors}")
        settled = self.memory[len(self.memory) // 5 :]
        if len(self.memory) < FEWEST:
            return  # it ended early, and that is a failure of its own
        minutes, found = zip(*settled, strict=True)
        self.slope = statistics.linear_regression(minutes, found).slope
        rise = self.slope * (minutes[-1] - minutes[0])
        if rise > max(GROWTH[0] * found[0], GROWTH[1]):
            self.failures.append(
                f"memory rose by {rise / 1024:.0f} KiB in {minutes[-1] - minutes[0]:.1f} minutes, "
                f"from {found[0] >> 10} to {found[-1] >> 10} KiB"
            )


def descriptors_of(pid: int) -> int:
    """How many files a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def memory_of(pid: int) -> int:
    """The bytes of memory that a process has for itself, without mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


FAULTS = (
    LongLife.reset,
    LongLife.reset,
    LongLife.flood,
    LongLife.endless_line,
    LongLife.read_nothing,
    LongLife.half_close,
    LongLife.hold,
    LongLife.signal,
)


def long_run(run: Run) -> None:
    """The campaign."""
    quiet = Run(run.seed, False, run.folder, run.seconds)
    wrong = LongLife(quiet, MUTANT_SECONDS, WRONG)
    wrong.live()
    for leak in ("descriptors", "memory"):
        found = any(failure.startswith(leak) for failure in wrong.failures)
        run.counts["mutants caught"] += found
        if not found:
            run.fail(f"a server that leaks {leak} went unnoticed")
    life = LongLife(run, run.scale(*map(int, RUN_SECONDS)))
    life.live()
    for failure in life.failures:
        run.fail(failure)
    run.counts["KiB at first"] = life.memory[0][1] >> 10
    run.counts["KiB at last"] = life.memory[-1][1] >> 10
    run.counts["bytes a minute: the memory's slope"] = round(life.slope)
    run.counts["descriptors at first"] = life.descriptors[0]
    run.counts["descriptors at last"] = life.descriptors[-1]


CAMPAIGNS = (
    Campaign(
        "long-run",
        "Half an hour of mixed load with random faults: the answers stay right, and memory and file "
        "descriptors flat.",
        long_run,
        seconds=(120.0, 2100.0),
        form="long",
    ),
)
