"""A folder that several machines may share, and the few things the store asks of it.

Purpose: every operation of the store that is not a hot path goes through here, so that the rules about
caches and deposed writers are kept in one place, and a test can stand between the store and its disk.

Guarantees. Names are believed only when a folder opened anew by its path lists them (rule C4). What
others can see is changed only by a rename out of one's own staging directory or into it, through the
directory's descriptor, opened once (rule W1): once another writer has taken that directory away, every
such rename fails, whatever this process has slept through.

No symbolic link below the root leads anywhere: what is opened or listed must be no link itself, and
check_folders() sees that the four folders of the store are none. The root itself may be one.

Assumptions: rename(2) is atomic on the mount's server and mkdir(2) exclusive there. Nothing is assumed
of clocks, of locks, or of what a client's cache says about sizes.

Errors: OSError, as the system gave it, with the path; but see reached().
"""

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from pkgindex.errors import StoreUnreachable, reason_of
from pkgindex.store._disk import is_local

__all__ = ["Mount", "Staging", "reached"]

# What network file systems leave behind for files that were open when they were removed (rule N1).
FOREIGN = (".nfs", ".fuse_hidden")

T = TypeVar("T")

# Seconds for which a server that starts bears with the mount's caches: GlusterFS keeps names for a second by
# default, NFS those of a folder that changes for three.
SHOWN_WITHIN = 5.0

# ext4 writes inodes by blocks of sixteen, as a rule: so many numbers apart, two are in different ones.
INODES_APART = 16

FILE_MODE = 0o640
FOLDER_MODE = 0o750


@contextmanager
def reached(root: str) -> Iterator[None]:
    """While a server opens a store there: what the system refuses ends it with StoreUnreachable."""
    try:
        yield
    except OSError as error:
        raise StoreUnreachable(
            f"{reason_of(error, root)}: check that the mount is there, writable and not full"
        ) from None


class Mount:
    """The store's root folder."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def path(self, *parts: str) -> str:
        """The absolute path of something in the store."""
        return os.path.join(self.root, *parts)

    def is_local(self) -> bool:
        """Whether the root is on a local file system, which shows what is there; unknown: no."""
        try:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return is_local(fd)
        finally:
            os.close(fd)

    def once_shown(self, look: Callable[[], T], *hidden: int) -> T:
        """What `look` returns, as soon as the mount's caches show what another server has just made or
        replaced. `hidden`: the errors by which they do not. Raises OSError, after SHOWN_WITHIN those."""
        deadline, pause = time.monotonic() + SHOWN_WITHIN, 0.05
        while True:
            try:
                return look()
            except OSError as error:
                if error.errno not in hidden or time.monotonic() >= deadline or self.is_local():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def names_once_shown(self, *folder: str) -> list[str]:
        """names() of a folder that this server or another has just made."""
        return self.once_shown(lambda: self.names(*folder), errno.ENOENT, errno.ESTALE)

    def names(self, *folder: str) -> list[str]:
        """The names in a folder opened anew, sorted, without what network file systems leave behind."""
        return sorted(n for n in self.all_names(*folder) if not n.startswith(FOREIGN))

    def all_names(self, *folder: str) -> list[str]:
        """The names in a folder opened anew, all of them. Raises NotADirectoryError for a link to one."""
        if not folder:
            return os.listdir(self.root)
        with _opened(self.path(*folder), os.O_RDONLY | os.O_DIRECTORY) as fd:
            return os.listdir(fd)

    def check_folders(self, *folders: str) -> None:
        """Raise NotADirectoryError for one of these that is there and is no folder, or a link to one."""
        for folder in folders:
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(self.path(folder)).st_mode):
                    raise NotADirectoryError(
                        errno.ENOTDIR, "not a folder (links are not followed)", self.path(folder)
                    )

    def make_folder(self, *folder: str) -> bool:
        """Make a folder unless it is there, and sync its name; whether it was made."""
        path = self.path(*folder)
        try:
            os.mkdir(path, FOLDER_MODE)
        except FileExistsError:
            return False
        self.sync_folder(*folder[:-1])
        return True

    def make_once(self, data: bytes, mode: int, *target: str) -> None:
        """Make a file whole, unless it is there: of several servers that try, link(2) lets one through.

        Its name is not synced yet. One that fails, or is killed, leaves `<target>.new-…` behind."""
        new = f"{self.path(*target)}.new-{secrets.token_hex(8)}"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        with suppress(
            FileExistsError
        ):  # another server was quicker: its file is the one that counts
            os.link(new, self.path(*target))
        os.unlink(new)

    def sync_folder(self, *folder: str) -> None:
        """fsync a folder, opened anew."""
        with _opened(self.path(*folder), os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def sync_name(self, folder: str, name: str, inode: int) -> None:
        """Make sure that a file just renamed to `folder/name` keeps that name over a power loss.

        fsync the folder and, for FUSE, the file itself; then look for the name by a path opened anew:
        if the mount's server lost its power in between, both succeed and the name is not there (X6).
        Raises FileNotFoundError then.
        """
        path = self.path(folder, name)
        with _opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
        self.sync_folder(folder)
        with _opened(self.path(folder), os.O_RDONLY | os.O_DIRECTORY) as fd:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
        if found != inode:
            raise FileNotFoundError(2, "a synced rename was undone by the mount", path)

    def sync_removal(self, folder: str, name: str) -> None:
        """Make sure that a name just taken out of `folder` stays away (X4). Raises FileExistsError."""
        self.sync_folder(folder)
        if name in self.names(folder):
            raise FileExistsError(
                17, "a synced removal was undone by the mount", self.path(folder, name)
            )

    @contextmanager
    def opened(self, *parts: str) -> Iterator[int]:
        """A descriptor to read a file by."""
        # Without waiting: a pipe of that name would keep it for ever.
        with _opened(self.path(*parts), os.O_RDONLY | os.O_NONBLOCK) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(22, "not a regular file", self.path(*parts))
            yield fd

    def read(self, *parts: str) -> bytes:
        """A file's bytes, up to the size it has when it is opened: it may grow meanwhile (rule C3)."""
        with self.opened(*parts) as fd:
            chunks = []
            left = os.fstat(fd).st_size
            while left and (chunk := os.read(fd, min(left, 1 << 24))):
                chunks.append(chunk)
                left -= len(chunk)
            return b"".join(chunks)


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _filled(fd: int, data: bytes) -> int:
    try:
        write_all(fd, data)
        os.fsync(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_near(fd: int, inodes: Collection[int]) -> bool:
    inode = os.fstat(fd).st_ino
    return any(abs(inode - other) < INODES_APART for other in inodes)


@dataclass
class Staging:
    """A writer's own directory, `staging/<epoch>/`, held open: alive until a later writer empties it."""

    mount: Mount
    epoch: int
    fd: int

    @property
    def name(self) -> str:
        """Its name below staging/."""
        return epoch_name(self.epoch)

    def create(self, name: str, data: bytes) -> int:
        """Make a file that was not there, synced. Returns a descriptor to write to it."""
        return _filled(self._made(name), data)

    def create_apart(self, name: str, data: bytes, inodes: Collection[int]) -> int:
        """As create(), but far from these inodes, if that is possible.

        ext4 without a journal syncs a file together with its inode's block, if anything there has changed:
        beside an inode that changes all the time, each fdatasync costs another write to the disk."""
        aside: list[str] = []
        fd = self._made(name)
        try:
            while len(aside) < INODES_APART and _is_near(fd, inodes):
                os.close(fd)
                spare = f"{name}-{len(aside)}"
                self.rename(name, spare)
                aside.append(spare)
                fd = self._made(name)
        finally:
            for each in aside:
                self.discard(each)
        return _filled(fd, data)

    def _made(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(name, flags, FILE_MODE, dir_fd=self.fd)

    def inodes(self, name: str) -> tuple[int, int]:
        """The inode numbers of this directory and of a file in it."""
        return os.fstat(self.fd).st_ino, os.stat(name, dir_fd=self.fd).st_ino

    def publish(self, name: str, *target: str) -> None:
        """Rename a file of this directory to its place in the store, over what may be there."""
        os.rename(name, self.mount.path(*target), src_dir_fd=self.fd)

    def take(self, name: str, *source: str) -> None:
        """Rename something of the store into this directory: how it is removed, or kept for reading."""
        os.rename(self.mount.path(*source), name, dst_dir_fd=self.fd)

    def discard(self, name: str) -> None:
        """Unlink a file of this directory: nobody else's, even for one who has been deposed."""
        os.unlink(name, dir_fd=self.fd)

    def rename(self, old: str, new: str) -> None:
        """Rename within this directory: the proof that it is still alive (rule W2)."""
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def close(self) -> None:
        """Let go of the directory; it stays, for its number must never come twice (rule C1)."""
        os.close(self.fd)


def epoch_name(epoch: int) -> str:
    """An epoch as a directory's name: fixed width, so that names sort as numbers."""
    return f"{epoch:08x}"


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write everything, over as many calls as the system takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
