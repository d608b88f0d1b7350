"""Port `Journal`: the flushed log of every cluster, resuming where it stopped, each of its lives apart."""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from pathlib import Path

from connectors.memory.book import Entry
from connectors.memory.cluster import Cluster
from connectors.memory.lives import Held
from connectors.memory.manner import Manner
from connectors.memory.world import Staged, World
from trigger.errors import JournalError
from trigger.model import Extent, Finding, Logged, Severity
from trigger.ports import Copies, Progress
from trigger.position import LAST, History, Lineage, Name, Position
from trigger.replay import Replay


class MemoryJournal:
    """Port `Journal`: keeps the flushed log of the world's clusters, resuming where it stopped."""

    replays = True

    def __init__(self, world: World) -> None:
        self._world = world

    def look_into(self, copies: Copies) -> None:
        """Do nothing: its snapshots say nothing of the past."""

    async def run(self) -> None:
        """Take over what was flushed, whenever something was."""
        while True:
            for cluster in self._world.clusters:
                if cluster.up:
                    self._receive(cluster)
            await self._world.changed()

    def _receive(self, cluster: Cluster) -> None:
        lives = self._world.lives(cluster)
        lineage = lives.confirm()
        held, begin = lives.held, cluster.book.first
        for history, _, left_at in lineage.stretches():
            end = min(left_at, cluster.flushed_records)
            _take_over(held.entries.setdefault(history.branch, []), cluster.logs.get(history.branch, []), end)
            extents = held.pieces.setdefault(history.branch, [])
            if end > begin and (not extents or extents[-1][1] < cluster.book.first):
                # a timeline's first file begins with a copy of its parent's
                extents.append((cluster.manner.file_start(begin), end))
            elif extents and end > extents[-1][1]:
                extents[-1] = extents[-1][0], end
            begin = max(begin, end)

    async def begun(self) -> bool:
        """Whether it holds any log."""
        return bool(await self.extents())

    async def is_void(self) -> bool:
        """Whether it holds no log."""
        return not await self.begun()

    async def catch_up(self) -> None:
        """Do nothing: the log comes while it runs."""
        await asyncio.sleep(0)

    async def extents(self) -> list[Extent]:
        """Give what it holds."""
        await asyncio.sleep(0)
        return [
            Extent(history, start, end) for history, held in self._all() for start, end in held.pieces[history.branch]
        ]

    def _all(self) -> Iterator[tuple[History, Held]]:
        """Give every history that something is or was held of."""
        for system, lives in sorted(self._world.held.items()):
            kind = self._manner_of(system).kind
            for incarnation, held in enumerate(lives):
                yield from ((History(kind, system, branch, incarnation), held) for branch in sorted(held.pieces))

    def _manner_of(self, system: str) -> Manner:
        cluster = next((one for one in self._world.clusters if one.identity == system.partition("-")[0]), None)
        return (cluster or self._world.cluster).manner

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history`."""
        await asyncio.sleep(0)
        return self._lineage(history)

    def _lineage(self, history: History) -> Lineage:
        held = self._world.held_of(history)
        if held is None or history.branch not in held.pieces:
            raise JournalError(f"no history file of {history} is kept")
        return self._world.past(history)

    async def audit(self) -> list[Finding]:
        """Find the holes."""
        findings = []
        for history, held in self._all():
            for (_, hole), (end, _) in itertools.pairwise(held.pieces[history.branch]):
                message = f"log from {history.place(hole)} to {history.place(end)} of {history} is missing"
                findings.append(Finding("journal", Severity.WARNING, message, "take a point behind the hole"))
        await asyncio.sleep(0)
        return findings

    async def lacks_room(self) -> Finding | None:
        """Give that there is room."""
        await asyncio.sleep(0)
        return None

    async def stage(self, replay: Replay, folder: Path, progress: Progress) -> int:
        """Hand over the log from `start` on, as far as it reaches without a hole, at least to the target."""
        start, history = replay.log_from, replay.target.history
        lineage = self._world.past(history) if replay.as_cut else await self.lineage(history)
        held = self._world.held_of(lineage.history)
        assert held is not None
        staged, reached = Staged([], []), start.at
        stretches = [one for one in lineage.stretches() if one[0].branch >= start.history.branch and one[2] > reached]
        for (history, _, left_at), following in itertools.zip_longest(stretches, stretches[1:]):
            begin, pieces = reached, [*held.pieces.get(history.branch, [])]
            if following is not None:
                pieces += held.pieces.get(following[0].branch, [])
            while end := next((high for low, high in pieces if low <= reached < min(high, left_at)), None):
                reached = min(end, left_at)
            staged.extents.append(Extent(history, begin, reached))
            staged.entries += [e for e in held.entries.get(history.branch, []) if begin < e.end and e.end <= reached]
            if reached < left_at:
                break
        if reached < replay.until:
            missing = lineage.history.place(reached)
            raise JournalError(f"the log from {missing} on is not held, and is needed to {replay.until}")
        self._world.staged[folder] = staged
        size = lineage.history.place(min(reached, LAST)).since(start.at)
        progress("stage", size, size)
        return size

    async def check(self) -> list[Finding]:
        """Find nothing in the way."""
        await asyncio.sleep(0)
        return []

    async def release(self, starts: Collection[Position]) -> int:
        """Delete whole files that no replay from `starts` asks for."""
        await asyncio.sleep(0)
        present = {self._world.lives(cluster).lineage().history for cluster in self._world.clusters}
        released = 0
        for history, held in list(self._all()) if starts else ():
            pieces, manner = held.pieces[history.branch], self._manner_of(history.system)
            lineage = self._lineage(history)
            asked = [start.at for start in starts if lineage.includes(start)]
            last = pieces[-1][1] if pieces else 0
            newest = manner.file_start(last) if history in present else last
            limit = manner.file_start(min(asked)) if asked else newest
            gone = [history.place(min(end, limit)).since(start) for start, end in pieces]
            released += sum(size // manner.file_bytes for size in gone)
            held.pieces[history.branch] = [(max(start, limit), end) for start, end in pieces if end > limit]
        return released

    async def commits(self, lineage: Lineage, begin: int, end: int, like: Name) -> AsyncGenerator[Logged, None]:  # noqa: ARG002 - its log says all of each
        """Give the commits of a stretch of a lineage that are held, those that no stream shows too."""
        await asyncio.sleep(0)
        held = dict(self._all())
        for history, low, high in lineage.stretches():
            first, last = max(low, begin), min(high, end)
            pieces = held[history].pieces[history.branch] if history in held else []
            for entry in held[history].entries.get(history.branch, []) if history in held else []:
                commit, there = entry.commit, any(start <= entry.start and entry.end <= to for start, to in pieces)
                if commit is not None and there and first <= entry.start < last:
                    did = "" if commit.stream else "shown by no stream"
                    yield Logged(history, commit.name, commit.start, commit.end, commit.time_us, (), did)

    async def named(self, commits: Sequence[Logged]) -> list[Logged]:
        """Give the commits with their streams, which are its databases."""
        await asyncio.sleep(0)
        made = {
            (history, entry.start): entry for history, held in self._all() for entry in held.entries[history.branch]
        }
        found = [made.get((one.history, one.start)) for one in commits]
        return [
            one._replace(database=entry.commit.stream) if entry and entry.commit else one
            for one, entry in zip(commits, found, strict=True)
        ]

    def file_start(self, position: Position) -> int:
        """Give where the file that holds a position begins."""
        return self._manner_of(position.history.system).file_start(position.at)


def _take_over(mine: list[Entry], theirs: list[Entry], end: int) -> None:
    """Copy the records that are flushed as a whole and lie behind what is held."""
    held = mine[-1].end if mine else 0
    upto = bisect_right(theirs, end, key=lambda entry: entry.end)
    mine += theirs[bisect_left(theirs, held, key=lambda entry: entry.start) : upto]
