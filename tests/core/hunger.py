"""A graph that gets no memory: messages that make each part of it grow, and the judgement of each refusal."""

from __future__ import annotations

import random

from pkgindex._core import Graph, fail_allocation
from tests.core.talk import packages, pieces
from tests.reference import Model


def hungry_lines(seed: int = 1) -> list[bytes]:
    """Messages that make every part grow."""
    draw = random.Random(seed)
    names = [b"%d-" % i + b"n" * draw.randint(1, 250) for i in range(2500)]
    lines = []
    for i, name in enumerate(names):
        needed = draw.sample(names[:i], min(i, draw.choice([0, 0, 3, 30])))
        lines.append(b"INDEX|%b|%b" % (name, b",".join(needed)))
        if i % 10 == 9:
            lines.append(b"INDEX|%b|" % names[draw.randrange(i)])
            lines.append(b"REMOVE|%b|" % names[draw.randrange(i)])
    lines.append(b"INDEX|top|" + b",".join(names[:1000]))
    lines.append(b"INDEX|top|" + b",".join(names[500:1000]))
    return [line for line in lines if line.count(b",") < 900 or line.startswith(b"INDEX|top")]


def refuse_each(graph: Graph, lines: list[bytes]) -> int:
    """Carry out messages, each only after all of its allocations have failed; how many did.

    AssertionError if a refusal leaves anything else behind than what was there, or if the same message
    does not do what it should once there is memory."""
    failures = 0
    model = Model()
    for line in lines:
        data = line + b"\n"
        for n in range(100):
            before = graph.changes, graph.redo_bytes, graph.stats()["names"]
            fail_allocation(n)
            try:
                replies = pieces(graph, data)[0][1]
            except MemoryError:
                fail_allocation(-1)
                failures += 1
                assert (graph.changes, graph.redo_bytes, graph.stats()["names"]) == before
                graph.verify()
                assert packages(graph) == model.packages
            else:
                break
            finally:
                fail_allocation(-1)
        assert replies == model.apply(line)
    graph.verify()
    assert packages(graph) == model.packages
    return failures
