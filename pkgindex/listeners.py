"""Where the server listens: its sockets, its certificate, and who gets through to the protocol.

Sockets are bound before the store is claimed and listened on after it is read: a server that cannot
listen deposes nobody. A TLS client holds a place among `--max-clients` from its first packet on, and has
HANDSHAKE_SECONDS to finish its handshake; then the protocol speaks through TLS and knows no difference,
but one: TLS has no half-closed connections (see Connection.eof_received).
"""

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from pkgindex import log
from pkgindex.config import Listener, Settings, parse_address, show_address
from pkgindex.errors import ConfigError, ListenError
from pkgindex.protocol import Connection

__all__ = ["Bound", "Handshake", "Tls", "as_bound", "bind_again", "bind_all", "close_all"]

DEFAULT_LISTEN = (Listener("127.0.0.1:8080"), Listener("[::1]:8080"))
EVERY_ADDRESS = ("0.0.0.0", "::")
SOCKET_MODE = 0o660

HANDSHAKE_SECONDS = 10.0  # on an honest line, a few round trips
TLS_BUFFER = 64 * 1024
FAREWELL_SECONDS = 5.0  # for a TLS client to say goodbye after the server did

logger = log.get_logger()


@dataclass
class Bound:
    """A socket, and the listener that it is of; one listener may have several."""

    socket: socket.socket
    listener: Listener
    path: str = ""  # of a Unix socket
    inode: int = 0

    @property
    def name(self) -> str:
        """The address as a client would write it, its port the real one."""
        if self.path:
            return f"unix:{self.path}"
        return show_address(*self.socket.getsockname()[:2])


def bind_all(settings: Settings) -> list[Bound]:
    """Sockets on every address to listen on. Raises ListenError."""
    bound: list[Bound] = []
    try:
        for listener in settings.listen:
            address = parse_address(listener.address)
            if isinstance(address, tuple):
                bound += _bind(listener, *address)
            else:
                bound.append(_bind_unix(listener, str(address)))
        if not settings.listen:
            for listener in DEFAULT_LISTEN:
                try:
                    bound += _bind(
                        listener, *cast("tuple[str, int]", parse_address(listener.address))
                    )
                except ListenError as error:
                    if not _lacks_family(error):
                        raise
                    logger.warning(
                        "address skipped", address=listener.address, reason="not of this machine"
                    )
        if not bound:
            raise ListenError("no address to listen on; name one with --listen")
    except ListenError:
        close_all(bound)
        raise
    return bound


def bind_again(bound: list[Bound]) -> list[Bound]:
    """For another server of this process's family: sockets of its own on the same addresses and ports,
    among which the kernel deals out new connections once both listen. Raises ListenError.

    A Unix socket cannot be had twice: it is one queue, from which all of them take."""
    made: list[Bound] = []
    try:
        for one in bound:
            if one.path:
                made.append(one)
                continue
            # Only now, so that the first bind has found out whether anybody else has the port.
            one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            address = one.socket.getsockname()
            again = _bind_one(one.socket.family, socket.SOCK_STREAM, 0, address, shared=True)
            made.append(Bound(again, one.listener))
    except OSError as error:
        close_all([one for one in made if not one.path])
        raise ListenError(
            f"{one.name}: cannot listen once more: {error.strerror}: leave --workers out"
        ) from error
    return made


def as_bound(bound: list[Bound]) -> tuple[Listener, ...]:
    """The listeners with the addresses and ports that they have really got."""
    return tuple(replace(one.listener, address=one.name) for one in bound)


def close_all(bound: list[Bound]) -> None:
    """Close sockets; a Unix socket's name goes too, unless another server has taken it over."""
    for one in bound:
        if one.path:
            with suppress(OSError):
                if os.lstat(one.path).st_ino == one.inode:
                    os.unlink(one.path)
        one.socket.close()


def _bind(listener: Listener, host: str, port: int) -> list[Bound]:
    """Sockets on every address that `host` means; the empty host is every address of the machine.

    Raises ListenError with the OSError as its cause."""
    found: list[socket.socket] = []
    try:
        for one in [host] if host else EVERY_ADDRESS:
            try:
                infos = socket.getaddrinfo(
                    one, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
                for family, kind, proto, _, address in infos:
                    # A free port is one port, whatever the number of addresses.
                    chosen = found[0].getsockname()[1] if found and not port else port
                    found.append(_bind_one(family, kind, proto, (address[0], chosen, *address[2:])))
            except OSError as error:
                if host or not _is_lacking(error):
                    raise
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for made in found:
            made.close()
        remedy = {
            errno.EADDRINUSE: "another server has it; stop that one or name another port",
            errno.EACCES: "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
        }.get(error.errno or 0, "name another address with --listen")
        raise ListenError(
            f"{listener.address}: cannot listen: {error.strerror}: {remedy}"
        ) from error
    return [Bound(made, listener) for made in found]


def _bind_one(
    family: int, kind: int, proto: int, address: tuple[str | int, ...], *, shared: bool = False
) -> socket.socket:
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        _keep_alive(found)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def _bind_unix(listener: Listener, path: str) -> Bound:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mode = SOCKET_MODE if listener.mode is None else listener.mode
    # Not by chmod: between the two anyone might connect, or put another file under that name.
    before = os.umask(0o777 & ~mode)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_listening(path):
                os.unlink(path)
        found.bind(path)
        return Bound(found, listener, path, os.lstat(path).st_ino)
    except OSError as error:
        found.close()
        raise ListenError(f"unix:{path}: cannot listen: {error.strerror}") from error
    finally:
        os.umask(before)


def _keep_alive(listener: socket.socket) -> None:
    """Let connections whose other end has vanished be found out, so that they hold no place for ever."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 300),
        (socket.TCP_KEEPINTVL, 30),
        (socket.TCP_KEEPCNT, 4),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_lacking(error: OSError) -> bool:
    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(
        error, socket.gaierror
    )


def _lacks_family(error: ListenError) -> bool:
    return isinstance(error.__cause__, OSError) and _is_lacking(error.__cause__)


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        return True


# --- TLS ------------------------------------------------------------------------------------------


class Tls:
    """The server's certificate and key, and the CAs of its clients, as they were last read."""

    def __init__(self, settings: Settings) -> None:
        """Read the files that the settings name. Raises ConfigError: which one, and what is wrong."""
        self._settings = settings
        self.context = self._read()

    @classmethod
    def of(cls, settings: Settings) -> "Tls | None":
        """What the listeners need: None if none of them has tls.

        Raises ConfigError, too, for a certificate that no listener would use: whoever names one means
        it, and would serve in the clear."""
        with_tls = [listener for listener in settings.listen if listener.tls]
        if with_tls and not settings.tls_cert:
            raise ConfigError(
                f"--listen {with_tls[0]}: tls needs a certificate: name its file, tls-cert"
            )
        if with_tls:
            return cls(settings)
        for key in ("tls_cert", "tls_key", "tls_client_ca"):
            if getattr(settings, key):
                raise ConfigError(
                    f"{key.replace('_', '-')} is set, but no listener has tls: write --listen ADDRESS,tls"
                )
        return None

    def reload(self) -> None:
        """Read the files again, for handshakes from now on. Blocks; raises ConfigError, and then the
        old ones stay."""
        self.context = self._read()

    def _read(self) -> ssl.SSLContext:
        cert, key, ca = (
            self._settings.tls_cert,
            self._settings.tls_key,
            self._settings.tls_client_ca,
        )
        for path in filter(None, (cert, key, ca)):
            try:
                with open(path, "rb") as file:
                    file.read(1)
            except OSError as error:
                raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            context.load_cert_chain(cert, key or None, _no_password)
        except ssl.SSLError as error:
            both = f"{cert} and {key}" if key else cert
            why = (
                "this key is not that certificate's"
                if error.reason == "KEY_VALUES_MISMATCH"
                else "not a certificate and its key, in PEM"
            )
            raise ConfigError(f"{both}: {why}") from None
        if ca:
            try:
                context.load_verify_locations(ca)
            except ssl.SSLError:
                raise ConfigError(f"{ca}: not the certificate of a CA, in PEM") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _no_password() -> str:
    raise ConfigError("the key of the certificate has a password; store it without one (mode 0600)")


class Handshake(asyncio.Protocol):
    """What stands before a connection until its TLS handshake is done."""

    def __init__(self, connection: Connection, tls: Tls) -> None:
        self._connection = connection
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place among the clients; then begin."""
        self._connection.connection_made(transport)
        if transport.is_closing():
            return
        handshake = asyncio.get_running_loop().start_tls(
            cast("asyncio.Transport", transport),
            cast("asyncio.BaseProtocol", self._connection),
            self._tls.context,
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=FAREWELL_SECONDS,
        )
        # Its first step here and now, not in a task: uvloop reads as soon as this returns, whether it was
        # paused or not, and what a quick client has sent by then would come to this object and be lost.
        handshake.send(None).add_done_callback(partial(self._done, transport, handshake))

    def connection_lost(self, exc: Exception | None) -> None:
        """It was closed at once: too many, or a stranger."""
        self._connection.connection_lost(exc)

    def _done(
        self,
        transport: asyncio.BaseTransport,
        handshake: Coroutine[asyncio.Future[None], None, asyncio.Transport | None],
        _waited_for: asyncio.Future[None],
    ) -> None:
        try:
            handshake.send(None)
        except StopIteration as end:
            if not transport.is_closing():
                # uvloop would keep 512 and 256 KiB of a client that does not read; bare TCP keeps 64.
                end.value.set_write_buffer_limits(TLS_BUFFER)
                end.value.set_read_buffer_limits(TLS_BUFFER)
                self._connection.secured(end.value)
                return
            why = "the client closed it"
        except OSError as error:  # ssl.SSLError is one; so is a handshake that takes too long
            why = str(error)
        logger.debug("no TLS handshake", reason=why)
        # uvloop tells the connection of this end in some cases only; to be told twice is no harm.
        self._connection.not_secured()
