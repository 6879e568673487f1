"""The snapshot: what it saves, when it is believed, and that nothing rests on it."""

from __future__ import annotations

import math
import random
import shutil
import threading
from pathlib import Path

import pytest

from pkgindex._core import Graph
from pkgindex.errors import StoreDamaged
from pkgindex.store import packages, recovery
from pkgindex.store.check import check, repair
from pkgindex.store.mount import Mount
from pkgindex.store.offline import Offline
from tests.servers import Server, Wire
from tests.store.reading import head_of, read_files, read_index, reversed_index
from tests.store.test_rules_claiming import caught, mutants
from tests.store.writer import Writer, index_of, recovered_index


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "index"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshots(root: Path) -> list[str]:
    return names(root / "snapshot")


def without_files(root: Path) -> None:
    """Only the snapshot and the journal are left to read."""
    for path in (root / "forward").glob("*/*"):
        path.unlink()


def test_a_start_reads_the_snapshot_and_the_journal_and_no_package_file(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a", "INDEX|c|a,b", "INDEX|gone|")
        writer.write_files()
        assert snapshots(root) == [f"{4:016x}"]
        writer.ask("INDEX|d|c", "REMOVE|gone|", "INDEX|b|")
        writer.write_files()  # they are in their files, and yet in the journal for the snapshot's sake
        writer.ask("INDEX|e|d", "INDEX|c|")
        expected = writer.index
    assert snapshots(root) == [f"{4:016x}"]
    without_files(root)
    assert recovered_index(root) == expected


def test_what_only_the_snapshot_lacks_is_not_written_to_files_again(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        writer.ask("INDEX|b|a")
        writer.write_files()
        writer.ask("INDEX|c|")
        expected = writer.index
    for _ in range(3):  # and stays known as such from start to start
        with Writer(root) as writer:
            assert writer.index == expected
            assert writer.graph.dirty_packages() == ["c"]
    with Writer(root) as writer:
        writer.write_files()
        without_files(root)
        writer.ask("INDEX|d|c,b")
        expected = writer.index
    assert recovered_index(root) == expected


def test_a_new_snapshot_takes_the_place_of_the_old_and_lets_the_journal_go(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        writer.ask("INDEX|b|a")
        writer.write_files()
        assert len(names(root / "journal")) > 1
        monkeypatch.setattr(packages, "SNAPSHOT_JOURNAL_BYTES", 100)
        writer.ask("INDEX|c|b")
        writer.write_files()
        assert snapshots(root) == [f"{3:016x}"]
        assert len(names(root / "journal")) == 1
        expected = writer.index
    without_files(root)
    assert recovered_index(root) == expected


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "flipped", "no line"])
def test_a_snapshot_that_is_not_what_the_head_says_is_not_believed(root: Path, how: str) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a")
        writer.write_files()
        writer.ask("INDEX|c|b")
        expected = writer.index
    path = root / "snapshot" / snapshots(root)[0]
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(
            {
                "cut": data[:-3],
                "longer": data,
                "flipped": data.replace(b"+a|", b"+x|"),
                "no line": data.replace(b"+a", b"?a"),
            }[how]
        )
        if how == "longer":
            path.write_bytes(data + b"+z||\n")
    assert recovered_index(root) == expected
    with Offline(str(root)) as store:
        report = check(store)
        # What lies behind the bytes that the head names is nothing to anybody.
        assert report.is_sound == (how == "longer")
        if not report.is_sound:
            assert not report.problems
            repair(store, report)
    with Offline(str(root)) as store:
        assert check(store).is_sound


def test_a_snapshot_that_no_head_names_is_not_read_and_goes(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
    (root / "snapshot" / f"{1:016x}").write_bytes(b"+wrong||\n")
    with Writer(root) as writer:
        assert writer.index == {"a": []}
        writer.ask("INDEX|b|")
        writer.write_files()
        assert snapshots(root) == [f"{2:016x}"]


@pytest.mark.parametrize("how", ["missing", "cut", "another's"])
@pytest.mark.parametrize("package", ["a", "b", "c"])  # depended on; depends on it; neither
def test_check_mends_a_forward_file_from_the_snapshot(root: Path, how: str, package: str) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a", "INDEX|c|", "INDEX|d|a,b")
        writer.write_files()
        writer.ask("INDEX|e|d")
        expected = writer.index
    (path,) = (root / "forward").glob(f"*/{package}")
    (other,) = (root / "forward").glob("*/d")
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:-1] if how == "cut" else other.read_bytes())
    with Offline(str(root)) as store:
        report = check(store)
        assert not report.problems
        assert [p.path for p in report.derived] == [str(path.relative_to(root))]
        repair(store, report)
    assert path.read_bytes() == data
    with Offline(str(root)) as store:
        assert check(store).is_sound
    with Writer(root, rebuild=True) as writer:
        assert writer.index == expected


def test_check_mends_no_file_that_somebody_changed(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a")
        writer.write_files()
    with Writer(root.parent / "other") as writer:
        writer.ask("INDEX|a|", "INDEX|b|")
        writer.write_files()
    (path,) = (root / "forward").glob("*/b")
    path.write_bytes((root.parent / "other" / path.relative_to(root)).read_bytes())
    with Offline(str(root)) as store:
        assert [p.path for p in check(store).problems] == [str(path.relative_to(root))]


def test_rebuild_believes_the_files_and_check_names_those_that_differ(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a", "INDEX|c|")
        writer.write_files()
    (lost,) = (root / "forward").glob("*/c")
    lost.unlink()
    assert "c" in recovered_index(root)
    with Offline(str(root)) as store:
        assert [p.path for p in check(store).derived] == [str(lost.relative_to(root))]
    mount = Mount(str(root))
    with Server(f"file:{root}", "--rebuild") as server, Wire(server.address) as wire:
        assert wire.ask(b"QUERY|c|") == b"FAIL\n"
        assert wire.ask(b"QUERY|b|") == b"OK\n"
    assert "c" not in recovered_index(mount)


@mutants("published before it is durable")
def test_w5_a_snapshot_is_published_only_when_all_that_was_copied_is_durable(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        writer.apply("INDEX|b|")  # not committed
        behind = writer.write_behind()
        if mutant:
            monkeypatch.setattr(behind, "_durable", lambda ticket: True)
        behind.stop(math.inf)
        monkeypatch.setattr(behind, "_late", lambda: True)  # it does not wait for ever
        monkeypatch.setattr(packages, "SNAPSHOT_JOURNAL_BYTES", 1)
        behind._written_snapshot()
        with caught(mutant):
            assert snapshots(root) == [f"{1:016x}"]


@mutants("dropped before the head that names it")
def test_w6_the_journal_keeps_what_the_snapshot_lacks_until_a_durable_head_names_a_newer_one(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        writer.ask("INDEX|b|a")
        writer.write_files()
        expected = writer.index
        monkeypatch.setattr(packages, "SNAPSHOT_JOURNAL_BYTES", 1)

        class Died(Exception):
            pass

        def die() -> None:
            if mutant:
                writer.journal._base = writer.journal.snapshot.change  # type: ignore[union-attr]
                writer.journal.drop_covered()
            raise Died

        behind = writer.write_behind()
        writer.journal.snapshot = behind._written_snapshot()
        monkeypatch.setattr(writer.journal, "rotate", die)
        with pytest.raises(Died):
            writer.journal.rotate()
    without_files(root)
    with caught(mutant):
        assert recovered_index(root) == expected


@mutants("not asked for")
@pytest.mark.parametrize("snapshot", [False, True])
def test_w6_a_first_segment_that_is_missing_and_needed_is_damage(
    root: Path, mutant: str, snapshot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not snapshot:
        monkeypatch.setattr(packages.WriteBehind, "_written_snapshot", lambda _: None)
    with Writer(root) as writer:
        writer.ask("INDEX|z|")
        writer.write_files()
        writer.ask("INDEX|a|")
        writer.journal.rotate()
        writer.ask("INDEX|b|")
        if snapshot:
            writer.write_files()
    first = names(root / "journal")[0]
    (root / "journal" / first).unlink()
    if mutant:
        monkeypatch.setattr(recovery.Head, "base", 99)
    with caught(mutant), pytest.raises(StoreDamaged, match=first):
        recovered_index(root)


@mutants("the newest head's are all")
def test_c7_reverse_files_that_a_round_cut_short_was_to_write_are_owed_still(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|lib|", *(f"INDEX|p{n}|lib" for n in range(4097)))
        behind = writer.write_behind()
        assert behind._round()
        writer.ask("REMOVE|p7|")
        behind.settled(writer.graph.settled)
        assert behind._round()  # now all is written but for the large file
        assert writer.graph.owed_lines() == b"*lib\n"
        behind.stop(math.inf)
        with monkeypatch.context() as patch:
            patch.setattr(behind, "_late", lambda: True)
            behind._release_owed()
            assert not behind._round()
    if mutant:
        monkeypatch.setattr(recovery, "_owed", lambda lines: b"")
    with Writer(root) as writer:
        with caught(mutant):
            assert writer.graph.dirty_reverses() == ["lib"]
        writer.write_files()
    with caught(mutant):
        assert read_files(root, "reverse") == reversed_index(read_index(root))


def test_w6_a_segment_that_was_begun_before_it_was_asked_for_is_not_the_one_asked_for(
    root: Path,
) -> None:
    with Writer(root) as writer:
        journal = writer.journal
        told: list[int] = []

        def end_a_round() -> None:
            journal.written = 1
            journal.rotate()
            told.append(journal._base)

        second = threading.Thread(target=end_a_round)

        def owed_meanwhile() -> bytes:
            journal._owed = bytes
            second.start()
            second.join(0.2)  # it has asked, and waits
            return b""

        writer.ask("INDEX|a|")
        journal._owed = owed_meanwhile
        journal.rotate()  # as the commit thread does by itself when a segment is full
        second.join(60)
        assert told == [1]


def test_what_is_no_snapshot_in_their_folder_is_left_alone(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        (root / "snapshot/@eaDir").mkdir()
        (root / "snapshot/notes.txt").write_text("mine")
        writer.write_files()
        assert snapshots(root) == [f"{1:016x}", "@eaDir", "notes.txt"]


def test_a_store_of_before_snapshots_is_repaired_before_any_server_has_had_it(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a")
        writer.write_files()
    shutil.rmtree(root / "snapshot")
    (wrong,) = (root / "reverse").glob("*/a")
    wrong.unlink()
    with Offline(str(root)) as store:
        report = check(store)
        assert not report.problems
        repair(store, report)
    with Offline(str(root)) as store:
        assert check(store).is_sound


def test_heads_of_the_release_before_are_read(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        writer.ask("INDEX|b|")
        head = head_of((root / "journal" / names(root / "journal")[-1]).read_bytes())
        assert head is not None
        assert head[0]["snapshot"] is not None
    old = recovery.parse_head

    def of_before(data: bytes) -> tuple[recovery.Head, int]:
        head, end = old(data)
        object.__setattr__(head, "written", recovery.UNKNOWN)
        object.__setattr__(head, "snapshot", None)
        return head, end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "parse_head", of_before)
        assert recovered_index(root) == {"a": [], "b": []}


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_in_pieces_meets_every_package_that_stays_whatever_comes_and_goes(seed: int) -> None:
    with_seed = random.Random(seed)
    graph = Graph()

    def replay(line: str) -> None:
        graph.replay(line.encode(), track=False)

    stays = {f"stays-{i}" * (i % 3 + 1) for i in range(300)}
    for name in sorted(stays, key=lambda _: with_seed.random()):
        replay(f"+{name}||\n")
        replay(f"+x{with_seed.randrange(99)}||\n")
    met: list[str] = []
    last = 0
    while True:
        lines, count, last = graph.walk(last, 1 << 16, with_seed.randrange(1, 9))
        found = [line[1:].partition("|")[0] for line in lines.decode().splitlines()]
        assert len(found) == count
        met += found
        if not last:
            break
        for _ in range(5):
            sign = with_seed.choice("+-")
            name = f"x{with_seed.randrange(99)}" * with_seed.randrange(1, 4)
            replay(f"{sign}{name}|{'|' if sign == '+' else ''}\n")
    assert stays <= set(met)
    assert all(name in stays or name.startswith("x") for name in met)
    assert len([name for name in met if name in stays]) == len(stays)
    assert set(graph) >= stays


def test_a_piece_of_a_walk_is_bounded_where_all_was_removed_too() -> None:
    graph = Graph()
    graph.replay("".join(f"+x{n}||\n" for n in range(1000)).encode(), track=False)
    graph.replay(b"+last||\n", track=False)
    graph.replay("".join(f"-x{n}|\n" for n in range(1000)).encode(), track=False)
    pieces = 0
    last = 0
    while True:
        lines, _, last = graph.walk(last, 1 << 16, 100)
        pieces += 1
        if not last:
            break
    assert pieces >= 10
    assert lines == b"+last||\n"
    assert list(graph) == ["last"]


def test_a_snapshot_walks_and_loads_an_index_with_cycles_and_dependencies_in_any_order() -> None:
    graph = Graph()
    graph.replay(b"+a|b,c|\n+b|a|\n+c|c|\n+d||\n", track=False)
    again = Graph()
    lines, count, _ = graph.walk()
    assert count == 4
    again.replay(lines, track=False)
    again.verify()
    assert index_of(again) == index_of(graph)


def test_names_beyond_what_is_looked_up_ahead_are_replayed_all_the_same() -> None:
    deps = [f"d{i}" for i in range(1000)]
    lines = "".join(f"+{d}||\n" for d in deps) + f"+many|{','.join(deps)}|\n+few|d1,d2|\n"
    graph = Graph()
    graph.replay(lines.encode(), track=False)
    graph.verify()
    assert len(graph.dependencies("many")) == 1000
    assert graph.dependencies("few") == ["d1", "d2"]
