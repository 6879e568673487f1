"""Reads JSON lines: an object a line, with a name and a list of dependencies.

    {"name": "bash", "depends": ["libc", "base-files"]}

Both keys are required, others are ignored; of a name that comes twice the last line counts.

Measured with a million lines of 128 bytes, five dependencies each, in seconds on one machine:
`json.loads` a line 5.7, `json` over 1 MiB of lines joined to one array 2.3 (and it checks nothing),
orjson a line 2.7, msgspec's typed lines over 1 MiB 1.6. Hence msgspec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from pkgindex.load.source import BrokenInput, Source

__all__ = ["JsonLines"]

_CHUNK_SIZE: Final = 1024 * 1024


class _Package(msgspec.Struct, gc=False):
    name: str
    depends: list[str]


class JsonLines:
    """The packages of all sources fed to `read`."""

    def __init__(self) -> None:
        self._packages: dict[str, Sequence[str]] = {}
        self._decoder = msgspec.json.Decoder(_Package)

    def read(self, source: Source) -> None:
        """Adds a source. Raises BrokenInput for a line that is not such an object."""
        packages = self._packages
        before = 0  # lines read in earlier chunks
        while chunk := source.stream.read(_CHUNK_SIZE):
            chunk += source.stream.readline()
            try:
                for package in self._decoder.decode_lines(chunk):
                    packages[package.name] = package.depends
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise self._located(source, before, chunk, error) from error
            before += chunk.count(b"\n")

    def packages(self) -> dict[str, Sequence[str]]:
        """The dependencies of each package."""
        return self._packages

    def _located(self, source: Source, before: int, chunk: bytes, error: Exception) -> BrokenInput:
        """What to raise for an error that is somewhere in a chunk."""
        for number, line in enumerate(chunk.split(b"\n"), before + 1):
            try:
                if line.strip():
                    line.decode()  # msgspec's own word for it differs from release to release
                    self._decoder.decode(line)
            except UnicodeError:
                return source.broken(number, "not UTF-8")
            except msgspec.MsgspecError as wrong:
                return source.broken(number, f"not a package: {wrong}")
        return source.broken(before + 1, f"not a package, here or soon after: {error}")
