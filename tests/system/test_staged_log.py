"""What a restore takes of the journal: as much as its state needs, where there is room, and what proves its end."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import loop_volume

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


def _switch(here: Deployment, times: int) -> None:
    """Have so many more segments in the log, and no commit that is anybody's."""
    for _ in range(times):
        here.cluster.sql("SELECT pg_logical_emit_message(false, 'bulk', repeat('x', 1000))")
        here.cluster.sql("SELECT pg_switch_wal()")


def _insert(here: Deployment, number: int) -> str:
    """Commit a row, and give the transaction."""
    text = f"INSERT INTO t VALUES ({number}) RETURNING pg_current_xact_id()::text"
    return str(here.cluster.sql(text)[0][0])


def _checks(report: Any) -> dict[str, str]:
    assert all(held for _, held, _ in report["checks"]), report["checks"]
    return {what: seen for what, _, seen in report["checks"]}


def test_the_next_commit_proves_the_end_of_a_state_however_much_log_lies_before_it() -> None:
    with deployment(18, "btrfs", extra=_RARE, initdb=["--wal-segsize=1"]) as here:
        _begin(here)
        wanted = _insert(here, 2)
        _switch(here, 70)
        following = _insert(here, 3)
        checks = _checks(here.ask("restore", "--to-xid", wanted, "--name", "one"))
        assert f"transaction {following}, " in checks["the next commit is not there"]
        assert "no commit follows in the log that is kept" not in checks
        here.stop()
        journal = sorted(file for file in (here.state / "journal").rglob("0*") if file.is_file())
        lost = journal[len(journal) // 2]  # behind the state, and before the next commit
        lost.unlink()
        checks = _checks(here.ask("restore", "--to-xid", wanted, "--name", "two"))
        assert "no commit follows in the log that is kept" not in checks


@contextmanager
def _lowest_room(folder: Path) -> Iterator[list[int]]:
    """Give how many bytes were free on a filesystem at the least, once this ends."""
    over, low = threading.Event(), [shutil.disk_usage(folder).free]

    def watch() -> None:
        while not over.wait(0.01):
            low[0] = min(low[0], shutil.disk_usage(folder).free)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield low
    finally:
        over.set()
        watcher.join(30)


def test_what_lies_behind_a_state_is_not_copied_where_the_catalog_lies() -> None:
    with loop_volume("ext4", 300) as small, deployment(15, "btrfs", extra=_RARE) as here:
        small.chmod(0o755)
        here.state = small / "state"
        here.configure(f'{_RARE}[journal]\nfolder = "{here.root / "journal"}"\n')
        _begin(here)
        _now(here)
        _insert(here, 2)
        wanted = _now(here)
        third = _insert(here, 3)
        _switch(here, 20)
        following = _insert(here, 4)
        for option, held in ((f"--to-time={wanted}", [1, 2]), (f"--to-xid={third}", [1, 2, 3])):
            before = shutil.disk_usage(small).free
            with _lowest_room(small) as low:
                report = here.ask("restore", option, "--name", f"of-{len(held)}")
            assert _held(report["conninfo"]) == held
            assert before - low[0] < 5 * (16 << 20), "as much as the state needs"
            assert (
                f"transaction {third if len(held) == 2 else following}, "
                in _checks(report)["the next commit is not there"]
            )
