"""Clients that know what each of their messages must be answered."""

from __future__ import annotations

import random
import secrets
import threading
import time
from types import TracebackType
from typing import Self

from tests.cluster.servers import Member
from tests.reference import OK, Model
from tests.servers import PATIENCE, Wire


def mixed(draw: random.Random, prefix: bytes, count: int) -> list[bytes]:
    """Messages of every kind about a dozen packages, so that their order shows in the answers, and so
    does one that is carried out twice."""
    names = [b"%b%d" % (prefix, n) for n in range(12)]
    lines = []
    for _ in range(count):
        needed = b",".join(draw.choices(names, k=draw.choice([0, 0, 1, 2])))
        command = draw.choice([b"INDEX", b"INDEX", b"REMOVE", b"QUERY", b"LIZARD"])
        lines.append(b"%b|%b|%b" % (command, draw.choice(names), needed))
    return lines


class Load:
    """Clients of one server, each with packages of its own, that send pipelines and judge the answers.

    with Load(server) as load: …     they go on meanwhile; at the end everything must have been answered
    """

    def __init__(self, server: Member, clients: int = 4, pipeline: int = 50) -> None:
        self.address = server.address
        self.pipeline = pipeline
        self.answered = 0  # pipelines
        self.longest = 0.0  # seconds that one has taken
        self.failures: list[BaseException] = []
        self._prefixes = [b"%b-" % secrets.token_hex(6).encode() for _ in range(clients)]
        self._models = [Model() for _ in range(clients)]
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]

    def _run(self, number: int) -> None:
        draw, model = random.Random(number), self._models[number]
        try:
            with Wire(self.address) as wire:
                while not self._done.is_set():
                    count = draw.choice([1, self.pipeline])
                    lines = mixed(draw, self._prefixes[number], count)
                    began = time.monotonic()
                    told = wire.ask_all(lines)
                    self.longest = max(self.longest, time.monotonic() - began)
                    expected = [model.apply(line) for line in lines]
                    assert told == expected, (number, lines, told, expected)
                    self.answered += 1
        except BaseException as error:  # noqa: BLE001  # judged by the test's own thread
            self.failures.append(error)

    def goes_on(self, patience: float = PATIENCE) -> None:
        """Wait until each client may have had a few more answers."""
        wanted = self.answered + 5 * len(self._threads)
        deadline = time.monotonic() + patience
        while self.answered < wanted and not self.failures:
            assert time.monotonic() < deadline, "the clients get no more answers"
            time.sleep(0.005)
        if self.failures:
            raise self.failures[0]

    def compare(self, server: Member) -> None:
        """What this server has is what the clients expect."""
        names = [b"%b%d" % (prefix, n) for prefix in self._prefixes for n in range(12)]
        packages = {name for model in self._models for name in model.packages}
        with Wire(server.address) as wire:
            told = wire.ask_all(b"QUERY|%b|" % name for name in names)
        assert {name for name, reply in zip(names, told, strict=True) if reply == OK} == packages

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        if error is None and self.failures:
            raise self.failures[0]
