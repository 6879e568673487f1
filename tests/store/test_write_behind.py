"""The thread that writes package files, beside the rules: how it ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pkgindex.store import packages
from pkgindex.store.packages import WriteBehind
from tests.store.writer import PATIENCE, Writer


def broken(_self: WriteBehind) -> bool:
    raise RuntimeError("cannot schedule new futures after interpreter shutdown")


@pytest.mark.parametrize("abandoned", [False, True])
def test_what_fails_is_told_unless_the_writer_was_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    monkeypatch.setattr(WriteBehind, "_round", broken)
    told: list[OSError] = []
    with Writer(tmp_path / "index") as writer:
        writer.ask("INDEX|a|")
        behind = writer.write_behind()
        behind._failed = told.append
        behind.start()
        if abandoned:
            behind.abandon()
        else:
            behind.hurry()
        assert behind.join(PATIENCE)
    assert bool(told) is not abandoned


def test_who_abandons_it_need_not_wait_for_its_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "INTERVAL_SECONDS", 3600.0)
    with Writer(tmp_path / "index") as writer:
        behind = writer.write_behind()
        behind.start()
        time.sleep(0.1)  # it is waiting by now
        behind.abandon()
        assert behind.join(PATIENCE / 10)
