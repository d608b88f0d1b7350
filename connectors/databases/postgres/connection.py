"""An ordinary connection to a server, whose text comes as the server keeps it and is decoded here.

A server that converts raises where a character has no equivalent, and one with encoding SQL_ASCII where the bytes are
not of the encoding that was asked for: a name that somebody chose for a table would end what reads it, for good. So no
connection asks for another encoding than the server's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.types.string import TextLoader

from connectors.databases.postgres.encoding import decoding, readable

_RAW = "SQL_ASCII"
"""What keeps a server from converting, until its own encoding is known."""
_TEXT_TYPES = (0, "text", "name", "varchar", "bpchar", '"char"')


def encoding_of(connection: psycopg.AsyncConnection[Any]) -> str:
    """Give the encoding of the database that a connection is to."""
    return connection.info.parameter_status("server_encoding") or "UTF8"


async def connect(dsn: str) -> psycopg.AsyncConnection[Any]:
    """Open a connection (autocommit) whose text comes as the server keeps it, as `str`, whatever bytes it has.

    Errors of psycopg pass through; on any error, and on cancellation, nothing stays open.
    """
    raw = conninfo.make_conninfo(dsn, client_encoding=_RAW)
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
