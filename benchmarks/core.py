"""The core alone: nanoseconds a message, bytes a package, and how both grow. No sockets, no files.

    python benchmarks/core.py                      up to a million packages; half a minute
    python benchmarks/core.py --full               up to ten million: 3 GB of memory, some minutes
    python benchmarks/core.py --table FILE         memory with a real table too: lines `name: dep dep …`

Messages come in chunks of 64 KiB, as the server gets them. Each answer is checked: a figure of wrong
answers is none. With --json FILE the figures are kept, with --plot FILE the curves are drawn.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import machine

from pkgindex._core import Batch, Graph

CHUNK = 64 * 1024
SAMPLE = 200_000  # messages of one figure
SEED = 1
NEARBY = 1000

OK, FAIL = b"OK\n", b"FAIL\n"


class Core:
    """A graph, and the time that its messages took."""

    def __init__(self, *, journalled: bool = False) -> None:
        self.graph = Graph(journalled)
        self.batch = Batch(1 << 20)
        self.journalled = journalled

    def run(self, messages: Iterable[bytes], expected: bytes | None = OK) -> float:
        """Nanoseconds a message, the making of the messages not counted; all answers must be `expected`."""
        source = iter(messages)
        spent = count = 0
        while lines := list(islice(source, CHUNK // 64)):
            chunk = bytearray(b"".join(lines))
            answers, took = self.apply(chunk)
            spent += took
            count += len(lines)
            if expected is not None and answers != expected * len(lines):
                raise SystemExit(
                    f"core: wrong answers: {answers[:60]!r} where {expected!r} was due"
                )
        return spent / max(1, count)

    def apply(self, chunk: bytearray) -> tuple[bytes, int]:
        """The answers to a chunk, and the nanoseconds they took, a commit's hand-over included."""
        answers = []
        began = (
            time.process_time_ns()
        )  # this thread is the only one, and other processes do not count
        start = 0
        while start < len(chunk):
            self.batch.load(chunk, start, len(chunk), 1 << 30)
            got = self.graph.apply(self.batch)
            answers.append(got if isinstance(got, bytes) else b"".join(piece[1] for piece in got))
            start = self.batch.start
            if self.journalled and self.graph.asked:
                self.graph.settle(self.graph.seal()[0])
        return b"".join(answers), time.process_time_ns() - began


def name_of(i: int) -> str:
    return f"package-{i}"


def dependencies(i: int, draw: random.Random, most: int = 5) -> str:
    """Up to `most` packages indexed not long before this one."""
    if i == 0:
        return ""
    low = max(0, i - NEARBY)
    # Times a width: randrange() takes five times as long.
    return ",".join({f"package-{low + int(draw.random() * (i - low))}" for _ in range(most)})


def table(size: int) -> Iterable[bytes]:
    """INDEX of so many packages with five dependencies each."""
    draw = random.Random(SEED)
    return (f"INDEX|package-{i}|{dependencies(i, draw)}\n".encode() for i in range(size))


def chosen(size: int, form: str) -> list[bytes]:
    """A sample of messages about random packages."""
    draw = random.Random(SEED + 1)
    return [form.format(draw.randrange(size)).encode() for _ in range(SAMPLE)]


def figures(size: int, *, journalled: bool = False) -> dict[str, float]:
    """Nanoseconds a message of each kind, in an index of `size` packages."""
    before = machine.resident_bytes(os.getpid())
    core = Core(journalled=journalled)
    found = {"index, 5 dependencies": core.run(table(size))}
    found["bytes a package"] = core.graph.stats()["bytes"] / size
    found["bytes a package, resident"] = (machine.resident_bytes(os.getpid()) - before) / size
    found["query, hit, random order"] = core.run(chosen(size, "QUERY|package-{}|\n"))
    found["query, miss"] = core.run(chosen(size, "QUERY|absent-{}|\n"), FAIL)
    found["index, nothing to do"] = core.run(f"INDEX|package-{i}|\n".encode() for i in [0] * SAMPLE)
    found["remove, refused"] = core.run([b"REMOVE|package-0|\n"] * SAMPLE, FAIL)
    few = SAMPLE // 4
    found["index, new, bare"] = core.run(f"INDEX|new-{i}|\n".encode() for i in range(few))
    draw = random.Random(SEED + 2)
    pairs = [(draw.randrange(size), draw.randrange(size)) for _ in range(few)]
    change = (f"INDEX|new-{i}|package-{a},package-{b}\n".encode() for i, (a, b) in enumerate(pairs))
    found["index, 2 dependencies gained"] = core.run(change)
    found["index, 2 dependencies lost"] = core.run(f"INDEX|new-{i}|\n".encode() for i in range(few))
    found["remove"] = core.run(f"REMOVE|new-{i}|\n".encode() for i in range(few))
    if len(core.graph) != size:
        raise SystemExit(f"core: {len(core.graph)} packages where {size} were due")
    return found


def hub(size: int) -> dict[str, float]:
    """Nanoseconds an edge, of a package that `size` others depend on: flat, or the cost is quadratic."""
    core = Core()
    core.run([b"INDEX|hub|\n", b"INDEX|other|\n"])
    order = list(range(size))
    random.Random(SEED).shuffle(order)
    return {
        "a dependent gained": core.run(f"INDEX|d-{i}|hub\n".encode() for i in range(size)),
        "REMOVE of the hub, refused": core.run([b"REMOVE|hub|\n"] * 1000, FAIL),
        "re-INDEX of the hub": core.run(
            line for _ in range(500) for line in (b"INDEX|hub|other\n", b"INDEX|hub|\n")
        ),
        "a dependent turned away, random order": core.run(
            f"INDEX|d-{i}|other\n".encode() for i in order
        ),
        "a dependent removed, random order": core.run(f"REMOVE|d-{i}|\n".encode() for i in order),
        "REMOVE of the hub": core.run([b"REMOVE|hub|\n"]),
    }


def fan(size: int) -> dict[str, float]:
    """Nanoseconds a dependency, of a package with `size` of them."""
    core = Core()
    core.run(f"INDEX|d-{i}|\n".encode() for i in range(size + 1))
    names = [f"d-{i}" for i in range(size)]
    random.Random(SEED).shuffle(names)
    all_of_them = f"INDEX|fan|{','.join(names)}\n".encode()
    one_other = f"INDEX|fan|{','.join([*names[1:], f'd-{size}'])}\n".encode()
    return {
        "INDEX": core.run([all_of_them]) / size,
        "re-INDEX, the same": core.run([all_of_them] * 5) / size,
        "re-INDEX, one other": core.run([one_other, all_of_them] * 5) / size,
        "re-INDEX, none": core.run([b"INDEX|fan|\n"]) / size,
        "REMOVE": core.run([all_of_them, b"REMOVE|fan|\n"]) * 2 / size,
    }


def debian_like() -> list[tuple[str, list[str]]]:
    """A table of Debian bookworm's size and shape: 63,436 packages, names of 17 bytes, few very popular."""
    draw = random.Random(SEED)
    syllables = [
        "lib",
        "python3-",
        "golang-",
        "ruby-",
        "gtk",
        "perl",
        "data",
        "dev",
        "common",
        "node-",
        "qt5",
        "ssl",
    ]
    packages: list[tuple[str, list[str]]] = []
    for i in range(63_436):
        ending = "-dev" if i % 3 == 0 else ""
        name = (
            f"{draw.choice(syllables)}{draw.choice(syllables)}{draw.randrange(10**6):06x}{ending}"
        )
        wanted = min(i, int(draw.expovariate(1 / 4.9)))
        # Popularity falls as a power: the first packages of the table are its libc and its python.
        low = {int(i * draw.random() ** 4) for _ in range(wanted)}
        packages.append((f"{name}{i}", [packages[j][0] for j in low]))
    return packages


def read_table(path: Path) -> list[tuple[str, list[str]]]:
    """Lines `name: dep dep …`, in an order that can be indexed as long as it has no cycles."""
    rows: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        name, *deps = line.split()
        rows[name.removesuffix(":")] = deps
    for missing in {d for deps in rows.values() for d in deps} - rows.keys():
        rows[missing] = []
    done: dict[str, list[str]] = {}
    while rows.keys() - done.keys():
        ready = {
            n: deps for n, deps in rows.items() if n not in done and all(d in done for d in deps)
        }
        if not ready:
            raise SystemExit(f"core: {path.name}: a cycle")
        done |= ready
    return list(done.items())


def memory(packages: list[tuple[str, list[str]]]) -> dict[str, float]:
    """Bytes a package by the allocator's own count."""
    core = Core()
    core.run(f"INDEX|{name}|{','.join(deps)}\n".encode() for name, deps in packages)
    stats = core.graph.stats()
    size = len(packages)
    parts = {f"bytes a package: {part}": count / size for part, count in stats["memory"].items()}
    return {
        "packages": size,
        "dependencies": stats["dependencies"],
        "bytes a package": stats["bytes"] / size,
    } | parts


def show(title: str, columns: list[str], rows: list[dict[str, float]]) -> None:
    """A table: one line a figure, one column a size."""
    print(f"\n{title}\n{'':40}" + "".join(f"{column:>14}" for column in columns))
    for key in rows[0]:
        print(f"{key:40}" + "".join(f"{row[key]:14,.1f}" for row in rows))


def curve(
    title: str, measure: Callable[[int], dict[str, float]], sizes: list[int]
) -> dict[str, Any]:
    """Measure at each size, show, and give the figures."""
    rows = [measure(size) for size in sizes]
    show(title, [f"{size:,}" for size in sizes], rows)
    return {"title": title, "sizes": sizes, "rows": rows}


def draw_curves(results: list[dict[str, Any]], path: Path) -> None:
    """The curves as a picture; needs matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("core: --plot needs matplotlib; the `bench` extra has it") from None
    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4.5), layout="constrained"
    )
    for axis, result in zip(axes, results, strict=True):
        for key in result["rows"][0]:
            if "bytes" not in key:
                axis.plot(
                    result["sizes"], [row[key] for row in result["rows"]], marker="o", label=key
                )
        axis.set(xscale="log", yscale="log", title=result["title"], ylabel="ns")
        axis.legend(fontsize=7)
    drawing.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="up to ten million packages")
    parser.add_argument(
        "--growth", type=int, metavar="SIZE", help="an index of this size only, as JSON"
    )
    parser.add_argument("--table", type=Path, help="a real table, for its memory")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    options = parser.parse_args()
    if options.growth:
        print(json.dumps(figures(options.growth)))
        return 0
    sizes = [10_000, 100_000, 1_000_000] + [10_000_000] * options.full
    results = [
        curve("packages in the index: ns a message", figures, sizes),
        curve("one package's dependents: ns a message", hub, [1_000, 10_000, 100_000]),
        curve("one package's dependencies: ns each", fan, [100, 1_000, 10_000]),
    ]
    journalled = figures(100_000, journalled=True)
    show("the same with redo lines, 100,000 packages", ["ns"], [journalled])
    tables = {"like Debian's": memory(debian_like())}
    if options.table:
        tables[options.table.stem] = memory(read_table(options.table))
    for title, row in tables.items():
        show(f"memory, a table {title}", [""], [row])
    if options.json:
        options.json.write_text(
            json.dumps({"curves": results, "journalled": journalled, "memory": tables}, indent=1)
        )
    if options.plot:
        draw_curves(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
