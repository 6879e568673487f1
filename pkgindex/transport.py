"""How a client reaches its server: an `Endpoint` is a TCP address or a Unix socket, and TLS over TCP.

    endpoint = Endpoint("tls://index.example:8443")
    sock = endpoint.connect(10.0)                       # non-blocking: BlockingIOError where it would wait
    reader, writer = await endpoint.open(10.0)          # the same for asyncio

Over TLS a connection means what it means without: `send` returns how many bytes are on their way, and of
what it has not returned the other side can read nothing. A connection that cannot be made raises
ClientError; `why_lost` words what ended one. Both say in one line what is wrong, and what to do about it.

The server's own listeners name their addresses by `pkgindex.config.parse_address`.
"""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, cast

from pkgindex.errors import ClientError

if TYPE_CHECKING:
    # Their imports take longer than a whole `pkgindex query`.
    import asyncio
    import ssl

__all__ = ["CLOSED", "Endpoint", "TLSSocket"]

_DEFAULT_PORT = 8080
_TLS = "tls://"
# The most that one record of TLS carries (RFC 8446, 5.1).
_RECORD = 16 * 1024

CLOSED = "the server closed it"
_NEW_CERTIFICATE = "the server needs a new one, unless a clock is wrong"
_OTHER_NAME = "call the server by a name that its certificate has"
_TRUST = "name the CA that signed it (--tls-ca, or in the context of tls=)"
_SHOW = "does it want a certificate of this client, from a CA that it trusts (--tls-cert, or tls=)?"
_SPEAKS_TLS = "does the server speak TLS there?"
_WANTS_TLS = "does it want TLS (tls:// before its name), or no clients from here?"

# What to do about a certificate, by OpenSSL's X509_V_ERR_...: not yet valid, expired, other name, other IP.
_ADVICE = {9: _NEW_CERTIFICATE, 10: _NEW_CERTIFICATE, 62: _OTHER_NAME, 64: _OTHER_NAME}
# How a server's alert about the client's certificate is called. TLS 1.2 has one for all that fails.
_REFUSED = re.compile(
    r"ALERT.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|DECRYPT_ERROR|ACCESS_DENIED)"
)


class Endpoint:
    """Where a server is, and whether it is spoken to over TLS."""

    def __init__(self, name: str, tls: ssl.SSLContext | None = None) -> None:
        """Only reads the name: HOST:PORT, [IPV6]:PORT, HOST (port 8080) or unix:PATH.

        With `tls://` before it, or with a context, TLS is spoken; by default a context that trusts
        what the system trusts. Raises ClientError for any other name, and for a Unix socket with TLS.
        """
        self.name = name
        self._where = _where(name)
        if tls is None and name.startswith(_TLS):
            import ssl

            tls = ssl.create_default_context()
        if tls is not None and isinstance(self._where, str):
            raise ClientError(f"{name}: a Unix socket has no TLS")
        self._tls = tls

    def connect(self, seconds: float | None) -> socket.socket | TLSSocket:
        """A non-blocking connection. Raises ClientError if there is none after so many seconds."""
        try:
            if isinstance(self._where, str):
                return _connected_unix(self._where, seconds)
            sock = socket.create_connection(self._where, seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                sock.setblocking(False)
                return sock
            # Its handshake has the same time again; a failure closes the socket.
            return TLSSocket(self._tls.wrap_socket(sock, server_hostname=self._where[0]))
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name.
            raise self._unreachable(error) from error

    async def open(
        self, seconds: float | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As `connect`, for asyncio."""
        import asyncio

        try:
            async with asyncio.timeout(seconds):
                if isinstance(self._where, str):
                    return await asyncio.open_unix_connection(self._where)
                return await asyncio.open_connection(*self._where, ssl=self._tls)
        except (OSError, UnicodeError) as error:
            raise self._unreachable(error) from error

    def why_lost(self, error: OSError, answered: bool) -> str:
        """What ended a connection, on which the server has `answered` something or not.

        One that refuses a client for its certificate, or because it speaks no TLS, may do so by
        closing, and in TLS 1.3 only when the client takes the connection for made.
        """
        if _alerted(error):
            return f"{_reason(error)}; {_SHOW}"
        if answered or isinstance(self._where, str) or not _closed(error):
            return _reason(error)
        return f"{_reason(error)} before any answer: {_WANTS_TLS if self._tls is None else _SHOW}"

    def _unreachable(self, error: OSError | UnicodeError) -> ClientError:
        why = "no answer in time" if isinstance(error, TimeoutError) else _reason(error)
        return ClientError(f"cannot connect to {self.name}: {why}; {self._advice(error)}")

    def _advice(self, error: OSError | UnicodeError) -> str:
        if code := getattr(error, "verify_code", 0):
            return _ADVICE.get(code, _TRUST)
        if self._tls is not None:
            import ssl

            if _alerted(error):
                return _SHOW
            if _closed(error):
                return f"{_SPEAKS_TLS} if so, {_SHOW}"
            if isinstance(error, ssl.SSLError | TimeoutError):
                return _SPEAKS_TLS
        return "is the server running there?"


class TLSSocket:
    """A non-blocking TLS socket that says BlockingIOError when it would have to wait, as a plain one."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Takes over a socket whose handshake is done."""
        import ssl

        sock.setblocking(False)
        self._socket = sock
        self._waits = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.fileno = sock.fileno
        self.close = sock.close

    def send(self, data: memoryview) -> int:
        """Sends one record's worth at most. After BlockingIOError the same data must come again.

        Of more, OpenSSL would send the first records, and say of the whole that it has to wait.
        """
        try:
            return self._socket.send(data[:_RECORD])
        except self._waits:
            raise BlockingIOError from None

    def recv(self, size: int) -> bytes:
        """As a socket's. A `size` of a record or more leaves nothing behind that poll() does not see."""
        try:
            return self._socket.recv(size)
        except self._waits:
            raise BlockingIOError from None


def _where(name: str) -> str | tuple[str, int]:
    """The path of a Unix socket, or (host, port). Raises ClientError for what is neither."""
    server = name.removeprefix(_TLS)
    if server.startswith("unix:") and len(server) > len("unix:"):
        return server.removeprefix("unix:")
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", server)
    if match is None or not 0 < (port := int(match[3] or _DEFAULT_PORT)) < 65536:
        raise ClientError(
            f"{name!r} names no server: write HOST:PORT, [IPV6]:PORT or unix:PATH, or tls://HOST:PORT"
        )
    return match[1] or match[2], port


def _connected_unix(path: str, seconds: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(seconds)
        sock.connect(path)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _closed(error: OSError | UnicodeError) -> bool:
    """Whether the other side has just ended it, with or without a goodbye."""
    return isinstance(error, ConnectionResetError | BrokenPipeError) or (
        _openssl(error) in ("UNEXPECTED_EOF_WHILE_READING", "EOF occurred in violation of protocol")
    )


def _alerted(error: OSError | UnicodeError) -> bool:
    """Whether the server said that it refuses this client's certificate, or the lack of one."""
    return _REFUSED.search(_openssl(error)) is not None


def _openssl(error: OSError | UnicodeError) -> str:
    """OpenSSL's name of what is wrong; empty for an error that is none of TLS."""
    if isinstance(error, UnicodeError):
        return ""
    return cast("str | None", getattr(error, "reason", None)) or ""


def _reason(error: OSError | UnicodeError) -> str:
    if why := getattr(error, "verify_message", None):
        return f"its certificate is not to be trusted: {why.rstrip('.')}"
    if why := _openssl(error):
        return CLOSED if _closed(error) else f"TLS: {why.replace('_', ' ').lower()}"
    # str() of a plain OSError starts with "[Errno N]", which tells a user nothing. Of a connection that
    # ends in the handshake asyncio raises one without any text.
    return getattr(error, "strerror", None) or str(error) or CLOSED
