"""Which sealed points the storage does not show: seen in turns, said while it is so, never of one that is unmounted."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from connectors.memory import Kept
from tests.trigger.catalog.test_reconcile import Stage, play
from trigger.catalog import presence
from trigger.errors import StorageError
from trigger.model import RecoveryPoint, Severity, State


def test_a_snapshot_that_went_is_seen_within_a_turn_and_no_more_once_it_is_back() -> None:
    async def act(stage: Stage) -> None:
        watch = presence.Watch()
        points = [await stage.sealed(number) for number in range(1, 8)]
        await watch.look(stage.catalog, stage.storage)
        assert (watch.trouble, set(watch.gone)) == ("", set())
        away = {point.id: stage.world.kept.pop(point.id) for point in (points[1], points[5])}
        with patch.object(presence, "AT_ONCE", 3):
            seen = [await looked(watch, stage) for _ in range(3)]
            assert seen == [{6}, {2, 6}, {2, 6}], "so many at a time, the newest first"
            assert watch.trouble.startswith("of points 2, 6 a snapshot is gone from the storage; put back")
            stage.world.kept |= away
            assert [await looked(watch, stage) for _ in range(3)] == [{2}, set(), set()]
        assert watch.trouble == ""

    play(act)


async def looked(watch: presence.Watch, stage: Stage) -> set[int]:
    await watch.look(stage.catalog, stage.storage)
    return set(watch.gone)


def test_what_is_removed_on_purpose_or_given_up_is_not_missed() -> None:
    async def act(stage: Stage) -> None:
        watch = presence.Watch()
        going, lost, last = [await stage.sealed(number) for number in (1, 2, 3)]
        for point in (going, lost):
            del stage.world.kept[point.id]
        await stage.catalog.change(going, State.EXPIRING)
        assert await looked(watch, stage) == {lost.number}
        await stage.reconcile()
        assert await stage.state(lost) is State.FAILED
        assert await looked(watch, stage) == set()
        assert await presence.is_gone(lost, stage.catalog, stage.storage)
        assert not await presence.is_gone(last, stage.catalog, stage.storage)

    play(act)


@pytest.mark.parametrize("points", [1, 3])
def test_of_a_storage_that_shows_nothing_nobody_is_told_that_points_are_gone(points: int) -> None:
    async def act(stage: Stage) -> None:
        watch = presence.Watch()
        made = [await stage.sealed(number + 1) for number in range(points)]
        kept = dict(stage.world.kept)
        stage.world.kept.clear()
        for looking in (watch.look(stage.catalog, stage.storage), presence.away(made, stage.catalog, stage.storage)):
            with pytest.raises(StorageError, match="shows no snapshot at all") as refused:
                await looking
            assert "mount the storage's filesystem" in refused.value.hint
        assert watch.trouble == ""
        stage.world.kept |= kept
        assert await looked(watch, stage) == set()
        assert await presence.away(made, stage.catalog, stage.storage) == set()

    play(act)


def test_a_storage_that_shows_a_part_of_each_point_does_not_show_nothing() -> None:
    async def act(stage: Stage) -> None:
        made = [await stage.sealed(number) for number in (1, 2)]
        for point in made:
            del stage.world.kept[point.id].cuts["data"]
        assert await presence.away(made, stage.catalog, stage.storage) == {point.id for point in made}
        found = await presence.look(stage.catalog, stage.storage)
        assert found is not None
        assert found.message == "of points 1, 2 a snapshot is gone from the storage", "the check says the same"

    play(act)


def test_the_check_names_the_points_that_failed_as_gone_and_lie_in_the_storage_again() -> None:
    async def act(stage: Stage) -> None:
        lost, other, _ = [await stage.sealed(number) for number in (1, 2, 3)]
        away = {point.id: stage.world.kept.pop(point.id) for point in (lost, other)}
        await stage.reconcile()
        assert await presence.look_back(stage.catalog, stage.storage) is None
        stage.world.kept |= {lost.id: away[lost.id], other.id: Kept(("data",))}
        found = await presence.look_back(stage.catalog, stage.storage)
        assert found is not None
        assert (found.severity, found.subject) == (Severity.WARNING, "storage")
        assert found.message == "point 1 failed as gone, and lies in the storage again", "of the other one a part"
        assert "trigpoint reconcile" in found.remedy
        await stage.reconcile()
        assert await presence.look_back(stage.catalog, stage.storage) is None

    play(act)


def test_the_check_names_the_points_whose_snapshots_are_gone_and_not_all_of_very_many() -> None:
    async def act(stage: Stage) -> None:
        points: list[RecoveryPoint] = [await stage.sealed(number) for number in range(1, 10)]
        assert await presence.look(stage.catalog, stage.storage) is None
        stage.world.kept[points[0].id] = Kept(("data",))  # a part of it is there
        found = await presence.look(stage.catalog, stage.storage)
        assert found is not None
        assert (found.severity, found.subject) == (Severity.WARNING, "storage")
        assert found.message == "of point 1 a snapshot is gone from the storage"
        for point in points[1:8]:
            del stage.world.kept[point.id]
        found = await presence.look(stage.catalog, stage.storage)
        assert found is not None
        assert found.message == "of points 1, 2, 3, 4, 5 and 3 more a snapshot is gone from the storage"

    play(act)
