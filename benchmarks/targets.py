"""What the figures are to be, and whether they are: ratios within one run of the bench."""

# ruff: noqa: RUF001
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from probes import LINE

Document = dict[str, Any]  # what bench.json holds
Rounds = list[dict[str, Any]]

OURS = "pkgindex"
IN_MEMORY = "pkgindex-memory"


def figure(round_: dict[str, Any], name: str) -> float:
    """`rate`, or a latency in microseconds."""
    return float(round_[name] if name in round_ else round_["latency_us"][name])


def middle(rounds: Rounds, name: str = "rate") -> float:
    """The median over the rounds."""
    return median(figure(one, name) for one in rounds)


def ratio(ours: Rounds, theirs: Rounds, name: str = "rate") -> float:
    """The median of ours ÷ theirs, round by round: what the machine did from round to round falls out."""
    return median(figure(a, name) / figure(b, name) for a, b in zip(ours, theirs, strict=False))


NEAR = 0.9


@dataclass(frozen=True)
class Target:
    """A figure with its bound: at least, or at most.

    `limit`: what the machine's own limit comes to in the same unit and the same run. Where that misses
    what is wanted, NEAR of it is as good: no server could do better."""

    row: str
    wanted: str
    value: Callable[[Document], float]  # KeyError: it was not measured
    least: float | None = None
    most: float | None = None
    limit: Callable[[Document], float] | None = None

    def limited(self, document: Document) -> float | None:
        """The machine's limit, if it misses what is wanted; None if it does not, or was not measured."""
        if self.limit is None:
            return None
        try:
            limit = self.limit(document)
        except KeyError:
            return None
        misses = (self.least is not None and limit < self.least) or (
            self.most is not None and limit > self.most
        )
        return limit if misses else None

    def share(self, value: float, limit: float) -> float:
        """How much of the machine's limit a figure comes to."""
        return value / limit if self.least is not None else limit / value

    def judged(self, document: Document) -> tuple[float, bool] | None:
        """The figure and whether it is met; None if it was not measured."""
        try:
            value = self.value(document)
        except KeyError:
            return None
        met = (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )
        return value, met


def _times(
    row: str,
    workload: str,
    peer: str,
    least: float,
    title: str,
    limit: Callable[[Document], float] | None = None,
) -> Target:
    return Target(row, f"≥ {least} × {title}", _beside(workload, peer), least, limit=limit)


def _beside(workload: str, peer: str, name: str = "rate") -> Callable[[Document], float]:
    return lambda d: ratio(d["results"][workload][OURS], d["results"][workload][peer], name)


def _limit_beside(workload: str, limit: str, peer: str) -> Callable[[Document], float]:
    """What a server that does less than it must reaches beside a peer."""
    return lambda d: ratio(d["results"][workload][limit], d["results"][workload][peer])


def _commit_beside(peer: str) -> Callable[[Document], float]:
    """What a server could reach beside a peer that did nothing but the bare commits, one for each message
    that comes and goes as fast as C epoll lets it: the times of both added."""

    def value(document: Document) -> float:
        results = document["results"]
        trip = 1 / middle(results["query-1"]["c-epoll"])
        commit = 1 / middle(results["index-1"]["commit-loop"])
        return 1 / (trip + commit) / middle(results["index-1"][peer])

    return value


def _between(workload: str, other: str, server: str = OURS) -> Callable[[Document], float]:
    return lambda d: ratio(d["results"][workload][server], d["results"][other][server])


def _probe(probe: str, name: str, by: str = "") -> Callable[[Document], float]:
    def value(document: Document) -> float:
        figures = document["probes"][probe]
        return float(figures[name] / figures[by] if by else figures[name])

    return value


def _growth(what: str) -> Callable[[Document], float]:
    """How much more than the machine's own memory it grows from one million packages to ten."""

    def value(document: Document) -> float:
        of = document["probes"]["growth"]
        lines = {
            size: of[f"{size} {what}"] / of[f"{size} {LINE}"] for size in (MILLION, TEN_MILLION)
        }
        return float(lines[TEN_MILLION] / lines[MILLION])

    return value


def _extra_p99(beside: str, alone: str) -> Callable[[Document], float]:
    """Milliseconds that a server's p99 is longer beside changes than another's without them."""

    def value(document: Document) -> float:
        results = document["results"]
        longer = middle(results["open-beside"][beside], "p99")
        return (longer - middle(results["open"][alone], "p99")) / 1000

    return value


SHALLOW = "QUERY, depth 1, 100 connections"
DEEP = "QUERY hits, 16 connections × 2,000 deep, 30 k packages"
ALONE = "durable INDEX, 1 connection, depth 1"
NO_EFFECT = "INDEX and REMOVE without effect, 100 connections, depth 1"
MANY = "durable INDEX, 100 connections, depth 1"
PIPELINED = "durable INDEX, pipelined 16 × 1,000"
BEHIND = "write-behind"
MEMORY = "memory"
GROWTH = "cost of growth, of the core alone"
MILLION, TEN_MILLION = 1_000_000, 10_000_000

TARGETS = (
    _times(SHALLOW, "query-100", "uvloop", 0.97, "bare uvloop"),
    _times(
        SHALLOW,
        "query-100",
        "redis",
        1.7,
        "Redis EXISTS",
        _limit_beside("query-100", "uvloop", "redis"),
    ),
    Target(SHALLOW, "p99 ≤ 1.2 × bare uvloop's", _beside("query-100", "uvloop", "p99"), most=1.2),
    _times(
        DEEP,
        "query-deep",
        "c-epoll",
        0.45,
        "the C epoll server",
        _limit_beside("query-deep", "c-lookup", "c-epoll"),
    ),
    _times(DEEP, "query-deep", "redis", 8, "Redis"),
    Target(
        "the same, 1 million packages in random order",
        "≥ 0.6 × its own figure for 30 k",
        _between("query-deep-1m", "query-deep", IN_MEMORY),
        0.6,
        limit=_between("query-deep-1m", "query-deep", "c-lookup"),
    ),
    _times(
        ALONE,
        "index-1",
        "commit-loop",
        0.85,
        "a bare append + fdatasync + rename",
        _commit_beside("commit-loop"),
    ),
    _times(ALONE, "index-1", "redis", 1.2, "Redis", _commit_beside("redis")),
    Target(NO_EFFECT, "≥ 0.85 × QUERY", _between("no-effect-100", "query-100"), 0.85),
    Target(MANY, "≥ 0.7 × QUERY", _between("index-100", "query-100"), 0.7),
    _times(MANY, "index-100", "redis", 1.8, "Redis"),
    Target(
        PIPELINED, "≥ 1,000,000 a second", lambda d: middle(d["results"]["index-deep"][OURS]), 1e6
    ),
    _times(PIPELINED, "index-deep", "redis", 5, "Redis"),
    Target(
        PIPELINED,
        "journal ≤ 1.3 × the messages' bytes",
        _probe("journal", "journal_bytes", "message_bytes"),
        most=1.3,
    ),
    Target(
        BEHIND,
        "≥ 0.9 × the file system's own temporary file + sync + rename, as many threads",
        _probe("write-behind", "files_a_second", "bare_files_a_second"),
        0.9,
    ),
    Target(
        BEHIND,
        "a hot reverse file costs ≤ 1 write a round",
        _probe("hot-reverse", "reverse_writes", "rounds"),
        most=1,
    ),
    Target(
        "QUERY p99 at 20 k/s in an open loop, beside 5 k/s durable INDEX",
        "≤ 1 ms more than without them",
        _extra_p99(OURS, OURS),
        most=1,
        limit=_extra_p99("uvloop-disk", "uvloop"),
    ),
    Target(
        MEMORY, "≤ 160 bytes a package with Debian's table", _probe("debian", "bytes"), most=160
    ),
    Target(
        MEMORY,
        "10 million packages × 5 dependencies in ≤ 2.2 GB resident",
        lambda d: (
            _probe("growth", f"{TEN_MILLION} bytes a package, resident")(d) * TEN_MILLION / 1e9
        ),
        most=2.2,
    ),
    Target(MEMORY, "an idle connection ≤ 4,096 bytes", _probe("idle", "bytes"), most=4096),
    Target(
        "start, 1 million packages, warm cache",
        "recovery ≤ 2 s after a stop",
        _probe("start", "recovery_seconds_after_stop"),
        most=2,
    ),
    Target(
        "start, 1 million packages, warm cache",
        "recovery ≤ 2 s after a SIGKILL, with changes in the journal",
        _probe("start", "recovery_seconds_after_kill"),
        most=2,
    ),
    *(
        Target(
            GROWTH,
            f"{what} from 1 to 10 million: grows ≤ 1.25 × as a random read of as much memory",
            _growth(key),
            most=1.25,
        )
        for what, key in (
            ("lookup", "query, hit, random order"),
            ("INDEX", "index, 2 dependencies gained"),
            ("REMOVE", "remove"),
        )
    ),
)
