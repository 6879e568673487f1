"""One thing that `load` reads: a file or standard input, decompressed as it is read.

Compression is told by the first bytes, never by the name: gzip, xz, zstd, lz4 or none.
"""

from __future__ import annotations

import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

import lz4.frame
import zstandard

from pkgindex.errors import ClientError

__all__ = ["STDIN", "BrokenInput", "Source", "open_source"]

STDIN: Final = "-"
# Enough to tell a format by: no paragraph of a real Packages file has its version further in.
HEAD_SIZE: Final = 64 * 1024
_MAGIC_SIZE: Final = 6
_PIECE_SIZE: Final = 256 * 1024


class BrokenInput(ClientError):
    """An input cannot be read, or is not what its format asks for; the message says where."""


@dataclass(frozen=True)
class Source:
    """An input: how it is called before the user, what it begins with, and its bytes from there."""

    name: str
    head: bytes
    stream: BinaryIO

    def broken(self, line: int, what: str) -> BrokenInput:
        """The error to raise for what is wrong with a line, counted from 1."""
        return BrokenInput(f"{self.name}:{line}: {what}")


@contextmanager
def open_source(path: str, on_read: Callable[[int], object] = lambda _: None) -> Iterator[Source]:
    """Opens a path, or standard input for `-`.

    `on_read` is called with the number of bytes, still compressed, of each read. Raises BrokenInput
    if the path cannot be opened; reading raises it for bytes that do not decompress.
    """
    name = "standard input" if path == STDIN else path
    try:
        file = sys.stdin.buffer if path == STDIN else Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise BrokenInput(f"{name}: {error.strerror}") from error

    def stored() -> Iterator[bytes]:
        while data := file.read(_PIECE_SIZE):
            on_read(len(data))
            yield data

    try:
        magic, stream = _begun(stored(), name, "cannot be read", _MAGIC_SIZE)
        head, stream = _begun(*_decompressed(magic, stream, name), HEAD_SIZE)
        yield Source(name, head, stream)
    finally:
        if path != STDIN:
            file.close()


class _Stream(io.RawIOBase):
    """A stream of what an iterator yields; in its errors it says what of which input is wrong."""

    def __init__(self, pieces: Iterator[bytes], name: str, wrong: str) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._name = name
        self._wrong = wrong

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                self._rest = memoryview(next(self._pieces))
        except StopIteration:
            return 0
        except BrokenInput:
            raise
        except Exception as error:  # Each library has its own, lz4 even a plain RuntimeError.
            raise BrokenInput(f"{self._name}: {self._wrong}: {error}") from error
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def _begun(
    pieces: Iterator[bytes], name: str, wrong: str, size: int
) -> tuple[bytes, io.BufferedReader]:
    """The first bytes, fewer than `size` only if there are no more; and a stream of all bytes."""
    stream = io.BufferedReader(_Stream(pieces, name, wrong), _PIECE_SIZE)
    head = stream.read(size)
    whole = chain([head], _pieces(stream.read1))
    return head, io.BufferedReader(_Stream(whole, name, wrong), _PIECE_SIZE)


def _pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    return iter(lambda: read(_PIECE_SIZE), b"")


def _decompressed(
    magic: bytes, stored: io.BufferedReader, name: str
) -> tuple[Iterator[bytes], str, str]:
    """The pieces of what is stored, and the arguments of `_begun` that say whose they are."""
    if magic.startswith(b"\x1f\x8b"):
        return _pieces(gzip.GzipFile(fileobj=stored).read1), name, "broken gzip data"
    if magic.startswith(b"\xfd7zXZ\x00"):
        return _pieces(lzma.LZMAFile(stored).read1), name, "broken xz data"
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_pieces(stored), name, "broken zstd data"
    if magic.startswith(b"\x04\x22\x4d\x18"):
        return _pieces(lz4.frame.LZ4FrameFile(stored).read1), name, "broken lz4 data"
    return _pieces(stored.read1), name, "cannot be read"


def _zstd_pieces(stored: io.BufferedReader) -> Iterator[bytes]:
    # Not zstandard's own stream reader: that one takes a file cut short for a whole one.
    frame = None
    for piece in _pieces(stored.read1):
        data = piece
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends in the middle")
