"""The server: opens the index, listens, heeds signals, and stops without losing an answer.

The order of a start: limits, the index (which may take long), the listeners, the line that says so.
The order of a stop: no new clients, every received message answered, the index closed; all within
`stop_timeout`. A storage failure ends the process at once with exit code 5: connections that wait for
the lost batch are closed without an answer, which is all that may be said about it.
"""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import NoReturn, cast

import uvloop

from pkgindex import log
from pkgindex.config import Settings
from pkgindex.errors import ConfigError, PkgindexError
from pkgindex.index import Index, Progress, open_index
from pkgindex.listeners import Bound, Handshake, Tls, as_bound, bind_all, close_all
from pkgindex.protocol import SWEEP_SECONDS, Connection, Hub

__all__ = ["Bar", "notify", "run"]

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
SPARE_DESCRIPTORS = 1024  # beside the clients': 512 folders, listeners, logs, files under way

# Other threads' Python code waits at most about this long for a busy event loop. The default of 5 ms
# would make each step of a round or of a rotation wait that long.
SWITCH_SECONDS = 0.0005

# Of a stop's time, what clients may take to read their last answers; the rest is the store's.
CLIENTS_SHARE = 0.5
LINGER_SECONDS = 1.0  # for a client that has all its answers to close its side

# A worker gets one wish twice, where a terminal or a service manager tells the whole group: not a second one.
SAME_STOP_SECONDS = 0.5

TOLD_SECONDS = 60.0  # between two lines that say that the index is full, or that memory is

logger = log.get_logger()


# What shows how far something has come, while it is entered: by a name, and told (done, of all).
Bar = Callable[[], AbstractContextManager[Callable[[str], Progress]]]


def run(
    settings: Settings,
    bar: Bar,
    reread: Callable[[], object] = lambda: None,
    bound: list[Bound] | None = None,
    tell: Callable[[str], object] | None = None,
) -> int:
    """Serve until a signal; the exit code. Raises PkgindexError when the server cannot start.

    On SIGHUP `reread` is called, and the files of TLS are read again. `bound`: sockets to use instead of
    binding any. `tell` is told READY=1 and STOPPING=1, as systemd is by default."""
    os.umask(0o027)
    _raise_descriptor_limit(settings.max_clients)
    sys.setswitchinterval(SWITCH_SECONDS)
    for number in (signal.SIGUSR1, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # Before the store is claimed: one that cannot listen must not depose one that does.
    tls = Tls.of(settings)
    bound = bind_all(settings) if bound is None else bound
    began = time.monotonic()
    try:
        if settings.cluster:
            index = _open_cluster(replace(settings, listen=as_bound(bound)))
        else:
            with bar() as progress:
                index = open_index(settings, progress("reading the index"))
    except BaseException:
        close_all(bound)
        raise
    recovery = time.monotonic() - began
    # What was made so far lives as long as the process: no collection need look at it again.
    gc.collect()
    gc.freeze()
    server = _Server(settings, index, bound, tls, reread, tell or notify, recovery)
    return uvloop.run(server.serve())


class _Server:
    def __init__(
        self,
        settings: Settings,
        index: Index,
        bound: list[Bound],
        tls: Tls | None,
        reread: Callable[[], object],
        tell: Callable[[str], object],
        recovery: float,
    ) -> None:
        self.settings = settings
        self.index = index
        self.bound = bound
        self.tls = tls
        self.reread = reread
        self.tell = tell
        self.recovery = recovery
        self.stopping = asyncio.Event()
        self.stopped_at = 0.0
        self.failure: PkgindexError | None = None
        self.listeners: list[asyncio.Server] = []
        self.reading: asyncio.Task[None]

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        self.hub = hub = Hub(loop, self.index, self.settings)
        hub.failed = self._fail
        self.index.start(loop, hub.settled, self._fail)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGUSR1, self._log_counters)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        serving = loop.create_task(self._serve_clients(loop))
        stopping = loop.create_task(self.stopping.wait())
        done, _ = await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving in done:
            serving.result()  # which raises what has failed
        serving.cancel()
        # From here on for good: the loop's end would give the signal back its default, which kills.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self.failure is None:
            deadline = time.monotonic() + self.settings.stop_timeout
            await self._drain(time.monotonic() + self.settings.stop_timeout * CLIENTS_SHARE)
            self._log_counters()
        if self.failure is None:
            try:
                facts = await self.index.stop(max(0.1, deadline - time.monotonic()))
            except PkgindexError as error:
                self.failure = error
        if self.failure is not None:
            self._end(self.failure)
        logger.info("stopped", **facts)
        return 0

    async def _serve_clients(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen as soon as there is an index to answer from."""
        began = time.monotonic()
        await self.index.ready()
        if self.stopping.is_set():
            return
        for bound in self.bound:
            self.listeners.append(await self._listen(loop, bound))
        logger.info(
            "serving",
            listen=[bound.name for bound in self.bound],
            store=self.settings.store,
            packages=len(self.index),
            recovery_seconds=round(self.recovery + time.monotonic() - began, 3),
            pid=os.getpid(),
        )
        self.tell("READY=1")
        await self._sweep()

    # --- while it runs ----------------------------------------------------------------------------

    async def _listen(self, loop: asyncio.AbstractEventLoop, bound: Bound) -> asyncio.Server:
        listener, tls = bound.listener, self.tls

        def connection() -> asyncio.BaseProtocol:
            made = Connection(self.hub, listener)
            if listener.tls and tls is not None:
                return Handshake(made, tls)
            return cast("asyncio.BaseProtocol", made)

        if bound.socket.family == socket.AF_UNIX:
            return await loop.create_unix_server(connection, sock=bound.socket, backlog=BACKLOG)
        return await loop.create_server(connection, sock=bound.socket, backlog=BACKLOG)

    def _hang_up(self) -> None:
        self.reread()
        if self.tls is not None:
            self.reading = asyncio.get_running_loop().create_task(self._read_tls_again(self.tls))

    async def _read_tls_again(self, tls: Tls) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, tls.reload)
        except ConfigError as error:
            logger.error("certificate not read again; the old one stays", reason=str(error))
        else:
            logger.info("certificate read again", tls_cert=self.settings.tls_cert)

    async def _sweep(self) -> None:
        full, no_memory = _Grown(), _Grown()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.hub.sweep(self.settings.line_timeout, self.settings.idle_timeout)
            if beyond := full.by(self.index.beyond_limit):
                logger.warning(
                    "index full",
                    answered_fail=beyond,
                    packages=len(self.index),
                    remedy="remove packages, or raise --max-index and start again",
                )
            if closed := no_memory.by(self.hub.no_memory):
                logger.warning(
                    "no memory for a line",
                    closed=closed,
                    clients=len(self.hub.connections),
                    remedy="give the server more, or lower --max-line or --max-clients",
                )

    def _log_counters(self) -> None:
        facts = self.hub.stats() | self.index.stats()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        facts["max_rss_bytes"] = usage.ru_maxrss * 1024
        facts["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 3)
        logger.info("counters", **facts)

    def _fail(self, error: PkgindexError) -> None:
        """The storage can go on no longer: nobody gets another answer."""
        if self.failure is None:
            self.failure = error
            for connection in tuple(self.hub.connections):
                connection.abort()
            self.stopping.set()

    def _end(self, failure: PkgindexError) -> NoReturn:
        # Not by the interpreter's usual end: a thread that hangs on the mount would hold it up.
        logger.error("stopped: the storage failed", reason=str(failure))
        os._exit(failure.exit_code)

    def _stop(self, number: int) -> None:
        if self.failure is not None:
            self._end(self.failure)  # it was about to: no signal makes a good end of that
        now = time.monotonic()
        if self.stopping.is_set():
            if self.settings.workers > 1 and now < self.stopped_at + SAME_STOP_SECONDS:
                return
            logger.warning("stopped at once; all that was acknowledged is in the journal")
            os._exit(0)
        behind = self.index.stats().get("behind", 0)
        logger.info("stopping", signal=signal.Signals(number).name, behind=behind)
        self.tell("STOPPING=1")
        self.stopped_at = now
        self.stopping.set()

    async def _drain(self, deadline: float) -> None:
        """Answer everything that was received; then let the clients go."""
        for listener in self.listeners:
            listener.close()
        close_all(self.bound)
        connections = self.hub.connections
        for connection in tuple(connections):
            connection.drain()
        while time.monotonic() < deadline and self.failure is None:
            if sum(not connection.drained() for connection in tuple(connections)) == 0:
                break
            await asyncio.sleep(0.01)
        linger = min(deadline, time.monotonic() + LINGER_SECONDS)
        while connections and time.monotonic() < linger and self.failure is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in tuple(connections):
            connection.abort()
        await asyncio.sleep(0)


def _open_cluster(settings: Settings) -> Index:
    from pkgindex.cluster.index import ClusterIndex

    scheme, _, location = settings.store.partition(":")
    if scheme != "file":
        raise ConfigError(
            f"cluster: {settings.store}: only file: is a store that servers share a mount for"
        )
    return ClusterIndex.open(location, settings)


class _Grown:
    """A counter that is worth a line when it has grown, at most once in TOLD_SECONDS."""

    def __init__(self) -> None:
        self.told, self.next = 0, 0.0

    def by(self, count: int) -> int:
        """How much it has grown since the last line; 0 if it is too early for another."""
        if time.monotonic() < self.next or count == self.told:
            return 0
        grown = count - self.told
        self.told, self.next = count, time.monotonic() + TOLD_SECONDS
        return grown


def _raise_descriptor_limit(clients: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = clients + SPARE_DESCRIPTORS
    if soft >= wanted:
        return
    for limit in (max(hard, wanted), hard):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, limit), limit))
            break
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        logger.warning(
            "limit of open files too low",
            limit=hard,
            wanted=wanted,
            remedy="LimitNOFILE or --max-clients",
        )


def notify(state: str) -> None:
    """Tell systemd, if it asked (sd_notify(3)); a socket that is gone is no reason to stop."""
    target = os.environ.get("NOTIFY_SOCKET")
    if target:
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told,
        ):
            told.sendto(state.encode(), "\0" + target[1:] if target.startswith("@") else target)
