"""A store damaged at every byte: the right index, or a refusal that names the file; never a wrong index.

Each store is made once, claimed once, and then read again after each of thousands of damages.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pkgindex.store.journal import segment_name
from tests.store.damaging import (
    SHAPES,
    Damaged,
    a_head_full_of_changes,
    finish,
    one_segment,
    rewritten,
    segments,
)
from tests.store.reading import batch_ends, crc32c, head_of
from tests.store.test_rules_claiming import caught, mutants
from tests.store.writer import Writer


@pytest.fixture(params=SHAPES)
def damaged(request: pytest.FixtureRequest, root: Path) -> Damaged:
    with Writer(root) as writer:
        SHAPES[request.param](writer)
        if request.param == "a head full of changes":
            with Writer(root) as second:
                second.ask("INDEX|gettext|zlib")
                return finish(root, second)
        return finish(root, writer)


def test_the_undamaged_store_is_right(damaged: Damaged) -> None:
    assert damaged.read() == damaged.right[1]


@pytest.mark.parametrize("bit", [0x01, 0x20])
def test_a_journal_flipped_at_any_byte_is_refused_or_right(damaged: Damaged, bit: int) -> None:
    for path in segments(damaged):
        data = path.read_bytes()
        end = batch_ends(data)[-2] if path == segments(damaged)[-1] else len(data)
        for at in range(len(data)):
            flipped = bytearray(data)
            flipped[at] ^= bit
            with rewritten(path, bytes(flipped)):
                refused = damaged.judge(path, damaged.read())
            assert refused == (at < end), f"{path}: byte {at} of {len(data)}"


def test_a_journal_cut_at_any_byte_is_refused_or_right(damaged: Damaged) -> None:
    for path in segments(damaged):
        data = path.read_bytes()
        end = batch_ends(data)[-2] if path == segments(damaged)[-1] else len(data)
        for size in range(len(data)):
            with rewritten(path, data[:size]):
                refused = damaged.judge(path, damaged.read())
            assert refused == (size < end), f"{path}: cut to {size} of {len(data)}"


def test_a_journal_with_anything_behind_its_end_is_right(damaged: Damaged) -> None:
    path = segments(damaged)[-1]
    data = path.read_bytes()
    last = data[batch_ends(data)[-2] :]
    for more in (b"\0", b"\0" * 4096, b"batch ", last, last[:-1], data, b"x" * 200):
        with rewritten(path, data + more):
            assert damaged.read() == damaged.right[1]


def test_a_journal_without_one_of_its_batches_is_refused(damaged: Damaged) -> None:
    for path in segments(damaged):
        data = path.read_bytes()
        ends = batch_ends(data)
        acknowledged = ends[:-1] if path == segments(damaged)[-1] else ends
        for start, end in pairwise(acknowledged):
            with rewritten(path, data[:start] + data[end:]):
                assert damaged.judge(path, damaged.read())


def test_lower_journals_may_be_damaged_in_any_way(root: Path) -> None:
    with Writer(root) as writer:
        a_head_full_of_changes(writer)
        with Writer(root) as second:
            second.ask("INDEX|gettext|zlib")
            store = finish(root, second)
    lower = root / "journal" / segment_name(1, 0)
    for data in (b"", b"nonsense", lower.read_bytes()[:-1], segments(store)[0].read_bytes()):
        with rewritten(lower, data):
            assert store.read() == store.right[1]


def test_a_segment_that_is_gone_is_refused(damaged: Damaged) -> None:
    for path in segments(damaged)[1:] or segments(damaged):
        data = path.read_bytes()
        path.unlink()
        try:
            found = damaged.read()
        finally:
            path.write_bytes(data)
        assert isinstance(found, str)
        assert path.name in found


def test_a_journal_under_another_segments_name_is_refused(damaged: Damaged) -> None:
    path = segments(damaged)[-1]
    stranger = path.with_name(segment_name(damaged.mine.epoch + 5, 0))
    stranger.write_bytes(path.read_bytes())
    try:
        assert damaged.judge(stranger, damaged.read())
    finally:
        stranger.unlink()


@mutants("checksums are not looked at")
def test_the_judge_of_damages_notices_an_index_that_is_wrong(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without checksums takes one package's name for another."""
    with Writer(root) as writer:
        one_segment(writer)
        store = finish(root, writer)
    (path,) = segments(store)
    data = path.read_bytes().replace(b"+wget|zlib|\n", b"+wges|zlib|\n")
    if mutant:
        head = head_of(path.read_bytes())
        assert head is not None
        ends = batch_ends(path.read_bytes())
        running = crc32c(data[: ends[0]])
        whole = bytearray(data)
        for start, end in pairwise(ends):
            running = crc32c(data[start + 50 : end], crc32c(data[start : start + 41], running))
            whole[start + 41 : start + 49] = b"%08x" % running
        data = bytes(whole)
    with rewritten(path, data), caught(mutant):
        store.judge(path, store.read())


# --- package files ------------------------------------------------------------------------------------


@pytest.fixture
def files(root: Path) -> Damaged:
    """A store whose package files the journal no longer covers."""
    with Writer(root) as writer:
        writer.ask("INDEX|zlib|", "INDEX|gettext|", "INDEX|wget|zlib,gettext")
        writer.write_files()
        return finish(root, writer)


def forward(store: Damaged, package: str) -> Path:
    (path,) = (store.root / "forward").glob(f"*/{package}")
    return path


def refused(store: Damaged, path: Path) -> bool:
    """Whether who reads the files refuses this one, and names it; the snapshot gives the right index."""
    assert store.read() == store.right[1]
    return store.judge(path, store.read(rebuild=True))


def test_a_package_file_flipped_or_cut_at_any_byte_is_refused_and_named(files: Damaged) -> None:
    path = forward(files, "wget")
    data = path.read_bytes()
    for at in range(len(data)):
        for bit in (0x01, 0x20):
            flipped = bytearray(data)
            flipped[at] ^= bit
            with rewritten(path, bytes(flipped)):
                assert refused(files, path), f"byte {at}"
        with rewritten(path, data[:at]):
            assert refused(files, path), f"cut to {at}"
    for more in (b"\n", b"\0", data):
        with rewritten(path, data + more):
            assert refused(files, path)


def test_a_package_file_with_anothers_contents_is_refused_and_named(files: Damaged) -> None:
    path = forward(files, "zlib")
    with rewritten(path, forward(files, "gettext").read_bytes()):
        assert refused(files, path)
    (reverse,) = (files.root / "reverse").glob("*/zlib")
    with rewritten(path, reverse.read_bytes()):
        assert refused(files, path)


def test_a_package_file_that_is_gone_is_refused_while_something_depends_on_it(
    files: Damaged,
) -> None:
    forward(files, "zlib").unlink()
    assert files.read() == files.right[1]
    found = files.read(rebuild=True)
    assert isinstance(found, str)
    assert "wget depends on zlib" in found
    assert str(files.root / "forward") in found


@pytest.mark.parametrize("name", ["stranger", "zlib.bak", "%41%"])
def test_what_is_no_file_of_the_store_is_refused_and_named(files: Damaged, name: str) -> None:
    stranger = forward(files, "zlib").with_name(name)
    stranger.write_text("notes")
    assert refused(files, stranger)


def test_a_package_file_that_the_journal_covers_may_be_torn_at_any_byte(root: Path) -> None:
    """As a power loss in the middle of a round leaves it: it is right again after the next round."""
    with Writer(root) as writer:
        writer.ask("INDEX|zlib|", "INDEX|wget|zlib")
        writer.write_files()
        writer.ask("INDEX|gettext|", "INDEX|wget|zlib,gettext")
        store = finish(root, writer)
    path = forward(store, "wget")
    data = path.read_bytes()
    for size in range(len(data)):
        with rewritten(path, data[:size]):
            assert store.read() in store.right
            assert store.read(rebuild=True) in store.right
    path.write_bytes(data[:3])
    with Writer(root) as again:
        again.write_files()
    assert path.read_bytes().startswith(b"wget\ngettext\nzlib\nforward 2 ")
