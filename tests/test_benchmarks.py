"""The bench: what its generator sends, that a lost change is found, and that pages repeat its results."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("the bench is not here", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import figures  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import servers  # noqa: E402
import tables  # noqa: E402
import targets  # noqa: E402
import workloads  # noqa: E402

SECONDS = 0.2
CONNECTIONS = 4
KINDS = ("new", "new-with-dependencies", "mixed", "reindex", "remove")


@pytest.fixture(autouse=True, scope="module")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile into a folder of this process, choose no processors, wait for no package files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "BUILD", tmp_path_factory.mktemp("bench"))
        patch.setattr(machine, "pinned", lambda _cpu, *command: [*map(str, command)])
        patch.setattr(servers.Server, "settle", lambda _server: None)
        yield


def workload(kind: str) -> workloads.Workload:
    return workloads.Workload(kind, kind, "test", kind, CONNECTIONS, 1, ("pkgindex",), size=300)


@pytest.mark.parametrize("kind", KINDS)
def test_acknowledged_changes_of_a_store_are_found_after_a_sigkill(
    kind: str, tmp_path: Path
) -> None:
    result = runs.run_durable(workload(kind), servers.Pkgindex(), tmp_path / "s", SECONDS)
    assert result["survived"] > CONNECTIONS
    assert result["rate"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_changes_that_a_sigkill_took_are_missed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(servers.BenchError, match="did not survive SIGKILL"):
        runs.run_durable(workload(kind), servers.PkgindexInMemory(), tmp_path / "s", SECONDS)


class LosesTheLast(servers.Pkgindex):
    """After its SIGKILL, it lacks the last change that a connection was told of."""

    lost = False
    names: tuple[str, ...] = ()

    def send_all(self, messages: Any, otherwise: str, refused: int = 0) -> None:
        if "SIGKILL" in otherwise and not self.lost:
            self.lost = True
            super().send_all(map(self.remove, self.names), "the last change is not there")
        super().send_all(messages, otherwise, refused)


def test_one_lost_change_among_thousands_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = workloads.survivors
    server = LosesTheLast()

    def survivors(load: Any, asked: Any, acked: list[int]) -> Any:
        last = max(range(len(acked)), key=lambda c: acked[c])
        server.names = (f"p-{last:04d}-{acked[last] - 1:08d}",)
        return honest(load, asked, acked)

    monkeypatch.setattr(runs, "survivors", survivors)
    with pytest.raises(servers.BenchError, match="did not survive SIGKILL"):
        runs.run_durable(workload("new"), server, tmp_path / "s", SECONDS)


def test_a_mixed_load_changes_once_in_ten_messages(tmp_path: Path) -> None:
    server = servers.PkgindexInMemory()
    server.start(tmp_path / "s")
    try:
        server.load(tables.synthetic(300))
        words = workloads.options(workload("mixed"), server)
        stream = server.generate(*words, "--count", "4000")["streams"][0]
        assert (stream["ok"], stream["fail"], stream["error"]) == (4000, 0, 0)
        names = [f"p-{c:04d}-{i:08d}" for c in range(CONNECTIONS) for i in range(9, 1000, 10)]
        server.send_all(map(server.query, names), "a change of the mixed load is missing")
        before = [f"p-{c:04d}-{i:08d}" for c in range(CONNECTIONS) for i in range(8, 1000, 10)]
        server.send_all(map(server.query, before), "more changes than were due", len(before))
    finally:
        server.kill()


def test_the_most_popular_package_is_asked_for_twice_as_often_as_the_second() -> None:
    drawn = tables.popular(tables.synthetic(1000), 60_000)
    counts = sorted((drawn.count(name) for name in set(drawn)), reverse=True)
    assert 1.8 < counts[0] / counts[1] < 2.2
    assert 9 < counts[0] / counts[9] < 11


def test_a_synthetic_table_has_dependencies_first() -> None:
    seen: set[str] = set()
    for name, dependencies in tables.synthetic(3000):
        assert seen.issuperset(dependencies)
        seen.add(name)
    assert len(seen) == len(tables.synthetic(3000)) == 3000
    assert seen == set(tables.synthetic(3000).names())


def test_a_real_table_is_put_in_order_and_its_cycles_in_two_steps() -> None:
    rows = tables.ordered({"a": ["b", "nobody"], "b": ["a", "c"], "c": []})
    there: set[str] = set()
    whole: dict[str, list[str]] = {}
    for name, dependencies in rows:
        assert there.issuperset(dependencies)
        there.add(name)
        whole[name] = dependencies
    assert whole == {"nobody": [], "c": [], "a": ["b", "nobody"], "b": ["a", "c"]}
    assert len(rows) == 4


# --- results --------------------------------------------------------------------------------------


def rounds(rate: float, p99: float = 100.0) -> list[dict[str, Any]]:
    return [{"rate": rate, "latency_us": {"p50": 50.0, "p99": p99}} for _ in range(3)]


def document(**probes: dict[str, float]) -> dict[str, Any]:
    """Results as bench.json holds them: QUERY at 97 % of bare uvloop's rate."""
    made = [server() for server in servers.SERVERS]
    return {
        "date": "2026-01-01T00:00:00Z",
        "machine": {
            "cpu": "AMD EPYC, virtual machine",
            "cores": 2,
            "memory_gib": 24,
            "system": "Debian GNU/Linux 12 (bookworm)",
            "kernel": "6.1",
            "file_system": "ext4",
        },
        "versions": {"pkgindex": "pkgindex 1.0"},
        "titles": {server.name: server.title for server in made},
        "settings": {"rounds": 3, "seconds": 1.5, "scale": 1},
        "strangers_cpu": 0,
        "skipped": {"redis": "redis-server is not installed"},
        "failed": {},
        "results": {
            "query-100": {"pkgindex": rounds(97_000.0), "uvloop": rounds(100_000.0)},
            "open": {"pkgindex": rounds(20_000.0, 300.0)},
            "open-beside": {"pkgindex": rounds(20_000.0, 1500.0)},
        },
        "probes": dict(probes),
    }


def judged(results: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    return {t.wanted: found for t in targets.TARGETS if (found := t.judged(results)) is not None}


def test_a_target_is_met_at_its_bound_and_not_beyond() -> None:
    found = judged(document(idle={"bytes": 4097.0}))
    assert found["≥ 0.97 × bare uvloop"] == (0.97, True)
    assert found["an idle connection ≤ 4,096 bytes"] == (4097.0, False)
    assert found["≤ 1 ms more than without them"] == (pytest.approx(1.2), False)
    assert "≥ 1.7 × Redis EXISTS" not in found


def redis_row(ours: float) -> str:
    results = document()
    results["results"]["query-100"] |= {"pkgindex": rounds(ours), "redis": rounds(80_000.0)}
    (row,) = (line for line in report.targets_table(results) if "Redis EXISTS" in line)
    return row


def test_a_target_beyond_the_machines_own_limit_is_held_against_that() -> None:
    assert redis_row(140_000.0).endswith("| 1.75 | met |")
    assert redis_row(97_000.0).endswith("| 1.21 | 97% of the machine's limit, 1.25 |")
    assert redis_row(85_000.0).endswith("| **not met**: 85% of the machine's limit, 1.25 |")


def test_a_bound_from_above_is_held_against_the_machines_own_limit_too() -> None:
    def row(ours: float) -> str:
        results = document()
        results["results"]["open"]["uvloop"] = rounds(20_000.0, 500.0)
        results["results"]["open-beside"] = {
            "pkgindex": rounds(20_000.0, 300.0 + ours),
            "uvloop-disk": rounds(20_000.0, 2_500.0),
        }
        (found,) = (line for line in report.targets_table(results) if "1 ms more" in line)
        return found

    assert row(900.0).endswith("| 0.90 | met |")
    assert row(2_000.0).endswith("| 2.00 | 100% of the machine's limit, 2.00 |")
    assert row(4_000.0).endswith("| **not met**: 50% of the machine's limit, 2.00 |")


def test_every_target_is_of_a_workload_or_a_probe_that_there_is() -> None:
    from probes import PROBES

    known = {w.name for w in workloads.WORKLOADS} | {p.name for p in PROBES}
    for target in targets.TARGETS:
        with pytest.raises(KeyError) as missing:
            target.value({"results": {}, "probes": {}})
        assert missing.value.args[0] in known, target.wanted


def test_a_table_says_where_the_generator_was_the_limit() -> None:
    results = document()
    for one in results["results"]["query-100"]["uvloop"]:
        one |= {"generator_cpu": 0.99, "server_cpu": 0.7}
    table = "\n".join(report.workloads_table(results))
    assert "100,000*" in table
    assert "97,000*" not in table
    assert "generator used its whole core" in table


def test_results_put_into_a_page_twice_change_nothing_the_second_time() -> None:
    page = "before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n"
    blocks = {"figures": figures.headlines}
    once = figures.rewritten(page, blocks, document())
    assert "| 97,000 |" in once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert figures.rewritten(once, blocks, document()) == once
    with pytest.raises(ValueError, match="0 blocks targets"):
        figures.rewritten(page, {"targets": figures.headlines}, document())


def test_the_pages_say_what_the_committed_results_say() -> None:
    if not figures.COMMITTED.exists():
        pytest.skip("no results are committed")
    for path, text in figures.pages().items():
        assert path.read_text() == text, f"{path.name}: run benchmarks/figures.py"


def test_committed_results_name_no_host_and_no_path() -> None:
    if not figures.COMMITTED.exists():
        pytest.skip("no results are committed")
    text = figures.COMMITTED.read_text()
    assert socket.gethostname() not in text
    assert "/tmp" not in text
    assert "/home" not in text
    assert set(json.loads(text)) >= {"machine", "versions", "results", "probes"}
