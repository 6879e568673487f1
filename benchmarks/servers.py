"""pkgindex and its peers: how each is started, spoken to, loaded, killed and measured.

A server's dialect makes messages as load.c reads them: escaped, in one line. Names may hold load.c's
%c, %d and %r, whose widths are fixed, so lengths can be written in front of them.
"""

# ruff: noqa: ARG002  (a server that needs less than others still has their methods)
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import machine
from tables import Table

UNTIL_KILLED = 3600  # seconds: longer than any run
START_SECONDS = 60
SETTLE_SECONDS = 900
IDLE_SHARE = 0.02  # of a CPU: timers
PREPARE_SECONDS = 1  # pgbench's clients connect and prepare in this time, which is not counted
WIDTHS = {"%c": "0000", "%d": "00000000", "%m": "00000000", "%r": "000000"}
CLIENTS = 20_000  # more than any workload has

Result = dict[str, Any]


class BenchError(Exception):
    """A server did not do what the bench stands on; the message says which and what."""


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def output_of(*command: str | Path) -> str:
    """What a command prints. Raises BenchError if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(
            f"{Path(command[0]).name}: exit code {done.returncode}: {done.stderr[-400:]}"
        )
    return done.stdout


class Server:
    """One that listens on a port and speaks pkgindex's protocol. Others override what differs."""

    name = ""
    title = ""
    judges = True  # it keeps the rules; else it says OK to everything and its answers prove nothing
    replies = r"OK\n,FAIL\n"
    quiet_seconds = 0.5  # without work, and it has none left
    start_seconds = START_SECONDS  # that a start may take

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.folder = Path()

    def absent(self) -> str | None:
        """Why it cannot run here, or None."""
        return None

    def version(self) -> str:
        """What it is, in words."""
        return ""

    # --- its life ---------------------------------------------------------------------------------

    def command(self) -> list[str | Path]:
        """What to start."""
        raise NotImplementedError

    def start(self, folder: Path, cpu: int | str = machine.SERVER_CPU) -> None:
        """Start it on its CPU, with what it keeps in `folder`, and wait until it answers."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        with (folder / "log").open("ab") as log:
            command = machine.pinned(cpu, *self.command())
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **self.identity())
        deadline = time.monotonic() + self.start_seconds
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(
                    f"{self.name}: does not start: {(folder / 'log').read_text()[-400:]}"
                )
            time.sleep(0.01)

    def identity(self) -> dict[str, Any]:
        """As whom it runs: arguments for Popen."""
        return {}

    def answers(self) -> bool:
        """Whether it answers a query."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.settimeout(5)
            connection.sendall(unescaped(self.query("nothing")))
            return connection.recv(100) in [unescaped(one) for one in self.replies.split(",")]
        return False

    def kill(self) -> None:
        """SIGKILL, to all its processes."""
        if self.process:
            for pid in machine.family(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        """Of its first process; 0 if it has none."""
        return self.process.pid if self.process else 0

    # --- its dialect ------------------------------------------------------------------------------

    def query(self, name: str) -> str:
        """Whether a package is indexed."""
        return rf"QUERY|{name}|\n"

    def index(self, name: str, dependencies: list[str]) -> str:
        """Index a package."""
        return rf"INDEX|{name}|{','.join(dependencies)}\n"

    def remove(self, name: str) -> str:
        """Remove a package."""
        return rf"REMOVE|{name}|\n"

    # --- what is done with it ---------------------------------------------------------------------

    def load(self, table: Table) -> None:
        """Index a table, and check that all of it is."""
        if not self.judges:
            return
        messages = (self.index(name, dependencies) for name, dependencies in table)
        self.send_all(messages, "a package of the table is refused")

    def generate(self, *options: str | Path) -> Result:
        """Run the load generator; its report."""
        program = machine.compiled("load.c")
        command = machine.pinned(
            machine.GENERATOR_CPU, program, "--connect", f"127.0.0.1:{self.port}", *options
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not done.stdout:
            raise BenchError(
                f"{self.name}: the generator failed: {done.stderr.strip() or done.stdout[:300]}"
            )
        return dict(json.loads(done.stdout))

    def source(self, name: str, messages: Iterable[str]) -> list[str | Path]:
        """Options for load.c: send these messages, written to a file once."""
        path = self.folder / f"{name}.messages"
        if not path.exists():
            with path.open("w") as file:
                file.writelines(message + "\n" for message in messages)
        return ["--file", path, "--escaped"]

    def send_all(self, messages: Iterable[str], otherwise: str, refused: int = 0) -> None:
        """Send each once; raise BenchError unless `refused` of them are answered FAIL, all others OK."""
        path = self.folder / "once.messages"
        path.unlink(missing_ok=True)
        options = [*self.source("once", messages), "--replies", self.replies]
        if path.stat().st_size:
            stream = self.generate(*options, "--once", "--depth", "1000")["streams"][0]
            if stream["fail"] != refused or stream["error"]:
                raise BenchError(f"{self.name}: {otherwise}: {stream}")
        path.unlink()

    def settle(self) -> None:
        """Wait until it does nothing any more. Raises BenchError if that never comes."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            before = machine.cpu_seconds(self.pid)
            time.sleep(self.quiet_seconds)
            if machine.cpu_seconds(self.pid) - before < IDLE_SHARE * self.quiet_seconds:
                return
        raise BenchError(f"{self.name}: is still at work {SETTLE_SECONDS} s after it was loaded")


def unescaped(message: str) -> bytes:
    """The bytes that load.c would send."""
    return message.replace(r"\n", "\n").replace(r"\r", "\r").encode()


class Pkgindex(Server):
    """pkgindex itself, as its users start it."""

    name = "pkgindex"
    title = "pkgindex (`file:`)"
    quiet_seconds = 2.5  # package files are written in rounds that begin a second apart
    more: tuple[str, ...] = ()  # options of the command line

    def version(self) -> str:
        from pkgindex import __version__

        return f"pkgindex {__version__}"

    def store(self) -> str:
        return f"file:{self.folder / 'store'}"

    def command(self) -> list[str | Path]:
        program = Path(sys.executable).parent / "pkgindex"
        words = ["serve", "--store", self.store(), "--listen", f"127.0.0.1:{self.port}"]
        return [program, *words, "--max-clients", str(CLIENTS), *self.more]


class PkgindexInMemory(Pkgindex):
    """pkgindex without a store."""

    name = "pkgindex-memory"
    title = "pkgindex (`memory:`)"
    quiet_seconds = Server.quiet_seconds

    def store(self) -> str:
        return "memory:"


class Limit(Server):
    """A C program that answers OK to every line."""

    name = "c-epoll"
    title = "C epoll, OK to every line"
    judges = False

    def command(self) -> list[str | Path]:
        return [machine.compiled("peers/ok.c", "-O3"), str(self.port)]


class Lookup(Server):
    """A C program that looks each name up, and keeps no rule."""

    name = "c-lookup"
    title = "C epoll, names looked up and nothing else"

    def command(self) -> list[str | Path]:
        return [machine.compiled("peers/lookup.c", "-O3"), str(self.port)]


class Bare(Server):
    """A bare uvloop Protocol that answers OK to every line."""

    name = "uvloop"
    title = "bare uvloop, OK to every line"
    judges = False

    def version(self) -> str:
        import uvloop

        return f"uvloop {uvloop.__version__}"

    def command(self) -> list[str | Path]:
        return [sys.executable, machine.HERE / "peers" / "bare.py", str(self.port)]


class BareBesideDisk(Bare):
    """The same, and beside it on its core the bare calls that as many durable changes cost the disk."""

    name = "uvloop-disk"
    title = "bare uvloop, beside bare commits and package files"
    commits = 1_000  # a second, for all the changes of that second
    files = 5_000  # a second

    def generate(self, *options: str | Path) -> Result:
        """As others do, while the disk is kept at work."""
        began = time.monotonic_ns()
        beside = []
        for name, rate, more, flags in (
            ("commit", self.commits, [], ()),
            ("publish", self.files, ["1"], ("-O2", "-pthread")),
        ):
            folder = self.folder / f"{name}-{began}"
            folder.mkdir()
            program = machine.compiled(f"peers/{name}.c", *flags)
            words = machine.pinned(
                machine.SERVER_CPU, program, folder, str(UNTIL_KILLED), *more, str(rate)
            )
            nice = ["nice", "-n", "10"] if name == "publish" else []
            beside.append(subprocess.Popen([*nice, *words], stdout=subprocess.DEVNULL))
        try:
            report = super().generate(*options)
            if any(each.poll() is not None for each in beside):
                raise BenchError(f"{self.name}: what keeps the disk at work has ended")
            return report
        finally:
            for each in beside:
                each.kill()
                each.wait()


class Files(Server):
    """asyncio streams and one file per package."""

    name = "files"
    title = "asyncio, a file and two fsyncs a change"

    def command(self) -> list[str | Path]:
        return [
            sys.executable,
            machine.HERE / "peers" / "files.py",
            str(self.port),
            self.folder / "packages",
        ]

    def load(self, table: Table) -> None:
        """By its files: through its port this would take minutes."""
        self.kill()
        for name, dependencies in table:
            (self.folder / "packages" / f"{name}.package").write_text("\n".join(dependencies))
        self.start(self.folder)


class Redis(Server):
    """Redis: EXISTS for QUERY, a Lua script for INDEX and REMOVE, every change synced."""

    name = "redis"
    title = "Redis, appendfsync always"
    replies = r":1\r\n,:0\r\n"

    def __init__(self) -> None:
        super().__init__()
        self.script = ""

    def absent(self) -> str | None:
        return None if shutil.which("redis-server") else "redis-server is not installed"

    def version(self) -> str:
        return "Redis " + re.findall(r"v=([\d.]+)", output_of("redis-server", "--version"))[0]

    def command(self) -> list[str | Path]:
        words: list[str | Path] = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port)]
        words += [
            "--dir",
            self.folder,
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--maxclients",
            str(CLIENTS),
        ]
        return [*words, "--daemonize", "no"]

    def start(self, folder: Path, cpu: int | str = machine.SERVER_CPU) -> None:
        super().start(folder, cpu)
        script = (machine.HERE / "peers" / "index.lua").read_text()
        self.script = output_of("redis-cli", "-p", str(self.port), "SCRIPT", "LOAD", script).strip()

    def query(self, name: str) -> str:
        return resp("EXISTS", f"p:{name}")

    def index(self, name: str, dependencies: list[str]) -> str:
        return resp("EVALSHA", self.script, "0", "INDEX", name, *dependencies)

    def remove(self, name: str) -> str:
        return resp("EVALSHA", self.script, "0", "REMOVE", name)


def resp(*words: str) -> str:
    """A Redis command as its clients send it."""

    def size(word: str) -> int:
        for mark, sample in WIDTHS.items():
            word = word.replace(mark, sample)
        return len(word)

    return rf"*{len(words)}\r\n" + "".join(rf"${size(word)}\r\n{word}\r\n" for word in words)


class Memcached(Server):
    """memcached: mg for QUERY; it keeps nothing."""

    name = "memcached"
    title = "memcached, `mg`, one thread"
    replies = r"HD\r\n,EN\r\n"

    def absent(self) -> str | None:
        return None if shutil.which("memcached") else "memcached is not installed"

    def version(self) -> str:
        return output_of("memcached", "--version").strip()

    def command(self) -> list[str | Path]:
        words = [
            "memcached",
            "-l",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-t",
            "1",
            "-m",
            "1024",
            "-c",
            "4096",
        ]
        return [*words, "-u", "root"] if os.geteuid() == 0 else [*words]

    def query(self, name: str) -> str:
        return rf"mg {name}\r\n"

    def index(self, name: str, dependencies: list[str]) -> str:
        return rf"ms {name} 1\r\n1\r\n"


class InProcess(Server):
    """One that measures itself: it has no port that load.c could speak to."""

    def start(self, folder: Path, cpu: int | str = machine.SERVER_CPU) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def load(self, table: Table) -> None:
        pass

    def settle(self) -> None:
        pass

    def measure(self, what: str, connections: int, seconds: float) -> Result:
        """`what` is query or index: rate, latency_us, and done, the changes that must be found later."""
        raise NotImplementedError

    def indexed(self) -> int:
        """How many of the changes that measure() made are there, asked after a SIGKILL."""
        raise NotImplementedError


class CommitLoop(InProcess):
    """append, fdatasync, rename: the limit of a disk."""

    name = "commit-loop"
    title = "bare append + fdatasync + rename"
    judges = False

    def measure(self, what: str, connections: int, seconds: float) -> Result:
        folder = self.folder / f"loop-{time.monotonic_ns()}"
        folder.mkdir()
        program = machine.compiled("peers/commit.c")
        command = machine.pinned(machine.SERVER_CPU, program, folder, str(seconds))
        return dict(json.loads(output_of(*command)))


class Sqlite(InProcess):
    """SQLite in the process that uses it."""

    name = "sqlite"
    title = "SQLite in process, synchronous=FULL"

    def version(self) -> str:
        import sqlite3

        return f"SQLite {sqlite3.sqlite_version}"

    def run(self, *words: str, given: str = "") -> str:
        program = machine.HERE / "peers" / "sqlite.py"
        command = machine.pinned(
            machine.SERVER_CPU, sys.executable, program, self.folder / "db", *words
        )
        return subprocess.run(
            command, input=given, stdout=subprocess.PIPE, text=True, check=False
        ).stdout

    def load(self, table: Table) -> None:
        self.run("load", given="".join(f"{' '.join([name, *deps])}\n" for name, deps in table))

    def measure(self, what: str, connections: int, seconds: float) -> Result:
        before = self.indexed()
        result = dict(json.loads(self.run(what, str(seconds))))
        return result | {"done": before + result["done"] if what == "index" else before}

    def indexed(self) -> int:
        return int(self.run("count"))


class Postgres(InProcess):
    """PostgreSQL: PL/pgSQL functions, called by pgbench with prepared statements."""

    name = "postgres"
    title = "PostgreSQL, PL/pgSQL, synchronous_commit=on"

    def __init__(self) -> None:
        super().__init__()
        found = sorted(
            Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
        )
        self.bin = found[-1].parent if found else None

    def absent(self) -> str | None:
        return None if self.bin and shutil.which("pgbench") else "postgresql is not installed"

    def version(self) -> str:
        return "PostgreSQL " + output_of(self.program("postgres"), "--version").split()[2]

    def program(self, name: str) -> Path:
        assert self.bin is not None
        return self.bin / name

    def identity(self) -> dict[str, Any]:
        """Not root, which it refuses to be."""
        return (
            {"user": "postgres", "group": "postgres", "extra_groups": []}
            if os.geteuid() == 0
            else {}
        )

    def start(self, folder: Path, cpu: int | str = machine.SERVER_CPU) -> None:
        self.folder = folder
        if not folder.exists():
            folder.mkdir(mode=0o755)
            data = folder / "data"
            data.mkdir()
            if os.geteuid() == 0:
                shutil.chown(folder, "postgres", "postgres")
                shutil.chown(data, "postgres", "postgres")
            words = [
                "-D",
                data,
                "-A",
                "trust",
                "-U",
                "bench",
                "-E",
                "UTF8",
                "--no-sync",
                "--no-locale",
            ]
            initdb = [self.program("initdb"), *words]
            subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **self.identity())
        self.port = free_port()
        command = [
            self.program("postgres"),
            "-D",
            folder / "data",
            "-k",
            "",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        command += ["-c", "max_connections=200"]
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                machine.pinned(cpu, *command), stdout=log, stderr=log, cwd=folder, **self.identity()
            )
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(
            [*self.psql(), "-c", "select 1"], capture_output=True, check=False
        ).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(
                    f"{self.name}: does not start: {(folder / 'log').read_text()[-400:]}"
                )
            time.sleep(0.05)

    def psql(self) -> list[str | Path]:
        at = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "bench", "-d", "postgres"]
        return ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *at]

    def sql(self, text: str, given: str = "") -> str:
        done = subprocess.run(
            [*self.psql(), "-c", text], input=given, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchError(f"postgres: {done.stderr.strip()}")
        return done.stdout

    def load(self, table: Table) -> None:
        self.sql((machine.HERE / "peers" / "index.sql").read_text())
        self.sql("COPY package FROM STDIN", "".join(f"{name}\n" for name, _ in table))
        pairs = (f"{name}\t{one}\n" for name, deps in table for one in deps)
        self.sql("COPY dependency FROM STDIN", "".join(pairs))
        self.sql("VACUUM ANALYZE")
        self.size = len(table)

    def measure(self, what: str, connections: int, seconds: float) -> Result:
        before = self.indexed()
        run = time.monotonic_ns()  # names that no earlier run has used
        scripts = {
            "query": rf"\set i random(0, {self.size - 1})"
            "\n"
            "SELECT pkg_query('package-' || lpad((:i)::text, 6, '0'));\n",
            "index": "\\set n :n + 1\n"
            f"SELECT pkg_index('p-{run}-' || (:client_id)::text || '-' || (:n)::text, '{{}}');\n",
        }
        script = self.folder / f"{what}.pgbench"
        script.write_text(scripts[what])
        for old in self.folder.glob("latency.*"):
            old.unlink()
        at = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "bench"]
        words = [
            "-n",
            "-M",
            "prepared",
            "-c",
            str(connections),
            "-T",
            str(PREPARE_SECONDS + math.ceil(seconds)),
        ]
        words += ["-D", "n=0", "-f", str(script), "-l", f"--log-prefix={self.folder / 'latency'}"]
        command = machine.pinned(machine.GENERATOR_CPU, "pgbench", *words, *at, "postgres")
        printed = output_of(*command)
        if " 0 (0.000%)" not in printed:
            raise BenchError(f"postgres: {printed}")
        # A line a transaction: client, number, latency in µs, script, end in seconds and in µs.
        lines = [
            line.split()
            for log in self.folder.glob("latency.*")
            for line in log.read_text().splitlines()
        ]
        ends = [int(words[4]) + int(words[5]) / 1e6 for words in lines]
        begin, end = min(ends) + PREPARE_SECONDS, max(ends)
        latencies = sorted(
            int(words[2]) for words, at in zip(lines, ends, strict=True) if at >= begin
        )
        measured = len(latencies)
        micros = {"p50": latencies[measured // 2], "p99": latencies[measured * 99 // 100]}
        total = before + len(lines) if what == "index" else before
        return {"rate": measured / (end - begin), "done": total, "latency_us": micros}

    def indexed(self) -> int:
        return int(self.sql("SELECT count(*) FROM package WHERE name LIKE 'p-%'"))


SERVERS: tuple[Callable[[], Server], ...] = (
    Pkgindex,
    PkgindexInMemory,
    Limit,
    Lookup,
    Bare,
    BareBesideDisk,
    CommitLoop,
    Redis,
    Memcached,
    Postgres,
    Sqlite,
    Files,
)
