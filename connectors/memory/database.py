"""Port `Database`: a cluster as a whole, as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from connectors.memory.cluster import Cluster
from connectors.memory.world import World
from trigger.errors import DatabaseError
from trigger.model import Bracket, Finding, Layout, Retained, Severity, Volume
from trigger.ports import Seen
from trigger.position import History, Lineage, Position


class MemoryDatabase:
    """Port `Database`: a cluster as a whole, the world's first; every call looks whether its log is the one known."""

    def __init__(self, world: World, cluster: Cluster | None = None) -> None:
        self._world = world
        self._cluster = cluster or world.cluster
        self.kind = self._cluster.manner.kind
        self._bracketed = False
        self.session = -1

    def recognise(self, seen: Collection[Seen]) -> None:
        """Take note of what is known from before."""
        self._world.lives(self._cluster).recognise(seen)

    def claim(self, holder: str) -> None:
        """Note nothing: one world has one service."""

    async def claimed_by_another(self, holder: str) -> Finding | None:  # noqa: ARG002 - likewise
        """Give nothing."""
        return None

    async def lineage(self) -> Lineage:
        """Give the present history and its past."""
        await self._connected()
        return self._lineage()

    def _lineage(self) -> Lineage:
        return self._world.lives(self._cluster).lineage()

    @property
    def _history(self) -> History:
        return self._lineage().history

    async def durable(self) -> Position:
        """Give the position up to which the log is flushed."""
        cluster = await self._connected()
        return self._lineage().at(cluster.flushed)

    async def record_end(self) -> Position:
        """Give the end of the log, flushed."""
        cluster = await self._connected()
        end = self._lineage().at(cluster.inserted)
        if cluster.flushed < cluster.inserted:
            await self.mark()
        self._world.lives(cluster).saw(end)
        return end

    async def ceiling(self) -> Position:
        """Give the position up to which the log is inserted."""
        cluster = await self._connected()
        ceiling = Position(self._history, cluster.inserted)
        self._world.lives(cluster).ceiling(ceiling)
        return ceiling

    async def redo(self) -> Position | None:
        """Give where the last checkpoint began; None where nothing is replayed."""
        cluster = await self._connected()
        return Position(self._history, cluster.checkpoint_redo) if cluster.manner.replays else None

    @contextlib.asynccontextmanager
    async def bracket(self, name: str) -> AsyncIterator[Callable[[], Awaitable[Bracket]]]:
        """Hold a bracket: a checkpoint at its start, a record at its end."""
        cluster = await self._connected()
        if self._bracketed:
            raise DatabaseError(f"{name}: a bracket is held already", hint="hold one at a time")
        self._bracketed = True
        cluster.checkpoint()
        session, start = cluster.session, Position(self._history, cluster.checkpoint_redo)

        async def stop() -> Bracket:
            await self._connected()
            if cluster.session != session:
                raise DatabaseError(f"{name}: the connection that held the bracket broke")
            cluster.write_ahead(64)
            cluster.flush()
            return Bracket(start, Position(self._history, cluster.inserted), {"label": name})

        try:
            yield stop
        finally:
            self._bracketed = False

    async def checkpoint(self) -> None:
        """Make the cluster write a checkpoint."""
        (await self._connected()).checkpoint()

    async def check(
        self,
        volumes: Sequence[Volume],
        *,
        bracketed: bool = False,  # noqa: ARG002 - the port's
        seen: Collection[str] = (),  # noqa: ARG002 - the port's
    ) -> list[Finding]:
        """Find nothing wrong."""
        await self._connected()
        return [Finding(volume.name, Severity.OK, "in memory") for volume in volumes]

    async def explain(self) -> list[Finding]:
        """Say what the memory source cannot see."""
        await self._connected()
        return [Finding("records", Severity.NOTE, "records that commit nothing reach no source", "catch-all points")]

    async def remove(self, *, unused: bool = False) -> list[str]:
        """Drop every slot; there is none that nothing has a use for."""
        gone = [] if unused else sorted((await self._connected()).slots)
        for name in gone:
            del self._cluster.slots[name]
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
        end = self._history.place(cluster.inserted)
        return [
            Retained(name, end.since(slot.confirmed), None) for name, slot in cluster.slots.items() if not slot.lost
        ]

    async def layout(self) -> Layout:
        """Give a place that does not exist."""
        await self._connected()
        data = Path("/memory/data")
        return Layout({"data": data}, data / "log", (), 0, 0)

    def lies_at(self, layout: Layout) -> None:
        """Have nothing to note: the world has one place."""

    def recall(self, document: Mapping[str, Any]) -> Layout:
        """Give that place."""
        data = Path(document["places"]["data"])
        return Layout({"data": data}, data / "log", (), 0, 0)

    async def close(self) -> None:
        """Disconnect."""

    async def _connected(self) -> Cluster:
        await asyncio.sleep(0)
        if not self._cluster.up:
            raise DatabaseError("the server does not answer")
        self._world.lives(self._cluster).confirm()
        self.session = self._cluster.session
        return self._cluster
