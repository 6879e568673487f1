"""One run of one workload on one server, checked.

The answers are those that the rules give, and after a durable run the server is killed with SIGKILL in
the middle of its work, started again, and asked for every acknowledged change.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Self

import machine
from servers import BenchError, InProcess, Result, Server
from tables import synthetic
from workloads import BASE, Workload, options, survivors

WARMUP = 0.3  # seconds


def run(workload: Workload, server: Server, seconds: float) -> Result:
    """One run on a server that has started and is loaded; for durable workloads see run_durable().

    Raises BenchError if an answer was wrong."""
    if isinstance(server, InProcess):
        return server.measure("query", workload.connections, seconds)
    with Watch(server) as watch:
        report = server.generate(*options(workload, server), *_times(seconds))
    _check(workload, server, report)
    return _result(workload, report, watch)


def run_durable(workload: Workload, server: Server, folder: Path, seconds: float) -> Result:
    """One run on a server of its own, which is killed meanwhile, and must have kept what it acknowledged.

    The folder stays: on ext4 without a journal, removing many files makes the creation of others slow
    for the next minutes (the kernel passes by every inode that it has freed lately, one by one).
    Raises BenchError if an answer was wrong or a change is lost, tables.Absent."""
    if isinstance(server, InProcess):
        return _run_in_process(workload, server, folder, seconds)
    needed = workload.needs()
    server.start(folder)
    try:
        if len(needed):
            server.load(needed)
            server.settle()
        machine.rest()
        words = options(workload, server)
        if not server.judges:
            with Watch(server) as watch:
                report = server.generate(*words, *_times(seconds))
            return _result(workload, report, watch)
        if workload.kind == "table":
            with Watch(server) as watch:
                report = server.generate(*words, "--once", "--acked")
        else:
            report, watch = _run_until_killed(server, [*words, *_times(seconds)], seconds)
        _check(workload, server, report)
        server.kill()
        server.start(folder)
        acked = report["streams"][0]["acked"]
        for messages, refused in survivors(workload, server, acked):
            server.send_all(messages, "an acknowledged change did not survive SIGKILL", refused)
        return _result(workload, report, watch) | {"survived": sum(acked)}
    finally:
        server.kill()


def _times(seconds: float) -> list[str]:
    return ["--seconds", str(seconds), "--warmup", str(WARMUP)]


def _run_until_killed(server: Server, words: list[str], seconds: float) -> tuple[Result, "Watch"]:
    program = machine.compiled("load.c")
    command = machine.pinned(
        machine.GENERATOR_CPU, program, "--connect", f"127.0.0.1:{server.port}", *words
    )
    with Watch(server) as watch:
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
        machine.rest()
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


class Watch:
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


def _check(workload: Workload, server: Server, report: Result) -> None:
    stream = report["streams"][0]
    ok, fail = stream["ok"], stream["fail"]
    right = {
        "misses": ok == 0 and fail > 0,
        "no-effect": ok > 0 and fail > 0,
    }.get(workload.kind, ok > 0 and fail == 0)
    beside = report["streams"][1:]
    wrong_beside = any(one["fail"] or one["error"] or not one["ok"] for one in beside)
    if stream["error"] or wrong_beside or (server.judges and not right):
        raise BenchError(
            f"{server.name}: wrong answers to {workload.name}: {json.dumps(report)[:600]}"
        )


def _result(workload: Workload, report: Result, watch: Watch) -> Result:
    stream = report["streams"][0]
    messages = sum(one["ok"] + one["fail"] + one["error"] for one in report["streams"])
    shares = watch.shares(report["busy"], messages)
    if workload.rate:
        del shares["generator_cpu"]  # all of it: the open loop spins
    rates = {"rate": stream["rate"]}
    if workload.beside:
        rates["beside_rate"] = report["streams"][1]["rate"]
    return {**rates, "latency_us": stream["latency_us"], **shares}
