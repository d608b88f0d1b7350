"""Which life of its log a cluster is in.

A system identifier and a timeline do not tell logs apart: an older copy of the data directory that was put back goes on
under both, and uses the same places for other records. So whatever connects compares what is known from before (how far
the log went, the last record that the journal holds, the last commit that was seen) with what the server has at the
same place. Where that is something else, or the server has not come so far, a new incarnation begins, and no log and
no base of the one before is used across.

The same holds for a timeline that is new to us: the log that it shares with the one before is compared at its end.
One without a history file (`pg_resetwal` gave it its number) shares nothing, and begins a new incarnation.

What the server has no longer at hand cannot be compared, and what the journal's disk does not give neither. A copy put
back then goes unnoticed until its log ends below a place that was seen, or is joined to the journal: a segment whose
first record names another one before it than the journal has is not taken.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName, holds_commit
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.copyboth import NO_PAST, Present, System, identify, timeline_history
from connectors.databases.postgres.stream.physical import read_log
from trigger.errors import JournalError, PositionError, SourceError
from trigger.model import Commit, CommitRecord
from trigger.ports import Seen
from trigger.position import LAST, History, Position

_COMPARED_BYTES = 16_384
_SMALLEST_SEGMENT_BYTES = 1 << 20
T = TypeVar("T")
ReadLog = Callable[[str, int, int, int, float], Awaitable[bytes | None]]


@dataclass(slots=True)
class Lives:
    """Knows which incarnation of each cluster is the present one; shared by all that connect to it.

    Args:
        deadline_seconds: bound of one comparison.
        read: gives bytes of the server's log; see `read_log`.
    """

    deadline_seconds: float = 10.0
    read: ReadLog = read_log
    folders: LogFolders | None = None
    """Where the journal keeps its log, once there is one; it remembers the incarnations too."""
    writer: tuple[int, int] | None = None
    """Who writes into these folders."""
    _newest: dict[str, int] = field(default_factory=dict)
    _looked: set[str] = field(default_factory=set)
    _confirmed: History | None = None
    _ends: dict[History, int] = field(default_factory=dict)
    _last: dict[History, Commit | CommitRecord] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def recognise(self, seen: Collection[Seen]) -> None:
        """Take note of what is known from before."""
        for position, commit in seen:
            history = position.history
            self._newest[history.system] = max(self._newest.get(history.system, 0), history.incarnation)
            self._note(position)
            if commit is not None:
                self._keep(history, commit)

    def saw(self, commit: Commit) -> None:
        """Take note of a commit that a stream has delivered, so that no other log passes for the one that holds it."""
        self._note(commit.position)
        self._keep(commit.history, commit)

    def _keep(self, history: History, commit: Commit | CommitRecord) -> None:
        """Keep the last commit of a history, of whatever stream it is."""
        last = self._last.get(history)
        if last is None or last.start < commit.start:
            self._last[history] = commit

    def history(self, system: str, timeline: int) -> History:
        """Give the history of a timeline in the newest incarnation that is known; asks nobody."""
        return lsn.history(system, timeline, self._newest.get(system, 0))

    def newest_known(self) -> History | None:
        """Give the history that was seen last, as far as is known without asking; None for nothing.

        That is the one that a server was found in; before, the one with the latest commit.
        """
        if self._confirmed is not None:
            return self._confirmed
        made = {history: commit.time_us for history, commit in self._last.items()}
        return max(self._ends, key=lambda history: (made.get(history, -1), history.age), default=None)

    async def confirm(self, dsn: str, through: Position | None = None) -> Present:
        """Give the history that the server behind `dsn` is in, a new one where it is not the one that was known.

        It takes one connection in replication mode after the other, none of which is left open: a server has few.

        Args:
            dsn: how to connect.
            through: how far its log was seen.

        Raises:
            SourceError: the server did not answer, or a folder for a new log cannot be made.
        """
        async with self._turn:
            system = await identify(dsn, self.deadline_seconds)
            await self._look(system.identifier)
            history = self.history(system.identifier, system.timeline)
            if through is not None:
                self._note(through)
            known = await self._known_of(history)
            if known.end > system.flushed:  # it went on meanwhile, maybe
                system = await self._still(dsn, system)
            if await self._contradiction(dsn, system, history, known):
                past = await timeline_history(dsn, system.timeline, self.deadline_seconds)
                try:
                    history = await self._in_thread(partial(self._begin_anew, history, past))
                except (JournalError, OSError) as error:
                    raise SourceError(
                        f"the log is another one by now, and cannot be given a folder: {error}"
                    ) from error
            self._confirmed = history
            return Present(history, system.flushed)

    async def _look(self, system: str) -> None:
        """Take note of the incarnations that the journal has folders of; where its disk does not answer, next time."""
        if system in self._looked or self.folders is None:
            return
        with contextlib.suppress(OSError, JournalError):
            newest = await self._in_thread(partial(self.folders.newest, system))
            self._newest[system] = max(self._newest.get(system, 0), newest)
            self._looked.add(system)

    async def _in_thread(self, look: Callable[[], T]) -> T:
        """Look into the journal's folders; raises `TimeoutError`, an `OSError`, where their disk hangs."""
        if self.folders is None:
            return look()
        async with asyncio.timeout(self.deadline_seconds):
            return await self.folders.threads.run(look)

    def _note(self, position: Position) -> None:
        self._ends[position.history] = max(self._ends.get(position.history, 0), position.at)

    def _begin_anew(self, history: History, past: str) -> History:
        """Begin the next incarnation of a cluster; durably, where there is a journal."""
        again = lsn.history(history.system, history.branch, history.incarnation + 1)
        if self.folders is not None:
            self.folders.begin(again, self.writer, past)
        self._newest[history.system] = again.incarnation
        self._note(Position(again, 0))
        return again

    async def _known_of(self, history: History) -> _Known:
        """Give what is known of a history by now; streams and the journal go on while the server is asked."""
        held = await self._held_of(history, LAST)
        end = max(self._ends.get(history, 0), held.end if held else 0)
        return _Known(held, end, self._last.get(history))

    async def _still(self, dsn: str, before: System) -> System:
        """Ask a server again how far it has come; raises `SourceError` where it is not where it was."""
        system = await identify(dsn, self.deadline_seconds)
        if (system.identifier, system.timeline) != (before.identifier, before.timeline):
            raise SourceError(
                f"the server went from {before.identifier}/{before.timeline} to {system.identifier}/{system.timeline}"
                " while it was looked at"
            )
        return system

    async def _contradiction(self, dsn: str, system: System, history: History, known: _Known) -> str:
        """Give what shows that the server's log is another one than that of `history`; "" for nothing.

        What is known must be older than what the server said: else a log that goes on would contradict itself.
        """
        held, commit = known.held, known.commit
        if known.end > system.flushed:
            return f"the log ends at {system.flushed}, and was at {Lsn(known.end)} before"
        if held is not None and await self._differs(dsn, system.timeline, held):
            return f"the log has another record at {Lsn(held.at)} than before"
        if commit is not None and await self._has_another_commit(dsn, system, commit):
            return f"the log has something else at {Lsn(commit.start)} than commit {commit.name}"
        if history in self._ends or history.branch == 1:
            return ""
        text = await timeline_history(dsn, history.branch, self.deadline_seconds)
        if text == NO_PAST:
            return "" if await self._is_begun(history) else f"timeline {history.branch} has no history file"
        return await self._other_past(dsn, history, text)

    async def _is_begun(self, history: History) -> bool:
        """Whether the journal has begun the log of a timeline without a past; where its disk hangs none is begun."""
        if self.folders is None:
            return False
        try:
            folder = await self._in_thread(partial(self.folders.of, history))
            return history.branch in await self._in_thread(folder.histories)
        except (OSError, JournalError):
            return True

    async def _other_past(self, dsn: str, history: History, text: str) -> str:
        """Give what shows that a timeline which is new to us did not begin on the log that is known; "" for nothing."""
        try:
            past = lsn.lineage(history, text)
        except PositionError as error:
            raise SourceError(f"the server's history of timeline {history.branch} cannot be read: {error}") from error
        for before, _, left_at in reversed(past.stretches()[:-1]):
            held = await self._held_of(before, left_at)
            if held is not None and await self._differs(dsn, before.branch, held):
                return f"timeline {history.branch} has another record at {Lsn(held.at)} than before"
            commit = self._last.get(before)
            there = System(before.system, before.branch, Lsn(left_at))
            if commit is not None and commit.end <= left_at and await self._has_another_commit(dsn, there, commit):
                return f"timeline {history.branch} has something else at {Lsn(commit.start)} than commit {commit.name}"
            if held is not None or commit is not None:
                break
        return ""

    async def _held_of(self, history: History, limit: int) -> _Held | None:
        """Give the last of a timeline up to `limit` that the journal holds; None for nothing, or where it hangs."""
        try:
            return await self._in_thread(partial(self._last_held, history, limit))
        except (OSError, JournalError):
            return None

    def _last_held(self, history: History, limit: int) -> _Held | None:
        """Give the last record of a timeline that the journal holds and that passes its checksum, cut at `limit`."""
        if self.folders is None:
            return None
        folder = self.folders.of(history)
        names = [name for name in folder.names() if name.timeline == history.branch]
        for name in reversed([name for name in names if name.start(folder.segment_bytes) < limit]):
            if (held := _tail_of(folder, name, limit)) is not None:
                return held
        return None

    async def differs(self, dsn: str, folder: SegmentFolder, name: SegmentName) -> bool:
        """Whether the server has other log at the end of a segment than a folder; False where it has it no more."""
        held = await folder.threads.run(partial(_tail_of, folder, name))
        if held is None:
            return False
        return await self._differs(dsn, name.timeline, held)

    async def _differs(self, dsn: str, timeline: int, held: _Held) -> bool:
        theirs = await self.read(dsn, timeline, held.at, len(held.record), self.deadline_seconds)
        return theirs is not None and theirs != held.record

    async def _has_another_commit(self, dsn: str, system: System, commit: Commit | CommitRecord) -> bool:
        """Whether the server has something else where a commit was; False where it has that place no more.

        A record that lies in two segments, or is very long, is not looked at: most are of a few hundred bytes.
        """
        if commit.start // _SMALLEST_SEGMENT_BYTES != (commit.end - 1) // _SMALLEST_SEGMENT_BYTES:
            return False
        count = min(commit.end, system.flushed) - commit.start
        theirs = await self.read(dsn, system.timeline, commit.start, count, self.deadline_seconds)
        if theirs is None:
            return False
        before = bytes(commit.start % PAGE_BYTES)
        return not holds_commit(before + theirs, len(before), commit)


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece of log that the journal holds, mostly a record: where it begins, its bytes, where the record ends."""

    at: int
    record: bytes
    end: int


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a history at one moment: the last that is held, how far it was seen, its last commit."""

    held: _Held | None
    end: int
    commit: Commit | CommitRecord | None


def _tail_of(folder: SegmentFolder, name: SegmentName, limit: int = LAST) -> _Held | None:
    """Give the last record in a segment, or where it ends behind `limit` the bytes before that; None for nothing."""
    begin = name.start(folder.segment_bytes)
    try:
        found = folder.tail(name)
        if found.last_record is None:
            return None
        at: int = found.last_record
        until: int = min(found.end, at + _COMPARED_BYTES)
        if found.end > limit:
            at, until = max(begin, limit - _COMPARED_BYTES), limit
        with folder.slices(name) as segment:
            record = bytes(segment[at - begin : until - begin])
    except (OSError, ValueError):
        return None
    return _Held(at, record, found.end)
