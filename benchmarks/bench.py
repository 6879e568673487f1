"""Measure pkgindex beside what one would otherwise use, and beside what the machine allows.

    python benchmarks/bench.py                     everything that is installed; about 40 minutes
    python benchmarks/bench.py --quick             against the limits alone, beside baseline.json; a minute
    python benchmarks/bench.py --only changes      one group, workload, probe or server, or several of them
    python benchmarks/bench.py --list              what there is

The servers of a workload take turns, round by round, so that they share what the machine does at the
time. Results go to build/bench; with --save to benchmarks/results, which is committed, and from there into
the README and docs/performance.md.
"""

import argparse
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import figures
import machine
import report
from probes import PROBES, Probe
from runs import run, run_durable
from servers import SERVERS, BenchError, InProcess, Server
from tables import Absent
from workloads import WORKLOADS, Workload

BEGAN = time.monotonic()
QUICK = ("query-100", "query-deep", "no-effect-100", "index-1", "index-100", "index-deep")
QUICK_SIZE = 5_000  # packages: with more, most of the minute would go into their files
QUICK_SERVERS = ("pkgindex", "c-epoll", "uvloop")
BASELINE = machine.HERE / "baseline.json"

Failed = dict[str, str]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="pkgindex, C epoll and bare uvloop only"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[*names(), *(server.name for server in SERVERS)],  # type: ignore[attr-defined]
        metavar="NAME",
        help="a group, a workload, a probe or a server",
    )
    parser.add_argument("--list", action="store_true", help="the names, and no more")
    parser.add_argument("--rounds", type=int, help="of each workload, at most (5; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of each run (1.5; quick: 0.5)")
    parser.add_argument(
        "--scale", type=float, default=1, help="of the probes' sizes, for a trial (1)"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: build/bench)")
    parser.add_argument(
        "--save", action="store_true", help="write the results to benchmarks/results"
    )
    parser.add_argument(
        "--write-baseline", action="store_true", help="with --quick: make this the baseline"
    )
    options = parser.parse_args()
    if options.save and (options.only or options.quick or options.scale != 1):
        parser.error("--save is for a whole run: without --only, --quick and --scale")
    if options.write_baseline and not options.quick:
        parser.error("--write-baseline goes with --quick")
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 1.5)
    return options


def names() -> dict[str, str]:
    """Groups, workloads and probes: name → title."""
    every: list[Workload | Probe] = [*WORKLOADS, *PROBES]
    groups = dict.fromkeys(one.group for one in every)
    members = {g: [one.name for one in every if one.group == g] for g in groups}
    return {g: ", ".join(found) for g, found in members.items()} | {o.name: o.title for o in every}


def chosen(
    options: argparse.Namespace,
) -> tuple[list[Workload], list[Probe], list[Server], dict[str, str]]:
    """Workloads, probes and servers to measure, and the servers that cannot be, with the reason."""
    only = set(options.only or ())
    servers = [make() for make in SERVERS]
    wanted = only & {s.name for s in servers}
    measured = only - wanted

    def is_chosen(one: Workload | Probe) -> bool:
        if options.quick:
            return one.name in (measured or QUICK)
        return not measured or one.name in measured or one.group in measured

    if options.quick:
        wanted = wanted or set(QUICK_SERVERS)
    servers = [s for s in servers if not wanted or s.name in wanted]
    skipped = {s.name: reason for s in servers if (reason := s.absent())}
    workloads = [w for w in WORKLOADS if is_chosen(w)]
    if options.quick:
        workloads = [replace(w, size=min(w.size, QUICK_SIZE)) for w in workloads]
    return (
        workloads,
        [p for p in PROBES if is_chosen(p)],
        [s for s in servers if s.name not in skipped],
        skipped,
    )


class Bench:
    """Servers that stay loaded from one workload of queries to the next, and the folder of all runs.

    Nothing in the folder is removed before the end: see run_durable()."""

    def __init__(self, servers: list[Server], folder: Path, rounds: int, seconds: float) -> None:
        self.servers = servers
        self.folder = folder
        self.rounds = rounds
        self.seconds = seconds
        self.loaded: dict[str, tuple[str, int]] = {}  # server → the table in it

    def measure(self, workload: Workload) -> dict[str, list[Any]]:
        """All rounds of one workload: server → results of the rounds. Raises BenchError, Absent."""
        taking_part = [server for server in self.servers if server.name in workload.peers]
        results: dict[str, list[Any]] = {server.name: [] for server in taking_part}
        if workload.durable:
            self.kill_all()
        else:
            for server in taking_part:
                self.have_loaded(server, workload)
        seconds = self.seconds * workload.length
        for number in range(min(self.rounds, workload.rounds or self.rounds)):
            for server in taking_part:
                if workload.rate:
                    self.rest(taking_part)
                if workload.durable:
                    place = self.place(workload, number, server)
                    one = run_durable(workload, server, place, seconds)
                else:
                    one = run(workload, server, seconds)
                if workload.mount:
                    one.pop("strangers_cpu", None)  # these are the volume's own processes
                results[server.name].append(one)
                show(workload, number, server, one)
        return results

    def rest(self, servers: list[Server]) -> None:
        """Have nothing left to do that the run before has begun."""
        for server in servers:
            if server.pid:
                server.settle()
        machine.rest()

    def place(self, workload: Workload, number: int, server: Server) -> Path:
        """A durable run's folder: a new one, except that a cluster of PostgreSQL takes long to make."""
        kept = isinstance(server, InProcess)
        return self.folder / (f"{workload.name}-{server.name}" + ("" if kept else f"-{number}"))

    def have_loaded(self, server: Server, workload: Workload) -> None:
        """Have a server run with the workload's table in it, and nothing else to do."""
        key = workload.table, workload.size
        if self.loaded.get(server.name) == key:
            return
        table = workload.needs()
        server.kill()
        self.loaded.pop(server.name, None)
        server.start(self.folder / f"loaded-{workload.table}{workload.size}-{server.name}")
        server.load(table)
        server.settle()
        self.loaded[server.name] = key
        say(
            f"{server.name} has the {workload.table or 'synthetic'} table of {len(table):,} packages"
        )

    def kill_all(self) -> None:
        for server in self.servers:
            server.kill()
        self.loaded.clear()


def show(workload: Workload, number: int, server: Server, one: dict[str, Any]) -> None:
    """One line a run, on stderr: what comes out is a table."""
    latency = one["latency_us"]
    line = f"{workload.name:18} {number + 1} {server.name:16} {one['rate']:12,.0f}/s"
    line += f"  p50 {latency['p50']:9,.1f} µs  p99 {latency['p99']:9,.1f} µs"
    if "cpu_us_a_message" in one:
        line += f"  server {one['cpu_us_a_message']:7.3f} µs CPU, {one['server_cpu']:4.0%}"
    if "generator_cpu" in one:
        line += f", generator {one['generator_cpu']:4.0%}"
        line += ": IT LIMITS" if report.generator_limits(one) else ""
    if one.get("strangers_cpu", 0) > report.NOISY:
        line += f"  strangers {one['strangers_cpu']:.0%}"
    say(line)


def say(line: str) -> None:
    """A line of progress, with the time since the beginning."""
    minutes, seconds = divmod(int(time.monotonic() - BEGAN), 60)
    print(f"{minutes:3}:{seconds:02} {line}", file=sys.stderr, flush=True)


@contextmanager
def disk(folder: Path | None) -> Iterator[Path]:
    """A new folder for all runs on the disk to measure; it is taken away at the end."""
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="run-", dir=folder or machine.BUILD))
    place.chmod(0o755)  # PostgreSQL runs as another user
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def mount(folder: Path) -> Iterator[Path]:
    """A GlusterFS volume of one brick in `folder`, mounted. Raises Absent."""
    sys.path.insert(0, str(machine.HERE.parent))
    from tests.torture.gluster import GlusterFailed, Volume, why_absent

    if reason := why_absent():
        raise Absent(f"GlusterFS: {reason}")
    try:
        with Volume(folder / "volume") as volume:
            yield volume.mount("bench")
    except GlusterFailed as error:
        raise Absent(f"GlusterFS: {error}") from None


def measure_workloads(
    workloads: list[Workload], bench: Bench, skipped: dict[str, str], failed: Failed
) -> report.Document:
    """Workload → server → rounds. All queries come first: they share loaded servers."""
    results: report.Document = {}
    try:
        for workload in sorted(workloads, key=lambda w: (w.durable, w.table, w.size)):
            try:
                if measured := bench.measure(workload):
                    results[workload.name] = measured
            except Absent as reason:
                skipped[workload.name] = str(reason)
            except BenchError as error:
                failed[workload.name] = str(error)
                say(f"FAILED: {workload.name}: {error}")
    finally:
        bench.kill_all()
    return results


def measure_probes(
    probes: list[Probe], folder: Path, scale: float, skipped: dict[str, str], failed: Failed
) -> dict[str, dict[str, float]]:
    """Probe → figure → value."""
    found = {}
    for probe in probes:
        place = folder / probe.name
        place.mkdir()
        try:
            found[probe.name] = probe.measure(place, scale)
        except Absent as reason:
            skipped[probe.name] = str(reason)
            continue
        except BenchError as error:
            failed[probe.name] = str(error)
            say(f"FAILED: {probe.name}: {error}")
            continue
        for what, value in found[probe.name].items():
            say(f"{probe.name:18} {what:40} {report.shown(value):>14}")
    return found


def measure(options: argparse.Namespace, folder: Path) -> report.Document:
    """Everything that was asked for, as bench.json holds it."""
    workloads, probes, servers, skipped = chosen(options)
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    began = time.time()
    failed: Failed = {}
    local = Bench(servers, folder, options.rounds, options.seconds)
    results = measure_workloads([w for w in workloads if not w.mount], local, skipped, failed)
    if on_mount := [w for w in workloads if w.mount]:
        try:
            with mount(folder) as point:
                bench = Bench(servers, point, options.rounds, options.seconds)
                results |= measure_workloads(on_mount, bench, skipped, failed)
        except Absent as reason:
            skipped["mount"] = str(reason)
    probed = measure_probes(probes, folder, options.scale, skipped, failed)
    shares = [
        one["strangers_cpu"]
        for measured in results.values()
        for rounds in measured.values()
        for one in rounds
        if "strangers_cpu" in one
    ]
    order = [workload.name for workload in WORKLOADS]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "minutes": round((time.time() - began) / 60, 1),
        "machine": machine.description() | {"file_system": machine.file_system(folder)},
        "versions": {server.name: version for server in servers if (version := server.version())},
        "titles": {server.name: server.title for server in servers},
        "settings": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "scale": options.scale,
        },
        "strangers_cpu": round(median(shares), 3) if shares else 0,
        "skipped": skipped,
        "failed": failed,
        "results": dict(sorted(results.items(), key=lambda pair: order.index(pair[0]))),
        "probes": probed,
    }


def written(document: report.Document, options: argparse.Namespace) -> str:
    """Keep the results where they belong; what to print of them."""
    if not options.quick:
        text = report.write(document, report.RESULTS if options.save else machine.BUILD)
        if options.save:
            figures.update()
        return text
    text, ratios = report.quick_table(document, BASELINE)
    if options.write_baseline:
        BASELINE.write_text(json.dumps(ratios, indent=1) + "\n")
    return text


def main() -> int:
    options = arguments()
    if options.list:
        for name, title in names().items():
            print(f"{name:22} {title}")
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (hard, hard)
    )  # the peers raise no limit of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server stays behind
    try:
        with disk(options.folder) as folder:
            document = measure(options, folder)
            # Before the folder is taken away: millions of files take minutes.
            print(written(document, options), flush=True)
    except KeyboardInterrupt:
        return 130  # as the shell says it of a command that SIGINT ended
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
