"""Make a clone that is thrown away afterwards ready to be looked at in full, and tell what there is to look at.

What is done here would not do for a clone that somebody uses: databases are opened, locks of in-doubt transactions
broken, settings of roles and databases dropped, triggers on DDL and logins disabled.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from connectors.databases.postgres.clone.access import Access
from connectors.databases.postgres.clone.files import Relation
from connectors.databases.postgres.encoding import shared_text

_DATABASES = "SELECT pg_catalog.namesend(datname), datconnlimit = -2 FROM pg_catalog.pg_database ORDER BY datname"
_OPEN = "UPDATE pg_catalog.pg_database SET datallowconn = true WHERE NOT datallowconn AND datconnlimit <> -2"
"""By no name: one that is none in the encoding of our database cannot be said in a statement."""
_LOCKS = """
SELECT DISTINCT pg_catalog.namesend(p.database), p.gid
  FROM pg_catalog.pg_prepared_xacts p
       JOIN pg_catalog.pg_locks l ON l.virtualtransaction = '-1/' || p.transaction::pg_catalog.text
 WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' ORDER BY 1, 2
"""
_LOCKED = """
SELECT coalesce(pg_catalog.format('%%s.%%s', n.nspname, c.relname), l.relation::pg_catalog.text)
  FROM pg_catalog.pg_prepared_xacts p
       JOIN pg_catalog.pg_locks l ON l.virtualtransaction = '-1/' || p.transaction::pg_catalog.text
       LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation
       LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE p.gid = %s AND l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
   AND (c.relkind IS NULL OR c.relkind NOT IN ('i', 't')) ORDER BY 1
"""
_TRIGGERS = "SELECT evtname FROM pg_catalog.pg_event_trigger WHERE evtenabled <> 'D'"
_READER = "CREATE ROLE {} LOGIN BYPASSRLS IN ROLE pg_read_all_data, pg_monitor"
_AMCHECK_THERE = "SELECT true FROM pg_catalog.pg_available_extensions WHERE name = 'amcheck'"
_AMCHECK_SCHEMA = """
SELECT n.nspname FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname = 'amcheck'
"""
_RELATIONS = """
SELECT pg_catalog.namesend(pg_catalog.current_database()), pg_catalog.format('%s.%s', n.nspname, c.relname),
       c.relkind::pg_catalog.text, coalesce(a.amname::pg_catalog.text, ''), c.relpersistence = 'u', c.relpages,
       pg_catalog.pg_relation_filepath(c.oid),
       coalesce(CASE WHEN i.indisvalid AND i.indisready THEN pg_catalog.pg_relation_filepath(i.indrelid) END, '')
  FROM pg_catalog.pg_class c
       JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
       LEFT JOIN pg_catalog.pg_am a ON a.oid = c.relam
       LEFT JOIN pg_catalog.pg_index i ON i.indexrelid = c.oid
 WHERE c.relkind IN ('r', 'm', 't', 'i', 'S') AND c.relpersistence <> 't'
   AND pg_catalog.pg_relation_filepath(c.oid) IS NOT NULL
 ORDER BY c.oid
"""


@dataclass(frozen=True, slots=True)
class Opened:
    """A sandbox that is ready to be looked at."""

    databases: tuple[str, ...]
    has_amcheck: bool
    left_out: tuple[str, ...]
    """Databases that nobody can enter, since their DROP was interrupted."""
    broken_locks: tuple[str, ...]
    """The in-doubt transactions that were rolled back since nobody could have read behind their locks."""
    faults: tuple[str, ...]
    """What could not be done, by database."""
    reader: str
    """A role that may read everything and do nothing; for questions whose tables are other people's."""


async def open_all(access: Access) -> Opened:
    """Let every database be entered and every table be read; raises `psycopg.Error`."""
    reader = f"trigpoint_{secrets.token_hex(8)}"
    async with await access.connect() as first:
        await first.execute(_OPEN.encode())
        rows = await (await first.execute(_DATABASES.encode())).fetchall()
        await first.execute(
            b"DELETE FROM pg_catalog.pg_db_role_setting"
        )  # in force for the reader, who cannot override
        await first.execute(sql.SQL(_READER).format(sql.Identifier(reader)))
        has_amcheck = bool(await (await first.execute(_AMCHECK_THERE.encode())).fetchall())
        in_doubt = await (await first.execute(_LOCKS.encode())).fetchall()
    broken = [await _roll_back(access, shared_text(database), gid) for database, gid in in_doubt]
    there = tuple(shared_text(database) for database, is_broken in rows if not is_broken)
    faults = []
    for database in there:
        try:
            async with await access.connect(database) as connection:
                await _disarm(connection)
                if has_amcheck:
                    await _install_amcheck(connection)
        except psycopg.Error as error:
            faults.append(f"database {database}: {error}")
    left_out = tuple(shared_text(database) for database, is_broken in rows if is_broken)
    return Opened(there, has_amcheck, left_out, tuple(broken), tuple(faults), reader)


async def relations(access: Access, opened: Opened, shrunk: Mapping[str, int]) -> tuple[list[Relation], list[str]]:
    """Give everything that has a file, and of which databases that cannot be told.

    VACUUM truncates a file before it says so in the catalog, and a state may lie between the two: `shrunk` holds to how
    many pages the log truncated a file.
    """
    found: dict[str, Relation] = {}
    faults = []
    for database in opened.databases:
        try:
            async with await access.connect(database) as connection:
                for row in await (await connection.execute(_RELATIONS.encode())).fetchall():
                    one = Relation(shared_text(row[0]), *row[1:])
                    one = one._replace(known_pages=min(one.known_pages, shrunk.get(one.path, one.known_pages)))
                    found.setdefault(one.path, one)  # what all databases share is in the catalog of each
        except psycopg.Error as error:
            faults.append(f"database {database}: its catalog cannot be read: {error}")
    return list(found.values()), faults


async def _roll_back(access: Access, database: str, gid: str) -> str:
    """Roll an in-doubt transaction back; gives its name and what it had locked."""
    async with await access.connect(database) as connection:
        locked = [row[0] for row in await (await connection.execute(_LOCKED.encode(), [gid])).fetchall()]
        await connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    return f"{gid} on {', '.join(locked)} in {database}"


async def _disarm(connection: psycopg.AsyncConnection[Any]) -> None:
    """Disable the triggers on DDL and logins: some fire in every session, the others in the reader's."""
    for (name,) in await (await connection.execute(_TRIGGERS.encode())).fetchall():
        await connection.execute(sql.SQL("ALTER EVENT TRIGGER {} DISABLE").format(sql.Identifier(name)))


async def _install_amcheck(connection: psycopg.AsyncConnection[Any]) -> None:
    """See that amcheck is there, in a schema in which nobody can have put a function of the same name beside it."""
    schemas = [row[0] for row in await (await connection.execute(_AMCHECK_SCHEMA.encode())).fetchall()]
    if not schemas:
        await connection.execute(b"CREATE EXTENSION amcheck SCHEMA pg_catalog")
    elif schemas != ["pg_catalog"]:
        await connection.execute(b"ALTER EXTENSION amcheck SET SCHEMA pg_catalog")
