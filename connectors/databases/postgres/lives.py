"""Which life of its log a cluster is in.

A system identifier and a timeline do not tell logs apart: an older copy of the data directory that was put back goes on
under both, and uses the same places for other records. So whatever connects compares what is known from before (how far
the log went, the last record that the journal holds, the last commit that was seen) with what the server has at the
same place. Where that is something else, or the server has not come so far, a new incarnation begins, and no log and
no base of the one before is used across.

The same holds for a timeline that is new to us: the log that it shares with the one before is compared at its end.
One without a history file (`pg_resetwal` gave it its number) shares nothing, and begins a new incarnation. So does one
that an earlier incarnation may have begun, by all that can be compared: a restore in place brings back what was left,
on a timeline that leaves it behind all that is known of the incarnation that was there.

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
from pathlib import Path
from typing import TypeVar

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.folders import LogFolders, is_of
from connectors.databases.postgres.log.proof import Compared, Piece, end_of, goes_on
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName, holds_commit
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.copyboth import NO_PAST, Present, System, identify, timeline_history
from connectors.databases.postgres.stream.physical import read_log
from connectors.threads import Threads
from trigger.errors import JournalError, PositionError, SourceError
from trigger.model import Commit, CommitRecord
from trigger.ports import Seen
from trigger.position import LAST, History, Lineage, Position

_COMPARED_BYTES = 16_384
"""Of what is held, at every connection."""
_ARRIVING_BYTES = 1 << 20
"""Of a segment that comes into a folder, once."""
_SMALLEST_SEGMENT_BYTES = 1 << 20
T = TypeVar("T")
ReadLog = Callable[[str, int, int, int, float], Awaitable[bytes | None]]


async def _refuse_none(system: str) -> None:
    """Take whichever cluster answers."""


@dataclass(slots=True)
class Lives:
    """Knows which incarnation of each cluster is the present one; shared by all that connect to it.

    Args:
        deadline_seconds: bound of one comparison.
        read: gives bytes of the server's log; see `read_log`.
        refuse_another: raises `SourceError` for a cluster whose files do not lie here.
    """

    deadline_seconds: float = 10.0
    read: ReadLog = read_log
    folders: LogFolders | None = None
    """Where the journal keeps its log, once there is one; it remembers the incarnations too."""
    writer: tuple[int, int] | None = None
    """Who writes into these folders."""
    refuse_another: Callable[[str], Awaitable[None]] = _refuse_none
    _newest: dict[str, int] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)
    """Why the newest life of each was begun, where that was here."""
    _looked: set[str] = field(default_factory=set)
    _confirmed: History | None = None
    _ends: dict[History, int] = field(default_factory=dict)
    _last: dict[History, Commit | CommitRecord] = field(default_factory=dict)
    _pasts: dict[History, Lineage] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _threads: Threads = field(default_factory=lambda: Threads("comparison"))

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
            SourceError: the server did not answer, is another cluster's, or a folder for a new log cannot be made.
        """
        async with self._turn:
            system = await identify(dsn, self.deadline_seconds)
            await self.refuse_another(system.identifier)
            await self._look(system.identifier)
            history = self.history(system.identifier, system.timeline)
            if through is not None:
                self._note(through)
            known = await self._known_of(history)
            if known.end > system.flushed:  # it went on meanwhile, maybe
                system = await self._still(dsn, system)
            if reason := await self._contradiction(dsn, system, history, known):
                past = await timeline_history(dsn, system.timeline, self.deadline_seconds)
                try:
                    history = await self._in_thread(partial(self._begin_anew, history, past))
                except (JournalError, OSError) as error:
                    raise SourceError(
                        f"the log is another one by now, and cannot be given a folder: {error}"
                    ) from error
                self._reasons[history.system] = reason
            self._confirmed = history
            return Present(history, system.flushed, self._reasons.get(history.system, ""))

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
        if held is not None and await self._compare(dsn, system.timeline, held) is Compared.OTHER:
            return f"the log has another record than before, up to {Lsn(held.end)}"
        if commit is not None and await self._compare_commit(dsn, system, commit) is Compared.OTHER:
            return f"the log has something else at {Lsn(commit.start)} than commit {commit.name}"
        return await self._other_past(dsn, system, history, held)

    async def _other_past(self, dsn: str, system: System, history: History, held: Piece | None) -> str:
        """Give what shows that a timeline did not begin where it did, or on the log that is known; "" for nothing."""
        text = await timeline_history(dsn, history.branch, self.deadline_seconds) if history.branch > 1 else ""
        try:
            past = lsn.lineage(history, text)
        except PositionError as error:
            raise SourceError(f"the server's history of timeline {history.branch} cannot be read: {error}") from error
        before = self._pasts.get(history) or await self._held_past(history)
        if before is not None and before.forks != past.forks:
            return f"timeline {history.branch} has another past than before"
        reason = ""
        if history not in self._ends:
            if (later := await self._later(history, system.flushed)) is not None:
                reason = f"the log ends at {system.flushed}, and {later} left it behind that"
            elif text != NO_PAST:
                reason = await self._other_log(dsn, system, past, is_ours=held is not None)
            elif not await self._is_begun(history):
                reason = f"timeline {history.branch} has no history file"
        if not reason:
            self._pasts[history] = past
        return reason

    async def _later(self, history: History, end: int) -> History | None:
        """Give a timeline of the same life that is known to have left one behind a place; None for none."""
        for later in {*self._ends, *self._pasts}:
            if later.is_of_life(history) and later.branch > history.branch:
                past = self._pasts.get(later) or await self._held_past(later)
                if past is not None and any(one == history.branch and at > end for one, at in past.forks):
                    return later
        return None

    async def _held_past(self, history: History) -> Lineage | None:
        """Give the past of a timeline of which the journal holds log; None where it does not say it, or hangs.

        Without log the file says nothing: an archive gives those of all timelines, whoever began them.
        """
        try:
            return await self._in_thread(partial(self._read_past, history))
        except (OSError, JournalError):
            return None

    def _read_past(self, history: History) -> Lineage | None:
        if self.folders is None:
            return None
        folder = self.folders.of(history)
        is_held = any(name.timeline == history.branch for name in folder.names())
        return folder.lineage(history) if is_held else None

    async def _is_begun(self, history: History) -> bool:
        """Whether the journal has begun the log of a timeline without a past; where its disk hangs none is begun."""
        if self.folders is None:
            return False
        try:
            folder = await self._in_thread(partial(self.folders.of, history))
            return history.branch in await self._in_thread(folder.histories)
        except (OSError, JournalError):
            return True

    async def _other_log(self, dsn: str, system: System, past: Lineage, *, is_ours: bool) -> str:
        """Give why a timeline which is new to us did not, or may not, stand on the log that is known; "" for nothing.

        Where other incarnations had timelines of the same numbers, it is of the present one only where the log says so,
        or where no other can have been there: a restore in place brings back what was left, and only its last segments.
        """
        is_ours = is_ours or past.history in self._pasts or await self._is_fresh(past.history)
        for count, (one, _, left_at) in reversed([*enumerate(past.stretches())]):
            upto = min(left_at, system.flushed)
            mine = await self._agrees(dsn, one, upto)
            if mine is None:
                return f"timeline {past.history.branch} has something else than {one} before {Lsn(upto)}"
            if not is_ours and (other := await self._elder(dsn, Lineage(one, past.forks[:count]), upto, mine)):
                return f"timeline {past.history.branch} may stand on {other}, and not on {one}, before {Lsn(upto)}"
            if mine:
                break
            is_ours = is_ours or (await self._known_of(one)).end > 0
        return ""

    async def _agrees(self, dsn: str, history: History, upto: int) -> int | None:
        """Give up to where, at most `upto`, the server was found to have a history; None where it has something else.

        0 where there is nothing to compare.
        """
        found, agreed = [], 0
        if (held := await self._held_of(history, upto)) is not None:
            found.append((await self._compare(dsn, history.branch, held), min(held.end, upto)))
        commit = self._last.get(history)
        if commit is not None and commit.end <= upto:
            there = System(history.system, history.branch, Lsn(upto))
            found.append((await self._compare_commit(dsn, there, commit), commit.end))
        for compared, end in found:
            if compared is Compared.OTHER:
                return None
            if compared is Compared.SAME:
                agreed = max(agreed, end)
        return agreed

    async def _elder(self, dsn: str, past: Lineage, upto: int, mine: int) -> History | None:
        """Give the history of an earlier incarnation that the server's log up to a place may as well be of, or is.

        Args:
            dsn: how to connect.
            past: of the history that it would be of in the present incarnation.
            upto: the place.
            mine: up to where it was found to be of that; 0 for nowhere.
        """
        if mine == upto:
            return None
        present = past.history
        for incarnation in reversed(range(present.incarnation)):
            elder = lsn.history(present.system, present.branch, incarnation)
            known = await self._known_of(elder)
            if elder not in self._ends and known.held is None:
                continue
            before = self._pasts.get(elder) or await self._held_past(elder)
            if before is not None and before.forks != past.forks:
                continue
            theirs = await self._agrees(dsn, elder, upto)
            if theirs is not None and theirs > mine:
                return elder
            if theirs == mine == 0 and (known.end >= upto or (await self._known_of(present)).end < upto):
                return elder
        return None

    async def _is_fresh(self, history: History) -> bool:
        """Whether nothing is known of an incarnation but that it was begun; not where the journal's disk hangs."""
        if any((one.system, one.incarnation) == (history.system, history.incarnation) for one in self._ends):
            return False
        if self.folders is None:
            return True
        try:
            folder = await self._in_thread(partial(self.folders.of, history))
            return not await self._in_thread(folder.names)
        except (OSError, JournalError):
            return False

    async def _held_of(self, history: History, limit: int) -> Piece | None:
        """Give the last of a timeline up to `limit` that the journal holds; None for nothing, or where it hangs."""
        try:
            return await self._in_thread(partial(self._last_held, history, limit))
        except (OSError, JournalError):
            return None

    def _last_held(self, history: History, limit: int) -> Piece | None:
        """Give the last of a timeline that the journal holds whole, up to `limit`."""
        if self.folders is None:
            return None
        folder = self.folders.of(history)
        names = [name for name in folder.names() if name.timeline == history.branch]
        for name in reversed([name for name in names if name.start(folder.segment_bytes) < limit]):
            file, begin = folder.file(name), name.start(folder.segment_bytes)
            if (held := end_of(file, begin, _COMPARED_BYTES, limit)) is not None:
                return held
        return None

    async def compare(
        self, dsn: str, server: Position, past: Lineage, folder: SegmentFolder, name: SegmentName, file: Path
    ) -> Compared:
        """Hold a file that may become a segment of a folder against the server's log.

        What the server has not finished, or what belongs into another folder, is another log than its own; of what it
        has removed, its first record behind that says by its link whether it went on from there.

        Args:
            dsn: how to connect.
            server: how far it has come; asked after the file was there.
            past: of that history.
            folder: which is to have the segment.
            name: of the segment.
            file: where it lies.

        Raises:
            SourceError: the server did not answer.
        """
        begin, limits = name.start(folder.segment_bytes), {one.branch: end for one, _, end in past.stretches()}
        if not await folder.threads.run(partial(is_of, folder, server.history)):
            return Compared.OTHER
        if name.timeline == server.history.branch and begin + folder.segment_bytes > server.at:
            return Compared.OTHER
        limit = limits.get(name.timeline, 0)
        piece = await folder.threads.run(partial(end_of, file, begin, _ARRIVING_BYTES, limit))
        if piece is None:
            return Compared.UNKNOWN
        found = await self._compare(dsn, name.timeline, piece)
        end = begin + folder.segment_bytes
        if found is not Compared.UNKNOWN or name.timeline != server.history.branch:
            return found
        count = min(PAGE_BYTES, server.at - end)
        page = await self.read(dsn, name.timeline, end, count, self.deadline_seconds) if count else None
        return await folder.threads.run(partial(goes_on, file, begin, page))

    async def _compare(self, dsn: str, timeline: int, piece: Piece) -> Compared:
        theirs = await self.read(dsn, timeline, piece.at, piece.count, self.deadline_seconds)
        return await self._threads.run(partial(piece.compare, theirs))

    async def _compare_commit(self, dsn: str, system: System, commit: Commit | CommitRecord) -> Compared:
        """Hold a commit against what the server has where it was.

        A record that lies in two segments, or is very long, is not looked at: most are of a few hundred bytes.
        """
        count = min(commit.end, system.flushed) - commit.start
        if commit.start // _SMALLEST_SEGMENT_BYTES != (commit.end - 1) // _SMALLEST_SEGMENT_BYTES:
            return Compared.UNKNOWN
        theirs = await self.read(dsn, system.timeline, commit.start, count, self.deadline_seconds)
        if theirs is None:
            return Compared.UNKNOWN
        before = bytes(commit.start % PAGE_BYTES)
        is_there = await self._threads.run(partial(holds_commit, before + theirs, len(before), commit))
        return Compared.SAME if is_there else Compared.OTHER


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a history at one moment: the last that is held, how far it was seen, its last commit."""

    held: Piece | None
    end: int
    commit: Commit | CommitRecord | None
