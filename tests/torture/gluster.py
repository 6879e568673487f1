"""A real GlusterFS volume, mounted as often as a test wants, each mount a client with caches of its own.

    with Volume(folder) as volume:
        a, b = volume.mount("a"), volume.mount("b")
        (a / "file").write_bytes(b"x")            # and b sees it, when its caches let it
        volume.kill_brick(); volume.start_brick()

Every mount stands for a machine: its own glusterfs process, its own caches, its own owner of locks. There
is no glusterd: one brick (storage/posix, features/locks, protocol/server) on a free loopback port, and
clients that find it there. `brick` is the folder behind it, where a test sees what is, with no cache in
between. It needs root, /dev/fuse and Debian's glusterfs-server.

    with Volume(folder, bricks=3, arbiter=True) as volume:
        volume.kill_brick(1); …; volume.start_brick(1); volume.wait_until_healed()

Several bricks are copies of one another (cluster/replicate in each client), which GlusterFS's own daemon
heals. Of an arbiter there are names alone.

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
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = [
    "CACHES",
    "EVERY_CACHE",
    "TRUSTING",
    "TRUSTING_CACHES",
    "GlusterFailed",
    "Volume",
    "why_absent",
]

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

#: Where a brick keeps what it knows that others lack.
INDICES = ".glusterfs/indices"

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
    """Bricks and their mounts, below `folder`, which must be on a file system with trusted attributes."""

    def __init__(
        self,
        folder: Path,
        bricks: int = 1,
        *,
        arbiter: bool = False,
        quorum: str = "auto",
        heals: bool = True,
    ) -> None:
        """`arbiter`: the last brick has no contents. `quorum`: the option cluster.quorum-type; with `auto`
        more than half of the bricks decide, or half of them with the first. `heals`: a daemon does."""
        self.folder = folder
        self.bricks = [folder / f"brick-{number}" for number in range(bricks)]
        self.brick = self.bricks[0]
        self.mounts: dict[str, Path] = {}
        self._arbiter = self.bricks[-1] if arbiter else None
        self._quorum = quorum
        self._heals = heals and bricks > 1
        self._ports = [_free_port() for _ in self.bricks]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for brick in self.bricks:
            (brick / INDICES).mkdir(parents=True)  # what a brick knows that others lack
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            for number in range(len(self.bricks)):
                self.start_brick(number)
            if self._heals:
                self._heal()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def start_brick(self, number: int = 0) -> None:
        """Start a brick's server, and wait until it listens and every mount has it again (about 3 s).

        What it missed is not healed then."""
        name, brick, port = f"brick-{number}", self.bricks[number], self._ports[number]
        layers = [_layer("posix", "storage/posix", {"directory": str(brick)})]
        if brick == self._arbiter:
            layers.append(_layer("arbiter", "features/arbiter", {}, "posix"))
        layers += [
            _layer("locks", "features/locks", {}, _top(layers)),
            _layer("threads", "performance/io-threads", {"thread-count": "4"}, "locks"),
            _layer(
                "index",
                "features/index",
                {
                    "index-base": str(brick / INDICES),
                    "xattrop-dirty-watchlist": "trusted.afr.dirty",
                    "xattrop-pending-watchlist": "trusted.afr.copy-",
                },
                "threads",
            ),
            _layer(
                "server",
                "protocol/server",
                {
                    "transport-type": "tcp",
                    "transport.socket.bind-address": "127.0.0.1",
                    "transport.socket.listen-port": str(port),
                    "auth.addr.index.allow": "127.0.0.1",
                },
                "index",
            ),
        ]
        self._start(name, "glusterfsd", layers)
        self._wait(name, partial(_listens, port))
        for mount, point in self.mounts.items():
            self._wait(mount, partial(_has, point, number))

    def kill_brick(self, number: int = 0) -> None:
        """SIGKILL a brick's server: it forgets every lock. If it was one too many, clients get errors."""
        self._kill(f"brick-{number}")

    def pause_brick(self, number: int = 0) -> None:
        """SIGSTOP a brick's server: what its clients ask for hangs, and is not to be interrupted."""
        self._daemons[f"brick-{number}"].send_signal(signal.SIGSTOP)

    def resume_brick(self, number: int = 0) -> None:
        """Let it go on."""
        self._daemons[f"brick-{number}"].send_signal(signal.SIGCONT)

    def wait_until_healed(self) -> None:
        """Wait until no brick lacks anything: none has noted that another does, and all hold the same.

        All of them must run, and nobody may be about to write. What the daemon has put off it is told to
        try again, as by `gluster volume heal`. Raises GlusterFailed."""
        began = told = time.monotonic()
        while lack := self._lacks():
            now = time.monotonic()
            if now > began + PATIENCE:
                raise GlusterFailed(f"not healed within {PATIENCE:.0f} s: {lack}")
            if self._heals and now > told + 2.0:
                self._kill("healer")
                self._heal()
                told = now
            time.sleep(0.05)

    def _lacks(self) -> str:
        """What keeps the bricks from being the same."""
        for brick in self.bricks:
            for kind in ("xattrop", "dirty"):
                noted = [path.name for path in (brick / INDICES / kind).glob("*")]
                if left := [name for name in noted if not name.startswith(kind)]:
                    return f"{brick.name} has noted {', '.join(left[:4])} ({kind})"
        first = _contents(self.brick)
        for brick in self.bricks[1:]:
            found = _contents(brick)
            differ = {
                path
                for path in first.keys() | found.keys()
                if (first.get(path) != found.get(path))
                and not (brick == self._arbiter and path in first and path in found)
            }
            if differ:
                return f"{brick.name} has otherwise {', '.join(sorted(differ)[:4])}"
        return ""

    def mount(self, name: str, caches: Sequence[str] = CACHES, options: Sequence[str] = ()) -> Path:
        """Mount the volume once more, as another machine would, and return the mount point.

        `options`: of its glusterfs process."""
        point = self.folder / f"mount-{name}"
        point.mkdir()
        layers = self._clients()
        for above in caches:
            layers.append(_layer(above, f"performance/{above}", {}, _top(layers)))
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{point}\n".encode())
        self._guard.stdin.flush()
        self._start(name, "glusterfs", layers, *options, str(point))
        for number in range(len(self.bricks)):
            if f"brick-{number}" in self._daemons:
                self._wait(name, partial(_has, point, number))
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

    def _clients(self, **options: str) -> list[str]:
        """The layers of a client that lead to the bricks; `options` are the replication's."""
        layers = [
            _layer(
                f"client-{number}",
                "protocol/client",
                {
                    "transport-type": "tcp",
                    "remote-host": "127.0.0.1",
                    "remote-port": str(port),
                    "remote-subvolume": "index",
                },
            )
            for number, port in enumerate(self._ports)
        ]
        if len(layers) == 1:
            return layers
        numbers = range(len(layers))
        replication = {
            "afr-pending-xattr": ",".join(f"copy-{number}" for number in numbers),
            "quorum-type": self._quorum,
        }
        replication |= {"arbiter-count": "1"} if self._arbiter else {}
        below = [f"client-{number}" for number in numbers]
        return [*layers, _layer("copies", "cluster/replicate", replication | options, *below)]

    def _heal(self) -> None:
        """Start the daemon that heals, as glusterd would; it begins with what there is to heal."""
        what = dict.fromkeys(("data-self-heal", "metadata-self-heal", "entry-self-heal"), "on")
        layers = self._clients(**{"iam-self-heal-daemon": "yes", "heal-timeout": "5"}, **what)
        layers.append(_layer("healer", "debug/io-stats", {}, "copies"))
        self._start("healer", "glusterfs", layers, "--process-name", "glustershd")

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


def _top(layers: list[str]) -> str:
    """The name of the last layer."""
    return layers[-1].split()[1]


def _contents(brick: Path) -> dict[str, bytes | None]:
    """All that a brick holds: of files, what is in them. It may change meanwhile."""
    found: dict[str, bytes | None] = {}
    for folder, folders, files in os.walk(brick):
        if ".glusterfs" in folders:
            folders.remove(".glusterfs")
        where = os.path.relpath(folder, brick)
        found[where] = None
        for name in files:
            with suppress(FileNotFoundError):
                found[f"{where}/{name}"] = Path(folder, name).read_bytes()
    return found


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _has(point: Path, number: int) -> bool:
    """Whether a mount answers, and has a connection to a brick."""
    try:
        client = (point / f".meta/graphs/active/client-{number}/private").read_text()
    except OSError:
        return False
    return "connected = 1" in client and _answers(point)


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
