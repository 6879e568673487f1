"""Snapshot: the whole index in one file, so that a start need not read one file for each package.

    snapshot/<change>           +wget|gettext,zlib|
                                +zlib||
                                …

Purpose: a cache, and nothing but that. Every change is in the journal and in the package files all the
same; a snapshot that is missing, damaged or not wanted (`serve --rebuild`) costs a start its time.

Guarantee: the redo lines in it, and over them the journal's changes after `change`, give the index. It
is copied while changes go on, so it may hold some of the later ones already: redo lines are absolute
(rule W4). It is published once all that was copied is durable (rule W5), and believed only while the
head of the newest segment names it, with its size and checksum; such a head keeps every later change
in the journal (journal.py).

Calling sequence: write() from the thread that writes package files; then the journal's head names it;
then forget_others(). load() at recovery.

Errors: OSError while it is written, as any failed write of this writer (rule W7).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from pkgindex._core import Graph, crc32c
from pkgindex.store.mount import Mount, Staging, write_all

__all__ = ["PIECE_BYTES", "PIECE_PACKAGES", "Snapshot", "forget_others", "load", "write"]

FOLDER = "snapshot"
NAME = re.compile("[0-9a-f]{16}")
TEMPORARY = "snapshot"

# Copied out of the graph under the GIL in one go: a quarter of a millisecond, so no client notices.
PIECE_BYTES, PIECE_PACKAGES = 32 * 1024, 128

# What is gathered before it is written, and what is read at once.
WRITE_BYTES = 1 << 20
READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Snapshot:
    """What a head says of a snapshot."""

    change: int  # all changes up to this one are in it
    size: int
    checksum: int  # CRC-32C of all its bytes

    @property
    def name(self) -> str:
        """Its file's name below snapshot/."""
        return f"{self.change:016x}"


def write(
    mount: Mount,
    staging: Staging,
    graph: Graph,
    durable: Callable[[int], bool],
    late: Callable[[], bool],
) -> Snapshot | None:
    """Copy the index into a snapshot, published and synced; None if the time to stop came first.

    `durable(ticket)` waits for a commit, and gives False if it need not be waited for any longer."""
    change = graph.changes
    size = checksum = last = 0
    fd = staging.create(TEMPORARY, b"")
    try:
        gathered = bytearray()
        while True:
            lines, _, last = graph.walk(last, PIECE_BYTES, PIECE_PACKAGES)
            gathered += lines
            if gathered and (not last or len(gathered) >= WRITE_BYTES):
                checksum = crc32c(gathered, checksum)
                size += len(gathered)
                write_all(fd, gathered)
                gathered.clear()
            if not last:
                break
            if late():
                staging.discard(TEMPORARY)
                return None
        if not durable(graph.newest):
            staging.discard(TEMPORARY)
            return None
        os.fsync(fd)
        snapshot = Snapshot(change, size, checksum)
        inode = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    staging.publish(TEMPORARY, FOLDER, snapshot.name)
    mount.sync_name(FOLDER, snapshot.name, inode)
    return snapshot


def forget_others(mount: Mount, staging: Staging, kept: Snapshot | None) -> None:
    """Take away the snapshots that no head names any more."""
    for name in mount.names(FOLDER):
        if NAME.fullmatch(name) and (kept is None or name != kept.name):
            staging.take("snapshot-gone", FOLDER, name)
            staging.discard("snapshot-gone")


def load(mount: Mount, graph: Graph, snapshot: Snapshot) -> str:
    """Load a snapshot into an empty graph: "", or what is wrong with it, and then the graph is of no use."""
    path = mount.path(FOLDER, snapshot.name)
    try:
        with mount.opened(FOLDER, snapshot.name) as fd:
            checksum, left, rest = 0, snapshot.size, b""
            while left:
                read = os.read(fd, min(left, READ_BYTES))
                if not read:
                    return f"{path}: {snapshot.size - left} bytes, not {snapshot.size}"
                checksum = crc32c(read, checksum)
                left -= len(read)
                data = rest + read
                end = data.rfind(b"\n") + 1
                graph.replay(memoryview(data)[:end], track=False)
                rest = data[end:]
    except (OSError, ValueError) as error:
        return f"{path}: {error.strerror if isinstance(error, OSError) else error}"
    return "" if checksum == snapshot.checksum and not rest else f"{path}: its checksum is wrong"
