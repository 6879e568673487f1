"""A real `pkgindex serve` for a test, and a socket to speak to it byte by byte.

    with Server("memory:") as server, Wire(server.address) as wire:
        assert wire.ask(b"INDEX|a|") == b"OK\n"
        assert server.stop() == 0

`Server` is the process: started on a free port, ready when `with` is entered, gone for certain
when it is left, whatever the test did in between. `Wire` is one client that hides nothing: it
sends the bytes it is given and returns the replies as they came, and never waits without end.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: The stores that every server-wide test runs against: a name, and its URL in a fresh folder.
STORES: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: "memory:",
    "file": lambda folder: f"file:{folder / 'index'}",
}

#: `(host, port)`, or the path of a Unix socket.
Address = tuple[str, int] | str

#: Seconds for what takes milliseconds on a quiet machine: only a hang may reach it.
PATIENCE = 60.0


class ServerFailed(AssertionError):
    """The server ended, or did not do what was waited for; the message holds its last lines."""


class Server:
    """One `pkgindex serve` process and what it logs, from start to certain end.

    Start it from a thread that outlives it: the kernel kills it when that thread ends, so that
    not even a killed test run leaves a server behind.
    """

    def __init__(
        self,
        store: str,
        *options: str,
        listen: str = "127.0.0.1:0",
        log_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
        inside: Sequence[str] = (),
    ) -> None:
        """Name the store by its URL; `options` are further arguments of `pkgindex serve`, `inside` a
        command that runs the one that follows it somewhere else.

        `environment` is added to this process's own, less every PKGINDEX_ variable. The log goes
        to `log_file` too (by default a temporary file, removed at the end).
        """
        self.store = store
        self.lines: list[str] = []
        self.patience = patience
        self._temporary_log = log_file is None
        self.log_file = log_file or Path(tempfile.mkstemp(prefix="pkgindex-", suffix=".log")[1])
        self._command = [*inside, sys.executable, "-m", "pkgindex", "serve", "--store", store]
        self._command += ["--listen", listen, "--log-format", "json", *options]
        if setpriv := shutil.which("setpriv"):
            self._command = [setpriv, "--pdeathsig", "KILL", *self._command]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")}
        self._environment = kept | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._logged = threading.Condition()
        self._log_ended = False

    def start(self) -> Self:
        """Start the process and wait until it serves. ServerFailed if it ends before."""
        self.launch()
        try:
            self.wait_for("serving")
        except BaseException:
            self._dispose()
            raise
        return self

    def launch(self) -> None:
        """Start the process, and do not wait."""
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._running().pid

    @property
    def address(self) -> Address:
        """The first address of the `serving` line."""
        return parse_address(self.wait_for("serving")["listen"][0])

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._running().poll()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log so far: the JSON lines, all of them or those of one event."""
        with self._logged:
            parsed = [_parse_event(line) for line in self.lines]
        return [event for event in parsed if event and (name is None or event["event"] == name)]

    def wait_for(
        self, event: str, patience: float | None = None, *, after: int = 0
    ) -> dict[str, Any]:
        """Return the first line of `event` (of those after so many), waiting for it.

        ServerFailed if it never comes."""
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        with self._logged:
            while True:
                found = 0
                for line in self.lines:
                    parsed = _parse_event(line)
                    if parsed and parsed["event"] == event:
                        found += 1
                        if found > after:
                            return parsed
                left = deadline - time.monotonic()
                if self._log_ended or left <= 0:
                    raise ServerFailed(f"no event {event!r} from the server{self._last_lines()}")
                self._logged.wait(left)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone, not to its group."""
        self._running().send_signal(number)

    def stop(self, number: int = signal.SIGTERM, patience: float | None = None) -> int:
        """Send a signal and return the exit code. ServerFailed, and killed, if it does not end."""
        self.send_signal(number)
        return self.wait(patience)

    def wait(self, patience: float | None = None) -> int:
        """Return the exit code once it ended. ServerFailed, and killed, if it does not."""
        try:
            code = self._running().wait(self.patience if patience is None else patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerFailed(f"the server did not end{self._last_lines()}") from None
        self._end_of_log()
        return code

    def kill(self) -> int:
        """SIGKILL the whole process group and return the exit code; harmless after its end."""
        process = self._running()
        if process.returncode is None:
            # Not yet waited for, so its number is still its own: no stranger is hit.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._end_of_log()
        return process.returncode

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._dispose()

    def _dispose(self) -> None:
        self.kill()
        if self._temporary_log:
            self.log_file.unlink(missing_ok=True)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was not started"
        return self._process

    def _read_log(self) -> None:
        stream = self._running().stderr
        assert stream is not None
        with stream, self.log_file.open("ab", buffering=0) as copy:
            for line in stream:
                copy.write(line)
                with self._logged:
                    self.lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._logged.notify_all()
        with self._logged:
            self._log_ended = True
            self._logged.notify_all()

    def _end_of_log(self) -> None:
        if self._reader is not None:
            self._reader.join(self.patience)

    def _last_lines(self) -> str:
        if self._log_ended:  # so has the process, give or take a moment
            with suppress(subprocess.TimeoutExpired):
                self._running().wait(1)
        code = self._running().poll()
        state = "still running" if code is None else f"exit code {code}"
        return "\n".join([f" ({state}); its last lines:", *self.lines[-20:]])


def _parse_event(line: str) -> dict[str, Any] | None:
    """Return a log line's JSON object; None for anything else, such as a traceback."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def parse_address(text: str) -> Address:
    """Read `HOST:PORT`, `[HOST]:PORT` or `unix:PATH`. ValueError for anything else."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    match = re.fullmatch(r"(?:\[(.+)\]|([^:]+)):(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is not HOST:PORT, [HOST]:PORT or unix:PATH")
    return match[1] or match[2], int(match[3])


class Wire:
    """One raw connection. Every wait ends after `patience` seconds in a TimeoutError.

    EOFError: the server closed the connection before all the replies that were waited for.
    """

    def __init__(self, address: Address, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._received = bytearray()
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(patience)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection(address, timeout=patience)
            # Each send leaves at once as its own packet, for tests that cut messages apart.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Send exactly these bytes. For more than a few thousand messages use `exchange`."""
        self.socket.sendall(data)

    def receive(self, count: int = 1) -> list[bytes]:
        """Return the next `count` replies, each with its line feed."""
        return self.exchange(b"", count)

    def ask(self, line: bytes) -> bytes:
        """Send one line, given without its line feed, and return its reply."""
        return self.exchange(line + b"\n", 1)[0]

    def ask_all(self, lines: Iterable[bytes]) -> list[bytes]:
        """Send lines as one pipeline and return their replies."""
        data = [line + b"\n" for line in lines]
        return self.exchange(b"".join(data), len(data))

    def exchange(self, data: bytes, count: int) -> list[bytes]:
        """Send `data` and return the next `count` replies, reading while sending."""
        replies = self.exchange_bytes(data, count).split(b"\n")
        return [reply + b"\n" for reply in replies[:count]]

    def exchange_bytes(self, data: bytes, count: int) -> bytes:
        """Do as `exchange`, and return the replies as they came: for millions of them.

        A server stops reading from a client that does not read its replies, so a pipeline that
        is sent to its end before the first reply is read may wait for ever.
        """
        unsent = memoryview(data)
        missing = count - self._received.count(b"\n")
        deadline = time.monotonic() + self.patience
        with selectors.DefaultSelector() as selector:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
            selector.register(self.socket, wanted)
            while unsent or missing > 0:
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise TimeoutError(f"{max(missing, 0)} of {count} replies still missing")
                for _, happened in ready:
                    if happened & selectors.EVENT_WRITE:
                        unsent = unsent[self.socket.send(unsent[:262144]) :]
                        if not unsent:
                            selector.modify(self.socket, selectors.EVENT_READ)
                    if happened & selectors.EVENT_READ:
                        missing -= self._receive_some(missing)
        end = len(self._received)
        for _ in range(1 - missing):
            end = self._received.rfind(b"\n", 0, end)
        replies = bytes(self._received[: end + 1])
        del self._received[: end + 1]
        return replies

    def half_close(self) -> None:
        """Shut down the sending side; the receiving side stays open."""
        self.socket.shutdown(socket.SHUT_WR)

    def receive_until_closed(self) -> bytes:
        """Return everything up to the moment when the server closes the connection."""
        deadline = time.monotonic() + self.patience
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.socket.recv(262144)
            if not data:
                break
            self._received += data
        everything = bytes(self._received)
        self._received.clear()
        return everything

    def reset(self) -> None:
        """Break the connection off, as a client that crashed: the server sees a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close both directions; harmless when already closed."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _receive_some(self, missing: int) -> int:
        data = self.socket.recv(262144)
        if not data and missing > 0:
            raise EOFError(f"the server closed the connection, {missing} replies short")
        self._received += data
        return data.count(b"\n")
