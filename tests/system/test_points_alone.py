"""Points that are taken while no service runs, and the log that leads to them; and what goes further than that log."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.volume]

QUICK = "[points]\nmin_interval_seconds = 0\nper_minute = 6000\n"


def insert(here: Deployment, number: int) -> int:
    """Commit a row; gives the transaction."""
    return int(here.cluster.sql(f"INSERT INTO t VALUES ({number}) RETURNING txid_current()")[0][0])


def rows(here: Deployment, *target: str) -> list[int]:
    """Give the rows that a restore holds, whose clone is dropped again."""
    report = here.ask("restore", *target, "--name", "one")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            return [i for (i,) in connection.execute("SELECT i FROM t ORDER BY i").fetchall()]
    finally:
        here.trigpoint("clones", "drop", "--yes", "one")


@pytest.mark.parametrize("storage", ["btrfs", "directory"])
def test_a_point_that_is_taken_without_a_service_comes_back_at_once_and_after_the_slots_were_given_up(
    storage: str,
) -> None:
    with deployment(15, storage, extra=QUICK) as here:
        here.cluster.sql("CREATE TABLE t (i int PRIMARY KEY)")
        insert(here, 1)
        first = here.ask("point")  # before any service has run: behind a base of its own
        insert(here, 2)
        assert rows(here, "--to-point", str(first["number"])) == [1]
        assert here.ask("verify", str(first["number"]))["passed"]
        here.start()
        here.settle()
        here.stop()
        here.trigpoint("release", "--yes")
        insert(here, 3)
        for _ in range(3):
            here.cluster.sql("SELECT pg_switch_wal()")
            here.cluster.sql("CHECKPOINT")
        second = here.ask("point")
        insert(here, 4)
        assert rows(here, "--to-point", str(second["number"])) == [1, 2, 3]
        here.start()
        here.settle()
        assert rows(here, "--to-point", str(second["number"])) == [1, 2, 3]


@contextlib.contextmanager
def log_behind(major: int, storage: str) -> Iterator[tuple[Deployment, int]]:
    """Give a deployment whose newest point, for its second row, lies behind the log that is kept, and who keeps it."""
    with deployment(major, storage, extra=QUICK) as here:
        here.cluster.sql("CREATE TABLE t (i int PRIMARY KEY)")
        here.start()
        insert(here, 1)
        here.settle()
        receiver = here.running_receiver()
        os.kill(receiver, signal.SIGSTOP)
        try:
            insert(here, 2)
            here.settle()
            yield here, receiver
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(receiver, signal.SIGCONT)


@pytest.mark.parametrize("major", [15, 18])
def test_the_latest_state_is_the_newest_snapshot_where_that_goes_beyond_the_log_that_is_kept(major: int) -> None:
    with log_behind(major, "btrfs") as (here, receiver):
        assert rows(here, "--to-latest") == [1, 2]
        here.stop(signal.SIGKILL)
        os.kill(receiver, signal.SIGKILL)
        here.cluster.kill()
        assert rows(here, "--to-latest") == [1, 2]
        plan = here.ask("restore", "--to-latest", "--dry-run")
        assert plan["as_cut"]
        assert "as it was cut: it goes beyond the log" in plan["target"]["description"]
        here.trigpoint("restore", "--in-place", "--to-latest", "--yes")
        here.cluster.start()
        assert [i for (i,) in here.cluster.sql("SELECT i FROM t ORDER BY i")] == [1, 2]


def test_a_point_whose_log_is_not_kept_yet_is_called_neither_verified_nor_failed() -> None:
    with log_behind(15, "directory") as (here, receiver):
        newest = here.ask("list", "--limit", "1")[0]["number"]
        refused = here.trigpoint("verify", str(newest), check=False)
        assert refused.returncode == 9
        assert "wait until the journal has caught up" in refused.stderr
        assert here.ask("show", str(newest))["point"]["verification"] is None
        os.kill(receiver, signal.SIGCONT)
        here.settle()
        assert here.ask("verify", str(newest))["passed"]


def test_an_option_is_not_taken_for_the_name_of_a_restore_in_place() -> None:
    with deployment(15, "directory") as here:
        for option in ("--undo", "--resume", "--from-clone"):
            place = ["--in-place"] if option == "--from-clone" else []
            refused = here.trigpoint("restore", *place, option, "--dry-run", check=False)
            assert refused.returncode == 2
            assert f"{option} takes " in refused.stderr
            assert "not --dry-run" in refused.stderr
