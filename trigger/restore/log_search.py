"""Find commits in the log itself: any transaction, by any of its names, or around a time.

What the catalog has no word of (DDL alone, other databases, what no rule took) lies in the log all the same. To read
all of it takes long, so it is read between neighbouring points, and the newest part first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import pairwise, takewhile
from typing import NamedTuple

from trigger.catalog.catalog import Catalog, Found
from trigger.errors import JournalError
from trigger.model import Extent, Logged, RecoveryPoint, from_microseconds, to_microseconds
from trigger.ports import Journal
from trigger.position import LAST, At, History, Lineage, Name, Position
from trigger.replay import Following
from trigger.restore.histories import begins_apart, newest_first, past

LEFT_SECONDS = 10.0
"""How long the log of histories that were left is read for a name; with `--history` it is read to its end."""
FOLLOWING_SECONDS = 60.0
"""How long the log is read for the commit that follows on a state; it proves more, and is no part of that."""

_TOO_LONG = "to read what was left takes longer than {:g} s; find with --history {} reads all of it"
_FIRST_DAY, _LAST_DAY = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class Read(NamedTuple):
    """A stretch of log that is kept without a hole, as far as it was read."""

    begin: Position
    end: Position
    first_us: int | None
    """The time of its first commit, in microseconds since 1970; None where it has none."""
    last_us: int | None
    """Likewise of its last one."""


@dataclass(frozen=True, slots=True)
class Around:
    """The commits around a time, and which log says so."""

    commits: list[Logged]
    """Those nearest to the time, in the order of the log."""
    more: int
    """How many others there are."""
    read: list[Read]
    """The log that was read, or the end of what is kept before it; where it does not reach to, nobody knows what was
    committed."""
    from_before: bool
    """Whether it is known to reach back to the beginning of the time that was asked for."""
    until_behind: bool
    """Whether it is known to reach to the end of it; log may come yet."""
    history: History
    """Whose log was read, with that of its past."""
    others: list[History]
    """Other histories of which log is held that may be of that time, those begun last first; it was not read."""


async def known(name: Name, lineage: Lineage, stream: str | None, catalog: Catalog) -> tuple[Name, list[Found]]:
    """Give the whole name that is meant in a lineage, where somebody may have named it in short, and who bears it.

    What the catalog knows by the very name there is meant; else what is near to its last commit. Raises `CatalogError`.
    """
    found = await catalog.find(name=name, stream=stream)
    last = await catalog.commit_before(LAST, lineage)
    whole = lineage.history.meant(name, last.record.name) if last else name
    if whole == name or any(lineage.includes(Position(one.history, one.record.end)) for one in found):
        return name, found
    return whole, [*found, *await catalog.find(name=whole, stream=stream)]


async def named(name: Name, lineage: Lineage, catalog: Catalog, journal: Journal, since: int = 0) -> list[Logged]:
    """Give the commits that a name means, of the newest part of a lineage's log that has any; none where none has.

    What begins before `since` is not read.

    Raises:
        JournalError, CatalogError: they cannot be read.
    """
    marks = [since, *(mark for mark in _marks(await catalog.bases(), lineage) if mark > since)]
    for begin, end in reversed(list(pairwise(marks))):
        async with aclosing(journal.commits(lineage, begin, end, name)) as commits:
            found = [one async for one in commits if name == one.name or name in one.children]
        if found:
            return found
    return []


class Left(NamedTuple):
    """What is held of the histories that were left says of a name."""

    commits: list[Logged]
    """Those that bear it, by history, those begun last first."""
    unread: list[tuple[History, str]]
    """The histories whose log was not read to its end, and why."""


async def left(
    names: Sequence[Name], found: Sequence[Position], lineages: Sequence[Lineage], catalog: Catalog, journal: Journal
) -> Left:
    """Give the commits that a name means in what is held of other histories, as far as `LEFT_SECONDS` let read it.

    Args:
        names: as somebody said it, and whole, as it is meant where the catalog knows nothing of a history.
        found: where it was found already; a history that one of these lies in is not read.
        lineages: nothing that lies in one of these is read.

    Raises:
        JournalError: nobody can say what is held.
        CatalogError: the catalog cannot be read.
    """
    commits: list[Logged] = []
    unread: list[tuple[History, str]] = []
    until = asyncio.get_running_loop().time() + LEFT_SECONDS
    extents = await journal.extents()
    for history in newest_first(extent.history for extent in extents):
        lineage = await past(history, journal)
        begin = begins_apart(lineage, lineages)
        held = any(extent.history == history and extent.end > begin for extent in extents)
        if not held or any(lineage.includes(one) for one in found):
            continue
        last = await catalog.commit_before(LAST, lineage)
        name = history.meant(names[0], last.record.name) if last else names[-1]
        try:
            async with asyncio.timeout_at(until):
                commits += await named(name, lineage, catalog, journal, begin)
        except TimeoutError:
            unread.append((history, _TOO_LONG.format(LEFT_SECONDS, history)))
        except JournalError as error:
            unread.append((history, error.message))
    return Left(commits, unread)


async def around(
    time: datetime, aside: timedelta, most: int, lineage: Lineage, catalog: Catalog, journal: Journal
) -> Around:
    """Give the commits of a lineage within so long of a time, by the stamps in the log; so many at most.

    Clocks go back, and a stamp is made before its place in the log: the log is read between the points up to which all
    were cut before, by our clock, and those from which on all were cut after.

    Raises:
        JournalError: the log cannot be read.
        CatalogError: the catalog cannot be read.
    """
    since, until = time - min(aside, time - _FIRST_DAY), time + min(aside, _LAST_DAY - time)
    bases, extents = await catalog.bases(), await journal.extents()
    begin, end = await _around(since, until, bases, lineage, catalog)
    last = await catalog.commit_before(end, lineage) or await catalog.commit_after(end - 1, lineage)
    like = last.record.name if last else Name("", 0)
    near = _Near(to_microseconds(time), most)
    read = _held(extents, lineage, begin, end)
    earliest, latest = to_microseconds(since), to_microseconds(until)
    earlier = is_later = False
    async with aclosing(journal.commits(lineage, begin, end, like)) as commits:
        async for one in commits:
            read = [_with(each, one) for each in read]
            earlier, is_later = earlier or one.time_us < earliest, one.time_us > latest
            if earliest <= one.time_us <= latest:
                near.add(one)
    whole = len(read) == 1 or all(one.end.at >= other.begin.at for one, other in pairwise(read))
    reaches_back = bool(read) and whole and (earlier or 0 < begin >= read[0].begin.at)
    reaches_on = bool(read) and whole and (is_later or end <= read[-1].end.at)
    others = await _others(since, until, bases, extents, lineage, catalog, journal)
    return Around(
        await journal.named(near.commits), near.left_out, read, reaches_back, reaches_on, lineage.history, others
    )


async def _others(
    since: datetime,
    until: datetime,
    bases: Sequence[RecoveryPoint],
    extents: Sequence[Extent],
    lineage: Lineage,
    catalog: Catalog,
    journal: Journal,
) -> list[History]:
    """Give the histories that log of such a time may be held of beside a lineage; none of it is read."""
    found: list[History] = []
    for history in newest_first(extent.history for extent in extents):
        other = await past(history, journal)
        begin, end = await _around(since, until, bases, other, catalog)
        begin = max(begin, begins_apart(other, [lineage]))
        own = [extent for extent in extents if extent.history == history]
        held = any(max(extent.start, begin) < min(extent.end, end) for extent in own)
        if held and _was_in(history, since, until, bases):
            found.append(history)
    return found


def _was_in(history: History, since: datetime, until: datetime, bases: Sequence[RecoveryPoint]) -> bool:
    """Whether the database may have been in a history at such a time, by the points cut then, and next to it."""
    marks = [(base.opened_at, mark.floor.history) for base in bases if (mark := base.mark_in(history))]
    cut = sorted(marks, key=lambda one: one[0])
    before, then, later = (
        [there for opened, there in cut if opened < since],
        [there for opened, there in cut if since <= opened <= until],
        [there for opened, there in cut if opened > until],
    )
    return not before or history in (*before[-1:], *then, *later[:1])


async def _around(
    since: datetime, until: datetime, bases: Sequence[RecoveryPoint], lineage: Lineage, catalog: Catalog
) -> tuple[int, int]:
    """Give the places of a lineage that a time surely lies between, by the points that were cut before and after it."""
    behind = takewhile(lambda base: base.opened_at > until, reversed(_in_order(bases, lineage)))
    begin = _begins((await _by_catalog(since, lineage, catalog)).later, since, bases, lineage)
    return begin, min([LAST, *_ends(list(behind), lineage)])


def _begins(later: Found | None, time: datetime, bases: Sequence[RecoveryPoint], lineage: Lineage) -> int:
    """Give the last place where a point divides the log before all that is later than a time; 0 where none does.

    Clocks go back: a point counts only with all that were taken before it, and none behind `later`, the first commit
    that is later by the catalog.
    """
    before = list(takewhile(lambda base: base.opened_at < time, _in_order(bases, lineage)))
    return max(floor for floor in _marks(before, lineage)[:-1] if later is None or floor <= later.record.start)


def _in_order(bases: Sequence[RecoveryPoint], lineage: Lineage) -> list[RecoveryPoint]:
    """Give the points of a lineage as they lie in its log, which is how they were taken."""
    floors = [
        (mark.floor.at, base.number, base)
        for base in bases
        if (mark := base.mark_in(lineage.history)) is not None and lineage.includes(mark.floor)
    ]
    return [base for _, _, base in sorted(floors, key=lambda one: one[:2])]


async def following(begin: At, history: History, catalog: Catalog, journal: Journal) -> Following | None:
    """Give the first commit of a history from a place on, by all log that is held behind it, read where it is kept.

    Where no commit is found there (since it has a hole, is damaged, or takes too long to read), the next one that the
    catalog has. None where neither is known to have one, and the log was not read to its end.

    Raises:
        CatalogError: the catalog cannot be read.
    """
    try:
        lineage = await journal.lineage(history)
        end, last = _run(await journal.extents(), lineage, begin)
    except JournalError:
        lineage, end, last = Lineage(history), begin, begin
    known = await catalog.commit_after(begin - 1, lineage)
    like = known or await catalog.commit_before(begin, lineage)
    until = min(end, known.record.start + 1) if known else end
    try:
        async with (
            asyncio.timeout(FOLLOWING_SECONDS),
            aclosing(journal.commits(lineage, begin, until, like.record.name if like else Name("", 0))) as commits,
        ):
            async for one in commits:
                return Following(begin, one.record, one.end)
    except (JournalError, TimeoutError):
        last = LAST
    if known is not None:
        return Following(begin, known.record, known.record.end)
    return Following(begin, None, end) if begin < end == last else None


def _run(extents: Sequence[Extent], lineage: Lineage, begin: int) -> tuple[int, int]:
    """Give up to where the log of a lineage is held without a hole from a place on, and up to where it is at all."""
    end = last = begin
    for history, low, left_at in lineage.stretches():
        for one in sorted(extents, key=lambda extent: extent.start):
            if one.history == history and low <= one.end > last:
                last = max(last, min(one.end, left_at))
                if max(low, one.start) <= end:
                    end = last
    return end, last


@dataclass(slots=True)
class _Near:
    """Those commits that are nearest to a time, so many at most."""

    time_us: int
    most: int
    left_out: int = 0
    kept: list[tuple[int, int, Logged]] = field(default_factory=list)
    """(how near, how many came before it, the commit), the farthest first; a heap."""
    seen: int = 0

    def add(self, one: Logged) -> None:
        self.seen += 1
        heappush(self.kept, (-abs(one.time_us - self.time_us), -self.seen, one))
        if len(self.kept) > self.most:
            heappop(self.kept)
            self.left_out += 1

    @property
    def commits(self) -> list[Logged]:
        """In the order in which they came."""
        return [one for _, _, one in sorted(self.kept, key=lambda kept: -kept[1])]


def _held(extents: Sequence[Extent], lineage: Lineage, begin: int, end: int) -> list[Read]:
    """Give what is held of a stretch of a lineage, in its order; where nothing is, where the log before it ends."""
    held = [
        (history, low, high, extent)
        for history, low, high in lineage.stretches()
        for extent in sorted(extents, key=lambda extent: extent.start)
        if extent.history == history
    ]
    read = [
        Read(Position(history, first), Position(history, last), None, None)
        for history, low, high, extent in held
        if (first := max(low, begin, extent.start)) < (last := min(high, end, extent.end))
    ]
    before = [Position(history, min(high, extent.end)) for history, _, high, extent in held if extent.start < begin]
    return read or [Read(each, each, None, None) for each in before[-1:]]


def _with(read: Read, one: Logged) -> Read:
    if one.history != read.begin.history or not read.begin.at <= one.start < read.end.at:
        return read
    return read._replace(first_us=one.time_us if read.first_us is None else read.first_us, last_us=one.time_us)


async def end_held(lineage: Lineage, journal: Journal) -> Position | None:
    """Give where the log of a lineage ends that is kept by now, in its last history of which any is; else None."""
    extents = await journal.extents()
    for history, _, high in reversed(lineage.stretches()):
        if ends := [min(high, extent.end) for extent in extents if extent.history == history]:
            return Position(history, max(ends))
    return None


async def held_to(lineage: Lineage, journal: Journal) -> Position | None:
    """Give where the log of the present history of a lineage ends that is kept by now; None where none of it is."""
    end = await end_held(lineage, journal)
    return end if end is not None and end.history == lineage.history else None


async def end_of(lineage: Lineage, journal: Journal) -> str:
    """Give where the log of a history ends that is kept by now, in words."""
    end = await held_to(lineage, journal)
    return f"the log that is kept ends at {end.place}" if end is not None else "no log of it is kept"


async def nowhere(lineages: Sequence[Lineage], journal: Journal) -> str:
    """Give, in words, why the log of these lineages may have no word of a commit."""
    ends = [end for lineage in lineages if (end := await end_held(lineage, journal)) is not None]
    places = " or ".join(str(end.place) if len(ends) == 1 else str(end) for end in ends)
    behind = f", or lies behind {places}, where the log that is kept ends" if ends else ""
    return f"it was not committed, or is older than the log{behind}"


class AsOf(NamedTuple):
    """The commits around a time, as a replay to it meets them."""

    last: Found | None
    """The last one that a state as of then holds."""
    later: Found | None
    """The first one behind it that is later; None where none is known yet."""


async def as_of(time: datetime, lineage: Lineage, catalog: Catalog, journal: Journal) -> AsOf:
    """Give the last commit before the first one that is later than a time, and that one.

    By the log, whose stamps a replay goes by: a stream tells of a commit that came by replication the time that it had
    at its origin. The log is read from the newest point on that surely holds nothing later, as far as it takes; what
    cannot be read is looked up in the catalog.
    """
    known = await _by_catalog(time, lineage, catalog)
    try:
        return await _by_log(time, known.later, lineage, catalog, journal)
    except JournalError:
        return known


async def _by_catalog(time: datetime, lineage: Lineage, catalog: Catalog) -> AsOf:
    last = await catalog.as_of(time, lineage)
    return AsOf(last, await catalog.commit_after(last.record.start if last else 0, lineage))


async def _by_log(time: datetime, known: Found | None, lineage: Lineage, catalog: Catalog, journal: Journal) -> AsOf:
    begin = _begins(known, time, await catalog.bases(), lineage)
    if not begin:
        raise JournalError(f"no point was there by {time.isoformat()} to read the log from")
    older = await catalog.commit_before(begin, lineage)
    like = older or await catalog.commit_after(begin - 1, lineage)
    last, later, beyond = None, None, to_microseconds(time)
    async with aclosing(journal.commits(lineage, begin, LAST, like.record.name if like else Name("", 0))) as commits:
        async for one in commits:
            if one.time_us > beyond:
                later = Found(one.record, None, "", one.history)
                break
            last = one
    return AsOf(await as_known(last, catalog) if last else older, later)


async def set_back(later: Found | None, lineage: Lineage, catalog: Catalog) -> str:
    """Give, in words, that the clock went back behind the first commit that is later than a time, if points say so."""
    if later is None:
        return ""
    stamped = from_microseconds(later.record.time_us)
    earlier = [base for base in await catalog.bases() if base.opened_at < stamped]
    if max(_marks(earlier, lineage)[:-1]) < later.record.end:
        return ""
    return (
        f" (commit {later.record.name} behind it is stamped {stamped.isoformat()}, and the clock was set back after it:"
        " what follows on it is brought back by its transaction or place, whatever its time)"
    )


async def as_known(logged: Logged, catalog: Catalog) -> Found:
    """Give a commit of the log as the catalog knows it, whatever it was named by; else one of no stream and no point.

    Raises `CatalogError`.
    """
    known = await catalog.commit_before(logged.start + 1, logged.history)
    if known is not None and known.record.start == logged.start:
        return known
    return Found(logged.record, None, "", logged.history)


def _marks(bases: Sequence[RecoveryPoint], lineage: Lineage) -> list[int]:
    """Give where the log is divided by the floors of points: from its beginning to its end."""
    floors = {
        mark.floor.at
        for base in bases
        if (mark := base.mark_in(lineage.history)) is not None and lineage.includes(mark.floor)
    }
    return [0, *sorted(floors), LAST]


def _ends(bases: Sequence[RecoveryPoint], lineage: Lineage) -> Iterator[int]:
    for base in bases:
        mark = base.mark_in(lineage.history)
        if mark is not None and lineage.includes(mark.floor):
            yield mark.holds_at_most
