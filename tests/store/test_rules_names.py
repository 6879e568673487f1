"""The rules of names, files and FORMAT, N1 to N3, and of the lock, L1 and L2."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex.errors import StoreDamaged, StoreOwned, StoreUnreachable, UnknownFormat
from pkgindex.index import file as file_index
from pkgindex.store import format as store_format
from pkgindex.store._disk import file_name, shard
from pkgindex.store.claim import claim
from pkgindex.store.lease import Lease
from pkgindex.store.mount import Mount
from tests.servers import Server, ServerFailed, Wire
from tests.store.reading import crc32c, read_files
from tests.store.test_rules_claiming import caught, mutants
from tests.store.writer import Writer, made, recovered_index

T = TypeVar("T")

NAMES = st.text(
    st.sampled_from([chr(c) for c in range(0x21, 0x7F) if chr(c) not in "|,"]),
    min_size=1,
    max_size=255,
)

# Of one alphabet, so that names that differ in little come often.
ALIKE = st.text(st.sampled_from("aA.%~c0"), min_size=1, max_size=6)


# --- N1: file names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("wget", "wget"),
        ("gtk+", "gtk+"),
        ("openssl@1.1", "openssl@1.1"),
        ("@scope/pkg", "@scope%2fpkg"),
        ("perl(Foo::Bar)", "perl(%46oo%3a%3a%42ar)"),
        ("SDL", "%53%44%4c"),
        ("100%", "100%25"),
        ("a~b", "a%7eb"),
        (".", "%2e"),
        ("..", "%2e%2e"),
        (".hidden.", "%2ehidden%2e"),
        ("a.b", "a.b"),
        ("con", "%63on"),
        ("aux.txt", "%61ux.txt"),
        ("com1", "%63om1"),
        ("console", "console"),
        ('\\*?"<>', "%5c%2a%3f%22%3c%3e"),
    ],
)
def test_n1_a_file_name_is_the_package_with_percent_signs(package: str, name: str) -> None:
    assert file_name(package) == name


def test_n1_a_long_name_is_cut_and_told_apart_by_a_hash() -> None:
    one, other = "a" * 254 + "b", "a" * 254 + "c"
    assert len(file_name("a" * 200)) == 200
    assert file_name(one)[:101] == file_name(other)[:101] == "a" * 100 + "~"
    assert len(file_name(one)) == 133
    assert file_name(one) != file_name(other)


@mutants("the name as it is", "lower case only")
def test_n1_no_two_packages_share_a_file_on_any_file_system(mutant: str) -> None:
    encode = {"": file_name, "the name as it is": str, "lower case only": str.lower}[mutant]

    @settings(report_multiple_bugs=False, max_examples=300)
    @given(st.lists(NAMES | ALIKE, min_size=2, max_size=8, unique=True))
    def alone(packages: list[str]) -> None:
        names = [encode(package) for package in packages]
        folded = {name.lower() for name in names}
        assert len(folded) == len(packages)
        for name in names:
            assert len(name.encode()) <= 200
            assert not set(name) & set('/\\:*?"<>')
            assert not name.startswith(".")
            assert not name.endswith(".")
            assert name.split(".")[0] not in ("con", "prn", "aux", "nul", "com1", "lpt1")

    with caught(mutant):
        alone()
        if mutant:
            assert len({encode("A").lower(), encode("a").lower()}) == 2


def put(
    root: Path, package: str, name: str, place: str | None = None, kind: str = "forward"
) -> Path:
    """Write a whole, rightly checksummed package file under any name and in any shard."""
    body = f"{package}\n{kind} 0 ".encode()
    folder = root / kind / (place or shard(name, 256))
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(body + b"%08x\n" % crc32c(body))
    return folder / name


@pytest.mark.parametrize(
    ("package", "name"), [("a", "%61"), ("b", "a"), ("A", "A"), ("A", "%41%"), ("a/b", "a%2Fb")]
)
def test_n1_any_but_the_one_canonical_name_is_damage_and_named(
    root: Path, package: str, name: str
) -> None:
    Writer(root).stop()
    wrong = put(root, package, name)
    with pytest.raises(StoreDamaged, match=wrong.parent.name + "/" + name):
        recovered_index(root)


def test_n1_a_file_in_another_shard_is_damage_and_named(root: Path) -> None:
    Writer(root).stop()
    place = "00" if shard("a", 256) != "00" else "01"
    put(root, "a", "a", place)
    with pytest.raises(StoreDamaged, match=f"forward/{place}/a"):
        recovered_index(root)


@pytest.mark.parametrize("name", [".nfs0000000000000001", ".fuse_hidden0000000100000001"])
@pytest.mark.parametrize(
    "folder", ["forward", "forward/shard", "staging", "staging/epoch", "journal"]
)
def test_n1_what_a_network_file_system_leaves_behind_is_not_ours(
    root: Path, folder: str, name: str
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
    place = {"forward/shard": f"forward/{shard('a', 256)}", "staging/epoch": "staging/00000001"}
    (root / place.get(folder, folder) / name).write_bytes(b"somebody's")
    found: list[dict[str, list[str]]] = []
    reading = threading.Thread(target=lambda: found.append(recovered_index(root)), daemon=True)
    reading.start()
    reading.join(5)
    assert found == [{"a": []}]


def test_n1_temporary_names_are_never_those_of_packages(root: Path) -> None:
    """A package called as a temporary file is: it does not meet one."""
    with Writer(root) as writer:
        names = ["owner", "segment", "t1", "t2", "t3", "gone1", "proof-00000000-000000000000-0"]
        assert writer.ask(*(f"INDEX|{name}|" for name in names)) == ["OK"] * len(names)
        writer.write_files()
        assert recovered_index(root) == {name: [] for name in names}


# --- N2: reverse files ------------------------------------------------------------------------------


def test_n2_reverse_files_are_never_read_to_decide_anything(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a", "INDEX|c|a,b")
        writer.write_files()
    for path in (root / "reverse").glob("*/*"):
        path.write_bytes(b"nonsense")
    (root / "reverse" / "zz").write_bytes(b"nonsense")
    with Writer(root) as writer:
        assert writer.ask("REMOVE|a|", "REMOVE|b|") == ["FAIL", "FAIL"]
        assert writer.index == {"a": [], "b": ["a"], "c": ["a", "b"]}


def test_n2_a_package_without_dependents_has_no_reverse_file(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|a")
        writer.write_files()
        assert read_files(root, "reverse") == {"a": {"b"}}
        writer.ask("REMOVE|b|")
        writer.write_files()
        assert read_files(root, "reverse") == {}


def test_n2_many_changes_of_one_reverse_file_between_two_rounds_cost_one_write(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        for n in range(50):
            writer.ask(f"INDEX|b{n}|a")
        behind = writer.write_behind()
        behind.start()
        behind.stop(float("inf"))
        behind.join(30)
        assert behind.files == 52  # 51 forward, one reverse


# --- N3: FORMAT -------------------------------------------------------------------------------------


def rewrite(root: Path, **changes: object) -> None:
    """Change FORMAT's fields, with a right checksum."""
    first, fields, *_ = (root / "FORMAT").read_text().split("\n")
    if "version" in changes:
        first = f"pkgindex store {changes.pop('version')}"
    body = f"{first}\n{json.dumps(json.loads(fields) | changes, sort_keys=True)}\n".encode()
    (root / "FORMAT").write_bytes(body + b"crc32c %08x\n" % crc32c(body))


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"incompatible": ["sharded-journal"]}, {"names": "base64"}],
    ids=["major version", "incompatible feature", "encoding"],
)
def test_n3_what_this_release_does_not_know_is_refused(
    root: Path, changes: dict[str, object]
) -> None:
    Writer(root).stop()
    rewrite(root, **changes)
    with pytest.raises(UnknownFormat, match="FORMAT"):
        store_format.read(Mount(str(root)))


def test_n3_a_compatible_feature_that_it_does_not_know_is_no_matter(root: Path) -> None:
    Writer(root).stop()
    rewrite(root, compatible=["annotations"])
    assert store_format.read(Mount(str(root))) is not None


def test_n3_a_flipped_or_cut_byte_of_format_is_noticed_and_named(root: Path) -> None:
    Writer(root).stop()
    data = (root / "FORMAT").read_bytes()
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            (root / "FORMAT").write_bytes(damaged)
            with pytest.raises((StoreDamaged, UnknownFormat), match="FORMAT"):
                store_format.read(Mount(str(root)))


@mutants("written in place")
def test_n3_two_that_make_one_store_at_once_agree_on_its_format(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant:
        monkeypatch.setattr(store_format.os, "link", shutil.copyfile)
    root.mkdir()
    mount = Mount(str(root))
    unlink = os.unlink
    second: list[store_format.Format] = []
    write = store_format._write

    def slow(of: Mount) -> None:
        # Both have seen an empty folder; the second is quicker.
        monkeypatch.setattr(store_format, "_write", write)
        second.append(store_format.create(Mount(str(root)), insist=False))
        write(of)

    monkeypatch.setattr(store_format, "_write", slow)
    first = store_format.create(mount, insist=False)
    with caught(mutant):
        assert second == [first]
        assert os.unlink is unlink
        assert [path.name for path in root.iterdir()] == ["FORMAT"]


@pytest.mark.parametrize("turn", range(8))
def test_n3_two_that_make_one_store_in_an_absent_folder_at_once_agree(
    root: Path, turn: int
) -> None:
    barrier = threading.Barrier(4)
    found: list[object] = []

    def make() -> None:
        barrier.wait()
        try:
            found.append(store_format.create(Mount(str(root)), insist=False))
        except StoreUnreachable as error:
            found.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store_format.read(Mount(str(root)))] * 4


def hiding(real: Callable[..., T], times: int, error: int) -> Callable[..., T]:
    """As `real`, but so many times it fails first, as where a network mount's caches are behind."""
    left = iter(range(times))

    def look(mount: Mount, *path: str) -> T:
        if next(left, None) is not None:
            raise OSError(error, os.strerror(error), mount.path(*path))
        return real(mount, *path)

    return look


def test_n3_a_format_that_another_server_has_just_replaced_is_read_when_the_mount_shows_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(Mount(str(root)))
    monkeypatch.setattr(Mount, "read", hiding(Mount.read, 3, errno.ESTALE))
    with pytest.raises(StoreUnreachable, match="FORMAT: cannot read it: Stale"):
        store_format.read(Mount(str(root)))  # a local disk has no such excuse
    monkeypatch.setattr(Mount, "is_local", lambda _: False)
    assert store_format.read(Mount(str(root))) is not None


def test_n3_a_folder_that_another_server_has_just_made_is_used_when_the_mount_shows_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mount, "is_local", lambda _: False)
    monkeypatch.setattr(Mount, "names", hiding(Mount.names, 2, errno.ENOENT))
    assert store_format.create(Mount(str(root)), insist=False).shards == 256


def test_n3_a_store_is_made_only_in_a_folder_that_is_empty_or_absent(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreUnreachable, match=r"thesis\.txt"):
        store_format.create(Mount(str(root)), insist=True)
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]


def test_n3_where_a_mount_is_meant_to_be_and_is_not_a_store_is_made_only_if_insisted_upon(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_format, "_unmounted", lambda path: "/srv")
    with pytest.raises(StoreUnreachable, match="--create"):
        store_format.create(Mount(str(root)), insist=False)
    assert not root.exists()
    assert store_format.create(Mount(str(root)), insist=True).shards == 256


@mutants("read before the claim only")
def test_n3_format_is_read_again_after_the_fence(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkgindex.config import Settings

    Writer(root).stop()
    fenced = file_index.claim

    def claimed(mount: Mount, lease: Lease | None) -> object:
        mine = fenced(mount, lease)
        rewrite(root, id="0" * 32)  # another store was mounted here meanwhile
        return mine

    monkeypatch.setattr(file_index, "claim", claimed)
    if mutant:
        fmt = store_format.read(Mount(str(root)))
        monkeypatch.setattr(store_format, "read", lambda mount: fmt)
    with caught(mutant), pytest.raises(StoreDamaged, match="FORMAT"):
        file_index.FileIndex.open(str(root), Settings())


# --- L1, L2: the lock -------------------------------------------------------------------------------


def is_locked(root: Path, epoch: int) -> bool:
    """Whether another process holds the byte of an epoch: asked from a process of its own (L2)."""
    script = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))\n"
        "    except OSError: sys.exit(1)\n"
    )
    asked = subprocess.run([sys.executable, "-c", script, str(root / "LOCK"), str(epoch)])
    return asked.returncode == 1


def test_l1_the_byte_of_its_epoch_is_held_by_the_writers_process_and_no_longer(root: Path) -> None:
    with Server(f"file:{root}") as server:
        assert is_locked(root, 1)
        server.kill()
        assert not is_locked(root, 1)
    with Server(f"file:{root}", "--takeover") as server:
        assert is_locked(root, 2)
        assert server.stop() == 0
    assert not is_locked(root, 2)


def test_l1_a_held_lock_refuses_a_server_but_no_claim_waits_for_it(root: Path) -> None:
    with Server(f"file:{root}") as old:
        with pytest.raises(ServerFailed, match=f"process {old.pid} "):
            Server(f"file:{root}").start()
        # A claim that passes the lock by does not ask it: a brick's restart may have let it go anyway.
        claim(Mount(str(root)), None)
        with Wire(old.address) as wire, pytest.raises((EOFError, ConnectionError)):
            wire.ask(b"INDEX|a|")
        assert old.wait() == 5


def test_l1_a_claimant_that_died_before_its_fence_does_not_hide_the_living_writer(
    root: Path,
) -> None:
    with Server(f"file:{root}") as old:
        (root / "staging" / "00000002").mkdir()  # the take-over that died
        with pytest.raises(ServerFailed, match=f"process {old.pid} "):
            Server(f"file:{root}").start()
        with Wire(old.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"


@mutants("opened a second time")
def test_l2_a_server_opens_lock_once_so_that_nothing_it_does_drops_it(
    root: Path, mutant: str
) -> None:
    made(mount := Mount(str(root)))
    with Lease(mount) as lease:
        assert lease.hold(1)
        if mutant:
            Lease(mount).close()
        with caught(mutant):
            assert is_locked(root, 1)
    with Server(f"file:{root}") as server:
        with Wire(server.address) as wire:
            wire.ask(b"INDEX|a|")
        held = [
            str(fd.readlink()) for fd in Path(f"/proc/{server.pid}/fd").iterdir() if fd.is_symlink()
        ]
        assert held.count(str(root / "LOCK")) == 1
        server.send_signal(signal.SIGUSR1)
        assert is_locked(root, 1)


def test_l1_a_mount_without_locks_is_refused_with_the_way_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(mount := Mount(str(root)))

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with Lease(mount) as lease:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        with pytest.raises(StoreUnreachable, match="--takeover"):
            lease.hold(1)


def test_an_owned_store_is_named_with_its_host_process_and_epoch(root: Path) -> None:
    with Server(f"file:{root}") as server:
        with pytest.raises(StoreOwned) as told, Lease(mount := Mount(str(root))) as lease:
            file_index._claim(mount, lease, takeover=False)
        message = str(told.value)
        assert f"process {server.pid} on {os.uname().nodename} (epoch 1" in message
        assert "\n" not in message
