"""The catalog keeps what it was told, gives it back by every key, and is in no half state."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from trigger.catalog import Catalog
from trigger.model import (
    Cause,
    CommitRecord,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    point_id,
)
from trigger.position import History, Lsn, Position

T = TypeVar("T")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HISTORY = History("7391", 1)
SECOND = 1_000_000
BASE_US = 1_760_000_000 * SECOND


async def inline(work: Callable[[], T]) -> T:
    return work()


def at(lsn: int, history: History = HISTORY) -> Position:
    return Position(history, Lsn(lsn))


def record(
    start: int,
    *,
    xid: int | None = None,
    time_us: int | None = None,
    stream: str = "bank",
    outcome: Outcome = Outcome.PROTECTED,
    markers: tuple[str, ...] = (),
    length: int = 8,
) -> CommitRecord:
    time_us = BASE_US + start if time_us is None else time_us
    return CommitRecord(
        stream, start if xid is None else xid, Lsn(start), Lsn(start + length), time_us, markers, outcome
    )


async def opened(catalog: Catalog, number: int, floor: int = 100, history: History = HISTORY) -> RecoveryPoint:
    return await catalog.open_point(
        id=point_id(NOW, number), cause=Cause.COMMIT, floor=at(floor, history), opened_at=NOW
    )


def proven(point: RecoveryPoint) -> RecoveryPoint:
    snapshot = Snapshot("data", "memory", "/snapshots/1", NOW, NOW)
    ceiling = Position(point.floor.history, Lsn(point.floor.at + 50))
    return dataclasses.replace(point, ceiling=ceiling, sealed_at=NOW, snapshots=(snapshot,))


async def sealed(catalog: Catalog, number: int, records: Sequence[CommitRecord] = ()) -> RecoveryPoint:
    floor = max((int(each.end) for each in records), default=100)
    point = await opened(catalog, number, floor)
    return await catalog.seal(proven(point), records, {each.stream: at(each.end) for each in records})


def with_catalog(work: Callable[[Catalog], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        catalog = await Catalog.open(":memory:", run=inline)
        try:
            return await work(catalog)
        finally:
            await catalog.close()

    return asyncio.run(run())


def test_a_sealed_point_comes_back_whole_with_its_commits() -> None:
    async def work(catalog: Catalog) -> None:
        records = [record(100, markers=("payroll",)), record(110, outcome=Outcome.COALESCED)]
        point = await sealed(catalog, 1, records)
        assert (point.number, point.state, point.commits) == (1, State.SEALED, 2)
        for ref in (1, "1", point.id, point.name, point.name.upper()):
            assert await catalog.point(ref) == point
        assert await catalog.commits_of(1) == records
        assert await catalog.latest() == point
        assert await catalog.bases() == [point]
        assert await catalog.settled("bank") == at(118)

    with_catalog(work)
