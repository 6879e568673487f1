"""The model of a disk that loses its power, and of what a server asks of it: each rule, by an example."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.store.tracing import parse, require_strace
from tests.torture.crash_states import ROOT, Disk, Layout, crash_states
from tests.torture.operations import (
    Do,
    Recording,
    SyncBegun,
    SyncEnded,
    cut_off,
    narrowed,
    replay,
    without,
)


def states(disk: Disk, *, thorough: bool = True) -> list[Layout]:
    found: list[Layout] = []
    for _, layout in crash_states(disk, random.Random(1), thorough=thorough):
        if layout not in found:
            found.append(layout)
    return found


@pytest.fixture
def disk() -> Disk:
    """A disk with a folder `d` and a file `d/f` that holds "old", all durable."""
    return Disk.holding({"d": None, "d/f": b"old"})


def in_d(disk: Disk, *names: str) -> list[int]:
    return [disk.folder(1).seen[name] for name in names]


def test_what_was_synced_is_in_every_state(disk: Disk) -> None:
    assert states(disk) == [{"d": None, "d/f": b"old"}]


def test_an_unsynced_name_may_be_there_or_not(disk: Disk) -> None:
    disk.make_folder(1, "new", 10)
    assert {frozenset(s) for s in states(disk)} == {
        frozenset({"d", "d/f"}),
        frozenset({"d", "d/f", "d/new"}),
    }


def test_a_files_sync_makes_its_data_durable_and_not_its_name(disk: Disk) -> None:
    disk.make_file(1, "g", 10)
    disk.write(10, 0, b"data")
    disk.sync(10)
    assert states(disk) == [
        {"d": None, "d/f": b"old"},
        {"d": None, "d/f": b"old", "d/g": b"data"},
    ]


def test_a_folders_sync_makes_its_names_durable_and_not_their_data(disk: Disk) -> None:
    disk.make_file(1, "g", 10)
    disk.write(10, 0, b"data")
    disk.sync(1)
    found = [state["d/g"] for state in states(disk)]
    assert b"" in found
    assert b"data" in found


def test_a_sync_of_everything_leaves_nothing_volatile(disk: Disk) -> None:
    disk.make_file(1, "g", 10)
    disk.write(10, 0, b"data")
    disk.sync()
    assert states(disk) == [{"d": None, "d/f": b"old", "d/g": b"data"}]


def test_a_sync_covers_only_what_had_ended_before_it_began(disk: Disk) -> None:
    disk.write(2, 3, b"+1")
    covered = disk.covered(2)
    disk.write(2, 5, b"+2")
    disk.settle(covered)
    found = {state["d/f"] for state in states(disk)}
    assert {b"old+1", b"old+1+2"} <= found
    assert b"old" not in found


def test_of_an_unsynced_rename_both_names_may_be_there_and_never_none(disk: Disk) -> None:
    disk.make_folder(ROOT, "e", 10)
    disk.sync()
    disk.rename(1, "f", 10, "g")
    found = [frozenset(state) - {"d", "e"} for state in states(disk)]
    assert set(found) == {frozenset({"d/f"}), frozenset({"e/g"}), frozenset({"d/f", "e/g"})}


def test_a_sync_of_the_folder_that_a_name_left_does_not_lose_the_file(disk: Disk) -> None:
    disk.make_folder(ROOT, "e", 10)
    disk.sync()
    disk.rename(1, "f", 10, "g")
    disk.sync(1)
    assert states(disk) == [{"d": None, "e": None, "e/g": b"old"}]


def test_a_rename_over_a_file_leaves_one_of_the_two(disk: Disk) -> None:
    disk.make_file(1, "t", 10)
    disk.write(10, 0, b"new")
    disk.sync()
    disk.rename(1, "t", 1, "f")
    disk.sync(1)
    assert states(disk) == [{"d": None, "d/f": b"new"}]


def test_an_older_name_does_not_come_up_again_over_one_that_is_durable(disk: Disk) -> None:
    for node, data in ((10, b"first"), (11, b"second")):
        disk.make_file(ROOT, f"t{node}", node)
        disk.write(node, 0, data)
        disk.sync()
        disk.rename(ROOT, f"t{node}", 1, "f")
    disk.sync(1)
    assert {state["d/f"] for state in states(disk)} == {b"second"}


def test_unsynced_writes_may_be_there_in_any_order(disk: Disk) -> None:
    disk.write(2, 3, b"A")
    disk.write(2, 4, b"B")
    found = {state["d/f"] for state in states(disk)}
    assert {b"old", b"oldA", b"old\0B", b"oldAB"} <= found


def test_unsynced_data_is_torn_at_the_borders_of_sectors_and_pages(disk: Disk) -> None:
    data = bytes(range(1, 251)) * 20
    disk.write(2, 3, data)
    found = {state["d/f"] for state in states(disk)}
    for border in (512, 1024, 4096, 4608):
        whole = b"old" + data
        assert whole[:border] in found
        assert whole[:border] + bytes(len(whole) - border) in found
        assert b"old" + bytes(border - 3) + whole[border:] in found
    assert b"old" + bytes(len(data)) in found
    assert all(one is not None and one.startswith(b"old") for one in found)


def test_of_few_volatile_changes_every_subset_is_tried(disk: Disk) -> None:
    for number in range(4):
        disk.make_folder(ROOT, f"x{number}", 10 + number)
    assert len(states(disk)) == 2**4


def test_of_many_volatile_changes_all_but_each_one_is_tried(disk: Disk) -> None:
    names = {f"x{number}" for number in range(40)}
    for number in range(40):
        disk.make_folder(ROOT, f"x{number}", 10 + number)
    found = {frozenset(state) - {"d", "d/f"} for state in states(disk)}
    assert {frozenset(names - {name}) for name in names} <= found
    assert {frozenset({name}) for name in names} <= found
    assert frozenset() in found
    assert frozenset(names) in found


def test_what_no_name_leads_to_is_not_varied(disk: Disk) -> None:
    disk.make_file(1, "g", 10)
    disk.remove(1, "g")
    disk.sync(1)
    disk.write(10, 0, b"data")
    assert disk.volatile() == []


def test_a_disk_that_holds_a_state_shows_it(disk: Disk) -> None:
    layout: Layout = {"a": None, "a/b": None, "a/b/c": b"x", "z": b""}
    assert Disk.holding(layout).seen() == layout
    assert states(Disk.holding(layout)) == [layout]


def test_a_forgotten_sync_is_left_out_and_half_a_sync_is_half(disk: Disk) -> None:
    operations = [
        Do("make_file", (1, "g", 10)),
        Do("write", (10, 0, b"data")),
        SyncBegun(1, None, ""),
        SyncEnded(1),
    ]

    def left(forgets: object) -> set[object]:
        copy = Disk.holding(disk.seen())
        replay(copy, without(operations, forgets), lambda place, operation: None)  # type: ignore[arg-type]
        return {state.get("d/g", "gone") for state in states(copy)}

    assert left(lambda sync: sync) == {b"data"}
    assert "gone" in left(lambda sync: None)
    assert "gone" in left(lambda sync: narrowed(sync, data=True, names=False))
    only_names = left(lambda sync: narrowed(sync, data=False, names=True))
    assert "gone" not in only_names
    assert {b"", b"data"} <= only_names


def recorded(tmp_path: Path, script: str) -> Recording:
    """What a shell or Python script does in a folder, by a real strace."""
    import subprocess
    import sys

    from tests.torture.operations import CALLS, whole

    require_strace()
    top = (tmp_path / "top").resolve()
    top.mkdir()
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-q", "-s", "0", "-o", str(trace), "-e", f"trace={CALLS}"]
    subprocess.run([*whole(command), sys.executable, "-c", script, str(top)], check=True)
    recording = Recording(top)
    recording.add(parse(trace.read_text()))
    recording.check()
    return recording


def test_a_recording_of_real_calls_gives_what_lies_on_the_disk(tmp_path: Path) -> None:
    script = """
import os, sys
os.chdir("/")
top = sys.argv[1]
os.mkdir(top + "/d")
d = os.open(top + "/d", os.O_RDONLY)
f = os.open("f", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=d)
os.write(f, b"one\\x00\\xff\\"\\n")
os.rename("f", top + "/g", src_dir_fd=d)
os.writev(f, [b"two", b"three"])
os.fsync(f)
os.close(f)
f = os.open(top + "/g", os.O_WRONLY)      # the same number, perhaps, and another offset
os.write(f, b"ONE")
os.ftruncate(f, 9)
os.link(top + "/g", top + "/d/h")
os.unlink(top + "/g")
os.fsync(d)
"""
    recording = recorded(tmp_path, script)
    assert recording.disk.seen() == {"d": None, "d/h": b'ONE\0\xff"\ntw'}
    synced = [o.path for o in recording.operations if isinstance(o, SyncBegun)]
    assert synced == ["g", "d"]


def test_a_call_that_a_death_cut_off_is_known_by_its_name() -> None:
    text = (
        '7 mkdir("\\x61", 0777) = 0\n'
        '8 renameat(3</x>, "a" <unfinished ...>\n'
        "7 fsync(5</y> <unfinished ...>\n"
        "7 <... fsync resumed>) = 0\n"
        "8 +++ killed by SIGKILL +++\n"
    )
    (call,) = cut_off(text)
    assert (call.name, call.arguments, call.result) == ("renameat", '3</x>, "a"', "?")
