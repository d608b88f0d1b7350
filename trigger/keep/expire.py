"""Remove the snapshots of points, one point after the other.

A point is marked as expiring first, then its snapshot is removed, then it is expired; wherever the process dies
between, the next reconcile goes on. The commits of an expired point keep their record and stay restorable from the
base before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import away
from trigger.catalog.reserve import for_an_operator
from trigger.errors import CatalogError
from trigger.failpoint import reached
from trigger.model import GONE, RecoveryPoint, State
from trigger.ports import Journal, Storage
from trigger.position import History, Position


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What was, or would be, given up of the beginning of what can be restored."""

    points: tuple[int, ...]
    """Their snapshots are gone, and what only they could bring back."""
    kept: tuple[int, ...]
    """Older as well, and kept: there is a clone of them."""
    segments: int = 0
    """How many segments of the journal went with them."""


async def give_up_before(first: RecoveryPoint, catalog: Catalog, storage: Storage, *, dry_run: bool = False) -> GivenUp:
    """Give up every point older than `first`; with `dry_run` only say which.

    Commits before `first` keep their record and cannot be restored any more. May be repeated.

    Raises:
        CatalogError: `first` is not sealed, or its snapshot is gone, so that nothing would be left to restore from.
        StorageError: a snapshot could not be removed; its point is expiring, and goes with the next pass.
    """
    if first.state is not State.SEALED:
        raise CatalogError(f"point {first.number} is {first.state}", hint="name a sealed point: trigpoint list")
    bases = await catalog.bases()
    if first.id in await away(bases, catalog, storage):
        raise CatalogError(f"point {first.number}: {GONE}", hint="name a point that is there: trigpoint check")
    going: list[int] = []
    kept: list[int] = []
    for point in [point for point in bases if point.number < first.number]:
        if await is_cloned(storage, point):
            kept.append(point.number)
            continue
        going.append(point.number)
        if not dry_run:
            with for_an_operator():
                await expire(catalog, storage, point)
    return GivenUp(tuple(going), tuple(kept))


async def is_cloned(storage: Storage, point: RecoveryPoint) -> bool:
    """Whether there is a clone of a point, or one is being made, by whatever process.

    It is asked right before each removal: a restore may begin while others are removed.
    """
    return any(clone.point == point.id for clone in await storage.clones())


async def expire(catalog: Catalog, storage: Storage, point: RecoveryPoint) -> RecoveryPoint:
    """Give `point` as expired, its snapshot removed."""
    point = await catalog.change(point, State.EXPIRING)
    reached("after-expiring")
    await storage.delete(point.id)
    reached("after-delete")
    return await catalog.change(point, State.EXPIRED)


async def release_log(catalog: Catalog, journal: Journal) -> int:
    """Give how many journal segments were deleted because no kept point needs them, whatever history it is of.

    A point whose snapshot is gone is one of them while it is sealed: it may come back, and needs its log then.
    """
    oldest: dict[History, Position] = {}
    for mark in (mark for point in await catalog.bases() for mark in point.marks):
        for start in (mark.replay_from, mark.log_from):
            oldest[start.history] = min(start, oldest.get(start.history, start))
    return await journal.release(oldest.values())
