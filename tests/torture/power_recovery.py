"""Lays a crash state out on a disk and lets the product recover from it.

    place = Place(Path("/dev/shm/x"))
    place.lay_out(layout)
    outcome = recover(place.root, to_the_end=True)

Runs in worker processes; `recover_each` is what they are given. What is judged here needs no knowledge
of what was promised: that recovery succeeds, that it gives the same a second time, and, where it is
asked to go on to the end, that a change can be made, a round written, and that `check` then finds
nothing. What was recovered is for the caller to judge.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pkgindex._core import Graph
from pkgindex.errors import PkgindexError
from pkgindex.store.check import check
from pkgindex.store.claim import Withdrawn
from pkgindex.store.offline import Offline
from tests.store.writer import Writer
from tests.torture.crash_states import Layout

__all__ = ["STORE", "Outcome", "Place", "canonical", "recover", "recover_each"]

#: The store's folder below the top of each layout.
STORE = "index"

#: What is changed after a recovery that goes on to the end.
AFTERWARDS = "after-the-crash"


@dataclass(frozen=True)
class Outcome:
    """What became of a crash state."""

    index: str  # in canonical form; "" when there is none
    error: str = ""


class Place:
    """A folder that becomes one layout after another; what is alike in two of them stays."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / STORE
        self._there: Layout = {}  # what is known to lie below forward/ and reverse/
        shutil.rmtree(top, ignore_errors=True)
        top.mkdir(parents=True)

    def lay_out(self, layout: Layout) -> None:
        """Make the folder this layout."""
        wanted: Layout = {}
        for path, data in layout.items():
            if _is_package_file(path):
                wanted[path] = data
        for path in sorted(self._there.keys() - wanted.keys(), reverse=True):
            where = self.top / path
            if self._there[path] is None:
                shutil.rmtree(where, ignore_errors=True)
            else:
                where.unlink(missing_ok=True)
        self._remove_the_rest()
        for path, data in sorted(layout.items()):
            there = self._there.get(path, "") if path in wanted else ""
            if there == data:
                continue
            where = self.top / path
            if data is None:
                where.mkdir(parents=True, exist_ok=True)
            else:
                where.write_bytes(data)
        self._there = wanted

    def _remove_the_rest(self) -> None:
        kept = {path.split("/")[1] for path in self._there if "/" in path}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.name in kept and path.is_dir():
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if self.root.is_dir() and not kept:
            self.root.rmdir()

    def forget(self) -> None:
        """Nothing is known any more of what lies there: a round was written."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._there = {}


def _is_package_file(path: str) -> bool:
    return path.startswith((f"{STORE}/forward", f"{STORE}/reverse"))


def canonical(index: dict[str, Iterable[str]]) -> str:
    """An index as one text: equal texts, equal indices."""
    return "\n".join(f"{package}|{','.join(sorted(index[package]))}" for package in sorted(index))


def recover(root: Path, *, to_the_end: bool) -> Outcome:
    """Recover as the next writer does, with what may be asked of any recovered store.

    Going on to the end, also a second time, from the package files alone."""
    try:
        with Writer(root) as writer:
            found = _index(writer.graph)
        if to_the_end:
            with Writer(root, rebuild=True) as writer:
                if _index(writer.graph) != found:
                    return Outcome(found, "the package files give another index than the snapshot")
                if writer.ask(f"INDEX|{AFTERWARDS}|") != ["OK"]:
                    return Outcome(found, "the next change is not accepted")
                writer.write_files()
            with Offline(str(root)) as store:
                report = check(store)
                if not report.is_sound:
                    problems = [str(problem) for problem in (*report.problems, *report.derived)]
                    return Outcome(found, f"check after the next stop: {problems}")
                graph = store.read().graph
                index = {p: graph.dependencies(p) for p in graph if p != AFTERWARDS}
                if canonical(index) != found or AFTERWARDS not in graph:
                    return Outcome(found, "after the next stop the index is another")
    except (PkgindexError, Withdrawn, OSError, AssertionError, ValueError) as error:
        return Outcome("", f"{type(error).__name__}: {error}")
    return Outcome(found)


def _index(graph: Graph) -> str:
    graph.verify()
    if dangling := graph.dangling(1):
        raise AssertionError(f"half a change: {dangling}")
    return canonical({package: graph.dependencies(package) for package in graph})


_places: dict[Path, Place] = {}


def recover_each(folder: Path, states: list[tuple[int, Layout, bool]]) -> list[tuple[int, Outcome]]:
    """Recover from several states, each with a key and whether to go on to the end."""
    top = folder / str(os.getpid())
    place = _places.get(top) or _places.setdefault(top, Place(top))
    found = []
    for key, layout, to_the_end in states:
        place.lay_out(layout)
        found.append((key, recover(place.root, to_the_end=to_the_end)))
        if to_the_end:
            place.forget()
    return found
