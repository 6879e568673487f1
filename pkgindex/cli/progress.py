"""A progress bar on a terminal, for what takes longer than a second; elsewhere nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]

PATIENCE_SECONDS = 1.0


@contextmanager
def bar() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Give what makes a bar of a name: a function that is told (done, of all), from any thread."""
    if not sys.stderr.isatty():
        yield lambda _name: lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    began = time.monotonic()
    with Progress(
        console=Console(stderr=True), transient=True, disable=False, auto_refresh=False
    ) as shown:

        def named(name: str) -> Callable[[int, int], None]:
            task = shown.add_task(name, total=None, visible=False)

            def told(done: int, total: int) -> None:
                late = time.monotonic() - began > PATIENCE_SECONDS
                shown.update(task, completed=done, total=total, visible=late, refresh=late)

            return told

        yield named
