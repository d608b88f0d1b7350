"""Room is made by the plan, one point after the other, and wherever it ends between, the next pass goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from connectors.memory import SEGMENT_BYTES, MemoryJournal, MemoryStorage, World
from tests.simulation.virtual import VirtualLoop, inline
from tests.trigger.catalog.test_reconcile import HISTORY, NOON, Stage, record
from trigger import failpoint
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.reconcile import reconcile
from trigger.errors import CatalogError, StorageError
from trigger.keep.expire import expire, give_up_before, release_log
from trigger.keep.room import LOOK_SECONDS, Room
from trigger.model import Cause, Extent, Mark, RecoveryPoint, State
from trigger.point_names import point_id
from trigger.position import History, Position
from trigger.service import service

FAR = 1 << 40
POINTS = 20


class Shelves(Stage):
    """A storage that bears `POINTS` snapshots, in a world with a journal."""

    def __init__(self, catalog: Catalog, world: World) -> None:
        super().__init__(catalog, world)
        self.storage = MemoryStorage(world, budget=POINTS)
        self.journal = MemoryJournal(world)
        self.room = Room(catalog, self.storage, self.journal, inline)
        world.journal[HISTORY.branch] = [(0, 1 << 40)]

    async def sealed_at(self, number: int, lsn: int, history: History = HISTORY, volume_at: str = "") -> RecoveryPoint:
        """Seal a point whose redo, floor and ceiling lie at one place, with one commit of its own."""
        end = Position(history, lsn)
        point = await self.catalog.open_point(
            id=point_id(NOON, number), cause=Cause.COMMIT, marks=[Mark(end)], opened_at=NOON
        )
        point = replace(await self.cut(point), marks=(Mark(end, end, end),))
        point = replace(point, snapshots=tuple(replace(kept, path=volume_at) for kept in point.snapshots))
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
        assert await shelves.room.make(FAR) == []

    play(act)


def test_above_it_snapshots_go_down_to_seven_tenths_and_their_commits_stay_on_record() -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(19)(shelves)
        gone = await shelves.room.make(FAR)
        assert len(gone) == 5
        assert all(point.state is State.EXPIRED for point in gone)
        assert (await shelves.storage.space()).snapshots == len(await shelves.numbers()) == 14
        assert {points[0].number, points[-1].number} <= set(await shelves.numbers())
        for point in gone:
            assert [kept.name.number for kept in await shelves.catalog.commits_of(point.number)] == [
                point.floor.at - 48
            ]
        assert not await reconcile(shelves.catalog, shelves.storage)

    play(act)


def test_the_first_point_of_other_volumes_stays_since_none_before_it_holds_what_they_hold() -> None:
    async def act(shelves: Shelves) -> None:
        for number in range(1, POINTS + 1):
            await shelves.sealed_at(number, number * 1000, volume_at="/old" if number < 12 else "/new")
        gone = {point.number for point in await shelves.room.make(FAR)}
        assert gone
        assert 12 not in gone

    play(act)


def test_what_a_clone_hangs_on_stays() -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(20)(shelves)
        for point in points[2:-1]:
            await shelves.storage.clone(point.id, f"of-{point.number}", lambda *_: None)
        assert await shelves.room.make(FAR) != []
        assert await shelves.numbers() == [1, *range(3, 21)]

    play(act)


def test_where_the_restore_objective_allows_no_thinning_only_what_the_storage_cannot_bear_goes() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(20)(shelves)
        assert len(await shelves.room.make(1999)) == 2
        assert (await shelves.storage.space()).snapshots == 18

    async def act_within(shelves: Shelves) -> None:
        await _filled(20)(shelves)
        assert len(await shelves.room.make(2000)) == 6

    play(act_within)

    play(act)


def test_where_the_journal_has_a_hole_the_first_base_behind_it_stays() -> None:
    async def act(shelves: Shelves) -> None:
        shelves.world.journal[1] = [(0, 2 * SEGMENT_BYTES), (3 * SEGMENT_BYTES, 1 << 40)]
        for number in range(1, 21):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await shelves.room.make(0)
        assert 6 in await shelves.numbers(), "nothing leads to it from before 3 segments"
        assert (await shelves.storage.space()).snapshots == 18

    play(act)


HOLE = [(0, 2 * SEGMENT_BYTES), (3 * SEGMENT_BYTES, 10 * SEGMENT_BYTES)]
"""A journal whose third segment is lost; of points half a segment apart, number 6 is the first one behind that."""


class Journal(MemoryJournal):
    """A journal that may not be readable, or may lie in a folder that is not mounted."""

    readable = mounted = True

    async def extents(self) -> list[Extent]:
        if not self.readable:
            raise PermissionError(13, "Permission denied")
        return await super().extents() if self.mounted else []


@pytest.mark.parametrize("how", ["readable", "mounted"])
def test_a_journal_that_cannot_be_looked_at_counts_as_it_was_seen_last_and_points_go_on(how: str) -> None:
    async def act(shelves: Shelves) -> None:
        journal = Journal(shelves.world)
        room = Room(shelves.catalog, shelves.storage, journal, inline)
        shelves.world.journal[1] = HOLE
        for number in range(1, 20):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await room.make(0)
        assert 6 in await shelves.numbers()
        setattr(journal, how, False)
        for number in range(20, 40):  # behind all that was seen
            await asyncio.sleep(LOOK_SECONDS)
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
            assert await room.make(0), "points would end"
        assert 6 in await shelves.numbers(), "nothing leads to it from before the hole"

    play(act)


def test_what_only_log_to_come_would_lead_to_goes_last() -> None:
    async def act(shelves: Shelves) -> None:
        shelves.world.journal[1] = [(0, 5 * SEGMENT_BYTES)]
        for number in range(1, 20):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await shelves.room.make(FAR)
        assert set(range(10, 20)) <= set(await shelves.numbers()), "they lie behind all that the journal holds"

    play(act)


def test_damage_that_was_just_found_counts_inline() -> None:
    async def act(shelves: Shelves) -> None:
        for number in range(1, 20):
            await shelves.sealed_at(number, number * SEGMENT_BYTES // 2)
        await shelves.room.known_log.look()
        shelves.world.journal[1] = HOLE
        shelves.room.known_log.look_again()
        await shelves.room.make(FAR)
        assert 6 in await shelves.numbers()

    play(act)


def test_where_the_clock_was_set_back_the_first_point_by_the_new_one_stays() -> None:
    async def act(shelves: Shelves) -> None:
        points = await _filled(20)(shelves)
        late = shelves.catalog.bases

        async def bases() -> list[RecoveryPoint]:
            return [replace(p, sealed_at=NOON - timedelta(hours=p.number >= 8)) for p in await late()]

        with patch.object(shelves.catalog, "bases", bases):
            await shelves.room.make(FAR)
        assert points[7].number in await shelves.numbers(), "no other base serves the hour that was lived twice"

    play(act)


def test_a_storage_short_of_bytes_lets_a_tenth_go_at_a_time_and_not_the_oldest_or_the_newest() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(10)(shelves)
        shelves.world.free_bytes = 0
        left = []
        while await shelves.room.make(FAR):
            shelves.world.free_bytes += 1
            left.append((await shelves.storage.space()).snapshots)
        assert left == [9, 8, 7, 6, 5, 4, 3, 2]
        assert await shelves.numbers() == [1, 10]

    play(act)


def test_where_a_tenth_gave_nothing_back_the_next_one_waits_longer_and_longer_and_it_is_said() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(10)(shelves)
        shelves.world.free_bytes = 0
        clock, went = asyncio.get_running_loop().time, []
        began = clock()
        while clock() - began < 100:
            if await shelves.room.make(FAR):
                went.append(round(clock() - began))
            else:
                assert "something else fills the storage" in shelves.room.trouble
            await asyncio.sleep(1)
        assert [round(after - before, -1) for before, after in pairwise(went)] == [10, 20, 40]
        assert (shelves.room.lacking, shelves.room.eased) == (True, False)
        shelves.world.free_bytes = 1 << 40
        assert await shelves.room.make(FAR) == []
        assert (shelves.room.lacking, shelves.room.eased, shelves.room.trouble) == (False, True, "")
        shelves.world.free_bytes = 0
        assert len(await shelves.room.make(FAR)) == 1

    play(act)


def test_a_snapshot_that_cannot_be_deleted_keeps_no_other_from_going() -> None:
    class Stuck(MemoryStorage):
        stuck = ""

        async def delete(self, point: str) -> None:
            if point == self.stuck:
                raise StorageError(f"{point} is busy")
            await super().delete(point)

    async def act(shelves: Shelves) -> None:
        storage = Stuck(shelves.world, budget=POINTS)
        room = Room(shelves.catalog, storage, shelves.journal, inline)
        points = await _filled(20)(shelves)
        storage.stuck = points[1].id
        assert len(await room.make(FAR)) == 5
        assert "is busy" in room.trouble
        assert await shelves.numbers(State.EXPIRING) == [2]
        storage.stuck = ""
        assert [point.number for point in await room.make(FAR)] == [2]
        assert room.trouble == ""

    play(act)


def test_what_is_given_up_before_a_point_is_not_given_up_where_thinning_has_taken_that_point() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(20)(shelves)
        async with asyncio.TaskGroup() as tasks:
            thinned = tasks.create_task(shelves.room.make(FAR))
            await asyncio.sleep(0)
            given_up = tasks.create_task(_refused(shelves.room.give_up_before(2)))
        assert 2 in [point.number for point in thinned.result()]
        assert "point 2 is expired" in given_up.result()
        assert 1 in await shelves.numbers()

    play(act)


def test_what_may_go_is_thought_about_apart_from_the_loop_and_not_again_while_nothing_has_changed() -> None:
    """With a hole between each two of hundreds of points it takes a second, and was done every second."""

    async def act(shelves: Shelves) -> None:
        thought = 0

        async def apart(work: Callable[[], list[RecoveryPoint]]) -> list[RecoveryPoint]:
            nonlocal thought
            thought += 1
            return await inline(work)

        room = Room(shelves.catalog, shelves.storage, shelves.journal, apart)
        shelves.world.journal[HISTORY.branch] = [(number * 1000 + 500, number * 1000 + 600) for number in range(40)]
        await _filled(19)(shelves)
        assert await room.make(FAR) == await room.make(FAR) == []
        assert thought == 1
        await shelves.sealed_at(20, 20_000)
        assert await room.make(FAR) == []
        assert thought == 2
        shelves.world.journal[HISTORY.branch] = [(0, 1 << 40)]
        room.known_log.look_again()
        assert await room.make(FAR)
        assert thought == 3

    play(act)


async def _refused(call: Awaitable[object]) -> str:
    with pytest.raises(CatalogError) as raised:
        await call
    return str(raised.value)


def test_while_no_log_was_ever_seen_only_what_was_taken_since_may_go() -> None:
    async def act(shelves: Shelves) -> None:
        shelves.world.journal.clear()
        await _filled(10)(shelves)
        assert await shelves.room.make(FAR) == []
        for number in range(11, 40):
            await shelves.sealed_at(number, number * 1000)
            await shelves.room.make(FAR)
        assert set(range(1, 11)) <= set(await shelves.numbers()), "there may be a hole between them"

    play(act)


def test_thinning_and_giving_up_wait_for_each_other() -> None:
    class Slow(MemoryStorage):
        async def delete(self, point: str) -> None:
            await asyncio.sleep(1)
            await super().delete(point)

    async def act(shelves: Shelves) -> None:
        shelves.storage = Slow(shelves.world, budget=POINTS)
        shelves.room = Room(shelves.catalog, shelves.storage, shelves.journal, inline)
        points = await _filled(20)(shelves)
        async with asyncio.TaskGroup() as tasks:
            thinned = tasks.create_task(shelves.room.make(FAR))
            await asyncio.sleep(0.5)
            first = points[-1]
            given_up = tasks.create_task(shelves.room.give_up_before(first.number))
        assert len(thinned.result()) == 6
        assert len(given_up.result().points) == 13
        assert await shelves.numbers() == [first.number]

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
        assert [point.number for point in await shelves.room.make(FAR)] == [2]
        assert (await shelves.storage.space()).snapshots == 2

    play(act)


def test_the_log_is_let_go_of_below_the_oldest_base_only() -> None:
    async def act(shelves: Shelves) -> None:
        oldest = 3 * SEGMENT_BYTES + 1000
        shelves.world.journal[1] = [(0, 10 * SEGMENT_BYTES)]
        assert await release_log(shelves.catalog, shelves.journal) == 0, "without a base everything is kept"
        await shelves.sealed_at(1, oldest)
        await shelves.sealed_at(2, 7 * SEGMENT_BYTES)
        assert await release_log(shelves.catalog, shelves.journal) == 3
        assert shelves.world.journal[1] == [(3 * SEGMENT_BYTES, 10 * SEGMENT_BYTES)]
        assert await release_log(shelves.catalog, shelves.journal) == 0

    play(act)


def test_while_bases_of_two_timelines_are_kept_the_log_of_each_that_either_needs_is_kept() -> None:
    async def act(shelves: Shelves) -> None:
        fork, end = 5 * SEGMENT_BYTES, 10 * SEGMENT_BYTES
        shelves.world.cluster.forks[2] = ((1, fork),)
        shelves.world.journal.update({1: [(0, end)], 2: [(fork, end)]})
        first = await shelves.sealed_at(1, 3 * SEGMENT_BYTES)
        await shelves.sealed_at(2, 7 * SEGMENT_BYTES, replace(HISTORY, branch=2))
        assert await release_log(shelves.catalog, shelves.journal) == 3
        assert shelves.world.journal == {1: [(3 * SEGMENT_BYTES, end)], 2: [(fork, end)]}
        assert await release_log(shelves.catalog, shelves.journal) == 0
        await expire(shelves.catalog, shelves.storage, first)
        assert await release_log(shelves.catalog, shelves.journal) == 7 + 2
        assert shelves.world.journal == {1: [], 2: [(7 * SEGMENT_BYTES, end)]}

    play(act)


def test_what_is_older_than_a_point_is_given_up_with_the_log_that_only_it_needed() -> None:
    async def act(shelves: Shelves) -> None:
        fill = await _filled(6)(shelves)
        await shelves.storage.clone(fill[1].id, "one", lambda *_: None)
        first, give_up = fill[3].id, shelves.room.give_up_before
        said = await give_up(first, dry_run=True)
        assert (said.points, said.kept) == ((1, 3), (2,))
        assert await shelves.numbers() == [1, 2, 3, 4, 5, 6]
        assert await give_up(first) == said
        assert await shelves.numbers() == [2, 4, 5, 6]
        assert await shelves.numbers(State.EXPIRED) == [1, 3]
        assert fill[0].id not in shelves.world.kept
        await shelves.storage.drop_clone("one")
        assert (await give_up(first)).points == (2,)
        assert (await give_up(first)).points == ()
        assert (await shelves.catalog.find(place=1000 - 48))[0].point == 1

    play(act)


def test_without_a_service_a_dry_run_changes_nothing_not_even_what_a_crash_left() -> None:
    async def act(shelves: Shelves) -> None:
        await _filled(3)(shelves)
        half = await shelves.cut(await shelves.opened(4))
        options: Any = None

        @contextlib.asynccontextmanager
        async def alone(_: object, **_more: object) -> AsyncIterator[object]:
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


def test_nothing_is_given_up_for_a_point_that_is_no_base() -> None:
    async def act(shelves: Shelves) -> None:
        fill = await _filled(3)(shelves)
        gone = await expire(shelves.catalog, shelves.storage, fill[1])
        with pytest.raises(CatalogError, match="point 2 is expired"):
            await give_up_before(gone, shelves.catalog, shelves.storage)
        assert await shelves.numbers() == [1, 3]

    play(act)
