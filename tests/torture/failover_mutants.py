"""Servers of a cluster that are wrong on purpose: each breaks one of the rules F1 to F5.

    python -m tests.torture.failover_mutants runs-again serve --store … --cluster …

is `pkgindex serve …` with that mistake, for the campaigns of failover.py, which must see it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.servers import Server
from tests.torture.mutants import part

__all__ = ["MUTANTS", "Member"]


class Member(Server):
    """A server with a mistake, by name; the empty name is the product as it is."""

    def __init__(
        self,
        mutant: str,
        store: str,
        *options: str,
        listen: str = "127.0.0.1:0",
        inside: Sequence[str] = (),
    ) -> None:
        super().__init__(store, *options, listen=listen, inside=inside)
        if mutant:
            at = self._command.index("pkgindex")
            self._command[at : at + 1] = ["tests.torture.failover_mutants", mutant]


def keeps_what_was_deposed() -> None:
    """F1: a deposed writer goes on from its own graph, with what may never have become durable."""
    node = part("cluster.node:Node")
    step_down = node._step_down
    part("cluster.takeover:Takeover")._deposed_writer_drops = lambda self: None

    def keep(self: Any, action: Any) -> None:
        graph = self._writer.graph if self._writer else None
        step_down(self, action)
        self._graph = graph

    node._step_down = keep
    part("cluster.node")._DO[part("cluster.actions:StepDown")] = keep


def shows_a_snapshot_at_once() -> None:
    """F1: a snapshot is shown before its end. (It comes as over a slow network.)"""
    frames, feeds = part("cluster.frames"), part("cluster.feed")
    follower, slices = part("cluster.follower:Follower"), feeds.Feed._slices
    take = follower._take
    feeds.SLICE_PACKAGES = 1

    def slow(self: Any, following: Any) -> None:
        self._loop.call_later(0.002, slices, self, following)

    def early(self: Any, message: Any) -> None:
        take(self, message)
        if isinstance(message, frames.Snapshot) and not self.is_good:
            self._ears.snapshot_ended(self, 0)
            self._good()

    feeds.Feed._slices, follower._take = slow, early


def runs_again() -> None:
    """F2: a new writer knows no marks, and has everything that is unanswered run once more."""
    origins = part("store.origins")
    resume = origins.Origins.resume

    def forgetful(self: Any, origin: str, confirmed: int, change: int) -> Any:
        self._recorded.pop(origin, None)
        return resume(self, origin, confirmed, change)

    origins.Origins.resume = forgetful


def notes_nothing() -> None:
    """F2: a batch does not say whose messages it holds the changes of. (Its network is slow.)"""
    feed = part("cluster.feed:Feed")
    durable = feed.durable
    feed.durable = lambda self, commit: self._loop.call_later(0.01, durable, self, commit)
    part("store.origins:Origins").beyond = lambda self, other: []


def answers_before_the_batch() -> None:
    """F3: an answer overtakes the batch that it rests on."""
    frames, streams = part("cluster.frames"), part("cluster.stream")
    send = streams.Stream.send

    def overtaken(self: Any, *messages: Any) -> None:
        if not messages or not isinstance(messages[0], frames.Batch):
            send(self, *messages)
            return
        send(self, *messages[1:])
        streams.asyncio.get_running_loop().call_later(0.01, send, self, messages[0])

    streams.Stream.send = overtaken


def checks_without_a_proof() -> None:
    """F4: strong reads are allowed without a proof that this is still the writer."""
    frames, feed = part("cluster.frames"), part("cluster.feed:Feed")
    heard = feed._heard

    def quick(self: Any, following: Any, message: Any) -> None:
        if isinstance(message, frames.Check):
            following.stream.send(frames.Checked(message.number))
        else:
            heard(self, following, message)

    feed._heard = quick


def beats_by_a_plain_write() -> None:
    """F5: the heartbeat of a writer proves nothing, so one that was deposed goes on."""
    members = part("cluster.members:Members")
    publish = members.publish
    members.publish = lambda self, member, staging=None: publish(self, member, None)


def reaches_nobody_else() -> None:
    """F5: members that cannot reach the writer do not find out whether they reach each other."""
    part("cluster.node:Node")._try_others = lambda self: None


MUTANTS: dict[str, Callable[[], None]] = {
    "keeps-what-was-deposed": keeps_what_was_deposed,
    "shows-a-snapshot-at-once": shows_a_snapshot_at_once,
    "runs-again": runs_again,
    "notes-nothing": notes_nothing,
    "answers-before-the-batch": answers_before_the_batch,
    "checks-without-a-proof": checks_without_a_proof,
    "beats-by-a-plain-write": beats_by_a_plain_write,
    "reaches-nobody-else": reaches_nobody_else,
}

if __name__ == "__main__":
    from pkgindex.cli import main

    MUTANTS[sys.argv[1]]()
    main(sys.argv[2:], prog_name="pkgindex")
