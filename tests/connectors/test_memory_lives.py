"""The world in memory keeps the lives of a log apart, and its two strangers count as they should."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from connectors.memory import MemoryDatabase, MemoryJournal, MemorySource, NoLog, World
from connectors.memory.manner import ANNOUNCED, BINLOG, BINLOG_BYTES, BinlogPlace
from trigger.errors import PositionError
from trigger.position import Name, Position
from trigger.replay import Replay, Target


def told(story: Callable[[World], Awaitable[None]], world: World | None = None) -> None:
    asyncio.run(_tell(story, world or World()))


async def _tell(story: Callable[[World], Awaitable[None]], world: World) -> None:
    world.cluster.recreate_slot("bank")
    await story(world)


async def journaled(world: World) -> None:
    running = asyncio.create_task(MemoryJournal(world).run())
    await asyncio.sleep(0)
    running.cancel()


async def read(world: World) -> tuple[MemorySource, Position]:
    """Give an open source that has read all there is, and how far it has come."""
    source = MemorySource(world, "bank")
    await source.open(None)
    await source.read()
    return source, (await source.read()).through


def test_what_a_source_has_come_to_never_lies_within_a_record() -> None:
    async def story(world: World) -> None:
        world.cluster.commit("bank")
        _, first = await read(world)
        world.cluster.write_ahead(4000)
        world.cluster.flush_pages()
        assert world.cluster.flushed > first.at
        assert world.cluster.flushed_records == first.at

    told(story)


@pytest.mark.parametrize("ahead", [0, 5])
def test_an_older_copy_that_was_put_back_is_another_life_whether_or_not_it_has_passed_the_old_end(ahead: int) -> None:
    async def story(world: World) -> None:
        copy = world.cluster.copy()
        world.cluster.commit("bank")
        source, through = await read(world)
        await journaled(world)
        world.cluster.put_back(copy)
        for _ in range(ahead):
            world.cluster.commit("bank")
        broken = await source.open(through)
        assert broken is not None
        assert broken.until.history.incarnation == 1
        assert (await MemoryDatabase(world).lineage()).history.incarnation == 1
        await journaled(world)
        assert {extent.history.incarnation for extent in await MemoryJournal(world).extents()} == {0, 1}

    told(story)


def test_a_copy_that_has_not_come_so_far_is_another_life_whatever_is_held_of_it() -> None:
    async def story(world: World) -> None:
        copy = world.cluster.copy()
        world.cluster.write_ahead(400)
        await MemoryDatabase(world).record_end()
        world.cluster.put_back(copy)
        assert (await MemoryDatabase(world).lineage()).history.incarnation == 1

    told(story)


@pytest.mark.parametrize("service", ["lives on", "was killed"])
def test_a_copy_of_what_keeps_no_log_is_another_life_though_it_has_the_last_commit_and_has_passed_the_end(
    service: str,
) -> None:
    async def story(world: World) -> None:
        world.cluster.commit("bank")
        _, through = await read(world)
        copy = world.cluster.copy()
        world.cluster.commit("bank")
        world.cluster.advance_slot("bank")  # so that nobody is given it
        source = MemorySource(world, "bank")
        broken = await source.open(through)
        assert broken is not None
        assert broken.until.history.incarnation == 0
        if service == "was killed":
            world.kill_service()
        world.cluster.put_back(copy)
        for _ in range(5):
            world.cluster.commit("bank")
        broken = await source.open(through)
        assert broken is not None
        assert broken.until.history.incarnation == 1

    told(story, World(manners=(ANNOUNCED,)))


def test_a_copy_that_lacks_nothing_that_was_known_goes_on_in_the_same_life() -> None:
    async def story(world: World) -> None:
        world.cluster.commit("bank")
        source, through = await read(world)
        await journaled(world)
        copy = world.cluster.copy()
        world.cluster.commit("bank")  # nobody has seen it
        world.cluster.put_back(copy)
        assert await source.open(through) is None
        assert (await MemoryDatabase(world).lineage()).history.incarnation == 0

    told(story)


def test_a_copy_that_lacks_what_snapshots_may_hold_is_another_life() -> None:
    async def story(world: World) -> None:
        copy = world.cluster.copy()
        world.cluster.write_ahead(2000)
        await MemoryDatabase(world).ceiling()
        world.cluster.put_back(copy)
        assert (await MemoryDatabase(world).lineage()).history.incarnation == 1

    told(story)


def test_a_copy_that_was_promoted_within_a_record_that_is_held_is_another_life() -> None:
    async def story(world: World) -> None:
        copy = world.cluster.copy()
        world.cluster.commit("bank", data_bytes=2000)
        await read(world)
        await journaled(world)
        world.cluster.put_back(copy)
        world.cluster.commit("bank", data_bytes=0)
        world.cluster.promote()
        history = (await MemoryDatabase(world).lineage()).history
        assert (history.branch, history.incarnation) == (2, 1)

    told(story)


def test_a_log_that_has_begun_anew_behind_the_old_one_is_another_life() -> None:
    async def story(world: World) -> None:
        world.cluster.commit("bank")
        await journaled(world)
        world.cluster.reset_log()
        assert (await MemoryDatabase(world).lineage()).history.incarnation == 1
        await journaled(world)
        old, new = await MemoryJournal(world).extents()
        assert old.end < new.start

    told(story)


def test_a_log_in_files_is_written_by_file_and_offset_and_measured_over_the_ends_of_files() -> None:
    place = BinlogPlace.parse("binlog.000002:1234")
    assert (str(place), place.file, place.offset) == ("binlog.000002:1234", 2, 1234)
    assert place.since(BinlogPlace.parse("binlog.000001:1000")) == BINLOG_BYTES + 234
    for wrong in ("2:1234", "binlog.2", "binlog.x:1", "binlog.1:-4"):
        with pytest.raises(PositionError):
            BinlogPlace.parse(wrong)


def test_a_failover_to_another_server_is_another_history_with_names_of_its_own() -> None:
    async def story(world: World) -> None:
        assert world.cluster.commit("bank").name == Name("0-1-", 700)
        source, through = await read(world)
        world.cluster.promote()
        broken = await source.open(through)
        assert broken is not None
        assert broken.until.history.system != through.history.system
        assert world.cluster.commit("bank").name == Name("0-2-", 701)

    told(story, World(manners=(BINLOG,)))


def test_a_source_that_only_triggers_has_names_that_are_texts_and_nothing_to_replay() -> None:
    async def story(world: World) -> None:
        name = world.cluster.commit("bank").name
        assert name.number is None
        assert Name.parse(str(name)) == name
        assert await MemoryDatabase(world).redo() is None
        journal, history = NoLog(), world.cluster.history
        assert not journal.replays
        assert await journal.extents() == []
        assert (await journal.lineage(history)).forks == ()
        replay = Replay(Target(history, None, True, "as cut", point="p"), Position(history, 1), 1, as_cut=True)
        assert await journal.stage(replay, Path("/nowhere"), lambda *_: None) == 0

    told(story, World(manners=(ANNOUNCED,)))


@pytest.mark.parametrize("received", ["received", "not yet received"])
def test_what_was_left_and_is_restored_over_another_life_is_no_timeline_of_that_one(received: str) -> None:
    """And no more is what it took the place of when that is back."""

    async def story(world: World) -> None:
        copy = world.cluster.copy()
        world.cluster.commit("bank")
        source, through = await read(world)
        await journaled(world)
        left = world.cluster.copy()
        world.cluster.put_back(copy)
        broken = await source.open(through)
        assert broken is not None
        assert broken.until.history.incarnation == 1
        if received == "received":
            await journaled(world)
        replaced = world.cluster.copy()
        world.cluster.put_back(left)
        world.cluster.promote()
        broken = await source.open(broken.until)
        assert broken is not None
        assert (broken.until.history.branch, broken.until.history.incarnation) == (2, 2)
        world.cluster.put_back(replaced)
        broken = await source.open(broken.until)
        assert broken is not None
        assert (broken.until.history.branch, broken.until.history.incarnation) == (1, 3)

    told(story)
