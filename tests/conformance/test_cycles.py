"""Packages that depend on themselves, directly or in a circle."""

from __future__ import annotations

import random

import pytest

from tests.conformance.conftest import Names
from tests.reference import FAIL, OK, Model
from tests.servers import Wire

pytestmark = pytest.mark.decision


def test_a_package_cannot_enter_by_depending_on_itself(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.ask(b"INDEX|%b|%b" % (a, a)) == FAIL
    assert wire.ask(b"INDEX|%b|" % b) == OK
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, b, a)) == FAIL
    assert wire.ask_all([b"QUERY|%b|" % a, b"REMOVE|%b|" % b]) == [FAIL, OK]


def test_a_package_that_depends_on_itself_does_not_block_its_own_remove(
    wire: Wire, names: Names
) -> None:
    a, b = names("a"), names("b")
    for _ in range(2):
        assert wire.ask_all([b"INDEX|%b|" % a, b"INDEX|%b|" % b]) == [OK, OK]
        assert wire.ask(b"INDEX|%b|%b,%b" % (a, a, b)) == OK
        assert wire.ask(b"REMOVE|%b|" % b) == FAIL
        assert wire.ask(b"REMOVE|%b|" % a) == OK
        assert wire.ask(b"QUERY|%b|" % a) == FAIL
        assert wire.ask(b"REMOVE|%b|" % b) == OK
        # What it depended on before it was removed is forgotten, itself too.
        assert wire.ask(b"INDEX|%b|%b" % (a, a)) == FAIL


def test_another_dependent_blocks_a_package_that_depends_on_itself(
    wire: Wire, names: Names
) -> None:
    a, top = names("a"), names("top")
    assert wire.ask_all([b"INDEX|%b|" % a, b"INDEX|%b|%b" % (a, a)]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b" % (top, a)) == OK
    assert wire.ask_all([b"REMOVE|%b|" % a, b"REMOVE|%b|" % top]) == [FAIL, OK]
    assert wire.ask(b"REMOVE|%b|" % a) == OK


@pytest.mark.parametrize("size", [2, 3, 7])
def test_each_member_of_a_cycle_blocks_the_others_remove(
    wire: Wire, names: Names, size: int
) -> None:
    circle = [names(f"member-{number}") for number in range(size)]
    assert set(wire.ask_all(b"INDEX|%b|" % name for name in circle)) == {OK}
    edges = zip(circle, circle[1:] + circle[:1], strict=True)
    assert set(wire.ask_all(b"INDEX|%b|%b" % edge for edge in edges)) == {OK}
    assert set(wire.ask_all(b"REMOVE|%b|" % name for name in circle)) == {FAIL}
    assert set(wire.ask_all(b"QUERY|%b|" % name for name in circle)) == {OK}
    # Opened at one place, the circle comes apart from there on.
    assert wire.ask(b"INDEX|%b|" % circle[0]) == OK
    assert wire.ask(b"REMOVE|%b|" % circle[0]) == FAIL
    assert set(wire.ask_all(b"REMOVE|%b|" % name for name in circle[1:])) == {OK}
    assert wire.ask(b"REMOVE|%b|" % circle[0]) == OK


def test_indexing_again_with_a_missing_dependency_fails_and_the_old_list_stays(
    wire: Wire, names: Names
) -> None:
    a, old, new, missing = names("a"), names("old"), names("new"), names("missing")
    assert wire.ask_all([b"INDEX|%b|" % old, b"INDEX|%b|" % new]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b" % (a, old)) == OK
    for listed in ([missing], [new, missing], [missing, new], [old, new, missing]):
        assert wire.ask(b"INDEX|%b|%b" % (a, b",".join(listed))) == FAIL
        assert wire.ask(b"QUERY|%b|" % a) == OK
        assert wire.ask(b"REMOVE|%b|" % old) == FAIL, "the old list is gone"
    assert wire.ask(b"REMOVE|%b|" % new) == OK, "the refused list left an edge behind"


@pytest.mark.parametrize("seed", range(10))
def test_random_messages_with_cycles_are_answered_as_by_the_model(
    wire: Wire, names: Names, seed: int
) -> None:
    dice = random.Random(seed)
    model = Model()
    known = [names(f"p{number}") for number in range(4)]
    lines = []
    for _ in range(3000):
        listed = dice.choices(known, k=dice.choice((0, 1, 1, 2, 3)))
        if dice.random() < 0.02:
            listed.append(b"")
        command = dice.choice((b"INDEX", b"INDEX", b"REMOVE", b"QUERY"))
        lines.append(b"%b|%b|%b" % (command, dice.choice(known), b",".join(listed)))
    for line, answer in zip(lines, wire.ask_all(lines), strict=True):
        assert answer == model.apply(line), f"{line!r} with {model.packages!r}"
