"""What points cost where each ends segments of log, and how rare they are proposed to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trigger.service.test_initialise import BTRFS, EXT4, REACHED, layout, proposed
from trigger.config.options import PointOptions, parse
from trigger.model import Severity
from trigger.service.costs import DAY_SECONDS, INTERVALS_SECONDS, look, points_a_day, proposed_interval_seconds
from trigger.service.initialise import propose, text

SEGMENT = 16 << 20
GIB = 1 << 30


def with_room(free_bytes: int, mounts: Any = EXT4, **more: Any) -> Any:
    return propose(
        REACHED,
        ["bank"],
        layout(**more),
        state_folder=Path("/var/lib/trigpoint"),
        mounts=mounts,
        subvolume_of=lambda path: path,
        root=True,
        free_bytes=lambda _: free_bytes,
    )


@pytest.mark.parametrize("free_bytes", [2 * GIB, 20 * GIB, 200 * GIB, 2000 * GIB])
def test_where_each_point_costs_log_init_lets_a_week_of_them_fit_many_times_over(free_bytes: int) -> None:
    read = parse(text(with_room(free_bytes)), "written").points
    assert read.min_interval_seconds >= INTERVALS_SECONDS[0]
    assert read.max_delay_seconds >= read.min_interval_seconds
    assert read.catch_all_seconds is not None
    assert read.catch_all_seconds >= read.min_interval_seconds
    if read.min_interval_seconds < INTERVALS_SECONDS[-1]:
        assert 7 * points_a_day(read) * 2 * SEGMENT <= 0.26 * free_bytes


def test_the_smaller_the_disk_the_rarer_the_points_and_the_file_says_why() -> None:
    found = [with_room(each * GIB) for each in (2, 20, 200, 2000)]
    intervals = [each.interval_seconds for each in found]
    assert intervals == sorted(intervals, reverse=True)
    assert len(set(intervals)) > 2
    for each in found:
        assert "# Each point makes a checkpoint and ends 2 segments of log, 32 MiB" in text(each)


def test_where_a_point_costs_next_to_nothing_init_has_one_a_second() -> None:
    assert proposed(layout(), BTRFS).interval_seconds == 1.0
    assert proposed(layout(), BTRFS).points_why == ()
    assert parse(text(proposed(layout(), BTRFS)), "written").points.min_interval_seconds == 1


def test_several_subvolumes_are_no_single_instant_and_cost_log_too() -> None:
    found = with_room(20 * GIB, BTRFS, wal_directory=Path("/srv/pg/wal"))
    assert (found.driver, len(found.volumes)) == ("btrfs", 2)
    assert found.interval_seconds > 1


@given(st.integers(1 << 20, 1 << 30), st.integers(0, 1 << 60))
def test_there_is_an_interval_for_every_disk(segment_bytes: int, free_bytes: int) -> None:
    assert proposed_interval_seconds(segment_bytes, free_bytes) in INTERVALS_SECONDS


def test_the_check_says_what_a_day_costs_and_warns_where_the_disk_does_not_last_a_week() -> None:
    often, rare = PointOptions(), PointOptions(min_interval_seconds=3600, max_delay_seconds=3600)
    warned = look(often, SEGMENT, 100 * GIB, bracketed=True)
    assert warned.severity is Severity.WARNING
    assert "up to 86400 a day" in warned.message
    assert "2.6 TiB a day" in warned.message
    assert "100.0 GiB are free" in warned.message
    assert "points.min_interval_seconds = 900" in warned.remedy
    noted = look(rare, SEGMENT, 100 * GIB, bracketed=True)
    assert (noted.severity, noted.remedy) == (Severity.NOTE, "")
    assert "768.0 MiB a day" in noted.message
    assert look(often, SEGMENT, GIB, bracketed=False).severity is Severity.OK


def test_the_budget_of_a_minute_bounds_the_day_too() -> None:
    assert points_a_day(PointOptions(min_interval_seconds=0, per_minute=6)) == 6 * 60 * 24
    assert points_a_day(PointOptions(min_interval_seconds=DAY_SECONDS, max_delay_seconds=DAY_SECONDS)) == 1
