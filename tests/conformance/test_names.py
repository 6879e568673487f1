"""What a name may be: 1 to 255 bytes of visible ASCII without `|` and `,`."""

from __future__ import annotations

import pytest

from tests.conformance.conftest import Names
from tests.reference import ERROR, FAIL, OK
from tests.servers import Wire

pytestmark = pytest.mark.decision

LEGAL = bytes(byte for byte in range(0x21, 0x7F) if byte not in b"|,")

#: A name with a byte at its start, inside it or at its end, and random letters all the same.
PLACES = {
    "first": b"%(byte)b%(random)b",
    "inner": b"%(random)b%(byte)bz",
    "last": b"%(random)b%(byte)b",
}


def _name_with(byte: int, place: str, names: Names) -> bytes:
    return PLACES[place] % {b"byte": bytes([byte]), b"random": names.prefix}


@pytest.mark.parametrize("place", PLACES)
def test_every_byte_value_in_a_package_name_is_accepted_or_refused(
    wire: Wire, names: Names, place: str
) -> None:
    wrong = {}
    for byte in set(range(256)) - {ord("\n")}:
        name = _name_with(byte, place, names)
        if byte in LEGAL:
            names.exactly(name)
        answer = wire.ask(b"INDEX|%b|" % name)
        if answer != (OK if byte in LEGAL else ERROR):
            wrong[bytes([byte])] = answer
    assert not wrong


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [b"%b", b"%b,OTHER", b"OTHER,%b", b"OTHER,%b,OTHER"])
def test_every_byte_value_in_a_dependency_is_accepted_or_refused(
    wire: Wire, names: Names, place: str, shape: bytes
) -> None:
    """A legal name that is not indexed makes INDEX FAIL; an illegal one makes it ERROR."""
    assert wire.ask(b"INDEX|%b|" % names("other")) == OK
    shape = shape.replace(b"OTHER", names("other"))
    wrong = {}
    for byte in set(range(256)) - set(b"\n,"):
        name = _name_with(byte, place, names)
        answer = wire.ask(b"INDEX|%b|%b" % (names("a"), shape % name))
        if answer != (FAIL if byte in LEGAL else ERROR):
            wrong[bytes([byte])] = answer
    assert not wrong


def test_a_line_feed_always_ends_the_line(wire: Wire, names: Names) -> None:
    a, b = names("a"), names("b")
    assert wire.exchange(b"INDEX|%b\n%b|\n" % (a, b), 2) == [ERROR, ERROR]
    assert wire.exchange(b"INDEX|%b|\nQUERY|%b|\n" % (a, b), 2) == [OK, FAIL]


@pytest.mark.parametrize(
    "word",
    [
        "gtk+", "libstdc++6", "openssl@1.1", "@scope/pkg", "perl(Foo::Bar)", "~", "-", "--help",
        "a/b", "/", "//", "../..", "../../etc/passwd", ".hidden", "a.tmp", "a~", "a%2Fb", "%",
        "%s", "%00", "*", "?", "$HOME", "`id`", "'", '"', "\\", "\\n", "a=b", "a:b", "a;b", "#a",
        "{}", "[]", "<>", "!", "^", "&&", "con", "nul", "OK", "INDEX", "0",
    ],
)  # fmt: skip
def test_a_name_of_visible_characters_is_like_any_other(
    wire: Wire, names: Names, word: str
) -> None:
    name, top = names(word), names(word + "-top")
    assert wire.ask(b"INDEX|%b|%b" % (top, name)) == FAIL
    assert wire.ask(b"INDEX|%b|" % name) == OK
    assert wire.ask(b"INDEX|%b|%b" % (top, name)) == OK
    assert wire.ask_all([b"QUERY|%b|" % name, b"REMOVE|%b|" % name]) == [OK, FAIL]
    assert wire.ask_all([b"REMOVE|%b|" % top, b"REMOVE|%b|" % name]) == [OK, OK]
    assert wire.ask(b"QUERY|%b|" % name) == FAIL


@pytest.mark.parametrize("name", [b".", b"..", b"...", b"/", b"~", b"-", b"%", b"\\", b"*"])
def test_a_name_that_means_something_to_a_file_system_is_like_any_other(
    wire: Wire, names: Names, name: bytes
) -> None:
    if wire.ask(b"QUERY|%b|" % name) == OK:
        pytest.skip(f"{name!r} is indexed on this server already, and not ours to remove")
    names.exactly(name)
    assert wire.ask(b"INDEX|%b|" % name) == OK
    assert wire.ask(b"INDEX|%b|%b" % (names("top"), name)) == OK
    assert wire.ask_all([b"QUERY|%b|" % name, b"REMOVE|%b|" % name]) == [OK, FAIL]
    assert wire.ask(b"REMOVE|%b|" % names("top")) == OK
    assert wire.ask_all([b"REMOVE|%b|" % name, b"QUERY|%b|" % name]) == [OK, FAIL]


def test_names_that_differ_in_one_byte_are_different_packages(wire: Wire, names: Names) -> None:
    words = [
        "a",
        "A",
        "aa",
        "a/a",
        "a%2Fa",
        "a_a",
        "a-a",
        "a.a",
        "a.",
        "a/",
        "/a",
        "./a",
        "a/.",
        "a//a",
    ]
    for word in words:
        assert wire.ask(b"QUERY|%b|" % names(word)) == FAIL, word
        assert wire.ask(b"INDEX|%b|" % names(word)) == OK
    for word in words:
        assert wire.ask(b"REMOVE|%b|" % names(word)) == OK
        assert wire.ask(b"QUERY|%b|" % names(word)) == FAIL


@pytest.mark.parametrize("length", [1, 2, 254, 255])
def test_a_name_may_have_1_to_255_bytes(wire: Wire, names: Names, length: int) -> None:
    top = names("top")
    name = names.of_length(length)
    if length < len(names.prefix):
        name = _unused_name(wire, names, length)
    assert wire.ask(b"INDEX|%b|%b" % (top, name)) == FAIL
    assert wire.ask(b"INDEX|%b|" % name) == OK
    assert wire.ask(b"QUERY|%b|%b" % (name, name)) == OK
    assert wire.ask(b"INDEX|%b|%b" % (top, name)) == OK
    assert wire.ask(b"REMOVE|%b|" % name) == FAIL


def _unused_name(wire: Wire, names: Names, length: int) -> bytes:
    """Return a name too short for the prefix that nobody has indexed, and have it removed."""
    for byte in LEGAL:
        name = bytes([byte]) * length
        if wire.ask(b"QUERY|%b|" % name) == FAIL:
            return names.exactly(name)
    pytest.skip(f"every name of {length} bytes that was tried is indexed on this server")


@pytest.mark.parametrize("command", [b"INDEX", b"REMOVE", b"QUERY"])
@pytest.mark.parametrize("length", [256, 257, 511, 512, 65535, 65536, 65791])
def test_a_longer_name_is_an_error_as_package_and_as_dependency(
    wire: Wire, names: Names, command: bytes, length: int
) -> None:
    """Lengths whose lower 8 or 16 bits look harmless are among them."""
    a, long = names("a"), (names.prefix * 6000)[:length]
    assert wire.ask(b"INDEX|%b|" % a) == OK
    assert wire.ask(b"%b|%b|" % (command, long)) == ERROR
    assert wire.ask(b"%b|%b|%b" % (command, a, long)) == ERROR
    assert wire.ask(b"%b|%b|%b,%b" % (command, a, a, long)) == ERROR
    assert wire.ask(b"%b|%b|%b,%b" % (command, a, long, a)) == ERROR
    assert wire.ask(b"QUERY|%b|" % a) == OK


def test_long_names_that_differ_at_the_end_are_different_packages(wire: Wire, names: Names) -> None:
    first, second = names.of_length(255, b"a"), names.of_length(255, b"b")
    shorter = names.of_length(254)
    assert wire.ask(b"INDEX|%b|" % first) == OK
    assert wire.ask(b"INDEX|%b|%b" % (second, first)) == OK
    assert wire.ask_all([b"QUERY|%b|" % shorter, b"REMOVE|%b|" % first]) == [FAIL, FAIL]
    assert wire.ask_all([b"REMOVE|%b|" % second, b"REMOVE|%b|" % first]) == [OK, OK]
