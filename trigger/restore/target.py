"""From what a person names to the exact place in the log where a replay has to stop.

A commit is named by its transaction id, a marker, a point, or either end of its record; a state also by any place in
the log or by a time. What is ambiguous is refused with the ways to say it exactly, since a restore gives one commit
too many or too few without a word (an inclusive stop at the *end* of a commit's record takes the next commit too).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from trigger.catalog.catalog import Catalog, Found
from trigger.errors import DatabaseError, RestoreError
from trigger.model import CommitRecord, RecoveryPoint, State, StopKind, Target, from_microseconds
from trigger.ports import Database, Journal
from trigger.position import History, Lineage, Lsn, Position

_SHOWN = 5
_ENDLESS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Named:
    """What a person named; exactly one of the first seven is given."""

    lsn: Lsn | None = None
    """The commit whose record begins or ends there, else the state before the first record at or behind it."""
    xid: int | None = None
    """This transaction and everything before it."""
    time: datetime | None = None
    """Everything before the first commit that is later (PostgreSQL's `recovery_target_time`)."""
    latest: bool = False
    """All there is."""
    point: str | int | None = None
    """What the point was taken for: a commit, or the moment at which it was asked for or due."""
    marker: str | None = None
    """The transaction that wrote this marker, whole text."""
    before_xid: int | None = None
    """Everything before this transaction's commit, and not it."""
    stream: str | None = None
    """Only commits of this stream (database) count."""
    timeline: int | None = None
    """On this timeline, which may be abandoned; the present one if None."""

    @property
    def targets(self) -> int:
        """How many targets are named."""
        values = (self.lsn, self.xid, self.time, self.point, self.marker, self.before_xid)
        return sum(value is not None for value in values) + self.latest


async def resolve(named: Named, catalog: Catalog, journal: Journal, database: Database | None = None) -> Target:
    """Give the target that `named` means.

    Args:
        named: what a person named.
        catalog, journal: where it is looked up.
        database: made to commit something, where no commit is known to be later than a time, and asked how far it is;
            without it, or where it does not answer, nobody can tell whether the log goes so far.

    Raises:
        RestoreError: nothing bears that name, or several do; the message lists them.
        CatalogError, JournalError: they cannot be read.
    """
    if named.targets != 1:
        raise RestoreError("name exactly one target", hint="one of lsn, xid, time, latest, point, marker or before-xid")
    if named.point is not None:
        return await _at_point(await catalog.point(named.point), catalog, journal)
    lineage = await _lineage(named.timeline, catalog, journal)
    if named.lsn is not None:
        return await _at_lsn(named.lsn, named.stream, lineage, catalog)
    if named.time is not None:
        return await _at_time(named.time, lineage, catalog, database)
    if named.latest:
        return await _latest(lineage, catalog, database)
    if named.before_xid is not None:
        return await _before(await _transaction(named.before_xid, named.stream, lineage, catalog), lineage, catalog)
    if named.xid is not None:
        return _commit(await _transaction(named.xid, named.stream, lineage, catalog))
    return _commit(await _marked(named.marker or "", named.stream, lineage, catalog))


async def _lineage(timeline: int | None, catalog: Catalog, journal: Journal) -> Lineage:
    """Give the lineage of the newest point, or of another timeline of the same cluster."""
    latest = await catalog.latest()
    if latest is None or latest.ceiling is None:
        raise RestoreError(
            "there is no sealed recovery point to start from", hint="trigpoint run takes the first at its start"
        )
    present = latest.ceiling.history
    return await journal.lineage(present if timeline is None else History(present.system, timeline))


def _commit(found: Found, words: str = "") -> Target:
    """Give the target that holds a commit, everything before it, and nothing behind it."""
    record = found.record
    return Target(
        history=found.history,
        kind=StopKind.LSN,
        at=record.start,
        inclusive=True,
        description=f"{words}{_words(record)}",
        commit=record,
    )


def _words(record: CommitRecord) -> str:
    return f"commit {record.xid} of {record.stream} ({record.start})"


def _up_to(at: Lsn, lineage: Lineage, description: str, reach: Lsn | None = None) -> Target:
    """Give the target that holds every record that begins before `at`."""
    history = lineage.at(at).history
    return Target(history, StopKind.LSN, at, False, description, reach=reach)


async def _at_lsn(lsn: Lsn, stream: str | None, lineage: Lineage, catalog: Catalog) -> Target:
    there = [found for found in await catalog.find(lsn=lsn, stream=stream) if _in(found, lineage)]
    begins = [found for found in there if found.record.start == lsn]
    ends = [found for found in there if found.record.end == lsn]
    if begins and ends:
        ended, begun = ends[0].record.xid, begins[0].record.xid
        raise RestoreError(
            f"{lsn} is both the end of commit {ended} and the start of commit {begun}",
            hint=f"say which is the last one wanted: --to-xid {ended} or --to-xid {begun}",
        )
    if begins or ends:
        return _commit((begins or ends)[0])
    last = await catalog.commit_before(lsn, lineage)
    return _up_to(lsn, lineage, f"the state before {lsn}{_last(last)}")


async def _at_time(time: datetime, lineage: Lineage, catalog: Catalog, database: Database | None) -> Target:
    last = await catalog.as_of(time, lineage)
    later = await catalog.commit_after(last.record.start if last else Lsn(0), lineage)
    description = f"the state of {time.isoformat()}{_last(last)}"
    if later is None:
        description += ", no later commit is known"
    reach = later.record.end if later else await _passed(lineage, database)
    known = last.record if last else None
    return Target(lineage.history, StopKind.TIME, Lsn(0), True, description, time, known, reach)


async def _latest(lineage: Lineage, catalog: Catalog, database: Database | None) -> Target:
    last = await catalog.commit_before(Lsn(_ENDLESS), lineage)
    known = last.record if last else None
    description = f"the latest state that there is of {lineage.history}"
    with suppress(DatabaseError):
        if database is not None and (durable := await database.durable()).history == lineage.history:
            description += f" (the cluster itself is at {durable.at} by now)"
    reach = known.end if known else None
    return Target(lineage.history, StopKind.LATEST, Lsn(0), False, description, commit=known, reach=reach)


async def _passed(lineage: Lineage, database: Database | None) -> Lsn | None:
    """Give a place behind a commit that is made now in this history; None where none can be made."""
    with suppress(DatabaseError):
        mark = await database.mark() if database is not None else None
        return mark.at if mark is not None and mark.history == lineage.history else None
    return None


async def _before(found: Found, lineage: Lineage, catalog: Catalog) -> Target:
    record = found.record
    last = await catalog.commit_before(record.start, lineage)
    return Target(
        history=found.history,
        kind=StopKind.LSN,
        at=record.start,
        inclusive=False,
        description=f"the state before {_words(record)}{_last(last)}",
        reach=record.end,
    )


async def _at_point(point: RecoveryPoint, catalog: Catalog, journal: Journal) -> Target:
    if point.state in (State.OPEN, State.FAILED):
        raise RestoreError(
            f"point {point.number} is {point.state}{': ' + point.failure if point.failure else ''}",
            hint="name the commit instead (--to-xid); it can be restored from an earlier point",
        )
    words = f"point {point.number}: "
    if point.commit is not None and point.commit.end == point.floor.at:
        return _commit(Found(point.commit, point.number, "", point.floor.history), words)
    lineage = await journal.lineage(point.floor.history)
    last = await catalog.commit_before(point.floor.at, lineage)
    present = await _lineage(None, catalog, journal)
    if present.includes(point.floor):  # where a timeline was left, only the next one has a record behind the place
        lineage = present
    return _up_to(point.floor.at, lineage, f"{words}the state at {point.floor.at}{_last(last)}")


def _last(found: Found | None) -> str:
    if found is None:
        return ", before any commit in the catalog"
    return f", the last commit in the catalog being {found.record.xid} of {found.record.stream}"


async def _transaction(xid: int, stream: str | None, lineage: Lineage, catalog: Catalog) -> Found:
    found = await catalog.find(xid=xid, stream=stream)
    return _only(found, f"transaction {xid}", lineage)


async def _marked(marker: str, stream: str | None, lineage: Lineage, catalog: Catalog) -> Found:
    found = await catalog.find(marker=marker, stream=stream)
    return _only(found, f"marker {marker!r}", lineage)


def _only(found: list[Found], what: str, lineage: Lineage) -> Found:
    mine = [one for one in found if _in(one, lineage)]
    if len(mine) == 1:
        return mine[0]
    if len(mine) > 1:
        last = [one.record for one in mine[-_SHOWN:]]
        listed = ", ".join(f"{r.xid} of {r.stream} ({from_microseconds(r.time_us).isoformat()})" for r in last)
        raise RestoreError(f"{what} names {len(mine)} commits, the last being {listed}", hint="say which one: --to-xid")
    if found:
        history = found[-1].history
        raise RestoreError(
            f"{what} was committed in {history}, which is not in the past of {lineage.history}",
            hint=f"to bring back that abandoned state add --timeline {history.timeline}",
        )
    raise RestoreError(
        f"{what} is not in the catalog",
        hint="it did not qualify, was never seen, or was not committed (trigpoint find); any place in the log can be"
        " restored with --to-lsn",
    )


def _in(found: Found, lineage: Lineage) -> bool:
    return lineage.includes(Position(found.history, found.record.end))
