"""The logical replication slot of one stream: its name, its state, and where a stream may resume behind it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from connectors.databases.postgres.connection import connect
from connectors.databases.postgres.encoding import shared_text
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.copyboth import Present
from trigger.errors import SourceError
from trigger.position import Lineage, Position

_NAME_LIMIT = 63
_PLUGIN = "pgoutput"
FAILOVER_VERSION = 170000
"""From here on a slot can be kept on standbys too."""
_LOOK = """
SELECT plugin, namesend(database), confirmed_flush_lsn::text, wal_status, active_pid,
       to_jsonb(s) ->> 'invalidation_reason', to_jsonb(s) ->> 'failover'
  FROM pg_replication_slots s WHERE slot_name = %s
"""
_CREATE = "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput', false, false{failover})"
_AWAITED = """
SELECT w.name, coalesce(CASE WHEN NOT s.active THEN 'nobody reads it' END, 'there is no such slot')
  FROM unnest(string_to_array(current_setting('synchronized_standby_slots'), ',')) AS listed(name),
       LATERAL (SELECT trim(BOTH ' "' FROM listed.name)) AS w(name)
  LEFT JOIN pg_replication_slots s ON s.slot_name = w.name
 WHERE w.name <> '' AND (s.slot_name IS NULL OR NOT s.active)
"""
_SYNCHRONOUS = """
SELECT application_name, current_setting('synchronous_standby_names')
  FROM pg_stat_replication
 WHERE starts_with(application_name, %s) AND sync_state IN ('sync', 'quorum') ORDER BY application_name
"""
_OLDEST = """
SELECT textsend(what) FROM (
    SELECT format('process %%s (%%s)', l.pid, coalesce(a.usename, a.backend_type)), age(l.transactionid),
           coalesce(extract(epoch FROM clock_timestamp() - a.xact_start) >= %(seconds)s, true)
      FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
     WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()
    UNION ALL SELECT format('prepared transaction %%L in database %%s', gid, database), age(transaction), true
      FROM pg_prepared_xacts
) AS running(what, age, lasts) WHERE lasts ORDER BY age DESC LIMIT 1
"""
"""By the locks: in pg_stat_activity a role that may not monitor sees of others who they are, and neither id nor age."""
END_IT = "wait for that transaction to end, or end it"
_TELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as the server shows it."""

    confirmed: Lsn
    """Commits whose record begins before here are forgotten."""
    lost: str
    """Why nothing can be read from it any more; "" while it is whole."""
    active_pid: int | None
    failover: bool = False
    """Whether it is kept on standbys too; from version 17 on."""


def slot_name(name: str, database: str) -> str:
    """Give the name of the slot for a database: `<name>_<database>`, made legal (a-z, 0-9, _) and unambiguous.

    `<name>_journal` is the log's.
    """
    wanted = f"{name}_{database}"
    legal = re.sub(r"[^a-z0-9_]", "_", wanted.lower())
    if legal == wanted and len(legal) <= _NAME_LIMIT and database != "journal":
        return legal
    return f"{legal[: _NAME_LIMIT - 9]}_{zlib.crc32(wanted.encode()):08x}"


async def look(connection: psycopg.AsyncConnection[Any], name: str, database: str) -> Slot | None:
    """Give the slot of that name, None where there is none.

    Raises:
        SourceError: a slot of that name serves something else (not retryable).
    """
    row = await (await connection.execute(_LOOK, [name])).fetchone()
    if row is None:
        return None
    plugin, of, confirmed, wal_status, active_pid, invalidation, failover = row
    in_database = None if of is None else shared_text(of)
    if (plugin, in_database) != (_PLUGIN, database):
        raise SourceError(
            f"replication slot {name} is there, but for "
            + (f"{plugin} in database {in_database}" if plugin else "a standby, or another service's journal"),
            hint="set another prefix for ours (database.slot_prefix), or drop that slot if nobody needs it",
            retryable=False,
        )
    lost = f"invalidated by the server: {invalidation or 'its log was removed'}" if wal_status == "lost" else ""
    return Slot(Lsn.parse(confirmed or "0/0"), lost, active_pid, failover == "true")


async def create(connection: psycopg.AsyncConnection[Any], name: str, *, failover: bool) -> Lsn:
    """Make the slot and give its consistent point: every commit whose record begins at or after it is seen.

    The server first waits for the transactions that run or stand prepared now; how long, `statement_timeout` and
    `lock_timeout` of the connection say.
    Two-phase decoding stays off: COMMIT PREPARED then arrives as a commit with its rows, whatever was acknowledged
    between the two phases. With `failover` (from version 17 on) the slot is carried over to standbys.

    Raises:
        SourceError: a transaction did not end in time; other errors of psycopg pass through.
    """
    carried = ", failover => true" if failover and connection.info.server_version >= FAILOVER_VERSION else ""
    try:
        row = await (await connection.execute(_CREATE.format(failover=carried).encode(), [name])).fetchone()
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
        who = await oldest(connection) or "it has just ended"
        raise SourceError(
            f"replication slot {name} was not made in time, since a running transaction must end first: {who}",
            hint=END_IT,
        ) from error
    assert row is not None
    return Lsn.parse(row[0])


async def oldest(connection: psycopg.AsyncConnection[Any], seconds: float = 0.0) -> str:
    """Give whose transaction, of those open for so long or in doubt, a slot that is made waits for first; "" for none.

    Where the role may not see how long one is open, it counts.
    """
    row = await (await connection.execute(_OLDEST, {"seconds": seconds})).fetchone()
    return shared_text(row[0]) if row else ""


@contextlib.asynccontextmanager
async def telling(dsn: str, name: str, tell: Callable[[str], None]) -> AsyncIterator[None]:
    """Tell, while the slot is made in the block, for which transaction that waits, and "" at the end.

    The connection on which it is made waits itself, so another one is asked.
    """
    watching = asyncio.create_task(_watch(dsn, name, tell))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        tell("")


async def _watch(dsn: str, name: str, tell: Callable[[str], None]) -> None:
    await asyncio.sleep(_TELL_SECONDS)  # mostly it is made by then
    with contextlib.suppress(psycopg.Error):
        async with await connect(dsn) as connection:
            while True:
                who = await oldest(connection)
                tell(f"replication slot {name} is made once this has ended: {who}; {END_IT}" if who else "")
                await asyncio.sleep(_TELL_SECONDS)


async def awaited(connection: psycopg.AsyncConnection[Any]) -> str:
    """Give which standbys hold back the commits of a slot that is kept on standbys, and how to go on; "" for none."""
    rows = await (await connection.execute(_AWAITED.encode())).fetchall()
    if not rows:
        return ""
    slots = ", ".join(f"{name} ({why})" for name, why in rows)
    return (
        f"the server holds commits back until standbys have them, by synchronized_standby_slots: {slots}; start those"
        " standbys, take them out of the setting (and SELECT pg_reload_conf()), or set database.failover to false"
    )


async def synchronous(connection: psycopg.AsyncConnection[Any], prefix: str) -> str:
    """Give why COMMIT waits for a stream of ours, or for the journal, and how to end that; "" where it does not."""
    rows = await (await connection.execute(_SYNCHRONOUS.encode(), [prefix])).fetchall()
    if not rows:
        return ""
    return (
        f"COMMIT waits for {', '.join(row[0] for row in rows)}, by synchronous_standby_names ({rows[0][1]}); name there"
        " the standbys that are meant, without '*' and without our names (and SELECT pg_reload_conf())"
    )


_OTHER_LIFE = (
    "as where an older copy of the cluster was put back, a restore in place brought back what an earlier life of it had"
    " or was taken back after that, or pg_resetwal was run"
)


async def drop(connection: psycopg.AsyncConnection[Any], name: str) -> bool:
    """Remove the slot; False where there was none."""
    try:
        await connection.execute("SELECT pg_drop_replication_slot(%s)", [name])
    except psycopg.errors.UndefinedObject:
        return False
    return True


def resume(
    after: Position | None, lineage: Lineage, confirmed: Lsn, present: Present, made: str = ""
) -> tuple[Lsn, str]:
    """Give where commits are seen again, and why that is not right behind `after` ("" where it is).

    Args:
        after: the last settled position; None the first time.
        lineage: the server's present history and its past.
        confirmed: what the slot says was acknowledged; commits before it are gone.
        present: how far the server's log reaches, and what showed that it is another one than before.
        made: why the slot had to be made anew; "" where it was there.
    """
    if after is None:
        return confirmed, ""
    here = lineage.history
    if after.history.system != here.system:
        return (
            confirmed,
            f"the cluster was replaced: its system identifier was {after.history.system}, is {here.system}",
        )
    if after.history.incarnation != here.incarnation:
        seen = f": {present.reason};" if present.reason else ","
        return confirmed, f"the log is not the one that {after} lies in{seen} {_OTHER_LIFE}"
    if after.history.branch != here.branch:
        moved = f"the timeline changed from {after.history.branch} to {here.branch}"
        return Lsn(max(confirmed, lineage.shared(after) or 0)), "; ".join(filter(None, [moved, made]))
    if after.at > present.flushed:
        return (
            confirmed,
            f"the log ends at {present.flushed}, before what was settled ({after.place}): the cluster is an older copy",
        )
    if made or confirmed > after.at:
        ahead = f"the slot goes on at {confirmed}, and no commit behind {after.place} is known to be settled"
        return confirmed, made or f"{ahead}: it was recreated or moved ahead, or the catalog was made anew"
    return Lsn(after.at), ""
