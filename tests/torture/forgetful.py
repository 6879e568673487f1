"""A small FUSE file system that forgets, when it is told to, all that was not fsynced: a power loss.

    python -m tests.torture.forgetful MOUNT          # power_disks.py starts it so

It stands on the model of crash_states.py: a `Disk` holds what programs see and what is durable, and
`forget` puts one of the states that it allows in its place. The kernel is told to keep nothing in its
caches, so each call comes here. To the store this is FUSE: it takes its careful path, for syncfs
promises nothing here.

On standard input it is told, a line each and each answered by a number:

    cut             every call fails with EIO from now on
    forget          power is back, and nothing that was not synced is left; answers how much there was
    forget 17       the same, but a random part of it is left, chosen by this seed

It ends, and unmounts, with its input.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
from typing import Any

try:
    import pyfuse3
    import trio
except ImportError:  # then nothing here is ever called: see power_disks.py
    pyfuse3 = trio = None

from tests.torture.crash_states import PAGE, ROOT, Disk, Folder

#: Seconds for a sync: while one is under way its data is volatile, and so is what is written beside it.
LONGEST_SYNC = 0.005


class FileSystem(pyfuse3.Operations if pyfuse3 else object):
    """What the kernel asks, answered from a Disk. Inodes are its nodes' numbers, the root's one more."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.shift = 0  # nodes of disks before this one: a number never comes twice
        self.next = ROOT + 1
        self.cut = False
        self.listed: dict[int, list[tuple[str, int]]] = {}  # folders as they were when opened
        self.slow = random.Random()

    def fail(self, number: int) -> Any:
        return pyfuse3.FUSEError(number)

    def node(self, inode: int) -> int:
        """The node of an inode; EIO without power, ESTALE for one of before the power loss."""
        if self.cut:
            raise self.fail(errno.EIO)
        node = ROOT if inode == pyfuse3.ROOT_INODE else inode - 1 - self.shift
        if node not in self.disk.nodes:
            raise self.fail(errno.ESTALE)
        return node

    def inode(self, node: int) -> int:
        return int(pyfuse3.ROOT_INODE) if node == ROOT else node + 1 + self.shift

    def new(self) -> int:
        self.next += 1
        return self.next

    def child(self, parent: int, name: bytes) -> int:
        found = self.disk.folder(self.node(parent)).seen.get(os.fsdecode(name))
        if found is None:
            raise self.fail(errno.ENOENT)
        return found

    def attributes(self, node: int) -> Any:
        one = self.disk.nodes[node]
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self.inode(node)
        is_folder = isinstance(one, Folder)
        entry.st_mode = stat.S_IFDIR | 0o755 if is_folder else stat.S_IFREG | 0o644
        entry.st_nlink = 1
        entry.st_size = len(one.seen)
        entry.st_blksize = 4096
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self.attributes(self.node(inode))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        node = self.node(inode)
        if fields.update_size:
            self.disk.truncate(node, attr.st_size)
        return self.attributes(node)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        return self.attributes(self.child(parent_inode, name))

    async def forget(self, inode_list: Any) -> None:
        pass

    async def opendir(self, inode: int, ctx: Any) -> int:
        node = self.node(inode)
        self.listed[inode] = sorted(self.disk.folder(node).seen.items())
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if start_id == 0:
            self.listed[fh] = sorted(self.disk.folder(self.node(fh)).seen.items())
        for place, (name, node) in enumerate(self.listed[fh][start_id:], start_id + 1):
            if node in self.disk.nodes and not pyfuse3.readdir_reply(
                token, os.fsencode(name), self.attributes(node), place
            ):
                break

    async def releasedir(self, fh: int) -> None:
        pass

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        node = self.node(inode)
        if flags & os.O_TRUNC:
            self.disk.truncate(node, 0)
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        folder = self.node(parent_inode)
        node = self.disk.folder(folder).seen.get(os.fsdecode(name))
        if node is None:
            node = self.new()
            self.disk.make_file(folder, os.fsdecode(name), node)
        elif flags & os.O_EXCL:
            raise self.fail(errno.EEXIST)
        entry = self.attributes(node)
        return pyfuse3.FileInfo(fh=self.inode(node), direct_io=True), entry

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self.disk.file(self.node(fh)).seen[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        node, data = self.node(fh), bytes(buf)
        begin = 0
        while begin < len(data):  # each page that it touches may be lost by itself
            end = begin + PAGE - (off + begin) % PAGE
            self.disk.write(node, off + begin, data[begin:end])
            begin = end
        return len(data)

    async def release(self, fh: int) -> None:
        pass

    async def flush(self, fh: int) -> None:
        self.node(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        disk, covered = self.disk, self.disk.covered(self.node(fh))
        await trio.sleep(self.slow.uniform(0, LONGEST_SYNC))
        if self.cut or self.disk is not disk:
            raise self.fail(errno.EIO)
        disk.settle(covered)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fsync(fh, datasync)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        folder = self.node(parent_inode)
        if os.fsdecode(name) in self.disk.folder(folder).seen:
            raise self.fail(errno.EEXIST)
        node = self.new()
        self.disk.make_folder(folder, os.fsdecode(name), node)
        return self.attributes(node)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self.child(parent_inode, name)
        self.disk.remove(self.node(parent_inode), os.fsdecode(name))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        if self.disk.folder(self.child(parent_inode, name)).seen:
            raise self.fail(errno.ENOTEMPTY)
        self.disk.remove(self.node(parent_inode), os.fsdecode(name))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        self.child(parent_inode_old, name_old)
        self.disk.rename(
            self.node(parent_inode_old),
            os.fsdecode(name_old),
            self.node(parent_inode_new),
            os.fsdecode(name_new),
        )

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        node, folder = self.node(inode), self.node(new_parent_inode)
        if os.fsdecode(new_name) in self.disk.folder(folder).seen:
            raise self.fail(errno.EEXIST)
        self.disk.link(node, folder, os.fsdecode(new_name))
        return self.attributes(node)

    async def statfs(self, ctx: Any) -> Any:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = found.f_bfree = found.f_bavail = 1 << 20
        found.f_files = found.f_ffree = found.f_favail = 1 << 20
        found.f_namemax = 255
        return found

    def told(self, line: str) -> str:
        """Do what the one who mounted it says."""
        what, _, seed = line.partition(" ")
        if what == "cut":
            self.cut = True
            return "0"
        items = self.disk.volatile()
        rng = random.Random(int(seed)) if seed else None
        share = rng.random() if rng else 0.0
        kept = [item for item in items if rng and rng.random() < share]
        layout = self.disk.state(kept)
        self.shift += self.next
        self.disk = Disk.holding(layout)
        self.next = max(self.disk.nodes)
        self.listed.clear()
        self.cut = False
        return str(len(items))


async def obey(system: FileSystem) -> None:
    """Do what standard input says, until it ends."""
    buffer = b""
    async for data in trio.lowlevel.FdStream(os.dup(0)):
        buffer += data
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            os.write(1, system.told(line.decode()).encode() + b"\n")
    pyfuse3.terminate()


async def serve(mount: str) -> None:
    """Mount, serve until standard input ends, unmount."""
    system = FileSystem()
    options = {*pyfuse3.default_options, "fsname=forgetful"} - {"default_permissions"}
    pyfuse3.init(system, mount, options)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, system)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
