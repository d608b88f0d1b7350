"""Port `Recovery`: replay by PostgreSQL's rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from connectors.memory.book import Content, Entry
from connectors.memory.world import Restored, Staged, World
from trigger.errors import RestoreError
from trigger.model import Address, Commit, Finding, Severity, System, Volume, to_microseconds
from trigger.ports import Clone, Progress
from trigger.position import Lineage, Position
from trigger.replay import Follows, Replay, Running, Target


class MemoryRecovery:
    """Port `Recovery`: replays by PostgreSQL's rules, and knows the exact commits that came back."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(
        self,
        clone: Clone,
        volumes: Sequence[Volume],
        replay: Replay,
        log_folder: Path,
        progress: Progress,
        *,
        throwaway: bool = False,  # noqa: ARG002 - the port's
    ) -> Running:
        """Replay the clone to `target`; what came back stands in `World.restored` under the clone's name."""
        await asyncio.sleep(0)
        target, bracket = replay.target, replay.bracket
        base = self._base(clone, volumes, replay)
        lineage = self._world.past(target.history)
        consistent = max(base.upto, bracket.stop.at) if bracket else base.upto
        if not lineage.includes(Position(lineage.branch(base.lineage.history.branch), consistent)):
            raise RestoreError(f"requested timeline {target.history.branch} is not a child of the base's history")
        staged = self._world.staged.get(log_folder, Staged([], []))
        available = _available(staged, bracket.start.at if bracket else base.upto)
        if consistent > max(available, base.upto if bracket is None else 0):
            raise RestoreError("WAL ends before end of online backup")
        reached, commits = _replay(base, staged, replay, consistent, available)
        running = Running(
            clone.name,
            f"memory:{clone.name}",
            clone.paths[0][1],
            lineage.branch(lineage.history.branch + 1),
            reached,
            commits[-1].time if commits else None,
            (),
        )
        self._world.restored[clone.name] = Restored(running, commits)
        size = target.history.place(reached).since(base.redo)
        progress("replay", size, size)
        return running

    def _base(self, clone: Clone, volumes: Sequence[Volume], replay: Replay) -> Content:
        """Give what the volumes hold of the cluster that the target is of."""
        if clone.name not in self._world.clones:
            raise RestoreError(f"no clone {clone.name}")
        contents = self._world.clones[clone.name][1]
        wanted = replay.target.history
        parts = [contents[volume.name] for volume in clone.volumes or volumes]
        parts = [part for part in parts if part.lineage.history.is_of_system(wanted)]
        if not parts:
            raise RestoreError(f"nothing of {wanted} is in the clone")
        if replay.bracket is None and (any(part.torn for part in parts) or len({part.upto for part in parts}) > 1):
            raise RestoreError("xlog flush request is not satisfied: the base is not one instant")
        return max(parts, key=lambda part: part.upto)

    async def inspect(
        self,
        running: Running,
        target: Target,
        log_folder: Path,  # noqa: ARG002 - the port's
        *,
        deep: bool,
        follows: Follows | None = None,  # noqa: ARG002 - the port's
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """Look whether the target's commit is there, and the one behind it is not."""
        await asyncio.sleep(0)
        restored = self._world.restored[running.clone].commits
        last = restored[-1] if restored else None
        if target.commit is not None:
            last_ones = restored if target.at is None else restored[-1:]
            there = target.commit.name in {commit.name for commit in last_ones}
            yield "the last commit", there, f"transaction {last.name if last else 'none'}"
        beyond = [commit.name for commit in restored if last is not None and commit.end > running.replayed]
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
            raise RestoreError(f"{clone.name} was never brought up, or made ready to take production's place")
        self._world.restored[clone.name] = again = self._world.stopped.pop(clone.name)
        return again.running

    async def running(self, clone: Clone) -> Running | None:
        """Give the server of a clone if it runs."""
        await asyncio.sleep(0)
        restored = self._world.restored.get(clone.name)
        return restored.running if restored else None

    async def used(self, clone: Clone) -> int | None:  # noqa: ARG002 - the port's
        """Give 0: nothing is written to a clone here."""
        await asyncio.sleep(0)
        return 0

    async def unfit(self, clone: Clone, volumes: Sequence[Volume]) -> list[Finding]:  # noqa: ARG002 - the port's
        """Find nothing: no copy lies beside the volumes here."""
        await asyncio.sleep(0)
        return []

    async def systems(self, copy: Clone) -> list[System]:
        """Give the systems of the clusters in a clone or a point; of other volumes, those that are there now."""
        await asyncio.sleep(0)
        world, names = self._world, [volume for volume, _ in copy.paths]
        if copy.name in world.clones:
            books = [content.book for content in world.clones[copy.name][1].values()]
        elif copy.point in world.kept:
            books = [content.book for _, content in world.kept[copy.point].cuts.values()]
        else:
            books = [world.on(name).book for name in names]
        return [System(name, "") for name in dict.fromkeys(book.system for book in books)]

    async def lineage(self, copy: Clone, volumes: Sequence[Volume]) -> Lineage | None:  # noqa: ARG002 - the port's
        """Give None: nothing lies in files here."""
        await asyncio.sleep(0)
        return None

    async def outside(self, copy: Clone, volumes: Sequence[Volume]) -> list[Finding]:  # noqa: ARG002 - the port's
        """Give what the world says to lie outside the snapshots of a point."""
        await asyncio.sleep(0)
        return [
            Finding(what, Severity.REFUSED, f"{what} lies outside", "add a volume")
            for point, what in self._world.outside
            if point == copy.point
        ]

    async def at_work(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give the servers that the world says to work in a volume."""
        await asyncio.sleep(0)
        working = [volume.path for volume in volumes if volume.path in self._world.at_work]
        return [Finding(path, Severity.REFUSED, f"the server in {path} runs", "stop it first") for path in working]

    async def strangers(self, clone: Clone) -> list[Finding]:
        """Give the servers that the world says to work in a clone."""
        return await self.at_work([Volume(volume, str(path)) for volume, path in clone.paths])

    async def release(self, clone: Clone, volumes: Sequence[Volume]) -> None:  # noqa: ARG002 - the port's
        """Refuse for a clone that runs, and let no other be started; there is no configuration to give back."""
        await asyncio.sleep(0)
        if clone.name in self._world.restored:
            raise RestoreError(f"{clone.name} still runs", hint="stop it first")
        self._world.stopped.pop(clone.name, None)


def _stops(entry: Entry, target: Target) -> tuple[bool, bool]:
    """Whether a replay stops before, or after, this record."""
    if target.at is not None:
        hit = entry.start >= target.at
        return hit and not target.inclusive, hit and target.inclusive
    if entry.commit is None or target.time is None:
        return False, False
    time_us = to_microseconds(target.time)
    return entry.commit.time_us > time_us or (entry.commit.time_us == time_us and not target.inclusive), False


def _available(staged: Staged, start: int) -> int:
    """Give how far the staged log reaches from `start` without a hole."""
    reached = start
    for extent in staged.extents:
        if extent.start <= reached < extent.end:
            reached = extent.end
    return reached


def _replay(base: Content, staged: Staged, replay: Replay, consistent: int, available: int) -> tuple[int, list[Commit]]:
    """Give where the replay stops and what is there then; the records before `consistent` cannot be stopped at."""
    target, upto = replay.target, base.upto
    if replay.bracket is not None:  # which began with a checkpoint: the data held all that was there
        upto = max(upto, replay.bracket.start.at)
    held = [entry for entry in base.book.entries(base.lineage) if entry.end <= upto]
    begins, own = {entry.start: entry for entry in held}, (held[-1].end if held else 0)
    if any(begins.get(entry.start, entry) != entry for entry in staged.entries):
        raise RestoreError("record with incorrect prev-link: the log is not the one of the base")
    limit = consistent if replay.as_cut else max(available, consistent)
    coming = [entry for entry in staged.entries if entry.start >= own and entry.end <= limit]
    commits, reached = list(base.book.inherited), 0
    for entry in (*held, *coming):
        before, after = (False, False) if replay.as_cut else _stops(entry, target)
        if (before or after) and entry.start < consistent:
            raise RestoreError("requested recovery stop point is before consistent recovery point")
        if before:
            return max(reached, consistent), commits
        reached = entry.end
        commits += [entry.commit] if entry.commit is not None else []
        if after:
            return reached, commits
    if replay.as_cut or target.is_latest:
        return max(reached, consistent), commits
    raise RestoreError("recovery ended before configured recovery target was reached")
