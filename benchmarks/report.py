"""Results in three forms: JSON, tables in Markdown, plots.

A server's figure is its median over the rounds. A ratio is the median of the rounds' own ratios, so that
what changed on the machine from one round to the next falls out of it.
"""

# ruff: noqa: RUF001
import json
from pathlib import Path
from typing import Any

import machine
from probes import PROBES
from targets import NEAR, OURS, TARGETS, Document, Target, figure, middle, ratio
from workloads import TITLES

NOISY = 0.05  # of a CPU used by strangers: past this the figures are not to be quoted
BUSY = 0.95  # of its CPU: a generator, or a server, that uses more is the limit of a closed loop

# What one asks for first, as the README has it.
HEADLINES = (
    ("query-100", "`QUERY`, 100 connections, one at a time each"),
    ("query-deep", "`QUERY`, pipelined, 16 connections × 2,000 deep"),
    ("index-1", "`INDEX`, durable, one connection, one at a time"),
    ("index-100", "`INDEX`, durable, 100 connections, one at a time each"),
    ("index-deep", "`INDEX`, durable, pipelined, 16 connections × 1,000 deep"),
    ("mixed-100", "90 % `QUERY`, 10 % durable `INDEX`, 100 connections"),
)

RESULTS = machine.HERE / "results"


def generator_limits(one: dict[str, Any]) -> bool:
    """Whether in a round the generator had no time left, and the server had."""
    return one.get("generator_cpu", 0) > BUSY > one.get("server_cpu", 1)


def head(document: Document) -> list[str]:
    """The machine and the settings, in words."""
    facts, settings = document["machine"], document["settings"]
    versions = ", ".join(dict.fromkeys(document["versions"].values()))
    hardware = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    system = f"{facts['system']}, Linux {facts['kernel']}, {facts['file_system']}"
    how = f"up to {settings['rounds']} interleaved rounds of {settings['seconds']} s"
    lines = [
        f"{hardware}; {system}; {versions}.",
        f"Server on one core, generator on another; {how}; medians, and the lowest and highest round.",
    ]
    if settings["scale"] != 1:
        lines += [f"**A trial: sizes of the probes × {settings['scale']}.**"]
    if document["strangers_cpu"] > NOISY:
        busy = f"{document['strangers_cpu']:.0%} of a core"
        lines += [f"**The machine was not quiet: others used {busy}.**"]
    return [*lines, ""]


def targets_table(document: Document) -> list[str]:
    """Each target beside what was measured."""
    lines = ["| what | target | measured | |", "| --- | --- | ---: | --- |"]
    before = ""
    for target in TARGETS:
        judged = target.judged(document)
        value, met = ("–", "not measured")
        if judged is not None:
            value, met = shown(judged[0]), _met(target, *judged, target.limited(document))
        row = "" if target.row == before else target.row
        lines.append(f"| {row} | {target.wanted} | {value} | {met} |")
        before = target.row
    return [*lines, ""]


def _met(target: Target, value: float, met: bool, limit: float | None) -> str:
    if met or limit is None:
        return "met" if met else "**not met**"
    share = target.share(value, limit)
    text = f"{share:.0%} of the machine's limit, {shown(limit)}"
    return text if share >= NEAR else f"**not met**: {text}"


def shown(value: float) -> str:
    """A figure with as many digits as one can use."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def workloads_table(document: Document) -> list[str]:
    """Every server under every workload."""
    titles = document["titles"]
    lines = ["| workload | server | a second | lowest–highest | p50 µs | p99 µs | pkgindex is |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    limited = False
    for name, measured in document["results"].items():
        ours = measured.get(OURS)
        for server, rounds in sorted(measured.items(), key=lambda pair: -middle(pair[1])):
            rates = [figure(one, "rate") for one in rounds]
            times = "" if server == OURS or not ours else f"{ratio(ours, rounds):.2f} ×"
            mark = "*" if sum(map(generator_limits, rounds)) * 2 > len(rounds) else ""
            limited |= bool(mark)
            spread = f"{min(rates):,.0f}–{max(rates):,.0f}"
            latencies = f"{middle(rounds, 'p50'):,.0f} | {middle(rounds, 'p99'):,.0f}"
            start = f"| {TITLES.get(name, name)} | {titles[server]} | {middle(rounds):,.0f}{mark}"
            lines.append(f"{start} | {spread} | {latencies} | {times} |")
    if limited:
        lines += [
            "",
            "\\* The generator used its whole core and the server did not: at least this.",
        ]
    return [*lines, ""]


def probes_table(document: Document) -> list[str]:
    """What the probes found."""
    lines = ["| probe | figure | |", "| --- | --- | ---: |"]
    titles = {probe.name: probe.title for probe in PROBES}
    for name, figures in document["probes"].items():
        for what, value in figures.items():
            lines.append(
                f"| {titles.get(name, name)} | {what.replace('_', ' ')} | {shown(value)} |"
            )
    return [*lines, ""]


def markdown(document: Document) -> str:
    """The results as tables."""
    lines = head(document)
    lines += targets_table(document)
    if document["results"]:
        lines += workloads_table(document)
    if document["probes"]:
        lines += probes_table(document)
    for kind in ("skipped", "failed"):
        for name, reason in document[kind].items():
            lines += [f"{kind.title()}: {name}: {reason}.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def write(document: Document, folder: Path) -> str:
    """Write all forms into `folder`; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(document)
    (folder / "bench.md").write_text(text)
    try:
        import plots
    except ImportError:
        return text + "\nNo plots: matplotlib is not installed (the `bench` extra has it).\n"
    plots.rates(document, folder / "headlines.png", dict(HEADLINES))
    plots.rates(document, folder / "rates.png")
    plots.growth(document, folder / "growth.png")
    return text


GATE = (
    ("uvloop", "rate", "bare uvloop"),
    ("c-epoll", "rate", "C epoll"),
    ("uvloop", "cpu_us_a_message", "CPU, uvloop"),
)


def quick_table(document: Document, baseline: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Ratios to the limits beside the baseline's, and the ratios alone.

    The last is that of the CPU time a message costs the servers: others on the machine spoil it least."""
    before = json.loads(baseline.read_text()) if baseline.exists() else {}
    now: dict[str, dict[str, float]] = {}
    lines = [f"{'pkgindex ÷ …':16}" + "".join(f" {t:>12} {'baseline':>9}" for _, _, t in GATE)]
    for workload, measured in document["results"].items():
        if OURS not in measured:
            continue
        row = f"{workload:16}"
        for peer, what, title in GATE:
            if peer not in measured:
                row += f" {'':>12} {'':>9}"
                continue
            value = ratio(measured[OURS], measured[peer], what)
            now.setdefault(workload, {})[title] = round(value, 3)
            old = before.get(workload, {}).get(title)
            row += f" {value:12.3f} {'' if old is None else f'{old:.3f}':>9}"
        lines.append(row)
    return "\n".join(line.rstrip() for line in lines), now
