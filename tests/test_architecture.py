"""The structure that the design promises: imports go only downward, and no file is two ideas."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pkgindex"

#: From the wire down. A part imports itself and what stands after it.
STOREYS = [
    "cli",
    "supervisor",
    "server",
    "listeners",
    "protocol",
    "cluster",
    "index",
    "store",
    "_core",
]

#: What stands beside the storeys, and all that it may import of ours.
BESIDE = {
    "__init__": {"errors"},
    "__main__": {"cli"},
    "errors": set(),
    "config": {"errors"},
    "log": set(),
    "transport": {"errors"},
    "client": {"transport", "errors"},
    "load": {"client", "errors"},
}

#: What any storey may import besides.
EVERYWHERE = {"__init__", "errors", "config", "log"}

#: Lines; "about" 600 and 1,200, with room for a tenth more.
PYTHON_LIMIT, CYTHON_LIMIT = 660, 1320

SOURCES = sorted(
    path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyi", ".pyx", ".pxi", ".pxd")
)


def part_of(path: Path) -> str:
    """Return the part of the design that a source belongs to: the first name below the package."""
    first = path.relative_to(PACKAGE).parts[0]
    name = first.partition(".")[0]
    # The files that _core.pyx includes are the core, whatever each is called.
    return "_core" if path.suffix in (".pyx", ".pxi", ".pxd") and path.parent == PACKAGE else name


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for what a source imports of ours, wherever in it that happens."""
    text = path.read_text()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = path.relative_to(ROOT).parent.parts
                base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
                module = ".".join(filter(None, [base, node.module]))
                names = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((node.lineno, name) for name in names if is_ours(name))
    else:
        pattern = r"^\s*(?:from\s+(pkgindex[\w.]*)\s+c?import\s+(\w+)|c?import\s+(pkgindex[\w.]*))"
        for match in re.finditer(pattern, text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            yield line, match[3] or f"{match[1]}.{match[2]}"


def is_ours(name: str) -> bool:
    return name == "pkgindex" or name.startswith("pkgindex.")


def part_named(module: str) -> str:
    """Return the part that `pkgindex.a.b` lies in; a name of the package itself is `__init__`."""
    first = module.split(".")[1] if "." in module else "__init__"
    known = first in STOREYS or first in BESIDE
    return first if known else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_only_downward(path):
    part = part_of(path)
    assert part in STOREYS or part in BESIDE, f"{part} has no place in the design"
    if part in BESIDE:
        allowed = BESIDE[part] | {part}
    else:
        allowed = EVERYWHERE | set(STOREYS[STOREYS.index(part) :])
        if part == "cli":
            allowed |= {"client", "load"}
    wrong = [
        f"{path}:{line}: {name}" for line, name in imported(path) if part_named(name) not in allowed
    ]
    assert not wrong, f"{part} may import {sorted(allowed)} of ours"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long_enough_to_be_two_ideas(path):
    lines = path.read_text().count("\n")
    assert lines <= (PYTHON_LIMIT if path.suffix in (".py", ".pyi") else CYTHON_LIMIT)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.suffix in (".py", ".pyx")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_every_module_says_what_it_is_for(path):
    text = path.read_text()
    # Cython's own first lines are comments; after them stands the docstring.
    body = re.sub(r"\A(?:\s*#.*\n)+", "", text).lstrip()
    assert body.startswith('"""'), "the head of the module is missing"


def test_folders_are_one_level_deep():
    folders = [path.parent for path in SOURCES]
    assert {len(folder.relative_to(PACKAGE).parts) for folder in folders} <= {0, 1}


def test_every_folder_is_a_package():
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").exists(), f"{folder} would be missing from an installation"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # A program that embeds the client gets the standard library and nothing else.
        ("pkgindex.client", ["click", "rich", "structlog", "uvloop", "pkgindex._core"]),
        # A client command starts without the server and without what draws progress bars.
        ("pkgindex.cli.client", ["rich", "structlog", "uvloop", "pkgindex._core"]),
        ("pkgindex.cli", ["rich", "structlog", "uvloop", "pkgindex._core"]),
        ("pkgindex.config", ["click", "rich", "structlog", "uvloop"]),
        ("pkgindex.protocol", ["pkgindex.store"]),
    ],
)
def test_a_module_loads_only_what_it_needs(module, absent):
    program = f"import {module}, sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
