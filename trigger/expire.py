"""Remove snapshots that may go: plan by `retention`, then do, one point after the other.

A point is marked as expiring first, then its snapshot is removed, then it is expired; wherever the process dies
between, the next reconcile goes on. The commits of an expired point keep their record and stay restorable from the
base before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from trigger.catalog import Catalog
from trigger.errors import CatalogError, JournalError
from trigger.failpoint import reached
from trigger.model import RecoveryPoint, State
from trigger.planner import WAL_SEGMENT_BYTES, HeldLog
from trigger.ports import Extent, Journal, Storage
from trigger.position import History, Lineage
from trigger.retention import Leads, thin

THIN_FROM = 0.9
THIN_TO = 0.7
"""Shares of the storage's budget: thinning begins above the first and ends at the second; where the restore objective
does not allow that, it ends at the first. Where the storage is short of bytes, the first is the share of the snapshots
that may stay this time."""


LOOK_SECONDS = 5.0
LOOK_SHARE = 0.05
"""How often the journal is looked into at most, and how much of the time that may take: it grows with its history."""


class KnownLog:
    """What is known of the log in the journal; while it cannot be looked at, what was seen last counts."""

    def __init__(self, journal: Journal, segment_bytes: int = WAL_SEGMENT_BYTES) -> None:
        self._journal = journal
        self._segment_bytes = segment_bytes
        self._extents: Sequence[Extent] = ()
        self._lineages: dict[History, Lineage] = {}
        self._look_at = 0.0

    async def leads(self, bases: Sequence[RecoveryPoint]) -> Leads:
        """Give whether a replay leads from one of `bases` to another."""
        histories = {_history(base) for base in bases}
        with suppress(JournalError, OSError):
            await self._look(histories)
        logs = {
            history: HeldLog(self._extents, self._lineages.get(history, Lineage(history)), self._segment_bytes)
            for history in histories
        }
        return lambda base, point: logs[_history(point)].leads(base, point)

    async def _look(self, histories: Collection[History]) -> None:
        clock = asyncio.get_running_loop().time
        if (began := clock()) >= self._look_at:
            self._extents = await self._journal.extents()
            self._look_at = clock() + max(LOOK_SECONDS, (clock() - began) / LOOK_SHARE)
        for history in set(histories) - set(self._lineages):
            with suppress(JournalError):  # a past that is not known counts as none
                self._lineages[history] = await self._journal.lineage(history)


def _history(point: RecoveryPoint) -> History:
    return (point.ceiling or point.floor).history


async def make_room(
    catalog: Catalog, storage: Storage, known: KnownLog, replay_limit_bytes: int
) -> list[RecoveryPoint]:
    """Give the points whose snapshots were removed: as was begun before, or since the storage is nearly used up.

    A point of which there is a clone stays, and one to which no log leads from an earlier one.
    """
    begun = await catalog.points(states={State.EXPIRING}, newest_first=False)
    gone = [await expire(catalog, storage, point) for point in begun]
    space = await storage.space()
    if space.snapshots <= space.budget * THIN_FROM and not space.short:
        return gone
    pinned = {clone.point for clone in await storage.clones()}
    bases = await catalog.bases()
    others = max(space.snapshots - len(bases), 0)  # half made, strange, or not to be got rid of
    wanted, most = (max(int(space.budget * share) - others, 0) for share in (THIN_TO, THIN_FROM))
    if space.short:  # what a removal frees is known only when it is done, so a tenth at a time
        wanted = most = min(most, int(len(bases) * THIN_FROM))
    going = thin(bases, wanted, most, replay_limit_bytes, await known.leads(bases), pinned)
    return gone + [await expire(catalog, storage, point) for point in going]


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What was, or would be, given up of the beginning of what can be restored."""

    points: tuple[int, ...]
    """Their snapshots are gone, and what only they could bring back."""
    kept: tuple[int, ...]
    """Older as well, and kept: there is a clone of them."""
    segments: int
    """How many segments of the journal went with them."""


async def give_up_before(
    first: RecoveryPoint, catalog: Catalog, storage: Storage, journal: Journal, *, dry_run: bool = False
) -> GivenUp:
    """Give up every point older than `first`, and the log that only they needed; with `dry_run` only say which.

    Commits before `first` keep their record and cannot be restored any more. May be repeated.

    Raises:
        CatalogError: `first` is not sealed, so that nothing would be left to restore from.
        StorageError: a snapshot could not be removed; its point is expiring, and goes with the next pass.
    """
    if first.state is not State.SEALED:
        raise CatalogError(f"point {first.number} is {first.state}", hint="name a sealed point: trigpoint list")
    older = [point for point in await catalog.bases() if point.number < first.number]
    pinned = {clone.point for clone in await storage.clones()}
    going = [point for point in older if point.id not in pinned]
    segments = 0
    if not dry_run:
        for point in going:
            await expire(catalog, storage, point)
        segments = await release_log(catalog, journal)
    kept = [point.number for point in older if point.id in pinned]
    return GivenUp(tuple(point.number for point in going), tuple(kept), segments)


async def expire(catalog: Catalog, storage: Storage, point: RecoveryPoint) -> RecoveryPoint:
    """Give `point` as expired, its snapshot removed."""
    point = await catalog.change(point, State.EXPIRING)
    reached("after-expiring")
    await storage.delete(point.id)
    reached("after-delete")
    return await catalog.change(point, State.EXPIRED)


async def release_log(catalog: Catalog, journal: Journal) -> int:
    """Give how many journal segments were deleted because no kept point needs them."""
    starts = [point.redo or point.floor for point in await catalog.bases()]
    histories = {start.history for start in starts}
    if len(histories) != 1:
        return 0  # nothing kept, or several timelines: keep everything rather than reason across them
    return await journal.release(min(start.at for start in starts))
