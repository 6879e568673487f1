"""Several servers of one machine that share its addresses, each a process, and one that minds them.

The simple version would be: each binds the port for itself, with SO_REUSEPORT. What breaks it: the kernel
deals every new connection to one of the sockets at once, and resets those that wait on a socket which
nobody has open any more, as when a worker was killed. So this process binds all of them and keeps them
open. What waits on a dead worker's socket waits for the next worker on it; only if that fails as well the
socket is given up, and the clients are dealt to the others.

Workers are forked from here, where nothing runs but this: no thread, no event loop, no store. They learn
by the end of a pipe that this process is gone, and stop. What it learns of them is SIGCHLD, and the
first one's SIGUSR2, for that it serves.

The first worker starts alone: what is wrong with the settings or the store is then said once, and ends
all. Later only an exit code that says that a restart cannot help does.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from pkgindex import log, server
from pkgindex.cluster.port import bind
from pkgindex.config import Settings, parse_address
from pkgindex.errors import ConfigError, PkgindexError, StoreDamaged
from pkgindex.listeners import Bound, as_bound, bind_again, bind_all, close_all
from pkgindex.server import Bar

__all__ = ["run"]

# What a restart cannot cure: see errors.
HOPELESS = (ConfigError.exit_code, StoreDamaged.exit_code)

# Before the second start in a row, the third, and so on; one that has run for long starts anew.
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
LONG_SECONDS = 60.0

OVERDUE_SECONDS = 10.0  # beyond --stop-timeout, for a worker that cannot even stop by itself

STOPS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = (*STOPS, signal.SIGHUP, signal.SIGUSR1)
HEEDED = (*PASSED_ON, signal.SIGUSR2, signal.SIGCHLD)

logger = log.get_logger()


def run(settings: Settings, bar: Bar, reread: Callable[[], object]) -> int:
    """Serve with `settings.workers` processes until a signal; the exit code, as of one server.

    Raises PkgindexError if not even the addresses are to be had."""
    if not settings.store.startswith("file:"):
        raise ConfigError(
            f"workers: {settings.store}: several servers share a file: store; leave --workers out"
        )
    bound = bind_all(settings)
    try:
        settings = replace(settings, listen=as_bound(bound))
        workers = []
        for number in range(1, settings.workers + 1):
            own = bound if number == 1 else bind_again(bound)
            workers.append(_Worker(number, own, *_cluster_port(settings, number)))
        return _Supervisor(settings, bar, reread, workers).supervise()
    finally:
        close_all(bound)


def _cluster_port(settings: Settings, number: int) -> tuple[socket.socket, str]:
    """Keep a worker's cluster port, so that it is the same after each restart; and its address."""
    if not settings.cluster:
        return bind("127.0.0.1:0")
    host, port = settings.cluster.rsplit(":", 1)
    address = f"{host}:{int(port) and int(port) + number - 1}"
    try:
        parse_address(address)
    except ValueError as error:
        raise ConfigError(f"cluster: {address!r} {error}") from None
    return bind(address)


@dataclass
class _Worker:
    number: int
    bound: list[Bound]
    kept: socket.socket  # its cluster port
    cluster: str
    pid: int = 0  # 0: not running
    began: float = 0.0
    due: float = 0.0  # when it is to be started
    failures: int = 0  # in a row


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        bar: Bar,
        reread: Callable[[], object],
        workers: list[_Worker],
    ) -> None:
        self.settings = settings
        self.bar = bar
        self.reread = reread
        self.workers = workers
        self.serves = False  # one has served
        self.stopping = False
        self.give_up = float("inf")
        self.code = 0
        self.lifeline = os.pipe()

    def supervise(self) -> int:
        # They are waited for, and never interrupt: what is done here is done one thing after the other.
        signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
        self._start(self.workers[0])
        while not self.stopping or any(worker.pid for worker in self.workers):
            now = time.monotonic()
            for worker in self.workers if self.serves and not self.stopping else ():
                if not worker.pid and worker.due <= now:
                    self._start(worker)
            if now >= self.give_up:
                self._kill()
            info = signal.sigtimedwait(HEEDED, self._patience())
            if info is not None:
                self._heed(info)
        return self.code

    def _patience(self) -> float:
        """Seconds until something is to be done without a signal."""
        due = [worker.due for worker in self.workers if not worker.pid]
        at = min(due, default=float("inf")) if self.serves and not self.stopping else self.give_up
        return min(60.0, max(0.0, at - time.monotonic()))

    def _heed(self, info: signal.struct_siginfo) -> None:
        number = signal.Signals(info.si_signo)
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGUSR2:
            if not self.serves and info.si_pid == self.workers[0].pid:
                self.serves = True
                server.notify("READY=1")
        else:
            if number in STOPS:
                self._stop()
            elif number == signal.SIGHUP:
                self.reread()
            self._tell(number)

    def _tell(self, number: signal.Signals) -> None:
        for worker in self.workers:
            if worker.pid:
                os.kill(worker.pid, number)  # not waited for yet, so its number is its own

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.give_up = time.monotonic() + self.settings.stop_timeout + OVERDUE_SECONDS
            server.notify("STOPPING=1")
            # Once the workers have closed theirs, too, nobody may wait on them any more.
            for worker in self.workers:
                close_all(worker.bound)

    def _kill(self) -> None:
        self.give_up = float("inf")
        hung = [worker.number for worker in self.workers if worker.pid]
        logger.error("workers killed", workers=hung, reason="they did not stop in time")
        self._tell(signal.SIGKILL)

    # --- a worker's life --------------------------------------------------------------------------

    def _start(self, worker: _Worker) -> None:
        sys.stderr.flush()
        worker.began = time.monotonic()
        worker.pid = os.fork()
        if not worker.pid:
            self._become(worker)

    def _become(self, worker: _Worker) -> NoReturn:
        """In the child: be a server, and nothing else."""
        code = 1
        try:
            parent = os.getppid()
            os.close(self.lifeline[1])
            threading.Thread(target=self._mind, args=(parent,), daemon=True).start()
            for other in self.workers:
                if other is not worker:
                    _close_ports(other.bound)
            log.mark(worker=worker.number)
            settings = replace(self.settings, cluster=worker.cluster)
            # The name of a Unix socket is the supervisor's to remove.
            bound = [replace(one, inode=0) for one in worker.bound]
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
            code = server.run(
                settings, self.bar, self.reread, bound, lambda state: _tell_parent(parent, state)
            )
        except PkgindexError as error:
            code = error.exit_code
            print(f"pkgindex: {error}", file=sys.stderr)
        except BaseException:  # noqa: BLE001  # whatever it is, this process must not go on as its parent
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _mind(self, parent: int) -> None:
        """Stop when the supervisor is gone: nobody would stop this worker any more."""
        os.read(self.lifeline[0], 1)
        logger.error("supervisor gone", pid=parent)
        os.kill(os.getpid(), signal.SIGTERM)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for worker in self.workers:
                if worker.pid == pid:
                    self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: _Worker, code: int) -> None:
        worker.pid = 0
        if self.stopping:
            if code not in (0, *(-number for number in STOPS)):
                self.code = self.code or _as_exit_code(code)
            return
        if not self.serves or code in HOPELESS:
            self.code = _as_exit_code(code)
            self._stop()
            self._tell(signal.SIGTERM)
            return
        now = time.monotonic()
        worker.failures = 0 if code == 0 or now - worker.began > LONG_SECONDS else worker.failures
        wait = BACKOFF_SECONDS[min(worker.failures, len(BACKOFF_SECONDS) - 1)]
        worker.failures += code != 0
        worker.due = now + wait
        how = {"code": code} if code >= 0 else {"signal": signal.Signals(-code).name}
        logger.warning("worker ended", worker=worker.number, **how, again_in=wait)
        if wait:
            self._give_up_sockets(worker)

    def _give_up_sockets(self, worker: _Worker) -> None:
        """Let the clients that wait for a worker go to the others; on new sockets it comes again."""
        fresh = bind_again(worker.bound)
        _close_ports(worker.bound)
        worker.bound = fresh


def _close_ports(bound: list[Bound]) -> None:
    """Close what is a worker's own; a Unix socket is everybody's."""
    for one in bound:
        if not one.path:
            one.socket.close()


def _tell_parent(parent: int, state: str) -> None:
    if state == "READY=1" and os.getppid() == parent:
        os.kill(parent, signal.SIGUSR2)


def _as_exit_code(code: int) -> int:
    """A signal's, as a shell would have it."""
    return code if code >= 0 else 128 - code
