"""What outlives the service: the cluster, what the storage keeps, the journal, what was restored; and the clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from connectors.memory.cluster import Cluster, Content
from trigger.model import (
    Commit,
    Extent,
    Snapshot,
)
from trigger.ports import Clone, Running
from trigger.position import Lsn


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
        self.claimed_by: object = None
        """The storage driver that holds the storage."""
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
