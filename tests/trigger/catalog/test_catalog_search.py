"""Look-ups by position, id, time and marker give exactly what reading every commit would give."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from connectors.databases.postgres.lsn import Lsn
from tests.simulation.virtual import inline
from tests.trigger.catalog.test_catalog import BASE_US, at, opened, proven, record, sealed, with_catalog
from trigger.catalog import packing
from trigger.catalog.catalog import Catalog, Found, make_engine
from trigger.catalog.commit_search import log_order
from trigger.catalog.point_index import Missed
from trigger.model import CommitRecord, Outcome, from_microseconds
from trigger.position import History, Lineage, Name, Position

MAIN = History("postgres", "7391", 1)
BRANCH = History("postgres", "7391", 2)
FORK = 5_000
LINEAGE = Lineage(BRANCH, ((1, Lsn(FORK)),))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four commits, so that a short history fills many."""
    monkeypatch.setattr(packing, "BLOCK_COMMITS", 4)


def a_history(chance: random.Random, first: int, last: int, xid: int, jitter: int) -> list[CommitRecord]:
    """Commits of two databases whose ids and times do not rise in log order, some with markers."""
    lsn, time_us, records = first, BASE_US + first * 1000, []
    while lsn < last:
        lsn += chance.randint(0, 60)
        xid += chance.randint(1, 3)
        time_us += chance.randint(0, 2000)
        long_running = chance.random() < 0.05
        records.append(
            record(
                lsn,
                xid=xid - chance.randint(100, 20_000) if long_running else xid,
                time_us=time_us + chance.randint(-jitter, jitter),
                stream=chance.choice(["bank", "shop"]),
                outcome=chance.choice([Outcome.PROTECTED, Outcome.COALESCED]),
                markers=chance.choice([(), (), (), ("payroll",), ("payroll", "März"), (f"job {lsn}",)]),
                length=chance.choice([8, 40]),
            )
        )
        lsn += int(records[-1].end - records[-1].start)
    return records


async def fill(catalog: Catalog, history: History, records: list[CommitRecord], chance: random.Random) -> list[Found]:
    """Seal or miss the records in runs of random length and give what the catalog now knows."""
    known = []
    while records:
        size = chance.randint(1, 20)
        run, records = records[:size], records[size:]
        if chance.random() < 0.2:
            await catalog.record_gaps(missed=[Missed(run, "left", history)])
            known += [Found(each._replace(outcome=Outcome.MISSED), None, "left", history) for each in run]
        else:
            point = await opened(catalog, chance.getrandbits(60), int(run[-1].end), history)
            ends = {each.stream: at(each.end, history) for each in run}
            point = await catalog.seal(proven(point), run, ends)
            known += [Found(each, point.number, "", history) for each in run]
    return known


async def catalog_and_truth(seed: int, jitter: int) -> tuple[Catalog, list[Found]]:
    chance = random.Random(seed)
    catalog = await Catalog.open(":memory:", run=inline)
    truth = await fill(catalog, MAIN, a_history(chance, 1_000, 6_000, 40_000, jitter), chance)
    truth += await fill(catalog, BRANCH, a_history(chance, FORK, 8_000, 41_000, jitter), chance)
    return catalog, sorted(truth, key=log_order)


def in_line(truth: Iterable[Found], line: History | Lineage) -> list[Found]:
    def belongs(found: Found) -> bool:
        if isinstance(line, History):
            return found.history == line
        return line.includes(Position(found.history, found.record.end))

    return [found for found in truth if belongs(found)]


searches = settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 1 << 32)
jitters = st.sampled_from([0, 1_500, 400_000])


@searches
@given(seeds, jitters)
def test_every_commit_is_found_by_each_of_its_keys(seed: int, jitter: int) -> None:
    async def work() -> None:
        catalog, truth = await catalog_and_truth(seed, jitter)

        def expected(found: Iterator[Found]) -> list[Found]:
            return sorted(found, key=log_order)

        for one in random.Random(seed).sample(truth, 12):
            mine = one.record
            for lsn in (mine.start, mine.end, Lsn(mine.start + 1)):
                there = expected(f for f in truth if f.record.start <= lsn <= f.record.end)
                assert await catalog.find(place=lsn) == there
            assert await catalog.find(name=mine.name) == expected(f for f in truth if f.record.name == mine.name)
            time = from_microseconds(mine.time_us)
            assert await catalog.find(time=time) == expected(f for f in truth if f.record.time_us == mine.time_us)
            near = expected(f for f in truth if 0 <= f.record.time_us - mine.time_us <= 10_000)
            assert await catalog.find(time=time, within=timedelta(milliseconds=10)) == near
            for marker in mine.markers:
                assert await catalog.find(marker=marker, limit=9999) == expected(
                    f for f in truth if marker in f.record.markers
                )
            both = await catalog.find(name=mine.name, stream="bank", place=mine.start)
            assert both == expected(f for f in [one] if mine.stream == "bank")
        await catalog.close()

    asyncio.run(work())


@searches
@given(seeds, jitters)
def test_what_was_never_committed_is_not_found(seed: int, jitter: int) -> None:
    async def work() -> None:
        catalog, truth = await catalog_and_truth(seed, jitter)
        xids = {found.record.name.number for found in truth}
        for xid in {
            0,
            1,
            39_000,
            (1 << 63) - 1,
            1 << 70,
            *random.Random(seed).sample(range(20_000, 45_000), 15),
        } - xids:
            assert await catalog.find(name=Name("", xid)) == []
        assert await catalog.find(marker="no such") == []
        assert await catalog.find(place=Lsn(0)) == []
        await catalog.close()

    asyncio.run(work())


NAMES = st.one_of(
    st.builds(
        Name, st.sampled_from(["", "0-1-", "0-2-", "order "]), st.integers(0, 40) | st.integers(0, (1 << 63) - 1)
    ),
    st.sampled_from(["payroll", "März", "job a", "", "-", "007x"]).map(Name.parse),
    st.text(max_size=8).map(Name.parse),
)


@settings(searches, max_examples=40)
@given(st.lists(NAMES, min_size=1, max_size=14), st.lists(NAMES, max_size=6), st.booleans())
def test_commits_are_found_by_names_of_any_text(called: list[Name], others: list[Name], marked: bool) -> None:
    """Several texts before the numbers of one block, the same number behind two of them, and names without one."""

    async def work(catalog: Catalog) -> None:
        records = [
            record(100 * place, name=name, markers=("payroll",) if marked and place % 3 == 0 else ())
            for place, name in enumerate(called, 1)
        ]
        point = await sealed(catalog, 1, records)
        assert await catalog.commits_of(1) == records
        assert [each.name for each in await catalog.commits_of(1)] == called
        truth = [Found(each, point.number, "", MAIN) for each in records]
        alike = [Name(text, name.number) for name in called for text in ("", "0-1-", "0-9-") if name.number is not None]
        for name in {*called, *others, *alike, *(Name.parse(name.text) for name in called)}:
            mine = [found for found in truth if found.record.name == name]
            assert await catalog.find(name=name) == mine
            assert await catalog.find(name=name, stream="shop") == []
            assert await catalog.find(name=name, place=100) == [f for f in mine if f.record.start == 100]
            assert await catalog.find(name=name, marker="payroll") == [f for f in mine if f.record.markers]
        assert await catalog.find(marker="payroll") == [found for found in truth if found.record.markers]
        assert await catalog.find(marker="job a") == []

    with_catalog(work)


@pytest.mark.parametrize("text", [str((1 << 63) - 1), str(1 << 63), f"order {(1 << 64) - 1}", f"order {1 << 64}"])
def test_a_commit_is_kept_and_found_whatever_number_its_name_ends_in(text: str) -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100, name=Name.parse(text)), record(200)])
        assert [str(found.record.name) for found in await catalog.find(name=Name.parse(text))] == [text]

    with_catalog(work)


@searches
@given(seeds, jitters)
def test_neighbours_in_log_order_are_those_of_the_whole_list(seed: int, jitter: int) -> None:
    async def work() -> None:
        catalog, truth = await catalog_and_truth(seed, jitter)
        for line in (MAIN, BRANCH, LINEAGE, History("postgres", "7391", 3)):
            mine = in_line(truth, line)
            some = [*random.Random(seed).sample(range(900, 8_100), 6), *(found.record.start for found in mine[::29])]
            for lsn in map(Lsn, [0, FORK, 1 << 62, *some]):
                earlier = [found for found in mine if found.record.start < lsn]
                later = [found for found in mine if found.record.start > lsn]
                assert await catalog.commit_before(lsn, line) == (earlier[-1] if earlier else None)
                assert await catalog.commit_after(lsn, line) == (later[0] if later else None)
        await catalog.close()

    asyncio.run(work())


@searches
@given(seeds, jitters)
def test_commits_from_a_place_on_are_counted_as_the_whole_list_counts_them(seed: int, jitter: int) -> None:
    async def work() -> None:
        catalog, truth = await catalog_and_truth(seed, jitter)
        for line in (MAIN, BRANCH, LINEAGE, History("postgres", "7391", 3)):
            mine = in_line(truth, line)
            some = [*random.Random(seed).sample(range(900, 8_100), 6), *(found.record.start for found in mine[::29])]
            for lsn in map(Lsn, [0, FORK, 1 << 62, *some]):
                assert await catalog.count_from(lsn, line) == sum(found.record.start >= lsn for found in mine)
        await catalog.close()

    asyncio.run(work())


@searches
@given(seeds, jitters)
def test_as_of_ends_before_the_first_commit_that_is_later(seed: int, jitter: int) -> None:
    async def work() -> None:
        catalog, truth = await catalog_and_truth(seed, jitter)
        for line in (MAIN, BRANCH, LINEAGE):
            mine = in_line(truth, line)
            some = [found.record.time_us for found in random.Random(seed).sample(mine, 8)]
            for time_us in [0, BASE_US, BASE_US * 2, *some, *(time - 1 for time in some)]:
                run = list(takewhile(lambda found: found.record.time_us <= time_us, mine))  # noqa: B023 - used at once
                assert await catalog.as_of(from_microseconds(time_us), line) == (run[-1] if run else None)
        await catalog.close()

    asyncio.run(work())


def test_as_of_without_a_line_follows_the_history_recorded_last() -> None:
    async def work(catalog: Catalog) -> None:
        assert await catalog.as_of(from_microseconds(BASE_US * 2)) is None
        await catalog.record_gaps(missed=[Missed([record(100)], "left", BRANCH)])
        await catalog.record_gaps(missed=[Missed([record(200)], "left", MAIN)])
        found = await catalog.as_of(from_microseconds(BASE_US * 2))
        assert found is not None
        assert found.history == MAIN

    with_catalog(work)


def test_peaks_hold_when_blocks_are_adopted_out_of_order() -> None:
    async def work(catalog: Catalog) -> None:
        late = record(100, time_us=BASE_US + 9_000)
        early = [record(200, time_us=BASE_US + 1_000), record(300, time_us=BASE_US + 2_000)]
        first = await sealed(catalog, 1, [late])
        second = await sealed(catalog, 2, early)
        rebuilt = await Catalog.open(":memory:", run=inline)
        await rebuilt.adopt(second, early)
        await rebuilt.adopt(first, [late])
        for each in (catalog, rebuilt):
            assert await each.as_of(from_microseconds(BASE_US + 5_000), MAIN) is None
        await rebuilt.close()

    with_catalog(work)


def test_more_matches_than_the_limit_give_those_recorded_last() -> None:
    async def work(catalog: Catalog) -> None:
        for number in range(1, 11):
            await sealed(catalog, number, [record(100 * number, markers=("daily",)), record(100 * number + 50)])
        found = await catalog.find(marker="daily", limit=3)
        assert [each.record.start for each in found] == [800, 900, 1000]
        assert [each.record.start for each in await catalog.find(limit=3)] == [950, 1000, 1050]
        assert await catalog.find(stream="shop") == []

    with_catalog(work)


def test_no_look_up_and_no_seal_reads_the_blocks_from_end_to_end() -> None:
    engine = make_engine(":memory:")
    asked: list[tuple[str, Any]] = []

    def listen(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        asked.append((statement, parameters))

    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100, markers=("payroll",))])
        event.listen(engine, "before_cursor_execute", listen)
        time = from_microseconds(BASE_US)
        await catalog.find(name=Name("", 100))
        await catalog.find(place=Lsn(100))
        await catalog.find(time=time, within=timedelta(seconds=1))
        await catalog.find(marker="payroll")
        await catalog.commit_before(Lsn(200), MAIN)
        await catalog.commit_after(Lsn(2), MAIN)
        await catalog.as_of(time, LINEAGE)
        await catalog.commits_of(1)
        await catalog.latest()
        await sealed(catalog, 2, [record(200, markers=("payroll",)), record(300, stream="shop")])
        event.remove(engine, "before_cursor_execute", listen)

    with_catalog(work, engine)
    with engine.connect() as connection:
        selects = [
            (statement, parameters) for statement, parameters in asked if statement.startswith(("SELECT", "UPDATE"))
        ]
        plans = [
            str(row[3])
            for query in selects
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query[0]}", query[1])
        ]
    engine.dispose()
    assert any(plan.startswith("SEARCH blocks") for plan in plans)
    assert [
        plan
        for plan in plans
        if plan.startswith(("SCAN blocks", "SCAN markers", "SCAN number_outliers", "SCAN points"))
    ] == []
