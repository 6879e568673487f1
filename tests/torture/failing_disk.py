"""A disk that fails: every call to the storage, once and for good, with every error; and one that is full.

A short life of a server (tests/store/failing.py) is lived again and again, each time with another of its
calls failing, or all from that one on. What must hold each time: nothing acknowledged is lost, nothing is
acknowledged after a failed commit, the server ends by itself with an exit code that tells and one line,
soon; the next server recovers, and its files agree with one another.

ENOENT and ESTALE are answers as well as errors: what was to be taken away is gone. A server may take them
for that, and live on, as long as nothing is lost by it.

A full disk is a real one: a small file system that a stranger's file fills, again and again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.servers import Server, ServerFailed, Wire
from tests.store.failing import (
    CALLS,
    CHANGES,
    assert_ended_well,
    assert_silent_after,
    judge,
    leave_by_a_kill,
    live,
    places,
)
from tests.store.reading import read_index
from tests.store.tracing import strace_works
from tests.torture.campaign import Campaign, Run

__all__ = ["CAMPAIGNS"]

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "ENOENT")
ANSWERS = ("ESTALE", "ENOENT")
LIVES = 10  # of the reduced form
FULL_DISKS = (10, 1)  # times that a disk becomes full: full, quick
DISK = 64 << 20  # bytes: several times what the index of this campaign takes
FILES = 30_000  # that the small disk has room for
SOON = 1.0  # second from the failure to the end
PATIENCE = (
    5  # times what an undisturbed stop takes at that moment are allowed too, on a busy machine
)
AT_A_TIME = 2

#: Wrong servers: what each does, by Python that breaks the product, and a failure that shows it.
WRONG = {
    "acknowledges what could not be written": (
        """
from pkgindex.store import journal
completed = journal.Journal.completed
def never_mind(self):
    try:
        return completed(self)
    except OSError:
        return True
journal.Journal.completed = never_mind
""",
        "fdatasync",
    ),
    "takes no notice of a folder that cannot be synced": (
        """
from contextlib import suppress
from pkgindex.store import mount
sync = mount.Mount.sync_folder
def never_mind(self, *names):
    with suppress(OSError):
        sync(self, *names)
mount.Mount.sync_folder = never_mind
""",
        "fsync",
    ),
}


@dataclass(frozen=True)
class Failure:
    """What fails in one life: the call of a kind with this number, or all from it on."""

    kind: str
    place: int
    error: str
    for_good: bool

    @property
    def injection(self) -> str:
        """As strace wants it said."""
        return f"{self.kind}:error={self.error}:when={self.place}{'+' * self.for_good}"

    def __str__(self) -> str:
        tail = ", and all after it" if self.for_good else ""
        return f"{self.kind} number {self.place} fails with {self.error}{tail}"


def fail(
    before: Path, folder: Path, failure: Failure, counts: Counter[str], wrong: str = ""
) -> None:
    """Live once with this failure. AssertionError if a promise is broken."""
    what = str(failure)
    root = folder / "the-store"
    folder.mkdir()
    life = live(before, root, failure.injection, mutation=wrong)
    counts["lives"] += 1
    stored = ["/the-store/" in line for line in life.injected]
    if any(stored):
        counts["calls that failed"] += sum(stored)
        counts[f"with {failure.error}"] += 1
        if failure.error in ANSWERS and life.exit_code == 0:
            counts["failures taken for an answer, harmlessly"] += 1
        elif all(stored):
            # Otherwise Python may have failed as it loaded a module, and has its own words for it.
            assert_ended_well(life, what)
        assert "Traceback" not in "\n".join(life.lines) or not all(stored), what
        if failure.error not in ANSWERS or life.exit_code:
            assert_silent_after(life, what)
        if life.exit_code and failure.error not in ANSWERS:
            counts["slowest end, ms"] = max(
                counts["slowest end, ms"], int(life.seconds_to_end * 1000)
            )
            if life.seconds_to_end > SOON:
                counts["ends after more than a second"] += 1
                (folder / "undisturbed").mkdir()
                usual = live(before, folder / "undisturbed" / "the-store").seconds_to_end
                took = (
                    f"it took {life.seconds_to_end:.2f} s to end, an undisturbed stop {usual:.2f} s"
                )
                assert life.seconds_to_end < PATIENCE * usual, (what, took, life.lines)
    judge(root, life, what)
    shutil.rmtree(folder)


def failures(run: Run, before: Path) -> list[Failure]:
    """All of them, or a sample by the seed in which each kind of call is."""
    clean = live(before, run.folder / "clean" / "the-store")
    assert clean.exit_code == 0, clean.lines
    assert clean.acknowledged == CHANGES
    run.counts["an undisturbed stop, ms"] = int(clean.seconds_to_end * 1000)
    found: list[Failure] = []
    for kind in CALLS:
        numbers = places(clean, kind)
        assert numbers, f"the server never calls {kind} on its store"
        run.counts["places"] += len(numbers)
        for number in numbers:
            # Each place with another error than its neighbours, once and for good.
            error = run.random.randrange(len(ERRORS))
            found.append(Failure(kind, number, ERRORS[error], False))
            found.append(Failure(kind, number, ERRORS[(error + 1) % len(ERRORS)], True))
    run.random.shuffle(found)
    if run.full:
        return found
    one_each = [next(failure for failure in found if failure.kind == kind) for kind in CALLS]
    return (one_each + [failure for failure in found if failure not in one_each])[:LIVES]


def fail_each(run: Run) -> None:
    """The campaign with strace."""
    for name in ("before", "clean"):
        (run.folder / name).mkdir()
    before = leave_by_a_kill(run.folder / "before" / "the-store")
    for number, (name, (mutation, kind)) in enumerate(WRONG.items()):
        find_wrong(run, before, run.folder / f"wrong-{number}", name, mutation, kind)
    planned = failures(run, before)
    done: Counter[str] = Counter()
    late: list[Failure] = []

    def one(numbered: tuple[int, Failure]) -> None:
        number, failure = numbered
        if run.is_late():
            late.append(failure)
            return
        try:
            fail(before, run.folder / f"life-{number}", failure, done)
        except (AssertionError, OSError, ServerFailed, EOFError) as error:
            run.fail(f"{failure}: {str(error)[:3000]}")
        run.progress(done["lives"], len(planned))

    # A server dies with the thread that started it: these last to the end.
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(one, enumerate(planned)))
    run.counts.update(done)
    if late:
        run.skipped.append(f"{len(late)} of {len(planned)} lives: the time was up")


def find_wrong(run: Run, before: Path, folder: Path, name: str, mutation: str, kind: str) -> None:
    """A wrong server is found out by some call of the kind that fails."""
    folder.mkdir()
    (folder / "clean").mkdir()
    clean = live(before, folder / "clean" / "the-store", mutation=mutation)
    numbers = places(clean, kind)
    for place in random.Random(run.seed).sample(numbers, len(numbers)):
        failure = Failure(kind, place, "EIO", False)
        try:
            fail(before, folder / f"life-{place}", failure, Counter(), mutation)
        except AssertionError:
            run.counts["mutants caught"] += 1
            return
    run.fail(f"the mutant that {name} lived through {len(numbers)} failures of {kind} unnoticed")


# --- a full disk ----------------------------------------------------------------------------------------


def disk_absent() -> str | None:
    """Why there can be no small disk here."""
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    return None


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small ext4. CalledProcessError where that is not allowed."""
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-N", str(FILES), str(image)], check=True, capture_output=True
    )
    options = ["-o", "loop", str(image), str(mount)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(path: Path) -> None:
    """Write a file until there is no room for more."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for block in (1 << 16, 1 << 10, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * block)


def fill_up(run: Run) -> None:
    """The campaign with a disk that becomes full, and has room again."""
    acknowledged: dict[str, frozenset[str]] = {}
    try:
        with small_disk(run.folder) as disk:
            times = run.scale(*FULL_DISKS)
            for number in range(times):
                be_full(run, disk, acknowledged, number)
                run.progress(number + 1, times)
    except subprocess.CalledProcessError as error:
        run.skipped.append(f"a full disk: {error.stderr.decode().strip()}")


def be_full(run: Run, disk: Path, acknowledged: dict[str, frozenset[str]], number: int) -> None:
    """Change packages until the disk is full; then give it room, and ask a new server."""
    root, ballast = disk / "index", disk / "ballast"
    long = "n" * 200
    with Server(f"file:{root}") as server:
        address = server.address
        with Wire(address) as wire:
            fill(ballast)
            # Room for some changes, so that it is at another point each time that there is none.
            os.truncate(ballast, ballast.stat().st_size - run.random.randrange(1 << 18))
            with suppress(EOFError, ConnectionError):
                for change in range(100_000):
                    name = f"p{number}-{change}-{long}"
                    if wire.ask(f"INDEX|{name}|".encode()) != b"OK\n":
                        run.fail(f"full disk {number}: an INDEX was not answered OK")
                    acknowledged[name] = frozenset()
                    run.counts["changes until the disk was full"] += 1
        code = server.wait()
        said = [line for line in server.lines if "No space left" in line]
        if code != 5 or not said or "Traceback" in "\n".join(server.lines):
            run.fail(f"full disk {number}: exit code {code}: {server.lines[-3:]}")
    # While there is no room a server says so, and does no harm; or serves, as it needs none.
    with suppress(ServerFailed), Server(f"file:{root}") as server:
        server.stop()
    ballast.unlink(missing_ok=True)
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        lines = [f"QUERY|{name}|".encode() for name in acknowledged]
        if lost := wire.ask_all(lines).count(b"FAIL\n"):
            run.fail(f"full disk {number}: {lost} of {len(lines)} acknowledged packages are lost")
        if wire.ask(f"INDEX|after-{number}|".encode()) != b"OK\n":
            run.fail(f"full disk {number}: no change is possible after it has room again")
        acknowledged[f"after-{number}"] = frozenset()
        if server.stop() != 0:
            run.fail(f"full disk {number}: a clean stop is not possible after it has room again")
    found = read_index(root)
    if not acknowledged.keys() <= found.keys() or len(found) > len(acknowledged) + number + 1:
        run.fail(f"full disk {number}: the files are not the index")
    run.counts["disks that were full"] += 1


CAMPAIGNS = (
    Campaign(
        "failing-disk",
        "Each call to the storage fails, once and for good, with EIO, ENOSPC, EDQUOT, ESTALE, ENOENT: "
        "nothing acknowledged is lost, the server ends soon with one line, and the next one recovers.",
        fail_each,
        lambda: strace_works() or None,
        seconds=(60.0, 360.0),
    ),
    Campaign(
        "full-disk",
        "A small disk becomes full under a server, and has room again: it needs only a restart.",
        fill_up,
        disk_absent,
        seconds=(30.0, 90.0),
    ),
)
