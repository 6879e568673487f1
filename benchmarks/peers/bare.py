"""A bare uvloop Protocol that answers OK to every line: the limit of the runtime below pkgindex.

Usage: python bare.py PORT
"""

import asyncio
import gc
import sys

import uvloop


class Ok(asyncio.Protocol):
    """Count the line ends of what came; answer as many OKs."""

    __slots__ = ("transport",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"OK\n" * data.count(b"\n"))  # type: ignore[attr-defined]


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Ok, "127.0.0.1", port, backlog=4096)
    gc.freeze()
    await server.serve_forever()


uvloop.run(main(int(sys.argv[1])))
