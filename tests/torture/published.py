"""The figures of docs/reliability.md: the last reports, and the tables that the page makes of them.

    python -m tests.torture.published build/torture/full.json build/torture/long.json

keeps these reports beside the page in place of those of the same form, and writes its tables anew; with
none it writes them from what is kept. Nothing between the page's two marks is written by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

__all__ = ["PAGE", "REPORTS", "figures", "publish"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "reliability.md"
REPORTS = DOCS / "reliability"

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"

TITLES = {
    "full": "The whole campaigns (`make torture`)",
    "long": "The long run (`make torture-long`)",
    "cluster": "The failovers (`make torture-cluster`)",
    "quick": "The reduced form (`make torture-quick`)",
}


def figures(reports: list[dict[str, Any]]) -> str:
    """The tables of these reports, in Markdown."""
    lines = []
    for report in sorted(reports, key=lambda report: list(TITLES).index(report["form"])):
        outcomes = report["outcomes"]
        machine = report["machine"]
        ran = (
            f"{len(outcomes)} campaigns in {report['seconds'] / 60:.0f} minutes",
            f"begun {report['began'][:10]} with seed {report['seed']}",
            f"on {machine['cores']} cores, {machine['system']}",
            f"pkgindex {machine['pkgindex']}, Python {machine['Python']}",
        )
        if again := report.get("again"):
            ran = (f"{len(outcomes)} campaigns", *ran[1:])
            ran += (f"run again after a failure and its mend: {', '.join(again)}",)
        lines += [f"### {TITLES[report['form']]}", "", f"{'; '.join(ran)}.", ""]
        lines += ["| campaign | seconds | counted |", "| --- | ---: | --- |"]
        for outcome in outcomes:
            counted = [f"{count:,} {what}" for what, count in sorted(outcome["counts"].items())]
            counted += [f"*left out: {part}*" for part in outcome["skipped"]]
            said = "; ".join(counted).replace("|", "\\|")
            lines.append(f"| `{outcome['name']}` | {outcome['seconds']:.0f} | {said} |")
        lines.append("")
    return "\n".join(lines)


def publish(page: Path = PAGE, folder: Path = REPORTS) -> None:
    """Write the tables of the kept reports into the page."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    page.write_text(f"{head}{BEGIN}\n{figures(kept(folder))}\n{END}{tail}")


def kept(folder: Path = REPORTS) -> list[dict[str, Any]]:
    """The reports beside the page."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@click.command(help=__doc__)
@click.argument("reports", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(reports: tuple[Path, ...]) -> None:
    for path in reports:
        report = json.loads(path.read_text())
        if report["failed"]:
            raise click.BadParameter(f"{path}: something failed in this run; it is not published")
        REPORTS.mkdir(exist_ok=True)
        shutil.copy(path, REPORTS / f"{report['form']}.json")
    publish()


if __name__ == "__main__":
    main()
