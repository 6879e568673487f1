"""The rules of claiming, C1 to C8 and L1, L2: each with what is lost without it.

Every test makes the moment that its rule is for: a claimant paused between two steps, a power loss
that undoes one, a cache that hides one. `mutant` says how the product is broken: "" leaves it whole
and the test must pass, each other name breaks the one rule and the same test must fail.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pkgindex.errors import PkgindexError, StoreDamaged, StoreUnreachable
from pkgindex.store import claim as claiming
from pkgindex.store import journal as journaling
from pkgindex.store import recovery
from pkgindex.store.claim import Claim, Withdrawn, claim
from pkgindex.store.mount import Mount, Staging
from pkgindex.store.recovery import recover
from tests.store.reading import without_room
from tests.store.writer import Writer, index_of, made, recovered_index

Patch = pytest.MonkeyPatch

WHAT_FAILS_A_TEST = (AssertionError, pytest.fail.Exception, PkgindexError, Withdrawn, OSError)


@contextmanager
def caught(mutant: str) -> Iterator[None]:
    """Expect the check inside to fail for a mutant, and only for one."""
    if not mutant:
        yield
        return
    with pytest.raises(WHAT_FAILS_A_TEST):
        yield


def mutants(*names: str) -> pytest.MarkDecorator:
    """Run a test on the product as it is, and on each of these broken ones."""
    return pytest.mark.parametrize("mutant", ["", *names])


class Hooked(Mount):
    """A mount on which something happens, once, before or after an operation of a given name."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.before: dict[tuple[str, ...], Callable[[], None]] = {}
        self.after: dict[tuple[str, ...], Callable[[], None]] = {}

    def _now(self, when: dict[tuple[str, ...], Callable[[], None]], *what: str) -> None:
        action = when.pop(what, None)
        if action:
            action()

    def sync_folder(self, *folder: str) -> None:
        self._now(self.before, "sync_folder", *folder)
        super().sync_folder(*folder)
        self._now(self.after, "sync_folder", *folder)

    def names(self, *folder: str) -> list[str]:
        self._now(self.before, "names", *folder)
        return super().names(*folder)

    def read(self, *parts: str) -> bytes:
        self._now(self.before, "read", *parts)
        return super().read(*parts)


def staging_names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "staging").iterdir())


def segment(epoch: int, number: int) -> str:
    return journaling.segment_name(epoch, number)


# --- C1: the number --------------------------------------------------------------------------------


@mutants("from staging alone")
def test_c1_the_number_is_above_every_staging_directory_and_every_journal(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    if mutant:
        monkeypatch.setattr(
            claiming, "highest_epoch", lambda mount: max([0, *claiming.epochs(mount)])
        )
    made(mount := Mount(str(root)))
    (root / "staging" / "00000003").mkdir()
    (root / "journal" / segment(7, 2)).write_bytes(b"")
    with caught(mutant):
        assert claim(mount, None).epoch == 8


def test_c1_the_highest_staging_directory_stays_at_a_stop_so_no_number_comes_twice(
    root: Path,
) -> None:
    for epoch in (1, 2, 3):
        with Writer(root) as writer:
            assert writer.epoch == epoch
            writer.write_files()
        assert staging_names(root) == [f"{epoch:08x}"]


@mutants("it looks for lower numbers only")
def test_c1_a_claimant_that_sees_a_higher_number_withdraws(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    made(Mount(str(root)))
    if mutant:
        listed = claiming.epochs
        monkeypatch.setattr(
            claiming,
            "epochs",
            lambda m: [e for e in listed(m) if not isinstance(m, Hooked) or e < 2],
        )
    slow = Hooked(root)
    # It has made its directory and its owner file; then another makes a higher one.
    slow.after["sync_folder", "staging"] = (root / "staging" / "00000002").mkdir
    with caught(mutant), pytest.raises(Withdrawn, match="claimed above"):
        claim(slow, None)
    assert staging_names(root) == ["00000001", "00000002"]


@mutants("the owner file is not read again", "it is read through the directory that it opened")
def test_c1_of_two_that_hold_one_name_after_a_power_loss_only_one_goes_on(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    """A power loss takes back the mkdir of the first; the second makes the same directory again."""
    made(Mount(str(root)))
    slow = Hooked(root)
    second: list[Claim] = []

    def power_loss() -> None:
        (root / "staging" / "00000001").rename(root.parent / "undone")
        second.append(claim(Mount(str(root)), None))

    slow.before["sync_folder", "staging"] = power_loss
    if mutant.startswith("it is read"):

        def read(self: Mount, *parts: str) -> bytes:
            if parts[-1] == "owner" and isinstance(self, Hooked):
                return (root.parent / "undone" / "owner").read_bytes()
            return original(self, *parts)

        original = Mount.read
        monkeypatch.setattr(Mount, "read", read)
        monkeypatch.setattr(Hooked, "read", read)
    elif mutant:

        def own(mount: Mount, staging: Staging) -> None:
            os.close(staging.create("owner", b"somebody"))
            mount.sync_folder("staging")

        monkeypatch.setattr(claiming, "_own", own)
    with caught(mutant):
        with pytest.raises(Withdrawn, match="owner"):
            claim(slow, None)
        assert second[0].epoch == 1
    claiming.prove(second[0])


def test_c1_two_that_make_one_number_at_once_do_not_both_get_it(root: Path) -> None:
    made(mount := Mount(str(root)))
    slow = Hooked(root)
    first: list[Claim] = []
    slow.before["names", "staging"] = lambda: None
    original = claiming.highest_epoch

    def slow_number(of: Mount) -> int:
        number = original(of)
        if of is slow and not first:
            first.append(claim(mount, None))
        return number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claiming, "highest_epoch", slow_number)
        with pytest.raises(Withdrawn, match="claimed by another"):
            claim(slow, None)
    claiming.prove(first[0])


# --- C2: the fence ---------------------------------------------------------------------------------


@mutants("no fence")
def test_c2_after_the_fence_the_older_writer_can_neither_answer_nor_publish_nor_remove(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        old.apply("INDEX|b|")
        if mutant:
            monkeypatch.setattr(claiming, "_fence", lambda mount, mine: None)
        claim(Mount(str(root)), None)
        with caught(mutant):
            with pytest.raises(FileNotFoundError):
                old.commit()
            with pytest.raises(FileNotFoundError):
                old.claim.staging.take("gone", "journal", segment(1, 0))
            with pytest.raises(FileNotFoundError):
                old.claim.staging.create("t", b"")


@mutants("proofs are unlinked")
def test_c2_the_old_proof_survives_a_claimant_that_dies_before_it_has_read(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        size = len(without_room(root / "journal" / segment(1, 0)))
        with pytest.MonkeyPatch.context() as patch:
            if mutant:
                patch.setattr(
                    Staging,
                    "take",
                    lambda self, name, *source: Path(self.mount.path(*source)).unlink(),
                )
            claim(Mount(str(root)), None).staging.close()  # … and dies
        with caught(mutant):
            assert claim(Mount(str(root)), None).proven.get(1) == (0, size)


@mutants("oldest first")
def test_c2_newest_first_so_that_nobody_finds_the_oldest_robbed_of_its_proof(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    """2 sleeps before its fence; 3 begins to fence; 2 wakes between two steps of 3."""
    with Writer(root) as first:
        first.ask("INDEX|a|")
        acknowledged = len(without_room(root / "journal" / segment(1, 0)))
        if mutant:
            monkeypatch.setattr(claiming, "reversed", iter, raising=False)
        outcome: list[Claim] = []
        second = Hooked(root)

        def third() -> None:
            with pytest.MonkeyPatch.context() as patch:
                rmdir = os.rmdir

                def paused(path: str) -> None:
                    rmdir(path)
                    raise KeyboardInterrupt  # 3 is paused here, after its first rmdir

                patch.setattr(claiming.os, "rmdir", paused)
                with suppress(KeyboardInterrupt):
                    claim(Mount(str(root)), None)

        second.after["sync_folder", "staging"] = third
        with caught(mutant):
            # Newest first: it is deposed. Oldest first: 1 is gone, and 2 knows no proof of it.
            # That 3 is higher it has not seen yet: its listing was before.
            with suppress(Withdrawn), pytest.MonkeyPatch.context() as patch:
                listed = claiming.epochs
                patch.setattr(
                    claiming, "epochs", lambda m: [e for e in listed(m) if m is not second or e < 3]
                )
                outcome.append(claim(second, None))
            assert all(mine.proven.get(1) == (0, acknowledged) for mine in outcome)


@mutants("no second listing")
def test_c2_a_directory_that_a_power_loss_brings_back_is_taken_away_again_before_reading(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        mount = Hooked(root)
        aside = root.parent / "aside"
        rmdir = os.rmdir
        # The rmdir is not on disk yet …
        monkeypatch.setattr(
            claiming.os,
            "rmdir",
            lambda path: rmdir(path) if aside.exists() else Path(path).rename(aside),
        )

        # … when the mount's server loses its power: during the first sync of staging/ after it.
        def bring_back() -> None:
            shutil.copytree(aside, root / "staging" / "00000001")

        mount.after["sync_folder", "staging"] = lambda: mount.before.update(
            {("sync_folder", "staging"): bring_back}
        )
        if mutant:

            def fence_once(mount: Mount, mine: Claim) -> None:
                for epoch in reversed([e for e in claiming.epochs(mount) if e < mine.epoch]):
                    claiming._empty(mount, mine, epoch)
                mount.sync_folder("staging")

            monkeypatch.setattr(claiming, "_fence", fence_once)
        with caught(mutant):
            claim(mount, None)
            assert staging_names(root) == ["00000002"]
        assert aside.exists()


@mutants("proofs are listed later")
def test_c3_a_proof_is_remembered_from_its_rename_not_from_a_later_listing(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        acknowledged = len(without_room(root / "journal" / segment(1, 0)))
        take = Staging.take

        def taken(self: Staging, name: str, *source: str) -> None:
            take(self, name, *source)
            if "proof-0000" in name:  # a higher claimant takes it away again, at once
                os.rename(name, root.parent / "higher", src_dir_fd=self.fd)

        monkeypatch.setattr(Staging, "take", taken)
        mount = Mount(str(root))
        mine = claim(mount, None)
        if mutant:
            found = [claiming.PROOF.fullmatch(n) for n in mount.names("staging", mine.staging.name)]
            mine.proven = {
                int(m[1], 16): (int(m[2], 16), int(m[3], 16)) for m in found if m and m[1]
            }
        with caught(mutant):
            assert mine.proven.get(1) == (0, acknowledged)


# --- C3, C4: what a cache shows ---------------------------------------------------------------------


class Stale(Mount):
    """A mount whose cache shows old sizes and hides names, so many times."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.short: dict[str, tuple[int, int]] = {}  # name: (size shown, times)
        self.hidden: dict[str, int] = {}
        self.absent: dict[str, int] = {}  # listed, but ENOENT when opened

    @staticmethod
    def _counts(times: dict[str, int], name: str) -> bool:
        times[name] = times.get(name, 0) - 1
        return times[name] >= 0

    def names(self, *folder: str) -> list[str]:
        return [name for name in super().names(*folder) if not self._counts(self.hidden, name)]

    def read(self, *parts: str) -> bytes:
        name = parts[-1]
        if self._counts(self.absent, name):
            raise FileNotFoundError(2, "No such file or directory", self.path(*parts))
        data = super().read(*parts)
        size, times = self.short.get(name, (0, 0))
        if times:
            self.short[name] = (size, times - 1)
            return data[:size]
        return data


def recovered_behind(mount: Mount, *, forget_proofs: bool = False) -> dict[str, list[str]]:
    mine = claim(mount, None)
    if forget_proofs:
        mine.proven.clear()
    return index_of(recover(mount, made(mount), mine).graph)


@pytest.mark.usefixtures("behind_a_cache")
@mutants("any size is believed")
def test_c3_a_journal_shorter_than_its_proof_is_a_stale_cache_and_read_again(
    root: Path, mutant: str
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        first = len(without_room(root / "journal" / segment(1, 0)))
        old.ask("INDEX|b|")
    mount = Stale(root)
    mount.short[segment(1, 0)] = (first, 4)
    with caught(mutant):
        assert recovered_behind(mount, forget_proofs=bool(mutant)) == {"a": [], "b": []}


@pytest.mark.usefixtures("behind_a_cache")
def test_c3_a_journal_that_stays_shorter_than_its_proof_is_damage_and_named(
    root: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(recovery, "PATIENCE_SECONDS", 0.2)
    with Writer(root) as old:
        old.ask("INDEX|a|")
        first = len(without_room(root / "journal" / segment(1, 0)))
        old.ask("INDEX|b|")
    mount = Stale(root)
    mount.short[segment(1, 0)] = (first, 1_000_000)
    with pytest.raises(StoreDamaged, match=segment(1, 0)):
        recovered_behind(mount)


def test_c3_above_the_proven_position_a_torn_batch_is_the_end(root: Path) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")
        path = root / "journal" / segment(1, 0)
        with path.open("r+b") as file:
            file.seek(len(without_room(path)))
            file.write(b"batch 00000005 00000001 0000000000000002 00000000\n+b")
    assert recovered_index(root) == {"a": []}


@mutants("to the end")
def test_c3_a_file_is_read_to_a_size_taken_once_though_a_deposed_writer_appends(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    root.mkdir()
    growing = root / "segment"
    growing.write_bytes(b"x" * 100)
    read = os.read
    reads = 0

    def reading(fd: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        assert reads < 100, "the reading does not end"
        with growing.open("ab") as file:
            file.write(b"y" * 100)
        return read(fd, size)

    if mutant:

        def to_the_end(self: Mount, *parts: str) -> bytes:
            fd = os.open(self.path(*parts), os.O_RDONLY)
            data = b""
            while chunk := os.read(fd, 4096):
                data += chunk
            return data

        monkeypatch.setattr(Mount, "read", to_the_end)
    monkeypatch.setattr(os, "read", reading)
    with caught(mutant):
        assert Mount(str(root)).read("segment") == b"x" * 100


@pytest.mark.usefixtures("behind_a_cache")
@mutants("the first listing is believed")
@pytest.mark.parametrize("how", ["not listed", "listed but not found"])
def test_c4_a_gap_in_the_chain_means_list_again(
    root: Path, how: str, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        for package in ("a", "b", "c"):
            old.ask(f"INDEX|{package}|")
            old.journal.rotate()
    if mutant:
        monkeypatch.setattr(recovery, "PATIENCE_SECONDS", 0)
    mount = Stale(root)
    if how == "not listed":
        mount.hidden[segment(1, 1)] = 3
    else:
        mount.absent[segment(1, 1)] = 3
    with caught(mutant):
        assert recovered_behind(mount) == {"a": [], "b": [], "c": []}


@pytest.mark.parametrize("gone", [1, 2])
def test_c4_a_segment_that_stays_away_is_damage_and_named(root: Path, gone: int) -> None:
    with Writer(root) as old:
        for package in ("a", "b"):
            old.ask(f"INDEX|{package}|")
            old.journal.rotate()
    (root / "journal" / segment(1, gone)).unlink()
    with pytest.raises(StoreDamaged, match=segment(1, gone)):
        recovered_index(root)


@pytest.mark.usefixtures("behind_a_cache")
@mutants("the first listing is believed")
@pytest.mark.parametrize("errno_", [errno.ENOENT, errno.ESTALE])
def test_c4_a_package_file_that_is_listed_and_not_found_means_list_again(
    root: Path, errno_: int, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|", "INDEX|b|a")
        old.write_files()
    (root / "snapshot" / f"{2:016x}").unlink()
    if mutant:
        monkeypatch.setattr(recovery, "PATIENCE_SECONDS", 0)
    read_folder = recovery.read_folder
    stale = 3

    def read(path: str, kind: str, *where: int) -> tuple[bytes, int, list[tuple[str, str, int]]]:
        nonlocal stale
        lines, count, wrong = read_folder(path, kind, *where)
        if stale and lines.startswith(b"+a|"):
            stale -= 1
            return b"", count, [("a", f"open: {os.strerror(errno_)}", errno_)]
        return lines, count, wrong

    monkeypatch.setattr(recovery, "read_folder", read)
    with caught(mutant):
        assert recovered_behind(Mount(str(root))) == {"a": [], "b": ["a"]}


# --- C5 to C8: replaying and owning -----------------------------------------------------------------


def test_a_start_reads_each_segment_whole_but_once(root: Path, monkeypatch: Patch) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.journal.rotate()
        writer.ask("INDEX|b|a")
    whole = []
    read = Mount.read

    def noted(self: Mount, *parts: str) -> bytes:
        whole.extend(parts[1:] if parts[0] == "journal" else ())
        return read(self, *parts)

    monkeypatch.setattr(Mount, "read", noted)
    assert recovered_index(root) == {"a": [], "b": ["a"]}
    assert whole == [segment(1, 0), segment(1, 1)]


def test_a_head_of_any_length_is_read(root: Path, monkeypatch: Patch) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
    for size in (1, 30, 100, 10_000):
        monkeypatch.setattr(recovery, "HEAD_BYTES", size)
        assert recovered_index(root) == {"a": []}


@mutants("the lowest is replayed")
def test_c5_only_the_highest_journal_with_a_whole_head_is_replayed(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|", "INDEX|old|")
    kept = (root / "journal" / segment(1, 0)).read_bytes()
    with Writer(root) as second:
        second.write_files()
        second.ask("REMOVE|old|", "INDEX|b|")
        second.write_files()
    (root / "journal" / segment(1, 0)).write_bytes(kept)  # its removal was undone
    if mutant:
        listed = recovery.segments
        monkeypatch.setattr(recovery, "segments", lambda mount: listed(mount)[:1])
    with caught(mutant):
        assert recovered_index(root) == {"a": [], "b": []}


def test_c5_a_higher_journal_whose_head_is_not_whole_was_never_served_from(root: Path) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|")
    (root / "journal" / segment(2, 0)).write_bytes(b"pkgindex journal 1\n{")
    assert recovered_index(root) == {"a": []}


@mutants("an empty head")
def test_c6_the_new_writers_head_carries_all_that_it_replayed(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|", "INDEX|b|a", "INDEX|c|", "REMOVE|c|")
    if mutant:
        opened = journaling.Journal.open
        monkeypatch.setattr(
            journaling.Journal, "open", lambda self, lines, number, *_: opened(self, b"", number)
        )
    Writer(root).stop()
    # What was merely read may have lived in a page cache alone: it is gone with the old machine.
    (root / "journal" / segment(1, 0)).unlink()
    with caught(mutant):
        assert recovered_index(root) == {"a": [], "b": ["a"]}


@mutants("removed before its own head is there")
def test_c6_older_journals_stay_until_the_new_writers_head_is_published_and_proven(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|")

    class Died(Exception):
        pass

    def die(*_: object) -> None:
        raise Died

    if mutant:
        opened = journaling.Journal.open

        def early(self: journaling.Journal, *head: Any) -> None:
            self.drop_older_epochs()
            opened(self, *head)

        monkeypatch.setattr(journaling.Journal, "open", early)
    with caught(mutant):
        for step in ("create", "publish"):
            with pytest.MonkeyPatch.context() as patch:
                # Only the head: the owner file and the proof are made by the claim before.
                if step == "create":
                    patch.setattr(journaling.Journal, "_begin", die)
                else:
                    patch.setattr(Staging, step, die)
                with pytest.raises(Died):
                    Writer(root)
            assert (root / "journal" / segment(1, 0)).exists(), f"died in {step}"
        assert recovered_index(root) == {"a": []}


@mutants("only files that look wrong are rewritten")
def test_c7_every_package_file_that_the_head_names_is_written_anew(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|", "INDEX|b|a")
        journal = (root / "journal" / segment(1, 0)).read_bytes()
        first.write_files()
    # As after a power loss: all files are there, but nobody knows whether they are on the disk.
    for path in (root / "journal").iterdir():
        path.unlink()
    for path in (root / "staging" / "00000001").glob("proof*"):
        path.unlink()
    (root / "journal" / segment(1, 0)).write_bytes(journal)
    files = [p for kind in ("forward", "reverse") for p in (root / kind).glob("*/*")]
    before = {path: path.stat().st_ino for path in files}
    assert len(before) == 3
    if mutant:
        replay = recovery.load_journal

        def unmarked(mount: Mount, graph: object, *args: object, **more: object) -> object:
            loaded = replay(mount, graph, *args, **more)  # type: ignore[arg-type]
            graph.take_dirty()  # type: ignore[attr-defined]
            while graph.render(1 << 20, 1 << 20):  # type: ignore[attr-defined]
                pass
            return loaded

        monkeypatch.setattr(recovery, "load_journal", unmarked)
    with Writer(root) as second, caught(mutant):
        second.write_files()
        assert {path for path in files if path.stat().st_ino == before[path]} == set()


def test_c7_a_round_that_was_cut_short_leaves_no_reverse_file_behind(root: Path) -> None:
    """The forward file of the change is in its place already, the reverse file is not."""
    with Writer(root) as first:
        first.ask("INDEX|a|", "INDEX|b|a")
        journal = (root / "journal" / segment(1, 0)).read_bytes()
        first.write_files()
    for path in (root / "journal").iterdir():
        path.unlink()
    for path in (root / "staging" / "00000001").glob("proof*"):
        path.unlink()
    (root / "journal" / segment(1, 0)).write_bytes(journal)
    (reverse,) = (root / "reverse").glob("*/a")
    contents = reverse.read_bytes()
    reverse.unlink()
    with Writer(root) as second:
        second.write_files()
    assert reverse.read_bytes() == contents


@pytest.mark.usefixtures("behind_a_cache")
@mutants("no proof")
def test_c8_a_claimant_that_was_fenced_while_it_read_withdraws_and_cries_no_damage(
    root: Path, mutant: str, monkeypatch: Patch
) -> None:
    with Writer(root) as first:
        first.ask("INDEX|a|")
        first.journal.rotate()
        first.ask("INDEX|b|")
    slow = Hooked(root)

    def another_takes_all() -> None:
        with Writer(root) as third:
            third.write_files()  # and removes the journals that 2 is about to read

    slow.before["read", "journal", segment(1, 1)] = another_takes_all
    monkeypatch.setattr(recovery, "PATIENCE_SECONDS", 0)
    mine = claim(slow, None)
    if mutant:
        monkeypatch.setattr(recovery, "prove", lambda claim: None)
    with caught(mutant):
        try:
            recover(slow, made(slow), mine)
        except Withdrawn:
            pass
        else:
            raise AssertionError("it served what it had read")
    assert recovered_index(root) == {"a": [], "b": []}


@pytest.mark.parametrize("errno_", [errno.ENOENT, errno.ESTALE])
def test_c2_an_older_folder_that_is_listed_and_never_there_holds_up_no_claim_for_ever(
    root: Path, monkeypatch: pytest.MonkeyPatch, errno_: int
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")

    def never_there(path: str, *_: object, **__: object) -> None:
        raise OSError(errno_, os.strerror(errno_), path)

    monkeypatch.setattr(claiming.os, "rmdir", never_there)
    monkeypatch.setattr(claiming, "STALE_SECONDS", 0.2)
    with pytest.raises(OSError, match=os.strerror(errno_)):
        claiming.claim(Mount(str(root)))


def test_c8_a_handle_that_stays_stale_is_a_mount_to_be_mended_and_no_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|")

    def stale(mount: Mount) -> list[object]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), mount.path("journal"))

    monkeypatch.setattr(recovery, "highest_chain", stale)
    with pytest.raises(StoreUnreachable, match="journal: cannot read it: Stale file handle"):
        recovered_index(root)
