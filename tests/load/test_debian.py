"""Debian's package lists: each rule by a small list, and real lists beside python-debian."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from pkgindex.load.debian import Debian, version_key
from pkgindex.load.formats import read
from pkgindex.load.order import groups
from pkgindex.load.source import BrokenInput, open_source

LISTS = sorted(
    str(path)
    for path in Path("/var/lib/apt/lists").glob("*_Packages*")
    if re.search(r"_Packages(\.(gz|lz4|xz|zst))?$", path.name)
)
real = pytest.mark.skipif(not LISTS, reason="no package lists under /var/lib/apt/lists")


@pytest.fixture
def packages_of(tmp_path: Path) -> Callable[..., dict[str, Sequence[str]]]:
    """Reads lists given as texts."""

    def packages(*texts: str) -> dict[str, Sequence[str]]:
        paths = [tmp_path / f"{number}_Packages" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return read(map(str, paths), "debian")

    return packages


def paragraph(name: str, version: str = "1", **fields: str) -> str:
    lines = [f"Package: {name}", f"Version: {version}", "Architecture: all"]
    lines += [f"{label.replace('_', '-')}: {value}" for label, value in fields.items()]
    return "\n".join([*lines, f"Description: about {name}", " Depends: not this", "", ""])


def test_depends_and_pre_depends_count_and_nothing_else(packages_of):
    text = paragraph("a", Pre_Depends="b", Depends="c, d", Recommends="e", Suggests="f", Breaks="g")
    assert packages_of(text) == {"a": ["b", "c", "d"]}


def test_versions_qualifiers_architectures_and_profiles_are_left_out(packages_of):
    text = paragraph(
        "a", Depends="b (>= 1:2.0~rc1-1), python3:any (<< 4), c [amd64 !i386] <!nocheck> <x>, d(=1)"
    )
    assert packages_of(text) == {"a": ["b", "python3", "c", "d"]}


def test_a_field_may_be_folded_and_its_name_in_any_case(packages_of):
    text = "Package: a\nDEPENDS: b,\n c,\n\td\nVersion: 1\n \nPackage: b\n"
    assert packages_of(text) == {"a": ["b", "c", "d"], "b": []}


def test_a_dependency_named_twice_counts_once_and_empty_items_do_not(packages_of):
    assert packages_of(paragraph("a", Depends="b, c (>> 1), b (>> 2), ,", Pre_Depends="c")) == {
        "a": ["c", "b"]
    }


def test_the_first_alternative_that_the_input_has_counts(packages_of):
    text = paragraph("a", Depends="x | c | b") + paragraph("b") + paragraph("c")
    assert packages_of(text)["a"] == ["c"]


def test_a_virtual_name_stands_for_its_provider_that_sorts_first(packages_of):
    text = paragraph("a", Depends="mail-agent")
    text += paragraph("postfix", Provides="mail-agent (= 2), other")
    text += paragraph("exim", Provides="smtp, mail-agent")
    assert packages_of(text)["a"] == ["exim"]


def test_a_provided_alternative_comes_before_a_later_real_one(packages_of):
    text = paragraph("a", Depends="virtual | b") + paragraph("b")
    assert packages_of(text)["a"] == ["b"]
    assert packages_of(text + paragraph("c", Provides="virtual"))["a"] == ["c"]


def test_a_package_of_that_name_comes_before_its_providers(packages_of):
    text = paragraph("x", Depends="b") + paragraph("a", Provides="b") + paragraph("b")
    assert packages_of(text)["x"] == ["b"]


def test_if_nothing_satisfies_a_group_its_first_name_stays(packages_of):
    assert packages_of(paragraph("a", Depends="x:any (>= 1) | y"))["a"] == ["x"]


def test_alternatives_and_providers_are_found_across_lists(packages_of):
    lists = paragraph("a", Depends="x | v"), paragraph("p", Provides="v")
    assert packages_of(*lists)["a"] == ["p"]
    assert packages_of(*reversed(lists))["a"] == ["p"]


def test_of_several_versions_the_newest_counts_wherever_it_stands(packages_of):
    older = paragraph("a", "1.9-1", Depends="old", Provides="v")
    newer = paragraph("a", "1.10-1", Depends="new")
    user = paragraph("b", Depends="v")
    for texts in ((older + newer + user,), (newer + older, user), (user, older, newer)):
        assert packages_of(*texts) == {"a": ["new"], "b": ["v"]}


def test_versions_are_ordered_as_dpkg_orders_them():
    rising = "0~~ < 0~~a < 0~ < 0 < 0a < 0+ < 1.0~rc1-1 < 1.0-0 < 1.0-1 < 1.0-1+b1 < 1.0-1.1"
    rising += " < 1.0a-1 < 1.0+dfsg-1 < 1.2 < 1.10 < 2-1-1 < 1:0.1 < 1:0.1-1 < 2:0"
    for lower, higher in pairwise(rising.split(" < ")):
        assert version_key(lower) < version_key(higher), (lower, higher)
    assert version_key("1.0") == version_key("0:1.00-0")


def test_versions_are_ordered_as_python_debian_orders_them():
    debian_support = pytest.importorskip("debian.debian_support", reason="needs python-debian")
    versions = [
        f"{epoch}{upstream}{revision}"
        for epoch in ("", "1:")
        for upstream in ("1", "1.0", "1.0~", "1.0~a", "1.a", "1.+", "10", "09", "1a1", "1~1", "1-1")
        for revision in ("", "-0", "-1", "-1~b", "-a", "-01")
    ]
    ours = sorted(versions, key=version_key)
    theirs = [debian_support.NativeVersion(version) for version in ours]
    assert all(one <= other for one, other in pairwise(theirs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Package: a\nno field\n", "2: not a field"),
        ("\n\n folded\n", "3: a folded line before any field"),
        ("Package: a\n\nVersion: 2\n", "3: a paragraph without a package's name"),
        ("Package: a\n\nPackage: b\nDepends: c d\n", "3: b: not a relation: 'c d'"),
        ("Package: a\nDepends: b | | c\n", "1: a: not a relation"),
        ("Package: a\nDepends: b (>= 1\n", "1: a: not a relation"),
        ("Package: a\nVersion: x:1\n\nPackage: a\nVersion: 1", "4: a: a version whose epoch"),
    ],
)
def test_a_broken_list_is_named_by_file_and_line(packages_of, text, message):
    with pytest.raises(BrokenInput, match=f"0_Packages:{message}"):
        packages_of(text)


# --- real lists -----------------------------------------------------------------------------------


@real
def test_the_real_lists_have_no_dependency_without_a_package_but_a_known_few():
    packages = read(LISTS)
    absent: dict[str, None] = {}
    order = list(groups(packages, absent))
    assert sum(map(len, order)) == len(packages)
    assert len(absent) < 0.001 * len(packages) + 10


@real
def test_a_real_list_is_read_as_python_debian_reads_it():
    deb822 = pytest.importorskip("debian.deb822", reason="needs python-debian")
    smallest = min(LISTS, key=lambda path: Path(path).stat().st_size)
    with open_source(smallest) as source:
        ours = Debian()
        ours.read(source)
    names = ours.packages()
    with open_source(smallest) as source:
        paragraphs = list(deb822.Packages.iter_paragraphs(source.stream, use_apt_pkg=False))
    assert {paragraph["Package"] for paragraph in paragraphs} == names.keys()
    providers: dict[str, set[str]] = {}
    for paragraph in paragraphs:
        for [relation] in paragraph.relations["provides"]:
            providers.setdefault(relation["name"], set()).add(paragraph["Package"])
    versions = [paragraph["Package"] for paragraph in paragraphs]
    for paragraph in paragraphs:
        if versions.count(paragraph["Package"]) > 1:
            continue  # Which of them counts is tested above.
        wanted: dict[str, None] = {}
        for group in paragraph.relations["pre-depends"] + paragraph.relations["depends"]:
            for name in (relation["name"] for relation in group):
                if name in names or name in providers:
                    wanted[name if name in names else min(providers[name])] = None
                    break
            else:
                wanted[group[0]["name"]] = None
        assert names[paragraph["Package"]] == list(wanted)
