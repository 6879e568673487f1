"""packaging/haproxy.cfg: HAProxy finds nothing wrong with it; clients behind it survive restarts of all."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pkgindex.config import Settings
from tests.reference import Conversation, Model, listen
from tests.torture.rolling import (
    CONFIGURATION,
    LONGEST_WAIT,
    Balanced,
    Fleet,
    index_of,
    roll,
    why_absent,
)

needs_haproxy = pytest.mark.skipif(why_absent() is not None, reason=str(why_absent()))


@needs_haproxy
def test_haproxy_finds_nothing_wrong_with_the_configuration() -> None:
    done = subprocess.run(
        ["haproxy", "-c", "-dW", "-f", str(CONFIGURATION)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def seconds(name: str) -> float:
    """Return a time of the configuration: of a `timeout`, or what one of a server's words sets."""
    words = CONFIGURATION.read_text().split()
    value = words[words.index(name) + 1]
    return float(value.removesuffix("s"))


def test_a_takeover_is_over_before_the_checks_that_wait_for_it_fail() -> None:
    assert seconds("fall") * seconds("check") > Settings().takeover_after + 2


def test_one_server_has_room_for_the_clients_of_all() -> None:
    assert seconds("maxconn") < Settings().max_clients


@needs_haproxy
def test_a_fleet_survives_a_restart_of_every_server(tmp_path: Path) -> None:
    with Balanced(tmp_path) as balanced:
        fleet = Fleet(balanced.address, random.Random(6))
        try:
            roll(balanced, fleet, ["one", "two", "three"])
        finally:
            fleet.end()
        balanced.stop("one", "two", "three")
        fleet.judge(index_of(balanced.store))
    assert not fleet.failures
    assert fleet.reconnects >= fleet.clients  # every one of them was led to another server
    assert fleet.history.answered > 1000
    assert fleet.longest < LONGEST_WAIT
    print(
        f"{fleet.history.answered} answers, {fleet.reconnects} new connections, {fleet.repeated} messages "
        f"repeated, longest wait {fleet.longest * 1000:.0f} ms"
    )


# --- what the fleet would notice ------------------------------------------------------------------


class EndsNowAndThen(Conversation):
    """Closes connections, as a server that is restarted does."""

    def reply(self, replies: list[bytes]) -> None:
        super().reply(replies)
        if random.random() < 0.05:
            self.end()

    def end(self) -> None:
        self.transport.close()


class EndsWithinAnAnswer(EndsNowAndThen):
    def end(self) -> None:
        self.transport.write(b"O")
        super().end()


class AnswersTwice(EndsNowAndThen):
    def end(self) -> None:
        self.transport.write(b"OK\n")


class Forgets(EndsNowAndThen):
    def end(self) -> None:
        self.model.packages = {name: {} for name in self.model.packages if b"mark" in name}
        super().end()


@pytest.mark.parametrize(
    ("server", "failure"),
    [
        (EndsNowAndThen, ""),
        (EndsWithinAnAnswer, "a connection ended in the middle of an answer"),
        (AnswersTwice, "answers to nothing"),
        (Forgets, "no order of the calls explains the answers"),
    ],
)
def test_the_fleet_fails_if_and_only_if_the_servers_do(
    server: type[Conversation], failure: str
) -> None:
    model, loop = Model(), asyncio.new_event_loop()
    listening = loop.run_until_complete(listen(model, 0, server))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        fleet = Fleet(listening.sockets[0].getsockname(), random.Random(6))
        time.sleep(0.5)
        fleet.end()
        fleet.judge(
            {
                name.decode(): frozenset(each.decode() for each in needed)
                for name, needed in model.packages.items()
            }
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.close()
    assert fleet.reconnects or server is AnswersTwice
    assert bool(fleet.failures) is bool(failure)
    assert not failure or any(failure in each for each in fleet.failures)
