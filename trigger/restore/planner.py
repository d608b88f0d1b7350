"""Decide how to bring a state back: the base snapshot, the log to replay, the estimate; or say exactly why not.

Pure. PostgreSQL cannot roll back, and it refuses to stop inside the log that a base already holds ("requested
recovery stop point is before consistent recovery point"). A base therefore fits a target when everything it may
hold lies at or before the place where the replay stops, when all of it belongs to the past of the target, and when
the journal holds the log from there to the target without a hole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from trigger.errors import RestoreError
from trigger.model import Extent, RecoveryPoint, State, StopKind, Target, to_microseconds
from trigger.position import Lineage, Lsn, Position

WAL_SEGMENT_BYTES = 16 << 20
"""PostgreSQL's default; a cluster may have been made with another size (`Layout.wal_segment_bytes`)."""

_SHOWN = 5
_OPEN = (StopKind.TIME, StopKind.LATEST)
"""The targets whose place in the log is known only when the replay is there."""


class PassedOver(NamedTuple):
    """A base that was looked at before the chosen one, and why it does not serve."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a target is reached: what is cloned, what is replayed, and how long that should take."""

    target: Target
    """The target as the recovery gets it: `kind` is `END` where the base ends there by itself; for a time `at` is the
    base's ceiling, for the end of the log where that is."""
    base: RecoveryPoint
    replay_from: Position
    """Where the server begins to replay: the redo position of the base, or the start of its bracket."""
    replay_to: Lsn
    """Where the replay ends; for a time a place by which it has gone past it."""
    log_from: Position
    """From here on the journal must give the log; what lies before is in the snapshot."""
    log_bytes: int
    """How much that is, from the start of the file it lies in; 0 where the base needs none."""
    replay_bytes: int
    estimate_seconds: float
    """How long the replay should take; cloning and starting come on top."""
    passed_over: tuple[PassedOver, ...]
    """Newer bases that do not serve, newest first."""

    def describe(self) -> list[str]:
        """Give the plan in lines for people."""
        kind = "bracketed copy" if self.base.bracket else "atomic snapshot"
        lines = [
            f"target    {self.target.description}",
            f"base      point {self.base.number} ({kind}), holds everything up to {self.base.floor.at}"
            f" and nothing behind {self.base.ceiling.at if self.base.ceiling else '?'}",
        ]
        if self.target.kind is StopKind.END:
            lines.append("replay    none: the snapshot ends exactly at the target; crash recovery only")
        else:
            limit = "at most to" if self.target.kind is StopKind.TIME else "to"
            lines.append(f"replay    from {self.replay_from} {limit} {self.replay_to}")
            lines.append(f"journal   {_size(self.log_bytes)} from {self.log_from.at}")
        lines.append(f"estimate  {_size(self.replay_bytes)} to replay, about {self.estimate_seconds:.1f} s")
        lines += [f"not       point {number}: {reason}" for number, reason in self.passed_over[:_SHOWN]]
        if len(self.passed_over) > _SHOWN:
            lines.append(f"          and {len(self.passed_over) - _SHOWN} more")
        return lines


def plan(
    target: Target,
    bases: Sequence[RecoveryPoint],
    extents: Sequence[Extent],
    lineage: Lineage,
    replay_bytes_per_second: float,
    *,
    segment_bytes: int = WAL_SEGMENT_BYTES,
) -> Plan:
    """Give the cheapest way to `target`, which starts from the newest base that fits.

    Args:
        target: the state wanted; `at` is the start of a commit record where it is inclusive. For a time, or the end
            of the log, `at` is not looked at. Where `reach` is given, the journal must hold the log up to there, so
            that the replay sees that it has arrived.
        bases: recovery points in any order; what is not sealed is passed over.
        extents: what the journal holds.
        lineage: the past of `target.history`.
        replay_bytes_per_second: how fast this machine replays, measured; above 0.
        segment_bytes: the size of one file of the log; the log is read from the start of such a file.

    Raises:
        RestoreError: the target lies outside the lineage, before the first base, beyond the journal, or behind a
            hole in it; the message names the bound and what can be restored instead. It is retryable where the
            journal may still come to the target.
    """
    _require_lineage(target, lineage)
    held = _held(extents, lineage, segment_bytes)
    needed = _last_held(held) if target.kind is StopKind.LATEST else _needed(target)
    passed: list[PassedOver] = []
    holes: list[tuple[RecoveryPoint, Stretch]] = []
    for base in sorted(bases, key=_newest_first):
        if _ends_at(base, target) and lineage.includes(base.floor):
            return _as_it_is(base, target, replay_bytes_per_second, passed)
        if reason := _unfit(base, target, lineage):
            passed.append(PassedOver(base.number, reason))
            continue
        begin = _file_start(_log_from(base).at, segment_bytes)
        if hole := _first_hole(held, Stretch(begin, max(needed, _limit(base, target)))):
            holes.append((base, hole))
            passed.append(PassedOver(base.number, f"the log between {hole.start} and {hole.end} is missing"))
            continue
        log = Stretch(begin, _end(target, held, begin))
        return _replayed(base, target, log, replay_bytes_per_second, passed)
    raise _refusal(target, bases, lineage, held, holes)


def own(point: RecoveryPoint, replay_bytes_per_second: float, *, segment_bytes: int = WAL_SEGMENT_BYTES) -> Plan:
    """Give the plan that brings up a sealed point's own snapshot, as far as it goes by itself, whatever its commit.

    What a bracketed copy needs to become consistent comes out of the journal; an atomic snapshot needs nothing.
    """
    description = f"the snapshot of point {point.number}"
    target = Target(point.floor.history, StopKind.END, _held_at_most(point), True, description)
    if point.bracket is None:
        return _as_it_is(point, target, replay_bytes_per_second, ())
    log = Stretch(_file_start(point.bracket.start.at, segment_bytes), point.bracket.stop.at)
    return _replayed(point, target, log, replay_bytes_per_second, ())


class Stretch(NamedTuple):
    """Bytes of log from `start` up to, not including, `end`."""

    start: Lsn
    end: Lsn


class HeldLog:
    """The log of one history and of its past, as far as the journal holds it.

    Args:
        extents: what the journal holds.
        lineage: the past of the history.
        segment_bytes: the size of one file of the log.
    """

    def __init__(self, extents: Sequence[Extent], lineage: Lineage, segment_bytes: int = WAL_SEGMENT_BYTES) -> None:
        self._lineage = lineage
        self._held = _held(extents, lineage, segment_bytes)
        self._segment_bytes = segment_bytes

    def leads(self, base: RecoveryPoint, point: RecoveryPoint, *, to_come: bool = False) -> bool:
        """Whether a replay from `base` comes past all that `point` holds, so that it brings back all that `point` can.

        Args:
            base: where the replay begins.
            point: lies in the history of this log.
            to_come: let log behind all that the journal holds count as held.
        """
        begin, end = _file_start(_log_from(base).at, self._segment_bytes), _held_at_most(point)
        past = _is_within(base, point) and _latest_stamp(base) <= _latest_stamp(point) and _inside(base, self._lineage)
        until = min(Lsn(end + 1), _last_held(self._held)) if to_come else Lsn(end + 1)
        return past and _first_hole(self._held, Stretch(begin, until)) is None


def _is_within(base: RecoveryPoint, point: RecoveryPoint) -> bool:
    """Whether `base` surely holds no more than `point`, and is as exact where both may end at one place."""
    end, limit = _held_at_most(base), _held_at_most(point)
    return end < limit or (end == limit and (_is_exact(base) or not _is_exact(point)))


def _latest_stamp(base: RecoveryPoint) -> int:
    """Give the time in microseconds behind which a base serves a target that is a time; see `_too_late`."""
    stamps = [*map(to_microseconds, _cuts(base)), *([base.commit.time_us] if base.commit else [])]
    return max(stamps, default=0)


def _cuts(base: RecoveryPoint) -> list[datetime]:
    """Give the times by our clock by which all that the base holds was cut; none where that is not known."""
    return [snapshot.ended_at for snapshot in base.snapshots] + ([base.sealed_at] if base.sealed_at else [])


def _as_it_is(base: RecoveryPoint, target: Target, rate: float, passed: Sequence[PassedOver]) -> Plan:
    end = base.ceiling or base.floor
    begin = base.redo or base.floor
    size = end.at - begin.at
    return Plan(replace(target, kind=StopKind.END), base, begin, end.at, end, 0, size, size / rate, tuple(passed))


def _replayed(base: RecoveryPoint, target: Target, log: Stretch, rate: float, passed: Sequence[PassedOver]) -> Plan:
    begin = base.bracket.start if base.bracket else base.redo or base.floor
    end = max(log.end, base.floor.at)
    size = end - begin.at
    if target.kind in _OPEN:
        target = replace(target, at=_held_at_most(base) if target.kind is StopKind.TIME else end)
    return Plan(target, base, begin, end, _log_from(base), log.end - log.start, size, size / rate, tuple(passed))


def _newest_first(base: RecoveryPoint) -> tuple[int, int]:
    return -_held_at_most(base), -base.number


def _held_at_most(base: RecoveryPoint) -> Lsn:
    """Give the position at or before which everything lies that the base's snapshots may hold."""
    ceiling = base.ceiling.at if base.ceiling else base.floor.at
    return max(ceiling, base.bracket.stop.at) if base.bracket else ceiling


def _log_from(base: RecoveryPoint) -> Position:
    """Give from where on the journal must have the log: the start of the bracket, else the floor.

    An atomic snapshot's own log ends somewhere between floor and ceiling, in a file that is only begun; the server
    reads that file again, from its start, out of the journal. Of a bracketed copy no log is trusted.
    """
    return base.bracket.start if base.bracket else base.floor


def _file_start(at: Lsn, segment_bytes: int) -> Lsn:
    return Lsn(at - at % segment_bytes)


def _needed(target: Target) -> Lsn:
    """Give up to where the log must be there, as far as the target itself says."""
    if target.reach is not None:
        return target.reach
    if target.kind is StopKind.TIME:
        return Lsn(0)
    if target.inclusive and target.commit is not None:
        return target.commit.end
    return Lsn(target.at + 1)  # the replay stops at sight of a record that begins at `at` or behind it


def _last_held(held: Sequence[Stretch]) -> Lsn:
    return held[-1].end if held else Lsn(0)


def _limit(base: RecoveryPoint, target: Target) -> Lsn:
    """Give up to where a replay from the base must see log, to be consistent and to have all that is known."""
    consistent = base.bracket.stop.at if base.bracket else Lsn(0)
    known = target.reach if target.kind is StopKind.LATEST and target.reach else Lsn(0)
    return max(consistent, known) if known > base.floor.at else consistent


def _end(target: Target, held: Sequence[Stretch], begin: Lsn) -> Lsn:
    """Give where the replay ends; for a time a place by which it has gone past it."""
    if target.kind is StopKind.LATEST:
        return max(_last_held(held), begin)
    if target.kind is StopKind.TIME:
        return target.reach or next((stretch.end for stretch in held if stretch.start <= begin < stretch.end), begin)
    return target.commit.end if target.inclusive and target.commit is not None else target.at


def _ends_at(base: RecoveryPoint, target: Target) -> bool:
    """Whether the snapshot holds exactly the target: floor, ceiling and the end of the state are one place."""
    if base.state is not State.SEALED or not _is_exact(base) or target.kind in _OPEN:
        return False
    if not target.inclusive:
        return base.floor.at == target.at
    return target.commit is not None and base.floor.at == target.commit.end


def _is_exact(base: RecoveryPoint) -> bool:
    """Whether it is known to the byte what the snapshot holds, so that it needs no replay to be a state of its own.

    Only an atomic one can be: the log of a bracketed copy ends behind the record that closes the bracket.
    """
    return base.bracket is None and base.ceiling == base.floor


def _unfit(base: RecoveryPoint, target: Target, lineage: Lineage) -> str:
    """Give why a replay to the target cannot start from the base, whatever the journal holds; "" if it can."""
    if base.state is not State.SEALED or base.ceiling is None:
        return f"it is {base.state}, not sealed"
    if not all(lineage.includes(position) for position in _places(base)):
        return f"it belongs to {base.ceiling}, which is not in the past of {lineage.history}"
    if target.kind is StopKind.TIME:
        return _too_late(base, target.time)
    if target.kind is not StopKind.LATEST and (ends := _held_at_most(base)) > target.at:
        return f"it may hold log up to {ends}, beyond {target.at}"
    return ""


def _places(base: RecoveryPoint) -> Iterable[Position]:
    yield base.floor
    if base.ceiling:
        yield base.ceiling
    if base.bracket:
        yield base.bracket.start
        yield base.bracket.stop


def _too_late(base: RecoveryPoint, time: datetime | None) -> str:
    """Give why the base may hold a commit later than `time`; "" where it surely does not.

    Every commit in a snapshot was stamped before the snapshot ended, by the database's clock; we know the end by
    ours. So a base counts only if it was sealed strictly before; and where the stamps of its own commit show that
    the database's clock is ahead of ours, they decide.
    """
    if time is None:
        raise RestoreError("a target of kind time has no time")
    if not (cuts := _cuts(base)):
        return "it is not known when it was cut"
    if (cut := max(cuts)) >= time:
        return f"it was cut until {cut.isoformat()}, not before {time.isoformat()}"
    if base.commit and base.commit.time_us >= to_microseconds(time):
        return f"it was taken for commit {base.commit.xid}, which is not before {time.isoformat()}"
    return ""


def _require_lineage(target: Target, lineage: Lineage) -> None:
    """Refuse a target that lies outside `lineage`; an abandoned end of a timeline has a lineage of its own."""
    place = Position(target.history, target.at if target.kind not in _OPEN else Lsn(0))
    if target.inclusive and target.kind not in _OPEN:
        place = Position(target.history, target.commit.end if target.commit else Lsn(target.at + 1))
    if not lineage.includes(place):
        forks = ", ".join(f"timeline {timeline} until {left_at}" for timeline, left_at in lineage.forks)
        raise RestoreError(
            f"{target.description} lies at {place}, in another lineage than {lineage.history}"
            + (f" ({forks} before)" if forks else ""),
            hint="the cluster was restored, failed over or replaced; name the commit by the history it was made in",
        )


def _held(extents: Sequence[Extent], lineage: Lineage, segment_bytes: int) -> list[Stretch]:
    """Give the stretches of log along `lineage` that the journal holds, joined, in order.

    A timeline's first file begins at a file boundary, with a copy of what its parent wrote there; so the journal may
    hold the shared bytes in either.
    """
    owned: dict[int, Stretch] = {}
    begin = Lsn(0)
    endless = Lsn((1 << 64) - 1)
    for timeline, left_at in (*lineage.forks, (lineage.history.timeline, endless)):
        owned[timeline] = Stretch(_file_start(begin, segment_bytes), left_at)
        begin = left_at
    joined: list[Stretch] = []
    for start, end in sorted(_owned_parts(extents, lineage, owned)):
        if joined and start <= joined[-1].end:
            joined[-1] = Stretch(joined[-1].start, max(end, joined[-1].end))
        else:
            joined.append(Stretch(start, end))
    return joined


def _owned_parts(extents: Sequence[Extent], lineage: Lineage, owned: dict[int, Stretch]) -> Iterable[Stretch]:
    for extent in extents:
        whole = owned.get(extent.history.timeline)
        if extent.history.system != lineage.history.system or whole is None:
            continue
        start, end = max(extent.start, whole.start), min(extent.end, whole.end)
        if start < end:
            yield Stretch(start, end)


def _first_hole(held: Sequence[Stretch], wanted: Stretch) -> Stretch | None:
    """Give the first stretch of `wanted` that is not in `held` (ordered, joined)."""
    at = wanted.start
    for stretch in held:
        if at >= wanted.end:
            return None
        if stretch.end <= at:
            continue
        if stretch.start > at:
            return Stretch(at, min(stretch.start, wanted.end))
        at = stretch.end
    return Stretch(at, wanted.end) if at < wanted.end else None


def _refusal(
    target: Target,
    bases: Sequence[RecoveryPoint],
    lineage: Lineage,
    held: Sequence[Stretch],
    holes: Sequence[tuple[RecoveryPoint, Stretch]],
) -> RestoreError:
    """Give the error that says why nothing fits, with the nearest thing that would."""
    if holes:
        base, hole = holes[0]
        last = held[-1].end if held else None
        if last is None or hole.start >= last:
            ends = "holds nothing yet" if last is None else f"ends at {last}"
            or_else = "; --to-latest needs less of it" if target.kind is StopKind.TIME else ""
            return RestoreError(
                f"{target.description} lies in the future of the journal, which {ends} and must reach {hole.end}",
                hint=f"wait until the journal has caught up (trigpoint status), or name an earlier target{or_else}",
                retryable=True,
            )
        return RestoreError(
            f"the log between {hole.start} and {hole.end} is missing"
            f" on the way from point {base.number} to {target.description}",
            hint="the journal lost these segments; put them back from an archive, or name a target before the hole",
        )
    mine = [base for base in bases if base.state is State.SEALED and base.ceiling and _inside(base, lineage)]
    if not mine:
        return RestoreError(
            f"there is no sealed recovery point in the lineage of {lineage.history} to start from"
            f" for {target.description}",
            hint="trigpoint list shows the points there are, with the history of each",
        )
    first = min(mine, key=_held_at_most)
    when = f", sealed {first.sealed_at.isoformat()}" if first.sealed_at else ""
    return RestoreError(
        f"no recovery point is early enough for {target.description}: the earliest is point {first.number},"
        f" which may hold log up to {_held_at_most(first)}{when}",
        hint=f"the earliest target that can be restored is --to-lsn {_held_at_most(first)}",
    )


def _inside(base: RecoveryPoint, lineage: Lineage) -> bool:
    return all(lineage.includes(position) for position in _places(base))


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
