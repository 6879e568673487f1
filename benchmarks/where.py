"""Where the server's time goes: perf samples of its threads under each of some workloads (`make profile`).

    python benchmarks/where.py [--only WORKLOAD …] [--server NAME] [--folder DISK]

Prints what the threads and the functions cost, a function's own time and that with all it called. The
raw samples stay in build/bench/WORKLOAD.perf, for `perf report` and for flame graphs.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import machine
import workloads
from servers import SERVERS

DEFAULT = ("query-deep", "query-100", "index-100")


def table(samples: Path, key: str, *, children: bool, lines: int) -> str:
    """The head of perf's report, by `key`."""
    options = ["--children"] if children else ["--no-children"]
    command = [
        "perf",
        "report",
        "-i",
        samples,
        "--stdio",
        "-g",
        "none",
        "--percent-limit",
        "0.4",
        *options,
    ]
    printed = subprocess.run(
        [*command, "--sort", key], capture_output=True, text=True, check=False
    ).stdout
    rows = [
        line.rstrip() for line in printed.splitlines() if line.strip() and not line.startswith("#")
    ]
    return "\n".join(rows[:lines])


def record(workload: workloads.Workload, server_name: str, seconds: float, place: Path) -> None:
    server = next(make() for make in SERVERS if make.name == server_name)  # type: ignore[attr-defined]
    samples = machine.BUILD / f"{workload.name}.perf"
    folder = Path(tempfile.mkdtemp(prefix="where-", dir=place))
    try:
        server.start(folder)
        server.load(workload.needs())
        server.settle()
        words = [
            *workloads.options(workload, server),
            "--seconds",
            str(seconds + 1),
            "--warmup",
            "0.5",
        ]
        load = threading.Thread(
            target=lambda: print(server.generate(*words)["streams"][0]["rate"], "messages/s")
        )
        load.start()
        perf = [
            "perf",
            "record",
            "-q",
            "-F",
            "1999",
            "-e",
            "cpu-clock",
            "-g",
            "-p",
            str(server.pid),
            "-o",
            str(samples),
        ]
        subprocess.run([*perf, "--", "sleep", str(seconds)], check=True, stderr=subprocess.DEVNULL)
        load.join()
        threads = machine.threads(server.pid)
    finally:
        server.kill()
        shutil.rmtree(folder)
    print(f"\n== {workload.title} ==\n-- threads")
    for line in threads:
        print(line)
    print("-- modules")
    print(table(samples, "dso", children=False, lines=8))
    print("-- functions, their own time")
    print(table(samples, "dso,symbol", children=False, lines=40))
    print("-- functions, with all they call")
    print(table(samples, "symbol", children=True, lines=60))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=[w.name for w in workloads.WORKLOADS], metavar="WORKLOAD"
    )
    parser.add_argument("--server", default="pkgindex")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=machine.BUILD,
        help="where the store is (default: build/bench)",
    )
    options = parser.parse_args()
    if not shutil.which("perf"):
        print(
            "where: perf is not installed; on Debian: apt-get install linux-perf", file=sys.stderr
        )
        return 2
    machine.BUILD.mkdir(parents=True, exist_ok=True)
    for workload in workloads.WORKLOADS:
        if workload.name in (options.only or DEFAULT):
            record(workload, options.server, options.seconds, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
