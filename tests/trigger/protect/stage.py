"""The whole main path over a world in memory, for tests of single steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from connectors.memory import MemoryAgent, MemoryClock, MemoryDatabase, MemorySource, MemoryStorage, World
from tests.simulation.virtual import VirtualLoop
from trigger.catalog.catalog import Catalog
from trigger.config.options import PointOptions
from trigger.model import Outcome, RecoveryPoint, Volume
from trigger.ports import Capability
from trigger.position import Name
from trigger.protect.agenda import Agenda
from trigger.protect.logs import Logs
from trigger.protect.pipeline import Protected, protect
from trigger.protect.window import BOUND, Window

T = TypeVar("T")


async def inline(work: Callable[[], T]) -> T:
    return work()


class Told:
    """Passes every call on, notes its name, and raises what was put down for it, before or after its effect."""

    def __init__(self, port: object, stage: Stage) -> None:
        self._port = port
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._port, name)
        if not asyncio.iscoroutinefunction(value):
            return value

        async def call(*arguments: Any, **named: Any) -> Any:
            self._stage.calls.append(name)
            await self._stage.at(f"before {name}")
            answer = await value(*arguments, **named)
            await self._stage.at(f"after {name}")
            return answer

        return call


class Stage:
    """A world with the whole main path over it; calls can be made to fail, and things to happen between them."""

    def __init__(
        self,
        *streams: str,
        capabilities: frozenset[Capability] = frozenset(Capability),
        bound: int = BOUND,
        **options: Any,
    ) -> None:
        self.bound = bound
        self.loop = VirtualLoop()
        self.world = World(seconds=self.loop.time)
        self.cluster = self.world.cluster
        self.calls: list[str] = []
        self.turns: dict[str, list[Exception | Callable[[], object]]] = {}
        self.streams = streams or ("bank",)
        for stream in self.streams:
            self.cluster.recreate_slot(stream)
        self.capabilities = capabilities
        self.options = PointOptions(**{"min_interval_seconds": 0, "catch_all_seconds": None, **options})

    def when(self, moment: str, *turns: Exception | Callable[[], object]) -> None:
        """Let these happen, one each time `before x` or `after x` comes."""
        self.turns.setdefault(moment, []).extend(turns)

    async def at(self, moment: str) -> None:
        waiting = self.turns.get(moment)
        if not waiting:
            return
        turn = waiting.pop(0)
        if isinstance(turn, Exception):
            raise turn
        answer = turn()
        if asyncio.iscoroutine(answer):
            await answer

    def told(self, port: T) -> T:
        return cast("T", Told(port, self))

    def play(self, act: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            self.catalog = await Catalog.open(":memory:", run=inline)
            self.storage = MemoryStorage(self.world, capabilities=self.capabilities)
            agent = MemoryAgent(self.world)
            await agent.prepare((Volume("data", "/data"),))
            sources = [self.told(MemorySource(self.world, stream)) for stream in self.streams]
            self.window = Window(sources, {}, lambda _: "all", self.bound)
            self.agenda = Agenda(self.options, None)
            database = self.told(MemoryDatabase(self.world))
            self.protected = Protected(
                Logs(dict.fromkeys(self.streams, database)),
                (Volume("data", "/data"),),
                (self.told(agent),),
                self.told(self.storage),
                self.told(self.catalog),
                MemoryClock(self.world),
                self.options,
                30,
                random.Random(0),
            )
            self.readers = [asyncio.ensure_future(self.window.follow(stream)) for stream in self.streams]
            self.main = asyncio.ensure_future(protect(self.protected, self.window, self.agenda))
            try:
                await asyncio.sleep(1)
                await act(self)
            finally:
                for task in (*self.readers, self.main):
                    task.cancel()
                await asyncio.wait([*self.readers, self.main])

        self.loop.run(main())

    async def points(self) -> list[RecoveryPoint]:
        return await self.catalog.points(newest_first=False)

    async def outcomes(self) -> dict[Name, Outcome]:
        return {found.record.name: found.record.outcome for found in await self.catalog.find()}

    async def stop(self, within_seconds: float) -> None:
        """Stop as SIGTERM does."""
        self.agenda.stopping = True
        self.window.wake()
        async with asyncio.timeout(within_seconds):
            await self.main
