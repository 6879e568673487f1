"""`memory:` keeps nothing: a Graph alone, whose every answer may be sent at once."""

import asyncio
from collections.abc import Callable
from typing import Self

from pkgindex._core import Batch, Graph
from pkgindex.config import Settings
from pkgindex.errors import ConfigError, PkgindexError
from pkgindex.index.base import Answers, Index, Progress

__all__ = ["MemoryIndex"]


class MemoryIndex(Index):
    """An index that is gone when its process is."""

    def __init__(self, limit: int = 0) -> None:
        self._graph = Graph()
        self._graph.limit = limit
        self.apply = self._graph.apply  # type: ignore[method-assign]  # spares a call for each chunk

    @classmethod
    def open(cls, location: str, settings: Settings, progress: Progress | None = None) -> Self:  # noqa: ARG003
        """Begin empty. Raises ConfigError if `location` is not."""
        if location:
            raise ConfigError(
                f"{settings.store}: memory: keeps nothing and has no place; write just memory:"
            )
        return cls(settings.max_index)

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        settled: Callable[[], None],
        failed: Callable[[PkgindexError], None],
    ) -> None:
        """Nothing ever has to wait."""

    def apply(self, batch: Batch) -> Answers:
        """See Index."""
        return self._graph.apply(batch)

    async def stop(self, timeout: float) -> dict[str, object]:  # noqa: ARG002
        """Forget everything."""
        return {"packages": len(self)}

    def stats(self) -> dict[str, object]:
        """The graph's counters."""
        return self._graph.stats()

    def __len__(self) -> int:
        return len(self._graph)

    @property
    def beyond_limit(self) -> int:
        """See Index."""
        return self._graph.beyond_limit
