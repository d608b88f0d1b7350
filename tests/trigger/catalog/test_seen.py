"""What the catalog knows of each history at a start: the furthest place, and the last commit; cheaply."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

from sqlalchemy import Engine

from tests.simulation.virtual import inline
from tests.trigger.catalog.test_catalog import HISTORY, NOW, at, record, sealed, with_catalog
from trigger.catalog.catalog import Catalog, make_engine
from trigger.catalog.point_index import Missed
from trigger.model import CommitRecord, Gap
from trigger.position import History, Position

NEXT = History("postgres", "7391", 2)
AGAIN = History("postgres", "7391", 1, 1)


async def places(catalog: Catalog) -> dict[History, int]:
    return {position.history: position.at for position, _ in await catalog.seen()}


async def missed(catalog: Catalog, history: History, *starts: int, stream: str = "bank") -> None:
    await catalog.record_gaps(missed=[Missed([record(start, stream=stream) for start in starts], "lost", history)])


def test_a_new_catalog_has_seen_no_history() -> None:
    async def work(catalog: Catalog) -> None:
        assert await catalog.seen() == []

    with_catalog(work)


def test_the_furthest_commit_of_any_stream_counts() -> None:
    async def work(catalog: Catalog) -> None:
        await missed(catalog, HISTORY, 100, 900)
        await missed(catalog, HISTORY, 500, stream="shop")
        assert await places(catalog) == {HISTORY: 908}
        await missed(catalog, HISTORY, 2_000, stream="shop")
        await missed(catalog, HISTORY, 300, stream="third")
        await missed(catalog, HISTORY, 950)
        ((position, last),) = await catalog.seen()
        assert position == at(2_008)
        assert isinstance(last, CommitRecord)
        assert (last.stream, last.start) == ("shop", 2_000)

    with_catalog(work)


def test_a_commit_that_is_recorded_late_before_others_takes_nothing_back() -> None:
    async def work(catalog: Catalog) -> None:
        await missed(catalog, HISTORY, 900)
        await missed(catalog, HISTORY, 100)
        assert await places(catalog) == {HISTORY: 908}

    with_catalog(work)


def test_a_settled_place_counts_where_it_lies_behind_the_commits_and_only_there() -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100), record(900)])
        await catalog.settle("shop", at(500))
        assert await places(catalog) == {HISTORY: 908}
        await catalog.settle("shop", at(5_000))
        assert await places(catalog) == {HISTORY: 5_000}

    with_catalog(work)


def test_each_history_has_its_own_place_those_that_only_a_gap_names_too() -> None:
    def gap(after: Position, until: Position) -> Gap:
        return Gap("bank", after, until, "an older copy was put back", NOW)

    async def work(catalog: Catalog) -> None:
        await missed(catalog, HISTORY, 900)
        await missed(catalog, NEXT, 400, stream="shop")
        await catalog.settle("bank", at(600, NEXT))
        await catalog.record_gaps(gap(at(950), at(300, AGAIN)))
        await catalog.record_gaps(gap(at(200), at(700, AGAIN)))
        await catalog.record_gaps(gap(at(50, History("postgres", "8", 1)), at(1_000)))
        found = await places(catalog)
        assert found == {HISTORY: 1_000, NEXT: 600, AGAIN: 700, History("postgres", "8", 1): 0}

    with_catalog(work)


def steps(engine: Engine, catalog: Catalog) -> int:
    """Give how many tens of steps SQLite takes for what a start asks."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)
    raw.set_progress_handler(count, 10)
    try:
        assert len(asyncio.run(catalog.seen())) == 2
    finally:
        raw.set_progress_handler(None, 0)
    return counted


def test_ten_times_as_many_blocks_cost_no_more_than_twice_as_much() -> None:
    engine = make_engine(":memory:")

    async def fill(first: int, behind: int) -> Catalog:
        catalog = await Catalog.open(engine, run=inline)
        for number in range(first, behind):
            for history in (HISTORY, NEXT):
                await missed(catalog, history, number * 1_000, stream="bank" if number % 2 else "shop")
        return catalog

    few = steps(engine, asyncio.run(fill(1, 60)))
    many = steps(engine, asyncio.run(fill(60, 600)))
    engine.dispose()
    assert few > 0
    assert many <= 2 * few, f"{few} steps for few blocks, {many} for ten times as many"
