"""Port `Journal`: the cluster's flushed log, resuming where it stopped."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from connectors.memory.cluster import FIRST_LSN, SEGMENT_BYTES
from connectors.memory.world import World
from trigger.errors import JournalError
from trigger.model import (
    Extent,
    Finding,
    Severity,
    StopKind,
    Target,
)
from trigger.ports import Progress
from trigger.position import History, Lineage, Lsn, Position

_ENDLESS = Lsn((1 << 64) - 1)


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
        begin = FIRST_LSN
        for timeline, end in (*lineage.forks, (lineage.history.timeline, cluster.flushed)):
            extents = held.setdefault(timeline, [])
            if not extents and end > begin:
                extents.append((_file_start(begin), end))  # a timeline's first file begins with a copy of its parent's
            elif extents and end > extents[-1][1]:
                extents[-1] = extents[-1][0], end
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
        timelines = [*lineage.forks, (lineage.history.timeline, _ENDLESS)]
        for (timeline, left_at), (child, _) in itertools.zip_longest(timelines, timelines[1:], fillvalue=(0, _ENDLESS)):
            if timeline < start.history.timeline or left_at <= reached:
                continue
            begin, pieces = reached, self._world.journal.get(timeline, []) + self._world.journal.get(child, [])
            while end := next((high for low, high in pieces if low <= reached < min(high, left_at)), None):
                reached = min(end, left_at)
            staged.append(Extent(History(lineage.history.system, timeline), begin, reached))
            if reached < left_at:
                break
        needed = start.at if target.kind is StopKind.END else target.at
        if reached < needed or (reached == needed and target.kind is StopKind.LSN and target.inclusive):
            raise JournalError(f"the log from {reached} on is not held, {target.description} is at {target.at}")
        self._world.staged[folder] = staged
        progress("stage", reached - start.at, reached - start.at)
        return reached - start.at

    async def check(self) -> list[Finding]:
        """Find nothing in the way."""
        await asyncio.sleep(0)
        return []

    async def release(self, before: Lsn) -> int:
        """Delete whole segments before `before`."""
        await asyncio.sleep(0)
        limit = _file_start(before)
        released = 0
        for timeline, pieces in self._world.journal.items():
            released += sum(max(0, (min(end, limit) - start) // SEGMENT_BYTES) for start, end in pieces)
            self._world.journal[timeline] = [(max(start, limit), end) for start, end in pieces if end > limit]
        return released


def _file_start(at: Lsn) -> Lsn:
    return Lsn(at - at % SEGMENT_BYTES)
