"""The order of packages, compared with what it must be by its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pkgindex.load.order import groups

NAMES = st.sampled_from("abcdefghij")


def reachable(packages: dict[str, list[str]], start: str) -> set[str]:
    """What `start` depends on, directly or not."""
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in packages.get(todo.pop(), []):
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


@given(st.dictionaries(NAMES, st.lists(NAMES, max_size=4)))
def test_every_package_comes_once_after_all_it_depends_on_and_with_its_cycle(packages):
    absent: dict[str, None] = {}
    order = list(groups(packages, absent))
    assert dict(member for group in order for member in group) == packages
    assert sum(map(len, order)) == len(packages)
    assert (
        absent.keys() == {name for needs in packages.values() for name in needs} - packages.keys()
    )
    below = {name: reachable(packages, name) for name in packages}
    came: set[str] = set()
    for group in order:
        names = {name for name, _ in group}
        for name in names:
            cycle = {other for other in below[name] & packages.keys() if name in below[other]}
            assert names == cycle | {name}
            assert below[name] <= came | names | absent.keys()
        came |= names


def test_an_ordered_input_keeps_its_order():
    packages = {str(n): [str(n // 2), str(n // 3)] if n else [] for n in range(1000)}
    assert [name for [(name, _)] in groups(packages, {})] == list(packages)


def test_absent_names_are_known_before_the_package_that_needs_them():
    absent: dict[str, None] = {}
    for [(name, needs)] in groups({"a": ["x", "b"], "b": ["y", "x"]}, absent):
        assert set(needs) - {"a", "b"} <= absent.keys(), name


def test_a_chain_and_a_cycle_may_be_as_long_as_the_input():
    count = 100_000
    chain = {str(n): [str(n + 1)] for n in range(count)} | {str(count): []}
    assert [name for [(name, _)] in groups(chain, {})] == list(reversed(chain))
    [cycle] = groups(chain | {str(count): ["0"]}, {})
    assert len(cycle) == count + 1


def test_a_cycles_members_mostly_follow_those_they_need():
    [cycle] = groups({"a": ["b"], "b": ["c"], "c": ["a"]}, {})
    assert [name for name, _ in cycle] == ["c", "b", "a"]
