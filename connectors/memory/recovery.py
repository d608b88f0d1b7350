"""Port `Recovery`: replay by PostgreSQL's rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from connectors.memory.cluster import FIRST_LSN, Content, Entry
from connectors.memory.world import Restored, World
from trigger.errors import RestoreError
from trigger.model import (
    Address,
    Bracket,
    StopKind,
    Target,
    Volume,
    to_microseconds,
)
from trigger.ports import Clone, Progress, Running
from trigger.position import History, Lineage, Lsn, Position


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
        reached = FIRST_LSN
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
        if target.kind is StopKind.LATEST:
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
            last_ones = restored if target.kind in (StopKind.TIME, StopKind.LATEST) else restored[-1:]
            there = target.commit.xid in {commit.xid for commit in last_ones}
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

    async def resume(self, clone: Clone, listen: Address | None = None) -> Running:  # noqa: ARG002 - the port's
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
