"""Do both ends of a cluster connection belong to one store? A secret on the mount, a challenge both ways.

The simple version would be to send the secret. What breaks it, and each version after it:

- who listens on the wire has the secret then: so only a MAC of a nonce is sent;
- who has recorded an exchange sends it again: so each side adds a nonce of its own;
- who sends a side's own challenge back to it, or to another connection of it, has it answer itself: so the
  MAC says which of the two roles it was made in;
- who belongs to another store, or speaks another version, is told apart only later: so both are in it too.

    the one that dials     CHALLENGE version, nonce
    the one that listens                             CHALLENGE version, nonce
    the one that dials     PROOF hmac("dials" …)
    the one that listens                             PROOF hmac("listens" …)

The one that dials proves itself first: a stranger that connects costs one small frame each way and
HANDSHAKE_SECONDS, and learns the version. What follows is neither encrypted nor sealed: the network between
the servers is one that the operator trusts with that (or use TLS on it).

Dials and Listens are pure: messages in, messages out. Their caller keeps the time-out, reads with a
frames.Reader of the limit SMALL until `trusted`, and closes the connection at NotTrusted.
"""

import hmac
import os
import re
import secrets
import stat
import struct

from pkgindex.cluster.frames import NONCE_BYTES, VERSION, Challenge, Message, Proof
from pkgindex.cluster.members import FOLDER
from pkgindex.errors import ConfigError, StoreDamaged, StoreUnreachable
from pkgindex.store.mount import Mount

__all__ = ["HANDSHAKE_SECONDS", "Dials", "Listens", "NotTrusted", "secret_of"]

HANDSHAKE_SECONDS = 5.0  # on any network that servers of one mount stand on

NAME = "secret"
SECRET_MODE = 0o600
SECRET_BYTES = 32


class NotTrusted(Exception):
    """The other side does not belong to this store, or not to this release: one line that says which.

    The line goes on from the other's address, which the caller knows.
    `reply`: what it is to be sent all the same before the connection is closed."""

    def __init__(self, reason: str, *reply: Message) -> None:
        super().__init__(reason)
        self.reply = reply


class _Handshake:
    """What both sides do."""

    _own_role: bytes
    _other_role: bytes

    def __init__(self, secret: bytes, store: str, nonce: bytes | None = None) -> None:
        """`store`: the id in FORMAT. `nonce`: 32 random bytes, never used before."""
        self._secret = secret
        self._store = bytes.fromhex(store)
        self._nonce = secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce
        self._other: bytes | None = None  # the other side's nonce
        self.trusted = False

    def heard(self, message: Message) -> list[Message]:
        """Take what the other side says; what to say to it. Raises NotTrusted."""
        if isinstance(message, Challenge) and self._other is None:
            return self._challenged(message)
        if isinstance(message, Proof) and self._other is not None and not self.trusted:
            if not hmac.compare_digest(message.mac, self._mac(self._other_role)):
                raise NotTrusted("does not know the secret of this store: is it of another store?")
            self.trusted = True
            return self._believed()
        raise NotTrusted(f"said {type(message).__name__.upper()} out of turn")

    def _challenged(self, challenge: Challenge) -> list[Message]:
        if challenge.version != VERSION:
            reason = f"speaks version {challenge.version} of the cluster protocol, not {VERSION}"
            raise NotTrusted(f"{reason}: run one release on all servers", *self._unlike())
        if hmac.compare_digest(challenge.nonce, self._nonce):
            raise NotTrusted("sends back what it is told")
        self._other = challenge.nonce
        return self._replies()

    def _challenge(self) -> Challenge:
        return Challenge(VERSION, self._nonce)

    def _proof(self) -> Proof:
        return Proof(self._mac(self._own_role))

    def _mac(self, role: bytes) -> bytes:
        assert self._other is not None
        nonces = [self._nonce, self._other]
        if isinstance(self, Listens):
            nonces.reverse()
        said = struct.pack("!16s16sH16s", b"pkgindex cluster", role, VERSION, self._store)
        return hmac.digest(self._secret, said + b"".join(nonces), "sha256")

    def _unlike(self) -> tuple[Message, ...]:
        raise NotImplementedError

    def _replies(self) -> list[Message]:
        raise NotImplementedError

    def _believed(self) -> list[Message]:
        raise NotImplementedError


class Dials(_Handshake):
    """The side that has connected. It sends begin() first."""

    _own_role = b"dials"
    _other_role = b"listens"

    def begin(self) -> list[Message]:
        """What to say first."""
        return [self._challenge()]

    def _unlike(self) -> tuple[Message, ...]:
        return ()

    def _replies(self) -> list[Message]:
        return [self._proof()]

    def _believed(self) -> list[Message]:
        return []


class Listens(_Handshake):
    """The side that was connected to. It says nothing before it has heard something."""

    _own_role = b"listens"
    _other_role = b"dials"

    def _unlike(self) -> tuple[Message, ...]:
        return (self._challenge(),)  # so that the other learns this side's version

    def _replies(self) -> list[Message]:
        return [self._challenge()]

    def _believed(self) -> list[Message]:
        return [self._proof()]


# --- the secret -----------------------------------------------------------------------------------


def secret_of(mount: Mount, *, make: bool = True) -> bytes:
    """The secret of this store, made if there is none: 64 hexadecimal digits in servers/secret.

    Servers that make it at once agree: link(2) lets one of them through, and all read it back. Without
    `make` nothing is written. Raises ConfigError if others than its owner may read it, or for a store
    without one that is not to be made; StoreDamaged, StoreUnreachable. Blocks."""
    path = mount.path(FOLDER, NAME)
    try:
        mount.check_folders(FOLDER)
        if make:
            mount.make_folder(FOLDER)
            if NAME not in mount.names_once_shown(FOLDER):
                _make(mount)
        elif FOLDER not in mount.names() or NAME not in mount.names(FOLDER):
            raise ConfigError(f"{mount.root}: no server has been started with --cluster on it")
        with mount.opened(FOLDER, NAME) as fd:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            data = os.read(fd, 4096)
    except OSError as error:
        raise StoreUnreachable(
            f"{error.filename or path}: cannot read or make the servers' secret: {error.strerror}"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"{path}: others than its owner may read it (mode {mode:04o}): chmod 600 it"
        )
    if not re.fullmatch(rb"[0-9a-f]{64}\n", data):
        raise StoreDamaged(
            f"{path}: damaged (not 64 hexadecimal digits): stop all servers and remove it; "
            "the first that starts makes a new one"
        )
    return bytes.fromhex(data.decode())


def _make(mount: Mount) -> None:
    mount.make_once(secrets.token_hex(SECRET_BYTES).encode() + b"\n", SECRET_MODE, FOLDER, NAME)
    with mount.opened(FOLDER, NAME) as fd:
        os.fsync(fd)  # through FUSE no folder's fsync reaches the server's disk, a file's does
    mount.sync_folder(FOLDER)
