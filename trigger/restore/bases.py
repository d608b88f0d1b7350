"""The plan from what can be restored from; where there is none, what would do once reconcile has taken it back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import back
from trigger.errors import RestoreError, StorageError
from trigger.model import Finding, RecoveryPoint, State
from trigger.ports import Storage
from trigger.restore.obstacles import require_none
from trigger.restore.planner import LACKS, Plan
from trigger.volumes import are_alike

LeftOut = Callable[[RecoveryPoint], Awaitable[list[Finding]]]
"""Gives what of the cluster the snapshots of a point do not hold."""

PlanFrom = Callable[..., Plan]
"""Gives the plan for one target from some points, of which some are `away`, as `planner.plan` does."""


async def planned(
    plan_from: PlanFrom,
    bases: Sequence[RecoveryPoint],
    away: Mapping[str, str],
    left_out: LeftOut,
    catalog: Catalog,
    storage: Storage | None,
) -> Plan:
    """Give the plan from sealed points; `away` as in `planner.plan`, `left_out` tells of each base whether it is whole.

    Raises:
        RestoreError: there is none, and waiting does not help either; or it is retryable. A point that failed as gone,
            lies in the storage again and would do is named.
        CatalogError: the catalog cannot be read.
    """
    try:
        return await _plan_of_whole(partial(plan_from, bases), bases, away, left_out)
    except RestoreError as refused:
        if storage is not None and not refused.retryable:
            refused.message += await _would_do(plan_from, catalog, storage)
        raise


async def _plan_of_whole(
    planned: Callable[..., Plan], bases: Sequence[RecoveryPoint], away: Mapping[str, str], left_out: LeftOut
) -> Plan:
    """Give the plan that starts from the nearest point whose snapshots hold all of the cluster.

    With one that does not all of the same volumes are left out: what it lacks lay on none of them, or was made since.

    Args:
        planned: `planner.plan`, but for what is `away`.
        bases: what it starts from.
        away: what is known of them, as for that.
        left_out: gives what the snapshots of a point do not hold.

    Raises:
        RestoreError: there is no plan; where a point would do but for what it lacks, this is said of the nearest.
    """
    without: dict[str, str] = {}
    nearest: Sequence[Finding] = ()
    while True:
        try:
            found = planned(away={**without, **away})
        except RestoreError:
            require_none(nearest)
            raise
        if not (lacks := await left_out(found.base)):
            return found
        nearest = nearest or lacks
        without |= {base.id: f"{LACKS}{lacks[0].message}" for base in bases if are_alike(base, found.base)}


async def _would_do(plan_from: PlanFrom, catalog: Catalog, storage: Storage) -> str:
    try:
        there = [replace(point, state=State.SEALED) for point in await back(catalog, storage)]
        base = plan_from(there).base
    except (RestoreError, StorageError):
        return ""
    return (
        f"; it could be done from point {base.number}, which failed as gone and lies in the storage again:"
        " `trigpoint reconcile`, while the service is stopped, takes it back if it is whole"
    )
