"""A clone's server comes up at exactly the commit asked for, by the log's own account, on every version."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from tests.fixtures.postgres import MAJORS
from tests.fixtures.restores import Ground, at_commit, before_commit, ground, load
from tests.fixtures.volumes import loop_volume, plain_folder
from trigger.model import StopKind, Target

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
            written = {int(row[0]) for row in here.cluster.sql("SELECT xid::text FROM ledger")}
            assert not silent_commits & written, f"seed {seed}, {target}: one commit too few"
            async for what, held_true, seen in here.recovery.inspect(running, target, staged, deep=False):
                assert held_true, f"{what}: {seen}"
            await here.drop(clone)


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
        target = Target(begin.history, StopKind.END, cut.ceiling.at, True, "the snapshot")
        clone, running, _ = await here.restore(cut, target)
        commits = await here.commits(begin)
        held = await here.ledger(running)
        written = {int(row[0]) for row in here.cluster.sql("SELECT xid::text FROM ledger")}
        surely = {commit.xid for commit in commits if commit.start < cut.floor.at} & written
        never = {commit.xid for commit in commits if commit.start >= cut.ceiling.at}
        assert surely <= held
        assert not held & never
        assert running.history.timeline == begin.history.timeline + 1
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
            await here.journal_reaches(here.durable())
        commits = await here.commits(begin)
        number = next(n for n, commit in enumerate(commits) if commit.start >= cut.ceiling.at) + 5
        clone, running, staged = await here.restore(cut, at_commit(begin.history, commits[number]))
        written = {int(row[0]) for row in here.cluster.sql("SELECT xid::text FROM ledger")}
        assert await here.ledger(running) == {commit.xid for commit in commits[: number + 1]} & written
        async for what, held, seen in here.recovery.inspect(
            running, at_commit(begin.history, commits[number]), staged, deep=True
        ):
            assert held, f"{what}: {seen}"
        await here.drop(clone)

    asyncio.run(run())
