"""What is measured on the wire: the workloads, in groups, and the messages that each of them sends.

How one is run and checked stands in runs.py; what they are measured for, in targets.py.
"""

# ruff: noqa: RUF001
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import machine
import tables
from servers import Server

BASE = 30_000  # packages that are there before a run
DRAWN = 500_000  # messages of a run whose packages are drawn by popularity
TEN_MILLION = 10_000_000
MEMORY_A_PACKAGE = 600  # bytes, the generator's too

LONG = 8.0  # 12 s: within it comes a round of package files, and the table of names grows

EVERY = 10  # one message in so many of a mixed load is a change
TURN = 200  # packages of a connection that go, and then come again
RING = 64  # dependencies of which a connection's package has one after the other

NEW = "p-%c-%d"  # names that load.c makes: connection and number
AGAIN = "p-%c-%m"  # connection and number within a turn or a ring

LIMITS = ("c-epoll", "uvloop")
QUERIES = ("pkgindex", *LIMITS, "redis", "memcached", "postgres")
CHANGES = ("pkgindex", *LIMITS, "redis", "postgres")
STORES = ("pkgindex", "redis")
CACHES = ("pkgindex-memory", "redis", "memcached")


@dataclass(frozen=True)
class Workload:
    """A kind of load, and who is to bear it."""

    name: str
    title: str
    group: str
    kind: str  # hits, misses, zipf, no-effect, new, new-with-dependencies, mixed, reindex, remove, table
    connections: int
    depth: int
    peers: tuple[str, ...]
    size: int = BASE
    table: str = ""  # a real table instead of a synthetic one of `size`
    rate: float = 0  # messages a second if not as many as possible: the open loop
    beside: float = 0  # durable INDEX a second, of other clients, meanwhile
    rounds: int = 0  # at most; 0: as many as the bench does
    length: float = 1  # times as long as other runs
    mount: bool = False  # on a GlusterFS mount

    @property
    def durable(self) -> bool:
        """Whether it makes changes that must survive."""
        return self.kind not in ("hits", "misses", "zipf", "no-effect")

    def needs(self) -> tables.Table:
        """What is indexed before a run. Raises tables.Absent."""
        least = self.size * MEMORY_A_PACKAGE
        if machine.available_bytes() < least:
            raise tables.Absent(f"{self.size:,} packages want {least / 1e9:.0f} GB of free memory")
        if self.kind in ("new", "table"):
            return tables.Rows([])
        if self.kind == "remove":
            pairs = ((c, i) for c in range(self.connections) for i in range(TURN))
            return tables.Rows([(f"p-{c:04d}-{i:08d}", []) for c, i in pairs])
        if self.kind == "reindex":
            pairs = ((c, i) for c in range(self.connections) for i in range(RING))
            return tables.Rows([(f"p-{c:04d}-{i:08d}", []) for c, i in pairs])
        return tables.named(self.table, self.size)


def _queries() -> Iterator[Workload]:
    def one(name: str, title: str, *more: object, **options: object) -> Workload:
        return Workload(name, f"QUERY {title}", "queries", *more, **options)  # type: ignore[arg-type]

    in_process = ("sqlite", "files")
    yield one(
        "query-1", "hits, 1 connection, depth 1", "hits", 1, 1, (*QUERIES, *in_process), rounds=3
    )
    yield one("query-100", "hits, 100 connections, depth 1", "hits", 100, 1, (*QUERIES, "files"))
    few = ("pkgindex", *LIMITS, "redis")
    yield one("misses-100", "misses, 100 connections, depth 1", "misses", 100, 1, few, rounds=3)
    yield one("query-1000", "hits, 1,000 connections, depth 1", "hits", 1000, 1, few, rounds=3)
    yield one("query-10000", "hits, 10,000 connections, depth 1", "hits", 10_000, 1, few, rounds=3)
    yield one("query-100-16", "hits, 100 connections × 16 deep", "hits", 100, 16, few, rounds=3)
    yield one(
        "query-100-1000", "hits, 100 connections × 1,000 deep", "hits", 100, 1000, few, rounds=3
    )
    deep = ("pkgindex", "pkgindex-memory", *LIMITS, "c-lookup", "redis", "memcached", "files")
    yield one("query-deep", "hits, 16 connections × 2,000 deep", "hits", 16, 2000, deep)
    stores = ("pkgindex", "redis", "memcached")
    yield one("misses-deep", "misses, 16 × 2,000 deep", "misses", 16, 2000, stores, rounds=3)
    for name in ("homebrew", "debian"):
        title = f"hits, {name.title()}'s table, 16 × 2,000 deep"
        yield one(f"query-{name}", title, "hits", 16, 2000, CACHES, table=name, rounds=3)
    title = "hits, 1 million packages in random order, 16 × 2,000 deep"
    yield one("query-deep-1m", title, "hits", 16, 2000, (*CACHES, "c-lookup"), size=1_000_000)
    title = "hits, 1 million packages by Zipf's law, 16 × 2,000 deep"
    yield one("zipf-deep-1m", title, "zipf", 16, 2000, CACHES, size=1_000_000, rounds=3)
    title = "hits, 10 million packages in random order, 16 × 2,000 deep"
    ours = ("pkgindex-memory",)
    yield one("query-deep-10m", title, "hits", 16, 2000, ours, size=TEN_MILLION, rounds=3)


def _changes() -> Iterator[Workload]:
    def one(name: str, *more: object, **options: object) -> Workload:
        return Workload(name, more[0], "changes", *more[1:], **options)  # type: ignore[arg-type]

    title = "INDEX and REMOVE without effect, 100 connections, depth 1"
    yield one("no-effect-100", title, "no-effect", 100, 1, ("pkgindex", "uvloop", "redis"))
    alone = (*CHANGES, "commit-loop", "sqlite", "files")
    yield one("index-1", "durable INDEX, 1 connection, depth 1", "new", 1, 1, alone)
    many = (*CHANGES, "files")
    yield one("index-100", "durable INDEX, 100 connections, depth 1", "new", 100, 1, many)
    title = "durable INDEX, 1,000 connections, depth 1"
    yield one("index-1000", title, "new", 1000, 1, STORES, rounds=3)
    title = "durable INDEX, 100 connections × 16 deep"
    yield one("index-100-16", title, "new", 100, 16, STORES, rounds=3)
    deep = ("pkgindex", *LIMITS, "redis")
    yield one("index-deep", "durable INDEX, 16 connections × 1,000 deep", "new", 16, 1000, deep)
    title = "durable INDEX with 2 dependencies, 16 × 1,000 deep"
    yield one("index-deep-2", title, "new-with-dependencies", 16, 1000, STORES, rounds=3)
    title = "90 % QUERY and 10 % durable INDEX, 100 connections, depth 1"
    yield one("mixed-100", title, "mixed", 100, 1, STORES, rounds=3)
    title = "90 % QUERY and 10 % durable INDEX, 16 × 1,000 deep"
    yield one("mixed-deep", title, "mixed", 16, 1000, STORES, rounds=3)
    title = "durable re-INDEX, another dependency each time, 100 connections, depth 1"
    yield one("reindex-100", title, "reindex", 100, 1, STORES, rounds=3)
    title = "durable REMOVE of 200 packages a connection, INDEX of them, and so on, 100 × depth 1"
    yield one("remove-100", title, "remove", 100, 1, STORES, rounds=3)
    for name in ("homebrew", "debian"):
        title = f"durable INDEX of {name.title()}'s table, 1 connection × 1,000 deep"
        yield one(f"index-{name}", title, "table", 1, 1000, STORES, table=name, rounds=3)


def _steady() -> Iterator[Workload]:
    title = "QUERY, open loop at 20,000/s"
    loop = ("steady", "hits", 20, 1)
    times = {"rate": 20_000, "rounds": 3, "length": LONG}
    yield Workload("open", title, *loop, ("pkgindex", "uvloop"), **times)
    title = "QUERY, open loop at 20,000/s, beside 5,000 durable INDEX/s"
    yield Workload("open-beside", title, *loop, ("pkgindex", "uvloop-disk"), beside=5_000, **times)


def _mount() -> Iterator[Workload]:
    where = "on a GlusterFS mount"
    alone = ("pkgindex", "commit-loop", "redis")
    for name, title, connections, depth, peers in (
        ("index-1", "durable INDEX, 1 connection, depth 1", 1, 1, alone),
        ("index-100", "durable INDEX, 100 connections, depth 1", 100, 1, STORES),
        ("index-deep", "durable INDEX, 16 × 1,000 deep", 16, 1000, STORES),
    ):
        load = ("mount", "new", connections, depth, peers)
        yield Workload(f"mount-{name}", f"{title}, {where}", *load, rounds=3, mount=True)
    title = f"INDEX and REMOVE without effect, 100 connections, depth 1, {where}"
    load = ("mount", "no-effect", 100, 1, ("pkgindex",))
    yield Workload("mount-no-effect-100", title, *load, size=2000, rounds=3, mount=True)


WORKLOADS = (*_queries(), *_changes(), *_steady(), *_mount())
TITLES = {workload.name: workload.title for workload in WORKLOADS}


_fresh = count()


def options(workload: Workload, server: Server) -> list[str]:
    """What load.c is told: the messages, and how they are sent. Raises tables.Absent."""
    words = ["--connections", str(workload.connections), "--depth", str(workload.depth)]
    words += ["--replies", server.replies]
    if workload.rate:
        words += ["--rate", str(workload.rate)]
    if workload.beside:
        name = f"beside-{next(_fresh)}-%c-%d"  # or a second run would find it all done
        beside = ["--stream", "--template", server.index(name, []), "--replies", server.replies]
        beside += ["--connections", "10", "--rate", str(workload.beside)]
    else:
        beside = []
    if templates := _templates(workload, server):
        return [*words, *templates, *beside]
    source = server.source(
        f"{workload.kind}-{workload.table}{workload.size}", _made(workload, server)
    )
    order = [] if workload.kind == "table" else ["--random"]
    return [*words, *map(str, source), *order, *beside]


def _templates(workload: Workload, server: Server) -> list[str]:
    kind, drawn = workload.kind, ["--range", str(workload.size)]
    if kind == "new":
        return ["--template", server.index(NEW, [])]
    if kind == "new-with-dependencies":
        return ["--template", server.index(NEW, ["package-%r", "package-%r"]), *drawn]
    if kind == "mixed":
        changes = ["--other", server.index(NEW, []), "--every", str(EVERY)]
        return ["--template", server.query("package-%r"), *drawn, *changes]
    if kind == "reindex":
        return ["--template", server.index("again-%c", [AGAIN]), "--modulo", str(RING)]
    if kind == "remove":
        turns = ["--other", server.index(AGAIN, []), "--turns", "--modulo", str(TURN)]
        return ["--template", server.remove(AGAIN), *turns]
    return []


def _made(workload: Workload, server: Server) -> Iterator[str]:
    table = tables.named(workload.table, workload.size)
    if workload.kind == "no-effect":
        for command, name, dependencies in tables.without_effect(table):
            yield server.index(name, dependencies) if command == "INDEX" else server.remove(name)
    elif workload.kind == "table":
        for name, dependencies in table:
            yield server.index(name, dependencies)
    elif workload.kind == "zipf":
        for name in tables.popular(table, DRAWN):
            yield server.query(name)
    elif workload.kind == "misses":
        for name in table.names():
            yield server.query("absent-" + name)
    else:
        for name in table.names():
            yield server.query(name)


def survivors(
    workload: Workload, server: Server, acked: list[int]
) -> Iterator[tuple[list[str], int]]:
    """What to ask after a SIGKILL: messages, and how many of them must be answered FAIL, all others OK.

    `acked` are the replies that each connection had; the messages after them may or may not count."""
    if workload.kind == "table":
        names = tables.named(workload.table, 0).names()
        yield [server.query(name) for name in names], 0
    elif workload.kind == "remove":
        yield from _after_turns(workload, server, acked)
    elif workload.kind == "reindex":
        yield from _after_ring(workload, server, acked)
    else:
        step = EVERY if workload.kind == "mixed" else 1
        pairs = ((c, i) for c, n in enumerate(acked) for i in range(step - 1, n, step))
        yield [server.query(f"p-{c:04d}-{i:08d}") for c, i in pairs], 0


def _after_turns(
    workload: Workload, server: Server, acked: list[int]
) -> Iterator[tuple[list[str], int]]:
    there: list[str] = []
    gone: list[str] = []
    for c, n in enumerate(acked):
        indexing, done = n // TURN % 2, n % TURN
        for i in range(TURN):
            if (
                not done <= i < done + workload.depth
            ):  # not asked about: perhaps done, not acknowledged
                (there if (i < done) == bool(indexing) else gone).append(f"p-{c:04d}-{i:08d}")
    yield [server.query(name) for name in there], 0
    yield [server.query(name) for name in gone], len(gone)


def _after_ring(
    workload: Workload, server: Server, acked: list[int]
) -> Iterator[tuple[list[str], int]]:
    """Which dependency a package has shows in which may not be removed: the last one, or one in flight."""
    free: list[str] = []
    perhaps: list[str] = []
    for c, n in enumerate(acked):
        needed = {i % RING for i in range(n - 1, n + workload.depth)} if n else set(range(RING))
        for i in range(RING):
            (perhaps if i in needed else free).append(f"p-{c:04d}-{i:08d}")
    yield [server.remove(name) for name in free], 0
    yield [server.remove(name) for name in perhaps], sum(n > 0 for n in acked)
