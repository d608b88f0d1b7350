"""What is known of a transaction before it is committed; of a streamed one by subtransaction, as each may be aborted.

A program that guards each of its statements makes one subtransaction a statement, and millions of them in one
transaction; nobody says that one of them is over, only that it was aborted, which may be at any time until the commit.
So they are kept as numbers in two arrays: 16 bytes for what one of them did to one table.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping

CHANGE_BYTES, TABLE_BYTES, STRING_BYTES = 16, 200, 64
"""About what a change of a subtransaction, a table of a transaction, and a text take of memory."""
_OPERATION_BITS = 34  # relation id << 2 | operation
_OFFSET_BITS = 30

Counts = dict[int, int]
"""How often: by `relation id << 2 | operation`."""


class Subtransactions:
    """Changes by subtransaction; a key is `relation id << 2 | operation`.

    Args:
        top: the id of the whole transaction; its subtransactions' ids follow it.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._places = array("Q")
        """In order: how far the subtransaction's id lies behind the top one's, and the key."""
        self._counts = array("Q")
        """How often, at the same place; 0 where it was aborted."""
        self._aborted = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, xid: int, changes: Mapping[int, int]) -> None:
        """Add what a subtransaction changed; raises `ValueError` where its id cannot be of this transaction."""
        first = self._first(xid)
        places, counts = self._places, self._counts
        for key, count in changes.items():
            place = first | key
            if not places or place > places[-1]:
                places.append(place)
                counts.append(count)
                continue
            at = bisect_left(places, place)  # one that went on after another that it holds
            if places[at] == place:
                counts[at] += count
            else:
                places.insert(at, place)
                counts.insert(at, count)

    def drop(self, xid: int) -> dict[int, int]:
        """Give what an aborted subtransaction changed, and forget it."""
        first = self._first(xid)
        begin = bisect_left(self._places, first)
        end = bisect_left(self._places, first + (1 << _OPERATION_BITS), begin)
        gone = {
            self._places[at] & ((1 << _OPERATION_BITS) - 1): self._counts[at]
            for at in range(begin, end)
            if self._counts[at]
        }
        if end == len(self._places):
            del self._places[begin:], self._counts[begin:]
        else:  # to move up what is behind would cost more than all the rest
            self._counts[begin:end] = array("Q", bytes(8 * (end - begin)))
            self._aborted += len(gone)
        return gone

    def shrink(self) -> None:
        """Let go of the room that aborted ones still take, where it is worth it; takes as long as there are many."""
        if self._aborted <= len(self) // 4:
            return
        kept = [at for at, count in enumerate(self._counts) if count]
        self._places = array("Q", [self._places[at] for at in kept])
        self._counts = array("Q", [self._counts[at] for at in kept])
        self._aborted = 0

    def _first(self, xid: int) -> int:
        offset = (xid - self._top) & 0xFFFFFFFF
        if offset >> _OFFSET_BITS:
            raise ValueError(f"subtransaction {xid} of transaction {self._top}")
        return offset << _OPERATION_BITS


class Transaction:
    """What is known of a transaction that has not been committed yet."""

    __slots__ = (
        "counts",
        "marker_bytes",
        "markers",
        "markers_cut",
        "origin",
        "start",
        "subtransactions",
        "time",
        "xid",
    )

    def __init__(self, xid: int, start: int = 0, time: int = 0) -> None:
        self.xid = xid
        self.start = start
        self.time = time
        self.counts: Counts = {}
        """Of the whole, without what was aborted of it."""
        self.subtransactions = Subtransactions(xid)
        self.markers: list[str] = []
        self.marker_bytes = 0
        self.markers_cut = False
        self.origin = ""

    @property
    def held_bytes(self) -> int:
        """About how much memory it takes."""
        return CHANGE_BYTES * len(self.subtransactions) + TABLE_BYTES * len(self.counts) + self.marker_bytes

    def add(self, xid: int, changes: Counts) -> None:
        """Count what a subtransaction changed."""
        counts = self.counts
        for key, count in changes.items():
            counts[key] = counts.get(key, 0) + count
        self.subtransactions.add(xid, changes)

    def abort(self, xid: int) -> None:
        """Take away what a subtransaction changed."""
        for key, count in self.subtransactions.drop(xid).items():
            self.counts[key] -= count
            if not self.counts[key]:
                del self.counts[key]

    def mark(self, marker: str) -> None:
        """Add a marker."""
        self.markers.append(marker)
        self.marker_bytes += STRING_BYTES + 4 * len(marker)

    def finish(self) -> None:
        """Forget which subtransaction changed what, now that none of them can be aborted any more."""
        self.subtransactions = Subtransactions(self.xid)
