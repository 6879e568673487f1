"""INDEX, REMOVE and QUERY, one client at a time."""

from __future__ import annotations

import random

import pytest

from tests.conformance.conftest import Connect, Names
from tests.reference import FAIL, OK, Model
from tests.servers import Wire

pytestmark = pytest.mark.spec


def test_query_fails_for_a_package_that_is_not_indexed(wire: Wire, names: Names) -> None:
    assert wire.ask(b"QUERY|%b|" % names("a")) == FAIL


def test_index_without_dependencies_is_ok_and_makes_query_ok(wire: Wire, names: Names) -> None:
    assert wire.ask(b"INDEX|%b|" % names("a")) == OK
    assert wire.ask(b"QUERY|%b|" % names("a")) == OK


def test_indexing_again_is_ok(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.ask_all([b"INDEX|%b|" % b, b"INDEX|%b|" % b]) == [OK, OK]
    assert wire.ask_all([b"INDEX|%b|%b" % (a, b)] * 3) == [OK] * 3
    assert wire.ask(b"REMOVE|%b|" % b) == FAIL


def test_index_fails_while_a_dependency_is_missing_and_changes_nothing(
    wire: Wire, names: Names
) -> None:
    a, b, c = names("a"), names("b"), names("c")
    assert wire.ask(b"INDEX|%b|%b" % (a, b)) == FAIL
    assert wire.ask(b"INDEX|%b|" % b) == OK
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, b, c)) == FAIL
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, c, b)) == FAIL
    assert wire.ask_all(b"QUERY|%b|" % name for name in (a, b, c)) == [FAIL, OK, FAIL]
    assert wire.ask(b"REMOVE|%b|" % b) == OK, "the refused INDEX left an edge behind"


def test_index_is_ok_once_all_dependencies_are_indexed(wire: Wire, names: Names) -> None:
    a, b, c = names("a"), names("b"), names("c")
    assert wire.ask_all([b"INDEX|%b|" % b, b"INDEX|%b|" % c]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, b, c)) == OK
    assert wire.ask(b"QUERY|%b|" % a) == OK


def test_remove_is_ok_for_a_package_that_is_not_indexed(wire: Wire, names: Names) -> None:
    assert wire.ask_all([b"REMOVE|%b|" % names("a")] * 2) == [OK, OK]
    assert wire.ask(b"QUERY|%b|" % names("a")) == FAIL


def test_remove_takes_a_package_out_until_it_is_indexed_again(wire: Wire, names: Names) -> None:
    a = names("a")
    for _ in range(3):
        assert wire.ask(b"INDEX|%b|" % a) == OK
        assert wire.ask(b"QUERY|%b|" % a) == OK
        assert wire.ask(b"REMOVE|%b|" % a) == OK
        assert wire.ask(b"QUERY|%b|" % a) == FAIL


def test_remove_fails_while_another_depends_on_it(wire: Wire, names: Names) -> None:
    base, first, second = names("base"), names("first"), names("second")
    assert wire.ask(b"INDEX|%b|" % base) == OK
    assert wire.ask(b"INDEX|%b|%b" % (first, base)) == OK
    assert wire.ask(b"INDEX|%b|%b" % (second, base)) == OK
    assert wire.ask(b"REMOVE|%b|" % base) == FAIL
    assert wire.ask(b"QUERY|%b|" % base) == OK, "a refused REMOVE removed it"
    assert wire.ask(b"REMOVE|%b|" % first) == OK
    assert wire.ask(b"REMOVE|%b|" % base) == FAIL, "one of two dependents was left"
    assert wire.ask(b"REMOVE|%b|" % second) == OK
    assert wire.ask(b"REMOVE|%b|" % base) == OK
    assert wire.ask(b"QUERY|%b|" % base) == FAIL


def test_a_removed_dependency_makes_index_fail_again(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.ask_all([b"INDEX|%b|" % b, b"REMOVE|%b|" % b]) == [OK, OK]
    assert wire.ask(b"INDEX|%b|%b" % (a, b)) == FAIL


def test_dependents_of_dependents_do_not_block_remove(wire: Wire, names: Names) -> None:
    base, middle, top = names("base"), names("middle"), names("top")
    assert wire.ask(b"INDEX|%b|" % base) == OK
    assert wire.ask(b"INDEX|%b|%b" % (middle, base)) == OK
    assert wire.ask(b"INDEX|%b|%b" % (top, middle)) == OK
    assert wire.ask(b"INDEX|%b|" % middle) == OK
    assert wire.ask(b"REMOVE|%b|" % base) == OK, "only a direct dependent blocks"
    assert wire.ask(b"REMOVE|%b|" % middle) == FAIL


def test_indexing_again_replaces_the_dependencies(wire: Wire, names: Names) -> None:
    a, old, kept, new = names("a"), names("old"), names("kept"), names("new")
    assert wire.ask_all(b"INDEX|%b|" % name for name in (old, kept, new)) == [OK] * 3
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, old, kept)) == OK
    assert wire.ask(b"INDEX|%b|%b,%b" % (a, kept, new)) == OK
    assert wire.ask(b"REMOVE|%b|" % old) == OK, "a dependency that was replaced still blocks"
    assert wire.ask(b"REMOVE|%b|" % kept) == FAIL
    assert wire.ask(b"REMOVE|%b|" % new) == FAIL
    assert wire.ask(b"INDEX|%b|" % a) == OK
    assert wire.ask_all(b"REMOVE|%b|" % name for name in (kept, new)) == [OK, OK]


def test_indexing_again_keeps_the_dependents(wire: Wire, names: Names) -> None:
    base, top = names("base"), names("top")
    assert wire.ask(b"INDEX|%b|" % base) == OK
    assert wire.ask(b"INDEX|%b|%b" % (top, base)) == OK
    assert wire.ask(b"INDEX|%b|" % base) == OK
    assert wire.ask(b"REMOVE|%b|" % base) == FAIL


def test_a_removed_package_forgets_its_dependencies(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.ask(b"INDEX|%b|" % b) == OK
    assert wire.ask(b"INDEX|%b|%b" % (a, b)) == OK
    assert wire.ask(b"REMOVE|%b|" % a) == OK
    assert wire.ask(b"INDEX|%b|" % a) == OK
    assert wire.ask(b"REMOVE|%b|" % b) == OK


def test_a_package_can_have_thousands_of_dependencies(wire: Wire, names: Names) -> None:
    needed = [names(f"needed-{number}") for number in range(2_000)]
    top = names("top")
    assert set(wire.ask_all(b"INDEX|%b|" % name for name in needed)) == {OK}
    assert wire.ask(b"INDEX|%b|%b" % (top, b",".join(needed))) == OK
    assert set(wire.ask_all(b"REMOVE|%b|" % name for name in needed)) == {FAIL}
    assert wire.ask(b"REMOVE|%b|" % top) == OK
    assert set(wire.ask_all(b"REMOVE|%b|" % name for name in needed)) == {OK}


def test_a_package_can_have_thousands_of_dependents(wire: Wire, names: Names) -> None:
    base = names("base")
    dependents = [names(f"dependent-{number}") for number in range(2_000)]
    assert wire.ask(b"INDEX|%b|" % base) == OK
    assert set(wire.ask_all(b"INDEX|%b|%b" % (name, base) for name in dependents)) == {OK}
    assert wire.ask(b"REMOVE|%b|" % base) == FAIL
    *most, last = random.Random(1).sample(dependents, len(dependents))
    assert set(wire.ask_all(b"INDEX|%b|" % name for name in most)) == {OK}
    assert wire.ask(b"REMOVE|%b|" % base) == FAIL
    assert wire.ask_all([b"INDEX|%b|" % last, b"REMOVE|%b|" % base]) == [OK, OK]


def test_what_one_connection_was_told_every_other_sees(connect: Connect, names: Names) -> None:
    first, second = connect(), connect()
    for number in range(100):
        name, top = names(f"base-{number}"), names(f"top-{number}")
        assert first.ask(b"INDEX|%b|" % name) == OK
        assert second.ask(b"QUERY|%b|" % name) == OK
        assert second.ask(b"INDEX|%b|%b" % (top, name)) == OK
        assert first.ask(b"REMOVE|%b|" % name) == FAIL
        assert first.ask(b"REMOVE|%b|" % top) == OK
        assert second.ask(b"QUERY|%b|" % top) == FAIL


@pytest.mark.parametrize("seed", range(10))
def test_random_messages_are_answered_as_by_the_model(
    connect: Connect, names: Names, seed: int
) -> None:
    """Every command over a handful of packages, on three connections in turn.

    A package depends only on those before it: of cycles the specification does not speak.
    """
    dice = random.Random(seed)
    model = Model()
    wires = [connect() for _ in range(3)]
    known = [names(f"p{number}") for number in range(6)]
    for step in range(300):
        place = dice.randrange(len(known))
        line = b"%b|%b|" % (dice.choice((b"INDEX", b"REMOVE", b"QUERY")), known[place])
        if line.startswith(b"INDEX"):
            line += b",".join(dice.sample(known[:place], min(place, dice.choice((0, 1, 2)))))
        assert dice.choice(wires).ask(line) == model.apply(line), f"step {step}: {line!r}"
