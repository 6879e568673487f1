"""What a user gets: an sdist with all that it needs, installed by each Python that is here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pkgindex

ROOT = Path(__file__).resolve().parent.parent
NAME = f"pkgindex-{pkgindex.__version__}"
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]

#: No part of an sdist: what only this repository's own machinery reads.
OF_THE_REPOSITORY = (".ci/", ".git")

#: A folder without its __init__.py would be missing from an installation, and only from there.
IMPORT_EVERYTHING = """
import importlib, pkgutil, pkgindex
for module in pkgutil.walk_packages(pkgindex.__path__, "pkgindex."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("lz4", "msgspec", "zstandard"):  # the extra `load`
            raise
print(pkgindex.__file__)
"""

#: Made by the build itself.
OF_THE_BUILD = {"PKG-INFO", "setup.cfg"}


def clean_environment() -> dict[str, str]:
    """Return this process's environment less what would reach into an installation."""
    mine = ("PKGINDEX_", "PYTHON", "VIRTUAL_ENV", "LD_PRELOAD")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(mine)}
    # Byte code of every dependency would be made at length and run once.
    return kept | {"PIP_NO_COMPILE": "1"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; its last lines are the failure if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


# --- the sdist ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy of the sources as a clone would have them."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "clone"
    # An egg-info of an earlier build would bring its own list of files along.
    made = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info", "*-data*"
    )
    shutil.copytree(ROOT, source, ignore=made, symlinks=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist"]
    run(*build, "--outdir", folder, source, cwd=folder)
    return folder / f"{NAME}.tar.gz"


@pytest.fixture(scope="session")
def contents(sdist: Path) -> set[str]:
    """Return the paths of the files in the sdist, relative to its one folder."""
    with tarfile.open(sdist) as archive:
        paths = [member.name for member in archive if member.isfile()]
    assert all(path.startswith(f"{NAME}/") for path in paths)
    return {path.removeprefix(f"{NAME}/") for path in paths}


def test_the_sdist_has_all_that_an_installation_is_built_from(contents):
    needed = [path for path in (ROOT / "pkgindex").rglob("*") if path.is_file()]
    endings = (".py", ".pyx", ".pxi", ".pxd", ".pyi", ".h", "py.typed")
    expected = {str(path.relative_to(ROOT)) for path in needed if path.name.endswith(endings)}
    expected |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert expected <= contents


def test_the_sdist_has_nothing_that_a_build_or_a_run_made(contents):
    made = (".so", ".pyc", ".o", "pkgindex/_core.c", "pkgindex/store/_disk.c", ".html")
    assert not {path for path in contents if path.endswith(made)}
    folders = {part for path in contents for part in Path(path).parts[:-1]}
    assert not {name for name in folders if name.startswith(".") or name == "__pycache__"}
    assert not {name for name in folders if name.startswith("pkgindex-data")}


def test_the_sdist_is_the_repository_less_its_own_machinery(contents):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    # Not yet committed files count: the test is of the rules, not of the day.
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    expected = {
        path for path in listed if (ROOT / path).exists() and not path.startswith(OF_THE_REPOSITORY)
    }
    found = {path for path in contents - OF_THE_BUILD if not path.startswith("pkgindex.egg-info/")}
    assert found == expected


# --- installing it --------------------------------------------------------------------------------


def interpreter(version: str) -> str:
    """Return a Python of this minor version, from PATH or pyenv, that can build; skip if none."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders += sorted(folder / "bin" for folder in pyenv.glob(f"{version}.*"))
    candidates = [folder / f"python{version}" for folder in folders]
    program = (
        "import os, sys, sysconfig\n"
        "try: import ensurepip, venv\n"
        "except ImportError: sys.exit('cannot make a virtual environment')\n"
        "if not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')):\n"
        "    sys.exit('has no Python.h')\n"
        "print('ready')\n"
    )
    reasons = []
    for candidate in filter(Path.exists, candidates):
        # It is run, not only found: a shim of pyenv may lead nowhere.
        done = subprocess.run(
            [candidate, "-c", program], env=clean_environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.stdout == "ready\n":
            return str(candidate)
        reasons.append(f"{candidate}: {done.stderr.strip().splitlines()[0]}")
    pytest.skip("; ".join(reasons) or f"no python{version} on PATH or under {pyenv}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_sdist_installs_and_works_in_an_empty_environment(version, sdist, tmp_path):
    python = interpreter(version)
    run(python, "-m", "venv", "environment", cwd=tmp_path)
    bin_folder = tmp_path / "environment" / "bin"
    run(bin_folder / "pip", "install", "--quiet", sdist, cwd=tmp_path)
    command = bin_folder / "pkgindex"
    assert run(command, "--version", cwd=tmp_path) == f"pkgindex {pkgindex.__version__}\n"
    place = run(bin_folder / "python", "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    assert place.startswith(str(tmp_path))
    assert_serves(command, tmp_path)


def assert_serves(command: Path, folder: Path) -> None:
    """Start the installed server on a free port, index and query through the installed client."""
    server = subprocess.Popen(
        [command, "serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--log-format", "json"],
        cwd=folder,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            address = address_of(server)
            for arguments, code in (
                (("query", "elisp"), 1),
                (("index", "emacs", "elisp"), 1),
                (("index", "elisp"), 0),
                (("index", "emacs", "elisp"), 0),
                (("query", "emacs"), 0),
                (("remove", "elisp"), 1),
            ):
                done = subprocess.run(
                    [command, *arguments, "--server", address],
                    cwd=folder, env=clean_environment(), capture_output=True, text=True,
                    check=False,
                )  # fmt: skip
                assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


def address_of(server: subprocess.Popen[str]) -> str:
    """Return the address of the `serving` line; the lines so far are the failure if it ends."""
    lines = []
    for line in server.stderr or ():
        lines.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "serving":
            return event["listen"][0]
    pytest.fail(f"the server ended: {''.join(lines)}")


# --- what a machine may lack ----------------------------------------------------------------------


def build_fails(prelude: str, tmp_path: Path, **environ: str) -> str:
    """Run `setup.py build_ext` after `prelude` and return the one line with which it stops."""
    program = (
        f"import os, platform, runpy, setuptools, sys, sysconfig\n{prelude}\n"
        f"sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-temp', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=clean_environment() | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "machine",
    [
        "platform.machine = lambda: 'riscv64'",
        "sysconfig.get_config_vars(); sys.platform = 'darwin'",
        "sys.maxsize = 2**31 - 1",
    ],
)
def test_elsewhere_the_build_stops_with_one_line(machine, tmp_path):
    assert "64-bit Linux on x86-64 or arm64 only" in build_fails(machine, tmp_path)


def test_a_missing_compiler_is_named_with_its_debian_package(tmp_path):
    assert "apt-get install gcc" in build_fails("", tmp_path, CC="no-such-compiler")


def test_missing_headers_are_named_with_their_debian_package(tmp_path):
    line = build_fails("sysconfig.get_path = lambda *_: '/nonexistent'", tmp_path)
    assert "apt-get install python3" in line
    assert "-dev" in line


@pytest.mark.parametrize(
    ("lacking", "environ", "package"),
    [
        ("nothing", {"CC": "no-such-compiler"}, "apt-get install gcc"),
        ("ensurepip", {}, "apt-get install python3-venv"),
        ("Python.h", {}, "apt-get install python3-dev"),
        ("version_info", {}, "apt-get install python3."),
    ],
)
def test_make_names_what_is_missing_in_one_line(lacking, environ, package, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *{lacking}*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "tools", f"PYTHON={python}"],
        cwd=ROOT,
        env=clean_environment() | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert package in done.stderr
    assert done.stderr.count("\n") == 1
