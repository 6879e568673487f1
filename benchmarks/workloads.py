"""What is measured: the workloads, the targets, and one run of one workload on one server.

Every run is checked: the answers are those that the rules give, and after a durable run the server is
killed with SIGKILL in the middle of its work, started again, and asked for every acknowledged change.
"""

# ruff: noqa: RUF001
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import machine
from servers import BenchError, InProcess, Result, Server
from tables import name_of, synthetic, without_effect

BASE = 30_000  # packages that are there before a run
WARMUP = 0.3  # seconds
QUERIES = ("pkgindex", "c-epoll", "uvloop", "redis", "memcached", "postgres")
CHANGES = ("pkgindex", "c-epoll", "uvloop", "redis", "postgres")

NEW = "p-%c-%d"  # names that load.c makes: connection and number


@dataclass(frozen=True)
class Workload:
    """A kind of load, and who is to bear it."""

    name: str
    title: str
    kind: str  # hits, misses, no-effect, new, new-with-dependencies
    connections: int
    depth: int
    peers: tuple[str, ...]
    size: int = BASE
    rate: float = 0  # messages a second if not as many as possible: the open loop
    beside: float = 0  # durable INDEX a second, of other clients, meanwhile

    @property
    def durable(self) -> bool:
        """Whether it makes changes that must survive."""
        return self.kind.startswith("new")


WORKLOADS = (
    Workload(
        "query-1", "QUERY, 1 connection, depth 1", "hits", 1, 1, (*QUERIES, "sqlite", "files")
    ),
    Workload("query-100", "QUERY, 100 connections, depth 1", "hits", 100, 1, (*QUERIES, "files")),
    Workload(
        "query-deep",
        "QUERY hits, 16 connections × 2,000 deep",
        "hits",
        16,
        2000,
        ("pkgindex", "pkgindex-memory", "c-epoll", "uvloop", "redis", "memcached", "files"),
    ),
    Workload(
        "query-deep-misses",
        "QUERY misses, 16 connections × 2,000 deep",
        "misses",
        16,
        2000,
        ("pkgindex", "redis", "memcached"),
    ),
    Workload(
        "query-deep-1m",
        "QUERY hits, 16 × 2,000 deep, 1 million packages in random order",
        "hits",
        16,
        2000,
        ("pkgindex-memory", "redis", "memcached"),
        size=1_000_000,
    ),
    Workload(
        "no-effect-100",
        "INDEX and REMOVE without effect, 100 connections, depth 1",
        "no-effect",
        100,
        1,
        ("pkgindex", "uvloop", "redis"),
    ),
    Workload(
        "index-1",
        "durable INDEX, 1 connection, depth 1",
        "new",
        1,
        1,
        (*CHANGES, "commit-loop", "sqlite", "files"),
    ),
    Workload(
        "index-100", "durable INDEX, 100 connections, depth 1", "new", 100, 1, (*CHANGES, "files")
    ),
    Workload(
        "index-deep",
        "durable INDEX, 16 connections × 1,000 deep",
        "new",
        16,
        1000,
        ("pkgindex", "c-epoll", "uvloop", "redis"),
    ),
    Workload(
        "index-deep-2",
        "durable INDEX with 2 dependencies, 16 × 1,000 deep",
        "new-with-dependencies",
        16,
        1000,
        ("pkgindex", "redis"),
    ),
    Workload(
        "open", "QUERY, open loop at 20,000/s", "hits", 20, 1, ("pkgindex", "uvloop"), rate=20_000
    ),
    Workload(
        "open-beside",
        "QUERY, open loop at 20,000/s, beside 5,000 durable INDEX/s",
        "hits",
        20,
        1,
        ("pkgindex",),
        rate=20_000,
        beside=5_000,
    ),
)


@dataclass(frozen=True)
class Target:
    """One figure against another: a ratio, or for `extra` a difference in microseconds."""

    of: tuple[str, str]  # workload, server
    to: tuple[str, str]
    least: float = 0
    most: float = 0
    figure: str = "rate"
    extra: bool = False


def _beats(workload: str, peer: str, least: float) -> Target:
    return Target((workload, "pkgindex"), (workload, peer), least)


TARGETS = (
    _beats("query-100", "uvloop", 0.97),
    _beats("query-100", "redis", 1.7),
    Target(("query-100", "pkgindex"), ("query-100", "uvloop"), most=1.2, figure="p99"),
    _beats("query-deep", "c-epoll", 0.45),
    _beats("query-deep", "redis", 8),
    Target(("query-deep-1m", "pkgindex-memory"), ("query-deep", "pkgindex-memory"), 0.6),
    _beats("index-1", "commit-loop", 0.85),
    _beats("index-1", "redis", 1.2),
    Target(("no-effect-100", "pkgindex"), ("query-100", "pkgindex"), 0.85),
    Target(("index-100", "pkgindex"), ("query-100", "pkgindex"), 0.7),
    _beats("index-100", "redis", 1.8),
    _beats("index-deep", "redis", 5),
    Target(("open-beside", "pkgindex"), ("open", "pkgindex"), most=1000, figure="p99", extra=True),
)
MESSAGES_A_SECOND = {("index-deep", "pkgindex"): 1_000_000}  # least


def run(workload: Workload, server: Server, seconds: float) -> Result:
    """One run on a server that has started and is loaded; for durable workloads see run_durable().

    Raises BenchError if an answer was wrong."""
    if isinstance(server, InProcess):
        return server.measure("query", workload.connections, seconds)
    words = options(workload, server)
    if workload.beside:
        words += ["--stream", "--template", server.index(NEW, []), "--replies", server.replies]
        words += ["--connections", "10", "--rate", str(workload.beside)]
    with _Watch(server) as watch:
        report = server.generate(*words, "--seconds", str(seconds), "--warmup", str(WARMUP))
    _check(workload, server, report)
    return _result(report, watch)


def run_durable(workload: Workload, server: Server, folder: Path, seconds: float) -> Result:
    """One run on a server of its own, which is killed meanwhile, and must have kept what it acknowledged.

    The folder stays: on ext4 without a journal, removing many files makes the creation of others slow
    for the next minutes (the kernel passes by every inode that it has freed lately, one by one).
    Raises BenchError if an answer was wrong or a change is lost."""
    if isinstance(server, InProcess):
        return _run_in_process(workload, server, folder, seconds)
    server.start(folder)
    try:
        if workload.kind == "new-with-dependencies":
            server.load(synthetic(BASE))
            server.settle()
        words = [*options(workload, server), "--seconds", str(seconds), "--warmup", str(WARMUP)]
        if not server.judges:
            with _Watch(server) as watch:
                report = server.generate(*words)
            return _result(report, watch)
        report, watch = _run_until_killed(server, words, seconds)
        _check(workload, server, report)
        server.start(folder)
        acked = report["streams"][0]["acked"]
        names = (f"p-{c:04d}-{i:08d}" for c, count in enumerate(acked) for i in range(count))
        server.send_all(
            (server.query(name) for name in names), "an acknowledged change did not survive SIGKILL"
        )
        return _result(report, watch) | {"survived": sum(acked)}
    finally:
        server.kill()


def _run_until_killed(server: Server, words: list[str], seconds: float) -> tuple[Result, "_Watch"]:
    program = machine.compiled("load.c")
    command = machine.pinned(
        machine.GENERATOR_CPU, program, "--connect", f"127.0.0.1:{server.port}", *words
    )
    with _Watch(server) as watch:
        generator = subprocess.Popen(
            [*command, "--until-killed", "--acked"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(WARMUP + seconds + 0.3)
    server.kill()
    printed, complaint = generator.communicate(timeout=30)
    if generator.returncode or not printed:
        raise BenchError(f"{server.name}: the generator failed: {complaint.decode().strip()}")
    return dict(json.loads(printed)), watch


def _run_in_process(workload: Workload, server: InProcess, folder: Path, seconds: float) -> Result:
    # Its folder is kept from round to round: making a cluster of PostgreSQL takes longer than a round.
    fresh = not folder.exists()
    server.start(folder)
    try:
        if fresh:
            server.load(synthetic(BASE))
            server.settle()
        result = server.measure("index", workload.connections, seconds)
        if server.judges:
            server.kill()
            server.start(folder)
            found = server.indexed()
            if found < result["done"]:
                raise BenchError(
                    f"{server.name}: {result['done']} changes acknowledged, {found} there after SIGKILL"
                )
            result["survived"] = result["done"]
        return result
    finally:
        server.kill()


class _Watch:
    """Who used the CPUs in the time that it is open."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.elapsed = self.machine = self.used = 0.0

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.before = machine.machine_busy_seconds(), machine.cpu_seconds(self.server.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.elapsed = time.monotonic() - self.began
        self.machine = machine.machine_busy_seconds() - self.before[0]
        self.used = machine.cpu_seconds(self.server.pid) - self.before[1]

    def shares(self, generator: float, messages: int) -> Result:
        """Of one CPU: the server's share, the generator's, and that of strangers, who spoil the rates.

        The CPU time that a message costs the server, in microseconds, is spoilt least."""
        strangers = (self.machine - self.used) / self.elapsed - generator
        return {
            "server_cpu": self.used / self.elapsed,
            "generator_cpu": generator,
            "strangers_cpu": max(0.0, strangers),
            "cpu_us_a_message": self.used / max(1, messages) * 1e6,
        }


def options(workload: Workload, server: Server) -> list[str]:
    """What load.c is told: the messages, and how they are sent."""
    words = ["--connections", str(workload.connections), "--depth", str(workload.depth)]
    if workload.rate:
        words += ["--rate", str(workload.rate)]
    if workload.durable:
        needed = ["package-%r", "package-%r"] if workload.kind == "new-with-dependencies" else []
        template = server.index(NEW, needed)
        return [*words, "--template", template, "--range", str(BASE), "--replies", server.replies]

    def made() -> Iterator[str]:
        if workload.kind == "no-effect":
            for command, name, dependencies in without_effect(synthetic(workload.size)):
                yield (
                    server.index(name, dependencies) if command == "INDEX" else server.remove(name)
                )
        else:
            prefix = "absent-" if workload.kind == "misses" else ""
            for i in range(workload.size):
                yield server.query(prefix + name_of(i))

    source = server.source(f"{workload.kind}-{workload.size}", made())
    return [*words, *map(str, source), "--random"]


def _check(workload: Workload, server: Server, report: Result) -> None:
    stream = report["streams"][0]
    ok, fail = stream["ok"], stream["fail"]
    right = {
        "hits": ok > 0 and fail == 0,
        "misses": ok == 0 and fail > 0,
        "no-effect": ok > 0 and fail > 0,
    }.get(workload.kind, ok > 0 and fail == 0)
    wrong_beside = any(other["fail"] or other["error"] for other in report["streams"][1:])
    if stream["error"] or wrong_beside or (server.judges and not right):
        raise BenchError(
            f"{server.name}: wrong answers to {workload.name}: {json.dumps(report)[:600]}"
        )


def _result(report: Result, watch: _Watch) -> Result:
    stream = report["streams"][0]
    messages = sum(one["ok"] + one["fail"] + one["error"] for one in report["streams"])
    shares = watch.shares(report["busy"], messages)
    return {"rate": stream["rate"], "latency_us": stream["latency_us"], **shares}
