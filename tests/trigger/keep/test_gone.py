"""A point whose snapshot is gone is no base: nothing goes on its account, and its log stays while it may be back."""

from __future__ import annotations

from itertools import pairwise

import pytest

from connectors.memory import SEGMENT_BYTES
from tests.trigger.keep.test_expire import POINTS, Shelves, play
from trigger.errors import CatalogError, StorageError
from trigger.keep.expire import give_up_before, release_log


def test_no_snapshot_is_thinned_whose_commits_only_one_that_is_gone_could_bring_back_in_time() -> None:
    async def act(shelves: Shelves) -> None:
        points = [await shelves.sealed_at(number, number * 1000) for number in range(1, POINTS + 1)]
        lost = points[2]
        away = shelves.world.kept.pop(lost.id)
        gone = {point.number for point in await shelves.room.make(2000)}
        there = [point.number for point in points if point != lost and point.number not in gone]
        assert gone
        assert lost.number not in gone, "it may come back"
        assert max(after - before for before, after in pairwise(there)) == 2, "as far apart as the objective allows"
        shelves.world.kept[lost.id] = away

    play(act)


def test_nothing_is_thinned_while_the_storage_shows_none_of_the_points() -> None:
    async def act(shelves: Shelves) -> None:
        for number in range(1, POINTS + 1):
            await shelves.sealed_at(number, number * 1000)
        shelves.world.kept.clear()
        shelves.world.free_bytes = 0  # of what lies beneath
        with pytest.raises(StorageError, match="shows no snapshot at all"):
            await shelves.room.make(2000)
        assert len(await shelves.numbers()) == POINTS

    play(act)


def test_nothing_is_thinned_or_given_up_where_each_point_lacks_a_part() -> None:
    async def act(shelves: Shelves) -> None:
        points = [await shelves.sealed_at(number, number * 1000) for number in range(1, POINTS + 1)]
        for kept in shelves.world.kept.values():
            kept.cuts.clear()
        shelves.world.free_bytes = 0
        assert await shelves.room.make(2000) == []
        with pytest.raises(CatalogError, match="its snapshot is gone from the storage"):
            await give_up_before(points[-1], shelves.catalog, shelves.storage)
        assert len(await shelves.numbers()) == POINTS

    play(act)


def test_what_is_older_than_a_point_that_is_gone_is_not_given_up_for_it() -> None:
    async def act(shelves: Shelves) -> None:
        first, second, third = [await shelves.sealed_at(number, number * SEGMENT_BYTES) for number in (2, 4, 6)]
        away = shelves.world.kept.pop(second.id)
        for dry_run in (True, False):
            with pytest.raises(CatalogError, match="its snapshot is gone from the storage"):
                await give_up_before(second, shelves.catalog, shelves.storage, dry_run=dry_run)
        assert len(await shelves.numbers()) == 3
        given_up = await give_up_before(third, shelves.catalog, shelves.storage, dry_run=True)
        assert given_up.points == (first.number, second.number)
        shelves.world.kept[second.id] = away
        assert (await give_up_before(second, shelves.catalog, shelves.storage)).points == (first.number,)

    play(act)


def test_the_log_of_a_point_that_is_gone_stays_while_it_may_be_back() -> None:
    async def act(shelves: Shelves) -> None:
        first, _ = [await shelves.sealed_at(number, number * SEGMENT_BYTES) for number in (2, 6)]
        del shelves.world.kept[first.id]
        await release_log(shelves.catalog, shelves.journal)
        assert shelves.world.journal[1][0][0] == 2 * SEGMENT_BYTES

    play(act)
