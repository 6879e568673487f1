"""What the tests of the store share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for a store, absent yet."""
    return tmp_path / "index"


@pytest.fixture
def behind_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the store believe that its mount may show what is old: it reads again before it judges."""
    monkeypatch.setattr("pkgindex.store.recovery.is_local", lambda fd: False)
    monkeypatch.setattr("pkgindex.store.recovery.PATIENCE_SECONDS", 3.0)
