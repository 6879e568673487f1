"""Clients that contradict one another: the load under which a server is killed, and judged afterwards.

    crowd = Crowd(random)
    history.connect(…) → await crowd.prepare(client)     # once, alone
    await crowd.talk(client)                             # each of many, until its connection ends

What they change falls into small sets of packages that no dependency connects, so that the answers of
thousands of calls can be judged: *neighbourhoods*, which every client changes, each package of one upon
others of it; what a client *owns*, which it changes alone, in long pipelines, and others ask after; and
*marks*, which are there for ever and on which everything may depend.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from tests.torture.history import Client, History

__all__ = ["Crowd", "talk_all"]

#: What is answered with ERROR, whatever has been indexed.
MALFORMED = ("INDEX|a", "QUERY|a b|", "INDEX|a|b,,c", "index|a|", "", "REMOVE||", "QUERY|a|\r")


@dataclass
class Crowd:
    """What the clients talk about; each is given its own number, from 0."""

    random: random.Random
    clients: int = 50
    watchers: int = 4  # as many of them only ask
    neighbourhoods: int = 12
    neighbours: int = 5
    owned: int = 15  # packages of each client
    marks: int = 6
    silent: bool = False  # whoever talks, ends
    pause: float = 0.0  # seconds between two pipelines of a client, on average

    @property
    def names(self) -> list[str]:
        """Every package that is ever named in a message that is none but well-formed."""
        shared = [
            self.near(n, k) for n in range(self.neighbourhoods) for k in range(self.neighbours)
        ]
        own = [self.own(c, k) for c in range(self.clients) for k in range(self.owned)]
        return self.mark_names + shared + own

    @property
    def mark_names(self) -> list[str]:
        return [f"mark-{n}" for n in range(self.marks)]

    @staticmethod
    def near(neighbourhood: int, number: int) -> str:
        return f"near-{neighbourhood}-{number}"

    @staticmethod
    def own(client: int, number: int) -> str:
        return f"own-{client}-{number}"

    async def prepare(self, client: Client) -> None:
        """Index the marks: alone, and before the history that is to be judged."""
        await client.ask(f"INDEX|{mark}|" for mark in self.mark_names)

    async def level(self, client: Client) -> dict[str, frozenset[str]]:
        """Index everything without dependencies, and return the index that it leaves: alone, so that
        what follows can be judged from a known beginning without reading the store."""
        await client.ask(f"INDEX|{name}|" for name in self.names)
        return dict.fromkeys(self.names, frozenset())

    async def talk(self, client: Client, number: int) -> None:
        """Send pipelines and wait for their replies, until the connection ends, or all fall silent."""
        try:
            while not self.silent:
                await client.ask(self.pipeline(number))
                if self.pause:
                    await asyncio.sleep(self.random.expovariate(1 / self.pause))
        except ConnectionError:
            return

    def pipeline(self, number: int) -> list[str]:
        """Return the next messages of one client."""
        if number < self.watchers:
            chosen = self.random.randrange(self.neighbourhoods)
            return [f"QUERY|{self.near(chosen, self.random.randrange(self.neighbours))}|"]
        chance = self.random.random()
        if chance < 0.8:
            return self.neighbourly()
        if chance < 0.93:
            length = self.random.choice((1, 5, 40))
            mine = [self.own(number, k) for k in range(self.owned)]
            return [self.change(mine, 0.4) for _ in range(length)]
        if chance < 0.99:
            another = self.random.randrange(self.clients)
            return [f"QUERY|{self.own(another, self.random.randrange(self.owned))}|"]
        return [self.random.choice(MALFORMED)]

    def neighbourly(self) -> list[str]:
        """Return a few messages about one neighbourhood."""
        chosen = self.random.randrange(self.neighbourhoods)
        packages = [self.near(chosen, k) for k in range(self.neighbours)]
        lines = []
        for _ in range(self.random.choice((1, 1, 2, 4))):
            if self.random.random() < 0.25:
                lines.append(f"QUERY|{self.random.choice(packages)}|")
            else:
                lines.append(self.change(packages, 0.4))
        return lines

    def change(self, packages: list[str], removals: float) -> str:
        """Return an INDEX or a REMOVE of one of these packages."""
        package = self.random.choice(packages)
        if self.random.random() < removals:
            return f"REMOVE|{package}|"
        among = self.random.sample(packages, self.random.choice((0, 0, 1, 2)))
        if self.random.random() < 0.3:
            among.append(self.random.choice(self.mark_names))
        return f"INDEX|{package}|{','.join(among)}"


async def talk_all(crowd: Crowd, history: History, address: tuple[str, int] | str) -> list[Client]:
    """Connect all clients and let them talk until their connections end; give them, for their strays."""
    clients = [await history.connect(address) for _ in range(crowd.clients)]
    await asyncio.gather(*(crowd.talk(client, n) for n, client in enumerate(clients)))
    return clients
