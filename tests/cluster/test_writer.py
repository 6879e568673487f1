"""The writer's reign, where something goes wrong that nobody thought of."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from pkgindex.cluster.feed import Feed
from pkgindex.cluster.index import ClusterIndex
from pkgindex.config import Settings
from tests.index.inside import Inside
from tests.servers import Wire


def test_a_commit_that_cannot_be_told_ends_the_server_and_leaves_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_how(*_: object) -> NoReturn:
        raise KeyError("how")

    settings = Settings(store=f"file:{tmp_path}", cluster="127.0.0.1:0")
    with Inside(ClusterIndex.open(str(tmp_path), settings)) as inside:
        monkeypatch.setattr(Feed, "durable", forgets_how)
        with Wire(inside.address) as wire:
            wire.send(b"INDEX|a|\n")
            inside.wait_until(lambda: inside.failures)
    assert "a mistake of pkgindex" in str(inside.failures[0])
