"""Tables of packages: synthetic ones, the same for the same size, and the real ones of two distributions.

A table is what can be sent from its beginning to its end: rows (package, dependencies), each after all
that it depends on. It is made anew at each reading, so that ten million packages need no memory.
"""

import random
import subprocess
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import machine

DEPENDENCIES = 5  # of each synthetic package, at most
NEARBY = 1000  # a package depends on ones indexed not long before it, as real ones do
FETCH_SECONDS = 60
HOMEBREW = machine.HERE.parents[1] / "shared" / "data" / "brew-dependencies.txt"

Row = tuple[str, list[str]]


class Table(Iterable[Row], Sized, Protocol):
    """Rows, dependencies first, and how many packages they are."""

    def names(self) -> Iterable[str]:
        """Of the packages, each once."""


class Absent(Exception):
    """A real table is not to be had here; the message says why."""


def name_of(number: int) -> str:
    """The name of a synthetic package; load.c's %r makes the same ones."""
    return f"package-{number:06d}"


class Synthetic:
    """`size` packages, dependencies first, each with up to five of them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def names(self) -> Iterable[str]:
        return map(name_of, range(self.size))

    def __iter__(self) -> Iterator[Row]:
        draw = random.Random(
            self.size
        ).random  # times a width: randrange() takes five times as long
        for i in range(self.size):
            low = max(0, i - NEARBY)
            count = int(draw() * (DEPENDENCIES + 1)) if i else 0
            chosen = {low + int(draw() * (i - low)) for _ in range(count)}
            yield name_of(i), [name_of(one) for one in sorted(chosen)]


class Rows:
    """A table that lies in memory; a member of a cycle has several rows, of which the last is whole."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.packages = dict.fromkeys(name for name, _ in rows)

    def __len__(self) -> int:
        return len(self.packages)

    def names(self) -> Iterable[str]:
        return self.packages

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def synthetic(size: int) -> Synthetic:
    """The table that most workloads stand on."""
    return Synthetic(size)


def ordered(packages: dict[str, list[str]]) -> Rows:
    """Dependencies first, cycles in two steps, what nobody provides first of all and bare."""
    from pkgindex.load.order import groups

    absent: dict[str, None] = {}
    rows: list[Row] = []
    there: set[str] = set()
    for group in groups(packages, absent):
        for name in absent.keys() - there:
            rows.append((name, []))
            there.add(name)
        outside = [(name, [one for one in needed if one in there]) for name, needed in group]
        whole = [(name, list(needed)) for name, needed in group]
        rows += outside if outside != whole else []
        rows += whole
        there.update(name for name, _ in group)
    return Rows(rows)


@cache
def homebrew() -> Rows:
    """Homebrew's table, as it is given to whoever builds this. Raises Absent."""
    from pkgindex.load.formats import read

    if not HOMEBREW.exists():
        raise Absent("Homebrew's table is not beside the repository: ../shared/data")
    return ordered({k: list(v) for k, v in read([str(HOMEBREW)], "homebrew").items()})


@cache
def debian() -> Rows:
    """Debian's main archive as this machine's apt knows it, or can fetch it. Raises Absent."""
    from pkgindex.load.formats import read

    lists = _packages_files(["apt-get"]) or _fetched()
    return ordered({k: list(v) for k, v in read(map(str, lists), "debian").items()})


def _packages_files(apt: list[str]) -> list[Path]:
    words = [*apt, "indextargets", "--format", "$(FILENAME)", "Created-By: Packages"]
    try:
        printed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [path for line in printed.split() if (path := Path(line)).exists()]


def _fetched() -> list[Path]:
    """By apt, from wherever it is told to, into a folder of the bench, once."""
    lists = machine.BUILD / "apt"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-o", f"Dir::State::lists={lists}/", "-o", f"Dir::Cache={lists}/cache/"]
    if not _packages_files(apt):
        update = [*apt, "update"]
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(update, capture_output=True, timeout=FETCH_SECONDS, check=False)
    found = _packages_files(apt)
    if not found:
        raise Absent("Debian's table: apt has none here and cannot fetch it")
    return found


def named(table: str, size: int) -> Table:
    """debian, homebrew, or the synthetic one of this size. Raises Absent."""
    return {"debian": debian, "homebrew": homebrew}.get(table, lambda: synthetic(size))()


def popular(table: Table, count: int) -> list[str]:
    """Names drawn by Zipf's law: the one of rank k k times as rarely as the first; ranks in random order."""
    draw = random.Random(count)
    names = list(table.names())
    draw.shuffle(names)
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(names))))
    return draw.choices(names, cum_weights=weights, k=count)


def without_effect(table: Table) -> Iterator[tuple[str, str, list[str]]]:
    """(command, package, dependencies) without effect: INDEX as it stands, REMOVE of what is needed."""
    needed = {one for _, dependencies in table for one in dependencies}
    for name, dependencies in table:
        yield "INDEX", name, dependencies
        if name in needed:
            yield "REMOVE", name, []
