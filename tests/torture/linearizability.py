"""Is there an order of all calls that explains every answer, and what a crash left?

    for violation in judge(history.calls, before, after):
        print(violation)

The model. An index maps packages to their dependencies. Each call takes effect at one moment between
its sending and its reply; the calls of one connection do so in their order. A call without a reply may
have taken effect at any moment after its sending, or never. The index was `before` at first, and, if
`after` is given, that was found when all was over: so after a crash `after` must hold every acknowledged
change and may hold any of the unanswered ones (durability), and what a QUERY has revealed is among the
answers to be explained (never revealed, then lost). This is durable linearizability: J. Izraelevitz,
H. Mendes, M. Scott, "Linearizability of Persistent Memory Objects Under a Full-System-Crash Failure
Model", DISC 2016, with the server's life as the era that a crash ends.

The search is that of J. Wing and C. Gong, "Testing and Verifying Concurrent Objects", J. Parallel and
Distributed Computing 17 (1993): take as the next in the order any call that no other, not yet taken,
precedes in time; go back where an answer does not fit. With G. Lowe's memoisation, "Testing for
linearizability", Concurrency and Computation 29 (2017): of two orders of the same calls that lead to the
same state one is enough. Beside these two:

- Locality. An INDEX reads its dependencies and a REMOVE its dependents, so packages are not objects of
  their own; sets of packages that no call and no edge connects are (M. Herlihy, J. Wing, 1990), and are
  judged one by one. A package that no call changes is a constant and connects nothing.
- A QUERY, and a change that was refused, leaves every state as it was. So one that fits now may be taken
  now: any order that takes it later stays an order if it is moved here. Only changes branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.reference import MESSAGE
from tests.torture.history import NEVER, Call

__all__ = ["Index", "Violation", "connected", "judge"]

Index = Mapping[str, frozenset[str]]

#: Orders that are looked at before a set of packages is called too hard: some seconds, 300 MB.
BUDGET = 1_000_000

LOST = "an acknowledged change is lost, or a change that never was is there"
REVEALED = "an answer revealed what was lost afterwards"
NO_ORDER = "no order of the calls explains the answers"
TOO_HARD = "too many calls at once: not judged"
NOT_A_REPLY = "not the reply that this message has in every state"


@dataclass(frozen=True)
class Violation:
    """What cannot be explained, and of which packages."""

    what: str  # one of the sentences above
    packages: tuple[str, ...]
    detail: str

    @property
    def is_undecided(self) -> bool:
        """Whether this is no violation, but a set of packages that was too hard to judge."""
        return self.what == TOO_HARD

    def __str__(self) -> str:
        names = ", ".join(self.packages[:8]) + (", …" if len(self.packages) > 8 else "")
        return f"{self.what}: {names}: {self.detail}"


@dataclass(slots=True)
class Parsed:
    """A call as the model sees it."""

    call: Call
    command: str
    package: str
    dependencies: frozenset[str]  # of an INDEX; what other commands list is ignored


def judge(
    calls: Iterable[Call], before: Index, after: Index | None = None, budget: int = BUDGET
) -> list[Violation]:
    """Return what no order explains; an empty list is the proof that one does, for each part."""
    found: list[Violation] = []
    parsed = list(_parse(calls, found))
    changed = {one.package for one in parsed if one.command != "QUERY"}
    found += _constants(parsed, changed, before, after)
    for part in connected(parsed, changed, before, after or {}):
        found += part.judge(before, after, budget)
    return found


def _parse(calls: Iterable[Call], found: list[Violation]) -> Iterable[Parsed]:
    """Give the messages among the calls; judge those that are none, and impossible replies."""
    for call in calls:
        match = MESSAGE.fullmatch(call.line.encode())
        if match is None:
            if call.reply not in (None, "ERROR"):
                found.append(Violation(NOT_A_REPLY, (), str(call)))
            continue
        if call.reply not in (None, "OK", "FAIL"):
            found.append(Violation(NOT_A_REPLY, (match[2].decode(),), str(call)))
            continue
        command, package, listed = (group.decode() for group in match.groups())
        dependencies = (
            frozenset(listed.split(",")) if listed and command == "INDEX" else frozenset()
        )
        if command != "QUERY" or call.reply is not None:
            yield Parsed(call, command, package, dependencies)


def _constants(
    parsed: list[Parsed], changed: set[str], before: Index, after: Index | None
) -> Iterable[Violation]:
    """Judge the packages that no call changes: what they were they are."""
    for one in parsed:
        if one.package not in changed and (one.call.reply == "OK") != (one.package in before):
            yield Violation(NO_ORDER, (one.package,), f"{one.call}, and nobody changed it")
    if after is not None:
        for package in (before.keys() | after.keys()) - changed:
            if before.get(package) != after.get(package):
                was, now = before.get(package), after.get(package)
                yield Violation(LOST, (package,), f"{_shown(was)} became {_shown(now)} by no call")


# --- parts that have nothing to do with each other ---------------------------------------------------


@dataclass
class Part:
    """Packages that calls or edges connect, and the calls about them, in the order of sending."""

    packages: list[str] = field(default_factory=list)
    calls: list[Parsed] = field(default_factory=list)
    held: list[str] = field(default_factory=list)  # on which a package that nobody changes depends

    def judge(self, before: Index, after: Index | None, budget: int) -> Iterable[Violation]:
        """Search for an order; say what kind of violation it is if there is none."""
        search = _Search(self, before, after, budget)
        outcome = search.run()
        if outcome:
            return
        names = tuple(self.packages)
        if outcome is None:
            yield Violation(TOO_HARD, names, f"{len(self.calls)} calls")
            return
        what, detail = NO_ORDER, search.stuck()
        if after is not None and _Search(self, before, None, budget).run():
            changes = [one for one in self.calls if one.command != "QUERY"]
            without = _Search(Part(self.packages, changes, self.held), before, after, budget)
            what = REVEALED if without.run() else LOST
            detail = f"found {{{search.describe(after)}}}; {search.reached()}"
        yield Violation(what, names, detail)


def connected(
    parsed: list[Parsed], changed: set[str], before: Index, after: Index
) -> Iterable[Part]:
    """Split calls by the sets of packages that calls and edges connect, over packages that change."""
    sets = _Sets(changed)
    for one in parsed:
        sets.join(one.package, one.dependencies)
    for index in (before, after):
        for package, dependencies in index.items():
            sets.join(package, dependencies)
    parts: dict[str, Part] = {}
    for package in sorted(changed):
        parts.setdefault(sets.leader(package), Part()).packages.append(package)
    for one in parsed:
        if one.package in changed:
            parts[sets.leader(one.package)].calls.append(one)
    for package, dependencies in before.items():
        if package not in changed:
            for dependency in changed & dependencies:
                parts[sets.leader(dependency)].held.append(dependency)
    return parts.values()


class _Sets:
    """Disjoint sets of packages, each known by one of them (union-find, paths halved)."""

    def __init__(self, packages: Iterable[str]) -> None:
        self._above = {package: package for package in packages}

    def leader(self, package: str) -> str:
        above = self._above
        while above[package] != package:
            above[package] = above[above[package]]
            package = above[package]
        return package

    def join(self, package: str, dependencies: Iterable[str]) -> None:
        """Make one set of those of a package and of its dependencies; others than ours join nothing."""
        if package in self._above:
            for dependency in dependencies:
                if dependency in self._above:
                    self._above[self.leader(dependency)] = self.leader(package)


# --- the search --------------------------------------------------------------------------------------

INDEX, REMOVE, QUERY = range(3)
COMMANDS = {"INDEX": INDEX, "REMOVE": REMOVE, "QUERY": QUERY}

#: The dependencies of each package as a bit set, 0 for one that is not indexed, and behind them the set
#: of those that are indexed.
State = tuple[int, ...]


@dataclass(slots=True)
class _Step:
    """A call in the terms of the search."""

    command: int
    package: int
    needs: int
    reply: bool | None
    sent: int
    replied: int
    follows: int  # the step of the same connection before it; -1: none
    fixed: bool  # whatever the state, it leaves it as it is


class _Search:
    """For an order of one part's calls."""

    def __init__(self, part: Part, before: Index, after: Index | None, budget: int) -> None:
        self.part = part
        self.budget = budget
        self.count = len(part.packages)
        self.numbers: dict[str, int] = {name: n for n, name in enumerate(part.packages)}
        self.names = list(part.packages)
        calls = sorted(
            part.calls, key=lambda one: one.call.sent
        )  # stable: pipelines keep their order
        for one in calls:
            for name in one.dependencies:
                self._number(name)
        for index in (before, after or {}):
            for package in part.packages:
                for name in index.get(package, ()):
                    self._number(name)
        last: dict[int, int] = {}
        self.steps: list[_Step] = []
        for one in calls:
            call, command = one.call, COMMANDS[one.command]
            self.steps.append(
                _Step(
                    command,
                    self.numbers[one.package],
                    self._bits(one.dependencies),
                    None if call.reply is None else call.reply == "OK",
                    call.sent,
                    call.replied,
                    last.get(call.client, -1),
                    command == QUERY or call.reply == "FAIL",
                )
            )
            last[call.client] = len(self.steps) - 1
        self.lines = [str(one.call) for one in calls]
        # Constants: packages that nobody changes.
        self.constant = self._bits(n for n in self.names[self.count :] if n in before)
        self.held = self._bits(set(part.held))
        self.first = self._state(before)
        self.goal = None if after is None else self._state(after)
        self.best = -1
        self.best_key: tuple[int, int, State] = (0, 0, self.first)

    def _number(self, name: str) -> None:
        if name not in self.numbers:
            self.numbers[name] = len(self.names)
            self.names.append(name)

    def _bits(self, names: Iterable[str]) -> int:
        return sum(1 << self.numbers[name] for name in names)

    def _state(self, index: Index) -> State:
        packages = self.names[: self.count]
        present = self._bits(name for name in packages if name in index) | self.constant
        return (*(self._bits(index.get(name, ())) for name in packages), present)

    def run(self) -> bool | None:
        """Return whether there is an order; None if the budget was spent before that was known."""
        answered = sum(step.reply is not None for step in self.steps)
        # What is taken: all steps before `low`, and bit n of `window` for step low + n.
        stack: list[tuple[int, int, State, int]] = [(0, 0, self.first, answered)]
        seen: set[tuple[int, int, State]] = set()
        while stack:
            low, window, state, left = stack.pop()
            low, window, left, changes = self._take_fixed(low, window, state, left)
            key = (low, window, state)
            if key in seen:
                continue
            seen.add(key)
            if not left and (self.goal is None or state == self.goal):
                return True
            if answered - left > self.best:
                self.best, self.best_key = answered - left, key
            if len(seen) > self.budget:
                return None
            # The earliest reply is tried first: a server mostly answers in the order of its changes.
            changes.sort(key=lambda number: -self.steps[number].replied)
            for number in changes:
                step = self.steps[number]
                done, following = self._apply(step, state)
                if step.reply is None or step.reply == done:
                    moved, grown = _taken(low, window, number)
                    stack.append((moved, grown, following, left - (step.reply is not None)))
        return False

    def _take_fixed(
        self, low: int, window: int, state: State, left: int
    ) -> tuple[int, int, int, list[int]]:
        """Take every call that fits and leaves the state alone; give the changes that may come next."""
        while True:
            changes = []
            again = False
            for number in self._next(low, window):
                step = self.steps[number]
                if not step.fixed:
                    changes.append(number)
                elif self._apply(step, state)[0] == step.reply:
                    low, window = _taken(low, window, number)
                    left -= 1
                    again = True  # it may have been what others had to wait for
            if not again:
                return low, window, left, changes

    def _next(self, low: int, window: int) -> list[int]:
        """Return the steps that nothing which is not taken precedes."""
        found = []
        earliest = NEVER
        steps = self.steps
        for number in range(low, len(steps)):
            step = steps[number]
            if step.sent > earliest:
                break
            if window >> (number - low) & 1:
                continue
            if step.replied < earliest:
                earliest = step.replied
            follows = step.follows
            if follows < low or window >> (follows - low) & 1:
                found.append(number)
        return found

    def _apply(self, step: _Step, state: State) -> tuple[bool, State]:
        """Carry out a call: whether it answers OK, and the state after it."""
        package, present = step.package, state[-1]
        bit = 1 << package
        if step.command == QUERY:
            return bool(present & bit), state
        if step.command == INDEX:
            if step.needs & ~present:
                return False, state
            needs, present = step.needs, present | bit
        else:
            if self.held & bit or any(
                needs & bit for n, needs in enumerate(state[:-1]) if n != package
            ):
                return False, state
            needs, present = 0, present & ~bit
        return True, (*state[:package], needs, *state[package + 1 : -1], present)

    # --- for people ------------------------------------------------------------------------------

    def describe(self, state: State | Index) -> str:
        """A state in words."""
        if not isinstance(state, tuple):
            state = self._state(state)
        shown = []
        for number in range(self.count):
            if state[-1] >> number & 1:
                needs = (self.names[n] for n in range(len(self.names)) if state[number] >> n & 1)
                shown.append(f"{self.names[number]}: {' '.join(needs) or '-'}")
        return "; ".join(shown) or "nothing"

    def reached(self) -> str:
        """Where the order that explains most answers has led."""
        return f"the answers lead to {{{self.describe(self.best_key[2])}}}"

    def stuck(self) -> str:
        """The calls that cannot come next where most answers are explained."""
        low, window, state = self.best_key
        waiting = [self.lines[number] for number in self._next(low, window)]
        return f"after {self.best} answers, at {{{self.describe(state)}}}, none of: " + "; ".join(
            waiting[:6]
        )


def _taken(low: int, window: int, number: int) -> tuple[int, int]:
    """Take one step more; `low` moves on over all that are taken."""
    window |= 1 << (number - low)
    if window & 1:
        ones = (~window & (window + 1)).bit_length() - 1
        return low + ones, window >> ones
    return low, window


def _shown(dependencies: frozenset[str] | None) -> str:
    if dependencies is None:
        return "absent"
    return f"indexed with {','.join(sorted(dependencies)) or 'no dependencies'}"
