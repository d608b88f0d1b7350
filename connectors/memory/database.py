"""Ports `Source` and `Database`: the cluster as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from connectors.memory.cluster import FIRST_LSN, SEGMENT_BYTES, Cluster, Slot
from connectors.memory.world import World
from trigger.errors import DatabaseError, SourceError
from trigger.model import (
    Bracket,
    Commit,
    Finding,
    Layout,
    Retained,
    Severity,
    Volume,
)
from trigger.ports import Batch, Break
from trigger.position import Lineage, Lsn, Position

_BATCH_COMMITS = 500


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
        self._read_until = FIRST_LSN
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

    async def record_end(self) -> Position:
        """Give the end of the log, flushed."""
        cluster = await self._connected()
        end = cluster.lineage().at(cluster.inserted)
        if cluster.flushed < cluster.inserted:
            await self.mark()
        return end

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

    async def mark(self) -> Position:
        """Commit a transaction that no stream shows."""
        cluster = await self._connected()
        cluster.commit("")
        cluster.flush()
        return await self.durable()

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
