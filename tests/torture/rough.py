"""A switch that delays packets and loses some: between the network devices of one namespace.

    ip netns exec NAMESPACE python -m tests.torture.rough DEVICE DEVICE …

It begins as a good switch. Each line on its standard input says how rough it is from then on, as JSON:
`{"loss": 0.03, "delay": 0.02}`, the share of frames that are lost and the mean of their delay in seconds,
which is uniform between none and twice that. No frame overtakes another on its way out of a device, so that
delay is delay and nothing else. The kernel's own emulation (netem) is a module that not every machine has.

Frames keep the header by which the kernel's virtual devices tell each other of checksums and segments that
are yet to be made (`struct virtio_net_hdr`), for the devices count on that.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import socket
import sys
import time
from collections import deque

__all__ = ["Switch"]

PROTOCOLS = 0x0003  # ETH_P_ALL
SOL_PACKET, PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR = 263, 23, 15
HEADER = 10  # bytes of a virtio_net_hdr
LARGEST = 1 << 17


class Switch:
    """Devices by number, the machines known behind each, and what is on its way."""

    def __init__(self, devices: list[str]) -> None:
        self.loss = self.delay = 0.0
        self._ports = [self._opened(device) for device in devices]
        self._behind: dict[bytes, int] = {}
        self._leaving: list[deque[tuple[float, bytes]]] = [deque() for _ in devices]

    @staticmethod
    def _opened(device: str) -> socket.socket:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.bind((device, PROTOCOLS))
        port.setblocking(False)
        return port

    def run(self) -> None:
        """Until the standard input ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin, selectors.EVENT_READ, -1)
            for number, port in enumerate(self._ports):
                selector.register(port, selectors.EVENT_READ, number)
            while True:
                for key, _ in selector.select(self._due_in()):
                    if key.data >= 0:
                        self._take(key.data)
                    elif not (told := os.read(sys.stdin.fileno(), LARGEST)):
                        return
                    else:
                        rough = json.loads(told.splitlines()[-1])
                        self.loss, self.delay = rough["loss"], rough["delay"]
                self._send_due()

    def _take(self, number: int) -> None:
        """Take in what has come to a device."""
        now = time.monotonic()
        while True:
            try:
                frame = self._ports[number].recv(LARGEST)
            except OSError:  # nothing more, or a cable that is cut
                return
            to, source = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
            self._behind[source] = number
            known = self._behind.get(to)
            for out in range(len(self._ports)) if known is None else (known,):
                if out != number and random.random() >= self.loss:
                    at = now + self.delay * 2 * random.random()
                    leaving = self._leaving[out]
                    leaving.append((max(at, leaving[-1][0]) if leaving else at, frame))

    def _due_in(self) -> float | None:
        due = [leaving[0][0] for leaving in self._leaving if leaving]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _send_due(self) -> None:
        now = time.monotonic()
        for port, leaving in zip(self._ports, self._leaving, strict=True):
            while leaving and leaving[0][0] <= now:
                try:
                    port.send(leaving.popleft()[1])
                except OSError:  # a cable that is cut, or full
                    continue


if __name__ == "__main__":
    Switch(sys.argv[1:]).run()
