"""Whose that is which bears our prefix in a cluster: noted with a publication, since a slot can bear no word.

A note says which catalog, of which cluster: a copy of the database elsewhere brings its publications along. It counts
while a slot of the prefix stands in that database, and while that catalog is where it was; so what a service left that
lost its state is taken by the next, and what was released is nobody's.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import psycopg
from psycopg import sql

from connectors.claimant import is_anothers
from connectors.databases.postgres.stream.publication import KEYED_SUFFIX

_NOTE = re.compile(r"trigpoint: what bears this name is of the catalog (/\S*) in the cluster (\d+)")
_LOOK = """
SELECT p.pubname, coalesce(obj_description(p.oid, 'pg_publication'), ''), pg_has_role(p.pubowner, 'USAGE'),
       c.system_identifier::text,
       EXISTS (SELECT FROM pg_replication_slots s
                WHERE s.database = current_database() AND starts_with(s.slot_name, %s))
  FROM pg_publication p, pg_control_system() c
 WHERE p.pubname = ANY (%s) ORDER BY p.pubname
"""
REMEDY = (
    "give this service names of its own (database.slot_prefix), as `trigpoint init` proposes them; or, if that one is"
    " given up, let it drop them (`release`, by its own configuration), or move its catalog away"
)


class _Seen(NamedTuple):
    name: str
    said: str
    """What somebody has written of it."""
    ours_to_change: bool
    system: str
    has_slot: bool

    def catalog(self) -> str:
        """Give the catalog that it was noted for, here; "" where it was for none."""
        found = _NOTE.fullmatch(self.said)
        return os.fsdecode(unquote_to_bytes(found[1])) if found and found[2] == self.system else ""


async def another(connection: psycopg.AsyncConnection[Any], name: str, holder: str) -> str:
    """Give the catalog that what bears `name` in the database of a connection is of, if that is not `holder`; else "".

    Errors of psycopg pass through.
    """
    for one in await _look(connection, name) if holder else ():
        if one.has_slot and is_anothers(one.catalog(), holder):
            return one.catalog()
    return ""


async def note(connection: psycopg.AsyncConnection[Any], name: str, holder: str) -> None:
    """Note with a publication that all of `name` in the database of a connection is of the catalog `holder`.

    Where none of the two is the role's to change, or an operator has written his own word there, nothing is noted.
    Errors of psycopg pass through where the connection broke.
    """
    noted = [
        one for one in await _look(connection, name) if one.ours_to_change and (not one.said or _NOTE.match(one.said))
    ]
    if not (noted and holder) or noted[0].catalog() == holder:
        return
    words = f"trigpoint: what bears this name is of the catalog {quote(os.fsencode(holder))} in the cluster"
    statement = sql.SQL("COMMENT ON PUBLICATION {} IS {}")
    said = sql.Literal(f"{words} {noted[0].system}")
    try:
        await connection.execute(statement.format(sql.Identifier(noted[0].name), said))
    except psycopg.Error:  # a trigger forbids it, say: what is not noted is told apart by nobody, as before
        if connection.closed:
            raise


async def _look(connection: psycopg.AsyncConnection[Any], name: str) -> list[_Seen]:
    cursor = await connection.execute(_LOOK.encode(), [f"{name}_", [name, name + KEYED_SUFFIX]])
    return [_Seen(*row) for row in await cursor.fetchall()]
