"""Results in three forms: JSON, a table in Markdown, plots.

A server's figure is its median over the rounds. A ratio is the median of the rounds' own ratios, so that
what changed on the machine from one round to the next falls out of it.
"""

# ruff: noqa: RUF001
import json
from pathlib import Path
from statistics import median
from typing import Any

from servers import Server
from workloads import MESSAGES_A_SECOND, TARGETS, WORKLOADS, Target

Results = dict[str, dict[str, list[dict[str, Any]]]]  # workload → server → rounds

OURS = "pkgindex"
NOISY = 0.05  # of a CPU used by strangers: past this the figures are not to be quoted


def figure(round_: dict[str, Any], name: str) -> float:
    """`rate`, or a latency in microseconds."""
    return float(round_[name] if name in round_ else round_["latency_us"][name])


def middle(rounds: list[dict[str, Any]], name: str = "rate") -> float:
    """The median over the rounds."""
    return median(figure(one, name) for one in rounds)


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str = "rate") -> float:
    """The median of ours ÷ theirs, round by round."""
    return median(figure(a, name) / figure(b, name) for a, b in zip(ours, theirs, strict=False))


def judged(results: Results, target: Target) -> tuple[str, str, float, bool] | None:
    """(what, the target, the value, whether it is met), if both were measured."""
    try:
        ours = results[target.of[0]][target.of[1]]
        theirs = results[target.to[0]][target.to[1]]
    except KeyError:
        return None
    titles = {workload.name: workload.title for workload in WORKLOADS}
    other = target.to[1] if target.of[0] == target.to[0] else f"its own {titles[target.to[0]]}"
    what = f"{titles[target.of[0]]}: {target.figure}"
    if target.extra:
        value = middle(ours, target.figure) - middle(theirs, target.figure)
        return what, f"≤ {target.most:,.0f} µs more than {other}", value, value <= target.most
    value = ratio(ours, theirs, target.figure)
    if target.most:
        return what, f"≤ {target.most} × {other}", value, value <= target.most
    return what, f"≥ {target.least} × {other}", value, value >= target.least


def markdown(document: dict[str, Any], titles: dict[str, str]) -> str:
    """The results as tables."""
    results: Results = document["results"]
    facts, settings = document["machine"], document["settings"]
    versions = ", ".join(dict.fromkeys(document["versions"].values()))
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {facts['system']}"
    how = f"{settings['rounds']} interleaved rounds of {settings['seconds']} s"
    lines = [
        f"{where}, Linux {facts['kernel']}, {facts['file_system']}; {versions}.",
        f"Server on one core, generator on another; {how}; medians, and the lowest and highest round.",
        "",
    ]
    if document["strangers_cpu"] > NOISY:
        lines += [
            f"**The machine was not quiet: others used {document['strangers_cpu']:.0%} of a core.**",
            "",
        ]
    lines += ["| workload | server | a second | lowest–highest | p50 µs | p99 µs | pkgindex is |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for workload in WORKLOADS:
        measured = results.get(workload.name, {})
        ours = measured.get(OURS)
        for name, rounds in sorted(measured.items(), key=lambda pair: -middle(pair[1])):
            rates = [figure(one, "rate") for one in rounds]
            times = "" if name == OURS or not ours else f"{ratio(ours, rounds):.2f} ×"
            spread = f"{min(rates):,.0f}–{max(rates):,.0f}"
            latencies = f"{middle(rounds, 'p50'):,.0f} | {middle(rounds, 'p99'):,.0f}"
            head = f"| {workload.title} | {titles[name]} | {middle(rounds):,.0f}"
            lines.append(f"{head} | {spread} | {latencies} | {times} |")
    found = [one for target in TARGETS if (one := judged(results, target))]
    lines += ["", "| figure | target | measured | |", "| --- | --- | ---: | --- |"]
    for what, wanted, value, met in found:
        lines.append(f"| {what} | {wanted} | {value:,.2f} | {'met' if met else 'not met'} |")
    for (workload_name, server), least in MESSAGES_A_SECOND.items():
        if server in results.get(workload_name, {}):
            value = middle(results[workload_name][server])
            met = "met" if value >= least else "not met"
            lines.append(f"| {workload_name}: a second | ≥ {least:,} | {value:,.0f} | {met} |")
    for name, reason in document["skipped"].items():
        lines.append(f"\nSkipped: {name}: {reason}.")
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], titles: dict[str, str], path: Path) -> bool:
    """A bar chart of the rates; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    shown = [w for w in WORKLOADS if w.name in document["results"] and not w.rate]
    columns = 2
    rows = -(-len(shown) // columns)
    drawing, axes = plt.subplots(
        rows, columns, figsize=(14, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, workload in zip(axes.flat, shown, strict=False):
        pairs = sorted(document["results"][workload.name].items(), key=lambda pair: middle(pair[1]))
        rates = [middle(rounds) for _, rounds in pairs]
        colours = ["#c1440e" if name.startswith(OURS) else "#8a9aa8" for name, _ in pairs]
        bars = axis.barh([titles[name].replace("`", "") for name, _ in pairs], rates, color=colours)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(rates) / 4, max(rates) * 6)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(workload.title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.suptitle("messages a second, logarithmic")
    drawing.savefig(path, dpi=110)
    return True


def write(document: dict[str, Any], servers: list[Server], folder: Path) -> str:
    """Write all forms into `folder`; the Markdown."""
    titles = {server.name: server.title for server in servers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(document, titles)
    (folder / "bench.md").write_text(text)
    if not plot(document, titles, folder / "bench.png"):
        text += "\nNo plots: matplotlib is not installed (the `bench` extra has it).\n"
    return text
