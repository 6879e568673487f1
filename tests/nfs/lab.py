"""Three machines: one serves a folder over NFSv4.1, two mount it.

    with Lab(folder) as lab:
        lab.clients["a"].run("ls", lab.MOUNT)
        lab.cut("a", "mount"); lab.join("a", "mount")

The cables: each client has one to the server ("mount"), and one to the other ("peer"). Locks and opens that
a client does not renew for LEASE seconds are the server's to give to others; for as long after its start the
server waits for those who had some.
"""

from __future__ import annotations

import base64
import io
import shutil
import socket
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.nfs.image import built, program
from tests.nfs.machine import Link, Machine
from tests.nfs.remote import DATA_PORT

__all__ = ["LEASE", "MOUNT", "PEERS", "Lab"]

EXPORT, MOUNT = "/export", "/mnt"
LEASE = 10  # seconds; nfsd takes no less

SERVER_NETS = {"a": "10.9.1", "b": "10.9.2"}  # server: .1, client: .2
PEER_NET = "10.9.3"
PEERS = {"a": f"{PEER_NET}.1", "b": f"{PEER_NET}.2"}

# What an operator would write into fstab, but for the time-out: hard, for a mount that gives up loses data.
OPTIONS = "vers=4.1,hard,timeo=50,retrans=2"

SERVE = f"""
set -e
# No delegations: a machine that froze would keep those that it has, and whoever replaces such a file waits
# for as long as a lease, and with it all that is about the same folder.
echo 0 > /proc/sys/fs/leases-enable
modprobe nfsd
mount -t nfsd nfsd /proc/fs/nfsd
mkdir -p /run/rpcbind /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs
mount -t rpc_pipefs sunrpc /var/lib/nfs/rpc_pipefs
echo '{EXPORT} *(rw,sync,no_root_squash,no_subtree_check,fsid=0,insecure)' > /etc/exports
exportfs -ra
rpc.mountd
rpc.nfsd --no-nfs-version 3 --grace-time {LEASE} --lease-time {LEASE} 8
"""


class Lab:
    """The machines and what connects them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Machine
        self.clients: dict[str, Machine] = {}
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Self:
        try:
            self._build()
            for machine in self.machines():
                machine.start()
            self.server.wait_until_up()
            self.server.run("bash", "-c", SERVE)
            for name in self.clients:
                self.mount(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Switch everything off; harmless once more."""
        for machine in self.machines():
            machine.power_off()
        for end in self._ends:
            end.close()

    def machines(self) -> Iterator[Machine]:
        """Every machine, the server first."""
        if self.clients:
            yield self.server
        yield from self.clients.values()

    def mount(self, name: str) -> None:
        """Wait for a client, and mount the export in it."""
        machine = self.clients[name]
        machine.wait_until_up()
        source = f"{SERVER_NETS[name]}.1:/"
        machine.run("mount", "-t", "nfs4", "-o", OPTIONS, source, MOUNT)

    def cut(self, name: str, cable: str) -> None:
        """Cut one of a client's cables."""
        self.clients[name].set_link(cable, up=False)

    def join(self, name: str, cable: str) -> None:
        """Mend one of a client's cables."""
        self.clients[name].set_link(cable, up=True)

    def lose_power(self, name: str) -> None:
        """Switch a client off, as it is."""
        self.clients[name].power_off()

    def start_again(self, name: str) -> None:
        """Switch a client on again, and mount the export."""
        self.clients[name].start()
        self.mount(name)

    def restart_nfsd(self, seconds: float) -> None:
        """Stop the server's threads, and start them after a while: every lock and open is to be reclaimed."""
        self.server.run("rpc.nfsd", "0")
        time.sleep(seconds)
        self.server.run("rpc.nfsd", "--no-nfs-version", "3", "8")

    def fetch(self, name: str) -> Path:
        """Copy a folder of the export here, as it truly is: no client's cache in between."""
        target = self.folder / "fetched"
        shutil.rmtree(target, ignore_errors=True)
        # As text, for the agent tells output and errors not apart; what changes meanwhile is no error.
        pack = f"tar -C {EXPORT} -c {name} 2> /dev/null | base64"
        packed = io.BytesIO(base64.b64decode(self.server.run("bash", "-c", pack)))
        with tarfile.open(fileobj=packed) as archive:
            archive.extractall(target, filter="data")
        return target / name

    def _build(self) -> None:
        image = built()
        disk = self.folder / "program"
        program(image, disk)

        def cable() -> tuple[socket.socket, socket.socket]:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            for end in ends:
                end.setblocking(False)
            self._ends += ends
            return ends

        mounts = {name: cable() for name in SERVER_NETS}
        peers = dict(zip(PEERS, cable(), strict=True))
        links = [Link(name, f"{SERVER_NETS[name]}.1/24", end) for name, (end, _) in mounts.items()]
        self.server = Machine("server", image, disk, self.folder, links)
        for name, peer in peers.items():
            to_server = Link("mount", f"{SERVER_NETS[name]}.2/24", mounts[name][1])
            to_peer = Link("peer", f"{PEERS[name]}/24", peer)
            self.clients[name] = Machine(
                name, image, disk, self.folder, [to_server, to_peer], [DATA_PORT]
            )
