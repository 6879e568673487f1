"""The load: what the server has afterwards, what is reported, and what is sent on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkgindex.client import Answer, Client, ConnectionLost
from pkgindex.load import loader
from tests.load.test_debian import LISTS
from tests.reference import Model
from tests.servers import Server

HOMEBREW = Path(__file__).parents[3] / "shared/data/brew-dependencies.txt"
NEITHER = "which neither the input nor the server has"


class ModelClient:
    """Stands in for Client: the reference model answers, and what was sent is kept."""

    def __init__(self, **packages: Sequence[str]) -> None:
        self.model = Model()
        self.model.packages = {
            name.encode(): frozenset(need.encode() for need in needs)
            for name, needs in packages.items()
        }
        self.sent: list[str] = []
        self.largest_loss = 0

    def batch(self, messages, progress=lambda _: None) -> list[Answer]:
        answers = []
        for message in messages:
            if message.startswith("INDEX"):
                self.sent.append(message)
            answers.append(Answer(self.model.apply(message.encode()).decode().strip()))
            progress(len(answers))
        return answers

    @property
    def packages(self) -> dict[str, set[str]]:
        return {
            name.decode(): {need.decode() for need in needs}
            for name, needs in self.model.packages.items()
        }


def load(client: ModelClient, packages: dict[str, Sequence[str]], **options) -> loader.Report:
    return loader.load(packages, client, **options)  # type: ignore[arg-type]


def test_packages_are_indexed_after_what_they_need():
    client = ModelClient()
    report = load(client, {"a": ["b", "c"], "b": ["c"], "c": []})
    assert (report.packages, report.indexed, report.failed) == (3, 3, {})
    assert client.sent == ["INDEX|c|", "INDEX|b|c", "INDEX|a|b,c"]


def test_a_missing_dependency_fails_all_that_need_it_by_name():
    client = ModelClient()
    report = load(client, {"a": ["b"], "b": ["x"], "c": [], "d": ["c", "a"]})
    assert report.indexed == 1
    assert report.failed == {
        "b": f"needs x, {NEITHER}",
        "a": "needs b, which fails for want of x",
        "d": "needs a, which fails for want of x",
    }
    assert client.packages == {"c": set()}


def test_a_missing_dependency_is_added_if_so_asked():
    client = ModelClient()
    report = load(client, {"a": ["b"], "b": ["x", "y"]}, add_missing=True)
    assert (report.indexed, report.failed, report.added) == (2, {}, ["x", "y"])
    assert client.packages == {"a": {"b"}, "b": {"x", "y"}, "x": set(), "y": set()}


def test_a_dependency_that_the_server_has_is_not_missing_and_stays_as_it_is():
    client = ModelClient(x=["z"], z=[])
    report = load(client, {"a": ["x"]}, add_missing=True)
    assert (report.indexed, report.failed, report.added) == (1, {}, [])
    assert client.packages == {"a": {"x"}, "x": {"z"}, "z": set()}


def test_a_failed_package_of_which_the_server_has_a_version_does_not_fail_others():
    client = ModelClient(b=[])
    report = load(client, {"a": ["b"], "b": ["x"]})
    assert report.failed == {"b": f"needs x, {NEITHER}"}
    assert client.packages == {"a": {"b"}, "b": set()}


def test_a_name_that_the_protocol_cannot_carry_fails_and_is_not_sent():
    client = ModelClient()
    packages = {"a b": [], "c": ["a b"], "d": ["e|f"], "g": [], "": [], "\udcff": []}
    report = load(client, packages, add_missing=True)
    assert report.failed == {
        "a b": "the protocol cannot carry its name",
        "c": "needs a b, which fails for want of a b",
        "d": "needs e|f, a name that the protocol cannot carry",
        "": "the protocol cannot carry its name",
        "\udcff": "the protocol cannot carry its name",
    }
    assert client.sent == ["INDEX|g|"]


# --- cycles ---------------------------------------------------------------------------------------


def test_a_cycle_is_started_with_as_few_messages_as_it_takes():
    client = ModelClient()
    report = load(client, {"a": ["b"], "b": ["c", "d"], "c": ["a", "d"], "d": []})
    assert (report.indexed, report.failed) == (4, {})
    assert [sorted(cycle) for cycle in report.cycles] == [["a", "b", "c"]]
    assert client.sent == ["INDEX|d|", "INDEX|a|", "INDEX|c|a,d", "INDEX|b|c,d", "INDEX|a|b"]


def test_the_start_of_a_cycles_member_has_the_dependencies_that_are_there():
    client = ModelClient()
    load(client, {"a": ["b", "d"], "b": ["a"], "d": []})
    assert client.sent == ["INDEX|d|", "INDEX|a|d", "INDEX|b|a", "INDEX|a|b,d"]


def test_a_package_that_depends_on_itself_is_loaded():
    client = ModelClient()
    report = load(client, {"a": ["a"]})
    assert (report.indexed, report.cycles) == (1, [])
    assert client.packages == {"a": {"a"}}


def test_a_cycle_that_the_server_has_is_never_shortened_on_the_way():
    packages = {"a": ["b"], "b": ["a", "d"], "d": []}
    client = ModelClient()
    load(client, packages)
    before, client.sent = client.packages, []
    report = load(client, packages)
    assert (report.indexed, report.failed) == (3, {})
    assert client.sent == ["INDEX|d|", "INDEX|b|a,d", "INDEX|a|b"]
    assert client.packages == before


def test_a_cycle_with_a_missing_dependency_fails_whole_and_leaves_nothing():
    client = ModelClient()
    report = load(client, {"a": ["b"], "b": ["c"], "c": ["a", "x"], "z": ["a"], "y": []})
    assert report.failed.keys() == {"a", "b", "c", "z"}
    assert report.failed["c"] == f"needs x, {NEITHER}"
    assert report.failed["z"] == "needs a, which fails for want of x"
    assert client.packages == {"y": set()}


def test_a_cycles_member_that_fails_does_not_pull_down_the_rest_if_the_server_has_it():
    client = ModelClient(c=[])
    report = load(client, {"a": ["b"], "b": ["a", "c"], "c": ["a", "x"]})
    assert report.failed == {"c": f"needs x, {NEITHER}"}
    assert client.packages == {"a": {"b"}, "b": {"a", "c"}, "c": set()}


NAMES = st.sampled_from("abcdefgh")
GRAPHS = st.dictionaries(NAMES, st.lists(NAMES, max_size=3))


@given(GRAPHS, GRAPHS, st.booleans())
def test_after_any_load_the_server_has_what_the_input_says_and_the_report_is_true(
    server_has, packages, add_missing
):
    known = {
        name: [need for need in needs if need in server_has] for name, needs in server_has.items()
    }
    client = ModelClient(**known)
    report = load(client, packages, add_missing=add_missing)
    after = client.packages
    for name, needs in packages.items():
        if name not in report.failed:
            assert after[name] == set(needs)
        else:
            assert not add_missing
            # Nothing half done: an earlier version is as it was, and none is as if never tried.
            assert after.get(name) == (set(known[name]) if name in known else None)
            assert any(need not in after for need in needs)
    assert report.indexed == len(packages) - len(report.failed)
    assert after.keys() - packages.keys() - known.keys() == set(report.added)
    for name in known.keys() - packages.keys():
        assert after[name] == set(known[name])
    again = load(client, packages, add_missing=add_missing)
    assert (again.indexed, again.failed.keys()) == (report.indexed, report.failed.keys())
    assert client.packages == after


# --- a server that answers otherwise than expected ------------------------------------------------


class Refusing(ModelClient):
    """Gives one answer to every INDEX of some names."""

    def __init__(self, answer: Answer, *names: str) -> None:
        super().__init__()
        self._answer, self._names = answer, names

    def batch(self, messages, progress=lambda _: None) -> list[Answer]:
        return [
            self._answer
            if message.split("|")[1] in self._names and message.startswith("INDEX")
            else super(Refusing, self).batch([message])[0]
            for message in messages
        ]


@pytest.mark.parametrize("answer", [Answer.FAIL, Answer.ERROR])
def test_a_refused_package_and_all_that_need_it_fail(answer):
    packages = {"a": ["b"], "b": [], "c": ["a"], "d": ["a", "e"], "e": ["d"], "f": []}
    report = load(Refusing(answer, "b"), packages)
    assert report.indexed == 1
    assert report.failed.keys() == {"a", "b", "c", "d", "e"}
    assert report.failed["b"].startswith(f"the server answered {answer}")
    assert report.failed["a"] == "needs b, which failed"
    assert report.failed["d"] == "needs a, which the server refused"


def test_progress_never_goes_back_and_ends_at_the_number_of_packages():
    packages = {"a": ["b"], "b": [], "c": ["d"], "d": ["c", "b"], "e": ["x"], "f": ["c"]}
    seen: list[int] = []
    load(ModelClient(), packages, add_missing=True, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 6


# --- the command, with a real server --------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("memory:") as running:
        yield running


def run(server: Server, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    host, port = server.address
    return subprocess.run(
        [sys.executable, "-m", "pkgindex", "load", "--server", f"{host}:{port}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_loads_standard_input_and_exits_with_0(server):
    done = run(server, "-", stdin="c1: c2\nc2: c1 c3\nc3:\n")
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()
    assert words[words.index("indexed") + 1] == "3"
    assert words[words.index("cycles") + 1] == "1"
    assert words[words.index("failed") + 1] == "0"


def test_the_command_exits_with_1_and_a_table_of_what_failed_and_why(server):
    table = "".join(f"f{n:02}: absent\n" for n in range(20))
    done = run(server, "-", stdin=table)
    assert done.returncode == 1
    assert "f00" in done.stdout
    assert f"needs absent, {NEITHER}" in done.stdout
    assert "f19" not in done.stdout
    assert "and 10 more; --verbose names all of them" in done.stdout
    assert "f19" in run(server, "-", "--verbose", stdin=table).stdout


def test_the_command_prints_its_outcome_as_json(server):
    done = run(server, "-", "--json", stdin="j1: j2 lacking\nj2:\n[odd]: [red]x[/red]\n")
    outcome = json.loads(done.stdout)
    assert done.returncode == 1
    assert outcome.pop("seconds").keys() == {"reading", "loading"}
    assert outcome == {
        "packages": 3,
        "indexed": 1,
        "failed": {
            "j1": f"needs lacking, {NEITHER}",
            "[odd]": f"needs [red]x[/red], {NEITHER}",
        },
        "added": [],
        "cycles": [],
    }


def test_names_that_look_like_markup_are_shown_as_they_are(server):
    done = run(server, "-", stdin="[odd]: [red]x[/red]\n")
    assert "[odd]" in done.stdout
    assert "[red]x[/red]" in done.stdout


def test_a_broken_input_exits_with_2_and_one_line_and_nothing_is_sent(server):
    done = run(server, "-", "--format", "jsonlines", stdin='{"name": "q", "depends": []}\n{\n')
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pkgindex: standard input:2: not a package: ")
    assert done.stderr.count("\n") == 1
    assert json.loads(run(server, "-", "--json", stdin="needs-q: q\n").stdout)["indexed"] == 0


def test_without_a_server_the_command_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "pkgindex", "load", "--server", "unix:/nonexistent", "-"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pkgindex: cannot connect to unix:/nonexistent: ")


@pytest.mark.skipif(not HOMEBREW.exists(), reason="the project's shared data is not here")
def test_homebrews_table_lacks_two_names_and_is_loaded_whole_with_them_added(server):
    failing = json.loads(run(server, str(HOMEBREW), "--json").stdout)
    assert failing["indexed"] == 3359
    assert failing["failed"]["multirust"] == f"needs gpg, {NEITHER}"
    whole = run(server, str(HOMEBREW), "--missing", "add", "--json")
    outcome = json.loads(whole.stdout)
    assert whole.returncode == 0
    assert outcome["indexed"] == 3368
    assert sorted(outcome["added"]) == ["docbook2X", "gpg"]


@pytest.mark.skipif(not LISTS, reason="no package lists under /var/lib/apt/lists")
def test_the_real_debian_lists_are_loaded_whole_and_can_be_loaded_again(server):
    for _ in range(2):
        done = run(server, *LISTS, "--missing", "add", "--json")
        outcome = json.loads(done.stdout)
        assert (done.returncode, outcome["failed"]) == (0, {})
        assert outcome["indexed"] == outcome["packages"] > 0


def test_a_server_that_dies_during_the_load_leaves_no_doubt_how_far_it_came():
    packages: dict[str, Sequence[str]] = {f"d{n}": [] for n in range(500_000)}
    with Server("memory:") as dying:
        host, port = dying.address

        def progress(answered: int) -> None:
            if answered > 10_000:
                dying.kill()

        with Client(f"{host}:{port}") as client, pytest.raises(ConnectionLost) as lost:
            loader.load(packages, client, progress=progress)
    assert len(lost.value.answers) > 10_000
    assert lost.value.unanswered or lost.value.unsent
