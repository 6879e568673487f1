"""The machine of takeover.py in small stories; random schedules of faults are in tests/simulation."""

from __future__ import annotations

from typing import Any

from pkgindex.cluster.actions import (
    Action,
    Beat,
    Claim,
    CloseClients,
    End,
    Look,
    Offer,
    OpenClients,
    Position,
    Resume,
)
from pkgindex.cluster.takeover import LOOK_SECONDS, Role, Sight, Takeover

AFTER = 5.0


class Story:
    """A member and its clock: what happens to it, and what it asks for."""

    def __init__(self) -> None:
        self.machine = Takeover("me", AFTER, lambda: 0.0)
        self.now = 100.0

    def happens(self, event: str, *args: Any, **more: Any) -> list[Action]:
        """Something happens; what it asks for."""
        asked: list[Action] = getattr(self.machine, event)(self.now, *args, **more)
        return asked

    def passes(self, seconds: float) -> list[Action]:
        """Time passes, in steps as its driver makes them, while each beat succeeds."""
        asked = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + LOOK_SECONDS / 2)
            asked += self.happens("tick")
            if self.machine.epoch:
                asked += self.happens("proven", self.machine.epoch)
        return asked


def writer(*followers: str) -> Story:
    """A writer of epoch 1 at change 7, with these followers, all current."""
    story = Story()
    story.happens("tick")
    for _ in range(3):
        story.happens("looked", {}, [])
        story.passes(LOOK_SECONDS)
    assert story.machine.role is Role.CLAIMING
    story.happens("claimed", 1, 0)
    story.happens("recovered", 1, 7)
    assert story.machine.role is Role.WRITER
    for follower in followers:
        story.happens("follower", follower, current=True)
    return story


def test_a_leaving_writer_offers_its_place_to_the_next_when_the_first_is_gone():
    story = writer("a", "b")
    assert Offer("a") in story.happens("stop")
    story.happens("follower", "a", current=False)
    assert Offer("b") in story.passes(1.2)


def test_a_leaving_writer_ends_soon_when_all_to_whom_it_offered_its_place_are_gone():
    story = writer("a")
    assert Offer("a") in story.happens("stop")
    story.happens("follower", "a", current=False)
    assert End() in story.passes(1.2)


def test_a_leaving_writer_gives_each_time_to_take_its_place_and_asks_nobody_twice():
    story = writer("a", "b")
    assert Offer("a") in story.happens("stop")
    assert all(isinstance(each, Beat) for each in story.passes(AFTER - 0.1))  # it waits
    assert Offer("b") in story.passes(0.2)
    asked = story.passes(2 * AFTER)
    assert Offer("a") not in asked
    assert asked[-1] == End()


def test_a_writer_that_stays_writes_on_when_the_one_to_whom_it_offered_its_place_is_gone():
    story = writer("a", "b")
    assert Offer("b") in story.happens("handover", "b")
    story.happens("follower", "b", current=False)
    asked = story.passes(1.2)
    assert Resume() in asked
    assert not any(isinstance(each, Offer) for each in asked)
    assert Offer("a") in story.happens("handover")


def test_a_follower_that_lacks_nothing_takes_the_place_of_a_writer_that_has_written_nothing():
    story = Story()
    story.happens("tick")
    story.happens("looked", {1: True}, [Sight("first", 1, True, 1, frozenset())])
    story.happens("welcomed", "first", 1, 7, fresh=True)
    story.happens("snapshot_ended", "first", 1, 7)
    assert story.machine.position == Position(1, 7)
    story.happens("lost", "first")
    story.happens("looked", {2: True}, [Sight("second", 2, True, 1, frozenset())])
    story.happens("welcomed", "second", 2, 7, fresh=False)
    assert Claim() in story.happens("offered", "second", 2)


def test_a_follower_that_lacks_changes_takes_no_place_before_they_have_come():
    story = Story()
    story.happens("tick")
    story.happens("looked", {1: True}, [Sight("first", 1, True, 1, frozenset())])
    story.happens("welcomed", "first", 1, 7, fresh=True)
    story.happens("snapshot_ended", "first", 1, 7)
    story.happens("lost", "first")
    story.happens("looked", {2: True}, [Sight("second", 2, True, 1, frozenset())])
    story.happens("welcomed", "second", 2, 9, fresh=False)
    assert Claim() not in story.happens("offered", "second", 2)
    story.happens("applied", "second", 2, 9)
    assert Claim() in story.happens("offered", "second", 2)


def claimant() -> Story:
    """A follower that has been offered the place, and whose writer has gone away since."""
    story = Story()
    story.happens("tick")
    story.happens("looked", {1: True}, [Sight("first", 1, True, 1, frozenset())])
    story.happens("welcomed", "first", 1, 7, fresh=True)
    assert OpenClients() in story.happens("snapshot_ended", "first", 1, 7)
    assert Claim() in story.happens("offered", "first", 1)
    story.happens("lost", "first")
    return story


def test_a_claim_that_takes_long_on_a_mount_that_answers_closes_no_client():
    story, asked = claimant(), []
    for beat in range(2, 30):
        asked += story.passes(LOOK_SECONDS * 3)
        # It has not made its directory yet, and the one that leaves is still there for a while.
        asked += story.happens("looked", {1: True}, [Sight("first", 1, True, beat, frozenset())])
    assert CloseClients() not in asked


def test_no_claim_rests_on_a_look_that_a_pause_has_made_old():
    """Before it slept the place was vacant; meanwhile another may have taken it."""
    story = Story()
    story.happens("tick")
    story.now += LOOK_SECONDS / 10
    assert Look() in story.happens("looked", {}, [])
    assert story.machine.role is Role.FOLLOWER
    story.now += 10 * AFTER
    asked = story.happens("looked", {}, [])
    assert Claim() not in asked
    assert Look() in asked
    assert Claim() in story.happens("looked", {}, [])


def test_a_claimant_whose_mount_hangs_closes_its_clients():
    assert CloseClients() in claimant().passes(2 * AFTER)


def test_the_file_of_a_dead_member_never_counts_as_a_newcomers():
    """Whoever it said it reaches: it has no voice in who is to write."""
    story = Story()
    story.happens("tick")
    asked: list[Action] = []
    for beat in range(300):
        dead = Sight("dead", 0, serves=False, beat=1, reaches=frozenset({"me"}))
        writer = Sight("writer", 1, serves=True, beat=beat, reaches=frozenset())
        asked += story.happens("looked", {1: True}, [dead, writer])
        story.happens("lost", "writer")
        if story.now == 100.0:
            story.now += 2 * AFTER  # until it is known for dead
        asked += story.passes(AFTER / 20)
    assert Claim() not in asked
