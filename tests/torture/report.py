"""What a run of the campaigns found: one line a campaign on the screen, a page to read, JSON for machines.

Everything that is needed to run it again and to doubt it stands in it: the seed, the versions, the
machine, what each campaign counted, what it skipped and why, and which campaigns this form leaves out.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pkgindex
from tests.torture.campaign import Campaign, Run

__all__ = ["Outcome", "Report"]

FORMS = {
    "quick": "the reduced form (make torture-quick has all campaigns in it)",
    "full": "the whole (make torture has the campaigns that fit into an hour)",
    "long": "the whole (make torture-long has the campaigns that take longer)",
    "cluster": "the whole (make torture-cluster has those of several servers)",
}


@dataclass
class Outcome:
    """What one campaign did."""

    name: str
    what: str
    seed: int
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, campaign: Campaign, run: Run) -> Self:
        """Take over what a run has counted and found."""
        counts = dict(run.counts)
        return cls(
            campaign.name, campaign.what, run.seed, counts, list(run.failures), list(run.skipped)
        )

    @property
    def state(self) -> str:
        """`held`, `FAILED`, or `skipped` if nothing of it was run."""
        if self.failures:
            return "FAILED"
        return "held" if self.counts or not self.skipped else "skipped"

    def line(self) -> str:
        """One line: the name, whether it held, what was counted."""
        counted = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        skipped = "".join(f"; skipped: {part}" for part in self.skipped)
        return f"{self.name}: {self.state} in {self.seconds:.0f} s: {counted or '-'}{skipped}"


@dataclass
class Report:
    """A run of campaigns."""

    form: str
    seed: int
    began: str
    machine: dict[str, str]
    seconds: float = 0.0  # that the whole run took
    outcomes: list[Outcome] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)  # campaign: the command that has it
    again: list[str] = field(default_factory=list)  # campaigns that had failed in the run before

    @classmethod
    def begun(cls, form: str, seed: int) -> Self:
        """Begin a report on this machine."""
        return cls(form, seed, datetime.now(UTC).isoformat(timespec="seconds"), _machine())

    @property
    def failed(self) -> bool:
        """Whether any campaign failed, or there was none."""
        return not self.outcomes or any(outcome.failures for outcome in self.outcomes)

    @property
    def totals(self) -> Counter[str]:
        """What all campaigns counted together."""
        found: Counter[str] = Counter()
        for outcome in self.outcomes:
            found.update(outcome.counts)
        return found

    def summary(self) -> str:
        """The last line of a run."""
        states = Counter(outcome.state for outcome in self.outcomes)
        said = ", ".join(f"{count} {state}" for state, count in states.items())
        return f"{said or 'no campaign'} in {self.seconds:.0f} s; run again with --seed {self.seed}"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both forms into `folder`; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        text, data = folder / f"{self.form}.md", folder / f"{self.form}.json"
        text.write_text(self.page())
        facts = asdict(self) | {"totals": dict(self.totals), "failed": self.failed}
        data.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        return text, data

    def page(self) -> str:
        """The report to read, in Markdown."""
        lines = [
            f"# Fault campaigns: {self.summary()}",
            "",
            f"This is {FORMS[self.form]}, begun {self.began}, seed {self.seed}.",
            "",
        ]
        if self.again:
            lines += [
                f"Run again, after a failure: {', '.join(self.again)}. The rest held before.",
                "",
            ]
        lines += [f"- {name}: {value}" for name, value in self.machine.items()]
        lines += ["", "| campaign | | seconds | counted |", "| --- | --- | --- | --- |"]
        for outcome in self.outcomes:
            counted = ", ".join(f"{count:,} {what}" for what, count in outcome.counts.items())
            lines.append(
                f"| {outcome.name} | {outcome.state} | {outcome.seconds:.0f} | {counted or '-'} |"
            )
        for outcome in self.outcomes:
            lines += ["", f"## {outcome.name}: {outcome.state}", "", outcome.what, ""]
            lines += [f"- {count:,} {what}" for what, count in sorted(outcome.counts.items())]
            lines += [f"- skipped: {part}" for part in outcome.skipped]
            for failure in outcome.failures:
                lines += ["", "FAILED:", "", *(f"    {line}" for line in failure.splitlines())]
        if self.elsewhere:
            lines += ["", "## Not in this run", ""]
            lines += [f"- {name}: `{command}`" for name, command in self.elsewhere.items()]
        return "\n".join(lines) + "\n"


def _machine() -> dict[str, str]:
    """What ran, and on what."""
    return {
        "pkgindex": pkgindex.__version__ + _commit(),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _commit() -> str:
    """The commit of the sources, where git knows it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
