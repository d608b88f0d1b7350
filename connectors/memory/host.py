"""Port `Agent`: the host whose cache lies between the cluster and the storage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from connectors.memory.world import World
from trigger.errors import AgentError
from trigger.model import (
    Flush,
    Volume,
)


class MemoryAgent:
    """Port `Agent`: the host whose cache lies between the cluster and the storage."""

    def __init__(self, world: World, name: str = "memory") -> None:
        self._world = world
        self.name = name
        self._volumes: tuple[Volume, ...] | None = None

    async def prepare(self, volumes: Sequence[Volume]) -> None:
        """Remember the volumes."""
        await asyncio.sleep(0)
        self._volumes = tuple(volumes)

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        """Bring what was written to stable storage; an error of write-back poisons its volume."""
        if self._volumes is None:
            raise AgentError(f"{self.name}: flush of {point} before prepare", retryable=False)
        try:
            async with asyncio.timeout(deadline_seconds):
                return tuple([await self._flush(volume) for volume in self._volumes])
        except TimeoutError:
            raise AgentError(f"{self.name}: not flushed within {deadline_seconds:g} s") from None

    async def _flush(self, volume: Volume) -> Flush:
        began_at = self._world.now()
        await asyncio.sleep(0)
        if volume.name in self._world.write_errors:
            self._world.write_errors.discard(volume.name)
            self._world.poisoned.add(volume.name)
        if volume.name in self._world.poisoned:
            raise AgentError(f"{self.name}: write-back of {volume.name} failed", retryable=False)
        self._world.on(volume.name).write_back()
        return Flush(self.name, volume.name, "0:0", "0", began_at, self._world.now())

    async def clear(self, volume: str) -> None:
        """Trust a poisoned volume again, by an operator's word."""
        self._world.poisoned.discard(volume)

    async def close(self) -> None:
        """Let go of the volumes."""
        self._volumes = None
