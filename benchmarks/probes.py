"""What is measured besides rates on the wire: bytes, files, starts, and how costs grow.

A probe takes a folder of its own on the disk to measure, and a scale (1 is the real size, less is a
trial), and gives figures by name. Each checks what it measured. Raises BenchError, tables.Absent.
"""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import core
import machine
import tables
from runs import WARMUP
from servers import Bare, BenchError, Pkgindex, PkgindexInMemory, Server, output_of
from workloads import MEMORY_A_PACKAGE, NEW

Figures = dict[str, float]

IDLE = 10_000  # connections
JOURNALLED = 200_000  # changes: so few that all are in the journal before the first round can begin
JOURNAL_LIMIT = (
    "2m"  # some 50,000 changes: small, so that changes wait for package files all the time
)
STEADY_SECONDS = 15
BURSTS, BURST_SECONDS, QUIET_SECONDS = 3, 0.5, 3.0
PATIENCE_SECONDS = 120
STARTED = 1_000_000
START_SECONDS = 600
LINE = "a random line of as much memory"
GROWTH = (10_000, 100_000, 1_000_000, 10_000_000)
GROWTH_PASSES = 3
STARTS = 3
LOCAL_WRITERS, REMOTE_WRITERS = 1, 8  # threads of pkgindex that write package files
LOCAL = ("ext", "xfs", "btrfs", "zfs", "f2fs", "tmpfs")


@dataclass(frozen=True)
class Probe:
    """A kind of measurement."""

    name: str
    title: str
    group: str
    measure: Callable[[Path, float], Figures]


def counters(server: Server) -> dict[str, int]:
    """What the server counts, written to its log at SIGUSR1."""
    log = server.folder / "log"
    before = log.read_text().count(" counters ")
    assert server.process is not None
    server.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while log.read_text().count(" counters ") == before:
        if time.monotonic() > deadline:
            raise BenchError(f"{server.name}: no counters in its log")
        time.sleep(0.01)
    line = log.read_text().rpartition(" counters ")[2].partition("\n")[0]
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)(?=\s|$)", line)}


def idle_connection(folder: Path, scale: float) -> Figures:
    """User memory of a connection that was used once and is idle; the kernel's is not counted."""
    found = {}
    wanted = max(200, round(IDLE * scale))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted + 200:
        raise tables.Absent(f"no {wanted:,} connections: the limit of open files is {hard:,}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for server in (Pkgindex(), Bare()):
        server.start(folder / server.name)
        connections: list[socket.socket] = []
        try:
            _connect(
                server, connections, 100
            )  # what the first ones cost is the server's, not theirs
            before = machine.resident_bytes(server.pid)
            _connect(server, connections, wanted)
            grown = machine.resident_bytes(server.pid) - before
            found[server.name] = grown / wanted
        finally:
            for one in connections:
                one.close()
            server.kill()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return {"connections": wanted, "bytes": found["pkgindex"], "bytes_bare": found["uvloop"]}


def _connect(server: Server, connections: list[socket.socket], count: int) -> None:
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", server.port), 10)
        connections.append(one)
        one.sendall(b"QUERY|nothing|\n")
        if one.recv(100) not in (b"OK\n", b"FAIL\n"):
            raise BenchError(f"{server.name}: a new connection is not answered")


def debian_memory(folder: Path, scale: float) -> Figures:  # noqa: ARG001
    """Bytes a package with Debian's table, by the allocator's count and as the server grows."""
    table = tables.debian()
    counted = core.memory(list(table))
    server = PkgindexInMemory()
    server.start(folder / "server")
    try:
        before = machine.resident_bytes(server.pid)
        server.load(table)
        grown = machine.resident_bytes(server.pid) - before
    finally:
        server.kill()
    return {
        "packages": len(table),
        "dependencies": counted["dependencies"],
        "bytes": counted["bytes a package"],
        "resident_bytes": grown / len(table),
    }


def growth(folder: Path, scale: float) -> Figures:  # noqa: ARG001
    """The core in indexes of growing size, five dependencies a package: `10000 query, miss` and so on.

    Medians of a few passes: what else the machine's memory is used for changes from minute to minute."""
    passes: list[Figures] = []
    for _ in range(GROWTH_PASSES):
        passes.append({})
        for full in GROWTH:
            if machine.available_bytes() < full * scale * MEMORY_A_PACKAGE:
                continue  # and the targets of this size are said to be not measured
            size = str(max(1000, round(full * scale)))
            program = machine.pinned(
                machine.SERVER_CPU, sys.executable, machine.HERE / "core.py", "--growth", size
            )
            one = json.loads(output_of(*program))
            one[LINE] = _line_ns(round(one["bytes a package"] * int(size)))
            passes[-1] |= {f"{size} {what}": value for what, value in one.items()}
    return {what: median(one[what] for one in passes if what in one) for what in passes[0]}


def _line_ns(size: int) -> float:
    """What the machine needs for a random line of so many bytes of memory."""
    program = machine.pinned(machine.SERVER_CPU, machine.compiled("peers/touch.c"), str(size))
    return float(json.loads(output_of(*program))["ns"])


def journal_bytes(folder: Path, scale: float) -> Figures:
    """Bytes in the journal for those of the messages; pipelined."""
    server = Pkgindex()
    server.start(folder / "server")
    messages = max(1600, round(JOURNALLED * scale))
    words = ["--template", server.index(NEW, []), "--connections", "16", "--depth", "1000"]
    try:
        server.generate(*words, "--count", str(messages))
    finally:
        server.kill()
    segments = list((server.folder / "store" / "journal").iterdir())
    written = b"".join(path.read_bytes() for path in segments)
    lines = written.count(b"\n+") + written.startswith(b"+")
    if lines != messages:
        raise BenchError(f"{server.name}: {messages} changes, {lines} of them in the journal")
    sent = messages * len("INDEX|p-0000-00000000|\n")
    return {"messages": messages, "message_bytes": sent, "journal_bytes": len(written)}


def write_behind(folder: Path, scale: float) -> Figures:
    """Files a second while changes wait for files, beside the same calls without a server."""
    seconds = max(4.0, STEADY_SECONDS * scale)
    kind = machine.file_system(folder)
    threads = LOCAL_WRITERS if kind.startswith(LOCAL) else REMOTE_WRITERS
    program = machine.compiled("peers/publish.c", "-O2", "-pthread")

    def bare(name: str) -> float:
        (folder / name).mkdir()
        words = [program, folder / name, str(seconds), str(threads)]
        return float(json.loads(output_of(*machine.pinned(machine.SERVER_CPU, *words)))["rate"])

    before = bare("before")
    server = Pkgindex()
    server.more = ("--journal-limit", JOURNAL_LIMIT)
    server.start(folder / "server")
    try:
        words = ["--template", server.index(NEW, []), "--connections", "16", "--depth", "1000"]
        # No stop of the load for its last answers, which wait for a round: the server is killed first.
        words += ["--seconds", str(START_SECONDS), "--until-killed"]
        load = [machine.compiled("load.c"), "--connect", f"127.0.0.1:{server.port}", *words]
        generator = subprocess.Popen(
            machine.pinned(machine.GENERATOR_CPU, *load), stdout=subprocess.DEVNULL
        )
        try:
            first, began = _end_of_round(server)
            time.sleep(seconds)
            last, ended = _end_of_round(server)
            if generator.poll() is not None:
                raise BenchError("the generator ended before the server did")
        finally:
            server.kill()
            generator.wait()
    finally:
        server.kill()
    after = bare("after")
    return {
        "threads": threads,
        "files_a_second": (last["files_written"] - first["files_written"]) / (ended - began),
        "bare_files_a_second": mean([before, after]),
        "rounds": last["rounds"] - first["rounds"],
    }


def _end_of_round(server: Server) -> tuple[dict[str, int], float]:
    """The counters when a round has just ended."""
    before = counters(server)["rounds"]
    now = _until(server, lambda now: now["rounds"] > before, "the end of a round")
    return now, time.monotonic()


def _until(server: Server, reached: Callable[[dict[str, int]], bool], what: str) -> dict[str, int]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached(now := counters(server)):
        if time.monotonic() > deadline:
            raise BenchError(f"{server.name}: {what} does not come")
        time.sleep(0.02)
    return now


def hot_reverse(folder: Path, scale: float) -> Figures:  # noqa: ARG001
    """How often the reverse file of a package is written that thousands of others come to depend on."""
    server = Pkgindex()
    server.start(folder / "server")
    try:
        server.load(tables.Rows([("hub", [])]))
        server.settle()
        first = counters(server)
        changes = 0
        for burst in range(BURSTS):
            words = ["--template", server.index(f"p-{burst}-%c-%d", ["hub"]), "--connections", "16"]
            times = ["--seconds", str(BURST_SECONDS), "--warmup", str(WARMUP)]
            stream = server.generate(*words, *times)["streams"][0]
            if stream["fail"] or stream["error"]:
                raise BenchError(f"{server.name}: a dependent of the hub is refused: {stream}")
            changes += stream["ok"]
            time.sleep(QUIET_SECONDS)
        server.settle()
        last = counters(server)
    finally:
        server.kill()
    written = last["files_written"] - first["files_written"]
    rounds = last["rounds"] - first["rounds"]
    if written < changes or not rounds:
        raise BenchError(
            f"{server.name}: {changes} new packages, {written} files in {rounds} rounds"
        )
    return {"changes": changes, "rounds": rounds, "reverse_writes": written - changes}


def start(folder: Path, scale: float) -> Figures:
    """Seconds of a start with a warm cache: after a stop, and after a SIGKILL with a journal to replay.

    `recovery` is what the server says of itself; the others are from the command to the first answer."""
    server = Pkgindex()
    server.start_seconds = START_SECONDS
    size = max(1000, round(STARTED * scale))
    table = tables.synthetic(size)
    changes = tables.Rows([(f"p-{i}", []) for i in range(size // 10)])
    found: Figures = {"packages": size}
    server.start(folder / "server")
    try:
        server.load(table)
        server.settle()
        _stop(server)
        found |= {f"{what}_after_stop": value for what, value in _starts(server, _stop).items()}
        server.load(changes)  # which are in the journal alone when it is killed
        server.kill()
        found |= {f"{what}_after_kill": v for what, v in _starts(server, Server.kill).items()}
        for rows in (table, changes):
            server.send_all(map(server.query, rows.names()), "a package is lost at a start")
    finally:
        server.kill()
    return found


def _stop(server: Server) -> None:
    assert server.process is not None
    server.process.terminate()
    if server.process.wait(START_SECONDS):
        raise BenchError(f"{server.name}: exit code {server.process.returncode} at the stop")


def _starts(server: Server, end: Callable[[Server], None]) -> Figures:
    """The medians of several starts, between which the server ends; it runs when this returns."""
    whole, recovery = [], []
    for number in range(STARTS):
        if number:
            end(server)
        began = time.monotonic()
        server.start(server.folder, machine.ALL_CPUS)
        whole.append(time.monotonic() - began)
        log = (server.folder / "log").read_text()
        recovery.append(float(re.findall(r" recovery_seconds=([\d.]+)", log)[-1]))
    return {"seconds": median(whole), "recovery_seconds": median(recovery)}


PROBES = (
    Probe("idle", "An idle connection", "memory", idle_connection),
    Probe("debian", "Memory with Debian's table", "memory", debian_memory),
    Probe("growth", "The core as the index grows", "growth", growth),
    Probe("journal", "The journal's bytes", "disk", journal_bytes),
    Probe("write-behind", "Package files, steady state", "disk", write_behind),
    Probe("hot-reverse", "A popular package's reverse file", "disk", hot_reverse),
    Probe("start", "Start", "start", start),
)
