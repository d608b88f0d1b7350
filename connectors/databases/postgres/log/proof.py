"""Whether two logs are one: the end of a segment of ours held against what the server has at the same place.

It is the end, since whatever came between two lives of a log shows there: a commit bears its time. Only a record that
passes its checksum speaks against a log; one that does not is damage, which the audit finds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres.log.segments import slices_of
from connectors.databases.postgres.log.wal import PAGE_BYTES, checksum_holds, joins, records, tail
from connectors.databases.postgres.lsn import Lsn
from trigger.position import LAST

_RECORD_BYTES = 16_384
"""So much of a long record is looked at."""


class Compared(enum.Enum):
    """What a comparison of two logs at one place says."""

    SAME = enum.auto()
    OTHER = enum.auto()
    UNKNOWN = enum.auto()
    """One of them has nothing there, or has it no more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The end of what a segment holds."""

    at: int
    """Where it begins, which is where a page does."""
    count: int
    """So many bytes of it are compared."""
    record: int
    """Where the last whole record of the segment begins, which passes its checksum."""
    end: int
    """Where that record ends."""
    log: bytes
    """The log from `at` on, further than what is compared where a record goes on there."""

    def compare(self, theirs: bytes | None) -> Compared:
        """Hold it against the log that somebody else has at that place; None, or less of it, where he has it not."""
        if theirs is None or len(theirs) < self.count:
            return Compared.UNKNOWN
        if self._is(theirs, 0, self.count):
            return Compared.SAME
        last = self.record - self.at
        if not self._is(theirs, last, self.count):
            return Compared.OTHER
        for begin, end, body in records(self.log):
            if begin < self.count and not self._is(theirs, begin, end) and checksum_holds(body):
                return Compared.OTHER
        return Compared.SAME if last < self.count else Compared.UNKNOWN

    def _is(self, theirs: bytes, begin: int, end: int) -> bool:
        end = min(end, self.count)
        return self.log[begin:end] == theirs[begin:end]


def end_of(file: Path, begin: int, count: int, limit: int = LAST) -> Piece | None:
    """Give the last `count` bytes and the last record of a segment; None where nothing of it can be compared.

    Args:
        file: the segment.
        begin: the position of its first byte.
        count: how much before the last record is part of it.
        limit: log from there on is not compared.
    """
    if begin >= limit:
        return None
    try:
        with slices_of(file) as segment:
            found = tail(segment, Lsn(begin))
            if found.last_record is None:
                return None
            last = min(found.last_record, limit)
            at = max(begin, last - count)
            at -= at % PAGE_BYTES
            until = min(found.end, last + _RECORD_BYTES)
            log = bytes(segment[at - begin : until - begin])
            return Piece(at, min(until, limit) - at, found.last_record, found.end, log)
    except (OSError, ValueError):
        return None


def goes_on(file: Path, begin: int, page: bytes | None) -> Compared:
    """Hold the end of a segment against the first page behind it that somebody else has, None for nothing."""
    if page is None or next(records(page), None) is None:
        return Compared.UNKNOWN
    with slices_of(file) as segment:
        found = tail(segment, Lsn(begin))
        if found.last_record is None:
            return Compared.UNKNOWN
        return Compared.SAME if joins(found, page, begin + len(segment)) else Compared.OTHER
