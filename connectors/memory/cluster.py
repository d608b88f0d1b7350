"""A small model of one database cluster: its log over all timelines, how far each part of it got, its slots."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from connectors.memory.book import Book, Content, Entry, Forks
from connectors.memory.manner import MEMORY, Manner
from trigger.model import Changes, Commit, to_microseconds
from trigger.position import History, Lineage

_COMMIT_BYTES = 48


@dataclass
class Slot:
    """A logical slot: what the server remembers for one stream."""

    confirmed: int
    saved: int
    """What a crash of the server brings `confirmed` back to."""
    lost: bool = False


@dataclass(frozen=True)
class Copy:
    """A cluster as it was at one moment, as its host would find it after a crash then."""

    book: Book
    timeline: int
    upto: int
    slots: Mapping[str, Slot]
    next_xid: int
    server: int


class Cluster:
    """A small model of one database cluster.

    Args:
        now: gives the time of day.
        notify: told whenever something happens.
        system: its identity.
        manner: how it counts.
    """

    def __init__(
        self, now: Callable[[], datetime], notify: Callable[[], None], system: str = "7001", manner: Manner = MEMORY
    ) -> None:
        self._now = now
        self._notify = notify
        self.manner = manner
        self.identity = system
        """What the systems of all its servers begin with."""
        self.timeline = manner.first_branch
        self.book = Book(manner, system, manner.first, (self.timeline, ()))
        self._server = self._servers = 1
        """The number of the present server, and how many there were."""
        self.inserted = self.written = self.flushed = self.stable = self.checkpoint_redo = manner.first
        self.slots: dict[str, Slot] = {}
        self.next_xid = 700
        self._serial = 0
        self._latest_us = self._not_before_us = 0
        self.up = True
        self.starts = 0
        """Counts up whenever the server starts."""
        self.session = 0
        """Counts up whenever all connections break."""

    @property
    def system(self) -> str:
        """The identity of the present server."""
        return self.book.system

    @property
    def logs(self) -> dict[int, list[Entry]]:
        """The log of each timeline."""
        return self.book.logs

    @property
    def forks(self) -> dict[int, Forks]:
        """Where each timeline left its ancestors."""
        return self.book.forks

    @property
    def history(self) -> History:
        """The history that commits go into now, in the first incarnation."""
        return self.book.history(self.timeline)

    def lineage(self, timeline: int | None = None) -> Lineage:
        """Give the past of one timeline; of the present one if None."""
        return self.book.lineage(self.timeline if timeline is None else timeline)

    @property
    def flushed_records(self) -> int:
        """The end of the last record that is flushed as a whole."""
        return self.book.end_before(self.timeline, self.flushed)

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
        start, end = self._span(_COMMIT_BYTES)
        time_us = max(to_microseconds(self._now()), self._not_before_us)
        self._latest_us = max(time_us, self._latest_us)
        committed = Commit(
            stream,
            self.history,
            start,
            end,
            self.manner.name(self.next_xid, self._server),
            time_us,
            dict(tables or {}),
            markers,
        )
        self.next_xid += 1
        self._append(start, end, committed)
        if synchronous:
            self.flush()
        return committed

    def write_ahead(self, byte_count: int = 64) -> None:
        """Insert a record that no source can see: DDL, a sequence, another database, housekeeping."""
        start, end = self._span(byte_count)
        self._append(start, end)

    def _span(self, byte_count: int) -> tuple[int, int]:
        """Give where the next record lies; what a file leaves unused before it is a record that commits nothing."""
        start, end = self.manner.span(self.inserted, byte_count)
        if start > self.inserted:
            self._append(self.inserted, start)
        return start, end

    def _append(self, start: int, end: int, commit: Commit | None = None) -> None:
        self._serial += 1
        self.logs[self.timeline].append(Entry(start, end, commit, self._serial))
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
        self.flushed = max(self.flushed, self.inserted // self.manner.page * self.manner.page)
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
        end = self.book.end_before(self.timeline, kept)
        self.inserted = self.written = self.flushed = end
        self.stable = min(self.stable, end)
        for slot in self.slots.values():
            slot.confirmed = slot.saved
        self.up = False
        self.cut_connections()

    def restart(self) -> None:
        """Start the server again; recovery ends with a checkpoint."""
        self.up = True
        self.starts += 1
        self.checkpoint()

    def promote(self, at: int | None = None, *, keep_slots: bool = False) -> None:
        """Go on from `at` (the flushed end if None) on a new timeline: a failover, or a restore in place.

        What was committed behind `at` stays on the old timeline and is no part of the new one's past.
        """
        left_at = self.book.end_before(self.timeline, self.flushed if at is None else at)
        if self.manner.branches:
            past = (*self.forks[self.timeline], (self.timeline, left_at))
            self.timeline = max(self.logs) + 1
            self.forks[self.timeline], self.logs[self.timeline] = past, []
            self.slots = {name: slot for name, slot in self.slots.items() if keep_slots}
        else:
            commits = self.book.commits(self.lineage(), left_at)
            self._servers, self.slots, left_at = self._servers + 1, {}, self.manner.first
            self._server = self._servers
            system = f"{self.identity}-{self._servers}"
            self.timeline = self.manner.first_branch
            self.book = Book(self.manner, system, left_at, (self.timeline, ()), commits)
        for slot in self.slots.values():
            slot.confirmed = slot.saved = min(slot.confirmed, left_at)
        self._begin_at(left_at)

    def copy(self) -> Copy:
        """Give what the cluster would be after a crash now."""
        upto = self.book.end_before(self.timeline, self.written)
        slots = {name: replace(slot, confirmed=slot.saved) for name, slot in self.slots.items()}
        book = self.book.copy()
        log = book.logs[self.timeline]
        del log[bisect_right(log, upto, key=lambda entry: entry.end) :]
        return Copy(book, self.timeline, upto, slots, self.next_xid, self._server)

    def put_back(self, copy: Copy) -> None:
        """Go on from an older copy, under the same identity and on the same timeline, as if nothing had been since."""
        self.book, self.timeline, self.next_xid = copy.book.copy(), copy.timeline, copy.next_xid
        self._server = copy.server
        self.slots = {name: replace(slot) for name, slot in copy.slots.items()}
        self._begin_at(copy.upto)

    def reset_log(self) -> None:
        """Begin a new log behind the old one, which is given up: the data are there, the slots are useless."""
        end = self.book.end_before(self.timeline, self.written)
        commits = self.book.commits(self.lineage(), end)
        first = self.manner.behind(end)
        self.book = Book(self.manner, self.system, first, (self.timeline, self.forks[self.timeline]), commits)
        for slot in self.slots.values():
            slot.lost = True
        self._begin_at(first)

    def _begin_at(self, end: int) -> None:
        """Start with a log that ends there; recovery ends with a checkpoint, and takes longer than no time."""
        self._not_before_us = self._latest_us + 1
        self.inserted = self.written = self.flushed = self.stable = self.checkpoint_redo = end
        self.up = True
        self.starts += 1
        self.cut_connections()
        self.checkpoint()

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
        self.slots[stream] = Slot(self.flushed_records, self.flushed_records)
        self.cut_connections()

    def advance_slot(self, stream: str) -> None:
        """Move the slot of a stream to the present end of the log, as `pg_replication_slot_advance` does."""
        self.slots[stream].confirmed = self.slots[stream].saved = self.flushed_records
        self.cut_connections()

    def lose_slot(self, stream: str) -> None:
        """Invalidate the slot of a stream, as `max_slot_wal_keep_size` does."""
        self.slots[stream].lost = True
        self.cut_connections()

    def entries(self, lineage: Lineage, after: int = 0) -> Iterator[Entry]:
        """Give the records of a lineage that end behind `after`, oldest first."""
        return self.book.entries(lineage, after)

    def commits(self, content: Content) -> list[Commit]:
        """Give every commit that a content holds, oldest first."""
        return content.commits()
