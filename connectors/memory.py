"""Every port in memory: the reference drivers, for simulation and for tests of the service.

A `World` holds what outlives the service: the cluster with its log, what the storage keeps, the journal, what was
restored. The drivers hold connections only, so a service that died is simulated by building them anew over the same
world. There are no threads and no waiting but asyncio's own, so a loop with virtual time runs all of it at once.

What is modelled, each after a measured fact of the real thing:

- The log is a row of records on a timeline. A commit is *inserted*, then *written* to the host's cache, then
  *flushed* by the server; a source sees flushed commits only, a snapshot may hold written ones.
- The host caches writes. A cut sees what was *stable* at that moment, which an agent's flush brings up to what was
  written; so a point that was sealed without its flush is a point without its commit.
- A restore replays by PostgreSQL's rules: it cannot stop before the end of the log inside its base, an inclusive
  stop at an LSN ends after the record that begins there, an exclusive one before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from trigger.errors import AgentError, DatabaseError, JournalError, RestoreError, SourceError, StorageError
from trigger.model import (
    Bracket,
    Changes,
    Commit,
    Finding,
    Flush,
    Severity,
    Snapshot,
    StopKind,
    Target,
    Volume,
    to_microseconds,
)
from trigger.ports import Batch, Break, Capability, Clone, Extent, Layout, Progress, Retained, Running, Space, Tagged
from trigger.position import History, Lineage, Lsn, Position

SEGMENT_BYTES = 1 << 16
_COMMIT_BYTES = 48
_BATCH_COMMITS = 500
_FIRST_LSN = Lsn(1 << 24)


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
        self.inserted = self.written = self.flushed = self.stable = self.checkpoint_redo = _FIRST_LSN
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
        return forks[-1][1] if forks else _FIRST_LSN

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

    def entries(self, lineage: Lineage, after: Lsn = _FIRST_LSN) -> Iterator[Entry]:
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


@dataclass
class Kept:
    """What the storage keeps under one point id."""

    wanted: tuple[str, ...]
    """The volumes it shall hold."""
    tag: str | None = None
    cuts: dict[str, tuple[Snapshot, Content]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every volume is there, and the tag, which is written last."""
        return self.tag is not None and all(volume in self.cuts for volume in self.wanted)


@dataclass
class Restored:
    """What a restore brought back."""

    running: Running
    commits: list[Commit]


class World:
    """Everything that outlives the service.

    Args:
        seconds: gives the time since `started_at`; the running loop's time if None.
        started_at: the time of day when `seconds` gives 0.
    """

    def __init__(
        self,
        *,
        seconds: Callable[[], float] | None = None,
        started_at: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    ) -> None:
        self._seconds = seconds
        self._last = 0.0
        self.started_at = started_at
        self.skew = timedelta()
        """How wrong the clock is; a test may step it."""
        self._waiting: dict[asyncio.Future[None], None] = {}  # woken in the order in which they came
        self.cluster = Cluster(self.now, self.notify)
        self.kept: dict[str, Kept] = {}
        self.claimed_by: MemoryStorage | None = None
        self.clones: dict[str, tuple[Clone, dict[str, Content]]] = {}
        self.free_bytes = 1 << 40
        self.write_errors: set[str] = set()
        """Volumes whose next flush meets an error of write-back, which the host reports once only."""
        self.poisoned: set[str] = set()
        self.journal: dict[int, list[tuple[Lsn, Lsn]]] = {}
        """What the journal holds of each timeline, joined, by position."""
        self.staged: dict[Path, list[Extent]] = {}
        self.restored: dict[str, Restored] = {}
        self.stopped: dict[str, Restored] = {}

    def now(self) -> datetime:
        """Give the time of day."""
        if self._seconds is not None:
            self._last = self._seconds()
        else:
            with contextlib.suppress(RuntimeError):  # outside a loop time stands still
                self._last = asyncio.get_running_loop().time()
        return self.started_at + timedelta(seconds=self._last) + self.skew

    def notify(self) -> None:
        """Wake whoever waits for something to happen in the cluster."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Wait until something happens in the cluster."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            self._waiting.pop(future, None)

    def kill_service(self) -> None:
        """Forget whoever waited or claimed: the process that they belonged to is gone, its event loop with it."""
        self._waiting.clear()
        self.claimed_by = None

    def damage_journal(self, timeline: int, start: Lsn, end: Lsn) -> None:
        """Take the stretch from `start` to `end` out of the journal."""
        pieces = []
        for held_start, held_end in self.journal.get(timeline, []):
            pieces += [(held_start, min(held_end, start)), (max(held_start, end), held_end)]
        self.journal[timeline] = [(low, high) for low, high in pieces if low < high]


class MemoryClock:
    """The world's time of day."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> datetime:
        """Give the present time, aware UTC."""
        return self._world.now()


class MemorySource:
    """Port `Source`: one stream of the world's cluster; one that `repeats` gives again what was not acknowledged."""

    heartbeat_seconds = 5.0
    trouble = ""

    def __init__(self, world: World, name: str, *, repeats: bool = False) -> None:
        self._world = world
        self.name = name
        self._repeats = repeats
        self._says_where_it_begins = False
        self._session = -1
        self._read_until = _FIRST_LSN
        self._lineage = world.cluster.lineage()

    async def open(self, after: Position | None) -> Break | None:
        """Connect and resume behind `after`; gives the break where the stream does not go on from there."""
        await asyncio.sleep(0)
        cluster = self._world.cluster
        if not cluster.up:
            raise SourceError(f"{self.name}: the server does not answer")
        slot, broken = self._slot(after)
        self._session = cluster.session
        self._lineage = cluster.lineage()
        self._says_where_it_begins = after is None
        self._read_until = slot.confirmed
        if after is not None and not self._repeats:
            self._read_until = broken.until.at if broken else after.at
        return broken

    def _slot(self, after: Position | None) -> tuple[Slot, Break | None]:
        cluster = self._world.cluster
        slot = cluster.slots.get(self.name)
        reason = ""
        if slot is None or slot.lost:
            reason = "the slot was lost" if slot else "the slot is gone"
            slot = cluster.slots[self.name] = Slot(cluster.flushed, cluster.flushed)
        lineage = cluster.lineage()
        if after is None:
            return slot, None
        if not lineage.includes(after):
            reason = f"{after} is not in the past of {lineage.history}"
        elif slot.confirmed > after.at:
            reason = reason or f"the slot was moved ahead to {slot.confirmed}"
        else:
            return slot, None
        return slot, Break(lineage.at(max(slot.confirmed, lineage.shared(after) or Lsn(0))), reason)

    async def read(self) -> Batch:
        """Wait for log that was flushed, and give the commits of this stream in it."""
        while True:
            self._require_connection()
            if self._says_where_it_begins:
                self._says_where_it_begins = False
                return Batch((), self._lineage.at(self._read_until))
            batch = self._arrived()
            if batch is not None:
                return batch
            await self._world.changed()

    def _arrived(self) -> Batch | None:
        cluster = self._world.cluster
        if cluster.flushed <= self._read_until:
            return None
        commits: list[Commit] = []
        through = cluster.flushed
        for entry in cluster.entries(self._lineage, self._read_until):
            if entry.end > cluster.flushed:
                break
            if entry.commit is not None and entry.commit.stream == self.name:
                commits.append(entry.commit)
                if len(commits) == _BATCH_COMMITS:
                    through = entry.end
                    break
        self._read_until = through
        return Batch(commits, self._lineage.at(through))

    async def acknowledge(self, through: Position) -> None:
        """Let the server forget everything up to `through`."""
        await asyncio.sleep(0)
        self._require_connection()
        if not self._lineage.includes(through):
            raise SourceError(f"{self.name}: {through} is not in {self._lineage.history}", retryable=False)
        slot = self._world.cluster.slots[self.name]
        slot.confirmed = max(slot.confirmed, min(through.at, self._world.cluster.flushed))

    async def heartbeat(self) -> None:
        """Tell the server that we are alive."""
        await asyncio.sleep(0)
        self._require_connection()

    async def close(self) -> None:
        """Disconnect; the slot stays."""
        self._session = -1

    def _require_connection(self) -> None:
        if self._session != self._world.cluster.session:
            raise SourceError(f"{self.name}: the connection is broken")


class MemoryDatabase:
    """Port `Database`: the world's cluster as a whole."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._bracketed = False

    async def lineage(self) -> Lineage:
        """Give the present history and its past."""
        return (await self._connected()).lineage()

    async def durable(self) -> Position:
        """Give the position up to which the log is flushed."""
        cluster = await self._connected()
        return cluster.lineage().at(cluster.flushed)

    async def ceiling(self) -> Position:
        """Give the position up to which the log is inserted."""
        cluster = await self._connected()
        return Position(cluster.history, cluster.inserted)

    async def redo(self) -> Position:
        """Give where the last checkpoint began."""
        cluster = await self._connected()
        return Position(cluster.history, cluster.checkpoint_redo)

    @contextlib.asynccontextmanager
    async def bracket(self, name: str) -> AsyncIterator[Callable[[], Awaitable[Bracket]]]:
        """Hold a bracket: a checkpoint at its start, a record at its end."""
        cluster = await self._connected()
        if self._bracketed:
            raise DatabaseError(f"{name}: a bracket is held already", hint="hold one at a time")
        self._bracketed = True
        cluster.checkpoint()
        session, start = cluster.session, Position(cluster.history, cluster.checkpoint_redo)

        async def stop() -> Bracket:
            await self._connected()
            if cluster.session != session:
                raise DatabaseError(f"{name}: the connection that held the bracket broke")
            cluster.write_ahead(64)
            cluster.flush()
            label = f"START WAL LOCATION: {start.at}\nLABEL: {name}\nSTART TIMELINE: {start.history.timeline}\n"
            return Bracket(start, Position(cluster.history, cluster.inserted), label)

        try:
            yield stop
        finally:
            self._bracketed = False

    async def checkpoint(self) -> None:
        """Make the cluster write a checkpoint."""
        (await self._connected()).checkpoint()

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Find nothing wrong."""
        await self._connected()
        return [Finding(volume.name, Severity.OK, "in memory") for volume in volumes]

    async def explain(self) -> list[Finding]:
        """Say what the memory source cannot see."""
        await self._connected()
        return [Finding("records", Severity.NOTE, "records that commit nothing reach no source", "catch-all points")]

    async def remove(self) -> list[str]:
        """Drop every slot."""
        gone = sorted((await self._connected()).slots)
        self._world.cluster.slots.clear()
        return gone

    async def retained(self) -> list[Retained]:
        """Give the log behind each slot that is not lost."""
        cluster = await self._connected()
        end = cluster.inserted
        return [Retained(name, end - slot.confirmed, None) for name, slot in cluster.slots.items() if not slot.lost]

    async def layout(self) -> Layout:
        """Give a place that does not exist."""
        await self._connected()
        data = Path("/memory/data")
        return Layout(150000, data, data / "pg_wal", (), (), 0, 0, SEGMENT_BYTES)

    async def close(self) -> None:
        """Disconnect."""

    async def _connected(self) -> Cluster:
        await asyncio.sleep(0)
        if not self._world.cluster.up:
            raise DatabaseError("the server does not answer")
        return self._world.cluster


class MemoryAgent:
    """Port `Agent`: the host whose cache lies between the cluster and the storage."""

    def __init__(self, world: World, name: str = "memory") -> None:
        self._world = world
        self.name = name
        self._volumes: tuple[Volume, ...] | None = None

    async def prepare(self, volumes: Sequence[Volume]) -> None:
        """Remember the volumes."""
        await asyncio.sleep(0)
        self._volumes = tuple(volumes)

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        """Bring what was written to stable storage; an error of write-back poisons its volume."""
        if self._volumes is None:
            raise AgentError(f"{self.name}: flush of {point} before prepare", retryable=False)
        try:
            async with asyncio.timeout(deadline_seconds):
                return tuple([await self._flush(volume) for volume in self._volumes])
        except TimeoutError:
            raise AgentError(f"{self.name}: not flushed within {deadline_seconds:g} s") from None

    async def _flush(self, volume: Volume) -> Flush:
        began_at = self._world.now()
        await asyncio.sleep(0)
        if volume.name in self._world.write_errors:
            self._world.write_errors.discard(volume.name)
            self._world.poisoned.add(volume.name)
        if volume.name in self._world.poisoned:
            raise AgentError(f"{self.name}: write-back of {volume.name} failed", retryable=False)
        self._world.cluster.write_back()
        return Flush(self.name, volume.name, "0:0", "0", began_at, self._world.now())

    async def clear(self, volume: str) -> None:
        """Trust a poisoned volume again, by an operator's word."""
        self._world.poisoned.discard(volume)

    async def close(self) -> None:
        """Let go of the volumes."""
        self._volumes = None


class MemoryStorage:
    """Port `Storage`: keeps what each volume held at the instant of its cut.

    Args:
        capabilities: what it shall be able to do. Without `ATOMIC` a cut takes a millisecond and is torn if the log
            moved meanwhile; without `ATOMIC_GROUP` each volume has an instant of its own.
        budget: how many snapshots it bears.
        wanted_free_bytes: no snapshot is made while `World.free_bytes` is less.
    """

    name = "memory"

    def __init__(
        self,
        world: World,
        *,
        capabilities: frozenset[Capability] = frozenset(Capability),
        budget: int = 1000,
        wanted_free_bytes: int = 1 << 20,
    ) -> None:
        self._world = world
        self.capabilities = capabilities
        self._budget = budget
        self._wanted_free_bytes = wanted_free_bytes

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Find nothing wrong."""
        await asyncio.sleep(0)
        return [Finding(volume.name, Severity.OK, "kept in memory") for volume in volumes]

    async def claim(self) -> None:
        """Hold the storage of this world."""
        await asyncio.sleep(0)
        if self._world.claimed_by not in (None, self):
            raise StorageError("another one holds the storage", hint="close it first", retryable=False)
        self._world.claimed_by = self

    async def snapshot(self, volumes: Sequence[Volume], point: str, tag: str) -> tuple[Snapshot, ...]:
        """Keep what the volumes hold, the tag last."""
        kept = self._world.kept.get(point)
        if kept is not None and kept.complete:
            return tuple(snapshot for snapshot, _ in kept.cuts.values())
        if kept is not None:
            raise StorageError(f"{point} is there, unfinished", hint="delete it first", retryable=False)
        await self._require_room()
        kept = self._world.kept[point] = Kept(tuple(volume.name for volume in volumes))
        if Capability.ATOMIC_GROUP in self.capabilities:
            cuts = {volume.name: self._cut(point, volume) for volume in volumes}
            await asyncio.sleep(0)
            kept.cuts |= cuts
        else:
            for volume in volumes:
                kept.cuts[volume.name] = await self._copy(point, volume)
        await asyncio.sleep(0)
        kept.tag = tag
        return tuple(snapshot for snapshot, _ in kept.cuts.values())

    async def _require_room(self) -> None:
        space = await self.space()
        if space.free_bytes < space.wanted_free_bytes:
            raise StorageError(f"only {space.free_bytes} bytes are free, {space.wanted_free_bytes} are wanted")
        if space.snapshots >= space.budget:
            raise StorageError(f"{space.snapshots} snapshots, and no more than {space.budget} are borne")

    def _cut(self, point: str, volume: Volume) -> tuple[Snapshot, Content]:
        cluster, now = self._world.cluster, self._world.now()
        snapshot = Snapshot(volume.name, self.name, f"memory:{point}/{volume.name}", now, now)
        redo = min(cluster.checkpoint_redo, cluster.stable)
        return snapshot, Content(cluster.lineage(), cluster.stable, redo)

    async def _copy(self, point: str, volume: Volume) -> tuple[Snapshot, Content]:
        snapshot, first = self._cut(point, volume)
        if Capability.ATOMIC in self.capabilities:
            await asyncio.sleep(0)
            return snapshot, first
        await asyncio.sleep(0.001)
        _, last = self._cut(point, volume)
        torn = first.upto != last.upto or first.lineage != last.lineage
        return replace(snapshot, ended_at=self._world.now()), last._replace(redo=first.redo, torn=torn)

    async def retag(self, point: str, tag: str) -> None:
        """Replace the tag of a point."""
        await asyncio.sleep(0)
        kept = self._world.kept.get(point)
        if kept is None or not kept.complete:
            raise StorageError(f"no whole snapshot of {point} to tag", retryable=False)
        kept.tag = tag

    async def tagged(self) -> list[Tagged]:
        """Give everything it keeps."""
        await asyncio.sleep(0)
        return [
            Tagged(point, kept.tag, tuple(snapshot for snapshot, _ in kept.cuts.values()), kept.complete)
            for point, kept in sorted(self._world.kept.items())
        ]

    async def delete(self, point: str) -> None:
        """Forget the snapshots and the tag of a point."""
        await asyncio.sleep(0)
        self._world.kept.pop(point, None)

    async def clone(self, point: str, name: str, progress: Progress) -> Clone:
        """Make a copy of what a point holds."""
        await asyncio.sleep(0)
        kept = self._world.kept.get(point)
        if kept is None or not kept.complete:
            raise StorageError(f"no whole snapshot of {point}", retryable=False)
        if name in self._world.clones:
            raise StorageError(f"the clone {name} exists already", hint="choose another name", retryable=False)
        paths = tuple((volume, Path(f"/memory/clones/{name}/{volume}")) for volume in kept.cuts)
        clone = Clone(name, point, paths, self._world.now())
        self._world.clones[name] = clone, {volume: content for volume, (_, content) in kept.cuts.items()}
        progress("clone", 1, 1)
        return clone

    async def clones(self) -> list[Clone]:
        """Give all clones."""
        await asyncio.sleep(0)
        return [clone for clone, _ in self._world.clones.values()]

    async def drop_clone(self, name: str) -> None:
        """Remove a clone."""
        await asyncio.sleep(0)
        self._world.clones.pop(name, None)

    async def space(self) -> Space:
        """Give the room that is left."""
        await asyncio.sleep(0)
        return Space(self._world.free_bytes, 1 << 40, self._wanted_free_bytes, len(self._world.kept), self._budget)

    async def close(self) -> None:
        """Let go of the claim."""
        if self._world.claimed_by is self:
            self._world.claimed_by = None


class MemoryJournal:
    """Port `Journal`: keeps the cluster's flushed log, resuming where it stopped."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self) -> None:
        """Take over what was flushed, whenever something was."""
        while True:
            self._receive()
            await self._world.changed()

    def _receive(self) -> None:
        cluster, held = self._world.cluster, self._world.journal
        if not cluster.up:
            return
        lineage = cluster.lineage()
        begin = _FIRST_LSN
        for timeline, end in (*lineage.forks, (lineage.history.timeline, cluster.flushed)):
            extents = held.setdefault(timeline, [])
            resume = extents[-1][1] if extents else begin
            if end > resume:
                if extents:
                    extents[-1] = extents[-1][0], end
                else:
                    extents.append((resume, end))
            begin = end

    async def extents(self) -> list[Extent]:
        """Give what it holds."""
        await asyncio.sleep(0)
        system = self._world.cluster.system
        return [
            Extent(History(system, timeline), start, end)
            for timeline, pieces in sorted(self._world.journal.items())
            for start, end in pieces
        ]

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history`."""
        await asyncio.sleep(0)
        if history.system != self._world.cluster.system or history.timeline not in self._world.journal:
            raise JournalError(f"no history file of {history} is kept")
        return self._world.cluster.lineage(history.timeline)

    async def audit(self) -> list[Finding]:
        """Find the holes."""
        findings = []
        for timeline, pieces in sorted(self._world.journal.items()):
            for (_, hole), (end, _) in itertools.pairwise(pieces):
                message = f"log from {hole} to {end} of timeline {timeline} is missing"
                findings.append(Finding("journal", Severity.WARNING, message, "take a point behind the hole"))
        await asyncio.sleep(0)
        return findings

    async def stage(self, start: Position, target: Target, folder: Path, progress: Progress) -> int:
        """Hand over the log from `start` on, as far as it reaches without a hole, at least to the target."""
        lineage = await self.lineage(target.history)
        staged: list[Extent] = []
        reached = start.at
        for timeline, left_at in (*lineage.forks, (lineage.history.timeline, None)):
            if timeline < start.history.timeline or (left_at is not None and left_at <= reached):
                continue
            history = History(lineage.history.system, timeline)
            pieces = self._world.journal.get(timeline, [])
            end = next((high for low, high in pieces if low <= reached < high), reached)
            end = end if left_at is None else min(end, left_at)
            staged.append(Extent(history, reached, end))
            reached = end
            if left_at is not None and end < left_at:
                break
        needed = start.at if target.kind is StopKind.END else target.at
        if reached < needed or (reached == needed and target.kind is StopKind.LSN and target.inclusive):
            raise JournalError(f"the log from {reached} on is not held, {target.description} is at {target.at}")
        self._world.staged[folder] = staged
        progress("stage", reached - start.at, reached - start.at)
        return reached - start.at

    async def release(self, before: Lsn) -> int:
        """Delete whole segments before `before`."""
        await asyncio.sleep(0)
        limit = Lsn(before - before % SEGMENT_BYTES)
        released = 0
        for timeline, pieces in self._world.journal.items():
            released += sum(max(0, (min(end, limit) - start) // SEGMENT_BYTES) for start, end in pieces)
            self._world.journal[timeline] = [(max(start, limit), end) for start, end in pieces if end > limit]
        return released


class MemoryRecovery:
    """Port `Recovery`: replays by PostgreSQL's rules, and knows the exact commits that came back."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(
        self,
        clone: Clone,
        volumes: Sequence[Volume],
        target: Target,
        bracket: Bracket | None,
        log_folder: Path,
        progress: Progress,
        *,
        throwaway: bool = False,  # noqa: ARG002 - the port's
    ) -> Running:
        """Replay the clone to `target`; what came back stands in `World.restored` under the clone's name."""
        await asyncio.sleep(0)
        lineage = self._world.cluster.lineage(target.history.timeline)
        base = self._base(clone, volumes, bracket)
        consistent = max(base.upto, bracket.stop.at) if bracket else base.upto
        if not lineage.includes(Position(base.lineage.history, consistent)):
            raise RestoreError(f"requested timeline {target.history.timeline} is not a child of the base's history")
        available = self._available(log_folder, bracket.start.at if bracket else base.upto)
        if consistent > max(available, base.upto if bracket is None else Lsn(0)):
            raise RestoreError("WAL ends before end of online backup")
        reached = self._replay(lineage, target, consistent, available)
        commits = self._world.cluster.commits(Content(lineage, reached, base.redo))
        running = Running(
            clone.name,
            f"memory:{clone.name}",
            clone.paths[0][1],
            0,
            History(target.history.system, max(self._world.cluster.logs) + 1),
            reached,
            commits[-1].time if commits else None,
            (),
        )
        self._world.restored[clone.name] = Restored(running, commits)
        progress("replay", reached - base.redo, reached - base.redo)
        return running

    def _base(self, clone: Clone, volumes: Sequence[Volume], bracket: Bracket | None) -> Content:
        if clone.name not in self._world.clones:
            raise RestoreError(f"no clone {clone.name}")
        contents = self._world.clones[clone.name][1]
        parts = [contents[volume.name] for volume in volumes]
        if bracket is None and (any(part.torn for part in parts) or len({part.upto for part in parts}) > 1):
            raise RestoreError("xlog flush request is not satisfied: the base is not one instant")
        return max(parts, key=lambda part: part.upto)

    def _available(self, log_folder: Path, start: Lsn) -> Lsn:
        """Give how far the staged log reaches from `start` without a hole."""
        reached = start
        for extent in self._world.staged.get(log_folder, []):
            if extent.start <= reached < extent.end:
                reached = extent.end
        return reached

    def _replay(self, lineage: Lineage, target: Target, consistent: Lsn, available: Lsn) -> Lsn:
        """Give where the replay stops; the records before `consistent` cannot be stopped at."""
        if target.kind is StopKind.END:
            return consistent
        reached = _FIRST_LSN
        for entry in self._world.cluster.entries(lineage):
            if entry.end > max(available, consistent):
                break
            before, after = _stops(entry, target)
            if (before or after) and entry.start < consistent:
                raise RestoreError("requested recovery stop point is before consistent recovery point")
            if before:
                return max(reached, consistent)
            reached = entry.end
            if after:
                return reached
        if target.kind is StopKind.LATEST or (target.kind is StopKind.TIME and target.reach is not None):
            return max(reached, consistent)
        raise RestoreError("recovery ended before configured recovery target was reached")

    async def inspect(
        self,
        running: Running,
        target: Target,
        log_folder: Path,  # noqa: ARG002 - the port's
        *,
        deep: bool,
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """Look whether the target's commit is there, and the one behind it is not."""
        await asyncio.sleep(0)
        restored = self._world.restored[running.clone].commits
        last = restored[-1] if restored else None
        if target.commit is not None:
            there = last is not None and last.xid == target.commit.xid
            yield "the last commit", there, f"transaction {last.xid if last else 'none'}"
        beyond = [commit.xid for commit in restored if last is not None and commit.end > running.replayed]
        yield "no commit behind it", not beyond, f"{len(beyond)} found"
        if deep:
            yield "structures", True, f"{len(restored)} commits"

    async def query(self, running: Running, database: str, sql: str) -> str:  # noqa: ARG002 - the port's
        """Give how many commits of `database` came back, whatever `sql` asks."""
        await asyncio.sleep(0)
        if running.clone not in self._world.restored:
            raise RestoreError(f"{running.clone} does not run")
        return str(sum(commit.stream == database for commit in self._world.restored[running.clone].commits))

    async def stop(self, clone: Clone) -> None:
        """Stop the server of a clone."""
        await asyncio.sleep(0)
        if (stopped := self._world.restored.pop(clone.name, None)) is not None:
            self._world.stopped[clone.name] = stopped

    async def resume(self, clone: Clone) -> Running:
        """Start the server of a clone that was stopped."""
        await asyncio.sleep(0)
        if clone.name not in self._world.stopped:
            raise RestoreError(f"{clone.name} was never brought up")
        self._world.restored[clone.name] = again = self._world.stopped.pop(clone.name)
        return again.running

    async def running(self, clone: Clone) -> Running | None:
        """Give the server of a clone if it runs."""
        await asyncio.sleep(0)
        restored = self._world.restored.get(clone.name)
        return restored.running if restored else None

    async def release(self, clone: Clone, volumes: Sequence[Volume]) -> None:  # noqa: ARG002 - the port's
        """Refuse for a clone that runs; there is no configuration to give back."""
        await asyncio.sleep(0)
        if clone.name in self._world.restored:
            raise RestoreError(f"{clone.name} still runs", hint="stop it first")


def _stops(entry: Entry, target: Target) -> tuple[bool, bool]:
    """Whether a replay stops before, or after, this record."""
    if target.kind is StopKind.LSN:
        hit = entry.start >= target.at
        return hit and not target.inclusive, hit and target.inclusive
    if entry.commit is None or target.time is None:
        return False, False
    time_us = to_microseconds(target.time)
    return entry.commit.time_us > time_us or (entry.commit.time_us == time_us and not target.inclusive), False
