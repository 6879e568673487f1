"""The cluster port's messages: what is written is read, wherever it is cut, and nothing else is."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex.cluster import frames
from pkgindex.cluster.frames import (
    HEADER,
    KINDS,
    LARGE,
    SCRATCH,
    SMALL,
    VERSION,
    Answers,
    Batch,
    Challenge,
    Check,
    Checked,
    Confirm,
    Current,
    Done,
    Elsewhere,
    End,
    Forward,
    FrameError,
    HandOver,
    Hello,
    Message,
    Offer,
    Ping,
    Pong,
    Proof,
    Reader,
    Refused,
    Snapshot,
    State,
    Status,
    Welcome,
    encode,
)

X, Y = "0123456789abcdef" * 2, "f" * 32

numbers = st.integers(0, 2**64 - 1)
names = st.binary(min_size=16, max_size=16).map(bytes.hex)
letters = st.text("OFE", max_size=300)
some_lines = st.lists(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"") + b"\n"), min_size=1
)

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Challenge, st.just(VERSION), st.binary(min_size=32, max_size=32)),
    st.builds(Proof, st.binary(min_size=32, max_size=32)),
    st.builds(Refused, st.text(max_size=100)),
    st.builds(Hello, names, names, numbers, numbers, numbers, numbers, numbers),
    st.builds(Welcome, numbers, numbers, numbers, st.booleans(), st.booleans()),
    st.builds(Batch, numbers, st.integers(1, 9), st.binary(max_size=400)),
    st.builds(Snapshot, st.binary(max_size=400)),
    st.builds(End, numbers),
    st.builds(Answers, numbers, letters),
    st.builds(Checked, numbers),
    st.builds(Offer, numbers),
    st.builds(Elsewhere, numbers),
    st.builds(lambda n, lines: Forward(n, len(lines), b"".join(lines)), numbers, some_lines),
    st.builds(Confirm, numbers),
    st.builds(Check, numbers),
    st.builds(Current),
    st.builds(Status),
    st.builds(State, st.text(max_size=100)),
    st.builds(HandOver, names),
    st.builds(Done),
    st.builds(Ping, numbers, numbers),
    st.builds(Pong, numbers, numbers),
)


def bytes_of(*these: Message) -> bytes:
    return b"".join(bytes(part) for message in these for part in encode(message))


def feed(reader: Reader, data: bytes, cuts: random.Random | None = None) -> list[Message]:
    """Hand bytes to a reader, as a socket does that gives few or many at a time."""
    found: list[Message] = []
    while data:
        room = reader.get_buffer()
        size = min(len(room), len(data), cuts.choice([1, 3, 7, 64, 1 << 20]) if cuts else len(data))
        room[:size] = data[:size]
        data = data[size:]
        found += reader.received(size)
    return found


@given(st.lists(messages, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_what_was_written_is_read_wherever_it_is_cut(these: list[Message], cuts: Any) -> None:
    assert feed(Reader(LARGE), bytes_of(*these), cuts) == these


def test_every_kind_of_message_is_known_and_has_a_number_of_its_own() -> None:
    kinds = [
        each for each in vars(frames).values() if isinstance(each, type) and "kind" in vars(each)
    ]
    assert sorted(KINDS.values(), key=repr) == sorted(kinds, key=repr)


@given(st.binary(max_size=200), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_messages_or_an_error_and_the_cuts_are_no_matter(
    data: bytes, cuts: Any
) -> None:
    outcomes = []
    for cut in (None, cuts):
        found: list[Message] = []
        try:
            found += feed(Reader(), data, cut)
            outcomes.append((len(found), ""))
        except FrameError as error:
            outcomes.append((len(found), str(error)))
    assert outcomes[0][1] == outcomes[1][1]


@given(st.lists(messages, min_size=1, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_gives_other_messages_or_an_error_and_never_another_exception(
    these: list[Message], data: st.DataObject
) -> None:
    raw = bytearray(bytes_of(*these))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    reader, found = Reader(LARGE), []
    try:
        for message in feed(reader, bytes(raw)):
            found.append(message)
            encode(message)
    except FrameError:
        pass
    assert found != these


def test_messages_before_a_wrong_one_are_given_first() -> None:
    reader = Reader()
    data = bytes_of(Ping(1, 2), Check(3)) + b"GET / HTTP/1.1\r\n"
    reader.get_buffer()[: len(data)] = data
    found = reader.received(len(data))
    assert (next(found), next(found)) == (Ping(1, 2), Check(3))
    with pytest.raises(FrameError, match="no message of the cluster protocol: kind 71"):
        next(found)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (HEADER.pack(99, 0), "kind 99"),
        (HEADER.pack(Ping.kind, 15), "PING: 15 bytes, not 16 to 16"),
        (HEADER.pack(Ping.kind, 17), "PING: 17 bytes"),
        (HEADER.pack(Batch.kind, 11), "BATCH: 11 bytes"),
        (HEADER.pack(Batch.kind, SMALL + 1), "BATCH: 4097 bytes, 4096 at most here"),
        (HEADER.pack(Batch.kind, 0xFFFFFFFF), "BATCH: 4294967295 bytes"),
        (HEADER.pack(Answers.kind, 2**17), "ANSWERS: 131072 bytes"),
        (
            HEADER.pack(Answers.kind, 9) + b"\0" * 8 + b"X",
            "ANSWERS: an answer that is not O, F or E",
        ),
        (HEADER.pack(Challenge.kind, 3) + b"\0\1x", "CHALLENGE: a nonce of another length"),
        (HEADER.pack(Forward.kind, 14) + b"\0" * 11 + b"\2a\n", "FORWARD: not 2 complete lines"),
        (HEADER.pack(Forward.kind, 14) + b"\0" * 11 + b"\1\na", "FORWARD: not 1 complete lines"),
        (HEADER.pack(Forward.kind, 12) + b"\0" * 12, "FORWARD: not 0 complete lines"),
        (HEADER.pack(Hello.kind, 3) + b"\0\1x", "HELLO: of another length"),
        (HEADER.pack(Hello.kind, 3) + b"\0\2x", "HELLO: version 2 of the cluster protocol, not 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, why: str) -> None:
    with pytest.raises(FrameError) as caught:
        feed(Reader(), data)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_challenge_of_a_later_version_is_read_whatever_it_holds() -> None:
    frame = HEADER.pack(Challenge.kind, 9) + b"\0\7unknown"
    assert feed(Reader(), frame) == [Challenge(7, b"unknown")]


def test_a_message_too_large_is_not_written() -> None:
    with pytest.raises(FrameError, match="ANSWERS: 65537 bytes of body, 65536 at most"):
        encode(Answers(1, "O" * 65537))


def test_a_reason_is_cut_to_what_may_be_said() -> None:
    (refused,) = feed(Reader(), bytes_of(Refused("ä" * 1000)))
    assert refused == Refused("ä" * 512)


def test_a_body_is_not_copied_on_the_way_out() -> None:
    lines = memoryview(b"+a||\n" * 1000)
    _, body = encode(Batch(1, 1000, lines))
    assert body is lines


def test_a_large_body_is_received_where_it_stays() -> None:
    body = random.Random(1).randbytes(3 * SCRATCH)
    data = bytes_of(Batch(1, 1, body))
    reader = Reader(LARGE)
    reader.get_buffer()[:SCRATCH] = data[:SCRATCH]
    assert list(reader.received(SCRATCH)) == []
    room = reader.get_buffer()
    assert len(room) == len(data) - SCRATCH
    room[:] = data[SCRATCH:]
    (batch,) = reader.received(len(room))
    assert batch == Batch(1, 1, body)
    assert isinstance(batch, Batch)
    assert room.obj is batch.lines


def test_a_reader_may_be_trusted_with_more_between_two_messages_of_one_chunk() -> None:
    reader = Reader()
    data = bytes_of(Proof(b"m" * 32), Answers(1, "O" * 5000))
    reader.get_buffer()[: len(data)] = data
    found = []
    for message in reader.received(len(data)):
        found.append(message)
        reader.limit = LARGE
    assert found[1] == Answers(1, "O" * 5000)


def test_no_memory_is_set_aside_for_a_strangers_large_frame() -> None:
    reader = Reader()
    with pytest.raises(FrameError):
        feed(reader, HEADER.pack(Batch.kind, LARGE) + b"\0" * 12)
    assert reader._body is None
