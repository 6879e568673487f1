"""The campaigns' runner: what fails, hangs or is left out is said, and a run can be repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Progress

from tests.torture import __main__ as runner
from tests.torture import published
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


def tells(run: Run) -> None:
    (run.folder / "pid").write_text(str(os.getpid()))
    time.sleep(1000)


def vanishes(run: Run) -> None:
    os._exit(3)


EVERY_CAMPAIGN = set(runner.campaigns())

NOTHING = (0.0, 0.0)
CAMPAIGNS = {
    "holds": Campaign("holds", "It holds.", holds, seconds=NOTHING),
    "fails": Campaign("fails", "It fails.", fails, seconds=NOTHING),
    "breaks": Campaign("breaks", "It breaks.", breaks, seconds=NOTHING),
    "hangs": Campaign("hangs", "It hangs.", hangs, seconds=NOTHING),
    "tells": Campaign("tells", "It tells who it is.", tells, seconds=NOTHING),
    "vanishes": Campaign("vanishes", "It vanishes.", vanishes, seconds=NOTHING),
    "absent": Campaign("absent", "It needs more.", fails, lambda: "no such tool", NOTHING),
    "long": Campaign("long", "It takes its time.", holds, seconds=NOTHING, form="long"),
    "cluster": Campaign("cluster", "It takes several.", holds, seconds=NOTHING, form="cluster"),
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


def test_a_campaign_ends_with_its_runner(tmp_path: Path) -> None:
    told = tmp_path / "work" / "pid"
    killed = multiprocessing.get_context("fork").Process(
        target=run_one, args=("tells", told.parent)
    )
    killed.start()
    deadline = time.monotonic() + 20
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    with suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in Path("/proc", told.read_text(), "stat").read_text():
            assert time.monotonic() < deadline, "the campaign goes on for nobody"
            time.sleep(0.01)


def test_each_form_names_the_campaigns_that_it_leaves_to_others() -> None:
    def names(form: str, *only: str) -> tuple[list[str], list[str]]:
        ours, others = runner._chosen(CAMPAIGNS, only, form)
        return [one.name for one in ours], [one.name for one in others]

    everything = list(CAMPAIGNS)
    ours = everything[:-2]
    assert names("quick") == (everything, [])
    assert names("full") == (ours, ["long", "cluster"])
    assert names("long") == (["long"], [*ours, "cluster"])
    assert names("cluster") == (["cluster"], [*ours, "long"])
    assert names("full", "long") == (["long"], [*ours, "cluster"])


def test_a_run_ends_with_1_if_anything_failed_and_reports_it_twice(tmp_path: Path) -> None:
    command = ["--only", "fails", "--only", "holds", "--seed", "7", "--report", str(tmp_path)]
    result = CliRunner().invoke(runner.main, command)
    assert result.exit_code == 1, result.output
    facts = json.loads((tmp_path / "quick.json").read_text())
    assert (facts["seed"], facts["failed"], facts["totals"]) == (7, True, {"seeds": 7})
    page = (tmp_path / "quick.md").read_text()
    left = ("- long: `make torture-long`", "- cluster: `make torture-cluster`")
    for told in ("## fails: FAILED", "it was promised", *left):
        assert told in page
    command = ["--only", "holds", "--report", str(tmp_path)]
    assert CliRunner().invoke(runner.main, command).exit_code == 0


def test_what_failed_can_be_run_again_alone(tmp_path: Path) -> None:
    def run(*options: str) -> int:
        command = [*options, "--report", str(tmp_path)]
        return CliRunner().invoke(runner.main, command).exit_code

    def ran() -> list[str]:
        facts = json.loads((tmp_path / "quick.json").read_text())
        return [outcome["name"] for outcome in facts["outcomes"]]

    assert run("--failed") == 2  # there is no report yet
    assert run("--only", "fails", "--only", "holds") == 1
    assert run("--failed") == 1
    facts = json.loads((tmp_path / "quick.json").read_text())
    assert sorted(ran()) == ["fails", "holds"]  # what held before stands
    assert facts["again"] == ["fails"]
    assert run("--only", "holds") == 0
    assert run("--failed") == 2
    assert ran() == ["holds"]


def test_a_name_that_is_none_is_a_wrong_command_line() -> None:
    result = CliRunner().invoke(runner.main, ["--only", "hold"])
    assert result.exit_code == 2
    assert "no campaign hold" in result.output


def test_a_report_of_nothing_is_no_success() -> None:
    assert Report.begun("quick", 1).failed


# --- what is published ----------------------------------------------------------------------------------


def report_of(form: str) -> dict[str, Any]:
    """A report as it is kept."""
    report = Report.begun(form, 7)
    report.outcomes.append(Outcome("holds", "It holds.", 7, {"kills": 12_345}, seconds=61.0))
    report.outcomes[0].skipped.append("a|b: no such tool")
    report.seconds = 3_000.0
    return asdict(report)


def test_the_pages_tables_have_every_figure_and_what_was_left_out(tmp_path: Path) -> None:
    folder, page = tmp_path / "reports", tmp_path / "page.md"
    folder.mkdir()
    for form in ("long", "full"):
        (folder / f"{form}.json").write_text(json.dumps(report_of(form)))
    page.write_text(f"before\n{published.BEGIN}outdated\n{published.END}after\n")
    published.publish(page, folder)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "outdated" not in text
    assert text.index("make torture`") < text.index("make torture-long`")
    assert "| `holds` | 61 | 12,345 kills; *left out: a\\|b: no such tool* |" in text
    assert "1 campaigns in 50 minutes" in text
    published.publish(page, folder)
    assert page.read_text() == text


def test_a_run_in_which_something_failed_is_not_published(tmp_path: Path) -> None:
    failed = tmp_path / "full.json"
    failed.write_text(json.dumps(report_of("full") | {"failed": True}))
    result = CliRunner().invoke(published.main, [str(failed)])
    assert result.exit_code == 2
    assert "something failed" in result.output


@pytest.mark.skipif(not published.PAGE.exists(), reason="no docs/ beside the tests")
def test_the_figures_of_the_page_are_those_of_its_reports() -> None:
    text = published.PAGE.read_text()
    shown = text.split(published.BEGIN)[1].split(published.END)[0]
    assert published.kept()
    assert shown == f"\n{published.figures(published.kept())}\n"


@pytest.mark.skipif(not published.PAGE.exists(), reason="no docs/ beside the tests")
def test_the_page_tells_of_every_campaign() -> None:
    told = re.findall(
        r"[a-z0-9-]+", " ".join(re.findall(r"^### (.*)$", published.PAGE.read_text(), re.MULTILINE))
    )
    assert set(told) >= EVERY_CAMPAIGN
