"""Listeners with options of their own: what each lets in and lets through, and how each is written."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkgindex._core import Batch, Graph
from pkgindex.config import Listener, load, parse_listener
from pkgindex.errors import ConfigError
from pkgindex.index.memory import MemoryIndex
from tests.reference import ERROR, FAIL, OK
from tests.servers import STORES, Server, Wire, parse_address
from tests.test_limits import counters

MIB = 1 << 20


def addresses(server: Server) -> list:
    return [parse_address(text) for text in server.wait_for("serving")["listen"]]


# --- how they are written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "table"),
    [
        (":8080", {"address": ":8080"}),
        ("[::1]:1,tls", {"address": "[::1]:1", "tls": True}),
        ("a:1,read-only", {"address": "a:1", "read-only": True, "tls": False}),
        (
            "a:1,tls,read-only,allow=192.0.2.0/24,allow=2001:db8::/32",
            {
                "address": "a:1",
                "tls": True,
                "read-only": True,
                "allow": ["192.0.2.0/24", "2001:db8::/32"],
            },
        ),
        ("a:1,allow=192.0.2.7/32", {"address": "a:1", "allow": "192.0.2.7"}),
        ("unix:/run/a,mode=0600", {"address": "unix:/run/a", "mode": "600"}),
        ("unix:/run/a,mode=0666", {"address": "unix:/run/a", "mode": 0o666}),
    ],
)
def test_a_text_and_a_table_say_the_same(text: str, table: dict) -> None:
    assert parse_listener(text) == parse_listener(table)
    assert str(parse_listener(table)) == text


def test_flags_variable_and_file_take_the_same_listeners(tmp_path: Path) -> None:
    expected = (Listener("a:1", read_only=True), Listener("unix:b", mode=0o600))
    assert load({"listen": ("a:1,read-only", "unix:b,mode=0600")}, {}).listen == expected
    environ = {"PKGINDEX_LISTEN": "a:1,read-only  unix:b,mode=0600"}
    assert load({}, environ).listen == expected
    file = tmp_path / "pkgindex.toml"
    file.write_text('listen = ["a:1,read-only", "unix:b,mode=0600"]')
    assert load({}, {}, file).listen == expected
    file.write_text(
        '[[listen]]\naddress = "a:1"\nread-only = true\n'
        '[[listen]]\naddress = "unix:b"\nmode = "0600"\n'
    )
    assert load({}, {}, file).listen == expected


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a:1,b:2", "between two addresses stands a space"),
        ("a:1,", "'', which is no option"),
        ("a:1,readonly", "'readonly', which is no option"),
        ("a:1,tls,tls", "has tls twice"),
        ("a:1,tls=yes", "takes no value"),
        ("a:1,allow", "is no network"),
        ("a:1,allow=localhost", "is no network"),
        ("a:1,allow=10.0.0.1/8", "write 10.0.0.0/8"),
        ("a:1,mode=0600", "only a Unix socket can have"),
        ("unix:a,mode=rw", "is not three octal digits"),
        ("unix:a,mode=01777", "is not three octal digits"),
        ("unix:a,tls", "a Unix socket cannot have"),
        ("unix:a,allow=10.0.0.0/8", "a Unix socket cannot have"),
        ({"address": "a:1", "allow": 5}, "is no network"),
        ({"address": "a:1", "tls": "yes"}, "takes no value"),
        ({"address": "a:1", "port": 1}, "'port', which is no option"),
        ({"tls": True}, "neither an address nor a table with one"),
        (5, "neither an address nor a table with one"),
    ],
)
def test_a_wrong_listener_is_refused_in_one_line_that_names_it(value: object, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"listen": ("ok:1", value)}, {})
    assert str(caught.value).startswith(f"--listen: {value!r} ")
    assert why in str(caught.value)
    assert "ok:1" not in str(caught.value)


def test_check_config_shows_each_listener_with_its_options() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pkgindex", "serve", "--check-config"),
            *("--listen", ":1,read-only,allow=::1", "--listen", "unix:x,mode=600"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")},
    )
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("listen ")]
    assert row.split()[1:] == [":1,read-only,allow=::1/128", "unix:x,mode=0600", "(--listen)"]


# --- read-only ------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_read_only_listener_answers_changes_with_fail_and_carries_out_none(
    store: str, tmp_path: Path
) -> None:
    options = ("--listen", "127.0.0.1:0,read-only")
    with Server(STORES[store](tmp_path), *options) as server:
        writer, reader = addresses(server)
        with Wire(writer) as writing, Wire(reader) as reading:
            assert writing.ask_all([b"INDEX|a|", b"INDEX|b|a"]) == [OK, OK]
            lines = [
                b"QUERY|a|",
                b"INDEX|c|",
                b"INDEX|c|a,",
                b"REMOVE|b|",
                b"REMOVE|b",
                b"QUERY|b|",
            ]
            assert reading.ask_all(lines) == [OK, FAIL, ERROR, FAIL, ERROR, OK]
            assert reading.ask(b"INDEX|a|") == FAIL  # though it would change nothing
            assert reading.exchange_bytes(b"REMOVE|b|\n" * 100_000, 100_000) == FAIL * 100_000
            assert writing.ask_all([b"QUERY|c|", b"QUERY|b|", b"REMOVE|b|"]) == [FAIL, OK, OK]
        facts = counters(server)
        assert (facts["changes"], facts["messages"]["remove_fail"]) == (3, 100_001)


def read_only(lines: bytes, room: int = 0) -> Batch:
    batch = Batch()
    batch.load(bytearray(lines), 0, len(lines), room, True)
    return batch


def test_what_a_read_only_connection_is_answered_waits_for_nothing() -> None:
    graph = Graph(journalled=True)
    batch = read_only(b"INDEX|a|\nREMOVE|a|\nQUERY|a|\nx\n")
    assert graph.apply(batch) == FAIL * 3 + ERROR
    assert (batch.start, batch.changes, graph.asked, len(graph)) == (batch.stop, 0, False, 0)


def test_an_index_that_iterates_never_sees_a_change_of_a_read_only_connection() -> None:
    batch = read_only(b"INDEX|a|b\nREMOVE|a|\nQUERY|a|\nx\n")
    assert list(batch) == [False, False, ("QUERY", "a", ()), None]
    assert batch.changes == 0


def test_a_batch_is_read_only_until_it_is_loaded_anew() -> None:
    batch = read_only(b"INDEX|a|\n")
    batch.load(batch.buffer, 0, len(batch.buffer), 1)
    assert Graph().apply(batch) == OK


# --- who may connect ------------------------------------------------------------------------------


def test_a_stranger_is_closed_without_a_byte_and_counted() -> None:
    options = ("--listen", "127.0.0.1:0,allow=192.0.2.0/24,allow=2001:db8::/32")
    with Server("memory:", *options, listen="127.0.0.1:0,allow=127.0.0.0/8") as server:
        ours, theirs = addresses(server)
        for _ in range(3):
            with Wire(theirs) as wire:
                assert wire.receive_until_closed() == b""
        with Wire(ours) as wire:
            assert wire.ask(b"QUERY|a|") == FAIL
        facts = counters(server)
        assert (facts["strangers"], facts["accepted"], facts["refused"]) == (3, 1, 0)


def test_a_stranger_takes_no_place_among_the_clients() -> None:
    options = ("--max-clients", "1", "--listen", "127.0.0.1:0,allow=127.0.0.2/32")
    with Server("memory:", *options) as server:
        ours, theirs = addresses(server)
        strangers = [socket.create_connection(theirs) for _ in range(20)]
        with Wire(ours) as wire:
            assert wire.ask(b"QUERY|a|") == FAIL
        # From an address that is allowed.
        deadline = time.monotonic() + 20
        while counters(server)["clients"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        friend = socket.create_connection(theirs, source_address=("127.0.0.2", 0))
        friend.sendall(b"QUERY|a|\n")
        assert friend.recv(100) == FAIL
        for one in [*strangers, friend]:
            one.close()


# --- files and sockets ----------------------------------------------------------------------------


def under(mask: int, *arguments: str) -> list[str]:
    """The command line of pkgindex, begun with this umask."""
    program = f"import os; os.umask({mask}); from pkgindex.cli import main; main()"
    return [sys.executable, "-c", program, *arguments]


def modes(root: Path) -> dict[str, set[int]]:
    """The modes of all folders and of all files below, and of, a folder."""
    found: dict[str, set[int]] = {"folders": set(), "files": set()}
    for path in (root, *root.rglob("*")):
        mode = path.lstat().st_mode
        found["folders" if stat.S_ISDIR(mode) else "files"].add(stat.S_IMODE(mode))
    return found


@pytest.mark.parametrize("mask", [0, 0o022, 0o077], ids=oct)
def test_files_are_0640_and_folders_0750_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    root = tmp_path / "index"
    server = Server(f"file:{root}", "--listen", f"unix:{tmp_path / 'socket'}")
    place = server._command.index("-m")
    server._command[place - 1 : place + 2] = under(mask)
    with server:
        with Wire(server.address) as wire:
            assert wire.ask_all([b"INDEX|a|", b"INDEX|b|a"]) == [OK, OK]
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o660
        assert modes(root) == {"folders": {0o750}, "files": {0o640}}
        assert server.stop() == 0
    assert modes(root) == {"folders": {0o750}, "files": {0o640}}
    (reverse,) = (root / "reverse").glob("*/a")
    reverse.write_text("wrong\n")
    (root / "LOCK").unlink()
    done = subprocess.run(
        under(mask, "check", str(root), "--repair"), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert modes(root) == {"folders": {0o750}, "files": {0o640}}


def test_a_unix_socket_has_its_mode_from_the_first_moment(tmp_path: Path) -> None:
    for mode in ("0600", "0666"):
        path = tmp_path / mode
        with (
            Server("memory:", listen=f"unix:{path},mode={mode}") as server,
            Wire(str(path)) as wire,
        ):
            assert f"{path.stat().st_mode & 0o777:04o}" == mode
            assert wire.ask(b"QUERY|a|") == FAIL
            assert server.stop() == 0


def serve_on(root: Path) -> str:
    """What a start on a store that must be refused says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pkgindex", "serve", "--listen", "127.0.0.1:0"),
            *("--store", f"file:{root}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in (3, 4), done.stderr
    return done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "index"
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        assert wire.ask_all([b"INDEX|a|", b"INDEX|b|a"]) == [OK, OK]
        assert server.stop() == 0
    return root


@pytest.mark.parametrize("folder", ["staging", "journal", "forward", "reverse"])
def test_a_folder_that_is_a_link_is_not_followed_out_of_the_store(
    folder: str, store: Path, tmp_path: Path
) -> None:
    (store / folder).rename(tmp_path / "elsewhere")
    (store / folder).symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.joinpath("elsewhere").rglob("*"))
    assert f"{store / folder}: not a folder (links are not followed)" in serve_on(store)
    assert sorted(tmp_path.joinpath("elsewhere").rglob("*")) == before


def test_a_link_among_the_epochs_costs_nobody_a_file(store: Path, tmp_path: Path) -> None:
    precious = tmp_path / "home" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    (store / "staging" / "00000000").symlink_to(precious.parent)
    assert "Not a directory" in serve_on(store)
    assert precious.read_text() == "mine"


# --- a ceiling on the index -----------------------------------------------------------------------


def fill(wire: Wire, prefix: bytes, most: int = 200_000) -> int:
    """Index packages, each needing the one before, until one is told FAIL; how many were not."""
    done = 0
    while done < most:
        lines = [
            b"INDEX|%s-%d|%s" % (prefix, n, b"%s-%d" % (prefix, n - 1) if n else b"")
            for n in range(done, done + 1000)
        ]
        replies = wire.ask_all(lines)
        good = replies.index(FAIL) if FAIL in replies else len(replies)
        assert replies[:good] == [OK] * good
        done += good
        if good < len(replies):
            return done
    raise AssertionError("no end to it")


@pytest.mark.parametrize("store_name", STORES)
def test_an_index_at_its_ceiling_takes_no_more_and_all_else_goes_on(
    store_name: str, tmp_path: Path
) -> None:
    url = STORES[store_name](tmp_path)
    with Server(url, "--max-index", "512k") as server, Wire(server.address) as wire:
        count = fill(wire, b"p")
        facts = counters(server)
        assert facts["memory"]["names"] + facts["memory"]["edges"] <= MIB // 2
        assert facts["packages"] == count > 1000
        assert facts["beyond_max_index"] >= 1
        last = b"p-%d" % (count - 1)
        needed = b"p-%d" % (count - 2)
        assert wire.ask_all([b"QUERY|" + last + b"|", b"QUERY|p-0|"]) == [OK, OK]
        assert wire.ask(b"INDEX|" + last + b"|" + needed) == OK, "it has that already"
        assert wire.ask(b"REMOVE|" + last + b"|") == OK
        assert wire.ask(b"QUERY|" + last + b"|") == FAIL
        line = server.wait_for("index full")
        assert (line["level"], line["answered_fail"] >= 1) == ("warning", True)
        before = counters(server)["beyond_max_index"]
        assert FAIL in wire.ask_all([b"INDEX|more-%d|" % n for n in range(5000)])
        assert counters(server)["beyond_max_index"] > before
        assert len(server.events("index full")) == 1, "once a minute"
        assert server.stop() == 0
    if store_name == "file":
        # What is there is there: a smaller ceiling keeps no index from being read.
        with Server(url, "--max-index", "300k") as server, Wire(server.address) as wire:
            assert server.wait_for("index larger than --max-index")["max_index"] == 300 * 1024
            assert wire.ask_all([b"QUERY|p-0|", b"REMOVE|" + needed + b"|"]) == [OK, OK]
            assert FAIL in wire.ask_all([b"INDEX|other-%d|" % n for n in range(5000)])
            assert server.stop() == 0


def test_what_a_removal_frees_is_used_again() -> None:
    index = MemoryIndex(MIB)

    def ask(line: bytes) -> bytes:
        batch = Batch()
        batch.load(bytearray(line + b"\n"), 0, len(line) + 1, 1)
        return bytes(index.apply(batch))

    count = 0
    while ask(b"INDEX|package-%06d|" % count) == OK:
        count += 1
    for n in range(0, count, 2):
        assert ask(b"REMOVE|package-%06d|" % n) == OK
    for n in range(0, count, 2):
        assert ask(b"INDEX|another-%06d|" % n) == OK
    assert index.beyond_limit == 1
