"""Measure pkgindex beside what one would otherwise use, and beside what the machine allows.

    python benchmarks/bench.py                     everything that is installed; about 15 minutes
    python benchmarks/bench.py --quick             against the limits alone, beside baseline.json; a minute
    python benchmarks/bench.py --only index-100    one workload, or one server, or several of either

The servers of a workload take turns, round by round, so that they share what the machine does at the
time. Results go to build/bench; with --save to benchmarks/results, which is committed.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine
import report
from servers import SERVERS, BenchError, InProcess, Server
from tables import synthetic
from workloads import WORKLOADS, Workload, run, run_durable

QUICK = ("query-100", "query-deep", "no-effect-100", "index-1", "index-100", "index-deep")
QUICK_SERVERS = ("pkgindex", "c-epoll", "uvloop")
BASELINE = machine.HERE / "baseline.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [w.name for w in WORKLOADS] + [server.name for server in SERVERS]  # type: ignore[attr-defined]
    parser.add_argument(
        "--quick", action="store_true", help="pkgindex, C epoll and bare uvloop only"
    )
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="a workload or a server"
    )
    parser.add_argument("--rounds", type=int, help="of each workload (5; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of each run (1.5; quick: 0.5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: build/bench)")
    parser.add_argument(
        "--save", action="store_true", help="write the results to benchmarks/results"
    )
    parser.add_argument(
        "--write-baseline", action="store_true", help="with --quick: make this the baseline"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 1.5)
    return options


def chosen(options: argparse.Namespace) -> tuple[list[Workload], list[Server], dict[str, str]]:
    """Workloads and servers to measure, and the servers that cannot be, with the reason."""
    only = set(options.only or ())
    servers = [make() for make in SERVERS]
    workloads = [w for w in WORKLOADS if not options.quick or w.name in QUICK]
    if only & {w.name for w in WORKLOADS}:
        workloads = [w for w in WORKLOADS if w.name in only]
    wanted = only & {s.name for s in servers}
    if options.quick:
        wanted = wanted or set(QUICK_SERVERS)
    servers = [s for s in servers if not wanted or s.name in wanted]
    skipped = {s.name: reason for s in servers if (reason := s.absent())}
    return workloads, [s for s in servers if s.name not in skipped], skipped


class Bench:
    """Servers that stay loaded from one workload of queries to the next, and the folder of all runs.

    Nothing in the folder is removed before the end: see run_durable()."""

    def __init__(self, servers: list[Server], folder: Path, rounds: int, seconds: float) -> None:
        self.servers = servers
        self.folder = folder
        self.rounds = rounds
        self.seconds = seconds
        self.loaded: dict[str, int] = {}  # server → the size of the table in it

    def measure(self, workload: Workload) -> dict[str, list[Any]]:
        """All rounds of one workload: server → results of the rounds."""
        taking_part = [server for server in self.servers if server.name in workload.peers]
        results: dict[str, list[Any]] = {server.name: [] for server in taking_part}
        if workload.durable:
            self.kill_all()
        else:
            for server in taking_part:
                self.have_loaded(server, workload.size)
        for number in range(self.rounds):
            for server in taking_part:
                if workload.durable:
                    one = run_durable(
                        workload, server, self.place(workload, number, server), self.seconds
                    )
                else:
                    one = run(workload, server, self.seconds)
                results[server.name].append(one)
                show(workload, number, server, one)
        return results

    def place(self, workload: Workload, number: int, server: Server) -> Path:
        """A durable run's folder: a new one, except that a cluster of PostgreSQL takes long to make."""
        kept = isinstance(server, InProcess)
        return self.folder / (f"{workload.name}-{server.name}" + ("" if kept else f"-{number}"))

    def have_loaded(self, server: Server, size: int) -> None:
        """Have a server run with the table of this size in it, and nothing else to do."""
        if self.loaded.get(server.name) == size:
            return
        server.kill()
        server.start(self.folder / f"loaded-{size}-{server.name}")
        server.load(synthetic(size))
        server.settle()
        self.loaded[server.name] = size

    def kill_all(self) -> None:
        for server in self.servers:
            server.kill()
        self.loaded.clear()


def show(workload: Workload, number: int, server: Server, one: dict[str, Any]) -> None:
    """One line a run, on stderr: what comes out is a table."""
    latency = one["latency_us"]
    cpu = f"  CPU {one['cpu_us_a_message']:7.3f} µs" if "cpu_us_a_message" in one else ""
    strangers = (
        f"  strangers {one['strangers_cpu']:.0%}"
        if one.get("strangers_cpu", 0) > report.NOISY
        else ""
    )
    print(
        f"{workload.name:18} {number + 1} {server.name:16} {one['rate']:12,.0f}/s"
        f"  p50 {latency['p50']:9,.1f} µs  p99 {latency['p99']:9,.1f} µs{cpu}{strangers}",
        file=sys.stderr,
        flush=True,
    )


def quick_table(results: report.Results) -> tuple[str, dict[str, dict[str, float]]]:
    """Ratios to the limits beside the baseline's, and the ratios alone."""
    before = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    now: dict[str, dict[str, float]] = {}
    lines = [
        f"{'pkgindex ÷ …':20} {'bare uvloop':>12} {'baseline':>10} {'C epoll':>12} {'baseline':>10}"
    ]
    for workload, measured in results.items():
        if report.OURS not in measured:
            continue
        row = f"{workload:20}"
        for peer in ("uvloop", "c-epoll"):
            if peer not in measured:
                row += f" {'':>12} {'':>10}"
                continue
            value = report.ratio(measured[report.OURS], measured[peer])
            now.setdefault(workload, {})[peer] = round(value, 3)
            old = before.get(workload, {}).get(peer)
            row += f" {value:12.3f} {old if old is not None else '':>10}"
        lines.append(row)
    return "\n".join(lines), now


def main() -> int:
    options = arguments()
    workloads, servers, skipped = chosen(options)
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results: report.Results = {}
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.folder or machine.BUILD))
    folder.chmod(0o755)  # PostgreSQL runs as another user
    bench = Bench(servers, folder, options.rounds, options.seconds)
    try:
        # All queries come first: they share loaded servers.
        for workload in sorted(workloads, key=lambda w: (w.durable, w.size)):
            measured = bench.measure(workload)
            if measured:
                results[workload.name] = measured
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        bench.kill_all()
        shutil.rmtree(folder, ignore_errors=True)
    shares = [
        one["strangers_cpu"]
        for w in results.values()
        for s in w.values()
        for one in s
        if "strangers_cpu" in one
    ]
    document = {
        "date": began,
        "machine": machine.description()
        | {"file_system": machine.file_system(options.folder or machine.BUILD)},
        "versions": {server.name: version for server in servers if (version := server.version())},
        "settings": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "seed": 1,
            "base_packages": 30_000,
        },
        "strangers_cpu": round(median(shares), 3) if shares else 0,
        "skipped": skipped,
        "results": results,
    }
    if options.quick:
        text, ratios = quick_table(results)
        if options.write_baseline:
            BASELINE.write_text(json.dumps(ratios, indent=1) + "\n")
    else:
        text = report.write(
            document, servers, machine.HERE / "results" if options.save else machine.BUILD
        )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
