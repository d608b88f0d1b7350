"""What production would lose is told as the cluster's own log has it, also where timelines were left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from connectors.memory import World
from connectors.memory.manner import BINLOG
from tests.fixtures.bank import Bank, bank, quiet, run
from trigger.errors import RestoreError
from trigger.model import EPOCH, Commit, System
from trigger.position import Position
from trigger.restore.clone_records import CloneRecord
from trigger.restore.inplace import prepare_clone, prepare_in_place, put_in_place, restore_in_place
from trigger.restore.losses import behind_clone, behind_target
from trigger.restore.restore import restore
from trigger.restore.target import Named


async def lost(it: Bank, named: Named) -> int:
    return (await behind_target(await it.resolve(named), it.site)).commits


async def committed(it: Bank, count: int) -> list[Commit]:
    """Commit so often, with a point at the end."""
    made = [it.commit(stream=("bank", "shop")[number % 2]) for number in range(count)]
    await it.point()
    return made


def test_every_commit_behind_a_target_is_counted_whichever_way_it_is_named(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first, second, third, *others = await committed(it, 7)
        assert await lost(it, Named(name=second.name)) == 5
        assert await lost(it, Named(before=second.name)) == 6
        assert await lost(it, Named(time=third.time)) == 4
        assert await lost(it, Named(time=EPOCH)) == 7
        assert await lost(it, Named(latest=True)) == 0
        assert await lost(it, Named(place=str(first.history.place(first.start)))) == 6
        found = await behind_target(await it.resolve(Named(name=second.name)), it.site)
        assert (found.first_at, found.last_at) == (third.time, others[-1].time)
        assert found.log_end == Position(first.history, it.world.cluster.flushed)
        assert "5 commits that the catalog knows" in found.describe()[0]
        one = await behind_target(await it.resolve(Named(before=others[-1].name)), it.site)
        assert "one commit that the catalog knows will be lost" in one.describe()[0]

    run(tmp_path, story)


def test_a_state_of_a_timeline_that_was_left_loses_all_since_it_was_left(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await committed(it, 2)
        fork = it.world.cluster.flushed
        (abandoned,) = await committed(it, 1)
        it.world.cluster.promote(fork)
        await it.journaled()
        await committed(it, 3)
        named = Named(name=abandoned.name, history=str(abandoned.history.branch))
        assert await lost(it, named) == 3
        assert await lost(it, Named(latest=True)) == 0

    run(tmp_path, story)


def test_a_clone_loses_what_was_committed_behind_the_state_it_was_made_of(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        await committed(it, 1)
        _, wanted, *_ = await committed(it, 4)
        await restore(await it.resolve(Named(name=wanted.name)), it.site, progress=quiet, name="one")
        await committed(it, 2)
        planned = await prepare_clone("one", it.site)
        assert planned.losses.commits == 4
        assert all(held for _, held, _ in planned.record.checks)
        assert planned.record.checks

    run(tmp_path, story)


def test_a_clone_of_which_nobody_noted_where_it_stands_is_not_put_in_place(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        found = await behind_clone(CloneRecord("one", "commit 1", 1, EPOCH), it.site)
        assert "nobody knows which commits will be lost" in found.describe()[0]
        with pytest.raises(RestoreError, match="there is no clone one"):
            await prepare_clone("one", it.site)

    run(tmp_path, story)


def test_where_another_cluster_lies_all_of_that_one_is_lost_and_nothing_is_put_there_unasked(tmp_path: Path) -> None:
    async def story() -> None:
        async with bank(tmp_path, None, World(manners=[BINLOG])) as it:
            await committed(it, 1)
            _, wanted, _ = await committed(it, 3)
            await committed(it, 1)
            named = Named(name=wanted.name, history=str(wanted.history))
            await restore(await it.resolve(named), it.site, progress=quiet, name="old")
            assert await lost(it, named) == 2
            it.world.cluster.promote()
            (first,), (second, *_, last) = await committed(it, 1), await committed(it, 5)
            assert not first.history.is_of_system(wanted.history)
            target = await it.resolve(named)
            for planned in (await prepare_in_place(target, it.site), await prepare_clone("old", it.site)):
                losses, goes = planned.losses, first.history.system
                assert (losses.commits, losses.first_at, losses.last_at) == (6, first.time, last.time)
                said = f"{goes} goes, with all that it holds, and {wanted.history.system} takes its place"
                assert losses.describe()[0] == f"another cluster lies there: {said}"
                assert losses.describe()[1].startswith("6 commits that the catalog knows will be lost")
                assert [found.message for found in planned.refused if found.subject == "cluster"] == [
                    str(losses.replaced)
                ]
            for acted in (
                restore_in_place(target, it.site, progress=quiet),
                put_in_place("old", it.site, progress=quiet),
            ):
                with pytest.raises(RestoreError, match=r"another cluster lies there.*--replace-cluster"):
                    await acted
            asked = (
                await prepare_in_place(target, it.site, replacing=True),
                await prepare_clone("old", it.site, replacing=True),
            )
            assert not [found for planned in asked for found in planned.refused if found.subject == "cluster"]
            assert [planned.losses.commits for planned in asked] == [6, 6]
            own = await prepare_in_place(await it.resolve(Named(name=second.name)), it.site)
            assert (own.losses.replaced, own.losses.commits) == (None, 4)

    asyncio.run(story())


@pytest.mark.parametrize("lies", ["nothing", "what the state is of"])
def test_what_lies_there_is_asked_first_and_the_newest_point_where_that_says_nothing(tmp_path: Path, lies: str) -> None:
    async def story() -> None:
        async with bank(tmp_path, None, World(manners=[BINLOG])) as it:
            await committed(it, 1)
            _, wanted, _ = await committed(it, 3)
            it.world.cluster.promote()
            await committed(it, 5)
            there = [] if lies == "nothing" else [System(wanted.history.system, "PostgreSQL 15")]

            async def systems(_: object) -> list[System]:
                return there

            it.site.recovery.systems = systems  # type: ignore[method-assign, assignment]
            target = await it.resolve(Named(name=wanted.name, history=str(wanted.history)))
            losses = (await prepare_in_place(target, it.site)).losses
            assert losses.commits == (5 if lies == "nothing" else 1)
            assert (losses.replaced is None) == (lies != "nothing")

    asyncio.run(story())
