"""Remove snapshots that may go: plan by `retention`, then do, one point after the other.

A point is marked as expiring first, then its snapshot is removed, then it is expired; wherever the process dies
between, the next reconcile goes on. The commits of an expired point keep their record and stay restorable from the
base before it.
"""

from __future__ import annotations

from trigger.catalog import Catalog
from trigger.failpoint import reached
from trigger.model import RecoveryPoint, State
from trigger.ports import Journal, Storage
from trigger.retention import thin

THIN_FROM = 0.9
THIN_TO = 0.7
"""Shares of the storage's budget: thinning begins above the first and ends at the second."""


async def make_room(catalog: Catalog, storage: Storage, replay_limit_bytes: int) -> list[RecoveryPoint]:
    """Give the points whose snapshots were removed: as was begun before, or since the budget is nearly used up.

    A point of which there is a clone stays.
    """
    begun = await catalog.points(states={State.EXPIRING}, newest_first=False)
    gone = [await expire(catalog, storage, point) for point in begun]
    space = await storage.space()
    if space.snapshots <= space.budget * THIN_FROM:
        return gone
    pinned = {clone.point for clone in await storage.clones()}
    going = thin(await catalog.bases(), int(space.budget * THIN_TO), replay_limit_bytes, pinned)
    return gone + [await expire(catalog, storage, point) for point in going]


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
