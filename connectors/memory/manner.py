"""How kinds of databases count: what a place in the log is, how it moves over a record, how commits are named.

What is a cluster of PostgreSQL in most simulations is a stranger in others, so that nothing outside may take one for
the other: a server whose log is a row of files, and a source that announces commits and has no log at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from trigger.errors import PositionError
from trigger.position import Name, Place

SEGMENT_BYTES = 1 << 12
PAGE_BYTES = 1 << 9
FIRST_PLACE = 1 << 24
BINLOG_BYTES = 1 << 13
_OFFSET_BITS = 32
_FILE_HEADER_BYTES = 4


class BinlogPlace(Place, kind="binlog"):
    """A place in a row of files: the number of the file, and the offset in it (`binlog.000002:1234`)."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the place written in `text`; raises `PositionError` for anything else."""
        name, _, offset = text.partition(":")
        number = name.removeprefix("binlog.")
        digits = number + offset
        if not (name.startswith("binlog.") and number and offset and digits.isascii() and digits.isdigit()):
            raise PositionError(f"not a place: {text!r}", hint="such as binlog.000002:1234")
        return cls(int(number) << _OFFSET_BITS | int(offset))

    @property
    def file(self) -> int:
        """The number of the file."""
        return self >> _OFFSET_BITS

    @property
    def offset(self) -> int:
        """The place in it."""
        return self & (1 << _OFFSET_BITS) - 1

    def since(self, earlier: int) -> int:
        """Give the bytes between, files counted as full."""
        other = BinlogPlace(earlier)
        return max(0, (self.file - other.file) * BINLOG_BYTES + self.offset - other.offset)

    def __str__(self) -> str:
        return f"binlog.{self.file:06}:{self.offset}"


class Span(NamedTuple):
    """Where a record begins and ends."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Manner:
    """How one kind of database counts."""

    kind: str
    first: int
    """Where its log begins."""
    span: Callable[[int, int], Span]
    """Gives where a record of so many bytes lies that is written at a place; what is left out before it is filler."""
    file_start: Callable[[int], int]
    """Gives where the file of the log that holds a place begins."""
    behind: Callable[[int], int]
    """Gives where a log begins anew that must not touch the file which holds a place."""
    name: Callable[[int, int], Name]
    """Gives the name of a commit by its number and the number of its server."""
    file_bytes: int = SEGMENT_BYTES
    """How much a file holds."""
    page: int = PAGE_BYTES
    """What the log writer flushes at a time."""
    branches: bool = True
    """Whether a failover goes on in a branch of the same system; else another server has a log of its own."""
    replays: bool = True
    """Whether there is a log to be replayed."""

    @property
    def first_branch(self) -> int:
        """The number of the branch that a log begins with."""
        return 1 if self.branches else 0


def _bytes(at: int, count: int) -> Span:
    return Span(at, at + count)


def _segment(at: int) -> int:
    return at - at % SEGMENT_BYTES


def _in_files(at: int, count: int) -> Span:
    place = BinlogPlace(at)
    if place.offset + count > BINLOG_BYTES:
        at = (place.file + 1 << _OFFSET_BITS) + _FILE_HEADER_BYTES
    return Span(at, at + count)


def _file(at: int) -> int:
    return at >> _OFFSET_BITS << _OFFSET_BITS


def _next_segment(at: int) -> int:
    return _segment(at) + 2 * SEGMENT_BYTES


def _next_file(at: int) -> int:
    return (_file(at) + (2 << _OFFSET_BITS)) | _FILE_HEADER_BYTES


def _one(at: int, _count: int) -> Span:
    return Span(at, at + 1)


def _itself(at: int) -> int:
    return at


def _soon(at: int) -> int:
    return at + 10


MEMORY = Manner("memory", FIRST_PLACE, _bytes, _segment, _next_segment, lambda number, _: Name("", number))
"""As PostgreSQL counts, under another name."""
POSTGRES = Manner("postgres", FIRST_PLACE, _bytes, _segment, _next_segment, lambda number, _: Name("", number))
"""As PostgreSQL counts, under its own: what an earlier version of the catalog holds can be of no other kind."""
BINLOG = Manner(
    "binlog",
    1 << _OFFSET_BITS | _FILE_HEADER_BYTES,
    _in_files,
    _file,
    _next_file,
    lambda number, server: Name(f"0-{server}-", number),
    file_bytes=BINLOG_BYTES,
    branches=False,
)
"""A row of small files; a failover goes to another server, with another identity and files of its own."""
ANNOUNCED = Manner(
    "announced",
    1,
    _one,
    _itself,
    _soon,
    lambda number, server: Name(f"order-{number * 2654435761 % 65521:x}{chr(96 + server)}", None),
    file_bytes=1,
    page=1,
    branches=False,
    replays=False,
)
"""An application that says what it has committed; nothing can be replayed."""
