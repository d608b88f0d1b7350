"""Which point holds a transaction: point, interval, or gap; and what is not known is said to be so."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.fixtures.bank import Bank, run
from trigger.catalog.point_index import Missed
from trigger.errors import PositionError, RestoreError
from trigger.model import Extent, Gap, Logged, Outcome
from trigger.position import Name, Position
from trigger.protect.window import record
from trigger.restore.locate import Location, Where, locate
from trigger.restore.obstacles import left_out
from trigger.restore.restore import prepare
from trigger.restore.target import Named, resolve


async def only(it: Bank, **named: Any) -> Location:
    (found,) = await locate(it.catalog, it.site.journal, **named)
    return found


def test_the_commit_a_point_was_taken_for_is_in_that_point(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        commit = it.commit("payday")
        point = await it.point()
        for named in ({"name": commit.name}, {"place": str(commit.start)}, {"marker": "payday"}, {"time": commit.time}):
            found = await only(it, **named)
            assert (found.where, found.point, found.after) == (Where.POINT, point.number, point.number - 1)

    run(tmp_path, story)


def test_a_coalesced_commit_lies_between_two_points(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        first = await it.point()
        commit = it.commit()
        it.commit()
        second = await it.point()
        found = await only(it, name=commit.name)
        assert (found.where, found.after, found.point) == (Where.INTERVAL, first.number, second.number)

    run(tmp_path, story)


def test_nothing_is_promised_of_a_snapshot_that_is_gone(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        first = await it.point()
        it.commit()
        second = await it.point()
        commit = it.commit()
        third = await it.point()
        for point in (second, third):
            it.world.kept.pop(point.id)
        found = await only(it, name=commit.name, storage=it.site.storage)
        assert (found.where, found.base, found.after) == (Where.POINT, first.number, first.number)
        assert (found.point, found.snapshot) == (third.number, None)
        it.world.kept.clear()
        found = await only(it, name=commit.name, storage=it.site.storage)
        assert (found.base, found.snapshot) == (None, None)
        assert "cannot be restored: the storage shows no snapshot at all" in found.reason

    run(tmp_path, story)


def test_a_missed_commit_is_in_a_gap_with_its_reason(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        lost = it.commit()
        it.pending.clear()
        gap = Gap("bank", first.position, lost.position, "the slot was dropped", it.site.clock.now())
        await it.catalog.record_gaps(gap)
        await it.catalog.record_gaps(missed=[Missed([record(lost, Outcome.MISSED)], "slot lost", lost.history)])
        later = it.commit()
        await it.point()
        found = await only(it, name=lost.name)
        assert (found.where, found.point, found.after) == (Where.GAP, None, 1)
        assert found.gap == gap
        assert "slot lost" in found.reason
        place = await only(it, place=str(lost.start - 1))
        assert (place.where, place.record) == (Where.GAP, None)
        assert (await only(it, name=later.name)).where is Where.POINT

    run(tmp_path, story)


def test_a_gap_that_began_on_a_timeline_that_was_left_is_found_on_the_one_that_went_on(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        left_behind = it.commit()
        it.world.cluster.promote(first.end)
        unseen = it.world.cluster.commit("bank")
        until = it.world.cluster.lineage().at(it.world.cluster.inserted)
        gap = Gap("bank", left_behind.position, until, "the timeline changed", it.site.clock.now())
        await it.catalog.record_gaps(gap)
        it.pending.clear()
        it.commit()
        await it.point()
        found = await only(it, place=str(unseen.start))
        assert (found.where, found.gap, found.after) == (Where.GAP, gap, 1)

    run(tmp_path, story)


def test_a_place_before_the_end_of_a_gap_that_comes_from_another_life_lies_in_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        copy = it.world.cluster.copy()
        first = it.commit()
        await it.point()
        it.pending.clear()
        it.world.cluster.put_back(copy)
        unseen = it.world.cluster.commit("bank")
        until = await it.database.record_end()
        assert until.history.incarnation == 1
        gap = Gap("bank", first.position, until, "another log", it.site.clock.now())
        await it.catalog.record_gaps(gap)
        await it.point()
        found = await only(it, place=str(unseen.start))
        assert (found.where, found.gap) == (Where.GAP, gap)

    run(tmp_path, story)


def test_a_gap_that_left_a_history_ends_there_where_a_later_one_comes_back_into_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        cluster = it.world.cluster
        before = cluster.commit("")
        first = it.commit()
        await it.point()
        copy = cluster.copy()
        cluster.promote()
        left = Gap("bank", first.position, await it.database.record_end(), "restored", it.site.clock.now())
        await it.catalog.record_gaps(left)
        shown = cluster.commit("")
        newer = it.commit()
        await it.point()
        behind = cluster.commit("")
        it.commit()
        await it.point()
        cluster.put_back(copy)
        cluster.next_xid += 100
        between = cluster.commit("")
        again = await it.database.record_end()
        assert again.history == first.history
        back = Gap("bank", newer.position, again, "undone", it.site.clock.now())
        await it.catalog.record_gaps(back)
        it.pending.clear()
        since = it.commit()
        await it.point()
        later = cluster.commit("")
        last = it.commit()
        await it.point()
        told = {one.name: await only(it, name=one.name) for one in (before, shown, behind, between, later)}
        held = {name: (found.where, found.gap) for name, found in told.items()}
        assert held[later.name] == held[before.name] == held[shown.name] == (Where.LOG, None)
        assert held[between.name] == (Where.GAP, left)
        assert held[behind.name] == (Where.GAP, back)
        for time, commit in ((since.time, since), (last.time + timedelta(hours=1), last)):
            found = await only(it, time=time)
            assert (found.where, found.record and found.record.name) == (Where.POINT, commit.name)

    run(tmp_path, story)


def test_a_place_without_a_commit_is_told_by_the_points_around_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        second = it.commit()
        await it.point()
        between = await only(it, place=str(second.start - 4))
        assert (between.where, between.after, between.point) == (Where.INTERVAL, 1, 2)
        newer = await only(it, place=str(second.end + 4))
        assert (newer.where, newer.point) == (Where.UNKNOWN, None)
        assert "newer than the newest point" in newer.reason
        older = await only(it, place=str(first.start - 4))
        assert (older.where, older.after) == (Where.UNKNOWN, None)

    run(tmp_path, story)


def test_a_time_names_the_last_commit_by_then(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        commit = it.commit()
        await it.point()
        found = await only(it, time=commit.time + timedelta(milliseconds=300))
        assert (found.where, found.point) == (Where.POINT, 1)
        assert f"the last qualifying commit by then is {commit.name}" in found.reason
        assert (await only(it, time=commit.time - timedelta(hours=1))).where is Where.UNKNOWN

    run(tmp_path, story)


def test_what_the_catalog_does_not_know_is_said_to_be_unknown(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        assert "no sealed recovery point yet" in (await only(it, name=Name("", 1))).reason
        it.commit()
        await it.point()
        found = await only(it, name=Name("", 1))
        assert (found.where, found.point) == (Where.UNKNOWN, None)
        assert "was not committed" in found.reason
        with pytest.raises(RestoreError, match="exactly one"):
            await locate(it.catalog, it.site.journal)

    run(tmp_path, story)


def test_a_commit_that_no_stream_showed_is_found_in_the_log_with_the_way_back(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        first = await it.point()
        unseen = it.world.cluster.commit("")
        it.commit()
        await it.point()
        found = await only(it, name=unseen.name)
        assert (found.where, found.base, found.point) == (Where.LOG, first.number, None)
        target = await it.resolve(Named(before=unseen.name))
        assert (target.at, target.inclusive) == (unseen.start, False)
        nowhere = await only(it, name=Name("", 999_999))
        assert nowhere.where is Where.UNKNOWN
        assert "neither the catalog nor the log" in nowhere.reason

    run(tmp_path, story)


def test_a_name_that_the_log_alone_knows_of_a_commit_gives_what_the_catalog_knows_of_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        saved, whole = it.commit("payday"), it.site.journal.commits
        await it.point()
        savepoint = Name("", 50_000)

        async def with_savepoint(*stretch: Any) -> AsyncGenerator[Logged, None]:
            async for one in whole(*stretch):
                yield one._replace(children=(savepoint,)) if one.name == saved.name else one

        by_itself = await only(it, name=saved.name)
        with patch.object(it.site.journal, "commits", with_savepoint):
            assert await only(it, name=savepoint) == by_itself
            assert (by_itself.where, by_itself.point) == (Where.POINT, 2)
            for named in (Named(name=savepoint), Named(before=savepoint)):
                assert f"commit {saved.name} of bank" in (await it.resolve(named)).description
            it.world.cluster.promote(saved.start)
            it.commit()
            await it.point()
            left = await only(it, name=savepoint)
            assert (left.where, left.point, left.aside) == (Where.POINT, 2, "--timeline 1")

    run(tmp_path, story)


def test_a_commit_of_the_life_before_is_named_by_its_history_before_the_first_point_of_the_new_one(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        commit = it.commit()
        await it.point()
        assert (await only(it, name=commit.name)).aside == ""
        again = Position(replace(commit.history, incarnation=1), commit.start)
        await it.catalog.record_gaps(Gap("bank", commit.position, again, "an older copy", it.site.clock.now()))
        assert (await only(it, name=commit.name)).aside == f"--history {commit.history}"

    run(tmp_path, story)


def test_a_commit_that_the_journal_never_got_of_a_life_that_was_left_is_not_called_restorable_later(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        commit = it.commit()
        it.commit()
        await it.point()
        target = await it.resolve(Named(name=commit.name))
        with patch.object(it.site.journal, "extents", nothing):
            assert "not yet restorable" in (await only(it, name=commit.name)).reason
            again = Position(replace(commit.history, incarnation=1), commit.start)
            await it.catalog.record_gaps(Gap("bank", commit.position, again, "an older copy", it.site.clock.now()))
            assert "it cannot be restored: " in (await only(it, name=commit.name)).reason
            with pytest.raises(RestoreError, match="has gone on in another history") as refused:
                await prepare(target, it.site)
        assert not refused.value.retryable

    run(tmp_path, story)


async def nothing() -> list[Extent]:
    return []


def test_a_history_that_nobody_knows_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        point = await it.point()
        system = point.floor.history.system
        for unknown in ("7", f"{system}/1+9", "elsewhere/1"):
            with pytest.raises(RestoreError, match="nothing is known of the history") as refused:
                await it.resolve(Named(latest=True, history=unknown))
            assert refused.value.hint == f"there are: {point.floor.history}"
        for misspelt in ("01", f"{system}/01", f"{system}/1+0", f"{system}/1+01"):
            with pytest.raises(PositionError, match="not a history"):
                await it.resolve(Named(latest=True, history=misspelt))

    run(tmp_path, story)


def test_a_time_before_a_life_began_is_told_with_the_histories_of_the_lives_before(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        copy = it.world.cluster.copy()
        first = it.commit()
        await it.point()
        it.world.cluster.put_back(copy)
        it.seconds[0] += 100
        await it.database.record_end()
        await it.point()
        found = await only(it, time=first.time + timedelta(seconds=1))
        assert found.where is Where.UNKNOWN
        assert f"--history {first.history}" in found.reason

    run(tmp_path, story)


def test_a_time_behind_a_gap_and_a_hole_is_told_so_as_a_restore_would_refuse_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        last = it.commit()
        await it.point()
        lost = [it.world.cluster.commit("bank") for _ in range(3)]
        it.pending.clear()
        until = it.world.cluster.lineage().at(it.world.cluster.inserted)
        (whole,) = await it.site.journal.extents()
        held = [replace(whole, end=last.end), Extent(whole.history, lost[-1].end, lost[-1].end + 64)]
        after = it.site.clock.now() + timedelta(seconds=5)
        with patch.object(it.site.journal, "extents", return_value=held):
            found = await only(it, time=after)
            assert (found.where, found.point) == (Where.POINT, 2)
            assert "of the state of that time: it cannot be restored: the log between" in found.reason
            target = await resolve(Named(time=after), it.catalog, it.site.journal)
            with pytest.raises(RestoreError, match=r"the log between .* is missing"):
                await prepare(target, it.site)
            gap = Gap("bank", last.position, until, "the slot was dropped", it.site.clock.now())
            await it.catalog.record_gaps(gap)
            found = await only(it, time=after)
            assert (found.where, found.gap, found.record, found.base) == (Where.GAP, gap, None, None)
            assert "it lies in a gap" in found.reason
            assert "the log between" in found.reason
            between = await only(it, time=first.time)
            assert (between.where, between.gap) == (Where.POINT, None)

    run(tmp_path, story)


def test_what_the_snapshots_of_a_base_do_not_hold_is_no_promise(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        before = it.commit()
        await it.point()
        commit = it.commit()
        point = await it.point()
        it.world.outside.add((point.id, "pg_tblspc/16400"))
        whole = partial(left_out, recovery=it.site.recovery, volumes=it.site.volumes)
        target = await it.resolve(Named(point=point.id))
        with pytest.raises(RestoreError, match="pg_tblspc/16400 lies outside"):
            await prepare(target, it.site)
        found = await only(it, name=commit.name, left_out=whole)
        assert (found.where, found.base) == (Where.POINT, None)
        assert "it cannot be restored: pg_tblspc/16400 lies outside" in found.reason
        assert (await only(it, name=before.name, left_out=whole)).base is not None

    run(tmp_path, story)
