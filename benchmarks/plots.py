"""The results as pictures. Importing this needs matplotlib, which the `bench` extra has."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter
from probes import LINE
from targets import OURS, Document, middle
from workloads import TITLES, WORKLOADS

OUR_COLOUR, THEIR_COLOUR = "#c1440e", "#8a9aa8"
OPEN = {workload.name for workload in WORKLOADS if workload.rate}
CURVES = (
    ("query, hit, random order", "QUERY, hit"),
    ("query, miss", "QUERY, miss"),
    ("index, new, bare", "INDEX, new"),
    ("index, 2 dependencies gained", "INDEX, two dependencies gained"),
    ("index, 2 dependencies lost", "INDEX, two dependencies lost"),
    ("remove", "REMOVE"),
)


def rates(document: Document, path: Path, chosen: Container[str] | None = None) -> None:
    """Bars: each server's rate under each workload, or each chosen one, that has more than one server."""
    compared = {
        name: measured
        for name, measured in document["results"].items()
        if len(measured) > 1 and name not in OPEN and (chosen is None or name in chosen)
    }
    if not compared:
        path.unlink(missing_ok=True)
        return
    rows = -(-len(compared) // 2)
    drawing, axes = plt.subplots(
        rows, 2, figsize=(14, 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(compared) :]:
        axis.axis("off")
    for axis, (name, measured) in zip(axes.flat, compared.items(), strict=False):
        _bars(axis, document["titles"], measured)
        axis.set_title(TITLES.get(name, name), fontsize=9)
    drawing.suptitle("messages a second, logarithmic")
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


def _bars(axis: Any, titles: dict[str, str], measured: dict[str, Any]) -> None:
    pairs = sorted(measured.items(), key=lambda pair: middle(pair[1]))
    values = [middle(rounds) for _, rounds in pairs]
    colours = [OUR_COLOUR if name.startswith(OURS) else THEIR_COLOUR for name, _ in pairs]
    bars = axis.barh([titles[name].replace("`", "") for name, _ in pairs], values, color=colours)
    axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 4, max(values) * 6)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def growth(document: Document, path: Path) -> None:
    """Curves: what a message costs the core, by the size of the index."""
    figures = document["probes"].get("growth")
    if not figures:
        path.unlink(missing_ok=True)
        return
    sizes = sorted({int(name.split()[0]) for name in figures})
    drawing, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for key, title in CURVES:
        axis.plot(sizes, [figures[f"{size} {key}"] for size in sizes], marker="o", label=title)
    line = [figures[f"{size} {LINE}"] for size in sizes]
    axis.plot(sizes, line, color="black", linestyle=":", label=f"{LINE}, on this machine")
    axis.set(
        xscale="log", xlabel="packages in the index, five dependencies each", ylabel="ns a message"
    )
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)
