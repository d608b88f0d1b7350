"""An ordinary connection to a server, whose text comes as the server keeps it and is decoded here.

What roles and databases set for their sessions is meant for applications, and has no say in ours: each connection
brings its own settings in the startup packet, which go before those of roles, databases and the server (`GucSource` in
guc.h).

A server that converts raises where a character has no equivalent, and one with encoding SQL_ASCII where the bytes are
not of the encoding that was asked for: a name that somebody chose for a table would end what reads it, for good. So no
connection asks for another encoding than the server's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.types.string import TextLoader

from connectors.databases.postgres.encoding import decoding, readable
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
    "standard_conforming_strings": "on",
}
"""What every session of ours begins with; each may be set by any role."""
_WITHOUT_LIMIT_SINCE_17 = b"SET transaction_timeout = 0"
_ESCAPED = re.compile(r"([\\ ])")
_BACKSLASHED = r"\\\1"
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
    raw = conninfo.make_conninfo(dsn, client_encoding=_RAW, options=options)
    try:
        connection = await psycopg.AsyncConnection.connect(raw, autocommit=True)
    except psycopg.OperationalError as error:
        raise _legible(error) from None
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


def _legible(error: psycopg.OperationalError) -> psycopg.OperationalError:
    """Give a refusal with the server's words in UTF-8, if they are that: nobody has told it of an encoding yet."""
    said = error.pgconn.error_message if error.pgconn is not None else b""
    legible = said and "\N{REPLACEMENT CHARACTER}" in str(error)
    return psycopg.OperationalError(said.decode(errors="backslashreplace").strip()) if legible else error


@lru_cache(64)
def _loader(server_encoding: str) -> type[TextLoader]:
    decode = decoding(server_encoding)

    class Loader(TextLoader):
        """Text that is never refused."""

        def load(self, data: Any) -> str:
            return decode(bytes(data))

    return Loader
