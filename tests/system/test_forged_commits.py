"""A role that may only write cannot lead a restore, or its proof, to another state by texts that look like commits."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.volume]

_LINE = (
    "rmgr: Transaction len (rec/tot):     34/    34, tx:        {xid}, lsn: {lsn}, prev 0/0, desc: COMMIT {time} UTC"
)


def commit(cluster: Cluster, text: str) -> int:
    """Give the transaction that did something."""
    with cluster.connect() as connection:
        connection.autocommit = False
        ((xid,),) = connection.execute("SELECT pg_current_xact_id()::text::int")
        connection.execute(text.encode())
        connection.commit()
    return int(xid)


def forge(cluster: Cluster, xid: int | None) -> None:
    """Have a role leave the line of a commit in the log: of a transaction, or of its own, which is rolled back."""
    ((lsn, time),) = cluster.sql(
        "SELECT (pg_current_wal_insert_lsn() + 64)::text,"
        " to_char(clock_timestamp() AT TIME ZONE 'utc', 'YYYY-MM-DD HH24:MI:SS.US')"
    )
    with cluster.connect() as connection:
        connection.execute("SET ROLE app")
        connection.execute("BEGIN")
        ((own,),) = connection.execute("SELECT pg_current_xact_id()::text::int")
        gid = psycopg.sql.Literal(f"x\n{_LINE.format(xid=xid or own, lsn=lsn, time=time)}\nx")
        connection.execute(psycopg.sql.SQL("PREPARE TRANSACTION {}").format(gid))
        connection.execute(psycopg.sql.SQL("ROLLBACK PREPARED {}").format(gid))


def held(here: Deployment, *target: str) -> tuple[Any, ...]:
    """Give what a clone of a state has; every check must hold."""
    report = here.ask("restore", *target, "--name", "back")
    try:
        assert all(holds for _, holds, _ in report["checks"]), report["checks"]
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            rows = clone.execute("SELECT to_regclass('precious') IS NOT NULL, (SELECT array_agg(n ORDER BY n) FROM t)")
            row = rows.fetchone()
            assert row is not None
            return row
    finally:
        here.trigpoint("clones", "drop", "--yes", "back")


@pytest.mark.parametrize("major", [15, 18])
def test_a_restore_goes_by_the_commits_that_were_made(major: int) -> None:
    with deployment(major, "btrfs") as here:
        cluster = here.cluster
        cluster.sql("CREATE TABLE t (n int); CREATE TABLE precious AS SELECT 1 AS n; CREATE ROLE app LOGIN")
        cluster.sql("GRANT EXECUTE ON FUNCTION pg_create_restore_point (text) TO app")
        here.start()
        first = commit(cluster, "INSERT INTO t VALUES (1)")
        forge(cluster, first)  # behind the target: it is committed, so the proof would fail
        commit(cluster, "INSERT INTO t VALUES (2)")
        here.settle()
        here.trigpoint("point")
        dropped = commit(cluster, "DROP TABLE precious")
        commit(cluster, "INSERT INTO t VALUES (3)")
        here.settle()
        here.trigpoint("point")
        ((moment,),) = cluster.sql("SELECT clock_timestamp()::text")
        forge(cluster, None)
        ((behind,),) = cluster.sql("SELECT clock_timestamp()::text")
        commit(cluster, "INSERT INTO t VALUES (4)")
        forge(cluster, dropped)  # another place for the accident
        last = commit(cluster, "INSERT INTO t VALUES (5)")
        here.settle()
        assert held(here, "--to-xid", str(first)) == (True, [1])
        assert held(here, "--before-xid", str(dropped)) == (True, [1, 2])
        assert held(here, "--to-time", moment) == held(here, "--to-time", behind) == (False, [1, 2, 3])
        with cluster.connect() as connection:
            connection.execute("SET ROLE app")
            connection.execute(
                "SELECT pg_create_restore_point(%s)", ['\nrmgr: a tx: 1, lsn: 0/0, desc: CREATE 9 "/srv"']
            )
        commit(cluster, "INSERT INTO t VALUES (6)")
        here.settle()
        assert held(here, "--to-xid", str(last)) == (False, [1, 2, 3, 4, 5])
        assert held(here, "--to-latest") == (False, [1, 2, 3, 4, 5, 6])
