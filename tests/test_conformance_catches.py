"""The conformance suite can fail: servers that are wrong in one way each do not pass it.

A suite that passes everything proves nothing. Each server of `tests.mistakes` stands here beside
the tests that must see its mistake.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import mistakes
from tests.reference import Conversation, Model, listen

ROOT = Path(__file__).parents[1]

#: A server that is wrong somewhere.
Mistaken = type[Model | Conversation]

#: Tests that take longest, and that no mutant here needs.
SLOWEST = "100000 or does_not_read or thousands_of"


#: Each mistake with the tests that must see it: a file, and words of their names.
MISTAKES: list[tuple[Mistaken, str, str]] = [
    (mistakes.ForgetsReverseEdges, "commands", "remove_fails_while"),
    (mistakes.MergesDependencies, "commands", "replaces_the_dependencies"),
    (mistakes.ForgetsTheOldListWhenIndexFails, "cycles", "old_list_stays"),
    (mistakes.IndexesWithMissingDependencies, "commands", "dependency_is_missing"),
    (mistakes.CountsItselfAsADependent, "cycles", "its_own_remove"),
    (mistakes.RefusesCycles, "cycles", "each_member_of_a_cycle"),
    (mistakes.AcceptsEmptyDependencies, "messages", "empty_dependency"),
    (mistakes.AcceptsAThirdBar, "messages", "exactly_two_bars"),
    (mistakes.StripsCarriageReturns, "messages", "carriage_return"),
    (mistakes.TakesCommandsInLowerCase, "messages", "three_words_in_capitals"),
    (mistakes.TakesDeleteForVisible, "names", "every_byte_value_in_a_package"),
    (mistakes.TakesDeleteForVisible, "names", "every_byte_value_in_a_dependency"),
    (mistakes.CutsLongNames, "names", "differ_at_the_end"),
    (mistakes.IgnoresTheCaseOfNames, "names", "differ_in_one_byte"),
    (mistakes.AnswersOutOfOrder, "framing", "answered_in_order_each"),
    (mistakes.AnswersTwice, "framing", "100000"),
    (mistakes.TakesAPacketForAMessage, "framing", "cut_at_any_byte"),
    (mistakes.SharesOneBuffer, "framing", "not_mixed"),
    (mistakes.DropsRepliesOnHalfClose, "framing", "after_half_close_everything"),
    (mistakes.StaysOpenAfterHalfClose, "framing", "after_half_close_everything"),
    (mistakes.AnswersAnUnfinishedLine, "framing", "after_the_last_line_feed"),
    (mistakes.HangsUpAfterAnError, "messages", "broken_message"),
    (mistakes.CountsTheLineFeed, "long_lines", "limit_is_a_message"),
    (mistakes.AnswersTheEndOfALongLine, "long_lines", "is_not_a_message"),
    (mistakes.ChecksNowAndAppliesLater, "many_clients", "cannot_both_be_ok"),
    (mistakes.ChecksNowAndAppliesLater, "many_clients", "some_order_explains"),
    (mistakes.WaitsForTheSlowest, "many_clients", "does_not_read and LIZARD"),
    (mistakes.ForgetsReverseEdges, "distribution", "hundred_clients"),
    (mistakes.IndexesWithMissingDependencies, "distribution", "hundred_clients"),
]


@contextmanager
def _served(kind: Mistaken) -> Iterator[tuple[str, Model]]:
    """Serve a reference server, or one with a mistake, in a thread; give its address and model."""
    model = kind() if issubclass(kind, Model) else Model()
    conversation = kind if issubclass(kind, Conversation) else Conversation
    conversations: list[Conversation] = []

    def begin(model: Model) -> Conversation:
        conversations.append(conversation(model))
        return conversations[-1]

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(listen(model, 0, begin))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname()), model
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for begun in conversations:
            begun.transport.abort()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _judge(address: str, files: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the conformance tests of some files against a server, in a pytest of their own."""
    paths = [f"tests/conformance/test_{file}.py" for file in files] or ["tests/conformance"]
    command = [sys.executable, "-m", "pytest", *paths, "--server", address]
    # Without the plugins, and without their settings, it starts three times as fast.
    command += ["-q", "-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command += ["-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("kind", "file", "words"), MISTAKES, ids=[f"{k.__name__}-{file}" for k, file, _ in MISTAKES]
)
def test_a_server_with_a_mistake_fails(kind: Mistaken, file: str, words: str) -> None:
    with _served(kind) as (address, _):
        judged = _judge(address, [file], "-k", words, "-x", "--patience", "1")
    assert judged.returncode == 1, judged.stdout
    assert "1 failed" in judged.stdout, judged.stdout


def test_the_reference_passes_and_is_left_as_it_was() -> None:
    with _served(Model) as (address, model):
        model.packages = {b"already-there": frozenset()}
        judged = _judge(address, [], "-k", f"not ({SLOWEST})")
        assert judged.returncode == 0, judged.stdout
        assert model.packages == {b"already-there": frozenset()}


def test_a_server_that_decided_otherwise_passes_what_the_specification_says() -> None:
    with _served(mistakes.DecidesOtherwise) as (address, _):
        files = ["messages", "names", "cycles", "long_lines"]
        assert _judge(address, files, "--only-spec").returncode == 0
        assert _judge(address, files, "-x").returncode == 1
