"""What is done inside a clone as soon as it takes connections, and what its user must be told about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from connectors.databases.postgres.clone.access import Access
from connectors.databases.postgres.encoding import shared_text
from connectors.databases.postgres.programs import listed

_REACHING_OUT = ("dblink", "postgres_fdw", "file_fdw", "mysql_fdw", "pg_cron", "pg_net", "http", "pg_partman")
_FACTS = """
SELECT s.system_identifier::text, c.timeline_id, c.next_xid
  FROM pg_catalog.pg_control_system() s, pg_catalog.pg_control_checkpoint() c
"""
_DATABASES = """
SELECT pg_catalog.namesend(datname), datallowconn, datconnlimit = -2 FROM pg_catalog.pg_database ORDER BY 1
"""
_IN_DOUBT = "SELECT gid FROM pg_catalog.pg_prepared_xacts ORDER BY prepared"
_UNLOGGED = """
SELECT pg_catalog.format('%s.%s', n.nspname, c.relname)
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relpersistence = 'u' AND c.relkind = 'r' ORDER BY 1
"""
_DISABLE_SUBSCRIPTIONS = """
  WITH before AS (SELECT b.oid, b.subslotname FROM pg_catalog.pg_subscription b)
UPDATE pg_catalog.pg_subscription s SET subenabled = false, subslotname = NULL
  FROM pg_catalog.pg_database d, before WHERE d.oid = s.subdbid AND before.oid = s.oid
RETURNING s.subname, pg_catalog.namesend(d.datname),
          COALESCE(' (slot ' || before.subslotname::pg_catalog.text || ' on its publisher)', '')
"""
_AHEAD = (
    "in production's place each has to be made anew: such a slot is ahead of this state, so it never sends again what"
    " came between, and keeps log on its publisher until it is dropped there"
)
_FOREIGN_SERVERS = "SELECT srvname FROM pg_catalog.pg_foreign_server ORDER BY 1"
_EXTENSIONS = "SELECT extname FROM pg_catalog.pg_extension ORDER BY 1"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a clone is, by its own word, and what it cannot have."""

    system: str
    timeline: int
    next_xid: int
    """The first transaction id that was not in the log replayed, in 64 bits."""
    notes: tuple[str, ...]


async def scrub(access: Access) -> Facts:
    """Disable the subscriptions of a clone and give the facts about it; raises `psycopg.Error`.

    The server starts no worker for a subscription (`max_logical_replication_workers = 0`); they are disabled too, so
    that none wakes up when somebody runs the data with another configuration: in their catalog, since ALTER
    SUBSCRIPTION would fire the event triggers of the application.
    """
    async with await access.connect() as first:
        system, timeline, next_xid = (await _rows(first, _FACTS))[0]
        databases = [(shared_text(name), *state) for name, *state in await _rows(first, _DATABASES)]
        in_doubt = await _column(first, _IN_DOUBT)
        disabled = await _rows(first, _DISABLE_SUBSCRIPTIONS)  # of all databases, the closed ones too
    notes = ["sequences may be up to 32 values ahead: their log is written in advance"]
    if in_doubt:
        notes.append(
            f"in-doubt transactions, which hold their locks until COMMIT or ROLLBACK PREPARED: {listed(in_doubt)}"
        )
    if disabled:
        subscriptions = sorted(f"{name} in database {shared_text(of)}{at}" for name, of, at in disabled)
        notes.append(f"subscriptions were disabled and let go of their slots: {listed(subscriptions)}; {_AHEAD}")
    for database, is_open, is_broken in databases:
        if is_broken:
            notes.append(f"database {database} is what an interrupted DROP DATABASE left, and can only be dropped")
        elif is_open:
            async with await access.connect(database) as one:
                notes += [f"database {database}: {note}" for note in await _scrub_database(one)]
    epoch, _, low = next_xid.partition(":")
    return Facts(system, timeline, int(epoch) << 32 | int(low), tuple(notes))


async def _scrub_database(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    notes = []
    if unlogged := await _column(connection, _UNLOGGED):
        notes.append(f"unlogged tables are empty: {listed(unlogged)}")
    if servers := await _column(connection, _FOREIGN_SERVERS):
        notes.append(f"foreign servers are still configured, and statements can reach them: {listed(servers)}")
    extensions = await _column(connection, _EXTENSIONS)
    if reaching := [name for name in extensions if name in _REACHING_OUT]:
        notes.append(f"extensions that can reach out are installed: {listed(reaching)}")
    return notes


async def _rows(connection: psycopg.AsyncConnection[Any], text: str) -> list[tuple[Any, ...]]:
    return await (await connection.execute(text.encode())).fetchall()


async def _column(connection: psycopg.AsyncConnection[Any], text: str) -> list[str]:
    return [str(row[0]) for row in await _rows(connection, text)]
