"""A member's unanswered messages: each runs once and is answered once, whoever writes meanwhile (F2)."""

from __future__ import annotations

import zlib
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkgindex.cluster import pending as pending_module
from pkgindex.cluster.frames import Forward
from pkgindex.cluster.pending import Chunk, Pending
from pkgindex.store.origins import Origins, replies_of

ORIGIN = "7" * 32


def sent(pending: Pending, *lines: bytes) -> Chunk:
    """A chunk that was handed to somebody."""
    pending.add(b"".join(lines), len(lines))
    return pending.handed()


def test_answers_go_to_the_chunks_in_their_order_wherever_they_are_cut() -> None:
    pending = Pending()
    one, two = sent(pending, b"a\n", b"b\n"), sent(pending, b"c\n")
    pending.answer(1, "O")
    assert (bytes(one.box), pending.answered, pending.give_out()) == (b"", 1, False)
    pending.answer(1, "OFE")  # the first is known
    assert (bytes(one.box), bytes(two.box)) == (b"OK\nFAIL\n", b"ERROR\n")
    assert pending.give_out()
    assert (pending.settled, pending.answered, pending.messages, pending.bytes) == (2, 3, 0, 0)


def test_what_nobody_has_been_given_is_not_settled_though_it_is_done() -> None:
    """A read that was evaluated waits for the change before it: answers leave in the order of tickets."""
    pending = Pending()
    sent(pending, b"a\n")
    pending.add(b"QUERY|a|\n", 1, reads=True)
    pending.handed().is_done = True
    assert not pending.give_out()
    pending.answer(1, "O")
    assert pending.give_out()
    assert pending.settled == 2


@pytest.mark.parametrize(("first", "letters"), [(2, "O"), (1, "OOO"), (4, "O")])
def test_answers_to_what_was_not_sent_are_refused(first: int, letters: str) -> None:
    pending = Pending()
    sent(pending, b"a\n", b"b\n")
    pending.add(b"c\n", 1)  # in nobody's hands
    with pytest.raises(ValueError, match="answers"):
        pending.answer(first, letters)


def test_only_what_is_after_the_mark_is_sent_again() -> None:
    pending = Pending()
    sent(pending, b"a\n", b"b\n", b"c\n")
    sent(pending, b"d\n")
    expected = [Forward(1, 3, b"a\nb\nc\n"), Forward(4, 1, b"d\n")]
    assert list(pending.forwards(0)) == expected
    assert list(pending.forwards(2)) == [Forward(3, 1, b"c\n"), expected[1]]
    assert list(pending.forwards(4)) == []


def test_it_is_full_at_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_module, "MOST_MESSAGES", 3)
    monkeypatch.setattr(pending_module, "MOST_BYTES", 10)
    many, large = Pending(), Pending()
    many.add(b"a\n", 2)
    assert many.room == 1
    many.add(b"a\n", 1)
    assert many.room == 0
    large.add(b"0123456789", 1)
    assert large.room == 0


def test_those_whose_fate_nobody_knows_are_named_and_not_sent_again() -> None:
    pending = Pending()
    sent(pending, b"a\n", b"b\n")
    sent(pending, b"c\n")
    pending.add(b"d\n", 1)
    pending.answer(1, "O")
    assert pending.forsake() == [1, 2]
    assert list(pending.forwards(0)) == []
    assert pending.give_out()
    assert (pending.settled, pending.answered) == (2, 3)
    pending.handed()
    assert list(pending.forwards(3)) == [Forward(4, 1, b"d\n")]


# --- any sequence of writers --------------------------------------------------------------------------


def letter_of(line: bytes, runs: int) -> str:
    """What a writer answers; another thing each time that it runs."""
    return "OFE"[(zlib.crc32(line) + runs) % 3]


class Writers(RuleBasedStateMachine):
    """One member and its Pending, with one writer after the other: others, and it itself.

    What is durable is a list of messages, in order; a takeover lets any part of what the writer has run
    but not told come through, and drops the rest. The table of origins is the product's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending = Pending()
        self.lines: list[bytes] = []  # by counter, from 1
        self.chunks: list[tuple[Chunk, int, int]] = []  # with the counters of its messages
        self.durable: list[bytes] = []  # what took effect, in its order
        self.letters: list[str] = []
        self.table = Origins()  # as the journal has it
        self.role = "nobody"
        self.clear()

    def clear(self) -> None:
        """Nobody has run anything that is not durable."""
        self.inbox: deque[tuple[int, bytes]] = deque()
        self.run: list[tuple[int, bytes, str]] = []
        self.told: deque[tuple[int, str]] = deque()  # on their way here
        self.expected = 0  # counter of the next message forwarded
        self.ticket = 0

    # --- clients ----------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def message(self, count: int) -> None:
        first = len(self.lines) + 1
        lines = [b"m%d\n" % (first + n) for n in range(count)]
        self.lines += lines
        chunk = self.pending.add(b"".join(lines), count)
        self.chunks.append((chunk, first, first + count - 1))
        assert chunk.first == first

    @rule()
    def read(self) -> None:
        self.chunks.append((self.pending.add(b"QUERY|a|\n", 1, reads=True), 0, 0))

    @rule()
    def flush(self) -> None:
        """What is fresh goes to whoever writes."""
        if self.role == "other":
            while self.pending.fresh:
                chunk = self.pending.handed()
                if chunk.first:
                    self.forward(Forward(chunk.first, chunk.count, chunk.lines))
        elif self.role == "self":
            while self.pending.fresh:
                self.evaluate(self.pending.handed())

    def forward(self, message: Forward) -> None:
        lines = bytes(message.lines).splitlines(keepends=True)
        assert len(lines) == message.count
        assert message.first == self.expected
        self.expected += message.count
        self.inbox += zip(range(message.first, self.expected), lines, strict=True)

    # --- another writes ---------------------------------------------------------------------------

    @precondition(lambda self: self.role == "other")
    @rule(count=st.integers(1, 5))
    def other_runs(self, count: int) -> None:
        for _ in range(min(count, len(self.inbox))):
            counter, line = self.inbox.popleft()
            self.run.append((counter, line, letter_of(line, self.durable.count(line))))

    @precondition(lambda self: self.role == "other")
    @rule(apart=st.booleans())
    def other_commits(self, apart: bool) -> None:
        first = len(self.letters) + 1
        self.commit(len(self.run))
        letters = "".join(self.letters[first - 1 :])
        if letters and apart:
            self.told += [(first + n, letter) for n, letter in enumerate(letters)]
        elif letters:
            self.told.append((first, letters))

    def commit(self, count: int) -> None:
        """So much of what was run becomes durable, with its results."""
        for counter, line, letter in self.run[:count]:
            assert counter == len(self.letters) + 1
            self.durable.append(line)
            self.letters.append(letter)
            self.table.record(ORIGIN, counter, letter)
        del self.run[:count]

    @precondition(lambda self: self.told)
    @rule(count=st.integers(1, 3))
    def answers_arrive(self, count: int) -> None:
        for _ in range(min(count, len(self.told))):
            self.pending.answer(*self.told.popleft())
        self.pending.give_out()

    @precondition(lambda self: self.role == "other")
    @rule()
    def reads_are_proven(self) -> None:
        for chunk in self.pending.reads():
            chunk.box += b"FAIL\n"
            chunk.is_done = True
        self.pending.give_out()

    # --- this one writes --------------------------------------------------------------------------

    def evaluate(self, chunk: Chunk) -> None:
        """As the writer, what no other has answered of it."""
        self.ticket += 1
        answer = replies_of(chunk.letters)
        if chunk.first:
            done = len(chunk.letters)
            lines = chunk.lines.splitlines(keepends=True)[done:]
            for counter, line in enumerate(lines, chunk.first + done):
                letter = letter_of(line, self.durable.count(line))
                self.run.append((counter, line, letter))
                answer += replies_of(letter)
        else:
            answer = b"FAIL\n"
        chunk.answer, chunk.rests = answer, self.ticket

    @precondition(lambda self: self.role == "self")
    @rule()
    def own_commit(self) -> None:
        self.commit(len(self.run))
        self.pending.settle(self.ticket)

    # --- takeovers --------------------------------------------------------------------------------

    def goes(self, survives: int) -> None:
        """The writer goes; so much of what it has run was durable, though it has told nobody."""
        self.commit(min(survives, len(self.run)))
        self.clear()
        self.role = "nobody"
        self.pending.retract()

    @rule(survives=st.integers(0, 6))
    def nobody_writes(self, survives: int) -> None:
        self.goes(survives)

    @rule(survives=st.integers(0, 6))
    def another_takes_over(self, survives: int) -> None:
        self.goes(survives)
        self.role = "other"
        resumed = self.table.resume(ORIGIN, self.pending.answered, 1)
        assert resumed is not None
        self.expected = resumed.mark + 1
        if resumed.letters:
            self.told.append((resumed.mark - len(resumed.letters) + 1, resumed.letters))
        for message in self.pending.forwards(resumed.mark):
            self.forward(message)

    @rule(survives=st.integers(0, 6))
    def this_one_takes_over(self, survives: int) -> None:
        self.goes(survives)
        self.role = "self"
        resumed = self.table.resume(ORIGIN, self.pending.answered, 1)
        assert resumed is not None
        self.pending.answer(resumed.mark - len(resumed.letters) + 1, resumed.letters)
        for chunk in tuple(self.pending.sent):
            if not chunk.is_done:
                self.evaluate(chunk)
        self.pending.give_out()

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def each_takes_effect_once_and_in_order(self) -> None:
        assert self.durable == self.lines[: len(self.durable)]

    @invariant()
    def each_is_answered_with_what_became_of_it(self) -> None:
        for chunk, first, last in self.chunks:
            if chunk.ticket > self.pending.settled:
                continue
            letters = "".join(self.letters[first - 1 : last]) if first else "F"
            assert bytes(chunk.box) == replies_of(letters)

    @invariant()
    def what_waits_is_counted(self) -> None:
        waiting = [c for c, _, _ in self.chunks if c.ticket > self.pending.settled]
        assert self.pending.messages == sum(chunk.count for chunk in waiting)
        assert self.pending.bytes == sum(len(chunk.lines) for chunk in waiting)
        assert self.pending.answered <= len(self.letters)

    def teardown(self) -> None:
        """In the end all is answered."""
        self.this_one_takes_over(0)
        self.flush()
        self.own_commit()
        assert not self.pending.messages
        assert self.durable == self.lines
        self.each_is_answered_with_what_became_of_it()


TestWriters = Writers.TestCase
TestWriters.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
