"""Bytes and messages: packets cut anywhere, pipelines, half-close and what is left unfinished."""

from __future__ import annotations

import random
import time

import pytest

from tests.conformance.conftest import Connect, Names
from tests.reference import ERROR, FAIL, OK, Model
from tests.servers import Wire


def _story(names: Names) -> list[tuple[bytes, bytes]]:
    """Return messages of every kind with their replies; they leave the index as it was."""
    a, b = names("a"), names("b")
    return [
        (b"QUERY|%b|" % a, FAIL),
        (b"INDEX|%b|%b" % (a, b), FAIL),
        (b"INDEX|%b|" % b, OK),
        (b"INDEX|%b|%b" % (a, b), OK),
        (b"LIZARD|%b" % a, ERROR),
        (b"QUERY|%b|" % a, OK),
        (b"REMOVE|%b|" % b, FAIL),
        (b"REMOVE|%b|" % a, OK),
        (b"REMOVE|%b|" % b, OK),
    ]


def _random_story(names: Names, count: int, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Return `count` messages over a few hundred packages, and the model's replies."""
    dice = random.Random(seed)
    model = Model()
    known = [names(f"p{number}") for number in range(200)]
    lines = []
    for _ in range(count):
        place = dice.randrange(len(known))
        needed = dice.sample(known[:place], min(place, dice.choice((0, 0, 1, 2))))
        lines.append(
            dice.choices(
                [
                    b"INDEX|%b|%b" % (known[place], b",".join(needed)),
                    b"QUERY|%b|" % known[place],
                    b"REMOVE|%b|" % known[place],
                    b"INDEX|emacs elisp",
                ],
                [5, 6, 2, 1],
            )[0]
        )
    return lines, [model.apply(line) for line in lines]


@pytest.mark.spec
def test_a_stream_cut_at_any_byte_is_answered_the_same(wire: Wire, names: Names) -> None:
    story = _story(names)
    stream = b"".join(line + b"\n" for line, _ in story)
    expected = [answer for _, answer in story]
    first = b"QUERY|%b|\n" % names("never")
    for cut in range(len(stream) + 1):
        # The reply to what is complete in the first packet shows that the server has read it.
        complete = stream[:cut].count(b"\n")
        wire.send(first + stream[:cut])
        assert wire.receive(1 + complete) == [FAIL, *expected[:complete]], f"cut at {cut}"
        wire.send(stream[cut:])
        assert wire.receive(len(story) - complete) == expected[complete:], f"cut at {cut}"


@pytest.mark.spec
def test_one_byte_a_packet_is_answered_the_same(wire: Wire, names: Names) -> None:
    for line, answer in _story(names):
        for byte in line + b"\n":
            wire.send(bytes([byte]))
            time.sleep(0.0003)  # so that the server reads it before the next one is there
        assert wire.receive() == [answer], line


@pytest.mark.spec
def test_unfinished_lines_of_two_connections_are_not_mixed(connect: Connect, names: Names) -> None:
    first, second = connect(), connect()
    a, b = names("a"), names("b")
    first.send(b"INDEX|%b" % a)
    second.send(b"INDEX|%b" % b)
    time.sleep(0.05)
    first.send(b"|\n")
    assert first.receive() == [OK]
    assert second.exchange(b"|%b\n" % a, 1) == [OK]
    assert first.ask(b"REMOVE|%b|" % a) == FAIL


@pytest.mark.spec
def test_a_pipeline_is_answered_in_order_each_message_once(wire: Wire, names: Names) -> None:
    """Slow answers (changes) do not let quick ones (errors, queries) overtake them."""
    story = _story(names)
    for count in (1, 2, 3, 50, 500):
        assert wire.ask_all([line for line, _ in story] * count) == [a for _, a in story] * count


@pytest.mark.spec
@pytest.mark.parametrize("seed", [1, 2])
def test_a_pipeline_of_100000_messages_is_answered_in_order(
    wire: Wire, names: Names, seed: int
) -> None:
    lines, expected = _random_story(names, 100_000, seed)
    answers = wire.ask_all(lines)
    wrong = next((n for n in range(len(lines)) if answers[n] != expected[n]), None)
    assert wrong is None, f"message {wrong}: {lines[wrong]!r} got {answers[wrong]!r}"


@pytest.mark.decision
def test_after_half_close_everything_sent_is_answered_then_the_server_closes(
    connect: Connect, names: Names
) -> None:
    """What `printf … | nc` does."""
    story = _story(names)
    for rounds in (0, 1, 2, 100):
        wire = connect()
        wire.send(b"".join(line + b"\n" for line, _ in story) * rounds)
        wire.half_close()
        assert wire.receive_until_closed() == b"".join(answer for _, answer in story) * rounds
        wire.close()


@pytest.mark.decision
def test_after_half_close_a_pipeline_of_100000_messages_is_answered_to_its_end(
    connect: Connect, names: Names
) -> None:
    """The end arrives while the server still has replies that the client has not read."""
    lines, expected = _random_story(names, 100_000, seed=3)
    wire = connect()
    # All but the last thousands are sent while reading, so that neither side waits for the other.
    first = wire.ask_all(lines[:-5000])
    wire.send(b"".join(line + b"\n" for line in lines[-5000:]))
    wire.half_close()
    assert b"".join(first) + wire.receive_until_closed() == b"".join(expected)
    wire.close()


@pytest.mark.decision
@pytest.mark.parametrize(
    "unfinished", [b"INDEX|%b|", b"INDEX|%b", b"I", b"INDEX|%b|\r", b"x" * 70_000]
)
def test_bytes_after_the_last_line_feed_are_dropped_without_a_reply(
    connect: Connect, names: Names, unfinished: bytes
) -> None:
    a, b = names("a"), names("b")
    wire = connect()
    wire.send(b"INDEX|%b|\n" % b + unfinished.replace(b"%b", a))
    wire.half_close()
    assert wire.receive_until_closed() == OK
    wire.close()
    assert connect().ask_all([b"QUERY|%b|" % a, b"QUERY|%b|" % b]) == [FAIL, OK]


@pytest.mark.decision
def test_a_client_that_closes_without_a_message_gets_no_byte(connect: Connect) -> None:
    for unfinished in (b"", b"QUERY"):
        wire = connect()
        wire.send(unfinished)
        wire.half_close()
        assert wire.receive_until_closed() == b""
        wire.close()


@pytest.mark.spec
def test_clients_that_break_off_disturb_nobody(connect: Connect, names: Names) -> None:
    """Resets in the middle of a line, of a pipeline, and with replies that nobody read."""
    steady = connect()
    query = b"QUERY|%b|\n" % names("a")
    assert steady.ask(b"INDEX|%b|" % names("a")) == OK
    for number in range(60):
        broken = connect()
        broken.send((b"INDEX|%b" % names("b"), query * 1000, query * 1000 + b"INDEX|")[number % 3])
        broken.reset()
        assert steady.exchange(query, 1) == [OK]
    assert steady.ask(b"QUERY|%b|" % names("b")) == FAIL, "half a line was carried out"


@pytest.mark.spec
def test_a_connection_stays_open_for_message_after_message(wire: Wire, names: Names) -> None:
    story = _story(names)
    for _ in range(100):
        for line, answer in story:
            assert wire.ask(line) == answer
