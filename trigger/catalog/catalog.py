"""The catalog: every recovery point, every qualifying commit with its one outcome, every gap, durably.

It is the word by which the source may forget. What a call has returned is on stable storage (SQLite in WAL mode with
`synchronous=FULL`, or a PostgreSQL of its own); what a call did not finish has not happened at all, since each
call is one transaction. A cancelled call may or may not have had its effect, and may be repeated.

The work of a call is synchronous and runs through `Run`: by default on one thread of the catalog's own, so that
writers never meet; a simulation runs it inline. The catalog is no copy of the snapshots' tags: what only it knows is
the failed points, the missed commits, the gaps, and how far each stream is settled.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from trigger.catalog import commit_index, commit_search, migrations, point_index, pruning, schema
from trigger.catalog.commit_search import Found, Query
from trigger.catalog.point_index import Missed, Totals
from trigger.catalog.reserve import Reserve
from trigger.errors import CatalogError
from trigger.failpoint import reached
from trigger.model import (
    Cause,
    CommitRecord,
    Gap,
    Mark,
    Outcome,
    RecoveryPoint,
    State,
    Verification,
    to_microseconds,
)
from trigger.ports import Seen
from trigger.position import LAST, History, Lineage, Name, Position

__all__ = ["Catalog", "Found", "Run", "Totals", "make_engine"]

make_engine = schema.make_engine

T = TypeVar("T")

_PAGE = 500

Upgrade = AbstractContextManager[bool]
"""Entered where a catalog is of an older version; gives whether nobody else works with it until it is left."""


class Run(Protocol):
    """Runs a piece of synchronous work somewhere and gives what it gave."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Run `work` to its end, even where the caller is cancelled, with the caller's context variables."""
        ...


class Catalog:
    """The durable index of recovery points and of the commits they protect; open it with `Catalog.open`."""

    def __init__(self, engine: Engine, run: Run | None, *, owns_engine: bool, place: Path | None = None) -> None:
        self.file = schema.sqlite_file(engine)
        """The file of a SQLite catalog; None for one in memory or on a server."""
        self.place = self.file if place is None else place.absolute()
        """By which others know it: its file, or the one in whose place that will be put."""
        self.where = schema.display(engine)
        """Where it lies, for people; without a password."""
        self._engine = engine
        self._owns_engine = owns_engine
        self._thread = ThreadPoolExecutor(1, "catalog") if run is None else None
        self._run = run or self._on_thread
        self.reserve = Reserve(self.file if self.file == self.place else None)
        """The room on its disk that is kept for giving points up."""
        self._inode: tuple[int, int] | None = None
        self._copy_is_kept = False

    # ---- opening and closing

    @classmethod
    async def open(
        cls,
        where: str | Path | Engine,
        *,
        run: Run | None = None,
        upgrade: Upgrade | None = None,
        place: Path | None = None,
    ) -> Self:
        """Give the catalog at a path, a database URL, `:memory:`, or behind an engine of the caller's.

        The file and its tables are made where there are none (the folder must exist), and brought to the present
        version where they are older: nobody else may work with them then, which `upgrade` says once it is entered (by
        default nobody does). An engine that was given stays open after `close`, so that a catalog in memory
        survives a simulated restart. `place` is where it belongs, if that is not where it is.

        Raises:
            CatalogError: it cannot be opened, is damaged, or a newer Trigpoint made it.
        """
        engine = where if isinstance(where, Engine) else schema.make_engine(where)
        catalog = cls(engine, run, owns_engine=engine is not where, place=place)
        try:
            await catalog._run(partial(catalog._prepare, upgrade=upgrade or contextlib.nullcontext(enter_result=True)))
        except BaseException:
            await catalog.close()
            raise
        return catalog

    async def close(self) -> None:
        """Let go of the database; what was returned before is durable without it. Never raises."""
        with contextlib.suppress(SQLAlchemyError, sqlite3.Error, OSError):
            if self._owns_engine:
                await self._run(self._engine.dispose)
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, copy_context().run, work)

    def _prepare(self, upgrade: Upgrade) -> None:
        with schema.translated(self.where):
            if self.file is not None:
                schema.create_file(self.file)
                self._inode = schema.inode(self.file)
            have = self._version()
            if have is None or have >= schema.VERSION:
                upgrade = contextlib.nullcontext(enter_result=True)
            if have != schema.VERSION:
                with upgrade as may:
                    self._upgrade(self._version(), may=may)  # somebody else may have brought it up meanwhile
            self._copy_is_kept = self.file is not None and migrations.has_copies(self.file)
            self.reserve.fill()

    def _version(self) -> int | None:
        with self._transaction(writes=False) as connection:
            return schema.version(connection)

    def _upgrade(self, have: int | None, *, may: bool) -> None:
        """Make the tables, or bring them to the present version."""
        if have == schema.VERSION:
            return
        if not may:
            raise CatalogError(
                f"its tables are of version {have}, this program's of version {schema.VERSION}",
                hint="an older service works with it: stop that, and start the new one, which brings them up",
            )
        if self.file is not None and have is not None and have < schema.VERSION:
            migrations.keep_copy(self.file, have)
        with self._transaction(writes=True) as connection:
            migrations.migrate(connection)

    @contextlib.contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        with self._engine.connect().execution_options(writes=writes) as connection, connection.begin():
            yield connection

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(partial(self._transact, work, writes=False))

    async def _write(self, work: Callable[[Connection], T], *, makes_room: bool = False) -> T:
        return await self._run(partial(self._transact, work, writes=True, makes_room=makes_room))

    def _transact(self, work: Callable[[Connection], T], *, writes: bool, makes_room: bool = False) -> T:
        with schema.translated(self.where):
            self._require_same_file()
            while True:
                try:
                    with self._transaction(writes=writes) as connection:
                        return work(connection)
                except DBAPIError as error:
                    if not schema.is_full(error) or not self.reserve.give_piece(makes_room=makes_room):
                        raise

    def _require_same_file(self) -> None:
        # SQLite would go on writing, without any error, to a file that has no name any more.
        if self.file is not None and schema.inode(self.file) != self._inode:
            raise CatalogError(
                "its file was removed or replaced while it was open",
                hint="stop the service, put the right file back or run: trigpoint catalog rebuild",
            )

    async def apart(self, work: Callable[[], T]) -> T:
        """Give what `work` on very many commits gives, done where the catalog's own is: the event loop turns on."""
        return await self._run(work)

    # ---- how far each stream is settled

    async def settled(self, stream: str) -> Position | None:
        """Give the position up to which every commit of `stream` has its outcome here; None where none has.

        The source may forget up to there, and no further.
        """
        return await self._read(partial(commit_index.settled_through, stream=stream))

    async def all_settled(self) -> dict[str, Position]:
        """Give by stream what `settled` gives."""
        return await self._read(commit_index.all_settled)

    async def streams(self) -> list[str]:
        """Give every stream that a commit, a gap or a settled position is known of, by name."""
        return await self._read(commit_index.stream_names)

    async def settle(self, stream: str, through: Position) -> None:
        """Note that `stream` is settled up to `through`, no qualifying commit between; never goes back.

        One small write; callers limit its rate.
        """
        await self._write(partial(commit_index.settle, stream=stream, through=through))

    async def new_in_this_life(self, records: Sequence[CommitRecord], history: History) -> list[CommitRecord]:
        """Give those of `records`, commits of `history` in log order, that no earlier life of that log has.

        What a copy that was put back shares with the time before has its outcome there.
        """
        return await self._read(partial(commit_index.new_in_this_life, records=records, history=history))

    # ---- the life of a point

    async def open_point(
        self,
        *,
        id: str,  # noqa: A002 - the word of the model
        cause: Cause,
        marks: Sequence[Mark],
        opened_at: datetime,
        commit: CommitRecord | None = None,
        rule: str = "",
        note: str = "",
    ) -> RecoveryPoint:
        """Record the intent to take a point and give it, open, with its number.

        Opening the same id again gives the point that is there: a call whose answer was lost is simply repeated.
        """
        draft = RecoveryPoint(
            id=id,
            number=0,
            state=State.OPEN,
            cause=cause,
            marks=tuple(marks),
            opened_at=opened_at,
            commit=commit,
            rule=rule,
            note=note,
        )
        point = await self._write(partial(point_index.open_point, draft=draft))
        reached("catalog-open-committed")
        return point

    async def seal(
        self, point: RecoveryPoint, records: Sequence[CommitRecord], settled: Mapping[str, Position]
    ) -> RecoveryPoint:
        """Record, in one transaction, that `point` holds `records` and that streams are settled; give it sealed.

        `point` is the open one with its proofs: ceiling, flushes, snapshots, `sealed_at`. `settled` says by stream
        how far every commit now has its outcome; it is moved on to the end of the stream's last record where it
        falls short of it. Records whose commit already has an outcome are dropped and counted (`Totals.repeated`).
        Sealing a sealed point again changes nothing.

        Raises:
            CatalogError: the point is not open, lacks its proofs, or the records are missed or not in log order.
        """
        point_index.require_proofs(point)
        if any(record.outcome is Outcome.MISSED for record in records):
            raise CatalogError(f"point {point.number} cannot be sealed with missed commits")
        sealed = await self._write(partial(point_index.seal, point=point, records=records, settled=settled))
        reached("catalog-seal-committed")
        if self._copy_is_kept and self.file is not None:
            self._copy_is_kept = False
            with contextlib.suppress(OSError):  # it is in nobody's way
                await self._run(partial(migrations.drop_copies, self.file))
        return sealed

    async def fail(self, point: RecoveryPoint, reason: str) -> RecoveryPoint:
        """Record that `point` failed and why; failing a failed point again keeps the first reason."""
        return await self._write(partial(point_index.change, key=point.id, state=State.FAILED, failure=reason))

    async def regain(self, point: RecoveryPoint) -> RecoveryPoint:
        """Record that the snapshot of a `point` that failed since it was gone is there again; give it sealed.

        Raises:
            CatalogError: it never was sealed.
        """
        return await self._write(partial(point_index.change, key=point.id, state=State.SEALED))

    async def change(self, point: RecoveryPoint, state: State) -> RecoveryPoint:
        """Move `point` on to `state`; being there already is fine.

        Raises:
            CatalogError: `TRANSITIONS` does not have the step, or it is the business of `seal`, `regain` or `fail`.
        """
        if state in (State.SEALED, State.FAILED):
            raise CatalogError(f"point {point.number} becomes {state} by its own call, not by a change of state")
        return await self._write(partial(point_index.change, key=point.id, state=state), makes_room=True)

    async def prune(self, taken_before: datetime, most: int) -> int:
        """Let go of what is known of expired points taken before a time; gives of how many, `most` at most.

        Number, id and the outcomes of their commits stay; the last thousand that expired stay whole (see `pruning`).
        """
        old = await self._read(partial(pruning.old, taken_before=taken_before, most=most))
        if old:
            await self._write(partial(pruning.prune, numbers=old))
        return len(old)

    async def give_back(self, pages: int) -> int:
        """Give so many pages of a file of which very many are free back to the filesystem; gives how many went.

        What was used of the reserve is laid by again before that, where there is the room.
        """
        await self._run(self.reserve.fill)
        if not await self._read(pruning.may_give_back):
            return 0
        return await self._write(partial(pruning.give_back, pages=pages))

    async def verified(self, point: RecoveryPoint, verification: Verification) -> RecoveryPoint:
        """Store the result of restoring `point`; raises `CatalogError` unless it is sealed."""
        return await self._write(partial(point_index.verify, key=point.id, verification=verification))

    async def adopt(self, point: RecoveryPoint, records: Sequence[CommitRecord], streams: Collection[str] = ()) -> bool:
        """Insert a point and its commits as a tag gave them, and say whether it was not there yet.

        It keeps its number unless another point has it; then it gets the next free one. Commits with an outcome are
        dropped and counted. Streams are settled up to the last commit, unknown ones of `streams` to the floor.

        Raises:
            CatalogError: the point is open or failed.
        """
        if point.state in (State.OPEN, State.FAILED):
            raise CatalogError(f"point {point.id} is {point.state} and cannot be adopted")
        return await self._write(partial(point_index.adopt, point=point, records=records, streams=streams))

    # ---- looking at points

    async def latest(self) -> RecoveryPoint | None:
        """Give the sealed point with the highest number."""
        found = await self.points(states={State.SEALED}, limit=1)
        return found[0] if found else None

    async def points(
        self,
        *,
        states: Collection[State] | None = None,
        newest_first: bool = True,
        limit: int | None = None,
        before_number: int | None = None,
    ) -> list[RecoveryPoint]:
        """Give the points in `states` (all where None) by number; only those below `before_number` if given."""
        found: list[RecoveryPoint] = []
        edge = before_number if newest_first else None
        while limit is None or len(found) < limit:
            size = _PAGE if limit is None else min(_PAGE, limit - len(found))
            query = point_index.page_of(states, newest_first=newest_first, below=before_number, edge=edge).limit(size)
            page = await self._read(partial(point_index.load, query=query))
            found += page
            if len(page) < size:
                break
            edge = page[-1].number
        return found

    async def having(self, ids: Collection[str]) -> list[RecoveryPoint]:
        """Give those points, in any state, whose id is among `ids`, by number."""
        wanted, found = sorted(ids), list[RecoveryPoint]()
        for first in range(0, len(wanted), _PAGE):
            query = point_index.with_ids(wanted[first : first + _PAGE])
            found += await self._read(partial(point_index.load, query=query))
        return sorted(found, key=lambda point: point.number)

    async def pruned_among(self, ids: Collection[str]) -> set[str]:
        """Give those of `ids` whose points expired so long ago that nothing else is known of them."""
        wanted, found = sorted(ids), set[str]()
        for first in range(0, len(wanted), _PAGE):
            found |= await self._read(partial(point_index.pruned_among, ids=wanted[first : first + _PAGE]))
        return found

    async def point(self, ref: str | int) -> RecoveryPoint:
        """Give the point with a number, an id, or the name of its snapshots (`trg-…`).

        Raises:
            CatalogError: there is none.
        """
        return await self._read(partial(point_index.find_point, ref=ref))

    async def bases(self) -> list[RecoveryPoint]:
        """Give all sealed points, by number; what a restore may start from."""
        return await self.points(states={State.SEALED}, newest_first=False)

    async def commits_of(self, point_number: int) -> list[CommitRecord]:
        """Give the commits that a point protects, by stream and in log order."""
        return await self._read(partial(commit_search.commits_of, point=point_number))

    # ---- looking for commits

    async def find(
        self,
        *,
        name: Name | None = None,
        place: int | None = None,
        time: datetime | None = None,
        within: timedelta = timedelta(0),
        marker: str | None = None,
        stream: str | None = None,
        limit: int = 100,
    ) -> list[Found]:
        """Give the commits that match everything that is not None, by history and in log order.

        `place` matches a commit record that begins, ends or lies there; `time` every commit made from then to
        `within` later; `marker` the whole text of a marker. Of more than `limit`, those recorded last are given.
        """
        first_us = None if time is None else to_microseconds(time)
        last_us = None if time is None else to_microseconds(time + within)
        query = Query(name, place, first_us, last_us, marker, stream)
        return await self._read(partial(commit_search.find, query=query, limit=limit))

    async def commit_before(self, at: int, line: History | Lineage) -> Found | None:
        """Give the last qualifying commit, over all streams, whose record begins before `at`."""
        return await self._read(partial(commit_search.before, at=at, line=line))

    async def commit_after(self, at: int, line: History | Lineage) -> Found | None:
        """Give the first qualifying commit, over all streams, whose record begins behind `at`."""
        return await self._read(partial(commit_search.after, at=at, line=line))

    async def count_from(self, at: int, line: History | Lineage) -> int:
        """Give how many qualifying commits, over all streams, have records that begin at or behind `at`."""
        return await self._read(partial(commit_search.count_from, at=at, line=line))

    async def as_of(self, time: datetime, line: History | Lineage | None = None) -> Found | None:
        """Give the last commit of the longest run, in log order, of commits made at or before `time`.

        Commit times do not always rise along the log, so a commit behind the run may be older than `time`. Without
        a line it is the history of the commit recorded last.
        """
        return await self._read(partial(commit_search.as_of, time=time, line=line))

    async def seen(self) -> list[Seen]:
        """Give how far each history is known, and the last commit of it; both by what is durable in the database."""
        found = [(position, await self.commit_before(LAST, position.history)) for position in await self._furthest()]
        return [Seen(position, last.record if last else None) for position, last in found]

    async def present(self, of: History) -> History | None:
        """Give the history that the database of `of` has gone on to; None where it is protected no more.

        Where commits are seen again behind a gap that is open, no point stands there yet.
        """
        for gap in reversed(await self.gaps(open_only=True)):
            if gap.until.history.is_of_system(of):
                return gap.until.history
        latest = await self.latest()
        if latest is None:
            return of
        mark = latest.mark_in(of)
        return (mark.ceiling or mark.floor).history if mark else None

    async def _furthest(self) -> list[Position]:
        return await self._read(commit_index.furthest)

    # ---- gaps

    async def record_gaps(
        self, *found: Gap, missed: Sequence[Missed] = (), settled: Mapping[str, Position] | None = None
    ) -> list[Gap]:
        """Record gaps, the commits that were seen and are lost with them, and how far all that settles their streams.

        All or nothing: a commit that was missed with no gap to say why could be there again, with its log put back.
        Gives the gaps as they are recorded: for one between the same positions that is open already, that one.
        """
        return await self._write(partial(point_index.record_gaps, found=found, missed=missed, settled=settled or {}))

    async def take_over(self, found: Collection[Gap], settled: Mapping[str, Position]) -> None:
        """Take over what another catalog knew: gaps that are not here, and how far streams were settled.

        A stream that is known to have gone on to a later history stays there.
        """
        await self._write(partial(point_index.take_over, found=found, settled=settled))

    async def close_gaps(self, point_number: int) -> None:
        """Note that a sealed point closes every gap that was known when it was opened.

        Raises:
            CatalogError: there is no such point, or it is not sealed.
        """
        await self._write(partial(point_index.close_gaps, number=point_number))

    async def gaps(self, open_only: bool = False) -> list[Gap]:
        """Give the gaps in the order in which they were found."""
        return await self._read(partial(point_index.all_gaps, open_only=open_only))

    async def totals(self) -> Totals:
        """Give how much the catalog holds."""
        return await self._read(point_index.totals)
