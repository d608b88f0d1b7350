"""Port `Source`: one stream of commits of a cluster, as one of its clients sees it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from connectors.memory.cluster import Cluster, Slot
from connectors.memory.world import World
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.ports import Batch, Break
from trigger.position import Position

_BATCH_COMMITS = 500


class MemorySource:
    """Port `Source`: one stream of a cluster, the world's first; one that `repeats` gives again what is unacknowledged.

    As the real ones it never says that it is within a record, and looks at every `open` whether the log is the one that
    it knows.
    """

    heartbeat_seconds = 5.0
    trouble = ""

    def __init__(self, world: World, name: str, cluster: Cluster | None = None, *, repeats: bool = False) -> None:
        self._world = world
        self.name = name
        self._cluster = cluster or world.cluster
        self._repeats = repeats
        self._says_where_it_begins = False
        self._session = -1
        self._read_until = 0
        self._lineage = self._cluster.lineage()

    async def open(self, after: Position | None) -> Break | None:
        """Connect and resume behind `after`; gives the break where the stream does not go on from there."""
        await asyncio.sleep(0)
        cluster, lives = self._cluster, self._world.lives(self._cluster)
        if not cluster.up:
            raise SourceError(f"{self.name}: the server does not answer")
        if after is not None:
            lives.saw(after)
        self._lineage = lives.confirm()
        slot, broken = self._slot(after)
        if broken is not None:
            lives.saw(broken.until)
        self._session = cluster.session
        self._says_where_it_begins = after is None
        self._read_until = slot.confirmed
        if after is not None and not self._repeats:
            self._read_until = broken.until.at if broken else after.at
        return broken

    def _slot(self, after: Position | None) -> tuple[Slot, Break | None]:
        cluster, lineage = self._cluster, self._lineage
        slot = cluster.slots.get(self.name)
        reason = ""
        if slot is None or slot.lost:
            reason = "the slot was lost" if slot else "the slot is gone"
            slot = cluster.slots[self.name] = Slot(cluster.flushed_records, cluster.flushed_records)
        if after is None:
            return slot, None
        if not lineage.includes(after):
            reason = f"{after} is not in the past of {lineage.history}"
        elif slot.confirmed > after.at:
            reason = reason or f"the slot was moved ahead to {slot.confirmed}"
        elif after.history != lineage.history:
            reason = reason or f"{after.history} was left for {lineage.history}"
        elif not reason:
            return slot, None
        until = lineage.at(max(slot.confirmed, lineage.shared(after) or 0))
        return slot, Break(until, reason, lineage)

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
        cluster = self._cluster
        through = cluster.flushed_records
        if through <= self._read_until:
            return None
        commits: list[Commit] = []
        for entry in cluster.entries(self._lineage, self._read_until):
            if entry.end > cluster.flushed:
                break
            if entry.commit is not None and entry.commit.stream == self.name:
                commits.append(self._of_this_life(entry.commit))
                if len(commits) == _BATCH_COMMITS:
                    through = entry.end
                    break
        self._read_until = through
        lives = self._world.lives(cluster)
        lives.remember()
        lives.saw(self._lineage.at(through), commits[-1] if commits else None)
        return Batch(commits, self._lineage.at(through))

    def _of_this_life(self, commit: Commit) -> Commit:
        incarnation = self._lineage.history.incarnation
        return replace(commit, history=replace(commit.history, incarnation=incarnation)) if incarnation else commit

    async def acknowledge(self, through: Position) -> None:
        """Let the server forget everything up to `through`."""
        await asyncio.sleep(0)
        self._require_connection()
        if not self._lineage.includes(through):
            raise SourceError(f"{self.name}: {through} is not in {self._lineage.history}", retryable=False)
        slot = self._cluster.slots[self.name]
        slot.confirmed = max(slot.confirmed, min(through.at, self._cluster.flushed_records))

    async def heartbeat(self) -> None:
        """Tell the server that we are alive."""
        await asyncio.sleep(0)
        self._require_connection()

    async def close(self) -> None:
        """Disconnect; the slot stays."""
        self._session = -1

    def _require_connection(self) -> None:
        if self._session != self._cluster.session:
            raise SourceError(f"{self.name}: the connection is broken")
