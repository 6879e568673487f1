"""How a server ends: by a signal, by a deposer, by its storage; and how it does not begin.

Each end has its exit code and one clear line; whatever the end, nothing acknowledged is lost.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.servers import Server, Wire
from tests.store.reading import read_files, read_index, reversed_index, without_room


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "index"


def pipeline(count: int, begin: int = 0) -> bytes:
    """INDEX of that many packages, each of which depends on the one before."""
    numbers = range(begin, begin + count)
    return "".join(f"INDEX|p{n}|{f'p{n - 1}' if n else ''}\n" for n in numbers).encode()


def chain(count: int) -> dict[str, frozenset[str]]:
    return {f"p{n}": frozenset([f"p{n - 1}"] if n else []) for n in range(count)}


# --- signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_received_and_leaves_it_all_in_the_package_files(
    number: int, root: Path
) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.send(pipeline(3000))
            wire.receive()
            server.send_signal(number)
            replies = wire.receive_until_closed()
        assert server.wait() == 0
        (last,) = server.events("stopped")
    count = 1 + replies.count(b"\n")
    assert replies == b"OK\n" * (count - 1)
    forward = read_files(root, "forward")
    assert forward == chain(count)  # what was answered, and not one change more
    assert read_files(root, "reverse") == reversed_index(forward)
    assert last["behind"] == 0
    assert last["packages"] == count


def test_after_a_stop_a_person_can_read_a_packages_file(root: Path) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|zlib|", b"INDEX|gettext|", b"INDEX|wget|zlib,gettext"])
        assert server.stop() == 0
    shown = subprocess.run(
        f"cat {root}/forward/*/wget {root}/reverse/*/zlib",
        shell=True,
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert re.fullmatch(
        r"wget\ngettext\nzlib\nforward 2 [0-9a-f]{8}\nzlib\nwget\nreverse 1 [0-9a-f]{8}\n", shown
    )


def test_no_new_client_is_taken_once_a_stop_has_begun(root: Path) -> None:
    with Server(f"file:{root}", "--stop-timeout", "20") as server, unread(server):
        server.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        # One that comes in the very moment may still be taken, and is then answered or closed.
        with pytest.raises(ConnectionRefusedError):
            ask_in_vain(server)


def ask_in_vain(server: Server) -> None:
    """Try for five seconds to get in."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with Wire(server.address, patience=1) as wire, suppress(EOFError, OSError):
            wire.ask(b"QUERY|a|")


def unread(server: Server) -> Wire:
    """A client that has been sent much and reads nothing of it."""
    wire = Wire(server.address)
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.socket.setblocking(False)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            wire.socket.send(b"QUERY|nothing|\n" * 10000)
        except BlockingIOError:
            time.sleep(0.05)
    return wire


def test_a_client_that_does_not_read_is_closed_within_the_time_of_a_stop(root: Path) -> None:
    with Server(f"file:{root}", "--stop-timeout", "3") as server, unread(server):
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 5
    assert read_files(root, "forward") == {"a": frozenset()}


def test_past_the_stop_timeout_the_journal_covers_the_rest_and_the_last_line_says_how_much(
    root: Path,
) -> None:
    count = 12_000
    with Server(f"file:{root}", "--stop-timeout", "0.1") as server:
        with Wire(server.address) as wire:
            assert wire.exchange_bytes(pipeline(count), count) == b"OK\n" * count
        begun = time.monotonic()
        assert server.stop() == 0
        took = time.monotonic() - begun
        (last,) = server.events("stopped")
    assert took < 5
    assert 0 < last["behind"] <= count
    assert read_index(root) == chain(count)
    with Server(f"file:{root}") as server:
        assert server.wait_for("serving")["packages"] == count
        assert server.stop() == 0
    assert read_files(root, "forward") == chain(count)
    assert read_files(root, "reverse") == reversed_index(chain(count))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_and_loses_nothing_acknowledged(
    second: int, root: Path
) -> None:
    with Server(f"file:{root}", "--stop-timeout", "60") as server, unread(server):
        with Wire(server.address) as wire:
            assert wire.exchange_bytes(pipeline(2000), 2000) == b"OK\n" * 2000
        server.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        begun = time.monotonic()
        server.send_signal(second)
        server.wait(5)
        assert time.monotonic() - begun < 3
    assert read_index(root) == chain(2000)
    with Server(f"file:{root}") as server:
        assert server.wait_for("serving")["packages"] == 2000


def test_a_hangup_never_stops_it_and_reads_the_log_level_again(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('log-level = "info"\n')
    with Server(f"file:{root}", "--config", str(config)) as server, Wire(server.address) as wire:
        config.write_text('log-level = "error"\n')
        server.send_signal(signal.SIGHUP)
        assert wire.ask(b"INDEX|a|") == b"OK\n"
        server.send_signal(signal.SIGUSR1)  # counters are "info": not logged any more
        assert wire.ask(b"QUERY|a|") == b"OK\n"
        assert server.exit_code is None
        wire.close()
        assert server.stop() == 0
        assert not server.events("counters")


def test_usr1_logs_the_counters(root: Path) -> None:
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        wire.ask_all([b"INDEX|a|", b"INDEX|b|missing", b"QUERY|a|", b"nonsense"])
        server.send_signal(signal.SIGUSR1)
        counters = server.wait_for("counters")
        assert counters["packages"] == 1
        assert counters["messages"]["index_ok"] == 1
        assert counters["messages"]["index_fail"] == 1
        assert counters["messages"]["error"] == 1
        assert counters["clients"] == 1
        assert wire.ask(b"QUERY|a|") == b"OK\n"


def test_a_signal_with_changes_of_clients_that_are_gone_loses_nothing_that_was_seen(
    root: Path,
) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.send(b"INDEX|a|\n")
            wire.reset()
        with Wire(server.address) as wire:
            seen = wire.ask(b"QUERY|a|")
        assert server.stop() == 0
    assert ("a" in read_files(root, "forward")) or seen == b"FAIL\n"


# --- what keeps a server from starting ----------------------------------------------------------------


def refused(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run `pkgindex serve` to its end; its exit code and the one line that it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "pkgindex", "serve", *arguments],
        capture_output=True,
        timeout=60,
        text=True,
        env=environment,
    )
    assert "Traceback" not in ended.stderr
    assert not ended.stdout
    lines = ended.stderr.splitlines()
    assert lines, "it says nothing"
    assert lines[-1].startswith("pkgindex: ")
    assert len(lines) == 1, ended.stderr
    return ended.returncode, lines[-1]


ANYWHERE = ("--listen", "127.0.0.1:0")


def test_a_port_in_use_is_named_with_what_to_do(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = refused("--store", "memory:", "--listen", address)
        assert code == 3
        assert address in line
        assert "another" in line
        code, line = refused("--store", f"file:{root}", "--listen", address)
        assert code == 3
    with Server(f"file:{root}") as server:
        assert server.stop() == 0


def test_a_taker_over_that_finds_its_port_in_use_leaves_the_writer_alone(root: Path) -> None:
    with Server(f"file:{root}") as server:
        host, port = server.address
        code, line = refused("--store", f"file:{root}", "--listen", f"{host}:{port}", "--takeover")
        assert code == 3
        assert str(port) in line
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"


def test_a_store_below_a_file_or_in_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "index", tmp_path / "no" / "folder"):
        code, line = refused("--store", f"file:{path}", *ANYWHERE)
        assert code == 3, line
        assert str(tmp_path) in line


def test_a_folder_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, line = refused("--store", f"file:{tmp_path}", *ANYWHERE)
    assert code == 3
    assert "thesis.txt" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_store_in_use_is_named_with_its_holders_host_process_and_epoch(root: Path) -> None:
    with Server(f"file:{root}") as server:
        code, line = refused("--store", f"file:{root}", *ANYWHERE)
        assert code == 3
        assert f"process {server.pid} on {socket.gethostname()} (epoch 1" in line
        assert "--takeover" in line
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"


def test_an_unknown_format_is_refused(root: Path) -> None:
    with Server(f"file:{root}") as server:
        assert server.stop() == 0
    (root / "FORMAT").write_text("pkgindex store 99\n{}\ncrc32c 00000000\n")
    code, line = refused("--store", f"file:{root}", *ANYWHERE)
    assert code == 4
    assert "FORMAT" in line
    assert "99" in line


@pytest.mark.parametrize("command", [["serve", *ANYWHERE, "--store"], ["check"], ["dump"]])
def test_a_store_without_its_format_is_damaged_and_its_format_fits_from_any_backup(
    command: list[str], root: Path
) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
        assert server.stop() == 0
    before = sorted(root.rglob("*"))
    saved = (root / "FORMAT").rename(root.with_name("saved"))
    ended = subprocess.run(
        [sys.executable, "-m", "pkgindex", *command, f"file:{root}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (4 if command[0] == "serve" else 2)
    (line,) = ended.stderr.splitlines()
    assert f"{root}/FORMAT: missing" in line
    assert "restore it from any backup of this store" in line
    saved.rename(root / "FORMAT")
    assert sorted(root.rglob("*")) == before
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        assert wire.ask(b"QUERY|a|") == b"OK\n"


@pytest.mark.parametrize("where", ["forward", "journal"])
def test_a_damaged_file_is_refused_and_named(where: str, root: Path) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|a|", b"INDEX|b|a"])
        assert (server.stop() if where == "forward" else server.kill()) is not None
    path = next(p for p in sorted((root / where).rglob("*")) if p.is_file())
    data = bytearray(without_room(path))
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)
    code, line = refused("--store", f"file:{root}", "--rebuild", *ANYWHERE)
    assert code == 4
    assert str(path) in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--store", "gopher:there"], "gopher"),
        (["--store", "memory:something"], "memory"),
        (["--store", "file:"], "file:"),
        (["--store", "file://host/path"], "host"),
        (["--stop-timeout", "soon"], "soon"),
        (["--listen", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_usage_is_named(arguments: list[str], named: str) -> None:
    code, line = (
        refused(*ANYWHERE, *arguments) if "--listen" not in arguments else refused(*arguments)
    )
    assert code == 2
    assert named in line


# --- mounts made for the test -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB in memory; skipped where this process may not mount one."""
    point = tmp_path / "disk"
    point.mkdir()
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "pkgindex-test", str(point)],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def remount(point: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(point)], check=True)


def test_a_read_only_mount_is_refused(small_disk: Path) -> None:
    with Server(f"file:{small_disk}/index") as server:
        assert server.stop() == 0
    remount(small_disk, "ro")
    for path in ("index", "new"):
        code, line = refused("--store", f"file:{small_disk}/{path}", *ANYWHERE)
        assert code == 3
        assert "Read-only" in line
        assert str(small_disk) in line


def test_a_full_disk_at_the_start_is_refused_and_does_no_harm(small_disk: Path) -> None:
    with Server(f"file:{small_disk}/index") as server:
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
        server.kill()
    filled = subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/filler"], capture_output=True)
    assert b"No space left" in filled.stderr
    code, line = refused("--store", f"file:{small_disk}/index", *ANYWHERE)
    assert code == 3
    assert "No space left" in line
    (small_disk / "filler").unlink()
    with Server(f"file:{small_disk}/index") as server, Wire(server.address) as wire:
        assert wire.ask(b"QUERY|a|") == b"OK\n"


def test_a_disk_that_fills_up_ends_the_writer_and_room_brings_it_all_back(small_disk: Path) -> None:
    root = small_disk / "index"
    with (
        Server(f"file:{root}") as server,
        Wire(server.address) as wire,
        Wire(server.address) as other,
    ):
        answered = index_until_closed(wire)
        assert server.wait(10) == 5
        with pytest.raises((EOFError, ConnectionError)):
            other.ask(b"QUERY|p0|")
        (last,) = server.events("stopped: the storage failed")
        assert "No space left" in last["reason"]
        assert "Traceback" not in "\n".join(server.lines)
    remount(small_disk, "size=64m")
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        names = [f"p{n}".ljust(200, "x") for n in range(answered)]
        replies = wire.ask_all(f"QUERY|{name}|".encode() for name in names)
        assert replies == [b"OK\n"] * answered
        assert server.wait_for("serving")["packages"] in (answered, answered + 1)


def index_until_closed(wire: Wire) -> int:
    """INDEX one package after another; how many were acknowledged."""
    answered = 0
    while True:
        name = f"p{answered}".ljust(200, "x")
        try:
            reply = wire.ask(f"INDEX|{name}|".encode())
        except (EOFError, ConnectionError):
            return answered
        assert reply == b"OK\n"
        answered += 1


# --- a deposer ----------------------------------------------------------------------------------------


def test_a_deposed_writer_acknowledges_nothing_more_and_ends_with_code_5(root: Path) -> None:
    answered: list[int] = []
    with Server(f"file:{root}") as old:

        def load() -> None:
            with Wire(old.address) as wire:
                n = 0
                while True:
                    assert wire.ask(b"INDEX|p%d|" % n) == b"OK\n"
                    answered.append(n)
                    n += 1

        failures: list[BaseException] = []
        client = threading.Thread(target=keep_failure, args=(load, failures))
        client.start()
        while len(answered) < 50:
            time.sleep(0.005)
        with Server(f"file:{root}", "--takeover") as new:
            assert old.wait(10) == 5
            client.join()
            assert isinstance(failures[0], (EOFError, ConnectionError)), failures
            (last,) = old.events("stopped: the storage failed")
            assert "taken over" in last["reason"]
            assert "epoch 2" in last["reason"]
            with Wire(new.address) as wire:
                replies = wire.ask_all(b"QUERY|p%d|" % n for n in answered)
                assert replies == [b"OK\n"] * len(answered)
                # The one that was under way may be there or not; nothing behind it can.
                assert wire.ask(b"QUERY|p%d|" % (len(answered) + 1)) == b"FAIL\n"
            assert new.stop() == 0


def keep_failure(job: object, failures: list[BaseException]) -> None:
    try:
        job()  # type: ignore[operator]
    except BaseException as error:  # noqa: BLE001  (judged by the test's own thread)
        failures.append(error)


def test_an_idle_deposed_writer_answers_its_next_change_with_nothing(root: Path) -> None:
    with Server(f"file:{root}") as old, Wire(old.address) as wire:
        assert wire.ask(b"INDEX|a|") == b"OK\n"
        with Server(f"file:{root}", "--takeover") as new:
            with Wire(new.address) as other:
                assert other.ask(b"REMOVE|a|") == b"OK\n"
            # It believes that `a` is there, so to it this is a REMOVE with an effect …
            with pytest.raises((EOFError, ConnectionError)):
                wire.ask(b"REMOVE|never-there|")  # … and this one without: both rest on a proof.
            assert old.wait(10) == 5
            assert new.stop() == 0
    assert read_files(root, "forward") == {}


def test_a_server_that_ends_while_it_starts_leaves_a_store_that_starts(root: Path) -> None:
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            assert wire.exchange_bytes(pipeline(500), 500) == b"OK\n" * 500
        server.kill()
    for number in (signal.SIGTERM, signal.SIGINT):
        starting = Server(f"file:{root}")
        starting.launch()
        time.sleep(0.3)
        starting.send_signal(number)
        starting.wait()
        assert "Traceback" not in "\n".join(starting.lines)
        starting.log_file.unlink(missing_ok=True)
    with Server(f"file:{root}") as server:
        assert server.wait_for("serving")["packages"] == 500
