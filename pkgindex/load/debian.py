"""Reads Debian's package lists, the Packages files of an archive.

Of each paragraph the fields Package, Version, Depends, Pre-Depends and Provides count. What a
package depends on is decided by these rules, so that the same files always give the same index:

1. Of several versions of a package, within a file or among files, the newest counts, by dpkg's
   order of versions; of equal ones the first.
2. Each group of Depends and Pre-Depends gives one dependency. Version constraints, architecture
   qualifiers (`:any`) and restrictions (`[amd64]`, `<!nocheck>`) are left out: an index has names.
3. Of alternatives (`a | b | c`) the first one counts that the input can satisfy, by a package of
   that name, or else by a package that provides it.
4. A virtual name stands for its provider whose name sorts first, in ASCII order.
5. If the input can satisfy no alternative, the first one's name stays as it is: the server may have
   it, and if not, the load says that it is missing.

The library for these files is python-debian. Measured with the 63,440 paragraphs of bookworm's main
on one quiet machine: 10.3 s for `Packages.iter_paragraphs` and `relations`, 6.4 s with only these
fields asked for, against 2.0 s here. A whole load must take no more than 12 s, on a busy machine
too, and most of what the library does is for fields and details that an index has not. The tests
compare both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pkgindex.load.source import Source

__all__ = ["Debian", "version_key"]

_FIELDS: Final = {
    name.lower().encode(): name
    for name in ("Package", "Version", "Depends", "Pre-Depends", "Provides")
}
# A name, a qualifier, a version constraint, architectures, and build profiles. Debian's names are
# stricter; those that the protocol cannot carry are reported by name later.
_RELATION: Final = re.compile(
    r"\s*([^\s:|,()\[\]<>]+)(?::[\w-]+)?\s*(?:\([^()]*\)\s*)?(?:\[[^\[\]]*\]\s*)?(?:<[^<>]*>\s*)*"
)

Key = tuple[tuple[tuple[int, ...], int], ...]


@dataclass(slots=True)
class _Paragraph:
    version: str
    groups: list[str]
    provides: list[str]


class Debian:
    """The packages of all lists fed to `read`."""

    def __init__(self) -> None:
        self._newest: dict[str, _Paragraph] = {}
        self._alternatives: dict[str, tuple[str, ...]] = {}  # of each text of a group, parsed once

    def read(self, source: Source) -> None:
        """Adds a list. Raises BrokenInput for what is no such paragraph or relation."""
        for line, fields in _paragraphs(source):
            name = fields.get("Package")
            if not name:
                raise source.broken(line, "a paragraph without a package's name")
            paragraph = _Paragraph(
                fields.get("Version", ""),
                [*_items(fields.get("Pre-Depends")), *_items(fields.get("Depends"))],
                _items(fields.get("Provides")),
            )
            for group in (*paragraph.groups, *paragraph.provides):
                if group not in self._alternatives:
                    matches = [_RELATION.fullmatch(item) for item in group.split("|")]
                    if not all(matches):
                        raise source.broken(line, f"{name}: not a relation: {group.strip()!r}")
                    self._alternatives[group] = tuple(match[1] for match in matches if match)
            known = self._newest.get(name)
            try:
                if known is None or version_key(known.version) < version_key(paragraph.version):
                    self._newest[name] = paragraph
            except ValueError:
                raise source.broken(line, f"{name}: a version whose epoch is no number") from None

    def packages(self) -> dict[str, Sequence[str]]:
        """The dependencies of each package, by the rules above."""
        providers: dict[str, str] = {}
        for name, paragraph in self._newest.items():
            for provided in paragraph.provides:
                virtual = self._alternatives[provided][0]
                providers[virtual] = min(name, providers.get(virtual, name))

        def choice(alternatives: Sequence[str]) -> str:
            for alternative in alternatives:
                if alternative in self._newest:
                    return alternative
                if alternative in providers:
                    return providers[alternative]
            return alternatives[0]

        chosen = {group: choice(names) for group, names in self._alternatives.items()}
        return {
            name: list(dict.fromkeys(chosen[group] for group in paragraph.groups))
            for name, paragraph in self._newest.items()
        }


def version_key(version: str) -> tuple[int, Key, Key]:
    """What Debian's versions are ordered by (deb-version(7)): epoch, upstream part, revision.

    Raises ValueError if the epoch is not a number.
    """
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return int(epoch), _part_key(upstream), _part_key(revision)


def _part_key(part: str) -> Key:
    # Stretches without digits alternate with numbers. A stretch's end counts more than a tilde and
    # less than all else, letters less than the other characters. A part that is not there is 0.
    return tuple(
        ((*map(_weight, other), 0), int(digits or 0))
        for other, digits in re.findall(r"([^0-9]*)([0-9]*)", part or "0")
    )


def _weight(character: str) -> int:
    if character == "~":
        return -1
    return ord(character) + (0 if character.isalpha() else 256)


def _items(field: str | None) -> list[str]:
    """The non-empty items of a comma-separated field."""
    return [item for item in field.split(",") if item.strip()] if field else []


def _paragraphs(source: Source) -> Iterator[tuple[int, dict[str, str]]]:
    """The wanted fields of each paragraph, with the number of its first line."""
    fields: dict[str, str] = {}
    first = 0  # 0: between paragraphs
    current: str | None = None  # the field that a folded line continues, if it is wanted
    for number, line in enumerate(source.stream, 1):
        # A line of spaces alone separates paragraphs, as an empty one does.
        if line[0] in b" \t" and line.strip():
            if not first:
                raise source.broken(number, "a folded line before any field")
            if current:
                fields[current] += " " + line.decode("utf-8", "surrogateescape").strip()
            continue
        if not line.strip():
            if first:
                yield first, fields
            fields, first, current = {}, 0, None
            continue
        label, colon, value = line.partition(b":")
        if not colon:
            raise source.broken(number, "not a field, which is a name, a colon and a value")
        first = first or number
        current = _FIELDS.get(label.lower())
        if current:
            fields[current] = value.decode("utf-8", "surrogateescape").strip()
    if first:
        yield first, fields
