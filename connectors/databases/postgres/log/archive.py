"""Feed of a journal: an archive that is there already, read through the operator's own `restore_command`.

PostgreSQL's convention for such a command is kept: it fails for a file that is not there, so a failure alone is no
trouble. It is one where the command itself could not do its work (ended by a signal, not found, not executable), and
where the server finished a segment long ago that the archive still does not give.

An archive keeps what an earlier life of the cluster, or another server, put there: timelines that a restore in place
began and `--undo` left, or a standby that is no longer the primary. Where an older copy of the cluster was put back it
has files under names that the server has not come to yet. So no timeline is followed but those that lead to where the
server itself is, and no segment is taken but one that the server has finished, and holds the same log in. Of what it
has removed it cannot say: that is taken where it joins a segment that was taken before. So what lies in the folder was
found to be the server's, and a restore goes on from it though the server is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.files import flushed_size, take_place
from connectors.databases.postgres.log.folders import is_of
from connectors.databases.postgres.log.proof import Compared
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.programs import as_owner, last_lines, minimal_environment
from connectors.threads import Threads, ask
from trigger.errors import ConfigError, DatabaseError, JournalError, PositionError, SourceError
from trigger.model import Finding, Severity
from trigger.position import Lineage, Position

_COMMAND = "restore_command"
_NAME_LENGTH = 24
"""Characters of a segment's name."""
_TRY_SECONDS = 20.0
"""How long the command may take when it is only tried: a start waits for it."""
_FETCHING = "fetching"
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_@+,./:=-]*")
_HIGHEST_CODE = 125
"""Above it a shell says that it did not find the command, or could not run it."""
_BY_SIGNAL = 128
"""Added by a shell to the number of the signal that ended what it ran."""
_SEVERAL = 4
"""So many finished segments that do not come from one look to the next are too many, however short the time."""
_MEND = (
    "see that the command can be run by hand as the user of the service, or correct journal.restore_command and start"
    " the service again; commits since the last segment that came cannot be restored exactly until then"
)
_FEED = (
    "see that the server archives (archive_mode, archive_command, pg_stat_archiver), and that restore_command reads the"
    " same archive and may do so; commits in this segment and behind it cannot be restored exactly until it comes"
)
_SKIP = (
    "; if it is lost for good, stop the service, copy the next segment that there is into {folder}, as a file that the"
    " user of the service may read, and start it again: the journal goes on behind it, and the first point from then on"
    " is the next to restore from"
)

_FOREIGN = "it has the log of another life of the cluster under that name, as where an older copy was put back"
_FOREIGN_MEND = (
    "move what the archive has of the earlier life to another place, so that the server can archive its own log under"
    " those names, and see in pg_stat_archiver that it does; commits in that log cannot be restored exactly until then"
)
_UNPROVEN = "what the archive has under that name cannot be held against the server, which has removed its own"
_UNANSWERED = "what the archive has under that name cannot be held against the server, which does not answer"
_UNANSWERED_SECONDS = 10.0
"""So long a server that does not answer is not asked again: many segments may be fetched for one restore."""
_COMPARE_SECONDS = 60.0
"""How long a thread waits for a comparison, which has deadlines of its own."""


class _Refusal(NamedTuple):
    """Why a file was not given."""

    why: str
    broken: bool
    """Whether the command itself could not do its work, so that nothing is known of the file, or gave another log."""


class Server(Protocol):
    """What the server that fills the archive says of its log; each raises `DatabaseError`."""

    async def redo(self) -> Position:
        """Give a position that the oldest point needs: where to begin while the folder is empty."""
        ...

    async def durable(self) -> Position:
        """Give how far the server has come."""
        ...

    async def lineage(self) -> Lineage:
        """Give the history that it is in, and its past; may raise `PositionError` too."""
        ...

    async def archived(self) -> str:
        """Give the file that it archived last, "" for none."""
        ...

    def compare(self, segments: SegmentFolder, name: SegmentName, file: Path) -> Coroutine[Any, Any, Compared]:
        """Hold a file that may become a segment of a folder against its log; may raise what `lineage` does.

        A segment that it has not finished, and a folder that its log does not go into, is another log.
        """
        ...


class ArchiveReader:
    """Follows an archive: fetches each next segment as soon as it is there, and any file that a restore asks for.

    The command is the operator's own shell text, in the form of PostgreSQL's setting `restore_command`, and is run as
    PostgreSQL runs it: `%f` is the file, `%p` where to put it, `%%` a percent sign, and `/bin/sh -c` reads the rest.
    Nothing but names of segments, of which we know the form, and a path that is no more than that to a shell are put
    into it.

    Args:
        command: as above.
        server: the one that fills the archive.
        owner: user and group id to run as; ignored where we are not root.
        poll_seconds: how often the archive is asked for what is not there yet.
        fetch_seconds: how long one run of the command may take.
        late_seconds: how long the archive may lack a segment that the server has finished before that is a trouble.
    """

    def __init__(
        self,
        command: str,
        server: Server,
        *,
        owner: tuple[int, int] | None = None,
        poll_seconds: float = 5.0,
        fetch_seconds: float = 120.0,
        late_seconds: float = 60.0,
    ) -> None:
        if "%f" not in command or "%p" not in command:
            raise ConfigError(f"not a restore_command: {command!r}", hint="it needs %f and %p, as in cp /archive/%f %p")
        self._command = command
        self._server = server
        self.owner = owner
        self.begun = False
        self._poll_seconds = poll_seconds
        self._fetch_seconds = fetch_seconds
        self._late_seconds = late_seconds
        self._refusal: _Refusal | None = None
        self._threads = Threads("restore_command")
        self._broken = ""
        self._late = ""
        self._folder = Path()
        self._finished_since: float | None = None
        self._unanswered = -math.inf
        self._replaced: dict[str, tuple[int, int]] = {}
        """What was fetched for segments that were damaged, as it looked."""

    async def check(self, segment_bytes: int) -> list[Finding]:
        """Say whether the command brings back what the server archived last; only a copy of it is made, and removed."""
        try:
            last = await self._server.archived()
        except DatabaseError as error:
            return [Finding(_COMMAND, Severity.NOTE, f"not tried, since the server does not answer: {error.message}")]
        name = last[:_NAME_LENGTH]  # a file of a backup is called by its segment, which was archived before it
        if SegmentName.parse(name, segment_bytes) is None:
            return [Finding(_COMMAND, Severity.WARNING, "not tried, since the server has archived no segment", _FEED)]
        with tempfile.TemporaryDirectory(prefix="trigpoint-") as folder:
            path = Path(folder) / name
            refusal = await self._threads.run(partial(self._ask, segment_bytes, name, path, _TRY_SECONDS))
        if refusal is None:
            return [Finding(_COMMAND, Severity.OK, f"brings {name}, which the server archived last")]
        message = f"does not bring {name}, which the server archived last: {refusal.why}"
        return [Finding(_COMMAND, Severity.WARNING, message, _MEND)]

    def findings(self) -> list[Finding]:
        """Give why no log comes out of the archive at present; that it has no further segment yet is no trouble."""
        if self._broken:
            message = f"the archive cannot be read: {self._broken}"
            return [Finding(_COMMAND, Severity.WARNING, message, _FOREIGN_MEND if _FOREIGN in message else _MEND)]
        remedy = _FEED + _SKIP.format(folder=self._folder)
        return [Finding("archive", Severity.WARNING, self._late, remedy)] if self._late else []

    def fetch(self, segments: SegmentFolder, name: str, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        """Fetch one file that the folder does not have, or has cut short or damaged; whether a sound one is there now.

        What is there is replaced where the archive has the file whole. Of a segment the server is asked, in `loop`,
        whether it is its log; nobody is where there is none. Blocks for `fetch_seconds` and what that takes at most.
        """
        if segments.is_sound(name) or self._is_as_fetched(segments, name):
            return segments.is_sound(name)
        path = segments.path / f"{_FETCHING}.{os.getpid()}.{name}"  # a restore fetches beside the service
        path.unlink(missing_ok=True)
        self._refusal = self._ask(segments.segment_bytes, name, path, self._fetch_seconds)
        segment = SegmentName.parse(name, segments.segment_bytes)
        if self._refusal is None and segment is not None:
            self._refusal = self._refuse_other_log(segments, segment, path, loop)
        if self._refusal is not None:
            path.unlink(missing_ok=True)
            return False
        was_there = segments.locate(name)
        take_place(path, was_there or segments.path / name)
        (segments.path / f"{name}.partial").unlink(missing_ok=True)
        if was_there is not None:
            self._replaced[name] = _stamp(was_there)
        return True

    def _refuse_other_log(
        self, segments: SegmentFolder, name: SegmentName, file: Path, loop: asyncio.AbstractEventLoop | None
    ) -> _Refusal | None:
        """Say why a file does not become a segment of a folder; None where it is of the log that is kept there."""
        held = segments.neighbours(name)
        if not all(segments.joins(name, neighbour, file) for neighbour in held):
            return _Refusal(_FOREIGN, broken=True)
        try:
            compared = self._compare(segments, name, file, loop)
        except OSError:  # nobody waits for us any more, or a disk hangs
            return _Refusal(_UNANSWERED, broken=False)
        if compared is Compared.OTHER:
            return _Refusal(_FOREIGN, broken=True)
        if compared is None and (segments.incarnation or not held):
            return _Refusal(_UNANSWERED, broken=False)  # an archive has, or had, an earlier life's log under that name
        return _Refusal(_UNPROVEN, broken=False) if compared is Compared.UNKNOWN and not held else None

    def _compare(
        self, segments: SegmentFolder, name: SegmentName, file: Path, loop: asyncio.AbstractEventLoop | None
    ) -> Compared | None:
        """Have the server asked, from a thread; None where it does not answer.

        Raises:
            OSError: the loop has ended, or a disk hangs.
        """
        if loop is None or time.monotonic() < self._unanswered + _UNANSWERED_SECONDS:
            return None
        try:
            return ask(loop, partial(self._server.compare, segments, name, file), _COMPARE_SECONDS)
        except (DatabaseError, SourceError, PositionError):
            self._unanswered = time.monotonic()
            return None

    def _is_as_fetched(self, segments: SegmentFolder, name: str) -> bool:
        """Whether a file is still the one that was fetched for a damaged one: the archive has no better one."""
        found = segments.locate(name)
        return found is not None and self._replaced.get(name) == _stamp(found)

    def _ask(self, segment_bytes: int, name: str, path: Path, seconds: float) -> _Refusal | None:
        """Have the command put a file at `path`; gives why it did not, None where it is there, whole."""
        try:
            code, words = self._run_command(name, path, seconds)
        except subprocess.TimeoutExpired:
            return _Refusal(f"the command did not end within {seconds:g} s", broken=True)
        if code > _BY_SIGNAL:
            code = _BY_SIGNAL - code
        if code != 0:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            broken = code != -signal.SIGTERM and not 0 <= code <= _HIGHEST_CODE
            return _Refusal(f"the command ended with {how}{words and f': {words}'}", broken)
        try:
            size, is_segment = flushed_size(path), SegmentName.parse(name, segment_bytes) is not None
        except FileNotFoundError:
            return _Refusal("the command ended well and gave no file", broken=False)
        except OSError as error:
            return _Refusal(f"what the command gave is of no use: {error}", broken=True)
        if is_segment and size != segment_bytes:  # perhaps it is just being written there
            return _Refusal(f"the command gave {size} of {segment_bytes} bytes", broken=False)
        return None

    def _run_command(self, name: str, path: Path, seconds: float) -> tuple[int, str]:
        """Give its exit code and its last words; where it does not end in time, it goes with all it started."""
        where = str(path) if _PLAIN_PATH.fullmatch(str(path)) else path.name  # it runs where that lies
        marks = {"%f": name, "%p": where, "%%": "%"}
        with subprocess.Popen(
            ["/bin/sh", "-c", re.sub("%[fp%]", lambda mark: marks[mark[0]], self._command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=minimal_environment(),
            cwd=path.parent,
            start_new_session=True,
            **as_owner(self.owner),
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, last_lines(output.decode(errors="replace"))

    async def catch_up(self, segments: SegmentFolder) -> None:
        """Fetch what the archive has by now behind the newest segment that is held, of its timeline."""
        held = [name for name in await segments.threads.run(segments.names) if not name.partial]
        if not held:
            return
        following = max(held)
        while await self._fetch_own(segments, following := SegmentName(following.timeline, following.number + 1)):
            pass

    async def run(self, segments: SegmentFolder) -> None:
        """Fetch what comes, segment by segment and timeline by timeline, until cancelled.

        It ends where the server's log belongs into another folder: an older copy of the cluster was put back, or
        another cluster in its place.

        Raises:
            JournalError: the folder is empty, and the server does not say where to begin.
        """
        following, self._folder = await self._resume(segments, None), segments.path
        self.begun = True  # the server archives the segment that it writes, from its last checkpoint on at the latest
        lineage, looked_at = None, -math.inf
        while True:
            if (now := asyncio.get_running_loop().time()) >= looked_at + self._poll_seconds:
                looked_at, lineage = now, await self._lineage() or lineage
                if lineage and not await segments.threads.run(partial(is_of, segments, lineage.history)):
                    return
                if lineage and following.timeline not in _timelines(lineage):
                    following = await self._resume(segments, lineage)
            if await self._fetch_own(segments, following):
                self._broken, self._late, self._finished_since = "", "", None
                following = SegmentName(following.timeline, following.number + 1)
                continue
            refusal = self._refusal
            await segments.threads.run(partial(self._fetch_histories, segments, following.timeline))
            if lineage and (wanted := _behind(following, lineage, segments.segment_bytes)) is not None:
                refusal = await segments.threads.run(partial(self._fetch_past, segments, wanted.timeline, lineage))
                if refusal is None:
                    following = wanted
                    continue
                await self._judge(wanted, segments.segment_bytes, refusal)
            elif refusal is not None:
                await self._judge(following, segments.segment_bytes, refusal)
            await segments.threads.run(partial(self._fill, segments, following, asyncio.get_running_loop()))
            if refusal is not None and refusal.why == _UNPROVEN:
                later = await self._later(following, segments.segment_bytes)
                if later != following:
                    following = later
                    continue
            await asyncio.sleep(self._poll_seconds)

    async def _lineage(self) -> Lineage | None:
        """Give the history that the server is in, and its past; of one that does not answer nobody knows."""
        try:
            return await self._server.lineage()
        except (DatabaseError, PositionError):
            return None

    async def _fetch_own(self, segments: SegmentFolder, name: SegmentName) -> bool:
        """Fetch a segment, unless the archive has the log of another life of the cluster under its name."""
        text, loop = name.text(segments.segment_bytes), asyncio.get_running_loop()
        return await segments.threads.run(partial(self.fetch, segments, text, loop))

    async def _later(self, following: SegmentName, segment_bytes: int) -> SegmentName:
        """Give where to go on, right before what the server still has: what lies between is taken once that is here."""
        try:
            redo = await self._server.redo()
        except DatabaseError:
            return following
        return max(following, SegmentName(redo.history.branch, redo.at // segment_bytes - 1))

    async def _judge(self, following: SegmentName, segment_bytes: int, refusal: _Refusal) -> None:
        """Tell an archive that cannot be read, or that the server has left behind, from one that is up to date."""
        self._broken = refusal.why if refusal.broken else ""
        try:
            finished = (await self._server.durable()).at // segment_bytes - following.number
        except DatabaseError:
            return  # the streams say so
        now = asyncio.get_running_loop().time()
        if finished < 1:
            self._late, self._finished_since = "", None
        elif self._finished_since is None:
            self._finished_since = now
        elif finished >= _SEVERAL or now - self._finished_since >= self._late_seconds:
            name = following.text(segment_bytes)
            self._late = f"the archive does not give segment {name}, which the server has finished: {refusal.why}"

    def _fill(self, segments: SegmentFolder, following: SegmentName, loop: asyncio.AbstractEventLoop) -> None:
        """Fetch what is missing or damaged from the oldest segment on, in case that the archive has it by now.

        A server archives a new timeline's history before the segments of the old one that it was behind with.
        """
        for name in sorted(segments.damaged):
            if segments.locate(name) is not None and not self.fetch(segments, name, loop) and self._refusal is not None:
                break
        for missing in _missing(segments.names(), following):
            if not self.fetch(segments, missing.text(segments.segment_bytes), loop):
                return

    async def _resume(self, segments: SegmentFolder, lineage: Lineage | None) -> SegmentName:
        """Give behind what is held; where nothing is, the beginning, which an empty partial segment keeps in mind.

        Where it is known what the server is in, what is held of timelines that do not lead there does not count.
        """
        names = await segments.threads.run(segments.names)
        if lineage is not None:
            names = [name for name in names if name.timeline in _timelines(lineage)]
        if held := [name for name in names if not name.partial]:
            newest = max(held)
            return SegmentName(newest.timeline, newest.number + 1)
        if names:
            return names[0]._replace(partial=False)
        try:
            begin = await self._server.redo()
        except DatabaseError as error:
            raise JournalError(f"the server does not say where the journal has to begin: {error}") from error
        first = SegmentName(begin.history.branch, begin.at // segments.segment_bytes)
        await segments.threads.run(partial(segments.mark, first._replace(partial=True), self.owner))
        return first

    def _fetch_histories(self, segments: SegmentFolder, timeline: int) -> None:
        """Fetch the history of every later timeline, whoever began it: a clone is to get a number that none has."""
        for later in itertools.count(timeline + 1):
            if not self.fetch(segments, f"{later:08X}.history"):
                return

    def _fetch_past(self, segments: SegmentFolder, timeline: int, lineage: Lineage) -> _Refusal | None:
        """Fetch the history file of a timeline that leads to the server's; gives why it is not there."""
        name = f"{timeline:08X}.history"
        if not self.fetch(segments, name):
            return self._refusal and self._refusal._replace(why=f"{name}, which is needed first: {self._refusal.why}")
        past = tuple(itertools.takewhile(lambda fork: fork[0] != timeline, lineage.forks))
        try:
            if segments.lineage(lsn.history("", timeline)).forks == past:
                return None
        except JournalError:  # it is damaged, and asked for again
            pass
        if (file := segments.locate(name)) is not None:
            file.unlink()
        return _Refusal(f"{name}, which is needed first: {_FOREIGN}", broken=True)


def _missing(names: list[SegmentName], following: SegmentName) -> Iterator[SegmentName]:
    """Give what is missing between those that are there, and before them; each beside one that is there by then."""
    held = [name for name in names if not name.partial]
    if held and names[0].partial:  # where it was to begin, and the server had removed its own log, or left the timeline
        for number in reversed(range(names[0].number, held[0].number)):
            yield SegmentName(names[0].timeline, number)
    for before, behind in itertools.pairwise([*held, following]):
        for number in range(before.number + 1, behind.number):
            yield SegmentName(before.timeline, number)


def _stamp(path: Path) -> tuple[int, int]:
    seen = path.stat()
    return seen.st_ino, seen.st_mtime_ns


def _timelines(lineage: Lineage) -> list[int]:
    """Give the timelines that lead to a history, its own last."""
    return [history.branch for history, _, _ in lineage.stretches()]


def _behind(following: SegmentName, lineage: Lineage, segment_bytes: int) -> SegmentName | None:
    """Give where the log goes on that has left the timeline of a segment; None where it is on that one still."""
    for (before, _, left), (after, _, _) in itertools.pairwise(lineage.stretches()):
        if before.branch == following.timeline:
            return SegmentName(after.branch, left // segment_bytes)
    return None
