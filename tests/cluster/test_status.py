"""`pkgindex status` and `handover`: what they say of real servers, alive, dead, hung and unheard of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pkgindex.cluster.members import Member as MemberFile
from pkgindex.cluster.members import Members
from pkgindex.store.mount import Mount
from tests.cluster.servers import Cluster, Member, wait_until
from tests.servers import Server, Wire
from tests.torture.gluster import Volume, why_absent

AFTER = 4.0  # --takeover-after: files on the mount change every 0.8 seconds


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")}
    return subprocess.run(
        [sys.executable, "-m", "pkgindex", *arguments],
        env=kept | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def status(store: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = run("status", "--store", store, "--json", *options)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def cluster_of(server: Member) -> str:
    return "{}:{}".format(*server.cluster)


def files(store: Path) -> list[MemberFile]:
    """What the servers' files on the mount say."""
    return [seen.member for seen in Members(Mount(str(store)), "").look(0)]


def roles(said: dict[str, Any]) -> dict[str, str]:
    return {member["cluster"]: member["role"] for member in said["members"]}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "index", takeover_after=AFTER) as servers:
        yield servers


# --- status ---------------------------------------------------------------------------------------


def test_status_tells_who_writes_and_how_far_the_others_are(cluster):
    writer, follower = cluster.add(), cluster.add()
    with Wire(follower.address) as wire:
        assert wire.ask_all([b"INDEX|a|", b"INDEX|b|a"]) == [b"OK\n", b"OK\n"]
    time.sleep(0.5)  # some PINGs later
    code, said = status(cluster.folder)
    assert code == 0
    assert said["epoch"] == 1
    assert said["writer"]["cluster"] == cluster_of(writer)
    assert said["writer"]["data"] == ["{}:{}".format(*writer.address)]
    assert roles(said) == {cluster_of(writer): "writer", cluster_of(follower): "follower"}
    assert {member["position"] for member in said["members"]} == {2}
    assert all(member["current"] and member["answers"] for member in said["members"])
    assert said["last_change"]["position"] == 2
    assert 0.4 < said["last_change"]["seconds_ago"] < 60
    behind = next(m for m in said["members"] if m["role"] == "follower")
    assert behind["lag_changes"] == 0
    assert 0 <= behind["lag_seconds"] < 10
    assert said["troubles"] == []


def test_the_table_has_a_row_for_each_server_and_says_who_writes(cluster):
    writer, follower = cluster.add(), cluster.add()
    done = run("status", "--store", f"file:{cluster.folder}")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.startswith(f"epoch 1: {cluster_of(writer)} writes; ")
    for server, role in ((writer, "writer"), (follower, "follower")):
        (row,) = [row for row in rows if cluster_of(server) in row]
        assert f" {role} " in row
        assert "{}:{}".format(*server.address) in row


def test_a_killed_server_is_gone_until_another_stands_in_its_place(cluster):
    cluster.add()
    killed = cluster.add()
    address = cluster_of(killed)
    killed.kill()
    code, said = status(cluster.folder)
    assert (code, roles(said)[address]) == (1, "gone")
    (trouble,) = said["troubles"]
    assert trouble == f"{address}: it does not answer on its cluster port (Connection refused)"
    cluster.add(cluster=address)
    code, said = status(cluster.folder)
    assert (code, roles(said)[address]) == (0, "follower")
    assert len(said["members"]) == 2


def test_a_stopped_server_is_not_missed(cluster):
    cluster.add()
    stopped = cluster.add()
    assert stopped.stop() == 0
    code, said = status(cluster.folder)
    assert (code, len(said["members"])) == (0, 1)


def test_a_hung_server_costs_a_bounded_time_and_is_told_from_one_that_beats(cluster):
    writer, paused = cluster.add(), cluster.add()
    paused.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code, said = status(cluster.folder, "--timeout", "30")
    assert time.monotonic() - began < 15
    paused.send_signal(signal.SIGCONT)
    assert code == 1
    assert roles(said) == {cluster_of(writer): "writer", cluster_of(paused): "gone"}


def test_without_a_living_server_the_mount_alone_is_told(cluster):
    first, second = cluster.add(), cluster.add()
    with Wire(first.address) as wire:
        assert wire.ask(b"INDEX|a|") == b"OK\n"
    wait_until(lambda: {seen.change for seen in files(cluster.folder)} == {1})
    first.kill()
    second.kill()
    began = time.monotonic()
    code, said = status(cluster.folder, "--timeout", "2")
    assert time.monotonic() - began < 10
    assert code == 3
    assert said["epoch"] >= 1
    assert said["writer"] is None
    assert roles(said) == {cluster_of(first): "gone", cluster_of(second): "gone"}
    assert {member["position"] for member in said["members"]} == {1}
    assert said["troubles"][0] == "no server writes"


def test_when_all_have_stopped_no_server_writes(cluster):
    assert cluster.add().stop() == 0
    code, said = status(cluster.folder)
    assert (code, said["writer"], said["members"]) == (3, None, [])


def test_one_server_is_asked_alone(cluster):
    writer, follower, killed = cluster.add(), cluster.add(), cluster.add()
    killed.kill()
    for server in (writer, follower):
        code, said = status(cluster.folder, "--server", cluster_of(server))
        assert code == 0
        assert list(roles(said)) == [cluster_of(server)]
        assert said["writer"]["cluster"] == cluster_of(writer)
    code, said = status(cluster.folder, "--server", cluster_of(killed), "--timeout", "2")
    assert code == 3
    done = run("status", "--store", cluster.folder, "--server", "127.0.0.1:1", "--timeout", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "pkgindex: 127.0.0.1:1: no server of this store answers at 127.0.0.1:1; "
    )


def test_a_server_of_another_store_on_an_old_address_is_not_counted_in(cluster, tmp_path):
    cluster.add()
    killed = cluster.add()
    address = cluster_of(killed)
    killed.kill()
    with Cluster(tmp_path / "other") as others:
        others.add(cluster=address)
        code, said = status(cluster.folder)
        assert (code, roles(said)[address]) == (1, "gone")
        assert len(said["troubles"]) == 1


def test_a_store_without_a_cluster_is_refused_in_one_line_and_stays_as_it_is(tmp_path):
    store = tmp_path / "index"
    with Server(f"file:{store}") as server:
        before = sorted(store.iterdir())
        done = run("status", "--store", store)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr == f"pkgindex: {store}: no server has been started with --cluster on it\n"
        )
        assert sorted(store.iterdir()) == before
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("store", "line"),
    [
        ("absent", "no pkgindex store (it has no FORMAT)"),
        ("memory:", "only a file: store has files to read"),
        ("file://host/path", "names a host"),
    ],
)
def test_what_is_no_store_is_told_in_one_line(store, line, tmp_path):
    for command in ("status", "handover"):
        where = tmp_path / store if store == "absent" else store
        done = run(command, "--store", where)
        assert (done.returncode, done.stdout) == (2, "")
        assert line in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_whoever_may_not_read_the_secret_is_told_so(cluster):
    cluster.add()
    secret = cluster.folder / "servers" / "secret"
    secret.chmod(0)
    done = run("status", "--store", cluster.folder)
    assert done.returncode == 2
    assert "Permission denied" in done.stderr


def test_a_mount_that_hangs_ends_the_commands_in_time(tmp_path):
    if why := why_absent():
        pytest.skip(why)
    with Volume(tmp_path) as volume:
        mount = volume.mount("a")
        with Server(f"file:{mount / 'index'}", "--cluster", "127.0.0.1:0") as server:
            assert status(mount / "index")[0] == 0
            volume.pause_brick()
            try:
                for command in ("status", "handover"):
                    began = time.monotonic()
                    done = run(command, "--store", mount / "index", "--timeout", "1")
                    assert time.monotonic() - began < 10
                    assert (done.returncode, done.stdout) == (2, "")
                    assert done.stderr.endswith(": the mount does not answer in time\n")
            finally:
                volume.resume_brick()
            server.kill()


# --- handover -------------------------------------------------------------------------------------


def test_handover_makes_a_follower_write_and_the_writer_follow(cluster):
    writer, follower = cluster.add(), cluster.add()
    done = run("handover", "--store", cluster.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{cluster_of(follower)} writes now, epoch 2 (")
    code, said = wait_until_well(cluster.folder)
    assert code == 0
    assert roles(said) == {cluster_of(follower): "writer", cluster_of(writer): "follower"}


def wait_until_well(store: Path) -> tuple[int, dict[str, Any]]:
    """Wait until everybody follows the new writer."""
    deadline = time.monotonic() + 30
    while True:
        code, said = status(store)
        if code == 0 or time.monotonic() > deadline:
            return code, said


def test_handover_goes_to_the_server_that_is_named(cluster):
    writer, *others = [cluster.add() for _ in range(3)]
    for server in others:
        wait_until_well(cluster.folder)
        done = run("handover", "--store", cluster.folder, "--to", cluster_of(server))
        assert done.stdout.startswith(f"{cluster_of(server)} writes now, "), done.stderr
    wait_until_well(cluster.folder)
    name = writer.id[:8]
    assert run("handover", "--store", cluster.folder, "--to", name).returncode == 0
    done = run("handover", "--store", cluster.folder, "--to", name)
    assert done.returncode == 0
    assert done.stdout == f"{cluster_of(writer)} writes already, epoch 4\n"


def test_a_name_that_is_no_servers_is_a_mistake(cluster):
    cluster.add()
    done = run("handover", "--store", cluster.folder, "--to", "10.9.9.9:1")
    assert done.returncode == 2
    assert done.stderr.startswith("pkgindex: --to: '10.9.9.9:1' is no server of this store: ")


def test_without_a_follower_the_writer_writes_on(cluster):
    writer = cluster.add()
    done = run("handover", "--store", cluster.folder)
    assert done.returncode == 1
    assert (
        done.stderr == f"pkgindex: {cluster_of(writer)} writes on: it refuses: "
        "no follower is ready to take over\n"
    )
    with Wire(writer.address) as wire:
        assert wire.ask(b"INDEX|a|") == b"OK\n"


def test_without_a_writer_there_is_nothing_to_hand_over(cluster):
    cluster.add().kill()
    done = run("handover", "--store", cluster.folder, "--timeout", "2")
    assert done.returncode == 3
    assert done.stderr.startswith("pkgindex: no server writes; ")


def test_a_named_server_that_is_gone_is_told(cluster):
    cluster.add()
    killed = cluster.add()
    killed.kill()
    done = run("handover", "--store", cluster.folder, "--to", cluster_of(killed))
    assert done.returncode == 1
    assert done.stderr.startswith(f"pkgindex: {cluster_of(killed)}: it does not answer ")


def test_clients_of_all_servers_keep_their_connections_through_a_handover(cluster):
    servers = [cluster.add() for _ in range(3)]
    for _ in range(2):
        wait_until_well(cluster.folder)
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.address)) for server in servers]
            command = subprocess.Popen(
                [sys.executable, "-m", "pkgindex", "handover", "--store", str(cluster.folder)]
            )
            rounds = 0
            while command.poll() is None or rounds < 3:
                rounds += 1
                for number, wire in enumerate(wires):
                    name = b"p%d-%d" % (number, rounds % 50)
                    asked = wire.ask_all([b"INDEX|%s|" % name, b"QUERY|%s|" % name])
                    assert asked == [b"OK\n", b"OK\n"]
            assert command.returncode == 0
