"""The server: opens the index, listens, heeds signals, and stops without losing an answer.

The order of a start: limits, the index (which may take long), the listeners, the line that says so.
The order of a stop: no new clients, every received message answered, the index closed; all within
`stop_timeout`. A storage failure ends the process at once with exit code 5: connections that wait for
the lost batch are closed without an answer, which is all that may be said about it.
"""

import asyncio
import errno
import gc
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import uvloop

from pkgindex import log
from pkgindex.config import Settings, parse_address
from pkgindex.errors import ListenError, PkgindexError
from pkgindex.index import Index, Progress, open_index
from pkgindex.protocol import SWEEP_SECONDS, Connection, Hub

__all__ = ["run"]

DEFAULT_LISTEN = (("127.0.0.1", 8080), ("::1", 8080))
EVERY_ADDRESS = ("0.0.0.0", "::")
BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
SPARE_DESCRIPTORS = 1024  # beside the clients': 512 folders, listeners, logs, files under way

# Other threads' Python code waits at most about this long for a busy event loop. The default of 5 ms
# would make each step of a round or of a rotation wait that long.
SWITCH_SECONDS = 0.0005

# Of a stop's time, what clients may take to read their last answers; the rest is the store's.
CLIENTS_SHARE = 0.5
LINGER_SECONDS = 1.0  # for a client that has all its answers to close its side

logger = log.get_logger()


# What shows how far something has come, while it is entered: by a name, and told (done, of all).
Bar = Callable[[], AbstractContextManager[Callable[[str], Progress]]]


def run(settings: Settings, bar: Bar) -> int:
    """Serve until a signal; the exit code. Raises PkgindexError when the server cannot start."""
    os.umask(0o027)
    _raise_descriptor_limit(settings.max_clients)
    sys.setswitchinterval(SWITCH_SECONDS)
    for number in (signal.SIGUSR1, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # Before the store is claimed: one that cannot listen must not depose one that does.
    listeners = _bind_all(settings)
    began = time.monotonic()
    try:
        with bar() as progress:
            index = open_index(settings, progress("reading the index"))
    except BaseException:
        _close(listeners)
        raise
    recovery = time.monotonic() - began
    # What was made so far lives as long as the process: no collection need look at it again.
    gc.collect()
    gc.freeze()
    return uvloop.run(_Server(settings, index, listeners, recovery).serve())


class _Server:
    def __init__(
        self, settings: Settings, index: Index, bound: list[socket.socket], recovery: float
    ) -> None:
        self.settings = settings
        self.index = index
        self.bound = bound
        self.recovery = recovery
        self.stopping = asyncio.Event()
        self.failure: PkgindexError | None = None
        self.listeners: list[asyncio.Server] = []

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        self.hub = hub = Hub(loop, self.index, self.settings)
        hub.failed = self._fail
        self.index.start(loop, hub.settled, self._fail)
        for found in self.bound:
            self.listeners.append(await self._listen(loop, found))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGUSR1, self._log_counters)
        logger.info(
            "serving",
            listen=[_name(found) for found in self.bound],
            store=self.settings.store,
            packages=len(self.index),
            recovery_seconds=round(self.recovery, 3),
            pid=os.getpid(),
        )
        _notify("READY=1")
        sweeper = loop.create_task(self._sweep())
        await self.stopping.wait()
        sweeper.cancel()
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
            # Not by the interpreter's usual end: a thread that hangs on the mount would hold it up.
            logger.error("stopped: the storage failed", reason=str(self.failure))
            os._exit(self.failure.exit_code)
        logger.info("stopped", **facts)
        return 0

    # --- while it runs ----------------------------------------------------------------------------

    async def _listen(
        self, loop: asyncio.AbstractEventLoop, found: socket.socket
    ) -> asyncio.Server:
        def connection() -> Connection:
            return Connection(self.hub)

        if found.family == socket.AF_UNIX:
            return await loop.create_unix_server(connection, sock=found, backlog=BACKLOG)
        return await loop.create_server(connection, sock=found, backlog=BACKLOG)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.hub.sweep(self.settings.line_timeout, self.settings.idle_timeout)

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

    def _stop(self, number: int) -> None:
        if self.stopping.is_set():
            logger.warning("stopped at once; all that was acknowledged is in the journal")
            os._exit(0)
        logger.info("stopping", signal=signal.Signals(number).name)
        _notify("STOPPING=1")
        self.stopping.set()

    async def _drain(self, deadline: float) -> None:
        """Answer everything that was received; then let the clients go."""
        for listener in self.listeners:
            listener.close()
        _close(self.bound)
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


def _bind_all(settings: Settings) -> list[socket.socket]:
    """Sockets on every address to listen on. Raises ListenError."""
    bound: list[socket.socket] = []
    try:
        for text in settings.listen:
            address = parse_address(text)
            if isinstance(address, tuple):
                bound += _bind(text, *address)
            else:
                bound.append(_bind_unix(str(address)))
        if not settings.listen:
            for host, port in DEFAULT_LISTEN:
                try:
                    bound += _bind(f"{host}:{port}", host, port)
                except ListenError as error:
                    if not _lacks_family(error):
                        raise
                    logger.warning("address skipped", address=host, reason="not of this machine")
        if not bound:
            raise ListenError("no address to listen on; name one with --listen")
    except ListenError:
        _close(bound)
        raise
    return bound


def _bind(text: str, host: str, port: int) -> list[socket.socket]:
    """Sockets on every address that `host` means; the empty host is every address of the machine.

    Raises ListenError with the OSError as its cause."""
    bound: list[socket.socket] = []
    try:
        for one in [host] if host else EVERY_ADDRESS:
            try:
                infos = socket.getaddrinfo(
                    one, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
                for family, kind, proto, _, address in infos:
                    # A free port is one port, whatever the number of addresses.
                    chosen = bound[0].getsockname()[1] if bound and not port else port
                    bound.append(_bind_one(family, kind, proto, (address[0], chosen, *address[2:])))
            except OSError as error:
                if host or not _is_lacking(error):
                    raise
        if not bound:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        _close(bound)
        remedy = {
            errno.EADDRINUSE: "another server has it; stop that one or name another port",
            errno.EACCES: "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
        }.get(error.errno or 0, "name another address with --listen")
        raise ListenError(f"{text}: cannot listen: {error.strerror}: {remedy}") from error
    return bound


def _bind_one(family: int, kind: int, proto: int, address: tuple[str | int, ...]) -> socket.socket:
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _keep_alive(found)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


class _UnixSocket(socket.socket):
    """A Unix socket that knows its name in the file system, to take it away again."""

    path = ""
    inode = 0


def _bind_unix(path: str) -> socket.socket:
    found = _UnixSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_listening(path):
                os.unlink(path)
        found.bind(path)
        os.chmod(path, 0o660)
        found.path, found.inode = path, os.lstat(path).st_ino
    except OSError as error:
        found.close()
        raise ListenError(f"unix:{path}: cannot listen: {error.strerror}") from error
    return found


def _close(bound: list[socket.socket]) -> None:
    """Close sockets; a Unix socket's name goes too, unless another server has taken it over."""
    for found in bound:
        if isinstance(found, _UnixSocket):
            with suppress(OSError):
                if os.lstat(found.path).st_ino == found.inode:
                    os.unlink(found.path)
        found.close()


def _keep_alive(listener: socket.socket) -> None:
    """Let connections whose other end has vanished be found out, so that they hold no place for ever."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 300),
        (socket.TCP_KEEPINTVL, 30),
        (socket.TCP_KEEPCNT, 4),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_lacking(error: OSError) -> bool:
    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(
        error, socket.gaierror
    )


def _lacks_family(error: ListenError) -> bool:
    return isinstance(error.__cause__, OSError) and _is_lacking(error.__cause__)


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        return True


def _name(found: socket.socket) -> str:
    address = found.getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def _notify(state: str) -> None:
    """Tell systemd, if it asked (sd_notify(3)); a socket that is gone is no reason to stop."""
    target = os.environ.get("NOTIFY_SOCKET")
    if target:
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told,
        ):
            told.sendto(state.encode(), "\0" + target[1:] if target.startswith("@") else target)
