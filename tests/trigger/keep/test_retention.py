"""Thinning never makes a commit unreachable, or reachable only beyond the restore objective."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise, zip_longest

from hypothesis import given
from hypothesis import strategies as st

from trigger.errors import RestoreError
from trigger.keep.retention import Leads, longest_replay, thin
from trigger.model import Cause, Extent, Mark, RecoveryPoint, State
from trigger.point_names import point_id
from trigger.position import History, Lineage, Position
from trigger.replay import Target
from trigger.restore.planner import HeldLog, plan

SEGMENT = 200
"""Small, so that holes in the log lie between the points."""
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LIMIT = 10_000


def file_start(position: Position) -> int:
    return position.at - position.at % SEGMENT


def point(number: int, redo: int, floor: int, ceiling: int, timeline: int = 1) -> RecoveryPoint:
    """Give a sealed point; a redo before 0 stands for one that is not known."""
    history = History("memory", "7001", timeline)
    return RecoveryPoint(
        id=point_id(NOON, number),
        number=number,
        state=State.SEALED,
        cause=Cause.COMMIT,
        marks=(
            Mark(
                Position(history, floor),
                Position(history, ceiling),
                Position(history, redo) if redo >= 0 else None,
            ),
        ),
        opened_at=NOON,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[RecoveryPoint]:
    """Give points as they are taken: floors and ceilings rise, redo follows at times, a timeline may end."""
    points: list[RecoveryPoint] = []
    end, redo, timeline = 1000, 1000, 1
    for number in range(1, draw(st.integers(0, 30)) + 1):
        if draw(st.integers(0, 9)) == 0:
            timeline += 1
        floor = end + draw(st.integers(0, 4000))
        end = floor + draw(st.integers(0, 50))
        if draw(st.booleans()):
            redo = draw(st.integers(redo, floor))
        known = draw(st.integers(0, 19)) > 0
        points.append(point(number, redo if known else -1, floor, end, timeline))
    return points


def replay_to(commit: int, bases: Sequence[RecoveryPoint]) -> tuple[RecoveryPoint, int] | None:
    """Give the base that a commit which ends there is replayed from, and how much log that is."""
    place = bisect_right([base.ceiling.at for base in bases if base.ceiling], commit)
    base = bases[place - 1] if place else None
    return (base, commit - base.redo.at) if base and base.redo else None


def whole(points: Sequence[RecoveryPoint]) -> list[Extent]:
    """Give all the log there is, of every timeline to its end."""
    return [Extent(history, 0, 1 << 40) for history in lineages_of(points)]


def over(points: Sequence[RecoveryPoint], extents: Sequence[Extent]) -> tuple[Leads, Leads]:
    """Give what leads from where to where by the log of `extents`; none is to come."""
    logs = {history: HeldLog(extents, lineage, file_start) for history, lineage in lineages_of(points).items()}

    def leads(base: RecoveryPoint, point: RecoveryPoint) -> bool:
        return logs[point.floor.history].leads(base, point)

    return leads, leads


def left_after(points: Sequence[RecoveryPoint], most: int, pinned: Sequence[str] = ()) -> list[RecoveryPoint]:
    goes = thin(points, most, len(points), LIMIT, *over(points, whole(points)), pinned)
    assert [one.number for one in goes] == sorted(one.number for one in goes)
    assert all(one in points for one in goes)
    return [one for one in points if one not in goes]


@given(histories(), st.integers(0, 20))
def test_every_commit_between_the_oldest_and_the_newest_base_stays_within_the_objective(
    points: list[RecoveryPoint], most: int
) -> None:
    left = left_after(points, most)
    for one in points[1:]:
        assert one.ceiling is not None
        commit = one.ceiling.at - 1  # the last one that this base cannot serve
        before, now = replay_to(commit, points), replay_to(commit, left)
        if before is None or now is None or before[0] is now[0]:
            continue  # nothing has changed for it
        assert now[1] <= LIMIT
        if before[0].floor.history == one.floor.history:
            assert now[0].floor.history == one.floor.history, "a replay that was within one timeline leads over two"


@given(histories(), st.integers(0, 20), st.data())
def test_the_oldest_the_newest_and_what_is_pinned_never_go(
    points: list[RecoveryPoint], most: int, data: st.DataObject
) -> None:
    pinned = [one.id for one in points if data.draw(st.booleans())]
    left = left_after(points, most, pinned)
    assert left[:1] == points[:1]
    assert left[-1:] == points[-1:]
    assert set(pinned) <= {one.id for one in left}


@given(histories(), st.integers(0, 20))
def test_it_stops_at_what_was_asked_for_and_before_only_where_nothing_more_can_go(
    points: list[RecoveryPoint], most: int
) -> None:
    left = left_after(points, most)
    if len(points) <= most:
        assert left == points
    elif len(left) <= most:
        assert len(left) == max(most, min(len(points), 2))
    else:
        leads, _ = over(points, whole(points))
        for before, one, after in zip(left, left[1:], left[2:], strict=False):
            if not leads(before, one):
                continue  # they may end at one place, and only this one is known to
            same = before.floor.history == one.floor.history == after.floor.history
            assert after.ceiling is not None
            assert not same or before.redo is None or after.ceiling.at - before.redo.at > LIMIT, (
                f"point {one.number} could go"
            )


def test_where_two_may_go_the_one_that_is_missed_least_goes() -> None:
    points = [point(1, 0, 0, 0), point(2, 100, 100, 100), point(3, 200, 200, 200), point(4, 5000, 5000, 5000)]
    assert [one.number for one in thin(points, 3, 4, LIMIT, *over(points, whole(points)))] == [2]


def test_without_a_limit_that_allows_it_nothing_goes() -> None:
    points = [point(number, number * LIMIT, number * LIMIT, number * LIMIT) for number in range(5)]
    leads = over(points, whole(points))
    assert thin(points, 2, 5, LIMIT, *leads) == []
    assert [one.number for one in thin(points, 2, 5, 4 * LIMIT, *leads)] == [1, 2, 3]


def test_a_snapshot_that_is_exactly_a_commit_stays_where_the_one_before_may_hold_more() -> None:
    sure, unsure, exact, last = (point(n, 0, floor, 1080) for n, floor in ((1, 1080), (2, 1000), (3, 1080), (4, 1080)))
    assert thin([unsure, exact, last], 2, 2, LIMIT, *over([unsure, exact, last], whole([exact]))) == []
    assert thin([sure, exact, last], 2, 2, LIMIT, *over([sure, exact, last], whole([exact]))) == [exact]


@given(histories(), st.integers(0, 20), st.integers(0, 20))
def test_what_a_storage_cannot_bear_goes_beyond_the_objective(
    points: list[RecoveryPoint], wanted: int, most: int
) -> None:
    held, to_come = over(points, whole(points))
    goes = thin(points, wanted, most, LIMIT, held, to_come)
    left = [one for one in points if one not in goes]
    assert left[:1] == points[:1]
    assert left[-1:] == points[-1:]
    if len(left) > max(most, 2):
        for index, one in enumerate(left[1:-1], start=1):
            before = next((base for base in reversed(left[:index]) if held(base, one)), None)
            assert before is None or before.redo is None, f"point {one.number} could go"
    if len(left) < most:
        assert longest_replay(left) <= max(LIMIT, longest_replay(points)), "the objective was broken without need"


def test_beyond_the_objective_the_older_a_commit_the_longer_its_replay() -> None:
    kept: list[RecoveryPoint] = []
    for number in range(1000):
        kept.append(point(number, number * LIMIT, number * LIMIT, number * LIMIT))
        goes = thin(kept, 14, 18, LIMIT, lambda *_: True, lambda *_: True)
        kept = [one for one in kept if one not in goes]
    assert (len(kept), kept[0].number, kept[-1].number) == (18, 0, 999)
    gaps = [after.number - before.number for before, after in pairwise(kept)]
    assert gaps[-3:] == [1, 1, 1], "what was just committed comes back at once"
    assert gaps[0] > 50
    assert all(older >= newer / 2 for older, newer in pairwise(gaps)), gaps


@given(histories(), st.integers(2, 20))
def test_what_goes_over_a_switch_of_timelines_leaves_a_base_in_the_past_of_all_that_it_served(
    points: list[RecoveryPoint], most: int
) -> None:
    lineages = lineages_of(points)
    goes = thin(points, most, most, LIMIT, *over(points, whole(points)))
    left = [one for one in points if one not in goes]
    for gone in goes:
        past = lineages[gone.floor.history]
        bases = [base for base in left if base.ceiling and base.number < gone.number and past.includes(base.ceiling)]
        assert bases, f"nothing serves what point {gone.number} served"
    if all(one.redo is not None for one in points):
        assert len(left) <= max(most, 2), "every timeline goes back to the first, so everything between may go"


@given(histories(), st.integers(2, 20), st.lists(st.integers(0, 600), max_size=5))
def test_with_holes_in_the_log_every_state_that_could_be_restored_still_can(
    points: list[RecoveryPoint], most: int, holes: list[int]
) -> None:
    lost = sorted({hole * SEGMENT for hole in holes})
    stretches = zip([0, *(hole + SEGMENT for hole in lost)], [*lost, 1 << 40], strict=True)
    held = [(start, end) for start, end in stretches if start < end]
    extents = [Extent(one.history, start, end) for one in whole(points) for start, end in held]
    lineages = lineages_of(points)
    goes = thin(points, most, most, LIMIT, *over(points, extents))
    left = [one for one in points if one not in goes]
    for gone in goes:
        assert gone.ceiling is not None
        for at in (gone.ceiling.at - 1, gone.ceiling.at, gone.ceiling.at + 500):
            target = Target(gone.ceiling.history, at, False, f"what lies before {at}")
            if planned(target, points, extents, lineages):
                assert planned(target, left, extents, lineages), f"{at} was lost with point {gone.number}"


def planned(
    target: Target, points: Sequence[RecoveryPoint], extents: Sequence[Extent], lineages: dict[History, Lineage]
) -> bool:
    """Whether there is a way to a target."""
    try:
        plan(target, points, extents, lineages[target.history], 1.0, file_start=file_start)
    except RestoreError:
        return False
    return True


def lineages_of(points: Sequence[RecoveryPoint]) -> dict[History, Lineage]:
    """Give the past of each timeline: it left the one before behind its last point."""
    found: dict[History, Lineage] = {}
    forks: tuple[tuple[int, int], ...] = ()
    for one, after in zip_longest(points, points[1:]):
        history = one.floor.history
        found[history] = Lineage(history, forks)
        if after is not None and after.floor.history != history and one.ceiling:
            forks = (*forks, (history.branch, one.ceiling.at))
    return found


def two_logs(number: int, near: int, far: int) -> RecoveryPoint:
    """Give a point that stands in two logs."""
    one, other = point(number, near, near, near), point(number, far, far, far)
    (mark,) = other.marks
    elsewhere = History("memory", "7002", 1)
    there = Position(elsewhere, far)
    return replace(one, marks=(*one.marks, replace(mark, floor=there, ceiling=there, redo=there)))


def test_a_point_of_two_logs_goes_only_where_both_lead_past_it_and_within_the_objective() -> None:
    points = [two_logs(1, 0, 0), two_logs(2, 100, 100), two_logs(3, 200, 200)]
    logs = [mark.floor.history for mark in points[0].marks]

    def going(held: Sequence[History], most: int = 3, among: Sequence[RecoveryPoint] = points) -> list[int]:
        room = [HeldLog([Extent(h, 0, 1 << 40)] if h in held else [], Lineage(h), file_start) for h in logs]

        def leads(base: RecoveryPoint, point: RecoveryPoint) -> bool:
            return all(log.leads(base, point) for log in room)

        return [one.number for one in thin(among, 2, most, LIMIT, leads, leads)]

    assert going(logs) == [2]
    assert going(logs[:1]) == going(logs[1:]) == going(logs[:1], most=2) == []
    far = [two_logs(1, 0, 0), two_logs(2, 100, LIMIT), two_logs(3, 200, 2 * LIMIT)]
    assert going(logs, among=far) == [], "the second log would have too much to replay"
    assert going(logs, most=2, among=far) == [2]
