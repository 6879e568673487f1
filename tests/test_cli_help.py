"""The command line as a person meets it: help that helps, and mistakes that end in one line."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import pkgindex
from pkgindex import cli, config

COMMANDS = sorted(cli.MODULES)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pkgindex", *arguments], capture_output=True, text=True, check=False
    )


def help_of(*command: str) -> str:
    """Return a command's help as an 80 column terminal shows it."""
    result = CliRunner().invoke(cli.main, [*command, "--help"], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output


def command_named(name: str) -> click.Command:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    return command


def test_version_is_the_packages():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"pkgindex {pkgindex.__version__}\n")


def test_help_lists_every_command_with_what_it_does():
    text = help_of()
    for name in COMMANDS:
        short = command_named(name).get_short_help_str(limit=70)
        assert short.endswith("."), f"the short help of {name} is cut or no sentence: {short}"
        assert f"  {name} " in text
    for title in cli.SECTIONS:
        assert f"{title}:\n" in text


def test_help_has_examples():
    assert "Examples:" in help_of()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_it_and_shows_an_example(name):
    text = help_of(name)
    assert f"Usage: main {name}" in text or f"Usage: pkgindex {name}" in text
    assert "Example" in text
    assert f"pkgindex {name} " in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_says_what_it_does(name):
    for parameter in command_named(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_a_terminal_of_80_columns(name):
    assert [line for line in help_of(name).splitlines() if len(line) > 80] == []


def test_the_help_of_serve_has_every_option_under_its_section_with_its_default():
    text = " ".join(help_of("serve").split())
    for option in config.OPTIONS:
        assert f"--{option.key} " in text
        assert f"{option.section}:" in text
        if option.kind is not config.SWITCH:
            assert f"[{option.shown_default}]" in text


def test_a_command_is_imported_only_when_it_is_wanted():
    program = (
        "import sys; from pkgindex import cli\n"
        "print([m for m in set(cli.MODULES.values()) if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [["sreve"], ["--nonsense"], ["serve", "--nonsense"], ["serve", "--max-line"], ["index"]],
    ids=" ".join,
)
def test_a_mistake_ends_in_one_line_that_says_where_help_is(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pkgindex: ")
    assert done.stderr.rstrip().endswith("--help")
    assert done.stderr.count("\n") == 1
