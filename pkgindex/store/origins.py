"""What became of the messages that came through other servers: each takes effect once (rule F2).

An *origin* is one server process's life: 32 hexadecimal digits, and a counter for each message that it
hands to the writer. A batch of the journal notes, beside its changes, what became of every message of an
origin since the note before, changed anything or not:

    @9f86d081884c7d659a2feaa0c55ad015 1041 OOFEO

So changes and their results are durable together. A later writer runs nothing again up to the last
counter noted, the origin's *mark*; it answers from the results, and has the rest sent once more: what is
not noted has changed nothing. Results are kept until the origin confirms that it has given them out.

This table is pure: no I/O, no clock. A writer has two: what it has evaluated, and what is durable
(Journal.origins, which each head carries); beyond() gives what the next batch is to note.

An origin that is away for an hour is forgotten. If it comes back, an unknown origin's messages may be
ones that were never noted, to be run again, or ones that took effect and were forgotten, which must not
be. No clock can tell the two for certain (a machine may have slept), but the number of the change at
which an origin was last forgotten can: one that has seen a later change was there after that.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple, Self

__all__ = ["FORGET_SECONDS", "WINDOW", "Origins", "Recorded", "Resumed", "letters_of", "replies_of"]

# Messages that an origin may have handed over and not confirmed: more would make each head too large.
WINDOW = 1 << 16

FORGET_SECONDS = 3600.0

# Servers that started over and over within the hour; the table must not grow with them.
MOST_ORIGINS = 1024


class Recorded(NamedTuple):
    """What became of an origin's messages from the counter `first` on: O, F or E for each."""

    origin: str
    first: int
    letters: str

    @classmethod
    def checked(cls, origin: object, first: object, letters: object) -> Self:
        """The same, of a file's fields. Raises ValueError."""
        if (
            not isinstance(origin, str)
            or not isinstance(first, int)
            or not isinstance(letters, str)
            or not re.fullmatch("[0-9a-f]{32}", origin)
            or not 1 <= first < 10**18
            or not re.fullmatch("[OFE]*", letters)
        ):
            raise ValueError("not a record of an origin")
        return cls(origin, first, letters)

    @property
    def mark(self) -> int:
        """The counter of the last message."""
        return self.first + len(self.letters) - 1

    def line(self) -> bytes:
        """The note that a batch carries; there must be letters."""
        return b"@%b %d %b\n" % (self.origin.encode(), self.first, self.letters.encode())


class Resumed(NamedTuple):
    """Where an origin that comes back goes on."""

    mark: int  # everything after this counter is to be sent again
    letters: str  # results up to it, after what the origin has confirmed


class Origins:
    """The table: for each origin, its mark and the results that it has not confirmed.

    One thread changes it. entries(), and then `forgotten`, may be read by another meanwhile."""

    def __init__(self, recorded: Iterable[Recorded] = (), forgotten: int = 0) -> None:
        """As a head carried it."""
        self._recorded: dict[str, Recorded] = {each.origin: each for each in recorded}
        self._seen: dict[str, float] = {}
        self.forgotten = forgotten  # who has not seen this change may be among those forgotten

    def __len__(self) -> int:
        return len(self._recorded)

    def __contains__(self, origin: str) -> bool:
        return origin in self._recorded

    def entries(self) -> tuple[Recorded, ...]:
        """The whole table, for a head."""
        return tuple(self._recorded.copy().values())  # a copy is made in one step: see the class

    def mark(self, origin: str) -> int:
        """The counter of the last message whose result is known; 0 for an unknown origin."""
        known = self._recorded.get(origin)
        return known.mark if known else 0

    def room(self, origin: str) -> int:
        """How many more messages an origin may hand over before it confirms some."""
        known = self._recorded.get(origin)
        return WINDOW - len(known.letters) if known else WINDOW

    def record(self, origin: str, first: int, letters: str) -> None:
        """Add results; those up to the mark are known already.

        Where counters are left out, or are more than the window, the origin has confirmed what lies
        before: it was answered without a note, or the note was read without the confirmation."""
        known = self._recorded.get(origin)
        if known and first + len(letters) - 1 <= known.mark:
            return
        if known and first <= known.mark + 1:
            letters = known.letters + letters[known.mark + 1 - first :]
            first = known.first
        over = max(0, len(letters) - WINDOW)
        self._recorded[origin] = Recorded(origin, first + over, letters[over:])

    def record_all(self, notes: Iterable[tuple[str, int, str]]) -> None:
        """Add what a journal's notes say, in their order."""
        for note in notes:
            self.record(*note)

    def confirm(self, origin: str, counter: int) -> None:
        """The origin has given out every result up to this one, and will not ask for them."""
        known = self._recorded.get(origin)
        if known and counter >= known.first:
            rest = known.letters[counter + 1 - known.first :]
            self._recorded[origin] = Recorded(origin, counter + 1, rest)

    def resume(self, origin: str, confirmed: int, change: int) -> Resumed | None:
        """Where an origin goes on that has confirmed so much and has seen the index at `change`.

        None: what became of its messages is forgotten. It closes the connections that wait for them,
        repeats nothing, and goes on with the next. (So does one that is new and has none.)"""
        known = self._recorded.get(origin)
        if known is None:
            return None if change < self.forgotten else Resumed(confirmed, "")
        if confirmed + 1 < known.first:
            return None
        self.confirm(origin, confirmed)
        return Resumed(max(known.mark, confirmed), self._recorded[origin].letters)

    def beyond(self, other: Self) -> list[Recorded]:
        """What this table knows and the other, an earlier state of it, does not."""
        found = []
        for known in self._recorded.values():
            first = max(known.first, other.mark(known.origin) + 1)
            if first <= known.mark:
                found.append(Recorded(known.origin, first, known.letters[first - known.first :]))
        return found

    def forget(self, now: float, connected: Collection[str], change: int) -> list[str]:
        """Drop the origins that have been away for an hour, and those away longest where they are too many.

        To be called now and then, with the seconds of any clock that never goes back, the origins that
        are connected, and the number of the newest change. Returns who was dropped."""
        for origin in self._recorded:
            if origin in connected or origin not in self._seen:
                self._seen[origin] = now
        away = sorted(self._recorded.keys() - set(connected), key=lambda o: (self._seen[o], o))
        many = max(0, len(self._recorded) - MOST_ORIGINS)
        gone = [o for i, o in enumerate(away) if i < many or now - self._seen[o] >= FORGET_SECONDS]
        if gone:
            self.forgotten = change + 1  # first: a head made meanwhile must not lack both
        for origin in gone:
            del self._recorded[origin], self._seen[origin]
        return gone


def letters_of(replies: bytes) -> str:
    """The letters of replies of the data protocol."""
    short = replies.replace(b"OK\n", b"O").replace(b"FAIL\n", b"F").replace(b"ERROR\n", b"E")
    return short.decode("ascii")


def replies_of(letters: str) -> bytes:
    """The replies of the data protocol that letters stand for."""
    # In this order: none of the words holds a letter that is replaced after it.
    replies = letters.replace("O", "OK\n").replace("F", "FAIL\n").replace("E", "ERROR\n")
    return replies.encode("ascii")
