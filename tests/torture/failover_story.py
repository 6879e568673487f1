"""One cluster, and fault after fault under its clients; each act is judged before the next begins.

    with Story(place, folder, seed) as story:
        story.act("writer killed")

An act: the clients talk to all servers; a fault; changes flow again on every server that lives; what was
done is undone (a killed server is started again, a paused one woken); the clients fall silent and are all
answered. Then the files are read from behind the mounts, the history must explain them, and each server
must answer what they say.

How reads are judged. With `--reads strong` the history must be linearizable over all servers. Without, a
QUERY may be answered from a state that is older than its sending, but never older than what its connection
was told before: its call is then taken to have been sent when the one before it on its connection was.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers import Server, ServerFailed
from tests.store.reading import nothing_is_behind, read_index
from tests.torture.failover_fleet import Fleet, Life, Ratchets
from tests.torture.gluster import GlusterFailed, Volume
from tests.torture.history import Call
from tests.torture.kill import keep
from tests.torture.linearizability import Index, judge
from tests.torture.reigns import Place

__all__ = ["TAKEOVER_AFTER", "Story"]

TAKEOVER_AFTER = 1.0  # seconds

#: Seconds after which changes that do not flow again are a failure, whatever the machine is about.
LIVENESS = 15.0

#: Seconds for which a server is paused, or a mount hangs, at most after changes flow again elsewhere.
LINGERS = 1.5

#: Seconds in which a follower has come to what the writer had settled, when nobody changes anything.
LAG = 3.0

Start = Callable[[Path, int, tuple[str, ...]], Server]


class Failed(Exception):
    """The story cannot go on."""


class Story:
    """A cluster of servers, one in each seat, and its clients."""

    takeover_after = TAKEOVER_AFTER
    liveness = LIVENESS

    def __init__(
        self, place: Place, folder: Path, seed: int, start: Start, *, strong: bool = False
    ) -> None:
        """`start`: makes a server, not started, for the n-th seat."""
        folder.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.folder = folder
        self.strong = strong
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.undecided: list[str] = []
        self.stops: dict[str, list[float]] = defaultdict(list)  # by fault: seconds without changes
        self.what = "the first start"
        self.lives: list[Life] = []  # of each seat, the present one
        self.known: Index = {}
        self._start = start
        self._all: list[Life] = []
        self._paused: list[Life] = []
        self._cut: list[Life] = []  # from anything
        self._hung: list[Life] = []  # writers whose mount hangs
        self._lingers = 0.0  # seconds for which a fault goes on at most after changes flow again
        self._heal: list[Callable[[], None]] = []
        self.fleet = Fleet(self.crowd(seed))

    def crowd(self, seed: int) -> Ratchets:
        """Who talks to the servers."""
        return Ratchets(
            random.Random(seed),
            watchers=8,
            neighbourhoods=14,
            neighbours=4,
            owned=5,
            pause=0.04,
        )

    # --- its beginning and end --------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.lives += self.live(*range(len(self.place.roots)))
            self.fleet.prepare(self.lives[-1])
        except BaseException:
            self.end()
            raise
        self.known = dict.fromkeys(self.fleet.crowd.mark_names, frozenset())
        self.fleet.add(*self.lives)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is None and not self.failures:
                self.stop_cleanly()
        finally:
            self.end()

    def live(self, *numbers: int) -> list[Life]:
        """Start a server in each of these seats, at once."""
        servers = [self.server(number) for number in numbers]
        for server in servers:
            server.launch()
        try:
            for server in servers:
                server.wait_for("serving")
        except ServerFailed:
            for server in servers:
                server.kill()
            raise
        started = [Life(n, s, s.address) for n, s in zip(numbers, servers, strict=True)]
        self._all += started
        return started

    def server(self, number: int) -> Server:
        """A server for this seat, not started."""
        options: tuple[str, ...] = (
            "--cluster",
            "127.0.0.1:0",
            "--takeover-after",
            str(self.takeover_after),
        )
        options += ("--reads", "strong") if self.strong else ()
        return self._start(self.place.roots[number], number, options)

    def end(self) -> None:
        """End everything, and keep the logs if anything failed."""
        for life in self._all:
            life.is_doomed = True
        for life in self._paused:
            life.server.send_signal(signal.SIGCONT)
        for name in self.place.volume.mounts if self.place.volume else ():
            self.place.volume.wake(name)
        self.fleet.end()
        self.take_failures()
        for n, life in enumerate(self._all):
            life.server.kill()
            if self.failures:
                lines = "\n".join(life.server.lines)
                (self.folder / f"server-{life.number}-{n}.log").write_text(lines + "\n")
            life.server.log_file.unlink(missing_ok=True)

    def stop_cleanly(self) -> None:
        """Tell all servers to stop, one after the other; the files hold everything, and are sound."""
        for life in self.lives:
            life.is_doomed, life.is_open = True, False
        for life in self.lives:
            if code := life.server.stop():
                self.fail(f"server {life.number} ended with {code} when it was told to stop")
        self.look_at_logs()
        files = self.files()
        if read_index(files) != self.known:
            self.fail("after the clean stop of all servers the files are not what they were")
        command = [sys.executable, "-m", "pkgindex", "check", str(files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.fail(f"pkgindex check: {done.returncode}: {done.stdout}{done.stderr}")

    # --- an act -----------------------------------------------------------------------------------

    def act(self, what: str, fault: Callable[[Story], float]) -> None:
        """One fault, and its judgement. `fault` says when it happened."""
        self.what = f"{what}, act {self.counts['faults'] + 1}"
        reigned = self.epoch
        self.fleet.go_on()
        try:
            time.sleep(self.random.uniform(0.1, 0.4))
            at = fault(self)
            self.flow_again(at)
            well = [x for x in self.lives if self.is_well(x) and self.fleet.changes(x)]
            stops = [life.stood_still(at) for life in well]
            time.sleep(self.random.uniform(0, 0.2 + self._lingers))
            self.heal()
            time.sleep(self.random.uniform(0.05, 0.2))
            self.come_to_rest()
        except (Failed, ServerFailed) as error:
            self.fail(str(error))
            return
        finally:
            self.take_failures()
        self.counts["faults"] += 1
        if self.epoch != reigned:
            self.counts["failovers"] += 1
            self.stops[what].append(max(stops))
        self.counts[what] += 1

    def flow_again(self, since: float) -> None:
        """Wait until changes flow on every server that lives."""
        lives = [x for x in self.lives if self.is_well(x) and self.fleet.changes(x)]
        self.all_flow(lives, since)

    def all_flow(self, lives: Iterable[Life], since: float) -> None:
        """Wait until changes flow on these servers."""
        lives = list(lives)
        deadline = time.monotonic() + self.liveness
        while still := [life for life in lives if not life.flows_since(since)]:
            self.mind_ends()
            if time.monotonic() > deadline:
                names = ", ".join(str(life.number) for life in still)
                raise Failed(f"no changes on server {names} within {self.liveness:.0f} s")
            time.sleep(0.005)

    def heal(self) -> None:
        """Undo what was done, and wait until changes flow everywhere."""
        self._lingers = 0.0
        while self._heal:
            self._heal.pop(0)()
        self.all_flow(filter(self.fleet.changes, self.lives), time.monotonic())
        for life in self.lives:
            life.is_open = True
            if life.may_close and life.server.events("clients closed"):
                life.told |= life.clients
            if life.closed and not life.is_doomed:
                self.counts["connections closed, with a reason"] += life.closed
                if not life.server.events("clients closed"):
                    self.fail(f"server {life.number} closed connections and did not say why")
            life.closed, life.may_close = 0, False

    def come_to_rest(self) -> None:
        """Let all be answered; judge it."""
        self.be_quiet()
        if self.place.volume:
            try:
                self.place.volume.wait_until_healed()
            except GlusterFailed as error:
                raise Failed(str(error)) from None
        self.judge(self.fleet.take())
        for life in self.lives:
            self.ask_all(life)
        self.fleet.silent.clear()
        self.fleet.asking.clear()
        self.look_at_logs()

    def be_quiet(self) -> None:
        """Let nobody ask anything more, and wait for the answers."""
        try:
            self.fleet.be_quiet()
        except TimeoutError:
            left = {life.number: self.fleet.unanswered(life) for life in self.lives}
            raise Failed(f"messages are not answered, by server: {left}") from None

    # --- servers ----------------------------------------------------------------------------------

    def is_well(self, life: Life) -> bool:
        """Whether its clients are to be served."""
        missing = (*self._paused, *self._hung, *self._cut)
        return not (life.is_doomed or life in missing)

    @property
    def epoch(self) -> int:
        """The newest reign, by the servers' logs."""
        return max((self.reign(life) for life in self._all), default=0)

    @staticmethod
    def reign(life: Life) -> int:
        """The newest epoch for which this server has written."""
        return max((int(event["epoch"]) for event in life.server.events("writer")), default=0)

    @property
    def writer(self) -> Life:
        """The server that writes."""
        return max(self.lives, key=self.reign)

    @property
    def followers(self) -> list[Life]:
        """The other servers, in a random order."""
        others = [life for life in self.lives if life is not self.writer]
        self.random.shuffle(others)
        return others

    def kill(self, *lives: Life) -> float:
        """SIGKILL servers; they are started again. Say when."""
        at = time.monotonic()
        for life in lives:
            life.is_doomed, life.is_open = True, False
        for life in lives:
            life.server.send_signal(signal.SIGKILL)
        self._heal.append(partial(self.start_again, *lives))
        return at

    def start_again(self, *lives: Life) -> None:
        """Put new servers into these seats."""
        for life in lives:
            life.server.kill()
        for new in self.live(*(life.number for life in lives)):
            self.lives[new.number] = new
            self.fleet.add(new)

    def pause(self, *lives: Life) -> float:
        """SIGSTOP servers; they are woken. Say when."""
        at = time.monotonic()
        for life in lives:
            life.is_open = False
            life.server.send_signal(signal.SIGSTOP)
            self._paused.append(life)
        self._lingers = LINGERS
        self._heal.append(partial(self.wake, *lives))
        return at

    def wake(self, *lives: Life) -> None:
        """Let paused servers go on."""
        for life in lives:
            if life in self._paused:
                life.server.send_signal(signal.SIGCONT)
                self._paused.remove(life)

    def wake_all(self) -> None:
        """Let every paused server go on."""
        self.wake(*tuple(self._paused))

    def idle_writer(self) -> Life:
        """The writer, when all its files are written; its clients ask nothing until this act is over."""
        self.be_quiet()
        try:
            self.fleet.wait(self.liveness, lambda: nothing_is_behind(self.files()))
        except TimeoutError:
            raise Failed("the package files are not brought up to date") from None
        writer = self.writer
        self.fleet.silent.add(writer)
        self.fleet.go_on()
        return writer

    def let_only_ask(self, life: Life) -> None:
        """Let the clients of a server change nothing until this act is over."""
        self.fleet.asking.add(life)
        time.sleep(0.3)  # what was under way is over

    def leave(self, life: Life) -> float:
        """SIGTERM a server; it is started again. Say when."""
        at = time.monotonic()
        life.is_doomed, life.is_open = True, False
        life.server.send_signal(signal.SIGTERM)
        self._heal.append(partial(self.left, life))
        return at

    def left(self, life: Life) -> None:
        """One that was told to stop has ended, and is started again."""
        if code := life.server.wait(self.liveness):
            self.fail(f"server {life.number} ended with {code} when it was told to stop")
        self.start_again(life)

    def hang(self, life: Life) -> float:
        """Let a server's mount hang; it is woken. Say when. A follower does not mind, a writer must."""
        at = time.monotonic()
        if life is self.writer:
            life.may_close, life.is_open = True, False
            self._hung.append(life)
        self.volume.hang(str(life.number))
        self._heal.append(partial(self.end_hang, life))
        self._lingers = LINGERS
        return at

    def cut_off(
        self, life: Life, cut: Callable[[], None], mend: Callable[[], None], *, closes: bool
    ) -> float:
        """Let a server be cut off; that is mended. `closes`: it may close clients. Say when."""
        at = time.monotonic()
        life.is_open, life.may_close = False, closes
        self._cut.append(life)
        cut()
        self._heal.append(mend)
        self._heal.append(partial(self._cut.remove, life))
        self._lingers = LINGERS
        return at

    def roughen(self, begin: Callable[[], None], end: Callable[[], None]) -> float:
        """Let the network between the servers be rough until this act is over. Say when."""
        at = time.monotonic()
        begin()
        self._heal.append(end)
        self._lingers = LINGERS
        return at

    def hang_briefly(self, life: Life, seconds: float) -> float:
        """Let a server's mount hang while it may hold what all others need, and wake it. Say when it woke."""
        for each in self.lives:
            each.may_close, each.is_open = True, False
        self.volume.hang(str(life.number))
        time.sleep(seconds)
        self.volume.wake(str(life.number))
        return time.monotonic()

    def end_hang(self, life: Life) -> None:
        """Let a mount go on."""
        self.volume.wake(str(life.number))
        if life in self._hung:
            self._hung.remove(life)

    def lose_brick(self) -> float:
        """Kill the volume's server and start it: all locks are forgotten, and what is under way fails.

        For the writer that is final: it ends, and is started again. Say when the volume was back."""
        writer = self.writer
        writer.is_doomed, writer.is_open = True, False
        for life in self.lives:
            life.may_close, life.is_open = True, False
        self.volume.kill_brick()
        time.sleep(self.random.uniform(0, 1))
        self.volume.start_brick()
        at = time.monotonic()
        writer.server.wait(self.liveness)
        self._heal.append(partial(self.start_again, writer))
        return at

    def lose_copy(self, number: int) -> float:
        """Kill one brick of several: nobody minds. It comes again, and catches up. Say when."""
        at = time.monotonic()
        self.volume.kill_brick(number)
        self._heal.append(partial(self.volume.start_brick, number))
        return at

    @property
    def volume(self) -> Volume:
        assert self.place.volume is not None
        return self.place.volume

    def mind_ends(self) -> None:
        """No server ends by itself."""
        for life in self.lives:
            if not life.is_doomed and life.server.exit_code is not None:
                raise Failed(f"server {life.number} ended with {life.server.exit_code}")

    # --- judgement --------------------------------------------------------------------------------

    def judge(self, calls: list[Call]) -> None:
        """Compare the files with what everybody was told; what they say is known from now on."""
        found = self.read()
        self.counts["answers judged"] += sum(call.reply is not None for call in calls)
        wrong: list[str] = []
        judged = calls if self.strong else relaxed(calls)
        for violation in judge(judged, self.known, found):
            (self.undecided if violation.is_undecided else wrong).append(str(violation))
        if wrong:
            kept = self.folder / f"act-{self.counts['faults'] + 1}.json"
            keep(kept, calls, self.known, found)
            for one in wrong:
                self.fail(f"{one} ({kept})")
        self.known = found

    def files(self) -> Path:
        """Where the store's files are now as they truly are."""
        return self.place.truth

    def read(self) -> Index:
        """What the files say, while the writer lives and nobody asks it for changes."""
        for _ in range(100):
            with suppress(FileNotFoundError):  # a round goes on
                found = read_index(self.files())
                if found == read_index(self.files()):
                    return found
            time.sleep(0.02)
        raise Failed("the files change though nobody asks for changes")

    def ask_all(self, life: Life) -> None:
        """A server answers what the files say: a follower without strong reads, as soon as it has it."""
        names = sorted({*self.known, *self.fleet.crowd.names})
        expected = ["OK" if name in self.known else "FAIL" for name in names]
        deadline = time.monotonic() + (0 if self.strong else LAG)
        while True:
            try:
                said = self.fleet.ask(life, [f"QUERY|{name}|" for name in names])
            except (OSError, TimeoutError) as error:
                self.fail(f"server {life.number} cannot be asked: {error!r}")
                return
            if said == expected:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        wrong = [n for n, a, b in zip(names, said, expected, strict=True) if a != b]
        self.fail(f"server {life.number} answers otherwise than the files: {', '.join(wrong[:6])}")

    def look_at_logs(self) -> None:
        """No server has anything to say of itself that is not one line."""
        for life in self._all:
            if any(line.startswith("Traceback") for line in life.server.lines):
                lines = "\n".join(life.server.lines[-30:])
                self.fail(f"a traceback in the log of server {life.number}:\n{lines}")

    def take_failures(self) -> None:
        """Note what has befallen clients, alike ones once."""
        for what, times in Counter(self.fleet.failures).items():
            self.fail(f"{what}, {times} times" if times > 1 else what)
        self.fleet.failures.clear()

    def fail(self, what: str) -> None:
        """Note a failure of this act."""
        self.failures.append(f"{what} ({self.what})")


def relaxed(calls: Iterable[Call]) -> list[Call]:
    """The calls as they are to be judged without strong reads: see above."""
    last: dict[int, int] = {}
    found = []
    for call in calls:
        if not call.line.startswith(("INDEX|", "REMOVE|")) or call.reply == "ERROR":
            call = replace(call, sent=last.get(call.client, 0))
        last[call.client] = call.sent
        found.append(call)
    return found
