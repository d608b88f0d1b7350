"""Points that no commit asks for, taken by the real service on a real server: catch-all, interval, cron, replay debt.

They are for what no stream shows and for what nobody commits; that they come, and that they come no more often than
they should, is seen in the catalog, and what they hold in a clone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn
from tests.fixtures import judge
from tests.fixtures.service import Deployment, deployment
from trigger.model import Cause, RecoveryPoint, State
from trigger.protect.agenda import IDLE_NOISE_BYTES

pytestmark = [pytest.mark.server, pytest.mark.slow]

OFTEN = "[points]\nmin_interval_seconds = 0.1\nper_minute = 6000\n"
CATCH_ALL = f"{OFTEN}catch_all_seconds = 1\n"
STORAGES = (pytest.param("btrfs", marks=pytest.mark.volume), "directory")
MIB = 1 << 20


def done(here: Deployment, statement: str) -> Lsn:
    """Run a statement and give where the log was flushed to by its commit.

    What the server writes of its own accord right behind it may be too little for another point.
    """
    with here.cluster.connect() as connection:
        connection.execute(statement.encode())
        row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    assert row is not None
    return Lsn.parse(row[0])


def sealed(here: Deployment, cause: Cause | None = None, floor: int = 0) -> list[RecoveryPoint]:
    """Give the sealed points, the oldest first; of one cause, and with everything up to `floor`, if that is given."""
    points = [point for point in judge.read(here).points if point.state is State.SEALED]
    return [point for point in points if cause in (None, point.cause) and point.floor.at >= floor]


def asked_of_a_clone(here: Deployment, question: str, *target: str) -> list[tuple[Any, ...]]:
    report = here.ask("restore", *target, "--name", "one")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            return connection.execute(question.encode()).fetchall()
    finally:
        here.trigpoint("clones", "drop", "--yes", "one")


def planned(here: Deployment, *target: str) -> dict[str, Any]:
    """Give how a target would be restored, once the journal has come to it."""
    dry = ("restore", *target, "--dry-run")
    here.wait_for(lambda: here.trigpoint(*dry, check=False).returncode == 0, "a plan")
    return dict(here.ask(*dry))


def watch(here: Deployment, seconds: float) -> Iterator[list[RecoveryPoint]]:
    """Give the sealed points again and again, for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield sealed(here)
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------------ catch-all

UNSEEN = {
    "DDL": ("CREATE TABLE made (n int PRIMARY KEY, words text)", "SELECT to_regclass('made') IS NOT NULL"),
    "a sequence": (
        "SELECT max(nextval('counter')) FROM generate_series(1, 2000)",
        "SELECT last_value >= 2000 FROM counter",
    ),
    "a large object": (
        "SELECT lo_from_bytea(4711, convert_to(repeat('trigpoint', 1000), 'UTF8'))",
        "SELECT convert_from(lo_get(4711), 'UTF8') = repeat('trigpoint', 1000)",
    ),
}


@pytest.fixture(scope="module")
def watched() -> Iterator[Deployment]:
    with deployment(18, extra=CATCH_ALL) as here:
        here.cluster.sql("CREATE SEQUENCE counter")
        here.start()
        yield here


@pytest.mark.volume
@pytest.mark.parametrize("kind", UNSEEN)
def test_what_no_stream_shows_is_in_a_catch_all_point_soon_after(watched: Deployment, kind: str) -> None:
    make, there = UNSEEN[kind]
    known, begin, began = len(sealed(watched)), watched.cluster.end_of_log(), datetime.now(UTC)
    end = done(watched, make)
    assert end - begin > IDLE_NOISE_BYTES
    watched.wait_for(lambda: sealed(watched, Cause.CATCH_ALL, end), "a catch-all point that holds it")
    assert {point.cause for point in sealed(watched)[known:]} == {Cause.CATCH_ALL}
    point = sealed(watched, Cause.CATCH_ALL, end)[0]
    assert timedelta(0) <= point.opened_at - began < timedelta(seconds=4)
    assert (point.commit, point.commits) == (None, 0)
    assert not any(watched.status()["commits_by_rule"].values()), "a stream has shown it"
    assert asked_of_a_clone(watched, there, "--to-point", str(point.number)) == [(True,)]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_server_that_is_idle_gets_no_catch_all_points(storage: str) -> None:
    with deployment(15, storage, extra=CATCH_ALL) as here:
        here.start()
        end = done(here, "CREATE TABLE made (n int)")
        here.wait_for(lambda: sealed(here, Cause.CATCH_ALL, end), "the point for what was made")
        known = sealed(here)
        for points in watch(here, 6):
            assert [(p.number, p.cause) for p in points[len(known) :]] == []
        assert here.status()["log_since_last_point_bytes"] <= IDLE_NOISE_BYTES


# --------------------------------------------------------------------------------------------- interval and cron


@pytest.mark.parametrize("storage", STORAGES)
def test_points_are_taken_at_the_interval_though_nothing_is_written(storage: str) -> None:
    with deployment(18, storage, extra=f"{OFTEN}interval_seconds = 1\n") as here:
        here.start()
        here.wait_for(lambda: len(sealed(here)) > 4, "points by interval")
        first, *others = sealed(here)
        assert first.cause is Cause.START
        assert {point.cause for point in others} == {Cause.INTERVAL}
        opened = [point.opened_at for point in (first, *others)]
        apart = [(after - before).total_seconds() for before, after in itertools.pairwise(opened)]
        assert min(apart) > 0.8
        assert min(apart) < 2


@pytest.mark.volume
@pytest.mark.timeout(120)
def test_a_schedule_is_kept_by_the_minute_in_utc_on_an_idle_server() -> None:
    due = (datetime.now(UTC) + timedelta(seconds=75)).replace(second=0, microsecond=0)
    extra = f'{CATCH_ALL}cron = "{due.minute} {due.hour} * * *"\n'
    with deployment(15, extra=extra) as here:
        here.start({"TZ": "Asia/Kolkata"})
        assert datetime.now(UTC) < due
        here.wait_for(lambda: sealed(here, Cause.CRON), "the point of the schedule", 90)
        (point,) = sealed(here, Cause.CRON)
        assert timedelta(0) <= point.opened_at - due < timedelta(seconds=3)
        assert [p.cause for p in sealed(here)] == [Cause.START, Cause.CRON]


# ---------------------------------------------------------------------------------------------------- replay debt

LIMIT = 16 * MIB
DEBT = f"""{OFTEN}restore_objective_seconds = 2
replay_bytes_per_second = {LIMIT // 2}
[[rules]]
name = "orders"
tables = ["public.orders"]
"""


@pytest.mark.volume
def test_log_that_no_rule_takes_leads_to_points_that_keep_replays_within_the_objective() -> None:
    with deployment(18, extra=DEBT) as here:
        here.cluster.sql("CREATE TABLE bulk (n int, words text)")
        here.start()
        for number in range(1, 3):
            end = done(here, "INSERT INTO bulk SELECT n, repeat('x', 1000) FROM generate_series(1, 25000) n")
            here.wait_for(lambda end=end: sealed(here, Cause.REPLAY, end), f"point {number} for replay debt")
            here.cluster.sql("INSERT INTO bulk VALUES (0, 'after')")
            last = here.cluster.end_of_log()
            here.cluster.sql("INSERT INTO bulk VALUES (0, 'and one more, so that the journal goes on behind it')")
            plan = planned(here, "--to-lsn", str(last))
            assert plan["base"]["number"] == sealed(here)[-1].number
            assert 0 < plan["replay_bytes"] <= LIMIT
            assert here.status()["replay_bytes"] <= LIMIT
        assert [p.cause for p in sealed(here)] == [Cause.START, Cause.REPLAY, Cause.REPLAY]
        assert here.status()["commits_by_rule"].keys() == {""}
