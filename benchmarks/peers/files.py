"""What one would write in an afternoon: asyncio streams, dictionaries, one file per package.

A change is durable before its OK: temporary file, fsync, rename, fsync of the folder, on the event loop.
It is correct and it survives a crash; it only makes no use of there being many clients.

Usage: python files.py PORT FOLDER
"""

import asyncio
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote, unquote

NAME = re.compile(r"[!-+\--{}~]{1,255}")


class Store:
    """The packages, in memory and as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.directory = os.open(folder, os.O_RDONLY)
        self.dependencies: dict[str, set[str]] = {}
        self.dependents: dict[str, set[str]] = {}
        for path in folder.glob("*.package"):
            self.keep(unquote(path.stem), set(path.read_text().split()))

    def keep(self, name: str, dependencies: set[str]) -> None:
        for old in self.dependencies.get(name, ()):
            self.dependents[old].discard(name)
        for new in dependencies:
            self.dependents.setdefault(new, set()).add(name)
        self.dependencies[name] = dependencies

    def path(self, name: str) -> Path:
        return self.folder / (quote(name, safe="") + ".package")

    def index(self, name: str, dependencies: set[str]) -> bool:
        if not all(one in self.dependencies for one in dependencies):
            return False
        if self.dependencies.get(name) == dependencies:
            return True
        temporary = self.folder / "temporary"
        with temporary.open("w") as file:
            file.write("\n".join(sorted(dependencies)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path(name))
        os.fsync(self.directory)
        self.keep(name, dependencies)
        return True

    def remove(self, name: str) -> bool:
        if name not in self.dependencies:
            return True
        if self.dependents.get(name, set()) - {name}:
            return False
        self.path(name).unlink()
        os.fsync(self.directory)
        self.keep(name, set())
        del self.dependencies[name]
        return True

    def answer(self, line: bytes) -> bytes:
        try:
            command, name, listed = line.decode("ascii").removesuffix("\n").split("|")
        except ValueError:
            return b"ERROR\n"
        dependencies = listed.split(",") if listed else []
        if not all(NAME.fullmatch(one) for one in [name, *dependencies]):
            return b"ERROR\n"
        if command == "QUERY":
            done = name in self.dependencies
        elif command == "INDEX":
            done = self.index(name, set(dependencies))
        elif command == "REMOVE":
            done = self.remove(name)
        else:
            return b"ERROR\n"
        return b"OK\n" if done else b"FAIL\n"


async def main(port: int, folder: Path) -> None:
    store = Store(folder)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                writer.write(store.answer(line))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 20, backlog=4096)
    await server.serve_forever()


asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
