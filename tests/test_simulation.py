"""The takeover protocol holds its invariants in random schedules of faults, and each rule is needed.

`python -m tests.simulation` runs 100,000 of them, or as many as one likes.
"""

from __future__ import annotations

import pytest

from tests.simulation.__main__ import broken
from tests.simulation.mutants import MUTANTS

SCHEDULES = 1500
MUTANT_SCHEDULES = 2000  # the rarest mistake shows once in some hundred


@pytest.mark.parametrize("first", range(0, SCHEDULES, 500))
def test_every_invariant_holds_in_random_schedules(first):
    found = [(seed, what) for seed in range(first, first + 500) if (what := broken(seed))]
    assert not found, "python -m tests.simulation --trace --seed N shows it step by step"


def test_a_seed_gives_the_same_schedule_again():
    one: list[str] = []
    other: list[str] = []
    broken(7, trace=one.append)
    broken(7, trace=other.append)
    assert one == other
    assert len(one) > 50


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_simulation_catches_a_protocol_without(mutant):
    assert any(broken(seed, mutant) for seed in range(MUTANT_SCHEDULES))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_protocol_holds_in_the_schedules_that_catch(mutant):
    assert not any(broken(seed, mutant, is_whole=True) for seed in range(50))
