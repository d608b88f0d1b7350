"""Port `Source` for PostgreSQL: one logical slot in one database, read with pgoutput.

Why acknowledging is safe: the server keeps the log from the start of the oldest transaction that has not ended, and
after a reconnect sends every transaction whose *commit record begins* at or after what was acknowledged. So a
transaction that is still streamed, or prepared, when a later position is acknowledged is sent again as a whole. What
we acknowledge is the end of a commit record that was settled, or the end of log in which no commit of ours stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo

from connectors.databases.postgres.connection import connect
from connectors.databases.postgres.lsn import Lsn, full_xid, history, transaction
from connectors.databases.postgres.stream import ownership, publication, slot
from connectors.databases.postgres.stream.copyboth import (
    CopyBoth,
    Present,
    StreamRefusedError,
    Told,
    identify,
    refused,
)
from connectors.databases.postgres.stream.pace import Pace
from connectors.databases.postgres.stream.pgoutput import Committed, Decoder, UnstreamableError
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.ports import Batch, Break
from trigger.position import Lineage, Position

_MESSAGES_A_SLICE = 2_000
"""Messages drained before other tasks get their turn: about 4 ms."""
_MAINTENANCE_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_LOCK_SECONDS = 0.25
"""How long the upkeep of the publication waits for a table that somebody has locked."""
_SLOT_IN_USE = "55006"
_NO_SUCH_PUBLICATION = Told("42704", "get_publication_oid")
_SKIPPED_PUBLICATION = Told("55000", "LoadPublications")
"""What PostgreSQL 18 warns of, and goes on without the changes, where the versions before stop with an error."""
_LOG_REMOVED = {Told("58P01", function) for function in ("WalSndSegmentOpen", "CheckXLogRemoved")}
"""What a slot is given up for names the function too: of other facts with these SQLSTATEs (a standby is down that the
server waits for, a file of another kind is not there) the slot is none the worse."""

_T = TypeVar("_T")

_ALONE_SECONDS = 10.0

Recognise = Callable[[str, Position | None], Awaitable[Present]]
"""Says which history a server is in, by how far its log and which commit of it were seen last."""


class PostgresSource:
    """The commits of one database of a cluster; implements port `Source`.

    Args:
        dsn: connection string of a role that may replicate; the database in it is replaced.
        database: the database whose commits are given.
        name: prefix of the slot, and name of the publications.
        deadline_seconds: bound of every wait on the server, but for creating a slot.
        slot_deadline_seconds: how long creating a slot may wait for running transactions.
        failover: whether the slot is kept on standbys too, from version 17 on.
        silence_seconds: how long the server may owe us an answer before the connection counts as dead.
        recognise: says which history the server is in, by what is known of it; the first of its timeline by default.
        saw: told the last commit of a batch before that is given: from then on it is known.
        holder: the catalog that slot and publications are noted for, and of no other of which they may be; "" for none.

    Attributes:
        duplicates_suppressed: commits that the server sent again and that were not delivered again.
        trouble: what the slot waits for while it is made, why the list of tables whose updates are published could not
            be refreshed last time, or what holds commits back, or "".
    """

    def __init__(
        self,
        dsn: str,
        database: str,
        name: str = "trigpoint",
        *,
        deadline_seconds: float = 10.0,
        slot_deadline_seconds: float = 60.0,
        failover: bool = False,
        silence_seconds: float = 60.0,
        recognise: Recognise | None = None,
        saw: Callable[[Commit], None] = lambda _: None,
        holder: str = "",
    ) -> None:
        self.name = database
        self.slot = slot.slot_name(name, database)
        self.publication = name
        self.heartbeat_seconds = 10.0
        self.duplicates_suppressed = 0
        self.trouble = ""
        self._dsn = conninfo.make_conninfo(dsn, dbname=database, application_name=self.slot)
        self._deadline_seconds = deadline_seconds
        self._slot_deadline_seconds = slot_deadline_seconds
        self.failover = failover
        self._silence_seconds = silence_seconds
        self._recognise = recognise or _first_of_its_timeline
        self._saw = saw
        self._holder = holder
        self._side: psycopg.AsyncConnection[Any] | None = None
        self._stream: CopyBoth | None = None
        self._decoder = Decoder()
        self._lineage = Lineage(history("", 0))
        self._forked_at = 0  # where the present timeline begins
        self._failed = False
        self._streaming = "on"  # off for the one connection after a transaction that cannot be streamed
        self._publications_broken = False
        self._log_removed = False
        self._maintains = False
        self._after = 0  # commits that end here or before were settled
        self._through = 0
        self._settled = 0
        self._reported = 0
        self._xid = 0  # a full transaction id near those in the stream
        self._reported_at = self._maintained_at = 0.0
        self._says_where_it_begins = False
        self._asked_at: float | None = None  # since when the server owes us an answer
        self._relations_seen = 0
        self._pace, self._taken_bytes = Pace(), 0

    # ---- open and close

    async def open(self, after: Position | None) -> Break | None:
        """Connect and resume behind `after`; see port `Source`."""
        await self.close()
        try:
            return await self._open(after)
        except BaseException as error:
            await self.close()
            if isinstance(error, psycopg.Error):
                raise refused(f"database {self.name}", error) from error
            if isinstance(error, TimeoutError):
                raise SourceError(f"database {self.name} did not answer within {self._deadline_seconds:g} s") from None
            raise

    async def _open(self, after: Position | None) -> Break | None:
        side = await self._connect_side()
        through = self._lineage.at(self._through) if self._through else after
        present = await self._recognise(self._dsn, through)
        self._stream = stream = await CopyBoth.connect(self._dsn, self._deadline_seconds)
        lineage = await self._within(stream.lineage(present.history))
        publications, useless = await self._publish(side)
        confirmed, made = await self._slot(side, stream, useless, present.flushed)
        behind, reason = slot.resume(after, lineage, confirmed, present, made)
        await self._start(stream, behind, publications)
        self._lineage = lineage  # with the place: a place of one history told of another makes a life that never was
        self._forked_at = lineage.forks[-1][1] if lineage.forks else 0
        self._after = self._through = behind
        self._settled = confirmed  # what was delivered before may have no outcome yet, and is not to be forgotten
        self._says_where_it_begins = after is None
        self._decoder, self._relations_seen, self._failed = Decoder(decode=stream.decode), 0, False
        self._reported = 0
        self._pace, self._taken_bytes = Pace(stream.holds_bytes), stream.taken_bytes
        self._reported_at, self._asked_at = asyncio.get_running_loop().time(), None
        return Break(lineage.at(behind), reason, lineage) if reason else None

    async def _connect_side(self) -> psycopg.AsyncConnection[Any]:
        """Open the ordinary connection: it makes slot and publications and asks what the stream does not tell."""
        async with asyncio.timeout(self._deadline_seconds):
            self._side = side = await connect(self._dsn)
            await self._patience(side, self._deadline_seconds, _LOCK_SECONDS)
            cursor = await side.execute(
                "SELECT pg_is_in_recovery(), (SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'),"
                " pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
            )
            row = await cursor.fetchone()
        assert row is not None
        standby, timeout_ms, self._xid = row
        if standby:
            raise SourceError(
                f"the server of database {self.name} is a standby",
                hint="protect the primary, by a service on its own host",
            )
        self.heartbeat_seconds = min(10.0, timeout_ms / 4000) if timeout_ms else 10.0
        return side

    async def _patience(self, side: psycopg.AsyncConnection[Any], seconds: float, lock_seconds: float) -> None:
        """Have the server give up statements after `seconds`, and what others hold locked after `lock_seconds`."""
        await side.execute(
            "SELECT set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false)",
            [str(int(seconds * 1000)), str(int(lock_seconds * 1000))],
        )

    async def _publish(self, side: psycopg.AsyncConnection[Any]) -> tuple[list[str], str]:
        """Make the publications before the slot (LAB 19); gives their names and why an existing slot is useless."""
        async with asyncio.timeout(self._deadline_seconds):
            if other := await ownership.another(side, self.publication, self._holder):
                what = f"slot {self.slot} and publication {self.publication} in {self.name}"
                raise SourceError(f"{what} are those of the catalog {other}", hint=ownership.REMEDY, retryable=False)
            publications, made = await publication.ensure(side, self.publication)
            await ownership.note(side, self.publication, self._holder)
            self._maintains = len(publications) > 1
        if self._maintains:
            await self._maintain(side)
        if made:
            return publications, "the publication had been dropped"
        if self._publications_broken:
            return publications, "the publication had been dropped and made again"
        if self._log_removed:  # without a word at the slot, as after pg_resetwal
            return publications, "log that the slot needs was removed"
        return publications, ""

    async def _slot(
        self, side: psycopg.AsyncConnection[Any], stream: CopyBoth, useless: str, flushed: Lsn
    ) -> tuple[Lsn, str]:
        """Find or make the slot; gives where it begins, and why the one that was there before is not used ("")."""
        async with asyncio.timeout(self._deadline_seconds):
            found = await slot.look(side, self.slot, self.name)
        if found is not None and found.confirmed > flushed:  # as after pg_resetwal
            useless = useless or f"the slot is of another log, and waits for {found.confirmed}, beyond this one"
        if found is not None and not found.lost and not useless:
            if found.failover != self.failover and stream.server_version >= slot.FAILOVER_VERSION:
                await self._unless_in_use(
                    lambda: self._within(stream.keep_on_standbys(self.slot, failover=self.failover))
                )
            return found.confirmed, ""
        reason = "the slot had been dropped"
        if found is not None:
            reason = useless or f"the slot was {found.lost}"
            await self._unless_in_use(lambda: slot.drop(side, self.slot))
        await self._patience(side, self._slot_deadline_seconds, self._slot_deadline_seconds)
        async with (
            asyncio.timeout(self._slot_deadline_seconds + self._deadline_seconds),
            slot.telling(self._dsn, self.slot, self._tell),
        ):
            confirmed = await slot.create(side, self.slot, failover=self.failover)
        await self._patience(side, self._deadline_seconds, _LOCK_SECONDS)
        self._publications_broken = self._log_removed = False
        return confirmed, reason

    def _tell(self, trouble: str) -> None:
        self.trouble = trouble

    async def _start(self, stream: CopyBoth, behind: Lsn, publications: list[str]) -> None:
        protocol = 4 if stream.server_version >= 160000 else 3
        names = ",".join(f'"{name}"' for name in publications)
        options = {"proto_version": str(protocol), "publication_names": names, "messages": "true"}
        options["streaming"] = self._streaming
        listed = ", ".join(f"{name} {_literal(value)}" for name, value in options.items())
        command = f"START_REPLICATION SLOT {self.slot} LOGICAL {behind} ({listed})"
        await self._unless_in_use(lambda: stream.start(command, self._deadline_seconds))

    async def _unless_in_use(self, act: Callable[[], Awaitable[object]]) -> None:
        """Do something with the slot; where another process holds it, try again until the deadline (C9).

        After a crash of ours the old connection's process may hold the slot until its timeout.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline_seconds
        while True:
            try:
                await act()
                return
            except (StreamRefusedError, psycopg.errors.ObjectInUse) as error:
                if error.sqlstate != _SLOT_IN_USE:
                    raise
                if loop.time() >= deadline:
                    raise SourceError(
                        f"slot {self.slot} is held by another process: {' '.join(str(error).split())}",
                        hint="a second service on the same slot? else it goes away after wal_sender_timeout, or "
                        "end it with pg_terminate_backend",
                    ) from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def _within(self, awaitable: Awaitable[_T]) -> _T:
        async with asyncio.timeout(self._deadline_seconds):
            return await awaitable

    async def close(self) -> None:
        """Disconnect; the slot stays. Never raises."""
        stream, self._stream = self._stream, None
        side, self._side = self._side, None
        for connection in (stream, side):
            if connection is not None:
                with contextlib.suppress(psycopg.Error, OSError):
                    await connection.close()

    async def remove(self) -> list[str]:
        """Drop the slot and the publications, for good; gives the names of what was there.

        Raises:
            SourceError: the slot is in use, or the server refused.
        """
        await self.close()
        try:
            side = await self._connect_side()
            gone: list[str] = []
            if await slot.look(side, self.slot, self.name) is not None:
                await self._unless_in_use(lambda: slot.drop(side, self.slot))
                gone.append(f"slot {self.slot}")
            dropped = await publication.drop(side, self.publication)
            return gone + [f"publication {name} in {self.name}" for name in dropped]
        except psycopg.Error as error:
            raise refused(f"database {self.name}", error) from error
        except TimeoutError:
            raise SourceError(f"database {self.name} did not answer within {self._deadline_seconds:g} s") from None
        finally:
            await self.close()

    # ---- the stream

    async def read(self) -> Batch:
        """Wait until something has arrived and give it, at most what 2,000 messages hold; see port `Source`."""
        stream = self._connected()
        if self._decoder.is_full:
            raise SourceError(f"the stream of database {self.name} described very many tables, and is opened anew")
        if self._says_where_it_begins:  # an idle server would let the first word wait for half its timeout
            self._says_where_it_begins = False
            return Batch((), self._lineage.at(Lsn(self._through)))
        await self._maintain_if_due()
        if (seconds := self._pace.look_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(seconds)
        while True:
            drained = self._drain(stream)
            self._stay_alive(stream, heard=drained > 0)
            batch = self._take()
            if batch is not None:
                now = asyncio.get_running_loop().time()
                before, self._taken_bytes = self._taken_bytes, stream.taken_bytes
                self._pace.gave(now, taken_bytes=self._taken_bytes - before, emptied=drained < _MESSAGES_A_SLICE)
                return batch
            if drained == _MESSAGES_A_SLICE:
                await asyncio.sleep(0)  # amid a large transaction: the other tasks' turn
            elif not await stream.readable(self._quiet_seconds()):
                self._report(stream, reply=True)
                await self._maintain_if_due()

    def _connected(self) -> CopyBoth:
        if self._stream is None or self._failed:  # a decoder that has lost its place must not go on
            raise SourceError(f"the stream of database {self.name} is not open", hint="open it again")
        return self._stream

    def _drain(self, stream: CopyBoth) -> int:
        try:
            drained = stream.drain(self._decoder.feed, _MESSAGES_A_SLICE)
            self._refuse_holes(stream)
        except SourceError as error:
            self._failed = True
            self._streaming = "off" if isinstance(error, UnstreamableError) else "on"
            if isinstance(error, StreamRefusedError):
                self._publications_broken |= error.told == _NO_SUCH_PUBLICATION
                self._log_removed |= error.told in _LOG_REMOVED
            raise
        return drained

    def _refuse_holes(self, stream: CopyBoth) -> None:
        if _SKIPPED_PUBLICATION in stream.warnings:
            self._publications_broken = True
            raise SourceError(f"the publication of database {self.name} was dropped and made again")

    def _stay_alive(self, stream: CopyBoth, *, heard: bool) -> None:
        """Report in time, also amid a transaction of many minutes, and notice a server that has gone silent."""
        now = asyncio.get_running_loop().time()
        if heard:
            self._asked_at = None
        elif self._asked_at is not None and now - self._asked_at > self._silence_seconds:
            raise SourceError(f"the server of database {self.name} has been silent for {self._silence_seconds:g} s")
        if self._decoder.reply_wanted:
            self._let_server_stop()
        due = now - self._reported_at >= self.heartbeat_seconds
        if self._decoder.reply_wanted or due:  # where nothing has moved, the server is asked how far it is
            self._report(stream, reply=due and self._decoder.through <= self._reported)

    def _let_server_stop(self) -> None:
        """Raise where the server has ended our ordinary connection, as one does that shuts down.

        It ends those first, and streams only when all that was sent is acknowledged, asking again and again. What
        waits for a point can never be, since no point is taken without the server; it would wait for us for ever.
        """
        if self._side is None:
            return
        with contextlib.suppress(psycopg.OperationalError):
            while not self._side.closed and select.select([self._side], [], [], 0)[0]:
                self._side.pgconn.consume_input()
                self._side.pgconn.is_busy()  # takes in what has arrived, down to the end of the connection
        if self._side.closed:
            raise SourceError(f"the server of database {self.name} has ended our connection: it is shutting down")

    def _quiet_seconds(self) -> float:
        return max(0.0, self._reported_at + self.heartbeat_seconds - asyncio.get_running_loop().time())

    def _report(self, stream: CopyBoth, *, reply: bool = False) -> None:
        stream.report(self._decoder.through, self._settled, reply=reply)
        self._reported = self._decoder.through
        self._decoder.reply_wanted = False
        self._reported_at = asyncio.get_running_loop().time()
        if reply and self._asked_at is None:
            self._asked_at = self._reported_at

    def _take(self) -> Batch | None:
        """Give what the decoder has, without a wait in between; None where nothing has moved."""
        decoder = self._decoder
        committed, decoder.commits = decoder.commits, []
        fresh = [self._commit(one) for one in committed if one.end > self._after]
        self.duplicates_suppressed += len(committed) - len(fresh)
        if not fresh and decoder.through <= self._through:
            return None
        if fresh:
            self._saw(fresh[-1])
        self._through = max(self._through, decoder.through)
        return Batch(fresh, self._lineage.at(Lsn(self._through)))

    def _commit(self, one: Committed) -> Commit:
        self._xid, start = full_xid(one.xid, self._xid), Lsn(one.start)
        return Commit(
            self.name,
            self._lineage.history if start >= self._forked_at else self._lineage.at(start).history,
            start,
            Lsn(one.end),
            transaction(self._xid),
            one.time_us,
            one.tables,
            one.markers,
            one.origin,
            one.markers_cut,
        )

    async def acknowledge(self, through: Position) -> None:
        """Let the server forget everything up to `through`; see port `Source`.

        Raises:
            SourceError: not connected, or `through` lies in another history (not retryable).
        """
        stream = self._connected()
        if not self._lineage.includes(through):
            raise SourceError(
                f"{through} is not in the past of {self._lineage.history}, which database {self.name} is in",
                hint="the cluster was replaced or failed over; open the stream again",
                retryable=False,
            )
        if through.at > self._settled:
            self._settled = through.at
            self._report(stream)

    async def heartbeat(self) -> None:
        """Tell the server that we are alive; see port `Source`."""
        stream = self._connected()
        self._let_server_stop()
        self._report(stream)

    # ---- what the stream itself does not tell

    async def _maintain_if_due(self) -> None:
        """Every ten seconds, and soon after a table was new in the stream, look after what may have changed."""
        now = asyncio.get_running_loop().time()
        news = self._decoder.relations_seen != self._relations_seen
        if now - self._maintained_at < (1.0 if news else _MAINTENANCE_SECONDS):
            return
        self._maintained_at, self._relations_seen = now, self._decoder.relations_seen
        try:
            async with asyncio.timeout(self._deadline_seconds):
                side = self._side if self._side and not self._side.closed else await self._connect_side()
                self.trouble = ""
                if self._maintains:
                    await self._maintain(side)
                row = await (
                    await side.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
                ).fetchone()
                self._xid = max(self._xid, row[0] if row else 0)
                self.trouble = self.trouble or await slot.synchronous(side, f"{self.publication}_")
                if self.failover and side.info.server_version >= slot.FAILOVER_VERSION:
                    self.trouble = self.trouble or await slot.awaited(side)
        except (psycopg.Error, TimeoutError, SourceError) as error:
            self.trouble = f"not looked after: {' '.join(str(error).split()) or type(error).__name__}"

    async def _maintain(self, side: psycopg.AsyncConnection[Any]) -> None:
        try:
            await self._within(publication.maintain(side, self.publication))
        except psycopg.errors.InsufficientPrivilege as error:
            self.trouble = f"the list of tables whose updates are published is not kept up to date: {error}"
        self._maintained_at = asyncio.get_running_loop().time()


async def _first_of_its_timeline(dsn: str, through: Position | None) -> Present:  # noqa: ARG001
    """Give the history of a server of which nothing is known."""
    system = await identify(dsn, _ALONE_SECONDS)
    return Present(history(system.identifier, system.timeline), system.flushed)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
