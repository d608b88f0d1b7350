"""What the planner decides and says, case by case; `test_planner_properties` has the general claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from connectors.databases.postgres.lsn import Lsn
from trigger.errors import RestoreError
from trigger.model import (
    GONE,
    Bracket,
    Cause,
    CommitRecord,
    Extent,
    Mark,
    Outcome,
    RecoveryPoint,
    State,
)
from trigger.position import History, Lineage, Name, Position
from trigger.replay import Target
from trigger.restore.planner import HeldLog, Plan, own, plan

SEGMENT = 0x1000
HISTORY = History("postgres", "7", 1)
LINEAGE = Lineage(HISTORY)
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
WHOLE = (Extent(HISTORY, Lsn(0x1000), Lsn(0x9000)),)


def file_start(position: Position) -> int:
    return position.at - position.at % SEGMENT


def at(lsn: int, history: History = HISTORY) -> Position:
    return Position(history, Lsn(lsn))


def base(number: int, floor: int, ceiling: int, *, redo: int = 0x1000, history: History = HISTORY) -> RecoveryPoint:
    return RecoveryPoint(
        id=f"{number:026d}",
        number=number,
        state=State.SEALED,
        cause=Cause.COMMIT,
        marks=(Mark(at(floor, history), at(ceiling, history), at(redo, history)),),
        opened_at=NOON,
        sealed_at=NOON + timedelta(minutes=number),
    )


def bracketed(cut: RecoveryPoint, start: int, stop: int) -> RecoveryPoint:
    mark = replace(cut.marks[0], bracket=Bracket(at(start), at(stop), {"label": "label"}))
    return replace(cut, marks=(mark,))


def commit(start: int, end: int) -> Target:
    record = CommitRecord("bank", Name("", 77), Lsn(start), Lsn(end), 0, (), Outcome.PROTECTED)
    return Target(HISTORY, Lsn(start), True, "commit 77", commit=record)


def before(lsn: int, history: History = HISTORY) -> Target:
    return Target(history, Lsn(lsn), False, "before commit 77")


def make(
    target: Target,
    *bases: RecoveryPoint,
    extents: tuple[Extent, ...] = WHOLE,
    left: bool = False,
    away: Mapping[str, str] = {},
) -> Plan:
    return plan(target, bases, extents, LINEAGE, 1000.0, file_start=file_start, left=left, away=away)


def test_the_newest_base_that_ends_before_the_commit_record_is_chosen() -> None:
    found = make(commit(0x3000, 0x3030), base(1, 0x2000, 0x2100), base(2, 0x2F00, 0x3000), base(3, 0x3000, 0x3040))
    assert found.base.number == 2
    assert [number for number, _ in found.passed_over] == [3]
    assert found.passed_over[0].reason == "it may hold log up to 0/3040, beyond 0/3000"
    assert (found.replay_from, found.replay_to, found.log_from) == (at(0x1000), 0x3030, at(0x2F00))
    assert (found.log_bytes, found.replay_bytes) == (0x3030 - 0x2000, 0x3030 - 0x1000)
    assert found.estimate_seconds == pytest.approx(0x2030 / 1000)


def test_a_base_whose_snapshot_is_gone_is_passed_over_and_named() -> None:
    oldest, older, nearest = base(1, 0x2000, 0x2100), base(2, 0x2800, 0x2900), base(3, 0x2F00, 0x3000)
    ended, late = base(4, 0x3030, 0x3030), base(5, 0x3100, 0x3200)
    away = dict.fromkeys((one.id for one in (older, nearest, ended, late)), GONE)
    found = make(commit(0x3000, 0x3030), oldest, older, nearest, ended, late, away=away)
    assert (found.base.number, found.as_cut) == (1, False)
    gone = "its snapshot is gone from the storage"
    assert [number for number, reason in found.passed_over if reason == gone] == [4, 3, 2]
    assert found.without == [f"point {number} is nearer, and left out: {gone}" for number in (4, 3, 2)]
    newer = [base(number, 0x4000, 0x4100 + number) for number in range(6, 16)]
    found = make(commit(0x3000, 0x3030), oldest, nearest, *newer, away=away)
    assert "not       point 3: its snapshot is gone from the storage" in found.describe(), (
        "though there are many others"
    )
    early = (Extent(HISTORY, Lsn(0x3000), Lsn(0x9000)),)
    with pytest.raises(RestoreError, match="is missing on the way") as refused:
        make(commit(0x3000, 0x3030), oldest, nearest, late, extents=early, away=away)
    assert "could be done" not in str(refused.value), "nor could it be from that one"
    with pytest.raises(RestoreError, match=f"early enough .*; it could be done from point 3, 2, but {gone}"):
        make(commit(0x3000, 0x3030), older, nearest, late, away={older.id: GONE, nearest.id: GONE})
    with pytest.raises(RestoreError, match="is not there any more"):
        make(own(nearest), nearest, away=away)


def test_a_snapshot_that_ends_exactly_at_the_commit_is_used_as_it_is() -> None:
    found = make(commit(0x3000, 0x3030), base(1, 0x2000, 0x2100), base(2, 0x3030, 0x3030), extents=())
    assert (found.base.number, found.as_cut, found.log_bytes) == (2, True, 0)
    assert found.target.at == 0x3000
    assert found.replay_bytes == 0x3030 - 0x1000


def test_a_snapshot_that_may_end_a_byte_behind_the_commit_is_not_used() -> None:
    with pytest.raises(RestoreError, match="early enough"):
        make(commit(0x3000, 0x3030), base(1, 0x3030, 0x3038))


def test_a_snapshot_that_may_end_before_the_commit_is_not_taken_for_the_commit() -> None:
    """Its ceiling is the commit's end, but nothing proves that its own log reaches there."""
    with pytest.raises(RestoreError, match="early enough"):
        make(commit(0x3000, 0x3030), base(1, 0x2F00, 0x3030))


def test_the_same_number_on_another_timeline_is_not_the_same_place() -> None:
    other = base(1, 0x3030, 0x3030, history=History("postgres", "7", 2))
    with pytest.raises(RestoreError, match="no sealed recovery point in the lineage"):
        make(commit(0x3000, 0x3030), other)


def test_the_state_before_a_commit_may_start_from_a_base_that_ends_where_it_begins() -> None:
    found = make(before(0x3000), base(1, 0x2F00, 0x3000))
    assert (found.base.number, found.as_cut, found.replay_to) == (1, False, 0x3000)


def test_a_bracketed_copy_is_replayed_from_the_start_of_its_bracket() -> None:
    copied = bracketed(base(1, 0x2000, 0x2800), 0x1800, 0x2700)
    found = make(commit(0x3000, 0x3030), copied)
    assert (found.replay_from, found.log_from, found.log_bytes) == (at(0x1800), at(0x1800), 0x2030)


def test_a_bracketed_copy_is_never_taken_for_one_that_ends_at_the_target() -> None:
    copied = bracketed(base(1, 0x2800, 0x2800), 0x1800, 0x2700)
    assert not make(before(0x2800), copied).as_cut


def test_a_bracket_that_stops_behind_the_target_does_not_serve() -> None:
    copied = bracketed(base(1, 0x2000, 0x2100), 0x1800, 0x3010)
    with pytest.raises(RestoreError, match="early enough"):
        make(commit(0x3000, 0x3030), copied)


def test_a_time_starts_from_a_base_sealed_strictly_before_it() -> None:
    target = Target(HISTORY, None, True, "noon", NOON + timedelta(minutes=2))
    later = replace(target, reach=Lsn(0x4000))
    found = make(later, base(1, 0x2000, 0x2100), base(2, 0x2F00, 0x3000))
    assert (found.base.number, found.log_until, found.replay_to) == (1, 0x2100, 0x4000)
    assert make(target, base(1, 0x2000, 0x2100)).replay_to == 0x9000


def test_a_time_starts_from_no_base_behind_the_first_commit_that_is_later_whenever_that_was_cut() -> None:
    target = Target(HISTORY, None, True, "noon", NOON + timedelta(hours=1), reach=Lsn(0x2F30), later=Lsn(0x2F00))
    behind, around = base(3, 0x3000, 0x3100), base(2, 0x2E00, 0x2F01)
    found = make(target, base(1, 0x2000, 0x2100), around, behind)
    assert found.base.number == 1
    assert [(one.number, one.reason) for one in found.passed_over] == [
        (3, "it may hold log up to 0/3100, beyond 0/2F00"),
        (2, "it may hold log up to 0/2F01, beyond 0/2F00"),
    ]


LATEST = Target(HISTORY, None, False, "the latest state")


def test_the_latest_state_is_the_newest_base_and_all_the_log_behind_it() -> None:
    found = make(LATEST, base(1, 0x2000, 0x2100), base(2, 0x2F00, 0x3000))
    assert (found.base.number, found.target, found.log_until) == (2, LATEST, 0x9000)
    assert (found.replay_to, found.replay_bytes) == (0x9000, 0x9000 - 0x1000)


def test_the_latest_state_is_no_less_than_a_snapshot_where_the_log_that_is_kept_ends_before_it() -> None:
    bases = (base(1, 0x2000, 0x2100), base(2, 0x2F00, 0x3000))
    for end in (0x1800, 0x2F00):
        found = make(LATEST, *bases, extents=(Extent(HISTORY, Lsn(0x1000), Lsn(end)),))
        assert (found.base.number, found.as_cut, found.target.point) == (2, True, bases[1].id)
        assert found.target.description == "the latest state, which is point 2 as it was cut: it goes beyond the log"
    found = make(LATEST, *bases, extents=(Extent(HISTORY, Lsn(0x1000), Lsn(0x3000)),))
    assert (found.base.number, found.as_cut, found.target) == (2, False, LATEST)
    found = make(LATEST, base(1, 0x2000, 0x2100), extents=())
    assert (found.base.number, found.as_cut) == (1, True)


def test_the_latest_state_is_replayed_from_before_a_snapshot_that_may_end_before_or_behind_the_log() -> None:
    bases, between = (base(1, 0x2000, 0x2100), base(2, 0x2F00, 0x3000)), Extent(HISTORY, Lsn(0x1000), Lsn(0x2F08))
    found = make(LATEST, *bases, extents=(between,))
    assert (found.base.number, found.target, found.log_until) == (1, LATEST, 0x2F08)
    with pytest.raises(RestoreError, match="ends at 0/2F08 and must reach 0/3000") as refused:
        make(LATEST, bases[1], extents=(between,))
    assert refused.value.retryable


def test_a_latest_state_without_a_commit_that_is_known_is_refused() -> None:
    known = replace(LATEST, reach=Lsn(0x2F40))
    behind = (Extent(HISTORY, Lsn(0x1000), Lsn(0x2F30)),)
    with pytest.raises(RestoreError, match="ends at 0/2F30 and must reach 0/2F40"):
        make(known, base(1, 0x2000, 0x2100), extents=behind)
    assert make(known, base(1, 0x2000, 0x2100), base(2, 0x2F40, 0x3000), extents=behind).base.number == 2


def test_a_copy_that_the_log_does_not_make_consistent_yet_is_not_the_latest_state() -> None:
    behind = (Extent(HISTORY, Lsn(0x1000), Lsn(0x2800)),)
    copied = bracketed(base(2, 0x2000, 0x2900), 0x1800, 0x2900)
    found = make(LATEST, base(1, 0x2000, 0x2100), copied, extents=behind)
    assert (found.base.number, found.replay_to) == (1, 0x2800)


def test_the_latest_state_is_refused_where_a_hole_lies_before_the_end_of_the_log() -> None:
    holed = (Extent(HISTORY, Lsn(0x1000), Lsn(0x4000)), Extent(HISTORY, Lsn(0x5000), Lsn(0x9000)))
    with pytest.raises(RestoreError, match="the log between 0/4000 and 0/5000 is missing"):
        make(LATEST, base(1, 0x2000, 0x2100), extents=holed)


def test_a_base_whose_commit_is_stamped_behind_the_time_does_not_serve_whatever_our_clock_says() -> None:
    ahead = CommitRecord(
        "bank", Name("", 7), Lsn(1), Lsn(2), int(NOON.timestamp() + 7200) * 10**6, (), Outcome.PROTECTED
    )
    target = Target(HISTORY, None, True, "one", NOON + timedelta(hours=1))
    with pytest.raises(RestoreError, match="early enough"):
        make(target, replace(base(1, 0x2000, 0x2100), commit=ahead))


def test_a_refusal_names_the_earliest_state_that_can_be_restored() -> None:
    with pytest.raises(RestoreError) as refusal:
        make(commit(0x1000, 0x1030), base(2, 0x2F00, 0x3000), base(1, 0x2000, 0x2100))
    assert "the earliest is point 1, which may hold log up to 0/2100" in refusal.value.message
    assert refusal.value.hint == "the earliest target that can be restored is --to-lsn 0/2100"


def test_a_refusal_for_what_the_earliest_point_was_taken_for_says_that_it_is_its_own() -> None:
    own = Target(HISTORY, Lsn(0x2000), False, "point 1: the state at 0/2000")
    for target in (own, commit(0x1FD0, 0x2000)):
        with pytest.raises(RestoreError, match="its own, point 1, is the earliest, and may hold log up to 0/2100"):
            make(target, base(1, 0x2000, 0x2100))


def test_a_target_that_a_history_which_was_left_never_comes_to_is_not_waited_for() -> None:
    with pytest.raises(RestoreError, match=r"it ends at 0/9000, and the.* has gone on in another history") as refused:
        make(commit(0x9000, 0x9030), base(1, 0x2000, 0x2100), left=True)
    assert not refused.value.retryable


def test_a_refusal_names_the_missing_log() -> None:
    torn = (Extent(HISTORY, Lsn(0x1000), Lsn(0x3000)), Extent(HISTORY, Lsn(0x5000), Lsn(0x9000)))
    with pytest.raises(RestoreError, match=r"the log between 0/3000 and 0/5000 is missing on the way from point 1"):
        make(commit(0x6000, 0x6030), base(1, 0x2000, 0x2100), extents=torn)


def test_a_base_behind_the_hole_is_used() -> None:
    torn = (Extent(HISTORY, Lsn(0x1000), Lsn(0x3000)), Extent(HISTORY, Lsn(0x5000), Lsn(0x9000)))
    bases = base(1, 0x2000, 0x2100), base(2, 0x5100, 0x5200), base(3, 0x2800, 0x2900)
    assert make(commit(0x6000, 0x6030), *bases, extents=torn).base.number == 2


def test_a_refusal_says_that_the_target_is_in_the_future_of_the_journal() -> None:
    with pytest.raises(RestoreError, match=r"in the future of the journal, which ends at 0/9000 and must reach 0/9030"):
        make(commit(0x9000, 0x9030), base(1, 0x2000, 0x2100))


def test_a_journal_that_holds_nothing_yet_has_lost_nothing() -> None:
    with pytest.raises(RestoreError, match=r"in the future of the journal, which holds nothing yet") as refused:
        make(commit(0x3000, 0x3030), base(1, 0x2000, 0x2100), extents=())
    assert refused.value.retryable
    assert "start the database and the service" in refused.value.hint  # its journal may have been lost


def test_the_journal_must_reach_the_end_of_the_commit_record() -> None:
    with pytest.raises(RestoreError, match="future"):
        make(commit(0x8FF0, 0x9020), base(1, 0x2000, 0x2100))
    assert make(commit(0x8FD0, 0x9000), base(1, 0x2000, 0x2100)).replay_to == 0x9000


def test_a_base_leads_to_a_point_by_the_log_up_to_what_the_point_holds_and_to_a_state_by_what_comes_next() -> None:
    log = HeldLog([Extent(HISTORY, 0, 0x3000)], Lineage(HISTORY), file_start)  # which goes on no more
    state = base(3, 0x3000, 0x3000)
    assert log.leads(base(1, 0x2000, 0x2000), base(2, 0x2800, 0x3000))
    assert not log.leads(base(1, 0x2000, 0x2000), state), "a replay cannot stop before a record that is not there"
    assert log.leads(base(2, 0x3000, 0x3000), state)
    assert not log.leads(base(2, 0x2800, 0x3000), state)


def test_a_target_in_another_lineage_is_refused_by_name() -> None:
    with pytest.raises(RestoreError, match="lies at 7/2@0/3000, in another lineage than 7/1"):
        make(before(0x3000, History("postgres", "7", 2)), base(1, 0x2000, 0x2100))


def test_a_commit_behind_the_fork_is_not_in_the_lineage_of_the_new_timeline() -> None:
    forked = Lineage(History("postgres", "7", 2), ((1, Lsn(0x3000)),))
    with pytest.raises(RestoreError, match=r"7/1 until 0/3000"):
        plan(commit(0x3000, 0x3030), [base(1, 0x2000, 0x2100)], WHOLE, forked, 1e6, file_start=file_start)


def test_a_replay_across_a_fork_reads_each_timeline_where_it_owns_the_log() -> None:
    forked = Lineage(History("postgres", "7", 2), ((1, Lsn(0x3800)),))
    target = replace(commit(0x5000, 0x5030), history=forked.history)
    old = Extent(HISTORY, Lsn(0x1000), Lsn(0x3800))
    new = Extent(forked.history, Lsn(0x3000), Lsn(0x6000))
    early, late = base(1, 0x2000, 0x2100), base(2, 0x4000, 0x4100)  # the late one is on the abandoned end
    found = plan(target, [early, late], [old, new], forked, 1e6, file_start=file_start)
    assert found.base.number == 1
    assert "not in the past of 7/2" in found.passed_over[0].reason
    abandoned = Extent(HISTORY, Lsn(0x1000), Lsn(0x6000))
    late_start = Extent(forked.history, Lsn(0x4000), Lsn(0x6000))
    with pytest.raises(RestoreError, match="between 0/3800 and 0/4000 is missing"):
        plan(target, [early], [abandoned, late_start], forked, 1e6, file_start=file_start)


def test_a_plan_reads_as_sentences() -> None:
    bases = [base(number, 0x3000, 0x3000 + number) for number in range(2, 10)]
    lines = make(commit(0x3000, 0x3030), base(1, 0x2000, 0x2100), *bases).describe()
    assert lines[0].endswith("commit 77")
    assert "point 1 (atomic snapshot)" in lines[1]
    assert "replay    from 7/1@0/1000 to 0/3030" in lines
    assert lines[-1].endswith("and 3 more")
    assert any("crash recovery only" in line for line in make(before(0x3000), base(1, 0x3000, 0x3000)).describe())
