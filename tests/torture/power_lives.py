"""Second lives: writers that start on what a killed one, or a power loss, has left, and are recorded too.

    for life in second_lives(folder, layouts, careful=True):
        life.index, life.calls

Whatever a writer finds when it starts, it may not take for durable: a name that the one before it made
and had not synced when it was killed can still go with the next power loss. So a recording of one life
after another is made for every point at which the first may have ended.

One process under strace is the writer of all these lives, one after the other, with the parts of the
product as they are, and no server around them: `python -m tests.torture.power_lives FOLDER…` . It says
on SAYING what it begins to change and what is durable, for there are no clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkgindex.errors import PkgindexError
from pkgindex.store.claim import Withdrawn
from tests.store.tracing import Call, parse
from tests.store.writer import Writer
from tests.torture.crash_states import Layout
from tests.torture.operations import CALLS, SAYING, Told, whole
from tests.torture.power_recovery import STORE, canonical

__all__ = ["LINES", "Life", "second_lives"]

#: What each life is asked for, one commit each, with a round in between.
LINES = ("INDEX|second-life|", "INDEX|third|second-life", "REMOVE|third|")

HEARD, TOLD = "heard", "told"


@dataclass(frozen=True)
class Life:
    """What came of one."""

    top: Path
    index: dict[str, list[str]]  # as it was found
    error: str
    calls: list[Call]


def second_lives(folder: Path, layouts: Sequence[Layout], *, careful: bool) -> list[Life]:
    """Lay each of these out below `folder`, and record a life on it."""
    tops = []
    for number, layout in enumerate(layouts):
        top = folder / str(number)
        top.mkdir()
        for path, data in sorted(layout.items()):
            if data is None:
                (top / path).mkdir()
            else:
                (top / path).write_bytes(data)
        tops.append(top)
    trace = folder / "trace"
    command = ["strace", "-f", "-y", "-q", "-s", "0", "-o", str(trace), "-e", f"trace={CALLS}"]
    command = [*whole(command), sys.executable, "-m", "tests.torture.power_lives"]
    command += ["--careful"] * careful
    done = subprocess.run(
        [*command, str(folder), str(len(tops))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Each life's part of the one trace: from its beginning to that of the next.
    parts: list[list[Call]] = []
    for call in parse(trace.read_text()):
        if said(call) == "begins":
            parts.append([])
        elif parts:
            parts[-1].append(call)
    trace.unlink()
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Life(top, one["index"], one["error"], calls)
        for top, one, calls in zip(tops, told, parts, strict=True)
    ]


def said(call: Call) -> str:
    """What the writer says with this call; "" for any other."""
    if call.name != "write" or f"<{_hexed(SAYING)}" not in call.arguments:
        return ""
    text = call.arguments.split('"')[1]
    return bytes.fromhex(text.replace("\\x", "")).decode()


def _hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def is_heard(operation: Told) -> bool:
    """Whether this is the beginning of a change, and not the answer to it."""
    return operation.data == HEARD.encode()


def live(root: Path, say: int) -> tuple[dict[str, list[str]], str]:
    """One life: recover, change, write a round, change again. The index found; what went wrong."""
    index: dict[str, list[str]] = {}
    try:
        with Writer(root) as writer:
            index = writer.index
            # First a round alone: another change might make the folders that it should have synced.
            writer.write_files()
            for line in LINES:
                os.write(say, HEARD.encode())
                assert writer.ask(line) == ["OK"], line
                os.write(say, TOLD.encode())
                writer.write_files()
    except (PkgindexError, Withdrawn, OSError, AssertionError) as error:
        return index, f"{type(error).__name__}: {error}"
    return index, ""


def states_after(index: dict[str, list[str]]) -> list[str]:
    """The index after each of LINES, in canonical form."""
    first = index | {"second-life": []}
    return [canonical(first), canonical(first | {"third": ["second-life"]}), canonical(first)]


def main() -> None:
    """Live on each folder; one JSON line for each."""
    *options, folder, count = sys.argv[1:]
    from tests.torture.power_story import CAREFUL, EAGER

    exec(EAGER + (CAREFUL if "--careful" in options else ""), {})
    say = os.open(SAYING, os.O_WRONLY)
    for number in range(int(count)):
        os.write(say, b"begins")
        index, error = live(Path(folder) / str(number) / STORE, say)
        print(json.dumps({"index": index, "error": error}))


if __name__ == "__main__":
    main()
