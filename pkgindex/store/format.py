"""FORMAT: what this store is, written when it is made (rule N3).

    pkgindex store 1
    {"compatible": [], "id": "5f0c…", "incompatible": [], "names": "percent", "shards": 256}
    crc32c 9ae0daaf

Guarantee: two servers that make the same store at once agree on one FORMAT, for link(2) lets only one
of them through, and both read it back. A store is made only in a folder that is empty or absent: an
unmounted mount point looks empty too, so a folder that /etc/fstab means to be mounted and is not is
refused unless the caller insists.

It changes once at most in a store's life for each feature that a release before would misread: require()
names it under "incompatible" before anything of it is written, and such a release then refuses the store,
even if it has read the old FORMAT: it reads it again after its fence.
"""

import errno
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pkgindex._core import crc32c
from pkgindex.errors import StoreDamaged, StoreUnreachable, UnknownFormat
from pkgindex.store.mount import FILE_MODE, FOLDER_MODE, Mount, Staging

__all__ = ["FOLDERS", "ORIGINS", "Format", "complete", "create", "opened", "read", "require"]

VERSION = 1
SHARDS = 256  # 1 million packages are 4,000 files a folder: quick to list, on any file system
ORIGINS = "origins"  # batches hold notes, and heads a table, that must not be dropped (rule F2)
FEATURES = frozenset({ORIGINS})  # incompatible ones that this release knows
FOLDERS = ("staging", "journal", "snapshot", "forward", "reverse")

# What may lie in a folder that still counts as empty.
HARMLESS = ("lost+found", ".snapshot", ".snapshots", ".glusterfs", ".trashcan")
UNFINISHED = "FORMAT.new-"


@dataclass(frozen=True)
class Format:
    """What FORMAT says."""

    id: str
    shards: int
    # Not compared: a store is the same one when it has got another feature.
    incompatible: tuple[str, ...] = field(default=(), compare=False)
    compatible: tuple[str, ...] = field(default=(), compare=False)

    def encode(self) -> bytes:
        """The bytes of the file."""
        fields = {
            "id": self.id,
            "shards": self.shards,
            "names": "percent",
            "incompatible": self.incompatible,
            "compatible": self.compatible,
        }
        body = f"pkgindex store {VERSION}\n{json.dumps(fields, sort_keys=True)}\n".encode()
        return body + b"crc32c %08x\n" % crc32c(body)


def opened(mount: Mount, *, insist: bool, also: tuple[str, ...] = ()) -> Format:
    """The store's format; a store is made where there is none, see create(). `also`: more folders that must
    not be links. Raises as read() and create() do, and OSError."""
    mount.check_folders(*FOLDERS, *also)
    fmt = read(mount) or create(mount, insist=insist)
    complete(mount)
    return fmt


def read(mount: Mount) -> Format | None:
    """Read FORMAT; None where there is none, and no store.

    Raises UnknownFormat for what another program or a later release wrote, StoreDamaged for a wrong
    checksum or where a store has lost it, StoreUnreachable when the system cannot read it."""
    path = mount.path("FORMAT")
    try:
        data = mount.once_shown(lambda: mount.read("FORMAT"), errno.ESTALE)
    except FileNotFoundError:
        _refuse_without(mount)
        return None
    except OSError as error:
        raise StoreUnreachable(f"{path}: cannot read it: {error.strerror}") from None
    lines = data.split(b"\n")
    if not lines[0].startswith(b"pkgindex store "):
        raise UnknownFormat(f"{path}: not a pkgindex store; name another folder")
    if lines[0] != b"pkgindex store %d" % VERSION:
        version = lines[0].removeprefix(b"pkgindex store ").decode("ascii", "replace")
        raise UnknownFormat(
            f"{path}: format {version} is not known to this release, which knows {VERSION}"
        )
    body = b"\n".join(lines[:2]) + b"\n"
    if len(lines) != 4 or lines[2] != b"crc32c %08x" % crc32c(body) or lines[3]:
        raise StoreDamaged(f"{path}: damaged (its checksum is wrong); restore it from a backup")
    fields = json.loads(lines[1])
    unknown = sorted(set(fields["incompatible"]) - FEATURES)
    if unknown or fields["names"] != "percent":
        raise UnknownFormat(
            f"{path}: needs a release that knows {', '.join(unknown) or fields['names']}"
        )
    return Format(
        fields["id"],
        fields["shards"],
        tuple(fields["incompatible"]),
        tuple(fields["compatible"]),
    )


def _refuse_without(mount: Mount) -> None:
    """Raise StoreDamaged for a store whose FORMAT is lost: one that is being made has it first of all."""
    try:
        there = mount.names()
    except OSError:
        return
    if "FORMAT" not in there and {"staging", "journal", "forward"}.issubset(there):
        raise StoreDamaged(
            f"{mount.path('FORMAT')}: missing, though the rest of a store is there: restore it from any "
            "backup of this store"
        )


def create(mount: Mount, *, insist: bool) -> Format:
    """Make a new store, or find that another has just made it.

    `insist`: even where nothing is mounted on a mount point. Raises StoreUnreachable."""
    root = mount.root
    waiting = _unmounted(root)
    if waiting and not insist:
        raise StoreUnreachable(
            f"{root}: nothing is mounted on {waiting}, which /etc/fstab means to be a mount: "
            "mount it, or make a new store there all the same with --create"
        )
    try:
        if not os.path.isdir(root):
            with suppress(FileExistsError):
                os.mkdir(root, FOLDER_MODE)
        there = mount.names_once_shown()
        others = [n for n in there if n not in HARMLESS and not n.startswith(UNFINISHED)]
        if others and "FORMAT" not in others:
            raise StoreUnreachable(
                f"{root}: not a pkgindex store and not empty (it has {others[0]!r}): name another folder"
            )
        if "FORMAT" not in others:
            _write(mount)
        mount.sync_folder()
    except OSError as error:
        raise StoreUnreachable(
            f"{error.filename or root}: cannot make a store here: {error.strerror}"
        ) from None
    made = read(mount)
    if made is None:
        raise StoreUnreachable(
            f"{root}: FORMAT was written and is not there: the mount loses files"
        )
    return made


def complete(mount: Mount) -> None:
    """Make the folders that are missing, and sync every name that the store hangs by.

    At each start: a process that was killed while it made the store has left names unsynced, and its
    successor would put acknowledged changes into folders that a power loss takes away. Raises OSError."""
    for folder in FOLDERS:
        mount.make_folder(folder)
    mount.sync_folder()
    with suppress(PermissionError):  # a parent that may not be opened was not made by us either
        Mount(os.path.dirname(mount.root)).sync_folder()


def require(mount: Mount, staging: Staging, feature: str) -> None:
    """Name an incompatible feature in FORMAT, durably, unless it is named already.

    By the store's writer, before it writes the first of what only such a release can read. Raises OSError,
    and what read() raises."""
    fmt = read(mount)
    if fmt is None:
        raise FileNotFoundError(2, "missing", mount.path("FORMAT"))
    if feature in fmt.incompatible:
        return
    named = replace(fmt, incompatible=tuple(sorted({*fmt.incompatible, feature})))
    fd = staging.create("format", named.encode())
    try:
        inode = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    staging.publish("format", "FORMAT")
    mount.sync_name("", "FORMAT", inode)


def _write(mount: Mount) -> None:
    mount.make_once(Format(secrets.token_hex(16), SHARDS).encode(), FILE_MODE, "FORMAT")


def _unmounted(root: str) -> str | None:
    """The mount point, at `root` or above it, that /etc/fstab names and nothing is mounted on."""
    try:
        with open("/etc/fstab", encoding="utf-8", errors="replace") as file:
            rows = [line.split() for line in file if not line.lstrip().startswith("#")]
    except OSError:
        return None
    for row in rows:
        if len(row) < 2 or not row[1].startswith("/") or row[1] == "/":
            continue
        point = row[1].rstrip("/")
        if (root + "/").startswith(point + "/") and not os.path.ismount(point):
            return point
    return None
