"""`serve --workers`: several servers that share one port, minded by one process that never dies with them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.servers import wait_until
from tests.servers import PATIENCE, Address, Server, Wire

WORKERS = 3


class Workers(Server):
    """A supervisor with its workers."""

    def __init__(self, folder: Path, *options: str, count: int = WORKERS, **more: Any) -> None:
        super().__init__(f"file:{folder}", "--workers", str(count), *options, **more)
        self.count = count

    def all_serve(self) -> dict[int, int]:
        """Wait until each worker has served; their process numbers by their own."""
        wait_until(lambda: len(self.pids()) == self.count, what="workers that serve")
        return self.pids()

    def pids(self) -> dict[int, int]:
        """Of the workers that have served, the newest of each number."""
        return {each["worker"]: each["pid"] for each in self.events("serving")}

    def again(self, number: int, pid: int) -> int:
        """Wait until a worker serves that is not this process any more."""
        wait_until(lambda: self.pids()[number] != pid, what=f"worker {number} again")
        return self.pids()[number]

    def counters(self) -> dict[int, dict[str, Any]]:
        """What every worker counts."""
        known = len(self.events("counters"))
        self.send_signal(signal.SIGUSR1)
        wait_until(lambda: len(self.events("counters")) >= known + self.count)
        return {each["worker"]: each for each in self.events("counters")[known:]}


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    with Workers(tmp_path / "index") as started:
        started.all_serve()
        yield started


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")}
    return subprocess.run(
        [sys.executable, "-m", "pkgindex", *arguments],
        env=kept,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- sharing --------------------------------------------------------------------------------------


def test_clients_are_dealt_to_all_workers_and_see_one_index(workers):
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(workers.address)) for _ in range(60)]
        for number, wire in enumerate(wires):
            assert wire.ask(b"INDEX|p%d|" % number) == b"OK\n"
        for number, wire in enumerate(wires):
            assert wire.ask(b"QUERY|p%d|" % number) == b"OK\n"
        counters = workers.counters()
    assert sorted(counters) == [1, 2, 3]
    assert all(each["accepted"] > 0 for each in counters.values())
    assert sum(each["accepted"] for each in counters.values()) == 60
    roles = [each["cluster"]["self"]["role"] for each in counters.values()]
    assert sorted(roles) == ["follower", "follower", "writer"]


def test_every_line_of_the_log_says_which_worker(workers):
    assert {event["worker"] for event in workers.events()} == {1, 2, 3}


def test_status_shows_all_workers_with_the_address_that_they_share(workers):
    store = workers.store
    done = run("status", "--store", store)
    assert done.returncode == 0
    assert done.stdout.count("{}:{}".format(*workers.address)) == WORKERS


def test_a_unix_socket_is_shared_and_stays_until_the_end(tmp_path):
    path = tmp_path / "socket"
    with Workers(tmp_path / "index", "--listen", f"unix:{path}", count=2) as workers:
        pids = workers.all_serve()
        with Wire(str(path)) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
        os.kill(pids[2], signal.SIGTERM)
        workers.again(2, pids[2])
        with Wire(str(path)) as wire:
            wait_until(lambda: wire.ask(b"QUERY|a|") == b"OK\n")
        assert workers.stop() == 0
        assert not path.exists()


def three_free_ports() -> int:
    """The first of three in a row, below those that the system gives to whoever asks for any."""
    while True:
        first = random.randrange(20_000, 30_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + 3):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def test_fixed_cluster_ports_are_a_range(tmp_path):
    first = three_free_ports()
    with Workers(tmp_path / "index", "--cluster", f"127.0.0.1:{first}") as workers:
        workers.all_serve()
        cluster = {each["worker"]: each["cluster"] for each in workers.events("cluster member")}
    assert cluster == {n: f"127.0.0.1:{first + n - 1}" for n in (1, 2, 3)}


def test_further_servers_join_the_workers(workers):
    with Server(workers.store, "--cluster", "127.0.0.1:0") as other:
        with Wire(other.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
        with Wire(workers.address) as wire:
            wait_until(lambda: wire.ask(b"QUERY|a|") == b"OK\n")


# --- a worker dies --------------------------------------------------------------------------------


def test_a_killed_worker_is_started_again_in_its_place_and_the_others_clients_stay(workers):
    pids = workers.pids()
    where = {each["worker"]: each["cluster"] for each in workers.events("cluster member")}
    for number in sorted(pids):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(workers.address)) for _ in range(30)]
            assert all(wire.ask(b"INDEX|a|") == b"OK\n" for wire in wires)
            its = workers.counters()[number]["clients"]
            os.kill(pids[number], signal.SIGKILL)
            workers.again(number, pids[number])
            lost = 0
            for wire in wires:
                try:
                    assert wire.ask(b"QUERY|a|") == b"OK\n"
                except (EOFError, ConnectionError):
                    lost += 1
            assert lost == its
        ended = workers.events("worker ended")[-1]
        assert (ended["worker"], ended["signal"]) == (number, "SIGKILL")
        assert workers.events("cluster member")[-1]["cluster"] == where[number]
    assert workers.exit_code is None


def test_clients_that_wait_to_be_accepted_by_a_worker_that_dies_are_answered_by_the_next(workers):
    paused = workers.pids()[2]
    os.kill(paused, signal.SIGSTOP)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(workers.address)) for _ in range(60)]
        for wire in wires:
            wire.send(b"QUERY|a|\n")
        time.sleep(0.5)  # those of the other workers have their answers
        os.kill(paused, signal.SIGKILL)
        for wire in wires:
            assert wire.receive() == [b"FAIL\n"]
        assert workers.counters()[2]["accepted"] > 0


def test_a_worker_that_dies_again_and_again_waits_longer_each_time_and_its_clients_go_elsewhere(
    workers,
):
    for times in range(1, 4):
        pid = workers.pids()[2]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda times=times: len(workers.events("worker ended")) == times)
        if times == 3:
            for _ in range(30):  # nobody listens on its sockets now
                with Wire(workers.address) as wire:
                    assert wire.ask(b"QUERY|a|") == b"FAIL\n"
            assert workers.pids()[2] == pid
        workers.again(2, pid)
    assert [each["again_in"] for each in workers.events("worker ended")] == [0.0, 0.5, 1.0]


def test_a_worker_that_is_asked_to_stop_answers_all_and_is_started_again(workers):
    pid = workers.pids()[1]
    with Wire(workers.address) as wire:
        wire.send(b"INDEX|a|\n" * 1000)
        os.kill(pid, signal.SIGTERM)
        assert wire.receive(1000) == [b"OK\n"] * 1000
    workers.again(1, pid)
    assert workers.events("worker ended")[-1]["code"] == 0


def test_workers_whose_supervisor_is_killed_stop_by_themselves(tmp_path):
    with Workers(tmp_path / "index") as workers:
        pids = workers.all_serve().values()
        os.kill(workers.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), what="no worker")
        assert len(workers.events("stopped")) == WORKERS


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", ["supervisor", "group"])
def test_a_signal_to_stop_answers_what_was_received_and_ends_all(tmp_path, number, to):
    """To the whole group, as a terminal or a service manager sends it: each worker gets it twice."""
    with Workers(tmp_path / "index") as workers, ExitStack() as stack:
        pids = workers.all_serve().values()
        wires = [stack.enter_context(Wire(workers.address)) for _ in range(12)]
        for count, wire in enumerate(wires):
            wire.send(b"".join(b"INDEX|p%d-%d|\n" % (count, n) for n in range(500)))
        assert [wire.receive() for wire in wires] == [[b"OK\n"]] * 12
        (os.kill if to == "supervisor" else os.killpg)(workers.pid, number)
        for wire in wires:
            answers = wire.receive_until_closed()
            assert answers == b"OK\n" * answers.count(b"\n")
        assert workers.wait() == 0
        assert not any(map(is_alive, pids))
        assert len(workers.events("stopped")) == WORKERS
        # A unique folder's servers/ has nobody any more, so no client of another server waits for one.
        assert [p.name for p in (tmp_path / "index" / "servers").iterdir()] == ["secret"]
    assert run("check", str(tmp_path / "index")).returncode == 0


def test_a_second_signal_stops_all_at_once(tmp_path):
    with Workers(tmp_path / "index") as workers:
        pids = workers.all_serve()
        os.kill(pids[2], signal.SIGSTOP)  # which holds the stop up
        workers.send_signal(signal.SIGTERM)
        time.sleep(1)
        workers.send_signal(signal.SIGTERM)
        os.kill(pids[2], signal.SIGCONT)
        assert workers.wait() == 0


def test_a_worker_that_does_not_stop_in_time_is_killed(tmp_path):
    with Workers(tmp_path / "index", "--stop-timeout", "1", count=2) as workers:
        pid = workers.all_serve()[2]
        os.kill(pid, signal.SIGSTOP)
        workers.send_signal(signal.SIGTERM)
        assert workers.wait() == 128 + signal.SIGKILL
        assert not is_alive(pid)
        assert workers.events("workers killed")[0]["workers"] == [2]


def test_a_hangup_is_heeded_by_every_worker(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('log-level = "info"')
    with Workers(tmp_path / "index", "--config", str(file)) as workers:
        workers.all_serve()
        workers.send_signal(signal.SIGHUP)
        wait_until(lambda: len(workers.events("configuration read again")) == WORKERS + 1)
        said = [each.get("worker") for each in workers.events("configuration read again")]
        assert sorted(said, key=str) == [1, 2, 3, None]


def test_systemd_is_told_once_when_clients_are_served_and_when_the_stop_begins(tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(PATIENCE)
        with Workers(tmp_path / "index", environment={"NOTIFY_SOCKET": str(path)}) as workers:
            assert told.recv(100) == b"READY=1"
            with Wire(workers.address) as wire:
                assert wire.ask(b"QUERY|a|") == b"FAIL\n"
            workers.all_serve()
            assert workers.stop() == 0
        told.setblocking(False)
        rest = []
        with suppress(BlockingIOError):
            while True:
                rest.append(told.recv(100))
        assert rest == [b"STOPPING=1"]


# --- what cannot be -------------------------------------------------------------------------------


def refusal(*options: str) -> tuple[int, str]:
    done = run("serve", "--workers", "3", "--listen", "127.0.0.1:0", *options)
    assert done.stdout == ""
    *_, line = done.stderr.splitlines()
    assert sum(line.startswith("pkgindex: ") for line in done.stderr.splitlines()) == 1
    return done.returncode, line


def test_a_store_that_cannot_be_shared_is_refused():
    assert refusal("--store", "memory:") == (
        2,
        "pkgindex: workers: memory:: several servers share a file: store; leave --workers out",
    )


def test_what_a_start_cannot_do_is_said_once_with_the_code_of_one_server(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "FORMAT").write_text("something else\n")
    code, line = refusal("--store", f"file:{tmp_path / 'index'}")
    assert (code, "not a pkgindex store" in line) == (4, True)
    code, line = refusal("--store", f"file:{tmp_path / 'other'}", "--takeover")
    assert (code, "leave it out" in line) == (2, True)


def test_a_port_that_others_listen_on_is_refused_be_they_workers_too(tmp_path, workers):
    address: Address = workers.address
    options = ["--listen", "{}:{}".format(*address), "--store", f"file:{tmp_path / 'other'}"]
    for more in ([], ["--workers", "2"]):
        done = run("serve", *options, *more)
        assert done.returncode == 3
        assert "cannot listen: Address already in use" in done.stderr


def test_damage_that_a_restart_cannot_cure_ends_all_with_its_code(tmp_path):
    with Workers(tmp_path / "index") as workers:
        pids = workers.all_serve()
        (tmp_path / "index" / "FORMAT").write_text("something else\n")
        os.kill(pids[3], signal.SIGKILL)
        assert workers.wait() == 4
        assert not any(map(is_alive, pids.values()))
