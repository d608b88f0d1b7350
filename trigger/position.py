"""Where a commit stands in its database's history: parse, print, compare.

Two positions compare only inside one history (one system identifier, one timeline): after a point-in-time restore
or a failover the same numbers are used again for other commits, so a comparison across histories is an error and
never an answer. A `Lineage` says which stretch of which timeline belongs to the past of a history.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from trigger.errors import PositionError

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_POSITION = re.compile(r"([0-9]{1,20})/([0-9]{1,10})@(.+)", re.DOTALL)


class Lsn(int):
    """A byte address in the write-ahead log, printed as PostgreSQL prints it (`16/B374D848`)."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the LSN written in `text`; raises `PositionError` for anything else."""
        match = _LSN.fullmatch(text)
        if match is None:
            raise PositionError(f"not an LSN: {text!r}", hint="an LSN looks like 16/B374D848")
        return cls(int(match[1], 16) << 32 | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({self})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True, slots=True)
class History:
    """One line of commits: the cluster's system identifier and its timeline."""

    system: str
    timeline: int

    def __str__(self) -> str:
        return f"{self.system}/{self.timeline}"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one history; text form `<system>/<timeline>@<lsn>`."""

    history: History
    at: Lsn

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the position written in `text`; raises `PositionError` for anything else."""
        match = _POSITION.fullmatch(text)
        if match is None:
            raise PositionError(f"not a position: {text!r}", hint="a position looks like 7391/1@16/B374D848")
        return cls(History(match[1], int(match[2])), Lsn.parse(match[3]))

    def __str__(self) -> str:
        return f"{self.history}@{self.at}"

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
    """The past of one history: which earlier timelines led to it, and where each was left.

    `forks` holds (timeline, where it was left), oldest first, as PostgreSQL's timeline history files list them.
    """

    history: History
    forks: tuple[tuple[int, Lsn], ...] = ()

    def includes(self, position: Position) -> bool:
        """Whether `position` lies in this history or in the part of an ancestor that led to it."""
        if position.history.system != self.history.system:
            return False
        if position.history.timeline == self.history.timeline:
            return True
        return any(timeline == position.history.timeline and position.at <= left_at for timeline, left_at in self.forks)

    def shared(self, position: Position) -> Lsn | None:
        """Give how much of what lies up to `position` belongs here; None where nothing of its timeline does."""
        if self.includes(position):
            return position.at
        left = (left_at for timeline, left_at in self.forks if timeline == position.history.timeline)
        return next(left, None) if position.history.system == self.history.system else None

    def at(self, lsn: Lsn) -> Position:
        """Give the position of `lsn` on the timeline that owned it in this lineage."""
        for timeline, left_at in self.forks:
            if lsn < left_at:
                return Position(History(self.history.system, timeline), lsn)
        return Position(self.history, lsn)

    @classmethod
    def from_history_file(cls, history: History, text: str) -> Self:
        """Read a timeline history file (`00000002.history`): lines of timeline, LSN, reason; `#` comments.

        Raises:
            PositionError: a line is neither blank, a comment, nor a timeline with an LSN.
        """
        forks = []
        for line in text.splitlines():
            words = line.split(maxsplit=2)
            if not words or words[0].startswith("#"):
                continue
            if len(words) < 2 or not words[0].isascii() or not words[0].isdigit():
                raise PositionError(f"not a line of a timeline history file: {line!r}")
            forks.append((int(words[0]), Lsn.parse(words[1])))
        return cls(history, tuple(forks))


def distance(later: Position, earlier: Position) -> int:
    """Give the bytes of log between two positions of one lineage; 0 where the first is not the later one."""
    return max(0, int(later.at) - int(earlier.at))
