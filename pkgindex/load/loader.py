"""Brings packages into a server, each after everything it depends on, over one connection.

The server answers a connection's messages in their order, so it is enough to send them in the order
of dependencies, without waiting. The load has two stages:

1. *Straight.* Packages whose dependencies are all in the input, and are no part of a cycle, are
   indexed while the order is still being worked out.
2. *Deferred.* The others need to know what the server has. It is asked for every one of them and
   for every name that the input lacks; then they are sent too.

The rules of the second stage:

- A name that the input lacks but the server has is an ordinary dependency. One that neither has is
  missing: with `add_missing` it is indexed without dependencies, and listed; otherwise all that
  depend on it fail.
- A package fails if a dependency is missing, has a name that the protocol cannot carry, or failed
  itself while the server has no earlier version of it. It is not sent.
- In a cycle the members that another one needs first are indexed twice: once with those of their
  dependencies that are there already, then with all. A member that the server has needs no such
  start, and its list is never replaced by a shorter one: whoever loads the same again, or loses
  the connection half way, leaves no package with less than it had.

Loading is repeatable: indexing a package again with the same list changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain, compress

from pkgindex.client import Answer, Client, is_name
from pkgindex.load.order import Package, groups

__all__ = ["Report", "load"]


@dataclass
class Report:
    """What became of the packages."""

    packages: int
    indexed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Why each package that is not indexed as the input says failed."""
    added: list[str] = field(default_factory=list)
    """Missing names that were indexed without dependencies."""
    cycles: list[list[str]] = field(default_factory=list)
    """Packages that depend on each other, for each such group."""


def load(
    packages: Mapping[str, Sequence[str]],
    client: Client,
    *,
    add_missing: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Indexes `packages`, the dependencies of each name, through a connected client.

    `progress` is called with the number of packages that are dealt with so far. Raises
    ConnectionLost if the connection does not last to the end.
    """
    return _Load(packages, client, add_missing, progress).run()


class _Role(Enum):
    """What a message of the second stage is for."""

    MISSING = auto()  # indexes a name that the input lacks
    START = auto()  # indexes a member of a cycle with what is there already
    PACKAGE = auto()  # indexes a package as the input says


_Step = tuple[_Role, Package]


class _Load:
    """One load; its methods are the steps of `run`, in their order."""

    def __init__(
        self,
        packages: Mapping[str, Sequence[str]],
        client: Client,
        add_missing: bool,
        progress: Callable[[int], object],
    ) -> None:
        self._packages = packages
        self._client = client
        self._add_missing = add_missing
        self._progress = progress
        self._report = Report(len(packages))
        self._absent: dict[str, None] = {}  # depended upon, and not in the input
        self._deferred: list[list[Package]] = []
        self._present: set[str] = set()  # what the server has of all names that were asked for
        # Why each name that nothing can depend on is lacking: how it reads after "needs NAME, ",
        # and the name that is at the root of it.
        self._lacking: dict[str, tuple[str, str]] = {}

    def run(self) -> Report:
        self._send_straight()
        self._ask()
        self._send_deferred()
        return self._report

    def _send_straight(self) -> None:
        sent: list[Package] = []

        def messages() -> Iterator[str]:
            for package in self._straight():
                sent.append(package)
                yield _message(*package)

        answers = self._client.batch(messages(), self._progress)
        self._report.indexed = answers.count(Answer.OK)
        if self._report.indexed < len(answers):
            for package, answer in zip(sent, answers, strict=True):
                if answer is not Answer.OK:
                    self._refused(package, answer)

    def _straight(self) -> Iterator[Package]:
        """The packages of the first stage; notes the others as deferred."""
        absent = self._absent
        deferred: set[str] = set()
        for group in groups(self._packages, absent):
            package = name, dependencies = group[0]
            if (
                len(group) == 1
                and name not in dependencies
                and deferred.isdisjoint(dependencies)
                and (not absent or absent.keys().isdisjoint(dependencies))
                and is_name(name)
            ):
                yield package
            else:
                deferred.update(member for member, _ in group)
                self._deferred.append(group)

    def _ask(self) -> None:
        """Learns which of the names that matter now the server has."""
        deferred = (name for group in self._deferred for name, _ in group)
        refused = self._report.failed
        names = [name for name in chain(self._absent, deferred, refused) if is_name(name)]
        answers = self._client.batch(f"QUERY|{name}|" for name in names)
        self._present.update(compress(names, (answer is Answer.OK for answer in answers)))
        for name in refused:
            if name not in self._present:
                self._lacking[name] = "which the server refused", name

    def _send_deferred(self) -> None:
        steps = list(self._steps())
        dealt_with = self._report.indexed + len(self._report.failed)

        def progress(answered: int) -> None:
            # A cycle takes more messages than it has packages.
            share = answered / len(steps)
            self._progress(dealt_with + int(share * (self._report.packages - dealt_with)))

        answers = self._client.batch((_message(*package) for _, package in steps), progress)
        started: set[str] = set()
        for (role, package), answer in zip(steps, answers, strict=True):
            name = package[0]
            if answer is not Answer.OK:
                self._refused(package, answer)
                if role is _Role.PACKAGE and name in started:
                    self._report.failed[name] += "; it is indexed without its cycle's dependencies"
            elif role is _Role.PACKAGE:
                self._report.indexed += 1
                self._report.failed.pop(name, None)  # Its start may have been refused.
            elif role is _Role.START:
                started.add(name)
            else:
                self._report.added.append(name)

    def _steps(self) -> Iterator[_Step]:
        """What the second stage sends, in order; notes what fails before it is sent."""
        for name in self._absent:
            if not is_name(name):
                self._lacking[name] = "a name that the protocol cannot carry", name
            elif name not in self._present:
                if self._add_missing:
                    yield _Role.MISSING, (name, ())
                else:
                    self._lacking[name] = "which neither the input nor the server has", name
        for group in self._deferred:
            if len(group) > 1:
                self._report.cycles.append([name for name, _ in group])
            yield from _untangled(self._possible(group), self._present)

    def _possible(self, group: list[Package]) -> list[Package]:
        """The members of a group that can be indexed; the others fail."""
        while True:
            possible = [package for package in group if not self._fails(*package)]
            if len(possible) == len(group):
                return possible
            group = possible  # Again, for one may need another that failed after it.

    def _fails(self, name: str, dependencies: Sequence[str]) -> bool:
        """Whether a package cannot be indexed; notes why."""
        lacking = self._lacking
        if not is_name(name):
            reason, root = "the protocol cannot carry its name", name
        else:
            culprit = next((needed for needed in dependencies if needed in lacking), None)
            if culprit is None:
                return False
            why, root = lacking[culprit]
            reason = f"needs {culprit}, {why}"
        self._report.failed[name] = reason
        if name not in self._present:
            lacking[name] = f"which fails for want of {root}", root
        return True

    def _refused(self, package: Package, answer: Answer) -> None:
        """Notes the failure of a package that the server did not index."""
        name, dependencies = package
        culprit = next((needed for needed in dependencies if needed in self._report.failed), None)
        if answer is Answer.ERROR:
            reason = "the server answered ERROR: it cannot take such a message, or so long a one"
        elif culprit is not None:
            reason = f"needs {culprit}, which failed"
        else:
            reason = "the server answered FAIL: another client removed a dependency meanwhile"
        self._report.failed[name] = reason


def _message(name: str, dependencies: Iterable[str]) -> str:
    # Not client.index_message, which checks every name again: all of these are known to be good.
    return f"INDEX|{name}|{','.join(dependencies)}"


def _untangled(members: list[Package], present: set[str]) -> Iterator[_Step]:
    """The steps that index the members of a cycle, each of them after what it needs."""
    dependencies_of = dict(members)
    to_come = dependencies_of.keys() - present
    for package in members:
        for needed in package[1]:
            if needed in to_come:
                there = [name for name in dependencies_of[needed] if name not in to_come]
                yield _Role.START, (needed, there)
                to_come.remove(needed)
        yield _Role.PACKAGE, package
        to_come.discard(package[0])
