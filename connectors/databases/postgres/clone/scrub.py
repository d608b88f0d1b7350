"""What is done inside a clone as soon as it takes connections, and what its user must be told about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from connectors.databases.postgres.connection import connect
from connectors.databases.postgres.programs import listed

_REACHING_OUT = ("dblink", "postgres_fdw", "file_fdw", "mysql_fdw", "pg_cron", "pg_net", "http", "pg_partman")
_FACTS = """
SELECT s.system_identifier::text, c.timeline_id, c.next_xid
  FROM pg_control_system() s, pg_control_checkpoint() c
"""
_UNLOGGED = """
SELECT format('%s.%s', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relpersistence = 'u' AND c.relkind = 'r' ORDER BY 1
"""
_SUBSCRIPTIONS = """
SELECT subname FROM pg_subscription
 WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a clone is, by its own word, and what it cannot have."""

    system: str
    timeline: int
    next_xid: int
    """The first transaction id that was not in the log replayed, in 64 bits."""
    notes: tuple[str, ...]


async def scrub(conninfo: str, major: int) -> Facts:
    """Disable the subscriptions of a clone and give the facts about it; raises `psycopg.Error`.

    The server starts no worker for a subscription (`max_logical_replication_workers = 0`); they are disabled too, so
    that none wakes up when somebody runs the data with another configuration.
    """
    options = "-c event_triggers=off" if major >= 17 else ""  # a login trigger of the application would run
    own = make_conninfo(conninfo, options=options, connect_timeout=10)
    async with await connect(make_conninfo(own, dbname="template1")) as first:
        system, timeline, next_xid = (await _rows(first, _FACTS))[0]
        databases = await _column(first, "SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1")
        in_doubt = await _column(first, "SELECT gid FROM pg_prepared_xacts ORDER BY prepared")
    notes = ["sequences may be up to 32 values ahead: their log is written in advance"]
    if in_doubt:
        notes.append(
            f"in-doubt transactions, which hold their locks until COMMIT or ROLLBACK PREPARED: {listed(in_doubt)}"
        )
    for database in databases:
        async with await connect(make_conninfo(own, dbname=database)) as one:
            notes += [f"database {database}: {note}" for note in await _scrub_database(one)]
    epoch, _, low = next_xid.partition(":")
    return Facts(system, timeline, int(epoch) << 32 | int(low), tuple(notes))


async def _scrub_database(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    notes = []
    if unlogged := await _column(connection, _UNLOGGED):
        notes.append(f"unlogged tables are empty: {listed(unlogged)}")
    for name in (subscriptions := await _column(connection, _SUBSCRIPTIONS)):
        for action in ("DISABLE", "SET (slot_name = NONE)"):
            await connection.execute(sql.SQL("ALTER SUBSCRIPTION {} " + action).format(sql.Identifier(name)))
    if subscriptions:
        notes.append(f"subscriptions were disabled and let go of their slots: {listed(subscriptions)}")
    if servers := await _column(connection, "SELECT srvname FROM pg_foreign_server ORDER BY 1"):
        notes.append(f"foreign servers are still configured, and statements can reach them: {listed(servers)}")
    extensions = await _column(connection, "SELECT extname FROM pg_extension ORDER BY 1")
    if reaching := [name for name in extensions if name in _REACHING_OUT]:
        notes.append(f"extensions that can reach out are installed: {listed(reaching)}")
    return notes


async def _rows(connection: psycopg.AsyncConnection[Any], text: str) -> list[tuple[Any, ...]]:
    return await (await connection.execute(text.encode())).fetchall()


async def _column(connection: psycopg.AsyncConnection[Any], text: str) -> list[str]:
    return [str(row[0]) for row in await _rows(connection, text)]
