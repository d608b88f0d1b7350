"""Connections to a clone in which no setting of its roles and databases has a say.

`ALTER DATABASE` is its owner's, and what it sets is in force in every session there: of a superuser too, and from the
first statement on. So each connection of ours brings its own settings in the startup packet, which go before those of
roles and databases (`GucSource` in guc.h); what else they set goes back to the server's default at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from connectors.databases.postgres.connection import SESSION, connect, startup_options
from trigger.errors import RestoreError

_CONNECT_SECONDS = 10
_NO_PASSWORD = {"password": "", "passfile": os.devnull + "/none"}
"""Neither the environment nor a file of ours has a password for whoever listens in a folder that was given away."""
LOCK_SECONDS = 60
"""So long we wait for a lock: of all that lives in a clone only an in-doubt transaction can hold one for longer."""
_FROM_THE_START = SESSION | {
    "session_preload_libraries": "",
    "local_preload_libraries": "",
    "dynamic_library_path": "$libdir",
    "session_replication_role": "replica",  # before 17 nothing else keeps event triggers from firing
    "lock_timeout": f"{LOCK_SECONDS}s",
    "post_auth_delay": "0",
    "ignore_system_indexes": "off",
    "ignore_checksum_failure": "off",
    "zero_damaged_pages": "off",
    "row_security": "off",
    "client_encoding": "SQL_ASCII",  # so that nothing is converted: a name may be no text of its encoding
}
_ANYBODYS = frozenset(_FROM_THE_START) - {
    "session_preload_libraries",
    "dynamic_library_path",
    "session_replication_role",
    "post_auth_delay",
    "ignore_system_indexes",
    "ignore_checksum_failure",
    "zero_damaged_pages",
}
"""What a role that is no superuser may bring along too."""
_SINCE_17 = {"event_triggers": "off", "transaction_timeout": "0"}
_RESET = """
SELECT pg_catalog.set_config(s.name, s.boot_val, false) FROM pg_catalog.pg_settings s
 WHERE s.source IN ('global', 'database', 'user', 'database user')
   AND s.context IN ('user', 'superuser') AND s.boot_val IS NOT NULL
   AND s.name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'seed')
"""
_OTHERS = """
SELECT DISTINCT s.name, s.boot_val
  FROM pg_catalog.pg_db_role_setting d
       CROSS JOIN LATERAL pg_catalog.unnest(d.setconfig) AS one(line)
       JOIN pg_catalog.pg_settings s ON s.name = pg_catalog.split_part(one.line, '=', 1)
 WHERE d.setrole IN (0, (SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname = SESSION_USER))
   AND s.context IN ('user', 'superuser') AND s.boot_val IS NOT NULL
   AND s.name NOT IN ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable', 'seed')
 ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Access:
    """How the server of a clone is asked."""

    conninfo: str
    """Of a superuser, without a database."""
    major: int
    home: str
    """A database that takes connections."""
    is_superuser: bool = True

    async def connect(self, database: str = "", **other: str) -> psycopg.AsyncConnection[Any]:
        """Give an autocommit connection (to `home` if no database is named) with our settings and `other` ones.

        Raises:
            psycopg.Error: there is none to be had.
        """
        connection = await connect(
            make_conninfo(
                self.conninfo,
                dbname=database or self.home,
                options=clone_options(self.major, other, is_superuser=self.is_superuser),
                **_NO_PASSWORD,
                connect_timeout=_CONNECT_SECONDS,
            )
        )
        try:
            await connection.execute(_RESET.encode())
        except BaseException:
            await connection.close()
            raise
        return connection

    async def environment(self) -> dict[str, str]:
        """Give what makes a program of PostgreSQL connect in the same way; raises `psycopg.Error`."""
        async with await self.connect() as connection:
            others = await (await connection.execute(_OTHERS.encode())).fetchall()
        found = {name: value for name, value in others if name not in _FROM_THE_START | _SINCE_17}
        return {"PGOPTIONS": clone_options(self.major, found), "PGCONNECT_TIMEOUT": str(_CONNECT_SECONDS)}


def clone_options(major: int, other: Mapping[str, str] | None = None, *, is_superuser: bool = True) -> str:
    """Give what our sessions on a clone begin with, and `other` settings, as `options` of a connection."""
    found = _FROM_THE_START | (_SINCE_17 if major >= 17 else {}) | dict(other or {})
    if not is_superuser:
        found = {name: value for name, value in found.items() if name in _ANYBODYS or name in (other or {})}
    return startup_options(found)


async def find_home(conninfo: str, major: int, roles: Sequence[str], candidates: Sequence[str]) -> Access:
    """Give the access to a clone by the first of `roles` that it has, and the first of `candidates` that lets it in.

    Raises:
        psycopg.Error: the server, or each of the roles, is refused as such; what was said of the first.
        RestoreError: none of the databases is there and open.
    """
    refusals: list[str] = []
    unfit: psycopg.OperationalError | None = None
    for role in dict.fromkeys(roles):
        for name in dict.fromkeys(candidates):
            access = Access(make_conninfo(conninfo, user=role), major, name)
            try:
                async with await access.connect():
                    return access
            except psycopg.OperationalError as error:
                words = " ".join(str(error).split())
                if f'database "{name}"' not in words:
                    unfit = unfit or error
                    break
                refusals.append(words.rpartition("FATAL: ")[2].strip())
    if unfit is not None and not refusals:
        raise unfit
    raise RestoreError(
        f"no database of the clone takes connections: {'; '.join(refusals)}",
        hint="name one in database.databases that is there and open (ALTER DATABASE … ALLOW_CONNECTIONS true)",
    )
