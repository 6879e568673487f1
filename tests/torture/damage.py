"""Damage: every byte of every file of small stores flipped, swapped, cut off, and every file removed.

Each damage ends in the right index, or in a refusal that names a file; never in another index. And
`pkgindex check` finds it, or it is one that does no harm: bytes behind what was acknowledged, a file of
an epoch that nobody reads any more, a package file that the journal will write anew.

Who reads the package files all the same (`serve --rebuild`) has only their own word: a file that is gone
as a whole, of a package on which nothing depends, is not missed then. But `check`, which knows the
snapshot, has named it.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pkgindex.errors import PkgindexError
from pkgindex.store import check as checking
from pkgindex.store import recovery
from pkgindex.store._disk import file_name
from pkgindex.store.offline import Offline
from tests.store.damaging import SHAPES, Damaged, finish, rewritten, segments
from tests.store.writer import Writer
from tests.torture.campaign import Campaign, Run

__all__ = ["CAMPAIGNS"]

BITS = (range(8), 1)  # of each byte: all, or so many by chance
FLIPPED = (1, 6)  # each byte, or each so many
MUTANT_STEP = 2  # each so many bytes, until a wrong reader is found out


@dataclass(frozen=True)
class Damage:
    """What is done to one file."""

    path: Path
    what: str
    data: bytes | None  # in its place; None: it is gone


def files_beneath(writer: Writer) -> None:
    """All of it is in package files, which the journal no longer covers."""
    writer.ask("INDEX|zlib|", "INDEX|gettext|", "INDEX|wget|zlib,gettext", "INDEX|lone|")
    writer.ask("INDEX|openssl@1.1|zlib", "INDEX|" + "n" * 255 + "|wget", "INDEX|curl|" + "n" * 255)
    writer.write_files()


STORES = {**SHAPES, "files alone": files_beneath}


def store_of(name: str, root: Path) -> Damaged:
    """Make a store of one of the shapes."""
    root.parent.mkdir(exist_ok=True)
    with Writer(root) as writer:
        STORES[name](writer)
        if name == "a head full of changes":
            with Writer(root) as second:
                second.ask("INDEX|gettext|zlib")
                return finish(root, second)
        return finish(root, writer)


def files_of(store: Damaged) -> list[Path]:
    """Give the files whose damage is to be found: FORMAT, the journal that counts, package files."""
    packages = [path for kind in ("forward", "reverse") for path in (store.root / kind).glob("*/*")]
    snapshots = (store.root / "snapshot").iterdir()
    return [store.root / "FORMAT", *segments(store), *snapshots, *sorted(packages)]


def damages(store: Damaged, draw: random.Random, full: bool) -> Iterator[Damage]:
    """Give all damages, or in the reduced form some of each kind by chance."""
    step = FLIPPED[not full]
    files = files_of(store)
    for path in files:
        data = path.read_bytes()
        for at in range(draw.randrange(step), len(data), step):
            for bit in BITS[0] if full else draw.sample(range(8), BITS[1]):
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                yield Damage(path, f"bit {bit} of byte {at} flipped", bytes(flipped))
        for at in range(draw.randrange(step), len(data) - 1, step):
            if data[at] != data[at + 1]:
                swapped = data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
                yield Damage(path, f"bytes {at} and {at + 1} swapped", swapped)
        for size in range(draw.randrange(step), len(data), step):
            yield Damage(path, f"cut to {size} bytes", data[:size])
            zeros = data[:size] + bytes(len(data) - size)
            yield Damage(path, f"zeros from byte {size}", zeros)
        yield Damage(path, "removed", None)
        yield Damage(path, "doubled", data * 2)
    pairs = list(combinations(files, 2))
    for one, other in pairs if full else draw.sample(pairs, min(len(pairs), 10)):
        data = other.read_bytes()
        if one.read_bytes() != data:
            yield Damage(one, f"the contents of {other.name}", data)


@contextmanager
def done(damage: Damage) -> Iterator[None]:
    """Do it, and undo it."""
    if damage.data is not None:
        with rewritten(damage.path, damage.data):
            yield
        return
    kept = damage.path.read_bytes()
    damage.path.unlink()
    try:
        yield
    finally:
        damage.path.write_bytes(kept)


class Judge:
    """Says of each damage to one store whether it was borne."""

    def __init__(self, store: Damaged, counts: Counter[str]) -> None:
        self.store = store
        self.segments = segments(store)  # as they are beforehand
        self.counts = counts
        self.listed = set(self.check())  # beforehand: what a deposed writer's end leaves
        assert not self.listed, self.listed

    def check(self) -> list[str]:
        """What `pkgindex check` says, or the line with which it refuses."""
        try:
            with Offline(str(self.store.root)) as offline:
                report = checking.check(offline)
        except PkgindexError as error:
            return [str(error)]
        return [str(problem) for problem in report.problems + report.derived]

    def judge(self, damage: Damage) -> str | None:
        """What is wrong about how it ended; None if nothing is."""
        with done(damage):
            found = self.store.read()
            rebuilt = self.store.read(rebuild=True)
            said = self.check()
        self.counts["damages"] += 1
        where = damage.path.relative_to(self.store.root)
        if isinstance(rebuilt, str):
            self.counts["refused by a rebuilding server"] += 1
            if "\n" in rebuilt or not names(rebuilt, damage.path):
                return f"the rebuilding server does not name the file: {rebuilt}"
        elif rebuilt not in self.store.right and not (
            damage.data is None and any(names(line, damage.path) for line in said)
        ):
            return f"rebuilt to a wrong index: {rebuilt}; check says {said}"
        if isinstance(found, str):
            self.counts["refused by the next server"] += 1
            if "\n" in found or not names(found, damage.path):
                return f"the refusal does not name the file: {found}"
            return None if said else "check finds nothing wrong, the server refuses: " + found
        if found not in self.store.right:
            return f"a wrong index: {found}, not {self.store.right[-1]}; check says {said}"
        if said:
            self.counts["found by check, derived or mended by the next server"] += 1
            return None if any(names(line, damage.path) for line in said) else f"named: {said}"
        self.counts["without any harm"] += 1
        if where.parts[0] in ("forward", "reverse") and not self.covered(damage.path):
            return "neither the server nor check notices"
        return None

    def covered(self, path: Path) -> bool:
        """Whether the journal has its package: then it will be written anew."""
        return any(path.name.encode() in segment.read_bytes() for segment in segments(self.store))


def names(line: str, path: Path) -> bool:
    """Whether a line names the file, or the package whose file is missing."""
    if path.name == "FORMAT":
        return "FORMAT" in line
    missing = re.search(r"depends on (\S+), whose file is missing", line)
    return f"{path.parent.name}/{path.name}" in line or (
        missing is not None and file_name(missing[1]) == path.name
    )


def damage(run: Run) -> None:
    """The campaign."""
    find_wrong(run)
    stores = list(STORES)
    for number, name in enumerate(stores):
        store = store_of(name, run.folder / f"store-{number}" / "index")
        judge = Judge(store, run.counts)
        for planned in damages(store, run.random, run.full):
            if run.is_late():
                run.skipped.append(f"some damages of {name}: the time was up")
                break
            try:
                wrong = judge.judge(planned)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is no clear refusal
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                run.fail(f"{name}: {planned.path.name}: {planned.what}: {wrong[:600]}")
            if len(run.failures) > 30:
                return
        run.counts["stores"] += 1
        run.counts["files"] += len(files_of(store))
        run.progress(number + 1, len(stores))


def find_wrong(run: Run) -> None:
    """A reader that believes every checksum is found out, and a check that looks at forward files only."""
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        store = store_of("files alone", Path(folder) / "index")

        def never_reads(*arguments: Any) -> tuple[Any, set[str]]:
            return recovery_graph(store), set()

        with patch.object(checking, "_reverse_files", never_reads):
            caught(run, store, "a check that does not read the reverse files")
        believing = recovery.read_shards

        def unread(*arguments: Any) -> Iterator[Any]:
            for lines, _ in believing(*arguments):
                yield lines, []

        with patch.object(recovery, "read_shards", unread):
            caught(run, store, "a server that leaves out the files that are damaged")


def recovery_graph(store: Damaged) -> Any:
    """What a check that reads no reverse file believes them to say: what they should."""
    from pkgindex._core import Graph

    graph = Graph()
    index = store.right[-1]
    dependents = {name: [p for p, needs in index.items() if name in needs] for name in index}
    lines = "".join(f"+{name}|{','.join(sorted(p))}|\n" for name, p in dependents.items() if p)
    graph.replay(lines.encode(), track=False)
    return graph


def caught(run: Run, store: Damaged, name: str) -> None:
    """Damage a store until a mutant is found out."""
    judge = Judge(store, Counter())
    for number, planned in enumerate(damages(store, random.Random(run.seed), False)):
        of_package = planned.path.parts[-3] in ("forward", "reverse")
        if number % MUTANT_STEP == 0 and of_package and judge.judge(planned):
            run.counts["mutants caught"] += 1
            return
    run.fail(f"{name} was not found out")


CAMPAIGNS = (
    Campaign(
        "damage",
        "Every byte of FORMAT, journal, snapshot and package files flipped, swapped, cut off, every file "
        "removed: the right index or a refusal that names the file, and `check` finds it.",
        damage,
        seconds=(100.0, 600.0),
    ),
)
