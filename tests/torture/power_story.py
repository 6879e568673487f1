"""A server's lives, written down: all that the store ever does, and what its clients were told meanwhile.

    story = tell(folder, careful=False)
    story.allowed(told, heard)

Five lives walk all of the store's operations: the first start in an absent folder; commits of one change
and of many, more than a page long; rounds, with commits while they are written; the journal's rotation
and removal; packages removed again; a clean stop; a takeover after it; a death with a journal to replay; a
takeover of the dead, and a death in the middle of its round; a death in the middle of a start; a start
after that, and a stop at once. `careful`: as on a mount where syncfs promises nothing.

A second client asks, while the first one's change is under way, whether it is there: what it was told
must be true after the crash too.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.reference import Model
from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import nothing_is_behind
from tests.torture.crash_states import Disk, Layout
from tests.torture.operations import Heard, Operation, Recorded, Recording, Told, layout_of
from tests.torture.power_recovery import STORE, canonical

__all__ = ["Progress", "Story", "tell", "tell_of_a_large_file"]

PATIENCE = 30.0

#: The product takes the path of NFS and FUSE: each file and folder synced by itself.
CAREFUL = """
import pkgindex.store.journal, pkgindex.store.packages, pkgindex.store.recovery
for module in (pkgindex.store.journal, pkgindex.store.packages, pkgindex.store.recovery):
    module.is_local = lambda fd: False
"""


#: A snapshot in each round, and so the journal cut in each, which otherwise only a long one is.
EAGER = """
import pkgindex.store.packages
pkgindex.store.packages.SNAPSHOT_JOURNAL_BYTES = 1
"""


@dataclass
class Progress:
    """How many of the story's messages a crash point has seen heard and answered."""

    heard: int = 0
    told: int = 0
    revealed: int = 0  # a QUERY's answer has shown the state after so many messages, or a later one


@dataclass
class Story:
    """What was recorded, and what each message made of the index."""

    name: str
    before: Layout  # what lay there, durable, when it began
    operations: list[Operation]
    states: list[str]  # the index after so many messages, in canonical form
    asked: dict[bytes, int]  # QUERYs of the second client: the message whose change each asks after
    disk: Disk = field(default_factory=Disk)  # after it all, with what is volatile

    def __post_init__(self) -> None:
        self.places: dict[str, list[int]] = {}
        for number, state in enumerate(self.states):
            self.places.setdefault(state, []).append(number)

    def follow(self, progress: dict[str, Progress], operation: Operation) -> None:
        """Take an operation into account; `progress` is the caller's, {} at the beginning."""
        if not isinstance(operation, (Heard, Told)):
            return
        mine = progress.setdefault("", Progress())
        one = progress.setdefault(operation.client, Progress())
        if isinstance(operation, Heard):
            is_asking = operation.data.startswith(b"QUERY")
            if is_asking:
                one.revealed = self.asked[operation.data]
            else:
                mine.heard += operation.data.count(b"\n")
        elif one.revealed:
            if operation.data == b"OK\n":
                mine.revealed = max(mine.revealed, one.revealed)
        else:
            mine.told += operation.data.count(b"\n")

    def explains(self, index: str, told: int, heard: int) -> bool:
        """Whether this is the index after at least `told` and at most `heard` messages."""
        return any(told <= place <= heard for place in self.places.get(index, ()))


@dataclass
class _Teller:
    """Whoever makes a story: the recording, and the messages so far."""

    folder: Path
    careful: bool
    recording: Recording
    lives: int = 0
    model: Model = field(default_factory=Model)
    states: list[str] = field(default_factory=list)
    asked: dict[bytes, int] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.recording.top / STORE

    def note(self) -> None:
        """Remember the index as it is now, after so many messages."""
        index = {
            name.decode(): [d.decode() for d in ds] for name, ds in self.model.packages.items()
        }
        self.states.append(canonical(index))

    @contextmanager
    def life(
        self, *options: str, inject: tuple[str, ...] = (), eager: bool = True
    ) -> Iterator[Recorded]:
        """One life of the server; it is added to the recording once it has ended."""
        self.lives += 1
        trace = self.folder / f"trace-{self.lives}"
        server = Recorded(
            f"file:{self.store}", trace, *options, inject=inject,
            mutation=(EAGER if eager else "") + (CAREFUL if self.careful else ""),
        )  # fmt: skip
        try:
            yield server
            self.recording.add(server.calls())
        finally:
            with suppress(AssertionError):
                server.__exit__(None, None, None)
        trace.unlink()
        self.recording.check()

    def ask(self, wire: Wire, *lines: str) -> None:
        """Send messages as one pipeline and hear all their answers, which are known beforehand."""
        expected = [self._expect(line) for line in lines]
        assert wire.ask_all(line.encode() for line in lines) == expected, lines

    def ask_and_watch(self, wire: Wire, watcher: Wire, package: str) -> None:
        """Index a new package, while another client asks after it."""
        line = f"INDEX|{package}|"
        query = f"QUERY|{package}|".encode()
        expected = self._expect(line)
        self.asked[query + b"\n"] = len(self.states) - 1
        wire.send(line.encode() + b"\n")
        assert watcher.ask(query) in (b"OK\n", b"FAIL\n")
        assert wire.receive() == [expected]

    def _expect(self, line: str) -> bytes:
        reply = self.model.apply(line.encode())
        self.note()
        return reply

    def segments(self) -> set[str]:
        """The journal's segments now."""
        return {path.name for path in (self.store / "journal").iterdir()}

    def wait_for(self, what: str, seen: Callable[[], bool]) -> None:
        """Wait until this is so on the disk. AssertionError if it never is."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.002)

    def wait_for_a_round(self) -> None:
        """Wait until a round has written all that was changed."""
        self.wait_for("the end of a round", lambda: nothing_is_behind(self.store))


def tell(folder: Path, *, careful: bool) -> Story:
    """Record the five lives below `folder`, which is empty."""
    top = folder / "disk"
    top.mkdir(parents=True)
    teller = _Teller(folder, careful, Recording(top.resolve()))
    teller.note()
    for life in (_first, _after_a_stop, _of_the_dead, _in_a_start, _last):
        life(teller)
    return Story(
        "careful" if careful else "local", {}, teller.recording.operations, teller.states,
        teller.asked, teller.recording.disk,
    )  # fmt: skip


LONG = "l" * 220  # the name of its file is a digest

#: Two of them whose files lie in one folder would be luck: these are chosen to be encoded, cut, alike.
NAMES = ("zlib", "GTK+", "@scope/pkg", LONG, "perl(Foo::Bar)")


def _first(teller: _Teller) -> None:
    with teller.life() as server:
        server.start()
        with Wire(server.address) as wire, Wire(server.address) as watcher:
            for name in NAMES[:2]:
                teller.ask(wire, f"INDEX|{name}|")
            teller.ask(
                wire,
                f"INDEX|{LONG}|zlib",
                "INDEX|early|missing",
                f"INDEX|@scope/pkg|GTK+,{LONG}",
                "REMOVE|zlib|",
                "INDEX|short|zlib",
                "REMOVE|short|",
            )
            teller.ask_and_watch(wire, watcher, "seen-1")
            # More than a page in one batch, that is: in one write.
            lists = ("zlib", f"zlib,{LONG}", f"GTK+,{LONG},@scope/pkg", "")
            teller.ask(wire, *(f"INDEX|perl(Foo::Bar)|{lists[n % 4]}" for n in range(35)))
            # Commits while a round is written.
            before = teller.segments()
            for n in range(12):
                teller.ask(wire, f"INDEX|perl(Foo::Bar)|{lists[n % 3]}")
                if n == 6:
                    teller.wait_for("a round", lambda: before != teller.segments())
            teller.wait_for_a_round()
            teller.ask_and_watch(wire, watcher, "seen-2")
            # Packages are removed and lose dependents: their files go.
            teller.ask(wire, "REMOVE|perl(Foo::Bar)|", "REMOVE|@scope/pkg|", f"INDEX|{LONG}|")
            teller.ask(wire, "INDEX|@scope/pkg|seen-1")
            teller.wait_for_a_round()
            teller.ask(wire, "INDEX|at-the-stop|zlib,seen-2")
        assert server.stop() == 0


def _after_a_stop(teller: _Teller) -> None:
    with teller.life() as server:
        server.start()
        with Wire(server.address) as wire, Wire(server.address) as watcher:
            teller.ask(wire, "REMOVE|at-the-stop|", "INDEX|of-the-second|zlib")
            teller.ask_and_watch(wire, watcher, "seen-3")
            teller.ask(wire, "INDEX|@scope/pkg|seen-3,seen-2")
        server.stop(signal.SIGKILL)  # it alone: strace writes down its end


def _of_the_dead(teller: _Teller) -> None:
    # It dies at the entry of a rename in the middle of its second round.
    with teller.life(inject=("renameat:error=EIO:signal=KILL:when=14+",)) as server:
        server.start()
        with Wire(server.address) as wire, Wire(server.address) as watcher:
            teller.ask(wire, "INDEX|of-the-third|of-the-second")
            teller.wait_for_a_round()
            teller.ask_and_watch(wire, watcher, "seen-4")
            teller.ask(
                wire, "REMOVE|of-the-third|", "INDEX|again|@scope/pkg,seen-1,seen-2", "INDEX|of-the-second|"
            )  # fmt: skip
        server.wait(PATIENCE)


def _in_a_start(teller: _Teller) -> None:
    with (
        teller.life(inject=("fsync:error=EIO:signal=KILL:when=6+",)) as server,
        suppress(ServerFailed),
    ):
        server.start()
        server.wait(PATIENCE)


def _last(teller: _Teller) -> None:
    with teller.life() as server:
        server.start()
        with Wire(server.address) as wire:
            teller.ask(wire, "INDEX|of-the-fifth|again")
        assert server.stop() == 0
    with teller.life() as server:
        server.start()
        assert server.stop() == 0


LARGE = 4096  # dependents from which on a reverse file is owed rather than written each round


def tell_of_a_large_file(folder: Path) -> Story:
    """Record a life in which a reverse file with many dependents is owed, and at last written."""
    top = folder / "disk"
    top.mkdir(parents=True)
    teller = _Teller(folder, False, Recording(top.resolve()))
    with Server(f"file:{teller.store}") as server, Wire(server.address) as wire:
        lines = ["INDEX|base|", *(f"INDEX|p{n}|base" for n in range(LARGE))]
        for line in lines:
            teller.model.apply(line.encode())
        wire.ask_all(line.encode() for line in lines)
        assert server.stop() == 0
    teller.note()
    before = layout_of(top)
    teller.recording = Recording.over(teller.recording.top, Disk.holding(before))
    with teller.life() as server:
        server.start()
        with Wire(server.address) as wire:
            teller.ask(wire, "INDEX|one-more|base")
            teller.wait_for_a_round()  # it is written at once, after a start
            teller.ask(wire, "INDEX|two-more|base,one-more")
            teller.wait_for_a_round()  # and now it is owed: named in the head of the next segment
        server.stop(signal.SIGKILL)  # it alone: strace writes down its end
    with teller.life() as server:
        server.start()
        with Wire(server.address) as wire:
            teller.ask(wire, "REMOVE|two-more|")
        assert server.stop() == 0  # what is owed is written
    return Story(
        "a large reverse file", before, teller.recording.operations, teller.states, {},
        teller.recording.disk,
    )  # fmt: skip
