"""The port of a host's client, which flushes what the host holds in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trigger.model import Flush, Volume


class Agent(Protocol):
    """A host's client, which flushes what the host still holds in memory."""

    name: str

    async def prepare(self, volumes: Sequence[Volume]) -> None:
        """Get ready before any round: open what must be open so that an earlier write-back error is seen.

        Raises:
            AgentError: a volume is not there, or may not be opened.
        """
        ...

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        """Write everything of the prepared volumes to stable storage; one proof a volume.

        An error of write-back, even an old one that nobody has seen yet, fails the flush and poisons the volume:
        every later flush fails too, until an operator has looked and cleared it.

        Raises:
            AgentError: not flushed, or not within `deadline_seconds`.
        """
        ...

    async def clear(self, volume: str) -> None:
        """Trust a poisoned volume again, on an operator's word; one that is not poisoned is no error."""
        ...

    async def close(self) -> None:
        """Let go of the volumes. Never raises."""
        ...
