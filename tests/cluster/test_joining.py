"""Servers that come: to a new store, to a large one, to one in use; and strangers."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkgindex.cluster.frames import Challenge, Message, Reader, Refused, encode
from pkgindex.cluster.index import ClusterIndex
from pkgindex.cluster.trust import Dials
from pkgindex.config import Settings
from pkgindex.errors import ConfigError
from tests.cluster.clients import Load
from tests.cluster.servers import Cluster, Member, wait_until
from tests.reference import OK
from tests.servers import PATIENCE, Server, ServerFailed, Wire


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "index") as cluster:
        yield cluster


def filled(server: Server, count: int) -> None:
    """Give the index so many packages, p0 and so on, each of which needs the one before."""
    lines = b"".join(b"INDEX|p%d|%b\n" % (n, b"p%d" % (n - 1) if n else b"") for n in range(count))
    with Wire(server.address) as wire:
        assert wire.exchange_bytes(lines, count) == OK * count


# --- members ------------------------------------------------------------------------------------------


def test_of_servers_that_start_at_once_on_a_new_folder_one_writes(cluster: Cluster) -> None:
    members = cluster.start(3)
    assert [member.role for member in members] == ["writer", "follower", "follower"]
    for member in members:
        with Wire(member.address) as wire:
            assert wire.ask(b"INDEX|a|") == OK
    cluster.check()


def test_a_follower_joins_an_index_of_100_000_packages_while_it_changes(cluster: Cluster) -> None:
    writer = cluster.add()
    filled(writer, 100_000)
    with Load(writer, clients=2) as load:
        follower = cluster.add()
        load.goes_on()
    assert writer.events("follower joins")[0]["snapshot"] is True
    asked = b"".join(b"QUERY|p%d|\n" % n for n in range(100_000))
    with Wire(follower.address) as wire:
        assert wire.exchange_bytes(asked, 100_000) == OK * 100_000
    writer.kill()
    follower.wait_for_role("writer")
    load.compare(follower)
    with Wire(follower.address) as wire:
        removed = b"".join(b"REMOVE|p%d|\n" % n for n in reversed(range(99_000, 100_000)))
        assert wire.exchange_bytes(removed, 1000) == OK * 1000
    assert re.search(r"\b99\d{3} packages", cluster.check())


def test_a_follower_that_was_away_goes_on_from_its_position(tmp_path: Path) -> None:
    with Cluster(tmp_path / "index", takeover_after=1.0) as cluster:
        writer, follower = cluster.start(2)
        with Load(writer, clients=2) as load, Wire(follower.address) as wire:
            follower.pause()
            wire.send(b"INDEX|a|\nQUERY|a|\n")
            writer.wait_for("follower gone")
            load.goes_on()
            follower.go_on()
            assert wire.receive(2) == [OK, OK]
        assert [joined["snapshot"] for joined in writer.events("follower joins")] == [True, False]
        load.compare(follower)


def test_a_server_that_is_alone_stops_at_once_and_its_store_is_an_ordinary_one(
    cluster: Cluster,
) -> None:
    alone = cluster.add()
    filled(alone, 1000)
    began = time.monotonic()
    assert alone.stop() == 0
    assert time.monotonic() - began < 5
    assert alone.wait_for("stopped")["behind"] == 0
    assert [path.name for path in (cluster.folder / "servers").iterdir()] == ["secret"]
    with Server(f"file:{cluster.folder}") as plain:
        assert plain.wait_for("serving")["packages"] == 1000
        assert plain.stop() == 0
    again = cluster.add()
    assert again.wait_for("serving")["packages"] == 1000


def test_an_ordinary_server_does_not_start_beside_a_cluster(cluster: Cluster) -> None:
    cluster.add()
    plain = Server(f"file:{cluster.folder}")
    with pytest.raises(ServerFailed) as failed:
        plain.start()
    assert plain.exit_code == 3
    assert "it is in use by" in str(failed.value)


def test_a_server_that_finds_nobody_to_serve_with_ends_when_it_is_asked_to(
    cluster: Cluster,
) -> None:
    writer = cluster.add()
    writer.pause()
    waiting = cluster.launch()
    waiting.wait_for("cluster member")
    assert waiting.counters()["unanswered"] == 0
    began = time.monotonic()
    assert waiting.stop() == 0
    assert time.monotonic() - began < 5
    assert not waiting.events("serving")


# --- refusals -----------------------------------------------------------------------------------------


def refused(store: str, *options: str) -> tuple[int, str]:
    """The exit code, and the one line, of a server that cannot start."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pkgindex",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--store",
            store,
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def test_only_a_store_on_a_mount_can_be_shared() -> None:
    code, line = refused("memory:", "--cluster", "127.0.0.1:0")
    assert (code, line.startswith("pkgindex: cluster: memory:: only file: is a store")) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster": ":8081"}, "every address"),
        ({"cluster": "0.0.0.0:8081"}, "every address"),
        ({"cluster": "127.0.0.1:0", "takeover": True}, "takeover: "),
        ({"cluster": "127.0.0.1:0", "max_line": 33 << 20}, "max-line: at most 32m"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    folder = str(tmp_path / "index")
    with pytest.raises(ConfigError) as refused:
        ClusterIndex.open(folder, Settings(store=f"file:{folder}", **options))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cluster_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = refused(f"file:{tmp_path / 'index'}", "--cluster", address)
    assert code == 3
    assert address in line


# --- strangers at the cluster port --------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    with Cluster(tmp_path_factory.mktemp("strangers") / "index") as cluster:
        yield cluster.add()


def said_to(server: Member, *parts: bytes) -> bytes:
    """All that the cluster port says to who sends this, until it closes the connection."""
    heard = bytearray()
    with socket.create_connection(server.cluster, timeout=PATIENCE) as stranger:
        try:
            for part in parts:
                stranger.sendall(part)
            while data := stranger.recv(65536):
                heard += data
        except ConnectionError:
            pass
    return bytes(heard)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"INDEX|a|\n" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        bytes(5),
        b"\xff" * 100_000,
        b"".join(encode(Refused("me"))),
    ],
    ids=["http", "client", "tls", "zeros", "flood", "refused"],
)
def test_who_does_not_speak_its_language_is_told_nothing(server: Member, sent: bytes) -> None:
    assert said_to(server, sent) == b""
    with Wire(server.address) as wire:
        assert wire.ask(b"INDEX|a|") == OK


def conversation(server: Member, dials: Dials) -> list[Message]:
    """What the server says until it closes the connection, or trusts this side."""
    reader, heard = Reader(), []
    with socket.create_connection(server.cluster, timeout=PATIENCE) as stranger:
        stranger.sendall(b"".join(part for m in dials.begin() for part in encode(m)))
        while not dials.trusted:
            count = stranger.recv_into(reader.get_buffer(4096))
            if not count:
                break
            for message in reader.received(count):
                heard.append(message)
                if not isinstance(message, Refused):
                    said = [part for m in dials.heard(message) for part in encode(m)]
                    stranger.sendall(b"".join(said))
    return heard


def is_mistrusted_for(server: Member, reason: str) -> bool:
    return any(reason in line["reason"] for line in server.events("server not trusted"))


def test_a_server_of_another_store_is_not_trusted(server: Member) -> None:
    dials = Dials(bytes(32), "0" * 32)
    heard = conversation(server, dials)
    assert not dials.trusted
    assert {type(message) for message in heard} <= {Challenge, Refused}
    wait_until(lambda: is_mistrusted_for(server, "does not know the secret"))


def test_a_server_of_another_version_is_told_this_ones(server: Member) -> None:
    challenge = b"".join(encode(Challenge(2, bytes(32))))
    reader = Reader()
    heard = said_to(server, challenge)
    reader.get_buffer(4096)[: len(heard)] = heard
    first, *rest = reader.received(len(heard))
    assert isinstance(first, Challenge)
    assert all(isinstance(message, Refused) for message in rest)
    wait_until(lambda: is_mistrusted_for(server, "version"))


@pytest.mark.skipif(shutil.which("nc") is None, reason="nc is not installed")
def test_a_shell_can_be_a_client_of_a_follower(cluster: Cluster) -> None:
    _, follower = cluster.start(2)
    host, port = follower.address
    done = subprocess.run(
        rf"printf 'INDEX|a|\nINDEX|b|a\nQUERY|b|\nREMOVE|a|\nx\n' | nc -N {host} {port}",
        shell=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.stdout == b"OK\nOK\nOK\nFAIL\nERROR\n"
    assert follower.stop(signal.SIGINT) == 0
