"""What is known of points that expired long ago goes, a little at a time; what is never to be said otherwise stays."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from connectors.memory import MemoryStorage, World
from tests.trigger.catalog.test_catalog import HISTORY, NOW, at, proven, record, with_catalog
from trigger.catalog import pruning, tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.rebuild import known
from trigger.catalog.reconcile import reconcile
from trigger.errors import CatalogError
from trigger.model import Cause, Gap, Mark, Outcome, RecoveryPoint, State, Volume
from trigger.point_names import point_id

DAY = timedelta(days=1)
KEPT = 3
MANY = 200


@pytest.fixture(autouse=True)
def _few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "KEPT", KEPT)


async def point_of(catalog: Catalog, number: int, taken_at: datetime, state: State = State.EXPIRED) -> RecoveryPoint:
    """Make a point with one commit, taken at a time, and bring it to a state."""
    one = record(number * 1000, markers=(f"m{number}",))
    opened = await catalog.open_point(
        id=point_id(taken_at, number),
        cause=Cause.COMMIT,
        marks=[Mark(at(int(one.end)))],
        opened_at=taken_at,
        commit=one,
    )
    if state is State.OPEN:
        return opened
    if state is State.FAILED:
        return await catalog.fail(opened, "no room")
    point = await catalog.seal(proven(opened), [one], {"bank": at(int(one.end))})
    for step in (State.EXPIRING, State.EXPIRED) if state in (State.EXPIRING, State.EXPIRED) else ():
        point = await catalog.change(point, step) if point.state is not state else point
    return point


async def expired(catalog: Catalog, count: int) -> list[RecoveryPoint]:
    """Make so many expired points, a day apart, the first taken now; and a sealed one behind them."""
    made = [await point_of(catalog, number, NOW + number * DAY) for number in range(1, count + 1)]
    await point_of(catalog, count + 1, NOW + (count + 1) * DAY, State.SEALED)
    return made


async def states(catalog: Catalog) -> dict[int, State]:
    return {point.number: point.state for point in await catalog.points()}


def test_of_a_pruned_point_its_number_and_the_outcomes_of_its_commits_stay() -> None:
    async def work(catalog: Catalog) -> None:
        made = await expired(catalog, 5)
        found, commits = await catalog.find(), await catalog.commits_of(1)
        await catalog.record_gaps(Gap("bank", at(1), at(2), "slot dropped", NOW))
        later = await point_of(catalog, 7, NOW + 7 * DAY, State.SEALED)
        await catalog.close_gaps(later.number)
        before, gaps = await catalog.totals(), await catalog.gaps()
        assert await catalog.prune(NOW + 100 * DAY, 500) == 2
        assert sorted(await states(catalog)) == [3, 4, 5, 6, 7]
        assert await catalog.points(states={State.EXPIRED}, newest_first=False) == made[2:]
        after = await catalog.totals()
        assert (after.pruned, after.points[State.EXPIRED]) == (2, 3)
        assert (after.commits, after.open_gaps) == (before.commits, 0)
        assert [one for one in await catalog.find() if one.point != 7] == found
        assert await catalog.commits_of(1) == commits
        assert await catalog.gaps() == gaps
        for ref in (1, made[0].id, made[0].name):
            with pytest.raises(CatalogError, match="point 1 expired long ago") as refused:
                await catalog.point(ref)
            assert "trigpoint find" in refused.value.hint
        assert (await point_of(catalog, 8, NOW + 8 * DAY)).number == 8
        assert (await catalog.commit_before(1500, HISTORY)) == found[0]

    with_catalog(work)


def test_what_a_commit_is_repeated_for_is_still_known_after_its_point_was_pruned() -> None:
    async def work(catalog: Catalog) -> None:
        await expired(catalog, 4)
        assert await catalog.prune(NOW + 100 * DAY, 500) == 1
        again = await catalog.open_point(
            id=point_id(NOW + 50 * DAY, 1), cause=Cause.COMMIT, marks=[Mark(at(9000))], opened_at=NOW
        )
        sealed = await catalog.seal(proven(again), [record(1000, markers=("m1",))], {})
        assert (sealed.commits, (await catalog.totals()).repeated) == (0, 1)

    with_catalog(work)


@pytest.mark.parametrize("state", [state for state in State if state is not State.EXPIRED])
def test_nothing_but_expired_points_is_pruned(state: State) -> None:
    async def work(catalog: Catalog) -> None:
        other = await point_of(catalog, 1, NOW, state)
        made = [await point_of(catalog, number, NOW) for number in range(2, 6)]
        assert await catalog.prune(NOW + 100 * DAY, 500) == 1
        assert await catalog.points(newest_first=False) == [other, *made[1:]]

    with_catalog(work)


def test_the_young_stay_and_the_last_that_expired_however_old_and_a_round_is_bounded() -> None:
    async def work(catalog: Catalog) -> None:
        made = await expired(catalog, 10)
        assert await catalog.prune(NOW + 4.5 * DAY, 500) == 4
        assert sorted(await states(catalog)) == [5, 6, 7, 8, 9, 10, 11]
        assert [await catalog.prune(NOW + 100 * DAY, 2) for _ in range(3)] == [2, 1, 0]
        assert await catalog.points(states={State.EXPIRED}, newest_first=False) == made[7:]

    with_catalog(work)


def test_few_expired_points_stay_for_ever() -> None:
    async def work(catalog: Catalog) -> None:
        made = await expired(catalog, KEPT)
        assert await catalog.prune(NOW + 10_000 * DAY, 500) == 0
        assert await catalog.points(states={State.EXPIRED}, newest_first=False) == made

    with_catalog(work)


@pytest.mark.parametrize("query", [pruning._OLDEST, pruning._FIRST_KEPT])
def test_what_is_old_is_found_without_a_look_at_all_that_was_pruned(query: Any, tmp_path: Path) -> None:
    with_catalog(lambda catalog: expired(catalog, 5), tmp_path / "catalog")
    with sqlite3.connect(tmp_path / "catalog") as connection:
        text = str(query.compile(compile_kwargs={"literal_binds": False}))
        plan = connection.execute(
            f"EXPLAIN QUERY PLAN {text}", dict.fromkeys(("state_1", "most", "later", "param_1"), 1)
        )
        assert [row[3] for row in plan if "points_by_state" not in row[3]] == []


def test_a_snapshot_of_a_pruned_point_that_turns_up_again_is_removed_and_not_adopted() -> None:
    async def work(catalog: Catalog) -> None:
        made = await expired(catalog, 4)
        storage = MemoryStorage(World())
        assert await catalog.prune(NOW + 100 * DAY, 500) == 1
        (living,) = await catalog.bases()
        for point in (made[0], living):
            whole = dataclasses.replace(point, state=State.SEALED)
            await storage.snapshot([Volume("data", "/data")], point.id, tag.encode(whole, [record(1000)]))
        done = await reconcile(catalog, storage)
        assert done.removed == [made[0].id]
        assert [kept.point for kept in await storage.tagged()] == [living.id]
        assert 1 not in await states(catalog)
        assert not await reconcile(catalog, storage)

    with_catalog(work)


def test_a_rebuild_says_of_how_many_points_that_expired_long_ago_nothing_is_known_any_more() -> None:
    async def work(catalog: Catalog) -> None:
        await expired(catalog, 5)
        await catalog.prune(NOW + 100 * DAY, 500)
        old = await known(catalog)
        assert (old.pruned, len(old.points)) == (2, 4)

    with_catalog(work)


def on_disk(path: Path, act: Callable[[Catalog], Coroutine[Any, Any, None]]) -> int:
    """Run `act` on the catalog at a path; gives the file's size once it is closed."""
    with_catalog(act, path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


async def many(catalog: Catalog, first: int, count: int) -> None:
    for number in range(first, first + count):
        await point_of(catalog, number, NOW + number * timedelta(seconds=1))


async def prune_all(catalog: Catalog) -> None:
    while await catalog.prune(NOW + 100 * DAY, 500):
        pass


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of many expired points, to be copied."""
    path = tmp_path_factory.mktemp("full") / "catalog"
    on_disk(path, lambda catalog: many(catalog, 1, MANY))
    return path


def test_the_room_of_what_was_pruned_goes_back_to_the_filesystem_a_little_at_a_time(full: Path, tmp_path: Path) -> None:
    path, given_back = Path(shutil.copy(full, tmp_path)), list[int]()

    async def give_back(catalog: Catalog) -> None:
        await prune_all(catalog)
        while (pages := await catalog.give_back(10)) > 0:
            given_back.append(pages)

    assert on_disk(path, give_back) < 0.6 * full.stat().st_size
    assert len(given_back) > 2
    assert max(given_back) <= 11, "more than was asked for; a page that maps others goes with them"
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_catalog_of_an_earlier_version_uses_the_room_again(full: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(full, tmp_path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (0,)

    async def prune(catalog: Catalog) -> None:
        await prune_all(catalog)
        assert await catalog.give_back(1000) == 0

    before = path.stat().st_size
    assert before <= on_disk(path, prune) < 1.05 * before
    assert on_disk(path, lambda catalog: many(catalog, MANY + 1, MANY // 2)) < 1.1 * before


def test_a_pruned_point_takes_little_room(full: Path, tmp_path: Path) -> None:
    """Its commits keep theirs: a block, which indexes lead to."""
    path = Path(shutil.copy(full, tmp_path))
    on_disk(path, prune_all)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        pruned = "SELECT count(*), sum(length(document)) FROM points WHERE state = 'pruned'"
        assert connection.execute(pruned).fetchone() == (MANY - KEPT, 0)


def test_pruning_on_a_thread_of_the_catalogs_own_and_again_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        catalog = await Catalog.open(tmp_path / "catalog")
        await expired(catalog, 6)
        assert await catalog.prune(NOW + 100 * DAY, 2) == 2
        await catalog.close()
        catalog = await Catalog.open(tmp_path / "catalog")
        assert await catalog.prune(NOW + 100 * DAY, 2) == 1
        assert (await catalog.totals()).pruned == 3
        assert (await catalog.totals()).commits[Outcome.PROTECTED] == 7
        await catalog.close()

    asyncio.run(work())
