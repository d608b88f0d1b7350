"""Room is made by the plan, one point after the other, and wherever it ends between, the next pass goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from connectors.memory import SEGMENT_BYTES, MemoryJournal, MemoryStorage, World
from tests.simulation.virtual import VirtualLoop
from tests.unit.test_reconcile import HISTORY, NOON, Stage, inline, record
from trigger import failpoint, service, tag
from trigger.catalog import Catalog
from trigger.errors import CatalogError, StorageError
from trigger.expire import LOOK_SECONDS, KnownLog, expire, give_up_before, make_room, release_log
from trigger.model import Cause, RecoveryPoint, State, point_id
from trigger.ports import Extent
from trigger.position import History, Lsn, Position
from trigger.reconcile import reconcile

FAR = 1 << 40
POINTS = 20


class Shelves(Stage):
    """A storage that bears `POINTS` snapshots, in a world with a journal."""

    def __init__(self, catalog: Catalog, world: World) -> None:
        super().__init__(catalog, world)
        self.storage = MemoryStorage(world, budget=POINTS)
        self.journal = MemoryJournal(world)
        self.known = KnownLog(self.journal, SEGMENT_BYTES)
        world.journal[HISTORY.timeline] = [(Lsn(0), Lsn(1 << 40))]

    async def sealed_at(self, number: int, lsn: int, history: History = HISTORY) -> RecoveryPoint:
        """Seal a point whose redo, floor and ceiling lie at one place, with one commit of its own."""
        end = Position(history, Lsn(lsn))
        point = await self.catalog.open_point(id=point_id(NOON, number), cause=Cause.COMMIT, floor=end, opened_at=NOON)
        point = replace(await self.cut(point), ceiling=end, redo=end)
        records = [record(lsn - 48)]
        await self.storage.retag(point.id, tag.encode(point, records))
        return await self.catalog.seal(point, records, {"bank": end})

    async def numbers(self, state: State = State.SEALED) -> list[int]:
        return [point.number for point in await self.catalog.points(states={state}, newest_first=False)]


def play(act: Callable[[Shelves], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await act(Shelves(await Catalog.open(":memory:", run=inline), World()))

    VirtualLoop().run(main())


def _filled(count: int) -> Callable[[Shelves], Awaitable[list[RecoveryPoint]]]:
    async def fill(shelves: Shelves) -> list[RecoveryPoint]:
        return [await shelves.sealed_at(number, number * 1000) for number in range(1, count + 1)]

    return fill


def test_below_nine_tenths_of_the_budget_nothing_goes() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(18)(shelves)
        assert await make_room(shelves.catalog, shelves.storage, shelves.known, FAR) == []

    play(act)


def test_above_it_snapshots_go_down_to_seven_tenths_and_their_commits_stay_on_record() -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(19)(shelves)
        gone = await make_room(shelves.catalog, shelves.storage, shelves.known, FAR)
        assert len(gone) == 5
        assert all(point.state is State.EXPIRED for point in gone)
        assert (await shelves.storage.space()).snapshots == len(await shelves.numbers()) == 14
        assert {points[0].number, points[-1].number} <= set(await shelves.numbers())
        for point in gone:
            assert [kept.xid for kept in await shelves.catalog.commits_of(point.number)] == [point.floor.at - 48]
        assert not await reconcile(shelves.catalog, shelves.storage)

    play(act)


def test_what_a_clone_hangs_on_stays() -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(20)(shelves)
        for point in points[2:-1]:
            await shelves.storage.clone(point.id, f"of-{point.number}", lambda *_: None)
        assert await make_room(shelves.catalog, shelves.storage, shelves.known, FAR) != []
        assert await shelves.numbers() == [1, *range(3, 21)]

    play(act)


def test_where_the_restore_objective_allows_no_thinning_only_what_the_storage_cannot_bear_goes() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(20)(shelves)
        assert len(await make_room(shelves.catalog, shelves.storage, shelves.known, 1999)) == 2
        assert (await shelves.storage.space()).snapshots == 18

    async def act_within(shelves: Shelves) -> None:
        await _filled(20)(shelves)
        assert len(await make_room(shelves.catalog, shelves.storage, shelves.known, 2000)) == 6

    play(act_within)

    play(act)


def test_where_the_journal_has_a_hole_the_first_base_behind_it_stays() -> None:
    async def act(shelves: Shelves) -> None:
        shelves.world.journal[1] = [(Lsn(0), Lsn(2 * SEGMENT_BYTES)), (Lsn(3 * SEGMENT_BYTES), Lsn(1 << 40))]
        for number in range(1, 21):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await make_room(shelves.catalog, shelves.storage, shelves.known, 0)
        assert 6 in await shelves.numbers(), "nothing leads to it from before 3 segments"
        assert (await shelves.storage.space()).snapshots == 18

    play(act)


def test_a_journal_that_cannot_be_looked_at_counts_as_it_was_seen_last() -> None:
    class Unreadable(MemoryJournal):
        readable = True

        async def extents(self) -> list[Extent]:
            if not self.readable:
                raise PermissionError(13, "Permission denied")
            return await super().extents()

    async def act(shelves: Shelves) -> None:
        journal = Unreadable(shelves.world)
        known = KnownLog(journal, SEGMENT_BYTES)
        shelves.world.journal[1] = [(Lsn(0), Lsn(2 * SEGMENT_BYTES)), (Lsn(3 * SEGMENT_BYTES), Lsn(1 << 40))]
        for number in range(1, 20):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await make_room(shelves.catalog, shelves.storage, known, 0)
        assert 6 in await shelves.numbers()
        journal.readable = False
        await asyncio.sleep(LOOK_SECONDS)
        for number in range(20, 40):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
            assert await make_room(shelves.catalog, shelves.storage, known, 0), "points would end"
        assert 6 in await shelves.numbers(), "nothing leads to it from before the hole"

    play(act)


def test_a_storage_short_of_bytes_lets_a_tenth_go_at_a_time_and_not_the_oldest_or_the_newest() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(10)(shelves)
        shelves.world.free_bytes = 0
        arguments = (shelves.catalog, shelves.storage, shelves.known, FAR)
        left = []
        while await make_room(*arguments):
            left.append((await shelves.storage.space()).snapshots)
        assert left == [9, 8, 7, 6, 5, 4, 3, 2]
        assert await shelves.numbers() == [1, 10]

    play(act)


@pytest.fixture
def die_at() -> Iterator[Callable[[str], None]]:
    """Let the process end at a failpoint, as far as a coroutine can."""

    def die(where: str) -> None:
        def hook(name: str) -> None:
            if name == where:
                raise KeyboardInterrupt

        failpoint.hook = hook

    yield die
    failpoint.hook = None


@pytest.mark.parametrize("where", ["after-expiring", "after-delete"])
def test_an_end_between_two_steps_is_made_good_by_the_next_reconcile(where: str, die_at: Callable[[str], None]) -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(3)(shelves)
        die_at(where)
        with pytest.raises(KeyboardInterrupt):
            await expire(shelves.catalog, shelves.storage, points[1])
        assert await shelves.numbers(State.EXPIRING) == [2]
        done = await reconcile(shelves.catalog, shelves.storage)
        assert done.expired == [points[1].id]
        assert await shelves.numbers() == [1, 3]
        assert {found.point for found in await shelves.storage.tagged()} == {points[0].id, points[2].id}

    play(act)


def test_what_the_storage_would_not_delete_is_no_base_any_more_and_goes_with_the_next_pass() -> None:
    class Stuck(MemoryStorage):
        async def delete(self, point: str) -> None:
            raise StorageError(f"{point} is busy")

    async def act(shelves: Shelves) -> None:
        points = await _filled(3)(shelves)
        with pytest.raises(StorageError, match="is busy"):
            await expire(shelves.catalog, Stuck(shelves.world), points[1])
        assert await shelves.numbers(State.EXPIRING) == [2]
        assert await shelves.numbers() == [1, 3], "nobody plans a restore from it"
        assert [point.number for point in await make_room(shelves.catalog, shelves.storage, shelves.known, FAR)] == [2]
        assert (await shelves.storage.space()).snapshots == 2

    play(act)


def test_the_log_is_let_go_of_below_the_oldest_base_only() -> None:
    async def act(shelves: Shelves) -> None:
        oldest = 3 * SEGMENT_BYTES + 1000
        shelves.world.journal[1] = [(Lsn(0), Lsn(10 * SEGMENT_BYTES))]
        assert await release_log(shelves.catalog, shelves.journal) == 0, "without a base everything is kept"
        await shelves.sealed_at(1, oldest)
        await shelves.sealed_at(2, 7 * SEGMENT_BYTES)
        assert await release_log(shelves.catalog, shelves.journal) == 3
        assert shelves.world.journal[1] == [(3 * SEGMENT_BYTES, 10 * SEGMENT_BYTES)]
        assert await release_log(shelves.catalog, shelves.journal) == 0

    play(act)


def test_while_bases_of_two_timelines_are_kept_no_log_is_let_go_of() -> None:
    async def act(shelves: Shelves) -> None:
        shelves.world.journal[1] = [(Lsn(0), Lsn(10 * SEGMENT_BYTES))]
        await shelves.sealed_at(1, 3 * SEGMENT_BYTES)
        await shelves.sealed_at(2, 7 * SEGMENT_BYTES, replace(HISTORY, timeline=2))
        assert await release_log(shelves.catalog, shelves.journal) == 0

    play(act)


def test_what_is_older_than_a_point_is_given_up_with_the_log_that_only_it_needed() -> None:
    async def act(shelves: Shelves) -> None:
        fill = await _filled(6)(shelves)
        await shelves.storage.clone(fill[1].id, "one", lambda *_: None)
        arguments = (fill[3], shelves.catalog, shelves.storage, shelves.journal)
        said = await give_up_before(*arguments, dry_run=True)
        assert (said.points, said.kept) == ((1, 3), (2,))
        assert await shelves.numbers() == [1, 2, 3, 4, 5, 6]
        assert await give_up_before(*arguments) == said
        assert await shelves.numbers() == [2, 4, 5, 6]
        assert await shelves.numbers(State.EXPIRED) == [1, 3]
        assert fill[0].id not in shelves.world.kept
        await shelves.storage.drop_clone("one")
        assert (await give_up_before(*arguments)).points == (2,)
        assert (await give_up_before(*arguments)).points == ()
        assert (await shelves.catalog.find(lsn=Lsn(1000 - 48)))[0].point == 1

    play(act)


def test_without_a_service_a_dry_run_changes_nothing_not_even_what_a_crash_left() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(3)(shelves)
        half = await shelves.cut(await shelves.opened(4))
        options: Any = None

        @contextlib.asynccontextmanager
        async def alone(_: object) -> AsyncIterator[object]:
            yield SimpleNamespace(catalog=shelves.catalog, storage=shelves.storage, journal=shelves.journal)

        with patch.object(service, "alone", alone):
            said = await service.answer_alone(options, {"do": "expire", "before": 3, "dry_run": True})
            assert said["expired"]["points"] == [1, 2]
            assert await shelves.numbers() == [1, 2, 3]
            assert await shelves.numbers(State.OPEN) == [4]
            assert half.id in shelves.world.kept
            assert shelves.world.claimed_by is None
            assert await service.answer_alone(options, {"do": "expire", "before": 3}) == said
        assert await shelves.numbers() == [3]
        assert await shelves.numbers(State.FAILED) == [4]
        assert half.id not in shelves.world.kept

    play(act)


def test_a_note_is_cut_alike_with_and_without_a_service() -> None:
    notes: list[str] = []

    async def noted(_: object, note: str) -> str:
        notes.append(note)
        return note

    async def act(_: Shelves) -> None:
        @contextlib.asynccontextmanager
        async def alone(_: object) -> AsyncIterator[object]:
            yield None

        options: Any = None
        running: Any = SimpleNamespace(point=lambda note: noted(None, note))
        request = {"do": "point", "note": "x" * 2000}
        with patch.object(service, "alone", alone), patch.object(service, "_take_one", noted):
            await service.answer_alone(options, request)
        await service.Service.answer(running, request)

    play(act)
    assert notes == ["x" * service.NOTE_CHARACTERS] * 2


def test_nothing_is_given_up_for_a_point_that_is_no_base() -> None:
    async def act(shelves: Shelves) -> None:
        fill = await _filled(3)(shelves)
        gone = await expire(shelves.catalog, shelves.storage, fill[1])
        with pytest.raises(CatalogError, match="point 2 is expired"):
            await give_up_before(gone, shelves.catalog, shelves.storage, shelves.journal)
        assert await shelves.numbers() == [1, 3]

    play(act)
