"""The databases of one service, each with its log: what a point asks of all of them, asked of each.

A log is what is replayed together. A point stands in every log whose database lies in its snapshots, so it has a floor
and a ceiling for each; a commit belongs to one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from trigger.errors import DatabaseError
from trigger.model import Bracket, Cause, Commit, Mark, RecoveryPoint
from trigger.ports import Database
from trigger.position import Lineage, Position

Finish = Callable[[], Awaitable[Sequence[Bracket | None]]]


class Covered(NamedTuple):
    """A mark whose floor is durable, in the log of its database, which was durable to somewhere in a session."""

    mark: Mark
    database: Database
    durable: Position
    session: int


class Logs:
    """The databases whose commits are protected together.

    Args:
        by_stream: the database that each stream of commits is of.
    """

    def __init__(self, by_stream: Mapping[str, Database]) -> None:
        self._by_stream = by_stream
        self.databases: tuple[Database, ...] = tuple(dict.fromkeys(by_stream.values()))

    async def lineage(self, stream: str) -> Lineage:
        """Give the present history of the database that a stream is of, and its past."""
        return await self._by_stream[stream].lineage()

    async def have_in_past(self, point: RecoveryPoint) -> bool:
        """Whether the present history of every database goes back to a sealed point."""
        lineages = [await database.lineage() for database in self.databases]
        marks = [(point.mark_in(lineage.history), lineage) for lineage in lineages]
        return all(mark and mark.ceiling and lineage.includes(mark.ceiling) for mark, lineage in marks)

    async def floors(self, cause: Cause, newest: Commit | None) -> tuple[Mark, ...]:
        """Give where a point begins in each log, first in the one of the newest commit.

        That is the commit itself for a point that is taken for it, and the end of the log for one taken for a moment.

        Raises:
            DatabaseError: the history of the commit, for which the point is not taken, was left.
        """
        own = self._by_stream[newest.stream] if newest else self.databases[0]
        others = [database for database in self.databases if database is not own]
        floor = await _floor(own, cause, newest)
        return (Mark(floor), *[Mark(await database.record_end()) for database in others])

    async def has_left(self, commit: Commit) -> bool:
        """Whether a commit's database is in another history by now: no point of the present moment can hold both."""
        return (await self.lineage(commit.stream)).history != commit.history

    async def cover(self, marks: Sequence[Mark]) -> Sequence[Covered]:
        """Give the marks with where a replay would begin, each floor durable in the lineage of now.

        Raises:
            DatabaseError: a log does not cover its floor, or its history has changed.
        """
        covered = []
        for mark, database in await self._each(marks):
            durable = await _require_cover(database, mark.floor)
            session = database.session
            covered.append(Covered(replace(mark, redo=await database.redo()), database, durable, session))
        return covered

    @contextlib.asynccontextmanager
    async def bracketed(self, marks: Sequence[Mark], name: str) -> AsyncIterator[Finish]:
        """Hold the backup bracket of every database; gives what ends them, and their proofs in the order of `marks`."""
        async with contextlib.AsyncExitStack() as stack:
            held = [await stack.enter_async_context(database.bracket(name)) for _, database in await self._each(marks)]

            async def finish() -> Sequence[Bracket | None]:
                return [await end() for end in held]

            yield finish

    async def _each(self, marks: Sequence[Mark]) -> list[tuple[Mark, Database]]:
        """Give each mark with the database whose log it is in; raises `DatabaseError` for one that is of none."""
        if len(self.databases) == 1:
            return [(marks[0], self.databases[0])]
        lineages = [(database, await database.lineage()) for database in self.databases]
        found = []
        for mark in marks:
            history = mark.floor.history
            mine = [database for database, lineage in lineages if lineage.history.is_of_system(history)]
            if len(mine) != 1:
                raise DatabaseError(f"{history} is of none of the databases any more", retryable=True)
            found.append((mark, mine[0]))
        return found


async def ceilings(covered: Sequence[Covered], brackets: Sequence[Bracket | None]) -> tuple[Mark, ...]:
    """Give the marks of snapshots just made, with their ceilings.

    A bracketed copy was complete before its bracket ended, so the end of the bracket is the ceiling.

    Raises:
        DatabaseError: the history of a log changed during the round, or may have, and changed back.
    """
    found = []
    for (mark, database, durable, session), bracket in zip(covered, brackets, strict=True):
        ceiling = bracket.stop if bracket else await database.ceiling()
        again = bracket is None and database.session != session
        if ceiling.history != durable.history or again:
            how = "the connection broke, so it may have changed and changed back" if again else "another server came up"
            raise DatabaseError(f"the history changed during the round, from {durable} to {ceiling}: {how}")
        redo = bracket.start if bracket else mark.redo
        found.append(replace(mark, ceiling=ceiling, redo=redo, bracket=bracket))
    return tuple(found)


async def _floor(database: Database, cause: Cause, newest: Commit | None) -> Position:
    if newest is not None and cause is Cause.COMMIT:
        return newest.position
    end = await database.record_end()
    if newest is None:
        return end
    if end.history != newest.history:
        raise DatabaseError(f"{newest.position} is not in {end.history}: the history has changed", retryable=True)
    return end if end.covers(newest.position) else newest.position


async def _require_cover(database: Database, floor: Position) -> Position:
    """Give the durable position, which must cover `floor` in one lineage; raises `DatabaseError` otherwise."""
    durable = await database.durable()
    if durable.history != floor.history and not (await database.lineage()).includes(floor):
        raise DatabaseError(f"{floor} is not in the past of {durable}: the history has changed", retryable=True)
    if durable.at < floor.at:
        raise DatabaseError(f"the log is durable to {durable} only, which does not cover {floor}", retryable=True)
    return durable
