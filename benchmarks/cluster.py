"""Several servers on one folder, beside one server alone and beside what they are held to.

    python benchmarks/cluster.py [--only ROW …] [--rounds N] [--seconds S] [--save]

All servers run on one CPU and the generator on another, so that "per second" means "per second of one
core", whoever of the servers does the work. What is compared is run in turns within the same minute.
Changes are durable: local disk, one journal.
"""

import argparse
import json
import random
import re
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
from servers import BenchError, Pkgindex, Result, unescaped
from tables import synthetic

PACKAGES = 30_000
JOINING = 1_000_000
TAKEOVER_AFTER = "1"
KILLS = 10
LAG_RATE = 50_000
LAG_SAMPLES = 300
NEXT = iter(range(1 << 62))


class Member(Pkgindex):
    """One server of a cluster. `before`: how its command line begins."""

    before: tuple[str, ...] = ()

    def __init__(self, store: Path, *more: str) -> None:
        super().__init__()
        self._store = store
        self.more = ("--cluster", "127.0.0.1:0", "--takeover-after", TAKEOVER_AFTER, *more)

    def store(self) -> str:
        return f"file:{self._store}"

    def command(self) -> list[str]:
        return [*self.before, *super().command()]

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "log").read_text()


class Cluster:
    """Servers on one folder; the first writes."""

    def __init__(self, folder: Path, *members: tuple[str, ...], cpu: int | str) -> None:
        self.folder = folder
        self.cpu = cpu
        self.members: list[Member] = []
        for more in members:
            self.join(*more)

    def join(self, *more: str, before: tuple[str, ...] = ()) -> Member:
        """One more server."""
        member = Member(self.folder / "store", *more)
        member.before = before
        member.start(self.folder / f"member-{len(self.members)}", self.cpu)
        self.members.append(member)
        return member

    def kill(self) -> None:
        for member in self.members:
            member.kill()


@contextmanager
def cluster(*members: tuple[str, ...], cpu: int | str = machine.SERVER_CPU) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="cluster-", dir=machine.BUILD))
    made = None
    try:
        made = Cluster(folder, *members, cpu=cpu)
        yield made
    finally:
        if made is not None:
            made.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone() -> Iterator[Pkgindex]:
    folder = Path(tempfile.mkdtemp(prefix="alone-", dir=machine.BUILD))
    server = Pkgindex()
    try:
        server.start(folder)
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def queries(server: Pkgindex, table: list[str], options: argparse.Namespace) -> Result:
    """100 connections, one QUERY at a time each."""
    messages = [server.query(name) for name in table]
    random.Random(1).shuffle(messages)
    words = [*server.source("queries", messages), "--connections", "100", *times(options)]
    return checked(server.generate(*words))


def changes(server: Pkgindex, options: argparse.Namespace) -> Result:
    """100 connections, one INDEX of a new package at a time each."""
    template = rf"INDEX|n{next(NEXT)}-%c-%d|\n"
    words = ["--template", template, "--connections", "100", *times(options)]
    return checked(server.generate(*words))


def times(options: argparse.Namespace) -> list[str]:
    return ["--seconds", str(options.seconds), "--warmup", "0.3"]


def checked(report: Result) -> Result:
    stream = report["streams"][0]
    if stream["fail"] or stream["error"]:
        raise BenchError(f"wrong answers: {stream}")
    return dict(stream)


def ratio(
    one: Callable[[], float], other: Callable[[], float], rounds: int
) -> tuple[float, float, float]:
    """Medians of both, and of the ratio of each round."""
    ones, others, ratios = [], [], []
    for _ in range(rounds):
        ones.append(one())
        others.append(other())
        ratios.append(ones[-1] / others[-1])
    return statistics.median(ones), statistics.median(others), statistics.median(ratios)


def used(members: list[Member], run: Callable[[], Result]) -> tuple[float, float]:
    """Messages a second, and the servers' CPU microseconds a message."""
    before = sum(machine.cpu_seconds(member.pid) for member in members)
    report = run()
    spent = sum(machine.cpu_seconds(member.pid) for member in members) - before
    return report["rate"], spent / (report["ok"] or 1) * 1e6


# --- the rows -------------------------------------------------------------------------------------


def reads(options: argparse.Namespace) -> Iterator[str]:
    """QUERY on a follower, local and strong."""
    table = [name for name, _ in synthetic(PACKAGES)]
    with alone() as single, cluster((), (), ("--reads", "strong")) as three:
        single.load(synthetic(PACKAGES))
        writer, follower, strong = three.members
        writer.load(synthetic(PACKAGES))
        single.settle()
        writer.settle()
        plain = lambda: queries(follower, table, options)["rate"]  # noqa: E731
        mine, others, share = ratio(
            plain, lambda: queries(single, table, options)["rate"], options.rounds
        )
        yield row("QUERY on a follower", f"{mine:,.0f}/s", f"alone {others:,.0f}/s", share, 0.97)
        mine, others, share = ratio(
            lambda: queries(strong, table, options)["rate"], plain, options.rounds
        )
        yield row(
            "strong QUERY on a follower", f"{mine:,.0f}/s", f"plain {others:,.0f}/s", share, 0.5
        )


def forwarded(options: argparse.Namespace) -> Iterator[str]:
    """Durable INDEX by way of a follower."""
    with cluster((), ()) as two:
        writer, follower = two.members
        costs: dict[Member, list[float]] = {writer: [], follower: []}

        def rate(member: Member) -> float:
            found, cost = used(two.members, lambda: changes(member, options))
            costs[member].append(cost)
            return found

        mine, others, share = ratio(lambda: rate(follower), lambda: rate(writer), options.rounds)
        yield row(
            "durable INDEX by a follower", f"{mine:,.0f}/s", f"direct {others:,.0f}/s", share, 0.6
        )
        by, direct = (statistics.median(costs[member]) for member in (follower, writer))
        yield f"{'  CPU time a change, both servers':34} {by:9.1f} µs  direct {direct:.1f} µs"


def lag(options: argparse.Namespace) -> Iterator[str]:
    """How long after its OK a change is seen on a follower, while 50,000 changes a second pour in."""
    with cluster((), (), cpu=machine.ALL_CPUS) as two:
        writer, follower = two.members
        rate = min(LAG_RATE, options.lag_rate)
        words = ["--template", r"INDEX|a%c-%d|\n", "--connections", "50", "--rate", str(rate)]
        seconds = LAG_SAMPLES * 0.02 + 4
        found: dict[str, Result] = {}
        load = threading.Thread(
            target=lambda: found.update(
                report=writer.generate(*words, "--seconds", str(seconds), "--warmup", "0.5")
            )
        )
        load.start()
        time.sleep(1.5)
        lags = []
        with talk(writer.port) as here, talk(follower.port) as there:
            for number in range(LAG_SAMPLES):
                ask(here, writer.index(f"seen-{number}", []))
                began = time.perf_counter()
                while ask(there, follower.query(f"seen-{number}")) != b"OK\n":
                    pass
                lags.append((time.perf_counter() - began) * 1e3)
                time.sleep(0.01)
        load.join()
        got = found["report"]["streams"][0]["rate"]
        p99 = statistics.quantiles(lags, n=100)[98]
        yield row(
            "lag, p99",
            f"{p99:.1f} ms",
            f"at {got:,.0f} changes/s, median {statistics.median(lags):.1f}",
            p99,
            50,
            less=True,
        )


def joining(options: argparse.Namespace) -> Iterator[str]:
    """A follower that joins an index of a million packages, and the writer's clients meanwhile.

    It would be on another machine. Here it gets what the writer and the generator leave of two CPUs: as
    their equal it would show in the writer's figures how a kernel shares out too few of them."""
    with cluster((), cpu=machine.ALL_CPUS) as one:
        (writer,) = one.members
        writer.load(synthetic(options.packages))
        writer.settle()
        messages = [writer.query(name) for name, _ in synthetic(PACKAGES)]
        words = [*writer.source("queries", messages), "--connections", "20", "--rate", "5000"]

        def p99(seconds: float) -> float:
            report = writer.generate(*words, "--seconds", str(seconds), "--warmup", "0.3")
            return checked(report)["latency_us"]["p99"] / 1e3

        taken, quiet, busy = [], [], []
        for _ in range(max(3, options.rounds // 3)):
            quiet.append(p99(3))
            found: list[float] = []
            load = threading.Thread(target=lambda: found.append(p99(4)))  # noqa: B023
            load.start()
            time.sleep(0.8)
            member = one.join(before=("chrt", "--idle", "0"))
            seconds = stamp(member.log(), "serving") - stamp(member.log(), "cluster member")
            taken.append(seconds)
            load.join()
            busy.append(found[0])
            member.kill()
        worse = statistics.median(busy) - statistics.median(quiet)
        middle = statistics.median(taken)
        yield row(
            f"joining, {options.packages:,} packages", f"{middle:.2f} s", "", middle, 3, less=True
        )
        yield row(
            "  the writer's QUERY p99 meanwhile",
            f"{worse:+.2f} ms",
            f"{statistics.median(quiet):.2f} to {statistics.median(busy):.2f} ms",
            worse,
            1,
            less=True,
        )


def stamp(log: str, event: str) -> float:
    found = re.search(rf"T(\d+):(\d+):([\d.]+)Z \w+ {event} ", log)
    if found is None:
        raise BenchError(f"no line {event!r} in the log")
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


def failover(_options: argparse.Namespace) -> Iterator[str]:
    """The writer is killed: how long until the next change is acknowledged on the other server."""
    gaps = []
    with cluster((), (), cpu=machine.ALL_CPUS) as two:
        for number in range(KILLS):
            writer, follower = two.members[-2:]
            with talk(follower.port) as there:
                ask(there, follower.index(f"before-{number}", []))
                began = time.perf_counter()
                writer.kill()
                if ask(there, follower.index(f"after-{number}", [])) != b"OK\n":
                    raise BenchError("a change was refused")
                gaps.append(time.perf_counter() - began)
            two.join()
    worst = max(gaps)
    yield row(
        "SIGKILL to the next change, most",
        f"{worst:.2f} s",
        f"median {statistics.median(gaps):.2f} s of {KILLS}",
        worst,
        1,
        less=True,
    )


@contextmanager
def talk(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), 30) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield made


def ask(connection: socket.socket, message: str) -> bytes:
    connection.sendall(unescaped(message))
    return connection.recv(100)


def row(
    name: str, figure: str, beside: str, value: float, target: float, *, less: bool = False
) -> str:
    """One line; `value` is what the target is about."""
    met = value <= target if less else value >= target
    share = "" if less else f" {value:.2f} times that"
    bound = f"target {'at most' if less else 'at least'} {target:g}: {'met' if met else 'missed'}"
    return f"{name:34} {figure:>12}  {beside}{share}  {bound}"


ROWS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "reads": reads,
    "forwarded": forwarded,
    "lag": lag,
    "joining": joining,
    "failover": failover,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=ROWS, help="measure only this (repeat)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.6, help="of one run")
    parser.add_argument("--packages", type=int, default=JOINING, help="that a follower joins")
    parser.add_argument("--lag-rate", type=int, default=LAG_RATE)
    parser.add_argument("--save", action="store_true", help="write results/cluster.txt")
    options = parser.parse_args()
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    lines = []
    try:
        for name in options.only or ROWS:
            for line in ROWS[name](options):
                print(line, flush=True)
                lines.append(line)
    except BenchError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    if options.save:
        (machine.HERE / "results" / "cluster.txt").write_text(
            json.dumps(machine.description()) + "\n" + "\n".join(lines) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
