"""`file:PATH`: a Graph in memory, a journal that makes its changes durable, and one file per package.

Group commit: what arrives while one commit is being synced forms the next. A commit under way costs
the event loop nothing; when it is done an eventfd wakes the loop, which hands over the next one before
it lets the answers go.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Self

from pkgindex import log
from pkgindex._core import Batch
from pkgindex.config import Settings
from pkgindex.errors import (
    ConfigError,
    PkgindexError,
    StoreDamaged,
    StoreFailed,
    StoreOwned,
    StoreUnreachable,
    reason_of,
)
from pkgindex.index.base import Answers, Index, Progress
from pkgindex.store import format as store_format
from pkgindex.store.claim import GONE, Claim, Withdrawn, claim, epochs, highest_epoch, owner_of
from pkgindex.store.journal import Journal
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount, reached
from pkgindex.store.packages import WriteBehind
from pkgindex.store.recovery import Recovered, recover

__all__ = ["Deposed", "FileIndex", "path_of"]

# How long past the deadline the files that are being written when it comes may take.
GRACE_SECONDS = 2.0

# A commit costs the processor the same for one change as for a hundred. So it waits, for so long at most,
# while each turn of the loop brings more to share it: who has just been answered is about to ask again.
SHARING_SECONDS = 0.001

# With changes, that is as much as ten answers cost. So where few changes come among thousands of QUERYs a
# second, the next commit begins a moment later, rather than keep all of these waiting.
QUERIES_BESIDE = 4  # since the last commit began
PAUSE_SECONDS = 0.001

logger = log.get_logger()

CLAIMS = 5  # tries against other claimants, with random pauses that grow (rule C8)


def path_of(location: str) -> str:
    """The folder that `file:LOCATION` names, absolute or relative. Raises ConfigError."""
    if location.startswith("//"):
        location = location[2:]
        if not location.startswith("/"):
            raise ConfigError(
                f"file://{location}: names a host; write file:///PATH for an absolute path"
            )
    if not location or "\0" in location:
        raise ConfigError("file: needs a path, such as file:./pkgindex-data")
    return os.path.abspath(location)


class Deposed(StoreFailed):
    """Another server has claimed a higher epoch: nothing that this one does counts any more."""


class FileIndex(Index):
    """The index that one writer keeps on a mount."""

    def __init__(
        self,
        mount: Mount,
        shards: int,
        mine: Claim,
        lease: Lease,
        recovered: Recovered,
        journal_limit: int,
        max_index: int = 0,
    ) -> None:
        self._graph = recovered.graph
        self._graph.limit = max_index  # from now on: what is there is there
        self._warn_if_too_large()
        self._graph.wake = self._wake
        self.apply = self._graph.apply  # type: ignore[method-assign]  # spares a call for each chunk
        self._lease = lease
        self._claim = mine
        self._mount = mount
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._journal = Journal(mount, mine, self._graph.owed_lines, self._event)
        if recovered.distrusted:
            logger.warning("snapshot not read", why=recovered.distrusted, instead="package files")
        recovered.open(self._journal)
        self._behind = WriteBehind(
            mount,
            mine.staging,
            shards,
            self._graph,
            self._journal,
            self._round_failed,
            journal_limit,
        )
        self._journal_limit = journal_limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._committing = False
        self._scheduled = False
        self._queries = 0  # answered before the last commit began
        self._commit_failed = self._abandoned = False
        self._quiet: asyncio.Event | None = None
        self._sealed: tuple[memoryview, int, int] = (
            memoryview(b""),
            0,
            0,
        )  # lines, their number, the first
        self.recovered_bytes = recovered.replayed

    def _warn_if_too_large(self) -> None:
        memory, limit = self._graph.stats()["memory"], self._graph.limit
        if limit and (size := memory["names"] + memory["edges"]) > limit:
            logger.warning(
                "index larger than --max-index", bytes=size, max_index=limit, packages=len(self)
            )

    # --- opening ----------------------------------------------------------------------------------

    @classmethod
    def open(cls, location: str, settings: Settings, progress: Progress | None = None) -> Self:
        """Claim the store, read it, and make this process its writer. See Index."""
        mount = Mount(path_of(location))
        with reached(mount.root):
            fmt = store_format.opened(mount, insist=settings.create)
            lease = Lease(mount)
            try:
                mine = _claim(mount, lease, takeover=settings.takeover)
                if store_format.read(mount) != fmt:
                    raise StoreDamaged(
                        f"{mount.path('FORMAT')}: changed while the store was claimed; start again"
                    )
                recovered = recover(mount, fmt, mine, progress, rebuild=settings.rebuild)
                return cls(
                    mount,
                    fmt.shards,
                    mine,
                    lease,
                    recovered,
                    settings.journal_limit,
                    settings.max_index,
                )
            except Withdrawn as reason:
                raise _owned(
                    mount, highest_epoch(mount), f"{reason}; now it is in use by"
                ) from None
            except BaseException:
                lease.close()
                raise

    # --- serving ----------------------------------------------------------------------------------

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None],
        failed: Callable[[PkgindexError], None],
    ) -> None:
        """See Index."""
        self._loop = loop
        self._tell_settled = settled
        self._tell_failed = failed
        self._quiet = asyncio.Event()
        self._quiet.set()
        loop.add_reader(self._event, self._committed)
        self._behind.start()

    def apply(self, batch: Batch) -> Answers:
        """See Index. Raises MemoryError when the process must end."""
        return self._graph.apply(batch)

    def _wake(self) -> None:
        """The open commit has got its first answer to carry, or is full."""
        if not self._scheduled and not self._committing and self._loop:
            # Not at once: what the other connections have sent in this turn of the loop belongs to it.
            self._scheduled = True
            if self._quiet:
                self._quiet.clear()
            self._loop.call_soon(self._commit)
        if self._graph.full:
            self.congested = True

    def _commit(self, before: int = 0, until: float | None = None) -> None:
        """Hand the open commit over. `before`: how many answers rested on it a turn ago; `until`: how long it
        may still be put off, by the monotonic clock."""
        self._scheduled = False
        if self._committing or self._commit_failed:
            return
        now = time.monotonic()
        if until is None:
            until = now + SHARING_SECONDS
        asked, queries = self._graph.asked, self._graph.queries
        if now < until and self._loop and not self._graph.full:
            if asked > before + 1:
                self._scheduled = True
                self._loop.call_soon(self._commit, asked, until)
                return
            if self._graph.redo_bytes and queries > self._queries + QUERIES_BESIDE:
                self._scheduled = True
                self._loop.call_later(PAUSE_SECONDS, self._commit, asked, 0.0)
                return
        self._queries = queries
        self._seal()
        self._journal.submit(*self._sealed)
        self._committing = True

    def _seal(self) -> None:
        """Close the open commit."""
        _, lines, number = self._graph.seal()
        self._sealed = lines, number, self._graph.changes - number + 1

    def _made_durable(self, ticket: int) -> None:
        """The commit that was sealed last is durable and proven; nothing else has been told yet."""

    def _committed(self) -> None:
        """The eventfd was rung."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        try:
            if not self._journal.completed():
                return
        except OSError as error:
            self._commit_failed = True
            self._fail(error)
            return
        self._committing = False
        ticket = self._graph.ticket - 1
        self._graph.settle(ticket)
        self._made_durable(ticket)
        if self._graph.asked:
            self._commit()
        elif self._quiet:
            self._quiet.set()
        self.settled = ticket
        self._behind.settled(ticket)
        size = self._journal.size
        over = size > self._journal_limit
        if size > self._journal_limit // 2:
            self._behind.hurry()
        self.congested = over or self._graph.full
        self._tell_settled()
        if over and self._loop:
            self._loop.call_later(0.05, self._uncongest)

    def _uncongest(self) -> None:
        """The journal was over its limit: let changes go on once a round has shortened it."""
        if not self.congested or self._commit_failed:
            return
        if self._journal.size > self._journal_limit:
            self._behind.hurry()
            if self._loop:
                self._loop.call_later(0.05, self._uncongest)
        elif not self._committing:
            self.congested = False
            self._tell_settled()

    def _fail(self, error: OSError) -> None:
        if self._abandoned:
            return
        if self._loop:
            self._loop.remove_reader(self._event)
        # ENOENT alone may be a folder that somebody removed: a claim above this one's is a successor.
        if error.errno in GONE and self._is_deposed():
            newest = highest_epoch(self._mount)
            self._tell_failed(
                Deposed(
                    f"{self._mount.root}: another server has taken over (epoch {newest}); this one stops"
                )
            )
            return
        self._tell_failed(
            StoreFailed(
                f"{reason_of(error, self._mount.root)}; the writer stops, nothing was acknowledged since; "
                "mend the storage (room, permissions, mount) and start again"
            )
        )

    def _is_deposed(self) -> bool:
        staging = self._mount.path("staging", self._claim.staging.name)
        try:
            return highest_epoch(self._mount) > self._claim.epoch or not os.path.exists(staging)
        except OSError:
            return False

    def _round_failed(self, error: OSError) -> None:
        if self._loop:
            self._loop.call_soon_threadsafe(self._fail, error)

    # --- the end ----------------------------------------------------------------------------------

    async def stop(self, timeout: float) -> dict[str, object]:
        """See Index."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        if self._quiet:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), left())
        self._behind.stop(deadline)
        written = await loop.run_in_executor(None, self._behind.join, left() + GRACE_SECONDS)
        behind = self._behind.behind
        try:
            ended = await loop.run_in_executor(None, self._journal.stop, left())
            loop.remove_reader(self._event)
            if self._behind.last_error is not None:
                raise self._behind.last_error
            if written and ended:
                self._claim.staging.close()
                self._lease.close()
                os.close(self._event)
        except OSError as error:
            if error.errno in GONE and self._is_deposed():
                raise Deposed(
                    f"{self._mount.root}: another server has taken over before this one had stopped; "
                    "what was acknowledged is in the journal"
                ) from None
            raise StoreFailed(
                f"{reason_of(error, self._mount.root)}; package files lag behind, "
                "what was acknowledged is in the journal"
            ) from None
        if not written or not ended:
            raise StoreFailed(
                f"{self._mount.root}: does not answer; stopped without it; "
                "what was acknowledged is in the journal"
            )
        return {"packages": len(self), "behind": behind, "rounds": self._behind.rounds}

    def abandon(self, released: Callable[[], None]) -> None:
        """Let everything go without waiting for anything: another server has deposed this one.

        `released` is called, in another thread, when all that a hanging mount may hold up has ended."""
        self._abandoned = self._commit_failed = True
        if self._loop:
            self._loop.remove_reader(self._event)
        self._behind.abandon()

        def reap() -> None:
            # Until its threads have ended they use the graph's memory and the descriptors.
            self._behind.join(None)
            self._journal.stop(threading.TIMEOUT_MAX)
            self._claim.staging.close()
            os.close(self._event)
            released()

        threading.Thread(target=reap, name="abandoned", daemon=True).start()

    def stats(self) -> dict[str, object]:
        """The graph's counters and the store's."""
        return self._graph.stats() | {
            "epoch": self._claim.epoch,
            "commits": self._journal.commits,
            "journal_bytes": self._journal.size,
            "rounds": self._behind.rounds,
            "snapshots": self._behind.snapshots,
            "files_written": self._behind.files,
            "behind": self._behind.behind,
        }

    def __len__(self) -> int:
        return len(self._graph)

    @property
    def beyond_limit(self) -> int:
        """See Index."""
        return self._graph.beyond_limit


def _claim(mount: Mount, lease: Lease, *, takeover: bool) -> Claim:
    """Claim the store unless its writer lives. Raises StoreOwned, StoreUnreachable, OSError."""
    reason = Withdrawn("")
    for attempt in range(CLAIMS):
        # A takeover is meant for who had the store when it began, not for who was quicker meanwhile.
        # Of every epoch: a claimant that died before its fence leaves a higher one than the writer's.
        for epoch in epochs(mount) if attempt or not takeover else ():
            with suppress(StoreUnreachable) if takeover else nullcontext():
                if lease.holds(epoch):
                    raise _owned(mount, epoch, "it is in use by")
        try:
            return claim(mount, lease)
        except Withdrawn as withdrawn:
            reason = withdrawn
            if attempt + 1 < CLAIMS:
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
    raise _owned(mount, highest_epoch(mount), f"another server claims it: {reason};")


def _owned(mount: Mount, epoch: int, why: str) -> StoreOwned:
    owner = owner_of(mount, epoch)
    return StoreOwned(
        f"{mount.root}: {why} {owner}; stop that server, or depose it with --takeover"
    )
