"""The mount as a model: what STORE's rules need of it, and what it does to who breaks them.

Each method is one operation, atomic on the server. Operations on names are undone by a power loss from
some point on, unless an fsync came after them (as one ext4 or XFS does it: any fsync commits all that was
before); batches that were not synced are cut off at any length. A state of the index is the list of its
changes, so that a change's number is its place in it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from pkgindex.cluster.takeover import Sight

__all__ = ["Directory", "Journal", "Mount"]


class Directory:
    """A staging directory: an inode, that a process may hold open after its name is gone."""

    __slots__ = ("epoch", "owner", "proofs")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.owner = ""
        self.proofs: dict[int, int] = {}  # by epoch: how far its journal was proven


class Journal:
    """All segments of an epoch: the changes after `base`, which the package files hold; those up to
    `head` are in the newest head, which is read whole or not at all (C5)."""

    __slots__ = ("base", "changes", "durable", "head")

    def __init__(self, base: int, changes: list[str]) -> None:
        self.base = base
        self.head = base + len(changes)
        self.changes = changes
        self.durable = len(changes)

    @property
    def end(self) -> int:
        """The number of the last change in it."""
        return self.base + len(self.changes)


class Mount:
    """The server's side of the mount."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.staging: dict[int, Directory] = {}
        self.journals: dict[int, Journal] = {}
        self.files: list[str] = []  # what the package files hold
        self.locks: dict[int, str] = {}
        self.sights: dict[str, Sight] = {}
        self.caches_lie = True  # a client may see an older size, until a power loss (X5)
        self._undo: list[Callable[[], object]] = []

    def lives(self, directory: Directory | None) -> bool:
        """Whether a rename out of this directory succeeds."""
        return directory is not None and self.staging.get(directory.epoch) is directory

    def highest(self) -> int:
        """C1: the highest number that was ever given out, as far as names tell."""
        return max((*self.staging, *self.journals), default=0)

    def make(self, epoch: int) -> bool:
        """mkdir, exclusive."""
        if epoch in self.staging:
            return False
        self.staging[epoch] = Directory(epoch)
        self._undo.append(lambda: self.staging.pop(epoch, None))
        return True

    def own(self, directory: Directory, owner: str) -> bool:
        """The owner file, made exclusively in a directory that is open."""
        if directory.owner:
            return False
        directory.owner = owner
        self._undo.append(lambda: setattr(directory, "owner", ""))
        return True

    def take(self, directory: Directory, old: Directory) -> dict[int, int]:
        """Rename the proofs of an older directory into one's own: C2."""
        taken, before, after = old.proofs, dict(old.proofs), dict(directory.proofs)
        for epoch, change in taken.items():
            directory.proofs[epoch] = max(change, directory.proofs.get(epoch, 0))
        old.proofs = {}

        def undo() -> None:
            old.proofs, directory.proofs = before, after

        self._undo.append(undo)
        return before

    def remove(self, old: Directory) -> bool:
        """Rmdir: fails while anything is in it."""
        if old.proofs:
            return False
        if self.staging.get(old.epoch) is old:
            del self.staging[old.epoch]
            self._undo.append(lambda: self.staging.setdefault(old.epoch, old))
        return True

    def publish(self, epoch: int, journal: Journal) -> None:
        """Rename one's head out of staging."""
        self.journals[epoch] = journal
        self._undo.append(lambda: self.journals.pop(epoch, None))

    def remove_journals_below(self, epoch: int) -> None:
        """C6: older journals go once one's own head is durable and proven."""
        for old in [e for e in self.journals if e < epoch]:
            journal = self.journals.pop(old)
            self._undo.append(
                lambda old=old, journal=journal: self.journals.setdefault(old, journal)
            )

    def round(self, journal: Journal, change: int) -> None:
        """W5: package files as of `change`, synced; then the segments that this covers go, synced."""
        self.files = self.files[: journal.base] + journal.changes[: change - journal.base]
        del journal.changes[: change - journal.base]
        journal.durable -= change - journal.base
        journal.base = journal.head = change
        self.sync()

    def sync(self) -> None:
        """Fsync of a file or folder: every operation on names until now is on the disk."""
        self._undo.clear()

    def seen_end(self, journal: Journal, proven: int) -> int:
        """How far a client reads a journal: its cache may be old, but not below what was proven (C3)."""
        least = max(proven, journal.head)
        if not self.caches_lie or least >= journal.end:
            return journal.end
        return self.rng.randint(least, journal.end)

    def lose_power(self) -> None:
        """The server's disk forgets what was not synced, and its locks are gone without a word (L1)."""
        keep = self.rng.randint(0, len(self._undo))
        for undo in reversed(self._undo[keep:]):
            undo()
        self._undo.clear()
        for journal in self.journals.values():
            del journal.changes[self.rng.randint(journal.durable, len(journal.changes)) :]
            journal.durable = len(journal.changes)
        self.locks.clear()
        self.caches_lie = False
