"""The publications that a stream reads, made so that they can never stop an application's write.

A publication that publishes updates makes UPDATE and DELETE **fail** on every table in it that has no replica identity
("cannot update table … because it does not have a replica identity and publishes updates"), tables that are created
later included. So there are two:

- `<name>`: FOR ALL TABLES, inserts and truncates only; safe on any table, present or future;
- `<name>_keyed`: updates and deletes of the tables that have a replica identity, kept up to date by `maintain`. Of a
  partitioned table these are its partitions, each by itself: a new one has the identity of its parent's key, but not
  its REPLICA IDENTITY FULL.

What stays unseen: UPDATE and DELETE on a table without replica identity, and on a new table until the next `maintain`
(a new table is noticed with its first insert). Catch-all points hold them; `ALTER TABLE … REPLICA IDENTITY FULL`, or a
primary key, makes them visible. Where the operator has made `<name>` himself, it is used as it is.

Locks: adding a table takes SHARE UPDATE EXCLUSIVE on it, which no reader or writer waits for; we wait for it no longer
than `lock_timeout` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import psycopg
from psycopg import sql

KEYED_SUFFIX = "_keyed"

_SAFE = """
WITH identity AS (
    SELECT c.oid, c.relkind, n.nspname, c.relname, c.relispartition,
           CASE c.relreplident
               WHEN 'f' THEN current_setting('server_version_num')::int < 180000 OR NOT EXISTS (
                   SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> '' AND NOT a.attisdropped)
               WHEN 'n' THEN false
               ELSE EXISTS (
                   SELECT FROM pg_index i
                    WHERE i.indrelid = c.oid AND i.indimmediate
                      AND (i.indisvalid OR c.relkind = 'p')
                      AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END
                      AND (current_setting('server_version_num')::int < 180000 OR NOT EXISTS (
                          SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> ''
                             AND a.attnum = ANY (i.indkey::int2[]))))
           END AS keyed
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.oid >= 16384
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
)
SELECT i.oid, i.nspname, i.relname, textsend(format('%%I.%%I', i.nspname, i.relname)) AS quoted,
       i.keyed AND (i.relkind = 'r' OR NOT EXISTS (
           SELECT FROM pg_partition_tree(i.oid) t JOIN identity l ON l.oid = t.relid WHERE NOT l.keyed)) AS keyed,
       EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                WHERE r.prrelid = i.oid AND p.pubname = %s) AS published,
       i.relkind
  FROM identity i
"""
_LOOK = """
SELECT pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = ANY (%s)
"""


_OWNED = """
SELECT pubname FROM pg_publication
 WHERE pubname = ANY (%s) AND pg_has_role(pubowner, 'USAGE') ORDER BY pubname
"""


class Table(NamedTuple):
    """One table as far as publishing its updates and deletes is concerned."""

    oid: int
    schema: str
    name: str
    quoted: bytes
    """Both as the server wants them in a statement, byte for byte, whatever they hold."""
    keyed: bool
    """Whether its updates and deletes can be published without making them fail."""
    published: bool
    """Whether they are, by `<name>_keyed`."""
    kind: str
    """`r`, or `p` for a partitioned one."""


async def tables(connection: psycopg.AsyncConnection[Any], name: str) -> list[Table]:
    """Give every table of the database that a publication can hold."""
    cursor = await connection.execute(_SAFE, [name + KEYED_SUFFIX])
    return [Table(*row) for row in await cursor.fetchall()]


async def existing(connection: psycopg.AsyncConnection[Any], name: str) -> dict[str, tuple[bool, ...]]:
    """Give those of the two publications that are there: (all tables, insert, update, delete, truncate) by name."""
    cursor = await connection.execute(_LOOK, [[name, name + KEYED_SUFFIX]])
    return {row[0]: row[1:] for row in await cursor.fetchall()}


async def ensure(connection: psycopg.AsyncConnection[Any], name: str) -> tuple[list[str], bool]:
    """Make what is missing of the publications; gives their names, and whether any had to be made.

    Errors of psycopg pass through; nothing is half made then.
    """
    keyed = name + KEYED_SUFFIX
    found = await existing(connection, name)
    made = False
    if name not in found:
        statement = "CREATE PUBLICATION {} FOR ALL TABLES WITH (publish = 'insert, truncate')"
        await connection.execute(sql.SQL(statement).format(sql.Identifier(name)))
        made = True
    elif all(found[name]):  # the operator's own; it is enough by itself
        return [name], False
    if keyed not in found:
        statement = "CREATE PUBLICATION {} WITH (publish = 'update, delete')"
        await connection.execute(sql.SQL(statement).format(sql.Identifier(keyed)))
        made = True
    return [name, keyed], made


async def attempt(connection: psycopg.AsyncConnection[Any], name: str) -> None:
    """Do what making and keeping the publications takes, and take it back; errors of psycopg say what is in the way."""
    async with connection.transaction(force_rollback=True):
        names, _ = await ensure(connection, name)
        for keyed in names[1:]:
            statement = "ALTER PUBLICATION {} SET (publish = 'update, delete')"
            await connection.execute(sql.SQL(statement).format(sql.Identifier(keyed)))


async def maintain(connection: psycopg.AsyncConnection[Any], name: str) -> int:
    """Bring `<name>_keyed` up to date with the tables there are; gives how many were added or taken out.

    A table whose lock is not to be had now is left for the next time. Other errors of psycopg pass through.
    """
    keyed = sql.Identifier(name + KEYED_SUFFIX)
    present = await tables(connection, name)
    changed = 0
    for verb, wrong in (("DROP", _unsafe(present)), ("ADD", _missing(present)), ("DROP", _parents(present))):
        for group in (wrong[at : at + 500] for at in range(0, len(wrong), 500)):
            changed += await _alter(connection, keyed, verb, group)
    return changed


def _unsafe(present: list[Table]) -> list[Table]:
    return [table for table in present if table.published and not table.keyed]


def _missing(present: list[Table]) -> list[Table]:
    return [table for table in present if table.keyed and not table.published and table.kind == "r"]


def _parents(present: list[Table]) -> list[Table]:
    """Give what an earlier version published of partitioned tables, with all that will ever be a partition of them."""
    return [table for table in present if table.published and table.keyed and table.kind == "p"]


async def _alter(connection: psycopg.AsyncConnection[Any], keyed: sql.Identifier, verb: str, group: list[Table]) -> int:
    """Add or drop tables all at once, or else one by one, so that one locked table does not hold up the others."""
    names = b", ".join(b"ONLY " + table.quoted for table in group)
    statement = b"ALTER PUBLICATION %s %s TABLE %s" % (keyed.as_bytes(connection), verb.encode(), names)
    try:
        await connection.execute(statement)
        return len(group)
    except (psycopg.errors.LockNotAvailable, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject):
        if len(group) == 1:
            return 0
    done = 0
    for table in group:
        done += await _alter(connection, keyed, verb, [table])
    return done


async def drop(connection: psycopg.AsyncConnection[Any], name: str) -> list[str]:
    """Remove both publications, as far as they are the role's to remove; gives the names of those that were."""
    cursor = await connection.execute(_OWNED.encode(), [[name, name + KEYED_SUFFIX]])
    found = [row[0] for row in await cursor.fetchall()]
    for publication in found:
        await connection.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(publication)))
    return found
