"""From what a person names to the exact place in the log where a replay has to stop.

A commit is named by its name (for PostgreSQL its transaction id), a marker, a point, or either end of its record; a
state also by any place in the log or by a time. What is ambiguous is refused with the ways to say it exactly, since a
restore gives one commit too many or too few without a word (an inclusive stop at the *end* of a commit's record takes
the next commit too).

Where a history has no log that is kept, its points are the only states that can be named; see `Journal.replays`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from trigger.catalog.catalog import Catalog, Found
from trigger.catalog.presence import TAKES_BACK
from trigger.errors import DatabaseError, JournalError, RestoreError
from trigger.model import GONE, CommitRecord, Extent, Outcome, RecoveryPoint, State, from_microseconds
from trigger.ports import Database, Journal
from trigger.position import LAST, History, Lineage, Name, Position
from trigger.replay import Target
from trigger.restore import log_search
from trigger.restore.branch import followed
from trigger.restore.histories import is_branch, meant, naming

JOURNAL_WAIT_SECONDS = 5.0
"""How long what lies just behind the journal's end is waited for: the journal is a moment behind the database."""
POLL_SECONDS = 0.05
_SHOWN = 5
_NOWHERE = "is in neither the catalog nor the log that is kept"
_OTHERWISE = "trigpoint commits --around lists those of a time, and any place in the log can be restored with --to-lsn"
_NO_MARKER = (
    "no log is read for markers; trigpoint commits --around lists the commits of a time, and each can be restored with"
    " --to-xid"
)


@dataclass(frozen=True, slots=True)
class Named:
    """What a person named; exactly one of the first seven is given."""

    place: str | None = None
    """The commit whose record begins or ends there, else the state before the first record at or behind it; in the
    form of the history's kind."""
    name: Name | None = None
    """This transaction and everything before it."""
    time: datetime | None = None
    """Everything before the first commit that is later (PostgreSQL's `recovery_target_time`)."""
    latest: bool = False
    """All there is."""
    point: str | int | None = None
    """What the point was taken for: a commit, or the moment at which it was asked for or due."""
    marker: str | None = None
    """The transaction that wrote this marker, whole text."""
    before: Name | None = None
    """Everything before this transaction's commit, and not it."""
    stream: str | None = None
    """Only commits of this stream (database) count."""
    history: str | None = None
    """In this history, which may be abandoned: whole (`7391/2+1`), or the branch alone (`2`) of the present database;
    the present one if None."""

    @property
    def targets(self) -> int:
        """How many targets are named."""
        values = (self.place, self.name, self.time, self.point, self.marker, self.before)
        return sum(value is not None for value in values) + self.latest


async def resolve(
    named: Named, catalog: Catalog, journal: Journal, database: Database | None = None, *, only_look: bool = False
) -> Target:
    """Give the target that `named` means.

    A commit that was found nowhere is waited for, no longer than `JOURNAL_WAIT_SECONDS`, while the journal does not yet
    hold all that the database has: it may be the last one.

    Args:
        named: what a person named.
        catalog, journal: where it is looked up; where a journal replays nothing, only points can be named.
        database: made to commit something, where no commit is known to be later than a time, and asked how far it is;
            without it, or where it does not answer, nobody can tell whether the log goes so far.
        only_look: it is not made to commit anything.

    Raises:
        RestoreError: nothing bears that name, or several do; the message lists them.
        CatalogError, JournalError: they cannot be read.
    """
    if named.targets != 1:
        raise RestoreError("name exactly one target", hint="one of place, name, time, latest, point, marker or before")
    if not journal.replays:
        return await _as_cut(named, catalog)
    await journal.catch_up()
    deadline, until = asyncio.get_running_loop().time() + JOURNAL_WAIT_SECONDS, None
    while True:
        held = await journal.extents()
        try:
            target = await _resolved(named, catalog, journal, None if only_look else database, database)
            return replace(target, around=await _around(target, catalog, journal))
        except RestoreError as error:
            if not error.retryable:
                raise
            until = until or await _durable(database)
            if until is None or not await _more_comes(held, until, journal, deadline):
                raise


async def _durable(database: Database | None) -> Position | None:
    with suppress(DatabaseError):
        return await database.durable() if database is not None else None
    return None


async def _more_comes(held: Sequence[Extent], until: Position, journal: Journal, deadline: float) -> bool:
    """Wait until more log is kept than was `held`; gives False where that went to `until`, or at the deadline."""
    if any(one.history == until.history and one.end >= until.at for one in held):
        return False
    while asyncio.get_running_loop().time() < deadline:
        if await journal.extents() != held:
            return True
        await asyncio.sleep(POLL_SECONDS)
    return False


async def _resolved(
    named: Named, catalog: Catalog, journal: Journal, committing: Database | None, database: Database | None
) -> Target:
    """Give the target, before it is known what lies around it; `committing` is what may be made to commit."""
    if named.point is not None:
        return await _at_point(await catalog.point(named.point), catalog, journal)
    lineage, extents = await _lineage_of(named, catalog, journal), await journal.extents()
    if named.place is not None:
        return await _at_place(lineage.history.parse_place(named.place), named.stream, lineage, catalog, extents)
    if named.time is not None:
        return await at_time(named.time, lineage, catalog, journal, committing)
    if named.latest:
        return await _latest(lineage, catalog, database, meant=named.history is not None)
    if named.before is not None:
        left_out = await _transaction(named.before, named.stream, lineage, catalog, journal)
        return await _before(left_out, lineage, catalog, extents)
    if named.name is not None:
        return at_commit(await _transaction(named.name, named.stream, lineage, catalog, journal), lineage, extents)
    return at_commit(await _marked(named.marker or "", named.stream, lineage, catalog), lineage, extents)


async def _around(target: Target, catalog: Catalog, journal: Journal) -> tuple[CommitRecord, ...]:
    """Give the commits of the catalog around the end of a state; none where it ends with one that the catalog has.

    A commit that was found in the log alone says nothing of whose log that is.
    """
    commit = target.commit
    at = target.at if target.at is not None else commit.start if commit is not None else None
    if at is None or target.is_latest:
        return ()
    behind = at + 1 if target.inclusive else at
    lineage = await journal.lineage(target.history)
    before, after = await catalog.commit_before(behind, lineage), await catalog.commit_after(behind - 1, lineage)
    if before is not None and commit is not None and before.record.start == commit.start:
        return ()
    return tuple(found.record for found in (before, after) if found is not None)


async def _as_cut(named: Named, catalog: Catalog) -> Target:
    """Give the target that is a point as it was cut, or the one taken for a commit; nothing else can be had."""
    found: list[Found] = []
    if named.name is not None or named.marker is not None:
        found = await catalog.find(name=named.name, marker=named.marker, stream=named.stream)
    taken = [one.point for one in found if one.record.outcome is Outcome.PROTECTED]
    number = named.point if named.point is not None else taken[0] if len(found) == len(taken) == 1 else None
    if number is None:
        holder = next((f"; point {one.point} holds it, among others" for one in found if one.point), "")
        raise RestoreError(
            f"no log is kept of this database: points can be brought back as they were cut, nothing else{holder}",
            hint="name a point: --to-point (trigpoint list shows them)",
        )
    point = await catalog.point(number)
    _require_there(point)
    words = f"point {point.number} as it was cut: everything up to {point.floor.place}, and maybe more"
    return Target(point.floor.history, None, True, words, commit=point.commit, point=point.id)


async def _lineage_of(named: Named, catalog: Catalog, journal: Journal) -> Lineage:
    """Give the lineage in which something is looked for.

    Where the newest point stands in several logs, and no history is named whole, it is that of the database which the
    stream, or the commit, is of.

    Raises:
        RestoreError: nothing tells which database is meant, or several have such a commit.
    """
    latest = await catalog.latest()
    if latest is None or len(latest.marks) == 1 or (named.history is not None and not is_branch(named.history)):
        return await _lineage(named.history, catalog, journal)
    settled = await catalog.settled(named.stream) if named.stream is not None else None
    histories = [settled.history] if settled else []
    name = named.name or named.before or named.marker
    if not histories and name:
        by = {"marker": named.marker} if named.marker is not None else {"name": named.name or named.before}
        histories = [one.history for one in await catalog.find(**by)]
    present = {mark.ceiling.history for one in histories if (mark := latest.mark_in(one)) and mark.ceiling}
    if len(present) != 1:
        there = ", ".join(sorted(map(str, present or (mark.floor.history for mark in latest.marks))))
        what = f"{name} names commits of" if present else "nothing tells which is meant of"
        raise RestoreError(f"{what} several databases: in {there}", hint="say which: --database, or --history")
    return await _lineage(named.history, catalog, journal, *present)


async def _lineage(history: str | None, catalog: Catalog, journal: Journal, present: History | None = None) -> Lineage:
    """Give the lineage of the newest point, in its first log if `present` is None, or of a history that was named."""
    return await journal.lineage(await meant(history, catalog, journal, present))


def at_commit(found: Found, lineage: Lineage, extents: Sequence[Extent], words: str = "") -> Target:
    """Give the target that holds a commit of a lineage, everything before it, and nothing behind it.

    Args:
        found: the commit; it lies in the lineage.
        lineage: of the history that is wanted.
        extents: what the journal holds, which says along which branch of the lineage a replay finds the commit.
        words: stand before its description.
    """
    record = found.record
    history = followed(Position(found.history, record.end - 1), lineage, extents)
    return Target(history, record.start, True, f"{words}{_words(found)}", commit=record)


def _words(found: Found) -> str:
    record = found.record
    where = f"of {record.stream}" if record.stream else "in the log"
    return f"commit {record.name} {where} ({found.history.place(record.start)})"


def up_to(at: int, lineage: Lineage, extents: Sequence[Extent], description: str, reach: int | None = None) -> Target:
    """Give the target that holds every record of a lineage that begins before `at`; see `at_commit`.

    `reach` is where the first record ends that stays out, as far as that is known.
    """
    last = Position(lineage.at(at).history, max(at, (reach or 0) - 1))
    return Target(followed(last, lineage, extents), at, False, description, reach=reach)


async def _at_place(
    at: int, stream: str | None, lineage: Lineage, catalog: Catalog, extents: Sequence[Extent]
) -> Target:
    there = [found for found in await catalog.find(place=at, stream=stream) if _in(found, lineage)]
    begins = [found for found in there if found.record.start == at]
    ends = [found for found in there if found.record.end == at]
    written = lineage.history.place(at)
    if begins and ends:
        ended, begun = ends[0].record.name, begins[0].record.name
        raise RestoreError(
            f"{written} is both the end of commit {ended} and the start of commit {begun}",
            hint=f"say which is the last one wanted: --to-xid {ended} or --to-xid {begun}",
        )
    if begins or ends:
        return at_commit((begins or ends)[0], lineage, extents)
    last = await catalog.commit_before(at, lineage)
    return up_to(at, lineage, extents, f"the state before {written}{_last(last, lineage)}")


async def at_time(
    time: datetime, lineage: Lineage, catalog: Catalog, journal: Journal, database: Database | None = None
) -> Target:
    """Give the target that is the state of a lineage at a time.

    Where no commit is known to be later, all log that is held has to be there without a hole: whatever is missing in it
    may have been committed by then. `database` is made to commit something then, which is surely later.
    """
    last, later = await log_search.as_of(time, lineage, catalog, journal)
    description = f"the state of {time.isoformat()}{_last(last, lineage)}"
    description += await log_search.set_back(later, lineage, catalog)
    if later is None:
        description += f", no later commit is known: {await log_search.end_of(lineage, journal)}"
    reach = later.record.end if later else await _passed(lineage, database)
    if reach is None and (end := await log_search.held_to(lineage, journal)) is not None:
        reach = end.at
    known, begins = last.record if last else None, later.record.start if later else None
    return Target(lineage.history, None, True, description, time, known, reach, later=begins)


async def _latest(lineage: Lineage, catalog: Catalog, database: Database | None, *, meant: bool) -> Target:
    """Give all that there is of a history; one that the cluster has left has to be `meant`, by its name."""
    last = await catalog.commit_before(LAST, lineage)
    known = last.record if last else None
    description = f"the latest state that there is of {lineage.history}"
    durable = await _durable(database)
    if durable is None and not meant:
        description += " (whether the cluster has gone on in another history is not known: it was not asked)"
    elif durable is not None and durable.history == lineage.history:
        description += f" (the cluster itself is at {durable.place} by now)"
    elif durable is not None and not meant and durable.history.is_of_system(lineage.history):
        raise RestoreError(
            f"the cluster is in {durable.history} by now, and the latest state that is kept is of {lineage.history},"
            " which it has left",
            hint=f"start the service, or take a point; or add {naming(lineage.history, durable.history)} for the latest"
            " state of what was left",
        )
    reach = known.end if known else None
    return Target(lineage.history, None, False, description, commit=known, reach=reach)


async def _passed(lineage: Lineage, database: Database | None) -> int | None:
    """Give a place behind a commit that is made now in this history; None where none can be made."""
    with suppress(DatabaseError):
        mark = await database.mark() if database is not None else None
        return mark.at if mark is not None and mark.history == lineage.history else None
    return None


async def _before(found: Found, lineage: Lineage, catalog: Catalog, extents: Sequence[Extent]) -> Target:
    record = found.record
    last = await catalog.commit_before(record.start, lineage)
    words = f"the state before {_words(found)}{_last(last, lineage)}"
    return up_to(record.start, lineage, extents, words, record.end)


def _require_there(point: RecoveryPoint) -> None:
    if point.state in (State.OPEN, State.FAILED):
        raise RestoreError(
            f"point {point.number} is {point.state}{': ' + point.failure if point.failure else ''}",
            hint="name the commit instead (--to-xid); it can be restored from an earlier point"
            + (f". Where its snapshot lies in the storage again: {TAKES_BACK}" if point.failure == GONE else ""),
        )


async def _at_point(point: RecoveryPoint, catalog: Catalog, journal: Journal) -> Target:
    _require_there(point)
    words, floor = f"point {point.number}: ", point.floor
    lineage, extents = await _lineage_around(floor, catalog, journal), await journal.extents()
    if point.commit is not None and point.commit.end == floor.at:
        return at_commit(Found(point.commit, point.number, "", floor.history), lineage, extents, words)
    last = await catalog.commit_before(floor.at, lineage)
    return up_to(floor.at, lineage, extents, f"{words}the state at {floor.place}{_last(last, lineage)}")


async def _lineage_around(position: Position, catalog: Catalog, journal: Journal) -> Lineage:
    """Give the present lineage where a position lies in it, else that of its own history.

    Where a timeline was left, only the next one has a record behind the place.
    """
    with suppress(JournalError):  # without the present one's history file, its own is as far as it can be followed
        present = await journal.lineage(await catalog.present(position.history) or position.history)
        if present.includes(position):
            return present
    return await journal.lineage(position.history)


def _last(found: Found | None, lineage: Lineage) -> str:
    if found is None:
        return f", before any commit of {lineage.history} in the catalog"
    where = f"in the catalog being {found.record.name} of {found.record.stream}"
    return f", the last commit {where if found.record.stream else f'in the log being {found.record.name}'}"


async def _transaction(name: Name, stream: str | None, lineage: Lineage, catalog: Catalog, journal: Journal) -> Found:
    """Give the commit of a name: by the catalog, else by the log itself, which has DDL and savepoints too."""
    whole, found = await log_search.known(name, lineage, stream, catalog)
    if stream is None and not any(_in(one, lineage) for one in found):
        logged = await log_search.named(whole, lineage, catalog, journal)
        if not found and not logged:  # it is only for the words of the refusal
            logged = (await log_search.left([name, whole], [], [lineage], catalog, journal)).commits
        found += [await log_search.as_known(one, catalog) for one in logged]
    if stream is None:
        unknown, remedy = _NOWHERE, f"{await log_search.nowhere([lineage], journal)}; {_OTHERWISE}"
    else:
        unknown = f"of {stream} is not in the catalog"
        remedy = "without --database the log is read too, which has no word of databases"
    return _only(found, f"transaction {name}", lineage, unknown, remedy)


async def _marked(marker: str, stream: str | None, lineage: Lineage, catalog: Catalog) -> Found:
    found = await catalog.find(marker=marker, stream=stream)
    of = f" of {stream}" if stream is not None else ""
    unknown = (
        f"is not in the catalog: no commit{of} that a stream showed and a rule took has it, by its whole text, among"
        " the markers that are kept of each (trigpoint explain)"
    )
    return _only(found, f"marker {marker!r}", lineage, unknown, _NO_MARKER)


def _only(found: list[Found], what: str, lineage: Lineage, unknown: str, remedy: str) -> Found:
    """Give the one commit of a lineage that was found; raises `RestoreError`, with the last two where there is none.

    Where there is none anywhere, the error is retryable.
    """
    mine = [one for one in found if _in(one, lineage)]
    if len(mine) == 1:
        return mine[0]
    if len(mine) > 1:
        last = [one.record for one in mine[-_SHOWN:]]
        listed = ", ".join(f"{r.name} of {r.stream} ({from_microseconds(r.time_us).isoformat()})" for r in last)
        raise RestoreError(f"{what} names {len(mine)} commits, the last being {listed}", hint="say which one: --to-xid")
    if found:
        history = found[-1].history
        raise RestoreError(
            f"{what} was committed in {history}, which is not in the past of {lineage.history}",
            hint=f"to bring back that abandoned state add {naming(history, lineage.history)}",
        )
    raise RestoreError(f"{what} {unknown}", hint=remedy, retryable=True)


async def is_left(target: Target, catalog: Catalog, journal: Journal) -> bool:
    """Whether the log of a target's history comes no further: the database has gone on in another, from before it."""
    present = await catalog.present(target.history)
    if present is None or present == target.history:
        return present is None
    at = max(target.at or 0, target.reach or 0, target.commit.end if target.commit else 0)
    try:
        lineage = await journal.lineage(present)
    except JournalError:
        lineage = Lineage(present)
    return not lineage.includes(Position(target.history, at))


def _in(found: Found, lineage: Lineage) -> bool:
    return lineage.includes(Position(found.history, found.record.end))
