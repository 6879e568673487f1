"""A real GlusterFS volume, mounted as often as a test wants, each mount a client with caches of its own.

    with Volume(folder) as volume:
        a, b = volume.mount("a"), volume.mount("b")
        (a / "file").write_bytes(b"x")            # and b sees it, when its caches let it
        volume.kill_brick(); volume.start_brick()

Every mount stands for a machine: its own glusterfs process, its own caches, its own owner of locks. There
is no glusterd: one brick (storage/posix, features/locks, protocol/server) on a free loopback port, and
clients that find it there. `brick` is the folder behind it, where a test sees what is, with no cache in
between. It needs root, /dev/fuse and Debian's glusterfs-server.

Nothing is left behind: the daemons die with the thread that made the volume, and a guard, which notices by
the end of a pipe that this process is gone, unmounts what it had mounted.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CACHES", "EVERY_CACHE", "TRUSTING", "TRUSTING_CACHES", "Volume", "why_absent"]

#: The caching layers of a client, from the brick upwards: those of a volume with default options, and all.
CACHES = ("write-behind", "open-behind", "quick-read", "md-cache")
EVERY_CACHE = (
    *("write-behind", "read-ahead", "readdir-ahead", "io-cache"),
    *("open-behind", "quick-read", "md-cache", "nl-cache"),
)

#: Of a client that believes for seconds what it knows of names, sizes and contents, whatever is listed,
#: opened or read meanwhile: the kernel's caches alone, for md-cache tells it of what a listing brings.
TRUSTING = (
    "--attribute-timeout=3",
    "--entry-timeout=3",
    "--use-readdirp=no",
    "--fopen-keep-cache=yes",
)
TRUSTING_CACHES = ("write-behind", "read-ahead", "io-cache", "open-behind", "quick-read")

#: Seconds for a daemon to answer: it takes a tenth on a quiet machine.
PATIENCE = 30.0

# Waits until its standard input ends, then takes away every mount point that was named there.
GUARD = (
    'points=; while read -r point; do points="$points $point"; done; umount -l $points 2>/dev/null'
)


@cache
def why_absent() -> str | None:
    """Why this machine cannot run GlusterFS; None if it can."""
    for program in ("glusterfsd", "glusterfs", "setpriv", "umount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    if os.geteuid() != 0:
        return "mounting needs root"
    try:
        with tempfile.TemporaryDirectory() as folder, Volume(Path(folder)) as volume:
            (volume.mount("tried") / "file").write_bytes(b"")
    except (OSError, GlusterFailed) as error:
        return f"a volume cannot be mounted here: {error}"
    return None


class GlusterFailed(AssertionError):
    """A daemon of the volume did not come up; the message holds its last lines."""


class Volume:
    """One brick and its mounts, below `folder`, which must be on a file system with trusted attributes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.brick = folder / "brick"
        self.mounts: dict[str, Path] = {}
        self._port = _free_port()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.brick.mkdir(parents=True)
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.start_brick()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def start_brick(self) -> None:
        """Start the brick's server, and wait until it listens and every mount answers (about 3 s)."""
        layers = [
            _layer("posix", "storage/posix", {"directory": str(self.brick)}),
            _layer("locks", "features/locks", {}, "posix"),
            _layer("threads", "performance/io-threads", {"thread-count": "4"}, "locks"),
            _layer(
                "server",
                "protocol/server",
                {
                    "transport-type": "tcp",
                    "transport.socket.bind-address": "127.0.0.1",
                    "transport.socket.listen-port": str(self._port),
                    "auth.addr.threads.allow": "127.0.0.1",
                },
                "threads",
            ),
        ]
        self._start("brick", "glusterfsd", layers)
        self._wait("brick", self._listens)
        for name, point in self.mounts.items():
            self._wait(name, partial(_answers, point))

    def kill_brick(self) -> None:
        """SIGKILL the brick's server: it forgets every lock, its clients get errors or wait."""
        self._kill("brick")

    def pause_brick(self) -> None:
        """SIGSTOP the brick's server: what its clients ask for hangs, and is not to be interrupted."""
        self._daemons["brick"].send_signal(signal.SIGSTOP)

    def resume_brick(self) -> None:
        """Let it go on."""
        self._daemons["brick"].send_signal(signal.SIGCONT)

    def mount(self, name: str, caches: Sequence[str] = CACHES, options: Sequence[str] = ()) -> Path:
        """Mount the volume once more, as another machine would, and return the mount point.

        `options`: of its glusterfs process."""
        point = self.folder / f"mount-{name}"
        point.mkdir()
        remote = {
            "transport-type": "tcp",
            "remote-host": "127.0.0.1",
            "remote-port": str(self._port),
            "remote-subvolume": "threads",
        }
        layers = [_layer("client", "protocol/client", remote)]
        for above in caches:
            below = layers[-1].split()[1]
            layers.append(_layer(above, f"performance/{above}", {}, below))
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{point}\n".encode())
        self._guard.stdin.flush()
        self._start(name, "glusterfs", layers, *options, str(point))
        self._wait(name, partial(_answers, point))
        self.mounts[name] = point
        return point

    def hang(self, name: str) -> None:
        """Stop a mount's process: whatever touches the mount waits, until wake()."""
        self._daemons[name].send_signal(signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """Let a mount that hangs go on; harmless for one that does not."""
        self._daemons[name].send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Unmount, kill the daemons and wait for all of it; once more does nothing."""
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None
        for name in list(self._daemons):
            self._kill(name)
        self.mounts.clear()

    def _start(self, name: str, program: str, layers: list[str], *arguments: str) -> None:
        description = self.folder / f"{name}.vol"
        description.write_text("\n".join(layers))
        self._daemons[name] = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", program, "--no-daemon"),
                *("--volfile", str(description), "--log-file", str(self.folder / f"{name}.log")),
                *("--pid-file", str(self.folder / f"{name}.pid"), "--log-level", "WARNING"),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            ended = self._daemons[name].poll() is not None
            if ended or time.monotonic() > deadline:
                log = self.folder / f"{name}.log"
                lines = log.read_text(errors="replace").splitlines() if log.exists() else []
                said = "\n".join(lines[-10:])
                raise GlusterFailed(f"{name} {'ended' if ended else 'does not answer'}:\n{said}")
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self._port)) == 0

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGKILL)
        daemon.wait()


def _layer(name: str, kind: str, options: dict[str, str], *below: str) -> str:
    """Return one layer of a volume's description."""
    lines = [f"volume {name}", f"  type {kind}"]
    lines += [f"  option {option} {value}" for option, value in options.items()]
    lines += [f"  subvolumes {' '.join(below)}"] if below else []
    return "\n".join([*lines, "end-volume\n"])


def _answers(point: Path) -> bool:
    """Whether the volume answers there; a mount point whose client is not connected does not."""
    try:
        list(point.iterdir())
        return point.is_mount()
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
