"""A real table of packages for the tests: Homebrew's, or one of its shape where that is absent."""

from __future__ import annotations

import random
from pathlib import Path

#: The table lies beside the checkout of whoever has it; a clone alone does not hold it.
TABLE = Path(__file__).parents[3] / "shared" / "data" / "brew-dependencies.txt"


def load_table() -> tuple[dict[str, list[str]], str | None]:
    """Return each package with its dependencies, every one itself in the table.

    The second is None for Homebrew's own table, else what stands in for it.
    """
    stand_in = None
    if TABLE.is_file():
        table = _read(TABLE)
    else:
        table, stand_in = _made_up(), f"a made-up table of packages: there is no {TABLE.name}"
    for missing in {needed for listed in table.values() for needed in listed} - table.keys():
        table[missing] = []
    return table, stand_in


def _read(path: Path) -> dict[str, list[str]]:
    """Read lines of `name: dependency dependency`; a name may itself hold colons."""
    table = {}
    for line in path.read_text().splitlines():
        name, _, listed = line.partition(" ")
        table[name.removesuffix(":")] = listed.split()
    return table


def _made_up() -> dict[str, list[str]]:
    """Make a table of Homebrew's size and shape, always the same one, without cycles.

    3,368 packages with some 17,000 dependencies, half of them with none; the most popular one has
    a thousand dependents; chains are up to 25 long.
    """
    dice = random.Random(3368)
    packages = [f"package-{number}@{number % 7}.{number % 10}" for number in range(3368)]
    table = {}
    for place, name in enumerate(packages):
        count = 0 if dice.random() < 0.5 else min(place, round(dice.expovariate(1 / 13)))
        # The square of an even throw favours the front of the table, as libraries are favoured.
        table[name] = sorted({packages[int(dice.random() ** 4 * place)] for _ in range(count)})
    return table
