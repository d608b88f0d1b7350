"""An ordinary connection to a server, whose text comes as the server keeps it and is decoded here.

What roles and databases set for their sessions is meant for applications, and has no say in ours: each connection
brings its own settings in the startup packet, which go before those of roles, databases and the server (`GucSource` in
guc.h).

A server that converts raises where a character has no equivalent, and one with encoding SQL_ASCII where the bytes are
not of the encoding that was asked for: a name that somebody chose for a table would end what reads it, for good. So no
connection asks for another encoding than the server's own.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo, pq
from psycopg.types.string import TextLoader

from connectors.databases.postgres.encoding import decoding, readable, shared_bytes, shared_text
from trigger.errors import ConfigError

_RAW = "SQL_ASCII"
"""What keeps a server from converting, until its own encoding is known."""
SESSION = {
    "search_path": "pg_catalog",
    "role": "none",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "client_min_messages": "notice",  # of a publication that is gone version 18 does no more than warn
    "datestyle": "ISO, MDY",
    "bytea_output": "hex",  # psycopg reads the other form up to a zero byte, beyond the end of an array's element
    "standard_conforming_strings": "on",
}
"""What every session of ours begins with; each may be set by any role."""
_WITHOUT_LIMIT_SINCE_17 = b"SET transaction_timeout = 0"
_ESCAPED = re.compile(r"([\\ ])")
_BACKSLASHED = r"\\\1"
_QUOTED = re.compile(rb"([\\'])")
_SHARED = ("dbname", "user")
_TEXT_TYPES = (0, "text", "name", "varchar", "bpchar", '"char"')


def encoding_of(connection: psycopg.AsyncConnection[Any]) -> str:
    """Give the encoding of the database that a connection is to."""
    return connection.info.parameter_status("server_encoding") or "UTF8"


def startup_options(settings: Mapping[str, str]) -> str:
    """Give settings as `options` of a connection."""
    return " ".join(f"-c {name}={_ESCAPED.sub(_BACKSLASHED, value)}" for name, value in settings.items())


def with_password_file(dsn: str, password_file: Path | None) -> str:
    """Give a connection string that names a file of passwords too; raises `ConfigError` where it is none."""
    try:
        return conninfo.make_conninfo(dsn, **({"passfile": str(password_file)} if password_file else {}))
    except psycopg.Error as error:
        raise ConfigError(f"not a connection string: {' '.join(str(error).split())}") from error


async def connect(dsn: str) -> psycopg.AsyncConnection[Any]:
    """Open a connection (autocommit) whose text comes as the server keeps it, as `str`, whatever bytes it has.

    It begins with the settings of `SESSION`, and with those that `dsn` names in `options`.

    Errors of psycopg pass through; on any error, and on cancellation, nothing stays open.
    """
    theirs = str(conninfo.conninfo_to_dict(dsn).get("options") or os.environ.get("PGOPTIONS") or "")
    options = f"{startup_options(SESSION)} {theirs}".strip()
    connection = await opened(conninfo.make_conninfo(dsn, client_encoding=_RAW, options=options))
    try:
        encoding = encoding_of(connection)
        if encoding != _RAW and readable(encoding):  # psycopg has its words for errors, and our parameters, in it
            await connection.execute(f"SET client_encoding TO '{encoding}'".encode())
        loader = _loader(encoding)
        for name in _TEXT_TYPES:
            connection.adapters.register_loader(name, loader)
        if connection.info.server_version >= 170000 and "transaction_timeout" not in theirs:
            await connection.execute(_WITHOUT_LIMIT_SINCE_17)
    except BaseException:
        await connection.close()
        raise
    return connection


async def opened(dsn: str) -> psycopg.AsyncConnection[Any]:
    """Open a connection (autocommit) as `dsn` has it, trying each host that it names in turn.

    Raises:
        psycopg.OperationalError: none lets us in within its `connect_timeout`; what the last one said. A cancellation
            leaves nothing open.
    """
    parameters = conninfo.conninfo_to_dict(dsn)
    seconds = conninfo.timeout_from_conninfo(parameters)
    refusals: list[psycopg.OperationalError] = []
    for attempt in await conninfo.conninfo_attempts_async(parameters):
        try:
            async with asyncio.timeout(seconds):
                connection = psycopg.AsyncConnection(await _reached(as_conninfo(attempt)))
        except TimeoutError:
            refusals.append(psycopg.errors.ConnectionTimeout("connection timeout expired"))
        except psycopg.OperationalError as error:
            refusals.append(error)
        else:
            try:
                await connection.set_autocommit(True)
            except BaseException:
                await connection.close()
                raise
            return connection
    if len(refusals) == 1:
        raise refusals[0]
    raise psycopg.OperationalError("; ".join(dict.fromkeys(map(str, refusals))))


async def _reached(dsn: bytes) -> pq.abc.PGconn:
    """Give the connection to one host; raises `psycopg.OperationalError`, with the server's words."""
    pgconn = pq.PGconn.connect_start(dsn)
    try:
        is_open = await _shake_hands(pgconn)
    except BaseException:
        pgconn.finish()
        raise
    if is_open:
        pgconn.nonblocking = 1
        return pgconn
    words = pgconn.error_message.decode(errors="backslashreplace").strip()  # nobody has told of an encoding yet
    pgconn.finish()
    raise psycopg.OperationalError(f"connection failed: {words}")


async def _shake_hands(pgconn: pq.abc.PGconn) -> bool:
    """Bring a connection to its end, as PQconnectPoll asks; False where it is refused."""
    while pgconn.status != pq.ConnStatus.BAD:
        status = pgconn.connect_poll()
        if status not in (pq.PollingStatus.READING, pq.PollingStatus.WRITING):
            return status == pq.PollingStatus.OK
        await _ready(pgconn.socket, to_write=status == pq.PollingStatus.WRITING)
    return False


async def _ready(descriptor: int, *, to_write: bool) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    (loop.add_writer if to_write else loop.add_reader)(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if to_write else loop.remove_reader)(descriptor)


def as_conninfo(parameters: Mapping[str, Any]) -> bytes:
    """Give parameters of a connection as libpq takes them, in the server's bytes."""
    said = ((name, str(value)) for name, value in parameters.items() if value is not None)
    found = (
        (name, shared_bytes(text) if name in _SHARED else text.encode(errors="surrogateescape")) for name, text in said
    )
    return b" ".join(b"%s='%s'" % (name.encode(), _QUOTED.sub(rb"\\\1", value)) for name, value in found)


def database_of(connection: psycopg.AsyncConnection[Any]) -> str:
    """Give the database that a connection is to."""
    return shared_text(connection.pgconn.db)


def role_of(connection: psycopg.AsyncConnection[Any]) -> str:
    """Give the role that a connection is of."""
    return shared_text(connection.pgconn.user)


@lru_cache(64)
def _loader(server_encoding: str) -> type[TextLoader]:
    decode = decoding(server_encoding)

    class Loader(TextLoader):
        """Text that is never refused."""

        def load(self, data: Any) -> str:
            return decode(bytes(data))

    return Loader
