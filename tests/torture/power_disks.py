"""Real file systems that lose their power when told to: what was not synced is gone, or may be.

    with Ext4(folder) as disk:           # or Forgetful(folder), Cached(folder)
        ...                              # a server uses disk.mount
        disk.cut()                       # from now on every call fails
        ...                              # it has ended
        disk.restore(seed)               # the power is back: what is there is what a power loss leaves

- `Ext4`: an image on a loop device, shut down by EXT4_IOC_SHUTDOWN without a flush of its log; its own
  journal is replayed by the next mount. The store sees a local file system, on which it uses syncfs.
- `Forgetful`: the FUSE file system of forgetful.py, which keeps nothing but what POSIX makes it keep.
  The store sees FUSE, and takes its careful path.
- `Cached`: ext4 on a disk with a volatile cache: its image is a file on a `Forgetful`, which keeps what was
  flushed and, of the blocks written since, any part or nothing. As with dm-log-writes and dm-flakey, ext4's
  own order of writes and flushes is then what the store stands on. The store sees a local file system.

`FORGETS` are what LD_PRELOAD makes of a product that leaves out syncs (power_shim.c).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol, Self

from tests.torture.gluster import GUARD

__all__ = ["Cached", "Ext4", "Forgetful", "PoweredDisk", "shim"]

PATIENCE = 20.0

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), of linux/ext4.h
NOLOGFLUSH = 2

IMAGE_BYTES = 256 << 20
CACHED_BYTES = 64 << 20  # held in memory
CACHED_FILES = 16_000


class PoweredDisk(Protocol):
    """A mounted file system with a power switch."""

    mount: Path

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def cut(self) -> None:
        """Cut the power: every call fails from now on."""

    def restore(self, seed: int | None) -> int:
        """Bring it back, once nobody uses it. With a seed a random part of what was volatile is left
        where that can be chosen. How much was volatile, as far as it is known."""


class Ext4:
    """An ext4 image on a loop device."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "mount"
        self._image = folder / "image"

    @staticmethod
    def why_not() -> str | None:
        """Why this machine cannot have one; None if it can."""
        if os.geteuid() != 0:
            return "mounting needs root"
        for tool in ("mkfs.ext4", "mount", "umount"):
            if shutil.which(tool) is None:
                return f"{tool} is not installed"
        if not Path("/dev/loop-control").exists():
            return "there are no loop devices (/dev/loop-control)"
        return None

    def __enter__(self) -> Self:
        self.mount.mkdir(parents=True)
        with self._image.open("wb") as image:
            image.truncate(IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()
        self._guard = _guard(self.mount)
        return self

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self.mount):
            _unmount(self.mount)
        _let_go(self._guard)
        self._image.unlink()

    def cut(self) -> None:
        """See PoweredDisk. The kernel's own caches go with the next unmount."""
        fd = os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(fd)

    def restore(self, seed: int | None) -> int:
        """See PoweredDisk. The seed changes nothing: what the kernel had written back is left."""
        _unmount(self.mount)
        self._mount()
        return 0

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.mount))


class Forgetful:
    """The FUSE file system of forgetful.py."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "mount"

    @staticmethod
    def why_not() -> str | None:
        """Why this machine cannot have one; None if it can."""
        if importlib.util.find_spec("pyfuse3") is None:
            return "pyfuse3 is not installed (the extra `torture`, and Debian's libfuse3-dev)"
        try:
            os.close(os.open("/dev/fuse", os.O_RDWR))
        except OSError as error:
            return f"/dev/fuse: {error.strerror}"
        return None if os.geteuid() == 0 else "mounting needs root"

    def __enter__(self) -> Self:
        self.mount.mkdir(parents=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.forgetful", str(self.mount)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        while not os.path.ismount(self.mount):
            assert self._process.poll() is None, "the file system ended"
            assert time.monotonic() < deadline, "the file system is not mounted"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            _run("umount", "-l", str(self.mount))
        self._process.stdout.close()

    def cut(self) -> None:
        """See PoweredDisk."""
        self._tell("cut")

    def restore(self, seed: int | None) -> int:
        """See PoweredDisk."""
        return int(self._tell("forget" if seed is None else f"forget {seed}"))

    def _tell(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the file system ended"
        return answer.strip()


class Cached:
    """An ext4 whose disk is a file of a forgetful file system."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "mount"
        self._beneath = Forgetful(folder / "disk")
        self._image = self._beneath.mount / "image"

    @staticmethod
    def why_not() -> str | None:
        """Why this machine cannot have one; None if it can."""
        return Ext4.why_not() or Forgetful.why_not()

    def __enter__(self) -> Self:
        self.mount.mkdir(parents=True)
        self._beneath.__enter__()
        self._guard = _guard(self.mount, self._beneath.mount)
        with self._image.open("wb") as image:
            image.truncate(CACHED_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-N", str(CACHED_FILES), str(self._image))
        for path in (self._image, self._beneath.mount):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self.mount):
            _unmount(self.mount)
        self._beneath.__exit__()
        _let_go(self._guard)

    def cut(self) -> None:
        """See PoweredDisk."""
        self._beneath.cut()

    def restore(self, seed: int | None) -> int:
        """See PoweredDisk: how many blocks were written and not flushed."""
        _unmount(self.mount)
        lost = self._beneath.restore(seed)
        self._mount()
        return lost

    def _mount(self) -> None:
        _run("mount", "-o", "loop,noinit_itable", str(self._image), str(self.mount))


def _guard(*mounts: Path) -> subprocess.Popen[bytes]:
    """See to it that nothing stays mounted, whatever becomes of this process."""
    guard = subprocess.Popen(["sh", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    guard.stdin.write("".join(f"{mount}\n" for mount in mounts).encode())
    guard.stdin.flush()
    return guard


def _let_go(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait()


def shim(folder: Path) -> Path | None:
    """Build the library that makes a server leave out syncs; None without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "power_shim.so"
    source = Path(__file__).with_name("power_shim.c")
    _run(compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


def _unmount(mount: Path) -> None:
    """Unmount, once nobody is in it: a process that another thread has just forked may be, for a moment."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _run("umount", str(mount))
        except AssertionError as error:
            if "busy" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
