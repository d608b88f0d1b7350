"""A replication connection over psycopg.pq: open it, drain what has arrived, answer; nothing else touches COPY_BOTH.

psycopg has no replication API of its own, but libpq's calls are enough: after START_REPLICATION the connection is in
COPY_BOTH state, `get_copy_data` gives whole messages and never waits, `put_copy_data` sends status updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import socket
import time
from collections.abc import Awaitable, Callable
from struct import Struct
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import conninfo, pq

from connectors.databases.postgres import lsn
from connectors.databases.postgres.connection import connect, encoding_of
from connectors.databases.postgres.encoding import decoding
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import SourceError
from trigger.position import History, Lineage

T = TypeVar("T")

_STATUS = Struct("!cQQQQB")
_KERNEL_BYTES = 768
"""What a message that the server sends by itself takes of a socket's room beside its bytes, which count double at the
most (a Unix socket on Linux 6; over TCP it is less)."""
_POSTGRES_EPOCH_SECONDS = 946_684_800
_NO_SUCH_FILE = "58P01"
NO_PAST = "# the server has no history file of this timeline: pg_resetwal began it, on nothing that is known\n"
"""What stands for that file, as one in which no earlier timeline is named."""
_REFUSED_FOR_GOOD = ("28", "3D", "42501")
"""SQLSTATEs that waiting does not heal: authentication, no such database, no privilege."""


class System(NamedTuple):
    """What a server says of itself (IDENTIFY_SYSTEM)."""

    identifier: str
    timeline: int
    flushed: Lsn


class Present(NamedTuple):
    """Which history a server is in, and how far its log is flushed."""

    history: History
    flushed: Lsn
    reason: str = ""
    """What showed that its log is not that of the incarnation before; "" where that is not known any more."""


class Told(NamedTuple):
    """What an error or a warning of the server is, in no language: one SQLSTATE stands for many facts."""

    sqlstate: str
    function: str
    """The function of the server that said it, by its name in the server's source."""


class CopyBoth:
    """One connection in replication mode to one database; commands first, then a stream until it is closed.

    Attributes:
        server_version: as libpq says it: 150018 is 15.18.
        decode: gives the text of names in the stream, which come in the server's own encoding.
        holds_bytes: what the socket holds until the server finds it full, as the kernel counts it.
        taken_bytes: what was taken out of it since the stream began, counted so, at the most.
        warnings: what the server warned of since the connection was opened; its words may be of any language.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.warnings: set[Told] = set()
        self._connection = connection
        self._pgconn = connection.pgconn
        self.server_version = connection.info.server_version
        self.decode = decoding(encoding_of(connection))
        self.taken_bytes = 0
        with socket.socket(fileno=os.dup(self._pgconn.socket)) as same:
            self.holds_bytes = min(
                same.getsockopt(socket.SOL_SOCKET, of) for of in (socket.SO_RCVBUF, socket.SO_SNDBUF)
            )
        connection.add_notice_handler(self._notice)

    @classmethod
    async def connect(cls, dsn: str, deadline_seconds: float) -> CopyBoth:
        """Open a replication connection to the database that `dsn` names.

        Raises:
            SourceError: no connection within the deadline, or refused. A cancellation closes what was opened.
        """
        try:
            dsn = conninfo.make_conninfo(dsn, replication="database")
            async with asyncio.timeout(deadline_seconds):
                return cls(await connect(dsn))
        except TimeoutError:
            raise SourceError(f"no replication connection within {deadline_seconds:g} s") from None
        except psycopg.Error as error:
            raise refused("no replication connection", error) from error

    async def require_primary(self) -> None:
        """Raise `SourceError` where a standby answers, whose log is another one's, and may be behind."""
        if (await self._command("SELECT pg_catalog.pg_is_in_recovery()"))[0] == b"t":
            raise SourceError("the server is a standby", hint="protect the primary, by a service on its own host")

    async def identify(self) -> System:
        """Give which cluster the server is, its timeline, and how far its log is flushed."""
        row = await self._command("IDENTIFY_SYSTEM")
        return System(row[0].decode(), int(row[1]), Lsn.parse(row[2].decode()))

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history` by the server's own timeline history file."""
        return lsn.lineage(history, await self.past(history.branch))

    async def past(self, timeline: int) -> str:
        """Give the server's history file of a timeline; "" for the first, which has none, `NO_PAST` where it lacks."""
        if timeline == 1:
            return ""
        try:
            row = await self._command(f"TIMELINE_HISTORY {timeline:d}")
        except StreamRefusedError as error:
            if error.sqlstate != _NO_SUCH_FILE:
                raise
            return NO_PAST
        return row[1].decode(errors="replace")

    async def _command(self, command: str) -> list[bytes]:
        """Run a replication command and give the first row as the server wrote it."""
        try:
            cursor = await self._connection.execute(command.encode())
            result = cursor.pgresult
            if result is None or result.ntuples != 1:
                raise SourceError(f"{command} gave no row")
            return [result.get_value(0, column) or b"" for column in range(result.nfields)]
        except psycopg.Error as error:
            raise refused(command, error) from error

    async def keep_on_standbys(self, slot: str, *, failover: bool) -> None:
        """Set whether a slot that nobody reads is kept on standbys too, from version 17 on.

        Raises:
            SourceError: refused; where somebody reads it a `StreamRefusedError` with that SQLSTATE.
        """
        try:
            words = f"ALTER_REPLICATION_SLOT {slot} (FAILOVER {'true' if failover else 'false'})"
            await self._connection.execute(words.encode())
        except psycopg.Error as error:
            raise refused("ALTER_REPLICATION_SLOT", error) from error

    async def start(self, command: str, deadline_seconds: float) -> None:
        """Begin to stream by a START_REPLICATION command.

        Raises:
            SourceError: refused (a `StreamRefusedError`, which has the SQLSTATE), or no answer within the deadline.
        """
        try:
            async with asyncio.timeout(deadline_seconds):
                self._pgconn.send_query(command.encode())
                result = await self._result(deadline_seconds)
                if result is None or result.status != pq.ExecStatus.COPY_BOTH:
                    while await self._result(deadline_seconds) is not None:
                        pass  # so that the next command can be sent
                    raise _explained("START_REPLICATION", result)
        except TimeoutError:
            raise SourceError(f"the server did not begin to stream within {deadline_seconds:g} s") from None
        except psycopg.Error as error:
            raise refused("START_REPLICATION", error) from error
        self._pgconn.nonblocking = 1

    async def _result(self, deadline_seconds: float) -> pq.abc.PGresult | None:
        while self._pgconn.is_busy():
            await self.readable(deadline_seconds)
            self._pgconn.consume_input()
        return self._pgconn.get_result()

    def drain(self, feed: Callable[[memoryview], None], messages_limit: int) -> int:
        """Pass what has arrived to `feed`, message by message, up to a limit; gives how many there were.

        Raises:
            SourceError: the stream ended or broke (retryable), or what `feed` raises.
        """
        get, consume = self._pgconn.get_copy_data, self._pgconn.consume_input
        done = length_sum = 0
        try:
            while done < messages_limit:
                length, message = get(1)
                if length == 0:
                    consume()
                    length, message = get(1)
                    if length == 0:
                        break
                if length < 0:
                    raise self._ended()
                length_sum += length
                feed(message)
                done += 1
        except psycopg.Error as error:
            raise refused("the replication stream broke", error) from error
        self.taken_bytes += 2 * length_sum + _KERNEL_BYTES * done
        return done

    async def readable(self, timeout_seconds: float) -> bool:
        """Wait until something has arrived; False where nothing did in time."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        descriptor = self._pgconn.socket
        loop.add_reader(descriptor, arrived.set)
        try:
            async with asyncio.timeout(timeout_seconds):
                await arrived.wait()
            return True
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)

    def report(self, received: int, settled: int, *, reply: bool) -> None:
        """Tell the server what was received and what it may forget; with `reply` it has to answer at once.

        What the kernel does not take now leaves with the next report: a report says everything anew.
        """
        now_us = int((time.time() - _POSTGRES_EPOCH_SECONDS) * 1_000_000)
        try:
            self._pgconn.put_copy_data(_STATUS.pack(b"r", max(received, settled), settled, settled, now_us, reply))
            self._pgconn.flush()
        except psycopg.Error as error:
            raise refused("the replication stream broke", error) from error

    async def close(self) -> None:
        """Disconnect. Never raises."""
        with contextlib.suppress(psycopg.Error, OSError):
            await self._connection.close()

    def _ended(self) -> StreamRefusedError:
        return _explained("the replication stream ended", self._pgconn.get_result())

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            self.warnings.add(_told(diagnostic))


async def identify(dsn: str, deadline_seconds: float) -> System:
    """Give what a primary says of itself; raises `SourceError` where it does not answer, or is a standby."""

    async def ask(stream: CopyBoth) -> System:
        await stream.require_primary()
        return await stream.identify()

    return await _asked(dsn, ask, "which one it is", deadline_seconds)


async def timeline_history(dsn: str, timeline: int, deadline_seconds: float) -> str:
    """Give the history file of a timeline as the server has it, "" for the first; raises `SourceError`."""
    return await _asked(
        dsn, lambda stream: stream.past(timeline), f"the history of timeline {timeline}", deadline_seconds
    )


async def _asked(dsn: str, ask: Callable[[CopyBoth], Awaitable[T]], what: str, deadline_seconds: float) -> T:
    """Give the answer to a question that gets a connection of its own."""
    stream = await CopyBoth.connect(dsn, deadline_seconds)
    try:
        async with asyncio.timeout(deadline_seconds):
            return await ask(stream)
    except TimeoutError:
        raise SourceError(f"the server did not say within {deadline_seconds:g} s {what}") from None
    finally:
        await stream.close()


class StreamRefusedError(SourceError):
    """A `SourceError` that also knows what the server told of the reason, as far as it did."""

    def __init__(self, message: str, told: Told, *, hint: str, retryable: bool) -> None:
        super().__init__(message, hint=hint, retryable=retryable)
        self.told = told
        self.sqlstate = told.sqlstate


def refused(what: str, error: psycopg.Error) -> StreamRefusedError:
    """Give the error of our port for one of psycopg's, its words kept."""
    return _refused(what, _told(error.diag)._replace(sqlstate=error.sqlstate or ""), str(error))


def _told(diagnostic: psycopg.errors.Diagnostic) -> Told:
    return Told(diagnostic.sqlstate or "", diagnostic.source_function or "")


def _explained(what: str, result: pq.abc.PGresult | None) -> StreamRefusedError:
    """Give the error of our port for a result that says why there is no stream (any more)."""
    if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
        return _refused(what, Told("", ""), "the server stopped")
    state, function, words = (
        (result.error_field(field) or b"").decode(errors="replace")
        for field in (
            pq.DiagnosticField.SQLSTATE,
            pq.DiagnosticField.SOURCE_FUNCTION,
            pq.DiagnosticField.MESSAGE_PRIMARY,
        )
    )
    return _refused(what, Told(state, function), words)


def _refused(what: str, told: Told, words: str) -> StreamRefusedError:
    for_good = told.sqlstate.startswith(_REFUSED_FOR_GOOD)
    hint = way_in(words, for_good=for_good)
    return StreamRefusedError(f"{what}: {' '.join(words.split())}", told, hint=hint, retryable=not for_good)


def way_in(words: str, *, for_good: bool) -> str:
    """Give what to do where the server does not let us in, by its words; "" where waiting may help.

    PostgreSQL gives no code for what fails before a connection stands, so the words are looked at; the name of the
    method is the same in every language.
    """
    if _PEER.search(words):
        return _LET_IN.format(user=_system_user())
    return "look at the role's rights, the name of the database and pg_hba.conf" if for_good else ""


def _system_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


_PEER = re.compile(r"(?i)\bpeer\b")
_LET_IN = (
    "the server lets in only the system user of the same name (peer), and this runs as {user}: run all of Trigpoint as"
    " that user (runuser -u postgres -- trigpoint …, and User=postgres in the unit); or let {user} in, by the lines"
    " `local all postgres peer map=trigpoint` and `local replication postgres peer map=trigpoint` before the others in"
    " pg_hba.conf, the lines `trigpoint postgres postgres` and `trigpoint {user} postgres` in pg_ident.conf, and"
    " SELECT pg_reload_conf()"
)
