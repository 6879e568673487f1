"""What both clients and the commands promise over TLS: a batch that holds, and one line for each mistake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pkgindex.cli import main
from pkgindex.client import Answer, AsyncClient, Client, ConnectionLost
from pkgindex.errors import ClientError
from tests.certificates import Authority, Certificate, needs_openssl
from tests.servers import Server, Wire, parse_address

pytestmark = needs_openssl

LISTEN = "127.0.0.1:0,tls"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that neither side trusts, unless told to."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def certificate(ca: Authority) -> Certificate:
    return ca.sign("server")


@pytest.fixture(scope="module")
def server(certificate: Certificate) -> Iterator[str]:
    """The name of a server with TLS."""
    with Server("memory:", *certificate.options, listen=LISTEN) as server:
        yield name_of(server)
        assert server.stop() == 0


def name_of(server: Server, scheme: str = "tls://") -> str:
    host, port = server.address
    return f"{scheme}{host}:{port}"


def through_client(name: str, messages: list[str], **options: object) -> list[Answer]:
    with Client(name, **options) as client:
        return client.batch(messages)


def through_async_client(name: str, messages: list[str], **options: object) -> list[Answer]:
    async def talk() -> list[Answer]:
        async with AsyncClient(name, **options) as client:
            return await client.batch(messages)

    return asyncio.run(talk())


both = pytest.mark.parametrize(
    "batch", [through_client, through_async_client], ids=["Client", "AsyncClient"]
)


@contextlib.contextmanager
def scripted(
    context: ssl.SSLContext | None, script: Callable[[socket.socket], object]
) -> Iterator[str]:
    """The name of a server that does to its one connection what is said, over TLS with a context."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.settimeout(30)
                if context is None:
                    script(connection)
                else:
                    with context.wrap_socket(connection, server_side=True) as secured:
                        script(secured)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "tls://{}:{}".format(*listener.getsockname())
        finally:
            thread.join()


@pytest.fixture
def serving(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


def long_messages(count: int) -> list[str]:
    """Of 4 KiB each: what the client joins for one write is more than the buffers take."""
    return [f"INDEX|{n}|{','.join(['d' * 200] * 20)}" for n in range(count)]


# --- a batch --------------------------------------------------------------------------------------


@both
def test_a_batch_larger_than_all_buffers_does_not_stop(
    server: str, ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    # A slice of these is 900 KiB, many records: answers to the first arrive while it is still written.
    messages = [f"INDEX|{'d' * 100}|{','.join(['e' * 190] * 4)}|" for _ in range(30_000)]
    messages[::2] = [f"QUERY|{'q' * 200}|"] * 15_000
    answers = batch(server, messages, tls=ca.trusting(), timeout=30)
    assert answers == [Answer.FAIL, Answer.ERROR] * 15_000


def test_what_is_called_unsent_has_not_reached_the_server(
    serving: ssl.SSLContext, ca: Authority
) -> None:
    received = bytearray()

    def script(connection: socket.socket) -> None:
        gone.wait(30)  # until all that fits lies in the buffers
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                received.extend(data)

    gone = threading.Event()
    messages = long_messages(3000)
    with scripted(serving, script) as name:
        try:
            with pytest.raises(ConnectionLost, match="nothing moved") as caught:
                through_client(name, messages, tls=ca.trusting(), timeout=0.5)
        finally:
            gone.set()
    lost = caught.value
    whole = received.decode().split("\n")[:-1]
    assert whole, "nothing was received"
    assert lost.answers == []
    assert lost.unsent
    assert len(whole) <= len(lost.unanswered), "a message was received that is called unsent"
    assert whole == lost.unanswered[: len(whole)]


def test_answers_to_the_first_records_of_a_slice_are_no_mistake(
    serving: ssl.SSLContext, ca: Authority
) -> None:
    """They come while the socket takes nothing more of that slice."""
    messages = long_messages(3000)

    def script(connection: socket.socket) -> None:
        threading.Event().wait(0.3)  # until all that fits lies in the buffers
        answered = 0
        while answered < len(messages) and (data := connection.recv(1 << 14)):
            lines = data.count(b"\n")
            connection.sendall(b"OK\n" * lines)
            if not answered:
                threading.Event().wait(0.3)  # and the client has read them
            answered += lines

    with scripted(serving, script) as name:
        answers = through_client(name, messages, tls=ca.trusting(), timeout=20)
    assert answers == [Answer.OK] * len(messages)


@both
def test_a_silent_server_is_given_up_after_the_time_out(
    serving: ssl.SSLContext, ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    with scripted(serving, lambda connection: connection.recv(100) and connection.recv(1)) as name:
        with pytest.raises(ConnectionLost, match=r"nothing moved for 0\.2 seconds") as caught:
            batch(name, ["QUERY|a|"], tls=ca.trusting(), timeout=0.2)
        assert caught.value.unanswered == ["QUERY|a|"]


@both
def test_a_name_or_an_ipv6_address_is_what_the_certificate_must_have(
    certificate: Certificate, ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    with Server("memory:", *certificate.options, listen="[::1]:0,tls") as server:
        port = parse_address(server.wait_for("serving")["listen"][0])[1]
        assert batch(f"tls://[::1]:{port}", ["QUERY|a|"], tls=ca.trusting()) == [Answer.FAIL]
    with Server("memory:", *certificate.options, listen=LISTEN) as server:
        name = f"localhost:{server.address[1]}"
        # A context alone is enough, too.
        assert batch(name, ["QUERY|a|"], tls=ca.trusting()) == [Answer.FAIL]


# --- mistakes -------------------------------------------------------------------------------------


def refusal(batch: Callable[..., list[Answer]], name: str, **options: object) -> str:
    """The one line that a client says instead of an answer, less the server's name."""
    with pytest.raises(ClientError) as caught:
        batch(name, ["QUERY|a|"], connect_timeout=10, timeout=10, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert name in line
    return line.partition(f"{name}: ")[2].partition(" (0 messages answered")[0]


@both
def test_a_ca_that_did_not_sign_is_said(
    server: str, stranger: Authority, batch: Callable[..., list[Answer]]
) -> None:
    for options in ({"tls": stranger.trusting()}, {}):  # and what the system trusts
        assert refusal(batch, server, **options) == (
            "its certificate is not to be trusted: unable to get local issuer certificate; "
            "name the CA that signed it (--tls-ca, or in the context of tls=)"
        )


@both
def test_an_expired_certificate_is_said(ca: Authority, batch: Callable[..., list[Answer]]) -> None:
    expired = ca.sign("expired", days=-1)
    with Server("memory:", *expired.options, listen=LISTEN) as server:
        assert refusal(batch, name_of(server), tls=ca.trusting()) == (
            "its certificate is not to be trusted: certificate has expired; "
            "the server needs a new one, unless a clock is wrong"
        )


@both
def test_a_certificate_of_another_name_is_said(
    ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    elsewhere = ca.sign("elsewhere", "DNS:elsewhere.example")
    with Server("memory:", *elsewhere.options, listen=LISTEN) as server:
        port = server.address[1]
        assert refusal(batch, f"tls://localhost:{port}", tls=ca.trusting()) == (
            "its certificate is not to be trusted: Hostname mismatch, certificate is not valid for "
            "'localhost'; call the server by a name that its certificate has"
        )
        assert refusal(batch, f"tls://127.0.0.1:{port}", tls=ca.trusting()) == (
            "its certificate is not to be trusted: IP address mismatch, certificate is not valid "
            "for '127.0.0.1'; call the server by a name that its certificate has"
        )


@both
def test_a_server_without_tls_is_said(ca: Authority, batch: Callable[..., list[Answer]]) -> None:
    with Server("memory:") as server:
        line = refusal(batch, name_of(server), tls=ca.trusting())
        assert line.startswith("TLS: ")
        assert line.endswith("; does the server speak TLS there?")
        with Wire(server.address) as wire:
            assert wire.ask(b"QUERY|a|") == b"FAIL\n"


@both
def test_a_server_that_never_answers_the_handshake_is_given_up(
    ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    with (
        scripted(None, until_closed) as name,
        pytest.raises(ClientError, match=r"no answer in time; does the server speak TLS there\?"),
    ):
        batch(name, ["QUERY|a|"], tls=ca.trusting(), connect_timeout=0.3)


@both
def test_a_tls_listener_spoken_to_without_tls_is_said(
    server: str, batch: Callable[..., list[Answer]]
) -> None:
    assert refusal(batch, server.removeprefix("tls://")) == (
        "the server closed it before any answer: does it want TLS (tls:// before its name), "
        "or no clients from here?"
    )


@both
def test_another_programs_tls_spoken_to_without_tls_is_said(
    serving: ssl.SSLContext, batch: Callable[..., list[Answer]]
) -> None:
    with scripted(serving, until_closed) as name:
        line = refusal(batch, name.removeprefix("tls://"))
    # It closes with bytes unread, which resets the connection.
    assert line.endswith(
        " before any answer: does it want TLS (tls:// before its name), or no clients from here?"
    )


def until_closed(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


refused = (
    "does it want a certificate of this client, from a CA that it trusts (--tls-cert, or tls=)?"
)


@both
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("shows", [False, True], ids=["none", "a stranger's"])
def test_a_refused_certificate_of_the_client_is_said(
    certificate: Certificate,
    serving: ssl.SSLContext,
    ca: Authority,
    stranger: Authority,
    version: ssl.TLSVersion,
    shows: bool,
    batch: Callable[..., list[Answer]],
) -> None:
    context = ca.trusting(stranger.sign("me") if shows else None)
    context.maximum_version = version
    options = [*certificate.options, "--tls-client-ca", str(ca.cert)]
    with Server("memory:", *options, listen=LISTEN) as server:
        line = refusal(batch, name_of(server), tls=context)
    assert line.endswith(refused)
    # Other programs say why, in an alert.
    serving.load_verify_locations(ca.cert)
    serving.verify_mode = ssl.CERT_REQUIRED
    with scripted(serving, until_closed) as name:
        line = refusal(batch, name, tls=context)
    assert line.endswith(refused)


@both
def test_a_lost_connection_that_had_answered_blames_no_certificate(
    serving: ssl.SSLContext, ca: Authority, batch: Callable[..., list[Answer]]
) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"OK\n")

    with scripted(serving, script) as name:
        with pytest.raises(ConnectionLost, match=r"the server closed it \(1 messages") as caught:
            batch(name, ["QUERY|a|", "QUERY|b|"], tls=ca.trusting(), timeout=10)
        assert caught.value.answers == [Answer.OK]


# --- the commands ---------------------------------------------------------------------------------


def complaint(*arguments: str) -> str:
    """The one line on standard error of a command that ends with 2."""
    none = {name: None for name in os.environ if name.startswith("PKGINDEX_")}
    done = CliRunner(env=none).invoke(main, list(arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_every_command_says_the_same_in_one_line(
    certificate: Certificate, server: str, ca: Authority, stranger: Authority, tmp_path: Path
) -> None:
    source = tmp_path / "list.jsonl"
    source.write_text('{"name": "a", "depends": []}\n')
    options = [*certificate.options, "--tls-client-ca", str(stranger.cert)]
    with Server("memory:", *options, listen=LISTEN) as mutual:
        for words in (["index", "a"], ["remove", "a"], ["query", "a"], ["load", str(source)]):
            to = [*words, "--server", server]
            assert "name the CA that signed it" in complaint(*to)
            assert "name the CA that signed it" in complaint(*to, "--tls-ca", str(stranger.cert))
            assert "does it want TLS" in complaint(
                *words, "--server", server.removeprefix("tls://")
            )
            trusting = [*words, "--server", name_of(mutual), "--tls-ca", str(ca.cert)]
            assert refused in complaint(*trusting)
            assert refused in complaint(*trusting, *certificate.options)


def test_files_that_do_not_belong_together_are_said(
    server: str, certificate: Certificate, ca: Authority, stranger: Authority, tmp_path: Path
) -> None:
    to = ["query", "a", "--server", server, "--tls-ca", str(ca.cert)]
    line = complaint(*to, "--tls-cert", str(certificate.cert), "--tls-key", str(stranger.key))
    assert line == (
        f"pkgindex: {certificate.cert} and {stranger.key}: this key is not that certificate's\n"
    )
    junk = tmp_path / "junk.pem"
    junk.write_text("no key\n")
    line = complaint(*to, "--tls-cert", str(certificate.cert), "--tls-key", str(junk))
    assert line == (
        f"pkgindex: {certificate.cert} and {junk}: not a certificate and its key, in PEM\n"
    )
    line = complaint(*to, "--tls-cert", str(certificate.cert))
    assert line == f"pkgindex: {certificate.cert}: not a certificate and its key, in PEM\n"
