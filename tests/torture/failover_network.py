"""Machines of a network that a test makes, and cuts: one network namespace for each seat of a cluster.

    with Network(3) as network:
        network.inside(0)                   # what goes before a command that is to run there
        network.address(0, SERVERS)         # where the others reach what listens there
        network.cut(0, SERVERS); network.mend(0, SERVERS)
        network.roughen(loss=0.02, delay=0.01)   # what the servers say to each other

Each seat has two cables, veth pairs: one to a switch between the servers, in a namespace of its own, which
delays and loses packets when it is told to (rough.py), and one to a bridge where this process is a client. A
cut is a link that is down: what is sent into it is gone, and neither end is told. The mount is a folder of
this machine, which no cut concerns. It needs root and iproute2.

Nothing is left behind: a guard, which notices by the end of a pipe that this process is gone, takes all away.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from types import TracebackType
from typing import Self

__all__ = ["CLIENTS", "SERVERS", "Network", "why_absent"]

SERVERS, CLIENTS = "servers", "clients"

# Networks for measurements (RFC 2544): no machine's own.
BETWEEN_SERVERS, TO_CLIENTS = "198.19.0", "198.18.{}"

#: Of the networks of this process: two may be there at a time.
_numbers = itertools.count()

GUARD = 'all=; while read -r line; do all="$line; $all"; done; eval "$all" 2>/dev/null'


@cache
def why_absent() -> str | None:
    """Why this machine cannot make networks; None if it can."""
    if shutil.which("ip") is None:
        return "ip is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network can be made here: {error.stderr.strip()}"


class Network:
    """Some seats and their cables."""

    def __init__(self, seats: int) -> None:
        self.seats = seats
        number = next(_numbers)
        tag = (
            f"{os.getpid()}{chr(ord('a') + number % 26)}"  # a link's name has 15 characters at most
        )
        self._clients = TO_CLIENTS.format((os.getpid() + 97 * number) % 250)
        self._hub, self._bridge = f"pkgindex-{tag}", f"pki{tag}"
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away."""
        if self._switch is not None:
            self._switch.communicate()
        self._guard.communicate()

    def _make(self) -> None:
        self._namespace(self._hub)
        self._later(f"ip link del {self._bridge}")
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._clients}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for seat in range(self.seats):
            self._namespace(self._seat(seat))
            self._cable(seat, SERVERS, "-n", self._hub)
            self._cable(seat, CLIENTS)
        ends = [self._end(seat, SERVERS) for seat in range(self.seats)]
        command = [sys.executable, "-m", "tests.torture.rough", *ends]
        self._switch = subprocess.Popen(
            ["ip", "netns", "exec", self._hub, *command], stdin=subprocess.PIPE, text=True
        )

    def _namespace(self, name: str) -> None:
        self._later(f"ip netns del {name}")
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _cable(self, seat: int, which: str, *at: str) -> None:
        """From a seat to where a switch is: `at` this namespace, or here."""
        theirs, ours, inside = self._seat(seat), self._end(seat, which), which
        _ip(*at, "link", "add", ours, "type", "veth", "peer", "name", inside, "netns", theirs)
        if not at:
            _ip("link", "set", ours, "master", self._bridge)
        _ip(*at, "link", "set", ours, "up")
        _ip("-n", theirs, "addr", "add", f"{self.address(seat, which)}/24", "dev", inside)
        _ip("-n", theirs, "link", "set", inside, "up")

    def _later(self, command: str) -> None:
        """What is to be done at the end."""
        assert self._guard.stdin is not None
        self._guard.stdin.write(command + "\n")
        self._guard.stdin.flush()

    def _seat(self, seat: int) -> str:
        return f"{self._hub}-{seat}"

    def _end(self, seat: int, which: str) -> str:
        return f"{self._bridge}{which[0]}{seat}"

    def address(self, seat: int, which: str) -> str:
        """The address of a seat, as others on that network know it."""
        return f"{BETWEEN_SERVERS if which == SERVERS else self._clients}.{seat + 1}"

    def inside(self, seat: int) -> list[str]:
        """What goes before a command that is to run in this seat."""
        return ["ip", "netns", "exec", self._seat(seat)]

    def cut(self, seat: int, *cables: str) -> None:
        """Let nothing through any more."""
        for which in cables:
            self._set(seat, which, "down")

    def mend(self, seat: int, *cables: str) -> None:
        """Undo it; harmless for a cable that is whole."""
        for which in cables:
            self._set(seat, which, "up")

    def roughen(self, *, loss: float, delay: float) -> None:
        """Let the network between the servers lose a share of the packets, and delay the others by so many
        seconds in the mean; none of both: let it be good again."""
        assert self._switch is not None
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps({"loss": loss, "delay": delay}) + "\n")
        self._switch.stdin.flush()

    def _set(self, seat: int, which: str, state: str) -> None:
        at = ["-n", self._hub] if which == SERVERS else []
        _ip(*at, "link", "set", self._end(seat, which), state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
