"""A stream that is opened again: nothing is forgotten by the server that has no outcome, nothing waits for no log."""

from __future__ import annotations

import signal
import time

import pytest

from tests.fixtures.service import Deployment
from tests.fixtures.slots import QUICK
from tests.system.test_histories import histories, spoken, tell

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

PATIENT = "[points]\nmin_interval_seconds = 120\nmax_delay_seconds = 300\n"


def cut_stream(here: Deployment) -> None:
    """Cut the connection of the stream, and wait until it is open again and has told the server how far it is."""
    reader = "FROM pg_stat_replication WHERE application_name = 'trigpoint_postgres'"
    before = here.cluster.sql(f"SELECT pid {reader}")
    here.cluster.sql(f"SELECT pg_terminate_backend(pid) {reader}")
    here.wait_for(lambda: here.cluster.sql(f"SELECT pid {reader}") not in ([], before), "a stream that is open again")
    time.sleep(12)  # a heartbeat, which nothing shows from outside


@pytest.mark.parametrize("major", [15, 18])
def test_a_reconnect_acknowledges_nothing_that_has_no_outcome(major: int) -> None:
    with spoken(major) as here:
        here.configure(PATIENT)
        here.start()
        told = tell(here.cluster, "one", "two")
        here.wait_for(lambda: here.status()["pending_commits"] == 2, "two commits that wait for their point")
        cut_stream(here)
        assert here.status()["pending_commits"] == 2
        assert here.process is not None
        here.process.send_signal(signal.SIGKILL)
        here.process.wait()
        here.configure(QUICK)
        here.start()
        here.settle()
        assert here.ask("list", "--gaps") == []
        for one in told:
            (found,) = here.ask("find", "--xid", str(one.xid))
            assert found["where"] in ("point", "interval"), found
        assert here.stop() == 0


def test_a_slot_of_a_log_that_is_no_more_is_made_anew() -> None:
    """The log is lost in a crash and begun anew, before the place that the slot was at."""
    with spoken(16) as here:
        cluster = here.cluster
        here.start()
        tell(cluster, "one", "two")
        cluster.sql("CHECKPOINT")
        control = cluster.data / "global" / "pg_control"
        old_control = control.read_bytes()
        cluster.sql("INSERT INTO said (word) SELECT repeat('x', 2000) FROM generate_series(1, 4000)")
        cluster.sql("DELETE FROM said WHERE word LIKE 'xx%'")
        for _ in range(3):  # the server writes down where a slot is only when its beginning moves
            cluster.sql("SELECT pg_log_standby_snapshot()")
            tell(cluster, "on")
            here.settle()
            time.sleep(1)
        assert here.stop() == 0
        cluster.stop()
        control.write_bytes(old_control)
        for file in (cluster.data / "pg_wal").iterdir():
            if file.is_file():
                file.unlink()
        cluster.run("pg_resetwal", "-f", "-D", cluster.data)
        cluster.start()
        beyond = "SELECT confirmed_flush_lsn > pg_current_wal_insert_lsn() FROM pg_replication_slots WHERE plugin <> ''"
        assert cluster.sql(beyond) == [(True,)]
        here.start()
        after = tell(cluster, "four", "five")
        here.settle()
        old, new = histories(here)
        assert new == f"{old}+1"
        (gap,) = here.ask("list", "--gaps")
        assert gap["closed_by"]
        for one in after:
            (found,) = [place for place in here.ask("find", "--xid", str(one.xid)) if place["history"] == new]
            assert found["where"] in ("point", "interval"), found
        here.wait_for(
            lambda: all(one["base"] for one in here.ask("find", "--xid", str(after[-1].xid)) if one["history"] == new),
            "log that the journal receives",
        )
        assert here.stop() == 0
