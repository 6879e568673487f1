"""Becoming the one writer: choose an epoch, make it one's own, take every older writer's staging away.

The simple version would be: mkdir `staging/<n+1>`, then write. What breaks it, rule by rule:

- two claimants choose one number: mkdir lets one through; but a power loss of the mount's server may
  undo the mkdir and a second claimant makes it again: hence the owner file, made exclusively in the
  directory that was opened, synced, and read again by a path opened anew (C1, X3);
- the writer before is alive, or paused in the middle of a rename: so its directory is emptied and
  removed. From then on each of its renames and proofs fails, wherever it wakes (C2);
- its directory is emptied by renames into one's own, never by unlink: its last proof, which says how
  far its journal was acknowledged, survives even if this claimant dies here (C2);
- newest first: the other way round, one may find an old directory already robbed of its proof by a
  higher claimant that has not deposed *this one* yet, and read too little (X7);
- a power loss may bring a removed directory back, and its paused writer with it: so staging/ is synced
  and listed again before anything is read (X1);
- each proof's position is remembered from the rename that took it: a higher claimant may be taking it
  away again, and a later listing would not show it (X8).

One who sees a higher number than his own withdraws.
"""

import errno
import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pkgindex.errors import StoreUnreachable
from pkgindex.store.lease import Lease
from pkgindex.store.mount import FOLDER_MODE, Mount, Staging, epoch_name

__all__ = [
    "GONE",
    "Claim",
    "Owner",
    "Withdrawn",
    "claim",
    "epochs",
    "highest_epoch",
    "owner_of",
    "prove",
]

EPOCH = re.compile(r"[0-9a-f]{8}")
SEGMENT = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})")
PROOF = re.compile(r"(?:from-([0-9a-f]{8})-)?proof-([0-9a-f]{8})-([0-9a-f]{12})-[0-9a-f]+")
PATIENCE_SECONDS = 30.0  # for an older writer's directory to become empty
STALE_SECONDS = 5.0  # for one that a listing still shows, though it is gone, to be listed no more
GONE = (errno.ENOENT, errno.ESTALE)  # how a directory that was taken away shows itself
FIRST_PROOF = "proof-00000000-000000000000-0"

Position = tuple[int, int]  # (segment, offset in it)


class Withdrawn(Exception):
    """Another claimant was quicker, or has a higher number. Nothing of its was touched."""


@dataclass(frozen=True)
class Owner:
    """Who claimed an epoch, as its owner file says; for people only."""

    epoch: int
    host: str = "unknown host"
    pid: int = 0
    since: str = ""
    id: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (epoch {self.epoch}, since {self.since or 'unknown'})"


@dataclass
class Claim:
    """A claimed epoch: its staging directory, and the proofs of those before it."""

    staging: Staging
    proof: str = FIRST_PROOF
    proven: dict[int, Position] = field(
        default_factory=dict
    )  # by epoch: how far its journal was proven

    @property
    def epoch(self) -> int:
        """The number of this reign."""
        return self.staging.epoch


def epochs(mount: Mount) -> list[int]:
    """The epochs that have a staging directory, ascending."""
    return [int(n, 16) for n in mount.names("staging") if EPOCH.fullmatch(n)]


def highest_epoch(mount: Mount) -> int:
    """The highest epoch that left a staging directory or a journal; 0 in a new store."""
    journals = [int(m[1], 16) for n in mount.names("journal") if (m := SEGMENT.fullmatch(n))]
    return max([0, *epochs(mount), *journals])


def owner_of(mount: Mount, epoch: int) -> Owner:
    """Who claimed `epoch`, as far as it can be read."""
    try:
        fields = json.loads(mount.read("staging", epoch_name(epoch), "owner"))
        return Owner(
            epoch, str(fields["host"]), int(fields["pid"]), str(fields["since"]), str(fields["id"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Owner(epoch)


def claim(mount: Mount, lease: Lease | None = None) -> Claim:
    """Claim the next epoch and depose every older writer. Raises Withdrawn, or OSError from the mount.

    The lock is taken if it is to be had: on a mount without any, the fence alone keeps the store safe.
    The caller then reads the store (recovery.py) and may serve only after its own journal's head is
    published and proven."""
    epoch = highest_epoch(mount) + 1
    name = epoch_name(epoch)
    path = mount.path("staging", name)
    try:
        os.mkdir(path, FOLDER_MODE)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileExistsError:
        raise Withdrawn(f"epoch {epoch} was claimed by another") from None
    except FileNotFoundError:
        raise Withdrawn(f"epoch {epoch} was taken away at once") from None
    staging = Staging(mount, epoch, fd)
    try:
        _own(mount, staging)
        if lease is not None:
            with suppress(StoreUnreachable):
                lease.hold(epoch)
        os.close(staging.create(FIRST_PROOF, b""))
        mine = Claim(staging)
        _fence(mount, mine)
    except (OSError, Withdrawn) as error:
        staging.close()
        if lease is not None:
            with suppress(OSError):
                lease.release(epoch)
        if isinstance(error, OSError) and error.errno in GONE and not os.path.exists(path):
            raise Withdrawn(f"epoch {epoch} was fenced while it claimed") from None
        raise
    return mine


def _own(mount: Mount, staging: Staging) -> None:
    """C1: the owner file, exclusively; synced; read again by a path opened anew."""
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    mine = {
        "id": secrets.token_hex(16),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": since,
    }
    data = json.dumps(mine).encode() + b"\n"
    try:
        os.close(staging.create("owner", data))
    except FileExistsError:
        raise Withdrawn(f"epoch {staging.epoch} has another owner") from None
    _sync_owner(mount, staging)
    try:
        found = mount.read("staging", staging.name, "owner")
    except FileNotFoundError:
        found = b""
    if found != data:
        raise Withdrawn(f"epoch {staging.epoch} went to another owner")


def _sync_owner(mount: Mount, staging: Staging) -> None:
    """Sync staging/ and one's own directory in it, and for FUSE, which passes no folder's fsync on to the
    server's disk, the owner file: that commits the disk's earlier changes of names too."""
    fd = os.open("owner", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=staging.fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.fsync(staging.fd)
    mount.sync_folder("staging")


def _fence(mount: Mount, mine: Claim) -> None:
    """C2: depose all older writers; return once none is left, after a sync of staging/."""
    synced = False
    while True:
        there = epochs(mount)
        if there and there[-1] > mine.epoch:
            raise Withdrawn(f"epoch {there[-1]} is claimed above {mine.epoch}")
        if mine.epoch not in there:
            raise Withdrawn(f"epoch {mine.epoch} was fenced while it claimed")
        older = [e for e in there if e < mine.epoch]
        if not older and synced:
            return
        for epoch in reversed(older):
            _empty(mount, mine, epoch)
        _sync_owner(mount, mine.staging)
        synced = True


def _empty(mount: Mount, mine: Claim, epoch: int) -> None:
    """Take everything out of an older staging directory and remove it, until it is gone."""
    name = epoch_name(epoch)
    began = time.monotonic()
    while True:
        try:
            # .nfs files too: they hold up rmdir.
            for old in mount.all_names("staging", name):
                _take(mine, epoch, name, old)
            os.rmdir(mount.path("staging", name))
        except OSError as error:
            if error.errno in GONE:
                prove(mine)  # what was to be taken is gone; or one's own directory is
                if name not in mount.names("staging"):
                    return
                if time.monotonic() > began + STALE_SECONDS:
                    raise
                time.sleep(0.001)
                continue
            # Its writer was busy, or another claimant; or a client holds a removed file open (EBUSY).
            busy = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY)
            if not busy or time.monotonic() > began + PATIENCE_SECONDS:
                raise
            time.sleep(0.001)
        else:
            return


def _take(mine: Claim, epoch: int, folder: str, old: str) -> None:
    kept = old if old.startswith("from-") else f"from-{folder}-{old}"
    mine.staging.take(kept, "staging", folder, old)
    match = PROOF.fullmatch(old)
    if match:
        of = int(match[1], 16) if match[1] else epoch
        position = (int(match[2], 16), int(match[3], 16))
        mine.proven[of] = max(position, mine.proven.get(of, (0, 0)))


def prove(mine: Claim) -> None:
    """A rename inside staging, which only succeeds while nobody has fenced this claim. Raises Withdrawn."""
    new = FIRST_PROOF[:-1] + secrets.token_hex(4)
    try:
        mine.staging.rename(mine.proof, new)
    except OSError as error:
        if error.errno not in GONE:
            raise
        raise Withdrawn(f"epoch {mine.epoch} was fenced while it claimed") from None
    mine.proof = new
