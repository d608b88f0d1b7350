"""A clone's server comes up at exactly the commit asked for, by the log's own account, on every version."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from connectors.databases.postgres.database import Postgres
from tests.fixtures.postgres import MAJORS
from tests.fixtures.restores import Cut, Ground, at_commit, before_commit, ground, load, replay_from
from tests.fixtures.volumes import loop_volume, plain_folder
from trigger.errors import RestoreError
from trigger.position import Position
from trigger.replay import Target

pytestmark = [pytest.mark.server]


@pytest.fixture(params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def on_btrfs(major: int) -> Iterator[Ground]:
    with loop_volume("btrfs", 4096) as folder, ground(major, folder, btrfs=True) as made:
        yield made


@pytest.fixture
def on_any(major: int) -> Iterator[Ground]:
    with plain_folder() as folder, ground(major, folder, btrfs=False) as made:
        yield made


@pytest.mark.volume
def test_a_restore_holds_every_commit_up_to_its_target_and_no_other(on_btrfs: Ground) -> None:
    asyncio.run(_restores_are_exact(on_btrfs, seed=time.time_ns() % 100_000))


async def _restores_are_exact(here: Ground, seed: int) -> None:
    choices = random.Random(seed)
    begin = here.durable()
    async with here.journaling():
        with load(here.cluster, seed=seed):
            await asyncio.sleep(0.5)
            cut = await asyncio.to_thread(here.cut)
            await asyncio.sleep(1.5)
        end = here.durable()
        await here.journal_reaches(end)
    commits = await here.commits(begin)
    legal = [number for number, commit in enumerate(commits) if commit.start >= cut.ceiling.at]
    chosen = sorted(choices.sample(legal[1:], 3))
    for number in [legal[0], legal[1], *chosen]:
        for target in (at_commit(begin.history, commits[number]), before_commit(begin.history, commits[number])):
            clone, running, staged = await here.restore(cut, target)
            # the last record of the setup apart, every commit in the log either wrote its id or nothing (txid_current)
            wanted = {commit.xid for commit in commits[: number + target.inclusive]}
            unwanted = {commit.xid for commit in commits} - wanted
            held = await here.ledger(running)
            assert not held & unwanted, f"seed {seed}, {target}: one commit too many"
            silent_commits = wanted - held
            assert not silent_commits & _written(here), f"seed {seed}, {target}: one commit too few"
            async for what, held_true, seen in here.recovery.inspect(running, target, staged, deep=False):
                assert held_true, f"{what}: {seen}"
            await here.drop(clone)
    await _assert_latest_is_all(here, cut, end)


@pytest.mark.volume
def test_without_a_target_a_clone_is_the_snapshot_itself(on_btrfs: Ground) -> None:
    async def run() -> None:
        here = on_btrfs
        begin = here.durable()
        async with here.journaling():
            with load(here.cluster):
                await asyncio.sleep(0.4)
                cut = await asyncio.to_thread(here.cut)
                await asyncio.sleep(0.4)
            await here.journal_reaches(here.durable())
        target = Target(begin.history, None, True, "the snapshot", point="point")
        clone, running, _ = await here.restore(cut, target)
        commits = await here.commits(begin)
        held = await here.ledger(running)
        written = {int(row[0]) for row in here.cluster.sql("SELECT xid::text FROM ledger")}
        surely = {commit.xid for commit in commits if commit.start < cut.floor.at} & written
        never = {commit.xid for commit in commits if commit.start >= cut.ceiling.at}
        assert surely <= held
        assert not held & never
        assert running.history.branch == begin.history.branch + 1
        assert cut.floor.at <= running.replayed <= cut.ceiling.at
        await here.drop(clone)

    asyncio.run(run())


def test_a_copy_made_under_load_starts_from_its_label_and_is_exact(on_any: Ground) -> None:
    async def run() -> None:
        here = on_any
        begin = here.durable()
        async with here.journaling():
            with load(here.cluster):
                await asyncio.sleep(0.3)
                cut = await asyncio.to_thread(here.copy_in_bracket)
                await asyncio.sleep(0.5)
            await here.journal_reaches(end := here.durable())
        commits = await here.commits(begin)
        number = next(n for n, commit in enumerate(commits) if commit.start >= cut.ceiling.at) + 5
        clone, running, staged = await here.restore(cut, at_commit(begin.history, commits[number]))
        written = _written(here)
        assert await here.ledger(running) == {commit.xid for commit in commits[: number + 1]} & written
        async for what, held, seen in here.recovery.inspect(
            running, at_commit(begin.history, commits[number]), staged, deep=True
        ):
            assert held, f"{what}: {seen}"
        await here.drop(clone)
        await _assert_latest_is_all(here, cut, end)

    asyncio.run(run())


async def _assert_latest_is_all(here: Ground, cut: Cut, end: Position) -> None:
    """The latest state from a cut holds every row that was written before `end`."""
    held_to = max(extent.end for extent in await here.journal.extents())
    target = Target(end.history, None, False, "the latest state")
    clone, running, staged = await here.restore(cut, target, until=held_to)
    assert await here.ledger(running) == _written(here)
    async for what, held, seen in here.recovery.inspect(running, target, staged, deep=False):
        assert held, f"{what}: {seen}"
        assert "nothing to compare" not in seen
        assert "0 of 0" not in seen
    await here.drop(clone)


def _written(here: Ground) -> set[int]:
    return {int(row[0]) for row in here.cluster.sql("SELECT xid::text FROM ledger")}


@pytest.mark.volume
def test_a_commit_is_found_again_on_whichever_timeline_it_was_made() -> None:
    """Production is restored in place twice; commits of all three timelines, the lost ones too, come back exactly."""

    async def run(here: Ground) -> None:
        made: list[tuple[int, str, Position]] = []  # (timeline, word, before its commit)

        def write(word: str) -> Position:
            before = here.inserted()
            here.cluster.sql(f"INSERT INTO words VALUES ('{word}')")
            made.append((before.history.branch, word, before))
            return before

        here.cluster.sql("CREATE TABLE words (word text)")
        async with here.journaling():
            await asyncio.to_thread(here.keep_for_fork)
            cut = here.cut()
            write("one")
            second = write("two")
            write("lost on 1")
            here.cluster.sql("SELECT pg_switch_wal()")
            write("lost behind a switch")
            await here.journal_reaches(here.durable())
            await here.fork(await _to(here, second))
            write("three on 2")
            fork = write("four on 2")
            write("lost on 2")
            await here.journal_reaches(here.durable())
            await here.fork(await _to(here, fork))
            write("five on 3")
            here.cluster.sql("SELECT pg_switch_wal()")
            write("six on 3")
            await here.journal_reaches(here.durable())
        wanted = {
            "two": "one,two",
            "lost behind a switch": "one,two,lost on 1,lost behind a switch",
            "three on 2": "one,two,three on 2",
            "lost on 2": "one,two,three on 2,four on 2,lost on 2",
            "five on 3": "one,two,three on 2,four on 2,five on 3",
            "six on 3": "one,two,three on 2,four on 2,five on 3,six on 3",
        }
        for timeline, word, before in made:
            if word in wanted:
                clone, running, staged = await here.restore(cut, target := await _to(here, before))
                text = await here.recovery.query(running, "postgres", "SELECT string_agg(word, ',') FROM words")
                assert text == wanted[word]
                assert before.history.branch == timeline
                assert running.history.branch == 4  # behind every timeline that production ever had
                async for what, held, seen in here.recovery.inspect(running, target, staged, deep=False):
                    assert held, f"{what}: {seen}"
                await here.drop(clone)

    with loop_volume("btrfs", 4096) as folder, ground(18, folder, btrfs=True) as made:
        asyncio.run(run(made))


async def _to(here: Ground, before: Position) -> Target:
    """Give the first commit behind a position as a target, read from the journal."""
    staged = here.folder / "looked-up"
    whole = Target(before.history, before.at, False, "to look it up")
    await here.journal.stage(replay_from(before, whole), staged, lambda *_: None)
    commits = await here.commits(before, staged)
    return at_commit(before.history, commits[0])


@pytest.mark.volume
def test_a_restore_by_time_holds_every_commit_up_to_that_time_and_no_other() -> None:
    async def run(here: Ground) -> None:
        async with here.journaling():
            cut = here.cut()
            for _ in range(6):
                here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            end = here.durable()
            await here.journal_reaches(end)
        rows = here.cluster.sql("SELECT xid::text::int, pg_xact_commit_timestamp(xid::xid) FROM ledger ORDER BY 1")
        for inclusive in (True, False):
            target = Target(end.history, None, inclusive, "that time", rows[3][1])
            clone, running, staged = await here.restore(cut, target)
            assert await here.ledger(running) == {row[0] for row in rows[: 3 + inclusive]}
            assert inclusive is (running.last_commit_at == rows[3][1])
            async for what, held, seen in here.recovery.inspect(running, target, staged, deep=False):
                assert held, f"{what}: {seen}"
            await here.drop(clone)
        later = Target(end.history, None, True, "a later time", rows[5][1] + timedelta(hours=1))
        with pytest.raises(RestoreError, match="recovery ended before configured recovery target") as refusal:
            await here.restore(cut, later)
        assert "--to-latest" in refusal.value.hint
        moment = here.cluster.sql("SELECT clock_timestamp()")[0][0]
        async with here.journaling():
            here.cluster.sql("SELECT pg_switch_wal()")
            await here.journal_reaches(here.inserted())
            await _assert_latest_is_all(here, cut, end)  # whose replay ends where a segment does
            database = Postgres(here.cluster.conninfo, ["postgres"])
            mark = await database.mark()
            await database.close()
            await here.journal_reaches(mark)
        now = replace(later, time=moment, reach=mark.at)
        clone, running, staged = await here.restore(cut, now)
        assert await here.ledger(running) == {row[0] for row in rows}
        async for what, held, seen in here.recovery.inspect(running, now, staged, deep=False):
            assert held, f"{what}: {seen}"
        await here.drop(clone)

    with loop_volume("btrfs", 4096) as folder, ground(16, folder, btrfs=True, track_commit_timestamp="on") as made:
        asyncio.run(run(made))


def test_the_label_of_one_server_on_the_files_of_another_is_refused(on_any: Ground) -> None:
    """As points have it that were made while the address led to another server, which had gone further."""

    async def run() -> None:
        here = on_any
        async with here.journaling():
            cut = await asyncio.to_thread(here.copy_in_bracket)
            here.cluster.sql("INSERT INTO ledger SELECT pg_current_xact_id()")
            further = await asyncio.to_thread(here.copy_in_bracket)
            end = here.durable()
            await here.journal_reaches(end)
        wrong = replace(cut, bracket=further.bracket, floor=further.floor, ceiling=further.ceiling)
        with pytest.raises(RestoreError, match="not those of the server whose commits") as refused:
            await here.restore(wrong, Target(end.history, None, True, "all"), until=end.at)
        assert f"the server's began at {further.bracket.start if further.bracket else ''} by then" in str(refused.value)
        _, running, _ = await here.restore(further, Target(end.history, None, True, "all"), until=end.at)
        assert await here.ledger(running)

    asyncio.run(run())
