"""What the documentation promises first: two servers on one folder, and one of them is killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.load.test_debian import LISTS
from tests.servers import PATIENCE, Server

PACKAGES = 120_000  # so many that the load takes a second or two

LOAD = (sys.executable, "-m", "pkgindex", "load", "--missing", "add", "--json")

#: A stop need not write all package files: the journal covers them.
STOP = ("--stop-timeout", "3")


def member(store: Path) -> Server:
    return Server(f"file:{store}", "--cluster", "127.0.0.1:0", *STOP)


def generated(folder: Path) -> list[str]:
    """A distribution: each package needs up to five of those before it."""
    chance = random.Random(6)
    names = [f"package-{n}" for n in range(PACKAGES)]
    file = folder / "packages.jsonl"
    with file.open("w") as out:
        for n, name in enumerate(names):
            depends = sorted({names[chance.randrange(n)] for _ in range(min(n, n % 6))})
            out.write(json.dumps({"name": name, "depends": depends}) + "\n")
    return [str(file)]


def begun(server: Server) -> None:
    """Wait until the first messages of a load are in a server's hands."""
    deadline = time.monotonic() + PATIENCE
    while not any(each["packages"] for each in server.events("counters")):
        assert time.monotonic() < deadline, "the load does not begin"
        server.send_signal(signal.SIGUSR1)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["generated", "debian"])
def test_a_load_goes_on_without_an_error_when_the_writer_is_killed(source, tmp_path):
    if source == "debian" and not LISTS:
        pytest.skip("no package lists under /var/lib/apt/lists")
    files = LISTS if source == "debian" else generated(tmp_path)
    store = tmp_path / "index"
    with member(store) as first:
        first.wait_for("writer")
        with member(store) as second:
            second.wait_for("snapshot taken")
            address = "{}:{}".format(*second.address)
            load = subprocess.Popen(
                [*LOAD, "--server", address, *files],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            begun(second)
            assert load.poll() is None, "the load was over before the writer was killed"
            first.kill()
            printed, errors = load.communicate(timeout=PATIENCE)
            outcome = json.loads(printed)
            assert (load.returncode, errors, outcome["failed"]) == (0, "", {})
            assert second.wait_for("writer")["change"] < outcome["indexed"], "killed too late"
            assert second.stop() == 0
    checked = subprocess.run(
        [sys.executable, "-m", "pkgindex", "check", str(store)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    there = outcome["indexed"] + len(outcome["added"])
    assert f": {there} packages, " in checked.stdout
