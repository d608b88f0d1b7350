"""Port `Storage`: snapshots, their tags, and clones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from connectors.memory.book import Content
from connectors.memory.world import Kept, World
from trigger.errors import StorageError
from trigger.model import (
    Finding,
    RecoveryPoint,
    Severity,
    Snapshot,
    Space,
    Volume,
)
from trigger.ports import Capability, Clone, ClonePlace, Progress, Tagged


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

    def clone_place(self, kept: Snapshot) -> ClonePlace | None:  # noqa: ARG002 - the same for each
        """Give nothing: they lie in no folder."""
        return None

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Find nothing wrong."""
        await asyncio.sleep(0)
        return [Finding(volume.name, Severity.OK, "kept in memory") for volume in volumes]

    async def claimed_by_another(self, holder: str) -> Finding | None:  # noqa: ARG002 - one world has one service
        """Find nobody: what holds it is known while it lives alone."""
        await asyncio.sleep(0)
        return None

    async def claim(self, holder: str = "") -> None:  # noqa: ARG002 - likewise
        """Hold the storage of this world."""
        await asyncio.sleep(0)
        if self._world.claimed_by not in (None, self):
            raise StorageError("another one holds the storage", hint="close it first", retryable=False)
        self._world.claimed_by = self

    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        """Keep what the volumes hold, the tag last."""
        kept = self._world.kept.get(point)
        if kept is not None and kept.complete:
            return tuple(snapshot for snapshot, _ in kept.cuts.values())
        if kept is not None:
            raise StorageError(f"{point} is there, unfinished", hint="delete it first", retryable=False)
        await self._require_room()
        kept = self._world.kept[point] = Kept(tuple(volume.name for volume in volumes), beside=tuple(beside))
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
        cluster, now = self._world.on(volume.name), self._world.now()
        snapshot = Snapshot(volume.name, self.name, f"memory:{point}/{volume.name}", now, now)
        redo = min(cluster.checkpoint_redo, cluster.stable)
        return snapshot, Content(cluster.book, cluster.lineage(), cluster.stable, redo)

    async def _copy(self, point: str, volume: Volume) -> tuple[Snapshot, Content]:
        snapshot, first = self._cut(point, volume)
        if Capability.ATOMIC in self.capabilities:
            await asyncio.sleep(0)
            return snapshot, first
        await asyncio.sleep(0.001)
        _, last = self._cut(point, volume)
        torn = (first.book, first.lineage, first.upto) != (last.book, last.lineage, last.upto)
        return replace(snapshot, ended_at=self._world.now()), last._replace(redo=first.redo, torn=torn)

    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        """Replace the tag of a point."""
        await asyncio.sleep(0)
        kept = self._world.kept.get(point)
        if kept is None or any(volume not in kept.cuts for volume in kept.wanted):
            raise StorageError(f"no whole snapshot of {point} to tag", retryable=False)
        kept.tag, kept.beside = tag, kept.beside or tuple(beside)

    async def tagged(self, point: str | None = None) -> list[Tagged]:
        """Give everything it keeps, or what it keeps of one point."""
        await asyncio.sleep(0)
        return [
            Tagged(one, kept.tag, tuple(snapshot for snapshot, _ in kept.cuts.values()), kept.complete, kept.beside)
            for one, kept in sorted(self._world.kept.items())
            if point in (None, one)
        ]

    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        """Give those of which it does not keep every cut."""
        await asyncio.sleep(0)
        kept = self._world.kept
        return {
            point.id
            for point in points
            if point.id not in kept or any(one.volume not in kept[point.id].cuts for one in point.snapshots)
        }

    async def delete(self, point: str) -> None:
        """Forget the snapshots and the tag of a point."""
        await asyncio.sleep(0)
        self._world.kept.pop(point, None)

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        """Make a copy of what a point holds."""
        await asyncio.sleep(0)
        kept = self._world.kept.get(point)
        if kept is None or not kept.complete:
            raise StorageError(f"no whole snapshot of {point}", retryable=False)
        if name in self._world.clones:
            raise StorageError(f"the clone {name} exists already", hint="choose another name", retryable=False)
        paths = tuple((volume, Path(f"/memory/clones/{name}/{volume}")) for volume in kept.cuts)
        clone = Clone(name, point, paths, self._world.now(), identity, beside=tuple(beside))
        self._world.clones[name] = clone, {volume: content for volume, (_, content) in kept.cuts.items()}
        progress("clone", 1, 1)
        return clone

    async def lack(self, point: str) -> str:  # noqa: ARG002 - the same for each
        """Find nothing: each was kept at once."""
        await asyncio.sleep(0)
        return ""

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
