"""The product built with AddressSanitizer and UndefinedBehaviorSanitizer, and servers that run it.

    with Sanitized("memory:") as server: ...
    assert not reports(server.lines)

It is built from a copy of the sources, once for as long as they stay as they are, and found before the
installed one by PYTHONPATH. gcc's library is preloaded, for Python itself is not built with it, and
PYTHONMALLOC=malloc gives each object a block of its own: in Python's arenas an overflow meets no border.

The copy has a few functions more, at the end of its core, each with a mistake that a sanitizer must
report when it is called: who sees nothing reported wants to know that it would have been.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests.servers import PATIENCE, Server

__all__ = ["PLANTED", "Planted", "Sanitized", "absent", "reports"]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized-core"
COMPILED = (".pyx", ".pxd", ".pxi", ".h")  # and protocol.py
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pkgindex")

#: Mistakes planted in the copy: a function's name, and what the sanitizer calls what it does.
PLANTED = {
    "overrun": "heap-buffer-overflow",
    "use_after_free": "heap-use-after-free",
    "overrun_block": "use-after-poison",
    "use_freed_block": "use-after-poison",
    "overrun_reserved": "use-after-poison",
    "overshift": "runtime error: shift exponent",
    "leak": "LeakSanitizer: detected memory leaks",
}

HOOKS = """

from libc.stdlib cimport malloc as planted_malloc, free as planted_free

def overrun(bytearray data):
    cdef volatile unsigned char *p = <unsigned char *>PyByteArray_AS_STRING(data)
    p[len(data) + 1] = 1

def use_after_free(bytearray data):
    cdef volatile unsigned char *p = <unsigned char *>planted_malloc(len(data))
    planted_free(<void *>p)
    p[0] = 1

cdef planted_block(bint freed, size_t offset):
    # 65 units come from a class of 72: what is behind them is nobody's, too.
    cdef Arena arena
    cdef uint32_t handle
    cdef volatile char *p
    memset(&arena, 0, sizeof(arena))
    arena.unit = 8
    arena_alloc(&arena, 3)
    handle = arena_alloc(&arena, 65)
    arena_alloc(&arena, 3)
    if freed:
        arena_free(&arena, handle, 65)
    p = arena.base + handle * arena.unit
    p[offset] = 1

def overrun_block(bytearray data):
    planted_block(False, 65 * 8)

def use_freed_block(bytearray data):
    planted_block(True, 100)

def overrun_reserved(bytearray data):
    cdef Bytes buffer
    cdef volatile char *p
    memset(&buffer, 0, sizeof(buffer))
    bytes_reserve(&buffer, 10)
    p = buffer.data
    p[10] = 1

def overshift(bytearray data):
    cdef volatile int shift = 32 + len(data)
    cdef volatile int one = 1
    one = one << shift

def leak(bytearray data):
    cdef volatile unsigned char *p = <unsigned char *>planted_malloc(4000 + len(data))
    p[0] = 1
"""

#: Where a server with a mutation begins, in place of `-m pkgindex`.
MAIN = "from pkgindex.cli import main; main()"

#: A mutation: the core's planted function is called when a line with this in it arrives.
TRIGGER = b"%%%"
CALL = """
import pkgindex._core as core, pkgindex.index.memory as memory
class Index(memory.MemoryIndex):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        apply = self.apply
        def calling(batch):
            if {trigger!r} in batch.buffer[batch.start:batch.stop]:
                core.{name}(bytearray(batch.stop))
            return apply(batch)
        self.apply = calling
memory.MemoryIndex = Index
"""


@cache
def library() -> str:
    """The path of gcc's libasan; "" where there is none."""
    if not (gcc := shutil.which("gcc")):
        return ""
    asked = [gcc, "-print-file-name=libasan.so"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


def absent() -> str | None:
    """Why this machine cannot run it."""
    if not library():
        return "gcc has no libasan here"
    return None if (ROOT / "setup.py").exists() else "the sources are not here"


def build() -> Path:
    """Build it unless that is done; return the folder that Python imports it from."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two campaigns may want it at once
        folder = BUILD / _digest()
        if not (folder / "done").exists():
            _compile(folder)
            (folder / "done").touch()
        lib = folder / "lib"
        for path in (ROOT / "pkgindex").rglob("*.py"):
            shutil.copy(path, lib / path.relative_to(ROOT))
        return lib


def _digest() -> str:
    """What was compiled is known by its sources; Python's are copied each time."""
    found = hashlib.sha256((HOOKS + sys.version).encode())
    compiled = [path for path in (ROOT / "pkgindex").rglob("*") if path.suffix in COMPILED]
    for path in sorted([*compiled, ROOT / "setup.py", ROOT / "pkgindex" / "protocol.py"]):
        found.update(f"{path}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _compile(folder: Path) -> None:
    for old in BUILD.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    source = folder / "source"
    source.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    with (source / "pkgindex" / "_core.pyx").open("a") as core:
        core.write(HOOKS)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(folder / "lib")]
    environment = os.environ | {"PKGINDEX_DEBUG": "1", "PKGINDEX_SANITIZE": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the sanitized build failed:\n{(done.stdout + done.stderr)[-4000:]}")


def sanitizing() -> dict[str, str]:
    """What a process needs to run the sanitized build, and the tests beside it."""
    return {
        "LD_PRELOAD": library(),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{build()}:{ROOT}",
        "PYTHONSAFEPATH": "1",  # the sources in the working folder are not what is to be run
        "ASAN_OPTIONS": "detect_leaks=1:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Sanitized(Server):
    """A server of the sanitized build; `mutation` is Python that breaks it first."""

    def __init__(
        self,
        store: str,
        *options: str,
        mutation: str = "",
        environment: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        made = sanitizing() | dict(environment or {})
        super().__init__(store, *options, environment=made, patience=patience)
        if mutation:
            place = self._command.index("-m")
            self._command[place : place + 2] = ["-c", f"{mutation}\n{MAIN}"]


class Planted(Sanitized):
    """One that makes a planted mistake at each line with TRIGGER in it."""

    def __init__(self, name: str) -> None:
        super().__init__("memory:", mutation=CALL.format(trigger=TRIGGER, name=name))


def reports(lines: Iterable[str]) -> list[str]:
    """Give the sanitizers' reports in a log, each as the line that it begins with."""
    return [
        line
        for line in lines
        if re.search(r"(Address|Leak|UndefinedBehavior)Sanitizer:|runtime error:", line)
        and not line.startswith("SUMMARY")
    ]
