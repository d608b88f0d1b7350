"""Which recovery point holds a transaction: a point, an interval between two, a gap, or not known and why."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from trigger.catalog.catalog import Catalog, Found
from trigger.errors import JournalError, RestoreError
from trigger.model import CommitRecord, Gap, Outcome, RecoveryPoint
from trigger.ports import Journal
from trigger.position import History, Lineage, Lsn


class Where(StrEnum):
    """How surely it is known what holds something."""

    POINT = "point"
    """A point was taken for this very commit."""
    INTERVAL = "interval"
    """It lies between two points: the later one's snapshot holds it, a replay from the earlier one stops at it."""
    GAP = "gap"
    """It is in a stretch in which commits may have gone unprotected, or was missed."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Location:
    """What the catalog knows about one commit or place in the log."""

    where: Where
    record: CommitRecord | None
    """The commit; None where only a place was asked for and no qualifying commit is there."""
    history: History | None
    after: int | None
    """The newest sealed point that holds nothing of it, from which it can be replayed; None where there is none."""
    point: int | None
    """The point that holds it."""
    gap: Gap | None
    reason: str
    """For people, one sentence."""


async def locate(
    catalog: Catalog,
    journal: Journal,
    *,
    xid: int | None = None,
    lsn: Lsn | None = None,
    time: datetime | None = None,
    marker: str | None = None,
    stream: str | None = None,
) -> list[Location]:
    """Give what holds the commits that bear a transaction id or marker, or that lie at a place or time.

    One location a commit; where no commit matches, one that says what is known of the place. Never an empty list.

    Raises:
        RestoreError: not exactly one of the four was given.
        CatalogError, JournalError: they cannot be read.
    """
    if sum(value is not None for value in (xid, lsn, time, marker)) != 1:
        raise RestoreError("name exactly one of transaction id, LSN, time or marker")
    bases, gaps = await catalog.bases(), await catalog.gaps()
    found = await catalog.find(xid=xid, lsn=lsn, time=time, marker=marker, stream=stream)
    if found:
        return [_of_commit(one, await _lineage(one.history, journal), bases, gaps) for one in found]
    latest = await catalog.latest()
    if latest is None or latest.ceiling is None:
        return [_unknown("there is no sealed recovery point yet")]
    lineage = await journal.lineage(latest.ceiling.history)
    if time is not None:
        return [await _of_time(time, catalog, lineage, bases, gaps)]
    if lsn is not None:
        return [_of_place(lsn, lineage, bases, gaps, stream)]
    words = f" or lies in one of {len(gaps)} gaps" if gaps else ""
    return [_unknown(f"it is not in the catalog: it did not qualify, was not seen by any source{words}")]


async def _lineage(history: History, journal: Journal) -> Lineage:
    """Give the past of a history; of one whose history file nobody kept, the history alone."""
    try:
        return await journal.lineage(history)
    except JournalError:
        return Lineage(history)


def _of_commit(found: Found, lineage: Lineage, bases: list[RecoveryPoint], gaps: list[Gap]) -> Location:
    record, history = found.record, found.history
    after = _newest_before(record.start, lineage, bases)
    if record.outcome is Outcome.MISSED or found.point is None:
        gap = _gap_at(record.start, lineage, gaps, record.stream)
        reason = f"it was missed: {found.reason}"
        return Location(Where.GAP, record, history, after, None, gap, f"{reason}; {_replay(after)}")
    if record.outcome is Outcome.PROTECTED:
        reason = f"point {found.point} was taken for it"
        return Location(Where.POINT, record, history, after, found.point, None, reason)
    reason = f"point {found.point} holds it among others; {_replay(after)}"
    return Location(Where.INTERVAL, record, history, after, found.point, None, reason)


async def _of_time(
    time: datetime, catalog: Catalog, lineage: Lineage, bases: list[RecoveryPoint], gaps: list[Gap]
) -> Location:
    last = await catalog.as_of(time, lineage)
    if last is None:
        return _unknown(f"the catalog knows no commit at or before {time.isoformat()}")
    there = _of_commit(last, lineage, bases, gaps)
    reason = f"the last qualifying commit by then is {last.record.xid} of {last.record.stream}: {there.reason}"
    return Location(there.where, there.record, there.history, there.after, there.point, there.gap, reason)


def _of_place(lsn: Lsn, lineage: Lineage, bases: list[RecoveryPoint], gaps: list[Gap], stream: str | None) -> Location:
    history = lineage.at(lsn).history
    after = _newest_before(lsn, lineage, bases)
    holder = min(
        (base for base in bases if lineage.includes(base.floor) and base.floor.at > lsn),
        key=lambda base: base.floor.at,
        default=None,
    )
    point = holder.number if holder else None
    if gap := _gap_at(lsn, lineage, gaps, stream):
        reason = f"it lies in a gap: {gap.reason}; {_replay(after)}"
        return Location(Where.GAP, None, history, after, point, gap, reason)
    if after is not None and point is not None:
        reason = f"no qualifying commit is there; it lies between points {after} and {point}"
        return Location(Where.INTERVAL, None, history, after, point, None, reason)
    side = "it is newer than the newest point" if point is None else "it is older than the first point"
    return Location(Where.UNKNOWN, None, history, after, point, None, f"no qualifying commit is there, and {side}")


def _newest_before(lsn: Lsn, lineage: Lineage, bases: list[RecoveryPoint]) -> int | None:
    """Give the newest point whose snapshot holds nothing at or behind `lsn`."""
    earlier = [
        (base.ceiling.at, base.number)
        for base in bases
        if base.ceiling and base.ceiling.at <= lsn and lineage.includes(base.ceiling)
    ]
    return max(earlier)[1] if earlier else None


def _gap_at(lsn: Lsn, lineage: Lineage, gaps: list[Gap], stream: str | None) -> Gap | None:
    """Give the gap around `lsn`; one that begins on a timeline that was left begins here where that was left.

    One that ends in a later history reaches to the end of its own.
    """
    for gap in gaps:
        after = lineage.shared(gap.after) if stream in (None, gap.stream) else None
        if after is not None and after <= lsn and (lsn < gap.until.at or not lineage.includes(gap.until)):
            return gap
    return None


def _replay(after: int | None) -> str:
    return f"a replay from point {after} brings it back" if after else "there is no point before it to replay from"


def _unknown(reason: str) -> Location:
    return Location(Where.UNKNOWN, None, None, None, None, None, reason)
