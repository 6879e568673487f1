"""TLS and mutual TLS, as clients meet them: whom the server lets in, and what differs from a plain line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pkgindex.cli import main
from pkgindex.client import Answer, AsyncClient, Client, index_message, query_message
from pkgindex.config import Listener, Settings
from pkgindex.errors import ClientError, ConfigError
from pkgindex.listeners import Tls
from tests.certificates import Authority, Certificate, needs_openssl
from tests.reference import ERROR, FAIL, OK
from tests.servers import Server, Wire, parse_address
from tests.test_limits import counters, resident

pytestmark = needs_openssl

LISTEN = "127.0.0.1:0,tls"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def certificate(ca: Authority) -> Certificate:
    return ca.sign("server")


@pytest.fixture(scope="module")
def server(certificate: Certificate) -> Iterator[Server]:
    """One with TLS, for the tests that leave it as it was."""
    with Server("memory:", *certificate.options, listen=LISTEN) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.lines if not line.startswith("{")], "a foreign line"


def name_of(server: Server) -> str:
    host, port = server.address
    return f"tls://{host}:{port}"


def secured(server: Server, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A raw connection that speaks TLS."""
    sock = socket.create_connection(server.address, timeout=20)
    return context.wrap_socket(sock, server_hostname="localhost")


def read_until(sock: ssl.SSLSocket, size: int) -> bytes:
    received = b""
    while len(received) < size and (data := sock.recv(1 << 16)):
        received += data
    return received


# --- what it carries ------------------------------------------------------------------------------


def test_a_client_speaks_tls_as_it_speaks_without(server: Server, ca: Authority) -> None:
    with Client(name_of(server), tls=ca.trusting()) as client:
        assert client.index("tls-a") is True
        assert client.index("tls-b", ["tls-a", "nowhere"]) is False
        assert client.remove("tls-a") is True
        assert client.batch([index_message("tls-c"), query_message("tls-c"), "LIZARD"]) == [
            Answer.OK,
            Answer.OK,
            Answer.ERROR,
        ]


def test_a_client_pipelines_over_tls_without_end(server: Server, ca: Authority) -> None:
    count = 200_000
    with Client(name_of(server), tls=ca.trusting()) as client:
        answers = client.batch(f"QUERY|no-such-package-{n}|" for n in range(count))
    assert answers == [Answer.FAIL] * count


def test_the_asynchronous_client_speaks_tls(server: Server, ca: Authority) -> None:
    async def talk() -> list[Answer]:
        async with AsyncClient(name_of(server), tls=ca.trusting()) as client:
            assert await client.query("nothing") is False
            return await client.batch([query_message("nothing")] * 20_000)

    assert asyncio.run(talk()) == [Answer.FAIL] * 20_000


def test_lines_cut_anywhere_into_records_are_answered_once_each(
    server: Server, ca: Authority
) -> None:
    with secured(server, ca.trusting()) as sock:
        for byte in b"INDEX|cut|\nQUERY|cut|\nx\n":
            sock.sendall(bytes([byte]))
        assert read_until(sock, 12) == OK + OK + ERROR


def test_a_line_longer_than_the_limit_is_one_error_over_tls_too(
    certificate: Certificate, ca: Authority
) -> None:
    with (
        Server("memory:", "--max-line", "64k", *certificate.options, listen=LISTEN) as server,
        secured(server, ca.trusting()) as sock,
    ):
        sock.sendall(b"x" * 1_000_000 + b"\nQUERY|a|\n")
        assert read_until(sock, 11) == ERROR + FAIL


# --- who may --------------------------------------------------------------------------------------


def test_a_client_does_not_trust_what_its_ca_has_not_signed(server: Server, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    with pytest.raises(ClientError, match=r"not to be trusted.*name the CA that signed it"):
        Client(name_of(server), tls=other.trusting()).connect()
    with pytest.raises(ClientError, match="not to be trusted"):
        Client(name_of(server)).connect()  # by what the system trusts


def test_a_client_does_not_trust_a_certificate_of_another_name(ca: Authority) -> None:
    elsewhere = ca.sign("elsewhere", "DNS:elsewhere.example")
    with (
        Server("memory:", *elsewhere.options, listen=LISTEN) as server,
        pytest.raises(ClientError, match=r"not to be trusted.*mismatch"),
    ):
        Client(name_of(server), tls=ca.trusting()).connect()


def test_nothing_older_than_tls_1_2_is_spoken(server: Server, ca: Authority) -> None:
    context = ca.trusting()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secured(server, context)
    context = ca.trusting()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with secured(server, context) as sock:
        assert sock.version() == "TLSv1.2"


def test_with_mutual_tls_only_those_whom_the_ca_has_signed_are_let_in(
    certificate: Certificate, ca: Authority, tmp_path: Path
) -> None:
    clients = Authority(tmp_path, "clients")
    known = clients.sign("known")
    options = [*certificate.options, "--tls-client-ca", str(clients.cert)]
    with Server("memory:", *options, listen=LISTEN) as server:
        with Client(name_of(server), tls=ca.trusting(known)) as client:
            assert client.index("a") is True
        # The client's side of the handshake is done before the server has judged: it hears at once after.
        for shown in (None, ca.sign("self-made")):
            with (
                pytest.raises(ClientError),
                Client(name_of(server), tls=ca.trusting(shown)) as client,
            ):
                client.index("b")
        with Client(name_of(server), tls=ca.trusting(known)) as client:
            assert client.query("b") is False
        assert counters(server)["no_handshake"] == 2
        assert server.stop() == 0


def test_tls_and_plain_listeners_stand_side_by_side(
    certificate: Certificate, ca: Authority
) -> None:
    options = ["--listen", "127.0.0.1:0,tls,read-only", *certificate.options]
    with Server("memory:", *options) as server, Wire(server.address) as plain:
        assert plain.ask(b"INDEX|a|") == OK
        host, port = parse_address(server.wait_for("serving")["listen"][1])
        with Client(f"tls://{host}:{port}", tls=ca.trusting()) as client:
            assert client.query("a") is True
            assert client.remove("a") is False
        assert plain.ask(b"QUERY|a|") == OK


# --- what a stranger can cost ---------------------------------------------------------------------


def test_a_handshake_that_fails_costs_a_counter_and_no_line(
    certificate: Certificate, ca: Authority
) -> None:
    with Server("memory:", *certificate.options, listen=LISTEN) as server:
        for junk in (
            b"INDEX|a|\n",
            b"\x16\x03\x01\xff\xff" + b"x" * 100_000,
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            with Wire(server.address) as wire, contextlib.suppress(ConnectionError):
                wire.send(junk)
                assert OK not in wire.receive_until_closed()
        for first in (b"", b"\x16\x03\x01") * 10:  # gone before, or in the middle of it
            with socket.create_connection(server.address) as gone:
                gone.sendall(first)
        with Client(name_of(server), tls=ca.trusting()) as client:
            assert client.query("a") is False
        deadline = time.monotonic() + 20
        while (facts := counters(server))["no_handshake"] != 23 or facts["clients"]:
            assert time.monotonic() < deadline, facts
            time.sleep(0.05)
        assert [line for line in server.lines if not line.startswith("{")] == []
        assert server.stop() == 0


def test_whoever_does_not_begin_holds_a_place_and_is_closed_in_time(
    certificate: Certificate, ca: Authority
) -> None:
    hurry = (
        "import pkgindex.listeners as l; l.HANDSHAKE_SECONDS = 1.0\n"
        "from pkgindex.cli import main; main()"
    )
    server = Server("memory:", "--max-clients", "3", *certificate.options, listen=LISTEN)
    place = server._command.index("-m")
    server._command[place : place + 2] = ["-c", hurry]
    with server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Wire(server.address)) for _ in range(3)]
        deadline = time.monotonic() + 20
        while counters(server)["clients"] != 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        with Wire(server.address) as refused:
            assert refused.receive_until_closed() == b""
        assert counters(server)["refused"] == 1
        for wire in silent:
            assert wire.receive_until_closed() == b""
        assert time.monotonic() - began < 10
        with Client(name_of(server), tls=ca.trusting()) as client:
            assert client.query("a") is False
        assert counters(server)["no_handshake"] == 3


def test_a_stranger_is_closed_before_the_handshake(certificate: Certificate, ca: Authority) -> None:
    with Server("memory:", *certificate.options, listen=f"{LISTEN},allow=192.0.2.0/24") as server:
        with Wire(server.address) as wire:
            assert wire.receive_until_closed() == b""
        facts = counters(server)
        assert (facts["strangers"], facts["accepted"], facts["no_handshake"]) == (1, 0, 0)


def test_an_idle_tls_client_costs_less_than_150_kib(
    certificate: Certificate, ca: Authority
) -> None:
    context = ca.trusting()
    with (
        Server("memory:", *certificate.options, listen=LISTEN) as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):  # what is made once
            secured(server, context).close()
        before, count = resident(server.pid), 200
        for _ in range(count):
            sock = stack.enter_context(secured(server, context))
            sock.sendall(b"QUERY|a|\n")
            assert read_until(sock, 5) == FAIL
        each = (resident(server.pid) - before) / count
        print(f"an idle TLS client costs {each / 1024:.0f} KiB")
        assert each < 150 * 1024


# --- ends -----------------------------------------------------------------------------------------


class HalfClosing:
    """A TLS client that can say goodbye (close_notify) and read on, which ssl.SSLSocket cannot."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self._socket = socket.create_connection(server.address, timeout=20)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        while not self._tried(self._tls.do_handshake):
            self._pass_on()
        self._pass_on()

    def _tried(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except ssl.SSLWantReadError:
            return False
        return True

    def _pass_on(self) -> None:
        if data := self._outgoing.read():
            self._socket.sendall(data)
        elif data := self._socket.recv(1 << 16):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def ask_and_leave(self, lines: bytes) -> bytes:
        """Send lines and the goodbye in one go; return all that comes until the server's."""
        self._tls.write(lines)
        self._tried(self._tls.unwrap)
        received = b""
        with self._socket:
            while True:
                try:
                    if not (data := self._tls.read(1 << 16)):
                        return received
                    received += data
                except ssl.SSLWantReadError:
                    self._pass_on()
                except ssl.SSLZeroReturnError:
                    return received


def test_a_client_that_says_goodbye_gets_every_answer_that_need_not_wait(
    server: Server, ca: Authority
) -> None:
    answers = HalfClosing(server, ca.trusting()).ask_and_leave(b"INDEX|bye|\n" * 900 + b"x\n")
    assert answers == OK * 900 + ERROR


def test_a_client_that_says_goodbye_may_lose_answers_that_wait_but_never_gets_wrong_ones(
    certificate: Certificate, ca: Authority, tmp_path: Path
) -> None:
    with Server(f"file:{tmp_path / 'index'}", *certificate.options, listen=LISTEN) as server:
        lines = b"QUERY|a|\nINDEX|a|\nQUERY|a|\n"
        answers = HalfClosing(server, ca.trusting()).ask_and_leave(lines)
        assert (FAIL + OK + OK).startswith(answers)
        assert answers.startswith(FAIL)
        with Client(name_of(server), tls=ca.trusting()) as client:
            assert client.query("a") is True, "what was received is carried out"


def test_a_stop_answers_what_was_received_over_tls_and_says_goodbye(
    certificate: Certificate, ca: Authority, tmp_path: Path
) -> None:
    with Server(f"file:{tmp_path / 'index'}", *certificate.options, listen=LISTEN) as server:
        with secured(server, ca.trusting()) as sock:
            sock.sendall(b"".join(b"INDEX|p%d|\n" % n for n in range(1000)))
            assert sock.recv(1)  # so all of it is on its way
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            received = b"O" + read_until(sock, 3 * 1000 - 1)
            assert received == OK * 1000
            assert sock.recv(1) == b"", "no close_notify"
        assert server.wait() == 0
        assert time.monotonic() - began < 10
        assert [line for line in server.lines if not line.startswith("{")] == []


# --- the files ------------------------------------------------------------------------------------


def test_a_hangup_reads_the_certificate_again(ca: Authority, tmp_path: Path) -> None:
    first, second = ca.sign("first"), ca.sign("second")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(made: Certificate) -> None:
        cert.write_bytes(made.cert.read_bytes())
        key.write_bytes(made.key.read_bytes())

    def shown() -> str:
        with secured(server, ca.trusting()) as sock:
            return dict(pair for (pair,) in sock.getpeercert()["subject"])["commonName"]

    install(first)
    options = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with Server("memory:", *options, listen=LISTEN) as server:
        old = secured(server, ca.trusting())
        assert shown() == "first"
        install(second)
        server.send_signal(signal.SIGHUP)
        server.wait_for("certificate read again")
        assert shown() == "second"
        old.sendall(b"QUERY|a|\n")
        assert read_until(old, 5) == FAIL, "a connection from before goes on"
        old.close()
        key.write_bytes(first.key.read_bytes())
        server.send_signal(signal.SIGHUP)
        reason = server.wait_for("certificate not read again; the old one stays")["reason"]
        assert "this key is not that certificate's" in reason
        assert str(cert) in reason
        assert shown() == "second"
        assert server.stop() == 0


def refusal(listen: str = LISTEN, **files: Path) -> str:
    """What a start is refused with."""
    named = {name: str(path) for name, path in files.items()}
    with pytest.raises(ConfigError) as caught:
        Tls.of(
            Settings(listen=(Listener(listen.partition(",")[0], tls=",tls" in listen),), **named)
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_missing_or_wrong_are_named(ca: Authority, tmp_path: Path) -> None:
    good = ca.sign("good")
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate\n")
    absent = tmp_path / "absent.pem"
    assert refusal(tls_cert=absent) == f"{absent}: cannot read it: No such file or directory"
    assert "absent.pem: cannot read it" in refusal(tls_cert=good.cert, tls_key=absent)
    assert "junk.pem: not a certificate and its key" in refusal(tls_cert=junk)
    assert "not a certificate and its key" in refusal(tls_cert=good.cert)  # it has no key
    assert "is not that certificate's" in refusal(tls_cert=good.cert, tls_key=ca.key)
    both = tmp_path / "both.pem"
    both.write_bytes(good.cert.read_bytes() + good.key.read_bytes())
    assert Tls.of(Settings(listen=(Listener(":1", tls=True),), tls_cert=str(both)))
    assert "junk.pem: not the certificate of a CA" in refusal(tls_cert=both, tls_client_ca=junk)
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", good.key, "-aes128", "-passout", "pass:secret", "-out", locked],
        check=True,
        capture_output=True,
    )
    assert "has a password" in refusal(tls_cert=good.cert, tls_key=locked)
    assert "tls needs a certificate" in refusal()
    assert "no listener has tls" in refusal("127.0.0.1:0", tls_cert=both)


def test_a_wrong_file_ends_the_start_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    for more in ([], ["--check-config"]):
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pkgindex",
                    "serve",
                    "--store",
                    f"file:{tmp_path / 'index'}",
                ),
                *("--listen", LISTEN, "--tls-cert", str(tmp_path / "absent.pem"), *more),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("PKGINDEX_")},
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"pkgindex: {tmp_path}/absent.pem: cannot read it: No such file or directory\n"
        )
    assert not (tmp_path / "index").exists()


# --- the commands ---------------------------------------------------------------------------------


def command(*arguments: str, **environ: str) -> Result:
    """Run a command in this process, whose result is the same and whose start costs nothing."""
    # None takes a variable away.
    none = {name: None for name in os.environ if name.startswith("PKGINDEX_")}
    return CliRunner(env=none | environ).invoke(main, list(arguments))


def test_the_commands_speak_tls(certificate: Certificate, ca: Authority, tmp_path: Path) -> None:
    known = ca.sign("person")
    options = [*certificate.options, "--tls-client-ca", str(ca.cert)]
    with Server("memory:", *options, listen=LISTEN) as server:
        to = ["--server", name_of(server)]
        me = ["--tls-cert", str(known.cert), "--tls-key", str(known.key)]
        assert command("index", "a", *to, *me, "--tls-ca", str(ca.cert)).stdout == "OK\n"
        environ = {
            "PKGINDEX_SERVER": name_of(server),
            "PKGINDEX_TLS_CA": str(ca.cert),
            "PKGINDEX_CLIENT_CERT": str(known.cert),
            "PKGINDEX_CLIENT_KEY": str(known.key),
        }
        assert command("query", "a", **environ).stdout == "OK\n"
        source = tmp_path / "list.txt"
        source.write_text("b: a\n")
        done = command("load", str(source), **environ)
        assert done.exit_code == 0, done.output
        assert command("query", "b", **environ).stdout == "OK\n"
        for wrong, message in (
            ([*to], "not to be trusted"),
            ([*to, "--tls-ca", "absent.pem"], "absent.pem: cannot read it"),
            ([*to, "--tls-ca", str(known.key)], "not the certificate of a CA"),
            ([*to, "--tls-key", str(known.key)], "a key without its certificate"),
            (["--tls-ca", str(ca.cert)], "write tls://127.0.0.1:8080"),
            (["--server", "tls://unix:x"], "a Unix socket has no TLS"),
        ):
            done = command("query", "b", *wrong)
            assert (done.exit_code, done.stdout) == (2, "")
            assert message in done.stderr
            assert done.stderr.count("\n") == 1
