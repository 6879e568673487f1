"""The journal: a chain of segments, each a head and then batches of redo lines.

    pkgindex journal 1
    {"bytes": 21, "covered": 0, "epoch": 3, "forgotten": 0, "next": 1235, "origins": [],
     "previous": [8192, 2597310127], "segment": 1, "snapshot": null, "written": 1234}   (on one line)
    *zlib
    +wget|gettext|zlib
    head 9ae0daaf
    batch 00000031 00000002 00000000000004d3 5b2e11c0
    …

Purpose: a change is durable once its batch is here, long before its package files are. The batches and
the commit itself are _commit.pxi's; this module makes segments and takes them away.

Guarantees (rule W6): a head carries its epoch and number, the number of the next change, the size and
checksum of the segment before it, and the table of origins, which is empty where one server has always
written alone. It is born in staging, synced, published by a rename, its name synced, and proven, before
a batch rests on it. A segment goes only when a durable head behind it says that it is not needed: that all of
its changes are in package files ("written"), and in the snapshot if there is one. So a segment that is
missing and that the newest head needs is damage. They go in ascending order, each removal synced and
seen gone before the next.

Calling sequence: open(), then submit() and completed() from the event loop, rotate() and drop_covered()
from the thread that writes package files, stop(). One thread of this object's own commits and rotates.

Errors: the first OSError is final (rule W7). completed() raises it, on the loop; rotate() too.
"""

import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass

from pkgindex._core import crc32c
from pkgindex.store._disk import Committer, is_local, read_batches
from pkgindex.store.claim import SEGMENT, Claim
from pkgindex.store.mount import Mount, epoch_name
from pkgindex.store.origins import Origins, Recorded
from pkgindex.store.snapshot import Snapshot

__all__ = ["Head", "Journal", "Torn", "parse_head", "segment_name", "segments"]

VERSION = 1
FIRST_LINE = b"pkgindex journal %d\n" % VERSION

# What a head of before "written" was told says of it.
UNKNOWN = -1

# A segment is read into memory whole at recovery; a round's rotation usually ends it much earlier.
SEGMENT_LIMIT = 64 << 20


class Torn(ValueError):
    """These bytes are not a whole head."""


@dataclass(frozen=True)
class Head:
    """What a segment begins with."""

    epoch: int
    segment: int
    next_change: int
    previous: tuple[int, int] | None  # size and CRC-32C of the segment before; None in the first
    lines: bytes = b""  # redo lines: the net effect of what was replayed, or files still owed
    origins: tuple[Recorded, ...] = ()
    # Every change up to this one is in package files, but for reverse files that are owed: by `lines`, or
    # by those of an earlier head with the same `written`, whose round may have been cut short.
    written: int = 0
    snapshot: Snapshot | None = None  # the newest; every later change is in the journal
    covered: int = 0  # bytes of `lines`, in front, that only the snapshot lacks and no package file
    forgotten: int = 0  # see Origins

    @property
    def base(self) -> int:
        """The last change that need not be in the journal any more."""
        return self.written if self.snapshot is None else min(self.written, self.snapshot.change)

    def encode(self) -> bytes:
        """The bytes that a segment begins with."""
        fields = {
            "bytes": len(self.lines),
            "covered": self.covered,
            "epoch": self.epoch,
            "forgotten": self.forgotten,
            "next": self.next_change,
            "origins": list(self.origins),
            "previous": self.previous,
            "segment": self.segment,
            "snapshot": self.snapshot and astuple(self.snapshot),
            "written": self.written,
        }
        body = FIRST_LINE + json.dumps(fields, sort_keys=True).encode() + b"\n" + self.lines
        return body + b"head %08x\n" % crc32c(body)


def parse_head(data: bytes) -> tuple[Head, int]:
    """The head of a segment, and the offset behind it. Raises Torn."""
    match = re.match(re.escape(FIRST_LINE) + rb"(\{[^\n]*\})\n", data)
    if match is None:
        raise Torn("no head")
    try:
        fields = json.loads(match[1])
        size = fields["bytes"]
        end = match.end() + size + len(b"head 00000000\n")
        body = data[: match.end() + size]
        if size < 0 or data[match.end() + size : end] != b"head %08x\n" % crc32c(body):
            raise ValueError("its checksum is wrong")
        previous = fields["previous"]
        head = Head(
            fields["epoch"],
            fields["segment"],
            fields["next"],
            None if previous is None else (previous[0], previous[1]),
            body[match.end() :],
            tuple(Recorded.checked(*each) for each in fields["origins"]),
            fields.get("written", UNKNOWN),
            Snapshot(*fields["snapshot"]) if fields.get("snapshot") else None,
            fields.get("covered", 0),
            fields.get("forgotten", 0),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Torn(f"its head is not whole: {error}") from error
    return head, end


def segment_name(epoch: int, segment: int) -> str:
    """A segment's file name, which sorts by epoch and number."""
    return f"{epoch_name(epoch)}-{segment:08x}"


def segments(mount: Mount) -> list[tuple[int, int]]:
    """The (epoch, number) of every segment that journal/ lists, ascending."""
    found = (SEGMENT.fullmatch(name) for name in mount.names("journal"))
    return sorted((int(m[1], 16), int(m[2], 16)) for m in found if m)


class Journal:
    """This writer's journal, open for commits."""

    def __init__(
        self,
        mount: Mount,
        claim: Claim,
        owed: Callable[[], bytes],
        event: int = -1,
        segment_limit: int = SEGMENT_LIMIT,
    ) -> None:
        """`owed` gives the redo lines that every later head is to carry; `event` is an eventfd that is
        rung when a commit is done, needed for submit()."""
        self._mount = mount
        self._claim = claim
        self._staging = claim.staging
        self._owed = owed
        self._local = is_local(self._staging.fd)
        self._committer = Committer(self._staging.fd, event, segment_limit, self._local)
        self._fd = -1
        self._restless: tuple[int, ...] = ()  # the inodes that every proof changes
        self._sizes: dict[int, int] = {}  # of the closed segments that are still there
        self._last: dict[int, int] = {}  # the last change in each of them
        self.written = 0  # see Head: what the next one is to say
        self.snapshot: Snapshot | None = None
        # Of durable batches only, and of each before its changes may count as written: a segment may go then.
        self.origins = Origins()
        self._base = 0  # what the newest head does not need any more
        self._asked = self._answered = 0  # rotate()'s calls, and how many of them a head has heard
        self._turned = threading.Condition()
        self._failed: OSError | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def open(
        self,
        effect: bytes,
        next_change: int,
        snapshot: Snapshot | None = None,
        covered: bytes = b"",
        origins: Origins | None = None,
    ) -> None:
        """Make the first segment, with what was replayed as its head (rule C6), and begin to commit.

        `effect`: redo lines that package files lack. `snapshot`: one that lacks these and, before them,
        the lines of `covered`. `origins`: the table that was read, kept in `origins` from now on.
        Raises OSError; this writer may serve only once this has returned."""
        self.snapshot = snapshot
        if origins is not None:
            self.origins = origins
        head = Head(
            self._claim.epoch,
            0,
            next_change,
            None,
            covered + effect,
            self.origins.entries(),
            snapshot=snapshot,
            covered=len(covered),
            forgotten=self.origins.forgotten,
        )
        if self._local:
            self._restless = self._staging.inodes(self._claim.proof)
        self._begin(head)
        self._committer.prove()
        self._thread.start()

    def _begin(self, head: Head) -> None:
        data = head.encode()
        fd = self._staging.create_apart("segment", data, self._restless)
        inode = os.fstat(fd).st_ino
        name = segment_name(head.epoch, head.segment)
        self._staging.publish("segment", "journal", name)
        self._mount.sync_name("journal", name, inode)
        proof = self._claim.proof if self._fd < 0 else None
        self._committer.continue_in(
            fd, head.segment, len(data), crc32c(data), head.next_change, proof
        )
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    # --- from the event loop ----------------------------------------------------------------------

    def submit(self, lines: memoryview, number: int, first_change: int) -> None:
        """Commit a batch of `number` changes; with no lines, just prove. One at a time."""
        self._committer.submit(lines, number, first_change)

    def completed(self) -> bool:
        """Whether the batch is durable and proven. Raises OSError when a commit has failed, for good."""
        return self._committer.completed()

    @property
    def size(self) -> int:
        """Bytes in all segments of this writer that are still there."""
        return sum(self._sizes.copy().values()) + self._committer.offset

    @property
    def commits(self) -> int:
        """Commits so far, those that were just a proof among them."""
        return self._committer.commits

    # --- the thread that commits ------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            why = self._committer.run()
            if why == "rotate":
                try:
                    self._rotate()
                except Exception as error:  # noqa: BLE001  # whatever it is, the loop must hear of it
                    self._fail(error if isinstance(error, OSError) else OSError(5, repr(error)))
                    return
            elif why == "failed":
                self._fail(self._committer.failure(), report=False)
                return
            else:
                with self._turned:
                    self._ended = True
                    self._turned.notify_all()
                return

    def _rotate(self) -> None:
        committer = self._committer
        previous = (committer.offset, committer.checksum)
        old = committer.segment
        asked = self._asked  # before what they ask for is read
        # Before the table is read, which has everything that is written: see `origins`.
        written, snapshot = self.written, self.snapshot
        head = Head(
            self._claim.epoch,
            old + 1,
            committer.next_change,
            previous,
            self._owed(),
            self.origins.entries(),
            written=written,
            snapshot=snapshot,
            forgotten=self.origins.forgotten,
        )
        self._begin(head)
        committer.prove()
        with self._turned:
            self._sizes[old] = previous[0]
            self._last[old] = head.next_change - 1
            self._base = head.base
            self._answered = asked
            self._turned.notify_all()

    def _fail(self, error: OSError, *, report: bool = True) -> None:
        with self._turned:
            self._failed = error
            self._turned.notify_all()
        if report:
            self._committer.fail(error.errno or 5)

    # --- from the thread that writes package files ------------------------------------------------

    def rotate(self) -> None:
        """Begin the next segment, whose head says what is `written` and names the `snapshot`.

        Blocks until the commit thread has done it: a segment that it was already about to begin, because
        the one before was full, does not count. Raises OSError when that failed."""
        with self._turned:
            self._asked += 1
            asked = self._asked
            self._committer.ask_rotation()
            self._turned.wait_for(lambda: self._answered >= asked or self._failed or self._ended)
            if self._failed:
                raise self._failed
            if self._ended:
                raise OSError(5, "the journal is closed")

    def drop_covered(self) -> None:
        """Take away this writer's segments that its newest head does not need any more."""
        with self._turned:
            base = self._base
            numbers = sorted(n for n in self._sizes if self._last[n] <= base)
        for number in numbers:
            self._drop(self._claim.epoch, number)
            del self._sizes[number], self._last[number]

    def drop_older_epochs(self) -> None:
        """Take away what earlier writers left: journals, proofs, temporary files."""
        for epoch, number in segments(self._mount):
            if epoch < self._claim.epoch:
                self._drop(epoch, number)
        for name in self._mount.names("staging", self._staging.name):
            if name.startswith("from-"):
                self._staging.discard(name)

    def _drop(self, epoch: int, number: int) -> None:
        name = segment_name(epoch, number)
        self._staging.take("segment-gone", "journal", name)
        self._mount.sync_removal("journal", name)
        self._staging.discard("segment-gone")

    def stop(self, timeout: float) -> bool:
        """End the thread that commits, once the batch under way is done; whether it has ended in time."""
        if self._thread.is_alive():
            self._committer.ask_stop()
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return True


def replay_lines(
    data: bytes, offset: int, checksum: int, next_change: int
) -> tuple[list[tuple[int, int, bytes]], int, int, int]:
    """All whole batches of a segment's bytes behind its head, some megabytes of them joined: ((first change,
    number of changes, redo lines) of each piece, end, checksum, next change)."""
    parts: list[tuple[int, int, bytes]] = []
    while True:
        first = next_change
        lines, end, checksum, next_change = read_batches(
            data, offset, checksum, next_change, 1 << 24
        )
        if end == offset:
            return parts, offset, checksum, next_change
        parts.append((first, next_change - first, lines))
        offset = end
