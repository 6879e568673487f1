"""The order in which packages can be indexed: each after everything it depends on.

Packages that depend on each other, directly or in a round, have no such order. They form a group
(a strongly connected component of the graph), and the groups do have one: `groups` yields them,
dependencies first, nearly all of them of a single package.

The algorithm is Tarjan's (Depth-first search and linear graph algorithms, SIAM J. Comput. 1, 1972)
in Nuutila's form (On finding the strongly connected components in a directed graph, Inf. Process.
Lett. 49, 1994), where a package is stacked when its search ends, and only if it is not the first of
its group. So most packages are never stacked, and a group comes out in the order in which its
searches ended: a member mostly follows those that it needs. It is iterative, for a chain of
dependencies may be as long as the input.

The names of a million packages are far more than a processor's caches hold, so that finding one
costs more than all else, and in a dict twice as much as in a set. Hence one set of the names that
are done with, asked about all dependencies of a package in one call; what else is known of a name
is kept only while its search goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Package", "groups"]

Package = tuple[str, Sequence[str]]
"""A name, and the names that it depends on."""


def groups(
    packages: Mapping[str, Sequence[str]], absent: dict[str, None]
) -> Iterator[list[Package]]:
    """Yields every package once, in groups, each after all groups that it depends on.

    `packages` has the dependencies of each name. Names that are depended upon but are no key of it
    are added to `absent`, in the order in which they are met, before the package that needs them is
    yielded. Time grows with the number of packages and dependencies.
    """
    done: set[str] = set()  # names that were yielded, and absent ones
    all_done = done.issuperset
    started: dict[str, int] = {}  # whose search goes on: how many searches began before it
    begun = 0
    ended: list[Package] = []  # whose search ended within a group of which another one's goes on
    for start, needed in packages.items():
        if start in done:
            continue
        if all_done(needed):  # So it is with most of an input that is in order already.
            done.add(start)
            yield [(start, needed)]
            continue
        path: list[Package] = [(start, needed)]
        rests = [iter(needed)]  # for each on the path: dependencies still to be looked at
        earliest = [begun]  # for each on the path: the first start known within its group
        started[start] = begun
        begun += 1
        while path:
            for dependency in rests[-1]:
                if dependency in done:
                    continue
                if dependency in started:
                    earliest[-1] = min(earliest[-1], started[dependency])
                    continue
                below = packages.get(dependency)
                if below is None:
                    absent[dependency] = None
                    done.add(dependency)
                elif all_done(below):  # And so with most others by now: no search of their own.
                    done.add(dependency)
                    yield [(dependency, below)]
                else:
                    path.append((dependency, below))
                    rests.append(iter(below))
                    earliest.append(begun)
                    started[dependency] = begun
                    begun += 1
                    break
            else:
                package = path.pop()
                rests.pop()
                first = earliest.pop()
                if first < started[package[0]]:
                    ended.append(package)
                    earliest[-1] = min(earliest[-1], first)
                    continue
                group = [*_taken_after(first, ended, started), package]
                for member, _ in group:
                    del started[member]
                    done.add(member)
                yield group


def _taken_after(first: int, ended: list[Package], started: Mapping[str, int]) -> list[Package]:
    """Takes from the end of `ended` the packages whose search began after `first`, in order."""
    start = len(ended)
    while start and started[ended[start - 1][0]] > first:
        start -= 1
    group = ended[start:]
    del ended[start:]
    return group
