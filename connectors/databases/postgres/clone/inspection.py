"""Prove that a clone holds its target and nothing behind it; the oracle is the log, read by `pg_waldump`.

Whether a transaction is committed in the clone is its own word (`pg_xact_status`); which transactions have to be, and
which must not, is read from the log that was staged for the replay, by a program that is not ours.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict

from connectors.databases.postgres.clone.access import Access
from connectors.databases.postgres.clone.files import Relation, look
from connectors.databases.postgres.clone.isolation import is_segment
from connectors.databases.postgres.clone.sandbox import Opened, open_all
from connectors.databases.postgres.connection import as_conninfo
from connectors.databases.postgres.encoding import shared_bytes
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.log.waldump import EndOfLogError, LoggedCommit, Stretch, WalDump, goes_on
from connectors.databases.postgres.lsn import Lsn, transaction
from connectors.databases.postgres.programs import Programs, last_lines, listed, run
from trigger.errors import DatabaseError, RestoreError
from trigger.replay import Follows, Running, Target

Result = tuple[str, bool, str]

_NOTHING_FOLLOWS = "no commit follows in the log that is kept"
_LOOK_BACK = 5
_DEEP_SECONDS = 4 * 3600.0
_TOLD_LINES = 10_000
_NAMED_FILES = 50
_LAST_LINES = 6
_IN_FILE = re.compile(r'in file "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: a running clone, the target it should stand at, and the log that led it there."""

    running: Running
    target: Target
    log_folder: Path
    next_xid: int
    """The first transaction id, in 64 bits, that the clone itself may have given out."""
    access: Access
    follows: Follows | None = None
    """Says what follows on a place behind which the log that led there has no commit; None for nobody."""

    @property
    def boundary(self) -> Lsn:
        """The first position at which a commit record that begins there is no part of the state."""
        if self.target.at is not None:
            return Lsn(self.target.at + (1 if self.target.inclusive else 0))
        return Lsn(self.running.replayed)


async def ends_at_target(subject: Subject, dump: WalDump) -> Result:
    """The replay ended where the state ends, by the clone's own timeline.

    A place amid a record means the state before the next one.
    """
    target, reached = subject.target, subject.running.replayed
    ends_at = target.commit.end if target.commit is not None and target.inclusive else target.at
    if target.time is not None:
        held = subject.running.last_commit_at is None or subject.running.last_commit_at <= target.time
    elif target.point:
        held = target.reach is None or reached <= target.reach
    elif target.at is None or ends_at is None:
        held = reached >= (target.reach or 0)
    elif target.inclusive:
        held = target.at < reached <= (ends_at if target.commit else reached)
    else:
        held = reached <= ends_at or reached == await _next_record(subject, dump, Lsn(ends_at))
    return "the replay ended at the target", held, f"at {reached}"


async def holds_target(subject: Subject, dump: WalDump) -> Result | None:
    """The target's own commit is there; without one, the last commit that the log has before the target, if any."""
    wanted = subject.target.commit
    if wanted is not None:
        status = await _logged_status(subject, wanted.name.number or 0)
        return "the target is committed", status == "committed", f"transaction {wanted.name}: {status}"
    before = await _commits_before(subject, dump)
    if not before:
        return None
    status = await _logged_status(subject, before[-1].xid)
    return "the last commit before the target is committed", status == "committed", _said(before[-1], status)


async def lacks_next(subject: Subject, dump: WalDump) -> Result | None:
    """The next commit record that the log has behind the target is not there; or all log that is held has none.

    None where nothing behind the target can be looked at, as where the log is damaged, or nobody knows what follows.

    Raises:
        JournalError: it could not be looked at.
    """
    stretch = await asyncio.to_thread(_behind, subject)
    behind, is_damaged = await _first_commit(stretch, dump) if stretch is not None else (None, False)
    if subject.target.is_latest:  # of which all that was held is staged; production may have committed since
        if stretch is None or is_damaged:
            return None
        if behind is not None:
            return "no commit of the log is left out", False, f"transaction {behind.xid} at {behind.start}"
        return _NOTHING_FOLLOWS, True, f"it was read from {stretch.start} to {stretch.end}"
    if behind is not None:
        status = await _logged_status(subject, behind.xid)
        return "the next commit is not there", status != "committed", _said(behind, status)
    return await _lacks_following(subject)


async def _first_commit(stretch: Stretch, dump: WalDump) -> tuple[LoggedCommit | None, bool]:
    """Give the first commit of a stretch, and whether damage hides what else it has."""
    try:
        behind = await dump.commits(stretch, limit=1)
    except EndOfLogError as end:
        return None, await asyncio.to_thread(goes_on, stretch, end)
    return (behind[0] if behind else None), False


async def _lacks_following(subject: Subject) -> Result | None:
    """What follows on the target further than the staged log goes is not there; None where that is not known."""
    found = await subject.follows(subject.boundary) if subject.follows is not None else None
    if found is None:
        return None
    if found.commit is None:
        return _NOTHING_FOLLOWS, True, f"it was read from {Lsn(found.begin)} to {Lsn(found.end)}"
    commit = LoggedCommit(found.commit.name.number or 0, Lsn(found.commit.start))
    status = await _logged_status(subject, commit.xid)
    which = " that the catalog has" if found.commit.stream else ""
    return f"the next commit{which} is not there", status != "committed", _said(commit, status)


async def holds_those_before(subject: Subject, dump: WalDump) -> Result | None:
    """The last few commits before the target are all there; None where the staged log has none."""
    before = (await _commits_before(subject, dump))[-_LOOK_BACK:]
    if not before:
        return None
    statuses = [(commit, await _logged_status(subject, commit.xid)) for commit in before]
    lost = [_said(commit, status) for commit, status in statuses if status != "committed"]
    seen = "; ".join(lost) or f"{len(before)} of {len(before)} in the staged log before {subject.boundary}"
    return f"the last {_LOOK_BACK} commits before it are committed", not lost, seen


QUICK = (ends_at_target, holds_target, lacks_next, holds_those_before)
"""The checks of every restore, in order; one that has nothing to look at gives None, and is shown as nothing."""


async def opened(subject: Subject) -> tuple[Opened, list[Result]]:
    """Open a sandbox for a look at all of it; gives what of it nobody can look at, and what was done to look at it."""
    try:
        found = await open_all(subject.access)
    except psycopg.Error as error:
        raise RestoreError(f"the sandbox cannot be opened for a look at it: {error}") from error
    results = []
    if found.broken_locks:
        what = "in-doubt transactions, which lock whole tables, are rolled back to look at these"
        results.append((what, True, "; ".join(found.broken_locks)))
    if found.left_out:
        what = f"all databases but {listed(found.left_out)}, left by an interrupted DROP DATABASE, can be entered"
        results.append((what, True, listed(found.databases)))
    if found.faults:
        results.append(("each database can be entered and got ready to be looked at", False, "; ".join(found.faults)))
    return found, results


async def structures(subject: Subject, opened: Opened, programs: Programs, owner: tuple[int, int]) -> Result:
    """Tables and indexes are sound by `pg_amcheck`; where amcheck is not installed, all tables can be read."""
    found = conninfo_to_dict(subject.access.conninfo)
    connection = ["-h", str(found["host"]), "-p", str(found["port"]), "-U", _raw(str(found["user"]))]
    if opened.has_amcheck:
        what = "tables and indexes (pg_amcheck)"
        command = [
            programs.path("pg_amcheck"),
            *connection,
            "--all",
            "--maintenance-db=" + os.fsdecode(as_conninfo({"dbname": subject.access.home})),
        ]
        command += ["--heapallindexed", "-j", "2"]
    else:
        what = "tables can be read in full (pg_dumpall); indexes not checked, since amcheck is not installed"
        command = [
            programs.path("pg_dumpall"),
            *connection,
            f"--database={_raw(subject.access.home)}",
            "--no-sync",
            "--file=/dev/null",
        ]
    try:
        environment = await subject.access.environment()
        output = await run(command, owner=owner, deadline_seconds=_DEEP_SECONDS, environment=environment)
    except DatabaseError as error:
        return what, False, error.message
    except psycopg.Error as error:
        return what, False, f"the clone did not answer: {error}"
    return what, True, last_lines(output) or "no fault"


def _raw(name: str) -> str:
    """Give the name of a database or role as a program takes it."""
    return os.fsdecode(shared_bytes(name))


async def whole(data: Path, known: Sequence[Relation], unknown: Sequence[str], control: Mapping[str, str]) -> Result:
    """All files of a stopped server are there, as long as they have to be, and can be read; see `files`."""
    unchecked = sorted({one.method for one in known if one.kind == "i"} - {"btree"})
    but = f"; of indexes of kind {', '.join(unchecked)} no more than that is checked" if unchecked else ""
    what = f"all files are there and whole, and hold what the catalogs and indexes speak of{but}"
    block_bytes = int(control["Database block size"])
    over = threading.Event()
    try:
        seen = await asyncio.to_thread(
            look, data, known, block_bytes, int(control["Blocks per segment of large relation"]), over
        )
    finally:
        over.set()
    if faults := [*unknown, *seen.faults]:
        return what, False, listed(faults, _NAMED_FILES)
    return what, True, f"{seen.relations} relations, {seen.bytes} bytes, {seen.entries} entries of indexes"


async def pages(data: Path, programs: Programs, owner: tuple[int, int]) -> Result:
    """Every page of a stopped server has the checksum that it says; each file in which one has not is named."""
    what = "page checksums"
    command: list[str | Path] = [programs.path("pg_checksums"), "--check", "-D", data]
    try:
        output = await run(command, owner=owner, deadline_seconds=_DEEP_SECONDS, told_lines=_TOLD_LINES)
    except DatabaseError as error:
        return what, False, _damage(error.message, data)
    return what, True, last_lines(output)


def _damage(words: str, data: Path) -> str:
    """Give the files that a program called damaged, and the end of what it said."""
    files = [str(Path(file).relative_to(data)) for file in dict.fromkeys(_IN_FILE.findall(words))]
    named = f"damaged: {listed(files, _NAMED_FILES)}; " if files else ""
    return named + " | ".join(words.split(" | ")[-_LAST_LINES:])


async def _commits_before(subject: Subject, dump: WalDump) -> list[LoggedCommit]:
    """Give the last commits before the target, in order: those of its segment, or of as many more as it takes.

    None at all where the log there is damaged: which are the last ones cannot be told.
    """
    staged = await asyncio.to_thread(_Staged.of, subject)
    last = (subject.boundary - 1) // staged.segment_bytes
    first = last
    while first in staged.numbers:
        start = SegmentName(staged.timeline, first).start(staged.segment_bytes)
        stretch = Stretch(subject.log_folder, staged.timeline, staged.segment_bytes, start, subject.boundary)
        found: list[LoggedCommit] = []
        try:
            found = await dump.commits(stretch, 1 << 20)
        except EndOfLogError as end:
            if await asyncio.to_thread(goes_on, stretch, end):
                return []
        before = [commit for commit in found if commit.start < subject.boundary]
        if len(before) >= _LOOK_BACK or first - 1 not in staged.numbers:
            return before
        first = max(first - (last - first + 1), staged.begin_of_run(first))
    return []


async def _next_record(subject: Subject, dump: WalDump, at: Lsn) -> Lsn | None:
    """Give where the first record begins, at or behind a place, in the staged log."""
    stretch = await asyncio.to_thread(_from, subject, at)
    return await dump.next_record(stretch) if stretch is not None else None


def _behind(subject: Subject) -> Stretch | None:
    """Give the staged log from the target's boundary on, as far as it goes."""
    return _from(subject, subject.boundary)


def _from(subject: Subject, at: Lsn) -> Stretch | None:
    """Give the staged log from a place on, as far as it goes; None where it is not there."""
    staged = _Staged.of(subject)
    end = SegmentFolder(subject.log_folder, staged.segment_bytes).end_of_run(staged.timeline, at)
    return Stretch(subject.log_folder, staged.timeline, staged.segment_bytes, at, end) if end is not None else None


class _Staged(NamedTuple):
    """The segments of the target's timeline in the folder of the staged log."""

    timeline: int
    segment_bytes: int
    numbers: frozenset[int]

    @classmethod
    def of(cls, subject: Subject) -> _Staged:
        timeline = subject.target.history.branch
        sizes = [entry.stat().st_size for entry in subject.log_folder.iterdir() if is_segment(entry.name)]
        if not sizes:
            return cls(timeline, 1, frozenset())
        names = SegmentFolder(subject.log_folder, sizes[0]).names()
        return cls(timeline, sizes[0], frozenset(name.number for name in names if name.timeline == timeline))

    def begin_of_run(self, number: int) -> int:
        """Give the first segment from which on all up to `number` are there."""
        while number - 1 in self.numbers:
            number -= 1
        return number


async def _logged_status(subject: Subject, xid: int) -> str:
    """Give the state of a transaction: of 32 bits, all that the log says, the one nearest to the clone's next id."""
    meant = Lsn.meant(transaction(xid), transaction(subject.next_xid))
    return await _status(subject, meant.number or 0)


async def _status(subject: Subject, xid: int) -> str:
    if xid >= subject.next_xid:
        return f"unknown to the clone, whose log ended before transaction {subject.next_xid}"
    return await _ask(
        subject.access, "SELECT coalesce(pg_catalog.pg_xact_status(%s::pg_catalog.xid8), 'too old to say')", str(xid)
    )


async def _ask(access: Access, text: str, argument: str) -> str:
    try:
        async with await access.connect() as connection:
            row = await (await connection.execute(text.encode(), [argument])).fetchone()
    except psycopg.Error as error:
        raise RestoreError(f"the clone did not answer: {error}") from error
    return str(row[0]) if row else ""


def _said(commit: LoggedCommit, status: str) -> str:
    return f"transaction {commit.xid}, committed in the log at {commit.start}: {status}"
