"""Hostile clients: each attack runs for a while, and honest clients must hardly notice.

    python -m tests.torture.hostile slow-readers 127.0.0.1:8080 5     # one attack, five seconds

Two honest clients change and ask, one message at a time, and compare each answer with what they know;
what they wait is measured in quiet and under each attack. The server's memory is measured at its peak: an
attack may cost it what is stated here for each of its connections, and SLACK. Afterwards every connection
of the attack is gone from the server, which stops at once.

The attackers are a process of their own, at the lowest priority: what they take of the processor is taken
by the kernel and the server for them, not by them. `benchmarks/attack.py` prints the same in figures.
"""

from __future__ import annotations

import os
import random
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.reference import FAIL, OK
from tests.servers import Address, Server, ServerFailed, Wire, parse_address
from tests.torture.campaign import Campaign, Run

__all__ = ["ATTACKS", "CAMPAIGNS", "OPTIONS", "Attack", "Honest", "attacked", "percentile"]

MIB = 1 << 20
MAX_CLIENTS = 2000
LINE_TIMEOUT = 1
OPTIONS = (
    *("--max-clients", str(MAX_CLIENTS), "--line-timeout", str(LINE_TIMEOUT)),
    *("--max-index", "256m"),
)

SECONDS = (4.0, 1.5)  # of each attack: full, quick
SLACK = (
    12 * MIB
)  # beside what the attack's connections may cost: the honest ones, and the allocator
TIMES = 5.0  # what an honest client may wait, as its 99th percentile, of that in quiet
LEAST = 0.1  # seconds that it may wait in any case: this is no quiet machine; see the benchmark
TRIES = 3  # in which it must have waited longer each time, and not for what else the machine does
BLOCK = b"x" * MIB
FLOODS = 40_000  # names of each kind, to compare how long they take
FLOOD_TIMES = 4.0  # what the worst of them may take of the best


# --- attacks: each a generator that does a little at each step ----------------------------------------


def connected(address: Address, count: int) -> list[socket.socket]:
    """Open connections that do not block; those that are refused are left out."""
    found = []
    for _ in range(count):
        with suppress(OSError):
            one = socket.create_connection(address, timeout=5)  # type: ignore[arg-type]
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.append(one)
    return found


def send_to_all(sockets: list[socket.socket], data: bytes) -> None:
    """Send what goes, to each that is still connected."""
    for one in list(sockets):
        try:
            one.send(data)
        except BlockingIOError:
            pass
        except OSError:
            one.close()
            sockets.remove(one)


def slow_readers(address: Address) -> Iterator[None]:
    """Ask all the time and read no answer."""
    sockets = connected(address, 50)
    while True:
        send_to_all(sockets, b"QUERY|a|\n" * 5000)
        yield


def slow_writers(address: Address) -> Iterator[None]:
    """Send one long line each, a byte now and then (slowloris); come again when closed."""
    sockets: list[socket.socket] = []
    while True:
        sockets += connected(address, 500 - len(sockets))
        send_to_all(sockets, b"x")
        time.sleep(0.1)
        yield


def idlers(address: Address) -> Iterator[None]:
    """Be there, as many as may be, and say nothing."""
    sockets = connected(address, MAX_CLIENTS - 100)
    while sockets:
        time.sleep(0.05)
        yield


def flood(address: Address) -> Iterator[None]:
    """Connect beyond --max-clients, over and over."""
    sockets = connected(address, MAX_CLIENTS)
    while sockets:
        for one in connected(address, 50):
            one.close()
        yield


def bytewise(address: Address) -> Iterator[None]:
    """Send good messages, one byte a packet."""
    sockets = connected(address, 20)
    readers = selectors.DefaultSelector()
    for one in sockets:
        readers.register(one, selectors.EVENT_READ)
    while True:
        for byte in b"QUERY|a|\n":
            send_to_all(sockets, bytes([byte]))
            yield
        for key, _ in readers.select(0):
            with suppress(OSError):
                key.fileobj.recv(65536)  # type: ignore[union-attr]


def endless_lines(address: Address) -> Iterator[None]:
    """Send lines of a gibibyte, as far as there is time."""
    sockets = connected(address, 4)
    sent = 0
    while True:
        if not sockets:  # closed for the line's time
            sockets = connected(address, 4)
        send_to_all(sockets, BLOCK)
        sent += len(BLOCK)
        if sent % (1 << 30) == 0:
            send_to_all(sockets, b"\n")
        yield


def half_lines(address: Address) -> Iterator[None]:
    """Hold many lines of nearly the longest length, without their ends."""
    while True:
        sockets = connected(address, 40)
        send_to_all(sockets, b"INDEX|" + b"x" * 900_000)
        for _ in range(8):
            time.sleep(0.1)
            yield
        for one in sockets:
            one.close()


def pipelines(address: Address) -> Iterator[None]:
    """Change as much as goes, and read all answers."""
    sockets = connected(address, 8)
    number = 0
    while True:
        number += 1
        names = [b"flood-%d" % (number * 500 % 20_000 + i) for i in range(500)]
        send_to_all(sockets, b"".join(b"INDEX|%b|\nREMOVE|%b|\n" % (n, n) for n in names))
        for one in sockets:
            with suppress(OSError):
                one.recv(1 << 18)
        yield


def resets(address: Address) -> Iterator[None]:
    """Connect, ask, and be gone without reading."""
    while True:
        for one in connected(address, 20):
            with suppress(OSError):
                one.send(b"QUERY|a|\n" * 1000 + b"INDEX|half")
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            one.close()
        yield


@dataclass(frozen=True)
class Attack:
    """An attack, and what memory it may cost: bytes for each of its connections."""

    name: str
    run: Callable[[Address], Iterator[None]]
    connections: int
    each: int
    counted: str = ""  # the server's counter that tells of it
    least: float = 0.0  # seconds that it needs to show


#: What a connection may cost: nothing to speak of when idle; replies that wait and the transport's
#: buffers when it does not read; twice the bytes of an unfinished line.
IDLE = 8 * 1024
UNREAD = MIB
UNFINISHED = 2 * MIB + (MIB >> 1)

ATTACKS = (
    Attack("slow-readers", slow_readers, 50, UNREAD),
    Attack("slow-writers", slow_writers, 500, 2 * IDLE, "closed_late", 3.5),
    Attack("idlers", idlers, MAX_CLIENTS - 100, IDLE),
    Attack("flood", flood, MAX_CLIENTS + 50, IDLE, "refused"),
    Attack("bytewise", bytewise, 20, IDLE),
    Attack("endless-lines", endless_lines, 4, UNFINISHED, "skipped_lines"),
    Attack("half-lines", half_lines, 40, UNFINISHED),
    Attack("pipelines", pipelines, 8, UNREAD),
    Attack("resets", resets, 20, UNREAD),
)


def run_attack(name: str, address: Address, seconds: float) -> None:
    """Attack; say so once it is under way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
    os.nice(19)
    (attack,) = (attack.run(address) for attack in ATTACKS if attack.name == name)
    next(attack)
    print("attacking", flush=True)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        next(attack)


# --- honest clients -----------------------------------------------------------------------------------


@dataclass
class Honest:
    """Clients that send one message after another; what each waited for its answer, in seconds."""

    address: Address
    clients: int = 2
    waits: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._wires = [Wire(self.address) for _ in range(self.clients)]
        self._threads = [
            threading.Thread(target=self._talk, args=(n, wire))
            for n, wire in enumerate(self._wires)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def _talk(self, number: int, wire: Wire) -> None:
        name = b"honest-%d" % number
        talk = (
            (b"INDEX|%b|" % name, OK),
            (b"QUERY|%b|" % name, OK),
            (b"INDEX|%b-user|%b" % (name, name), OK),
            (b"REMOVE|%b|" % name, FAIL),
            (b"REMOVE|%b-user|" % name, OK),
            (b"REMOVE|%b|" % name, OK),
            (b"QUERY|%b|" % name, FAIL),
        )
        try:
            with wire:
                while not self._stop.is_set():
                    for line, reply in talk:
                        began = time.perf_counter()
                        got = wire.ask(line)
                        self.waits.append(time.perf_counter() - began)
                        if got != reply:
                            self.wrong.append(f"{line!r}: {got!r}, not {reply!r}")
                        time.sleep(0.0005)
        except (OSError, EOFError) as error:
            self.wrong.append(f"an honest client was closed: {type(error).__name__} {error}")

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def percentile(waits: list[float], part: float = 0.99) -> float:
    """Return what this part of them is below."""
    return sorted(waits)[int(len(waits) * part)] if waits else float("inf")


@dataclass
class Outcome:
    """What an attack did."""

    waits: list[float]
    wrong: list[str]
    peak: int  # bytes of memory, above what there was before
    counters: dict[str, Any]


def attacked(server: Server, attack: Attack, seconds: float) -> Outcome:
    """Attack a server, and measure honest clients and its memory meanwhile. ServerFailed, OSError."""
    host, port = server.address
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # its peak begins anew
    before = status(server.pid, "VmRSS")
    with Honest(server.address) as honest:  # connected before: those inside are to be unharmed
        command = [sys.executable, "-m", "tests.torture.hostile", attack.name]
        process = subprocess.Popen(
            [*command, f"{host}:{port}", str(seconds)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() != "attacking\n":
            raise ServerFailed(f"the attack {attack.name} did not begin")
        honest.waits.clear()
        ended = process.wait(seconds + 60)
        waits = honest.waits[:]
    if ended:
        raise ServerFailed(f"the attack {attack.name} ended with {ended}")
    return Outcome(waits, honest.wrong, status(server.pid, "VmHWM") - before, counters(server))


def status(pid: int, what: str) -> int:
    """Return bytes, from the kernel's page about a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {what} of process {pid}")


def counters(server: Server) -> dict[str, Any]:
    """Ask the server for its counters."""
    before = len(server.events("counters"))
    server.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + server.patience
    while len(events := server.events("counters")) == before:
        if time.monotonic() > deadline:
            raise ServerFailed("no counters")
        time.sleep(0.01)
    return events[-1]


# --- campaign -----------------------------------------------------------------------------------------


#: What a server lacks when an option is so: an attack must show it.
WRONG = {
    "slow-writers": ("--line-timeout", "0"),
    "flood": ("--max-clients", "10000"),
    "endless-lines": ("--max-line", "1g"),
}


def hostile(run: Run) -> None:
    """The campaign: quiet, each attack, names that are made to collide, and a clean end."""
    seconds = SECONDS[not run.full]
    find_wrong(run, seconds)
    for store in (f"file:{run.folder / 'index'}", "memory:")[: 1 + run.full]:
        with Server(store, *OPTIONS) as server:
            for number, attack in enumerate(ATTACKS):
                attack_and_judge(run, server, attack, seconds)
                run.progress(number + 1, len(ATTACKS))
            judge_names(run, server)
            judge_end(run, server)


def find_wrong(run: Run, seconds: float) -> None:
    """Servers without a limit are found out."""
    for name, options in WRONG.items():
        tried = Run(run.seed, run.full, run.folder, run.seconds)
        (attack,) = (attack for attack in ATTACKS if attack.name == name)
        with Server("memory:", *OPTIONS, *options) as server:
            attack_once(tried, server, attack, seconds)
        if tried.failures:
            run.counts["mutants caught"] += 1
        else:
            run.fail(f"a server with {options} bore {name} unnoticed")


def attack_and_judge(run: Run, server: Server, attack: Attack, seconds: float) -> None:
    """One attack, again while honest clients wait long in it: what they wait beside what they do in quiet."""
    said = []
    for _ in range(TRIES):
        with Honest(server.address) as honest:
            time.sleep(seconds / 2)
        quiet = percentile(honest.waits)
        slow = attack_once(run, server, attack, seconds)
        if slow <= max(TIMES * quiet, LEAST):
            return
        said.append(f"{slow * 1000:.1f} ms ({quiet * 1000:.1f} in quiet)")
        run.counts["attacks made again, for honest clients waited long"] += 1
    run.fail(f"{server.store[:6]} {attack.name}: honest clients wait {', '.join(said)}")


def attack_once(run: Run, server: Server, attack: Attack, seconds: float) -> float:
    """One attack, judged but for what honest clients wait, which it returns: seconds, 99th percentile."""
    what = f"{server.store[:6]} {attack.name}"
    before = counters(server)
    try:
        outcome = attacked(server, attack, max(seconds, attack.least))
    except (ServerFailed, OSError) as error:
        run.fail(f"{what}: {error}")
        return 0.0
    run.counts["attacks"] += 1
    run.counts["honest messages under attack"] += len(outcome.waits)
    for wrong in outcome.wrong[:3]:
        run.fail(f"{what}: {wrong}")
    allowed = attack.connections * attack.each + SLACK
    if outcome.peak > allowed:
        run.fail(f"{what}: {outcome.peak / MIB:.0f} MiB, more than {allowed / MIB:.0f}")
    if attack.counted:
        more = outcome.counters[attack.counted] - before[attack.counted]
        run.counts[attack.counted.replace("_", " ")] += more
        if not more:
            run.fail(f"{what}: the server has counted none of it as {attack.counted}")
    return percentile(outcome.waits)


def names_of(kind: str) -> list[bytes]:
    """Names that would meet in a table whose hash is not keyed, or is weak."""
    if kind == "ends":  # alike at both ends
        return [b"p" * 32 + b"%06d" % i + b"s" * 32 for i in range(FLOODS)]
    if kind == "sums":  # of the same bytes, in another order: the same sum, the same exclusive or
        return [bytes(sorted(b"%06d" % i)) * 2 + b"%06d" % i for i in range(FLOODS)]
    # "Ez" and "FY" are the same to a hash that multiplies by 31
    return [b"".join((b"Ez", b"FY")[i >> bit & 1] for bit in range(16)) for i in range(FLOODS)]


def judge_names(run: Run, server: Server) -> None:
    """Names made to collide take no longer than random ones of the same lengths."""
    draw = random.Random(run.seed)
    with Wire(server.address) as wire:
        for kind in ("ends", "sums", "multiplied"):
            names = names_of(kind)
            others = [b"%0*x" % (len(name), draw.getrandbits(4 * len(name))) for name in names]
            took = [ask_after(run, wire, chosen) for chosen in (names, others)]
            run.counts["names made to collide"] += len(names)
            if took[0] > FLOOD_TIMES * took[1]:
                run.fail(f"{server.store[:6]}: names with the same {kind} are slow: {took} s")


def ask_after(run: Run, wire: Wire, names: list[bytes]) -> float:
    """Index names, ask after them, remove them: how long it takes to ask, in the best of three."""
    best = float("inf")
    count = len(names)
    wire.exchange_bytes(b"".join(b"INDEX|%b|\n" % name for name in names), count)
    asked = b"".join(b"QUERY|%b|\n" % name for name in names)
    for _ in range(3):
        began = time.perf_counter()
        if wire.exchange_bytes(asked, count) != OK * count:
            run.fail("names made to collide are not all there")
        best = min(best, time.perf_counter() - began)
    wire.exchange_bytes(b"".join(b"REMOVE|%b|\n" % name for name in names), count)
    return best


def judge_end(run: Run, server: Server) -> None:
    """Nobody is left inside, and the server stops at once."""
    deadline = time.monotonic() + 10
    while (left := counters(server)["clients"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        run.fail(f"{server.store[:6]}: {left} connections of the attackers are still there")
    code = server.stop()
    if code or any(line.startswith("Traceback") for line in server.lines):
        run.fail(f"{server.store[:6]}: ended with {code}: " + "\n".join(server.lines[-20:]))


CAMPAIGNS = (
    Campaign(
        "hostile",
        "Slow readers and writers, idlers, floods, lines of a gibibyte, names made to collide: memory "
        "bounded, honest clients answered rightly and soon, everything counted.",
        hostile,
        seconds=(60.0, 180.0),
        alone=True,
    ),
)


if __name__ == "__main__":
    run_attack(sys.argv[1], parse_address(sys.argv[2]), float(sys.argv[3]))
