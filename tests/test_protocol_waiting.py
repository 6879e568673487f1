"""Answers that wait: the window, the bounds, the order, and that nothing is left waiting for ever."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import threading
from contextlib import suppress
from typing import cast

import pytest

from pkgindex._core import Batch
from pkgindex.index import Answers
from pkgindex.protocol import CHUNK, HELD, Connection
from tests.index.inside import HandIndex, Inside
from tests.reference import ERROR, FAIL, OK, Model
from tests.servers import Wire


def send_all(wire: Wire, data: bytes) -> threading.Thread:
    """Send from another thread: the server may stop reading for long."""

    def send() -> None:
        with suppress(ConnectionError):
            wire.send(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def receive_nothing(wire: Wire) -> None:
    """Find that not a byte has come, now and for a moment."""
    wire.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        wire.socket.recv(1)
    wire.socket.settimeout(wire.patience)


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 7, 100])
def test_reading_pauses_at_the_window_and_goes_on_as_answers_leave(window: int) -> None:
    index = HandIndex()
    with Inside(index, window=window) as inside, Wire(inside.address) as wire:
        count = 20 * window + 1
        wire.send(b"".join(b"INDEX|p%d|\n" % i for i in range(count)))
        for settled in range(0, count, window):
            expected = min(settled + window, count)
            inside.wait_until(lambda n=expected: index.asked() == n)  # type: ignore[misc]
            assert inside.wait_while_it_moves(index.asked, 0.02) == expected
            inside.settle()
            assert wire.receive(expected - settled) == [OK] * (expected - settled)
        receive_nothing(wire)


def test_a_full_window_stops_reading_from_the_socket() -> None:
    index = HandIndex()
    with Inside(index, window=3) as inside, Wire(inside.address) as wire:
        sender = send_all(wire, b"INDEX|a|\n" * 2_000_000)
        inside.wait_until(lambda: index.asked() == 3)
        # Far more than the kernel holds for it: the sender would be done if the server went on.
        assert inside.wait_while_it_moves(index.asked) == 3
        assert sender.is_alive()
        wire.socket.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_queries_and_errors_do_not_count_in_the_window() -> None:
    index = HandIndex()
    with Inside(index, window=2) as inside, Wire(inside.address) as wire:
        wire.send(b"INDEX|a|\n" + b"QUERY|a|\nLIZARD\n" * 50 + b"INDEX|b|\nQUERY|a|\nINDEX|c|\n")
        inside.wait_until(lambda: index.asked() == 103)
        assert inside.wait_while_it_moves(index.asked, 0.02) == 103
        inside.settle()
        assert wire.receive(103) == [OK] + [OK, ERROR] * 50 + [OK, OK]
        inside.settle()
        assert wire.receive(1) == [OK]


def test_order_is_kept_across_commits_pauses_and_answers_that_need_not_wait() -> None:
    index, model, draw = HandIndex(), Model(), random.Random(1)
    lines = []
    for _ in range(5000):
        name = b"p%d" % draw.randrange(30)
        command = draw.choice([b"INDEX|%b|", b"REMOVE|%b|", b"QUERY|%b|", b"INDEX|%b|p1,p2", b"%b"])
        lines.append(command % name)
    expected = [model.apply(line) for line in lines]
    stop = threading.Event()
    with Inside(index, window=50) as inside, Wire(inside.address) as wire:

        def settle_now_and_then() -> None:
            while not stop.wait(0.001):
                inside.settle()

        settler = threading.Thread(target=settle_now_and_then)
        settler.start()
        try:
            assert wire.ask_all(lines) == expected
        finally:
            stop.set()
            settler.join()


def test_one_connections_full_window_stops_no_other() -> None:
    index = HandIndex()
    with (
        Inside(index, window=1) as inside,
        Wire(inside.address) as full,
        Wire(inside.address) as other,
    ):
        full.send(b"INDEX|a|\nINDEX|b|\n")
        inside.wait_until(lambda: index.asked() == 1)
        assert other.ask(b"QUERY|c|") == FAIL
        other.send(b"INDEX|c|\n")
        inside.wait_until(lambda: index.asked() == 3)
        inside.settle()
        assert (full.receive(), other.receive()) == ([OK], [OK])


# --- bounds ---------------------------------------------------------------------------------------


def test_replies_behind_a_waiting_change_are_bounded_and_all_come_in_the_end() -> None:
    index = HandIndex()
    count = 1_000_000
    with Inside(index) as inside, Wire(inside.address) as wire:
        wire.send(b"INDEX|a|\n")
        inside.wait_until(lambda: index.asked() == 1)
        sender = send_all(wire, b"QUERY|x|\n" * count)
        answered = inside.wait_while_it_moves(index.asked)
        # What may be held, and the replies to one chunk more.
        assert HELD < (answered - 1) * len(FAIL) <= HELD + CHUNK // len(b"QUERY|x|\n") * len(FAIL)
        assert sender.is_alive()
        inside.settle()
        assert wire.exchange_bytes(b"", count + 1) == OK + FAIL * count
        sender.join()


def test_a_client_that_reads_nothing_is_read_no_further() -> None:
    index = HandIndex()
    with Inside(index) as inside, Wire(inside.address) as wire:
        sender = send_all(wire, b"QUERY|x|\n" * 3_000_000)
        answered = inside.wait_while_it_moves(index.asked, 0.3)
        assert answered < 3_000_000
        with Wire(inside.address) as other:
            assert other.ask(b"QUERY|x|") == FAIL
        # It reads at last: nothing is lost.
        assert wire.exchange_bytes(b"", 3_000_000) == FAIL * 3_000_000
        sender.join()


@pytest.mark.parametrize("cut", [0, 1, 5000])
def test_an_overlong_line_behind_lines_that_wait_is_answered_in_its_turn(cut: int) -> None:
    index = HandIndex()
    overlong = b"x" * (cut + 70_000) + b"\n"
    with Inside(index, window=1, max_line=1000) as inside, Wire(inside.address) as wire:
        wire.send(b"INDEX|a|\nINDEX|b|\nINDEX|c|\n" + overlong[: cut + 1500])
        inside.wait_until(lambda: index.asked() == 1)
        sender = send_all(wire, overlong[cut + 1500 :] + b"QUERY|a|\nREMOVE|c|\n")
        for _ in range(3):
            inside.wait_until(lambda: index.graph.asked)
            inside.settle()
        assert wire.receive(5) == [OK, OK, OK, ERROR, OK]
        inside.settle()
        assert wire.receive() == [OK]
        sender.join()
        assert inside.do(lambda: inside.hub.skipped) == 1


# --- many replies leave at the end of the loop's turn ----------------------------------------------


def test_what_comes_after_many_replies_leaves_after_them() -> None:
    """An answer of its own kind in the same turn: to a line that is too long, unfinished as it is."""
    with Inside(HandIndex(), max_line=1000) as inside, Wire(inside.address) as wire:
        wire.send(b"QUERY|a|\n" * 700 + b"x" * 1100)
        assert wire.receive(701) == [FAIL] * 700 + [ERROR]


def test_many_replies_leave_before_their_connection_ends() -> None:
    with Inside(HandIndex()) as inside, Wire(inside.address) as wire:
        wire.send(b"QUERY|a|\n" * 3000)
        wire.half_close()
        assert wire.receive_until_closed() == FAIL * 3000


def test_many_replies_to_many_clients_all_leave() -> None:
    with Inside(HandIndex()) as inside:
        wires = [Wire(inside.address) for _ in range(20)]
        for turn in range(5):
            for i, wire in enumerate(wires):
                wire.send(b"QUERY|a|\n" * (1000 * turn + i) + b"LIZARD\n")
            for i, wire in enumerate(wires):
                assert wire.receive(1000 * turn + i + 1) == [FAIL] * (1000 * turn + i) + [ERROR]
        for wire in wires[::2]:  # gone before their answers leave
            wire.send(b"QUERY|a|\n" * 3000)
            wire.reset()
        inside.wait_until(lambda: len(inside.hub.connections) == 10)
        assert wires[1].ask(b"QUERY|a|") == FAIL
        for wire in wires[1::2]:
            wire.close()


def test_a_chunk_that_an_index_takes_in_parts_is_answered_in_whole() -> None:
    """What is much work is done over several turns of the loop, and others come in between."""

    class Hesitant(HandIndex):
        calls = 0

        def apply(self, batch: Batch) -> Answers:
            self.calls += 1
            stop = batch.stop
            batch.stop = batch.buffer.index(b"\n", batch.start) + 1
            answers = super().apply(batch)
            batch.stop = stop
            return answers

    index = Hesitant()
    with Inside(index) as inside, Wire(inside.address) as wire, Wire(inside.address) as other:
        wire.send(b"QUERY|a|\n" * 500 + b"INDEX|a|\nQUERY|a|\nLIZARD\n")
        other.send(b"QUERY|b|\n")
        assert wire.receive(500) == [FAIL] * 500
        assert other.receive() == [FAIL]
        inside.wait_until(lambda: index.calls == 504)
        inside.settle()
        assert wire.receive(3) == [OK, OK, ERROR]
        wire.send(b"LIZARD\n" * 50)
        wire.half_close()
        assert wire.receive_until_closed() == ERROR * 50


# --- a congested index ----------------------------------------------------------------------------


def test_a_congested_index_takes_no_changes_but_answers_queries() -> None:
    index = HandIndex()
    with Inside(index) as inside, Wire(inside.address) as wire, Wire(inside.address) as other:
        inside.do(lambda: setattr(index, "congested", True))
        wire.send(b"QUERY|a|\nLIZARD\nINDEX|a|\nQUERY|a|\n")
        assert wire.receive(2) == [FAIL, ERROR]
        assert other.ask_all([b"QUERY|a|"] * 1000) == [FAIL] * 1000
        receive_nothing(wire)
        inside.do(lambda: setattr(index, "congested", False))
        inside.do(index.tell)
        inside.wait_until(lambda: index.graph.asked)
        inside.settle()
        assert wire.receive(2) == [OK, OK]


def test_a_congestion_that_begins_among_waiting_lines_ends_for_all_of_them() -> None:
    index = HandIndex()
    with Inside(index, window=1) as inside:
        wires = [Wire(inside.address) for _ in range(20)]
        for number, wire in enumerate(wires):
            wire.send(b"INDEX|a%d|\nINDEX|b%d|\nQUERY|b%d|\n" % (number, number, number))
        inside.wait_until(lambda: index.asked() == 20)
        inside.do(lambda: setattr(index, "congested", True))
        inside.settle()
        assert [wire.receive() for wire in wires] == [[OK]] * 20
        assert inside.wait_while_it_moves(index.asked, 0.05) == 20
        inside.do(lambda: setattr(index, "congested", False))
        inside.do(index.tell)
        inside.wait_until(lambda: index.asked() == 60)
        inside.settle()
        assert [wire.receive(2) for wire in wires] == [[OK, OK]] * 20
        for wire in wires:
            wire.close()


def test_an_index_that_is_often_congested_serves_all_who_wait_in_turn() -> None:
    """On a slow mount it always is: who came first must not have all the room there ever is."""

    class Narrow(HandIndex):
        """Takes two chunks of changes a commit."""

        taken = 0

        def apply(self, batch: Batch) -> Answers:
            answers = super().apply(batch)
            self.taken += batch.changes > 0
            self.congested = self.taken >= 2
            return answers

        def settle(self) -> None:
            self.taken, self.congested = 0, False
            super().settle()

    index = Narrow()
    with Inside(index, window=10) as inside:
        wires = [Wire(inside.address) for _ in range(6)]
        for wire in wires:
            wire.send(b"INDEX|a|\n" * 2000)
        inside.wait_until(lambda: len(inside.hub.waiting) == 6)
        for _ in range(60):
            inside.settle()
        # 120 turns of 10 changes, among six.
        answered = []
        for wire in wires:
            wire.socket.settimeout(0.2)
            try:
                answered.append(len(wire.socket.recv(100_000)) // 3)
            except TimeoutError:
                answered.append(0)
            wire.close()
    assert min(answered) >= 50, answered


# --- the end of a connection ----------------------------------------------------------------------


def test_a_client_that_ends_its_side_gets_the_answers_that_wait_and_then_the_end() -> None:
    index = HandIndex()
    with Inside(index, window=2) as inside, Wire(inside.address) as wire:
        wire.send(b"".join(b"INDEX|p%d|\n" % i for i in range(5)) + b"QUERY|p4|\nINDEX|lost")
        wire.half_close()
        for _ in range(3):
            inside.wait_until(lambda: index.graph.asked)
            inside.settle()
        assert wire.receive_until_closed() == OK * 6
        inside.wait_until(lambda: not inside.hub.connections)


def test_a_client_that_ends_its_side_in_a_congestion_is_answered_after_it() -> None:
    index = HandIndex()
    with Inside(index) as inside, Wire(inside.address) as wire:
        inside.do(lambda: setattr(index, "congested", True))
        wire.send(b"INDEX|a|\nLIZARD\n")
        wire.half_close()
        receive_nothing(wire)
        inside.do(lambda: setattr(index, "congested", False))
        inside.do(index.tell)
        inside.wait_until(lambda: index.graph.asked)
        inside.settle()
        assert wire.receive_until_closed() == OK + ERROR


def test_the_changes_of_a_client_that_is_gone_are_made_all_the_same() -> None:
    index = HandIndex()
    with Inside(index, window=1) as inside:
        with Wire(inside.address) as wire:
            wire.send(b"INDEX|a|\nINDEX|b|\n")
            inside.wait_until(lambda: index.asked() == 1)
            wire.reset()
        for _ in range(2):
            inside.settle()
        inside.wait_until(lambda: not inside.hub.connections)
        inside.settle()
        assert "a" in index.graph
        assert not inside.hub.waiting


@pytest.mark.parametrize("seed", range(4))
def test_clients_that_break_off_in_the_middle_of_anything_leave_nothing_behind(seed: int) -> None:
    draw = random.Random(seed)
    index = HandIndex()
    stop = threading.Event()
    with Inside(index, window=5, max_line=2000, line_timeout=0) as inside:

        def meddle() -> None:
            while not stop.wait(0.001):
                index.congested = random.random() < 0.2
                inside.settle()

        meddler = threading.Thread(target=meddle)
        meddler.start()
        kinds = [b"INDEX|a|\n" * 30, b"QUERY|a|\n" * 9000, b"y" * 3000, b"\n", b"REMOVE|a", b"|\n"]
        try:
            for _ in range(150):
                with Wire(inside.address) as wire:
                    wire.socket.settimeout(0.01)
                    try:
                        for _ in range(draw.randint(0, 4)):
                            wire.send(draw.choice(kinds))
                        if draw.random() < 0.3:
                            wire.half_close()
                        if draw.random() < 0.3:
                            wire.socket.recv(draw.choice([1, 100_000]))
                    except (TimeoutError, ConnectionError):
                        pass
                    draw.choice([wire.reset, wire.close])()
        finally:
            stop.set()
            meddler.join()
        inside.do(lambda: setattr(index, "congested", False))
        inside.do(index.tell)
        for _ in range(40):  # a window of 5, and up to 120 changes of one who only closed its side
            inside.settle()
        inside.wait_until(lambda: not inside.hub.connections)
        assert (inside.hub.waiting, inside.hub.unfinished) == ({}, {})
        with Wire(inside.address) as wire:
            assert wire.ask_all([b"QUERY|x|", b"LIZARD"]) == [FAIL, ERROR]
        index.graph.verify()
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Connection)]


# --- trouble --------------------------------------------------------------------------------------


def test_an_index_without_memory_is_the_servers_end() -> None:
    class Exhausted(HandIndex):
        def apply(self, batch: Batch) -> Answers:
            raise MemoryError("no memory for another package")

    with Inside(Exhausted()) as inside, Wire(inside.address) as wire:
        wire.send(b"INDEX|a|\n")
        inside.wait_until(lambda: inside.failures)
        (failure,) = inside.failures
        assert failure.exit_code == 5
        assert "out of memory: no memory for another package" in str(failure)
        receive_nothing(wire)


class Roomless:
    """A transport that has no memory for what it should send."""

    def write(self, data: bytes) -> None:
        raise MemoryError

    def can_write_eof(self) -> bool:
        return False

    def abort(self) -> None:
        """Leave it to the transport that this one stands before."""

    close = abort


@pytest.mark.parametrize("line", [b"QUERY|a|\n", b"INDEX|a|\n"], ids=["at once", "settled"])
def test_no_memory_for_answers_is_the_servers_end(line: bytes) -> None:
    index = HandIndex()
    with Inside(index) as inside, Wire(inside.address) as wire:
        inside.wait_until(lambda: inside.hub.connections)
        (connection,) = inside.hub.connections
        inside.do(lambda: connection.secured(cast("asyncio.Transport", Roomless())))
        wire.send(line)
        inside.wait_until(index.asked)
        inside.settle()
        inside.wait_until(lambda: inside.failures)
        assert [failure.exit_code for failure in inside.failures] == [5]
        assert "out of memory: no room for answers" in str(inside.failures[0])
        assert not inside.unhandled


def test_the_hub_counts_what_it_did() -> None:
    with Inside(HandIndex(), max_clients=1, max_line=64) as inside:
        with Wire(inside.address) as wire:
            wire.send(b"x" * 1000)
            assert wire.receive() == [ERROR]
            with Wire(inside.address) as refused:
                assert refused.receive_until_closed() == b""
            expected = {
                "clients": 1,
                "accepted": 1,
                "refused": 1,
                "closed_late": 0,
                "closed_idle": 0,
                "skipped_lines": 1,
                "no_memory": 0,
            }
            assert expected.items() <= inside.do(inside.hub.stats).items()
        inside.wait_until(lambda: not inside.hub.connections)
