"""The checker of histories is right, and notices: by hand, beside the model, and on servers that are wrong.

A checker that never failed proves nothing. So servers that are wrong in one way each, with a disk of
their own and a crash that loses what was not synced, stand here beside one that is right, under the
same clients: it must find fault with each of them, and none with the right one.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterable
from typing import ClassVar

import pytest

from tests.reference import FAIL, OK, Conversation, Model, listen
from tests.torture.clients import Crowd, talk_all
from tests.torture.history import NEVER, Call, History
from tests.torture.linearizability import (
    LOST,
    NO_ORDER,
    NOT_A_REPLY,
    REVEALED,
    TOO_HARD,
    Index,
    judge,
)

# --- by hand -----------------------------------------------------------------------------------------


STRANGERS = itertools.count(100)


def call(line: str, reply: str | None, sent: int, replied: int = NEVER, client: int = 0) -> Call:
    """A call of a connection of its own, unless it is said whose."""
    return Call(client or next(STRANGERS), line, sent, reply, replied if reply else NEVER)


def indexed(**packages: str) -> dict[str, frozenset[str]]:
    return {name: frozenset(listed.split()) for name, listed in packages.items()}


def verdicts(calls: list[Call], before: Index, after: Index | None = None) -> list[str]:
    return [violation.what for violation in judge(calls, before, after)]


def test_an_answer_that_comes_after_the_change_must_know_it() -> None:
    change = call("INDEX|a|", "OK", 1, 5)
    assert verdicts([change, call("QUERY|a|", "FAIL", 6, 7)], {}) == [NO_ORDER]
    assert verdicts([change, call("QUERY|a|", "OK", 6, 7)], {}) == []


def test_an_answer_at_the_same_time_may_know_it_or_not() -> None:
    change = call("INDEX|a|", "OK", 1, 5)
    for reply in ("OK", "FAIL"):
        assert verdicts([change, call("QUERY|a|", reply, 2, 3)], {}) == []


def test_an_answer_from_the_future_is_found() -> None:
    assert verdicts([call("QUERY|a|", "OK", 1, 2), call("INDEX|a|", "OK", 3, 4)], {}) == [NO_ORDER]


def test_two_clients_cannot_see_one_change_come_and_go() -> None:
    seen = [call("QUERY|a|", "OK", 2, 3), call("QUERY|a|", "FAIL", 4, 5)]
    assert verdicts([call("INDEX|a|", "OK", 1, 9), *seen], {}) == [NO_ORDER]


def test_a_pipeline_takes_effect_in_its_order() -> None:
    pipeline = [
        call("QUERY|a|", "OK", 1, 9, client=1),
        call("INDEX|a|", "OK", 1, 9, client=1),
    ]
    assert verdicts(pipeline, {}) == [NO_ORDER]
    assert verdicts([pipeline[0], call("INDEX|a|", "OK", 1, 9, client=2)], {}) == []


def test_an_index_reads_its_dependencies() -> None:
    before = indexed(a="")
    upon = call("INDEX|b|a", "OK", 3, 4)
    assert verdicts([call("REMOVE|a|", "OK", 1, 2), upon], before) == [NO_ORDER]
    assert verdicts([call("REMOVE|a|", "OK", 1, 5), upon], before) == [NO_ORDER]
    assert verdicts([call("REMOVE|a|", "FAIL", 1, 5), upon], before) == []


def test_a_remove_reads_its_dependents() -> None:
    before = indexed(a="", b="a")
    assert verdicts([call("REMOVE|a|", "OK", 1, 2)], before) == [NO_ORDER]
    assert verdicts([call("REMOVE|a|", "FAIL", 1, 2)], before) == []
    assert verdicts([call("REMOVE|a|", "OK", 1, 4), call("REMOVE|b|", "OK", 2, 3)], before) == []


def test_a_new_list_takes_the_old_ones_place() -> None:
    before = indexed(a="", b="a")
    calls = [call("INDEX|b|", "OK", 1, 2), call("REMOVE|a|", "FAIL", 3, 4)]
    assert verdicts(calls, before) == [NO_ORDER]


def test_an_acknowledged_change_must_be_found_after_a_crash() -> None:
    assert verdicts([call("INDEX|a|", "OK", 1, 2)], {}, {}) == [LOST]
    assert verdicts([call("REMOVE|a|", "OK", 1, 2)], indexed(a=""), indexed(a="")) == [LOST]


def test_an_unanswered_change_may_be_found_or_not_and_only_whole() -> None:
    before = indexed(a="", b="")
    change = call("INDEX|b|a", None, 1)
    assert verdicts([change], before, before) == []
    assert verdicts([change], before, indexed(a="", b="a")) == []
    assert verdicts([change], before, indexed(a="")) == [LOST]


def test_a_refused_change_is_not_found() -> None:
    calls = [call("INDEX|b|a", "FAIL", 1, 2)]
    assert verdicts(calls, {}, indexed(b="a")) == [LOST]


def test_unanswered_changes_of_one_client_are_found_in_their_order() -> None:
    pipeline = [call(f"INDEX|{name}|", None, 1, client=1) for name in "ab"]
    pipeline.append(call("INDEX|c|a,b", None, 1, client=2))  # it connects the two
    assert verdicts(pipeline, {}, indexed(a="")) == []
    assert verdicts(pipeline, {}, indexed(b="")) == [LOST]


def test_what_an_answer_revealed_must_be_found_after_a_crash() -> None:
    calls = [call("INDEX|a|", None, 1), call("QUERY|a|", "OK", 2, 3)]
    assert verdicts(calls, {}, indexed(a="")) == []
    assert verdicts(calls, {}, {}) == [REVEALED]
    assert verdicts([*calls, call("REMOVE|a|", None, 4)], {}, {}) == []


def test_a_refusal_reveals_as_much_as_an_answer() -> None:
    calls = [call("INDEX|b|a", None, 1), call("REMOVE|a|", "FAIL", 2, 3)]
    assert verdicts(calls, indexed(a=""), indexed(a="", b="a")) == []
    assert verdicts(calls, indexed(a=""), indexed(a="")) == [LOST]


def test_what_nobody_changes_stays_and_connects_nothing() -> None:
    before = indexed(mark="", a="mark", other="a")
    assert verdicts([call("QUERY|mark|", "FAIL", 1, 2)], before) == [NO_ORDER]
    assert verdicts([], before, indexed(mark="", a="")) == [LOST, LOST]
    assert verdicts([call("REMOVE|a|", "OK", 1, 2)], before) == [NO_ORDER]
    assert verdicts([call("REMOVE|a|", "FAIL", 1, 2)], before, before) == []
    assert verdicts([call("INDEX|x|mark,gone", "FAIL", 1, 2)], before, before) == []


def test_a_malformed_message_is_an_error_and_no_other_is() -> None:
    assert verdicts([call("INDEX|a", "OK", 1, 2)], {}) == [NOT_A_REPLY]
    assert verdicts([call("QUERY|a|", "ERROR", 1, 2)], {}) == [NOT_A_REPLY]
    assert verdicts([call("INDEX|a", "ERROR", 1, 2)], {}) == []


def test_what_is_too_hard_is_said_and_not_guessed() -> None:
    calls = [call(f"INDEX|{a}|{b}", "OK", 1, 9) for a, b in itertools.product("abcd", repeat=2)]
    found = judge(calls, indexed(a="", b="", c="", d=""), {}, budget=50)
    assert [violation.what for violation in found] == [TOO_HARD]
    assert found[0].is_undecided


# --- beside the model --------------------------------------------------------------------------------


def test_whatever_the_model_answers_is_explained_and_each_wrong_answer_is_not() -> None:
    """One after another there is one order only, so every answer that is turned around is wrong."""
    chance = random.Random(5)
    crowd = Crowd(chance, clients=1, neighbourhoods=1, owned=3, marks=1)
    for _ in range(60):
        model = Model()
        calls = []
        for time in range(40):
            line = chance.choice(crowd.pipeline(0))
            reply = model.apply(line.encode()).decode().strip()
            calls.append(Call(1, line, 2 * time, reply, 2 * time + 1))
        after = as_index(model.packages)
        assert judge(calls, {}, after) == []
        turned = chance.choice([one for one in calls if one.reply != "ERROR"])
        turned.reply = "FAIL" if turned.reply == "OK" else "OK"
        assert judge(calls, {}, after) != [], turned


def as_index(packages: dict[bytes, frozenset[bytes]]) -> dict[str, frozenset[str]]:
    return {
        name.decode(): frozenset(one.decode() for one in needed)
        for name, needed in packages.items()
    }


# --- servers with a disk -----------------------------------------------------------------------------

SYNC_SECONDS = 0.01


class Disk:
    """What a crash leaves: the packages as they were at the last sync."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.packages: dict[bytes, frozenset[bytes]] = {}
        self.waiting: list[tuple[Durable, bytes]] = []
        self.conversations: list[Durable] = []
        self.timer: asyncio.TimerHandle | None = None

    def sync(self) -> None:
        """Make the changes so far durable, and let their replies go."""
        self.packages = self.written()
        waiting, self.waiting, self.timer = self.waiting, [], None
        for conversation, replies in waiting:
            conversation.transport.write(replies)

    def written(self) -> dict[bytes, frozenset[bytes]]:
        return dict(self.model.packages)

    def crash(self) -> Index:
        """End everything, and return the index that the next server would find."""
        if self.timer:
            self.timer.cancel()
        for conversation in self.conversations:
            conversation.transport.abort()
        return as_index(self.packages)


class Durable(Conversation):
    """The reference server with a disk: every reply waits for the sync of what it rests on."""

    disk: Disk

    def answer_all(self, lines: list[bytes]) -> list[bytes]:
        return [self.answer(line) for line in lines]

    def data_received(self, data: bytes) -> None:
        *lines, self.begun = (self.begun + data).split(b"\n")
        self.reply(self.answer_all(lines))

    def reply(self, replies: list[bytes]) -> None:
        self.disk.waiting.append((self, b"".join(replies)))
        if self.disk.timer is None:
            loop = asyncio.get_running_loop()
            self.disk.timer = loop.call_later(SYNC_SECONDS, self.disk.sync)


class ForgetsAChange(Model):
    """Now and then an INDEX is acknowledged, and not made."""

    indexed = 0

    def apply(self, line: bytes) -> bytes:
        before = dict(self.packages)
        reply = super().apply(line)
        if line.startswith(b"INDEX") and reply == OK:
            self.indexed += 1
            if self.indexed % 50 == 0:
                self.packages = before
        return reply


class DropsAReverseEdge(Model):
    """When a list is replaced, one that stays in it no longer holds its dependency."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: set[tuple[bytes, bytes]] = set()

    def apply(self, line: bytes) -> bytes:
        command, _, rest = line.partition(b"|")
        package = rest.split(b"|")[0]
        old = self.packages.get(package, frozenset())
        if command == b"REMOVE" and package in self.packages:
            holders = {n for n, needed in self.packages.items() if package in needed} - {package}
            if holders and all((name, package) in self.dropped for name in holders):
                del self.packages[package]
                return OK
        reply = super().apply(line)
        if command == b"INDEX" and reply == OK:
            kept = old & self.packages[package]
            self.dropped -= {(package, name) for name in old | self.packages[package]}
            self.dropped |= {(package, name) for name in kept}
        return reply


class ChecksADependencyTooEarly(Model):
    """An INDEX upon a package that is just being removed: it was there a moment ago."""

    removed: ClassVar[bytes] = b""

    def apply(self, line: bytes) -> bytes:
        reply = super().apply(line)
        if line.startswith(b"REMOVE") and reply == OK:
            self.removed = line.split(b"|")[1]
        elif line.startswith(b"INDEX") and reply == FAIL and self.removed in line.split(b"|")[2]:
            self.packages[line.split(b"|")[1]] = frozenset()
            return OK
        return reply


class AcknowledgesBeforeTheSync(Durable):
    def reply(self, replies: list[bytes]) -> None:
        super().reply([])
        self.transport.write(b"".join(replies))


class RevealsBeforeTheSync(Durable):
    """A QUERY is answered at once: its answer may rest on what a crash undoes."""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"QUERY") and data.count(b"\n") == 1:
            self.transport.write(self.answer(data[:-1]))
        else:
            super().data_received(data)


class AnswersFromTheFuture(Durable):
    """Of what has come in one piece the changes are made first, and the questions answered after."""

    def answer_all(self, lines: list[bytes]) -> list[bytes]:
        replies = dict.fromkeys(range(len(lines)), b"")
        for late in (False, True):
            for number, line in enumerate(lines):
                if line.startswith(b"QUERY") is late:
                    replies[number] = self.answer(line)
        return list(replies.values())


class AnswersFromThePast(Durable):
    """Questions are answered from a copy that lags behind."""

    def answer(self, line: bytes) -> bytes:
        if line.startswith(b"QUERY"):
            copy = Model()
            copy.packages = self.disk.packages
            return copy.apply(line)
        return super().answer(line)


class RepliesOutOfOrder(Durable):
    def reply(self, replies: list[bytes]) -> None:
        super().reply(replies[::-1])


class WritesHalfAChange(Disk):
    """What was changed last before the crash lacks a dependency."""

    def crash(self) -> Index:
        found = dict(super().crash())
        torn = max((name for name in found if found[name]), default=None)
        if torn is not None:
            found[torn] = frozenset(sorted(found[torn])[1:])
        return found


class ForgetsToWriteRemovals(Disk):
    """A package once written is never taken out of the files again."""

    def written(self) -> dict[bytes, frozenset[bytes]]:
        return self.packages | self.model.packages


async def life(
    model: Model, conversation: type[Durable], kind: type[Disk], seed: int
) -> tuple[History, Index, Index]:
    """Let a crowd talk to a server until it crashes: what was said, and both indexes."""
    chance = random.Random(seed)
    disk = kind(model)

    def begin(model: Model) -> Conversation:
        begun = conversation(model)
        begun.disk = disk
        disk.conversations.append(begun)
        return begun

    crowd = Crowd(chance, clients=12, watchers=2, neighbourhoods=4, owned=6, marks=2)
    history = History()
    async with await listen(model, 0, begin) as server:
        address = server.sockets[0].getsockname()
        first = await history.connect(address)
        await crowd.prepare(first)
        history.calls.clear()
        before = as_index(model.packages)
        talking = asyncio.ensure_future(talk_all(crowd, history, address))
        goal = chance.randrange(300, 600)
        # Not for a time: a busy machine would say less in it.
        while history.answered < goal:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        after = disk.crash()
        await talking
    return history, before, after


#: Lives in which a wrong server must have been found out, and in which the right one must not.
LIVES = 12


def lives(
    model: type[Model] = Model, conversation: type[Durable] = Durable, disk: type[Disk] = Disk
) -> Iterable[list[str]]:
    """Give what is wrong with each life of a server."""
    for seed in range(LIVES):
        history, before, after = asyncio.run(life(model(), conversation, disk, seed))
        yield [violation.what for violation in judge(history.calls, before, after)]


def test_a_right_server_is_found_right() -> None:
    assert list(lives()) == [[]] * LIVES


MISTAKES: list[tuple[str, dict[str, type], str]] = [
    ("forgets a change", {"model": ForgetsAChange}, NO_ORDER),
    ("drops a reverse edge", {"model": DropsAReverseEdge}, NO_ORDER),
    ("checks a dependency too early", {"model": ChecksADependencyTooEarly}, NO_ORDER),
    ("acknowledges before the sync", {"conversation": AcknowledgesBeforeTheSync}, LOST),
    ("reveals before the sync", {"conversation": RevealsBeforeTheSync}, REVEALED),
    ("answers from the future", {"conversation": AnswersFromTheFuture}, NO_ORDER),
    ("answers from the past", {"conversation": AnswersFromThePast}, NO_ORDER),
    ("replies out of order", {"conversation": RepliesOutOfOrder}, NO_ORDER),
    ("writes half a change", {"disk": WritesHalfAChange}, LOST),
    ("forgets to write removals", {"disk": ForgetsToWriteRemovals}, LOST),
]


@pytest.mark.parametrize(("kinds", "what"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_wrong_server_is_found_out(kinds: dict[str, type], what: str) -> None:
    assert any(what in found for found in lives(**kinds))
