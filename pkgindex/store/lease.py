"""LOCK: a courtesy that tells whether the last writer's process is still there (rules L1, L2).

Byte `<epoch>` of LOCK is held by that epoch's process. Getting it means only that this process is gone;
no promise rests on it, for a GlusterFS brick's restart takes the lock away without a word and a dead
NFSv3 machine's never expires. The fence of claim.py is what keeps the store safe.

LOCK is opened once in a process: closing any descriptor of a file drops all its POSIX locks.

Who only reads a store that may not be written shares the lock with others who do: it needs no right to
write LOCK, a writer's still excludes it, and it a writer's.
"""

import errno
import fcntl
import os
import struct
from typing import Self

from pkgindex.errors import StoreUnreachable
from pkgindex.store.mount import FILE_MODE, Mount

__all__ = ["Lease"]

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


class Lease:
    """The LOCK file, open."""

    def __init__(self, mount: Mount, *, for_reading: bool = False) -> None:
        """`for_reading`: where LOCK may not be written, do without; where it is not there, too.

        Raises StoreUnreachable."""
        self.path = mount.path("LOCK")
        self.is_shared = False
        try:
            self._fd = self._open(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if not for_reading or error.errno not in READ_ONLY:
                raise StoreUnreachable(f"{self.path}: cannot open it: {error.strerror}") from None
            self.is_shared = True
            try:
                self._fd = self._open(os.O_RDONLY)
            except FileNotFoundError:
                self._fd = -1
            except OSError as error:
                raise StoreUnreachable(f"{self.path}: cannot read it: {error.strerror}") from None

    def _open(self, flags: int) -> int:
        return os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def holds(self, epoch: int) -> bool:
        """Whether a living process holds the byte of `epoch`. Raises StoreUnreachable, as hold()."""
        if not self.hold(epoch):
            return True
        self.release(epoch)
        return False

    def is_held(self, epoch: int) -> bool:
        """Whether another process holds the byte of `epoch`, asked without taking it even for a moment:
        who looks on must not be taken for the writer. True where it cannot be known."""
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, epoch, 1, 0)
        try:
            kind, *_ = FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        except OSError:
            return True
        return bool(kind != fcntl.F_UNLCK)

    def hold(self, epoch: int) -> bool:
        """Take the byte of `epoch`; False if a living process holds it.

        Raises StoreUnreachable on a mount that has no locks, or no LOCK."""
        if self._fd < 0:
            raise StoreUnreachable(f"{self.path}: missing, and it cannot be made here")
        kind = fcntl.LOCK_SH if self.is_shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._fd, kind | fcntl.LOCK_NB, 1, epoch)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise StoreUnreachable(
                f"{self.path}: this mount gives no locks ({error.strerror}); if no other server uses the "
                "store, start with --takeover"
            ) from None
        return True

    def release(self, epoch: int) -> None:
        """Let the byte of `epoch` go."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, epoch)

    def close(self) -> None:
        """Close LOCK, and with it let go of everything held; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
