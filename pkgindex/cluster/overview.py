"""How all servers of a store are, seen from outside: from the mount, and from each member that answers.

Bounded in time, whatever hangs. The mount is read by a child process, for what waits for a mount may not
even be killed, and a process does not end before its last thread does; the child is left behind. Members
are asked at once, each in a thread. One that does not answer is watched on the mount, to tell a server
that is gone from one that only cannot be reached from here.

Nothing is written. Errors: StoreUnreachable, ConfigError, StoreDamaged, UnknownFormat.
"""

import json
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

from pkgindex.cluster import frames
from pkgindex.cluster.client import NoAnswer, ask
from pkgindex.cluster.members import FOLDER, Member, Members, Role, Seen
from pkgindex.cluster.takeover import BEATS
from pkgindex.cluster.trust import secret_of
from pkgindex.errors import StoreUnreachable, reason_of
from pkgindex.store import format as store_format
from pkgindex.store.claim import highest_epoch, owner_of
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount

__all__ = ["GONE", "UNREACHABLE", "Found", "MountSeen", "Overview", "survey"]

LOOK_SECONDS = 0.1
LEAST_SECONDS = 0.5  # for a look at all

# Instead of a role, of a member that does not answer: its file on the mount has not changed, or has.
GONE, UNREACHABLE = "gone", "unreachable"


TROUBLES: dict[str, str] = {
    Role.CLAIMING: "it takes over, or has found nobody to follow yet",
    Role.HUNG: "its mount does not answer",
}

# --- the mount ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MountSeen:
    """What the mount has to say."""

    secret: bytes
    store: str  # the id in FORMAT
    epoch: int  # the highest that was claimed
    owner: str  # of that epoch: process, host, since when
    locked: bool  # whether its process seems to be there
    members: list[Seen]


class _Watch:
    """A child process that looks at the mount again and again, while this is entered."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __enter__(self) -> Self:
        self._pipe, other = multiprocessing.Pipe(duplex=False)
        self._child = os.fork()
        if not self._child:
            self._pipe.close()
            _watch(self._root, other)
        other.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, os.WNOHANG)  # not for long: it may hang on the mount

    def first(self, deadline: float) -> MountSeen:
        """What is there now. Raises as told above."""
        seen = self._receive(deadline)
        if seen is None:
            raise StoreUnreachable(f"{self._root}: the mount does not answer in time")
        assert isinstance(seen, MountSeen)
        return seen

    def again(self, deadline: float) -> list[Seen]:
        """The members' files as they are a little later; none if that is not to be known."""
        with suppress(StoreUnreachable):
            seen = self._receive(deadline)
            if isinstance(seen, list):
                return seen
        return []

    def _receive(self, deadline: float) -> Any:
        with suppress(EOFError):
            if self._pipe.poll(max(0.0, deadline - time.monotonic())):
                seen = self._pipe.recv()
                if isinstance(seen, Exception):
                    raise seen
                return seen
        return None


def _watch(root: str, pipe: Connection) -> None:
    """In the child: look until nobody listens."""
    # Whoever reads this command's output to its end must not wait for what hangs here.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    try:
        mount = Mount(root)
        members = Members(mount, "")
        pipe.send(_first(mount, members))
        while True:
            time.sleep(LOOK_SECONDS)
            pipe.send(members.look(time.monotonic()))
    except BrokenPipeError:
        pass
    except Exception as error:  # noqa: BLE001  # it is raised in the parent
        if isinstance(error, OSError):
            error = StoreUnreachable(reason_of(error, root))
        with suppress(OSError):
            pipe.send(error)
    os._exit(0)


def _first(mount: Mount, members: Members) -> MountSeen:
    mount.check_folders(*store_format.FOLDERS, FOLDER)
    fmt = store_format.read(mount)
    if fmt is None:
        raise StoreUnreachable(f"{mount.root}: no pkgindex store (it has no FORMAT)")
    secret = secret_of(mount, make=False)
    epoch = highest_epoch(mount)
    locked = False
    if "LOCK" in mount.names():
        with Lease(mount, for_reading=True) as lease:
            locked = lease.is_held(epoch)
    seen = members.look(time.monotonic())
    return MountSeen(secret, fmt.id, epoch, str(owner_of(mount, epoch)), locked, seen)


# --- the members ----------------------------------------------------------------------------------


@dataclass
class Found:
    """A member, by its own word or else by its file."""

    id: str
    cluster: str
    data: list[str]
    role: str  # one of Role, or GONE, or UNREACHABLE
    epoch: int
    position: int  # of its last durable change
    version: str
    current: bool = False  # it writes, or follows with a whole index
    lag_changes: int | None = None
    lag_seconds: float | None = None
    unsent_bytes: int | None = None  # that the writer could not send it yet
    unanswered: int | None = None  # messages of its clients
    problem: str = ""
    said: dict[str, Any] = field(default_factory=dict, repr=False)  # all of what it answered

    @property
    def answers(self) -> bool:
        """Whether it said so itself."""
        return bool(self.said)

    @classmethod
    def by_word(cls, said: dict[str, Any]) -> Self:
        """Raises KeyError if it said less than is needed."""
        own = said["self"]
        names = ("id", "cluster", "data", "role", "epoch", "position", "version")
        found = cls(*(own[name] for name in names))
        found.said = said
        found.current = bool(own["current"])
        found.unanswered = own["unanswered"]
        return found

    @classmethod
    def by_file(cls, member: Member, role: str, problem: str = "") -> Self:
        """As its file says, but for the role."""
        return cls(
            member.id,
            member.cluster,
            list(member.data),
            role,
            member.epoch,
            member.change,
            member.version,
            problem=problem,
        )

    def trouble(self, max_lag: float) -> str:
        """What is not as it should be, if anything is not."""
        if self.problem:
            return self.problem
        if self.role in TROUBLES:
            return TROUBLES[self.role]
        if not self.current:
            return "it has no whole copy of the index yet"
        if self.lag_seconds is not None and self.lag_seconds > max_lag:
            return f"it is {self.lag_seconds:.1f} s behind"
        return ""


@dataclass
class Overview:
    """All of it."""

    mount: MountSeen
    members: list[Found]
    writer: Found | None

    @property
    def epoch(self) -> int:
        """The newest reign."""
        return max(self.mount.epoch, self.writer.epoch if self.writer else 0)

    def troubles(self, max_lag: float) -> list[str]:
        """What is not as it should be, a line each. `max_lag`: seconds that a follower may be behind."""
        found: list[str] = []
        if self.writer is None:
            holder = f"; its lock is held by {self.mount.owner}" if self.mount.locked else ""
            found.append(f"no server writes{holder}")
        elif self.mount.epoch > self.writer.epoch:
            found.append(f"it is being taken over by {self.mount.owner}")
        told = ((member.cluster, member.trouble(max_lag)) for member in self.members)
        return found + [f"{cluster}: {trouble}" for cluster, trouble in told if trouble]


def survey(root: str, seconds: float, only: str = "") -> Overview:
    """Look at the mount and ask every member, or the one at `only`; at most `seconds` in all.

    While servers live and none of them writes, again: most such moments are short."""
    deadline = time.monotonic() + seconds
    while True:
        overview = _survey(root, max(LEAST_SECONDS, deadline - time.monotonic()), only)
        is_over = overview.writer or not any(member.answers for member in overview.members)
        if is_over or time.monotonic() + LEAST_SECONDS > deadline:
            return overview
        time.sleep(LOOK_SECONDS)


def _survey(root: str, seconds: float, only: str) -> Overview:
    began = time.monotonic()
    deadline = began + seconds
    with _Watch(root) as watch:
        mount = watch.first(deadline)
        files = {seen.member.id: seen.member for seen in mount.members}
        addresses = {only} if only else {member.cluster for member in files.values()}
        answers = _Answers(addresses, mount, deadline)
        beating: set[str] = set()
        while not answers.wait(LOOK_SECONDS) or _missing(files, answers, beating, only):
            now = time.monotonic()
            if now >= deadline or now - began >= answers.patience:
                break
            for seen in watch.again(deadline):
                known = files.get(seen.member.id)
                if known is not None and known.beat != seen.member.beat:
                    beating.add(known.id)
    return _put_together(mount, files, answers, beating, only)


def _missing(
    files: dict[str, Member], answers: "_Answers", beating: set[str], only: str
) -> set[str]:
    """The members about which nothing is known yet but that they do not answer."""
    known = {found.cluster for found in answers.found.values()}
    return {
        member.id
        for member in files.values()
        if member.id not in beating and member.cluster not in known and only in ("", member.cluster)
    }


class _Answers:
    """Members that are being asked, all at once."""

    def __init__(self, addresses: set[str], mount: MountSeen, deadline: float) -> None:
        self.found: dict[str, Found] = {}  # by id
        self.silent: dict[str, str] = dict.fromkeys(addresses, "none in time")  # by address: why
        self._due = len(addresses)
        self._queue: queue.SimpleQueue[tuple[str, Found | str]] = queue.SimpleQueue()
        for address in addresses:
            seconds = max(0.1, deadline - time.monotonic())
            threading.Thread(target=self._ask, args=(address, mount, seconds), daemon=True).start()

    def _ask(self, address: str, mount: MountSeen, seconds: float) -> None:
        answer: Found | str
        try:
            said = ask(address, mount.secret, mount.store, frames.Status(), seconds)
            if not isinstance(said, frames.State):
                raise NoAnswer(f"it said {type(said).__name__.upper()}")
            answer = Found.by_word(json.loads(said.text))
        except NoAnswer as error:
            answer = str(error)
        except (ValueError, KeyError, TypeError) as error:
            answer = f"its answer is not understood: {error!r}"
        self._queue.put((address, answer))

    def wait(self, seconds: float) -> bool:
        """Wait so long for answers; whether all are there."""
        deadline = time.monotonic() + seconds
        while self._due:
            try:
                left = max(0.0, deadline - time.monotonic())
                address, answer = self._queue.get(timeout=left)
            except queue.Empty:
                return False
            self._due -= 1
            if isinstance(answer, Found):
                self.found[answer.id] = answer
                del self.silent[address]
            else:
                self.silent[address] = answer
        return True

    @property
    def patience(self) -> float:
        """Seconds in which a member that lives has certainly written its file again."""
        after = [found.said["self"].get("takeover_after", 0.0) for found in self.found.values()]
        return 2 * max(after) / BEATS + 2 * LOOK_SECONDS if after else math.inf


def _put_together(
    mount: MountSeen, files: dict[str, Member], answers: _Answers, beating: set[str], only: str
) -> Overview:
    members = list(answers.found.values())
    # Where a member answers, one that stood there before has had its time; so has the older of two.
    silent = dict(answers.silent)
    for member in sorted(files.values(), key=lambda each: (each.epoch, each.beat), reverse=True):
        why = silent.pop(member.cluster, None)
        if why is None:
            continue
        beats = member.id in beating
        problem = f"it does not answer on its cluster port ({why})"
        problem += ", but beats on the mount" if beats else ""
        members.append(Found.by_file(member, UNREACHABLE if beats else GONE, problem))
    writers = [found for found in members if found.role == Role.WRITER]
    writer = max(writers, key=lambda found: found.epoch, default=None)
    for other in writers:
        if other is not writer:
            other.problem = "it was replaced, and does not know it yet"
    if writer is not None:
        for member_id, lag in writer.said["followers"].items():
            if member_id in answers.found:
                found = answers.found[member_id]
                found.lag_changes = lag["lag_changes"]
                found.lag_seconds = lag["lag_seconds"]
                found.unsent_bytes = lag["unsent_bytes"]
    elif only and members:
        followed = files.get(members[0].said.get("self", {}).get("writer", ""))
        if followed is not None and members[0].current:
            writer = Found.by_file(followed, Role.WRITER)
    members.sort(key=lambda found: (found is not writer, not found.answers, found.cluster))
    return Overview(mount, members, writer)
