"""The commits that have an outcome, found by log position, id, time, marker, and by their neighbours.

Every function works inside the caller's transaction. The indexes give the few blocks that can hold an answer (see
`trigger.catalog.schema` for why they are few); these are opened, and only the commits that match are made.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Connection, Select, and_, bindparam, func, or_, select, true

from trigger.catalog.commit_index import IS_HISTORY, OF_HISTORY, as_marker, columns_of, history_of, marker_digest
from trigger.catalog.packing import Contents, open_data
from trigger.catalog.schema import BIGINT_MAX, BIGINT_MIN, LEVELS, blocks, histories, markers, number_outliers, streams
from trigger.model import CommitRecord, to_microseconds
from trigger.position import History, Lineage, Name


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

    name: Name | None
    place: int | None
    first_us: int | None
    last_us: int | None
    marker: str | None
    stream: str | None

    def places(self, contents: Contents) -> Iterable[int]:
        """Give where in a block the commits are that match, in log order."""
        if self.stream not in (None, contents.stream):
            return []
        places: Iterable[int] = range(len(contents)) if self.marker is None else contents.marked(self.marker)
        if self.name is not None:
            number = self.name.number or 0
            places = [p for p in places if contents.numbers[p] == number and contents.name(p) == self.name]
        if self.place is not None:
            places = [place for place in places if contents.starts[place] <= self.place <= contents.ends[place]]
        if self.first_us is not None:
            places = [place for place in places if contents.times_us[place] >= self.first_us]
        if self.last_us is not None:
            places = [place for place in places if contents.times_us[place] <= self.last_us]
        return places


def find(connection: Connection, query: Query, limit: int) -> list[Found]:
    """Give the `limit` most lately recorded commits that match, by history and in log order.

    Only blocks that can hold a match are unpacked; the narrowest key that was given picks them.
    """
    keys: Iterable[Any]
    number = query.name.number if query.name else None
    marker = as_marker(query.name.text) if query.name and number is None else query.marker
    if max(query.place or 0, number or 0) > BIGINT_MAX:
        return []
    if query.place is not None:
        keys = _around(connection, int(query.place))
    elif number is not None:
        keys = connection.scalars(_WITH_NUMBER, _range(number, number)).all()
    elif marker is not None:
        digest = markers.c.digest == marker_digest(marker)
        keys = connection.scalars(select(markers.c.block).where(digest).order_by(markers.c.block.desc())).all()
    elif query.first_us is not None and query.last_us is not None:
        keys = connection.scalars(_IN_TIME, _range(query.first_us, query.last_us)).all()
    else:
        keys = connection.scalars(_newest(query.stream, limit)).all()
    opened = (_opened(connection, key) for key in keys)
    matches = (block.found(place) for block in opened for place in reversed([*query.places(block.contents)]))
    return sorted(islice(matches, limit), key=log_order)


def commits_of(connection: Connection, point: int) -> list[CommitRecord]:
    """Give the commits that `point` protects, by stream and in log order."""
    keys = connection.scalars(
        select(blocks.c.id).where(blocks.c.point == point).order_by(blocks.c.stream, blocks.c.first)
    )
    opened = (_opened(connection, key) for key in keys.all())
    return [one.found(place).record for one in opened for place in range(len(one.contents))]


def before(connection: Connection, at: int, line: History | Lineage) -> Found | None:
    """Give the last commit of all streams whose record begins before `at`."""
    return _before(_Reader(connection), at, line)


def _before(reader: _Reader, at: int, line: History | Lineage) -> Found | None:
    for history, low, high in reversed(_stretches(line)):
        bound = min(at, high)
        keys = {  # the last block may hold nothing but a commit that reaches beyond the stretch
            *_one_a_stream(reader.connection, _LAST_BEFORE, history, bound=bound),
            *(
                _one_a_stream(reader.connection, _LAST_WITHIN, history, bound=bound, high=high)
                if high < BIGINT_MAX
                else ()
            ),
        }
        there = []
        for block in map(reader.open, keys):
            inside = block.inside(low, high)
            place = min(inside.stop, bisect_left(block.contents.starts, at)) - 1
            if place in inside:
                there.append(block.found(place))
        if there:
            return max(there, key=log_order)
    return None


def after(connection: Connection, at: int, line: History | Lineage) -> Found | None:
    """Give the first commit of all streams whose record begins behind `at`."""
    for history, low, high in _stretches(line):
        bound = min(max(at + 1, low), BIGINT_MAX)
        keys = {
            *_one_a_stream(connection, _LAST_BEFORE, history, bound=bound),
            *_one_a_stream(connection, _FIRST_FROM, history, bound=bound),
        }
        there = []
        for block in (_opened(connection, key) for key in keys):
            inside = block.inside(low, high)
            place = max(inside.start, bisect_right(block.contents.starts, at))
            if place in inside:
                there.append(block.found(place))
        if there:
            return min(there, key=log_order)
    return None


def count_from(connection: Connection, at: int, line: History | Lineage) -> int:
    """Give how many commits of all streams there are whose records begin at or behind `at`."""
    count, reader = 0, _Reader(connection)
    for history, low, high in _stretches(line):
        first, columns = min(max(at, low), BIGINT_MAX), columns_of(history)
        if first <= high:
            count += connection.scalar(_WHOLE, columns | {"bound": first, "high": high}) or 0
            for block in map(reader.open, connection.scalars(_CUT, columns | {"bound": first, "high": high}).all()):
                inside = block.inside(low, high)
                count += max(0, inside.stop - max(inside.start, bisect_left(block.contents.starts, first)))
    return count


def as_of(connection: Connection, time: datetime, line: History | Lineage | None) -> Found | None:
    """Give the last commit of the longest run, from the first one in log order, made at or before `time`."""
    line = line or _newest_history(connection)
    if line is None:
        return None
    time_us, reader = to_microseconds(time), _Reader(connection)
    for history, low, high in _stretches(line):
        keys = _one_a_stream(connection, _FIRST_LATER, history, bound=time_us)
        later = [block.first_later(time_us, block.inside(low, high)) for block in map(reader.open, keys)]
        if (first := min(later, default=BIGINT_MAX)) < BIGINT_MAX:
            return _before(reader, first, line)
    return _before(reader, BIGINT_MAX, line)


def log_order(found: Found) -> tuple[str, str, tuple[int, int], int]:
    """Give what sorts commits by history and in log order."""
    return found.history.kind, found.history.system, found.history.age, found.record.start


_BLOCK = (
    select(blocks.c.point, blocks.c.reason, blocks.c.data, streams.c.name, *OF_HISTORY)
    .join_from(blocks, streams, streams.c.id == blocks.c.stream)
    .join(histories, histories.c.id == blocks.c.history)
    .where(blocks.c.id == bindparam("key"))
)


class _Opened(NamedTuple):
    """One block, read and open."""

    contents: Contents
    point: int | None
    reason: str
    history: History

    def found(self, place: int) -> Found:
        """Give the commit at `place` with what holds it."""
        return Found(self.contents.record(place, self.history), self.point, self.reason, self.history)

    def inside(self, low: int, high: int) -> range:
        """Give the places of the commits whose records lie between `low` and `high`."""
        return range(bisect_left(self.contents.starts, low), bisect_right(self.contents.ends, high))

    def first_later(self, time_us: int, places: range) -> int:
        """Give where the first of some commits that was made after a time begins; `BIGINT_MAX` where none was."""
        starts, times_us = self.contents.starts, self.contents.times_us
        return next((starts[place] for place in places if times_us[place] > time_us), BIGINT_MAX)


class _Reader:
    """Opens each block once: what bounds an answer often holds it too."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._held: dict[int, _Opened] = {}

    def open(self, key: int) -> _Opened:
        """Give the block with this key."""
        if key not in self._held:
            self._held[key] = _opened(self.connection, key)
        return self._held[key]


def _opened(connection: Connection, key: int) -> _Opened:
    row = connection.execute(_BLOCK, {"key": key}).one()
    contents = open_data(row.name, row.data)
    return _Opened(contents, row.point, row.reason or "", history_of(row))


def _stretches(line: History | Lineage) -> list[tuple[History, int, int]]:
    """Give (history, from, up to) of each stretch of log that leads to the present of `line`, oldest first."""
    return [(line, 0, BIGINT_MAX)] if isinstance(line, History) else line.stretches()


_BOUND = bindparam("bound", type_=BigInteger)


def _first_of_each(where: ColumnElement[bool], *order: ColumnElement[Any]) -> Select[Any]:
    """Give the query for the first block, in some order, of each stream in each history for which `where` holds."""
    block = (
        select(blocks.c.id)
        .where(blocks.c.history == histories.c.id, blocks.c.stream == streams.c.id, where)
        .order_by(*order)
        .limit(1)
        .correlate(histories, streams)
        .scalar_subquery()
    )
    return select(block).select_from(histories.join(streams, true()))


def _in_history(query: Select[Any]) -> Select[Any]:
    return query.where(IS_HISTORY)


_LAST_ANYWHERE = _first_of_each(blocks.c.first < _BOUND, blocks.c.first.desc())
_LAST_BEFORE = _in_history(_LAST_ANYWHERE)
_LAST_WITHIN = _in_history(
    _first_of_each(
        and_(blocks.c.first < _BOUND, blocks.c.last <= bindparam("high", type_=BigInteger)), blocks.c.first.desc()
    )
)
_FIRST_FROM = _in_history(_first_of_each(blocks.c.first >= _BOUND, blocks.c.first))
_FIRST_LATER = _in_history(  # peaks never fall along the log: the lowest above a time is the first above it
    _first_of_each(blocks.c.time_peak_us > _BOUND, blocks.c.time_peak_us, blocks.c.first)
)


_HIGH = bindparam("high", type_=BigInteger)
_IN_HISTORY = blocks.join(histories, histories.c.id == blocks.c.history)
_WHOLE = (
    select(func.sum(blocks.c.commits))
    .select_from(_IN_HISTORY)
    .where(IS_HISTORY, blocks.c.first >= _BOUND, blocks.c.last <= _HIGH)
)
_CUT = (
    select(blocks.c.id)
    .select_from(_IN_HISTORY)
    .where(
        IS_HISTORY,
        blocks.c.last >= _BOUND,
        blocks.c.first <= _HIGH,
        or_(blocks.c.first < _BOUND, blocks.c.last > _HIGH),
    )
)


def _one_a_stream(connection: Connection, query: Select[Any], history: History, **bounds: int) -> list[int]:
    return [key for key in connection.scalars(query, columns_of(history) | bounds) if key is not None]


def _around(connection: Connection, at: int) -> list[int]:
    """Give the blocks that can hold a commit record which begins, ends, or lies at `at`."""
    bounds = (at, min(at + 1, BIGINT_MAX))  # the block that begins there, and the one before that may end there
    near = {key for bound in bounds for key in connection.scalars(_LAST_ANYWHERE, {"bound": bound}) if key is not None}
    reaching = select(blocks.c.id).where(blocks.c.id.in_(near), blocks.c.last >= at)
    return list(connection.scalars(reaching.order_by(blocks.c.id.desc())))


def _in_range(level: ColumnElement[int], low: ColumnElement[int], high: ColumnElement[int]) -> ColumnElement[bool]:
    """Give the condition that a block's range meets [:first, :last]: a short stretch of the index for each level."""
    first, last = bindparam("first", type_=BigInteger), bindparam("last", type_=BigInteger)
    return or_(
        *(
            and_(level == k, low.between(bindparam(f"from_{k}", type_=BigInteger), last), high >= first)
            for k in range(LEVELS)
        )
    )


_OUTLYING = select(number_outliers.c.block).where(number_outliers.c.number == bindparam("first", type_=BigInteger))
_WITH_NUMBER = (
    select(blocks.c.id)
    .where(or_(_in_range(blocks.c.number_level, blocks.c.number_low, blocks.c.number_high), blocks.c.id.in_(_OUTLYING)))
    .order_by(blocks.c.id.desc())
)
_IN_TIME = (
    select(blocks.c.id)
    .where(_in_range(blocks.c.time_level, blocks.c.time_low_us, blocks.c.time_high_us))
    .order_by(blocks.c.id.desc())
)


def _range(first: int, last: int) -> dict[str, int]:
    """Give the parameters for `_in_range`."""
    starts = {f"from_{k}": max(first - 16**k + 1, BIGINT_MIN) for k in range(LEVELS)}
    return {"first": first, "last": last, **starts}


def _newest(stream: str | None, limit: int) -> Select[Any]:
    newest = select(blocks.c.id).order_by(blocks.c.id.desc()).limit(limit)
    if stream is None:
        return newest
    return newest.join(streams, streams.c.id == blocks.c.stream).where(streams.c.name == stream)


def _newest_history(connection: Connection) -> History | None:
    row = connection.execute(
        select(*OF_HISTORY)
        .join_from(blocks, histories, histories.c.id == blocks.c.history)
        .order_by(blocks.c.id.desc())
        .limit(1)
    ).one_or_none()
    return history_of(row) if row else None
