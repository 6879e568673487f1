"""The campaigns' runner: what fails, hangs or is left out is said, and a run can be repeated."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Progress

from tests.torture import __main__ as runner
from tests.torture.campaign import Campaign, Run
from tests.torture.report import Outcome, Report


def holds(run: Run) -> None:
    run.counts["seeds"] = run.seed
    run.skipped.append("the full part: only in full") if not run.full else None


def fails(run: Run) -> None:
    run.fail("it was promised, and it is not so")


def breaks(run: Run) -> None:
    raise RuntimeError("nothing is as it should be")


def hangs(run: Run) -> None:
    time.sleep(1000)


def vanishes(run: Run) -> None:
    os._exit(3)


NOTHING = (0.0, 0.0)
CAMPAIGNS = {
    "holds": Campaign("holds", "It holds.", holds, seconds=NOTHING),
    "fails": Campaign("fails", "It fails.", fails, seconds=NOTHING),
    "breaks": Campaign("breaks", "It breaks.", breaks, seconds=NOTHING),
    "hangs": Campaign("hangs", "It hangs.", hangs, seconds=NOTHING),
    "vanishes": Campaign("vanishes", "It vanishes.", vanishes, seconds=NOTHING),
    "absent": Campaign("absent", "It needs more.", fails, lambda: "no such tool", NOTHING),
    "long": Campaign("long", "It takes its time.", holds, seconds=NOTHING, long=True),
}


def run_one(name: str, folder: Path) -> Outcome:
    with Progress(console=Console(quiet=True)) as bar:
        return runner._run(CAMPAIGNS[name], 7, False, folder, bar, grace=2.0)


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    # The child is forked here, so that it knows these campaigns too.
    monkeypatch.setattr(runner, "campaigns", lambda: CAMPAIGNS)
    monkeypatch.setattr(runner, "START", "fork")


def test_what_holds_is_counted_and_its_skipped_parts_are_named(tmp_path: Path) -> None:
    outcome = run_one("holds", tmp_path / "work")
    assert (outcome.state, outcome.counts) == ("held", {"seeds": 7})
    assert outcome.skipped == ["the full part: only in full"]
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "it was promised"),
        ("breaks", "nothing is as it should be"),
        ("hangs", "hangs after 2 s"),
        ("vanishes", "did not end: 3"),
    ],
)
def test_what_fails_in_any_way_has_failed(name: str, said: str, tmp_path: Path) -> None:
    outcome = run_one(name, tmp_path / "work")
    assert outcome.state == "FAILED"
    assert said in outcome.failures[0]
    assert "(seed 7)" in outcome.failures[0]
    assert (tmp_path / "work").exists()  # what is needed to explain it is kept


def test_what_a_machine_cannot_run_is_skipped_by_name(tmp_path: Path) -> None:
    outcome = run_one("absent", tmp_path / "work")
    assert outcome.state == "skipped"
    assert outcome.skipped == ["all of it: no such tool"]


def test_each_form_names_the_campaigns_that_it_leaves_to_others() -> None:
    def names(form: str, *only: str) -> tuple[list[str], list[str]]:
        ours, others = runner._chosen(CAMPAIGNS, only, form)
        return [one.name for one in ours], [one.name for one in others]

    everything = list(CAMPAIGNS)
    assert names("quick") == (everything, [])
    assert names("full") == (everything[:-1], ["long"])
    assert names("long") == (["long"], everything[:-1])
    assert names("full", "long") == (["long"], everything[:-1])


def test_a_run_ends_with_1_if_anything_failed_and_reports_it_twice(tmp_path: Path) -> None:
    command = ["--only", "fails", "--only", "holds", "--seed", "7", "--report", str(tmp_path)]
    result = CliRunner().invoke(runner.main, command)
    assert result.exit_code == 1, result.output
    facts = json.loads((tmp_path / "quick.json").read_text())
    assert (facts["seed"], facts["failed"], facts["totals"]) == (7, True, {"seeds": 7})
    page = (tmp_path / "quick.md").read_text()
    for told in ("## fails: FAILED", "it was promised", "- long: `make torture-long`"):
        assert told in page
    command = ["--only", "holds", "--report", str(tmp_path)]
    assert CliRunner().invoke(runner.main, command).exit_code == 0


def test_a_name_that_is_none_is_a_wrong_command_line() -> None:
    result = CliRunner().invoke(runner.main, ["--only", "hold"])
    assert result.exit_code == 2
    assert "no campaign hold" in result.output


def test_a_report_of_nothing_is_no_success() -> None:
    assert Report.begun("quick", 1).failed
