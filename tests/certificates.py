"""Certificates for a test: a CA, and what it has signed, made by the openssl command.

authority = Authority(tmp_path)
server = authority.sign("server", "DNS:localhost,IP:127.0.0.1")
Server("memory:", "--tls-cert", str(server.cert), "--tls-key", str(server.key), listen=...)
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="no openssl command; on Debian: apt-get install openssl"
)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, each in a file."""

    cert: Path
    key: Path

    @property
    def options(self) -> list[str]:
        """How a server is told of it."""
        return ["--tls-cert", str(self.cert), "--tls-key", str(self.key)]


class Authority:
    """A CA of a test's own."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.name = name
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self.key, "-out", self.cert, "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign"),
        )

    def sign(
        self, name: str, names: str = "DNS:localhost,IP:127.0.0.1,IP:::1", days: int = 2
    ) -> Certificate:
        """Make a certificate for these names (as in subjectAltName); of -1 days it has expired."""
        made = Certificate(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", made.key, "-out", request, "-subj", f"/CN={name}"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key),
            *("-days", str(days), "-CAcreateserial", "-extfile", extensions, "-out", made.cert),
        )
        return made

    def trusting(self, shown: Certificate | None = None) -> ssl.SSLContext:
        """What a client needs that trusts this CA, and shows a certificate."""
        context = ssl.create_default_context(cafile=self.cert)
        if shown is not None:
            context.load_cert_chain(shown.cert, shown.key)
        return context


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
