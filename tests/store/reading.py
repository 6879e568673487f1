"""Reads a store's files in plain Python, by what its pages say of the format: the tests' own oracle.

It shares nothing with the product but the checksum, and judges nothing: it takes what is whole.

    assert read_index(root) == {"wget": {"zlib"}, "zlib": set()}
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pkgindex._core import crc32c

Index = dict[str, frozenset[str]]


def read_files(root: Path, kind: str) -> Index:
    """Read every package file under forward/ or reverse/. AssertionError for one that is not whole."""
    found: Index = {}
    for path in sorted((root / kind).glob("*/*")):
        name, entries = read_file(path, kind)
        assert name not in found, f"{path}: a second file of {name}"
        found[name] = entries
    return found


def read_file(path: Path, kind: str) -> tuple[str, frozenset[str]]:
    """Read one package file: its package and its entries."""
    data = path.read_bytes()
    *body, last, empty = data.split(b"\n")
    covered = data[: data.rindex(b" ") + 1]
    assert empty == b"", f"{path}: no newline at its end"
    assert last == b"%s %d %08x" % (kind.encode(), len(body) - 1, crc32c(covered)), (
        f"{path}: {last!r}"
    )
    name, *entries = (line.decode() for line in body)
    assert entries == sorted(set(entries)), f"{path}: not sorted"
    return name, frozenset(entries)


def reversed_index(index: Index) -> Index:
    """Turn dependencies into dependents; a package that nothing depends on has no entry."""
    found: dict[str, set[str]] = {}
    for package, dependencies in index.items():
        for dependency in dependencies:
            found.setdefault(dependency, set()).add(package)
    return {package: frozenset(dependents) for package, dependents in found.items()}


def nothing_is_behind(root: Path) -> bool:
    """Whether a round is wholly over, and all written: the newest segment says so, and has no change."""
    newest = max((root / "journal").iterdir(), key=lambda path: path.name, default=None)
    if newest is None or any(is_temporary(p.name) for p in (root / "staging").glob("*/*")):
        return False
    try:
        data = newest.read_bytes()
    except FileNotFoundError:  # another has come since, and it is gone
        return False
    head = head_of(data)
    if head is None:
        return False
    fields, _, end = head
    return end == len(data) and fields["written"] == int(str(fields["next"])) - 1


def is_temporary(name: str) -> bool:
    """Whether a file in staging is on its way: part of a round, a segment or a snapshot."""
    return bool(re.fullmatch(r"t\d+|segment|segment-gone|snapshot|snapshot-gone", name))


def read_index(root: Path) -> Index:
    """Read the forward files, as far as they are whole, and the highest journal over them."""
    index: Index = {}
    for path in sorted((root / "forward").glob("*/*")):
        try:
            name, entries = read_file(path, "forward")
        except (AssertionError, ValueError):
            continue
        index[name] = entries
    for line in journal_lines(root):
        what, name = line[0], re.match(r"[^|]+", line[1:])
        assert name is not None, line
        if what == "+":
            dependencies = line.split("|")[1]
            index[name[0]] = frozenset(dependencies.split(",")) if dependencies else frozenset()
        elif what == "-":
            index.pop(name[0], None)
        else:
            assert what in "*@", line
    return index


def journal_lines(root: Path) -> Iterator[str]:
    """Give the redo lines of the highest journal that has a whole head, to the end of what is whole."""
    epochs: dict[str, list[Path]] = {}
    for path in sorted((root / "journal").iterdir()):
        epochs.setdefault(path.name.split("-")[0], []).append(path)
    for epoch in sorted(epochs, reverse=True):
        segments = [(path.read_bytes(), path) for path in epochs[epoch]]
        whole = [data for data, _ in segments if head_of(data) is not None]
        if whole:
            for data in whole:
                yield from segment_lines(data)
            return


def head_of(data: bytes) -> tuple[dict[str, object], bytes, int] | None:
    """Read a segment's head: its fields, its lines, the offset behind it; None if it is not whole."""
    match = re.match(rb"pkgindex journal 1\n(\{.*\})\n", data)
    if match is None:
        return None
    fields = json.loads(match[1])
    end = match.end() + fields["bytes"]
    closing = b"head %08x\n" % crc32c(data[:end])
    if data[end : end + len(closing)] != closing:
        return None
    return fields, data[match.end() : end], end + len(closing)


def without_room(path: Path) -> bytes:
    """Give a segment's bytes without the zeros behind its last batch, which the next ones write over."""
    return path.read_bytes().rstrip(b"\0")


def batch_ends(data: bytes) -> list[int]:
    """Give the offset of the end of the head and of each whole batch behind it.

    A batch's checksum runs over the segment up to its end, the batches' checksums left out."""
    head = head_of(data)
    assert head is not None
    ends = [head[2]]
    running = crc32c(data[: head[2]])
    pattern = re.compile(rb"batch ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{16}) ([0-9a-f]{8})\n")
    while match := pattern.match(data, ends[-1]):
        end = match.end() + int(match[1], 16)
        running = crc32c(
            data[match.end() : end], crc32c(data[match.start() : match.start(4)], running)
        )
        if end > len(data) or running != int(match[4], 16):
            break
        ends.append(end)
    return ends


def segment_lines(data: bytes) -> Iterator[str]:
    """Give the redo lines of a segment's head and of its whole batches."""
    head = head_of(data)
    assert head is not None
    yield from head[1].decode().splitlines()
    ends = batch_ends(data)
    for start, end in itertools.pairwise(ends):
        yield from data[start + BATCH_HEADER : end].decode().splitlines()


BATCH_HEADER = len(b"batch 00000031 00000002 00000000000004d2 9ae0daaf\n")
