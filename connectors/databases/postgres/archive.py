"""Feed of a journal: an archive that is there already, read through the operator's own `restore_command`."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
from collections.abc import Awaitable, Callable

from connectors.databases.postgres.programs import as_owner, last_lines, minimal_environment
from connectors.databases.postgres.segments import SegmentFolder
from connectors.databases.postgres.wal import SegmentName
from trigger.errors import ConfigError
from trigger.model import Finding
from trigger.position import History, Position

_FETCHING = "fetching"


class ArchiveReader:
    """Follows an archive: fetches each next segment as soon as it is there, and any file that a restore asks for.

    The command is the operator's own shell text, in the form of PostgreSQL's setting `restore_command`, and is run as
    PostgreSQL runs it: `%f` is the file, `%p` where to put it, `%%` a percent sign, and `/bin/sh -c` reads the rest.
    Nothing but names of segments, of which we know the form, is put into it.

    Args:
        command: as above.
        begin: gives where to begin while the folder is empty: a position that the oldest point needs.
        owner: user and group id to run as; ignored where we are not root.
        poll_seconds: how often the archive is asked for what is not there yet.
        fetch_seconds: how long one run of the command may take.
    """

    def __init__(
        self,
        command: str,
        begin: Callable[[], Awaitable[Position]],
        *,
        owner: tuple[int, int] | None = None,
        poll_seconds: float = 5.0,
        fetch_seconds: float = 120.0,
    ) -> None:
        if "%f" not in command or "%p" not in command:
            raise ConfigError(f"not a restore_command: {command!r}", hint="it needs %f and %p, as in cp /archive/%f %p")
        self._command = command
        self._begin = begin
        self.owner = owner
        self._poll_seconds = poll_seconds
        self._fetch_seconds = fetch_seconds
        self._words = ""

    def findings(self) -> list[Finding]:
        """Give nothing: that the archive has no further segment yet is the usual state."""
        return []

    def fetch(self, segments: SegmentFolder, name: str) -> bool:
        """Fetch one file if the folder does not have it; whether it has it now. Blocks for `fetch_seconds` at most."""
        if segments.locate(name) is not None:
            return True
        path = segments.path / f"{_FETCHING}.{os.getpid()}.{name}"  # a restore fetches beside the service
        path.unlink(missing_ok=True)
        marks = {"%f": name, "%p": str(path), "%%": "%"}
        command = re.sub("%[fp%]", lambda mark: marks[mark[0]], self._command)
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._fetch_seconds,
                env=minimal_environment(),
                cwd=segments.path,
                **as_owner(self.owner),
            )
        except subprocess.TimeoutExpired:
            path.unlink(missing_ok=True)
            return False
        self._words = last_lines((done.stdout + done.stderr).decode(errors="replace"))
        if done.returncode != 0 or not path.exists():
            path.unlink(missing_ok=True)
            return False
        path.replace(segments.path / name)
        return True

    async def run(self, segments: SegmentFolder) -> None:
        """Fetch what comes, segment by segment and timeline by timeline, until cancelled."""
        following = await self._resume(segments)
        while True:
            text = following.text(segments.segment_bytes)
            if await asyncio.to_thread(self.fetch, segments, text):
                following = SegmentName(following.timeline, following.number + 1)
            elif (fork := await self._next_timeline(segments, following)) is not None:
                following = fork
            else:
                await asyncio.sleep(self._poll_seconds)

    async def _resume(self, segments: SegmentFolder) -> SegmentName:
        held = [name for name in await asyncio.to_thread(segments.names) if not name.partial]
        if held:
            newest = max(held)
            return SegmentName(newest.timeline, newest.number + 1)
        begin = await self._begin()
        return SegmentName(begin.history.timeline, begin.at // segments.segment_bytes)

    async def _next_timeline(self, segments: SegmentFolder, following: SegmentName) -> SegmentName | None:
        """Give where a timeline that left this one goes on; None while the archive knows of none."""
        for timeline in itertools.count(following.timeline + 1):
            if not await asyncio.to_thread(self.fetch, segments, f"{timeline:08X}.history"):
                return None
            lineage = await asyncio.to_thread(segments.lineage, History("", timeline))
            left = dict(lineage.forks).get(following.timeline)
            if left is not None:
                return SegmentName(timeline, left // segments.segment_bytes)
        return None
