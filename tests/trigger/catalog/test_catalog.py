"""The catalog keeps what it was told, gives it back as it was, and lets no commit have two outcomes."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine

from connectors.databases.postgres.lsn import Lsn
from tests.simulation.virtual import inline
from trigger import failpoint
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.point_index import Missed
from trigger.errors import CatalogError, NotFoundError
from trigger.model import (
    TRANSITIONS,
    Cause,
    CommitRecord,
    Gap,
    Mark,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
)
from trigger.point_names import point_id
from trigger.position import History, Name, Position

T = TypeVar("T")
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HISTORY = History("postgres", "7391", 1)
BASE_US = 1_760_000_000_000_000


def at(lsn: int, history: History = HISTORY) -> Position:
    return Position(history, Lsn(lsn))


def record(
    start: int,
    *,
    xid: int | None = None,
    name: Name | None = None,
    time_us: int | None = None,
    stream: str = "bank",
    outcome: Outcome = Outcome.PROTECTED,
    markers: tuple[str, ...] = (),
    length: int = 8,
) -> CommitRecord:
    time_us = BASE_US + start if time_us is None else time_us
    name = Name("", start if xid is None else xid) if name is None else name
    return CommitRecord(stream, name, Lsn(start), Lsn(start + length), time_us, markers, outcome)


async def opened(catalog: Catalog, number: int, floor: int = 100, history: History = HISTORY) -> RecoveryPoint:
    return await catalog.open_point(
        id=point_id(NOW, number), cause=Cause.COMMIT, marks=[Mark(at(floor, history))], opened_at=NOW
    )


def proven(point: RecoveryPoint) -> RecoveryPoint:
    snapshot = Snapshot("data", "memory", "/snapshots/1", NOW, NOW)
    ceiling = Position(point.floor.history, Lsn(point.floor.at + 50))
    mark = dataclasses.replace(point.marks[0], ceiling=ceiling)
    return dataclasses.replace(point, marks=(mark, *point.marks[1:]), sealed_at=NOW, snapshots=(snapshot,))


async def sealed(catalog: Catalog, number: int, records: Sequence[CommitRecord] = ()) -> RecoveryPoint:
    floor = max((int(each.end) for each in records), default=100)
    point = await opened(catalog, number, floor)
    return await catalog.seal(proven(point), records, {each.stream: at(each.end) for each in records})


def with_catalog(work: Callable[[Catalog], Coroutine[Any, Any, T]], where: str | Path | Engine = ":memory:") -> T:
    """Give what `work` gives, run on a catalog that does its work inline."""

    async def run() -> T:
        catalog = await Catalog.open(where, run=inline)
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


def test_numbers_count_up_and_are_never_used_again() -> None:
    async def work(catalog: Catalog) -> None:
        assert [(await opened(catalog, n)).number for n in (1, 2)] == [1, 2]
        await catalog.fail(await catalog.point(2), "no room")
        assert (await opened(catalog, 3)).number == 3

    with_catalog(work)


def test_opening_an_id_again_gives_the_point_that_is_there() -> None:
    async def work(catalog: Catalog) -> None:
        first = await opened(catalog, 1)
        assert await opened(catalog, 1) == first
        assert len(await catalog.points()) == 1

    with_catalog(work)


def test_sealing_again_changes_nothing() -> None:
    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        once = await catalog.seal(proven(point), [record(100)], {"bank": at(200)})
        before = await catalog.totals()
        assert await catalog.seal(proven(point), [record(100), record(300)], {"bank": at(400)}) == once
        assert await catalog.totals() == before
        assert await catalog.settled("bank") == at(200)

    with_catalog(work)


def test_a_commit_that_has_an_outcome_is_dropped_and_counted_not_recorded_twice() -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100), record(110)])
        again = await sealed(catalog, 2, [record(100), record(110), record(120)])
        assert again.commits == 1
        assert await catalog.commits_of(2) == [record(120)]
        await catalog.settle("bank", at(500))
        await catalog.record_gaps(missed=[Missed([record(450), record(510)], "budget", HISTORY)])
        totals = await catalog.totals()
        assert totals.repeated == 3
        assert totals.commits == {Outcome.PROTECTED: 3, Outcome.COALESCED: 0, Outcome.MISSED: 1}

    with_catalog(work)


def test_a_repeated_commit_is_known_even_after_its_stream_went_to_another_history_and_back() -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])
        await catalog.settle("bank", at(50, History("postgres", "7391", 2)))
        assert await catalog.settled("bank") == at(50, History("postgres", "7391", 2))
        assert (await sealed(catalog, 2, [record(100)])).commits == 0
        assert len(await catalog.find(name=Name("", 100))) == 1

    with_catalog(work)


def test_the_same_position_in_another_history_is_another_commit() -> None:
    async def work(catalog: Catalog) -> None:
        other = History("postgres", "7391", 2)
        await sealed(catalog, 1, [record(100)])
        point = await opened(catalog, 2, 108, other)
        await catalog.seal(proven(point), [record(100)], {"bank": at(108, other)})
        assert [found.history for found in await catalog.find(place=Lsn(100))] == [HISTORY, other]

    with_catalog(work)


def test_a_commit_that_overlaps_a_recorded_one_is_refused_and_nothing_is_kept() -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100, length=20)])
        point = await opened(catalog, 2)
        with pytest.raises(CatalogError, match="overlaps"):
            await catalog.seal(proven(point), [record(110, length=20)], {"bank": at(200)})
        await catalog.record_gaps(missed=[Missed([record(300)], "left behind", HISTORY)])
        with pytest.raises(CatalogError, match="overlaps"):
            await catalog.seal(proven(point), [record(290, length=20)], {"bank": at(400)})
        assert (await catalog.point(2)).state is State.OPEN
        assert await catalog.settled("bank") == at(120)

    with_catalog(work)


def test_commits_kept_by_a_failover_are_protected_after_those_behind_them_were_missed() -> None:
    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])
        await catalog.record_gaps(missed=[Missed([record(300), record(310)], "left behind by the failover", HISTORY)])
        kept = await sealed(catalog, 2, [record(110), record(120)])
        assert kept.commits == 2
        assert [(await catalog.find(name=Name("", xid)))[0].point for xid in (110, 120, 300, 310)] == [2, 2, None, None]

    with_catalog(work)


def test_a_stream_is_settled_to_the_end_of_its_last_record_at_least() -> None:
    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        await catalog.seal(proven(point), [record(100)], {"shop": at(90)})
        assert (await catalog.settled("bank"), await catalog.settled("shop")) == (at(108), at(90))
        assert await catalog.settled("unknown") is None

    with_catalog(work)


def test_settled_never_goes_back_in_one_history() -> None:
    async def work(catalog: Catalog) -> None:
        for through, stands in ((50, 50), (40, 50), (60, 60)):
            await catalog.settle("bank", at(through))
            assert await catalog.settled("bank") == at(stands)

    with_catalog(work)


def test_a_missed_commit_is_found_with_its_reason() -> None:
    async def work(catalog: Catalog) -> None:
        await catalog.record_gaps(missed=[Missed([record(100)], "not in the history of timeline 2", HISTORY)])
        (found,) = await catalog.find(name=Name("", 100))
        assert (found.point, found.reason) == (None, "not in the history of timeline 2")
        assert found.record.outcome is Outcome.MISSED
        assert await catalog.settled("bank") is None

    with_catalog(work)


def test_a_point_is_not_sealed_without_its_proofs_nor_with_missed_commits() -> None:
    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        with pytest.raises(CatalogError, match="without ceiling, sealed_at, snapshots"):
            await catalog.seal(point, [], {})
        with pytest.raises(CatalogError, match="missed"):
            await catalog.seal(proven(point), [record(100, outcome=Outcome.MISSED)], {})
        assert (await catalog.point(1)).state is State.OPEN

    with_catalog(work)


async def bring_to(catalog: Catalog, number: int, state: State) -> RecoveryPoint:
    point = await opened(catalog, number)
    if state is State.FAILED:
        return await catalog.fail(point, "no room")
    if state is not State.OPEN:
        point = await catalog.seal(proven(point), [], {})
    for step in (State.EXPIRING, State.EXPIRED):
        if state in (State.EXPIRING, State.EXPIRED) and point.state is not state:
            point = await catalog.change(point, step)
    return point


@pytest.mark.parametrize("target", State)
@pytest.mark.parametrize("origin", State)
def test_a_point_changes_by_the_table_of_transitions_only(origin: State, target: State) -> None:
    async def step(catalog: Catalog, point: RecoveryPoint) -> RecoveryPoint:
        if target is State.SEALED:
            return await catalog.seal(proven(point), [], {})
        if target is State.FAILED:
            return await catalog.fail(point, "gone")
        return await catalog.change(point, target)

    async def work(catalog: Catalog) -> None:
        point = await bring_to(catalog, 1, origin)
        assert point.state is origin
        never_sealed = origin is State.FAILED
        if (target in TRANSITIONS[origin] and not never_sealed) or target is origin:
            point = await step(catalog, point)
            assert point.state is target
        else:
            with pytest.raises(CatalogError, match=f"is {origin} and cannot become {target}"):
                await step(catalog, point)
        assert await catalog.point(1) == point

    with_catalog(work)


def test_a_change_of_state_does_not_seal_or_fail() -> None:
    async def work(catalog: Catalog) -> None:
        point = await opened(catalog, 1)
        for state in (State.SEALED, State.FAILED):
            with pytest.raises(CatalogError, match="by its own call"):
                await catalog.change(point, state)

    with_catalog(work)


def test_only_a_point_that_was_sealed_is_sealed_again_after_it_failed() -> None:
    async def work(catalog: Catalog) -> None:
        sealed = await bring_to(catalog, 1, State.SEALED)
        assert await catalog.regain(await catalog.fail(sealed, "gone")) == sealed
        with pytest.raises(CatalogError, match="cannot become sealed: no room"):
            await catalog.regain(await bring_to(catalog, 2, State.FAILED))

    with_catalog(work)


def test_failing_again_keeps_the_first_reason() -> None:
    async def work(catalog: Catalog) -> None:
        point = await catalog.fail(await opened(catalog, 1), "no room")
        assert (await catalog.fail(point, "still no room")).failure == "no room"

    with_catalog(work)


def test_a_verification_is_kept_with_a_sealed_point_only() -> None:
    async def work(catalog: Catalog) -> None:
        proof = Verification(NOW, True, "commit 100", (("X is there", True, "committed"),))
        with pytest.raises(CatalogError, match="only a sealed point"):
            await catalog.verified(await opened(catalog, 1), proof)
        point = await sealed(catalog, 2)
        assert (await catalog.verified(point, proof)).verification == proof
        assert (await catalog.point(2)).verification == proof

    with_catalog(work)


def test_points_are_given_by_state_in_order_and_by_page() -> None:
    async def work(catalog: Catalog) -> None:
        for number, state in enumerate([State.SEALED, State.FAILED, State.EXPIRED, State.SEALED, State.OPEN], 1):
            await bring_to(catalog, number, state)

        async def numbers(**asked: Any) -> list[int]:
            return [point.number for point in await catalog.points(**asked)]

        assert await numbers() == [5, 4, 3, 2, 1]
        assert await numbers(newest_first=False) == [1, 2, 3, 4, 5]
        assert await numbers(states={State.SEALED, State.OPEN}) == [5, 4, 1]
        assert await numbers(limit=2) == [5, 4]
        assert await numbers(limit=2, before_number=4) == [3, 2]
        assert await numbers(newest_first=False, before_number=3) == [1, 2]
        assert await numbers(states=set()) == []
        latest = await catalog.latest()
        assert latest is not None
        assert latest.number == 4

    with_catalog(work)


def test_a_list_longer_than_a_page_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigger.catalog.catalog._PAGE", 3)

    async def work(catalog: Catalog) -> None:
        for number in range(1, 9):
            await opened(catalog, number)
        for count in (2, 3, 6, 7, None):
            assert [p.number for p in await catalog.points(limit=count)] == list(range(8, 0, -1))[:count]
        assert [p.number for p in await catalog.points(newest_first=False)] == list(range(1, 9))

    with_catalog(work)


@pytest.mark.parametrize("ref", [7, "7", "trg-", "", "' OR 1=1 --", "9" * 40, "²", point_id(NOW, 99)])
def test_an_unknown_point_is_an_error_with_a_hint(ref: str | int) -> None:
    async def work(catalog: Catalog) -> None:
        with pytest.raises(NotFoundError, match="trigpoint list") as raised:
            await catalog.point(ref)
        assert raised.value.exit_code == 11

    with_catalog(work)


def gap(until: int, history: History = HISTORY) -> Gap:
    return Gap("bank", at(100), at(until, history), "slot dropped", NOW)


def test_a_sealed_point_closes_the_gaps_that_were_known_when_it_was_opened() -> None:
    async def work(catalog: Catalog) -> None:
        await catalog.record_gaps(gap(200))
        point = await opened(catalog, 1)
        (late,) = await catalog.record_gaps(gap(300, History("postgres", "7391", 2)))
        with pytest.raises(CatalogError, match="closes no gap: it is open"):
            await catalog.close_gaps(1)
        await catalog.seal(proven(point), [], {})
        await catalog.close_gaps(1)
        assert await catalog.gaps(open_only=True) == [late]
        assert await catalog.gaps() == [dataclasses.replace(gap(200), closed_by=1), late]
        assert (await catalog.totals()).open_gaps == 1

    with_catalog(work)


def test_a_gap_that_is_open_already_is_not_recorded_again() -> None:
    async def work(catalog: Catalog) -> None:
        first = await catalog.record_gaps(gap(200))
        later = dataclasses.replace(gap(200), reason="again")
        assert await catalog.record_gaps(later) == first
        assert await catalog.gaps() == first

    with_catalog(work)


def test_a_catalog_adopted_from_tags_differs_only_in_what_only_it_knew() -> None:
    tags: list[str] = []

    async def first(catalog: Catalog) -> None:
        for number in range(1, 5):
            records = [record(100 * number), record(100 * number + 50, stream="shop", outcome=Outcome.COALESCED)]
            point = await sealed(catalog, number, records)
            tags.append(tag.encode(point, records))

    async def second(catalog: Catalog) -> list[RecoveryPoint]:
        for text_of_tag in (tags[2], tags[0], tags[3], tags[1]):
            point, records = tag.decode(text_of_tag)
            assert await catalog.adopt(point, records)
            assert not await catalog.adopt(point, records)
        for number in range(1, 5):
            assert len(await catalog.commits_of(number)) == 2
        assert (await catalog.totals()).commits[Outcome.COALESCED] == 4
        assert await catalog.settled("shop") == at(458)
        assert (await catalog.totals()).repeated == 0
        return await catalog.bases()

    with_catalog(first)
    assert [tag.encode(p, []) for p in with_catalog(second)] == [tag.encode(tag.decode(t)[0], []) for t in tags]


def test_an_adopted_point_whose_number_is_taken_gets_the_next_one() -> None:
    async def work(catalog: Catalog) -> None:
        mine = await sealed(catalog, 1, [record(100)])
        strange = dataclasses.replace(mine, id=point_id(NOW, 2))
        assert await catalog.adopt(strange, [record(100), record(200)])
        assert (await catalog.point(strange.id)).number == 2
        assert await catalog.commits_of(2) == [record(200)]
        assert (await catalog.totals()).repeated == 1

    with_catalog(work)


def test_an_adopted_point_fills_in_around_what_is_recorded() -> None:
    async def work(catalog: Catalog) -> None:
        await catalog.record_gaps(missed=[Missed([record(200), record(210)], "left", HISTORY)])
        around = [record(start) for start in (100, 190, 200, 210, 220, 300)]
        point = proven(dataclasses.replace(await opened(catalog, 1), id=point_id(NOW, 5), number=5))
        assert await catalog.adopt(dataclasses.replace(point, state=State.SEALED), around)
        assert await catalog.commits_of(5) == [record(start) for start in (100, 190, 220, 300)]

    with_catalog(work)


@pytest.mark.parametrize("state", [State.OPEN, State.FAILED])
def test_an_unfinished_point_is_not_adopted(state: State) -> None:
    async def work(catalog: Catalog) -> None:
        point = dataclasses.replace(proven(await opened(catalog, 1)), state=state)
        with pytest.raises(CatalogError, match=f"is {state} and cannot be adopted"):
            await catalog.adopt(point, [])

    with_catalog(work)


SEAL_STEPS = ("catalog-seal-begun", "catalog-blocks-written", "catalog-settled-written", "catalog-point-sealed")


@pytest.mark.parametrize("step", SEAL_STEPS)
def test_a_seal_that_breaks_off_between_two_steps_has_not_happened(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_at(name: str) -> None:
        if name == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])
        point = await opened(catalog, 2)
        before = await catalog.totals()
        monkeypatch.setattr(failpoint, "hook", full_at)
        with pytest.raises(CatalogError, match="No space left"):
            await catalog.seal(proven(point), [record(200, markers=("m",))], {"bank": at(300)})
        monkeypatch.setattr(failpoint, "hook", None)
        assert await catalog.totals() == before
        assert await catalog.settled("bank") == at(108)
        assert await catalog.find(marker="m") == []
        assert (await catalog.seal(proven(point), [record(200)], {"bank": at(300)})).commits == 1

    with_catalog(work)
