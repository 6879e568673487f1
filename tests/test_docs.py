"""What the documentation says is so: its examples run, its samples are read, its names exist.

Before a fenced block a comment says what it is:

    <!-- run -->             commands after `$ ` and what they print, with a server that runs
    <!-- run stopped -->     the same on the stopped store ./pkgindex-data
    <!-- run tls -->         the same with a server that speaks TLS, at tls://localhost:8443
    <!-- run [tls] python -->    a program
    <!-- member -->          a server's file in servers/
    <!-- file: NAME -->      a file of the store that all such blocks together make up
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pkgindex import config, errors
from pkgindex.cli import MODULES, main
from pkgindex.cluster.members import Member
from pkgindex.store._disk import file_name, shard
from pkgindex.store.check import check
from pkgindex.store.journal import parse_head
from pkgindex.store.offline import Offline
from tests.certificates import Authority, needs_openssl
from tests.reference import Model
from tests.servers import Server, Wire

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [page for page in [*PAGES, *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
SOURCES = ROOT / "pkgindex"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no docs/ beside the tests")

#: Options of other programs that the pages name.
FOREIGN = {"--now", "--sdist", "--reflink", "--server", "--only", "--seed"}

BLOCK = re.compile(r"<!-- ([^>]*?) -->\n+```\w*\n(.*?)```", re.DOTALL)


def blocks(what: str, pages: list[Path] = PAGES) -> list[tuple[str, str]]:
    """Return (rest of the comment, contents) of every block whose comment begins with `what`."""
    found = []
    for page in pages:
        for comment, contents in BLOCK.findall(page.read_text()):
            if comment == what or comment.startswith(what + " "):
                found.append((comment.removeprefix(what).strip(), contents))
    return found


def table_below(heading: str, page: str) -> list[list[str]]:
    """Return the rows of the first table after a heading, as cells."""
    text = (ROOT / page).read_text()
    rows: list[list[str]] = []
    for line in text[text.index(f"\n{heading}\n") :].splitlines()[2:]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


# --- examples -------------------------------------------------------------------------------------


def transcript(contents: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block and what it is to print."""
    for part in re.split(r"^\$ ", contents, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def run_in(folder: Path, command: str, **environment: str) -> str:
    """Run a command of the pages as a person would, and return all that it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=kept | {"PATH": path, "COLUMNS": "200"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_print_what_the_pages_say(page: Path, tmp_path: Path) -> None:
    examples = [contents for kind, contents in blocks("run", [page]) if kind == ""]
    if any("nc -N" in contents for contents in examples) and shutil.which("nc") is None:
        pytest.skip("nc is not installed (Debian: netcat-openbsd)")
    if not examples:
        return
    with Server("memory:") as server:
        assert not isinstance(server.address, str)
        host, port = server.address
        for contents in examples:
            for command, output in transcript(contents):
                here = command.replace("127.0.0.1 8080", f"{host} {port}")
                here = here.replace("127.0.0.1:8080", f"{host}:{port}")
                printed = run_in(tmp_path, here, PKGINDEX_SERVER=f"{host}:{port}")
                assert printed == output, command


def test_examples_on_a_stopped_store_print_what_the_pages_say(tmp_path: Path) -> None:
    with Server(f"file:{tmp_path / 'pkgindex-data'}") as server:
        with Wire(server.address) as wire:
            wire.ask_all([b"INDEX|libc|", b"INDEX|bash|libc"])
        assert server.stop() == 0
    examples = blocks("run stopped")
    assert examples
    for _, contents in examples:
        for command, output in transcript(contents):
            assert run_in(tmp_path, command) == output.replace("/srv", str(tmp_path)), command


def test_python_examples_run(tmp_path: Path) -> None:
    examples = blocks("run python")
    with Server("memory:") as server:
        assert not isinstance(server.address, str)
        address = "{}:{}".format(*server.address)
        for number, (_, contents) in enumerate(examples):
            program = tmp_path / f"example{number}.py"
            program.write_text(contents.replace("127.0.0.1:8080", address))
            assert run_in(tmp_path, f"{sys.executable} -W error {program}") == ""


@needs_openssl
def test_examples_of_tls_run_against_a_server_that_wants_certificates(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    ca.sign("me")
    options = [*ca.sign("server").options, "--tls-client-ca", str(ca.cert)]
    examples = blocks("run tls")
    assert {kind for kind, _ in examples} == {"", "python"}
    with Server("memory:", *options, listen="127.0.0.1:0,tls") as server:
        for kind, contents in examples:
            here = contents.replace("localhost:8443", f"localhost:{server.address[1]}")
            if kind == "python":
                (tmp_path / "example.py").write_text(here)
                assert run_in(tmp_path, f"{sys.executable} -W error example.py") == ""
            else:
                for command, output in transcript(here):
                    assert run_in(tmp_path, command) == output, command


# --- samples of the store -------------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The store that the pages show, file by file."""
    for name, contents in blocks("file:"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents)
    (tmp_path / "LOCK").touch()
    return tmp_path


def test_the_store_that_the_pages_show_is_sound(sample: Path) -> None:
    with Offline(str(sample)) as store:
        assert check(store).is_sound
        graph = store.read().graph
        assert {name: graph.dependencies(name) for name in graph} == {
            "ca-certificates": [],
            "gettext": [],
            "libidn2": ["gettext"],
            "openssl@1.1": ["ca-certificates"],
            "perl": [],
        }


def test_a_wrong_byte_in_a_shown_file_is_noticed_unless_the_journal_covers_it(sample: Path) -> None:
    unnoticed = set()
    for name, contents in blocks("file:"):
        if not contents or name.endswith("owner"):
            continue
        (sample / name).write_text(contents.replace("e", "E", 1))
        try:
            with Offline(str(sample)) as store:
                if check(store).is_sound:
                    unnoticed.add(name)
        except errors.PkgindexError:
            pass
        (sample / name).write_text(contents)
    dependencies = {"68/ca-certificates", "97/gettext", "c6/libidn2", "e4/perl"}
    covered = {"forward/47/wget", "forward/e4/openssl@1.1"}
    assert unnoticed == covered | {f"reverse/{name}" for name in dependencies}


def test_a_server_goes_on_from_the_store_that_the_pages_show(sample: Path) -> None:
    ((_, contents),) = blocks("head of the next journal")
    with Server(f"file:{sample}") as server:
        with Wire(server.address) as wire:
            asked = wire.ask_all([b"QUERY|openssl@1.1|", b"QUERY|wget|", b"REMOVE|perl|"])
            assert asked == [b"OK\n", b"FAIL\n", b"OK\n"]
        assert server.stop() == 0
    head, end = parse_head(contents.encode())
    assert (head.epoch, head.segment, head.next_change, end) == (2, 0, 9, len(contents))
    assert b"\n-wget|\n" in head.lines


def test_the_file_of_a_server_that_the_pages_show_is_whole() -> None:
    ((_, contents),) = blocks("member")
    assert Member.parse(contents.encode()).encode() == contents.encode()


def test_file_names_are_as_the_pages_say() -> None:
    text = (ROOT / "docs/storage.md").read_text().partition("<!-- names -->")[2]
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", text, re.MULTILINE)
    assert len(rows) > 5
    for package, path in rows:
        assert path == f"{shard(file_name(package), 256)}/{file_name(package)}"


# --- names ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        if not other.exists() and "build" in ROOT.parts:
            continue  # a copy of the tests, with a part of the pages
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def options_of_all_commands() -> set[str]:
    found: set[str] = {"--version", "--help"}
    context = click.Context(main)
    for name in MODULES:
        command = main.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            found.update(option for option in parameter.opts if option.startswith("--"))
    return found


def test_every_option_that_the_pages_name_exists() -> None:
    known = options_of_all_commands() | FOREIGN | {"--config"}
    others = {"bench.py", "core.py", "where.py", "pytest"}  # whose options are not ours to check
    for page in PAGES:
        for line in page.read_text().splitlines():
            if any(program in line for program in others):
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line):
                assert option in known, f"{page.name}: {line}"


def test_every_option_of_the_commands_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for option in options_of_all_commands() - {"--help", "--version"}:
        assert option in text, option


def test_every_variable_that_the_pages_name_exists() -> None:
    known = {option.variable for option in config.OPTIONS} | set(config.OTHER_VARIABLES)
    for page in PAGES:
        for variable in re.findall(r"PKGINDEX_[A-Z_]*[A-Z]", page.read_text()):
            assert variable in known, f"{page.name}: {variable}"


def test_the_exit_codes_of_the_pages_are_those_of_the_errors() -> None:
    rows = {int(row[0]) for row in table_below("## Exit codes of serve", "docs/operating.md")}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {one.exit_code for one in classes if one is not errors.PkgindexError}
    assert rows == raised | {0}
    help_page = run_in(ROOT, "pkgindex serve --help").partition("Exit codes:")[2]
    assert {int(code) for code in re.findall(r"^    ([0-9])  ", help_page, re.MULTILINE)} == rows


def flat(counters: dict[str, Any]) -> Iterator[str]:
    for name, value in counters.items():
        yield name
        if isinstance(value, dict):
            yield from value


@pytest.mark.parametrize("store", ["memory", "file"])
def test_every_counter_is_explained_and_no_other(store: str, tmp_path: Path) -> None:
    with Server("memory:" if store == "memory" else f"file:{tmp_path / 'index'}") as server:
        server.send_signal(signal.SIGUSR1)
        counters = server.wait_for("counters")
        for name in ("ts", "level", "event"):
            del counters[name]
    text = (ROOT / "docs/operating.md").read_text()
    rows = table_below("## The counters", "docs/operating.md")
    explained = [row[0].strip("`") for row in rows]
    inside = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[1])}
    if store == "file":
        assert explained == list(counters)
        assert set(flat(counters)) <= set(explained) | inside
    else:
        file_only = explained[explained.index("epoch") : explained.index("behind") + 1]
        assert [name for name in explained if name not in file_only] == list(counters)
        assert "from `epoch` to `behind`" in text


def test_every_event_of_the_log_is_explained_and_no_other() -> None:
    explained = {
        event
        for row in table_below("## The log", "docs/operating.md")
        for event in re.findall("`([^`]+)`", row[0])
    }
    logged = {"log lines dropped"}
    for source in SOURCES.rglob("*.py"):
        if source.name == "log.py":
            continue
        logged.update(
            re.findall(
                r'logger\.(?:debug|info|warning|error|exception)\(\s*"([^"]+)"', source.read_text()
            )
        )
    assert explained == logged


def test_log_lines_are_shown_as_they_are_written() -> None:
    ((_, lines),) = blocks("log")
    explained = {row[0].strip("`") for row in table_below("## The log", "docs/operating.md")}
    for line in lines.splitlines():
        match = re.fullmatch(
            r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:info|error) (.+?)((?: \w+=(?:\S+|".*"))*)',
            line,
        )
        assert match, line
        assert match[1] in explained


def test_messages_that_the_pages_explain_are_those_of_the_sources() -> None:
    sources = "".join(p.read_text() for p in SOURCES.rglob("*.py"))
    words = re.sub(r"\"\s*\n\s*f?\"", "", sources)
    rows = table_below("## It does not start, or it stopped", "docs/operating.md")
    assert len(rows) > 5
    fixed = {"No space left on device", "cannot listen: Address already in use"}
    for message, *_ in rows:
        shown = message.strip("`")
        if shown in fixed:  # the system's own words
            continue
        for piece in re.split(r"process 4711.*|/srv|format 2|: …;| \(epoch.*", shown):
            assert piece.strip() in words, shown


def test_the_configuration_that_the_pages_show_is_accepted(tmp_path: Path) -> None:
    for _, contents in blocks("config"):
        tomllib.loads(contents)
        file = tmp_path / "pkgindex.toml"
        file.write_text(contents)
        config.load({}, {}, file)


def test_every_target_of_make_that_the_pages_name_exists() -> None:
    makefile = ROOT / "Makefile"
    if not makefile.exists():
        pytest.skip("no Makefile beside the tests")
    targets = set(re.findall(r"^([a-z]+):", makefile.read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:`|^    )make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_every_file_that_contributing_names_exists_and_has_what_it_says() -> None:
    page = ROOT / "CONTRIBUTING.md"
    if not page.exists() or not (ROOT / "setup.py").exists():
        pytest.skip("no sources beside the tests")
    text = page.read_text()
    for path in re.findall(r"`((?:pkgindex|tests|docs|packaging|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    reading = text[text.index("## Reading the code") :]
    reading = reading[: reading.index("\n## ", 5)]
    entries = re.findall(r"^\d+\. (.*?)(?=^\d+\. |\Z)", reading, re.MULTILINE | re.DOTALL)
    assert len(entries) > 10
    for told in entries:
        paths = re.findall(r"`([\w/]+\.\w+)`", told)
        source = "".join((ROOT / path).read_text() for path in paths)
        for name in re.findall(r"`(?:\w+\.)?(\w+)\(\)`", told):
            assert re.search(rf"\b(?:def|cdef|cpdef)\b[^\n]*\b{name}\(", source), f"{paths}: {name}"


def test_the_index_that_contributing_shows_works(tmp_path: Path) -> None:
    examples = blocks("example of an Index")
    if not examples:
        pytest.skip("no CONTRIBUTING.md beside the tests")
    (tmp_path / "its_module.py").write_text(examples[0][1])
    described = tmp_path / "its-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: its\nVersion: 1.0\n")
    points = "[pkgindex.stores]\ndict = its_module:DictIndex\n"
    (described / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    model = Model()
    lines = [b"INDEX|a|b", b"INDEX|b|", b"INDEX|a|b", b"REMOVE|b|", b"INDEX|b|a", b"REMOVE|a|"]
    lines += [b"INDEX|a|", b"INDEX|a|c", b"REMOVE|b|", b"QUERY|b|", b"", b"INDEX|c|c", b"QUERY|a|"]
    with Server("dict:", environment={"PYTHONPATH": path}) as server:
        with Wire(server.address) as wire:
            assert wire.ask_all(lines) == [model.apply(line) for line in lines]
        assert server.stop() == 0


def test_the_pages_name_no_machine_and_no_one() -> None:
    for page in PAGES:
        assert not re.search(r"/work/|/tmp/|/home/|/root/", page.read_text()), page.name


def test_readme_has_figures_with_the_command_that_made_them() -> None:
    text = (ROOT / "README.md").read_text()
    figures = re.search(r"<!-- figures -->(.*?)<!-- /figures -->", text, re.DOTALL)
    assert figures
    assert "bench" in figures[1]
    assert re.search(r"\d", figures[1])


def test_a_json_line_of_the_pages_is_one() -> None:
    for page in PAGES:
        for line in re.findall(r'^\s*(\{"name": .*\})$', page.read_text(), re.MULTILINE):
            assert set(json.loads(line)) == {"name", "depends"}
