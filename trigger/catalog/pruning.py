"""Letting go of what nobody asks for any more: all that is known of points that expired long ago.

The row of such a point stays behind without its document, some hundred bytes: its number and its id are never given to
another one, a snapshot of it that turns up again is known for what it is, and its commits keep their outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from trigger.catalog.schema import PRUNED, points
from trigger.failpoint import reached
from trigger.model import State
from trigger.point_names import point_id

KEPT = 1000
"""So many expired points stay as they are, however old: what has just been given up is to be seen in a list."""
_SHARE = 4
"""One in so many pages of a file may be free before some are given back; what is free is written to again."""

_EXPIRED = points.c.state == State.EXPIRED.value
_OLDEST = select(points.c.number, points.c.id).where(_EXPIRED).order_by(points.c.number).limit(bindparam("most"))
_FIRST_KEPT = (
    select(points.c.number).where(_EXPIRED).order_by(points.c.number.desc()).offset(bindparam("later")).limit(1)
)
_ROWS = select(points.c.number, points.c.id, points.c.gaps_before).where(
    points.c.number.in_(bindparam("numbers", expanding=True)), _EXPIRED
)
_SHORTEN = update(points).where(points.c.number == bindparam("key"), _EXPIRED).values(state=PRUNED, document="")
_DELETE = delete(points).where(points.c.number == bindparam("key"))


def old(connection: Connection, taken_before: datetime, most: int) -> list[int]:
    """Give the numbers of expired points that were taken before a time and may be pruned, `most` at most.

    Only the oldest are looked at, by number: what that costs does not grow with how many there are.
    """
    first_kept = connection.scalar(_FIRST_KEPT, {"later": KEPT - 1})
    if first_kept is None:
        return []
    edge = point_id(taken_before, 0)  # ids begin with the time, and sort by it
    oldest = connection.execute(_OLDEST, {"most": most}).all()
    return [row.number for row in oldest if row.id < edge and row.number < first_kept]


def prune(connection: Connection, numbers: Sequence[int]) -> None:
    """Let go of the documents of expired points.

    The rows are made anew: SQLite joins pages that become nearly empty where rows go, not where they become shorter.
    """
    if connection.dialect.name != "sqlite":
        connection.execute(_SHORTEN, [{"key": number} for number in numbers])
        return
    connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")  # until the transaction ends: commits name their point
    rows = connection.execute(_ROWS, {"numbers": list(numbers)}).all()
    connection.execute(_DELETE, [{"key": row.number} for row in rows])
    connection.execute(insert(points), [{**row._asdict(), "state": PRUNED, "document": ""} for row in rows])
    reached("catalog-pruned")


def may_give_back(connection: Connection) -> bool:
    """Whether very much of a file is free that can be given back; one of an earlier version keeps what it has."""
    if connection.dialect.name != "sqlite":
        return False  # a server sees to that itself
    incremental = _pragma(connection, "auto_vacuum") != 0
    return incremental and _pragma(connection, "freelist_count") * _SHARE > _pragma(connection, "page_count")


def give_back(connection: Connection, pages: int) -> int:
    """Give up to `pages` free pages of a SQLite file back to its filesystem; gives how many went."""
    before = _pragma(connection, "page_count")
    for _ in range(min(pages, _pragma(connection, "freelist_count"))):
        connection.exec_driver_sql(
            "PRAGMA incremental_vacuum(1)"
        )  # of more, Python's library would do one all the same
    return before - _pragma(connection, "page_count")


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
