"""Tables of packages: synthetic ones, the same for the same seed."""

import random
from functools import cache

Table = list[tuple[str, list[str]]]

DEPENDENCIES = 5  # of each package, at most
NEARBY = 1000  # a package depends on ones indexed not long before it, as real ones do


def name_of(number: int) -> str:
    """The name of a synthetic package; load.c's %r makes the same ones."""
    return f"package-{number:06d}"


@cache
def synthetic(size: int) -> Table:
    """`size` packages, dependencies first, each with up to five dependencies."""
    draw = random.Random(size)
    table: Table = []
    for i in range(size):
        count = draw.randint(0, DEPENDENCIES) if i else 0
        chosen = {draw.randrange(max(0, i - NEARBY), i) for _ in range(count)}
        table.append((name_of(i), [name_of(one) for one in sorted(chosen)]))
    return table


def without_effect(table: Table) -> list[tuple[str, str, list[str]]]:
    """(command, package, dependencies) without effect: INDEX as it stands, REMOVE of what is needed."""
    needed = {one for _, dependencies in table for one in dependencies}
    messages: list[tuple[str, str, list[str]]] = []
    for name, dependencies in table:
        messages.append(("INDEX", name, dependencies))
        if name in needed:
            messages.append(("REMOVE", name, []))
    return messages
