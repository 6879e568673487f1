"""The table of origins (rule F2): as a table, and through journals, heads and FORMAT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pkgindex._core import crc32c
from pkgindex.errors import StoreDamaged, UnknownFormat
from pkgindex.store import format as store_format
from pkgindex.store import origins as origins_module
from pkgindex.store import packages
from pkgindex.store.check import check, repair
from pkgindex.store.claim import claim
from pkgindex.store.journal import Head, Torn, parse_head
from pkgindex.store.mount import Mount
from pkgindex.store.offline import Offline
from pkgindex.store.origins import (
    FORGET_SECONDS,
    WINDOW,
    Origins,
    Recorded,
    Resumed,
    letters_of,
    replies_of,
)
from tests.servers import Server, Wire
from tests.store.writer import Writer

X, Y, Z = ("0123456789abcdef" * 2, "f" * 32, "0" * 32)

# --- the table ------------------------------------------------------------------------------------


def test_nothing_is_run_again_up_to_the_mark_and_results_are_kept_until_confirmed() -> None:
    table = Origins()
    table.record(X, 1, "OFE")
    table.record(X, 4, "O")
    assert table.resume(X, 0, 0) == Resumed(4, "OFEO")
    assert table.resume(X, 2, 0) == Resumed(4, "EO")
    table.confirm(X, 4)
    assert table.entries() == ((X, 5, ""),)
    assert table.resume(X, 4, 0) == Resumed(4, "")
    assert table.mark(X) == 4


def test_results_that_are_recorded_twice_are_kept_once() -> None:
    table = Origins([Recorded(X, 3, "OF")])
    table.record(X, 1, "EEOF")
    table.record(X, 4, "FEO")
    assert table.entries() == ((X, 3, "OFEO"),)


def test_counters_that_were_answered_without_a_note_are_left_out() -> None:
    table = Origins([Recorded(X, 1, "OO")])
    assert table.resume(X, 9, 0) == Resumed(9, "")
    assert table.mark(X) == 9
    table.record(X, 10, "F")
    table.record(Y, 7, "O")
    table.record(Y, 9, "F")
    assert table.entries() == ((X, 10, "F"), (Y, 9, "F"))


def test_the_window_is_bounded_by_the_oldest_results() -> None:
    table = Origins()
    table.record(X, 1, "O" * WINDOW)
    assert table.room(X) == 0
    table.record(X, WINDOW + 1, "FE")
    assert table.entries() == ((X, 3, "O" * (WINDOW - 2) + "FE"),)
    assert table.resume(X, 1, 0) is None
    table.confirm(X, 12)
    assert (table.room(X), table.room(Y)) == (10, WINDOW)


def test_an_origin_away_for_an_hour_is_forgotten_and_one_that_is_connected_is_not() -> None:
    table = Origins([Recorded(X, 1, "O"), Recorded(Y, 1, "F")])
    assert table.forget(100, {X}, 5) == []
    assert table.forget(99 + FORGET_SECONDS, {X}, 6) == []
    assert table.forgotten == 0
    assert table.forget(100 + FORGET_SECONDS, {X}, 7) == [Y]
    assert table.forgotten == 8
    assert table.forget(100 + 2 * FORGET_SECONDS, (), 9) == [X]


def test_those_away_longest_are_forgotten_where_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(origins_module, "MOST_ORIGINS", 2)
    table = Origins([Recorded(X, 1, "O")])
    table.forget(1, (), 1)
    table.record(Y, 1, "F")
    table.forget(2, (), 1)
    table.record(Z, 1, "F")
    assert table.forget(3, {X}, 4) == [Y]
    assert {X, Z} == {each.origin for each in table.entries()}


def test_an_unknown_origin_repeats_only_if_none_was_forgotten_since_it_was_there() -> None:
    table = Origins([Recorded(X, 1, "O")])
    assert table.resume(Y, 3, 0) == Resumed(3, "")
    table.forget(0, (), 41)
    table.forget(FORGET_SECONDS, (), 41)
    assert table.resume(X, 0, 41) is None
    assert table.resume(Y, 3, 42) == Resumed(3, "")
    again = Origins(table.entries(), table.forgotten)
    assert again.resume(X, 0, 41) is None


def test_what_a_batch_is_to_note_is_what_the_last_does_not_know() -> None:
    durable = Origins([Recorded(X, 1, "OO"), Recorded(Z, 1, "E")])
    evaluated = Origins(durable.entries())
    evaluated.record(X, 3, "F")
    evaluated.record(Y, 5, "OE")
    evaluated.confirm(Z, 3)
    assert evaluated.beyond(durable) == [(X, 3, "F"), (Y, 5, "OE")]
    for each in evaluated.beyond(durable):
        durable.record(*each)
    assert evaluated.beyond(durable) == []


@given(st.lists(st.sampled_from([b"OK\n", b"FAIL\n", b"ERROR\n"])).map(b"".join))
def test_replies_and_letters_stand_for_each_other(replies: bytes) -> None:
    letters = letters_of(replies)
    assert len(letters) == replies.count(b"\n")
    assert replies_of(letters) == replies


class AgainstReference(RuleBasedStateMachine):
    """Origins that answer, confirm, vanish and come back, against a dictionary that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Origins()
        self.results: dict[str, dict[int, str]] = {}  # the reference
        self.confirmed = dict.fromkeys((X, Y, Z), 0)
        self.sent = dict.fromkeys((X, Y, Z), 0)
        self.seen: dict[str, float] = {}
        self.now, self.change, self.forgot = 0.0, 0, 0

    origin = st.sampled_from([X, Y, Z])

    @rule(origin=origin, letters=st.text("OFE", min_size=1, max_size=5), again=st.integers(0, 3))
    def record(self, origin: str, letters: str, again: int) -> None:
        first = max(self.sent[origin] + 1 - again, self.confirmed[origin] + 1)
        known = self.results.setdefault(origin, {})
        for counter, letter in enumerate(letters, first):
            known.setdefault(counter, letter)
        self.table.record(origin, first, letters)
        self.sent[origin] = max(self.sent[origin], first + len(letters) - 1)
        self.change += 1

    @rule(origin=origin, answered=st.integers(1, 3))
    def answer_without_a_note(self, origin: str, answered: int) -> None:
        self.sent[origin] += answered
        self.confirmed[origin] = self.sent[origin]
        self.table.confirm(origin, self.confirmed[origin])

    @rule(origin=origin, share=st.floats(0, 1))
    def confirm(self, origin: str, share: float) -> None:
        waiting = self.sent[origin] - self.confirmed[origin]
        self.confirmed[origin] += int(share * waiting)
        self.table.confirm(origin, self.confirmed[origin])

    @rule(origin=origin, unheard=st.booleans())
    def come_back(self, origin: str, unheard: bool) -> None:
        change = self.change if unheard else self.change + 1
        found = self.table.resume(origin, self.confirmed[origin], change)
        known = self.results.get(origin)
        if known is None:
            assert (found is None) == (change < self.forgot)
            return
        mark = max(max(known), self.confirmed[origin])
        letters = [known[c] for c in range(self.confirmed[origin] + 1, mark + 1)]
        assert found == Resumed(mark, "".join(letters))

    @rule(hours=st.sampled_from([0.4, 1.0]), connected=st.sets(origin))
    def time_passes(self, hours: float, connected: set[str]) -> None:
        self.now += hours * 3600
        self.seen |= {o: self.now for o in self.results if o in connected or o not in self.seen}
        gone = {o for o in self.seen.keys() - connected if self.now - self.seen[o] >= 3600}
        assert set(self.table.forget(self.now, connected, self.change)) == gone
        for origin in gone:
            del self.results[origin], self.seen[origin]
            self.confirmed[origin] = self.sent[origin]  # it closes what waited, and goes on
            self.forgot = self.change + 1

    @rule()
    def pass_through_a_head(self) -> None:
        head = Head(1, 0, 1, None, origins=self.table.entries(), forgotten=self.table.forgotten)
        read, _ = parse_head(head.encode())
        assert read == head
        seen = self.table._seen
        self.table = Origins(read.origins, read.forgotten)
        self.table._seen = seen

    @invariant()
    def results_are_those_of_the_reference(self) -> None:
        assert len(self.table) == len(self.results)
        for origin, first, letters in self.table.entries():
            known = self.results[origin]
            assert letters == "".join(known[first + i] for i in range(len(letters)))
            assert first == self.confirmed[origin] + 1 or first == min(known)


TestAgainstReference = AgainstReference.TestCase
TestAgainstReference.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [[X], [X, 1], [X, 0, "O"], [X, 1, "o"], [X[1:], 1, "O"], [1, 1, "O"], [X, "1", "O"], 3, None],
)
def test_a_head_whose_table_is_not_one_is_torn(wrong: object) -> None:
    head = Head(1, 0, 1, None, origins=(wrong,))  # type: ignore[arg-type]
    with pytest.raises(Torn):
        parse_head(head.encode())


# --- journals -------------------------------------------------------------------------------------


def ask(writer: Writer, line: str, *notes: Recorded, told: bool = True) -> None:
    """Commit one change with notes; `told`: and let the next head know of them."""
    writer.apply(line)
    writer.graph.note(b"".join(note.line() for note in notes))
    writer.commit()
    for note in notes if told else ():
        writer.journal.origins.record(*note)


def table_of(root: Path) -> tuple[Recorded, ...]:
    """Return the table as the next writer has it."""
    with Writer(root) as writer:
        return writer.journal.origins.entries()


def test_a_killed_writers_notes_are_read_back_and_are_no_changes(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "FO"), told=False)
        ask(writer, "INDEX|b|a", Recorded(X, 3, "O"), Recorded(Y, 1, "EEO"), told=False)
    with Writer(root) as writer:
        assert writer.index == {"a": [], "b": ["a"]}
        assert writer.graph.changes == 2
        assert writer.journal.origins.entries() == ((X, 1, "FOO"), (Y, 1, "EEO"))


def test_the_table_goes_on_through_heads_when_the_batches_have_gone(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "FO"))
        writer.journal.origins.confirm(X, 1)
        writer.write_files()
        assert len(list((root / "journal").iterdir())) == 1
    assert table_of(root) == ((X, 2, "O"),)
    assert table_of(root) == ((X, 2, "O"),)
    with Writer(root) as writer:
        writer.write_files()
        ask(writer, "INDEX|b|", Recorded(X, 3, "E"))
    assert table_of(root) == ((X, 2, "OE"),)


def test_that_all_were_forgotten_is_not_forgotten(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "O"))
        for now in (0, FORGET_SECONDS):
            writer.journal.origins.forget(now, (), writer.graph.changes)
        writer.write_files()
    with Writer(root) as writer:
        writer.journal.rotate()
    with Writer(root) as writer:
        assert writer.journal.origins.entries() == ()
        assert writer.journal.origins.resume(X, 0, 1) is None


def test_a_server_that_writes_alone_keeps_the_table(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "O"))
    with Server(f"file:{root}") as server, Wire(server.address) as wire:
        assert wire.ask(b"INDEX|b|a\n") == b"OK\n"
    assert table_of(root) == ((X, 1, "O"),)


def test_a_head_that_was_made_before_the_table_was_told_loses_nothing(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "F"))
        ask(writer, "INDEX|b|", Recorded(X, 2, "O"), told=False)
        writer.journal.rotate()
        ask(writer, "INDEX|c|", Recorded(X, 3, "E"), told=False)
    assert table_of(root) == ((X, 1, "FOE"),)


def test_notes_of_what_only_the_snapshot_lacks_are_not_carried_as_redo_lines(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "SNAPSHOT_JOURNAL_BYTES", 1 << 20)
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "O"))
        writer.write_files()
        ask(writer, "INDEX|b|a", Recorded(X, 2, "O"))
        writer.write_files()  # in its file, and yet in the journal for the snapshot's sake
    with Writer(root) as writer:
        expected = writer.index
    (segment,) = (root / "journal").glob("*-00000000")
    head = parse_head(segment.read_bytes())[0]
    assert head.lines[: head.covered] == b"+b|a|\n"
    assert head.origins == ((X, 1, "OO"),)
    with Writer(root) as writer:
        assert writer.index == expected


def test_a_note_that_is_none_is_damage_that_is_named(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.journal.submit(memoryview(b"+b||\n@nobody 1 O\n"), 1, 2)
        while not writer.journal.completed():
            pass
    with pytest.raises(StoreDamaged, match=r"00000001-00000000: damaged: not a redo line"):
        Writer(root)


def test_a_head_of_before_origins_were_forgotten_is_read() -> None:
    first, fields, _ = Head(3, 1, 7, (9, 8)).encode().split(b"\n", 2)
    older = {k: v for k, v in json.loads(fields).items() if k != "forgotten"}
    body = first + b"\n" + json.dumps(older).encode() + b"\n"
    assert parse_head(body + b"head %08x\n" % crc32c(body))[0] == Head(3, 1, 7, (9, 8))


def test_repair_keeps_the_table(root: Path) -> None:
    with Writer(root) as writer:
        ask(writer, "INDEX|a|", Recorded(X, 1, "O"))
        ask(writer, "INDEX|b|a", Recorded(X, 2, "O"))
        writer.write_files()
    (reverse,) = (root / "reverse").glob("*/a")
    reverse.unlink()
    store = Offline(str(root))
    repair(store, check(store))
    with Offline(str(root)) as store:
        assert check(store).is_sound
    assert table_of(root) == ((X, 1, "OO"),)


# --- FORMAT ---------------------------------------------------------------------------------------


def test_a_feature_is_named_once_and_the_store_stays_the_same_one(root: Path) -> None:
    with Writer(root) as writer:
        store_format.require(writer.mount, writer.claim.staging, store_format.ORIGINS)
        named = (root / "FORMAT").read_bytes()
        assert json.loads(named.split(b"\n")[1])["incompatible"] == ["origins"]
        store_format.require(writer.mount, writer.claim.staging, store_format.ORIGINS)
        assert store_format.read(writer.mount) == writer.format
        writer.ask("INDEX|a|")
    assert (root / "FORMAT").read_bytes() == named
    assert table_of(root) == ()


def test_a_release_that_does_not_know_of_origins_refuses_the_store(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        store_format.require(writer.mount, writer.claim.staging, store_format.ORIGINS)
    monkeypatch.setattr(store_format, "FEATURES", frozenset())
    with pytest.raises(UnknownFormat, match="needs a release that knows origins"):
        store_format.read(Mount(str(root)))


def test_a_deposed_writer_names_no_feature(root: Path) -> None:
    with Writer(root) as writer:
        before = (root / "FORMAT").read_bytes()
        claim(writer.mount, None).staging.close()
        with pytest.raises(FileNotFoundError):
            store_format.require(writer.mount, writer.claim.staging, store_format.ORIGINS)
    assert (root / "FORMAT").read_bytes() == before
