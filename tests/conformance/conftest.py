"""Servers, connections and names for the conformance tests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.servers import Cluster
from tests.reference import ERROR, FAIL, OK
from tests.servers import STORES, Address, Server, Wire, parse_address

Connect = Callable[[], Wire]


#: A follower of a cluster, which hands on all that one with local reads does, and its reads besides.
FOLLOWERS: dict[str, tuple[str, ...]] = {"strong-follower": ("--reads", "strong")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test against each store, or against the one server that was named."""
    if "address" in metafunc.fixturenames:
        ours = [*STORES, *FOLLOWERS]
        servers = ["given"] if metafunc.config.getoption("--server") else ours
        metafunc.parametrize("address", servers, indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a test that does not say whether it is the specification's word or ours."""
    marks = [mark for mark in ("spec", "decision") if item.get_closest_marker(mark)]
    if len(marks) != 1:
        raise pytest.UsageError(f"{item.nodeid}: mark it `spec` or `decision`, and only one")


@pytest.fixture(scope="session")
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Address]:
    """The address of the server under test; ours must end in order when the tests are done."""
    if given := request.config.getoption("--server"):
        yield parse_address(given)
        return
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        if request.param in FOLLOWERS:
            cluster = stack.enter_context(Cluster(folder / "index"))
            cluster.add()
            server = cluster.add(*FOLLOWERS[request.param], log_file=folder / "server.log")
        else:
            url = STORES[request.param](folder)
            server = stack.enter_context(Server(url, log_file=folder / "server.log"))
        yield server.address
        assert server.exit_code is None, f"the server ended; see {server.log_file}"
        assert server.stop() == 0, f"the server did not stop in order; see {server.log_file}"
        if request.param in FOLLOWERS:
            assert not server.events("writer"), "it was no follower all the time"


class Names:
    """Names that no other client uses: a random prefix before a word. Remembers each one."""

    def __init__(self) -> None:
        self.prefix = b"test-%s-" % secrets.token_hex(6).encode()
        self.given: set[bytes] = set()

    def __call__(self, word: str | bytes) -> bytes:
        """Return the name for a word, the same one each time."""
        return self.exactly(self.prefix + (word.encode() if isinstance(word, str) else word))

    def exactly(self, name: bytes) -> bytes:
        """Return `name` itself, and remember it as one of ours to remove."""
        self.given.add(name)
        return name

    def of_length(self, length: int, word: bytes = b"") -> bytes:
        """Return a name of `length` bytes that ends in `word`."""
        return self.exactly((self.prefix + b"x" * length)[: length - len(word)] + word)

    def remove_all(self, wire: Wire) -> None:
        """Take out of the index what is left of these names, cycles too."""
        given = sorted(self.given)
        answers = wire.ask_all(b"QUERY|%b|" % name for name in given)
        left = [name for name, answer in zip(given, answers, strict=True) if answer == OK]
        # Without dependencies none blocks another's removal.
        wire.ask_all(b"INDEX|%b|" % name for name in left)
        answers = wire.ask_all(b"REMOVE|%b|" % name for name in left)
        assert set(answers) <= {OK}, "names of this test could not be removed from the index"


@pytest.fixture
def names(request: pytest.FixtureRequest, address: Address) -> Iterator[Names]:
    """Names of this test's own, removed from the index when it ends."""
    names = Names()
    yield names
    with Wire(address, request.config.getoption("--patience")) as wire:
        names.remove_all(wire)


@pytest.fixture
def connect(request: pytest.FixtureRequest, address: Address, names: Names) -> Iterator[Connect]:
    """Open connections. At the end each one that is still open must owe nothing."""
    patience = request.config.getoption("--patience")
    wires: list[Wire] = []

    def connect() -> Wire:
        wires.append(Wire(address, patience))
        return wires[-1]

    yield connect
    try:
        for wire in wires:
            if wire.socket.fileno() >= 0:
                # Had a message been answered twice, these two would be answered out of place.
                answers = wire.ask_all([b"QUERY|%bnever-indexed|" % names.prefix, b"LIZARD"])
                assert answers == [FAIL, ERROR], "replies that no message asked for"
    finally:
        for wire in wires:
            wire.close()


@pytest.fixture
def wire(connect: Connect) -> Wire:
    """One connection."""
    return connect()
