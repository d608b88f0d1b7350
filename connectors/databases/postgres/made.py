"""What was made in a cluster under our prefix and is of no use any more: found, said, and dropped.

A database that is renamed, dropped from the configuration, or served under another prefix keeps its slot, and so does a
journal that is read from an archive by now: the server keeps log for it until its disk is full.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from connectors.databases.postgres.connection import connect, database_of
from connectors.databases.postgres.encoding import shared_text
from connectors.databases.postgres.sections import PASSING
from connectors.databases.postgres.stream import ownership, publication, slot
from trigger.model import Finding, Severity

_SLOTS = """
SELECT slot_name, namesend(database), pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn)::bigint
  FROM pg_replication_slots
 WHERE starts_with(slot_name, %s) AND NOT active AND NOT temporary AND coalesce(plugin, 'pgoutput') = 'pgoutput'
 ORDER BY slot_name
"""


_READ = """
SELECT DISTINCT namesend(database) FROM pg_replication_slots WHERE starts_with(slot_name, %s) AND database IS NOT NULL
"""


_TAKEN_OUT = "it bears our name, and its database is none of those that are configured"
_KILLED = "it was left by a rehearsal or a trial that was killed"


Used = Mapping[str, str | None]
"""The database that each slot in use is for, None for the journal's; a database that was renamed is another one."""


class Unused(NamedTuple):
    """A slot that bears our prefix, that is of no stream or journal of now, and that nobody reads."""

    name: str
    database: str | None
    """Which it is for; None for the journal's, which is for the whole cluster."""
    kept_bytes: int | None
    """How much log the server keeps for it; None where it keeps none any more."""
    killed: bool = False
    """Whether it was made for a while, by what was killed."""


async def unused(connection: psycopg.AsyncConnection[Any], prefix: str, used: Used) -> list[Unused]:
    """Give the slots of our prefix that are not among `used`; errors of psycopg pass through."""
    cursor = await connection.execute(_SLOTS.encode(), [f"{prefix}_"])
    rows = await cursor.fetchall()
    found = [Unused(name, None if of is None else shared_text(of), kept) for name, of, kept in rows]
    others = [one for one in found if (one.name, one.database) not in used.items()]
    mine = [one for one in others if is_ours(one.name, one.database, prefix)]
    passing = [one._replace(killed=True) for one in others if one not in mine and _is_passing(one, prefix)]
    return [*mine, *passing]


def _is_passing(one: Unused, prefix: str) -> bool:
    """Whether a slot is one that a rehearsal or a trial made, and not that of a database that is called so."""
    return any(is_ours(one.name, one.database, f"{prefix}{suffix}") for suffix in PASSING)


def is_ours(name: str, database: str | None, prefix: str) -> bool:
    """Whether a slot that begins like one of ours is one, and not that of a service with a longer or shorter prefix.

    A slot is called by its prefix and its database. Where it bears the name that its database has now, the rest is the
    prefix; where it does not, the database was renamed.
    """
    if database is None:
        return name == f"{prefix}_journal"
    parts = name.split("_")
    prefixes = ("_".join(parts[:count]) for count in range(1, len(parts)))
    theirs = [one for one in prefixes if slot.slot_name(one, database) == name]
    return not theirs or prefix in theirs


async def read(connection: psycopg.AsyncConnection[Any], prefix: str) -> list[str]:
    """Give the databases that a slot of our prefix is for; errors of psycopg pass through."""
    rows = await (await connection.execute(_READ.encode(), [f"{prefix}_"])).fetchall()
    return [shared_text(row[0]) for row in rows]


async def drop(connection: psycopg.AsyncConnection[Any], prefix: str, used: Used) -> list[str]:
    """Drop the slots of our prefix that are not among `used` and nobody reads; gives their names."""
    found = await unused(connection, prefix, used)
    return [f"slot {one.name}" for one in found if await slot.drop(connection, one.name)]


async def clear(
    connection: psycopg.AsyncConnection[Any], dsns: Mapping[str, str], watched: Sequence[str], prefix: str, used: Used
) -> list[str]:
    """Drop all of our prefix in a cluster that is of no use, its databases being reached by `dsns`; gives the names."""
    gone = await drop(connection, prefix, used)
    kept = [*watched, *await read(connection, prefix)]
    for database, dsn in dsns.items():
        async with await connect(dsn) as one:
            gone += await unpublish(one, prefix, unused=database not in kept)
    return gone


async def unpublish(connection: psycopg.AsyncConnection[Any], prefix: str, *, unused: bool) -> list[str]:
    """Drop the publications in the database of a connection that nobody needs; gives their names.

    Those are ours, if the database is `unused`, and those of a rehearsal or a trial that was killed, which goes on if
    there is a slot of it.
    """
    database, gone = database_of(connection), []
    for name in [*([prefix] if unused else []), *(prefix + suffix for suffix in PASSING)]:
        if name == prefix or database not in await read(connection, name):
            gone += [f"publication {one} in {database}" for one in await publication.drop(connection, name)]
    return gone


async def left_behind(
    connection: psycopg.AsyncConnection[Any], prefix: str, *, unused: bool = False
) -> Iterator[Finding]:
    """Say which publications in the database of a connection nobody needs: those that `unpublish` drops."""
    database, found = database_of(connection), list[tuple[str, str]]()
    for name in [*([prefix] if unused else []), *(prefix + suffix for suffix in PASSING)]:
        if database not in await read(connection, name):
            why = _TAKEN_OUT if name == prefix else _KILLED
            found += [(one, why) for one in await publication.existing(connection, name)]
    return (
        Finding(
            f"publication {name} in {database}",
            Severity.WARNING,
            f"{why}; a table that loses its primary key refuses UPDATE",
            "trigpoint release --unused drops it",
        )
        for name, why in found
    )


def judge(found: Collection[Unused]) -> Iterator[Finding]:
    """Say of each slot that nobody needs what it costs."""
    for one in found:
        of = "the journal" if one.database is None else f"a stream (database {one.database})"
        why = f"it bears our name, is for {of}, and nothing configured has a use for it"
        yield Finding(
            f"slot {one.name}",
            Severity.WARNING,
            f"{_KILLED if one.killed else why}; nobody reads it, and the server keeps {one.kept_bytes or 0} bytes of"
            " log for it, and more with every commit",
            "trigpoint release --unused drops it; if it is another service's that is down, start that one",
        )


async def of_another(dsns: Iterable[str], prefix: str, holder: str, deadline_seconds: float) -> Finding | None:
    """Give what bears our prefix in one of the databases of a cluster and is of another catalog; None for nothing.

    A database that does not let us in within `deadline_seconds` has no say.
    """
    for dsn in dsns if holder else ():
        with contextlib.suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(deadline_seconds), await connect(dsn) as connection:
                if other := await ownership.another(connection, prefix, holder):
                    names = f"slots and publications called {prefix} are those of another trigpoint"
                    return Finding(
                        "slot_prefix", Severity.REFUSED, f"{names}, of the catalog {other}", ownership.REMEDY
                    )
    return None
