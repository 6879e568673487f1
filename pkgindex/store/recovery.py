"""Reading the index back: the snapshot or the forward files, then the journal over them (rules C3 to C8).

Guarantee: what comes out is every change that was ever acknowledged, or an error that names the file
that stands in the way; nothing is guessed. Reverse files are not read: they are derived (rule N2).

Calling sequence: the caller has claimed an epoch, so nobody else can change the store any more.
recover() reads; the caller then opens its own journal with what was recovered, and only then serves.

Assumptions, each of which lost acknowledged changes where it was not made: a size may come from a cache
and be too small, so less than was proven means reading again (C3); a name may be missing from a cache,
so a gap means listing again (C4); a deposed writer may still append to a file it holds open, so nothing
is read beyond the size seen first (C3); and a claimant that was itself fenced sees gaps, so damage is
only cried after a proof (C8).
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pkgindex._core import Graph, crc32c
from pkgindex.errors import StoreDamaged, StoreUnreachable
from pkgindex.store import snapshot
from pkgindex.store._disk import file_name, is_local, read_folder
from pkgindex.store.claim import GONE, Claim, Position, prove
from pkgindex.store.format import Format
from pkgindex.store.journal import (
    UNKNOWN,
    Head,
    Journal,
    Torn,
    parse_head,
    replay_lines,
    segment_name,
    segments,
)
from pkgindex.store.mount import Mount
from pkgindex.store.origins import Origins
from pkgindex.store.snapshot import Snapshot

__all__ = [
    "Gap",
    "Problem",
    "Recovered",
    "highest_chain",
    "load_files",
    "load_journal",
    "read_shards",
    "recover",
    "shard_folders",
]

# How long a client's cache may hide what is there, with the usual mount options (acregmax is 60 s, but
# names and sizes are asked for anew at each open); past it, what is missing is missing.
PATIENCE_SECONDS = 15.0

# Of the batches replayed last, for followers that lack just these: beyond it they take a snapshot.
BATCHES_BYTES = 64 << 20

READERS = {True: 2, False: 16}  # by "is local": a disk is limited by cores, a mount by latency

HEAD_BYTES = 1 << 16  # of a segment: most heads are shorter, and behind them may lie megabytes

Progress = Callable[[int, int], None]


class Gap(Exception):
    """Something that must be there is not: a cache hides it, or it is damage."""


@dataclass(frozen=True)
class Problem:
    """A file of the store that is not what it should be."""

    path: str  # below the store's root
    what: str
    error: int = 0  # errno, if the system could not read it: the file itself may be sound

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Recovered:
    """The index as it was, and what a new writer has to carry on."""

    graph: Graph
    next_change: int
    replayed: int  # bytes of redo lines read from the journal
    snapshot: Snapshot | None = None  # that was read instead of package files
    covered: bytes = b""  # redo lines that only the snapshot lacks
    distrusted: str = ""  # why a snapshot that was there was not read
    origins: Origins = field(default_factory=Origins)
    # (first change, number of changes, redo lines) of what was replayed last, up to BATCHES_BYTES
    batches: list[tuple[int, int, bytes]] = field(default_factory=list)

    def open(self, journal: Journal) -> None:
        """Make it the first head of a new writer's journal (rule C6), with what package files lack.

        Raises OSError."""
        journal.open(
            self.graph.effect(), self.next_change, self.snapshot, self.covered, self.origins
        )


@dataclass
class Replayed:
    """What the journal gave."""

    next_change: int = 1
    size: int = 0  # bytes of redo lines
    covered: bytes = b""  # those that package files have already
    origins: Origins = field(default_factory=Origins)
    batches: list[tuple[int, int, bytes]] = field(default_factory=list)

    def keep(self, parts: list[tuple[int, int, bytes]]) -> None:
        """Keep these batches, and no more than BATCHES_BYTES in all."""
        self.batches += parts
        while sum(len(lines) for _, _, lines in self.batches) > BATCHES_BYTES:
            del self.batches[0]


def recover(
    mount: Mount,
    fmt: Format,
    claim: Claim,
    progress: Progress | None = None,
    *,
    rebuild: bool = False,
    graph: Graph | None = None,
) -> Recovered:
    """Read the whole index. `progress` is told (folders read, folders in all).

    `rebuild`: from the package files, even if there is a snapshot. `graph`: one whose every change is
    durable, and which has all that the journal does not hold any more (F1): only the journal is then read,
    over it, and it is of no use when this raises. Raises StoreDamaged, StoreUnreachable, OSError, or
    Withdrawn when another has claimed meanwhile."""
    # A writer that was killed may have made shards' folders and not synced their names: what its
    # successor puts below them would hang by nothing.
    for kind in ("forward", "reverse"):
        mount.sync_folder(kind)
    local = is_local(claim.staging.fd)
    deadline = time.monotonic() + (0 if local else PATIENCE_SECONDS)
    pause = 0.05
    while True:
        try:
            return _recover_once(mount, fmt, claim.proven, READERS[local], progress, rebuild, graph)
        except (Gap, OSError) as error:
            prove(claim)
            what = str(error)
            if isinstance(error, OSError):
                what = f"{error.filename or mount.root}: cannot read it: {error.strerror}"
                if error.errno not in GONE:
                    raise StoreUnreachable(what) from None
            if time.monotonic() >= deadline:
                if isinstance(error, OSError) and error.errno != errno.ENOENT:
                    raise StoreUnreachable(f"{what}: check the mount, and start again") from None
                raise StoreDamaged(
                    f"{what}; nothing was changed: restore it from a backup, or see what is left with "
                    f"'pkgindex check {mount.root}'"
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _recover_once(
    mount: Mount,
    fmt: Format,
    proven: dict[int, Position],
    readers: int,
    progress: Progress | None,
    rebuild: bool,
    known: Graph | None,
) -> Recovered:
    graph = Graph(journalled=True) if known is None else known
    chain = highest_chain(mount)
    base = chain[-1].snapshot if chain and not (rebuild and known is None) else None
    distrusted = ""
    if base is not None and known is None:
        distrusted = snapshot.load(mount, graph, base)
        if distrusted:
            graph, base = Graph(journalled=True), None
    reads_files = base is None and known is None
    problems = load_files(mount, fmt, graph, readers, progress) if reads_files else []
    found = load_journal(mount, graph, proven, chain, empty=not len(graph) and not problems)
    if problems:
        # What a power loss tore in the middle of a round, the journal still covers (and rewrites, C7).
        covered = {file_name(package) for package in graph.dirty_packages()}
        problems = [p for p in problems if os.path.basename(p.path) not in covered]
    for problem in problems:
        if problem.error and problem.error not in GONE:
            raise OSError(problem.error, problem.what, mount.path(problem.path))
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise Gap(f"{mount.path(problems[0].path)}: damaged: {problems[0].what}{more}")
    for package, dependency in graph.dangling(1):
        raise Gap(
            f"{mount.path('forward')}: damaged: {package} depends on {dependency}, whose file is missing"
        )
    graph.continue_at(found.next_change - 1)
    return Recovered(
        graph,
        found.next_change,
        found.size,
        base,
        found.covered if base is not None else b"",
        distrusted,
        found.origins,
        found.batches,
    )


def load_files(
    mount: Mount, fmt: Format, graph: Graph, readers: int, progress: Progress | None = None
) -> list[Problem]:
    """Load every forward file; the files that are not what they should be. Raises OSError, Gap."""
    problems: list[Problem] = []
    folders, strangers = shard_folders(mount, "forward", fmt.shards)
    problems += strangers
    for done, (lines, found) in enumerate(
        read_shards(mount, "forward", folders, fmt.shards, readers)
    ):
        graph.replay(lines, track=False)
        problems += found
        if progress:
            progress(done + 1, len(folders))
    return problems


def shard_folders(mount: Mount, kind: str, shards: int) -> tuple[list[int], list[Problem]]:
    """The shards that have a folder under forward/ or reverse/, and what else lies there."""
    folders, strangers = [], []
    for name in mount.names(kind):
        if (
            re.fullmatch(r"[0-9a-f]{2,3}", name)
            and int(name, 16) < shards
            and name == f"{int(name, 16):02x}"
        ):
            folders.append(int(name, 16))
        else:
            strangers.append(Problem(f"{kind}/{name}", "not a file of the store"))
    return folders, strangers


def read_shards(
    mount: Mount, kind: str, folders: list[int], shards: int, readers: int
) -> Iterator[tuple[bytes, list[Problem]]]:
    """Read the package files of these shards: for each (redo lines, what is wrong). Raises OSError."""

    def one(shard: int) -> tuple[bytes, list[Problem]]:
        lines, _, wrong = read_folder(mount.path(kind, f"{shard:02x}"), kind, shard, shards)
        return lines, [
            Problem(f"{kind}/{shard:02x}/{name}", what, error) for name, what, error in wrong
        ]

    with ThreadPoolExecutor(readers, thread_name_prefix="recovery") as pool:
        yield from pool.map(one, folders)


def load_journal(
    mount: Mount, graph: Graph, proven: dict[int, Position], chain: list[Head], *, empty: bool
) -> Replayed:
    """Replay the highest journal that has a whole head (C5), which highest_chain() has found.

    `proven`: how far each epoch's journal was acknowledged (C3). `empty`: no forward file is there, so
    that no journal need be there either. Raises Gap, OSError."""
    top = max((epoch for epoch, position in proven.items() if position > (0, 0)), default=0)
    if top and (not chain or chain[-1].epoch < top):
        lost = mount.path("journal", segment_name(top, proven[top][0]))
        raise Gap(f"{lost}: missing, or its head is damaged, though it was acknowledged")
    if not chain:
        if not empty:
            journal = mount.path("journal")
            raise Gap(f"{journal}: no segment with a whole head, though there are package files")
        return Replayed()
    newest = chain[-1]
    reached = proven.get(newest.epoch, (0, 0))
    if chain[0].segment and newest.written != UNKNOWN and chain[0].next_change > newest.base + 1:
        missing = segment_name(newest.epoch, chain[0].segment - 1)
        raise Gap(f"{mount.path('journal', missing)}: missing, though not all of it is in files")
    # The newest head's table, whose results are the fewest, may lack the last batches of the segments
    # that it still needs: their notes are replayed over it, and those that it has add nothing.
    replayed = Replayed(origins=Origins(newest.origins, newest.forgotten))
    covered: list[bytes] = []
    before: tuple[int, int] | None = None  # size and checksum of the segment before
    next_change = 0
    for index, listed in enumerate(chain):
        epoch, number = listed.epoch, listed.segment
        name = segment_name(epoch, number)
        path = mount.path("journal", name)
        try:
            data = mount.read("journal", name)
        except FileNotFoundError:
            raise Gap(f"{path}: missing, though it is listed") from None
        head, offset = _whole_head(data, path)
        if (head.epoch, head.segment) != (epoch, number):
            raise Gap(f"{path}: damaged: it is segment {head.segment} of epoch {head.epoch}")
        if index and head.previous != before:
            damaged = mount.path("journal", segment_name(epoch, number - 1))
            raise Gap(f"{damaged}: damaged: its successor knows it otherwise")
        if index and head.next_change != next_change:
            raise Gap(
                f"{path}: damaged: it begins with change {head.next_change}, not {next_change}"
            )
        parts, end, checksum, next_change = replay_lines(
            data, offset, crc32c(data[:offset]), head.next_change
        )
        replayed.keep(parts)
        before = (end, checksum)
        if number == reached[0] and end < reached[1]:
            raise Gap(f"{path}: damaged at byte {end}, though {reached[1]} bytes were acknowledged")
        # What the newest head says is written needs no writing again: only the snapshot lacks it.
        written = listed is not newest and next_change - 1 <= newest.written
        covered.append(head.lines[: head.covered])
        lines = head.lines[head.covered :]
        # The newest head lacks those that a round was about to write; it may have been cut short.
        owed = _owed(lines) if written and head.written == newest.written else b""
        notes: list[tuple[str, int, str]] = []
        try:
            graph.replay(covered[-1], track=False)
            graph.replay(lines, track=not written)
            graph.replay(owed)
            for _, _, part in parts:
                graph.replay(part, track=not written, notes=notes)
        except ValueError as error:
            raise Gap(f"{path}: damaged: {error}") from None
        replayed.origins.record_all(notes)
        replayed.size += sum(map(len, (covered[-1], lines, *(part for _, _, part in parts))))
        if written:
            covered += [lines, *(_without_notes(part) for _, _, part in parts)]
    if newest.segment < reached[0]:
        missing = segment_name(newest.epoch, reached[0])
        raise Gap(f"{mount.path('journal', missing)}: missing, though it was acknowledged")
    replayed.next_change = next_change
    replayed.covered = b"".join(covered)
    return replayed


def _owed(lines: bytes) -> bytes:
    return b"".join(re.findall(rb"^\*.*\n", lines, flags=re.MULTILINE))


def _without_notes(lines: bytes) -> bytes:
    if b"\n@" not in lines:  # a batch begins with a change
        return lines
    return re.sub(rb"^@.*\n", b"", lines, flags=re.MULTILINE)


def highest_chain(mount: Mount) -> list[Head]:
    """The segments of the highest epoch that has a whole head, by their heads; [] if none has.

    Raises Gap, OSError."""
    listed = segments(mount)
    for epoch in sorted({e for e, _ in listed}, reverse=True):
        numbers = [n for e, n in listed if e == epoch]
        heads = [_head(mount, segment_name(epoch, number)) for number in numbers]
        whole = [
            replace(head, epoch=epoch, segment=number, lines=b"")
            for number, head in zip(numbers, heads, strict=True)
            if head is not None
        ]
        if whole:
            if heads[0] is None:
                # A head is durable before its segment has a name: this is never half a start (W6).
                raise Gap(
                    f"{mount.path('journal', segment_name(epoch, numbers[0]))}: damaged: no whole head"
                )
            for one, following in pairwise(whole):
                if following.segment != one.segment + 1:
                    missing = segment_name(epoch, one.segment + 1)
                    raise Gap(
                        f"{mount.path('journal', missing)}: missing or damaged, though its successor is there"
                    )
            return whole
    return []


def _head(mount: Mount, name: str) -> Head | None:
    try:
        with mount.opened("journal", name) as fd:
            start = os.read(fd, HEAD_BYTES)
        with suppress(Torn):
            return parse_head(start)[0]
        return parse_head(mount.read("journal", name))[0]
    except (Torn, FileNotFoundError):
        return None


def _whole_head(data: bytes, path: str) -> tuple[Head, int]:
    try:
        return parse_head(data)
    except Torn as torn:
        raise Gap(f"{path}: damaged: {torn}") from None
