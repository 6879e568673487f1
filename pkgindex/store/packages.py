"""Write-behind: rounds that bring package files up to what the journal already holds (rule W5).

A round: begin a new segment of the journal; set aside the packages whose files lag behind; for a piece
of them at a time, copy their contents out of the graph, wait until the last change copied is durable,
write temporary files, sync them, rename, sync the names, look for them; at the end begin another
segment, whose head says what is written, and take away the segments that nothing needs any more. Many
changes of one package between two rounds cost one write.

Beside the files lies a snapshot (snapshot.py), written anew whenever the journal that has grown since
the last one is worth it.

Guarantee: at every moment the journal's segments, replayed over whatever package files are there, give
the index. A file may be newer than the round's beginning: the later segments say the same again.

On a local file system known to honour it one syncfs stands for the syncs of a whole piece; through NFS
and FUSE, where it promises nothing, each file is synced by itself, by several threads at once, for
there latency is the limit.

Errors: the first OSError is final (rule W7); `failed` is told, once, from this thread.
"""

import errno
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pkgindex._core import Graph
from pkgindex.store import snapshot
from pkgindex.store._disk import Files, Folders, is_local, sync_file_system
from pkgindex.store.journal import Journal
from pkgindex.store.mount import Mount, Staging
from pkgindex.store.snapshot import PIECE_BYTES, PIECE_PACKAGES, Snapshot

__all__ = ["WriteBehind", "write_all_files"]

# A round begins when no change has come for a second. While they pour in, one begins all the same after
# ten: until then the changes of a package cost one write, and a load has the machine to itself.
INTERVAL_SECONDS = 1.0
LONGEST_LAG_SECONDS = 10.0

# Package files can wait, clients cannot: what their threads are worth beside the others (nice(2)).
NICENESS = 10

# The files that are on their way between two syncs: enough to spread a syncfs's cost thin, few enough
# for their contents to be held in memory (about 100 bytes each).
FILES_AT_ONCE = 8192

# A large reverse file is written at most once in as many seconds as this goes into its entries: one of a
# million dependents is 20 MB, and every change of any of them would write it anew in each round (N2).
LARGE_ENTRIES_A_SECOND = 10_000
LONGEST_WAIT_SECONDS = 3600.0

WRITERS = {True: 1, False: 8}  # by "is local"

# A snapshot is written anew when the journal since the last one has come to this share of its size, or to
# so many bytes if that is more; and before the journal of --journal-limit is a quarter full.
SNAPSHOT_SHARE = 0.25
SNAPSHOT_JOURNAL_BYTES = 1 << 20


class WriteBehind:
    """The thread that writes package files."""

    def __init__(
        self,
        mount: Mount,
        staging: Staging,
        shards: int,
        graph: Graph,
        journal: Journal,
        failed: Callable[[OSError], None],
        journal_limit: int = 1 << 30,
    ) -> None:
        self._mount = mount
        self._graph = graph
        self._journal_limit = journal_limit
        self._journal = journal
        self._staging = staging
        self._failed = failed
        self._local = is_local(staging.fd)
        self._folders = [Folders(mount.root, shards) for _ in range(WRITERS[self._local])]
        self._pool = ThreadPoolExecutor(len(self._folders), "files", _be_nice)
        self._wake = threading.Condition()
        self._stop_by: float | None = None
        self._hurry = False
        self._abandoned = False
        self._settled = 0
        self._awaited: float = (
            math.inf
        )  # the ticket that a piece waits for: nothing else wakes the thread
        self._begun = 0  # packages of the round under way that are not written yet
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self.rounds = 0
        self.files = 0
        self.snapshots = 0
        self._written: dict[str, float] = {}  # when each large reverse file was written last
        self.last_error: OSError | None = None

    def start(self) -> None:
        """Begin; the journal must be open."""
        self._thread.start()

    # --- from the event loop ----------------------------------------------------------------------

    def settled(self, ticket: int) -> None:
        """The commit `ticket` is durable: a piece that waits for it may be written."""
        self._settled = ticket
        if self._awaited <= ticket:
            with self._wake:
                self._wake.notify_all()

    def hurry(self) -> None:
        """Begin a round at once: the journal grows towards its limit."""
        with self._wake:
            self._hurry = True
            self._wake.notify_all()

    def stop(self, deadline: float) -> None:
        """Write everything and end, by `deadline` (time.monotonic): see behind(). join() waits for it."""
        with self._wake:
            self._stop_by = deadline
            self._wake.notify_all()

    def abandon(self) -> None:
        """End without writing anything more; what fails from now on concerns nobody."""
        self._abandoned = True
        self.stop(0.0)

    def join(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for the thread's end; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        self._pool.shutdown()
        for folders in self._folders:
            folders.close()
        return True

    @property
    def behind(self) -> int:
        """Packages whose files lag behind the journal."""
        return self._begun + self._graph.dirty + self._graph.owed

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        _be_nice()
        last = time.monotonic()
        changes = self._graph.changes
        try:
            self._journal.drop_older_epochs()
            snapshot.forget_others(self._mount, self._staging, self._journal.snapshot)
            while True:
                with self._wake:
                    self._wake.wait_for(self._is_due, INTERVAL_SECONDS)
                    stopping = self._stop_by is not None
                    hurried, self._hurry = self._hurry, False
                before, changes = changes, self._graph.changes
                lag = time.monotonic() - last
                if before != changes and lag < LONGEST_LAG_SECONDS and not hurried and not stopping:
                    continue
                self._release_owed()
                if (self._graph.dirty or hurried) and not self._round():
                    return
                last = time.monotonic()
                if stopping and (self._late() or not self._graph.dirty + self._graph.owed):
                    return
        except Exception as error:  # noqa: BLE001  # whatever it is, the loop must hear of it
            if self._abandoned:
                return
            if not isinstance(error, OSError):
                error = OSError(errno.EIO, f"the writer of package files failed: {error!r}")
            self.last_error = error
            self._failed(error)

    def _is_due(self) -> bool:
        return self._hurry or self._stop_by is not None

    def _is_pressed(self) -> bool:
        """Whether the server waits for package files, or soon will: then they give way to nobody."""
        return self._stop_by is not None or self._journal.size > self._journal_limit // 2

    def _late(self) -> bool:
        return self._stop_by is not None and time.monotonic() >= self._stop_by

    def _round(self) -> bool:
        """One round; False if the time to stop came before its end."""
        self._journal.rotate()
        change = self._graph.changes
        self._begun = self._graph.take_dirty()
        while True:
            pieces: list[Files] = []
            count = rests_on = 0
            while count < FILES_AT_ONCE:
                if self._late():
                    return False
                records = self._graph.render(PIECE_BYTES, PIECE_PACKAGES)
                if records is None:
                    break
                if not records:
                    continue  # a large reverse file, of which this was a slice
                rests_on = self._graph.newest
                folders = self._folders[len(pieces) % len(self._folders)]
                pieces.append(
                    Files(
                        records, self._staging.fd, folders, not self._local, not self._is_pressed()
                    )
                )
                count += pieces[-1].count
            if not pieces:
                break
            if not self._durable(rests_on):
                return False
            if not self._write(pieces):
                return False
            self.files += count
            self._begun = self._graph.taken
        self._journal.written = change
        written = self._written_snapshot()
        if written is not None:
            self._journal.snapshot = written
        self._journal.rotate()
        self._journal.drop_covered()
        if written is not None:
            snapshot.forget_others(self._mount, self._staging, written)
            self.snapshots += 1
        self.rounds += 1
        return True

    def _written_snapshot(self) -> Snapshot | None:
        """A new snapshot, if one is due and there is time for it."""
        last = self._journal.snapshot
        if last is not None:
            worth = max(SNAPSHOT_JOURNAL_BYTES, int(SNAPSHOT_SHARE * last.size))
            if self._journal.size <= min(worth, self._journal_limit // 4):
                return None
        return snapshot.write(self._mount, self._staging, self._graph, self._durable, self._late)

    def _release_owed(self) -> None:
        """Let the next round write the large reverse files whose time has come (N2).

        The others are named in the head of each segment that begins meanwhile."""
        now = time.monotonic()
        due = {}
        for package, dependents in self._graph.owed_reverses():
            wait = dependents / LARGE_ENTRIES_A_SECOND
            if self._stop_by is not None or now - self._written.get(package, -math.inf) >= wait:
                due[package] = now
        self._graph.write_owed(due)
        # What was written longer ago than any file need wait is due anyway.
        self._written = {
            p: at for p, at in self._written.items() if now - at < LONGEST_WAIT_SECONDS
        }
        self._written |= due

    def _durable(self, ticket: int) -> bool:
        """Wait until `ticket` is settled; False if the time to stop came first."""
        with self._wake:
            self._awaited = ticket
            while self._settled < ticket and not self._late():
                self._wake.wait(INTERVAL_SECONDS)
            self._awaited = math.inf
            return self._settled >= ticket

    def _write(self, pieces: list[Files]) -> bool:
        """Bring a group of files to disk; False if the time to stop came before its end.

        What was not settled by then is covered by the journal, whatever became of it."""
        if not self._each(pieces, Files.stage):
            return False
        if self._local:
            sync_file_system(self._staging.fd)
        if not self._each(pieces, Files.publish):
            return False
        if self._local:
            sync_file_system(self._staging.fd)
        else:
            for folders in self._folders:
                folders.sync_touched()
        return self._each(pieces, Files.settle)

    def _each(self, pieces: list[Files], step: Callable[[Files], None]) -> bool:
        """Run a step on every piece: one thread for each set of folders, its pieces in turn."""
        width = len(self._folders)

        def one(first: int) -> bool:
            for piece in pieces[first::width]:
                if self._late():
                    return False
                step(piece)
            return True

        started = [self._pool.submit(one, first) for first in range(min(width, len(pieces)))]
        return sum(not done.result() for done in started) == 0


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def write_all_files(
    mount: Mount, staging: Staging, shards: int, graph: Graph, journal: Journal
) -> None:
    """Write what is behind, of a graph that does not change, in one round. Raises OSError."""
    writer = WriteBehind(mount, staging, shards, graph, journal, lambda _error: None)
    writer.start()
    writer.stop(math.inf)
    writer.join(None)
    if writer.last_error is not None:
        raise writer.last_error
