"""The journal of a PostgreSQL cluster: its write-ahead log, kept so that every commit can be replayed.

One folder holds the segments and timeline history files as PostgreSQL names them. How they get there is the feed's
business: `receiver` streams them, `archive` reads them from an archive that is there already.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Protocol

from connectors.databases.postgres.log.audit import Audit
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import WalDump
from trigger.errors import JournalError
from trigger.model import Extent, Finding, Severity, Target
from trigger.ports import Progress
from trigger.position import History, Lineage, Lsn, Position


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
        await self._segments.threads.run(partial(self._segments.make, self._feed.owner))
        await self._feed.run(self._segments)

    async def extents(self) -> list[Extent]:
        """Give what it holds without a hole, by timeline and position; damaged segments are not held."""
        await self._segments.threads.run(self._audit.load)
        return await self._segments.threads.run(self._segments.extents)

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history` by its timeline history file; raises `JournalError` where that is not held."""
        return await self._segments.threads.run(partial(self._segments.lineage, history))

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

        For an LSN these are the segments through the one that holds it and the one behind, for a time or the end all
        that is held on the target's timeline; and every history file, so that a clone's own timeline gets a number
        that production never used.

        Raises:
            JournalError: part of the stretch is missing or damaged; the message names the first such segment.
        """
        await self._segments.threads.run(self._audit.load)
        try:
            return await self._segments.threads.run(partial(self._stage, start, target, folder, progress))
        except OSError as error:
            raise JournalError(
                f"the log could not be staged in {folder}: {error}", hint="see that the folder can be written"
            ) from error

    def _stage(self, start: Position, target: Target, folder: Path, progress: Progress) -> int:
        def fetch(name: str) -> bool:
            return self._feed.fetch(self._segments, name)

        return self._segments.stage(start, target, folder, progress, fetch)

    async def release(self, before: Lsn) -> int:
        """Delete the segments that lie wholly before `before`; gives how many. History files stay: they are tiny."""
        async with self._audit.between_segments:
            return await self._segments.threads.run(partial(self._release, before))

    def _release(self, before: Lsn) -> int:
        going = self._segments.before(before)
        if going:
            with contextlib.suppress(JournalError):  # where the disk is full, what goes makes room for it
                self._audit.forget(before)
            self._segments.delete(going)
            self._audit.forget(before)
        return len(going)
