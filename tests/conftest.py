"""The options that the whole test run shares."""

from __future__ import annotations

import resource

import pytest

from tests.servers import PATIENCE, parse_address

#: Open files that a run with 1,000 connections needs in the test's own process.
OPEN_FILES = 4096


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption(
        "--server",
        metavar="HOST:PORT",
        help="judge the server that listens there (or at unix:PATH) instead of starting pkgindex",
    )
    group.addoption(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help="how long to wait for what the server owes (default: %(default)g)",
    )
    group.addoption(
        "--only-spec",
        action="store_true",
        help="leave out what the original specification does not say and pkgindex decided",
    )


def pytest_configure(config: pytest.Config) -> None:
    if given := config.getoption("--server"):
        try:
            parse_address(given)
        except ValueError as error:
            raise pytest.UsageError(f"--server: {error}") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        room = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-spec"):
        left_out = [item for item in items if item.get_closest_marker("decision")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what stood in for a thing that this machine lacks: a test's property `stand-in`."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    said = {text for r in reports for name, text in r.user_properties if name == "stand-in"}
    for text in sorted(said):
        terminalreporter.write_line(f"stand-in: {text}")
