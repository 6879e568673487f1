"""Reading: compressions, detection, Homebrew's table, JSON lines, and where an input is broken."""

from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from pkgindex.cli.load import FORMATS as CLI_FORMATS
from pkgindex.load.formats import FORMATS, read
from pkgindex.load.source import BrokenInput

lz4 = pytest.importorskip("lz4.frame", reason="lz4 is not installed")
zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "lz4": lz4.compress,
}
compressed = pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS.keys())
HOMEBREW = Path(__file__).parents[3] / "shared/data/brew-dependencies.txt"


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., str]:
    """Writes an input and returns its path."""

    def write(data: bytes | str, name: str = "input") -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


# --- compression ----------------------------------------------------------------------------------


@compressed
def test_compression_is_told_by_the_content_whatever_the_name(given, compress):
    assert read([given(compress(b"a: b c\nb:\n"), "x.txt")]) == {"a": ["b", "c"], "b": []}


@compressed
def test_an_input_of_several_compressed_parts_is_read_to_its_end(given, compress):
    table = b"".join(b"p%d: q\n" % n for n in range(200_000))
    assert len(read([given(compress(table) + compress(b"last:\n"))])) == 200_001


@pytest.mark.parametrize("kind", [name for name in COMPRESSIONS if name != "plain"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_an_input_cut_short_is_broken(given, kind, kept):
    data = COMPRESSIONS[kind](b"".join(b"p%d: q\n" % (n * n) for n in range(100_000)))
    with pytest.raises(BrokenInput, match=rf"input: broken {kind} data: "):
        read([given(data[: int(len(data) * kept)])])


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd", "lz4"])
def test_damaged_compressed_data_is_broken(given, kind):
    data = bytearray(COMPRESSIONS[kind](b"a: b c\n" * 1000))
    data[8:20] = b"\xff" * 12
    with pytest.raises(BrokenInput, match=rf"input: broken {kind} data: "):
        read([given(bytes(data))])


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(BrokenInput, match="absent: No such file or directory"):
        read([str(tmp_path / "absent")])
    with pytest.raises(BrokenInput, match="Is a directory"):
        read([str(tmp_path)])


def test_standard_input_is_a_dash(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(gzip.compress(b'{"name": "a", "depends": ["b"]}\n'))

    monkeypatch.setattr("sys.stdin", Stdin)
    assert read(["-"]) == {"a": ["b"]}


def test_reading_reports_every_byte_of_the_file(given):
    path = given(gzip.compress(b"a: b\n" * 100_000))
    counts: list[int] = []
    read([path], on_read=counts.append)
    assert sum(counts) == Path(path).stat().st_size


# --- detection ------------------------------------------------------------------------------------

PARAGRAPH = "Package: a\nVersion: 1\nDepends: b\n\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table", "a: b\n"),
        ("table.jsonl", "a: b\n\n"),
        ("lines.txt", '{"name": "a", "depends": ["b"]}\n'),
        ("lines", '\n  {"name": "a", "depends": ["b"]}'),
        ("Packages", PARAGRAPH),
        ("anything", "\n" + PARAGRAPH),
        ("anything", "Version: 1\nPackage: a\nDepends: b"),
        ("x_Packages.gz", "Depends: b\nPackage: a\n"),
    ],
)
def test_the_format_is_told_by_the_content_then_by_the_name(given, name, text):
    if name == "table.jsonl":
        with pytest.raises(BrokenInput, match="jsonl:1: not a package"):
            read([given(text, name)])
    else:
        assert read([given(text, name)]) == {"a": ["b"]}


def test_an_explicit_format_overrides_detection(given):
    assert read([given('{"x": y\n')], "homebrew") == {'{"x"': ["y"]}


def test_an_unknown_format_is_named_and_the_option_too(given):
    with pytest.raises(
        BrokenInput, match=r"input: its format .*--format homebrew\|debian\|jsonlines"
    ):
        read([given("what is this\n")])


def test_an_empty_input_holds_nothing(given):
    assert read([given("", name) for name in ("a", "b.jsonl", "Packages")]) == {}


def test_inputs_of_different_formats_make_one_set_of_packages(given):
    paths = [given("a: b\n", "one"), given('{"name": "b", "depends": ["c"]}', "two")]
    assert read([*paths, given("Package: c\nVersion: 1\n", "three")]) == {
        "a": ["b"],
        "b": ["c"],
        "c": [],
    }


def test_the_command_offers_the_formats_there_are():
    assert tuple(FORMATS) == CLI_FORMATS


# --- Homebrew's table -----------------------------------------------------------------------------


def test_a_homebrew_name_is_all_before_the_first_space_less_one_final_colon(given):
    text = "a: b  c \nperl::Foo: a\nx::: a\nbare\nno-colon d\n\n  \nempty:\r\nlast: z"
    assert read([given(text)], "homebrew") == {
        "a": ["b", "c"],
        "perl::Foo": ["a"],
        "x::": ["a"],
        "bare": [],
        "no-colon": ["d"],
        "empty": [],
        "last": ["z"],
    }


def test_of_a_name_that_comes_twice_the_last_counts(given):
    assert read([given("a: b\na: c\n")]) == {"a": ["c"]}
    assert read([given("a: b\n", "1"), given("a:\n", "2")]) == {"a": []}


@pytest.mark.parametrize("line", [" a: b", ": b", ":"])
def test_a_homebrew_line_without_a_name_is_broken(given, line):
    with pytest.raises(BrokenInput, match=r"input:3: no package's name"):
        read([given(f"a:\nb:\n{line}\n")])


@pytest.mark.skipif(not HOMEBREW.exists(), reason="the project's shared data is not here")
def test_the_whole_homebrew_table_is_read():
    packages = read([str(HOMEBREW)])
    assert len(packages) == 3368
    assert packages["abcm2ps"][:2] == ["cairo", "cmake"]
    lacking = {name for needs in packages.values() for name in needs} - packages.keys()
    assert lacking == {"gpg", "docbook2X"}


# --- JSON lines -----------------------------------------------------------------------------------


def test_json_lines_may_have_blank_lines_and_other_keys(given):
    text = '{"depends": ["b"], "name": "a", "x": [{}]}\r\n\n  \n{"name": "\\u0062", "depends": []}'
    assert read([given(text)]) == {"a": ["b"], "b": []}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"name": "a", "depends": [}', "malformed"),
        ('{"name": "a"}', "missing required field `depends`"),
        ('{"depends": []}', "missing required field `name`"),
        ('{"name": "a", "depends": "b"}', "Expected `array`"),
        ('{"name": "a", "depends": [1]}', "Expected `str`"),
        ('{"name": 1, "depends": []}', "Expected `str`"),
        ('["a", "b"]', "Expected `object`"),
        ("a: b", "malformed"),
        (b'{"name": "\xff", "depends": []}', "not UTF-8"),
    ],
)
@pytest.mark.parametrize("before", [0, 3, 50_000])
def test_a_broken_json_line_is_named_by_its_number(given, line, what, before):
    good = b'{"name": "good", "depends": ["better", "best"]}\n'
    line = line.encode() if isinstance(line, str) else line
    with pytest.raises(BrokenInput, match=f"input:{before + 1}: .*{what}"):
        read([given(good * before + line + b"\n" + good)], "jsonlines")
