"""Reads Homebrew's table: a line a package, its name, then its dependencies.

    a2ps: gettext libpaper
    perl::Foo: perl
    xz:

The name is everything before the first space, less one final colon, so that it may hold colons
itself. What follows is separated by any amount of white space. Empty lines are skipped; of a name
that comes twice the last line counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from pkgindex.load.source import Source

__all__ = ["Homebrew"]


class Homebrew:
    """The packages of all tables fed to `read`."""

    def __init__(self) -> None:
        self._packages: dict[str, Sequence[str]] = {}

    def read(self, source: Source) -> None:
        """Adds a table. Raises BrokenInput for a line without a name."""
        for number, line in enumerate(source.stream, 1):
            # surrogateescape: what is not UTF-8 is reported among the names that cannot be sent.
            name, _, dependencies = line.decode("utf-8", "surrogateescape").rstrip().partition(" ")
            if name.removesuffix(":"):
                self._packages[name.removesuffix(":")] = dependencies.split()
            elif name or dependencies:
                raise source.broken(number, "no package's name before the first space")

    def packages(self) -> dict[str, Sequence[str]]:
        """The dependencies of each package."""
        return self._packages
