"""Which states a power loss may leave behind: a model of a file system that holds what it must, no more.

    disk = Disk()
    disk.make_folder(ROOT, "a", 1)
    disk.make_file(1, "f", 2)
    disk.write(2, 0, b"data")
    disk.sync(2)
    for kept, layout in crash_states(disk, random.Random(1)): ...   # {"a": None, "a/f": b"data"}

The model is POSIX's, as in ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014):
until a sync that covers it has returned, a change of a file's data or of a folder's names is *volatile*:
after a power loss it may be there or not, whatever became of the others, in any order.

- fsync and fdatasync of a file make its data and size durable, and not its name;
- fsync of a folder makes its names durable, and not what they name;
- syncfs makes everything durable;
- a sync covers what had ended before it began, and holds from its return on;
- a rename is two changes, a name that comes and a name that goes. Both may be there after a power loss
  (the file has two names then); the old one is never gone without the new one being there: that
  rename(2) does not lose the file is what the store asks of a mount;
- unsynced data may be torn at the border of any sector or page, the file's size being ahead of its data.

Besides, each state is one layout, a path for each file and folder, in which two names of one file are
two files: the store tells no difference.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["PAGE", "ROOT", "Change", "Disk", "File", "Folder", "Layout", "Write", "crash_states"]

ROOT = 0

#: What lies on a disk: each path below its root, None for a folder, the bytes of a file.
Layout = dict[str, bytes | None]

SECTOR, PAGE = 512, 4096

#: So many volatile changes are tried in every combination; of more, those that crash_states() lists.
ALL_SUBSETS = 6

#: With less thoroughness, so many of the latest volatile changes are tried one by one.
LATEST = 4


@dataclass(eq=False, slots=True)
class Change:
    """A name in a folder that came, or that goes."""

    serial: int
    folder: int
    name: str
    node: int | None  # None: it goes
    requires: Change | None = None  # there too whenever this one is
    durable: bool = False


@dataclass(eq=False, slots=True)
class Write:
    """Bytes written to a file; no bytes and an offset: it was cut to that size."""

    serial: int
    file: int
    offset: int
    data: bytes | None
    durable: bool = False


Item = Change | Write


@dataclass(eq=False, slots=True)
class File:
    """A file: its bytes on stable storage, what is not there yet, and what programs see."""

    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[Write] = field(default_factory=list)
    seen: bytearray = field(default_factory=bytearray)
    snapshot: bytes | None = None  # of `synced`, while it does not change


@dataclass(eq=False, slots=True)
class Folder:
    """A folder, in the same way."""

    synced: dict[str, int] = field(default_factory=dict)
    unsynced: list[Change] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)


class Disk:
    """A file system with a power switch. Nodes are numbers that the caller gives; ROOT is there."""

    def __init__(self) -> None:
        self.nodes: dict[int, File | Folder] = {ROOT: Folder()}
        self.serial = 0

    @classmethod
    def holding(cls, layout: Layout) -> Disk:
        """A disk on which this layout is durable."""
        disk = cls()
        numbers = {"": ROOT}
        for number, path in enumerate(sorted(layout), 1):
            parent, _, name = path.rpartition("/")
            numbers[path] = number
            data = layout[path]
            folder = disk.folder(numbers[parent])
            folder.synced[name] = folder.seen[name] = number
            disk.nodes[number] = (
                Folder() if data is None else File(bytearray(data), [], bytearray(data))
            )
        return disk

    def file(self, node: int) -> File:
        """A node that must be a file."""
        found = self.nodes[node]
        assert isinstance(found, File), node
        return found

    def folder(self, node: int) -> Folder:
        """A node that must be a folder."""
        found = self.nodes[node]
        assert isinstance(found, Folder), node
        return found

    def find(self, path: str) -> int | None:
        """The node of a path below the root, as programs see it."""
        node = ROOT
        for part in path.split("/") if path else ():
            folder = self.nodes[node]
            if not isinstance(folder, Folder) or part not in folder.seen:
                return None
            node = folder.seen[part]
        return node

    # --- what programs do -------------------------------------------------------------------------

    def make_folder(self, folder: int, name: str, node: int) -> None:
        """mkdir."""
        self.nodes[node] = Folder()
        self._change(folder, name, node)

    def make_file(self, folder: int, name: str, node: int) -> None:
        """open with O_CREAT, of a name that is not there."""
        self.nodes[node] = File()
        self._change(folder, name, node)

    def write(self, node: int, offset: int, data: bytes) -> None:
        """write, at an offset; a gap before it reads as zeros."""
        file = self.file(node)
        _put(file.seen, offset, data)
        self.serial += 1
        file.unsynced.append(Write(self.serial, node, offset, data))

    def truncate(self, node: int, size: int) -> None:
        """Set a file's size."""
        file = self.file(node)
        _cut(file.seen, size)
        self.serial += 1
        file.unsynced.append(Write(self.serial, node, size, None))

    def link(self, node: int, folder: int, name: str) -> None:
        """link."""
        self._change(folder, name, node)

    def remove(self, folder: int, name: str) -> None:
        """unlink or rmdir."""
        self._change(folder, name, None)

    def rename(self, folder: int, name: str, to_folder: int, to_name: str) -> None:
        """rename, over what may be there."""
        node = self.folder(folder).seen[name]
        if self.folder(to_folder).seen.get(to_name) == node:
            return  # two names of one file: nothing happens
        came = self._change(to_folder, to_name, node)
        self._change(folder, name, None, came)

    def _change(
        self, folder: int, name: str, node: int | None, requires: Change | None = None
    ) -> Change:
        self.serial += 1
        change = Change(self.serial, folder, name, node, requires)
        where = self.folder(folder)
        where.unsynced.append(change)
        if node is None:
            del where.seen[name]
        else:
            where.seen[name] = node
        return change

    # --- what becomes durable ---------------------------------------------------------------------

    def covered(self, node: int | None, *, data: bool = True, names: bool = True) -> list[Item]:
        """What a sync of a node, or of everything, that begins now will make durable."""
        found: list[Item] = []
        for one in self.nodes.values() if node is None else (self.nodes[node],):
            if (isinstance(one, File) and data) or (isinstance(one, Folder) and names):
                found += one.unsynced
        found.sort(key=lambda item: item.serial)
        return found

    def settle(self, items: Iterable[Item]) -> None:
        """The sync that covers these, oldest first, has returned."""
        touched: set[int] = set()
        for item in items:
            if item.durable:
                continue
            if isinstance(item, Write):
                item.durable = True
                file = self.file(item.file)
                _apply(file.synced, item)
                file.snapshot = None
                touched.add(item.file)
            else:
                touched |= self._settle_change(item)
        for node in touched:
            one = self.nodes[node]
            one.unsynced = [item for item in one.unsynced if not item.durable]  # type: ignore[misc, attr-defined]

    def _settle_change(self, change: Change) -> set[int]:
        touched = {change.folder}
        if change.requires is not None and not change.requires.durable:
            touched |= self._settle_change(change.requires)
        folder = self.folder(change.folder)
        for older in folder.unsynced:  # what it stands above can no longer come up
            if older.name == change.name and older.serial <= change.serial:
                older.durable = True
        if change.node is None:
            folder.synced.pop(change.name, None)
        else:
            folder.synced[change.name] = change.node
        return touched

    def sync(self, node: int | None = None) -> None:
        """A sync that nothing happens beside: begun and returned."""
        self.settle(self.covered(node))

    def volatile(self) -> list[Item]:
        """All that a power loss may take or leave, in the order in which it was done, as far as it shows.

        What no name leads to, whatever is kept, does not."""
        reached = set()
        ahead = [ROOT]
        found: list[Item] = []
        while ahead:
            node = ahead.pop()
            if node in reached:
                continue
            reached.add(node)
            one = self.nodes[node]
            found += one.unsynced
            if isinstance(one, Folder):
                ahead += one.synced.values()
                ahead += (c.node for c in one.unsynced if c.node is not None)
        found.sort(key=lambda item: item.serial)
        return found

    # --- the states -------------------------------------------------------------------------------

    def seen(self) -> Layout:
        """The layout that programs see now."""
        return self._layout(lambda f: f.seen, lambda node, f: bytes(f.seen))

    def state(self, kept: Iterable[Item], torn: tuple[int, bytes] | None = None) -> Layout:
        """What lies there after a power loss that left just these volatile items.

        `torn`: a file's node, and the bytes that it has whatever is kept of its writes."""
        there = set(kept)
        for item in list(there):
            while isinstance(item, Change) and item.requires is not None:
                item = item.requires
                if item.durable:
                    break
                there.add(item)

        def names(folder: Folder) -> dict[str, int]:
            if not folder.unsynced:
                return folder.synced
            found = dict(folder.synced)
            for change in folder.unsynced:
                if change in there:
                    if change.node is None:
                        found.pop(change.name, None)
                    else:
                        found[change.name] = change.node
            return found

        def content(node: int, file: File) -> bytes:
            if torn is not None and torn[0] == node:
                return torn[1]
            writes = [write for write in file.unsynced if write in there]
            if writes:
                data = bytearray(file.synced)
                for write in writes:
                    _apply(data, write)
                return bytes(data)
            if file.snapshot is None:
                file.snapshot = bytes(file.synced)
            return file.snapshot

        return self._layout(names, content)

    def _layout(
        self, names: Callable[[Folder], dict[str, int]], content: Callable[[int, File], bytes]
    ) -> Layout:
        layout: Layout = {}
        ahead = [("", ROOT)]
        while ahead:
            prefix, number = ahead.pop()
            for name, node in names(self.folder(number)).items():
                path = prefix + name
                one = self.nodes[node]
                if isinstance(one, File):
                    layout[path] = content(node, one)
                else:
                    layout[path] = None
                    ahead.append((path + "/", node))
        return layout


def crash_states(
    disk: Disk, rng: random.Random, *, thorough: bool = True, varied: int | None = None
) -> Iterator[tuple[str, Layout]]:
    """The states that a power loss may leave now: what each one keeps, in words, and its layout.

    Every combination of the volatile items if they are few. Of many: none, all, each prefix and suffix
    in time, each single one, all but each one, the items of each folder and file alone and all but
    them, names without data, data without names, and random subsets. Then the torn data: each file's
    unsynced bytes cut at each border with all else there, and with none of it. The same layout may come
    twice. `thorough` off: no suffixes, prefixes and single ones among the latest items only (the others
    were latest at an earlier point), fewer combinations and random subsets. `varied`: a serial; of
    what is older all is there, or nothing, or all but the names in one folder; of what is younger all, or
    nothing."""
    items = disk.volatile()
    if varied is not None:
        yield from _varied(disk, items, varied)
        return
    for what, kept in _subsets(items, rng, thorough=thorough):
        yield what, disk.state(kept)
    for node in {item.file: None for item in items if isinstance(item, Write)}:
        names = [item for item in items if isinstance(item, Change)]
        for what, data in torn(disk.file(node), thorough=thorough):
            yield f"all, node {node} {what}", disk.state(items, (node, data))
            if thorough:
                yield f"all names, node {node} {what}", disk.state(names, (node, data))


def _subsets(
    items: list[Item], rng: random.Random, *, thorough: bool
) -> Iterator[tuple[str, Iterable[Item]]]:
    count = len(items)
    if count <= (ALL_SUBSETS if thorough else 3):
        for size in range(count + 1):
            for kept in itertools.combinations(items, size):
                yield f"{[item.serial for item in kept]}", kept
        return
    yield "nothing", ()
    yield "all", items
    latest = 0 if thorough else max(0, count - LATEST)
    for n in range(max(1, latest), count):
        yield f"the first {n}", items[:n]
        if thorough:
            yield f"the last {n}", items[n:]
    for n, item in enumerate(items[latest:], latest):
        yield f"only {item.serial}", (item,)
        yield f"all but {item.serial}", items[:n] + items[n + 1 :]
    yield from _groups(items)
    for n in range(12 if thorough else 3):
        share = rng.random()
        yield f"a random part ({n})", [item for item in items if rng.random() < share]


def _varied(disk: Disk, items: list[Item], serial: int) -> Iterator[tuple[str, Layout]]:
    older = [item for item in items if item.serial <= serial]
    younger = [item for item in items if item.serial > serial]
    for what, kept in (("nothing", []), ("all", older)):
        yield f"{what}, all that is younger", disk.state([*kept, *younger])
        yield f"{what}, nothing younger", disk.state(kept)
    names = [item for item in older if isinstance(item, Change)]
    for folder in {change.folder for change in names}:
        lost = {change for change in names if change.folder == folder}
        others = [item for item in older if item not in lost]
        yield f"all but what folder {folder} had", disk.state([*others, *younger])


def _groups(items: list[Item]) -> Iterator[tuple[str, Iterable[Item]]]:
    """The items of each folder and file, and all but them; names, and data."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.folder if isinstance(item, Change) else item.file, []).append(item)
    for node, group in groups.items():
        yield f"only node {node}'s", group
        others = set(group)
        yield f"all but node {node}'s", [item for item in items if item not in others]
    yield "names without data", [item for item in items if isinstance(item, Change)]
    yield "data without names", [item for item in items if isinstance(item, Write)]


def torn(file: File, *, thorough: bool = True) -> Iterator[tuple[str, bytes]]:
    """What a file with unsynced data may hold: its size ahead of its data, in part or whole.

    Borders are those of sectors and pages of the file, and of its writes."""
    if not file.unsynced:
        return
    data = bytes(file.seen)
    begin = min((w.offset for w in file.unsynced), default=0)
    end = max(len(data), begin)
    if len(file.synced) > len(data):  # it was cut: no bytes to tear
        return
    borders = {offset for step in (SECTOR, PAGE) for offset in range(0, end, step)}
    borders |= {w.offset for w in file.unsynced}
    if thorough:
        borders |= {begin + 1, (begin + end) // 2, end - 1}
    cuts = sorted(b for b in borders if begin < b < end)
    yield "zeros for its new data", data[:begin] + bytes(end - begin)
    for cut in cuts:
        yield f"cut at {cut}", data[:cut]
        yield f"zeros from {cut} on", data[:cut] + bytes(end - cut)
        yield f"zeros up to {cut}", data[:begin] + bytes(cut - begin) + data[cut:]
    blocks = [b for b in cuts if b % SECTOR == 0]
    for first, last in itertools.pairwise([begin, *blocks, end]):
        yield f"zeros for {first}-{last}", data[:first] + bytes(last - first) + data[last:]


def _apply(data: bytearray, write: Write) -> None:
    if write.data is None:
        _cut(data, write.offset)
    else:
        _put(data, write.offset, write.data)


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


def _cut(data: bytearray, size: int) -> None:
    del data[size:]
    if len(data) < size:
        data.extend(bytes(size - len(data)))
