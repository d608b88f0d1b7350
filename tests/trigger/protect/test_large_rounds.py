"""A round of very many commits keeps nothing else from going on: the event loop turns while they are packed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectors.memory import MemoryAgent, MemoryClock, MemoryDatabase, MemoryStorage, World
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.reconcile import reconcile
from trigger.config.options import PointOptions
from trigger.model import Cause, Changes, State, Volume
from trigger.position import Name
from trigger.protect.logs import Logs
from trigger.protect.pipeline import Protected, take
from trigger.protect.qualify import Pending
from trigger.protect.window import LARGE, Collected

MANY = 100_000
TURNS = 5
STUCK_SECONDS = 10.0


class Ticker:
    """Counts the turns of the event loop, and lets a piece of work wait for some of them."""

    def __init__(self) -> None:
        self._turned = threading.Condition()
        self.turns = 0
        self.waited_for: list[str] = []

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            with self._turned:
                self.turns += 1
                self._turned.notify_all()

    def while_it_turns(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Give `work` that ends only after the loop has turned: where the loop is kept by it, it never does."""

        def slow(*arguments: Any, **named: Any) -> Any:
            if not arguments[0]:  # a tag without commits
                return work(*arguments, **named)
            with self._turned:
                until = self.turns + TURNS
                assert self._turned.wait_for(lambda: self.turns >= until, STUCK_SECONDS), f"{name} keeps the loop"
            self.waited_for.append(name)
            return work(*arguments, **named)

        return slow


async def cluster_of(world: World, catalog: Catalog) -> Protected:
    volumes, agent = (Volume("data", "/data"),), MemoryAgent(world)
    await agent.prepare(volumes)
    logs = Logs({"bank": MemoryDatabase(world)})
    storage = MemoryStorage(world)
    return Protected(logs, volumes, [agent], storage, catalog, MemoryClock(world), PointOptions(), 30)


def commits(world: World, count: int, **more: Any) -> Collected:
    """Give so many commits that wait, all before the end of the world's log."""
    last = world.cluster.commit("bank")
    first = last.start - 2 * count
    ordinary = replace(last, tables={"public.t": Changes(1)}, **more)
    place = world.cluster.history.place
    made = (
        replace(ordinary, start=place(first + 2 * n), end=place(first + 2 * n + 1), name=Name("", n + 1))
        for n in range(count)
    )
    pending = [Pending(commit, "all", 0.0) for commit in made]
    return Collected(pending, {"bank": pending[-1].commit.position})


@pytest.fixture
def ticker(monkeypatch: pytest.MonkeyPatch) -> Ticker:
    made = Ticker()
    for where, name in ((Collected, "records"), (Collected, "tables"), (tag, "pack"), (tag, "unpack_data")):
        monkeypatch.setattr(where, name, made.while_it_turns(name, getattr(where, name)))
    return made


async def ticking(ticker: Ticker, path: Path, act: Callable[[World, Catalog], Any]) -> None:
    world = World(seconds=asyncio.get_running_loop().time)
    world.cluster.recreate_slot("bank")
    world.cluster.write_ahead(4 * MANY)
    catalog = await Catalog.open(path)
    ticks = asyncio.create_task(ticker.tick())
    try:
        await act(world, catalog)
    finally:
        ticks.cancel()
        await catalog.close()


def test_the_loop_turns_while_a_hundred_thousand_commits_are_packed_into_a_point(
    ticker: Ticker, tmp_path: Path
) -> None:
    async def act(world: World, catalog: Catalog) -> None:
        point = await take(await cluster_of(world, catalog), Cause.COMMIT, commits(world, MANY))
        assert (point.state, point.commits) == (State.SEALED, MANY)
        assert point.tables == {"bank.public.t": Changes(MANY)}
        assert ticker.waited_for == ["records", "tables", "pack"]

    asyncio.run(ticking(ticker, tmp_path / "catalog", act))


def test_the_loop_turns_while_few_commits_with_very_long_markers_are_packed(ticker: Ticker, tmp_path: Path) -> None:
    async def act(world: World, catalog: Catalog) -> None:
        few = commits(world, LARGE // 2, markers=("m" * 100_000,))
        assert (await take(await cluster_of(world, catalog), Cause.COMMIT, few)).state is State.SEALED
        assert ticker.waited_for == ["records", "tables", "pack"]

    asyncio.run(ticking(ticker, tmp_path / "catalog", act))


def test_the_loop_turns_while_the_tag_of_many_commits_is_read_or_mended(ticker: Ticker, tmp_path: Path) -> None:
    async def act(world: World, catalog: Catalog) -> None:
        cluster = await cluster_of(world, catalog)
        sealed = await take(cluster, Cause.COMMIT, commits(world, MANY // 10))
        ticker.waited_for.clear()
        lost = await Catalog.open(tmp_path / "anew")
        try:
            assert (await reconcile(lost, cluster.storage)).adopted == [sealed.id]
        finally:
            await lost.close()
        assert set(ticker.waited_for) == {"unpack_data"}
        ticker.waited_for.clear()
        world.kept[sealed.id].tag = None
        assert (await reconcile(catalog, cluster.storage)).mended == [sealed.id]
        assert ticker.waited_for == ["pack"]

    asyncio.run(ticking(ticker, tmp_path / "catalog", act))


def test_a_small_round_is_summed_up_at_once() -> None:
    async def act() -> None:
        world = World(seconds=asyncio.get_running_loop().time)
        world.cluster.recreate_slot("bank")
        world.cluster.write_ahead(4 * MANY)
        catalog = await Catalog.open(":memory:")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Catalog, "apart", None)  # would be no call
            point = await take(await cluster_of(world, catalog), Cause.COMMIT, commits(world, LARGE))
        assert (point.state, point.commits) == (State.SEALED, LARGE)
        await catalog.close()

    asyncio.run(act())
