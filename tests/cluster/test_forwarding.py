"""What a client of any server of a cluster sees: one index, and its own messages answered in order."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.clients import mixed
from tests.cluster.servers import Cluster, Member, wait_until
from tests.reference import ERROR, FAIL, MAX_LINE, OK, Model
from tests.servers import Address, Wire, parse_address

#: The servers that every test of this file runs against; each has a listener that may only read.
KINDS = {"writer": (), "follower": (), "strong": ("--reads", "strong")}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Member]]:
    """A writer, a follower, and one with strong reads."""
    read_only = ("--listen", "127.0.0.1:0,read-only")
    with Cluster(tmp_path_factory.mktemp("cluster") / "index", *read_only) as cluster:
        yield {kind: cluster.add(*options) for kind, options in KINDS.items()}
        cluster.check()


@pytest.fixture(params=KINDS)
def member(request: pytest.FixtureRequest, members: dict[str, Member]) -> Member:
    """Each of them."""
    return members[request.param]


@pytest.fixture
def wire(member: Member) -> Iterator[Wire]:
    """A connection to it."""
    with Wire(member.address) as wire:
        yield wire


@pytest.fixture
def prefix() -> bytes:
    """Of names that no other test uses."""
    return b"%b-" % secrets.token_hex(6).encode()


@contextmanager
def busy(member: Member, prefix: bytes) -> Iterator[None]:
    """A client of this server changes something all the time."""
    done = threading.Event()

    def change() -> None:
        with Wire(member.address) as wire:
            while not done.is_set():
                assert wire.ask(b"INDEX|%bbusy|" % prefix) == OK

    changing = threading.Thread(target=change)
    changing.start()
    try:
        yield
    finally:
        done.set()
        changing.join()


def read_only_address(member: Member) -> Address:
    return parse_address(member.wait_for("serving")["listen"][1])


def test_a_change_through_any_server_is_known_to_all(
    member: Member, members: dict[str, Member], wire: Wire, prefix: bytes
) -> None:
    assert wire.ask(b"INDEX|%ba|" % prefix) == OK
    for other in members.values():
        with Wire(other.address) as asking:
            wait_until(lambda asking=asking: asking.ask(b"QUERY|%ba|" % prefix) == OK)
            assert asking.ask(b"INDEX|%bb|%ba" % (prefix, prefix)) == OK
            assert wire.ask(b"REMOVE|%ba|" % prefix) == FAIL
            assert asking.ask(b"REMOVE|%bb|" % prefix) == OK
    assert wire.ask(b"REMOVE|%ba|" % prefix) == OK


def test_a_connection_sees_its_own_changes(wire: Wire, prefix: bytes) -> None:
    for n in range(40):
        asked = [b"INDEX|%b%d|", b"QUERY|%b%d|", b"REMOVE|%b%d|", b"QUERY|%b%d|"]
        told = [wire.ask(line % (prefix, n)) for line in asked]
        assert told == [OK, OK, OK, FAIL]


@pytest.mark.parametrize("seed", range(2))
def test_a_pipeline_of_everything_is_answered_in_its_order(
    wire: Wire, prefix: bytes, seed: int
) -> None:
    draw, model = random.Random(seed), Model()
    for _ in range(30):
        lines = mixed(draw, prefix, draw.choice([1, 2, 5, 40, 400]))
        sent = b"".join(line + b"\n" for line in lines)
        cuts = sorted(draw.choices(range(len(sent)), k=draw.choice([0, 1, 5])))
        for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            wire.send(sent[start:stop])
        assert wire.receive(len(lines)) == [model.apply(line) for line in lines]


def test_a_query_is_answered_before_the_changes_behind_it(
    members: dict[str, Member], wire: Wire, prefix: bytes
) -> None:
    """Also while commits of others are under way, so that both rest on the same one."""
    with busy(members["writer"], prefix):
        for n in range(100):
            wire.send(b"QUERY|%b%d|\n" % (prefix, n))
            wire.send(b"INDEX|%b%d|\n" % (prefix, n))
            wire.send(b"QUERY|%b%d|\n" % (prefix, n))
            assert wire.receive(3) == [FAIL, OK, OK]


def test_errors_are_answered_in_their_place(wire: Wire, prefix: bytes) -> None:
    lines = [b"", b"INDEX|%ba|" % prefix, b"INDEX|%ba|b," % prefix, b"\r", b"QUERY|%ba|" % prefix]
    assert wire.ask_all(lines * 3) == [ERROR, OK, ERROR, ERROR, OK] * 3
    assert wire.ask_all([b"LIZARD", b"QUERY||"]) == [ERROR, ERROR]


def test_a_hundred_thousand_changes_in_one_pipeline_are_answered(wire: Wire, prefix: bytes) -> None:
    count = 100_000
    lines = b"".join(
        b"INDEX|%b%d|\nREMOVE|%b%d|\n" % (prefix, n, prefix, n) for n in range(count // 2)
    )
    assert wire.exchange_bytes(lines, count) == OK * count


@pytest.mark.parametrize("kind", ["follower", "strong"])
def test_more_messages_than_may_wait_are_left_in_their_sockets(
    members: dict[str, Member], kind: str, prefix: bytes
) -> None:
    """The shortest messages are those of which the most come at once."""
    count = 300_000
    with Wire(members[kind].address) as wire, ThreadPoolExecutor(1) as pool:
        members["writer"].pause()
        try:
            sent = b"INDEX|%ba|\n" % prefix + b"\n" * count
            told = pool.submit(wire.exchange_bytes, sent, 1 + count)
            time.sleep(0.5)
        finally:
            members["writer"].go_on()
        assert told.result() == OK + ERROR * count


def test_long_lines_go_through(wire: Wire, prefix: bytes) -> None:
    head = b"INDEX|%bb|" % prefix
    assert wire.ask(b"INDEX|%ba|" % prefix) == OK
    longest = head + b",".join([b"%ba" % prefix] * (MAX_LINE // 14 + 1))
    longest = longest[: MAX_LINE - MAX_LINE % 14].rpartition(b",")[0]
    assert len(longest) > MAX_LINE - 100
    too_long = longest + b"," + longest
    lines = [longest, b"QUERY|%bb|" % prefix, too_long, b"REMOVE|%bb|" % prefix] * 3
    assert wire.ask_all(lines) == [OK, OK, ERROR, OK] * 3


def test_a_client_that_ends_its_side_gets_all_its_answers(wire: Wire, prefix: bytes) -> None:
    wire.send(b"".join(b"INDEX|%b%d|\nQUERY|%b%d|\n" % (prefix, n, prefix, n) for n in range(2000)))
    wire.half_close()
    assert wire.receive_until_closed() == OK * 4000


def test_a_client_that_goes_leaves_nothing_behind(member: Member, prefix: bytes) -> None:
    with Wire(member.address) as wire:
        wire.send(b"".join(b"INDEX|%b%d|\n" % (prefix, n) for n in range(1000)))
        wire.reset()
    wait_until(lambda: member.counters()["unanswered"] == 0)


def test_many_clients_of_all_servers_are_answered_as_each_expects(
    members: dict[str, Member], prefix: bytes
) -> None:
    def one(seed: int) -> None:
        draw, model = random.Random(seed), Model()
        address = list(members.values())[seed % len(members)].address
        with Wire(address) as wire:
            for _ in range(10):
                lines = mixed(draw, b"%b%d-" % (prefix, seed), draw.choice([1, 10, 100]))
                assert wire.ask_all(lines) == [model.apply(line) for line in lines]

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(24)))


def test_a_read_only_listener_changes_nothing(member: Member, wire: Wire, prefix: bytes) -> None:
    with Wire(read_only_address(member)) as reader:
        assert reader.ask(b"INDEX|%ba|" % prefix) == FAIL
        assert wire.ask(b"INDEX|%bb|" % prefix) == OK
        wait_until(lambda: reader.ask(b"QUERY|%bb|" % prefix) == OK)
        asked = [b"QUERY|%ba|", b"INDEX|%ba|", b"REMOVE|%bb|", b"QUERY|%ba|", b"QUERY|%bb|"]
        told = reader.ask_all([*(line % prefix for line in asked), b"LIZARD"])
        assert told == [FAIL, FAIL, FAIL, FAIL, OK, ERROR]
    assert wire.ask_all([b"QUERY|%ba|" % prefix, b"QUERY|%bb|" % prefix]) == [FAIL, OK]


@pytest.mark.parametrize("through", KINDS)
def test_a_strong_read_sees_what_was_acknowledged_anywhere_before(
    members: dict[str, Member], through: str, prefix: bytes
) -> None:
    with Wire(members[through].address) as one, Wire(members["strong"].address) as other:
        for n in range(40):
            assert one.ask(b"INDEX|%b%d|" % (prefix, n)) == OK
            assert other.ask(b"QUERY|%b%d|" % (prefix, n)) == OK
            assert one.ask(b"REMOVE|%b%d|" % (prefix, n)) == OK
            assert other.ask(b"QUERY|%b%d|" % (prefix, n)) == FAIL


def test_a_read_only_listener_with_strong_reads_sees_them_too(
    members: dict[str, Member], prefix: bytes
) -> None:
    with (
        Wire(members["follower"].address) as one,
        Wire(read_only_address(members["strong"])) as other,
    ):
        for n in range(30):
            assert one.ask(b"INDEX|%b%d|" % (prefix, n)) == OK
            assert other.ask_all([b"QUERY|%b%d|" % (prefix, n), b"REMOVE|x|"]) == [OK, FAIL]


def test_a_connection_never_goes_back_in_time(members: dict[str, Member], prefix: bytes) -> None:
    """One indexes p0, p1, … and another asks: what it has once seen, it sees again."""
    done = threading.Event()

    def load() -> None:
        with Wire(members["writer"].address) as wire:
            for n in range(300):
                assert wire.ask(b"INDEX|%b%d|" % (prefix, n)) == OK
        done.set()

    loading = threading.Thread(target=load)
    loading.start()
    with Wire(members["follower"].address) as wire:
        seen = 0
        while not done.is_set():
            wire.send(b"QUERY|%b%d|\n" % (prefix, seen))
            changes = seen % 3 == 0
            if changes:
                wire.send(b"INDEX|%bmine|\n" % prefix)
            if wire.receive(1 + changes)[0] == OK:
                seen += 1
            if seen:
                assert wire.ask(b"QUERY|%b%d|" % (prefix, seen - 1)) == OK
    loading.join()


def test_changes_of_followers_go_on_when_a_journal_over_its_limit_was_shortened(
    tmp_path: Path,
) -> None:
    """Also where nobody changes anything through the writer itself."""
    with Cluster(tmp_path / "index", "--journal-limit", "64k") as cluster:
        _, follower = cluster.start(2)
        lines = b"".join(b"INDEX|%b%d|\n" % (b"n" * 230, n) for n in range(310))
        with Wire(follower.address) as wire:
            assert wire.exchange_bytes(lines, 310) == OK * 310
            assert wire.ask(b"REMOVE|%b0|" % (b"n" * 230)) == OK
