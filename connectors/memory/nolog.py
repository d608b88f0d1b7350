"""Port `Journal` of a source that only triggers: there is no log, so nothing is kept and nothing is replayed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path

from trigger.model import Extent, Finding, Logged, Severity
from trigger.ports import Copies, Progress
from trigger.position import History, Lineage, Name, Position
from trigger.replay import Replay


class NoLog:
    """Port `Journal`: keeps nothing; points are brought back as they were cut."""

    replays = False

    def look_into(self, copies: Copies) -> None:
        """Do nothing: no history has a past."""

    async def check(self) -> list[Finding]:
        """Say what can be brought back."""
        await asyncio.sleep(0)
        return [Finding("journal", Severity.NOTE, "no log is kept: points are brought back as they were cut")]

    async def run(self) -> None:
        """Do nothing until cancelled."""
        await asyncio.Event().wait()

    async def begun(self) -> bool:
        """Give that nothing has to be waited for."""
        await asyncio.sleep(0)
        return True

    async def is_void(self) -> bool:
        """Give that nothing is missing."""
        await asyncio.sleep(0)
        return False

    async def catch_up(self) -> None:
        """Do nothing."""
        await asyncio.sleep(0)

    async def extents(self) -> list[Extent]:
        """Give that nothing is held."""
        await asyncio.sleep(0)
        return []

    async def lineage(self, history: History) -> Lineage:
        """Give the history alone: nothing is known of its past."""
        await asyncio.sleep(0)
        return Lineage(history)

    async def audit(self) -> list[Finding]:
        """Find nothing wrong with nothing."""
        await asyncio.sleep(0)
        return []

    async def lacks_room(self) -> Finding | None:
        """Give that nothing needs room."""
        await asyncio.sleep(0)
        return None

    async def stage(self, replay: Replay, folder: Path, progress: Progress) -> int:  # noqa: ARG002 - the port's
        """Put nothing into the folder."""
        await asyncio.sleep(0)
        progress("stage", 0, 0)
        return 0

    async def release(self, starts: Collection[Position]) -> int:  # noqa: ARG002 - the port's
        """Let go of nothing."""
        await asyncio.sleep(0)
        return 0

    async def commits(self, lineage: Lineage, begin: int, end: int, like: Name) -> AsyncGenerator[Logged, None]:  # noqa: ARG002 - the port's
        """Give nothing."""
        await asyncio.sleep(0)
        nothing: tuple[Logged, ...] = ()
        for one in nothing:
            yield one

    async def named(self, commits: Sequence[Logged]) -> list[Logged]:
        """Give them as they are."""
        await asyncio.sleep(0)
        return list(commits)

    def file_start(self, position: Position) -> int:
        """Give the place itself: there are no files."""
        return position.at
