"""Speaking to a Graph as the protocol does, and reading what it renders as the file writer does."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pkgindex._core import Batch, Graph
from tests.reference import MAX_LINE, Model

#: A window that no test fills.
ROOMY = 1 << 30

#: (ticket, replies, changes): see `Graph.apply`.
Piece = tuple[int, bytes, int]

#: What stands in package files: (kind, package) to the names listed in it.
Contents = dict[tuple[str, bytes], frozenset[bytes]]

#: As `_redo.pxi` describes a record: size, kind, exists, length of the name, zero, entries.
RECORD = struct.Struct("=IBBBBI")


def chunk(data: bytes, *, room: int = ROOMY, max_line: int = MAX_LINE) -> Batch:
    """Return a batch of these bytes, which end in a newline."""
    batch = Batch(max_line)
    batch.load(bytearray(data), 0, len(data), room)
    return batch


def pieces(graph: Graph, data: bytes, *, room: int = ROOMY) -> list[Piece]:
    """Apply a chunk; the pieces of its answer, also when there is only one."""
    batch = chunk(data, room=room)
    answers = graph.apply(batch)
    if isinstance(answers, bytes):
        return [(batch.ticket, answers, batch.changes)]
    return [(ticket, bytes(replies), changes) for ticket, replies, changes in answers]


def tell(graph: Graph, *lines: bytes) -> list[bytes]:
    """Apply lines, given without their line feeds, as one chunk, and return their replies."""
    data = b"".join(line + b"\n" for line in lines)
    return b"".join(replies for _, replies, _ in pieces(graph, data)).splitlines(keepends=True)


def commit(graph: Graph) -> bytes:
    """Seal the open commit and settle it; its redo lines."""
    ticket, lines, _ = graph.seal()
    redo = bytes(lines)
    graph.settle(ticket)
    return redo


def packages(graph: Graph) -> dict[bytes, frozenset[bytes]]:
    """Return the graph as the model holds it."""
    return {
        name.encode(): frozenset(needed.encode() for needed in graph.dependencies(name))
        for name in graph
    }


def model_of(lines: Iterable[bytes]) -> Model:
    """Return a model that was told these lines."""
    model = Model()
    for line in lines:
        model.apply(line)
    return model


def expected_contents(model: Model) -> Contents:
    """Return what the package files of this index must hold."""
    contents: Contents = {}
    dependents: dict[bytes, set[bytes]] = {}
    for name, needed in model.packages.items():
        contents["forward", name] = needed
        for other in needed:
            dependents.setdefault(other, set()).add(name)
    for name, names in dependents.items():
        contents["reverse", name] = frozenset(names)
    return contents


def decode(records: bytes) -> list[tuple[str, bytes, frozenset[bytes] | None]]:
    """Return (kind, package, entries) of each record; None for a file that is to be no more."""
    found: list[tuple[str, bytes, frozenset[bytes] | None]] = []
    at = 0
    while at < len(records):
        size, kind, exists, length, zero, count = RECORD.unpack_from(records, at)
        assert zero == 0
        end = at + size
        at += RECORD.size
        name = records[at : at + length]
        at += length
        entries = []
        for _ in range(count):
            entries.append(records[at + 1 : at + 1 + records[at]])
            at += 1 + records[at]
        padding = records[at:end]
        assert len(padding) < 4, "the record's size is not what it holds"
        assert end % 4 == 0
        assert not any(padding), "the record is padded with something"
        at = end
        assert len(set(entries)) == count, "an entry comes twice"
        found.append((("forward", "reverse")[kind], name, frozenset(entries) if exists else None))
    return found


def put(contents: Contents, records: bytes) -> None:
    """Write records to the files."""
    for kind, name, entries in decode(records):
        if entries is None:
            contents.pop((kind, name), None)
        else:
            contents[kind, name] = entries


def write_round(graph: Graph, contents: Contents, *, limit: int = 4096, count: int = 64) -> None:
    """Bring the files up to what the graph holds, owed ones too."""
    graph.write_owed([name for name, _ in graph.owed_reverses()])
    graph.take_dirty()
    while (records := graph.render(limit, count)) is not None:
        put(contents, records)


def forward_lines(contents: Contents) -> bytes:
    """Return what recovery reads out of forward files."""
    return b"".join(
        b"+%b|%b|\n" % (name, b",".join(sorted(entries)))
        for (kind, name), entries in contents.items()
        if kind == "forward"
    )
