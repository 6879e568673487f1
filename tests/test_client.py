"""What `Client` and `AsyncClient` promise, tried with the reference server and with bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from pkgindex.client import (
    Answer,
    AsyncClient,
    Client,
    ConnectionLost,
    NotConnected,
    Rejected,
    index_message,
    is_name,
    query_message,
    remove_message,
)
from pkgindex.errors import ClientError
from tests import reference

OK, FAIL, ERROR = Answer.OK, Answer.FAIL, Answer.ERROR


@contextlib.contextmanager
def running(serve: Callable[[], Awaitable[asyncio.Server]]) -> Iterator[None]:
    """An asyncio server in a thread of its own while the context lasts."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        server = await serve()
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a reference server."""
    where: list[str] = []

    async def serve() -> asyncio.Server:
        listening = await reference.listen(reference.Model(), 0)
        where.append("{}:{}".format(*listening.sockets[0].getsockname()))
        return listening

    with running(serve):
        yield where[0]


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does to each connection, one after the other, what is said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError), listener.accept()[0] as connection:
                    if not ended.is_set():
                        script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = listener.getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            ended.set()
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), 1).close()
            thread.join()


def received_lines(connection: socket.socket, count: int) -> None:
    """Reads until so many lines have arrived."""
    lines = 0
    while lines < count:
        data = connection.recv(65536)
        assert data
        lines += data.count(b"\n")


def until_closed(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


# --- both clients: the same calls, the same meaning ------------------------------------------------


class Blocking:
    """AsyncClient, called as Client is, so that one test judges both."""

    def __init__(self, server: str, **options: float) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(server, **options)

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    @property
    def connected(self) -> bool:
        return self._client.connected

    def __getattr__(self, name: str) -> Callable[..., object]:
        method = getattr(self._client, name)

        async def call(*arguments: object) -> object:
            return await method(*arguments)

        return lambda *arguments: self._runner.run(call(*arguments))


both = pytest.mark.parametrize("kind", [Client, Blocking], ids=["Client", "AsyncClient"])


@both
def test_index_remove_and_query_say_whether_the_answer_is_ok(server, kind):
    with kind(server) as client:
        assert client.index("bash", ["libc"]) is False
        assert client.index("libc") is True
        assert client.index("bash", ["libc"]) is True
        assert client.query("bash") is True
        assert client.query("zsh") is False
        assert client.remove("libc") is False
        assert client.remove("bash") is True


@both
def test_an_error_is_raised_and_the_connection_goes_on(server, kind):
    with kind(server) as client:
        with pytest.raises(Rejected, match="ERROR"):
            client.query("n\u00e4me")
        assert client.query("name") is False


@both
@pytest.mark.parametrize("name", ["", "a|b", "a\nQUERY|b|", "a,b"])
def test_a_name_that_would_change_its_message_is_refused_and_nothing_is_sent(server, kind, name):
    with kind(server) as client:
        for attempt in (
            lambda: client.query(name),
            lambda: client.remove(name),
            lambda: client.index(name),
            lambda: client.index("a", [name]),
        ):
            with pytest.raises(ValueError, match="no package can be named"):
                attempt()
        assert client.index("a") is True


@both
def test_a_batch_gives_one_answer_a_message_in_order(server, kind):
    with kind(server) as client:
        messages = [
            query_message("a"),
            index_message("a"),
            "nonsense",
            index_message("b", ["a", "c"]),
            index_message("b", ["a"]),
            remove_message("a"),
            query_message("a"),
        ]
        assert client.batch(messages) == [FAIL, OK, ERROR, FAIL, OK, FAIL, OK]
        assert client.batch([]) == []
        assert client.query("b") is True


@both
def test_a_message_of_two_lines_is_refused(server, kind):
    with kind(server) as client:
        with pytest.raises(ValueError, match="one line"):
            client.batch(["QUERY|a|\nQUERY|b|"])
        assert client.batch(["QUERY|a|"]) == [FAIL]


@both
def test_a_pipeline_larger_than_all_buffers_does_not_stop(server, kind):
    count = 300_000
    with kind(server) as client:
        client.index("a")
        answers = client.batch(f"QUERY|{'a' if n % 3 else 'b'}|" for n in range(count))
    assert answers == [OK if n % 3 else FAIL for n in range(count)]


@both
def test_a_server_that_cannot_be_reached_is_named(kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ClientError, match=f"cannot connect to 127.0.0.1:{port}.*running"):
        kind(f"127.0.0.1:{port}").__enter__()


@both
@pytest.mark.parametrize("name", ["", ":", "a:b", "::1", "host:0", "host:65536", "unix:", "[::1]x"])
def test_a_malformed_server_is_refused(kind, name):
    with pytest.raises(ClientError, match="names no server"):
        kind(name)


@both
def test_a_broken_connection_says_which_messages_are_unanswered(kind):
    def script(connection: socket.socket) -> None:
        received_lines(connection, 5)
        connection.sendall(b"OK\nFAIL\nER")

    messages = [f"QUERY|{name}|" for name in "abcde"]
    with scripted(script) as address, kind(address) as client:
        with pytest.raises(
            ConnectionLost, match="2 messages answered, 3 sent and unanswered"
        ) as got:
            client.batch(messages)
        assert got.value.answers == [OK, FAIL]
        assert got.value.unanswered == messages[2:]
        assert got.value.unsent == []
        assert not client.connected


@both
def test_nothing_is_repeated_and_connecting_again_is_the_callers_choice(kind):
    lines: list[bytes] = []

    def script(connection: socket.socket) -> None:
        lines.append(connection.recv(65536))
        if len(lines) > 1:
            connection.sendall(b"OK\n")
            until_closed(connection)

    with scripted(script) as address, kind(address) as client:
        with pytest.raises(ConnectionLost):
            client.index("a")
        for _ in range(2):
            with pytest.raises(NotConnected, match="connect"):
                client.index("b")
        client.connect()
        assert client.index("c") is True
    assert lines == [b"INDEX|a|\n", b"INDEX|c|\n"]


@both
def test_a_silent_server_is_given_up_after_the_time_out(kind):
    with scripted(until_closed) as address, kind(address, timeout=0.2) as client:
        with pytest.raises(ConnectionLost, match=r"nothing moved for 0\.2 seconds") as got:
            client.query("a")
        assert got.value.unanswered == ["QUERY|a|"]
        assert not client.connected


@both
def test_the_time_out_starts_anew_with_every_answer(kind):
    def script(connection: socket.socket) -> None:
        received_lines(connection, 4)
        for _ in range(4):
            threading.Event().wait(0.3)
            connection.sendall(b"OK\n")
        until_closed(connection)

    with scripted(script) as address, kind(address, timeout=1) as client:
        assert client.batch(["QUERY|a|"] * 4) == [OK] * 4


@both
def test_a_server_that_stops_reading_leaves_the_rest_unanswered_or_unsent(kind):
    stop = threading.Event()

    def script(connection: socket.socket) -> None:
        stop.wait(30)

    messages = [f"INDEX|{'x' * 200}{n}|" for n in range(100_000)]
    with scripted(script) as address:
        try:
            with kind(address, timeout=0.3) as client, pytest.raises(ConnectionLost) as got:
                client.batch(messages)
        finally:
            stop.set()
    lost = got.value
    assert lost.answers == []
    assert lost.unanswered
    assert lost.unanswered + lost.unsent == messages[: len(lost.unanswered) + len(lost.unsent)]


@both
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n", b"x" * 100, b"OK\nOK\n", b"OK\nF"]
)
def test_what_is_no_answer_ends_the_connection(kind, answer):
    def script(connection: socket.socket) -> None:
        received_lines(connection, 1)
        connection.sendall(answer)
        until_closed(connection)

    with scripted(script) as address, kind(address, timeout=5) as client:

        def ask_twice() -> None:
            # One answer too many may arrive with the first, or be found with the next question.
            client.query("a")
            client.query("a")

        with pytest.raises(ClientError, match=r"it answered|not connected"):
            ask_twice()


@both
def test_a_unix_socket_can_be_named(tmp_path: Path, kind):
    path = tmp_path / "socket"

    async def serve() -> asyncio.Server:
        model = reference.Model()
        return await asyncio.get_running_loop().create_unix_server(
            lambda: reference.Conversation(model), path
        )

    with running(serve), kind(f"unix:{path}") as client:
        assert client.index("a") is True


@both
def test_an_ipv6_address_can_be_named(kind):
    where: list[int] = []

    async def serve() -> asyncio.Server:
        model = reference.Model()
        listening = await asyncio.get_running_loop().create_server(
            lambda: reference.Conversation(model), "::1", 0
        )
        where.append(listening.sockets[0].getsockname()[1])
        return listening

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with running(serve), kind(f"[::1]:{where[0]}") as client:
        assert client.index("a") is True


# --- one of them --------------------------------------------------------------------------------


def test_a_batch_reports_its_progress(server):
    seen: list[int] = []
    with Client(server) as client:
        client.batch((f"QUERY|{n}|" for n in range(5000)), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 5000


def test_a_connection_that_the_server_closed_before_is_lost_with_nothing_sent():
    with scripted(lambda _: None) as address, Client(address) as client:
        threading.Event().wait(0.1)
        with pytest.raises(ConnectionLost, match="the server closed it") as got:
            client.index("a")
    assert got.value.unanswered == []
    assert got.value.unsent == ["INDEX|a|"]


def test_the_async_client_notices_by_itself_that_the_server_closed():
    async def story(address: str) -> None:
        async with AsyncClient(address) as client:
            await asyncio.sleep(0.1)
            assert not client.connected
            with pytest.raises(NotConnected):
                await client.index("a")

    with scripted(lambda _: None) as address:
        asyncio.run(story(address))


def test_an_interrupted_batch_leaves_no_answers_for_the_next_question(server):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with Client(server) as client:
        with pytest.raises(KeyboardInterrupt):
            client.batch(["QUERY|a|"] * 10_000, interrupted)
        assert not client.connected


def test_tasks_share_a_connection_and_each_gets_its_own_answers(server):
    async def story() -> None:
        async with AsyncClient(server) as client:

            async def one(n: int) -> None:
                assert await client.index(f"p{n}") is True
                assert await client.query(f"p{n}") is True
                assert await client.query(f"q{n}") is False
                assert (
                    await client.batch([f"QUERY|q{n}|", f"QUERY|p{n}|"] * 2000) == [FAIL, OK] * 2000
                )

            async with asyncio.TaskGroup() as tasks:
                for n in range(20):
                    tasks.create_task(one(n))

    asyncio.run(story())


def test_a_cancelled_call_does_not_shift_the_answers_of_others(server):
    async def story() -> None:
        async with AsyncClient(server) as client:
            await client.index("a")
            for patience in (0, 0.001, 0.01):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await client.batch(["QUERY|none|"] * 50_000)
                assert await client.query("a") is True
            waiting = [asyncio.create_task(client.query("none")) for _ in range(10)]
            await asyncio.sleep(0)
            for task in waiting[::2]:
                task.cancel()
            assert await client.query("a") is True
            assert await asyncio.gather(*waiting[1::2]) == [False] * 5

    asyncio.run(story())


def test_closing_ends_the_calls_that_wait():
    async def story(address: str) -> None:
        async with AsyncClient(address) as client:
            waiting = asyncio.create_task(client.query("a"))
            await asyncio.sleep(0.05)
        with pytest.raises(ConnectionLost, match="this side closed it"):
            await waiting

    with scripted(until_closed) as address:
        asyncio.run(story(address))


def test_the_async_client_works_on_uvloop(server):
    import uvloop

    async def story() -> None:
        async with AsyncClient(server) as client:
            assert await client.index("a") is True
            assert await client.batch(["QUERY|a|"] * 100_000) == [OK] * 100_000

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


@pytest.mark.parametrize(
    ("name", "carried"),
    [("libstdc++6", True), ("@scope/pkg", True), ("perl(Foo::Bar)", True), ("a" * 255, True)]
    + [(name, False) for name in ("", "a" * 256, "a b", "a|b", "a,b", "a\n", "\u00e4", "a\x7f")],
)
def test_is_name_knows_what_the_protocol_can_carry(name, carried):
    assert is_name(name) is carried


# --- the commands -------------------------------------------------------------------------------


def run(server: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pkgindex", *arguments],
        env=os.environ | {"PKGINDEX_SERVER": server},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_command_prints_the_answer_and_exits_with_0_for_ok_and_1_for_fail(server):
    assert run(server, "index", "emacs", "elisp") == (1, "FAIL\n", "")
    assert run(server, "index", "elisp") == (0, "OK\n", "")
    assert run(server, "index", "emacs", "elisp") == (0, "OK\n", "")
    assert run(server, "query", "emacs") == (0, "OK\n", "")
    assert run(server, "remove", "elisp") == (1, "FAIL\n", "")
    assert run("127.0.0.1:1", "remove", "emacs", "--server", server) == (0, "OK\n", "")


@pytest.mark.parametrize("name", ["a|b", "a b", ""])
def test_a_command_exits_with_2_and_one_line_for_a_bad_name(server, name):
    code, out, err = run(server, "query", name)
    assert (code, out) == (2, "")
    assert err.startswith("pkgindex: ")
    assert err.count("\n") == 1


def test_a_command_exits_with_2_and_one_line_without_a_server():
    code, out, err = run("unix:/nonexistent/socket", "query", "a")
    assert (code, out) == (2, "")
    assert err == (
        "pkgindex: cannot connect to unix:/nonexistent/socket: No such file or directory;"
        " is the server running there?\n"
    )


def test_a_query_does_not_wait_for_slow_imports():
    code = (
        "import sys, pkgindex.cli.client;"
        "print([m for m in ('asyncio', 'uvloop', 'rich', 'structlog', 'msgspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
