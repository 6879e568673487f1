"""Puts the committed results into the README and docs/performance.md, between their markers.

    python benchmarks/figures.py

Each block stands between <!-- NAME --> and <!-- /NAME -->, and is made of benchmarks/results/bench.json
alone: run again it changes nothing. Without committed results it leaves both pages as they are.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import machine
import report
from targets import OURS, Document, middle

REPOSITORY = machine.HERE.parent
COMMITTED = report.RESULTS / "bench.json"

PEERS = (("redis", "Redis"), ("uvloop", "bare uvloop"), ("c-epoll", "C epoll"))


def rounded(rate: float) -> str:
    """Three digits: more are not repeatable."""
    digits = len(str(int(rate)))
    return f"{round(rate, 3 - digits):,.0f}"


def headlines(document: Document) -> list[str]:
    """For the README: the few rates that one asks for first."""
    facts, settings = document["machine"], document["settings"]
    where = f"{facts['cores']} cores of {_article(facts['cpu'])}, {facts['file_system']}"
    lines = [
        f"Messages a second: the median of {settings['rounds']} rounds of `make bench`, on {where};",
        "the server on one core, the load on the other. Each run checks its answers, and after each durable",
        "run the server was killed and asked for every acknowledged change. *Bare uvloop* and *C epoll* only",
        "say `OK`, to anything: they are the limits of the runtime and of one core.",
        "",
        "| what | pkgindex | " + " | ".join(title for _, title in PEERS) + " |",
        "| --- | ---: |" + " ---: |" * len(PEERS),
    ]
    for name, title in report.HEADLINES:
        measured = document["results"].get(name, {})
        if OURS in measured:
            rates = [measured.get(server) for server in (OURS, *(name for name, _ in PEERS))]
            cells = [rounded(middle(rounds)) if rounds else "" for rounds in rates]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [*lines, *_picture("headlines.png", "Rates of all servers", "")]


def _picture(name: str, title: str, up: str = "../") -> list[str]:
    """If it was drawn; `up` leads from the page to the repository."""
    drawn = (report.RESULTS / name).exists()
    return ["", f"![{title}]({up}benchmarks/results/{name})"] if drawn else []


def _article(words: str) -> str:
    return ("an " if words[:1].lower() in "aeio" else "a ") + words


Block = Callable[[Document], list[str]]
PAGES: dict[str, dict[str, Block]] = {
    "README.md": {"figures": headlines},
    "docs/performance.md": {
        "targets": lambda d: [*report.head(d), *report.targets_table(d)],
        "workloads": lambda d: [*report.workloads_table(d), *_picture("rates.png", "All rates")],
        "probes": report.probes_table,
        "growth": lambda _: _picture("growth.png", "What a message costs the core, by packages"),
    },
}


def rewritten(text: str, blocks: dict[str, Block], document: Document) -> str:
    """A page with its blocks made anew. Raises ValueError for a block that it has no markers of."""
    for name, made in blocks.items():
        parts = re.split(rf"(?s)<!-- {name} -->.*?<!-- /{name} -->", text)
        if len(parts) != 2:  # what stands before it and behind it
            raise ValueError(f"{len(parts) - 1} blocks {name}, where one was due")
        lines = "\n".join(made(document)).strip("\n")
        text = f"<!-- {name} -->\n{lines}\n<!-- /{name} -->".join(parts)
    return text


def pages(repository: Path = REPOSITORY) -> dict[Path, str]:
    """Both pages as they must be, by the committed results; none if there are no results."""
    if not COMMITTED.exists():
        return {}
    document = json.loads(COMMITTED.read_text())
    paths = {repository / page: blocks for page, blocks in PAGES.items()}
    return {path: rewritten(path.read_text(), b, document) for path, b in paths.items()}


def update() -> None:
    """Write both pages."""
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    update()
