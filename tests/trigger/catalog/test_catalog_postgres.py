"""PostgreSQL serves the catalog as SQLite does: the same claims, on a real server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import text

from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from tests.trigger.catalog.test_catalog import BASE_US, HISTORY, NOW, at, opened, proven, record, sealed
from tests.trigger.catalog.test_catalog_search import LINEAGE, MAIN, a_history, fill
from trigger.catalog import packing, pruning
from trigger.catalog.catalog import Catalog, make_engine
from trigger.catalog.commit_search import log_order
from trigger.catalog.point_index import Missed
from trigger.errors import CatalogError
from trigger.model import Gap, Outcome, State, from_microseconds

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(15, folder / "data") as cluster:
        yield cluster


@pytest.fixture
def url(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    database = f"catalog_{abs(hash(request.node.name))}"
    cluster.sql(f"CREATE DATABASE {database}")
    return f"postgresql+psycopg://postgres@/{database}?host={cluster.sockets}&port={cluster.port}"


def test_points_commits_and_gaps_are_kept_on_a_server(url: str) -> None:
    async def work() -> None:
        catalog = await Catalog.open(url)
        records = [record(100, markers=("März",)), record(110, outcome=Outcome.COALESCED)]
        point = await sealed(catalog, 1, records)
        await catalog.record_gaps(Gap("bank", at(1), at(2), "slot dropped", proven(point).opened_at))
        assert (await sealed(catalog, 2, records)).commits == 0
        await catalog.close_gaps(2)
        await catalog.close()
        catalog = await Catalog.open(url)
        assert await catalog.point(1) == point
        assert await catalog.commits_of(1) == records
        assert [gap.closed_by for gap in await catalog.gaps()] == [2]
        totals = await catalog.totals()
        assert (totals.points[State.SEALED], totals.repeated) == (2, 2)
        assert totals.bytes > 100_000
        await catalog.close()

    asyncio.run(work())


def test_points_that_expired_long_ago_are_pruned_on_a_server_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "KEPT", 1)

    async def work() -> None:
        catalog = await Catalog.open(url)
        for number in (1, 2, 3):
            point = await sealed(catalog, number, [record(number * 100)])
            for step in (State.EXPIRING, State.EXPIRED) if number < 3 else ():
                point = await catalog.change(point, step)
        assert await catalog.prune(NOW + timedelta(days=1), 500) == 1
        assert await catalog.give_back(1000) == 0
        assert [point.number for point in await catalog.points()] == [3, 2]
        assert [found.point for found in await catalog.find()] == [1, 2, 3]
        assert (await catalog.totals()).pruned == 1
        await catalog.close()

    asyncio.run(work())


def test_look_ups_on_a_server_give_what_reading_every_commit_would_give(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_COMMITS", 4)
    chance = random.Random(7)

    async def work() -> None:
        catalog = await Catalog.open(url)
        truth = sorted(await fill(catalog, MAIN, a_history(chance, 1_000, 4_000, 40_000, 1_500), chance), key=log_order)
        for one in truth[::5]:
            mine = one.record
            assert one in await catalog.find(name=mine.name)
            assert one in await catalog.find(place=mine.start)
            assert one in await catalog.find(time=from_microseconds(mine.time_us))
            earlier = [found for found in truth if found.record.start < mine.start]
            assert await catalog.commit_before(mine.start, LINEAGE) == (earlier[-1] if earlier else None)
        assert await catalog.as_of(from_microseconds(BASE_US * 2), MAIN) == truth[-1]
        await catalog.close()

    asyncio.run(work())


def test_a_seal_refused_on_a_server_leaves_nothing(url: str) -> None:
    async def work() -> None:
        catalog = await Catalog.open(url)
        point = await opened(catalog, 1)
        with pytest.raises(CatalogError):
            await catalog.seal(proven(point), [record(100), record(50)], {"bank": at(200)})
        assert (await catalog.point(1)).state is State.OPEN
        assert await catalog.find() == []
        assert await catalog.settled("bank") is None
        await catalog.close()

    asyncio.run(work())


def test_a_server_that_restarts_is_a_retryable_error_and_the_next_call_succeeds(url: str, cluster: Cluster) -> None:
    async def work() -> None:
        catalog = await Catalog.open(url)
        await catalog.settle("bank", at(100))
        await asyncio.to_thread(cluster.stop)
        with pytest.raises(CatalogError) as caught:
            await catalog.settle("bank", at(200))
        assert caught.value.retryable
        await asyncio.to_thread(cluster.start)
        assert await catalog.settled("bank") == at(100)
        await catalog.settle("bank", at(200))
        await catalog.close()

    asyncio.run(work())


def test_a_server_without_the_database_is_an_error_that_names_it(url: str) -> None:
    async def work() -> None:
        with pytest.raises(CatalogError, match="nowhere"):
            await Catalog.open(url.replace("/catalog_", "/nowhere_"))

    asyncio.run(work())


def test_transactions_on_a_server_are_serializable(url: str) -> None:
    async def work() -> None:
        catalog = await Catalog.open(url)
        await catalog.record_gaps(missed=[Missed([record(100)], "left", HISTORY)])
        await catalog.close()

    asyncio.run(work())
    engine = make_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM blocks")) == 1
        assert connection.scalar(text("SHOW transaction_isolation")) == "serializable"
    engine.dispose()
