"""Verify a stopped store: every file, its checksum, forward against reverse, the journal.

What can be derived is told from what cannot. A reverse file that is missing, damaged or wrong follows
from the forward files and is mended by repair(): it is rewritten by a claimed epoch, as any writer
would. So is a forward file that is missing or damaged, while the snapshot is whole; and a snapshot, while
the forward files are. What neither has, and a damaged journal, is named and left as it is: it is only in
a backup. So is a whole forward file that says otherwise than the snapshot: somebody has changed it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pkgindex._core import Graph
from pkgindex.errors import StoreOwned
from pkgindex.store import format as store_format
from pkgindex.store._disk import file_name, shard
from pkgindex.store.claim import Withdrawn, claim
from pkgindex.store.journal import Journal
from pkgindex.store.lease import Lease
from pkgindex.store.offline import READERS, Offline
from pkgindex.store.packages import write_all_files
from pkgindex.store.recovery import Gap, Problem, Progress, read_shards, recover, shard_folders

__all__ = ["Report", "check", "repair"]

PATIENCE_SECONDS = 60.0  # for the journal's thread to end

REBUILD = "'pkgindex serve --rebuild' believes the file"


@dataclass
class Report:
    """What check() found."""

    packages: int
    files: int
    problems: list[Problem] = field(default_factory=list)  # that only a backup can mend
    derived: list[Problem] = field(default_factory=list)  # that can be written anew
    reverse: list[str] = field(
        default_factory=list
    )  # the packages of the reverse files among these
    forward: list[str] = field(default_factory=list)  # and of the forward files
    rebuild: bool = False  # whether the snapshot is of no use

    @property
    def is_sound(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.problems and not self.derived


def check(store: Offline, progress: Progress | None = None) -> Report:
    """Verify everything; `progress` is told (folders read, of all). Raises OSError."""
    contents = store.read(progress)
    report = Report(0, len(contents.graph), contents.problems)
    graph = _with_snapshot(store, contents.graph, report)
    report.packages = len(graph)
    named = {problem.path for problem in report.problems}
    lost = set()

    def missing(package: str, why: str) -> None:
        lost.add(package)
        path = _path(store, "forward", package)
        if path not in named:  # one that is there, but damaged, has been named already
            named.add(path)
            report.problems.append(Problem(path, f"missing, though {why}"))

    for package, dependency in graph.dangling(1_000_000):
        missing(dependency, f"{package} depends on it")
    owed = set(graph.dirty_reverses())
    dependents, damaged = _reverse_files(store, graph, report, progress)
    for package in graph:
        expected = graph.dependents(package)
        found = dependents.dependencies(package)
        if found == expected or package in owed:
            continue
        path = _path(store, "reverse", package)
        ghosts = [name for name in found if name not in graph]
        for ghost in ghosts:
            missing(ghost, f"{path} lists it")
        if not ghosts and path not in damaged:
            what = f"lists {len(found)} packages, not the {len(expected)} that depend on it"
            _derived(report, Problem(path, what if found else "missing"), package)
    for package in dependents:
        if package not in graph and package not in owed and package not in lost:
            path = _path(store, "reverse", package)
            _derived(report, Problem(path, "belongs to no indexed package"), package)
    return report


def _with_snapshot(store: Offline, graph: Graph, report: Report) -> Graph:
    """The index as a start reads it, from the snapshot if there is one; `graph` is that of the files.

    Files that are missing or damaged beside it can be written anew; one that was changed is a problem."""
    try:
        known, wrong = store.read_snapshot()
    except Gap:
        return graph  # it is among the problems already
    if wrong is not None:
        report.derived.append(wrong)
    if known is None:
        report.rebuild = True
        return graph
    damaged = {problem.path: problem for problem in report.problems}
    for package in known:
        path = _path(store, "forward", package)
        if package not in graph:
            report.derived.append(damaged.pop(path, Problem(path, "missing")))
            report.forward.append(package)
        elif graph.dependencies(package) != known.dependencies(package):
            damaged[path] = Problem(path, f"the snapshot has it otherwise; {REBUILD}")
    for package in graph:
        if package not in known:
            path = _path(store, "forward", package)
            damaged[path] = Problem(path, f"the snapshot does not have it; {REBUILD}")
    report.problems[:] = damaged.values()
    return known


def _reverse_files(
    store: Offline, graph: Graph, report: Report, progress: Progress | None
) -> tuple[Graph, set[str]]:
    """All reverse files as a graph whose "dependencies" are the dependents; the paths of damaged ones."""
    dependents = Graph()
    folders, strangers = shard_folders(store.mount, "reverse", store.format.shards)
    report.problems += strangers
    wrong: list[Problem] = []
    for done, (lines, found) in enumerate(
        read_shards(store.mount, "reverse", folders, store.format.shards, READERS)
    ):
        report.files += dependents.replay(lines, track=False)
        wrong += found
        if progress:
            progress(done + 1, len(folders))
    owed = (
        {_path(store, "reverse", package) for package in graph.dirty_reverses()} if wrong else set()
    )
    wrong = [problem for problem in wrong if problem.path not in owed]
    known = {_path(store, "reverse", package): package for package in graph} if wrong else {}
    for problem in wrong:
        package = known.get(problem.path) or _decoded(problem.path.rpartition("/")[2])
        if package is None or _path(store, "reverse", package) != problem.path:
            report.problems.append(problem)
        else:
            _derived(report, problem, package)
    return dependents, {problem.path for problem in wrong}


def _derived(report: Report, problem: Problem, package: str) -> None:
    report.derived.append(problem)
    report.reverse.append(package)


def _path(store: Offline, kind: str, package: str) -> str:
    name = file_name(package)
    return f"{kind}/{shard(name, store.format.shards)}/{name}"


def _decoded(name: str) -> str | None:
    """The package whose file has this name; None for the name of no package, or one shortened."""
    if "~" in name:
        return None
    package = re.sub("%([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), name)
    try:
        return (
            package
            if file_name(package) == name and not re.search(r"[^!-{}~]|,", package)
            else None
        )
    except ValueError:
        return None


def repair(store: Offline, report: Report) -> None:
    """Write anew what `report` calls derived. Closes `store`.

    Claims an epoch as any writer does. Raises PkgindexError, OSError."""
    mount, fmt = store.mount, store.format
    store.close()
    store_format.complete(mount)
    with Lease(mount) as lease:
        try:
            mine = claim(mount, lease)
            recovered = recover(mount, fmt, mine, rebuild=report.rebuild)
        except Withdrawn as reason:
            raise StoreOwned(f"{mount.root}: a server has claimed it meanwhile: {reason}") from None
        graph = recovered.graph
        graph.replay("".join(_owed_lines(report, graph)).encode())
        journal = Journal(mount, mine, graph.owed_lines)
        recovered.open(journal)
        try:
            write_all_files(mount, mine.staging, fmt.shards, graph, journal)
        finally:
            journal.stop(PATIENCE_SECONDS)
            mine.staging.close()


def _owed_lines(report: Report, graph: Graph) -> Iterator[str]:
    for package in report.forward:
        yield f"+{package}|{','.join(graph.dependencies(package))}|\n"
    for package in report.reverse:
        yield f"*{package}\n"
