"""Log lines: their two forms, and that logging never blocks, raises or breaks a line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

#: More than a pipe takes while nobody reads it, which is 64 KiB.
MANY = 5000


def program(text: str, form: str = "text") -> list[str]:
    """Return a command that logs: `text` runs with `logger`, `log` and the given form."""
    head = "import logging, os, sys, threading, warnings\nfrom pkgindex import log\n"
    head += f"log.configure('info', {form!r})\nlogger = log.get_logger()\n"
    return [sys.executable, "-c", head + text]


def lines(text: str, form: str = "text") -> list[str]:
    done = subprocess.run(program(text, form), capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_a_text_line_is_time_level_event_and_values():
    (line,) = lines(
        "logger.info('serving', listen=['127.0.0.1:1', '[::1]:1'], packages=0, took=0.12345)"
    )
    assert re.fullmatch(
        TIME + r" info serving listen=127\.0\.0\.1:1,\[::1\]:1 packages=0 took=0\.123", line
    )


def test_a_json_line_is_one_object_that_begins_with_time_level_and_event():
    (line,) = lines("logger.warning('two words', path='/a b', count=3, none=None)", "json")
    event = json.loads(line)
    assert list(event) == ["ts", "level", "event", "path", "count", "none"]
    assert re.fullmatch(TIME, event.pop("ts"))
    assert event == {
        "level": "warning",
        "event": "two words",
        "path": "/a b",
        "count": 3,
        "none": None,
    }


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "value", ["a\nb", "\x1b[31m", 'say "no"', "\udcff", "é\u2028", b"\xff\n", "", "a b"], ids=repr
)
def test_no_value_can_break_a_line_or_reach_the_terminal(value, form):
    (line,) = lines(f"logger.info('event', value={value!r}, after=1)", form)
    assert line.isprintable()
    assert line.endswith("after=1" if form == "text" else '"after":1}')


def test_an_exception_is_one_line():
    (line,) = lines("try: 1/0\nexcept Exception: logger.error('failed', exc_info=True)")
    assert "ZeroDivisionError" in line


def test_events_below_the_level_are_not_logged_and_the_level_can_change():
    text = "logger.debug('a'); log.set_level('debug'); logger.debug('b'); log.set_level('error')"
    assert [line.split()[2] for line in lines(text + "; logger.warning('c')")] == ["b"]


def test_what_libraries_log_and_warn_about_comes_out_in_the_same_form():
    text = "logging.getLogger('asyncio').error('no %s', 'x'); warnings.warn('careful')"
    first, second = (json.loads(line) for line in lines(text, "json"))
    assert (first["level"], first["event"], first["logger"]) == ("error", "no x", "asyncio")
    assert (second["level"], second["logger"]) == ("warning", "py.warnings")


def test_lines_of_several_threads_are_never_mixed():
    text = (
        "def work(n): [logger.info('event', n=n, i=i) for i in range(500)]\n"
        "threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]"
    )
    events = [json.loads(line) for line in lines(text, "json")]
    for n in range(4):
        assert [event["i"] for event in events if event["n"] == n] == list(range(500))


def test_a_reader_that_stalls_holds_nothing_up_and_is_told_what_it_missed():
    text = (
        f"for i in range({MANY}): logger.info('event', i=i, pad='x' * 50)\n"
        "print('logged', flush=True); sys.stdin.readline(); logger.info('after')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program(text, "json"), text=True, **pipes) as process:
        began = time.monotonic()
        assert process.stdout.readline() == "logged\n"
        assert time.monotonic() - began < 30
        os.set_blocking(process.stderr.fileno(), False)
        received = process.stderr.read()
        os.set_blocking(process.stderr.fileno(), True)
        rest = process.communicate("\n")[1]
    events = [json.loads(line) for line in (received + rest).splitlines()]
    *whole, dropped, after = events
    assert (dropped["event"], after["event"]) == ("log lines dropped", "after")
    assert len(whole) + dropped["lines"] == MANY
    assert [event["i"] for event in whole] == list(range(len(whole)))


@pytest.mark.parametrize("where", ["closed", "reader gone", "disk full"])
def test_logging_to_nowhere_is_no_trouble(where, tmp_path):
    text = f"[logger.info('event', pad='x' * 100) for i in range({MANY})]; print('done')"
    command = program(text)
    if where == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    elif where == "reader gone":
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, check=False)
        os.close(writing)
    else:
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_serve_never_gives_a_closed_standard_descriptor_to_a_file_of_its_own():
    text = (
        "from pkgindex.cli.serve import _hold_standard_descriptors as hold\n"
        "hold(); descriptor = os.open('/dev/zero', os.O_RDONLY)\n"
        "is_null = os.fstat(2).st_rdev == os.stat('/dev/null').st_rdev\n"
        "sys.exit(10 if is_null and descriptor > 2 else 11)"
    )
    done = subprocess.run(["sh", "-c", 'exec "$@" 0<&- 2>&-', "sh", *program(text)], check=False)
    assert done.returncode == 10
