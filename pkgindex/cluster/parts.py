"""What a node may ask of the index that clients see, whatever that is made of."""

from collections.abc import Iterable
from typing import Protocol

from pkgindex._core import Graph
from pkgindex.cluster.feed import Feed
from pkgindex.cluster.follower import Follower
from pkgindex.cluster.pending import Chunk, Pending
from pkgindex.cluster.writer import Writer
from pkgindex.errors import PkgindexError

__all__ = ["Parts"]


class Parts(Protocol):
    """What a node does to the index that clients see."""

    pending: Pending

    def shows(self, graph: Graph | None) -> None:
        """Answer reads from this graph; None: from none."""

    def follows(self, follower: Follower | None) -> None:
        """Hand messages to this writer's stream; None: to nobody for now."""

    def writes(self, writer: Writer, feed: Feed) -> None:
        """Evaluate messages here."""

    def goes_on(self) -> None:
        """Changes are taken again."""

    def steps_down(self) -> None:
        """Keep what is unanswered for another writer."""

    def gives_out(self) -> None:
        """Pending has answers that may be given out."""

    def checked(self, reads: Iterable[Chunk]) -> None:
        """These may be evaluated, as soon as there is a graph: the writer has proved itself."""

    def forsakes(self, tickets: list[int]) -> None:
        """Close the clients that wait for these: nobody knows what became of them."""

    def admits(self, clients: bool) -> None:
        """Serve clients, or close them."""

    def fails(self, error: PkgindexError | None) -> None:
        """This server ends; None: as it was asked to."""
