"""Every byte string is read as the protocol's table says, wherever the chunks are cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pkgindex._core import Batch, Graph, is_all_name, name_length, newline_offsets
from tests.core.talk import ROOMY, chunk, tell
from tests.reference import ERROR, FAIL, MESSAGE, OK, Model

#: Bytes around every border between classes, and the separators more often than chance has them.
TELLING = b"||||,,,,  \t\r\0\x1f !-+{}~\x7f\x80\xffaAzZ09:"
pieces_of_lines = st.one_of(
    st.sampled_from([b"INDEX", b"REMOVE", b"QUERY", b"index", b"INDEXX", b"REMOV", b"|", b"||"]),
    st.sampled_from([b"a", b"gtk+", b"perl(Foo::Bar)", b"@scope/pkg", b"x" * 255, b"x" * 256]),
    st.lists(st.sampled_from(TELLING), max_size=3).map(bytes),
    st.binary(max_size=4).map(lambda data: data.replace(b"\n", b"")),
)
near_misses = st.lists(pieces_of_lines, max_size=8).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good message with one byte put in, taken out or changed."""
    name = st.text(alphabet="ab+", min_size=1, max_size=3).map(str.encode)
    line = b"%b|%b|%b" % (
        draw(st.sampled_from([b"INDEX", b"REMOVE", b"QUERY"])),
        draw(name),
        b",".join(draw(st.lists(name, max_size=3))),
    )
    at = draw(st.integers(0, len(line)))
    put_in = draw(st.sampled_from([b"", *(bytes([b]) for b in TELLING)]))
    return line[:at] + put_in + line[at + draw(st.integers(0, 1)) :]


lines = st.lists(st.one_of(near_misses, mutated()), min_size=1, max_size=20)


def read(batch: Batch) -> list[tuple[str, str, tuple[str, ...]] | None]:
    return list(batch)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("byte", range(256))
def test_a_name_ends_at_every_byte_that_no_name_has(byte: int, portable: bool) -> None:
    """Wherever it stands in the words that are looked at together."""
    is_of_names = 0x21 <= byte <= 0x7E and byte not in b"|,"
    for before in range(36):
        for behind in range(18):
            data = b"x" * before + bytes([byte]) + b"y" * behind + b"\n"
            assert name_length(data, portable) == (len(data) - 1 if is_of_names else before)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("byte", range(256))
def test_bytes_are_all_of_a_name_or_are_not(byte: int, portable: bool) -> None:
    """At each place of names shorter and longer than the words that are looked at together."""
    is_of_names = 0x21 <= byte <= 0x7E and byte not in b"|,"
    for behind in (b"|\n", b"|\nQUERY|after-it|\n"):
        for length in (1, 2, 14, 15, 16, 17, 33):
            for at in range(length):
                data = b"x" * at + bytes([byte]) + b"y" * (length - at - 1) + behind
                assert is_all_name(data, length, portable) is is_of_names


@pytest.mark.parametrize("portable", [False, True])
def test_newlines_are_found_wherever_they_are(portable: bool) -> None:
    for size in (*range(40), 63, 64, 65, 100):
        data = bytearray(b"\x0b" * size)
        assert newline_offsets(data, portable) == []
        for at in range(size):
            data[at : at + 1] = b"\n"
            assert newline_offsets(data, portable) == ([at] if at < 64 else [])
            data[at : at + 1] = b"\x8a"
        assert newline_offsets(b"\n" * size, portable) == list(range(min(size, 64)))


@given(lines)
@example([b"INDEX|a|b,", b"INDEX|a|,b", b"INDEX|a|b,,c", b"INDEX|a|b|", b"QUERY||", b"QUERY|a|"])
@example([b"QUERY|a", b"REMOVE|a", b"REMOVE", b"REMOVEX|a|", b"", b"\r", b"QUERY|a|\r"])
@settings(max_examples=250, deadline=None)
def test_a_line_is_a_message_exactly_if_the_table_says_so(lines: list[bytes]) -> None:
    got = read(chunk(b"".join(line + b"\n" for line in lines)))
    expected: list[tuple[str, str, tuple[str, ...]] | None] = []
    for line in lines:
        match = MESSAGE.fullmatch(line)
        if match is None:
            expected.append(None)
        else:
            command, name, needed = (group.decode() for group in match.groups())
            expected.append((command, name, tuple(needed.split(",")) if needed else ()))
    assert got == expected


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_is_in_a_name_or_is_not(byte: int) -> None:
    line = b"QUERY|a%ca|a%c" % (byte, byte)
    legal = 0x21 <= byte <= 0x7E and byte not in b"|,"
    if byte == ord("\n"):
        assert tell(Graph(), line) == [ERROR, ERROR, ERROR]
    elif byte == ord(","):
        assert tell(Graph(), line) == [ERROR]
    else:
        assert tell(Graph(), line) == [FAIL if legal else ERROR]


@given(lines, st.randoms())
@settings(max_examples=60, deadline=None)
def test_replies_are_the_same_however_the_stream_is_cut_into_batches(lines, random) -> None:
    model, graph = Model(), Graph()
    data = b"".join(line + b"\n" for line in lines)
    ends = [match.end() for match in re.finditer(b"\n", data)]
    cuts = [*sorted(random.sample(ends, random.randint(0, len(ends) - 1))), len(data)]
    replies = b""
    start = 0
    # As in a connection's buffer: what stands before and behind is no part of the batch.
    buffer = bytearray(b"QUERY|" + data + b"INDEX|trap|\n")
    batch = Batch()
    for stop in dict.fromkeys(cuts):
        batch.load(buffer, 6 + start, 6 + stop, ROOMY)
        answers = graph.apply(batch)
        assert isinstance(answers, bytes)
        assert batch.start == 6 + stop
        replies += answers
        start = stop
    assert replies == b"".join(model.apply(line) for line in lines)
    assert "trap" not in graph


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 1000])
def test_more_messages_than_are_parsed_ahead_are_answered_in_order(count: int) -> None:
    graph = Graph()
    lines = [b"INDEX|p%d|%b" % (i, b"p%d" % (i - 1) if i else b"") for i in range(count)]
    assert tell(graph, *lines) == [OK] * count
    assert tell(graph, *[b"REMOVE|p%d|" % i for i in range(count)]) == [FAIL] * (count - 1) + [OK]


@pytest.mark.parametrize("limit", [9, 64, 1000])
def test_a_line_as_long_as_the_limit_is_read_and_one_byte_more_is_an_error(limit: int) -> None:
    needed = b",".join([b"a"] * limit)
    good = (b"QUERY|a|" + needed)[:limit]
    good = good[:-1] + b"a"
    assert len(good) == limit
    assert read(chunk(good + b"\n", max_line=limit)) != [None]
    assert read(chunk(good[:-1] + b"aa\n", max_line=limit)) == [None]


def test_names_of_255_bytes_are_kept_apart_by_their_last_byte() -> None:
    graph = Graph()
    one, other = b"x" * 254 + b"1", b"x" * 254 + b"2"
    asked = tell(graph, b"INDEX|%b|" % one, b"QUERY|%b|" % other, b"INDEX|%b|%b" % (other, one))
    assert asked == [OK, FAIL, OK]
    assert tell(graph, b"QUERY|%bx|" % one, b"INDEX|y|%bx" % one) == [ERROR, ERROR]
    assert graph.dependents(one.decode()) == [other.decode()]


def test_names_of_every_length_and_with_common_beginnings_are_told_apart() -> None:
    graph = Graph()
    names = [b"z" * length for length in range(1, 256)]
    assert set(tell(graph, *[b"INDEX|%b|" % name for name in names[::2]])) == {OK}
    asked = tell(graph, *[b"QUERY|%b|" % name for name in names])
    assert asked == [OK if i % 2 == 0 else FAIL for i in range(255)]
    graph.verify()


# --- the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 3), (4, 4), (5, 4), (-1, 4), (0, 9), (4, 8)]
)
def test_a_batch_is_a_non_empty_run_of_complete_lines(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="complete lines"):
        Batch().load(bytearray(b"abc\nabc"), start, stop, 1)


@pytest.mark.parametrize("room", range(5))
def test_reading_stops_before_the_change_for_which_there_is_no_room(room: int) -> None:
    data = b"QUERY|a|\nINDEX|a|\nLIZARD\nREMOVE|b|\nQUERY|a|\nINDEX|c|b\nQUERY|a|\nREMOVE|a|\n"
    borders = [data.index(word) for word in (b"INDEX|a", b"REMOVE|b", b"INDEX|c", b"REMOVE|a")]
    borders.append(len(data))
    batch, by_hand = chunk(data, room=room), chunk(data, room=room)
    answers = Graph().apply(batch)
    assert isinstance(answers, bytes)
    assert answers.count(b"\n") == data[: borders[room]].count(b"\n") == len(read(by_hand))
    # An Index that iterates sees just what the graph would take.
    assert (batch.start, batch.changes) == (borders[room], room)
    assert (by_hand.start, by_hand.changes) == (borders[room], room)


def test_reading_goes_on_where_it_stopped() -> None:
    graph, batch = Graph(), Batch()
    data = bytearray(b"INDEX|a|\nINDEX|b|a\nINDEX|c|b\n")
    batch.load(data, 0, len(data), 2)
    assert graph.apply(batch) == OK + OK
    batch.load(data, batch.start, len(data), 2)
    assert graph.apply(batch) == OK
    assert batch.start == len(data)


def test_a_message_that_an_index_has_not_asked_for_is_not_taken() -> None:
    batch = chunk(b"INDEX|a|\nINDEX|b|\nINDEX|c|\n")
    assert next(iter(batch)) == ("INDEX", "a", ())
    assert (batch.start, batch.changes) == (9, 1)
    assert next(iter(batch)) == ("INDEX", "b", ())
    assert read(batch) == [("INDEX", "c", ())]
    assert read(batch) == []
