"""Lines up to and over the limit, 1 MiB without the line feed unless the server says otherwise."""

from __future__ import annotations

import pytest

from tests.conformance.conftest import Connect, Names
from tests.reference import ERROR, FAIL, MAX_LINE, OK
from tests.servers import Wire

pytestmark = pytest.mark.decision


def _index_line(package: bytes, dependency: bytes, length: int) -> bytes:
    """Return an INDEX of exactly `length` bytes: one dependency, listed again and again.

    The last item may have to be longer, so the name is a short one and fillers are of its kind.
    """
    head = b"INDEX|%b|" % package
    room = length - len(head)
    item = dependency + b","
    whole, rest = divmod(room + 1, len(item))
    assert rest == 0, "choose a package whose name makes the items fit"
    return head + (item * whole)[:-1]


def _fitting_package(names: Names, dependency: bytes, length: int) -> bytes:
    """Return a package for which `_index_line` comes out at exactly `length` bytes."""
    for padding in range(len(dependency) + 1):
        package = names(b"p" + b"-" * padding)
        if (length - len(b"INDEX|%b|" % package) + 1) % (len(dependency) + 1) == 0:
            return package
    raise AssertionError("one of these paddings fits")


@pytest.mark.parametrize(
    ("length", "answer"),
    [(MAX_LINE - 1, OK), (MAX_LINE, OK), (MAX_LINE + 1, ERROR), (MAX_LINE + 2, ERROR)],
)
def test_a_line_of_the_limit_is_a_message_and_one_byte_more_is_an_error(
    wire: Wire, names: Names, length: int, answer: bytes
) -> None:
    dependency = names("d")
    package = _fitting_package(names, dependency, length)
    line = _index_line(package, dependency, length)
    assert len(line) == length
    assert wire.ask(b"INDEX|%b|" % dependency) == OK
    assert wire.ask(line) == answer
    assert wire.ask(b"QUERY|%b|" % package) == (OK if answer == OK else FAIL)
    assert wire.ask(b"REMOVE|%b|" % dependency) == (FAIL if answer == OK else OK)


@pytest.mark.parametrize("length", [MAX_LINE + 1, 2 * MAX_LINE, 3 * MAX_LINE + 7, 32 * MAX_LINE])
def test_a_line_over_the_limit_gets_one_error_and_the_connection_goes_on(
    wire: Wire, names: Names, length: int
) -> None:
    a = names("a")
    assert wire.exchange(b"x" * length + b"\n", 1) == [ERROR]
    assert wire.ask_all([b"INDEX|%b|" % a, b"QUERY|%b|" % a]) == [OK, OK]


def test_several_long_lines_in_a_row_get_one_error_each_in_order(wire: Wire, names: Names) -> None:
    a, long = names("a"), b"x" * (MAX_LINE + 1)
    lines = [
        b"QUERY|%b|" % a,
        long,
        b"INDEX|%b|" % a,
        long,
        long,
        long,
        b"QUERY|%b|" % a,
        b"",
        long,
    ]
    expected = [FAIL, ERROR, OK, ERROR, ERROR, ERROR, OK, ERROR, ERROR]
    assert wire.ask_all(lines * 2) == [*expected, OK, *expected[1:]]


@pytest.mark.parametrize("filler", [MAX_LINE, MAX_LINE + 1, 2 * MAX_LINE, 5 * MAX_LINE - 3])
def test_the_end_of_a_line_over_the_limit_is_not_a_message(
    wire: Wire, names: Names, filler: int
) -> None:
    """What is skipped must be skipped to its line feed, however it looks on the way."""
    a = names("a")
    assert wire.exchange(b"x" * filler + b"INDEX|%b|\n" % a, 1) == [ERROR]
    assert wire.ask(b"QUERY|%b|" % a) == FAIL


def test_a_line_over_the_limit_that_arrives_in_pieces_gets_one_error(
    wire: Wire, names: Names
) -> None:
    for piece in (1000, 65_536, 100_003):
        data = b"y" * (2 * MAX_LINE) + b"\n"
        for start in range(0, len(data), piece):
            wire.send(data[start : start + piece])
        assert wire.receive() == [ERROR]
        assert wire.ask(b"QUERY|%b|" % names("a")) == FAIL


def test_a_line_over_the_limit_that_ends_with_its_packet_gets_one_error(
    wire: Wire, names: Names
) -> None:
    """The line feed alone in the next packet, and with a message behind it."""
    for tail in (b"\n", b"\nQUERY|%b|\n" % names("a")):
        wire.send(b"z" * (MAX_LINE + 1))
        other = names("a")
        wire.send(tail)
        expected = [ERROR, FAIL][: tail.count(b"\n")]
        assert wire.receive(len(expected)) == expected
        assert wire.ask(b"QUERY|%b|" % other) == FAIL


def test_a_line_over_the_limit_disturbs_no_other_connection(connect: Connect, names: Names) -> None:
    long, other = connect(), connect()
    long.send(b"x" * (MAX_LINE + 1))
    assert other.ask(b"INDEX|%b|" % names("a")) == OK
    long.send(b"x" * MAX_LINE)
    assert other.ask(b"QUERY|%b|" % names("a")) == OK
    assert long.exchange(b"\nQUERY|%b|\n" % names("a"), 2) == [ERROR, OK]
