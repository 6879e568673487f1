"""The rules of writing, W1 to W7, each with what breaks without it.

What the compiled parts do is judged by the system calls of a real server, under strace. Each judge is
shown to notice: it must refuse the calls of a product that was broken on purpose, or the real calls
with the one that matters left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from pkgindex._core import Graph
from pkgindex.errors import StoreDamaged
from pkgindex.store import journal as journaling
from pkgindex.store import packages, recovery
from pkgindex.store._disk import Committer, Files, Folders
from pkgindex.store.claim import claim
from pkgindex.store.journal import segment_name
from pkgindex.store.mount import INODES_APART, Mount
from tests.servers import ServerFailed, Wire
from tests.store.reading import head_of, read_files, without_room
from tests.store.test_rules_claiming import caught, mutants
from tests.store.tracing import Call, Traced, require_strace
from tests.store.writer import Writer, index_of, recovered_index

# --- what a server does, call by call ----------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The calls of one server's life, those that name its store, and its answers."""

    root: str
    epoch: str
    calls: list[Call]

    def without(self, *dropped: Call) -> Trace:
        return Trace(self.root, self.epoch, [call for call in self.calls if call not in dropped])

    def __getitem__(self, names: str) -> list[Call]:
        """The successful calls of these names, in their order."""
        return [call for call in self.calls if call.name in names.split() and call.succeeded]

    def below(self, path: str) -> str:
        """A path relative to the store; "" for one that is not in it."""
        return path.removeprefix(self.root + "/") if path.startswith(self.root + "/") else ""

    def on(self, call: Call, number: int = 0) -> str:
        """What a call is about, relative to the store."""
        return self.below(call.paths[number]) if len(call.paths) > number else ""

    @property
    def renames(self) -> list[tuple[Call, str, str]]:
        found = [
            (call, self.on(call), self.on(call, 1)) for call in self["rename renameat renameat2"]
        ]
        return [one for one in found if one[1] or one[2]]

    @property
    def staging(self) -> str:
        return f"staging/{self.epoch}"

    @property
    def proofs(self) -> list[tuple[Call, str]]:
        """The renames of the proof file, and the name that each gave it."""
        return [
            (call, new.rpartition("/")[2])
            for call, old, new in self.renames
            if old.startswith(f"{self.staging}/proof-") and new.startswith(f"{self.staging}/proof-")
        ]

    @property
    def answers(self) -> list[Call]:
        return [
            call
            for call in self["write writev sendto"]
            if "socket" in call.arguments and '"OK\\n' in call.arguments
        ]

    def syncs(self, path: str) -> list[Call]:
        return [call for call in self["fsync fdatasync"] if self.on(call) == path]

    def listings(self, path: str) -> list[Call]:
        """Each opening of a folder anew, by its path."""
        return [
            call
            for call in self["open openat"]
            if "O_DIRECTORY" in call.arguments and call.paths[0] == f"{self.root}/{path}"
        ]


def in_order(*calls: Call | None) -> bool:
    """Whether each of these ended before the next began."""
    return all(a is not None and b is not None and a.ended < b.begun for a, b in pairwise(calls))


def first_after(calls: list[Call], call: Call | None) -> Call | None:
    return next((one for one in calls if call is not None and one.begun > call.ended), None)


def last_before(calls: list[Call], call: Call | None) -> Call | None:
    return next(
        (one for one in reversed(calls) if call is not None and one.ended < call.begun), None
    )


def live(root: Path, *, careful: bool = False, mutation: str = "") -> Iterator[Trace]:
    """Two lives of a server on one store: the first is killed, the second stopped."""
    require_strace()
    if careful:
        mutation = (
            "import pkgindex.store.journal as j, pkgindex.store.packages as p\n"
            f"j.is_local = p.is_local = lambda fd: False\n{mutation}"
        )
    lines = (
        [b"INDEX|a|", b"INDEX|b|a", b"REMOVE|nothing|", b"INDEX|c|a,b", b"REMOVE|c|"],
        [b"INDEX|d|a", b"REMOVE|b|"],
    )
    for epoch in (1, 2):
        trace = root.parent / f"{root.name}-{epoch}.strace"
        with Traced(f"file:{root}", trace, mutation=mutation) as server:
            with Wire(server.address) as wire:
                for line in lines[epoch - 1]:
                    assert wire.ask(line) == b"OK\n"
                if epoch == 1:
                    written_by = time.monotonic() + 30
                    while (root / "journal" / segment_name(1, 0)).exists():  # the first round ends
                        assert time.monotonic() < written_by
                        time.sleep(0.02)
                    assert wire.ask(b"INDEX|c|a") == b"OK\n"
                    server.send_signal(9)
                else:
                    assert server.stop() == 0
            server.wait()
            yield Trace(str(root), f"{epoch:08x}", server.calls())


Lives = tuple[Trace, Trace]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    first, second = live(tmp_path_factory.mktemp("plain") / "index")
    return first, second


@pytest.fixture(scope="module")
def careful_lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    """The lives of a server that takes its mount for one on which syncfs promises nothing."""
    first, second = live(tmp_path_factory.mktemp("careful") / "index", careful=True)
    return first, second


def refuses(judge: Callable[[Trace], None], trace: Trace) -> bool:
    try:
        judge(trace)
    except AssertionError:
        return True
    return False


# --- W1 -----------------------------------------------------------------------------------------------


def judge_w1(trace: Trace) -> None:
    """Nothing shared is made, written, cut or unlinked in place; every rename is by one's own descriptor."""
    own = trace.staging + "/"
    descriptors = set()
    for call in trace.calls:
        what = trace.on(call)
        if not call.succeeded or not (what or trace.on(call, 1)):
            continue
        if call.name in ("open", "openat", "openat2", "creat"):
            if (
                re.search(r"O_CREAT|O_TRUNC|O_WRONLY|O_RDWR", call.arguments)
                or call.name == "creat"
            ):
                mine = what.startswith(own) and re.match(r"\d+<", call.arguments)
                assert mine or what == "LOCK" or what.startswith("FORMAT.new-"), call
                assert "O_TRUNC" not in call.arguments, call
        elif call.name.startswith("rename"):
            match = re.search(rf"(\d+)<{re.escape(trace.root)}/{trace.staging}>", call.arguments)
            assert match, f"not through the writer's own staging directory: {call}"
            descriptors.add(match[1])
        elif call.name in ("unlink", "unlinkat"):
            mine = what.startswith(own) and re.match(r"\d+<", call.arguments)
            assert mine or what.startswith("FORMAT.new-"), call
        elif call.name == "rmdir":
            assert re.fullmatch(r"staging/[0-9a-f]{8}", what), call
            assert what < trace.staging, call
        elif call.name in ("link", "linkat"):
            assert trace.on(call, 1) == "FORMAT", call
        elif call.name in ("write", "writev", "pwrite64", "pwritev"):
            segment = what.startswith(f"journal/{trace.epoch}-")
            assert segment or what.startswith((own, "FORMAT.new-")), call
        else:
            assert call.name in ("mkdir", "mkdirat", "fsync", "fdatasync", "syncfs"), call
    assert len(descriptors) == 1, "the staging directory was opened more than once"


W1_BREACHES = {
    "a segment is made in place": (
        "from pkgindex.store.mount import Staging\nimport os\n"
        "def publish(self, name, *target):\n"
        "    with open(self.mount.path(*target), 'wb') as new:\n"
        "        new.write(open(self.mount.path('staging', self.name, name), 'rb').read())\n"
        "    os.unlink(name, dir_fd=self.fd)\n"
        "Staging.publish = publish\n"
        "from pkgindex.store.mount import Mount\nMount.sync_name = lambda *a: None"
    ),
    "a rename by path": (
        "from pkgindex.store.mount import Staging\nimport os\n"
        "Staging.publish = lambda self, name, *target: os.rename(\n"
        "    self.mount.path('staging', self.name, name), self.mount.path(*target))"
    ),
    "a segment is unlinked": (
        "from pkgindex.store.journal import Journal\nimport os\n"
        "from pkgindex.store.journal import segment_name\n"
        "Journal._drop = lambda self, epoch, number: os.unlink(\n"
        "    self._mount.path('journal', segment_name(epoch, number)))"
    ),
}


def test_w1_what_others_see_is_changed_only_by_renames_and_by_appending(
    lives: Lives, careful_lives: Lives
) -> None:
    for trace in (*lives, *careful_lives):
        judge_w1(trace)
        assert any(new.startswith("forward/") for _, _, new in trace.renames)


@pytest.mark.parametrize("breach", W1_BREACHES.values(), ids=W1_BREACHES)
def test_w1_the_judge_of_renames_refuses_a_server_that_breaks_the_rule(
    root: Path, breach: str
) -> None:
    assert refuses(judge_w1, next(live(root, mutation=breach)))


@mutants("through a directory that nobody takes away")
def test_w1_a_deposed_writer_that_wakes_can_publish_and_remove_nothing(
    root: Path, mutant: str
) -> None:
    with Writer(root) as old:
        old.ask("INDEX|a|", "INDEX|gone|")
        old.write_files()
        old.ask("INDEX|b|", "REMOVE|gone|")
        staging = old.claim.staging
        kept = staging.fd
        if mutant:
            aside = root.parent / "aside"
            aside.mkdir()
            staging.fd = os.open(aside, os.O_RDONLY)
        with Writer(root) as new:
            new.write_files()
            new.ask("REMOVE|b|", "INDEX|gone|")
            new.write_files()
            before = read_files(root, "forward")
            assert before == {"a": set(), "gone": set()}
            records = old.graph.take_dirty() and old.graph.render(1 << 20, 1 << 20)
            files = Files(records, staging.fd, Folders(str(root), old.format.shards), False)
            with caught(mutant):
                for step in (files.stage, files.publish):
                    try:
                        step()
                    except OSError:
                        break
                assert read_files(root, "forward") == before
            newest = max(path.name for path in (root / "journal").iterdir())
            with caught(mutant), pytest.raises(FileNotFoundError):
                staging.take("taken", "journal", newest)
        staging.fd = kept


# --- W2, W3 -------------------------------------------------------------------------------------------


def judge_w2(trace: Trace) -> None:
    """Each answer to a change: append, fdatasync, proof of just that position, answer."""
    sizes: dict[str, int] = {}
    written = [
        c for c in trace["write pwritev"] if trace.on(c).startswith(f"journal/{trace.epoch}-")
    ]
    begun = -1
    for answer in trace.answers:
        since = [c for c in written if begun < c.begun < answer.begun]
        proofs = [(c, n) for c, n in trace.proofs if begun < c.begun and c.ended < answer.begun]
        assert proofs, f"no proof before {answer}"
        for append in since:
            segment = trace.on(append).partition("-")[2]
            head = head_size(trace, trace.on(append))
            size, room = batch_size(append)
            assert append.arguments.rstrip().endswith(f", {sizes.get(segment, head)}"), append
            assert int(append.result) == size + room, append
            sizes[segment] = sizes.get(segment, head) + size
            synced = first_after(trace.syncs(trace.on(append)), append)
            assert in_order(append, synced, proofs[-1][0], answer), append
            assert synced is not None
            assert synced.name == "fdatasync"
            assert proofs[-1][1].startswith(f"proof-{segment}-{sizes[segment]:012x}-"), proofs[-1]
        begun = answer.ended
    names = [name for _, name in trace.proofs]
    assert len(set(names)) == len(names), "a proof that changes nothing"


def batch_size(append: Call) -> tuple[int, int]:
    """How many bytes a batch has, and how many zeros it takes along for the next ones to write over."""
    head, lines, *room = re.findall(r"iov_len=(\d+)", append.arguments)
    assert all('iov_base="\\0\\0' in append.arguments for _ in room), append
    return int(head) + int(lines), sum(map(int, room))


def test_w2_a_small_batch_finds_room_and_none_is_kept_where_a_sync_is_no_local_one(
    lives: Lives, careful_lives: Lives
) -> None:
    for traces, most in ((lives, 1), (careful_lives, 0)):
        for trace in traces:
            for segment in {trace.on(c) for c in trace["pwritev"]}:
                rooms = [batch_size(c)[1] for c in trace["pwritev"] if trace.on(c) == segment]
                assert [bool(room) for room in rooms[:most]] == [True] * most, segment
                assert not any(rooms[most:]), segment


def test_w2_a_segment_shares_no_block_of_inodes_with_what_each_proof_changes(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.journal.rotate()
        writer.ask("INDEX|b|")
        staging = root / "staging" / writer.claim.staging.name
        (proof,) = staging.glob("proof-*")
        for segment in (root / "journal").iterdir():
            for restless in (proof, staging):
                assert abs(segment.stat().st_ino - restless.stat().st_ino) >= INODES_APART
        assert {path.name for path in staging.iterdir()} == {"owner", proof.name}


def test_w2_where_all_inodes_are_near_a_segment_is_made_all_the_same(root: Path) -> None:
    with Writer(root) as writer:
        staging = writer.claim.staging
        near = os.fstat(staging.fd).st_ino
        everywhere = range(max(0, near - 100_000), near + 100_000)
        fd = staging.create_apart("new", b"contents", everywhere)
        assert os.path.samestat(os.fstat(fd), os.stat("new", dir_fd=staging.fd))
        os.close(fd)
        found = root / "staging" / staging.name
        assert (found / "new").read_bytes() == b"contents"
        assert not list(found.glob("new-*"))


def head_size(trace: Trace, segment: str) -> int:
    """The size of a segment's head, as it was written in staging before its rename."""
    published = next(call for call, _, new in trace.renames if new == segment)
    head = last_before(
        [c for c in trace["write"] if trace.on(c) == f"{trace.staging}/segment"], published
    )
    assert head is not None
    return int(head.result)


def test_w2_a_batch_is_appended_synced_and_proven_before_its_answers_leave(lives: Lives) -> None:
    assert [len(trace.answers) for trace in lives] == [6, 2]
    for trace in lives:
        judge_w2(trace)


def test_w2_the_judge_of_commits_misses_no_sync_and_no_proof(lives: Lives) -> None:
    trace = lives[0]
    for call in trace["fdatasync"]:
        assert refuses(judge_w2, trace.without(call)), call
    answered = [last_before([c for c, _ in trace.proofs], answer) for answer in trace.answers]
    assert len(answered) == 6
    for proof in answered:
        assert proof is not None
        assert refuses(judge_w2, trace.without(proof)), proof


@mutants("no proof")
def test_w2_a_deposed_writer_acknowledges_nothing_though_its_journal_takes_the_batch(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant:
        # A proof that nobody can take away is none.
        aside = root.parent / "aside"
        aside.mkdir()
        monkeypatch.setattr(
            journaling,
            "Committer",
            lambda _, *others: Committer(os.open(aside, os.O_RDONLY), *others),
        )
        proof = "proof-00000000-000000000000-0"
        (aside / proof).touch()
    with Writer(root) as old:
        claim(Mount(str(root)), None)
        with caught(mutant), pytest.raises(FileNotFoundError):
            old.ask("INDEX|a|")


@mutants("answers without effect leave at once")
@pytest.mark.parametrize("line", ["REMOVE|x|", "INDEX|a|", "INDEX|b|missing", "REMOVE|needed|"])
def test_w3_answers_without_effect_wait_for_a_proof_too(root: Path, line: str, mutant: str) -> None:
    """Else a deposed writer answers REMOVE x with OK, because its graph lacks what the new one has."""
    with Writer(root) as old:
        old.ask("INDEX|a|", "INDEX|needed|", "INDEX|needing|needed")
        claim(Mount(str(root)), None)
        ask = old.apply if mutant else old.ask
        with caught(mutant), pytest.raises(FileNotFoundError):
            ask(line)


def judge_w3(trace: Trace) -> None:
    """The REMOVE of nothing, third: a proof after its message was read, and nothing to sync."""
    before, answer = trace.answers[1], trace.answers[2]
    between = [c for c in trace.calls if before.ended < c.begun and c.ended < answer.begun]
    assert any(call in between for call, _ in trace.proofs)
    assert not [c for c in between if c.name == "fdatasync"]


def test_w3_an_answer_without_effect_costs_a_proof_and_no_sync(lives: Lives) -> None:
    judge_w3(lives[0])
    proof = last_before([call for call, _ in lives[0].proofs], lives[0].answers[2])
    assert proof is not None
    assert refuses(judge_w3, lives[0].without(proof))


# --- W4 -----------------------------------------------------------------------------------------------


@mutants("judged again")
def test_w4_redo_lines_are_replayed_unconditionally_over_whatever_files_there_are(
    mutant: str,
) -> None:
    """z's file is newer than the journal's beginning: z is gone already, and q's line names it."""
    graph = Graph(journalled=True)
    graph.replay(b"+p||\n+q|p|\n", track=False)  # z's file has been taken away by the round
    lines = b"+q|z|p\n-p|\n+q||z\n-z|\n"
    if mutant:
        for line in lines.decode().splitlines():
            command = "INDEX" if line[0] == "+" else "REMOVE"
            name, dependencies = [*line[1:].split("|"), ""][:2]
            data = f"{command}|{name}|{dependencies if line[0] == '+' else ''}\n".encode()
            apply(graph, data)
    else:
        graph.replay(lines)
    with caught(mutant):
        assert index_of(graph) == {"q": []}


def apply(graph: Graph, data: bytes) -> None:
    from pkgindex._core import Batch

    batch = Batch()
    batch.load(bytearray(data), 0, len(data), 10)
    graph.apply(batch)


@mutants("it names no dependency that goes")
def test_w4_a_redo_line_names_what_it_takes_away_so_no_reverse_file_is_forgotten(
    root: Path, mutant: str
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|old|", "INDEX|new|", "INDEX|a|old")
        writer.write_files()
        writer.apply("INDEX|a|new")
        _, lines, _ = writer.graph.seal()
        line = bytes(lines)
    if mutant:
        line = b"+a|new|\n"
    graph = Graph(journalled=True)
    graph.replay(b"+old||\n+new||\n+a|new|\n", track=False)  # a's forward file was written already
    graph.replay(line)
    with caught(mutant):
        assert sorted(graph.dirty_reverses()) == ["new", "old"]


# --- W5 -----------------------------------------------------------------------------------------------


def judge_w5(trace: Trace) -> None:
    """Written, synced, renamed, synced, looked for by a path opened anew; then the segment goes."""
    syncs = trace["syncfs"]
    published = [
        (c, old, new) for c, old, new in trace.renames if new.startswith(("forward/", "reverse/"))
    ]
    assert published
    gone = [call for call, old, _ in trace.renames if old.startswith("journal/")]
    for rename, temporary, target in published:
        written = last_before([c for c in trace["write"] if trace.on(c) == temporary], rename)
        assert in_order(written, first_after(syncs, written), rename), rename
        synced = first_after(syncs, rename)
        looked = first_after(trace.listings(target.rpartition("/")[0]), synced)
        assert in_order(rename, synced, looked), rename
        removal = first_after(gone, rename)
        assert removal is None or in_order(looked, removal), removal
    for rename, folder in removals(trace):
        synced = first_after(syncs, rename)
        assert in_order(rename, synced, first_after(trace.listings(folder), synced)), rename


def removals(trace: Trace) -> list[tuple[Call, str]]:
    """The renames that took package files away, and the folder of each."""
    shared = ("forward/", "reverse/")
    return [(c, old.rpartition("/")[0]) for c, old, _ in trace.renames if old.startswith(shared)]


def judge_w5_careful(trace: Trace) -> None:
    """The same where syncfs promises nothing: each file, and each folder, by itself."""
    published = [
        (c, old, new) for c, old, new in trace.renames if new.startswith(("forward/", "reverse/"))
    ]
    assert published
    gone = [call for call, old, _ in trace.renames if old.startswith("journal/")]
    assert not trace["syncfs"]
    for rename, temporary, target in published:
        written = last_before([c for c in trace["write"] if trace.on(c) == temporary], rename)
        assert in_order(written, first_after(trace.syncs(temporary), written), rename), rename
        folder = target.rpartition("/")[0]
        itself = first_after(trace.syncs(target), rename)
        around = first_after(trace.syncs(folder), rename)
        assert itself is not None, f"not synced after its rename: {target}"
        assert around is not None, f"not synced after a rename in it: {folder}"
        looked = first_after(trace.listings(folder), max(itself, around, key=lambda c: c.ended))
        assert in_order(rename, looked), rename
        removal = first_after(gone, rename)
        assert removal is None or in_order(looked, removal), removal
    for rename, folder in removals(trace):
        synced = first_after(trace.syncs(folder), rename)
        assert in_order(rename, synced, first_after(trace.listings(folder), synced)), rename


def test_w5_files_are_synced_before_and_their_names_after_the_rename_and_only_then_segments_go(
    lives: Lives,
) -> None:
    for trace in lives:
        judge_w5(trace)
        for call in trace["syncfs"]:
            assert refuses(judge_w5, trace.without(call)), call


def test_w5_on_a_mount_each_file_and_folder_is_synced_by_itself(careful_lives: Lives) -> None:
    for trace in careful_lives:
        judge_w5_careful(trace)
        shared = ("forward/", "reverse/")
        about = {
            name for _, old, new in trace.renames if new.startswith(shared) for name in (old, new)
        }
        about |= {name.rpartition("/")[0] for name in about} - {trace.staging}
        about |= {folder for _, folder in removals(trace)}
        judged = [c for c in trace["fsync"] if trace.on(c) in about]
        assert len(judged) > 6
        for call in judged:
            assert refuses(judge_w5_careful, trace.without(call)), call


@mutants("it does not wait")
def test_w5_nothing_is_renamed_before_the_change_that_was_copied_is_durable(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "INTERVAL_SECONDS", 0.01)
    if mutant:
        monkeypatch.setattr(packages.WriteBehind, "_durable", lambda self, ticket: True)
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.apply("INDEX|b|a")  # applied, not committed: the mount is slow
        behind = writer.write_behind()
        behind.start()
        time.sleep(0.3)
        with caught(mutant):
            assert "b" not in read_files(root, "forward")
        writer.commit()
        behind.settled(writer.graph.settled)
        behind.stop(float("inf"))
        assert behind.join(30)
        assert read_files(root, "forward") == {"a": set(), "b": {"a"}}


@mutants("it does not look")
@pytest.mark.parametrize("what", ["a file", "a removal"])
def test_w5_a_rename_that_the_mount_undoes_after_its_sync_is_final(
    root: Path, what: str, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X6: the descriptor's fsync succeeds and the name is not there."""
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.write_files()
        (path,) = (root / "forward").glob("*/a")
        contents = path.read_bytes()
        writer.ask("INDEX|new|") if what == "a file" else writer.ask("REMOVE|a|")
        assert writer.graph.take_dirty()
        records = writer.graph.render(1 << 20, 1 << 20)
        files = Files(records, writer.claim.staging.fd, Folders(str(root), 256), False)
        files.stage()
        files.publish()
        if what == "a file":
            (new,) = (root / "forward").glob("*/new")
            new.unlink()
        else:
            path.write_bytes(contents)
        settle = (lambda: None) if mutant else files.settle
        with caught(mutant), pytest.raises(OSError, match="undone"):
            settle()


# --- W6 -----------------------------------------------------------------------------------------------


def judge_w6(trace: Trace) -> None:
    """Segments are born whole, their names synced and seen before anything rests on them; X2, X4."""
    born = [(c, new) for c, old, new in trace.renames if new.startswith("journal/")]
    gone = [(c, old) for c, old, _ in trace.renames if old.startswith("journal/")]
    assert born
    assert gone
    for rename, segment in born:
        temporary = f"{trace.staging}/segment"
        written = last_before([c for c in trace["write"] if trace.on(c) == temporary], rename)
        assert in_order(written, first_after(trace.syncs(temporary), written), rename), rename
        itself = first_after(trace.syncs(segment), rename)
        folder = first_after(trace.syncs("journal"), rename)
        looked = first_after(trace.listings("journal"), folder)
        number = segment.partition("-")[2]
        rests = [c for c in trace["write pwritev"] if trace.on(c) == segment]
        rests += [call for call, name in trace.proofs if name.startswith(f"proof-{number}-")]
        rests += [call for call, old in gone if call.begun > rename.ended]
        assert rests, f"nothing rests on {segment}"
        for one in rests:
            assert in_order(rename, itself, folder, looked, one), f"{one} rests on {rename}"
    before: Call | None = None
    for removal, segment in gone:
        if before is not None:
            synced = first_after(trace.syncs("journal"), before)
            assert in_order(before, synced, first_after(trace.listings("journal"), synced), removal)
        before = removal
        newer = [call for call, new in born if new > segment and call.ended < removal.begun]
        assert newer, f"{segment} goes before it has a successor"
    assert [segment for _, segment in gone] == sorted(segment for _, segment in gone)


W6_BREACHES = {
    "names are not synced": "from pkgindex.store.mount import Mount\nMount.sync_name = lambda *a: None",
    "removals are not synced": (
        "from pkgindex.store.mount import Mount\nMount.sync_removal = lambda *a: None"
    ),
    "the latest goes first": (
        "import pkgindex.store.recovery, pkgindex.store.journal as j\n"
        "j.segments = lambda mount, s=j.segments: s(mount)[::-1]"
    ),
}


def test_w6_a_segments_name_is_synced_before_anything_rests_on_it_and_removals_go_in_order(
    lives: Lives,
) -> None:
    for trace in lives:
        judge_w6(trace)


@pytest.mark.parametrize("breach", W6_BREACHES.values(), ids=W6_BREACHES)
def test_w6_the_judge_of_segments_refuses_a_server_that_breaks_the_rule(
    root: Path, breach: str
) -> None:
    # Several old segments, so that an order of their removals shows.
    with Writer(root) as writer:
        for _ in range(3):
            writer.ask("INDEX|a|")
            writer.journal.rotate()
    require_strace()
    with Traced(f"file:{root}", root.parent / "trace", mutation=breach) as server:
        with Wire(server.address) as wire:
            wire.ask(b"INDEX|b|")
        assert server.stop() == 0
        assert refuses(judge_w6, Trace(str(root), "00000002", server.calls()))


def test_w6_a_head_tells_its_epoch_number_next_change_and_the_segment_before(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|", "INDEX|b|")
        writer.journal.rotate()
    before = without_room(root / "journal" / segment_name(1, 0))
    head = head_of((root / "journal" / segment_name(1, 1)).read_bytes())
    assert head is not None
    fields = head[0]
    assert fields.pop("previous")[0] == len(before)  # type: ignore[index]
    assert fields == {
        "bytes": 0,
        "covered": 0,
        "epoch": 1,
        "forgotten": 0,
        "next": 3,
        "origins": [],
        "segment": 1,
        "snapshot": None,
        "written": 0,
    }


@mutants("the head does not know the segment before")
def test_w6_a_segment_that_lost_its_last_batch_is_noticed_by_its_successor(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        kept = (root / "journal" / segment_name(1, 0)).read_bytes()
        writer.ask("INDEX|a|", "INDEX|b|", "REMOVE|b|", "INDEX|b|a")
        writer.journal.rotate()
        writer.ask("INDEX|c|")
    (root / "journal" / segment_name(1, 0)).write_bytes(kept)
    if mutant:
        parse = recovery.parse_head

        class Whatever:
            def __eq__(self, other: object) -> bool:
                return True

            def __ne__(self, other: object) -> bool:
                return False

        def parse_blindly(data: bytes) -> tuple[object, int]:
            head, end = parse(data)
            if head.segment:
                head = dataclasses.replace(head, next_change=Whatever())  # type: ignore[arg-type]
            return dataclasses.replace(head, previous=Whatever()), end  # type: ignore[arg-type]

        monkeypatch.setattr(recovery, "parse_head", parse_blindly)
        monkeypatch.setattr(recovery, "replay_lines", blind_replay(recovery.replay_lines))
    with caught(mutant), pytest.raises(StoreDamaged, match=segment_name(1, 0)):
        recovered_index(root)


def blind_replay(replay: Callable[..., object]) -> Callable[..., object]:
    """Replay a segment from the change that its first batch names, whatever stood before."""

    def blindly(data: bytes, offset: int, checksum: int, number: object) -> object:
        match = re.match(rb"batch \w+ \w+ (\w+)", data[offset:])
        return replay(data, offset, checksum, int(match[1], 16) if match else 1)

    return blindly


@mutants("damaged heads are passed over")
def test_w6_a_first_segment_without_a_whole_head_is_damage_when_its_successor_is_there(
    root: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        writer.journal.rotate()
        writer.ask("INDEX|b|")
    path = root / "journal" / segment_name(1, 0)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    if mutant:
        monkeypatch.setattr(recovery, "segments", lambda mount: journaling.segments(mount)[1:])
        monkeypatch.setattr(journaling.Head, "base", 99)  # and thought to be in files
    with caught(mutant), pytest.raises(StoreDamaged, match=segment_name(1, 0)):
        recovered_index(root)


# --- W7 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "place"),
    [("fdatasync", "journal/00000001-00000000"), ("pwritev", "journal/00000001-00000000")],
)
def test_w7_the_first_failed_call_is_final_though_a_second_would_succeed(
    root: Path, call: str, place: str
) -> None:
    require_strace()
    inject = [f"{call}:error=EIO:when=2"]
    with Traced(f"file:{root}", root.parent / "trace", inject=inject) as server:
        with Wire(server.address) as wire:
            assert wire.ask(b"INDEX|a|") == b"OK\n"
            with pytest.raises((EOFError, ConnectionError)):
                wire.ask(b"INDEX|b|")
        assert server.wait() == 5
        trace = Trace(str(root), "00000001", server.calls())
    tried = [c for c in trace.calls if c.name == call and trace.on(c) == place]
    assert [c.succeeded for c in tried] == [True, False]
    after = [c for c in trace.calls if c.begun > tried[1].ended and c.succeeded and trace.on(c)]
    assert not [c for c in after if c.name.startswith(("write", "rename", "fsync", "fdata"))], after
    assert len(trace.answers) == 1


def test_w7_the_commit_thread_that_failed_takes_no_other_batch(root: Path) -> None:
    with Writer(root) as writer:
        writer.ask("INDEX|a|")
        claim(Mount(str(root)), None)
        with pytest.raises(FileNotFoundError):
            writer.ask("INDEX|b|")
        with pytest.raises((RuntimeError, OSError)):
            writer.ask("INDEX|c|")
        writer.journal._thread.join(60)
        assert not writer.journal._thread.is_alive()


# --- the order of a start: C1, C2, C6, N3 ---------------------------------------------------------------


def judge_start(trace: Trace) -> None:
    """Owner file, fence, sync, second listing, FORMAT, reading, own head, proof, answer, removals."""
    own = trace.staging
    owner = next(
        c for c in trace["openat"] if trace.on(c) == f"{own}/owner" and "O_EXCL" in c.arguments
    )
    owner_synced = first_after(trace.syncs(f"{own}/owner"), owner)
    folder_synced = first_after(trace.syncs("staging"), owner_synced)
    read_again = first_after(
        [c for c in trace["openat"] if trace.on(c) == f"{own}/owner" and "O_RDONLY" in c.arguments],
        folder_synced,
    )
    taken = [
        c for c, old, new in trace.renames if old.startswith("staging/") and not old.startswith(own)
    ]
    removed = trace["rmdir"]
    first = taken[0] if taken else None
    assert in_order(owner, owner_synced, folder_synced, read_again)
    fenced = read_again
    if first is not None:
        assert in_order(read_again, first)
        assert removed
        fenced = removed[-1]
        # A power loss may bring the directory back: sync, through FUSE by a file, then list again.
        assert first_after(trace.syncs(f"{own}/owner"), fenced) is not None, "owner file not synced"
    synced = first_after(trace.syncs("staging"), fenced)
    listed = first_after(trace.listings("staging"), synced)
    format_read = first_after([c for c in trace["openat"] if trace.on(c) == "FORMAT"], listed)
    reading = first_after(trace.listings("forward"), format_read)
    born = next(c for c, _, new in trace.renames if new == f"journal/{trace.epoch}-00000000")
    assert in_order(fenced, synced, listed, format_read, reading, born)
    proof = first_after([c for c, _ in trace.proofs], born)
    assert in_order(born, proof, trace.answers[0])
    for removal, old, _ in trace.renames:
        if old.startswith("journal/") and not old.startswith(f"journal/{trace.epoch}"):
            assert in_order(proof, removal), removal


def test_a_start_claims_fences_reads_and_owns_before_it_answers_or_removes(lives: Lives) -> None:
    for trace in lives:
        judge_start(trace)


def test_the_judge_of_starts_misses_no_sync_listing_or_proof(lives: Lives) -> None:
    trace = lives[1]
    removed = trace["rmdir"][-1]
    owner = next(c for c in trace["openat"] if "owner" in c.arguments and "O_EXCL" in c.arguments)
    assert refuses(judge_start, trace.without(*trace.syncs(f"{trace.staging}/owner")))
    assert refuses(
        judge_start, trace.without(*[c for c in trace.syncs("staging") if c.begun > removed.ended])
    )
    assert refuses(
        judge_start,
        trace.without(
            *[c for c in trace.syncs("staging") if c.begun > owner.ended][:1] * 1,
            *[c for c in trace.syncs("staging") if c.ended < removed.begun],
        ),
    )
    assert refuses(
        judge_start,
        trace.without(*[c for c in trace.listings("staging") if c.begun > removed.ended]),
    )
    assert refuses(judge_start, trace.without(*[c for c, _ in trace.proofs]))
    formats = [c for c in trace["openat"] if trace.on(c) == "FORMAT" and c.begun > removed.ended]
    assert refuses(judge_start, trace.without(*formats))


def test_n3_format_is_synced_before_it_gets_its_name_and_read_back(lives: Lives) -> None:
    trace = lives[0]
    linked = next(c for c in trace["link"] if trace.on(c, 1) == "FORMAT")
    new = trace.on(linked)
    synced = first_after(trace.syncs(new), None) or last_before(trace.syncs(new), linked)
    root_synced = first_after([c for c in trace["fsync"] if c.paths == [trace.root]], linked)
    read_back = first_after([c for c in trace["openat"] if trace.on(c) == "FORMAT"], linked)
    assert in_order(synced, linked, root_synced, read_back)


def test_the_store_on_disk_is_what_the_pages_show(root: Path) -> None:
    """The literal samples of the format: a person reads a package's file with cat."""
    with Writer(root) as writer:
        writer.ask("INDEX|zlib|", "INDEX|gettext|", "INDEX|wget|zlib,gettext,zlib")
        writer.write_files()
    (wget,) = (root / "forward").glob("*/wget")
    assert wget.read_bytes().split(b"\n")[:3] == [b"wget", b"gettext", b"zlib"]
    assert re.fullmatch(rb"forward 2 [0-9a-f]{8}", wget.read_bytes().split(b"\n")[3])
    (zlib,) = (root / "reverse").glob("*/zlib")
    assert zlib.read_bytes().split(b"\n")[:2] == [b"zlib", b"wget"]
    assert json.loads((root / "staging" / "00000001" / "owner").read_text())["pid"] == os.getpid()


def test_a_server_that_cannot_be_started_is_no_pass(root: Path) -> None:
    """The mutations above take effect: a broken one is noticed at once."""
    require_strace()
    with pytest.raises(ServerFailed):
        Traced(f"file:{root}", root.parent / "trace", mutation="raise SystemExit(9)").start()


def test_w7_a_commit_handed_over_after_a_rotation_has_failed_hears_of_that(root: Path) -> None:
    """The failure may be known to the commit thread before the loop has been told of it."""
    with Writer(root) as old:
        committer = old.journal._committer
        committer.fail(5)
        old.journal.submit(memoryview(b""), 0, 1)
        with pytest.raises(OSError, match="the next segment"):
            old.journal.completed()
