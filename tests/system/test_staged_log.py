"""What a restore takes of the journal: as much as its state needs, where there is room, and what proves its end."""

from __future__ import annotations

import os
import time

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

_RARE = "[points]\nmin_interval_seconds = 600\nmax_delay_seconds = 600\n"
"""No point but those that are asked for."""


def _now(here: Deployment) -> str:
    """Give a time at which nothing is committed, by the server's clock, with a second on both sides of it."""
    time.sleep(1.1)
    found = str(here.cluster.sql("SELECT clock_timestamp()::text")[0][0])
    time.sleep(1.1)
    return found


def _held(conninfo: str) -> list[int]:
    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]


def _begin(here: Deployment) -> None:
    """Have one commit in a point, and the service at work."""
    here.cluster.sql("CREATE TABLE t (n int PRIMARY KEY); CREATE TABLE big (x text)")
    here.start()
    here.cluster.sql("INSERT INTO t VALUES (1)")
    here.trigpoint("point")


@pytest.mark.parametrize("major", [15, 18])
def test_a_tablespace_that_is_made_behind_a_time_is_no_reason_against_it(major: int) -> None:
    with deployment(major, "btrfs", extra=_RARE) as here:
        _begin(here)
        _now(here)
        here.cluster.sql("INSERT INTO t VALUES (2)")
        wanted = _now(here)
        here.cluster.sql("INSERT INTO t VALUES (3)")
        room = here.root / "room"
        room.mkdir()
        room.chmod(0o755)
        os.chown(room, *here.cluster.owner)
        here.cluster.sql(f"CREATE TABLESPACE later LOCATION '{room}'")  # in the segment that has the time too
        behind = _now(here)
        here.cluster.sql("INSERT INTO t VALUES (4)")
        try:
            report = here.ask("restore", "--to-time", wanted, "--name", "before")
            assert _held(report["conninfo"]) == [1, 2]
            refused = here.trigpoint("restore", "--to-time", behind, "--name", "behind", check=False)
            assert refused.returncode
            assert "makes tablespace" in refused.stderr
        finally:
            here.cluster.sql("DROP TABLESPACE later")
