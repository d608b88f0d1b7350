"""What is due besides commits, and when: start, gap, demand, interval, cron, replay debt, catch-all."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from connectors.databases.postgres.lsn import Lsn
from tests.simulation.virtual import VirtualLoop
from trigger.config.options import PointOptions
from trigger.model import Bracket, Cause, Mark, RecoveryPoint, State
from trigger.position import History, Position
from trigger.protect.agenda import IDLE_NOISE_BYTES, LONGEST_RETRY_SECONDS, Agenda
from trigger.protect.qualify import Take, qualify

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HISTORY = History("postgres", "7391", 1)


def at(lsn: int) -> Position:
    return Position(HISTORY, Lsn(lsn))


def point(number: int = 1, ceiling: int = 1000, redo: int = 500, state: State = State.SEALED) -> RecoveryPoint:
    marks = (Mark(at(ceiling), at(ceiling), at(redo)),)
    return RecoveryPoint(f"{number:026d}", number, state, Cause.START, marks, NOON)


def agenda(base: RecoveryPoint | None = None, **options: Any) -> Agenda:
    return Agenda(PointOptions(**{"catch_all_seconds": None, **options}), base)


def test_the_first_point_is_due_at_once() -> None:
    due = agenda().next(7.0, NOON, [])
    assert due is not None
    assert (due.cause, due.at, due.urgent) == (Cause.START, 7.0, True)


def test_nothing_is_due_where_nothing_is_planned() -> None:
    assert agenda(point()).next(7.0, NOON, [at(9_000_000)]) is None


def test_a_gap_comes_before_everything_else_until_a_point_is_sealed() -> None:
    book = agenda()
    book.open_gap = True
    due = book.next(0.0, NOON, [])
    assert due is not None
    assert due.cause is Cause.GAP
    book.began(0.0, NOON)
    book.sealed(point())
    assert book.next(1.0, NOON, []) is None


def test_a_demand_does_not_wait_with_an_open_gap_for_the_budget() -> None:
    async def run() -> None:
        book = agenda(point())
        book.open_gap = True
        book.ask("now")
        due = book.next(7.0, NOON, [])
        assert due is not None
        assert (due.cause, due.urgent) == (Cause.DEMAND, True)

    asyncio.run(run())


def test_gaps_that_come_on_and_on_get_no_more_points_than_the_budget_allows() -> None:
    book, options = agenda(point()), PointOptions(min_interval_seconds=1, per_minute=6)
    taken = 0
    for moment in range(1200):  # two minutes of a stream that breaks ten times a second
        now = moment / 10
        book.open_gap = True
        if isinstance(qualify(None, book.next(now, NOON, []), book.pace(now), options, now), Take):
            taken += 1
            book.began(now, NOON)
            book.sealed(point(taken + 1))
    assert taken == 12


def test_an_interval_is_counted_from_the_first_look_after_a_restart() -> None:
    book = agenda(point(), interval_seconds=60)
    for moment in (100.0, 130.0, 159.0):
        due = book.next(moment, NOON, [])
        assert due is not None
        assert (due.cause, due.at) == (Cause.INTERVAL, 160.0)


def test_an_interval_that_failed_stays_due() -> None:
    book = agenda(point(), interval_seconds=60, retry_seconds=5)
    book.next(0.0, NOON, [])
    book.began(60.0, NOON)
    book.failed(61.0, point(2, state=State.FAILED))
    due = book.next(61.0, NOON, [])
    assert due is not None
    assert (due.cause, due.at) == (Cause.INTERVAL, 60.0)
    assert book.pace(61.0).not_before == 66.0
    book.began(66.0, NOON)
    book.sealed(point(3))
    assert (book.next(67.0, NOON, []) or due).at == 126.0


def test_a_schedule_that_failed_stays_due_and_is_met_by_the_next_point() -> None:
    book = agenda(point(), cron="0 13 * * *")
    first = book.next(0.0, NOON, [])
    assert first is not None
    assert (first.cause, first.at) == (Cause.CRON, 3600.0)
    one = NOON + timedelta(hours=1)
    book.began(3600.0, one)
    book.failed(3601.0, None)
    again = book.next(3602.0, one + timedelta(seconds=2), [])
    assert again is not None
    assert again.at == 3600.0
    book.began(3606.0, one + timedelta(seconds=6))
    book.sealed(point(2))
    later = book.next(3607.0, one + timedelta(seconds=7), [])
    assert later is not None
    assert later.at == 3600.0 + 86_400


def test_a_clock_that_is_set_back_does_not_hide_the_schedule() -> None:
    book = agenda(point(), cron="0 * * * *")
    book.next(0.0, NOON + timedelta(days=30), [])
    due = book.next(1.0, NOON, [])
    assert due is not None
    assert due.at == 1.0 + 3600


def test_log_without_visible_commits_is_caught_and_the_noise_of_an_idle_server_is_not() -> None:
    book = agenda(point(ceiling=1000), catch_all_seconds=300)
    assert book.next(0.0, NOON, [at(1000 + IDLE_NOISE_BYTES)]) is None
    due = book.next(10.0, NOON, [at(1001 + IDLE_NOISE_BYTES)])
    assert due is not None
    assert (due.cause, due.at) == (Cause.CATCH_ALL, 300.0)


def test_what_the_end_of_its_own_bracket_left_unused_of_a_segment_is_no_reason_for_the_next_point() -> None:
    bracket = Bracket(at(500), at(1000), {"label": "label"}, at(1 << 20))
    inside = replace(point(ceiling=1000), marks=(Mark(at(1000), at(1000), at(500), bracket),))
    bracketed = Agenda(PointOptions(catch_all_seconds=300), inside)
    behind = 1 << 20
    assert bracketed.next(0.0, NOON, [at(behind - 1)]) is None
    assert bracketed.next(0.0, NOON, [at(behind + IDLE_NOISE_BYTES)]) is None
    assert bracketed.next(0.0, NOON, [at(behind + IDLE_NOISE_BYTES + 1)]) is not None
    cut = Agenda(PointOptions(catch_all_seconds=300), point(ceiling=1000))
    assert cut.next(0.0, NOON, [at(1001 + IDLE_NOISE_BYTES)]) is not None


def test_a_point_is_due_before_a_replay_takes_longer_than_promised() -> None:
    book = agenda(point(redo=0), restore_objective_seconds=10, replay_bytes_per_second=100)
    assert book.replay_limit_bytes == 1000
    assert not book.wants_checkpoint(at(900))
    book.redos = [at(0)]
    assert book.wants_checkpoint(at(501))
    assert book.next(0.0, NOON, [at(900)]) is None  # no checkpoint since: a point would not shorten the replay
    book.redos = [at(600)]
    assert book.next(0.0, NOON, [at(750)]) is None
    due = book.next(0.0, NOON, [at(751)])
    assert due is not None
    assert due.cause is Cause.REPLAY


def test_a_checkpoint_of_a_log_that_was_put_back_asks_for_no_point_after_each_point() -> None:
    book = agenda(point(redo=0), restore_objective_seconds=10, replay_bytes_per_second=100)
    book.redos = [at(600)]
    assert book.next(0.0, NOON, [at(751)]) is not None
    book.sealed(point(2, redo=0))  # an older copy was put back meanwhile
    assert book.next(0.0, NOON, [at(1100)]) is None
    book.redos = [at(900)]
    assert book.next(0.0, NOON, [at(1100)]) is not None


def test_pauses_after_failures_double_up_to_ten_minutes_and_end_with_a_success() -> None:
    book = agenda(point(), retry_seconds=5)
    pauses = [book.failed(0.0, None) for _ in range(12)]
    assert pauses[:4] == [5, 10, 20, 40]
    assert pauses[-1] == LONGEST_RETRY_SECONDS
    book.sealed(point(2))
    assert book.failed(0.0, None) == 5


def test_a_stream_that_is_open_again_leaves_no_more_than_the_first_pause() -> None:
    book = agenda(point(), retry_seconds=5)
    book.heed(1)
    for moment in (0.0, 5.0, 15.0, 35.0):
        book.failed(moment, None)
    book.heed(1)
    assert book.not_before == 75.0
    book.heed(2)
    assert book.not_before == 40.0, "one that comes and goes is not met by a round each time"
    assert book.failed(40.0, None) == 5


def test_a_full_window_is_urgent() -> None:
    due = agenda(point()).next(7.0, NOON, [], window_is_full=True)
    assert due is not None
    assert (due.cause, due.at, due.urgent) == (Cause.COMMIT, 7.0, True)


def test_only_the_rounds_of_the_last_minute_count_for_the_budget() -> None:
    book = agenda(point())
    for moment in (0.0, 10.0, 70.0):
        book.began(moment, NOON)
    pace = book.pace(80.0)
    assert (pace.last_began, list(pace.began_in_last_minute)) == (70.0, [70.0])


def demand(act: Any) -> None:
    async def main() -> None:
        act(agenda(point()))

    VirtualLoop().run(main())


def test_who_asks_for_a_point_gets_the_next_one_sealed_or_failed() -> None:
    def act(book: Agenda) -> None:
        answer = book.ask("before the upgrade")
        due = book.next(0.0, NOON, [])
        assert due is not None
        assert due.cause is Cause.DEMAND
        book.began(0.0, NOON)
        assert book.note == "before the upgrade"
        late = book.ask("too late for this one")
        failed = point(2, state=State.FAILED)
        book.failed(1.0, failed)
        assert answer.result() is failed
        assert not late.done()

    demand(act)


def test_a_round_that_ended_without_a_word_on_its_point_leaves_the_demand_due() -> None:
    def act(book: Agenda) -> None:
        answer = book.ask("once")
        book.began(0.0, NOON)
        book.failed(1.0, None)
        due = book.next(2.0, NOON, [])
        assert due is not None
        assert due.cause is Cause.DEMAND
        assert book.note == "once"
        book.began(2.0, NOON)
        book.sealed(point(2))
        assert answer.result().number == 2
        assert book.next(3.0, NOON, []) is None

    demand(act)


def test_an_answer_that_nobody_waits_for_any_more_is_no_error() -> None:
    def act(book: Agenda) -> None:
        answer = book.ask("impatient")
        answer.cancel()
        book.began(0.0, NOON)
        book.sealed(point(2))
        with pytest.raises(asyncio.CancelledError):
            answer.result()

    demand(act)
