"""The commits that have an outcome, written by the block, and how far each stream is settled.

Every function works inside the caller's transaction. One commit never has two outcomes, by construction: within one
history the blocks of a stream never overlap, and a record that lies at or before what the stream has already settled
is dropped and counted, not written again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import BigInteger, Connection, and_, bindparam, insert, select, update

from trigger.catalog.packing import Block, pack
from trigger.catalog.schema import (
    BIGINT_MAX,
    BIGINT_MIN,
    blocks,
    count,
    histories,
    markers,
    settled,
    streams,
    xid_outliers,
)
from trigger.errors import CatalogError
from trigger.model import CommitRecord, Outcome
from trigger.position import History, Lsn, Position

REPEATED = "repeated"
"""The counter of records that were dropped because their commit already had an outcome."""


# Statements are built once: to put one together takes SQLAlchemy longer than SQLite needs to run it.
_STREAM = select(streams.c.id).where(streams.c.name == bindparam("name"))
_HISTORY = select(histories.c.id).where(
    histories.c.system == bindparam("system"), histories.c.timeline == bindparam("timeline")
)
_SETTLED = (
    select(histories.c.system, histories.c.timeline, settled.c.through)
    .join_from(settled, histories)
    .join(streams, streams.c.id == settled.c.stream)
    .where(streams.c.name == bindparam("name"))
)
_OF_STREAM = (
    select(blocks.c.first, blocks.c.last)
    .join_from(blocks, streams, streams.c.id == blocks.c.stream)
    .join(histories, histories.c.id == blocks.c.history)
    .where(streams.c.name == bindparam("name"))
    .where(histories.c.system == bindparam("system"), histories.c.timeline == bindparam("timeline"))
)
_LOW, _HIGH = bindparam("low", type_=BigInteger), bindparam("high", type_=BigInteger)
_BLOCK_AT = _OF_STREAM.where(blocks.c.first <= _LOW).order_by(blocks.c.first.desc()).limit(1)
_BLOCKS_INSIDE = _OF_STREAM.where(blocks.c.first > _LOW, blocks.c.first < _HIGH).order_by(blocks.c.first)
_MINE = and_(blocks.c.history == bindparam("history"), blocks.c.stream == bindparam("stream"))
_AT = bindparam("at", type_=BigInteger)
_PEAK_BEFORE = select(blocks.c.time_peak_us).where(_MINE, blocks.c.first < _AT).order_by(blocks.c.first.desc()).limit(1)
_PEAK_BEHIND = select(blocks.c.time_peak_us).where(_MINE, blocks.c.first > _AT).order_by(blocks.c.first).limit(1)
_INSERT_BLOCK = insert(blocks).returning(blocks.c.id)
_UPDATE_SETTLED = update(settled).where(settled.c.stream == bindparam("key"))


def record_all(
    connection: Connection,
    records: Sequence[CommitRecord],
    through: Mapping[str, Position],
    history: History,
    *,
    point: int | None,
    reason: str | None = None,
) -> int:
    """Write the outcome of `records` in as few blocks as possible and give how many were new.

    A stream's records lie in the history of its position in `through`, or else in `history`. Dropped are those that
    end at or before what the stream has settled there, and those that lie in a block already. Blocks may lie behind
    the new records: what a failover left behind was missed before what is kept of that history is protected.

    Raises:
        CatalogError: the records of a stream are not in log order, or one overlaps a block without lying in it.
    """
    new = 0
    for stream, mine in _by_stream(records).items():
        owner = through[stream].history if stream in through else history
        done = _settled_at(connection, stream, owner)
        for run in _unrecorded(connection, [record for record in mine if record.end > done], owner, strict=True):
            _insert(connection, run, owner, point=point, reason=reason)
            new += len(run)
    count(connection, REPEATED, len(records) - new)
    return new


def record_missing(connection: Connection, records: Sequence[CommitRecord], history: History, *, point: int) -> int:
    """Write those `records` that lie in no block yet, wherever in the log that is, and give how many were new."""
    new = 0
    for mine in _by_stream(records).values():
        for run in _unrecorded(connection, mine, history, strict=False):
            _insert(connection, run, history, point=point, reason=None)
            new += len(run)
    count(connection, REPEATED, len(records) - new)
    return new


def _unrecorded(
    connection: Connection, mine: Sequence[CommitRecord], history: History, *, strict: bool
) -> list[list[CommitRecord]]:
    """Give those of a stream's records that lie in no block yet, in runs with no block between."""
    if not mine:
        return []
    there = _stretches_of(connection, mine[0].stream, history, mine[0].start, mine[-1].end)
    firsts = [first for first, _ in there]
    runs = []
    for place, run in groupby(mine, key=lambda record: bisect_right(firsts, record.start)):
        last = there[place - 1][1] if place else -1
        following = there[place][0] if place < len(there) else BIGINT_MAX
        whole = list(run)
        if strict and (crossing := next((r for r in whole if r.start < last < r.end or r.end > following), None)):
            raise CatalogError(f"commit {crossing} overlaps one that is recorded, up to {Lsn(last)}")
        runs.append([record for record in whole if record.start >= last])
    return [run for run in runs if run]


def settle(connection: Connection, stream: str, through: Position) -> None:
    """Note that every commit of `stream` up to `through` has an outcome; never goes back in one history."""
    current = settled_through(connection, stream)
    if current is not None and current.history == through.history and current >= through:
        return
    values = {"history": history_id(connection, through.history), "through": _bigint("LSN", through.at)}
    key = _stream_id(connection, stream)
    if current is None:
        connection.execute(insert(settled), {"stream": key, **values})
    else:
        connection.execute(_UPDATE_SETTLED, {"key": key, **values})


def settled_through(connection: Connection, stream: str) -> Position | None:
    """Give the last position up to which every commit of `stream` has an outcome."""
    row = connection.execute(_SETTLED, {"name": stream}).one_or_none()
    return Position(History(row.system, row.timeline), Lsn(row.through)) if row else None


def history_id(connection: Connection, history: History) -> int:
    """Give the key of `history`, which gets one where it has none."""
    found = connection.scalar(_HISTORY, {"system": history.system, "timeline": history.timeline})
    if found is None:
        values = {"system": history.system, "timeline": _bigint("timeline", history.timeline)}
        found = connection.scalar(insert(histories).values(values).returning(histories.c.id))
    return int(found or 0)


def _stream_id(connection: Connection, stream: str) -> int:
    found = connection.scalar(_STREAM, {"name": stream})
    if found is None:
        found = connection.scalar(insert(streams).values(name=stream).returning(streams.c.id))
    return int(found or 0)


def _by_stream(records: Iterable[CommitRecord]) -> dict[str, list[CommitRecord]]:
    streams_of: dict[str, list[CommitRecord]] = {}
    for record in records:
        streams_of.setdefault(record.stream, []).append(record)
    return streams_of


def _settled_at(connection: Connection, stream: str, history: History) -> int:
    done = settled_through(connection, stream)
    return done.at if done and done.history == history else -1


def _stretches_of(connection: Connection, stream: str, history: History, low: Lsn, high: Lsn) -> list[tuple[int, int]]:
    """Give where the blocks that touch the log between `low` and `high` begin and end, in log order."""
    owner = {"name": stream, "system": history.system, "timeline": history.timeline}
    bounds = {"low": _bigint("LSN", low), "high": _bigint("LSN", high)}
    rows = [*connection.execute(_BLOCK_AT, owner | bounds), *connection.execute(_BLOCKS_INSIDE, owner | bounds)]
    return [(row.first, row.last) for row in rows]


def _insert(
    connection: Connection,
    records: Sequence[CommitRecord],
    history: History,
    *,
    point: int | None,
    reason: str | None,
) -> None:
    if not records:
        return
    keys = {"history": history_id(connection, history), "stream": _stream_id(connection, records[0].stream)}
    done = 0
    for block in pack(records):
        values = block_row(block) | keys | {"point": point, "reason": reason}
        values["time_peak_us"] = _peak(connection, keys, block)
        row = connection.scalar(_INSERT_BLOCK, values)
        inside = records[done : done + block.commits]
        done += block.commits
        outliers = [{"xid": _bigint("transaction id", xid), "block": row} for xid in sorted(set(block.xid_outliers))]
        digests = sorted({marker_digest(marker) for record in inside for marker in record.markers})
        if outliers:
            connection.execute(insert(xid_outliers), outliers)
        if digests:
            connection.execute(insert(markers), [{"digest": digest, "block": row} for digest in digests])
    for outcome in Outcome:
        count(connection, outcome, sum(record.outcome is outcome for record in records))


def block_row(block: Block) -> dict[str, Any]:
    """Give the columns of `blocks` that `block` itself decides."""
    return {
        "first": _bigint("LSN", block.first),
        "last": _bigint("LSN", block.last),
        "xid_level": _level(block.xid_high - block.xid_low),
        "xid_low": _bigint("transaction id", block.xid_low),
        "xid_high": _bigint("transaction id", block.xid_high),
        "time_level": _level(block.time_high_us - block.time_low_us),
        "time_low_us": block.time_low_us,
        "time_high_us": block.time_high_us,
        "commits": block.commits,
        "data": block.data,
    }


def _peak(connection: Connection, keys: Mapping[str, int], block: Block) -> int:
    """Give the latest time up to the end of `block` in its stream, and raise the peaks behind it to its own."""
    place = {**keys, "at": int(block.first)}
    before, behind = connection.scalar(_PEAK_BEFORE, place), connection.scalar(_PEAK_BEHIND, place)
    peak = block.time_high_us if before is None else max(block.time_high_us, int(before))
    if behind is not None and behind < peak:  # only where a block is put in among others
        mine = and_(blocks.c.history == keys["history"], blocks.c.stream == keys["stream"])
        lower = and_(mine, blocks.c.first > int(block.first), blocks.c.time_peak_us < peak)
        connection.execute(update(blocks).where(lower).values(time_peak_us=peak))
    return peak


def _level(spread: int) -> int:
    """Give the least level whose ranges are wide enough for `spread`: the least k with spread < 16^k."""
    return (spread.bit_length() + 3) // 4


def marker_digest(marker: str) -> int:
    """Give the key of `marker` in the table of markers: the first 64 bits of its SHA-256, signed."""
    digest = hashlib.sha256(marker.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _bigint(what: str, number: int) -> int:
    if not BIGINT_MIN <= number <= BIGINT_MAX:
        raise CatalogError(f"{what} {number} does not fit in 63 bits")
    return int(number)
