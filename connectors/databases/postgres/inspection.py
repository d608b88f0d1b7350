"""Prove that a clone holds its target and nothing behind it; the oracle is the log, read by `pg_waldump`.

Whether a transaction is committed in the clone is its own word (`pg_xact_status`); which transactions have to be, and
which must not, is read from the log that was staged for the replay, by a program that is not ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from connectors.databases.postgres.programs import Programs, last_lines, run
from connectors.databases.postgres.segments import SegmentFolder
from connectors.databases.postgres.wal import SegmentName
from connectors.databases.postgres.waldump import LoggedCommit, Stretch, WalDump
from trigger.errors import DatabaseError, RestoreError
from trigger.model import StopKind, Target
from trigger.ports import Running
from trigger.position import Lsn

Result = tuple[str, bool, str]

_LOOK_BACK = 5
_DEEP_SECONDS = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: a running clone, the target it should stand at, and the log that led it there."""

    running: Running
    target: Target
    log_folder: Path
    next_xid: int
    """The first transaction id, in 64 bits, that the clone itself may have given out."""
    conninfo: str

    @property
    def boundary(self) -> Lsn:
        """The first position at which a commit record that begins there is no part of the state."""
        if self.target.kind is StopKind.LSN:
            return Lsn(self.target.at + (1 if self.target.inclusive else 0))
        return self.running.replayed


async def holds_target(subject: Subject, dump: WalDump) -> Result:
    """The target's own commit is there; without one, the last commit that the log has before the target."""
    wanted = subject.target.commit
    if wanted is not None:
        status = await _status(subject, wanted.xid)
        return "the target is committed", status == "committed", f"transaction {wanted.xid}: {status}"
    before = await _commits_before(subject, dump)
    if not before:
        seen = f"nothing to compare with: the staged log has no commit before {subject.boundary}"
        return "the last commit before the target is committed", True, seen
    status = await _logged_status(subject, before[-1])
    return "the last commit before the target is committed", status == "committed", _said(before[-1], status)


async def lacks_next(subject: Subject, dump: WalDump) -> Result:
    """The next commit record that the log has behind the target is not there."""
    what = "the next commit is not there"
    stretch = _stretch(subject, subject.boundary)
    behind = await dump.commits(stretch, limit=1) if stretch else []
    if not behind:
        return what, True, f"no commit follows in the staged log behind {subject.boundary}"
    if subject.target.kind is StopKind.LATEST:
        return "no commit of the log is left out", False, f"transaction {behind[0].xid} at {behind[0].start}"
    status = await _logged_status(subject, behind[0])
    return what, status != "committed", _said(behind[0], status)


async def holds_those_before(subject: Subject, dump: WalDump) -> Result:
    """The last few commits before the target are all there."""
    before = (await _commits_before(subject, dump))[-_LOOK_BACK:]
    statuses = [(commit, await _logged_status(subject, commit)) for commit in before]
    lost = [_said(commit, status) for commit, status in statuses if status != "committed"]
    seen = "; ".join(lost) or f"{len(before)} of {len(before)} in the staged log before {subject.boundary}"
    return f"the last {_LOOK_BACK} commits before it are committed", not lost, seen


async def structures(subject: Subject, programs: Programs, owner: tuple[int, int]) -> Result:
    """Tables and indexes are sound by `pg_amcheck`; where amcheck is not installed, all tables can be read."""
    found = conninfo_to_dict(subject.conninfo)
    connection = ["-h", str(found["host"]), "-p", str(found["port"]), "-U", str(found["user"])]
    if await _has_amcheck(subject.conninfo):
        what = "tables and indexes (pg_amcheck)"
        command = [
            programs.path("pg_amcheck"),
            *connection,
            "--all",
            "--install-missing",
            "--heapallindexed",
            "-j",
            "2",
        ]
    else:
        what = "tables can be read in full (pg_dumpall); indexes not checked, since amcheck is not installed"
        command = [programs.path("pg_dumpall"), *connection, "--no-sync", "--file=/dev/null"]
    try:
        output = await run(command, owner=owner, deadline_seconds=_DEEP_SECONDS)
    except DatabaseError as error:
        return what, False, error.message
    return what, True, last_lines(output) or "no fault"


async def _has_amcheck(conninfo: str) -> bool:
    rows = await _ask(conninfo, "SELECT count(*)::text FROM pg_available_extensions WHERE name = %s", "amcheck")
    return rows == "1"


async def _commits_before(subject: Subject, dump: WalDump) -> list[LoggedCommit]:
    """Give the commits of the last one or two segments before the target, in order."""
    stretch = _stretch(subject, subject.boundary, back=1)
    if stretch is None:
        return []
    found = await dump.commits(stretch, limit=1 << 20)
    return [commit for commit in found if commit.start < subject.boundary]


def _stretch(subject: Subject, start: Lsn, back: int = 0) -> Stretch | None:
    """Give the staged log from `start`, or `back` segments before it to it, on the target's timeline."""
    files = [entry for entry in subject.log_folder.iterdir() if len(entry.name) == 24]
    if not files:
        return None
    segment_bytes = files[0].stat().st_size
    timeline = subject.target.history.timeline
    held = {
        name.number for name in SegmentFolder(subject.log_folder, segment_bytes).names() if name.timeline == timeline
    }
    number = start // segment_bytes
    if number not in held:
        return None
    if not back:
        last = number
        while last + 1 in held:
            last += 1
        # Without an end pg_waldump waits five seconds for a segment that does not come (`WALDumpOpenSegment`).
        return Stretch(subject.log_folder, timeline, start, Lsn((last + 1) * segment_bytes))
    first = max(number - back, min(held)) if number - back in held else number
    return Stretch(subject.log_folder, timeline, SegmentName(timeline, first).start(segment_bytes), start)


async def _logged_status(subject: Subject, commit: LoggedCommit) -> str:
    """Give the state of a transaction of which the log says 32 bits: the one nearest to the clone's next id."""
    turn = 1 << 32
    distance = (commit.xid - subject.next_xid + turn // 2) % turn - turn // 2
    return await _status(subject, subject.next_xid + distance)


async def _status(subject: Subject, xid: int) -> str:
    if xid >= subject.next_xid:
        return f"unknown to the clone, whose log ended before transaction {subject.next_xid}"
    return await _ask(subject.conninfo, "SELECT coalesce(pg_xact_status(%s::xid8), 'too old to say')", str(xid))


async def _ask(conninfo: str, text: str, argument: str) -> str:
    try:
        own = make_conninfo(conninfo, dbname="template1", connect_timeout=10)
        async with await psycopg.AsyncConnection.connect(own, autocommit=True) as connection:
            row = await (await connection.execute(text.encode(), [argument])).fetchone()
    except psycopg.Error as error:
        raise RestoreError(f"the clone did not answer: {error}") from error
    return str(row[0]) if row else ""


def _said(commit: LoggedCommit, status: str) -> str:
    return f"transaction {commit.xid}, committed in the log at {commit.start}: {status}"
