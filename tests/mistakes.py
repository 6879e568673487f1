"""Servers with one mistake each, which the conformance suite must see.

Each is the reference server, wrong in a way that a real one could be wrong. What a `Model` gets
wrong is a rule of the index; what a `Conversation` gets wrong is what happens on a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar

from tests.reference import ERROR, FAIL, MAX_LINE, OK, Conversation, Model


class ForgetsReverseEdges(Model):
    def apply(self, line: bytes) -> bytes:
        reply = super().apply(line)
        if line.startswith(b"REMOVE") and reply == FAIL:
            self.packages.pop(line.split(b"|")[1])
            return OK
        return reply


class MergesDependencies(Model):
    def apply(self, line: bytes) -> bytes:
        before = dict(self.packages)
        reply = super().apply(line)
        for name in before.keys() & self.packages.keys():
            self.packages[name] |= before[name]
        return reply


class ForgetsTheOldListWhenIndexFails(Model):
    def apply(self, line: bytes) -> bytes:
        reply = super().apply(line)
        if line.startswith(b"INDEX") and reply == FAIL:
            name = line.split(b"|")[1]
            if name in self.packages:
                self.packages[name] = frozenset()
        return reply


class IndexesWithMissingDependencies(Model):
    def apply(self, line: bytes) -> bytes:
        reply = super().apply(line)
        if line.startswith(b"INDEX") and reply == FAIL:
            self.packages[line.split(b"|")[1]] = frozenset()
            return OK
        return reply


class CountsItselfAsADependent(Model):
    def apply(self, line: bytes) -> bytes:
        if line.startswith(b"REMOVE|"):
            name = line.split(b"|")[1]
            if name in self.packages.get(name, ()):
                return FAIL
        return super().apply(line)


class RefusesCycles(Model):
    def apply(self, line: bytes) -> bytes:
        before = dict(self.packages)
        reply = super().apply(line)
        for start in self.packages:
            seen: set[bytes] = set()
            ahead = set(self.packages[start])
            while ahead:
                seen |= ahead
                ahead = set().union(*(self.packages[name] for name in ahead)) - seen
            if start in seen:
                self.packages = before
                return FAIL
        return reply


class AcceptsEmptyDependencies(Model):
    def apply(self, line: bytes) -> bytes:
        while b",," in line:
            line = line.replace(b",,", b",")
        return super().apply(line.removesuffix(b",").replace(b"|,", b"|"))


class AcceptsAThirdBar(Model):
    def apply(self, line: bytes) -> bytes:
        return super().apply(line.removesuffix(b"|") if line.count(b"|") == 3 else line)


class StripsCarriageReturns(Model):
    def apply(self, line: bytes) -> bytes:
        return super().apply(line.removesuffix(b"\r"))


class TakesCommandsInLowerCase(Model):
    def apply(self, line: bytes) -> bytes:
        command, bar, rest = line.partition(b"|")
        return super().apply(command.upper() + bar + rest)


class TakesDeleteForVisible(Model):
    def apply(self, line: bytes) -> bytes:
        return super().apply(line.replace(b"\x7f", b"~"))


class CutsLongNames(Model):
    def apply(self, line: bytes) -> bytes:
        command, *fields = line.split(b"|")
        cut = [b",".join(name[:254] for name in field.split(b",")) for field in fields]
        return super().apply(b"|".join([command, *cut]))


class IgnoresTheCaseOfNames(Model):
    def apply(self, line: bytes) -> bytes:
        command, bar, rest = line.partition(b"|")
        return super().apply(command + bar + rest.lower())


class AnswersOutOfOrder(Conversation):
    def reply(self, replies: list[bytes]) -> None:
        super().reply(sorted(replies))


class AnswersTwice(Conversation):
    count = 0

    def answer(self, line: bytes) -> bytes:
        self.count += 1
        return super().answer(line) * (2 if self.count == 90_000 else 1)


class TakesAPacketForAMessage(Conversation):
    def data_received(self, data: bytes) -> None:
        super().data_received(data if data.endswith(b"\n") else data + b"\n")


class SharesOneBuffer(Conversation):
    shared: ClassVar[bytes] = b""

    def data_received(self, data: bytes) -> None:
        self.begun = self.shared
        super().data_received(data)
        SharesOneBuffer.shared = self.begun


class DropsRepliesOnHalfClose(Conversation):
    def reply(self, replies: list[bytes]) -> None:
        # As a server that waits for its disk, and has closed the connection when that is done.
        asyncio.get_running_loop().call_later(0.01, super().reply, replies)


class StaysOpenAfterHalfClose(Conversation):
    def eof_received(self) -> bool:
        return True


class AnswersAnUnfinishedLine(Conversation):
    def eof_received(self) -> None:
        if self.begun:
            self.reply([self.answer(self.begun)])


class HangsUpAfterAnError(Conversation):
    def reply(self, replies: list[bytes]) -> None:
        super().reply(replies)
        if ERROR in replies:
            self.transport.close()


class CountsTheLineFeed(Conversation):
    def answer(self, line: bytes) -> bytes:
        return ERROR if len(line) >= MAX_LINE else super().answer(line)


class AnswersTheEndOfALongLine(Conversation):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.skipping = False


class ChecksNowAndAppliesLater(Conversation):
    """The lost race: between the check of an INDEX and its change another client comes in."""

    def answer(self, line: bytes) -> bytes:
        before = dict(self.model.packages)
        reply = super().answer(line)
        if line.startswith(b"INDEX") and reply == OK:
            name = line.split(b"|")[1]
            needed = self.model.packages[name]
            self.model.packages = before
            self.later(self.model.packages.__setitem__, name, needed)
        return reply

    def reply(self, replies: list[bytes]) -> None:
        self.later(super().reply, replies)

    def later(self, call: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_later(0.001, call, *arguments)


class WaitsForTheSlowest(Conversation):
    """One client that does not read its replies, and nobody is served."""

    paused: ClassVar[bool] = False

    def data_received(self, data: bytes) -> None:
        if not WaitsForTheSlowest.paused:
            super().data_received(data)

    def pause_writing(self) -> None:
        WaitsForTheSlowest.paused = True


class DecidesOtherwise(
    AcceptsEmptyDependencies, StripsCarriageReturns, TakesCommandsInLowerCase, RefusesCycles
):
    """Not wrong by the original specification, which is silent on all of this."""
