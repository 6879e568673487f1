"""A fuzzer on the wire: messages of all kinds, cut anywhere, against the build with the sanitizers.

Lines come from a stock that is drawn anew all the time: well-formed ones about names of every length,
the same mutated, raw bytes, and lines about as long as one may be. Some connections, one of them to a
listener that is read-only, send runs of them, cut at any byte; a connection that has sent half a line
waits while others speak. Connections end by a half-close, a close or a reset. Complete lines are sent by
one connection at a time and their replies awaited, so the order of all is known, and each reply is the
model's. In the end the server's index is the model's, no sanitizer has said anything, and no memory
leaks. The whole is made from the seed.

Only what a reset leaves unread is of unknown effect, so before one only such lines are sent as change
nothing.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reference import ERROR, FAIL, MESSAGE, OK, Model
from tests.servers import Address, Server, Wire, parse_address
from tests.store.reading import read_files, read_index, reversed_index
from tests.torture.campaign import Campaign, Run
from tests.torture.sanitized import (
    PLANTED,
    TRIGGER,
    Planted,
    Sanitized,
    absent,
    build,
    reports,
)

__all__ = ["CAMPAIGNS", "Fuzzer", "Line", "QuickModel"]

MESSAGES = (10_000_000, 200_000)  # full, quick
MUTANT_MESSAGES = 100_000  # within which a wrong server must have been found out
COMPARED = 20_000  # messages with which the two models are compared first

MAX_LINE = 4096  # the server's limit, so that lines beyond it are many
STOCK = 6_000  # lines that are drawn from
STOCK_LASTS = 100_000  # messages, then another stock
NAMES = 250  # that lines of a stock are about
KEPT = 0.7  # of the names, in the next stock
CONNECTIONS = 8  # one of them read-only
ASK_AT_ONCE = 50_000  # questions at the end

Reply = bytes


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its line feed, and what it says if it is well-formed."""

    data: bytes
    command: bytes  # b"" if it is not
    package: bytes
    dependencies: frozenset[bytes]

    @classmethod
    def of(cls, data: bytes) -> Line:
        """Read it by the reference's own grammar."""
        message = MESSAGE.fullmatch(data) if len(data) <= MAX_LINE else None
        if message is None:
            return cls(data, b"", b"", frozenset())
        command, package, listed = message.groups()
        return cls(data, command, package, frozenset(listed.split(b",") if listed else ()))


class QuickModel(Model):
    """The reference's model, for lines that are read already, with the dependents counted."""

    def __init__(self) -> None:
        super().__init__()
        self.needed: Counter[bytes] = Counter()  # by others than itself

    def replies(self, lines: list[Line], read_only: bool = False) -> list[Reply]:
        """Carry out lines and give their replies."""
        packages, needed = self.packages, self.needed
        said: list[Reply] = []
        say = said.append
        for line in lines:
            command = line.command
            if not command:
                say(ERROR)
            elif command == b"QUERY":
                say(OK if line.package in packages else FAIL)
            elif read_only:
                say(FAIL)
            elif command == b"INDEX":
                if line.dependencies <= packages.keys():
                    self._replace(line.package, line.dependencies)
                    say(OK)
                else:
                    say(FAIL)
            elif needed[line.package]:
                say(FAIL)
            else:
                self._replace(line.package, frozenset())
                packages.pop(line.package, None)
                say(OK)
        return said

    def _replace(self, package: bytes, dependencies: frozenset[bytes]) -> None:
        before = self.packages.get(package, frozenset())
        if before is not dependencies:
            for name in before:
                self.needed[name] -= name != package
            for name in dependencies:
                self.needed[name] += name != package
            self.packages[package] = dependencies


class Stock:
    """Lines, as many of each kind as they are useful, about names that come and go."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw
        self.names = [self.name() for _ in range(NAMES)]
        self.lines: list[Line] = []
        self.harmless: list[Line] = []  # those that change nothing
        self.overlong: list[Line] = []
        self.renew()

    def renew(self) -> None:
        """Draw another stock; most names stay."""
        draw = self.random
        self.names = draw.sample(self.names, int(NAMES * KEPT))
        self.names += [self.name() for _ in range(NAMES - len(self.names))]
        made = [self.line() for _ in range(STOCK)]
        self.lines = [Line.of(data) for data in made if b"\n" not in data and TRIGGER not in data]
        self.harmless = [x for x in self.lines if x.command in (b"", b"QUERY")]
        self.overlong = [Line.of(self.long()) for _ in range(8)]
        # Just at the limit and just beyond it, and well-formed but for that.
        self.overlong += [Line.of(self.fitting(MAX_LINE)), Line.of(self.fitting(MAX_LINE + 1))]

    def name(self) -> bytes:
        """A name: short, long, as long as may be, or like another."""
        draw = self.random
        visible = [c for c in range(0x21, 0x7F) if c not in b"|,"]
        kind = draw.random()
        if kind < 0.1 and getattr(self, "names", None):
            like = bytearray(draw.choice(self.names))
            like[draw.randrange(len(like))] = draw.choice(visible)
            return bytes(like)
        length = draw.choice((1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 254, 255)) if kind < 0.5 else 0
        return bytes(draw.choices(visible, k=length or draw.randint(1, 24)))

    def line(self) -> bytes:
        """One line of any kind."""
        draw = self.random
        kind = draw.random()
        if kind < 0.80:
            return self.message()
        if kind < 0.94:
            return self.mutated(self.message())
        if kind < 0.97:
            return draw.randbytes(draw.choice((0, 1, 5, 9, 60)))
        return bytes(draw.choices(b"INDEXREMOVEQUERY|||,,, \r\0\t~az\xff", k=draw.randint(0, 40)))

    def message(self) -> bytes:
        """A well-formed one."""
        draw = self.random
        command = draw.choice((b"INDEX", b"INDEX", b"REMOVE", b"QUERY"))
        count = (
            draw.choice((0, 0, 1, 1, 2, 3, 8)) if command == b"INDEX" or draw.random() < 0.1 else 0
        )
        return b"%b|%b|%b" % (
            command,
            draw.choice(self.names),
            b",".join(draw.choices(self.names, k=count)),
        )

    def mutated(self, data: bytes) -> bytes:
        """A message with a byte flipped, put in, taken out or doubled, in another case, cut off."""
        draw = self.random
        at = draw.randrange(len(data))
        return draw.choice(
            (
                data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
                data[:at] + draw.choice((b"|", b",", b" ", b"\0", b"\r", b"\x7f")) + data[at:],
                data[:at] + data[at + 1 :],
                data[:at] + data[at:] * 2,
                data[:at],
                data.lower(),
                data + b"\r",
                data + b",",
                data.replace(b"|", b"||", 1),
                b" " + data,
                b"INDEX|%b|" % (draw.choice(self.names) * 256)[: draw.choice((255, 256, 257, 512))],
            )
        )

    def fitting(self, size: int) -> bytes:
        """A message of this length, its grammar in order."""
        data = b"INDEX|%b|" % self.random.choice(self.names)
        while size - len(data) > 255:
            data += b"z" * self.random.randint(1, 128) + b","
        return data + b"z" * (size - len(data))

    def long(self) -> bytes:
        """A line of about the limit's length; in part well-formed but for that."""
        draw = self.random
        size = MAX_LINE + draw.choice((-1, 0, 1, 1, 2, 100, MAX_LINE, 70_000))
        data = b"INDEX|%b|" % draw.choice(self.names)
        few = draw.sample(self.names, 3)
        while len(data) < size:
            data += draw.choice(few) + b","
        data = data[:size].rstrip(b",")
        return data + b"x" * (size - len(data)) if draw.random() < 0.8 else b"y" * size


class Disagreement(AssertionError):
    """The server said what the model does not."""


class Talker:
    """One connection, and the line of which it has sent the beginning."""

    def __init__(self, address: Address, read_only: bool) -> None:
        self.wire = Wire(address)
        self.read_only = read_only
        self.rest = b""  # of a line whose beginning is sent, with its line feed
        self.begun: list[Line] = []


class Fuzzer:
    """Talks to one server by a seed, beside a model."""

    def __init__(self, seed: int, addresses: list[Address]) -> None:
        """`addresses`: of the listener, and of one that is read-only."""
        self.random = random.Random(seed)
        self.addresses = addresses
        self.model = QuickModel()
        self.stock = Stock(self.random)
        self.counts: Counter[str] = Counter()
        self.talkers = [self.talker(number) for number in range(CONNECTIONS)]
        self.last: tuple[bytes, list[Line]] = b"", []

    def talker(self, number: int) -> Talker:
        self.counts["connections"] += 1
        read_only = number == CONNECTIONS - 1
        return Talker(self.addresses[read_only], read_only)

    def talk(self, messages: int) -> Iterator[int]:
        """Talk until so many messages are answered; gives how many are, from time to time."""
        stock_ends = STOCK_LASTS
        while self.counts["messages"] < messages:
            if self.counts["messages"] >= stock_ends:
                stock_ends += STOCK_LASTS
                self.stock.renew()
            number = self.random.randrange(CONNECTIONS)
            talker = self.talkers[number]
            self.step(talker)
            if self.random.random() < 0.02:
                self.end(talker)
                self.talkers[number] = self.talker(number)
            yield self.counts["messages"]
        for talker in self.talkers:
            self.end(talker)

    def step(self, talker: Talker) -> None:
        """Send a run of lines, and perhaps the beginning of another; await the replies."""
        draw = self.random
        lines = draw.choices(self.stock.lines, k=draw.choice((1, 2, 10, 300, 3000, 6000)))
        if draw.random() < 0.25:
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(self.stock.overlong))
            self.counts["lines about as long as may be, or longer"] += 1
        data = talker.rest + b"".join([line.data + b"\n" for line in lines])
        lines = talker.begun + lines
        talker.rest, talker.begun = b"", []
        last = lines[-1]
        if draw.random() < 0.5 and 0 < len(last.data) <= MAX_LINE and len(lines) > 1:
            # Some of the last line stays unsent while other connections speak.
            unsent = draw.randint(1, len(last.data))
            talker.rest, talker.begun = data[-unsent:], [lines.pop()]
            data = data[:-unsent]
        self.last = data, lines
        expected = self.model.replies(lines, talker.read_only)
        for piece in self.pieces(data):
            talker.wire.send(piece)
        self.compare(lines, expected, talker.wire.exchange_bytes(b"", len(lines)))
        self.counts["messages"] += len(lines)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Cut what is sent: not at all, at some bytes, or at each."""
        kind = self.random.random()
        if kind < 0.5 or len(data) < 2:
            yield data
            return
        if kind < 0.6 and len(data) < 3000:
            places = list(range(1, len(data)))
        else:
            places = self.random.choices(range(1, len(data)), k=self.random.choice((1, 3, 20)))
        self.counts["cuts"] += len(places)
        for start, end in zip([0, *sorted(places)], [*sorted(places), len(data)], strict=True):
            if start < end:
                yield data[start:end]

    def compare(self, lines: list[Line], expected: list[Reply], got: bytes) -> None:
        """Disagreement with the first line whose reply is not the model's."""
        if got == b"".join(expected):
            return
        replies = got.splitlines(keepends=True)
        for place, (line, reply) in enumerate(zip(lines, expected, strict=True)):
            answer = replies[place] if place < len(replies) else b""
            if reply != answer:
                raise Disagreement(
                    f"message {self.counts['messages'] + place}, {line.data[:300]!r} of "
                    f"{len(line.data)} bytes: the server said {answer!r}, the model {reply!r}"
                )
        raise Disagreement(f"the server said more than it was asked: {got[-100:]!r}")

    def end(self, talker: Talker) -> None:
        """End a connection one way or another; half a line is no message."""
        draw = self.random
        kind = draw.choice(("half-closes", "closes", "resets"))
        self.counts[kind] += 1
        if talker.begun:
            self.counts["half lines left"] += 1
        if kind == "half-closes":
            # The end of the last message and of the connection, at once.
            if talker.begun and draw.random() < 0.5:
                lines, data = talker.begun, talker.rest
                talker.wire.send(data)
            else:
                lines = []
            expected = self.model.replies(lines, talker.read_only)
            talker.wire.half_close()
            self.compare(lines, expected, talker.wire.receive_until_closed())
            self.counts["messages"] += len(lines)
        elif draw.random() < 0.7 and not talker.begun:
            # Gone without reading the answers.
            lines = draw.choices(self.stock.harmless, k=draw.choice((1, 100, 3000)))
            self.counts["messages whose answers nobody read"] += len(lines)
            with suppress(ConnectionError, TimeoutError):
                talker.wire.send(b"\n".join(line.data for line in lines))
        if kind == "resets":
            talker.wire.reset()
        talker.wire.close()

    def ask_after_all(self) -> None:
        """The server's index is the model's: every name is asked after."""
        names = sorted({*self.model.packages, *self.model.needed, *self.stock.names})
        with Wire(self.addresses[0]) as wire:
            for at in range(0, len(names), ASK_AT_ONCE):
                lines = [Line.of(b"QUERY|%b|" % name) for name in names[at : at + ASK_AT_ONCE]]
                data = b"".join(line.data + b"\n" for line in lines)
                got = wire.exchange_bytes(data, len(lines))
                self.compare(lines, self.model.replies(lines), got)
        self.counts["packages asked after in the end"] += len(names)

    def remove_all(self) -> None:
        """Take every package out, whoever depends on whom."""
        lines = [Line.of(b"INDEX|%b|" % name) for name in sorted(self.model.packages)]
        lines += [Line.of(b"REMOVE|%b|" % line.package) for line in lines]
        with Wire(self.addresses[0]) as wire:
            got = wire.exchange_bytes(b"".join(x.data + b"\n" for x in lines), len(lines))
        self.compare(lines, self.model.replies(lines), got)
        assert not self.model.packages


# --- campaign -----------------------------------------------------------------------------------------

OPTIONS = ("--max-line", str(MAX_LINE), "--listen", "127.0.0.1:0,read-only")

#: Wrong servers whose answers must be found out: what each does, by Python that breaks the product.
WRONG = {
    "an overlong line may be one byte longer": """
import pkgindex.server as server
from dataclasses import replace
run = server.run
server.run = lambda settings, *rest: run(replace(settings, max_line=settings.max_line + 1), *rest)
""",
    "lower case is a command too": """
import pkgindex.index.memory as memory
class Index(memory.MemoryIndex):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        apply = self.apply
        def lax(batch):
            text = batch.buffer[batch.start:batch.stop]
            batch.buffer[batch.start:batch.stop] = text.replace(b"\\nquery|", b"\\nQUERY|")
            return apply(batch)
        self.apply = lax
memory.MemoryIndex = Index
""",
    "read-only is for show": """
import pkgindex.protocol as protocol
made = protocol.Connection
class Listener:
    read_only, allow, tls = False, (), False
import pkgindex.server as server
server.Connection = lambda hub, listener=None: made(hub, Listener())
""",
}


class Wrong(Server):
    """The product as it is installed, broken."""

    def __init__(self, name: str) -> None:
        super().__init__("memory:", *OPTIONS)
        place = self._command.index("-m")
        main = "from pkgindex.cli import main; main()"
        self._command[place : place + 2] = ["-c", f"{WRONG[name]}\n{main}"]


def addresses(server: Server) -> list[Address]:
    """The listener that changes, and the one that does not."""
    listen: list[str] = server.wait_for("serving")["listen"]
    return [parse_address(text.partition(",")[0]) for text in listen]


def compare_models(run: Run) -> None:
    """The quick model is the reference's."""
    stock = Stock(random.Random(run.seed))
    lines = random.Random(run.seed).choices(stock.lines, k=COMPARED)
    slow, quick = Model(), QuickModel()
    for line in lines:
        if quick.replies([line]) != [slow.apply(line.data)]:
            run.fail(f"the quick model is wrong about {line.data!r}")
            return
    run.counts["messages on which both models agree"] += len(lines)


def find_planted(run: Run) -> None:
    """Each mistake planted in the core is reported by a sanitizer."""
    for name, expected in PLANTED.items():
        server = Planted(name)
        with server:
            with suppress(EOFError, ConnectionError), Wire(server.address) as wire:
                wire.ask(b"QUERY|%b|" % TRIGGER)
            with suppress(ProcessLookupError):
                server.send_signal(signal.SIGTERM)
            code = server.wait()
        found = reports(server.lines)
        if code and any(expected in line for line in found):
            run.counts["planted mistakes reported"] += 1
        else:
            run.fail(f"planted {name} was not reported: exit code {code}, {found}")


def find_wrong(run: Run) -> None:
    """Each wrong server is found out by an answer."""
    for name in WRONG:
        with Wrong(name) as server:
            fuzzer = Fuzzer(run.seed, addresses(server))
            try:
                for _ in fuzzer.talk(MUTANT_MESSAGES):
                    pass
            except Disagreement:
                run.counts["mutants caught"] += 1
                continue
            run.fail(f"the mutant '{name}' answered {MUTANT_MESSAGES} messages unnoticed")


def fuzz(run: Run) -> None:
    """The campaign: the models, the mutants, then half of the messages to each store."""
    build()
    began = time.monotonic()
    compare_models(run)
    find_planted(run)
    find_wrong(run)
    goal = run.scale(*MESSAGES)
    stores = ("memory:", f"file:{run.folder / 'index'}")
    for number, store in enumerate(stores):
        done = number * goal // 2
        answered = fuzz_store(run, store, goal // 2, done, goal)
        if answered < goal // 2:
            run.skipped.append(f"{goal // 2 - answered} messages to {store[:6]}: the time was up")
    run.counts["seconds without the build"] = round(time.monotonic() - began)


def fuzz_store(run: Run, store: str, messages: int, before: int, goal: int) -> int:
    """Fuzz a server of this store; how many messages were answered as the model says."""
    server = Sanitized(store, *OPTIONS)
    fuzzer: Fuzzer | None = None
    try:
        with server:
            fuzzer = Fuzzer(run.seed + before, addresses(server))
            for done in fuzzer.talk(messages):
                run.progress(before + done, goal)
                if run.is_late():
                    break
            fuzzer.ask_after_all()
            if store == "memory:":
                fuzzer.remove_all()
            code = server.stop()
            judge_end(run, server, fuzzer, code)
    except (AssertionError, OSError, EOFError) as error:
        what = f"{store[:6]} {type(error).__name__}: {error}"
        if fuzzer is not None:
            kept = run.folder / f"sent-{before}"
            kept.write_bytes(fuzzer.last[0])
            what += f" (what was sent last: {kept})"
        run.fail(what)
    for line in reports(server.lines):
        log = run.folder / f"report-{before}"
        log.write_text("\n".join(server.lines))
        run.fail(f"{store[:6]} a sanitizer's report: {line} ({log})")
    run.counts["sanitizer reports"] += len(reports(server.lines))
    if any(line.startswith("Traceback") for line in server.lines):
        run.fail("a traceback in the log:\n" + "\n".join(server.lines[-30:]))
    if fuzzer is not None:
        run.counts.update(fuzzer.counts)
        return fuzzer.counts["messages"]
    return 0


def judge_end(run: Run, server: Server, fuzzer: Fuzzer, code: int) -> None:
    """A clean end, nothing left over, and the files of a store that has some."""
    if code:
        run.fail(f"the server ended with {code}: {server.lines[-1:]}")
    counters: dict[str, Any] = server.events("counters")[-1]
    if server.store == "memory:":
        left = {key: counters[key] for key in ("clients", "packages", "names", "dependencies")}
        if any(left.values()):
            run.fail(f"left over when all was removed: {left}")
        return
    root = Path(server.store.removeprefix("file:"))
    expected = {
        name.decode(): frozenset(needed.decode() for needed in needs)
        for name, needs in fuzzer.model.packages.items()
    }
    if read_index(root) != expected or read_files(root, "forward") != expected:
        run.fail("the store's files are not the model's index")
    if read_files(root, "reverse") != reversed_index(expected):
        run.fail("the store's reverse files are not those of the model's index")
    run.counts["packages read from files"] += len(expected)


CAMPAIGNS = (
    Campaign(
        "fuzz",
        "Messages of all kinds, cut, half-closed and reset anywhere, against the build with ASan and "
        "UBSan: no report, no leak, every reply and in the end every file as the model says.",
        fuzz,
        absent,
        seconds=(180.0, 840.0),  # most of the short one is the build, once
    ),
)
