"""The plan from what can be restored from; where there is none, what would do once reconcile has taken it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import back
from trigger.errors import RestoreError, StorageError
from trigger.model import RecoveryPoint, State
from trigger.ports import Storage
from trigger.restore.obstacles import LeftOut, plan_of_whole
from trigger.restore.planner import Plan

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
    """Give the plan from sealed points; `away` and `left_out` as in `plan_of_whole`.

    Raises:
        RestoreError: there is none, and waiting does not help either; or it is retryable. A point that failed as gone,
            lies in the storage again and would do is named.
        CatalogError: the catalog cannot be read.
    """
    try:
        return await plan_of_whole(partial(plan_from, bases), bases, away, left_out)
    except RestoreError as refused:
        if storage is not None and not refused.retryable:
            refused.message += await _would_do(plan_from, catalog, storage)
        raise


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
