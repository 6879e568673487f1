"""One virtual machine, and what may befall it.

    with Machine("a", image, program, folder, links=[Link("mount", "10.9.1.2/24", end)]) as machine:
        machine.wait_until_up()
        machine.run("mount", "-t", "nfs4", …)
        machine.set_link("mount", up=False); machine.freeze(); machine.power_off()

Software emulates it (TCG): where /dev/kvm is there it may still not work. All disks are thrown away with
it, so power_off() is a power loss. Its first network, which is never cut, leads from here to its ports; the
others are cables to one other machine each, two sockets joined for good: nothing has to be there first, and
nothing notices when the other end is gone. One that reads nothing, for it is frozen or off, takes a few
packets and then no more (were the sockets not joined, the sender's emulator would try again without end).

Time in a machine stands still while it is frozen: it wakes and does not know.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.nfs.image import Image

__all__ = ["Command", "Link", "Machine", "MachineFailed"]

#: Seconds for what takes 5 (its start) or none (a command) on a quiet machine.
PATIENCE = 120.0

MEMORY = 512  # MiB

#: What newer ones have costs an emulator more than it brings: 11 s of work for a start, and not 8.
CPU = "Nehalem"

AGENT_PORT = 9  # as in guest/agent.py


class MachineFailed(AssertionError):
    """A machine did not come up, or a command in it failed; the message holds the last lines."""


@dataclass(frozen=True)
class Link:
    """One end of a cable."""

    name: str
    address: str  # "10.9.1.2/24"
    end: socket.socket  # of a pair that is joined, for datagrams


class Machine:
    """A machine from its start to its end. It dies with the thread that started it."""

    def __init__(
        self,
        name: str,
        image: Image,
        program: Path,
        folder: Path,
        links: Sequence[Link] = (),
        ports: Sequence[int] = (),
    ) -> None:
        """`ports`: of programs in it, that are to be reached from here (see address())."""
        self.name = name
        self.image = image
        self.program = program
        self.folder = folder
        self.links = links
        self.console = folder / f"{name}.console"
        self._monitor_path = folder / f"{name}.monitor"
        self._ports = {port: _free_port() for port in (AGENT_PORT, *ports)}
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None

    def start(self) -> None:
        """Switch it on; wait for nothing."""
        assert self._process is None
        words = [f"lab.name={self.name}", "lab.eth0=10.0.2.15/24"]
        words += [f"lab.eth{n}={link.address}" for n, link in enumerate(self.links, 1)]
        forwards = [f"hostfwd=tcp:127.0.0.1:{here}-:{port}" for port, here in self._ports.items()]
        argv = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
        argv += ["-accel", "tcg,thread=multi", "-cpu", CPU, "-m", str(MEMORY)]
        argv += ["-display", "none", "-no-reboot", "-serial", f"file:{self.console}"]
        argv += ["-qmp", f"unix:{self._monitor_path},server,nowait"]
        argv += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)]
        argv += [
            "-append",
            " ".join(["console=ttyS0", "quiet", "panic=-1", "mitigations=off", *words]),
        ]
        for disk in (self.image.disk, self.program):
            argv += ["-drive", f"file={disk},if=virtio,format=raw,snapshot=on"]
        argv += ["-netdev", ",".join(["user", "id=here", "restrict=on", *forwards])]
        argv += ["-device", "virtio-net-pci,netdev=here"]
        for n, link in enumerate(self.links, 1):
            cable = f"dgram,id={link.name},local.type=fd,local.str={link.end.fileno()}"
            argv += ["-netdev", cable]
            # Two machines on a cable must not have one hardware address.
            hardware = f"52:54:00:{sum(self.name.encode()) & 255:02x}:00:{n:02x}"
            argv += ["-device", f"virtio-net-pci,netdev={link.name},mac={hardware}"]
        self._monitor_path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{self.name}.qemu").open("wb"),
            start_new_session=True,
            pass_fds=[link.end.fileno() for link in self.links],
        )

    def wait_until_up(self) -> None:
        """Wait until it runs commands. MachineFailed if it does not."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.run("true")
            except (OSError, EOFError):
                if time.monotonic() > deadline or not self.is_on:
                    raise MachineFailed(f"machine {self.name} is not up: {self._said()}") from None
                time.sleep(0.1)
            else:
                return

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._process is not None and self._process.poll() is None

    def address(self, port: int) -> tuple[str, int]:
        """Where one of its ports is reached from here."""
        return "127.0.0.1", self._ports[port]

    def run(self, *argv: str, seconds: float = PATIENCE) -> str:
        """Run a command in it and return what it prints. MachineFailed if it fails or does not end;
        OSError, EOFError if the machine is not up."""
        command = Command(self.address(AGENT_PORT), argv, seconds=seconds)
        said = command.read_all()
        if command.exit_code:
            raise MachineFailed(f"{argv[0]} failed in machine {self.name}: {said[-2000:].strip()}")
        return said

    # --- what may befall it -----------------------------------------------------------------------

    def set_link(self, name: str, *, up: bool) -> None:
        """Cut a cable, or mend it: the machine sees that its end is dead."""
        self._do("set_link", name=name, up=up)

    def freeze(self) -> None:
        """Stop it between two instructions."""
        self._do("stop")

    def thaw(self) -> None:
        """Let it go on."""
        self._do("cont")

    def power_off(self) -> None:
        """Take its power away; harmless once more."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    # --- the rest ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.power_off()

    def _do(self, what: str, **arguments: Any) -> None:
        if self._monitor is None:
            self._monitor = Monitor(self._monitor_path)
        self._monitor.do(what, arguments)

    def _said(self) -> str:
        paths = (self.folder / f"{self.name}.qemu", self.console)
        texts = [path.read_text(errors="replace").strip() for path in paths if path.exists()]
        return "\n".join(texts)[-2000:]


class Monitor:
    """QEMU's own control of a machine (QMP)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()  # its greeting
        self.do("qmp_capabilities", {})

    def do(self, what: str, arguments: Mapping[str, Any]) -> None:
        """Do something, and wait until it is done."""
        asked = {"execute": what, "arguments": arguments}
        self._socket.sendall(json.dumps(asked).encode() + b"\n")
        for line in self._lines:
            said = json.loads(line)
            if "error" in said:
                raise MachineFailed(f"{what}: {said['error']['desc']}")
            if "return" in said:
                return
        raise MachineFailed(f"{what}: the machine is gone")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Command:
    """A command in a machine. It ends with close(), or with its own end; see guest/agent.py."""

    def __init__(
        self,
        agent: tuple[str, int],
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> None:
        """`seconds`: how long what it prints is waited for. OSError, EOFError if the machine is not up."""
        self.exit_code: int | None = None
        self._socket = socket.create_connection(agent, PATIENCE)
        asked = {"argv": list(argv), "environment": dict(environment or {})}
        try:
            self._socket.sendall(json.dumps(asked).encode() + b"\n")
            self._output = self._socket.makefile("rb")
            line = self._output.readline()
            if not line:
                raise EOFError("the machine takes no commands")
        except BaseException:
            self._socket.close()
            raise
        self.pid: int = json.loads(line)["pid"]
        self._socket.settimeout(seconds)

    def lines(self) -> Iterator[bytes]:
        """Yield what it prints, to its end or the machine's, and know its exit code if it has one."""
        with suppress(OSError):
            for line in self._output:
                printed, ended, code = line.partition(b"\0")
                if printed:
                    yield printed
                if ended:
                    self.exit_code = json.loads(code)["exit"]

    def read_all(self) -> str:
        """Return all that it prints. MachineFailed if it does not end, or the machine does."""
        said = b"".join(self.lines()).decode(errors="replace")
        self.close()
        if self.exit_code is None:
            raise MachineFailed(f"a command did not end: {said[-2000:].strip()}")
        return said

    def close(self) -> None:
        """Kill it if it still runs."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
