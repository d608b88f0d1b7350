"""A small model of one database cluster: its log over all timelines, how far each part of it got, its slots."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from trigger.model import (
    Changes,
    Commit,
    to_microseconds,
)
from trigger.position import History, Lineage, Lsn

SEGMENT_BYTES = 1 << 12
PAGE_BYTES = 1 << 9
FIRST_LSN = Lsn(1 << 24)
_COMMIT_BYTES = 48


class Entry(NamedTuple):
    """One record of the log; `commit` is None for a record that commits nothing."""

    start: Lsn
    end: Lsn
    commit: Commit | None


class Content(NamedTuple):
    """What a cut of one volume holds: the log of `lineage` up to `upto`, and where its last checkpoint began."""

    lineage: Lineage
    upto: Lsn
    redo: Lsn
    torn: bool = False
    """Whether the log moved while it was copied; then it needs the database's bracket to become one state."""


@dataclass
class Slot:
    """A logical slot: what the server remembers for one stream."""

    confirmed: Lsn
    saved: Lsn
    """What a crash of the server brings `confirmed` back to."""
    lost: bool = False


class Cluster:
    """A small model of one database cluster: its log over all timelines, how far each part of it got, its slots."""

    def __init__(self, now: Callable[[], datetime], notify: Callable[[], None], system: str = "7001") -> None:
        self._now = now
        self._notify = notify
        self.system = system
        self.timeline = 1
        self.forks: dict[int, tuple[tuple[int, Lsn], ...]] = {1: ()}
        self.logs: dict[int, list[Entry]] = {1: []}
        self.inserted = self.written = self.flushed = self.stable = self.checkpoint_redo = FIRST_LSN
        self.slots: dict[str, Slot] = {}
        self.next_xid = 700
        self.up = True
        self.session = 0
        """Counts up whenever all connections break."""

    @property
    def history(self) -> History:
        """The history that commits go into now."""
        return History(self.system, self.timeline)

    def lineage(self, timeline: int | None = None) -> Lineage:
        """Give the past of one timeline; of the present one if None."""
        number = self.timeline if timeline is None else timeline
        return Lineage(History(self.system, number), self.forks[number])

    def commit(
        self,
        stream: str,
        tables: Mapping[str, Changes] | None = None,
        markers: tuple[str, ...] = (),
        *,
        data_bytes: int = 200,
        synchronous: bool = True,
    ) -> Commit:
        """Commit a transaction; `data_bytes=0` puts its commit record right behind the record before.

        Asynchronous commits are inserted only; `write` and `flush` bring them on.
        """
        if data_bytes:
            self.write_ahead(data_bytes)
        start, end = self.inserted, Lsn(self.inserted + _COMMIT_BYTES)
        committed = Commit(
            stream,
            self.history,
            start,
            end,
            self.next_xid,
            to_microseconds(self._now()),
            dict(tables or {}),
            markers,
        )
        self.next_xid += 1
        self.logs[self.timeline].append(Entry(start, end, committed))
        self.inserted = end
        if synchronous:
            self.flush()
        return committed

    def write_ahead(self, byte_count: int = 64) -> None:
        """Insert a record that no source can see: DDL, a sequence, another database, housekeeping."""
        end = Lsn(self.inserted + byte_count)
        self.logs[self.timeline].append(Entry(self.inserted, end, None))
        self.inserted = end

    def write(self) -> None:
        """Let the server write its log to the host's cache, without a flush."""
        self.written = self.inserted

    def flush(self) -> None:
        """Let the server flush its log."""
        self.written = self.flushed = self.inserted
        self._notify()

    def flush_pages(self) -> None:
        """Let the log writer flush the pages that are full; the last of them may end in the middle of a record."""
        self.flushed = max(self.flushed, Lsn(self.inserted // PAGE_BYTES * PAGE_BYTES))
        self.written = max(self.written, self.flushed)
        self._notify()

    def write_back(self) -> None:
        """Let the host write its cache back, as it does on its own now and then, and as an agent makes it do."""
        self.stable = max(self.stable, self.written)

    def checkpoint(self) -> None:
        """Let the server write a checkpoint; positions of slots are saved with it."""
        self.checkpoint_redo = self.inserted
        for slot in self.slots.values():
            slot.saved = slot.confirmed
        self.write_ahead(112)
        self.flush()

    def crash(self, *, power: bool = False) -> None:
        """Stop the server at once; with `power` what only the host's cache held is lost too."""
        kept = max(self.flushed, self.stable) if power else self.written
        log = self.logs[self.timeline]
        del log[bisect_right(log, kept, key=lambda entry: entry.end) :]
        end = log[-1].end if log else self._begin()
        self.inserted = self.written = self.flushed = end
        self.stable = min(self.stable, end)
        for slot in self.slots.values():
            slot.confirmed = slot.saved
        self.up = False
        self.cut_connections()

    def restart(self) -> None:
        """Start the server again; recovery ends with a checkpoint."""
        self.up = True
        self.checkpoint()

    def promote(self, at: Lsn | None = None, *, keep_slots: bool = False) -> None:
        """Go on from `at` (the flushed end if None) on a new timeline: a failover, or a restore in place.

        What was committed behind `at` stays on the old timeline and is no part of the new one's past.
        """
        log = self.logs[self.timeline]
        index = bisect_right(log, self.flushed if at is None else at, key=lambda entry: entry.end)
        left_at = log[index - 1].end if index else self._begin()
        past = (*self.forks[self.timeline], (self.timeline, left_at))
        self.timeline = max(self.logs) + 1
        self.forks[self.timeline], self.logs[self.timeline] = past, []
        self.inserted = self.written = self.flushed = self.stable = self.checkpoint_redo = left_at
        self.slots = {name: slot for name, slot in self.slots.items() if keep_slots}
        for slot in self.slots.values():
            slot.confirmed = slot.saved = min(slot.confirmed, left_at)
        self.up = True
        self.cut_connections()
        self.checkpoint()

    def _begin(self) -> Lsn:
        """Give where the present timeline begins."""
        forks = self.forks[self.timeline]
        return forks[-1][1] if forks else FIRST_LSN

    def cut_connections(self) -> None:
        """Break every connection to the server."""
        self.session += 1
        self._notify()

    def drop_slot(self, stream: str) -> None:
        """Drop the slot of a stream, as an operator may."""
        self.slots.pop(stream, None)
        self.cut_connections()

    def recreate_slot(self, stream: str) -> None:
        """Drop the slot of a stream and create it again at the present end of the log."""
        self.slots[stream] = Slot(self.flushed, self.flushed)
        self.cut_connections()

    def advance_slot(self, stream: str) -> None:
        """Move the slot of a stream to the present end of the log, as `pg_replication_slot_advance` does."""
        self.slots[stream].confirmed = self.slots[stream].saved = self.flushed
        self.cut_connections()

    def lose_slot(self, stream: str) -> None:
        """Invalidate the slot of a stream, as `max_slot_wal_keep_size` does."""
        self.slots[stream].lost = True
        self.cut_connections()

    def entries(self, lineage: Lineage, after: Lsn = FIRST_LSN) -> Iterator[Entry]:
        """Give the records of a lineage that end behind `after`, oldest first."""
        for timeline, left_at in (*lineage.forks, (lineage.history.timeline, None)):
            log = self.logs[timeline]
            for entry in log[bisect_right(log, after, key=lambda entry: entry.end) :]:
                if left_at is not None and entry.end > left_at:
                    break
                yield entry

    def commits(self, content: Content) -> list[Commit]:
        """Give every commit that a content holds, oldest first."""
        found = []
        for entry in self.entries(content.lineage):
            if entry.end > content.upto:
                break
            if entry.commit is not None:
                found.append(entry.commit)
        return found
