"""Servers that die, leave, or stand still, and what the clients of the others notice: a delay."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clients import Load
from tests.cluster.servers import TAKEOVER_AFTER, Cluster, wait_until
from tests.reference import FAIL, OK
from tests.servers import Wire, parse_address


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "index") as cluster:
        yield cluster


def test_the_clients_of_a_follower_notice_no_more_than_a_delay_when_the_writer_is_killed(
    cluster: Cluster,
) -> None:
    writer, follower = cluster.start(2)
    with Load(follower) as load:
        writer.kill()
        load.goes_on()
        assert follower.role == "writer"
        assert load.longest < TAKEOVER_AFTER / 2, "it waited for a time-out"
    load.compare(follower)
    (taken,) = follower.events("taking over")
    assert taken["own_graph"], "it read the whole store, though it had all of it"
    assert "nothing is wrong" in cluster.check()


def test_one_writer_after_the_other_is_killed(cluster: Cluster) -> None:
    members = cluster.start(3)
    last = members[2]
    with Load(last, clients=2) as load:
        for _ in range(2):
            writer = next(m for m in members if m.exit_code is None and m.role == "writer")
            if writer is last:
                break
            writer.kill()
            wait_until(
                lambda: any(m.exit_code is None and m.role == "writer" for m in members),
                what="a writer",
            )
            load.goes_on()
        cluster.add()
        load.goes_on()
    load.compare(last)
    cluster.check()


def test_a_follower_goes_on_from_its_position_with_the_next_writer(cluster: Cluster) -> None:
    """It has nothing to catch up on, and so takes no snapshot."""
    writer, *followers = cluster.start(3)
    with Load(followers[0], clients=1) as load, Load(followers[1], clients=1) as other:
        writer.kill()
        load.goes_on()
        other.goes_on()
    following = next(f for f in followers if f.role == "follower")
    new = next(f for f in followers if f.role == "writer")
    (joined,) = new.events("follower joins")
    assert joined["member"] == following.id
    assert joined["snapshot"] is False
    assert len(following.events("snapshot taken")) == 1  # when it was started
    other.compare(following)
    load.compare(following)


def test_a_writer_that_is_asked_to_end_hands_over(cluster: Cluster) -> None:
    writer, follower = cluster.start(2)
    with Load(follower) as load, Wire(writer.address) as wire:
        wire.send(b"".join(b"INDEX|own%d|\n" % n for n in range(3000)))
        wire.receive()
        writer.send_signal(signal.SIGTERM)
        replies = wire.receive_until_closed()
        assert writer.wait() == 0
        load.goes_on()
    load.compare(follower)
    assert replies == OK * replies.count(b"\n")
    with Wire(follower.address) as wire:
        names = range(1 + replies.count(b"\n"))
        assert wire.ask_all(b"QUERY|own%d|" % n for n in names) == [OK] * len(names)
    assert len(follower.events("handing over")) == 0
    assert writer.events("handing over")[0]["to"] == follower.id
    cluster.check()


def test_a_follower_that_is_asked_to_end_answers_what_it_has_received(cluster: Cluster) -> None:
    writer, follower = cluster.start(2)
    with Load(writer, clients=1) as load, Wire(follower.address) as wire:
        wire.send(b"".join(b"INDEX|p%d|\n" % n for n in range(3000)))
        wire.receive()
        assert follower.stop() == 0
        replies = wire.receive_until_closed()
        load.goes_on()
    count = 1 + replies.count(b"\n")
    assert replies == OK * (count - 1)
    with Wire(writer.address) as wire:
        names = range(count + 1)
        told = wire.ask_all(b"QUERY|p%d|" % n for n in names)
    assert told[:count] == [OK] * count
    assert count == 3000 or told[count] == FAIL  # what was not answered was not carried out
    assert not (cluster.folder / "servers" / follower.id).exists()
    cluster.check()


def test_all_are_asked_to_end_at_once(cluster: Cluster) -> None:
    members = cluster.start(3)
    with Load(members[1], clients=1):
        pass
    began = time.monotonic()
    for member in members:
        member.send_signal(signal.SIGTERM)
    assert [member.wait() for member in members] == [0, 0, 0]
    assert time.monotonic() - began < TAKEOVER_AFTER, "it waited for one that was leaving as well"
    assert {p.name for p in (cluster.folder / "servers").iterdir()} == {"secret"}
    cluster.check()


def test_all_are_killed_and_nothing_acknowledged_is_lost(cluster: Cluster) -> None:
    members = cluster.start(2)
    load = Load(members[1], clients=2)
    with load:
        load.goes_on()
    for member in members:
        member.kill()
    again = cluster.start(2)
    for member in again:
        load.compare(member)
    cluster.check()


def test_a_writer_that_was_replaced_while_it_stood_still_follows_and_its_clients_stay(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path / "index", takeover_after=1.0) as cluster:
        first = cluster.add()
        second = cluster.add()
        with Wire(first.address) as wire, Wire(second.address) as other:
            assert wire.ask(b"INDEX|a|") == OK
            first.pause()
            wire.send(b"REMOVE|b|\nINDEX|b|a\nREMOVE|b|\nINDEX|c|\n")
            second.wait_for_role("writer")
            # Had the other carried out any of the above, it would show here.
            assert other.ask_all([b"INDEX|b|", b"QUERY|c|"]) == [OK, FAIL]
            first.go_on()
            assert wire.receive(4) == [OK, OK, OK, OK]
            assert wire.ask_all([b"QUERY|b|", b"QUERY|c|", b"INDEX|d|"]) == [FAIL, OK, OK]
            assert other.ask_all([b"QUERY|b|", b"QUERY|c|", b"QUERY|d|"]) == [FAIL, OK, OK]
        assert first.role == "follower"
        assert first.events("deposed")
        cluster.check()


def test_a_writer_that_stands_still_in_the_midst_of_a_load_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path / "index", takeover_after=1.0) as cluster:
        first = cluster.add()
        second = cluster.add()
        with Load(first, clients=2) as own, Load(second, clients=2) as load:
            first.pause()
            second.wait_for_role("writer")
            load.goes_on()
            first.go_on()
            own.goes_on()
            load.goes_on()
        own.compare(second)
        load.compare(first)
        cluster.check()


def test_a_follower_that_stands_still_holds_nobody_up_and_goes_on(cluster: Cluster) -> None:
    writer, follower = cluster.start(2)
    with Load(writer, clients=2) as load, Wire(follower.address) as wire:
        follower.pause()
        wire.send(b"INDEX|a|\nQUERY|a|\n")
        load.goes_on()
        follower.go_on()
        assert wire.receive(2) == [OK, OK]
    load.compare(follower)


def test_who_may_only_read_changes_nothing_across_a_takeover(cluster: Cluster) -> None:
    writer, follower = cluster.start(2, "--listen", "127.0.0.1:0,read-only", "--reads", "strong")
    done = threading.Event()
    told: list[bytes] = []

    def ask() -> None:
        address = parse_address(follower.wait_for("serving")["listen"][1])
        with Wire(address) as wire:
            while not done.is_set():
                told.extend(wire.ask_all([b"INDEX|x|", b"QUERY|x|", b"REMOVE|y|", b"QUERY|y|"]))

    with Wire(follower.address) as wire:
        assert wire.ask(b"INDEX|y|") == OK
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: len(told) > 100)
        writer.kill()
        follower.wait_for_role("writer")
        before = len(told)
        wait_until(lambda: len(told) > before + 100)
        done.set()
        asking.join()
        assert told == [FAIL, FAIL, FAIL, OK] * (len(told) // 4)
        assert wire.ask_all([b"QUERY|x|", b"QUERY|y|"]) == [FAIL, OK]


def test_strong_reads_go_on_after_a_takeover(cluster: Cluster) -> None:
    writer, *followers = cluster.start(3, "--reads", "strong")
    done = threading.Event()
    failures: list[str] = []

    def ask() -> None:
        with Wire(followers[0].address) as one, Wire(followers[1].address) as other:
            n = 0
            while not done.is_set():
                told = [one.ask(b"INDEX|s%d|" % n), other.ask(b"QUERY|s%d|" % n)]
                told += [other.ask(b"REMOVE|s%d|" % n), one.ask(b"QUERY|s%d|" % n)]
                if told != [OK, OK, OK, FAIL]:
                    failures.append(f"{n}: {told}")
                n += 1
                rounds[0] = n

    rounds = [0]
    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: rounds[0] > 20)
    writer.kill()
    before = rounds[0]
    wait_until(lambda: rounds[0] > before + 20)
    done.set()
    asking.join()
    assert not failures
