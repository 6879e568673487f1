"""What a real server asks of the file system, in order, and what it tells its clients in between.

    with Recorded(store, trace) as server: ...
    recording = Recording(top)
    recording.add(server.calls())
    for operation in recording.operations: ...

strace writes down the system calls of all the server's threads; here they become operations on the
nodes of a `Disk` (crash_states.py). Descriptors are followed by their numbers, not by the paths that
strace shows, which change with each rename.

Two calls of two threads may overlap. A call has its effect when strace saw it end, a sync covers only
what had ended before it began, a descriptor is free as soon as its close began, and an answer counts as
told as soon as its write began. Each is the strict reading: what relies on more is wrong.
"""

from __future__ import annotations

import copy
import heapq
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.store.tracing import Call, Traced
from tests.torture.crash_states import ROOT, Disk, File, Item, Layout

__all__ = [
    "Heard",
    "Operation",
    "Recorded",
    "Recording",
    "SyncBegun",
    "SyncEnded",
    "Told",
    "layout_of",
    "narrowed",
    "replay",
    "without",
]

#: The calls that change what lies on a disk, or make it durable, or carry messages and answers.
CALLS = (
    "open,openat,creat,close,read,recvfrom,recvmsg,write,writev,pwrite64,pwritev,truncate,ftruncate,"
    "fallocate,unlink,unlinkat,rename,renameat,renameat2,link,linkat,mkdir,mkdirat,rmdir,fsync,"
    "fdatasync,syncfs,sync_file_range,sendto,sendmsg,dup,dup2,dup3,copy_file_range,sendfile"
)

#: What nobody uses is not understood: better to stop than to leave it out.
UNKNOWN = ("truncate", "fallocate", "sync_file_range", "copy_file_range", "sendfile")

#: Where a traced writer without a server says what it heard and told (see lives.py).
SAYING = "/dev/null"


class Recorded(Traced):
    """A server whose calls are written down whole: every byte of every string."""

    def __init__(
        self,
        store: str,
        trace: Path,
        *options: str,
        inject: Sequence[str] = (),
        mutation: str = "",
    ) -> None:
        super().__init__(store, trace, *options, calls=CALLS, inject=inject, mutation=mutation)
        self._command = whole(self._command)

    def calls(self) -> list[Call]:
        """Return the calls of the ended process, those last that its end cut off."""
        found = super().calls()
        return found + cut_off(self.trace.read_text())


def whole(command: Sequence[str]) -> list[str]:
    """The strace command with strings in full, in hexadecimal, and sockets by their addresses."""
    found = list(command)
    found[found.index("-s") + 1] = str(1 << 24)
    found[found.index("-y")] = "-yy"
    found[found.index("-s") : found.index("-s")] = ["-xx", "--seccomp-bpf"]
    return found


def cut_off(text: str) -> list[Call]:
    """The calls that began and whose end strace did not see; their result is "?"."""
    begun: dict[str, tuple[str, int]] = {}
    for place, line in enumerate(text.splitlines()):
        thread, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[thread] = (rest.removesuffix("<unfinished ...>").strip(), place)
        elif "resumed>" in rest:
            begun.pop(thread, None)
    found = []
    for rest, place in begun.values():
        name, _, arguments = rest.partition("(")
        found.append(Call(name, arguments, "?", place, place))
    return found


@dataclass(frozen=True)
class Do:
    """A call of a method of Disk."""

    method: str
    arguments: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.method}{tuple(a if not isinstance(a, bytes) else len(a) for a in self.arguments)}"


@dataclass(frozen=True)
class SyncBegun:
    """A sync began, of a node or (None) of everything."""

    number: int
    node: int | None
    path: str  # of the node then; for people and for mutants
    data: bool = True
    names: bool = True

    def __str__(self) -> str:
        return f"sync {self.number} of {self.path or 'everything'} begins"


@dataclass(frozen=True)
class SyncEnded:
    """It returned, and was successful."""

    number: int

    def __str__(self) -> str:
        return f"sync {self.number} has returned"


@dataclass(frozen=True)
class Heard:
    """Bytes came from a client."""

    client: str
    data: bytes


@dataclass(frozen=True)
class Told:
    """Bytes are on their way to a client."""

    client: str
    data: bytes

    def __str__(self) -> str:
        return f"{self.client} is told {self.data.count(10)} answers"


Operation = Do | SyncBegun | SyncEnded | Heard | Told


class NotUnderstood(AssertionError):
    """A call that this module has no operation for."""


#: The descriptor of a file that a cut-off call has made.
NO_DESCRIPTOR = 1 << 30

#: Above the numbers of any recording that another one goes on from.
SYNCS_OF_OTHERS = 1 << 32


@dataclass
class Recording:
    """What one or several processes, one after another, did below the folder `top`."""

    top: Path
    operations: list[Operation] = field(default_factory=list)
    disk: Disk = field(default_factory=Disk)  # as after all of them
    _nodes: int = 0
    _syncs: int = 0

    @classmethod
    def over(cls, top: Path, disk: Disk) -> Recording:
        """A recording that begins with what `disk` holds; it takes the disk."""
        return cls(top, disk=disk, _nodes=max(disk.nodes), _syncs=SYNCS_OF_OTHERS)

    def add(self, calls: Iterable[Call]) -> None:
        """Append what one process did, from its start to its end."""
        calls = list(calls)
        process = _Process(self, sorted_by_effect(calls))
        process.run()
        for call in calls:
            if call.result.startswith("?"):
                self._add_if_done(process, call)

    def _add_if_done(self, process: _Process, call: Call) -> None:
        """A call that the end of its process cut off has had its effect, or none: the disk tells."""
        before = copy.deepcopy((self.operations, self.disk, self._nodes, self._syncs))
        differed = len(self.differences())
        size = sum(map(len, _strings(call.arguments))) if "write" in call.name else 0
        if differed:
            with suppress(NotUnderstood):
                process.take(replace(call, result=f"{size or NO_DESCRIPTOR}"))
        if not differed or len(self.differences()) >= differed:
            self.operations, self.disk, self._nodes, self._syncs = before

    def differences(self) -> list[str]:
        """Paths where what the operations give is not what really lies below `top`."""
        seen, real = self.disk.seen(), layout_of(self.top)
        return [p for p in sorted({*seen, *real}) if seen.get(p, "") != real.get(p, "")]

    def check(self) -> None:
        """Compare what the operations give with the disk. AssertionError if they differ."""
        differs = self.differences()
        assert not differs, f"the recording and the disk differ in {differs[:5]}"

    def note(self, operation: Operation) -> None:
        """Append an operation and carry it out."""
        self.operations.append(operation)
        if isinstance(operation, Do):
            getattr(self.disk, operation.method)(*operation.arguments)

    def new_node(self) -> int:
        """A number for a node that comes."""
        self._nodes += 1
        return self._nodes

    def new_sync(self) -> int:
        """A number for a sync."""
        self._syncs += 1
        return self._syncs


def without(
    operations: Iterable[Operation],
    forgets: Callable[[SyncBegun], SyncBegun | None],
    begin: int = 0,
) -> list[Operation]:
    """The operations of a product that, from one place on, forgets some syncs: what is left of each."""
    kept: list[Operation] = []
    gone = set()
    for place, operation in enumerate(operations):
        if isinstance(operation, SyncBegun) and place >= begin:
            left = forgets(operation)
            if left is None:
                gone.add(operation.number)
            else:
                kept.append(left)
        elif not (isinstance(operation, SyncEnded) and operation.number in gone):
            kept.append(operation)
    return kept


def replay(
    disk: Disk, operations: Iterable[Operation], at: Callable[[int, Operation], None]
) -> None:
    """Carry out the operations, and call `at` after each one that changes what a crash may leave."""
    under_way: dict[int, list[Item]] = {}
    for place, operation in enumerate(operations):
        if isinstance(operation, Do):
            getattr(disk, operation.method)(*operation.arguments)
        elif isinstance(operation, SyncBegun):
            under_way[operation.number] = disk.covered(
                operation.node, data=operation.data, names=operation.names
            )
            continue
        elif isinstance(operation, SyncEnded):
            disk.settle(under_way.pop(operation.number))
        at(place, operation)


def layout_of(top: Path) -> Layout:
    """What lies below a real folder."""
    found: Layout = {}
    for folder, folders, files in os.walk(top):
        for name in folders:
            found[str((Path(folder) / name).relative_to(top))] = None
        for name in files:
            path = Path(folder) / name
            found[str(path.relative_to(top))] = path.read_bytes()
    return found


# --- from strace's lines -----------------------------------------------------------------------------

_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_CONNECTION = re.compile(r"TCP(?:v6)?:\[.*->(.*)\]|UNIX")


@dataclass(order=True)
class _Event:
    """One end of a call: what happens there."""

    place: int
    late: int  # the beginning of a line's call comes before the end of another's at the same place
    call: Call = field(compare=False)
    begins: bool = field(compare=False)


def sorted_by_effect(calls: Iterable[Call]) -> list[_Event]:
    """The beginnings and ends of calls, in order."""
    events: list[_Event] = []
    for call in calls:
        if call.succeeded and not call.result.startswith("?"):
            heapq.heappush(events, _Event(call.begun, 0, call, begins=True))
            heapq.heappush(events, _Event(call.ended, 1, call, begins=False))
    return [heapq.heappop(events) for _ in range(len(events))]


@dataclass
class _Process:
    """The descriptors of one process."""

    recording: Recording
    events: list[_Event]
    open: dict[int, int] = field(default_factory=dict)  # the node of each descriptor
    appends: dict[int, bool] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    syncs: dict[int, int] = field(default_factory=dict)  # by the place where the call began

    def run(self) -> None:
        for event in self.events:
            self._take(event.call, self._begin if event.begins else self._end)

    def take(self, call: Call) -> None:
        """A call by itself. NotUnderstood if it does not fit what is there."""
        self._take(call, self._begin)
        self._take(call, self._end)

    def _take(self, call: Call, part: Callable[[Call], None]) -> None:
        try:
            part(call)
        except (AssertionError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise NotUnderstood(f"{call}: {error!r}") from error

    def _begin(self, call: Call) -> None:
        descriptor = _descriptor(call.arguments)
        match call.name:
            case "close":
                for table in (self.open, self.appends, self.offsets):
                    table.pop(descriptor, None)
            case "fsync" | "fdatasync" if descriptor in self.open:
                self._sync(call, self.open[descriptor])
            case "syncfs" if descriptor in self.open:
                self._sync(call, None)
            case "write" | "writev" | "sendto" | "sendmsg" if peer := self._peer(call, descriptor):
                size = int(call.result.split()[0])
                self.recording.note(Told(peer, b"".join(_strings(call.arguments))[:size]))

    def _sync(self, call: Call, node: int | None) -> None:
        number = self.syncs[call.begun] = self.recording.new_sync()
        path = "" if node is None else _decoded_path(call.arguments)
        path = path.removeprefix(str(self.recording.top)).lstrip("/") or ("." if path else "")
        self.recording.note(SyncBegun(number, node, path))

    def _peer(self, call: Call, descriptor: int) -> str | None:
        if descriptor in self.open:
            return None
        if _decoded_path(call.arguments) == SAYING:
            return SAYING
        match = _CONNECTION.search(call.arguments.split(",")[0])
        return match[1] or "unix" if match else None

    def _end(self, call: Call) -> None:
        name, arguments = call.name, call.arguments
        if name in UNKNOWN:
            raise NotUnderstood(f"no operation for {call}")
        descriptor = _descriptor(arguments)
        if name in ("open", "openat", "creat"):
            self._opened(call)
        elif name in ("read", "recvfrom", "recvmsg"):
            peer = self._peer(call, descriptor)
            size = int(call.result.split()[0])
            if peer and peer != SAYING and size > 0:
                self.recording.note(Heard(peer, _strings(arguments)[0][:size]))
        elif name in ("dup", "dup2", "dup3"):
            assert descriptor not in self.open, "a second descriptor of a file of the store"
        elif name in ("fsync", "fdatasync", "syncfs"):
            if number := self.syncs.pop(call.begun, None):
                self.recording.note(SyncEnded(number))
        elif name in ("write", "writev", "pwrite64", "pwritev", "ftruncate"):
            if descriptor in self.open:
                self._written(call, descriptor)
        else:
            self._name_changed(name, self._places(arguments))

    def _name_changed(self, call: str, places: list[tuple[int, str] | None]) -> None:
        if None in places:
            assert not any(places), "into the store or out of it"
            return
        place, *targets = (one for one in places if one)
        if call.startswith("mkdir"):
            self._do("make_folder", *place, self.recording.new_node())
        elif call in ("unlink", "unlinkat", "rmdir"):
            self._do("remove", *place)
        elif call.startswith("rename"):
            self._do("rename", *place, *targets[0])
        else:
            assert call in ("link", "linkat"), "no operation for it"
            self._do("link", self.recording.disk.folder(place[0]).seen[place[1]], *targets[0])

    def _do(self, method: str, *arguments: object) -> None:
        self.recording.note(Do(method, arguments))

    def _opened(self, call: Call) -> None:
        descriptor = int(re.match(r"\d+", call.result)[0])  # type: ignore[index]
        for table in (self.appends, self.offsets):
            table.pop(descriptor, None)
        path = self._full(call.arguments)
        place = self._places(call.arguments)[0]
        if place is None:
            if path == str(self.recording.top):
                self.open[descriptor] = ROOT
            return
        folder, name = place
        disk = self.recording.disk
        node = disk.folder(folder).seen.get(name)
        if node is None:
            assert "O_CREAT" in call.arguments, "it is not there"
            node = self.recording.new_node()
            self._do("make_file", folder, name, node)
        elif "O_TRUNC" in call.arguments:
            self._do("truncate", node, 0)
        self.open[descriptor] = node
        self.appends[descriptor] = "O_APPEND" in call.arguments
        self.offsets[descriptor] = 0

    def _written(self, call: Call, descriptor: int) -> None:
        node = self.open[descriptor]
        if call.name == "ftruncate":
            self._do("truncate", node, int(call.arguments.rpartition(",")[2]))
            return
        size = int(call.result.split()[0])
        data = b"".join(_strings(call.arguments))[:size]
        assert len(data) == size, "not all of the bytes were recorded"
        file = self.recording.disk.nodes[node]
        assert isinstance(file, File)
        if call.name in ("pwrite64", "pwritev"):
            offset = int(call.arguments.rpartition(",")[2])
        else:
            offset = len(file.seen) if self.appends[descriptor] else self.offsets[descriptor]
            self.offsets[descriptor] = offset + size
        if size:
            self._do("write", node, offset, data)

    def _full(self, arguments: str) -> str:
        return _strings(arguments)[0].decode()

    def _places(self, arguments: str) -> list[tuple[int, str] | None]:
        """The (folder, name) of each path in the arguments; None for one outside, or the top itself."""
        found: list[tuple[int, str] | None] = []
        for match in re.finditer(r'(?:(AT_FDCWD|\d+)<[^>]*>, )?"((?:\\x[0-9a-f]{2})*)"', arguments):
            path = _unhexed(match[2]).decode()
            if path.startswith("/") or match[1] in (None, "AT_FDCWD"):
                inside = os.path.normpath(Path.cwd() / path)
                top = f"{self.recording.top}/"
                if not inside.startswith(top):
                    found.append(None)
                    continue
                parent, _, name = inside[len(top) :].rpartition("/")
                folder = self.recording.disk.find(parent)
                assert folder is not None, f"{parent} is not there"
            else:
                if int(match[1]) not in self.open:
                    found.append(None)
                    continue
                assert "/" not in path, "a path below a descriptor"
                folder, name = self.open[int(match[1])], path
            found.append((folder, name))
        return found or [None]


def _descriptor(arguments: str) -> int:
    match = re.match(r"(\d+)<", arguments)
    return int(match[1]) if match else -1


def _decoded_path(arguments: str) -> str:
    match = re.match(r"\d+<((?:\\x[0-9a-f]{2})*)", arguments)
    return _unhexed(match[1]).decode(errors="replace") if match else ""


def _strings(arguments: str) -> list[bytes]:
    found = []
    for match in _STRING.finditer(arguments):
        assert not match[2], "strace cut a string"
        found.append(_unhexed(match[1]))
    return found


def _unhexed(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def narrowed(sync: SyncBegun, *, data: bool, names: bool) -> SyncBegun:
    """A sync that makes only data, or only names, durable."""
    return replace(sync, data=data, names=names)
