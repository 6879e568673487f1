"""Could these replies have been given in *some* order of two clients' messages?

Two clients that contradict one another at the same time may each come first: many outcomes are
legal. One is, if the two sequences of messages can be shuffled into one, each kept in its own
order, that the model answers with just these replies. All shuffles together are a grid: so many
messages of the one taken, so many of the other. Every cell holds the indexes that can be reached
there, few for a few packages.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference import Model

Exchange = tuple[bytes, bytes]  # a message without its line feed, and the reply it got
State = frozenset[tuple[bytes, frozenset[bytes]]]


def legal_end_states(
    first: Sequence[Exchange], second: Sequence[Exchange], start: State = frozenset()
) -> set[State]:
    """Return the indexes that the two sequences may have led to; none if no order explains them."""
    reached: dict[tuple[int, int], set[State]] = {(0, 0): {start}}
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            states = reached.setdefault((i, j), set())
            if i:
                states |= _after(reached[i - 1, j], first[i - 1])
            if j:
                states |= _after(reached[i, j - 1], second[j - 1])
    return reached[len(first), len(second)]


def _after(states: set[State], exchange: Exchange) -> set[State]:
    """Return where a message leads from each state in which it gets the reply that it got."""
    line, reply = exchange
    after = set()
    for state in states:
        model = Model()
        model.packages = dict(state)
        if model.apply(line) == reply:
            after.add(frozenset(model.packages.items()))
    return after
