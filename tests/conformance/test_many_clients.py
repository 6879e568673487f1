"""Clients side by side: a thousand connections, contradictions, and clients that do not read."""

from __future__ import annotations

import random
import selectors
import time
from contextlib import suppress

import pytest

from tests.conformance.conftest import Connect, Names
from tests.conformance.interleaving import State, legal_end_states
from tests.reference import FAIL, OK
from tests.servers import Wire

#: Seconds within which a server that is busy with another client must still answer this one.
#: Far more than it should need, for the machine may be busy with something else.
SOON = 5.0


def _together(wires: list[Wire], streams: list[bytes], counts: list[int]) -> list[list[bytes]]:
    """Send a stream on each connection at the same time; return each one's replies."""
    for wire, stream in zip(wires, streams, strict=True):
        wire.send(stream)
    return [wire.receive(count) for wire, count in zip(wires, counts, strict=True)]


@pytest.mark.spec
def test_a_thousand_connections_are_served_at_once(connect: Connect, names: Names) -> None:
    base = names("base")
    own = [names(f"own-{number}") for number in range(1000)]
    wires = [connect() for _ in own]
    ones = [1] * len(wires)
    assert wires[0].ask(b"INDEX|%b|" % base) == OK
    indexed = _together(wires, [b"INDEX|%b|%b\n" % (name, base) for name in own], ones)
    assert indexed == [[OK]] * 1000
    others = own[1:] + own[:1]
    assert _together(wires, [b"QUERY|%b|\n" % name for name in others], ones) == [[OK]] * 1000
    assert wires[-1].ask(b"REMOVE|%b|" % base) == FAIL
    removed = _together(wires, [b"REMOVE|%b|\n" % name for name in others], ones)
    assert removed == [[OK]] * 1000
    assert wires[500].ask(b"REMOVE|%b|" % base) == OK


@pytest.mark.spec
def test_a_thousand_unfinished_lines_keep_nobody_waiting(connect: Connect, names: Names) -> None:
    wires = [connect() for _ in range(1000)]
    half = b"QUERY|%b" % names("a")
    for wire in wires:
        wire.send(half)
    other = connect()
    began = time.monotonic()
    assert other.ask_all([b"INDEX|%b|" % names("a"), half + b"|"]) == [OK, OK]
    assert time.monotonic() - began < SOON
    assert _together(wires, [b"|\n"] * 1000, [1] * 1000) == [[OK]] * 1000


@pytest.mark.spec
def test_an_index_and_a_remove_of_its_dependency_at_once_cannot_both_be_ok(
    connect: Connect, names: Names
) -> None:
    """Whichever comes first makes the other FAIL; both OK or both FAIL is a broken index."""
    wires = [connect(), connect()]
    dice = random.Random(1)
    for number in range(200):
        top, base = names(f"top-{number}"), names(f"base-{number}")
        assert wires[0].ask(b"INDEX|%b|" % base) == OK
        streams = [b"INDEX|%b|%b\n" % (top, base), b"REMOVE|%b|\n" % base]
        order = dice.sample((0, 1), 2)
        answers = _together([wires[n] for n in order], [streams[n] for n in order], [1, 1])
        index, remove = (answers[order.index(n)][0] for n in (0, 1))
        assert {index, remove} == {OK, FAIL}, f"INDEX {index!r}, REMOVE {remove!r}"
        expected = [index, index]
        assert wires[1].ask_all(b"QUERY|%b|" % name for name in (top, base)) == expected


@pytest.mark.spec
@pytest.mark.parametrize("seed", range(8))
def test_contradicting_clients_get_answers_that_some_order_explains(
    connect: Connect, names: Names, seed: int
) -> None:
    """Two clients pipeline opposite changes of the same three packages at the same time."""
    dice = random.Random(seed)
    wires = [connect(), connect()]
    a, b, c = (names(word) for word in "abc")
    changes = [b"INDEX|%b|" % a, b"INDEX|%b|%b" % (b, a), b"INDEX|%b|%b,%b" % (c, a, b)]
    changes += [b"INDEX|%b|" % b, b"INDEX|%b|%b" % (c, b)]
    changes += [b"REMOVE|%b|" % name for name in (a, b, c)] * 2
    changes += [b"QUERY|%b|" % name for name in (a, b, c)]
    states: set[State] = {frozenset()}
    for _ in range(6):
        both = [dice.choices(changes, k=40) for _ in wires]
        streams = [b"".join(line + b"\n" for line in lines) for lines in both]
        answers = _together(wires, streams, [40, 40])
        first, second = (list(zip(*pair, strict=True)) for pair in zip(both, answers, strict=True))
        states = {end for state in states for end in legal_end_states(first, second, state)}
        assert states, f"no order of the two explains {first} beside {second}"
    seen = wires[0].ask_all(b"QUERY|%b|" % name for name in (a, b, c))
    assert seen in [[OK if n in dict(end) else FAIL for n in (a, b, c)] for end in states]


@pytest.mark.spec
def test_many_clients_that_index_and_remove_the_same_package_all_get_ok(
    connect: Connect, names: Names
) -> None:
    """Neither INDEX without dependencies nor REMOVE without dependents ever fails."""
    a = names("a")
    wires = [connect() for _ in range(20)]
    streams = [(b"INDEX|%b|\n" % a, b"REMOVE|%b|\n" % a)[n % 2] * 200 for n in range(len(wires))]
    assert _together(wires, streams, [200] * len(wires)) == [[OK] * 200] * len(wires)


def _send_until_stuck(wire: Wire, chunk: bytes, limit: int) -> int:
    """Send `chunk` again and again, reading nothing, until the server takes no more.

    Return how many bytes were sent, at most about `limit`: a server may buffer without bound.
    """
    sent = 0
    with selectors.DefaultSelector() as selector:
        selector.register(wire.socket, selectors.EVENT_WRITE)
        while sent < limit and selector.select(0.3):
            sent += wire.socket.send(chunk[sent % len(chunk) :])
    return sent


@pytest.mark.spec
@pytest.mark.parametrize(
    ("message", "megabytes"), [(b"QUERY|%b|\n", 32), (b"INDEX|%b|\n", 8), (b"LIZARD\n", 8)]
)
def test_a_client_that_sends_and_does_not_read_stops_nobody_else(
    connect: Connect, names: Names, message: bytes, megabytes: int
) -> None:
    """And when it reads at last it finds every reply, in order."""
    message = message.replace(b"%b", names("a"))
    chunk = message * (65_536 // len(message))
    slow, other = connect(), connect()
    assert slow.ask(b"INDEX|%b|" % names("a")) == OK
    answer = slow.ask(message[:-1])
    sent = _send_until_stuck(slow, chunk, megabytes * 1_000_000)
    for number in range(50):
        began = time.monotonic()
        assert other.ask(b"INDEX|%b|" % names(f"other-{number % 5}")) == OK
        assert other.ask(b"QUERY|%b|" % names("a")) == OK
        assert time.monotonic() - began < SOON, "a client that does not read held up another"
    # The last message may have been sent in part; its rest makes the number whole.
    rest = chunk[sent % len(chunk) :] if sent % len(message) else b""
    count = (sent + len(rest)) // len(message)
    assert slow.exchange_bytes(rest, count) == answer * count


@pytest.mark.spec
def test_a_client_that_sends_very_much_stops_nobody_else(connect: Connect, names: Names) -> None:
    """One client pipelines megabytes and reads; another asks one message at a time meanwhile."""
    busy, other = connect(), connect()
    count = 100_000
    assert other.ask(b"INDEX|%b|" % names("a")) == OK
    stream = b"QUERY|%b|\n" % names("a") * count
    sent, missing, longest = 0, count, 0.0
    deadline = time.monotonic() + busy.patience
    busy.socket.setblocking(False)
    while missing:
        assert time.monotonic() < deadline, f"{missing} of {count} replies still missing"
        with suppress(BlockingIOError):
            sent += busy.socket.send(stream[sent : sent + 262_144])
        began = time.monotonic()
        assert other.ask(b"QUERY|%b|" % names("a")) == OK
        longest = max(longest, time.monotonic() - began)
        try:
            received = busy.socket.recv(262_144)
        except BlockingIOError:
            continue
        assert received, "the server closed the connection"
        missing -= received.count(b"\n")
    busy.socket.settimeout(busy.patience)
    assert longest < SOON
