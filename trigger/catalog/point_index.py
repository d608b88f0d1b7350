"""The points and the gaps: their rows, and every step in the life of a point.

Every function works inside the caller's transaction. A point's row holds its tag's own text (see `tag`), so that
a flipped bit in the catalog is noticed as it is in a tag, and what can be rebuilt is exactly what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, func, insert, select, update

from trigger.catalog import commit_index, schema, tag
from trigger.catalog.schema import HISTORY_COLUMNS, PRUNED, gaps, histories, points
from trigger.errors import CatalogError, DamagedError, NotFoundError, StorageError
from trigger.failpoint import reached
from trigger.model import (
    TRANSITIONS,
    CommitRecord,
    Gap,
    Outcome,
    RecoveryPoint,
    State,
    Verification,
    from_microseconds,
    to_microseconds,
)
from trigger.point_names import is_point_id
from trigger.position import History, Position

_BY_ID = select(points.c.number, points.c.document).where(points.c.id == bindparam("key"))
_BY_NUMBER = select(points.c.number, points.c.document).where(points.c.number == bindparam("key"))
_UPDATE = update(points).where(points.c.number == bindparam("key"))
_LAST_NUMBER = select(func.max(points.c.number))
_LAST_GAP = select(func.max(gaps.c.id))


@dataclass(frozen=True, slots=True)
class Totals:
    """What the catalog holds, counted."""

    points: Mapping[State, int]
    pruned: int
    """Points that expired so long ago that nothing is known of them any more but their numbers and commits."""
    commits: Mapping[Outcome, int]
    repeated: int
    """Commits that came again after they had an outcome, and were dropped."""
    open_gaps: int
    bytes: int


def _settle_all(
    connection: Connection, records: Sequence[CommitRecord], settled: Mapping[str, Position], history: History
) -> None:
    through = dict(settled)
    for stream, end in {record.stream: record.end for record in records}.items():  # in log order: the last one stays
        mine = settled.get(stream, Position(history, end))
        through[stream] = Position(mine.history, max(mine.at, end))
    for stream, position in through.items():
        commit_index.settle(connection, stream, position)


def open_point(connection: Connection, draft: RecoveryPoint) -> RecoveryPoint:
    """Insert `draft` with the next number, unless its id is there already; give the point as it is stored."""
    there = _row(connection, _BY_ID, draft.id)
    if there is not None:
        return _parsed(there)
    point = replace(draft, number=_next_number(connection), gaps=tuple(all_gaps(connection, open_only=True)))
    known = connection.scalar(_LAST_GAP) or 0
    _insert_point(connection, point, gaps_before=known)
    reached("catalog-point-opened")
    return point


def require_proofs(point: RecoveryPoint) -> None:
    """Raise `CatalogError` unless `point` has what a sealed point has."""
    lacking = [name for name in ("ceiling", "sealed_at", "snapshots") if not getattr(point, name)]
    if lacking:
        raise CatalogError(f"point {point.number} cannot be sealed without {', '.join(lacking)}")


def seal(
    connection: Connection, point: RecoveryPoint, records: Sequence[CommitRecord], settled: Mapping[str, Position]
) -> RecoveryPoint:
    """Write the commits of `point`, how far the streams are settled, and the point itself; give it as stored."""
    stored = _stored(connection, point.id)
    if stored.state is State.SEALED:
        return stored
    _require_step(stored, State.SEALED)
    reached("catalog-seal-begun")
    history = point.floor.history
    commits = commit_index.record_all(connection, records, settled, history, point=stored.number)
    reached("catalog-blocks-written")
    _settle_all(connection, records, settled, history)
    reached("catalog-settled-written")
    sealed = replace(point, number=stored.number, state=State.SEALED, commits=commits)
    _store(connection, sealed)
    reached("catalog-point-sealed")
    return sealed


def change(connection: Connection, key: str, state: State, failure: str = "") -> RecoveryPoint:
    """Move the point with the id `key` on to `state`; raises `CatalogError` where `TRANSITIONS` has no such step."""
    stored = _stored(connection, key)
    if stored.state is state:
        return stored
    _require_step(stored, state)
    changed = replace(stored, state=state, failure=failure)
    _store(connection, changed)
    reached(f"catalog-point-{state}")
    return changed


def verify(connection: Connection, key: str, verification: Verification) -> RecoveryPoint:
    """Store `verification` with the sealed point whose id is `key`."""
    stored = _stored(connection, key)
    if stored.state is not State.SEALED:
        raise CatalogError(f"point {stored.number} is {stored.state}; only a sealed point is verified")
    changed = replace(stored, verification=verification)
    _store(connection, changed)
    reached("catalog-point-verified")
    return changed


def adopt(
    connection: Connection, point: RecoveryPoint, records: Sequence[CommitRecord], streams: Collection[str]
) -> bool:
    """Insert a point with those of its commits that have no outcome yet; give whether its id was new.

    Streams of which nothing is known begin at its floor.
    """
    if _row(connection, _BY_ID, point.id) is not None:
        return False
    taken = point.number < 1 or _row(connection, _BY_NUMBER, point.number) is not None
    number = _next_number(connection) if taken else point.number
    history = point.floor.history
    adopted = replace(point, number=number)
    _insert_point(connection, adopted, gaps_before=0)
    reached("catalog-point-adopted")
    new = commit_index.record_missing(connection, records, history, point=number)
    if new < len(records):  # an earlier version counted, and tagged, what two lives of a log share with both
        _store(connection, replace(adopted, commits=new))
    for gap in point.gaps:
        take_over_gap(connection, replace(gap, closed_by=number))
    reached("catalog-adopted-written")
    newest = number == connection.scalar(_LAST_NUMBER)
    for stream, end in {record.stream: Position(history, record.end) for record in records}.items():
        current = commit_index.settled_through(connection, stream)
        if newest or current is None or current.history == history:
            commit_index.settle(connection, stream, end)
    for stream in streams:
        if commit_index.settled_through(connection, stream) is None:
            commit_index.settle(connection, stream, point.floor)
    return True


def _require_step(point: RecoveryPoint, state: State) -> None:
    never_sealed = point.state is State.FAILED and point.sealed_at is None
    if state not in TRANSITIONS[point.state] or never_sealed:
        why = f": {point.failure}" if point.failure else ""
        raise CatalogError(f"point {point.number} is {point.state} and cannot become {state}{why}")


def _next_number(connection: Connection) -> int:
    return int(connection.scalar(_LAST_NUMBER) or 0) + 1


def _values(point: RecoveryPoint) -> dict[str, Any]:
    return {"state": point.state.value, "document": tag.encode(point)}


def _insert_point(connection: Connection, point: RecoveryPoint, gaps_before: int) -> None:
    key = {"number": point.number, "id": point.id, "gaps_before": gaps_before}
    connection.execute(insert(points), key | _values(point))


def _store(connection: Connection, point: RecoveryPoint) -> None:
    connection.execute(_UPDATE, {"key": point.number, **_values(point)})


def _row(connection: Connection, query: Select[*tuple[Any, ...]], key: str | int) -> Row[*tuple[Any, ...]] | None:
    return connection.execute(query, {"key": key}).one_or_none()


def _parsed(row: Row[*tuple[Any, ...]]) -> RecoveryPoint:
    if not row.document:
        raise CatalogError(
            f"point {row.number} expired long ago, and no more is kept of it than its number and its commits",
            hint="its commits are found as ever (trigpoint find), and restored by --to-xid, --to-time or --to-marker;"
            " catalog.keep_expired_seconds says how long more is kept",
        )
    try:
        return tag.decode(row.document)[0]
    except tag.NewerTagError as error:
        raise CatalogError(f"point {row.number}: {error.message}", hint=error.hint) from error
    except StorageError as error:
        raise DamagedError(
            f"point {row.number} is damaged: {error.message}", hint="rebuild it from its tag: trigpoint catalog rebuild"
        ) from error


def _stored(connection: Connection, key: str) -> RecoveryPoint:
    row = _row(connection, _BY_ID, key)
    if row is None:
        raise NotFoundError(f"there is no point {key}")
    return _parsed(row)


def find_point(connection: Connection, ref: str | int) -> RecoveryPoint:
    """Give the point by its number, id or name; raises `CatalogError` where there is none."""
    text = str(ref)
    key = text.lower().removeprefix("trg-")
    if text.isascii() and text.isdigit() and len(text) < 19:
        row = _row(connection, _BY_NUMBER, int(text))
    else:
        row = _row(connection, _BY_ID, key) if is_point_id(key) else None
    if row is None:
        raise NotFoundError(
            f"there is no point {text!r}", hint="give a number, an id or a name that `trigpoint list` shows"
        )
    return _parsed(row)


def page_of(
    states: Collection[State] | None, *, newest_first: bool, below: int | None, edge: int | None
) -> Select[Any]:
    """Give the query for points in `states` (all where None), with numbers below `below`, behind the number `edge`."""
    query = select(points.c.number, points.c.document)
    if states is not None:
        query = query.where(points.c.state.in_([state.value for state in states]))
    else:
        query = query.where(points.c.state != PRUNED)
    if below is not None:
        query = query.where(points.c.number < below)
    if edge is not None:
        query = query.where(points.c.number < edge if newest_first else points.c.number > edge)
    return query.order_by(points.c.number.desc() if newest_first else points.c.number)


def with_ids(ids: Collection[str]) -> Select[Any]:
    """Give the query for the points that have one of `ids`."""
    return select(points.c.number, points.c.document).where(points.c.id.in_(ids), points.c.state != PRUNED)


def pruned_among(connection: Connection, ids: Collection[str]) -> set[str]:
    """Give those of `ids` whose points expired long ago."""
    return set(connection.scalars(select(points.c.id).where(points.c.id.in_(ids), points.c.state == PRUNED)))


def load(connection: Connection, query: Select[Any]) -> list[RecoveryPoint]:
    """Give the points that `query` selects."""
    return [_parsed(row) for row in connection.execute(query)]


def _gap_row(connection: Connection, gap: Gap) -> dict[str, Any]:
    return {
        "stream": gap.stream,
        "after_history": commit_index.history_id(connection, gap.after.history),
        "after_at": int(gap.after.at),
        "until_history": commit_index.history_id(connection, gap.until.history),
        "until_at": int(gap.until.at),
    }


_AFTER, _UNTIL = histories.alias("after"), histories.alias("until")
_GAPS = (
    select(
        gaps,
        *(alias.c[name].label(f"{alias.name}_{name}") for alias in (_AFTER, _UNTIL) for name in HISTORY_COLUMNS),
    )
    .join_from(gaps, _AFTER, _AFTER.c.id == gaps.c.after_history)
    .join(_UNTIL, _UNTIL.c.id == gaps.c.until_history)
)


def _gap_of(row: Row[*tuple[Any, ...]]) -> Gap:
    after, until = (
        History(*(getattr(row, f"{end}_{name}") for name in HISTORY_COLUMNS)) for end in (_AFTER.name, _UNTIL.name)
    )
    return Gap(
        stream=row.stream,
        after=commit_index.position_of(after, row.after_at),
        until=commit_index.position_of(until, row.until_at),
        reason=row.reason,
        found_at=from_microseconds(row.found_at_us),
        closed_by=row.closed_by,
    )


class Missed(NamedTuple):
    """Commits of one history, in log order, that no point will hold, and why."""

    records: Sequence[CommitRecord]
    reason: str
    history: History


def record_gaps(
    connection: Connection, found: Iterable[Gap], missed: Iterable[Missed], settled: Mapping[str, Position]
) -> list[Gap]:
    """Insert gaps that are not open already, with what was missed, and settle; give the gaps as they are stored."""
    for one in missed:
        records = [record._replace(outcome=Outcome.MISSED) for record in one.records]
        commit_index.record_all(connection, records, {}, one.history, point=None, reason=one.reason)
    reached("catalog-missed-written")
    recorded = [_record_gap(connection, gap) for gap in found]
    for stream, through in settled.items():
        commit_index.settle(connection, stream, through)
    return recorded


def _record_gap(connection: Connection, gap: Gap) -> Gap:
    """Insert `gap`, unless the same one is open already; give it as it is stored."""
    where = _gap_row(connection, gap)
    same = _GAPS.where(*(gaps.c[name] == value for name, value in where.items()), gaps.c.closed_by == 0).limit(1)
    there = connection.execute(same).one_or_none()
    if there is not None:
        return _gap_of(there)
    rest = {"reason": gap.reason, "found_at_us": to_microseconds(gap.found_at), "closed_by": gap.closed_by}
    connection.execute(insert(gaps).values(where | rest))
    reached("catalog-gap-recorded")
    return gap


def take_over_gap(connection: Connection, gap: Gap) -> None:
    """Insert a gap that another catalog knew, open or closed, unless it is there already."""
    where = _gap_row(connection, gap) | {"found_at_us": to_microseconds(gap.found_at)}
    same = select(gaps.c.id).where(*(gaps.c[name] == value for name, value in where.items()))
    if connection.execute(same).first() is None:
        connection.execute(insert(gaps).values(where | {"reason": gap.reason, "closed_by": gap.closed_by}))


def take_over(connection: Connection, found: Collection[Gap], settled: Mapping[str, Position]) -> None:
    """Insert the gaps that are not there, and settle streams as far as another catalog knew, unless that is behind."""
    for gap in found:
        take_over_gap(connection, gap)
    for stream, through in settled.items():
        here = commit_index.settled_through(connection, stream)
        if here is None or not here.history.is_of_system(through.history) or here.history.age <= through.history.age:
            commit_index.settle(connection, stream, through)


def close_gaps(connection: Connection, number: int) -> None:
    """Close the gaps that were known when the sealed point `number` was opened."""
    row = connection.execute(
        select(points.c.state, points.c.gaps_before).where(points.c.number == number)
    ).one_or_none()
    if row is None or row.state != State.SEALED:
        raise CatalogError(f"point {number} closes no gap: it is {row.state if row else 'not there'}")
    known = (gaps.c.closed_by == 0) & (gaps.c.id <= row.gaps_before)
    connection.execute(update(gaps).where(known).values(closed_by=number))


def all_gaps(connection: Connection, open_only: bool) -> list[Gap]:
    """Give all gaps, or the open ones, in the order in which they were found."""
    query = _GAPS.order_by(gaps.c.id)
    return [_gap_of(row) for row in connection.execute(query.where(gaps.c.closed_by == 0) if open_only else query)]


def totals(connection: Connection) -> Totals:
    """Give how much there is of everything."""
    table = schema.counters
    counted = {row.name: row.value for row in connection.execute(select(table.c.name, table.c.value))}
    by_state = connection.execute(select(points.c.state, func.count().label("n")).group_by(points.c.state))
    states: dict[str, int] = {row.state: row.n for row in by_state}
    unclosed = connection.scalar(select(func.count()).select_from(gaps).where(gaps.c.closed_by == 0))
    return Totals(
        points={state: states.get(state.value, 0) for state in State},
        pruned=states.get(PRUNED, 0),
        commits={outcome: counted.get(outcome, 0) for outcome in Outcome},
        repeated=counted.get(commit_index.REPEATED, 0),
        open_gaps=unclosed or 0,
        bytes=schema.size_bytes(connection),
    )
