"""The world in memory behaves as the real one was measured to behave; the simulation's verdicts rest on that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from connectors.memory import (
    MemoryAgent,
    MemoryDatabase,
    MemoryJournal,
    MemoryRecovery,
    MemoryStorage,
    World,
)
from trigger.errors import JournalError, RestoreError
from trigger.model import EPOCH, Bracket, Commit, Volume
from trigger.point_names import point_id
from trigger.ports import Capability
from trigger.position import Name, Position
from trigger.replay import Replay, Target

VOLUMES = (Volume("data", "/data"), Volume("wal", "/wal"))
BASE = point_id(EPOCH, 1)
TORN = frozenset({Capability.INSTANT_CLONE})


@dataclass
class House:
    """A world, with the drivers that a restore needs."""

    capabilities: frozenset[Capability] = frozenset(Capability)
    world: World = field(default_factory=World)
    names: int = 0

    def __post_init__(self) -> None:
        self.cluster = self.world.cluster
        self.storage = MemoryStorage(self.world, capabilities=self.capabilities)
        self.journal = MemoryJournal(self.world)
        self.recovery = MemoryRecovery(self.world)

    async def flush(self) -> None:
        agent = MemoryAgent(self.world)
        await agent.prepare(VOLUMES)
        await agent.flush(BASE, 1)

    async def base(self) -> None:
        await self.flush()
        await self.storage.snapshot(VOLUMES, BASE, "tag")

    async def journaled(self) -> None:
        running = asyncio.create_task(self.journal.run())
        await asyncio.sleep(0)
        running.cancel()

    async def restore(self, target: Target, bracket: Bracket | None = None, *, as_cut: bool = False) -> list[Name]:
        """Give the transactions that came back."""
        await self.journaled()
        content = self.world.kept[BASE].cuts["data"][1]
        start = bracket.start if bracket else Position(content.lineage.history, content.redo)
        folder = Path(f"/staged-{self.names}")
        needed = start.at if as_cut or target.at is None else target.at + target.inclusive
        replay = Replay(target, start, needed, bracket, as_cut)
        await self.journal.stage(replay, folder, lambda *_: None)
        self.names += 1
        clone = await self.storage.clone(BASE, f"clone-{self.names}", lambda *_: None)
        await self.recovery.start(clone, VOLUMES, replay, folder, lambda *_: None)
        return [commit.name for commit in self.world.restored[clone.name].commits]

    def at(self, place: int, *, inclusive: bool) -> Target:
        return Target(self.cluster.history, place, inclusive, str(place))


def told(
    story: Callable[[House], Awaitable[None]], capabilities: frozenset[Capability] = frozenset(Capability)
) -> None:
    async def tell() -> None:
        await story(House(capabilities))

    asyncio.run(tell())


def adjacent(house: House) -> tuple[Commit, Commit]:
    """Commit two transactions whose commit records lie side by side, and one record behind them."""
    first = house.cluster.commit("bank")
    second = house.cluster.commit("bank", data_bytes=0)
    house.cluster.write_ahead()
    house.cluster.flush()
    return first, second


def test_of_two_adjacent_commits_each_kind_of_stop_brings_back_what_was_measured() -> None:
    async def story(house: House) -> None:
        before = house.cluster.commit("bank").name
        await house.base()
        a, b = adjacent(house)
        assert await house.restore(house.at(a.start, inclusive=True)) == [before, a.name]
        assert await house.restore(house.at(a.end, inclusive=True)) == [before, a.name, b.name]
        assert await house.restore(house.at(a.end, inclusive=False)) == [before, a.name]
        assert await house.restore(house.at(a.start, inclusive=False)) == [before]

    told(story)


def test_a_base_cannot_be_rolled_back_into_the_log_that_it_holds() -> None:
    async def story(house: House) -> None:
        first, second = adjacent(house)
        await house.base()
        house.cluster.commit("bank")
        for target in (house.at(first.start, inclusive=True), house.at(second.start, inclusive=False)):
            with pytest.raises(RestoreError, match="before consistent recovery point"):
                await house.restore(target)
        end = Target(house.cluster.history, None, True, "the base's own end", point=BASE)
        assert await house.restore(end, as_cut=True) == [first.name, second.name]

    told(story)


def test_a_stop_behind_the_end_of_the_log_is_never_reached() -> None:
    async def story(house: House) -> None:
        await house.base()
        last = house.cluster.commit("bank")
        with pytest.raises((RestoreError, JournalError)):
            await house.restore(house.at(last.end + 8, inclusive=False))

    told(story)


def test_a_hole_in_the_journal_is_found_before_anything_is_restored() -> None:
    async def story(house: House) -> None:
        await house.base()
        lost = house.cluster.commit("bank")
        wanted = house.cluster.commit("bank")
        await house.journaled()
        house.world.damage_journal(1, lost.start, lost.end)
        with pytest.raises(JournalError, match=str(lost.start)):
            await house.restore(house.at(wanted.start, inclusive=True))
        assert len(await house.journal.audit()) == 1

    told(story)


def test_a_point_that_was_not_flushed_does_not_hold_its_commit() -> None:
    async def story(house: House) -> None:
        commit = house.cluster.commit("bank")
        await house.storage.snapshot(VOLUMES, BASE, "tag")
        content = house.world.kept[BASE].cuts["data"][1]
        assert commit not in house.cluster.commits(content)
        await house.flush()
        await house.storage.snapshot(VOLUMES, point_id(EPOCH, 2), "tag")
        content = house.world.kept[point_id(EPOCH, 2)].cuts["data"][1]
        assert commit in house.cluster.commits(content)

    told(story)


def test_a_cut_may_hold_log_that_was_written_and_not_flushed_and_the_ceiling_covers_it() -> None:
    async def story(house: House) -> None:
        commit = house.cluster.commit("bank", synchronous=False)
        house.cluster.write()
        await house.base()
        database = MemoryDatabase(house.world)
        assert commit in house.cluster.commits(house.world.kept[BASE].cuts["data"][1])
        assert not (await database.durable()).covers(commit.position)
        assert (await database.ceiling()).covers(commit.position)
        house.cluster.crash(power=True)
        assert [entry.commit for entry in house.cluster.logs[1]][-1] == commit, "what a cut holds is on the disk"

    told(story)


def test_after_a_power_cut_what_was_neither_flushed_nor_written_back_is_gone() -> None:
    async def story(house: House) -> None:
        kept = house.cluster.commit("bank")
        lost = house.cluster.commit("bank", synchronous=False)
        house.cluster.crash(power=True)
        house.cluster.restart()
        commits = [entry.commit for entry in house.cluster.entries(house.cluster.lineage()) if entry.commit]
        assert commits == [kept]
        again = house.cluster.commit("bank")
        assert again.end <= lost.end + 300, "its place in the log is used again"

    told(story)


def test_a_torn_base_starts_only_with_its_bracket_and_then_is_exact() -> None:
    async def story(house: House) -> None:
        database = MemoryDatabase(house.world)
        await house.flush()
        async with database.bracket("base") as stop:
            cutting = asyncio.create_task(house.storage.snapshot(VOLUMES, BASE, "tag"))
            await asyncio.sleep(0.0005)
            during = house.cluster.commit("bank")
            house.cluster.write_back()
            await cutting
            bracket = await stop()
        wanted, _ = adjacent(house)
        assert house.world.kept[BASE].cuts["data"][1].torn
        with pytest.raises(RestoreError, match="not one instant"):
            await house.restore(house.at(wanted.start, inclusive=True))
        assert await house.restore(house.at(wanted.start, inclusive=True), bracket) == [during.name, wanted.name]
        with pytest.raises(RestoreError, match="before consistent recovery point"):
            await house.restore(house.at(during.start, inclusive=True), bracket)

    told(story, TORN)


def test_a_restore_follows_the_timeline_of_its_target() -> None:
    async def story(house: House) -> None:
        await house.base()
        kept, dropped = adjacent(house)
        await house.journaled()
        house.cluster.promote(kept.end)
        new, _ = adjacent(house)
        assert await house.restore(house.at(new.start, inclusive=True)) == [kept.name, new.name]
        old = Target(dropped.history, dropped.start, True, "on the timeline that was left")
        assert await house.restore(old) == [kept.name, dropped.name]

    told(story)


def test_a_base_from_behind_a_fork_is_no_base_for_the_other_branch() -> None:
    async def story(house: House) -> None:
        kept, _ = adjacent(house)
        await house.base()
        await house.journaled()
        house.cluster.promote(kept.end)
        new, _ = adjacent(house)
        with pytest.raises((RestoreError, JournalError)):
            await house.restore(house.at(new.start, inclusive=True))

    told(story)


def test_a_restore_to_a_time_holds_what_was_committed_until_then() -> None:
    async def story(house: House) -> None:
        await house.base()
        commits = []
        for _ in range(4):
            await asyncio.sleep(0.002)
            commits.append(house.cluster.commit("bank"))
        for inclusive, expected in ((True, commits[:2]), (False, commits[:1])):
            target = Target(house.cluster.history, None, inclusive, "a time", time=commits[1].time)
            assert await house.restore(target) == [commit.name for commit in expected]

    told(story)
