"""The servers/ folder of the mount: a small file of two lines for each server, by which they meet.

    {"beat": 71, "change": 1234, "cluster": "10.0.0.7:8081", "data": ["10.0.0.7:8080"], "epoch": 3,
     "id": "9f86d081884c7d659a2feaa0c55ad015", "reaches": [], "role": "writer", "version": "0.1.0"}
    crc32c 9ae0daaf

Purpose: addresses, and the sign of life. A server replaces its file every so often; who looks measures,
by its own clock alone, for how long it has not changed. Nothing here decides who may write: a claim does.

Guarantees. The file of a writer is published by a rename out of its staging directory, so one that was
deposed cannot beat any more (rule F5): publish() then raises as any proof would. A file that is cut or
damaged, or is none, counts as one that does not change. Files are not synced: they say what is now.

A name that a listing lacks (a cache may, rule C4) is not reported, but its age goes on from what was seen.

Everything here may block for as long as the mount hangs: call it from a thread. Errors: OSError.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from pkgindex._core import crc32c
from pkgindex.store.mount import FILE_MODE, Mount, Staging, write_all

__all__ = ["CLEAN_SECONDS", "FOLDER", "Member", "Members", "Role", "Seen"]

FOLDER = "servers"
NAME = re.compile("[0-9a-f]{32}")
REMAINS = re.compile(r"[0-9a-f]{32}(\.new)?|secret\.new-[0-9a-f]+")  # what may be cleaned away

# Unchanged for so long, a file is of a server that has died without taking it away.
CLEAN_SECONDS = 3600.0

LARGEST = 1 << 16  # bytes; a file that is larger is none of ours


class Role(StrEnum):
    """What a server is to the others."""

    CLAIMING = "claiming"
    WRITER = "writer"
    FOLLOWER = "follower"
    HUNG = "hung"


@dataclass(frozen=True)
class Member:
    """What a server says of itself."""

    id: str  # random, of this process's life: its origin
    cluster: str  # where the other servers reach it, HOST:PORT
    data: tuple[str, ...]  # where clients do
    role: Role
    epoch: int
    change: int  # its position, with the epoch
    version: str
    reaches: tuple[str, ...] = ()  # the ids of those that it has streams with
    beat: int = 0  # one more in each file, so that each differs from the one before

    def encode(self) -> bytes:
        """The bytes of its file."""
        body = json.dumps(asdict(self), sort_keys=True).encode() + b"\n"
        return body + b"crc32c %08x\n" % crc32c(body)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a file. Raises ValueError if it is not whole, or not a member's; unknown fields are let be."""
        body, newline, rest = data.partition(b"\n")
        if rest != b"crc32c %08x\n" % crc32c(body + newline):
            raise ValueError("its checksum is wrong")
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("not a member")
        try:
            return cls(
                _text(fields["id"], NAME),
                _text(fields["cluster"]),
                tuple(_text(each) for each in _list(fields["data"])),
                Role(fields["role"]),
                _number(fields["epoch"]),
                _number(fields["change"]),
                _text(fields["version"]),
                tuple(_text(each, NAME) for each in _list(fields["reaches"])),
                _number(fields["beat"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a member: {error}") from None


def _text(value: Any, form: re.Pattern[str] = re.compile(r"[ -~]+")) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"not a name or an address: {value!r}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"not a list: {value!r}")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"not a number: {value!r}")
    return value


@dataclass(frozen=True)
class Seen:
    """A member, and for how many seconds the one who looks has seen no other file of it."""

    member: Member
    age: float


@dataclass
class _File:
    data: bytes | None  # None: it could not be read
    since: float


class Members:
    """The folder, as one server sees it and stands in it. For one thread at a time."""

    def __init__(self, mount: Mount, me: str) -> None:
        """`me`: the id of this server."""
        self._mount = mount
        self._me = me
        self._files: dict[str, _File] = {}  # by name

    def publish(self, member: Member, staging: Staging | None = None) -> None:
        """Replace this server's file; the writer gives its `staging`, and is thereby proven.

        Raises OSError: ENOENT or ESTALE for a writer that was deposed. The folder must be there."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        new = "member" if staging else self._mount.path(FOLDER, f"{self._me}.new")
        fd = os.open(new, flags, FILE_MODE, dir_fd=staging.fd if staging else None)
        try:
            write_all(fd, member.encode())
        finally:
            os.close(fd)
        if staging:
            staging.publish(new, FOLDER, self._me)
        else:
            os.rename(new, self._mount.path(FOLDER, self._me))

    def withdraw(self) -> None:
        """Take this server's file away: it stops. Raises OSError."""
        for name in (self._me, f"{self._me}.new"):
            with suppress(FileNotFoundError):
                os.unlink(self._mount.path(FOLDER, name))

    def look(self, now: float) -> list[Seen]:
        """All whole files of the folder, this server's own too. `now`: seconds of a clock that never goes
        back. Raises OSError when the folder cannot be listed."""
        found = []
        for name in filter(REMAINS.fullmatch, self._mount.names(FOLDER)):
            data = self._read(name)
            known = self._files.get(name)
            if known is None or data not in (known.data, None):
                known = self._files[name] = _File(data, now)
            if known.data is not None and NAME.fullmatch(name):
                with suppress(ValueError):
                    member = Member.parse(known.data)
                    if member.id == name:
                        found.append(Seen(member, now - known.since))
        return found

    def age(self, member: str, now: float) -> float | None:
        """For how long no other file of this member was seen, listed or not; None if none ever was."""
        known = self._files.get(member)
        return None if known is None else now - known.since

    def clean(self, now: float) -> list[str]:
        """Take away the files that look() has seen unchanged for CLEAN_SECONDS. Returns their names.

        A server that was paused that long makes its file again. What cannot be removed stays."""
        cleaned = []
        for name, known in list(self._files.items()):
            old = now - known.since >= CLEAN_SECONDS and name != self._me
            if old and self._read(name) in (known.data, None):
                try:
                    os.unlink(self._mount.path(FOLDER, name))
                    cleaned.append(name)
                except FileNotFoundError:
                    pass
                except OSError:
                    continue
                del self._files[name]
        return cleaned

    def _read(self, name: str) -> bytes | None:
        """A file's bytes by a path opened anew; None if it cannot be read: it may be gone by now."""
        try:
            with self._mount.opened(FOLDER, name) as fd:
                data = os.read(fd, LARGEST + 1)
                return data if len(data) <= LARGEST else b""
        except OSError:
            return None
