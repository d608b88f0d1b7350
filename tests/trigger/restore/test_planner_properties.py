"""The planner against a model of PostgreSQL's recovery, over random histories with forks, bases and journals.

The model replays record by record under the rules of `xlogrecovery.c` as measured: a snapshot's own log is replayed
first, and a stop inside it is fatal; then the journal's files are read, newest timeline of the lineage first; the
end of the log before the stop is fatal. What lies between a base's floor and ceiling is unknown to the planner, so a
base is legal only if it gives the right state for every record boundary at which its snapshot may end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.errors import RestoreError
from trigger.model import (
    EPOCH,
    Bracket,
    Cause,
    CommitRecord,
    Extent,
    Mark,
    Outcome,
    RecoveryPoint,
    State,
    from_microseconds,
)
from trigger.position import History, Lineage, Name, Position
from trigger.replay import Target
from trigger.restore.planner import plan

SEGMENT = 64
SYSTEM = "7"


def file_start(position: Position) -> int:
    return position.at - position.at % SEGMENT


@dataclass(frozen=True)
class Record:
    """One record of the log; `time_us` is 0 for one that is not a commit."""

    timeline: int
    start: int
    end: int
    time_us: int


@dataclass(frozen=True)
class World:
    """The log of every timeline in full (what it shares with its parent included), and who forked where."""

    logs: dict[int, tuple[Record, ...]]
    parents: dict[int, tuple[int, int]]

    def lineage(self, timeline: int) -> Lineage:
        forks: list[tuple[int, Lsn]] = []
        at = timeline
        while at in self.parents:
            at, left_at = self.parents[at]
            forks.insert(0, (at, Lsn(left_at)))
        return Lineage(History("postgres", SYSTEM, timeline), tuple(forks))

    def boundaries(self, timeline: int) -> list[int]:
        return [self.logs[timeline][0].start, *(record.end for record in self.logs[timeline])]

    def begin(self, timeline: int) -> int:
        return self.parents[timeline][1] if timeline in self.parents else self.logs[timeline][0].start


class FatalError(Exception):
    """The server refuses to come up."""


def recover(
    world: World,
    files: set[tuple[int, int]],
    ends: dict[int, int],
    base: RecoveryPoint,
    ends_at: int,
    target: Target,
    *,
    as_cut: bool = False,
) -> list[Record]:
    """Give the records that the state holds after PostgreSQL recovered `base`, whose snapshot ends at `ends_at`."""
    own = [record for record in world.logs[base.floor.history.branch] if record.end <= ends_at]
    if as_cut:
        if base.bracket:
            raise FatalError("a bracketed copy has no end of its own")
        return own
    lineage = world.lineage(target.history.branch)
    tip = Position(base.floor.history, Lsn(ends_at))
    if not lineage.includes(tip):
        raise FatalError("requested timeline is not a child of this server's history")
    path = world.logs[target.history.branch]
    begin, local, consistent = ends_of(base, ends_at)
    state = [record for record in path if record.end <= begin]

    def held(record: Record) -> bool:
        return record.end <= local or readable(world, files, ends, target.history.branch, record)

    for record in takewhile(held, path[len(state) :]):
        if record.end <= local and not base.bracket:
            if stops_before(target, record) or stops_after(target, record):
                raise FatalError("requested recovery stop point is before consistent recovery point")
            state.append(record)
            continue
        if stops_before(target, record):
            break
        state.append(record)
        if stops_after(target, record):
            break
    else:
        if not target.is_latest:
            raise FatalError("recovery ended before configured recovery target was reached")
    if (state[-1].end if state else local) < consistent:
        raise FatalError("requested recovery stop point is before consistent recovery point")
    return state


def ends_of(base: RecoveryPoint, ends_at: int) -> tuple[int, int, int]:
    """Give where recovery of `base` begins, where the log that it has itself ends, and where it is consistent."""
    if base.bracket:
        return base.bracket.start.at, base.bracket.start.at, base.bracket.stop.at
    assert base.redo
    return base.redo.at, ends_at, ends_at


def stops_before(target: Target, record: Record) -> bool:
    if target.time is not None:
        return bool(record.time_us) and from_microseconds(record.time_us) > target.time
    return target.at is not None and not target.inclusive and record.start >= target.at


def stops_after(target: Target, record: Record) -> bool:
    return target.at is not None and target.inclusive and record.start >= target.at


def readable(world: World, files: set[tuple[int, int]], ends: dict[int, int], timeline: int, record: Record) -> bool:
    """Whether every byte of `record` can be read from the journal's files, newest timeline first."""
    for segment in range(record.start // SEGMENT, (record.end - 1) // SEGMENT + 1):
        family = [timeline]
        while family[-1] in world.parents:
            family.append(world.parents[family[-1]][0])
        file = next((t for t in family if (t, segment) in files and segment >= world.begin(t) // SEGMENT), None)
        last = min(record.end, (segment + 1) * SEGMENT)
        if file is None or ends[file] < last:
            return False
        if file not in _writers(world, timeline, max(record.start, segment * SEGMENT), last):
            return False
    return True


def _writers(world: World, timeline: int, start: int, end: int) -> set[int]:
    """Give the timelines whose files hold the bytes from `start` to `end` as `timeline` sees them."""
    writers = {timeline}
    while timeline in world.parents:
        timeline, left_at = world.parents[timeline]
        if end > left_at:
            break
        writers.add(timeline)
    return writers


@st.composite
def worlds(draw: st.DrawFn) -> World:
    logs: dict[int, tuple[Record, ...]] = {}
    parents: dict[int, tuple[int, int]] = {}
    for timeline in range(1, draw(st.sampled_from([1, 1, 2, 2, 3])) + 1):
        shared: tuple[Record, ...] = ()
        at = SEGMENT
        if timeline > 1:
            parent = draw(st.integers(1, timeline - 1))
            first_own = next(i for i, r in enumerate(logs[parent]) if r.timeline == parent)
            keep = draw(st.integers(first_own + 1, len(logs[parent])))
            shared = logs[parent][:keep]
            at = shared[-1].end
            parents[timeline] = (parent, at)
        own = []
        clock = 1000 * timeline
        for _ in range(draw(st.integers(3, 16))):
            size = draw(st.sampled_from([8, 16, 24, 40]))
            clock += draw(st.integers(-1, 3))
            own.append(Record(timeline, at, at + size, clock if draw(st.booleans()) else 0))
            at += size
        logs[timeline] = shared + tuple(own)
    return World(logs, parents)


@st.composite
def bases_of(draw: st.DrawFn, world: World, number: int) -> tuple[RecoveryPoint, list[int]]:
    """Give a base, and every place at which its snapshot may end for all that is known."""
    timeline = draw(st.sampled_from(sorted(world.logs)))
    history = History("postgres", SYSTEM, timeline)
    marks = [mark for mark in world.boundaries(timeline) if mark >= world.begin(timeline)]
    step = st.sampled_from([0, 0, 1, 2, 3])
    indexes = [draw(st.integers(0, len(marks) - 1)) // draw(st.integers(1, 4))]
    written = 1 if timeline in world.parents else 0  # a server writes a record when it begins a timeline
    for _ in range(3):
        indexes.append(max(indexes[-1] + draw(step), written))
    redo, first, second, third = (marks[min(index, len(marks) - 1)] for index in indexes)
    stamps = [r.time_us for r in world.logs[timeline] if r.end <= third]
    sealed_at = from_microseconds(max([*stamps, 0]) + draw(st.integers(0, 2)))
    bracket = None
    if draw(st.integers(0, 3)) == 0:
        bracket = Bracket(Position(history, Lsn(redo)), Position(history, Lsn(second)), {"label": "label"})
    point = RecoveryPoint(
        id=f"{number:026d}",
        number=number,
        state=State.SEALED if draw(st.integers(0, 9)) else State.EXPIRING,
        cause=Cause.COMMIT,
        marks=(
            Mark(Position(history, Lsn(first)), Position(history, Lsn(third)), Position(history, Lsn(redo)), bracket),
        ),
        opened_at=EPOCH,
        sealed_at=sealed_at,
    )
    return point, [mark for mark in marks if first <= mark <= third]


@st.composite
def journals(draw: st.DrawFn, world: World) -> tuple[set[tuple[int, int]], dict[int, int], list[Extent]]:
    """Give the files a journal holds, up to where it has come on each timeline, and the extents it reports."""
    files: set[tuple[int, int]] = set()
    ends: dict[int, int] = {}
    extents: list[Extent] = []
    for timeline in world.logs:
        marks = [mark for mark in world.boundaries(timeline) if mark >= world.begin(timeline)]
        ends[timeline] = draw(st.sampled_from(marks[-3:]))
        segments = range(world.begin(timeline) // SEGMENT, (ends[timeline] - 1) // SEGMENT + 1)
        kept = [segment for segment in segments if draw(st.integers(0, 11))]
        files |= {(timeline, segment) for segment in kept}
        for segment in kept:
            start, end = segment * SEGMENT, min((segment + 1) * SEGMENT, ends[timeline])
            if extents and extents[-1].end == start and extents[-1].history.branch == timeline:
                start = extents.pop().start
            extents.append(Extent(History("postgres", SYSTEM, timeline), Lsn(start), Lsn(end)))
    return files, ends, extents


@st.composite
def targets(draw: st.DrawFn, world: World) -> Target:
    """Give a target as the catalog would resolve it, with the end of the first record that stays out, if known."""
    timeline = draw(st.sampled_from(sorted(world.logs)))
    history = History("postgres", SYSTEM, timeline)
    log = world.logs[timeline]
    own = [record for record in log if record.timeline == timeline]
    kind = draw(st.sampled_from(["commit", "before", "position", "time", "latest"]))
    if kind == "latest":
        return Target(history, None, False, "the latest state")
    record = draw(st.sampled_from(own))
    following = {r.start: Lsn(r.end) for r in log}
    if kind == "commit":
        known = CommitRecord(
            "app", Name("", 1), Lsn(record.start), Lsn(record.end), record.time_us, (), Outcome.PROTECTED
        )
        return Target(history, Lsn(record.start), True, "a commit", commit=known)
    if kind == "before":
        return Target(history, Lsn(record.start), False, "before", reach=Lsn(record.end))
    if kind == "position":
        at = draw(st.sampled_from([mark for mark in world.boundaries(timeline) if mark >= world.begin(timeline)]))
        return Target(history, Lsn(at), False, "a position", reach=following.get(at))
    time_us = draw(st.sampled_from([r.time_us + step for r in own for step in (0, 1)]))
    time = from_microseconds(time_us)
    reach = next((Lsn(r.end) for r in log if r.time_us > time_us), None)
    return Target(history, None, True, "a time", time, reach=reach)


def wanted(world: World, target: Target) -> list[Record]:
    """Give the records of the state the target names, without any base: the definition of exact.

    The latest state is the longest beginning of it that there is.
    """

    def kept() -> Iterator[Record]:
        for record in world.logs[target.history.branch]:
            if stops_before(target, record):
                return
            yield record
            if stops_after(target, record):
                return

    return list(kept())


def gives(
    world: World,
    journal: tuple[set[tuple[int, int]], dict[int, int], list[Extent]],
    base: RecoveryPoint,
    may_end: list[int],
    target: Target,
    *,
    as_cut: bool,
) -> list[list[Record] | None]:
    """Give the state for every place at which the base may end; None where the server refuses."""
    states: list[list[Record] | None] = []
    for ends_at in may_end:
        try:
            states.append(recover(world, journal[0], journal[1], base, ends_at, target, as_cut=as_cut))
        except FatalError:
            states.append(None)
    return states


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_plan_gives_exactly_the_target_and_a_refusal_means_that_no_base_could(data: st.DataObject) -> None:
    world = data.draw(worlds())
    based = [data.draw(bases_of(world, number)) for number in range(1, data.draw(st.integers(1, 4)) + 1)]
    journal = data.draw(journals(world))
    target = data.draw(targets(world))
    state = wanted(world, target)
    may_end = {base.number: marks for base, marks in based}
    bases = [base for base, _ in based]
    lineage = world.lineage(target.history.branch)
    refused = ""
    try:
        found = plan(target, bases, journal[2], lineage, 1e6, file_start=file_start)
    except RestoreError as refusal:
        refused = refusal.message
    if refused:
        event(f"refused: {' '.join(refused.split()[:4])}")
        if target.is_latest:
            return  # what there is depends on the base; the unit tests have the refusals
        for base in bases:
            for as_cut in legal_uses(base, target):
                states = gives(world, journal, base, may_end[base.number], target, as_cut=as_cut)
                assert any(got != state for got in states), f"point {base.number} would have done: {refused}"
        return
    event(f"planned: {'as it was cut' if found.as_cut else found.target.kind}")
    assert found.target == target or (target.is_latest and found.as_cut and found.target.point == found.base.id)
    assert found.base.state is State.SEALED
    if target.time is not None and target.reach is None:
        return  # whether the time is reached at all is then the server's to find out
    for got in gives(world, journal, found.base, may_end[found.base.number], target, as_cut=found.as_cut):
        if target.is_latest:
            assert got is not None
            assert got == state[: len(got)]
            assert not any(readable(world, *journal[:2], target.history.branch, record) for record in state[len(got) :])
        else:
            assert got == state


def legal_uses(base: RecoveryPoint, target: Target) -> Iterator[bool]:
    """Give the ways in which a base may be used at all (as it was cut, or not), before the model is asked of them."""
    if base.state is not State.SEALED:
        return
    if target.time is not None:
        if base.sealed_at is not None and base.sealed_at < target.time:
            yield False
        return
    assert target.at is not None
    yield True
    may_hold_newer_pages = base.bracket and base.ceiling is not None and base.ceiling.at > target.at
    if not may_hold_newer_pages:
        yield False


def test_the_model_refuses_a_stop_inside_the_log_of_the_snapshot() -> None:
    records = tuple(Record(1, 64 + 8 * i, 72 + 8 * i, 1000 + i) for i in range(6))
    world = World({1: records}, {})
    history = History("postgres", SYSTEM, 1)
    base = RecoveryPoint(
        "0" * 26, 1, State.SEALED, Cause.COMMIT,
        (Mark(Position(history, Lsn(80)), Position(history, Lsn(96)), Position(history, Lsn(64))),), EPOCH,
    )  # fmt: skip
    target = Target(history, Lsn(88), True, "")
    with pytest.raises(FatalError, match="before consistent"):
        recover(world, {(1, 1)}, {1: 112}, base, 96, target)
    assert recover(world, {(1, 1)}, {1: 112}, base, 80, target) == list(records[:4])
