"""What is a message and what is not: every malformed shape gets ERROR and changes nothing."""

from __future__ import annotations

import pytest

from tests.conformance.conftest import Names
from tests.reference import ERROR, FAIL, OK
from tests.servers import Wire


@pytest.mark.spec
@pytest.mark.parametrize(
    "line",
    [
        b"LIZARD",
        b"BLINDEX|a|b",
        b"REMOVES|a|b",
        b"QUER|a|b",
        b"I|a|b",
        b"LIZARD|a|b",
        b"INDEX|emacs elisp",
        b"INDEX|emacs=elisp",
        "INDEX|emacs\N{SNOWMAN}elisp".encode(),
        b"INDEX",
        b"INDEX|",
        b"REMOVE",
        b"QUERY",
    ],
)
def test_a_broken_message_gets_error_and_the_connection_goes_on(
    wire: Wire, names: Names, line: bytes
) -> None:
    a = names("a")
    assert wire.ask(b"INDEX|%b|" % a) == OK
    assert wire.ask_all([line, b"QUERY|%b|" % a]) == [ERROR, OK]
    assert wire.ask(line) == ERROR
    assert wire.ask_all([line, line, b"QUERY|%b|" % a]) == [ERROR, ERROR, OK]


@pytest.mark.decision
@pytest.mark.parametrize("command", [b"INDEX", b"REMOVE", b"QUERY"])
@pytest.mark.parametrize(
    "shape", [b"%b", b"%b|", b"%b|PKG", b"%b|PKG||", b"%b|PKG|PKG|", b"|%b|PKG|"]
)
def test_a_message_has_exactly_two_bars(
    wire: Wire, names: Names, command: bytes, shape: bytes
) -> None:
    line = (shape % command).replace(b"PKG", names("a"))
    assert wire.ask(line) == ERROR
    assert wire.ask(b"QUERY|%b|" % names("a")) == FAIL


@pytest.mark.decision
@pytest.mark.parametrize("command", [b"INDEX", b"REMOVE", b"QUERY"])
def test_the_package_is_not_empty(wire: Wire, names: Names, command: bytes) -> None:
    assert wire.ask_all([b"%b||" % command, b"%b||%b" % (command, names("a"))]) == [ERROR, ERROR]


@pytest.mark.decision
@pytest.mark.parametrize("items", [b",", b"B,", b",B", b"B,,C", b",,", b"B,C,", b"B,C,,", b"B,,"])
@pytest.mark.parametrize("command", [b"INDEX", b"REMOVE", b"QUERY"])
def test_an_empty_dependency_is_an_error_whatever_the_command(
    wire: Wire, names: Names, command: bytes, items: bytes
) -> None:
    a, b, c = names("a"), names("b"), names("c")
    assert wire.ask_all([b"INDEX|%b|" % b, b"INDEX|%b|" % c]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b" % (a, b)) == OK
    items = items.replace(b"B", b).replace(b"C", c)
    assert wire.ask(b"%b|%b|%b" % (command, a, items)) == ERROR
    # A malformed message changes nothing: not the package, not one of its dependencies.
    assert wire.ask(b"QUERY|%b|" % a) == OK
    assert wire.ask_all([b"REMOVE|%b|" % b, b"REMOVE|%b|" % c]) == [FAIL, OK]


@pytest.mark.decision
def test_a_malformed_index_adds_nothing(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.ask(b"INDEX|%b|" % b) == OK
    broken = [b"INDEX|%b|%b," % (a, b), b"INDEX|%b" % a, b"INDEX|%b|%b|" % (a, b)]
    assert wire.ask_all(broken) == [ERROR] * 3
    assert wire.ask_all([b"QUERY|%b|" % a, b"REMOVE|%b|" % b]) == [FAIL, OK]


@pytest.mark.decision
def test_dependencies_of_query_and_remove_are_checked_for_form_then_ignored(
    wire: Wire, names: Names
) -> None:
    a, absent = names("a"), names("absent")
    assert wire.ask(b"QUERY|%b|%b" % (a, absent)) == FAIL
    assert wire.ask(b"INDEX|%b|" % a) == OK
    assert wire.ask(b"QUERY|%b|%b,%b" % (a, absent, a)) == OK
    assert wire.ask(b"QUERY|%b|not a name" % a) == ERROR
    assert wire.ask(b"REMOVE|%b|not a name" % a) == ERROR
    assert wire.ask(b"QUERY|%b|" % a) == OK, "a malformed REMOVE removed it"
    assert wire.ask(b"REMOVE|%b|%b,%b" % (a, absent, a)) == OK
    assert wire.ask(b"QUERY|%b|%b" % (a, absent)) == FAIL


@pytest.mark.decision
def test_a_dependency_listed_twice_counts_once(wire: Wire, names: Names) -> None:
    a, b, c = names("a"), names("b"), names("c")
    assert wire.ask_all([b"INDEX|%b|" % b, b"INDEX|%b|" % c]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b" % (a, b",".join([b, c, b, b, c]))) == OK
    assert wire.ask(b"REMOVE|%b|" % b) == FAIL
    assert wire.ask(b"INDEX|%b|%b" % (a, c)) == OK
    assert wire.ask(b"REMOVE|%b|" % b) == OK, "an edge was counted more than once"
    assert wire.ask_all([b"REMOVE|%b|" % a, b"REMOVE|%b|" % c]) == [OK, OK]


@pytest.mark.decision
@pytest.mark.parametrize(
    "command",
    [
        b"index",
        b"Index",
        b"INDEx",
        b"INDEX ",
        b" INDEX",
        b"\tINDEX",
        b"INDEX\0",
        b"",
        b"INDE",
        b"INDEXX",
        b"remove",
        b"Remove",
        b"query",
        b"Query",
        b"QUERYQUERY",
        b"REMOVE,",
        b"*",
    ],
)
def test_a_command_is_one_of_three_words_in_capitals(
    wire: Wire, names: Names, command: bytes
) -> None:
    assert wire.ask(b"%b|%b|" % (command, names("a"))) == ERROR
    assert wire.ask(b"QUERY|%b|" % names("a")) == FAIL


@pytest.mark.decision
@pytest.mark.parametrize("command", [b"INDEX", b"REMOVE", b"QUERY"])
def test_a_carriage_return_before_the_line_feed_is_an_error(
    wire: Wire, names: Names, command: bytes
) -> None:
    a, b = names("a"), names("b")
    assert wire.ask(b"INDEX|%b|" % b) == OK
    assert wire.ask(b"%b|%b|\r" % (command, b)) == ERROR
    assert wire.ask(b"%b|%b|%b\r" % (command, a, b)) == ERROR
    assert wire.ask_all([b"QUERY|%b|" % a, b"QUERY|%b|" % b]) == [FAIL, OK]


@pytest.mark.decision
@pytest.mark.parametrize(
    "line", [b"", b" ", b"\r", b"\0", b"|", b"||", b"|||", b",", b"OK", b"\xff"]
)
def test_an_empty_or_meaningless_line_is_an_error(wire: Wire, line: bytes) -> None:
    assert wire.ask_all([line] * 3) == [ERROR] * 3


@pytest.mark.decision
def test_a_nul_byte_ends_nothing(wire: Wire, names: Names) -> None:
    a = names("a")
    lines = [b"INDEX|%b|\0" % a, b"INDEX|%b\0|" % a, b"INDEX|%b\0b|" % a, b"\0INDEX|%b|" % a]
    assert wire.ask_all([*lines, b"QUERY|%b|" % a]) == [ERROR] * 4 + [FAIL]
