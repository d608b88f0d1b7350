"""PostgreSQL's backup mode: begun and ended on one connection, for copies that are not one instant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, LiteralString

from connectors.databases.postgres.lsn import Lsn
from trigger.model import Bracket
from trigger.position import History, Position

START: LiteralString = "SELECT lsn::text, left(pg_walfile_name(lsn), 8) FROM pg_backup_start(%s, fast => true) AS lsn"
_STOP: LiteralString = (
    "SELECT lsn::text, left(pg_walfile_name(lsn), 8), labelfile, spcmapfile,"
    " (lsn + ((size - mod(lsn - '0/0'::pg_lsn, size)) % size))::text"
    " FROM pg_backup_stop(wait_for_archive => false),"
    " (SELECT setting::numeric FROM pg_settings WHERE name = 'wal_segment_size') AS segment(size)"
)
"""The end of the backup switches to the next segment, so the rest of this one is filled."""


async def stop(
    ask: Callable[[LiteralString], Awaitable[tuple[Any, ...]]], started: tuple[Any, ...], on: Callable[[int], History]
) -> Bracket:
    """End the backup mode and give its proof.

    Args:
        ask: asks the server, on the connection that began it.
        started: what it answered to `START`.
        on: gives the history of a timeline.
    """
    start, start_timeline = started
    end, end_timeline, label, tablespace_map, filled_to = await ask(_STOP)
    history = on(int(end_timeline, 16))
    return Bracket(
        Position(on(int(start_timeline, 16)), Lsn.parse(start)),
        Position(history, Lsn.parse(end)),
        {"label": label, "tablespace_map": tablespace_map or ""},
        Position(history, Lsn.parse(filled_to)),
    )
