"""The formats that `load` knows, and which of them an input has.

    jsonlines   begins with `{`                                       .jsonl .ndjson .json
    debian      has a field `Package` and another one beside it       Packages, …_Packages
    homebrew    the first line has a name, which ends in a colon

What an input begins with decides; its name decides where that tells nothing, and an explicit format
over both. Each format has a class that reads any number of sources and then says what packages
all of them hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Final, Protocol

from pkgindex.load.debian import Debian
from pkgindex.load.homebrew import Homebrew
from pkgindex.load.jsonlines import JsonLines
from pkgindex.load.source import BrokenInput, Source, open_source

__all__ = ["FORMATS", "read"]


class Reader(Protocol):
    """What reads one format."""

    def read(self, source: Source) -> None:
        """Adds a source. Raises BrokenInput."""

    def packages(self) -> dict[str, Sequence[str]]:
        """What all sources hold: the dependencies of each package."""


FORMATS: Final[dict[str, Callable[[], Reader]]] = {
    "homebrew": Homebrew,
    "debian": Debian,
    "jsonlines": JsonLines,
}

_JSON_LINES: Final = re.compile(rb"\s*\{")
_DEBIAN: Final = re.compile(
    rb"(?s)(?=.*^Package:)(?=.*^(?:Version|Architecture|Filename|Depends|Description):)[\w-]+:",
    re.MULTILINE,
)
_HOMEBREW: Final = re.compile(rb"\s*[^\s{]\S*:(?:\s|$)")
_COMPRESSION_SUFFIXES: Final = {".gz", ".xz", ".zst", ".lz4"}
_JSON_SUFFIXES: Final = {".jsonl", ".ndjson", ".json"}


def read(
    paths: Iterable[str],
    format_name: str | None = None,
    on_read: Callable[[int], object] = lambda _: None,
) -> dict[str, Sequence[str]]:
    """Reads everything, `-` being standard input; returns the dependencies of each package.

    `on_read` is called with the number of bytes of each read. Raises BrokenInput.
    """
    readers: dict[str, Reader] = {}
    for path in paths:
        with open_source(path, on_read) as source:
            name = format_name or _detected(source, path)
            if name not in readers:
                readers[name] = FORMATS[name]()
            readers[name].read(source)
    packages: dict[str, Sequence[str]] = {}
    for reader in readers.values():
        packages.update(reader.packages())
    return packages


def _detected(source: Source, path: str) -> str:
    if _JSON_LINES.match(source.head):
        return "jsonlines"
    if _DEBIAN.match(source.head.lstrip()):
        return "debian"
    file = PurePath(path)
    if file.suffix in _COMPRESSION_SUFFIXES:
        file = file.with_suffix("")
    if file.suffix in _JSON_SUFFIXES:
        return "jsonlines"
    if file.name == "Packages" or file.name.endswith("_Packages"):
        return "debian"
    if _HOMEBREW.match(source.head) or not source.head.strip():
        return "homebrew"  # Nothing at all is an empty table as well as an empty anything.
    raise BrokenInput(
        f"{source.name}: its format is not known from what it begins with; "
        f"say which it is with --format {'|'.join(FORMATS)}"
    )
