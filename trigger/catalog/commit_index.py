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

from sqlalchemy import BigInteger, Connection, Row, and_, bindparam, func, insert, select, true, union_all, update

from trigger.catalog.packing import Block, open_data, pack
from trigger.catalog.schema import (
    BIGINT_MAX,
    BIGINT_MIN,
    HISTORY_COLUMNS,
    blocks,
    count,
    gaps,
    histories,
    markers,
    number_outliers,
    settled,
    streams,
)
from trigger.errors import CatalogError
from trigger.model import CommitRecord, Outcome
from trigger.position import History, Name, Position

REPEATED = "repeated"
"""The counter of records that were dropped because their commit already had an outcome."""


# Statements are built once: to put one together takes SQLAlchemy longer than SQLite needs to run it.
_STREAM = select(streams.c.id).where(streams.c.name == bindparam("name"))
IS_HISTORY = and_(*(histories.c[name] == bindparam(name) for name in HISTORY_COLUMNS))
"""The condition that a row of `histories` is the one whose columns are given."""
OF_HISTORY = tuple(histories.c[name] for name in HISTORY_COLUMNS)
_HISTORY = select(histories.c.id).where(IS_HISTORY)
_SETTLED = (
    select(*OF_HISTORY, settled.c.through)
    .join_from(settled, histories)
    .join(streams, streams.c.id == settled.c.stream)
    .where(streams.c.name == bindparam("name"))
)
_ALL_SETTLED = (
    select(streams.c.name, *OF_HISTORY, settled.c.through)
    .join_from(settled, histories)
    .join(streams, streams.c.id == settled.c.stream)
)
_OF_STREAM = (
    select(blocks.c.first, blocks.c.last)
    .join_from(blocks, streams, streams.c.id == blocks.c.stream)
    .join(histories, histories.c.id == blocks.c.history)
    .where(streams.c.name == bindparam("name"))
    .where(IS_HISTORY)
)
_EARLIER = (
    select(*OF_HISTORY)
    .where(histories.c.kind == bindparam("kind"), histories.c.system == bindparam("system"))
    .where(histories.c.incarnation < bindparam("incarnation"))
)
_LOW, _HIGH = bindparam("low", type_=BigInteger), bindparam("high", type_=BigInteger)
_BLOCK_AT = _OF_STREAM.where(blocks.c.first <= _LOW).order_by(blocks.c.first.desc()).limit(1)
_BLOCKS_INSIDE = _OF_STREAM.where(blocks.c.first > _LOW, blocks.c.first < _HIGH).order_by(blocks.c.first)
_DATA_AT, _DATA_INSIDE = (
    query.add_columns(blocks.c.data).where(blocks.c.point.is_not(None)) for query in (_BLOCK_AT, _BLOCKS_INSIDE)
)  # what was missed there may be protected here
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
    end at or before what the stream has settled there, those that lie in a block already, and those that an earlier
    incarnation has: what a copy that was put back shares with it comes again. Blocks may lie behind
    the new records: what a failover left behind was missed before what is kept of that history is protected.

    Raises:
        CatalogError: the records of a stream are not in log order, or one overlaps a block without lying in it.
    """
    new = 0
    for stream, mine in _by_stream(records).items():
        owner = through[stream].history if stream in through else history
        done = _settled_at(connection, stream, owner)
        fresh = _new_in_this_life(connection, [record for record in mine if record.end > done], owner)
        for run in _unrecorded(connection, fresh, owner, strict=True):
            _insert(connection, run, owner, point=point, reason=reason)
            new += len(run)
    count(connection, REPEATED, len(records) - new)
    return new


def record_missing(connection: Connection, records: Sequence[CommitRecord], history: History, *, point: int) -> int:
    """Write those `records` that lie in no block yet, wherever in the log that is, and give how many were new."""
    new = 0
    for mine in _by_stream(records).values():
        for run in _unrecorded(connection, _new_in_this_life(connection, mine, history), history, strict=False):
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
            raise CatalogError(f"commit {crossing} overlaps one that is recorded, up to {history.place(last)}")
        runs.append([record for record in whole if record.start >= last])
    return [run for run in runs if run]


def new_in_this_life(connection: Connection, records: Sequence[CommitRecord], history: History) -> list[CommitRecord]:
    """Give those records of a history that no earlier incarnation of it has an outcome of."""
    return [one for mine in _by_stream(records).values() for one in _new_in_this_life(connection, mine, history)]


def _new_in_this_life(
    connection: Connection, records: Sequence[CommitRecord], history: History
) -> Sequence[CommitRecord]:
    """Give those of a stream's records that no earlier incarnation has, with the same place, name and time."""
    if not records or not history.incarnation:
        return records
    known: set[tuple[int, Name, int]] = set()
    for row in connection.execute(_EARLIER, columns_of(history)).all():
        for data in _touching(connection, records[0].stream, history_of(row), records[0].start, records[-1].end):
            contents = open_data(records[0].stream, data)
            known |= {(contents.starts[p], contents.name(p), contents.times_us[p]) for p in range(len(contents))}
    return [record for record in records if (record.start, record.name, record.time_us) not in known]


def _touching(connection: Connection, stream: str, history: History, low: int, high: int) -> list[bytes]:
    """Give the data of the blocks that touch the log between two places: two short stretches of an index."""
    owner = {"name": stream, **columns_of(history)}
    bounds = {"low": _bigint("place", low), "high": _bigint("place", high)}
    rows = [*connection.execute(_DATA_AT, owner | bounds), *connection.execute(_DATA_INSIDE, owner | bounds)]
    return [row.data for row in rows if row.last > low]


def settle(connection: Connection, stream: str, through: Position) -> None:
    """Note that every commit of `stream` up to `through` has an outcome; never goes back in one history."""
    current = settled_through(connection, stream)
    if current is not None and current.history == through.history and current >= through:
        return
    values = {"history": history_id(connection, through.history), "through": _bigint("place", through.at)}
    key = _stream_id(connection, stream)
    if current is None:
        connection.execute(insert(settled), {"stream": key, **values})
    else:
        connection.execute(_UPDATE_SETTLED, {"key": key, **values})


def settled_through(connection: Connection, stream: str) -> Position | None:
    """Give the last position up to which every commit of `stream` has an outcome."""
    row = connection.execute(_SETTLED, {"name": stream}).one_or_none()
    return position_of(history_of(row), row.through) if row else None


def all_settled(connection: Connection) -> dict[str, Position]:
    """Give by stream what `settled_through` gives."""
    return {row.name: position_of(history_of(row), row.through) for row in connection.execute(_ALL_SETTLED)}


def stream_names(connection: Connection) -> list[str]:
    """Give the names of all streams, in order."""
    return list(connection.scalars(select(streams.c.name).order_by(streams.c.name)))


def history_of(row: Row[*tuple[Any, ...]]) -> History:
    """Give the history that a row names by the columns of `histories`."""
    return History(*(getattr(row, name) for name in HISTORY_COLUMNS))


def position_of(history: History, at: int) -> Position:
    """Give a stored place as a position, in the form of its kind."""
    return Position(history, history.place(at))


def columns_of(history: History) -> dict[str, Any]:
    """Give what the columns of `histories` hold for one."""
    return {name: getattr(history, name) for name in HISTORY_COLUMNS}


def history_id(connection: Connection, history: History) -> int:
    """Give the key of `history`, which gets one where it has none."""
    values = columns_of(history)
    found = connection.scalar(_HISTORY, values)
    if found is None:
        _bigint("branch", history.branch)
        found = connection.scalar(insert(histories).values(values).returning(histories.c.id))
    return int(found or 0)


def furthest(connection: Connection) -> list[Position]:
    """Give the furthest place that is known of each history: of a commit, of a settled stream, of the end of a gap."""
    newest = (  # the blocks of a stream in one history never overlap
        select(blocks.c.last)
        .where(blocks.c.history == histories.c.id, blocks.c.stream == streams.c.id)
        .order_by(blocks.c.first.desc())
        .limit(1)
        .correlate(histories, streams)
        .scalar_subquery()
    )
    ends = [
        select(histories.c.id.label("history"), newest.label("at")).select_from(histories.join(streams, true())),
        select(settled.c.history, func.max(settled.c.through).label("at")).group_by(settled.c.history),
        select(gaps.c.until_history.label("history"), func.max(gaps.c.until_at).label("at")).group_by(
            gaps.c.until_history
        ),
    ]
    known = union_all(*ends).subquery()
    rows = connection.execute(
        select(*OF_HISTORY, func.max(func.coalesce(known.c.at, 0)).label("at"))
        .select_from(histories.outerjoin(known, known.c.history == histories.c.id))
        .group_by(*OF_HISTORY)
    )
    return [position_of(history_of(row), row.at) for row in rows]


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


def _stretches_of(connection: Connection, stream: str, history: History, low: int, high: int) -> list[tuple[int, int]]:
    """Give where the blocks that touch the log between `low` and `high` begin and end, in log order."""
    owner = {"name": stream, **columns_of(history)}
    bounds = {"low": _bigint("place", low), "high": _bigint("place", high)}
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
        outliers = [{"number": _bigint("number", one), "block": row} for one in sorted(set(block.number_outliers))]
        texts = {marker for record in inside for marker in record.markers} | set(map(as_marker, block.whole_names))
        digests = sorted(map(marker_digest, texts))
        if outliers:
            connection.execute(insert(number_outliers), outliers)
        if digests:
            connection.execute(insert(markers), [{"digest": digest, "block": row} for digest in digests])
    for outcome in Outcome:
        count(connection, outcome, sum(record.outcome is outcome for record in records))


def block_row(block: Block) -> dict[str, Any]:
    """Give the columns of `blocks` that `block` itself decides."""
    return {
        "first": _bigint("place", block.first),
        "last": _bigint("place", block.last),
        "number_level": _level(block.number_high - block.number_low),
        "number_low": _bigint("number", block.number_low),
        "number_high": _bigint("number", block.number_high),
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


def as_marker(name: str) -> str:
    """Give the marker under which a name without a number is found; no marker of an application begins so."""
    return f"\0{name}"


def _bigint(what: str, number: int) -> int:
    if not BIGINT_MIN <= number <= BIGINT_MAX:
        raise CatalogError(f"{what} {number} does not fit in 63 bits")
    return int(number)
