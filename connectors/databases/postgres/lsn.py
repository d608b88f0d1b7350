"""PostgreSQL's words for a history: log sequence numbers, timelines and their history files, transaction ids."""

from __future__ import annotations

import re
from typing import Self

from trigger.errors import PositionError
from trigger.position import History, Lineage, Name, Place

_WRAP = 1 << 32
KIND = "postgres"
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


class Lsn(Place, kind=KIND):
    """A byte address in the write-ahead log, printed as PostgreSQL prints it (`16/B374D848`)."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Give the LSN written in `text`; raises `PositionError` for anything else."""
        match = _LSN.fullmatch(text)
        if match is None:
            raise PositionError(f"not an LSN: {text!r}", hint="an LSN looks like 16/B374D848")
        return cls(int(match[1], 16) << 32 | int(match[2], 16))

    @staticmethod
    def meant(name: Name, near: Name) -> Name:
        """Give the transaction nearest to `near` whose low half is named, as `xmin` shows it; another name as it is."""
        if name.text or name.number is None or name.number >= _WRAP or near.number is None:
            return name
        return transaction(max(full_xid(name.number, near.number), name.number))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"


def history(system: str, timeline: int, incarnation: int = 0) -> History:
    """Give the history of a cluster's timeline."""
    return History(KIND, system, timeline, incarnation)


def transaction(xid: int) -> Name:
    """Give what a commit is called: its full transaction id, with the epoch."""
    return Name("", xid)


def full_xid(xid: int, near: int) -> int:
    """Give the 64-bit transaction id whose low half is `xid`, the one nearest to `near`.

    Exact, since the server keeps all transactions that may still be decoded within 2^31 of the next one, also where
    the low half has just begun again at 3 (T7).
    """
    return near + (xid - near + _WRAP // 2) % _WRAP - _WRAP // 2


def lineage(of: History, text: str) -> Lineage:
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
    return Lineage(of, tuple(forks))
