"""Decide how to bring a state back: the base snapshot, the log to replay, the estimate; or say exactly why not.

Pure. A database cannot roll back, and PostgreSQL refuses to stop inside the log that a base already holds ("requested
recovery stop point is before consistent recovery point"). A base therefore fits a target when everything it may
hold lies at or before the place where the replay stops, when all of it belongs to the past of the target, and when
the journal holds the log from there to the target without a hole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from trigger.errors import RestoreError, TooEarlyError
from trigger.model import GONE, Extent, Mark, RecoveryPoint, State, to_microseconds
from trigger.position import At, History, Lineage, Place, Position
from trigger.replay import Replay, Target
from trigger.restore.held_log import FileStart, Stretch, first_hole, last_held, stretches, unfiled
from trigger.restore.histories import based_beside, options
from trigger.shape import size

LACKS = "its snapshots do not hold all of the cluster: "
_OF_SNAPSHOTS = (GONE, LACKS)
_SHOWN = 5


class PassedOver(NamedTuple):
    """A base that was looked at before the chosen one, and why it does not serve."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a target is reached: what is cloned, what is replayed, and how long that should take."""

    target: Target
    base: RecoveryPoint
    as_cut: bool
    """Whether the base ends at the target by itself."""
    replay_from: Position
    """Where the server begins to replay: the redo position of the base, or the start of its bracket."""
    replay_to: At
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
    log_until: At
    """Up to here the log must be there; a time may need more of it."""

    @property
    def mark(self) -> Mark:
        """Where the base stands in the log of the target."""
        return _mark(self.base, self.target.history)

    @property
    def beside(self) -> list[str]:
        """Give what becomes of the other logs that the base stands in, one sentence each; none of them is replayed."""
        notes = []
        for mark in self.base.marks:
            if mark is not self.mark:
                is_copy = "a copy that only its own log makes whole" if mark.bracket else "as it was cut"
                held = f"holds everything up to {mark.floor.place}, and nothing behind"
                ends = mark.floor.history.place(mark.holds_at_most)
                notes.append(f"{mark.floor.history} is {is_copy}, not replayed: it {held} {ends}")
        return notes

    @property
    def without(self) -> list[str]:
        """Give the newer bases that would have served, one sentence each, were their snapshots there and whole."""
        named = [one for one in self.passed_over if one.reason.startswith(_OF_SNAPSHOTS)]
        return [f"point {one.number} is nearer, and left out: {one.reason}" for one in named]

    @property
    def replay(self) -> Replay:
        """What leads a clone of the base to the target."""
        mark, held = self.mark, self.mark.holds_at_most
        redo = mark.bracket.start if mark.bracket else mark.redo
        return Replay(self.target, self.log_from, self.log_until, mark.bracket, self.as_cut, held, redo)

    def describe(self) -> list[str]:
        """Give the plan in lines for people."""
        mark = self.mark
        kind = "bracketed copy" if mark.bracket else "atomic snapshot"
        lines = [
            f"target    {self.target.description}",
            f"base      point {self.base.number} ({kind}), holds everything up to {mark.floor.place}"
            f" and nothing behind {mark.ceiling.place if mark.ceiling else '?'}",
        ]
        if self.as_cut and not mark.bracket:
            lines.append("replay    none: the snapshot ends exactly at the target; crash recovery only")
        else:
            limit = "at most to" if self.target.time is not None else "to"
            lines.append(f"replay    from {self.replay_from} {limit} {self.target.history.place(self.replay_to)}")
            lines.append(f"journal   {size(self.log_bytes)} from {self.log_from.place}")
        lines += [f"beside    {note}" for note in self.beside]
        lines.append(f"estimate  {size(self.replay_bytes)} to replay, about {self.estimate_seconds:.1f} s")
        told = sorted(self.passed_over, key=lambda one: not one.reason.startswith(_OF_SNAPSHOTS))
        lines += [f"not       point {number}: {reason}" for number, reason in told[:_SHOWN]]
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
    file_start: FileStart = unfiled,
    left: bool = False,
    away: Mapping[str, str] = {},
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
        file_start: where the file of the log that holds a position begins; a log is read from there.
        left: the database has gone on in another history, so the journal comes no further in this one.
        away: by id why points are no base, since their snapshots are not there, or not whole: `GONE`, or `LACKS` what.

    Raises:
        RestoreError: the target lies outside the lineage, before the first base, beyond the journal, or behind a
            hole in it; the message names the bound and what can be restored instead. It is retryable where the
            journal may still come to the target.
    """
    there = [base for base in bases if base.id not in away]
    if target.point:
        return _by_itself(target, there, replay_bytes_per_second, file_start)
    _require_lineage(target, lineage)
    held = stretches(extents, lineage, file_start)
    needed = last_held(held) if target.is_latest else _needed(target)
    passed: list[PassedOver] = []
    holes: list[tuple[RecoveryPoint, Stretch]] = []
    for base in sorted(bases, key=lambda base: _newest_first(base, target.history)):
        mark = base.mark_in(target.history)
        exact = mark is not None and _ends_at(base, mark, target) and lineage.includes(mark.floor)
        if mark is None or (reason := "" if exact else _unfit(base, mark, target, lineage)):
            passed.append(PassedOver(base.number, reason if mark else "it holds nothing of that database"))
            continue
        begin = file_start(mark.log_from)
        hole = None if exact else first_hole(held, Stretch(begin, max(needed, _limit(mark, target))))
        ahead = target.is_latest and mark.bracket is None and needed < mark.holds_at_most
        if ahead and mark.floor.at < needed:  # nobody knows which of the two goes further
            hole = hole or Stretch(needed, mark.holds_at_most)
        if hole:
            holes.append((base, hole))
        if hole or base.id in away:
            reason = f"the log between {_between(hole, lineage)} is missing" if hole else away[base.id]
            passed.append(PassedOver(base.number, reason))
            continue
        if exact:
            return _as_it_is(base, target, replay_bytes_per_second, passed)
        if ahead:
            return _as_it_is(base, _cut_later(target, base, mark), replay_bytes_per_second, passed)
        log = Stretch(begin, _end(target, held, begin))
        return _replayed(base, target, log, replay_bytes_per_second, passed)
    refused = _refusal(target, there, lineage, held, holes, left=left)
    if gone := [str(one.number) for one in passed if one.reason == GONE][:_SHOWN]:
        refused.message += f"; it could be done from point {', '.join(gone)}, but {GONE}: if it was moved, put it back"
    raise refused


def own(point: RecoveryPoint) -> Target:
    """Give the target that is a sealed point's own snapshots, as far as they go by themselves, whatever its commit."""
    words, ends_at = f"the snapshot of point {point.number}", point.marks[0].holds_at_most
    return Target(point.floor.history, None, True, words, reach=ends_at, point=point.id)


def _cut_later(target: Target, base: RecoveryPoint, mark: Mark) -> Target:
    """Give the latest state where a snapshot has more log than is kept: that would take the place of its own."""
    words = f"{target.description}, which is point {base.number} as it was cut: it goes beyond the log"
    return replace(target, inclusive=True, description=words, reach=mark.holds_at_most, point=base.id)


def _by_itself(target: Target, bases: Sequence[RecoveryPoint], rate: float, file_start: FileStart) -> Plan:
    """Give the plan for a point as it was cut.

    What a bracketed copy needs to become consistent comes out of the journal; an atomic snapshot needs nothing.
    """
    base = next((base for base in bases if base.id == target.point and base.state is State.SEALED), None)
    if base is None:
        raise RestoreError(f"{target.description} is not there any more", hint="see trigpoint list, trigpoint check")
    bracket = _mark(base, target.history).bracket
    if bracket is None:
        return _as_it_is(base, target, rate, ())
    log = Stretch(file_start(bracket.start), bracket.stop.at)
    return _replayed(base, target, log, rate, (), as_cut=True)


class HeldLog:
    """The log of one history and of its past, as far as the journal holds it.

    Args:
        extents: what the journal holds.
        lineage: the past of the history.
        file_start: where the file of the log that holds a position begins.
    """

    def __init__(self, extents: Sequence[Extent], lineage: Lineage, file_start: FileStart = unfiled) -> None:
        self._lineage = lineage
        self._held = stretches(extents, lineage, file_start)
        self._file_start = file_start

    def leads(self, base: RecoveryPoint, point: RecoveryPoint, *, to_come: bool = False) -> bool:
        """Whether a replay from `base` comes past all that `point` holds, so that it brings back all that `point` can.

        Args:
            base: where the replay begins.
            point: lies in the history of this log.
            to_come: let log behind all that the journal holds count as held.
        """
        before, mark = base.mark_in(self._lineage.history), point.mark_in(self._lineage.history)
        if before is None or mark is None or not _is_within(before, mark):
            return False
        begin, end = self._file_start(before.log_from), mark.holds_at_most
        if mark.is_exact and before.holds_at_most < end:
            end += 1  # it is the state before what comes next, at the sight of which alone a replay stops there
        until = min(end, last_held(self._held)) if to_come else end
        if first_hole(self._held, Stretch(begin, until)) is not None:  # what is told soonest comes first
            return False
        return _inside(before, self._lineage) and _latest_stamp(base) <= _latest_stamp(point)


def _mark(base: RecoveryPoint, history: History) -> Mark:
    """Give where a base stands in the log of a history that it is known to hold."""
    mark = base.mark_in(history)
    assert mark is not None, f"point {base.number} holds nothing of {history}"
    return mark


def _is_within(base: Mark, point: Mark) -> bool:
    """Whether `base` surely holds no more than `point`, and is as exact where both may end at one place."""
    end, limit = base.holds_at_most, point.holds_at_most
    return end < limit or (end == limit and (base.is_exact or not point.is_exact))


def _latest_stamp(base: RecoveryPoint) -> int:
    """Give the time in microseconds behind which a base serves a target that is a time; see `_too_late`."""
    stamps = [*map(to_microseconds, _cuts(base)), *([base.commit.time_us] if base.commit else [])]
    return max(stamps, default=0)


def _cuts(base: RecoveryPoint) -> list[datetime]:
    """Give the times by our clock by which all that the base holds was cut; none where that is not known."""
    return [snapshot.ended_at for snapshot in base.snapshots] + ([base.sealed_at] if base.sealed_at else [])


def _as_it_is(base: RecoveryPoint, target: Target, rate: float, passed: Sequence[PassedOver]) -> Plan:
    mark = _mark(base, target.history)
    begin, end = mark.replay_from, mark.ceiling or mark.floor
    length = end.place.since(begin.at)
    return Plan(target, base, True, begin, end.place, end, 0, length, length / rate, tuple(passed), end.place)


def _replayed(
    base: RecoveryPoint,
    target: Target,
    log: Stretch,
    rate: float,
    passed: Sequence[PassedOver],
    *,
    as_cut: bool = False,
) -> Plan:
    mark, place = _mark(base, target.history), target.history.place
    begin, end = mark.replay_from, max(log.end, mark.floor.at)
    length = place(end).since(begin.at)
    until = max(_reaches(target), mark.holds_at_most) if target.at is not None or target.time else end
    log_bytes = place(log.end).since(log.start)
    ends_at, log_until, seconds = place(end), place(until), length / rate
    return Plan(
        target, base, as_cut, begin, ends_at, mark.log_from, log_bytes, length, seconds, tuple(passed), log_until
    )


def _newest_first(base: RecoveryPoint, history: History) -> tuple[int, int]:
    mark = base.mark_in(history)
    return -mark.holds_at_most if mark else 0, -base.number


def _reaches(target: Target) -> int:
    """Give up to where the log must be read for the target's own place; 0 where it has none."""
    if target.at is None:
        return 0
    whole = target.commit.end if target.inclusive and target.commit is not None else 0
    return max(target.at + 1, whole)  # the replay stops at sight of a record that begins at `at` or behind it


def _needed(target: Target) -> int:
    """Give up to where the log must be there, as far as the target itself says."""
    if target.reach is not None:
        return target.reach
    return target.commit.end if target.at is not None and target.inclusive and target.commit else _reaches(target)


def _limit(mark: Mark, target: Target) -> int:
    """Give up to where a replay from the base must see log, to be consistent and to have all that is known."""
    consistent = mark.bracket.stop.at if mark.bracket else 0
    known = target.reach if target.is_latest and target.reach else 0
    return max(consistent, known) if known > mark.floor.at else consistent


def _end(target: Target, held: Sequence[Stretch], begin: int) -> int:
    """Give where the replay ends; for a time a place by which it has gone past it."""
    if target.time is not None:
        return target.reach or next((stretch.end for stretch in held if stretch.start <= begin < stretch.end), begin)
    if target.at is None:
        return max(last_held(held), begin)
    return target.commit.end if target.inclusive and target.commit is not None else target.at


def _ends_at(base: RecoveryPoint, mark: Mark, target: Target) -> bool:
    """Whether the snapshot holds exactly the target: floor, ceiling and the end of the state are one place."""
    if base.state is not State.SEALED or not mark.is_exact or target.at is None:
        return False
    if not target.inclusive:
        return mark.floor.at == target.at
    return target.commit is not None and mark.floor.at == target.commit.end


def _unfit(base: RecoveryPoint, mark: Mark, target: Target, lineage: Lineage) -> str:
    """Give why a replay to the target cannot start from the base, whatever the journal holds; "" if it can."""
    if base.state is not State.SEALED or mark.ceiling is None:
        return f"it is {base.state}, not sealed"
    if not _inside(mark, lineage):
        return f"it belongs to {mark.ceiling}, which is not in the past of {lineage.history}"
    if target.time is not None and (late := _too_late(base, target.time)):
        return late
    if target.limit is not None and (ends := mark.holds_at_most) > target.limit:
        place = target.history.place
        return f"it may hold log up to {place(ends)}, beyond {place(target.limit)}"
    return ""


def _too_late(base: RecoveryPoint, time: datetime) -> str:
    """Give why the base may hold a commit later than `time`; "" where it surely does not.

    Every commit in a snapshot was stamped before the snapshot ended, by the database's clock; we know the end by
    ours. So a base counts only if it was sealed strictly before; and where the stamps of its own commit show that
    the database's clock is ahead of ours, they decide.
    """
    if not (cuts := _cuts(base)):
        return "it is not known when it was cut"
    if (cut := max(cuts)) >= time:
        return f"it was cut until {cut.isoformat()}, not before {time.isoformat()}"
    if base.commit and base.commit.time_us >= to_microseconds(time):
        return f"it was taken for commit {base.commit.name}, which is not before {time.isoformat()}"
    return ""


def _require_lineage(target: Target, lineage: Lineage) -> None:
    """Refuse a target that lies outside `lineage`; an abandoned end of a branch has a lineage of its own."""
    place = Position(target.history, target.at or 0)
    if target.at is not None and target.inclusive:
        place = Position(target.history, target.commit.end if target.commit else target.at + 1)
    if not lineage.includes(place):
        written = lineage.history.place
        forks = ", ".join(f"{lineage.branch(branch)} until {written(left_at)}" for branch, left_at in lineage.forks)
        raise RestoreError(
            f"{target.description} lies at {place}, in another lineage than {lineage.history}"
            + (f" ({forks} before)" if forks else ""),
            hint="the cluster was restored, failed over or replaced; name the commit by the history it was made in",
        )


def _refusal(
    target: Target,
    bases: Sequence[RecoveryPoint],
    lineage: Lineage,
    held: Sequence[Stretch],
    holes: Sequence[tuple[RecoveryPoint, Stretch]],
    *,
    left: bool,
) -> RestoreError:
    """Give the error that says why nothing fits, with the nearest thing that would."""
    written = lineage.history.place
    if holes:
        base, hole = holes[0]
        last = held[-1].end if held else None
        if last is None or hole.start >= last:
            return _beyond(target, lineage, None if last is None else written(last), written(hole.end), left=left)
        return RestoreError(
            f"the log between {_between(hole, lineage)} is missing"
            f" on the way from point {base.number} to {target.description}",
            hint="the journal lost these segments; put them back from an archive, or name a target before the hole",
        )
    marks = [(base, mark) for base in bases if (mark := base.mark_in(lineage.history)) and base.state is State.SEALED]
    mine = [(mark.holds_at_most, base) for base, mark in marks if mark.ceiling and _inside(mark, lineage)]
    if not mine:
        return RestoreError(
            f"there is no sealed recovery point in the lineage of {lineage.history} to start from"
            f" for {target.description}",
            hint="trigpoint list shows the points there are, with the history of each",
        )
    ends_at, first = min(mine, key=lambda one: one[0])
    when = f", sealed {first.sealed_at.isoformat()}" if first.sealed_at else ""
    taken_for = _mark(first, lineage.history).floor.at
    its_own = target.at is not None and taken_for in (target.at, _needed(target))
    which = f"its own, point {first.number}, is" if its_own else f"the earliest is point {first.number}, which"
    what = f"{which} {'the earliest, and ' if its_own else ''}may hold log up to {written(ends_at)}{when}"
    hint = f"the earliest target that can be restored is --to-lsn {written(ends_at)}"
    if target.time is not None:
        early = [base for base in bases if base.state is State.SEALED and not _too_late(base, target.time)]
        if others := based_beside(early, lineage):
            hint = f"points of other histories are early enough: {options(others)}; of {lineage.history} {hint}"
    return TooEarlyError(f"no recovery point is early enough for {target.description}: {what}", hint=hint)


def _beyond(target: Target, lineage: Lineage, last: Place | None, needed: Place, *, left: bool) -> RestoreError:
    """Give the error for a target to which the journal has not come, or never will; `last` is where it ends."""
    ends = "holds nothing yet" if last is None else f"ends at {last}"
    if left:
        return RestoreError(
            f"{target.description} lies behind all that the journal has of {lineage.history}: it {ends}, and the"
            f" database has gone on in another history, so that it never reaches {needed}",
            hint="name an earlier target: what was not received before that history was left is lost",
        )
    caught_up = "wait until the journal has caught up (trigpoint status); while no service runs it comes no further"
    if last is None:  # it was lost, or has not begun
        caught_up = (
            f"start the database and the service, which brings what the database still keeps for it, and {caught_up}"
        )
    or_else = "; --to-latest needs less of it" if target.time is not None else ""
    return RestoreError(
        f"{target.description} lies in the future of the journal, which {ends} and must reach {needed}",
        hint=f"{caught_up}, or name an earlier target{or_else}",
        retryable=True,
    )


def _between(hole: Stretch, lineage: Lineage) -> str:
    return f"{lineage.history.place(hole.start)} and {lineage.history.place(hole.end)}"


def _inside(mark: Mark, lineage: Lineage) -> bool:
    return all(lineage.includes(position) for position in mark.positions)
