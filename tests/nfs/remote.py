"""A `pkgindex serve` in a virtual machine, for whoever knows what a Server is.

    with Remote(machine, "file:/mnt/index", "--cluster", "10.9.3.1:7070") as server:
        with Wire(server.address) as wire: …

Here it is a process too, this module, which passes on what the server logs, signals, and its end. Killed, it
takes the server with it (guest/agent.py). When the machine is gone it ends by itself, with GONE; when that is
frozen, or its end would be, it waits. A SIGSTOP stops only what is here: freeze the machine.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from tests.nfs.image import PYTHON_PATH
from tests.nfs.machine import AGENT_PORT, Command, Machine
from tests.servers import Address, Server

__all__ = ["DATA_PORT", "GONE", "Remote"]

DATA_PORT = 8080
GONE = 99  # exit code

#: Seconds for a server to start or stop there: some on a quiet machine.
PATIENCE = 120.0

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Remote(Server):
    """One `pkgindex serve` in a machine that has DATA_PORT among its ports."""

    def __init__(self, machine: Machine, store: str, *options: str, **more: Any) -> None:
        super().__init__(store, *options, listen=f"0.0.0.0:{DATA_PORT}", patience=PATIENCE, **more)
        self._machine = machine
        at = self._command.index(sys.executable)
        port = str(machine.address(AGENT_PORT)[1])
        there = ["python3", *self._command[at + 1 :]]
        self._command[at + 1 :] = ["-m", "tests.nfs.remote", port, *there]

    @property
    def address(self) -> Address:
        """Where it is reached from here."""
        self.wait_for("serving")
        return self._machine.address(DATA_PORT)


def main(port: str, *argv: str) -> None:
    """Run a command in the machine whose agent is at this port, as if it were here."""
    address = ("127.0.0.1", int(port))
    command = Command(address, argv, {"PYTHONPATH": PYTHON_PATH})

    def pass_on(number: int, _frame: object) -> None:
        # Beside what is read: the machine may be frozen.
        argv = ["kill", f"-{number}", str(command.pid)]
        threading.Thread(target=lambda: Command(address, argv).read_all(), daemon=True).start()

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    for line in command.lines():
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
    code = GONE if command.exit_code is None else command.exit_code
    if code < 0:
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
