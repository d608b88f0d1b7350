"""A point that stands in two logs: each database's commits are named, found and brought back in their own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from connectors.memory import MemoryDatabase, MemoryStorage, World
from connectors.memory.manner import BINLOG, MEMORY, Manner
from tests.fixtures.bank import Bank, bank, quiet
from trigger.errors import PositionError, RestoreError
from trigger.model import Cause, Commit, Volume
from trigger.ports import Capability
from trigger.position import Name
from trigger.protect.logs import Logs
from trigger.restore import locate
from trigger.restore.restore import prepare, restore
from trigger.restore.target import Named

VOLUMES = (Volume("data", "/memory/data"), Volume("files", "/memory/files"))
ATOMIC = frozenset(Capability)


def told(
    folder: Path,
    story: Callable[[Bank], Awaitable[None]],
    manners: Sequence[Manner] = (MEMORY, BINLOG),
    capabilities: frozenset[Capability] = ATOMIC,
) -> None:
    """Let `story` happen to two databases, `bank` and `shop`, on a volume each."""

    async def tell() -> None:
        world = World(manners=manners)
        first, second = world.clusters
        world.homes = {"files": second}
        async with bank(folder, MemoryStorage(world, capabilities=capabilities), world) as it:
            logs = Logs({"bank": MemoryDatabase(world, first), "shop": MemoryDatabase(world, second)})
            it.protected = replace(it.protected, logs=logs, volumes=VOLUMES)
            it.site = replace(it.site, volumes=VOLUMES)
            await it.protected.agents[0].prepare(VOLUMES)
            await it.point(Cause.START)
            await story(it)

    asyncio.run(tell())


def sold(it: Bank, *markers: str) -> Commit:
    """Commit in the second database; the next point will hold it."""
    made = it.world.clusters[1].commit("shop", markers=markers)
    it.pending.append(made)
    return made


def names(commits: Sequence[Commit]) -> list[Name]:
    return [commit.name for commit in commits]


def test_a_commit_of_the_second_database_is_found_and_brought_back_in_its_own_log(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        first = sold(it)
        await it.point()
        wanted = sold(it)
        later = sold(it)
        await it.point()
        beside = it.commit()
        await it.point()
        (found,) = await locate.locate(it.catalog, it.site.journal, name=wanted.name)
        assert (found.base, found.aside) == (2, "")
        report = await restore(await it.resolve(Named(name=wanted.name)), it.site, progress=quiet, name="one")
        assert it.held("one") == names([first, wanted])
        assert later.name not in it.held("one")
        (note,) = report.notes
        assert note.startswith(f"{beside.history} is as it was cut, not replayed")

    told(tmp_path, story)


def test_what_becomes_of_the_other_log_stands_in_the_plan(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        sold(it)
        wanted = sold(it)
        await it.point()
        plan = await prepare(await it.resolve(Named(name=wanted.name)), it.site)
        (line,) = [line for line in plan.describe() if line.startswith("beside")]
        assert "a copy that only its own log makes whole, not replayed" in line

    told(tmp_path, story, capabilities=frozenset({Capability.ATOMIC}))


def test_one_name_in_both_databases_is_refused_until_it_is_said_which(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        mine = it.commit("payday")
        await it.point()
        theirs = sold(it, "payday")
        await it.point()
        assert mine.name == theirs.name
        for named in (Named(name=mine.name), Named(marker="payday"), Named(before=mine.name)):
            with pytest.raises(RestoreError, match=r"names commits of several databases: in 7001/1, 7002/1"):
                await it.resolve(named)
            assert (await it.resolve(replace(named, history="7002/1"))).history == theirs.history
            for commit in (mine, theirs):
                assert (await it.resolve(replace(named, stream=commit.stream))).history == commit.history

    told(tmp_path, story, (MEMORY, MEMORY))


def test_a_history_of_another_kind_is_named_as_it_is_shown(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        wanted = sold(it)
        await it.point()
        target = await it.resolve(Named(latest=True, history=str(wanted.history)))
        assert target.history == wanted.history
        assert target.commit is not None
        assert target.commit.name == wanted.name

    told(tmp_path, story)


def test_what_could_be_of_either_database_is_refused_until_it_is_said_which(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        wanted = sold(it)
        await it.point()
        for named in (Named(latest=True), Named(time=wanted.time), Named(name=Name("", 1)), Named(place="7")):
            with pytest.raises(RestoreError, match=r"nothing tells which is meant of several databases: in 7001/1, "):
                await it.resolve(named)
        for named in (Named(latest=True), Named(time=wanted.time)):
            assert (await it.resolve(replace(named, stream="shop"))).history == wanted.history

    told(tmp_path, story)


def test_a_branch_is_one_of_the_database_that_the_commit_is_of(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        wanted = it.commit()
        it.world.cluster.promote()
        sold(it)
        await it.point()
        target = await it.resolve(Named(latest=True, stream="bank", history="1"))
        assert target.history == wanted.history

    told(tmp_path, story)


def test_a_place_or_a_time_is_told_of_each_log_and_of_one_stream_in_its_own(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        mine, theirs = it.commit(), sold(it)
        await it.point()
        sold(it)
        await it.point()
        between = str(theirs.end + 4)
        by = max(mine.time, theirs.time) + timedelta(milliseconds=1)
        for named in ({"place": between}, {"time": by}):
            found = await locate.locate(it.catalog, it.site.journal, **named)
            assert sorted(str(one.history) for one in found) == ["7001/1", "7002/1"]
            for stream, history in (("bank", mine.history), ("shop", theirs.history)):
                (one,) = await locate.locate(it.catalog, it.site.journal, stream=stream, **named)
                assert one.history == history

    told(tmp_path, story, (MEMORY, MEMORY))


def test_a_place_is_looked_for_in_the_logs_of_its_own_kind(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        wanted = sold(it)
        await it.point()
        (found,) = await locate.locate(it.catalog, it.site.journal, place=str(wanted.position.place))
        assert found.record is not None
        assert (found.history, found.record.name) == (wanted.history, wanted.name)
        with pytest.raises(PositionError):
            await locate.locate(it.catalog, it.site.journal, place="nowhere")

    told(tmp_path, story)


def test_a_commit_of_one_name_in_both_logs_is_found_with_what_tells_them_apart(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        mine = it.commit()
        await it.point()
        sold(it)
        await it.point()
        for one in await locate.locate(it.catalog, it.site.journal, name=mine.name):
            assert one.aside == f"--history {one.history}"
            assert one.history is not None
            target = await it.resolve(Named(name=mine.name, history=str(one.history)))
            assert target.history == one.history

    told(tmp_path, story, (MEMORY, MEMORY))
