"""Where a commit stands in its database's history, and what it is called: order, print, parse.

A place is a number of 64 bits that rises along one history; what it means, and how people write it, is known to the
kind of database alone (`Place`). Two positions compare only inside one history: after a point-in-time restore, a
failover, or where an older copy was put back, the same numbers are used again for other commits, so a comparison
across histories is an error and never an answer. A `Lineage` says which stretch of which history belongs to the past
of another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, Self

from trigger.errors import PositionError

LAST = (1 << 63) - 1
"""The greatest place; what is stored as a signed number of 64 bits must not lie beyond."""


class Place(int):
    """A place in a history, as a number; a kind of database derives its own, by which it is written and measured.

    `class Lsn(Place, kind="postgres")` makes that the form of every place in histories of this kind. A place of a kind
    of which no driver is loaded is written as a number.
    """

    __slots__ = ()
    KINDS: ClassVar[dict[str, type[Place]]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        Place.KINDS[kind] = cls

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the place written in `text`; raises `PositionError` for anything else."""
        if not (text.isascii() and text.isdigit() and int(text) <= LAST):
            raise PositionError(f"not a place: {text!r}", hint="it is a whole number here")
        return cls(text)

    @staticmethod
    def meant(name: Name, _near: Name) -> Name:
        """Give the whole name of a commit that somebody called `name`, maybe in short; `_near` is a late one's."""
        return name

    def since(self, earlier: int) -> int:
        """Give how much log lies between `earlier` and here, in bytes or units of this kind; 0 for one behind."""
        return max(0, self - earlier)

    def __str__(self) -> str:
        return int.__repr__(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __format__(self, spec: str) -> str:
        return int.__format__(self, spec) if spec[-1:] in set("bcdoxX") else format(str(self), spec)


At = Annotated[int, Place]
"""A place that is kept as a number; its history says in which form it is written."""

_NAME = re.compile(r"(.*?)(0|[1-9][0-9]{0,19})?", re.DOTALL)
_NUMBER_LIMIT = 1 << 63  # what is stored as a signed number of 64 bits


class Name(NamedTuple):
    """What people call a commit: text, and a number behind it where it ends in one.

    PostgreSQL's transaction 7731 is `("", 7731)`, MariaDB's GTID 0-1-57 `("0-1-", 57)`, an application's own name
    whatever it is; numbers rise with time, so many names of one text are kept in a few bytes each. A number that is not
    stored as a signed one of 64 bits is part of the text, so that what is written is read as the same name.
    """

    text: str
    number: int | None
    """From 0 up to 2^63 - 1; None where the text is the whole name."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the name written in `text`."""
        match = _NAME.fullmatch(text)
        assert match is not None
        number = int(match[2]) if match[2] else None
        return cls(text, None) if number is not None and number >= _NUMBER_LIMIT else cls(match[1], number)

    @property
    def is_number(self) -> bool:
        """Whether nothing but the number makes the name."""
        return not self.text and self.number is not None

    def __str__(self) -> str:
        return self.text if self.number is None else f"{self.text}{self.number}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True, slots=True)
class History:
    """One line of commits: of which kind of database, which one, on which branch, and which life of it."""

    kind: str
    """What the driver of the database calls itself: `postgres`."""
    system: str
    """The database's own identity: a system identifier, a server's uuid, a cluster and topic."""
    branch: int = 0
    """For PostgreSQL the timeline; 0 where a database knows no branches."""
    incarnation: int = 0
    """Counts up where the log went on under the same identity and is not the same log: an older copy put back."""

    @classmethod
    def parse(cls, text: str, kind: str) -> Self:
        """Give the history of a kind written in `text`; raises `PositionError` for anything else."""
        match = _HISTORY.fullmatch(text)
        found = cls(kind, match[1], int(match[2]), int(match[3] or 0)) if match else None
        if found is None or str(found) != text:  # one history has one spelling
            raise PositionError(f"not a history: {text!r}", hint="such as 7391/1, or 7391/1+1 for a second life of it")
        return found

    def place(self, at: int) -> Place:
        """Give a number as a place of this history."""
        form = Place.KINDS.get(self.kind, Place)
        return at if isinstance(at, form) else form(at)

    def parse_place(self, text: str) -> Place:
        """Give the place of this history written in `text`; raises `PositionError` for anything else."""
        return Place.KINDS.get(self.kind, Place).parse(text.strip())

    def meant(self, name: Name, near: Name) -> Name:
        """Give the whole name of a commit that somebody called `name`, maybe in short; `near` is a late one's."""
        return Place.KINDS.get(self.kind, Place).meant(name, near)

    def is_of_system(self, other: History) -> bool:
        """Whether both are of one database, whatever became of it."""
        return (self.kind, self.system) == (other.kind, other.system)

    def is_of_life(self, other: History) -> bool:
        """Whether both are branches of one incarnation of one log."""
        return self.is_of_system(other) and self.incarnation == other.incarnation

    @property
    def age(self) -> tuple[int, int]:
        """What orders the histories of one database by when they began."""
        return self.incarnation, self.branch

    def __str__(self) -> str:
        return f"{self.system}/{self.branch}" + (f"+{self.incarnation}" if self.incarnation else "")


_HISTORY = re.compile(r"(.+)/([0-9]{1,18})(?:\+([0-9]{1,18}))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one history; text form `<system>/<branch>@<place>`."""

    history: History
    at: At

    @property
    def place(self) -> Place:
        """The place in the form of its kind."""
        return self.history.place(self.at)

    def __str__(self) -> str:
        return f"{self.history}@{self.place}"

    def covers(self, other: Position) -> bool:
        """Whether everything up to `other` is also up to here; raises `PositionError` across histories."""
        return self.at >= self._in_my_history(other).at

    def __lt__(self, other: Position) -> bool:
        return self.at < self._in_my_history(other).at

    def __le__(self, other: Position) -> bool:
        return self.at <= self._in_my_history(other).at

    def __gt__(self, other: Position) -> bool:
        return self.at > self._in_my_history(other).at

    def __ge__(self, other: Position) -> bool:
        return self.at >= self._in_my_history(other).at

    def _in_my_history(self, other: Position) -> Position:
        if other.history != self.history:
            raise PositionError(
                f"positions of different histories do not compare: {self} and {other}",
                hint="the cluster was restored, failed over or replaced between the two",
            )
        return other


@dataclass(frozen=True, slots=True)
class Lineage:
    """The past of one history: which earlier branches of the same life of it led to it, and where each was left.

    `forks` holds (branch, where it was left), oldest first. Nothing of an earlier incarnation is the past of a later
    one: nobody can say how much of it.
    """

    history: History
    forks: tuple[tuple[int, int], ...] = ()

    def branch(self, branch: int) -> History:
        """Give the history of another branch of the same life."""
        mine = self.history
        return History(mine.kind, mine.system, branch, mine.incarnation)

    def stretches(self) -> list[tuple[History, int, int]]:
        """Give (history, from, up to) of each stretch of log that leads to the present, oldest first."""
        low, found = 0, []
        for branch, left_at in self.forks:
            found.append((self.branch(branch), low, left_at))
            low = left_at
        return [*found, (self.history, low, LAST)]

    def includes(self, position: Position) -> bool:
        """Whether `position` lies in this history or in the part of an ancestor that led to it."""
        if position.history == self.history:
            return True
        left_at = self._left(position.history)
        return left_at is not None and position.at <= left_at

    def shared(self, position: Position) -> int | None:
        """Give how much of what lies up to `position` belongs here; None where nothing of its history does."""
        return position.at if self.includes(position) else self._left(position.history)

    def _left(self, history: History) -> int | None:
        """Give where an ancestor was left; None for a history that is none."""
        return next((left_at for branch, left_at in self.forks if self.branch(branch) == history), None)

    def ends_since(self, position: Position) -> tuple[tuple[Position, Position], ...]:
        """Give (end, where the next one begins) of each branch that was left since `position`, oldest first.

        What a branch had behind its end is no part of any later one. Nothing where `position` is of another past.
        """
        places = [left_at for history, _, left_at in self.stretches()[:-1]]
        histories = [history for history, _, _ in self.stretches()]
        steps = list(zip(histories, histories[1:], places, strict=False))
        first = next((i for i, history in enumerate(histories) if history == position.history), len(histories))
        return tuple(
            (Position(old, max(left_at, position.at if old == position.history else 0)), Position(new, left_at))
            for old, new, left_at in steps[first:]
        )

    def at(self, at: int) -> Position:
        """Give the position of a place in the history that owned it in this lineage."""
        for branch, left_at in self.forks:
            if at < left_at:
                return Position(self.branch(branch), at)
        return Position(self.history, at)


def distance(later: Position, earlier: Position) -> int:
    """Give how much log lies between two positions of one lineage; 0 where the first is not the later one."""
    return later.place.since(earlier.at)
