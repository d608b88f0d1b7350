"""What histories other than the present one have: found by name, listed around a time, and named where it may be."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.fixtures.bank import Bank, quiet, run
from trigger.cli import log, points
from trigger.errors import JournalError, RestoreError
from trigger.model import Commit, Logged, State
from trigger.position import History, Lineage, Name
from trigger.restore import log_search
from trigger.restore.locate import Where, locate
from trigger.restore.log_search import Around, around
from trigger.restore.restore import prepare, restore
from trigger.restore.target import Named

FIRST, SECOND = (History("memory", "7001", branch) for branch in (1, 2))
SECOND_LIFE = History("memory", "7001", 1, 1)
SECONDS = timedelta(seconds=1)


async def left_behind_a_drop(it: Bank) -> tuple[Commit, Commit, Commit]:
    """Go back to before a commit that the log alone has; gives one long before, that, and one since."""
    early = it.commit()
    it.seconds[0] += 10
    await it.point()
    it.commit()
    await it.point()
    it.seconds[0] += 10
    fork = it.world.cluster.flushed
    it.seconds[0] += 1
    dropped = it.world.cluster.commit("")
    it.seconds[0] += 1
    it.commit()
    await it.point()
    it.seconds[0] += 10
    it.world.cluster.promote(fork)
    it.commit()
    await it.point()
    it.seconds[0] += 10
    newer = it.commit()
    await it.point()
    return early, dropped, newer


async def listed(it: Bank, one: Commit, history: History) -> Around:
    lineage = await it.site.journal.lineage(history)
    return await around(one.time, SECONDS, 100, lineage, it.catalog, it.site.journal)


def test_around_the_time_of_a_commit_that_was_left_its_history_is_named_and_lists_it(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        early, dropped, newer = await left_behind_a_drop(it)
        found = await listed(it, dropped, SECOND)
        assert dropped.name not in [one.name for one in found.commits]
        assert (found.history, found.others) == (SECOND, [FIRST])
        assert dropped.name in [one.name for one in (await listed(it, dropped, FIRST)).commits]
        for one in (early, newer):
            found = await listed(it, one, SECOND)
            assert ([each.name for each in found.commits], found.others) == ([one.name], [])

    run(tmp_path, story)


def test_so_is_the_life_that_an_older_copy_took_the_place_of_and_nothing_untrue_is_said_of_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await it.point()
        copy = it.world.cluster.copy()
        it.seconds[0] += 10
        dropped = it.commit()
        await it.point()
        it.world.cluster.put_back(copy)
        it.seconds[0] += 100
        await it.database.record_end()
        await it.point()
        found = await listed(it, dropped, SECOND_LIFE)
        assert (found.commits, found.others) == ([], [FIRST])
        assert not found.from_before
        assert f"is not in the log that is kept of {SECOND_LIFE}" in log._read(found)[0]
        assert log._others(found)[0].endswith(f"--history {FIRST} lists it")
        assert [one.name for one in (await listed(it, dropped, FIRST)).commits] == [dropped.name]

    run(tmp_path, story)


async def shared_name(it: Bank) -> Commit:
    """Leave a commit that the catalog has no word of, and let another bear its name since; gives the first."""
    it.commit()
    await it.point()
    fork = it.world.cluster.flushed
    lost = it.world.cluster.commit("")
    it.commit()
    await it.point()
    it.world.cluster.promote(fork)
    it.world.cluster.next_xid = lost.name.number or 0
    assert it.commit().name == lost.name
    await it.point()
    return lost


def test_a_name_that_the_catalog_knows_of_one_history_is_looked_for_in_the_log_of_every_other(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        lost = await shared_name(it)
        known, found = await locate(it.catalog, it.site.journal, name=lost.name)
        assert (known.where, known.history, known.aside) == (Where.POINT, SECOND, "")
        assert (found.where, found.history, found.aside, found.base) == (Where.LOG, FIRST, "--timeline 1", 1)
        target = await it.resolve(Named(name=lost.name, history="1"))
        report = await restore(target, it.site, progress=quiet, name="one")
        assert (it.held("one"), report.base) == (it.at_or_before(lost), found.base)

    run(tmp_path, story)


def test_a_history_whose_log_was_not_read_to_its_end_is_named_and_read_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(it: Bank) -> None:
        lost = await shared_name(it)
        monkeypatch.setattr(log_search, "LEFT_SECONDS", -1.0)
        known, unread = await locate(it.catalog, it.site.journal, name=lost.name)
        assert (known.history, unread.where, unread.history) == (SECOND, Where.UNKNOWN, FIRST)
        assert f"find with --history {FIRST} reads all of it" in unread.reason
        (found,) = await locate(it.catalog, it.site.journal, name=lost.name, history=str(FIRST))
        assert (found.where, found.history) == (Where.LOG, FIRST)
        nowhere, unread = await locate(it.catalog, it.site.journal, name=Name("", 999_999))
        assert "neither the catalog nor the log that was read has it" in nowhere.reason
        assert unread.history == FIRST

    run(tmp_path, story)


def test_log_of_another_history_that_cannot_be_read_is_said_beside_what_was_found(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        lost, whole = await shared_name(it), log_search.named

        async def broken(name: Name, lineage: Lineage, *rest: Any) -> list[Logged]:
            if lineage.history == FIRST:
                raise JournalError("segment 7 is damaged")
            return await whole(name, lineage, *rest)

        with patch.object(log_search, "named", broken):
            known, unread = await locate(it.catalog, it.site.journal, name=lost.name)
        assert (known.history, unread.history) == (SECOND, FIRST)
        assert unread.reason == f"whether {FIRST} has it is not known: segment 7 is damaged"

    run(tmp_path, story)


def test_in_a_history_that_is_named_nothing_of_another_is_found(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        fork = it.world.cluster.flushed
        left = it.commit("payday")
        await it.point()
        it.world.cluster.promote(fork)
        newer = it.commit("payday")
        await it.point()
        journal, catalog = it.site.journal, it.catalog
        for history, one, aside in ((FIRST, left, "--timeline 1"), (SECOND, newer, "")):
            for named in ({"name": one.name}, {"marker": "payday"}, {"place": str(one.start)}, {"time": one.time}):
                (found,) = await locate(catalog, journal, history=str(history), **named)
                assert (found.record and found.record.name, found.history) == (one.name, history), named
                assert (found.where, found.aside) == (Where.POINT, aside), named
        (between,) = await locate(catalog, journal, place=str(left.end + 4), history=str(FIRST))
        assert (between.history, between.aside) == (FIRST, f"--history {FIRST}")
        (none,) = await locate(catalog, journal, name=newer.name, history=str(FIRST))
        assert none.where is Where.UNKNOWN
        assert f"that is kept of {FIRST} and its past has it" in none.reason
        with pytest.raises(RestoreError, match="nothing is known of the history"):
            await locate(catalog, journal, name=newer.name, history="7001/9")

    run(tmp_path, story)


def test_a_time_before_a_life_began_is_refused_with_the_histories_that_have_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        copy = it.world.cluster.copy()
        it.commit()
        await it.point()
        it.seconds[0] += 5
        it.commit()
        await it.point()
        time = it.site.clock.now() + SECONDS
        it.world.cluster.put_back(copy)
        it.seconds[0] += 100
        await it.database.record_end()
        await it.point()
        target = await it.resolve(Named(time=time))
        assert f"before any commit of {SECOND_LIFE} in the catalog" in target.description
        with pytest.raises(RestoreError, match="no recovery point is early enough") as refused:
            await prepare(target, it.site)
        assert f"--history {FIRST}" in refused.value.hint
        assert (await prepare(await it.resolve(Named(time=time, history=str(FIRST))), it.site)).base.number == 2
        with pytest.raises(RestoreError, match="no recovery point is early enough") as refused:
            await prepare(await it.resolve(Named(time=time - timedelta(days=1))), it.site)
        assert "--history" not in refused.value.hint

    run(tmp_path, story)


def test_a_point_whose_snapshots_are_gone_is_not_said_to_hold_a_commit_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        commit = it.commit()
        point = await it.point()
        found = await locate(it.catalog, it.site.journal, name=commit.name)
        assert [(one.point, one.snapshot) for one in found] == [(2, 2)]
        points._show_found(found)
        assert "in the snapshot of  point 2" in capsys.readouterr().out
        for state in (State.EXPIRING, State.EXPIRED):
            point = await it.catalog.change(point, state)
        found = await locate(it.catalog, it.site.journal, name=commit.name)
        assert [(one.point, one.snapshot, one.base) for one in found] == [(2, None, 1)]
        points._show_found(found)
        shown = capsys.readouterr().out
        assert "in the snapshot of" not in shown
        assert "point 2, whose snapshots are gone" in shown

    run(tmp_path, story)
