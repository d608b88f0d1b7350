"""What the log says of a time: the commits nearest to it, and where the log that says so begins and ends."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.fixtures.bank import Bank, run
from trigger.errors import RestoreError
from trigger.model import Cause
from trigger.position import Lineage, Position
from trigger.replay import Following
from trigger.restore import log_search
from trigger.restore.locate import locate
from trigger.restore.log_search import Around, around, end_held, following
from trigger.restore.planner import plan
from trigger.restore.target import Named

HOUR = timedelta(hours=1)


async def looked(it: Bank, time: datetime, aside: timedelta, most: int = 100) -> Around:
    lineage = it.world.cluster.lineage()
    return await around(time, aside, most, lineage, it.catalog, it.site.journal)


def test_the_commits_nearest_to_a_time_are_given_with_their_databases_and_how_many_are_left_out(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        commits = [it.commit() for _ in range(9)]
        await it.point()
        middle = commits[4].time
        found = await looked(it, middle, HOUR, most=3)
        assert [one.name for one in found.commits] == [one.name for one in commits[3:6]]
        assert {one.database for one in found.commits} == {"bank"}
        assert found.more == 6
        assert len((await looked(it, middle, HOUR)).commits) == 9

    run(tmp_path, story)


def test_where_the_log_does_not_reach_to_is_told_from_where_nothing_was_committed(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        first, last = it.commit(), it.commit()
        await it.point()
        (whole,) = (found := await looked(it, last.time, HOUR)).read
        assert (whole.first_us, whole.last_us) == (first.time_us, last.time_us)
        assert whole.end.at >= last.end
        assert not found.until_behind
        later = await looked(it, last.time + 3 * HOUR, HOUR)
        assert (later.commits, later.until_behind) == ([], False)
        assert later.read[-1].end == whole.end
        within = await looked(it, first.time, timedelta(microseconds=1))
        assert (len(within.commits), within.until_behind) == (1, True)
        assert not (await looked(it, first.time - 3 * HOUR, HOUR)).from_before

    run(tmp_path, story)


def test_of_a_time_behind_the_last_commit_it_is_said_how_far_the_log_goes(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        first, last = it.commit(), it.commit()
        await it.point()
        end = max(extent.end for extent in await it.site.journal.extents())
        said = f"the log that is kept ends at {last.history.place(end)}"
        for time, told in ((first.time, False), (last.time + HOUR, True)):
            (found,) = await locate(it.catalog, it.site.journal, time=time)
            assert (said in found.reason) == told
            assert (said in (await it.resolve(Named(time=time))).description) == told

    run(tmp_path, story)


def test_the_first_and_the_last_time_that_there_is_can_be_asked_for(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        for time in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
            assert not (await looked(it, time, HOUR)).commits

    run(tmp_path, story)


@pytest.mark.parametrize("seen", [True, False])
def test_behind_a_clock_that_was_ahead_a_time_means_the_same_to_find_a_restore_and_a_look_into_the_log(
    tmp_path: Path, *, seen: bool
) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        it.seconds[0] += 3600
        ahead = it.commit() if seen else it.world.cluster.commit("")
        await it.point(Cause.INTERVAL)
        it.seconds[0] -= 3595
        since = [it.commit(), it.commit()]
        await it.point()
        it.commit()
        await it.point()
        time = since[-1].time + timedelta(milliseconds=1)
        target = await it.resolve(Named(time=time))
        assert target.commit is not None
        assert (target.commit.name, target.later) == (first.name, ahead.start)
        assert f"commit {ahead.name} behind it is stamped {ahead.time.isoformat()}" in target.description
        extents, lineage = await it.site.journal.extents(), await it.site.journal.lineage(target.history)
        assert plan(target, await it.catalog.bases(), extents, lineage, 1.0).base.number == 1
        (found,) = await locate(it.catalog, it.site.journal, time=time)
        assert (found.base, found.record and found.record.name) == (1, first.name)
        assert "the clock was set back" in found.reason
        near = await looked(it, time, timedelta(seconds=1.5))
        assert [one.name for one in near.commits if one.database] == [one.name for one in since]
        assert (await looked(it, ahead.time, timedelta(seconds=2))).commits[0].name == ahead.name

    run(tmp_path, story)


def test_a_clock_that_was_ahead_between_two_points_is_known_by_the_commits_of_then(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = it.commit()
        await it.point()
        it.seconds[0] += 3600
        ahead = it.commit()
        it.seconds[0] -= 3598
        for _ in range(2):
            last = it.commit()
            await it.point()
        target = await it.resolve(Named(time=last.time))
        assert target.commit is not None
        assert (target.commit.name, target.later) == (first.name, ahead.start)
        extents, lineage = await it.site.journal.extents(), await it.site.journal.lineage(target.history)
        assert plan(target, await it.catalog.bases(), extents, lineage, 1.0).base.number == 1
        assert (await looked(it, ahead.time, timedelta(seconds=2))).commits[0].name == ahead.name

    run(tmp_path, story)


def test_what_follows_is_what_the_log_has_next_and_nothing_where_nobody_looked(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        first, unseen, last = it.commit(), it.world.cluster.commit(""), it.commit()
        await it.point()
        history, journal = first.history, it.site.journal

        async def behind(at: int) -> Following | None:
            return await following(at, history, it.catalog, journal)

        found = await behind(first.start + 1)
        assert found is not None
        assert found.commit is not None
        assert (found.commit.name, found.commit.stream) == (unseen.name, "")
        end = max(extent.end for extent in await journal.extents())
        assert await behind(last.start + 1) == Following(last.start + 1, None, end)
        assert await behind(end + 1) is None

    run(tmp_path, story)


def test_where_the_log_cannot_be_read_the_catalog_says_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        first, last = it.commit(), it.commit()
        await it.point()
        monkeypatch.setattr(log_search, "FOLLOWING_SECONDS", 0.0)
        found = await following(first.start + 1, first.history, it.catalog, it.site.journal)
        assert found is not None
        assert found.commit is not None
        assert (found.commit.name, found.commit.stream) == (last.name, "bank")
        assert await following(last.start + 1, last.history, it.catalog, it.site.journal) is None

    run(tmp_path, story)


def test_of_a_name_that_is_nowhere_it_is_said_that_it_may_lie_behind_the_end_of_the_log(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        last = it.commit()
        await it.point()
        (whole,) = await it.site.journal.extents()
        newer = last.name._replace(number=50_000)
        said = f"or lies behind {last.history.place(last.start)}, where the log that is kept ends"
        with patch.object(it.site.journal, "extents", return_value=[replace(whole, end=last.start)]):
            (found,) = await locate(it.catalog, it.site.journal, name=newer)
            assert said in found.reason
            with pytest.raises(RestoreError, match="in neither the catalog nor the log") as refused:
                await it.resolve(Named(name=newer))
            assert said in refused.value.hint
        gone_on = Lineage(replace(last.history, branch=2), ((1, last.start),))  # of which no log is kept yet
        assert await end_held(gone_on, it.site.journal) == Position(last.history, last.start)

    run(tmp_path, story)
