"""What a member does on the mount: all that may take as long as the mount hangs, for threads.

Looks and heartbeats of a follower do not fail: until the mount answers without an error they are tried
again, for to the others a mount that fails is one that hangs. What belongs to an epoch fails as it does.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pkgindex._core import Graph
from pkgindex.cluster.members import Member, Members
from pkgindex.cluster.writer import Writer
from pkgindex.config import Settings
from pkgindex.store import format as store_format
from pkgindex.store.claim import Claim, claim, epochs, highest_epoch
from pkgindex.store.format import Format
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount
from pkgindex.store.recovery import Gap, highest_chain, recover

__all__ = ["Blocking"]

RETRY_SECONDS = 0.1
CLEAN_SECONDS = 60.0

Complain = Callable[[str, OSError], None]


class Blocking:
    """The mount, as one member uses it."""

    def __init__(self, mount: Mount, fmt: Format, settings: Settings, me: str) -> None:
        """`me`: the id of this member. Raises StoreUnreachable."""
        self._mount = mount
        self._fmt = fmt
        self._settings = settings
        self._lease = Lease(mount)
        self._members = Members(mount, me)
        self._one = threading.Lock()  # Members is for one thread at a time
        self._cleaned_at = time.monotonic()

    def look(self, complain: Complain) -> tuple[dict[int, bool], list[Member]]:
        """The epochs in staging/, each with whether its lock is held, and the members' files."""
        while True:
            try:
                locks = {epoch: self._lease.is_held(epoch) for epoch in epochs(self._mount)}
                return locks, self._look()
            except OSError as error:
                complain("cannot look at the mount", error)
                time.sleep(RETRY_SECONDS)

    def _look(self) -> list[Member]:
        with self._one:
            now = time.monotonic()
            seen = self._members.look(now)
            if now - self._cleaned_at >= CLEAN_SECONDS:
                self._cleaned_at = now
                self._members.clean(now)
        return [each.member for each in seen]

    def beat(self, member: Member, mine: Claim | None, complain: Complain) -> None:
        """Publish one's own file, with `mine` as a proof (F5), which raises OSError when that fails."""
        while True:
            try:
                self._members.publish(member, mine.staging if mine else None)
                if mine and time.monotonic() - self._cleaned_at >= CLEAN_SECONDS:
                    self._look()  # a writer does it for no other reason
            except OSError as error:
                if mine is not None:
                    raise
                complain("cannot beat on the mount", error)
                time.sleep(RETRY_SECONDS)
            else:
                return

    def withdraw(self) -> None:
        """Take one's own file away, if that can be done."""
        with suppress(OSError):
            self._members.withdraw()

    def claim(self) -> tuple[Claim, float]:
        """Claim the next epoch; and the change after which the journal begins (see Takeover).

        Raises Withdrawn, OSError, StoreUnreachable."""
        mine = claim(self._mount, self._lease)
        try:
            chain = highest_chain(self._mount)
            if not chain:
                return mine, 0
            # What lies before the first head is not all in it: it has what package files lacked then.
            return mine, chain[0].next_change - 1
        except (OSError, Gap):
            return mine, float("inf")  # whatever it is, recovery will meet it

    def is_above(self, epoch: int) -> bool:
        """Whether a higher epoch was claimed. Raises OSError."""
        return highest_epoch(self._mount) > epoch

    def recover(self, mine: Claim, graph: Graph | None) -> Writer:
        """Make this server the writer of its epoch, its head proven (C6). Raises as recovery.recover()."""
        store_format.require(self._mount, mine.staging, store_format.ORIGINS)
        settings = self._settings
        recovered = recover(self._mount, self._fmt, mine, rebuild=settings.rebuild, graph=graph)
        writer = Writer(
            self._mount,
            self._fmt.shards,
            mine,
            self._lease,
            recovered,
            settings.journal_limit,
            settings.max_index,
        )
        writer.prepare(settings.max_line, recovered.batches)
        return writer

    def release(self, mine: Claim) -> None:
        """Let go of a claim that came to nothing."""
        mine.staging.close()
        self.unlock(mine.epoch)

    def unlock(self, epoch: int) -> None:
        """Let the others see that nobody of this epoch is there any more."""
        with suppress(OSError):
            self._lease.release(epoch)
