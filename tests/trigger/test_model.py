"""Ids, times and states of the model."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.model import (
    EPOCH,
    TRANSITIONS,
    Cause,
    Changes,
    Commit,
    Mark,
    RecoveryPoint,
    State,
    from_microseconds,
    to_microseconds,
)
from trigger.point_names import is_point_id, point_id, tag_name
from trigger.position import History, Name, Position

moments = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds are naive
bits = st.integers(0, (1 << 80) - 1)


@given(moments, bits)
def test_a_point_id_is_legal_in_every_storage(now: datetime, randomness: int) -> None:
    made = point_id(now, randomness)
    assert is_point_id(made)
    assert set(tag_name(made)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(tag_name(made)) == 30


@given(moments, moments, bits, bits)
def test_point_ids_order_by_the_millisecond_in_which_they_were_made(
    one: datetime, other: datetime, first: int, second: int
) -> None:
    earlier, later = sorted((one, other))
    if to_microseconds(later) // 1000 > to_microseconds(earlier) // 1000:
        assert point_id(earlier, first) < point_id(later, second)


@given(moments, bits, bits)
def test_two_points_of_one_moment_differ_by_their_randomness(now: datetime, first: int, second: int) -> None:
    assert (point_id(now, first) == point_id(now, second)) == (first == second)


@given(st.text())
def test_only_the_form_that_we_make_is_taken_for_a_point_id(text: str) -> None:
    assert is_point_id(text) == (len(text) == 26 and set(text) <= set("0123456789abcdefghjkmnpqrstvwxyz"))


@given(st.integers(0, 7_258_118_400_000_000))
def test_times_keep_their_microseconds(time_us: int) -> None:
    assert to_microseconds(from_microseconds(time_us)) == time_us
    elsewhere = from_microseconds(time_us).astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert to_microseconds(elsewhere) == time_us


def test_the_epoch_is_the_beginning_of_time_labels() -> None:
    assert to_microseconds(EPOCH) == 0


def test_every_state_has_its_transitions_and_the_last_one_has_none() -> None:
    assert set(TRANSITIONS) == set(State)
    assert [state for state, after in TRANSITIONS.items() if not after] == [State.EXPIRED]
    assert State.SEALED in TRANSITIONS[State.OPEN]
    assert State.OPEN not in set().union(*TRANSITIONS.values())


def test_a_commit_stands_where_its_record_ends_and_counts_its_rows_without_truncates() -> None:
    tables = {"public.a": Changes(1, 2, 3), "public.b": Changes(truncated=1)}
    commit = Commit("bank", History("postgres", "7391", 1), Lsn(100), Lsn(148), Name("", 731), 1_000_000, tables)
    assert commit.position == Position(History("postgres", "7391", 1), Lsn(148))
    assert commit.rows == 6
    assert commit.time == EPOCH + timedelta(seconds=1)


def test_a_point_is_named_in_storages_by_its_id() -> None:
    made = point_id(EPOCH, 1)
    floor = Position(History("postgres", "7391", 1), Lsn(1))
    assert RecoveryPoint(made, 1, State.OPEN, Cause.DEMAND, (Mark(floor),), EPOCH).name == f"trg-{made}"
