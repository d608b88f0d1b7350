"""The journal of a PostgreSQL cluster: its write-ahead log, kept so that every commit can be replayed.

One folder holds the segments and timeline history files as PostgreSQL names them. How they get there is the feed's
business: `receiver` streams them, `archive` reads them from an archive that is there already.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Protocol

from connectors.databases.postgres.log.audit import Audit
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import Stretch, WalDump
from trigger.errors import JournalError
from trigger.model import Extent, Finding, Severity, StopKind, Target
from trigger.ports import Progress
from trigger.position import History, Lineage, Lsn, Position

_PROOF_SEGMENTS = 32
"""Behind so many segments without a commit the next one is not looked for further."""


class Feed(Protocol):
    """What brings the log into the folder."""

    owner: tuple[int, int] | None
    """User and group id under which it writes into the folder; None for ours."""

    async def run(self, segments: SegmentFolder) -> None:
        """Bring the log until cancelled; raises `JournalError` where that is no longer possible."""
        ...

    def fetch(self, segments: SegmentFolder, name: str) -> bool:
        """Try to bring one file by name, now; whether it is there. Blocks, and ends by a deadline of its own."""
        ...

    def findings(self) -> list[Finding]:
        """Give what hinders the feed at present."""
        ...

    async def check(self, segment_bytes: int) -> list[Finding]:
        """Give what a pre-flight check has to say of the feed; see port `Journal`."""
        ...


class PostgresJournal:
    """Port `Journal` over a folder of segments and a feed.

    Args:
        segments: the folder.
        feed: what fills it.
        dump: `pg_waldump` of the cluster's version, for the audit.
    """

    def __init__(self, segments: SegmentFolder, feed: Feed, dump: WalDump) -> None:
        self._segments = segments
        self._feed = feed
        self._dump = dump
        self._audit = Audit(segments, dump)

    async def check(self) -> list[Finding]:
        """Give what a pre-flight check has to say of where the log is to come from; changes nothing."""
        return await self._feed.check(self._segments.segment_bytes)

    async def run(self) -> None:
        """Keep the log until cancelled.

        What hinders it meanwhile (no connection, no room) is told by `audit` and tried again.

        Raises:
            JournalError: the folder holds the log of another cluster, or cannot be made.
        """
        await asyncio.to_thread(self._segments.make, self._feed.owner)
        await self._feed.run(self._segments)

    async def extents(self) -> list[Extent]:
        """Give what it holds without a hole, by timeline and position; damaged segments are not held."""
        await asyncio.to_thread(self._audit.load)
        return await asyncio.to_thread(self._segments.extents)

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history` by its timeline history file; raises `JournalError` where that is not held."""
        return await asyncio.to_thread(self._segments.lineage, history)

    async def audit(self) -> list[Finding]:
        """Give all that is wrong with the segments by now, and what hinders the feed at present."""
        hindered = self._feed.findings()
        try:
            return [*hindered, *await self._audit.run()]
        except (OSError, JournalError) as error:
            message = f"the segments in {self._segments.path} cannot be looked at: {error}"
            return [*hindered, Finding("audit", Severity.WARNING, message, "mount the folder, and give it to us")]

    async def stage(self, start: Position, target: Target, folder: Path, progress: Progress) -> int:
        """Put into `folder` every file that a replay from `start` to `target` asks for; gives the bytes put there.

        XX every history file, so that a clone's own timeline gets a number
                that production never used.

                Raises:
                    JournalError: part of the stretch is missing or damaged; the message names the first such segment.
        """
        await asyncio.to_thread(self._audit.load)
        try:
            size = await asyncio.to_thread(self._segments.stage, start, target, folder, progress, self._fetch)
        except OSError as error:
            raise JournalError(
                f"the log could not be staged in {folder}: {error}", hint="see that the folder can be written"
            ) from error
        if target.kind is StopKind.LSN:
            with contextlib.suppress(JournalError):  # the restore can do without a further proof
                await self._stage_next_commit(target, folder)
        return size

    async def _stage_next_commit(self, target: Target, folder: Path) -> None:
        """Stage on until the next commit behind the target is there: that the clone lacks it is the proof."""
        behind = Lsn(target.at + (1 if target.inclusive else 0))
        staged, more = SegmentFolder(folder, self._segments.segment_bytes), 1
        while (end := await asyncio.to_thread(staged.end_of_run, target.history.timeline, behind)) is not None:
            stretch = Stretch(folder, target.history.timeline, behind, end)
            if more > _PROOF_SEGMENTS or await self._dump.commits(stretch, limit=1):
                return
            if not await asyncio.to_thread(self._segments.stage_behind, target, folder, self._fetch, more):
                return
            more *= 2

    def _fetch(self, name: str) -> bool:
        return self._feed.fetch(self._segments, name)

    async def release(self, before: Lsn) -> int:
        """Delete the segments that lie wholly before `before`; gives how many. History files stay: they are tiny."""
        async with self._audit.between_segments:
            return await asyncio.to_thread(self._release, before)

    def _release(self, before: Lsn) -> int:
        going = self._segments.before(before)
        if going:
            with contextlib.suppress(JournalError):  # where the disk is full, what goes makes room for it
                self._audit.forget(before)
            self._segments.delete(going)
            self._audit.forget(before)
        return len(going)
