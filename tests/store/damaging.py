"""Small stores of every shape, to be damaged and read again, each as its next writer would read it.

A store is made once and claimed once, and then read again after each of thousands of damages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pkgindex.errors import PkgindexError
from pkgindex.store import format as store_format
from pkgindex.store.claim import Claim, claim
from pkgindex.store.format import Format
from pkgindex.store.mount import Mount
from pkgindex.store.recovery import recover
from tests.store.reading import without_room
from tests.store.writer import Writer, index_of, made

Index = dict[str, list[str]]


@dataclass
class Damaged:
    """A stopped store that a claimant reads again and again."""

    root: Path
    mount: Mount
    format: Format
    mine: Claim
    right: list[Index]  # without and with the last batch, which was written and never proven

    def read(self, *, rebuild: bool = False) -> Index | str:
        """The index that a new writer would serve, or the line that refuses it."""
        try:
            found = store_format.read(self.mount) or store_format.create(self.mount, insist=False)
            return index_of(recover(self.mount, found, self.mine, rebuild=rebuild).graph)
        except PkgindexError as error:
            return str(error)

    def judge(self, path: Path, found: Index | str) -> bool:
        """Whether it was refused. AssertionError for a wrong index and for a line without the file."""
        if isinstance(found, str):
            assert str(path) in found, f"the file is not named: {found}"
            assert "\n" not in found
            return True
        assert found in self.right
        return False


@contextmanager
def rewritten(path: Path, data: bytes) -> Iterator[None]:
    kept = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(kept)


def one_segment(writer: Writer) -> None:
    writer.ask("INDEX|zlib|", "INDEX|wget|zlib")
    writer.ask("INDEX|gettext|", "INDEX|wget|zlib,gettext")


def a_head_full_of_changes(writer: Writer) -> None:
    """What an earlier writer left in its journal stands in this one's head."""
    assert writer.epoch == 1
    writer.ask("INDEX|zlib|", "INDEX|wget|zlib", "INDEX|old|")
    writer.ask("REMOVE|old|")


def package_files_beneath(writer: Writer) -> None:
    """Half is in package files, and the journal changes that half."""
    writer.ask("INDEX|zlib|", "INDEX|wget|zlib", "INDEX|old|")
    writer.write_files()
    writer.ask("REMOVE|old|", "INDEX|wget|")


def two_segments(writer: Writer) -> None:
    writer.ask("INDEX|zlib|", "INDEX|wget|zlib")
    writer.journal.rotate()
    writer.ask("REMOVE|wget|")


SHAPES: dict[str, Callable[[Writer], None]] = {
    "one segment": one_segment,
    "a head full of changes": a_head_full_of_changes,
    "package files beneath": package_files_beneath,
    "two segments": two_segments,
}


def finish(root: Path, writer: Writer) -> Damaged:
    """Let the writer be deposed between the write of a batch and its proof."""
    right = [writer.index]
    writer.apply("INDEX|last|")
    right.append(writer.index)
    mount = Mount(str(root))
    mine = claim(mount, None)
    try:
        writer.commit()
    except FileNotFoundError:
        pass
    else:
        raise AssertionError("a deposed writer has committed")
    for path in (root / "journal").iterdir():
        os.truncate(path, len(without_room(path)))  # there is nothing to damage there
    return Damaged(root, mount, made(mount), mine, right)


def segments(damaged: Damaged) -> list[Path]:
    """Give the segments of the highest epoch; what is below is garbage (C5)."""
    found = sorted((damaged.root / "journal").iterdir())
    return [path for path in found if path.name[:8] == found[-1].name[:8]]
