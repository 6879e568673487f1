"""A whole distribution by 100 clients in random orders, broken messages among theirs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping

import pytest

from tests.conformance.conftest import Names
from tests.conformance.homebrew import load_table
from tests.reference import ERROR, FAIL, OK
from tests.servers import Address

CLIENTS = 100

#: Seconds for the whole run, which takes a few: only a server that gives wrong answers needs more.
PATIENCE = 60.0

BROKEN = [
    b"BLINDEX|a|b",
    b"REMOVES|a|b",
    b"QUER|a|b",
    b"LIZARD|a|b",
    b"I|a|b",
    b"INDEX|emacs=elisp",
    b"INDEX|emacs elisp",
    "INDEX|emacs\N{SNOWMAN}elisp".encode(),
]


class Client:
    """One of the clients, and the packages that are its share of the table."""

    def __init__(self, share: list[bytes], dice: random.Random) -> None:
        self.share = share
        self.dice = dice

    async def open(self, address: Address) -> None:
        """Connect."""
        if isinstance(address, str):
            self.reader, self.writer = await asyncio.open_unix_connection(address)
        else:
            self.reader, self.writer = await asyncio.open_connection(*address)

    async def ask(self, lines: list[bytes]) -> list[bytes]:
        """Pipeline these lines, broken ones in between; return the replies to these alone."""
        mixed: list[tuple[bytes, bool]] = []
        for line in lines:
            if self.dice.random() < 0.1:
                mixed.append((self.dice.choice(BROKEN), False))
            mixed.append((line, True))
        self.writer.write(b"".join(line + b"\n" for line, _ in mixed))
        answers = []
        for line, ours in mixed:
            answer = await self.reader.readline()
            if ours:
                answers.append(answer)
            else:
                assert answer == ERROR, f"{line!r} got {answer!r}"
        return answers

    async def repeat_until_ok(
        self, message: Callable[[bytes], bytes], others: Mapping[bytes, list[bytes]], then: bytes
    ) -> None:
        """Send a message for each package of the share, in random order, until each was OK.

        Once a package's message was OK each of its `others` must be answered with `then`.
        """
        left = self.share.copy()
        while left:
            self.dice.shuffle(left)
            answers = await self.ask([message(name) for name in left])
            assert set(answers) <= {OK, FAIL}
            done = [name for name, answer in zip(left, answers, strict=True) if answer == OK]
            await self.query([other for name in done for other in others[name]], then)
            left = [name for name, answer in zip(left, answers, strict=True) if answer == FAIL]
            if not done:  # it is others' turn: to ask again at once would only keep them from it
                await asyncio.sleep(0.01)

    async def find_unremovable(self, dependents: Mapping[bytes, list[bytes]]) -> None:
        """Try to remove what others depend on; none of it may go."""
        needed = [name for name in self.share if dependents[name]]
        answers = await self.ask([b"REMOVE|%b|" % name for name in needed])
        gone = [name for name, answer in zip(needed, answers, strict=True) if answer != FAIL]
        assert not gone, f"removed while others depend on it: {gone[:5]}, {len(gone)} in all"

    def some(self, packages: list[bytes]) -> list[bytes]:
        """Return a few of all packages: together the clients ask for the table many times."""
        return self.dice.sample(packages, min(300, len(packages)))

    async def query(self, packages: list[bytes], expected: bytes) -> None:
        """Query packages, and find the same answer for each."""
        asked = self.dice.sample(packages, len(packages))
        answers = await self.ask([b"QUERY|%b|" % name for name in asked])
        wrong = [n for n, answer in zip(asked, answers, strict=True) if answer != expected]
        assert not wrong, f"not {expected!r}: {wrong[:5]}, {len(wrong)} in all"


@pytest.mark.spec
@pytest.mark.parametrize("seed", [1])
def test_a_hundred_clients_index_query_and_remove_a_distribution(
    address: Address, names: Names, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Nobody knows an order: each client repeats its messages until all of them were OK."""
    table, stand_in = load_table()
    if stand_in:
        record_property("stand-in", stand_in)
    needs = {names(name): [names(d) for d in listed] for name, listed in table.items()}
    dependents: dict[bytes, list[bytes]] = {name: [] for name in needs}
    for name, listed in needs.items():
        for needed in listed:
            dependents[needed].append(name)
    dice = random.Random(seed)
    packages = dice.sample(list(needs), len(needs))
    shares = [packages[start::CLIENTS] for start in range(CLIENTS)]
    clients = [Client(share, random.Random(dice.random())) for share in shares]

    def index(name: bytes) -> bytes:
        return b"INDEX|%b|%b" % (name, b",".join(needs[name]))

    def remove(name: bytes) -> bytes:
        return b"REMOVE|%b|" % name

    steps: list[Callable[[Client], Coroutine[None, None, None]]] = [
        lambda client: client.query(client.share, FAIL),
        lambda client: client.repeat_until_ok(index, needs, then=OK),
        lambda client: client.find_unremovable(dependents),
        lambda client: client.query(client.share + client.some(packages), OK),
        lambda client: client.repeat_until_ok(remove, dependents, then=FAIL),
        lambda client: client.query(client.share + client.some(packages), FAIL),
    ]

    async def run() -> None:
        async with asyncio.timeout(PATIENCE):
            for client in clients:
                await client.open(address)
            for step in steps:
                async with asyncio.TaskGroup() as group:
                    for client in clients:
                        group.create_task(step(client))
            for client in clients:
                client.writer.close()
                await client.writer.wait_closed()

    asyncio.run(run())
