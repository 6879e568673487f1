"""No memory: each allocation of the core fails in turn, and servers with less memory than they need.

- *core*: the n-th allocation of a graph fails, for each n, by seeds: the change is refused as if it had
  never come, and with memory again it succeeds.
- *allocation*: the same in a server: it ends at once, with one line, and its store has all it acknowledged.
- *limit*: servers whose address space is limited, at random sizes, under clients that want more and more,
  of the index and of the connections: all goes on, or ends so.

What the kernel kills for want of memory is killed by SIGKILL: that is the campaign `kill`.
"""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from pkgindex._core import Graph
from tests.core.hunger import hungry_lines, refuse_each
from tests.reference import OK
from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import read_index
from tests.torture.campaign import Campaign, Run

__all__ = ["CAMPAIGNS"]

GRAPHS = (40, 2)  # full, quick
ALLOCATIONS = (120, 4)  # at most
LIMITS_SHARE = 0.4  # of the time, for servers with a limit
LIMITS = (60, 12)
MOST_ROOM = 4 << 20  # bytes above what a server needs to start
AT_ONCE = 1000  # changes in a pipeline
MOST_CHANGES = 15_000  # of one server; each is two files in the end
LINES = 40  # connections with a long unfinished line each
SOON = 10.0  # seconds, for a process that is full of memory and a machine that is busy
OUT_OF_MEMORY = 5  # exit code

PRELUDE = """
from pkgindex import _core, server
begin = server._Server.__init__
def hungry(self, *arguments, **named):
    begin(self, *arguments, **named)
    _core.fail_allocation({n})
server._Server.__init__ = hungry
"""

WRONG = """
import pkgindex.index.file as file
begin_index = file.FileIndex.__init__
def lying(self, *arguments, **named):
    begin_index(self, *arguments, **named)
    apply = self.apply
    def cannot_say_no(batch):
        try:
            return apply(batch)
        except MemoryError:
            return b"OK\\n" * batch.buffer[batch.start:batch.stop].count(b"\\n")
    self.apply = cannot_say_no
file.FileIndex.__init__ = lying
"""


class Hungry(Server):
    """A server that gets no more memory at some moment."""

    def __init__(self, store: str, mutation: str = "", limit: int = 0) -> None:
        """`limit`: bytes of address space; `mutation`: Python that runs first."""
        super().__init__(store)
        if mutation:
            place = self._command.index("-m")
            main = "from pkgindex.cli import main; main()"
            self._command[place : place + 2] = ["-c", f"{mutation}\n{main}"]
        if limit:
            place = self._command.index("KILL") + 1
            self._command[place:place] = ["prlimit", f"--as={limit}"]


def pipelines(seed: int) -> Iterator[list[bytes]]:
    """Give ever more packages, some with many dependencies."""
    names: list[bytes] = []
    for start in range(0, MOST_CHANGES, AT_ONCE):
        fresh = [b"p%d-%d-%b" % (seed, start + i, b"n" * 200) for i in range(AT_ONCE)]
        yield [
            b"INDEX|%b|%b" % (name, b",".join(names[-(i % 5) :]) if i % 5 else b"")
            for i, name in enumerate(fresh)
        ]
        names += fresh


def feed(server: Server, seed: int) -> tuple[set[bytes], bool]:
    """Index until the server ends, or all is told: the packages it acknowledged, and whether it ended.

    TimeoutError if it answers no more and does not end."""
    acknowledged: set[bytes] = set()
    with suppress(ConnectionError, EOFError), Wire(server.address, patience=SOON) as wire:
        for lines in pipelines(seed):
            replies = wire.ask_all(lines)
            assert set(replies) == {OK}, set(replies)
            acknowledged.update(line.split(b"|")[1] for line in lines)
        return acknowledged, False
    return acknowledged, True


def judge_end(server: Server, root: Path | None, acknowledged: set[bytes]) -> None:
    """One line, an exit code that tells, nothing lost. AssertionError."""
    code = server.wait(SOON)
    text = "\n".join(server.lines)
    assert code == OUT_OF_MEMORY, (code, text[-2000:])
    assert "Traceback" not in text, text[-2000:]
    (reason,) = [event["reason"] for event in server.events("stopped: the storage failed")]
    assert "memory" in reason, reason
    if root is not None:
        judge_store(root, acknowledged)


def judge_store(root: Path, acknowledged: set[bytes]) -> None:
    """The next server, and the files, have what was acknowledged."""
    found = read_index(root)
    lost = acknowledged - {name.encode() for name in found}
    assert not lost, f"{len(lost)} acknowledged packages are not in the files"
    for name, needs in found.items():
        assert needs <= found.keys(), f"{name} depends on what is not there"
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        replies = wire.ask_all([b"QUERY|%b|" % name for name in sorted(acknowledged)])
        assert set(replies) <= {OK}, "acknowledged packages are lost"
        server.kill()  # its files are the business of others


def fail_in_core(run: Run) -> None:
    """Each allocation of a graph, in turn."""
    for number in range(run.scale(*GRAPHS)):
        lines = hungry_lines(run.seed + number)[:: run.scale(1, 4)]
        run.counts["allocations of the core refused"] += refuse_each(
            Graph(journalled=number % 2 == 0), lines
        )
        run.counts["graphs"] += 1


def fail_in_server(run: Run) -> None:
    """Each allocation of a server's graph after its start, until one is never reached."""
    if run.full:
        numbers = list(range(ALLOCATIONS[0]))
    else:
        numbers = sorted(run.random.sample(range(20), ALLOCATIONS[1]))
    for done, n in enumerate(numbers):
        if run.is_late(LIMITS_SHARE * run.seconds):
            run.skipped.append(f"allocations from number {n}: the time was up")
            return
        root = run.folder / "allocation"
        try:
            with Hungry(f"file:{root}", PRELUDE.format(n=n)) as server:
                acknowledged, ended = feed(server, n)
                if not ended:
                    # What is left to do is to write the files, which takes memory too.
                    server.send_signal(signal.SIGTERM)
                    if server.wait() == 0:
                        run.counts["servers with memory enough"] += 1
                        return
                judge_end(server, root, acknowledged)
            run.counts["allocations of a server refused"] += 1
        except (AssertionError, OSError) as error:
            run.fail(f"allocation {n} of a server: {str(error)[:3000]}")
        shutil.rmtree(root, ignore_errors=True)
        run.progress(done, len(numbers) + run.scale(*LIMITS))


def size(pid: int) -> int:
    """How much address space a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def limit_servers(run: Run) -> None:
    """Servers with a limit: most from a moment at which they serve, some from their start."""
    total = run.scale(*LIMITS)
    with Server(f"file:{run.folder / 'first'}") as server:
        needed = size(server.pid)
    for number in range(total):
        if run.is_late():
            run.skipped.append(f"{total - number} servers with a limit: the time was up")
            return
        root = run.folder / f"limit-{number}"
        store = "memory:" if number % 3 == 2 else f"file:{root}"
        room = run.random.randrange(MOST_ROOM)
        what = f"{store[:6]} with {room >> 10} KiB more than when it serves"
        try:
            if number % 4 == 3:
                room = -run.random.randrange(needed * 9 // 10)
                what = f"{store[:6]} with {-room >> 10} KiB less than it has when it serves"
                start_server(run, store, needed + room)
            else:
                limit_server(run, store, room, number)
        except (AssertionError, OSError) as error:
            run.fail(f"{what}: {type(error).__name__}: {str(error)[:3000]}")
        shutil.rmtree(root, ignore_errors=True)
        run.progress(number, total)


def start_server(run: Run, store: str, limit: int) -> None:
    """Start one that has too little for it, perhaps: it does, or ends."""
    try:
        with Hungry(store, limit=limit) as server, Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == OK
            run.counts["servers started with less memory"] += 1
    except (ServerFailed, ConnectionError, EOFError):
        run.counts["servers with too little to start"] += 1


def limit_server(run: Run, store: str, room: int, number: int) -> None:
    """One of them: first long lines of many, in each second one, then more packages than it can hold."""
    with Server(store) as server, ExitStack() as stack:
        limit = size(server.pid) + room
        resource.prlimit(server.pid, resource.RLIMIT_AS, (limit, limit))
        if number % 2:
            for _ in range(LINES):
                with suppress(OSError):
                    wire = stack.enter_context(Wire(server.address, patience=SOON))
                    wire.send(b"INDEX|" + b"x" * 900_000)
        acknowledged, ended = feed(server, number)
        if ended:
            root = None if store == "memory:" else Path(store.removeprefix("file:"))
            judge_end(server, root, acknowledged)
            run.counts["servers ended for want of memory"] += 1
        else:
            assert "Traceback" not in "\n".join(server.lines), server.lines[-30:]
            run.counts["servers with memory enough"] += 1


def find_wrong(run: Run) -> None:
    """A server that says OK although it had no memory is found out."""
    root = run.folder / "wrong"
    try:
        with Hungry(f"file:{root}", WRONG + PRELUDE.format(n=6)) as server:
            acknowledged, _ = feed(server, 0)
            server.kill()
        judge_store(root, acknowledged)
    except (AssertionError, OSError):
        run.counts["mutants caught"] += 1
    else:
        run.fail("a server that says OK although it had no memory was not found out")


def memory(run: Run) -> None:
    """The campaign."""
    find_wrong(run)
    fail_in_core(run)
    fail_in_server(run)
    limit_servers(run)


def absent() -> str | None:
    """Why this machine cannot run it."""
    for tool in ("prlimit", "setpriv"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (util-linux)"
    return None


CAMPAIGNS = (
    Campaign(
        "memory",
        "Each allocation of the core fails, and servers have less memory than they need: a change is "
        "refused, or the server ends with one line; never a broken graph, nothing acknowledged lost.",
        memory,
        absent,
        seconds=(60.0, 300.0),
    ),
)
