"""Log lines on standard error: one event, one line, never in the way.

    from pkgindex import log

    logger = log.get_logger()
    logger.info("serving", listen=["127.0.0.1:8080"], store="memory:", packages=0)

Text: `2026-11-24T17:00:00.123Z info serving listen=127.0.0.1:8080 store=memory: packages=0`
JSON: `{"ts":"2026-11-24T17:00:00.123Z","level":"info","event":"serving","listen":[…],…}`

The promise: logging never blocks, never raises, and may be called from any thread and from a signal
handler. A reader of standard error that stalls loses lines, and is told how many once it reads
again; one that is gone loses them all. A value can hold anything: it is always written as one
line of printable text, since names and messages come from strangers.

What other libraries log or warn about (asyncio above all) comes out the same way.
"""

import json
import logging
import os
import select
import threading
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, cast

import structlog
from structlog.typing import FilteringBoundLogger

__all__ = ["configure", "get_logger", "mark", "set_level"]

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

# A pipe that polls as writable takes this much at once without blocking (PIPE_BUF; pipe(7)); a
# Unix socket, as journald gives, and a terminal take more.
CHUNK: Final = 4096

# How long the rest of a line that was begun may wait: better a short wait than half a line.
REST_OF_LINE_MILLISECONDS: Final = 100


class _StandardError:
    """Writes whole lines to descriptor 2, or drops and counts them: never blocks for long."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may log while its own thread is in here.
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        self._dropped = 0
        self._torn = False

    def write(self, line: str) -> None:
        with self._lock:
            if self._dropped and self._ready(0):
                told = {"ts": _now(), "level": "warning", "event": "log lines dropped"}
                self._put(_state.render(told | {"lines": self._dropped}))
            if not self._put(line):
                self._dropped += 1
            else:
                self._dropped = 0

    def _ready(self, milliseconds: int) -> bool:
        try:
            events = self._poll.poll(milliseconds)
        except OSError:
            return False
        return bool(events) and events[0][1] == select.POLLOUT

    def _put(self, line: str) -> bool:
        data = (line + "\n").encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        sent = 0
        while sent < len(data):
            if not self._ready(REST_OF_LINE_MILLISECONDS if sent else 0):
                self._torn = self._torn or sent > 0
                return False
            try:
                sent += os.write(2, data[sent : sent + CHUNK])
            except OSError:  # closed, full, gone: there is nowhere left to say so
                return False
        self._torn = False
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: object) -> object:
    """Make a value fit for JSON; floats to the millisecond, bytes as text."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    return str(value)


def _render_json(event: Mapping[str, object]) -> str:
    return json.dumps(_plain(event), separators=(",", ":"))


def _render_text(event: Mapping[str, object]) -> str:
    rest = dict(event)
    head = [str(rest.pop("ts")), str(rest.pop("level")), _word(rest.pop("event"), spaces=True)]
    return " ".join(head + [f"{key}={_word(value)}" for key, value in rest.items()])


def _word(value: object, *, spaces: bool = False) -> str:
    """A value as one word, quoted as in JSON where it would not be one."""
    value = _plain(value)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        value = ",".join(cast("list[str]", value))
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    is_word = value.isprintable() and (spaces or " " not in value) and '"' not in value
    return value if is_word and value else json.dumps(value)


class _State:
    """What `configure` and `set_level` change; the loggers look here at each event."""

    threshold = LEVELS["info"]
    render = staticmethod(_render_text)
    marks: Mapping[str, object] = MappingProxyType({})


_state = _State()
_standard_error = _StandardError()


def _drop_below_threshold(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    if LEVELS[method] < _state.threshold:
        raise structlog.DropEvent
    return event


def _finish(_logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    head = {"ts": _now(), "level": method, "event": event.pop("event", "")}
    return _state.render({**head, **_state.marks, **event})


class _Sink:
    """The bottom of a structlog logger: each method takes the finished line."""

    debug = info = warning = error = critical = staticmethod(_standard_error.write)


class _FromStandardLibrary(logging.Handler):
    """Carries what other libraries log into the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        level = max(10, min(50, record.levelno // 10 * 10))
        _logger.log(level, record.getMessage(), logger=record.name, exc_info=record.exc_info)


def get_logger() -> FilteringBoundLogger:
    """Give a logger: `logger.info("event", key=value, …)`; it heeds every later `configure`."""
    return _logger


def configure(level: str = "info", format: str = "text") -> None:  # noqa: A002
    """Set the least serious level to log, and the form of the lines: `text` or `json`."""
    set_level(level)
    _state.render = _render_json if format == "json" else _render_text
    root = logging.getLogger()
    if not any(isinstance(handler, _FromStandardLibrary) for handler in root.handlers):
        root.addHandler(_FromStandardLibrary())
        logging.captureWarnings(True)


def mark(**marks: object) -> None:
    """Put these behind the event of every line from now on: which of several processes says it."""
    _state.marks = marks


def set_level(level: str) -> None:
    """Set the least serious level to log: debug, info, warning or error. Any thread may call it."""
    _state.threshold = LEVELS[level]


_logger: FilteringBoundLogger = structlog.wrap_logger(
    _Sink(),
    processors=[_drop_below_threshold, structlog.processors.format_exc_info, _finish],
    wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    cache_logger_on_first_use=True,
)
