"""A stopped store, opened for reading: nothing in it is changed.

    with Offline(path) as store:
        contents = store.read()

While it is open it holds the last writer's byte of LOCK, so that no server starts meanwhile. A store that
may not be written (a snapshot, a read-only mount) is read too: then the byte is shared with other readers.
Where a read-only store gives no lock at all, a server may be writing it from elsewhere: see is_guarded.
"""

import os
from dataclasses import dataclass, field
from typing import Self

from pkgindex._core import Graph
from pkgindex.errors import StoreOwned, StoreUnreachable
from pkgindex.store import format as store_format
from pkgindex.store import snapshot
from pkgindex.store._disk import file_name
from pkgindex.store.claim import PROOF, Position, epochs, owner_of
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount, epoch_name
from pkgindex.store.recovery import Gap, Problem, Progress, highest_chain, load_files, load_journal

__all__ = ["Contents", "Offline"]

READERS = 4


@dataclass
class Contents:
    """What a store holds: the index, as far as it can be read, and what is wrong."""

    graph: Graph
    problems: list[Problem] = field(default_factory=list)


class Offline:
    """A store that no server runs on. Raises StoreOwned if one does, StoreUnreachable, UnknownFormat."""

    def __init__(self, path: str) -> None:
        self.mount = Mount(path)
        self.mount.check_folders(*store_format.FOLDERS)
        fmt = store_format.read(self.mount)
        if fmt is None:
            raise StoreUnreachable(f"{self.mount.root}: no pkgindex store (it has no FORMAT)")
        self.format = fmt
        self._lease = Lease(self.mount, for_reading=True)
        self.is_guarded = True  # no server can change it meanwhile
        for epoch in epochs(self.mount):
            try:
                held = self._lease.hold(epoch)
            except StoreUnreachable:
                if not self._lease.is_shared:
                    raise
                self.is_guarded = False
                break
            if not held:
                self._lease.close()
                owner = owner_of(self.mount, epoch)
                raise StoreOwned(
                    f"{self.mount.root}: it is in use by {owner}; stop that server first"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let servers start again."""
        self._lease.close()

    def read(self, progress: Progress | None = None) -> Contents:
        """Read the forward files and the journal over them. Raises OSError."""
        contents = Contents(Graph(journalled=True))
        graph, problems = contents.graph, contents.problems
        found = load_files(self.mount, self.format, graph, READERS, progress)
        try:
            chain = highest_chain(self.mount)
            load_journal(
                self.mount, graph, self._proven(), chain, empty=not len(graph) and not found
            )
        except Gap as gap:
            path, _, what = str(gap).partition(": ")
            problems.append(Problem(os.path.relpath(path, self.mount.root), what))
        covered = {file_name(package) for package in graph.dirty_packages()} if found else set()
        problems += [p for p in found if os.path.basename(p.path) not in covered]
        return contents

    def read_snapshot(self) -> tuple[Graph | None, Problem | None]:
        """The index as a start would read it from the snapshot, if there is one; else what is wrong with it.

        Raises OSError, Gap."""
        chain = highest_chain(self.mount)
        if not chain or chain[-1].snapshot is None:
            return None, None
        graph = Graph(journalled=True)
        wrong = snapshot.load(self.mount, graph, chain[-1].snapshot)
        if wrong:
            path, _, what = wrong.partition(": ")
            return None, Problem(os.path.relpath(path, self.mount.root), what)
        load_journal(self.mount, graph, self._proven(), chain, empty=False)
        return graph, None

    def _proven(self) -> dict[int, Position]:
        """How far each journal was acknowledged, as the names of the proofs say."""
        proven: dict[int, Position] = {}
        for epoch in epochs(self.mount):
            for name in self.mount.names("staging", epoch_name(epoch)):
                match = PROOF.fullmatch(name)
                if match:
                    of = int(match[1], 16) if match[1] else epoch
                    proven[of] = max(proven.get(of, (0, 0)), (int(match[2], 16), int(match[3], 16)))
        return proven
