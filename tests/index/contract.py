"""What every Index must do, whatever it keeps its packages in: one class of tests to inherit.

    class TestMine(IndexContract):
        durable = True

        @pytest.fixture
        def url(self, tmp_path):
            return f"mine:{tmp_path}"

The Index stands behind the real protocol, and between the two a Notary that checks what one call
may take and give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from pkgindex._core import Batch
from pkgindex.config import Settings
from pkgindex.errors import PkgindexError
from pkgindex.index import Answers, Index, open_index
from pkgindex.protocol import Hub
from tests.index.inside import Inside
from tests.reference import ERROR, FAIL, MESSAGE, OK, Model
from tests.servers import Wire


class Notary:
    """Stands for an Index's apply(), and sees to it that each call keeps to the seam's rules."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.really_apply = index.apply
        self.newest = 0  # the highest ticket seen
        self.calls = 0
        self.hub: Hub
        index.apply = self.apply  # type: ignore[method-assign]

    def between(self, hub: Hub) -> Notary:
        """Stand before the hub too: an Index may have another apply() after a while."""
        self.hub = hub
        return self

    def applies(self, apply: Callable[[Batch], Answers]) -> None:
        self.really_apply = apply

    def forsake(self, first: int, last: int) -> None:
        self.hub.forsake(first, last)

    def admit(self, admitted: bool) -> None:
        self.hub.admit(admitted)

    def apply(self, batch: Batch) -> Answers:
        buffer, start, stop, room = bytes(batch.buffer), batch.start, batch.stop, batch.room
        settled = self.index.settled
        answers = self.really_apply(batch)
        self.calls += 1
        assert (batch.stop, batch.room, bytes(batch.buffer)) == (stop, room, buffer)
        assert start <= batch.start <= stop
        taken = buffer[start : batch.start]
        assert not taken or taken.endswith(b"\n"), "a message was taken in part"
        lines = taken.split(b"\n")[:-1]
        messages = [MESSAGE.fullmatch(line) for line in lines]
        changes = sum(1 for message in messages if message and message[1] != b"QUERY")
        assert batch.changes == changes <= room
        assert self.index.settled == settled, "settled() belongs to a later turn of the loop"
        if isinstance(answers, bytes):
            assert answers.count(b"\n") == len(lines)
            assert not batch.ticket or batch.ticket > settled
            assert not batch.ticket or batch.ticket >= self.newest - 1
            self.newest = max(self.newest, batch.ticket)
            return answers
        tickets = [ticket for ticket, _, _ in answers]
        assert tickets == sorted(set(tickets))
        assert [ticket for ticket in tickets if ticket] == [t for t in tickets if t > settled]
        assert not tickets or not tickets[-1] or tickets[-1] >= self.newest - 1
        assert sum(count for _, _, count in answers) == changes
        known = [replies for _, replies, _ in answers if isinstance(replies, bytes)]
        if len(known) == len(answers):
            assert b"".join(known).count(b"\n") == len(lines)
        self.newest = max([self.newest, *tickets])
        return answers


class IndexContract:
    """Inherit, and give `url`."""

    #: Whether what was answered is there when the same URL is opened again.
    durable = False

    @pytest.fixture
    def url(self) -> str:
        """Return the URL of an empty store, the same one throughout a test."""
        raise NotImplementedError

    def opened(self, url: str) -> Index:
        """Open the Index at the URL."""
        return open_index(Settings(store=url))

    @pytest.fixture
    def inside(self, url: str) -> Iterator[Inside]:
        """The Index behind a listening socket."""
        index = self.opened(url)
        with Inside(index, Notary(index).between) as inside:
            yield inside
        assert inside.failures == []

    def test_it_begins_empty(self, inside: Inside) -> None:
        assert inside.do(lambda: len(inside.index)) == 0
        assert isinstance(inside.do(inside.index.stats), dict)

    @pytest.mark.parametrize("seed", range(3))
    def test_it_answers_as_the_model_does(self, inside: Inside, seed: int) -> None:
        draw, model = random.Random(seed), Model()
        names = [b"a", b"b", b"c", b"gtk+", b"libstdc++6", b"x" * 255]
        with Wire(inside.address) as wire:
            for _ in range(20):
                lines = []
                for _ in range(draw.choice([1, 2, 30, 300])):
                    needed = b",".join(draw.choices(names, k=draw.choice([0, 0, 1, 3])))
                    command = draw.choice([b"INDEX", b"INDEX", b"REMOVE", b"QUERY", b"LIZARD"])
                    lines.append(b"%b|%b|%b" % (command, draw.choice(names), needed))
                assert wire.ask_all(lines) == [model.apply(line) for line in lines]
            assert inside.do(lambda: len(inside.index)) == len(model.packages)
            asked = wire.ask_all(b"QUERY|%b|" % name for name in names)
        assert asked == [OK if name in model.packages else FAIL for name in names]

    def test_broken_messages_are_errors_between_good_ones(self, inside: Inside) -> None:
        with Wire(inside.address) as wire:
            asked = [b"", b"INDEX|a|", b"INDEX|b|a,", b"QUERY|a|", b"\r", b"QUERY||", b"QUERY|b|"]
            assert wire.ask_all(asked) == [ERROR, OK, ERROR, OK, ERROR, ERROR, FAIL]

    def test_a_long_pipeline_is_answered_in_order(self, inside: Inside) -> None:
        lines = [b"INDEX|p%d|%b" % (i, b"p%d" % (i - 1) if i else b"") for i in range(1500)]
        lines += [b"REMOVE|p%d|" % i for i in range(1500)]
        with Wire(inside.address) as wire:
            assert wire.ask_all(lines) == [OK] * 1500 + [FAIL] * 1499 + [OK]
            assert wire.ask_all([b"QUERY|p1499|", b"QUERY|p1498|"]) == [FAIL, OK]

    def test_clients_see_each_others_changes_once_they_are_answered(self, inside: Inside) -> None:
        with Wire(inside.address) as one, Wire(inside.address) as other:
            for i in range(50):
                assert one.ask(b"INDEX|p%d|" % i) == OK
                assert other.ask(b"QUERY|p%d|" % i) == OK
                assert other.ask(b"INDEX|q%d|p%d" % (i, i)) == OK
                assert one.ask(b"REMOVE|p%d|" % i) == FAIL

    def test_of_two_contradicting_changes_one_fails(self, inside: Inside) -> None:
        with Wire(inside.address) as one, Wire(inside.address) as other:
            for i in range(50):
                assert one.ask(b"INDEX|base%d|" % i) == OK
                one.send(b"REMOVE|base%d|\n" % i)
                other.send(b"INDEX|top%d|base%d\n" % (i, i))
                answers = one.receive() + other.receive()
                assert sorted(answers) == [FAIL, OK]

    def test_a_client_that_ends_its_side_gets_all_its_answers(self, inside: Inside) -> None:
        with Wire(inside.address) as wire:
            wire.send(b"".join(b"INDEX|p%d|\nQUERY|p%d|\n" % (i, i) for i in range(1000)))
            wire.half_close()
            assert wire.receive_until_closed() == OK * 2000

    def test_it_takes_no_more_changes_than_there_is_room_for(self, url: str) -> None:
        index = self.opened(url)
        notary = Notary(index)
        with Inside(index, notary.between, window=3) as inside, Wire(inside.address) as wire:
            lines = [b"INDEX|p%d|" % i for i in range(150)]
            assert wire.ask_all(lines) == [OK] * 150
            assert notary.calls > 1 or inside.do(lambda: index.settled) == 0

    def test_changes_of_a_client_that_is_gone_are_kept(self, inside: Inside) -> None:
        with Wire(inside.address) as wire, Wire(inside.address) as other:
            wire.send(b"INDEX|a|\n")
            inside.wait_until(lambda: len(inside.index) == 1)
            wire.reset()
            assert other.ask(b"QUERY|a|") == OK

    def test_what_was_answered_is_there_again_if_it_promises_that(self, url: str) -> None:
        lines = [b"INDEX|a|", b"INDEX|b|a", b"INDEX|c|a,b", b"INDEX|a|c", b"INDEX|d|", b"REMOVE|d|"]
        with Inside(self.opened(url)) as inside, Wire(inside.address) as wire:
            assert wire.ask_all(lines) == [OK] * 6
        assert inside.last_facts is not None
        with Inside(self.opened(url)) as inside, Wire(inside.address) as wire:
            asked = [b"QUERY|a|", b"QUERY|b|", b"QUERY|c|", b"REMOVE|a|", b"QUERY|d|"]
            if self.durable:
                assert wire.ask_all(asked) == [OK, OK, OK, FAIL, FAIL]
            else:
                assert wire.ask_all(asked) == [FAIL, FAIL, FAIL, OK, FAIL]

    def test_what_was_applied_is_settled_by_the_time_it_has_stopped(self, url: str) -> None:
        index = self.opened(url)
        notary = Notary(index)
        with Inside(index, notary.between) as inside, Wire(inside.address) as wire:
            wire.send(b"INDEX|a|\n")
            inside.wait_until(lambda: notary.calls)
        assert index.settled >= notary.newest
        if self.durable:
            with Inside(self.opened(url)) as inside, Wire(inside.address) as wire:
                assert wire.ask(b"QUERY|a|") == OK

    def test_a_place_that_makes_no_sense_is_refused_in_one_line(self, url: str) -> None:
        scheme = url.partition(":")[0]
        with pytest.raises(PkgindexError) as refused:
            self.opened(f"{scheme}://elsewhere/index")
        assert refused.value.exit_code in (2, 3)
        assert "\n" not in str(refused.value)
