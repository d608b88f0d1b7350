"""Port `Database` for PostgreSQL: the cluster as a whole, over ordinary connections that are opened when needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import conninfo as dsn

from connectors.databases.postgres import backup, made, places, preflight
from connectors.databases.postgres.connection import connect, role_of, with_password_file
from connectors.databases.postgres.control import CONTROL
from connectors.databases.postgres.encoding import shared_text
from connectors.databases.postgres.lives import Lives
from connectors.databases.postgres.locality import Locality
from connectors.databases.postgres.log.proof import Compared
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import KIND, Lsn, history
from connectors.databases.postgres.stream.copyboth import CopyBoth, way_in
from connectors.databases.postgres.stream.slot import slot_name
from connectors.databases.postgres.stream.source import PostgresSource
from connectors.threads import Threads
from trigger.errors import ConfigError, DatabaseError, JournalError, SourceError
from trigger.model import Bracket, Finding, Layout, Retained, Volume
from trigger.ports import Seen
from trigger.position import History, Lineage, Position

_FOR_GOOD = ("28", "3D", "42501")
_LATE_SECONDS = 1.0
"""How much later than the server we give a statement up, so that its own word on it is heard."""
_DURABLE: LiteralString = (
    "SELECT pg_current_wal_flush_lsn()::text, left(pg_walfile_name(pg_current_wal_flush_lsn()), 8)"
)
_CEILING: LiteralString = (
    "SELECT pg_current_wal_insert_lsn()::text, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
)
_RECORD_END: LiteralString = """
SELECT durable::text, (inserted - CASE
           WHEN at.file_offset = 40 THEN 40
           WHEN mod(at.file_offset, current_setting('wal_block_size')::int) = 24 THEN 24
           ELSE 0 END)::text, left(at.file_name, 8)
  FROM (SELECT pg_current_wal_insert_lsn() AS inserted, pg_current_wal_flush_lsn() AS durable) AS now,
       pg_walfile_name_offset(inserted) AS at
"""
"""The insert position is where the next record begins, behind the header of a page on which nothing stands yet (40
bytes in the first page of a segment, 24 in others: access/xlog_internal.h); the record before it ends where the page
begins. A record that goes on from the page before never ends right behind the header: at least a byte of it follows.
"""
_MARK: LiteralString = (
    "SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(false, %s, ''),"
    " pg_current_xact_id()::text"
)
"""A commit with an id, which a replay by time looks at, and with log of its own, without which it would not wait for
its flush; logical decoding shows an empty transaction to nobody."""
_RETAINED: LiteralString = (
    "SELECT coalesce(json_agg(json_build_array(slot_name,"
    " pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn)::bigint, safe_wal_size) ORDER BY slot_name), '[]')"
    " FROM pg_replication_slots WHERE starts_with(slot_name, %s) AND restart_lsn IS NOT NULL"
)
_GRANTS = (
    "have a superuser run: GRANT pg_read_all_settings, pg_checkpoint TO {role}; GRANT SELECT ON pg_file_settings TO"
    " {role}; GRANT EXECUTE ON FUNCTION pg_show_all_file_settings(), pg_backup_start(text, boolean),"
    " pg_backup_stop(boolean) TO {role}"
)
_PRESENT: LiteralString = (
    "WITH there AS (SELECT namesend(datname) AS name, oid::bigint AS number FROM pg_database"
    " WHERE datallowconn AND NOT datistemplate AND datconnlimit <> -2)"
    " SELECT array(SELECT name FROM there ORDER BY name), array(SELECT number FROM there ORDER BY name)"
)
"""Without what an interrupted DROP DATABASE left (DATCONNLIMIT_INVALID_DB)."""


class Postgres:
    """A PostgreSQL cluster, version 15 or later; implements port `Database`.

    Args:
        conninfo: how to reach the primary (libpq's connection string or URI); a database named in it is where cluster-
            wide questions are asked, the first of `databases` otherwise. A password belongs into `password_file`.
        databases: whose commits are to be captured, one stream each.
        name: prefix of all we make in the cluster: slots `<name>_<database>`, publications `<name>`, `<name>_keyed`.
        bin_directory: where PostgreSQL's programs lie, if not in the usual place.
        password_file: a file in libpq's .pgpass format.
        deadline_seconds: bound of every short question.
        slow_deadline_seconds: bound of a checkpoint and of opening and closing the backup bracket.
        slot_deadline_seconds: how long making a slot may wait for running transactions.
        failover: whether the streams' slots are kept on standbys too, from version 17 on.
    """

    kind = KIND

    def __init__(
        self,
        conninfo: str,
        databases: Sequence[str],
        name: str = "trigpoint",
        bin_directory: Path | None = None,
        password_file: Path | None = None,
        deadline_seconds: float = 10.0,
        *,
        slow_deadline_seconds: float = 600.0,
        slot_deadline_seconds: float = 60.0,
        failover: bool = False,
    ) -> None:
        if not databases:
            raise ConfigError("no database is named whose commits are to be captured", hint="set database.databases")
        self.conninfo = with_password_file(conninfo, password_file)
        self.databases = tuple(databases)
        self.name = name
        self._holder = ""
        self.bin_directory = bin_directory
        self.password_file = password_file
        self._threads = Threads("data")
        self._deadline_seconds = deadline_seconds
        self._slow_deadline_seconds = slow_deadline_seconds
        self._slot_deadline_seconds = slot_deadline_seconds
        self._failover = failover
        self._used: dict[str, str | None] = {slot_name(name, database): database for database in databases}
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self.session = 0
        self._confirmed: psycopg.AsyncConnection[Any] | None = None
        self._system = self._home = self._role = ""
        self._lineage = Lineage(history("", 0))
        self._locality = Locality(self._threads, deadline_seconds)
        self.lives = Lives(deadline_seconds, refuse_another=self._locality.refuse_another)
        self._turn = asyncio.Lock()
        self._bracket = asyncio.Lock()

    def sources(self) -> list[PostgresSource]:
        """Give one stream of commits for each database."""
        return [
            PostgresSource(
                self.conninfo,
                database,
                self.name,
                deadline_seconds=self._deadline_seconds,
                slot_deadline_seconds=self._slot_deadline_seconds,
                recognise=self.lives.confirm,
                saw=self.lives.saw,
                failover=self._failover,
                holder=self._holder,
            )
            for database in self.databases
        ]

    def journal_slot(self) -> str:
        """Give the name of the slot for a journal that reads the server's log: from now on it has a use."""
        self._used[name := f"{self.name}_journal"] = None
        return name

    def recognise(self, seen: Collection[Seen]) -> None:
        """Take note of what is known from before; see port `Database`."""
        self.lives.recognise(seen)

    def claim(self, holder: str) -> None:
        """Take note for whose catalog the publications are made, which are to say so; see port `Database`."""
        self._holder = holder

    async def claimed_by_another(self, holder: str) -> Finding | None:
        """Give what bears our prefix and is noted for another catalog; see port `Database`."""
        there = map(self._dsn, await self.existing())
        return await made.of_another(there, self.name, holder, self._deadline_seconds)

    def _history(self, timeline: int) -> History:
        return self.lives.history(self._system, timeline)

    async def recognised(self) -> History:
        """Give the history that the server is in, compared with what is known; raises `SourceError`."""
        return (await self.lives.confirm(self._any_dsn)).history

    async def present(self) -> History:
        """Give the history that the server is in; of one that does not answer, the last that is known.

        Raises:
            JournalError: it does not answer, and nothing is known of it.
        """
        try:
            return await self.recognised()
        except SourceError as error:
            if (known := self.lives.newest_known()) is None:
                raise JournalError(f"it is not known whose log is to be kept: {error}") from error
            return known

    async def compare(self, segments: SegmentFolder, name: SegmentName, file: Path) -> Compared:
        """Hold a file against the log of the server; see `Lives.compare`. Raises `DatabaseError`, `SourceError`."""
        past, server = await self.lineage(), await self.durable()
        return await self.lives.compare(self._any_dsn, server, past, segments, name, file)

    # ---- positions

    async def durable(self) -> Position:
        """Give the position up to which the log is on stable storage; one round trip. Raises `DatabaseError`."""
        return await self._position(_DURABLE)

    async def ceiling(self) -> Position:
        """Give the insert position, at or after all that a finished snapshot can hold; see port `Database`."""
        return await self._position(_CEILING)

    async def _position(self, question: LiteralString) -> Position:
        """Ask for (LSN, timeline in hexadecimal); the timeline is the one that log is written on at this moment."""
        lsn, timeline = await self._ask(question, of_log=True)
        return Position(self._history(int(timeline, 16)), Lsn.parse(lsn))

    async def record_end(self) -> Position:
        """Give the end of the newest record, durable on return; see port `Database`.

        The flushed position will not do: where others write it may lie in the middle of a record, and a server that
        is brought up from a snapshot ends right before that one.
        """
        durable, end, timeline = await self._ask(_RECORD_END, of_log=True)
        if Lsn.parse(durable) < Lsn.parse(end):
            await self.mark()  # a commit flushes all that came before it
        return Position(self._history(int(timeline, 16)), Lsn.parse(end))

    async def redo(self) -> Position:
        """Give the redo position of the last completed checkpoint, by the control file here; see port `Database`."""
        control = await self._locality.require(partial(self._ask, CONTROL, of_log=True))
        return Position(self._history(control.timeline), control.redo)

    async def lineage(self) -> Lineage:
        """Give the present history and its past; asks for the history file only when the timeline has changed."""
        history = (await self.durable()).history
        if self._lineage.history != history:
            self._lineage = await self._read_lineage(history)
        return self._lineage

    async def _read_lineage(self, history: History) -> Lineage:
        if history.branch == 1:
            return Lineage(history)
        try:
            stream = await CopyBoth.connect(self._any_dsn, self._deadline_seconds)
            try:
                async with asyncio.timeout(self._deadline_seconds):
                    return await stream.lineage(history)
            finally:
                await stream.close()
        except (SourceError, TimeoutError) as error:
            raise DatabaseError(f"the history of timeline {history.branch} cannot be read: {error}") from error

    async def mark(self) -> Position:
        """Commit a transaction without content, durable on return; see port `Database`."""
        await self._ask(_MARK, f"{self.name}.mark")
        return await self.durable()

    async def retained(self) -> list[Retained]:
        """Give how much log the server keeps for each slot of our prefix that still has its place, used or not."""
        (rows,) = await self._ask(_RETAINED, f"{self.name}_")
        return [Retained(name, kept, left) for name, kept, left in rows]

    # ---- acts

    @contextlib.asynccontextmanager
    async def bracket(self, name: str) -> AsyncIterator[Callable[[], Awaitable[Bracket]]]:
        """Hold PostgreSQL's backup mode on a connection of its own; see port `Database`.

        Entering makes a checkpoint (at once, not spread). When the block is left early, cancelled included, closing
        the connection ends the backup mode on the server.
        """
        async with self._bracket:
            connection = await self._connect(self._slow_deadline_seconds)
            try:
                await self._confirm(connection)
                ask = partial(self._run, connection)
                started = await ask(backup.START, name)
                await self._locality.require(partial(ask, CONTROL))
                yield partial(backup.stop, ask, started, self._history)
            finally:
                await _hang_up(connection)

    async def checkpoint(self) -> None:
        """Make the server write a checkpoint; raises `DatabaseError`, also where the role may not."""
        connection = await self._connect(self._slow_deadline_seconds)
        try:
            await self._run(connection, "CHECKPOINT")
        finally:
            await _hang_up(connection)

    async def remove(self, *, unused: bool = False) -> list[str]:
        """Drop all that was made in the cluster: slots, the journal's too, and publications; gives their names.

        Also what bears our prefix and nothing that is configured has a use for, unless somebody reads it; with `unused`
        that alone.

        Raises:
            SourceError, DatabaseError: a slot is still in use, or the server refused; what came before is gone.
        """
        if taken := await self.claimed_by_another(self._holder):
            raise DatabaseError(f"nothing was dropped: {taken.message}", hint=taken.remedy, retryable=False)
        there = await self.existing()
        dsns = {name: self._dsn(name) for name in there}
        sources = [] if unused else [source for source in self.sources() if source.name in there]
        gone = [name for source in sources for name in await source.remove()]
        try:
            async with asyncio.timeout(self._slow_deadline_seconds):
                async with await self._connect(self._deadline_seconds) as connection:
                    gone += await made.clear(connection, dsns, self.databases, self.name, self._used if unused else {})
        except TimeoutError:
            raise DatabaseError("what was made in the cluster could not be dropped in time") from None
        except psycopg.Error as error:
            raise _failed("what was made in the cluster cannot be dropped", error) from error
        return gone

    # ---- what there is

    async def layout(self) -> Layout:
        """Give where the cluster lies and who owns it.

        Raises:
            DatabaseError: no answer, the role may not read the settings, or the files are not on this host, or not
                those that are protected.
        """
        try:
            found = await self._ask(places.LAYOUT)
        except DatabaseError as error:
            if isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege):
                raise DatabaseError(error.message, hint=_GRANTS.format(role=self._role)) from error
            raise
        layout = await self._threads.run(partial(places.look_at_files, *found))
        self._locality.require_protected(data := places.data_directory(layout))
        await self._locality.require(partial(self._ask, CONTROL), data)
        return layout

    def lies_at(self, layout: Layout) -> None:
        """Take note of where the files lie that snapshots are made of; see port `Database`."""
        self._locality.data = places.data_directory(layout)

    async def archived(self) -> str:
        """Give the file of the log that the server archived last, "" for none; raises `DatabaseError`."""
        (name,) = await self._ask("SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")
        return str(name)

    def recall(self, document: Mapping[str, Any]) -> Layout:
        """Give the layout that was kept as JSON, by this version or an earlier one; raises `ConfigError`."""
        return places.recall(document)

    async def existing(self) -> dict[str, int]:
        """Give the oids of the databases that may be connected to, templates aside, by name; raises `DatabaseError`."""
        names, numbers = await self._ask(_PRESENT)
        return dict(zip(map(shared_text, names), numbers, strict=True))

    async def check(
        self, volumes: Sequence[Volume], *, bracketed: bool = False, seen: Collection[str] = ()
    ) -> list[Finding]:
        """Give all that a pre-flight check of settings, roles, slots and paths has to say; see port `Database`."""
        connection = await self._connect(self._deadline_seconds)
        try:
            findings = await preflight.check_cluster(connection, self._used, self.name, seen, bracketed=bracketed)
        except psycopg.Error as error:
            raise _failed("the pre-flight check", error) from error
        finally:
            await _hang_up(connection)
        there = await self.existing()
        for source in self.sources():
            if source.name in there:  # of others it is said already
                findings += await preflight.check_database(self._dsn(source.name), source, self._deadline_seconds)
        for database in there:
            if database not in self.databases:
                findings += await preflight.check_other(self._dsn(database), self.name, self._deadline_seconds)
        try:
            layout = await self.layout()
        except DatabaseError as error:
            return [*findings, preflight.unreachable(error)]
        findings += self._locality.findings()
        return findings + await self._threads.run(partial(preflight.check_paths, layout, volumes))

    async def explain(self) -> list[Finding]:
        """Give what a source of this cluster's version cannot see, and what is done about it."""
        (version,) = await self._ask("SELECT current_setting('server_version_num')::int")
        return preflight.blind_spots(version // 10_000)

    async def close(self) -> None:
        """Disconnect. Never raises."""
        connection, self._connection, self._confirmed = self._connection, None, None
        if connection is not None:
            await _hang_up(connection)

    # ---- connections

    def _dsn(self, database: str) -> str:
        return dsn.make_conninfo(self.conninfo, dbname=database)

    async def _connect(self, deadline_seconds: float) -> psycopg.AsyncConnection[Any]:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                connection = await self._connect_anywhere()
        except TimeoutError:
            raise DatabaseError(f"no connection to the database within {self._deadline_seconds:g} s") from None
        except psycopg.Error as error:
            raise _failed("no connection to the database", error) from error
        settings: LiteralString = (
            "SELECT set_config('statement_timeout', %s, false), system_identifier::text FROM pg_control_system()"
        )
        try:
            *_, self._system = await self._run(connection, settings, str(int(deadline_seconds * 1000)))
        except BaseException:
            await _hang_up(connection)
            raise
        return connection

    async def _connect_anywhere(self) -> psycopg.AsyncConnection[Any]:
        """Connect to the first database that lets us in, for what the whole cluster is asked.

        Raises:
            psycopg.Error: none does; what the first one said.
        """
        named = dsn.conninfo_to_dict(self.conninfo).get("dbname")
        candidates = dict.fromkeys([*([str(named)] if named else []), self._home, *self.databases, "postgres"])
        refusal: psycopg.Error | None = None
        for name in filter(None, candidates):
            try:
                connection = await connect(dsn.make_conninfo(self._dsn(name), application_name=self.name))
            except psycopg.Error as error:
                refusal = refusal or error
                continue
            self._home, self._role = name, role_of(connection)
            return connection
        assert refusal is not None
        raise refusal

    @property
    def _any_dsn(self) -> str:
        """How to connect for what is not asked of one database: to the one that let us in last."""
        return self._dsn(self._home or self.databases[0])

    async def _confirm(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Find out which history the server behind a connection is in, once for each: no other comes behind it."""
        if connection is self._confirmed:
            return
        try:
            await self.recognised()
        except SourceError as error:
            raise DatabaseError(f"it cannot be said which log the server writes: {error}", hint=error.hint) from error
        if connection is self._connection:
            self._confirmed = connection

    async def _ask(self, question: LiteralString, *arguments: str | list[str], of_log: bool = False) -> tuple[Any, ...]:
        """Ask on the connection that is kept; one that died since the last question is replaced once.

        A question of the log is asked of a server only whose history was confirmed.
        """
        async with self._turn:
            for attempt in (1, 2):
                kept = self._connection is not None
                if self._connection is None:
                    self._connection = await self._connect(self._deadline_seconds)
                    self.session += 1
                try:
                    if of_log:
                        await self._confirm(self._connection)
                    return await self._run(
                        self._connection, question, *arguments, within_seconds=self._deadline_seconds
                    )
                except BaseException as error:
                    died = self._connection.closed
                    await self.close()
                    if attempt == 2 or not (kept and died and isinstance(error, DatabaseError)):
                        raise
        raise AssertionError("unreachable")

    async def _run(
        self,
        connection: psycopg.AsyncConnection[Any],
        question: LiteralString,
        *arguments: str | list[str],
        within_seconds: float | None = None,
    ) -> tuple[Any, ...]:
        """Run one statement and give its first row, () where it gives none.

        The server keeps the deadline, and we do a little later: behind a dead wire nobody else would.
        """
        try:
            async with asyncio.timeout((within_seconds or self._slow_deadline_seconds) + _LATE_SECONDS):
                cursor = await connection.execute(question, arguments or None)
                return (await cursor.fetchone() or ()) if cursor.description else ()
        except TimeoutError:
            raise DatabaseError("the database did not answer in time") from None
        except psycopg.Error as error:
            raise _failed("the database refused", error) from error


def _failed(what: str, error: psycopg.Error) -> DatabaseError:
    words = " ".join(str(error).split())
    for_good = (error.sqlstate or "").startswith(_FOR_GOOD)
    return DatabaseError(f"{what}: {words}", hint=way_in(words, for_good=for_good), retryable=not for_good)


async def _hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    with contextlib.suppress(psycopg.Error, OSError):
        await connection.close()
