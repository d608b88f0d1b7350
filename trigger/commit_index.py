"""The commits that have an outcome: written by the block, found by log position, id, time and marker.

Every function works inside the caller's transaction. One commit never has two outcomes, by construction: within one
history the blocks of a stream never overlap, and a record that lies at or before what the stream has already settled
is dropped and counted, not written again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby, islice
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Connection, Select, and_, bindparam, insert, or_, select, true, update

from trigger.errors import CatalogError
from trigger.model import CommitRecord, Outcome, to_microseconds
from trigger.packing import Block, pack, unpack_data
from trigger.position import History, Lineage, Lsn, Position
from trigger.schema import blocks, count, histories, markers, settled, streams, xid_outliers

REPEATED = "repeated"
"""The counter of records that were dropped because their commit already had an outcome."""

_LEVELS = 17  # ranges narrower than 16^0, 16^1, … 16^16
_BIGINT_MAX = (1 << 63) - 1
_BIGINT_MIN = -(1 << 63)


class Found(NamedTuple):
    """A commit that the catalog knows, and what holds it."""

    record: CommitRecord
    point: int | None
    """The number of the point that protects it; None where it was missed."""
    reason: str
    """Why it was missed; "" where it was not."""
    history: History


class Query(NamedTuple):
    """What to look for; a commit must match everything that is not None."""

    xid: int | None
    lsn: Lsn | None
    first_us: int | None
    last_us: int | None
    marker: str | None
    stream: str | None

    def matches(self, record: CommitRecord) -> bool:
        """Whether `record` is one that was looked for."""
        return (
            (self.xid is None or record.xid == self.xid)
            and (self.lsn is None or record.start <= self.lsn <= record.end)
            and (self.first_us is None or record.time_us >= self.first_us)
            and (self.last_us is None or record.time_us <= self.last_us)
            and (self.marker is None or self.marker in record.markers)
            and (self.stream is None or record.stream == self.stream)
        )


# ----------------------------------------------------------------------------------------------------- writing


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
        whole = list(run)
        if strict and (crossing := next((r for r in whole if r.start < last < r.end), None)):
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
        connection.execute(insert(settled).values(stream=key, **values))
    else:
        connection.execute(update(settled).where(settled.c.stream == key).values(**values))


def settled_through(connection: Connection, stream: str) -> Position | None:
    """Give the last position up to which every commit of `stream` has an outcome."""
    row = connection.execute(
        select(histories.c.system, histories.c.timeline, settled.c.through)
        .join_from(settled, histories)
        .join(streams, streams.c.id == settled.c.stream)
        .where(streams.c.name == stream)
    ).one_or_none()
    return Position(History(row.system, row.timeline), Lsn(row.through)) if row else None


def history_id(connection: Connection, history: History) -> int:
    """Give the key of `history`, which gets one where it has none."""
    where = and_(histories.c.system == history.system, histories.c.timeline == history.timeline)
    found = connection.scalar(select(histories.c.id).where(where))
    if found is None:
        values = {"system": history.system, "timeline": _bigint("timeline", history.timeline)}
        found = connection.scalar(insert(histories).values(values).returning(histories.c.id))
    return int(found or 0)


def _stream_id(connection: Connection, stream: str) -> int:
    found = connection.scalar(select(streams.c.id).where(streams.c.name == stream))
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


def _last_block_at(connection: Connection, stream: str, history: History) -> int:
    query = _of_stream(select(blocks.c.last), stream, history).order_by(blocks.c.first.desc()).limit(1)
    last = connection.scalar(query)
    return -1 if last is None else int(last)


def _of_stream(query: Select[Any], stream: str, history: History) -> Select[Any]:
    return (
        query.join(streams, streams.c.id == blocks.c.stream)
        .join(histories, histories.c.id == blocks.c.history)
        .where(streams.c.name == stream)
        .where(histories.c.system == history.system, histories.c.timeline == history.timeline)
    )


def _stretches_of(connection: Connection, stream: str, history: History, low: Lsn, high: Lsn) -> list[tuple[int, int]]:
    """Give where the blocks that touch the log between `low` and `high` begin and end, in log order."""
    query = _of_stream(select(blocks.c.first, blocks.c.last), stream, history)
    inside = query.where(blocks.c.first > _bigint("LSN", low), blocks.c.first < _bigint("LSN", high))
    before = query.where(blocks.c.first <= int(low)).order_by(blocks.c.first.desc()).limit(1)
    rows = [*connection.execute(before), *connection.execute(inside.order_by(blocks.c.first))]
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
        values = _row(block) | keys | {"point": point, "reason": reason}
        values["time_peak_us"] = _peak(connection, keys, block)
        row = connection.scalar(insert(blocks).values(values).returning(blocks.c.id))
        inside = records[done : done + block.commits]
        done += block.commits
        outliers = [{"xid": _bigint("transaction id", xid), "block": row} for xid in sorted(set(block.xid_outliers))]
        digests = sorted({_digest(marker) for record in inside for marker in record.markers})
        if outliers:
            connection.execute(insert(xid_outliers), outliers)
        if digests:
            connection.execute(insert(markers), [{"digest": digest, "block": row} for digest in digests])
    for outcome in Outcome:
        count(connection, outcome, sum(record.outcome is outcome for record in records))


def _row(block: Block) -> dict[str, Any]:
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
    mine = and_(blocks.c.history == keys["history"], blocks.c.stream == keys["stream"])
    before = (
        select(blocks.c.time_peak_us)
        .where(mine, blocks.c.first < int(block.first))
        .order_by(blocks.c.first.desc())
        .limit(1)
    )
    peak = max(block.time_high_us, connection.scalar(before) or _BIGINT_MIN)
    lower = and_(mine, blocks.c.first > int(block.first), blocks.c.time_peak_us < peak)
    connection.execute(update(blocks).where(lower).values(time_peak_us=peak))
    return peak


def _level(spread: int) -> int:
    """Give the least level whose ranges are wide enough for `spread`: the least k with spread < 16^k."""
    return (spread.bit_length() + 3) // 4


def _digest(marker: str) -> int:
    digest = hashlib.sha256(marker.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _bigint(what: str, number: int) -> int:
    if not _BIGINT_MIN <= number <= _BIGINT_MAX:
        raise CatalogError(f"{what} {number} does not fit in 63 bits")
    return int(number)


# ---------------------------------------------------------------------------------------------------- looking up


def find(connection: Connection, query: Query, limit: int) -> list[Found]:
    """Give the `limit` most lately recorded commits that match, by history and in log order.

    Only blocks that can hold a match are unpacked; the narrowest key that was given picks them.
    """
    keys: Iterable[Any]
    if max(query.lsn or 0, query.xid or 0) > _BIGINT_MAX:
        return []
    if query.lsn is not None:
        keys = _around(connection, query.lsn)
    elif query.xid is not None:
        keys = connection.scalars(_WITH_XID, _range(query.xid, query.xid)).all()
    elif query.marker is not None:
        digest = markers.c.digest == _digest(query.marker)
        keys = connection.scalars(select(markers.c.block).where(digest).order_by(markers.c.block.desc())).all()
    elif query.first_us is not None and query.last_us is not None:
        keys = connection.scalars(_IN_TIME, _range(query.first_us, query.last_us)).all()
    else:
        keys = connection.scalars(_newest(query.stream, limit)).all()
    matches = (found for key in keys for found in reversed(_unpacked(connection, key)) if query.matches(found.record))
    return sorted(islice(matches, limit), key=log_order)


def commits_of(connection: Connection, point: int) -> list[CommitRecord]:
    """Give the commits that `point` protects, by stream and in log order."""
    keys = connection.scalars(
        select(blocks.c.id).where(blocks.c.point == point).order_by(blocks.c.stream, blocks.c.first)
    )
    return [found.record for key in keys.all() for found in _unpacked(connection, key)]


def before(connection: Connection, lsn: int, line: History | Lineage) -> Found | None:
    """Give the last commit of all streams whose record begins before `lsn`."""
    for history, low, high in reversed(_stretches(line)):
        earlier = blocks.c.first < min(lsn, high)
        keys = {  # the last block may hold nothing but a commit that reaches beyond the stretch
            *_last_blocks(connection, history, earlier),
            *_last_blocks(connection, history, and_(earlier, blocks.c.last <= high)),
        }
        there = [found for found in _inside(connection, keys, low, high) if found.record.start < lsn]
        if there:
            return max(there, key=log_order)
    return None


def after(connection: Connection, lsn: int, line: History | Lineage) -> Found | None:
    """Give the first commit of all streams whose record begins behind `lsn`."""
    for history, low, high in _stretches(line):
        bound = min(max(lsn + 1, low), _BIGINT_MAX)
        keys = {
            *_last_blocks(connection, history, blocks.c.first < bound),
            *_first_blocks(connection, history, blocks.c.first >= bound),
        }
        there = [found for found in _inside(connection, keys, low, high) if found.record.start > lsn]
        if there:
            return min(there, key=log_order)
    return None


def as_of(connection: Connection, time: datetime, line: History | Lineage | None) -> Found | None:
    """Give the last commit of the longest run, from the first one in log order, made at or before `time`."""
    line = line or _newest_history(connection)
    if line is None:
        return None
    time_us = to_microseconds(time)
    for history, low, high in _stretches(line):
        keys = _first_later(connection, history, time_us)
        later = [found.record for found in _inside(connection, keys, low, high) if found.record.time_us > time_us]
        if later:
            return before(connection, min(record.start for record in later), line)
    return before(connection, _BIGINT_MAX, line)


def log_order(found: Found) -> tuple[str, int, int]:
    """Give what sorts commits by history and in log order."""
    return found.history.system, found.history.timeline, found.record.start


_BLOCK = (
    select(blocks.c.point, blocks.c.reason, blocks.c.data, streams.c.name, histories.c.system, histories.c.timeline)
    .join_from(blocks, streams, streams.c.id == blocks.c.stream)
    .join(histories, histories.c.id == blocks.c.history)
    .where(blocks.c.id == bindparam("key"))
)


def _unpacked(connection: Connection, key: int) -> list[Found]:
    row = connection.execute(_BLOCK, {"key": key}).one()
    history = History(row.system, row.timeline)
    return [Found(record, row.point, row.reason or "", history) for record in unpack_data(row.name, row.data)]


def _inside(connection: Connection, keys: Iterable[int], low: int, high: int) -> list[Found]:
    """Give the commits of the blocks `keys` whose records lie between `low` and `high`."""
    return [
        found
        for key in keys
        for found in _unpacked(connection, key)
        if low <= found.record.start and found.record.end <= high
    ]


def _stretches(line: History | Lineage) -> list[tuple[History, int, int]]:
    """Give (history, from, up to) of each stretch of log that leads to the present of `line`, oldest first."""
    if isinstance(line, History):
        return [(line, 0, _BIGINT_MAX)]
    low, stretches = 0, []
    for timeline, left_at in line.forks:
        stretches.append((History(line.history.system, timeline), low, int(left_at)))
        low = int(left_at)
    return [*stretches, (line.history, low, _BIGINT_MAX)]


def _last_blocks(connection: Connection, history: History | None, where: ColumnElement[bool]) -> list[int]:
    """Give the last block, in log order, for which `where` holds, of each stream (in each history where None)."""
    return _one_a_stream(connection, history, where, blocks.c.first.desc())


def _first_blocks(connection: Connection, history: History, where: ColumnElement[bool]) -> list[int]:
    """Give the first block, in log order, for which `where` holds, of each stream."""
    return _one_a_stream(connection, history, where, blocks.c.first)


def _first_later(connection: Connection, history: History, time_us: int) -> list[int]:
    """Give the first block that holds a commit made after `time_us`, of each stream.

    Peaks never fall along the log, so the lowest peak above the time is that of the first such block.
    """
    return _one_a_stream(connection, history, blocks.c.time_peak_us > time_us, blocks.c.time_peak_us, blocks.c.first)


def _one_a_stream(
    connection: Connection, history: History | None, where: ColumnElement[bool], *order: ColumnElement[Any]
) -> list[int]:
    block = (
        select(blocks.c.id)
        .where(blocks.c.history == histories.c.id, blocks.c.stream == streams.c.id, where)
        .order_by(*order)
        .limit(1)
        .correlate(histories, streams)
        .scalar_subquery()
    )
    query = select(block).select_from(histories.join(streams, true()))
    if history is not None:
        query = query.where(histories.c.system == history.system, histories.c.timeline == history.timeline)
    return [key for key in connection.scalars(query) if key is not None]


def _around(connection: Connection, lsn: Lsn) -> list[int]:
    """Give the blocks that can hold a commit record which begins, ends, or lies at `lsn`."""
    touching = _last_blocks(connection, None, blocks.c.first <= int(lsn))
    ending = _last_blocks(connection, None, blocks.c.first < int(lsn))
    return sorted({*touching, *ending}, reverse=True)


def _in_range(level: ColumnElement[int], low: ColumnElement[int], high: ColumnElement[int]) -> ColumnElement[bool]:
    """Give the condition that a block's range meets [:first, :last]: a short stretch of the index for each level."""
    first, last = bindparam("first", type_=BigInteger), bindparam("last", type_=BigInteger)
    return or_(
        *(
            and_(level == k, low.between(bindparam(f"from_{k}", type_=BigInteger), last), high >= first)
            for k in range(_LEVELS)
        )
    )


_OUTLYING = select(xid_outliers.c.block).where(xid_outliers.c.xid == bindparam("first", type_=BigInteger))
_WITH_XID = (
    select(blocks.c.id)
    .where(or_(_in_range(blocks.c.xid_level, blocks.c.xid_low, blocks.c.xid_high), blocks.c.id.in_(_OUTLYING)))
    .order_by(blocks.c.id.desc())
)
_IN_TIME = (
    select(blocks.c.id)
    .where(_in_range(blocks.c.time_level, blocks.c.time_low_us, blocks.c.time_high_us))
    .order_by(blocks.c.id.desc())
)


def _range(first: int, last: int) -> dict[str, int]:
    """Give the parameters for `_in_range`."""
    starts = {f"from_{k}": max(first - 16**k + 1, _BIGINT_MIN) for k in range(_LEVELS)}
    return {"first": first, "last": last, **starts}


def _newest(stream: str | None, limit: int) -> Select[Any]:
    newest = select(blocks.c.id).order_by(blocks.c.id.desc()).limit(limit)
    if stream is None:
        return newest
    return newest.join(streams, streams.c.id == blocks.c.stream).where(streams.c.name == stream)


def _newest_history(connection: Connection) -> History | None:
    row = connection.execute(
        select(histories.c.system, histories.c.timeline)
        .join_from(blocks, histories, histories.c.id == blocks.c.history)
        .order_by(blocks.c.id.desc())
        .limit(1)
    ).one_or_none()
    return History(row.system, row.timeline) if row else None
