"""The seam between the wire and the storage: what an Index is, and how a URL finds one.

The unit is the Batch: the complete lines of one received chunk, parsed but still in C. An Index that
stands on the core's Graph hands the batch on and gets all answers in one call, with no object a
message. Another, such as one on a database, iterates over the batch, which costs a tuple a message, and
gives the answers later. The protocol knows neither.

A connection that may only read is the Batch's business: Graph.apply() heeds it, and an iteration gives
False, never the message, for what is to be answered FAIL. An Index that knew nothing of it would stumble
and not change anything.

An installed package adds a scheme with an entry point in the group `pkgindex.stores`:

    [project.entry-points."pkgindex.stores"]
    postgresql = "its_module:ItsIndex"
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Protocol, Self

from pkgindex._core import Batch, Standing
from pkgindex.config import Settings
from pkgindex.errors import ConfigError, PkgindexError

__all__ = ["Answers", "Clients", "Index", "Piece", "Progress", "open_index"]

# (ticket, replies, changes): these replies may be sent once the ticket is settled, and are the answers
# to that many INDEX and REMOVE. An Index that does not know the replies yet gives an empty bytearray and
# fills it before it settles the ticket.
Piece = tuple[int, bytes | bytearray, int]

# All replies in one, if they may be sent together: once `batch.ticket` is settled. It is 0, which means
# now, unless the Index sets it. Otherwise the pieces, in order.
Answers = bytes | list[Piece]

# How far the opening has come: (done, of all), in whatever unit.
Progress = Callable[[int, int], None]


class Clients(Protocol):
    """What an Index whose right to answer comes and goes does to those who wait for it."""

    def applies(self, apply: Callable[[Batch], Answers]) -> None:
        """From now on messages are given to this instead of what was `apply` before."""

    def forsake(self, first: int, last: int) -> None:
        """Close the connections that wait for these tickets: they will never be known."""

    def admit(self, admitted: bool) -> None:
        """Take connections, or close all and take no new ones, until told otherwise."""


class Index(Standing, ABC):
    """A consistent index of packages, which answers batches in the order they come.

    Called from one event loop only. Tickets grow; each is settled after all lower ones. An Index may
    read a batch in part (leaving `start` below `stop`): it is given the rest in a later turn of the loop,
    or once it is no longer congested. It sets `settled` and `congested` itself: see Standing.
    """

    clients: Clients  # set before start()

    @classmethod
    @abstractmethod
    def open(cls, location: str, settings: Settings, progress: Progress | None = None) -> Self:
        """Open the storage at `location`, the URL without its scheme; may block for long.

        Raises PkgindexError: what is wrong, where, and what to do."""

    @abstractmethod
    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None],
        failed: Callable[[PkgindexError], None],
    ) -> None:
        """Begin to serve on `loop`: call `settled` (never from within apply()) whenever `settled` has
        grown or `congested` has ended, and `failed` when the storage can go on no longer."""

    async def ready(self) -> None:
        """Wait, after start(), until there is anything to serve clients with."""

    @abstractmethod
    def apply(self, batch: Batch) -> Answers:
        """Read messages from the batch as it allows (see Batch), and answer them."""

    @abstractmethod
    async def stop(self, timeout: float) -> dict[str, object]:
        """Settle what was applied, write what is behind, let the storage go, within `timeout` seconds.

        Nothing may be applied any more. Returns facts for the log's last line."""

    @abstractmethod
    def stats(self) -> dict[str, object]:
        """Counters for the log."""

    @abstractmethod
    def __len__(self) -> int:
        """How many packages are indexed."""

    @property
    def beyond_limit(self) -> int:
        """How many INDEX it has answered FAIL because the index is as large as `max_index` lets it be.

        An Index whose packages are not in this process's memory has no such limit."""
        return 0


def open_index(settings: Settings, progress: Progress | None = None) -> Index:
    """Open the index that `settings.store` names. Blocks; raises PkgindexError."""
    scheme, _, location = settings.store.partition(":")
    found = {point.name: point for point in entry_points(group="pkgindex.stores")}
    if scheme not in found:
        known = ", ".join(f"{name}:" for name in sorted(found))
        raise ConfigError(
            f"{settings.store}: unknown store {scheme}:; this installation knows {known}"
        )
    try:
        index: type[Index] = found[scheme].load()
    except Exception as error:
        raise ConfigError(
            f"{settings.store}: what provides {scheme}: cannot be loaded: {error}; "
            f"install or mend the package of {found[scheme].value}"
        ) from error
    return index.open(location, settings, progress)
