"""Which recovery point holds a transaction: a point, an interval between two, a gap, or not known and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from trigger.catalog.catalog import Catalog, Found
from trigger.catalog.presence import away
from trigger.errors import JournalError, PositionError, RestoreError, StorageError
from trigger.model import GONE, CommitRecord, Extent, Finding, Gap, Logged, Outcome, RecoveryPoint
from trigger.ports import Journal, Storage
from trigger.position import LAST, History, Lineage, Name, Position
from trigger.replay import Target
from trigger.restore import log_search
from trigger.restore.bases import LeftOut, planned
from trigger.restore.histories import based_beside, meant, naming, options, past
from trigger.restore.planner import plan
from trigger.restore.target import at_commit, at_time, is_left, up_to


class Where(StrEnum):
    """How surely it is known what holds something."""

    POINT = "point"
    """A point was taken for this very commit."""
    INTERVAL = "interval"
    """It lies between two points: the later one's snapshot holds it, a replay from the earlier one stops at it."""
    GAP = "gap"
    """It is in a stretch in which commits may have gone unprotected, or was missed."""
    LOG = "log"
    """The catalog has no word of it; it lies in the log that is kept."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Location:
    """What the catalog knows about one commit or place in the log."""

    where: Where
    record: CommitRecord | None
    """The commit; None where only a place was asked for and no qualifying commit is there."""
    history: History | None
    after: int | None
    """The newest point that holds nothing of it, from which it can be replayed; None where there is none."""
    point: int | None
    """The point that holds it."""
    gap: Gap | None
    reason: str
    """For people, one sentence."""
    base: int | None = None
    """The point that a restore starts from; None where it cannot be brought back."""
    aside: str = ""
    """The option that names its history to `trigpoint restore`; "" where the present one goes back to it."""
    snapshot: int | None = None
    """The point that holds it, where its snapshots are there."""


async def locate(
    catalog: Catalog,
    journal: Journal,
    *,
    name: Name | None = None,
    place: str | None = None,
    time: datetime | None = None,
    marker: str | None = None,
    stream: str | None = None,
    history: str | None = None,
    left_out: LeftOut | None = None,
    storage: Storage | None = None,
) -> list[Location]:
    """Give what holds the commits that bear a name or marker, or that lie at a place or time.

    One location a commit; where no commit matches, one that says what is known of the place; one a history whose log
    was not read to its end. Never an empty list. That a replay brings something back is said only where there is a plan
    for it.

    Args:
        catalog: where it is looked up.
        journal: what a replay can use.
        name, marker, stream: of a commit.
        place: in the form of the newest point's history; of several, of whichever it is one in.
        time: a moment.
        history: only what lies in this one and its past, as a restore takes its name; in the present ones, and for a
            commit in any that was left, if None.
        left_out: gives what the snapshots of a base do not hold; without it they are taken to hold everything.
        storage: says which snapshots are there; without it all are taken to be.

    Raises:
        RestoreError: not exactly one of the four was given, or nothing is known of the history.
        PositionError: the place is none in any of its histories.
        CatalogError, JournalError: they cannot be read.
    """
    if sum(value is not None for value in (name, place, time, marker)) != 1:
        raise RestoreError("name exactly one of transaction, place, time or marker")
    if journal.replays:
        await journal.catch_up()
    known = replace(await _known(stream, history, catalog, journal), left_out=left_out)
    known = await _with_what_is_there(known, catalog, storage) if storage is not None else known
    places = _places(place, known.logs) if place is not None else {}
    whole: list[Name] = []
    if place is not None:
        each = [(kind, await catalog.find(place=at, stream=stream)) for kind, at in places.items()]
        found = [one for kind, there in each for one in there if one.history.kind == kind]
    elif name is not None:
        whole, found = await _known_by(name, stream, catalog, known)
    else:
        found = await catalog.find(time=time, marker=marker, stream=stream)
    if history is not None:
        found = [one for one in found if any(lineage.includes(_end_of(one)) for lineage in known.logs)]
    told = [await _of_commit(one, catalog, known) for one in found]
    unread: list[Location] = []
    if name is not None and stream is None:
        logged, left = await _logged([name, *whole], found, catalog, known, everywhere=history is None)
        told += [await _of_logged(one, catalog, known) for one in logged]
        unread = [_unread(*one) for one in left]
    for lineage in known.logs:
        if any(one.history.is_of_system(lineage.history) for one in found):
            continue
        aside = f"--history {lineage.history}" if history is not None else ""
        if time is not None:
            one = await _of_time(time, catalog, known, lineage)
        elif (at := places.get(lineage.history.kind)) is not None:
            one = await _of_place(at, catalog, known, lineage, stream)
        else:
            continue
        told.append(replace(one, aside=one.aside or aside))
    if not told:
        of = f" of {known.logs[0].history} and its past" if history is not None else ""
        log = None if name is None or stream is not None else "read" if unread else "kept"
        told = [_unknown(await _nowhere(known, of, log))]
    there = {base.number for base in known.bases if not known.unseen and base.id not in known.away}
    return [replace(one, snapshot=one.point if one.point in there else None) for one in (*told, *unread)]


class _Way(NamedTuple):
    """How something is brought back."""

    words: str
    base: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """What there is to restore from, and where something is looked for."""

    logs: Sequence[Lineage]
    """Of the newest point, one a log; of one stream the log that it is of."""
    bases: Sequence[RecoveryPoint]
    gaps: Sequence[Gap]
    journal: Journal
    extents: Sequence[Extent]
    left_out: LeftOut | None = None
    storage: Storage | None = None
    """Says which snapshots are there."""
    away: Mapping[str, str] = field(default_factory=dict)
    """By id the bases whose snapshots are not there, with that as the reason."""
    unseen: str = ""
    """Why nobody can say which are there; "" where that can be said."""

    async def way(self, target: Target, catalog: Catalog) -> _Way:
        """Give how a target is brought back, or why it is not."""
        if not self.journal.replays:
            return _Way("no log is kept of this database: only points can be brought back, as they were cut")
        if self.unseen:
            return _Way(f"it cannot be restored: {self.unseen}")
        left, start = await is_left(target, catalog, self.journal), self.journal.file_start
        try:
            lineage = await self.journal.lineage(target.history)
            plan_from = partial(
                plan,
                target,
                extents=self.extents,
                lineage=lineage,
                replay_bytes_per_second=1.0,
                file_start=start,
                left=left,
            )
            look = self.left_out or _whole
            found = await planned(plan_from, self.bases, self.away, look, catalog, self.storage)
        except (JournalError, RestoreError) as error:
            if not error.retryable:
                return _Way(f"it cannot be restored: {error.message}")
            lack = await self.journal.lacks_room()
            why = [error.message, *([lack.message, lack.remedy] if lack else [])]
            return _Way(f"not yet restorable: {'; '.join(why)}")
        number, beside = found.base.number, "".join(f"; {one}" for one in found.without)
        if found.as_cut:
            return _Way(f"the snapshot of point {number} ends with it{beside}", number, self._before(target, lineage))
        return _Way(f"a replay from point {number} brings it back{beside}", number, number)

    def _before(self, target: Target, lineage: Lineage) -> int | None:
        """Give the newest point that holds nothing at or behind a target's place."""
        ceilings = [
            (mark.ceiling.at, base.number)
            for base in self.bases
            if base.id not in self.away
            and (mark := base.mark_in(target.history))
            and mark.ceiling
            and lineage.includes(mark.ceiling)
        ]
        return max((one for one in ceilings if target.limit is None or one[0] <= target.limit), default=(0, None))[1]

    def gap_at(self, at: int, lineage: Lineage, stream: str | None) -> Gap | None:
        """Give the gap around a place: of one stream, or of any if None."""
        gaps = [gap for gap in self.gaps if stream in (None, gap.stream)]
        return next((gap for gap in gaps if self._takes_in(gap, at, lineage)), None)

    def _takes_in(self, gap: Gap, at: int, lineage: Lineage) -> bool:
        """Whether a place of a lineage lies in a gap.

        One that begins on a branch that was left begins here where that was left, or where an earlier one of its stream
        began since; one that comes from no past of this, out of another life of the log or back from a later history,
        is all before its end if there is no earlier one. One that ends in no past of this, or goes back to an earlier
        history, ends here where a later one of its stream comes back into this past.
        """
        after, until = gap.after.history, gap.until.history
        comes = not after.is_of_life(until) or until.age < after.age
        begin, ends_here = lineage.shared(gap.after), lineage.includes(gap.until)
        ends_here = ends_here and not (comes and lineage.at(at).history == after)
        if at >= gap.until.at if ends_here else begin is None:
            return False
        if not lineage.includes(gap.after):
            begins = (lineage.shared(one.after) for one in self._beside(gap, later=False))
            begin = max((one for one in (begin, *begins) if one is not None), default=0 if comes else None)
        if begin is None or at < begin:
            return False
        backs = (one.until for one in self._beside(gap, later=True) if lineage.includes(one.until))
        return ends_here or all(at < one.at for one in backs if (one.at, one.history == after) > (begin, False))

    def _beside(self, gap: Gap, *, later: bool) -> Sequence[Gap]:
        """Give the gaps of the same stream that were found before one, or later."""
        number = self.gaps.index(gap)
        found = self.gaps[number + 1 :] if later else self.gaps[:number]
        return [one for one in found if one.stream == gap.stream]

    def gap_between(self, begin: int, end: int, lineage: Lineage) -> Gap | None:
        """Give the first gap that takes in something between two places of a lineage."""
        starts = sorted(start for gap in self.gaps if (start := lineage.shared(gap.after)) is not None)
        places = [begin, *(start for start in starts if begin < start < end)]
        return next((gap for at in places if (gap := self.gap_at(at, lineage, None))), None)


async def _known(stream: str | None, history: str | None, catalog: Catalog, journal: Journal) -> _Known:
    latest = await catalog.latest()
    settled = await catalog.settled(stream) if stream is not None else None
    present = [mark.ceiling.history for mark in latest.marks if mark.ceiling] if latest else []
    if settled is not None and any(one.is_of_system(settled.history) for one in present):
        present = [one for one in present if one.is_of_system(settled.history)]
    if history is not None:
        present = [await meant(history, catalog, journal)]
    logs = [await past(one, journal) for one in present]
    return _Known(logs, await catalog.bases(), await catalog.gaps(), journal, await journal.extents())


async def _whole(_: RecoveryPoint) -> list[Finding]:
    """Give nothing that a point lacks: nobody looked."""
    return []


async def _with_what_is_there(known: _Known, catalog: Catalog, storage: Storage) -> _Known:
    try:
        gone = dict.fromkeys(await away(known.bases, catalog, storage), GONE)
        return replace(known, storage=storage, away=gone)
    except StorageError as error:
        return replace(known, unseen=str(error))


def _places(place: str, logs: Sequence[Lineage]) -> dict[str, int]:
    """Give by kind of database what a place is there; raises `PositionError` where it is none in any of the logs."""
    places: dict[str, int] = {}
    wrong: PositionError | None = None
    for history in (log.history for log in logs):
        try:
            places[history.kind] = history.parse_place(place)
        except PositionError as error:
            wrong = error
    if wrong is not None and not places:
        raise wrong
    return places


async def _known_by(name: Name, stream: str | None, catalog: Catalog, known: _Known) -> tuple[list[Name], list[Found]]:
    """Give which whole name is meant in each log, and the commits that the catalog knows by one of them."""
    if not known.logs:
        return [name], await catalog.find(name=name, stream=stream)
    whole: list[Name] = []
    found: list[Found] = []
    for lineage in known.logs:
        meant, there = await log_search.known(name, lineage, stream, catalog)
        whole.append(meant)
        found += [one for one in there if one not in found]
    return whole, found


async def _logged(
    names: Sequence[Name], found: Sequence[Found], catalog: Catalog, known: _Known, *, everywhere: bool
) -> log_search.Left:
    """Give the commits that have the name that is meant in each in the log alone; the catalog may know their own.

    `names` are the name as it was said, and the whole one that is meant in each log. They are looked for as a restore
    does: in each log whose lineage has none of those that the catalog knows; with `everywhere` in what is held of the
    histories that were left too.
    """
    logged: list[Logged] = []
    unread: list[tuple[History, str]] = []
    ends = [_end_of(one) for one in found]
    for name, lineage in zip(names[1:], known.logs, strict=False):
        if any(lineage.includes(end) for end in ends):
            continue
        try:
            logged += await log_search.named(name, lineage, catalog, known.journal)
        except JournalError as error:
            if not found:  # what the catalog knows is told without the log
                raise
            unread.append((lineage.history, error.message))
    if not everywhere:
        return log_search.Left(logged, unread)
    ends += [Position(one.history, one.end) for one in logged]
    left = await log_search.left(names[:2], ends, known.logs, catalog, known.journal)
    return log_search.Left([*logged, *left.commits], [*unread, *left.unread])


def _end_of(found: Found) -> Position:
    return Position(found.history, found.record.end)


def _unread(history: History, why: str) -> Location:
    """Give what is known of a commit in a history whose log was not read to its end: nothing."""
    reason = f"whether {history} has it is not known: {why}"
    return Location(Where.UNKNOWN, None, history, None, None, None, reason, None, f"--history {history}")


async def _nowhere(known: _Known, of: str, log: str | None) -> str:
    """Give what is to be said where nothing was found, `of` which histories, in the log that was `read` or `kept`."""
    if not known.logs:
        return "there is no sealed recovery point yet"
    words = f" or lies in one of {len(known.gaps)} gaps" if known.gaps else ""
    if log is not None:
        why = await log_search.nowhere(known.logs, known.journal)
        return f"neither the catalog nor the log that {'was' if log == 'read' else 'is'} {log}{of} has it: {why}{words}"
    return f"it is not in the catalog{of}: it did not qualify, was not seen or kept by any source{words}"


async def _of_commit(found: Found, catalog: Catalog, known: _Known) -> Location:
    record, history = found.record, found.history
    way, aside = await _way_to(found, catalog, known)
    if record.outcome is Outcome.MISSED or found.point is None:
        gap = known.gap_at(record.start, await past(history, known.journal), record.stream)
        reason = f"it was missed: {found.reason}; {way.words}"
        return Location(Where.GAP, record, history, way.after, None, gap, reason, way.base, aside)
    if record.outcome is Outcome.PROTECTED:
        reason = f"point {found.point} was taken for it" + ("" if way.base else f"; {way.words}")
        return Location(Where.POINT, record, history, way.after, found.point, None, reason, way.base, aside)
    reason = f"point {found.point} holds it among others; {way.words}"
    return Location(Where.INTERVAL, record, history, way.after, found.point, None, reason, way.base, aside)


async def _way_to(found: Found, catalog: Catalog, known: _Known) -> tuple[_Way, str]:
    """Give how a commit is brought back, and the option that names its history to a restore; see `Location.aside`."""
    gone_on = await catalog.present(found.history)
    if gone_on is None and known.logs:  # another database is in the place of that one
        present = known.logs[0]
    else:
        present = await past(gone_on or found.history, known.journal)
    within = present.includes(Position(found.history, found.record.end))
    lineage = present if within else await past(found.history, known.journal)
    way = await known.way(at_commit(found, lineage, known.extents), catalog)
    same = await catalog.find(name=found.record.name) if len(known.logs) > 1 else [found]
    if not same or not all(one.history.is_of_system(found.history) for one in same):
        return way, f"--history {lineage.history}"  # else a restore asks in which of the logs it is
    return way, "" if within else naming(found.history, present.history)


async def _of_logged(one: Logged, catalog: Catalog, known: _Known) -> Location:
    found = await log_search.as_known(one, catalog)
    if found.record.stream:  # by another name of it
        return await _of_commit(found, catalog, known)
    way, aside = await _way_to(found, catalog, known)
    did = f", which {one.did}" if one.did else ""
    if gap := known.gap_at(one.start, await past(one.history, known.journal), None):
        reason = f"it lies in a gap: {gap.reason}; the log has it{did}; {way.words}"
        return Location(Where.GAP, one.record, one.history, way.after, None, gap, reason, way.base, aside)
    unseen = "no stream showed it, no rule asked for it, or the catalog was made anew since"
    reason = f"{unseen}; it lies in the log{did}; {way.words}"
    return Location(Where.LOG, one.record, one.history, way.after, None, None, reason, way.base, aside)


async def _of_time(time: datetime, catalog: Catalog, known: _Known, lineage: Lineage) -> Location:
    _, later = await log_search.as_of(time, lineage, catalog, known.journal)
    last = await catalog.commit_before(later.record.start if later else LAST, lineage)
    if last is None:
        others = options(based_beside(known.bases, lineage))
        aside = f"; there are others, which find and restore take: {others}" if others else ""
        return _unknown(f"no commit at or before {time.isoformat()} is known of {lineage.history}{aside}")
    words = f"the last qualifying commit by then is {last.record.name} of {last.record.stream}"
    words += await log_search.set_back(later, lineage, catalog)
    if gap := known.gap_between(last.record.end, later.record.start if later else LAST, lineage):
        way = await _way_to_time(time, catalog, known, lineage)
        reason = f"it lies in a gap, or behind it: {gap.reason}; {words} that is known; {way.words}"
        return Location(Where.GAP, None, lineage.history, way.after, None, gap, reason, way.base)
    there = await _of_commit(last, catalog, known)
    reason = f"{words}: {there.reason}"
    if later is None:
        reason += f"; no later one is known, and {await log_search.end_of(lineage, known.journal)}"
        if (way := await _way_to_time(time, catalog, known, lineage)).base is None:
            reason += f"; of the state of that time: {way.words}"
    return replace(there, reason=reason)


async def _way_to_time(time: datetime, catalog: Catalog, known: _Known, lineage: Lineage) -> _Way:
    """Give how the state of a time is brought back, as a restore to it would find."""
    if not known.journal.replays:
        return await known.way(Target(lineage.history, None, True, "", time), catalog)
    return await known.way(await at_time(time, lineage, catalog, known.journal), catalog)


async def _of_place(at: int, catalog: Catalog, known: _Known, lineage: Lineage, stream: str | None) -> Location:
    history = lineage.at(at).history
    way = await known.way(up_to(at, lineage, known.extents, f"the state before {history.place(at)}"), catalog)
    after, base = way.after, way.base
    floors = [
        (mark.floor.at, base.number)
        for base in known.bases
        if (mark := base.mark_in(history)) and lineage.includes(mark.floor) and mark.floor.at > at
    ]
    point = min(floors)[1] if floors else None
    if gap := known.gap_at(at, lineage, stream):
        return Location(
            Where.GAP, None, history, after, point, gap, f"it lies in a gap: {gap.reason}; {way.words}", base
        )
    if after is not None and point is not None:
        reason = f"no qualifying commit is there; it lies between points {after} and {point}"
        return Location(Where.INTERVAL, None, history, after, point, None, reason, base)
    side = "it is newer than the newest point" if point is None else "it is older than the first point"
    return Location(
        Where.UNKNOWN, None, history, after, point, None, f"no qualifying commit is there, and {side}", base
    )


def _unknown(reason: str) -> Location:
    return Location(Where.UNKNOWN, None, None, None, None, None, reason)
