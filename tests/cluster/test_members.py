"""The servers/ folder: who is there, and for how long nothing was heard of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex._core import crc32c
from pkgindex.cluster.members import CLEAN_SECONDS, FOLDER, Member, Members, Role, Seen
from pkgindex.store.claim import GONE, claim
from pkgindex.store.mount import Mount
from tests.store.writer import made

X, Y, Z = ("0123456789abcdef" * 2, "f" * 32, "0" * 32)


def member(name: str = X, beat: int = 0, role: Role = Role.FOLLOWER) -> Member:
    return Member(name, "h:8081", ("h:8080", "unix:/run/p"), role, 3, 41, "0.1.0", (Y,), beat)


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    found = Mount(str(tmp_path))
    found.make_folder(FOLDER)
    return found


ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
count = st.integers(0, 2**64)
members = st.builds(
    Member, ids, texts, st.lists(texts).map(tuple), st.sampled_from(Role), count, count, texts,
    st.lists(ids).map(tuple), count,
)  # fmt: skip


@given(members)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(one: Member) -> None:
    assert Member.parse(one.encode()) == one


@given(members, st.data())
@settings(max_examples=200, deadline=None)
def test_a_file_that_is_cut_or_changed_is_not_believed(one: Member, data: st.DataObject) -> None:
    raw = bytearray(one.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(ValueError):  # noqa: PT011  # whichever
        Member.parse(bytes(raw[:at]))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):  # noqa: PT011
        Member.parse(bytes(raw))


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "me"}, {"id": None}, {"cluster": 3}, {"cluster": ""}, {"cluster": "a\nb"},
        {"data": "h:1"}, {"data": None}, {"data": [1]}, {"role": "king"}, {"epoch": -1},
        {"epoch": True}, {"change": "1"}, {"reaches": ["x"]}, {"beat": 1.5}, {"version": []},
    ],
)  # fmt: skip
def test_a_field_that_is_none_is_not_believed(changes: dict[str, object]) -> None:
    fields = json.loads(member().encode().split(b"\n")[0]) | changes
    body = json.dumps(fields).encode() + b"\n"
    with pytest.raises(ValueError):  # noqa: PT011
        Member.parse(body + b"crc32c %08x\n" % crc32c(body))


def test_a_field_of_a_later_release_is_let_be() -> None:
    body = json.dumps(json.loads(member().encode().split(b"\n")[0]) | {"zone": 7}).encode() + b"\n"
    assert Member.parse(body + b"crc32c %08x\n" % crc32c(body)) == member()


def test_a_member_is_found_by_the_others_and_its_age_is_told_by_their_clock(mount: Mount) -> None:
    mine, other = Members(mount, X), Members(mount, Y)
    mine.publish(member(beat=1))
    assert other.look(100.0) == [Seen(member(beat=1), 0.0)]
    assert other.look(103.0) == [Seen(member(beat=1), 3.0)]
    mine.publish(member(beat=2))
    assert other.age(X, 104.0) == 4.0
    assert other.look(104.0) == [Seen(member(beat=2), 0.0)]
    assert (other.age(X, 105.0), other.age(Z, 105.0)) == (1.0, None)
    mine.withdraw()
    mine.withdraw()
    assert other.look(106.0) == []
    assert list(Path(mount.path(FOLDER)).iterdir()) == []


def test_a_name_that_a_listing_lacks_ages_on(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    Members(mount, X).publish(member())
    other = Members(mount, Y)
    other.look(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(mount, "names", lambda *folder: [])
        assert other.look(2.0) == []
    assert other.look(5.0) == [Seen(member(), 5.0)]


def test_a_file_that_is_damaged_or_a_strangers_is_ignored_and_ages(mount: Mount) -> None:
    folder = Path(mount.path(FOLDER))
    for name, data in {
        Y: member(Y).encode()[:-3],
        Z: member(X).encode(),
        "secret": b"",
        "README": b"hello",
        "a" * 32: b"x" * (1 << 20),
        "b" * 32 + ".new": member().encode(),
        "secret.new-77": b"",
    }.items():
        (folder / name).write_bytes(data)
    (folder / ("c" * 32)).mkdir()
    os.mkfifo(folder / ("d" * 32))
    (folder / ("e" * 32)).symlink_to(Y)
    seen = Members(mount, X)
    seen.publish(member())
    assert [each.member for each in seen.look(0.0)] == [member()]
    assert seen.clean(CLEAN_SECONDS - 1) == []
    seen.publish(member(beat=1))
    assert [each.member.beat for each in seen.look(CLEAN_SECONDS)] == [1]
    expected = {Y, Z, "a" * 32, "b" * 32 + ".new", "secret.new-77", "d" * 32, "e" * 32}
    assert set(seen.clean(CLEAN_SECONDS)) == expected
    assert {path.name for path in folder.iterdir()} == {X, "secret", "README", "c" * 32}
    assert [each.member.beat for each in seen.look(3 * CLEAN_SECONDS)] == [1]


def test_only_what_was_seen_unchanged_for_long_is_cleaned_away(mount: Mount) -> None:
    mine, other = Members(mount, X), Members(mount, Y)
    other.publish(member(Y))
    mine.publish(member())
    other.look(0.0)
    mine.publish(member(beat=1))  # it wakes before the other cleans
    assert other.clean(2 * CLEAN_SECONDS) == []
    other.look(2 * CLEAN_SECONDS)
    assert other.clean(3 * CLEAN_SECONDS) == [X]
    assert [each.member.id for each in other.look(3 * CLEAN_SECONDS)] == [Y]
    mine.publish(member(beat=2))
    assert {each.member.id for each in other.look(3 * CLEAN_SECONDS)} == {X, Y}


def test_f5_a_writers_beat_is_a_proof_that_a_deposed_one_cannot_give(tmp_path: Path) -> None:
    mount = Mount(str(tmp_path / "index"))
    made(mount)
    mount.make_folder(FOLDER)
    first = claim(mount, None)
    mine, other = Members(mount, X), Members(mount, Y)
    for beat in range(2):
        mine.publish(member(beat=beat, role=Role.WRITER), first.staging)
    second = claim(mount, None)
    with pytest.raises(OSError, match=r".") as caught:
        mine.publish(member(beat=2, role=Role.WRITER), first.staging)
    assert caught.value.errno in GONE
    (seen,) = other.look(0.0)
    assert seen.member.beat == 1
    mine.publish(replace(member(beat=3), epoch=first.epoch))
    (seen,) = other.look(1.0)
    assert (seen.member.role, seen.age) == (Role.FOLLOWER, 0.0)
    for each in (first, second):
        each.staging.close()


def test_a_temporary_file_that_is_left_is_no_hindrance(mount: Mount) -> None:
    (Path(mount.path(FOLDER)) / f"{X}.new").write_bytes(b"x" * 9999)
    mine = Members(mount, X)
    mine.publish(member())
    assert [each.member for each in mine.look(0.0)] == [member()]
