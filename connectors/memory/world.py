"""What outlives the service: the cluster, what the storage keeps, the journal, what was restored; and the clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from connectors.memory.book import Content, Entry
from connectors.memory.cluster import Cluster
from connectors.memory.lives import Held, Lives
from connectors.memory.manner import MEMORY, Manner
from trigger.model import Commit, Extent, Snapshot
from trigger.ports import Clone
from trigger.position import History, Lineage
from trigger.replay import Running


@dataclass
class Kept:
    """What the storage keeps under one point id."""

    wanted: tuple[str, ...]
    """The volumes it shall hold."""
    tag: str | None = None
    cuts: dict[str, tuple[Snapshot, Content]] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    """The volumes of the point that another storage keeps."""

    @property
    def complete(self) -> bool:
        """Whether every volume is there, and the tag, which is written last."""
        return self.tag is not None and all(volume in self.cuts for volume in self.wanted)


@dataclass
class Restored:
    """What a restore brought back."""

    running: Running
    commits: list[Commit]


@dataclass
class Staged:
    """What the journal has put into a folder: which stretches, and the records in them."""

    extents: list[Extent]
    entries: list[Entry]


class World:
    """Everything that outlives the service.

    Args:
        manners: how each cluster counts, one a cluster.
        seconds: gives the time since `started_at`; the running loop's time if None.
        started_at: the time of day when `seconds` gives 0.
    """

    def __init__(
        self,
        *,
        manners: Sequence[Manner] = (MEMORY,),
        seconds: Callable[[], float] | None = None,
        started_at: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    ) -> None:
        self._seconds = seconds
        self._last = 0.0
        self.started_at = started_at
        self.skew = timedelta()
        """How wrong the clock is; a test may step it."""
        self._waiting: dict[asyncio.Future[None], None] = {}  # woken in the order in which they came
        self.clusters = tuple(
            Cluster(self.now, self.notify, f"{7001 + number}", manner) for number, manner in enumerate(manners)
        )
        self.cluster = self.clusters[0]
        """The first of them; most worlds have no other."""
        self.homes: dict[str, Cluster] = {}
        """Which cluster lies on a volume, where that is not the first."""
        self.held: dict[str, list[Held]] = {}
        """What is held of the log of each system, by incarnation."""
        self._lives: dict[Cluster, Lives] = {}
        self.kept: dict[str, Kept] = {}
        self.claimed_by: object = None
        """The storage driver that holds the storage."""
        self.clones: dict[str, tuple[Clone, dict[str, Content]]] = {}
        self.free_bytes = 1 << 40
        self.write_errors: set[str] = set()
        """Volumes whose next flush meets an error of write-back, which the host reports once only."""
        self.poisoned: set[str] = set()
        self.staged: dict[Path, Staged] = {}
        self.restored: dict[str, Restored] = {}
        self.stopped: dict[str, Restored] = {}
        self.at_work: set[str] = set()
        self.outside: set[tuple[str, str]] = set()
        """Volumes in which a server works, by path."""

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
        """Forget whoever waited, claimed or remembered: the process that they belonged to is gone."""
        self._waiting.clear()
        self.claimed_by = None
        self._lives.clear()

    def on(self, volume: str) -> Cluster:
        """Give the cluster that lies on a volume."""
        return self.homes.get(volume, self.cluster)

    def lives(self, cluster: Cluster) -> Lives:
        """Give what the drivers of one life of the service know together of a cluster."""
        return self._lives.setdefault(cluster, Lives(cluster, self.held))

    def held_of(self, history: History) -> Held | None:
        """Give what is held of the life of a log that a history belongs to; None for nothing."""
        lives = self.held.get(history.system, [])
        return lives[history.incarnation] if history.incarnation < len(lives) else None

    def past(self, history: History) -> Lineage:
        """Give the past of a history by the history files that are held, or else by the server's own."""
        held = self.held_of(history)
        forks = held.forks.get(history.branch) if held else None
        if forks is None:
            forks = next((one.forks.get(history.branch) for one in self.clusters if one.system == history.system), None)
        return Lineage(history, forks or ())

    @property
    def journal(self) -> dict[int, list[tuple[int, int]]]:
        """What the journal holds of each timeline of the first cluster, joined, by position."""
        return self.lives(self.cluster).held.pieces

    def damage_journal(self, timeline: int, start: int, end: int, cluster: Cluster | None = None) -> None:
        """Take the stretch from `start` to `end` out of the journal of a cluster, the first one if None."""
        held = self.lives(cluster or self.cluster).held.pieces
        pieces = []
        for held_start, held_end in held.get(timeline, []):
            pieces += [(held_start, min(held_end, start)), (max(held_start, end), held_end)]
        held[timeline] = [(low, high) for low, high in pieces if low < high]


class MemoryClock:
    """The world's time of day."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> datetime:
        """Give the present time, aware UTC."""
        return self._world.now()
