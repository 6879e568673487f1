"""The systemd unit: it is valid, it is confined, and it agrees with the server about numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pkgindex import errors
from pkgindex.config import Settings

UNIT = Path(__file__).resolve().parent.parent / "packaging" / "pkgindex.service"

#: `systemd-analyze security` counts from 0, confined, to 10; what an ordinary daemon gets is 9.6. What the
#: unit and the documentation say; another systemd may count a little otherwise.
STATED_EXPOSURE, TOLERANCE = 1.2, 0.3


def setting(name: str) -> str:
    """Return the value of a setting that the unit has once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return value


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """Return a copy of the unit whose command exists on this machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze; on Debian: apt-get install systemd")
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    return copy


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )


def test_systemd_finds_nothing_wrong_with_the_unit(runnable):
    done = analyze("verify", runnable)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_confines_the_server(runnable):
    done = analyze("security", "--offline=true", "--no-pager", runnable)
    if "--offline" in done.stderr:
        pytest.skip("this systemd cannot judge a unit that is not loaded; 250 or later can")
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stderr
    assert float(exposure[1]) <= STATED_EXPOSURE + TOLERANCE
    assert f"gives this unit {STATED_EXPOSURE} of 10" in UNIT.read_text()


def test_what_a_restart_cannot_cure_is_not_restarted():
    hopeless = {errors.ConfigError.exit_code, errors.StoreDamaged.exit_code}
    assert setting("RestartPreventExitStatus").split() == [str(code) for code in sorted(hopeless)]
    assert setting("Restart") == "on-failure"


def test_systemd_waits_longer_for_a_stop_than_the_server_takes():
    assert float(setting("TimeoutStopSec")) > Settings().stop_timeout


def test_every_client_that_is_let_in_has_a_descriptor():
    assert int(setting("LimitNOFILE")) > Settings().max_clients
