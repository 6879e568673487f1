"""The challenge both ways, and the secret that both ends know."""

from __future__ import annotations

import errno
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkgindex.cluster import trust
from pkgindex.cluster.frames import (
    SMALL,
    VERSION,
    Batch,
    Challenge,
    FrameError,
    Message,
    Ping,
    Proof,
    Reader,
    encode,
)
from pkgindex.cluster.trust import Dials, Listens, NotTrusted, secret_of
from pkgindex.errors import ConfigError, StoreDamaged, StoreUnreachable
from pkgindex.store.mount import Mount
from tests.store.test_rules_names import hiding

SECRET, STORE = bytes(range(32)), "0123456789abcdef" * 2


def passed_on(messages: list[Message]) -> list[Message]:
    """Hand messages over as a stranger's frames are read."""
    reader, found = Reader(), []
    for part in (part for message in messages for part in encode(message)):
        reader.get_buffer()[: len(part)] = part
        found += reader.received(len(part))
    return found


def exchange(dials: Dials, listens: Listens) -> list[Message]:
    """Let two talk until neither has more to say; all that was said. Raises NotTrusted."""
    said: list[Message] = []
    one: list[Message] = dials.begin()
    while one:
        said += one
        other = [reply for message in passed_on(one) for reply in listens.heard(message)]
        said += other
        one = [reply for message in passed_on(other) for reply in dials.heard(message)]
    return said


def test_two_that_know_the_secret_trust_each_other_after_two_frames_each() -> None:
    dials, listens = Dials(SECRET, STORE), Listens(SECRET, STORE)
    said = exchange(dials, listens)
    assert (dials.trusted, listens.trusted) == (True, True)
    assert [type(message) for message in said] == [Challenge, Challenge, Proof, Proof]
    assert SECRET not in b"".join(bytes(part) for message in said for part in encode(message))


@pytest.mark.parametrize(
    ("secret", "store"), [(SECRET[::-1], STORE), (b"", STORE), (SECRET, STORE[::-1])]
)
def test_another_secret_or_another_store_is_not_trusted_by_either(
    secret: bytes, store: str
) -> None:
    dials, listens = Dials(secret, store), Listens(SECRET, STORE)
    with pytest.raises(NotTrusted, match="does not know the secret of this store") as caught:
        exchange(dials, listens)
    assert caught.value.reply == ()
    assert (dials.trusted, listens.trusted) == (False, False)
    honest = Dials(SECRET, STORE)
    honest.begin()
    (proof,) = honest.heard(Challenge(VERSION, b"n" * 32))
    with pytest.raises(NotTrusted):
        honest.heard(Proof(b"\0" * 32))
    assert isinstance(proof, Proof)
    assert not honest.trusted


def test_the_one_that_listens_proves_nothing_to_one_that_has_not() -> None:
    listens = Listens(SECRET, STORE)
    assert [type(each) for each in listens.heard(Challenge(VERSION, b"n" * 32))] == [Challenge]
    with pytest.raises(NotTrusted):
        listens.heard(Proof(b"\0" * 32))


def test_an_exchange_that_was_recorded_is_of_no_use() -> None:
    said = exchange(Dials(SECRET, STORE), Listens(SECRET, STORE))
    listens = Listens(SECRET, STORE)
    listens.heard(said[0])
    with pytest.raises(NotTrusted):
        listens.heard(said[2])
    dials = Dials(SECRET, STORE)
    dials.begin()
    dials.heard(said[1])
    with pytest.raises(NotTrusted):
        dials.heard(said[3])


def test_a_challenge_that_is_sent_back_is_not_answered() -> None:
    dials = Dials(SECRET, STORE)
    with pytest.raises(NotTrusted, match="sends back"):
        dials.heard(dials.begin()[0])


def test_what_one_side_proves_is_no_proof_of_the_other_side() -> None:
    """A stranger without the secret lets two honest sides answer for it."""
    listens, other = Listens(SECRET, STORE), Dials(SECRET, STORE)
    (challenge,) = listens.heard(other.begin()[0])
    (proof,) = other.heard(challenge)
    with pytest.raises(NotTrusted):
        other.heard(proof)  # its own, sent back to it
    # The same nonces the other way round: a listening side's proof does for no dialling one.
    assert isinstance(challenge, Challenge)
    turned = Listens(SECRET, STORE, nonce=challenge.nonce)
    (mine,) = other.begin()
    turned.heard(mine)
    (answer,) = turned.heard(proof)
    fresh = Listens(SECRET, STORE, nonce=challenge.nonce)
    fresh.heard(mine)
    with pytest.raises(NotTrusted):
        fresh.heard(answer)


def test_another_version_is_refused_by_both_with_a_line_that_says_which() -> None:
    listens = Listens(SECRET, STORE)
    with pytest.raises(
        NotTrusted, match="speaks version 2 of the cluster protocol, not 1"
    ) as caught:
        listens.heard(Challenge(2, b"whatever that has"))
    (reply,) = caught.value.reply
    dials = Dials(SECRET, STORE)
    dials.begin()
    with pytest.raises(NotTrusted, match=r"speaks version 3 .*: run one release on all servers"):
        dials.heard(Challenge(3, b""))
    assert isinstance(reply, Challenge)
    assert reply.version == VERSION


@pytest.mark.parametrize("side", [Dials, Listens])
@pytest.mark.parametrize(
    "out_of_turn",
    [
        [Proof(b"\0" * 32)],
        [Ping(1, 1)],
        [Challenge(VERSION, b"n" * 32), Challenge(VERSION, b"m" * 32)],
        [Challenge(VERSION, b"n" * 32), Batch(1, 1, b"+a||\n")],
    ],
)
def test_what_is_said_out_of_turn_ends_it(
    side: type[Dials | Listens], out_of_turn: list[Message]
) -> None:
    one = side(SECRET, STORE)
    *before, last = out_of_turn
    for message in before:
        one.heard(message)
    with pytest.raises(NotTrusted, match=f"said {type(last).__name__.upper()} out of turn"):
        one.heard(last)
    assert not one.trusted


def test_nothing_is_heard_after_the_end() -> None:
    dials, listens = Dials(SECRET, STORE), Listens(SECRET, STORE)
    said = exchange(dials, listens)
    for one, last in ((listens, said[2]), (dials, said[3])):
        with pytest.raises(NotTrusted):
            one.heard(last)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_a_stranger_that_says_anything_is_not_trusted_and_gets_one_small_frame_at_most(
    data: bytes,
) -> None:
    listens, reader = Listens(SECRET, STORE), Reader()
    sent: list[Message] = []
    reader.get_buffer()[: len(data)] = data
    try:
        for message in reader.received(len(data)):
            sent += listens.heard(message)
    except FrameError:
        pass
    except NotTrusted as error:
        sent += error.reply
    assert not listens.trusted
    assert len(b"".join(bytes(part) for message in sent for part in encode(message))) <= 64


def test_a_strangers_frame_is_small_or_is_not_read() -> None:
    reader = Reader()
    head = encode(Batch(1, 1, b"x" * (SMALL + 1)))[0]
    reader.get_buffer()[: len(head)] = head
    with pytest.raises(FrameError, match="at most here"):
        list(reader.received(len(head)))


# --- the secret -----------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    return Mount(str(tmp_path))


def test_the_secret_is_made_once_for_its_owner_alone(mount: Mount) -> None:
    made = secret_of(mount)
    assert len(made) == 32
    assert secret_of(mount) == made
    assert secret_of(Mount(mount.root)) == made
    assert stat.S_IMODE(Path(mount.path("servers", "secret")).stat().st_mode) == 0o600
    assert [path.name for path in Path(mount.path("servers")).iterdir()] == ["secret"]


def test_servers_that_make_it_at_once_agree(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    make = trust._make

    def at_once(of: Mount) -> None:
        together.wait(10)
        make(of)

    monkeypatch.setattr(trust, "_make", at_once)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(secret_of(mount))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert [path.name for path in Path(mount.path("servers")).iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_may_read_is_refused(mount: Mount, mode: int) -> None:
    secret_of(mount)
    Path(mount.path("servers", "secret")).chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        secret_of(mount)


@pytest.mark.parametrize("data", [b"", b"\n", b"0" * 64, b"0" * 63 + b"\n", b"G" * 64 + b"\n"])
def test_a_damaged_secret_is_named_and_never_replaced(mount: Mount, data: bytes) -> None:
    secret_of(mount)
    path = Path(mount.path("servers", "secret"))
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match="servers/secret: damaged"):
        secret_of(mount)
    assert path.read_bytes() == data


def test_a_folder_of_servers_that_leads_elsewhere_is_refused(mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "servers").symlink_to("elsewhere")
    with pytest.raises(StoreUnreachable, match="servers: cannot read or make"):
        secret_of(mount)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_another_server_has_just_made_is_used_when_the_mount_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Mount(str(tmp_path))
    monkeypatch.setattr(Mount, "names", hiding(Mount.names, 2, errno.ENOENT))
    monkeypatch.setattr(Mount, "is_local", lambda _: False)
    assert secret_of(mount) == secret_of(mount)
