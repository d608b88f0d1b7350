"""Whatever was committed can be named: DDL, another database's commits, a savepoint, what no rule took; by the log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from tests.fixtures.service import Deployment, deployment
from tests.system.test_histories import copied, put_back, spoken, tell

pytestmark = [pytest.mark.server, pytest.mark.slow]

RULES = '[[rules]]\nname = "marked"\nmarkers = ["keep-*"]\n'


def committed(here: Deployment, *statements: str, database: str = "postgres") -> str:
    """Run statements in one transaction; gives its id, as `pg_current_xact_id` says it."""
    with here.cluster.connect(database) as connection, connection.transaction():
        for statement in statements:
            connection.execute(statement)
        row = connection.execute("SELECT pg_current_xact_id()::text").fetchone()
    assert row is not None
    return str(row[0])


def brought_back(here: Deployment, question: str, *target: str) -> Any:
    """Give the answer of the state that a target leads to, which every check must hold of."""
    here.wait_for(lambda: here.trigpoint("restore", *target, "--dry-run", check=False).returncode == 0, "a plan")
    report = here.ask("restore", *target, "--name", "named")
    try:
        assert all(held for _, held, _ in report["checks"]), report["checks"]
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            return clone.execute(question).fetchone()
    finally:
        here.trigpoint("clones", "drop", "--yes", "named")


@pytest.mark.parametrize("major", [15, 18])
def test_a_drop_that_no_stream_shows_is_listed_found_and_undone_by_its_transaction_id(major: int) -> None:
    with deployment(major, "directory", extra=RULES) as here:
        here.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        here.cluster.sql("CREATE DATABASE other")
        here.start()
        saved = committed(here, "INSERT INTO account VALUES (0)", "SAVEPOINT s", "INSERT INTO account VALUES (-1)")
        child = here.cluster.sql("SELECT xmin::text FROM account WHERE n = -1")[0][0]
        elsewhere = committed(here, "CREATE TABLE t (v int)", database="other")
        began = datetime.now(UTC)
        dropped = committed(here, "DROP TABLE account")
        committed(here, "CREATE TABLE later (v int)")
        here.settle()
        listed = here.ask("commits", "--around", began.isoformat(), "--within", "30")["commits"]
        by_name = {one["name"]: one for one in listed}
        assert {saved, elsewhere, dropped} <= set(by_name)
        assert "DDL" in by_name[dropped]["did"]
        assert "drops" in by_name[dropped]["did"]
        assert child in by_name[saved]["children"]
        (found,) = here.ask("find", "--xid", dropped)
        assert found["where"] == "log"
        assert found["base"]
        count = "SELECT count(*)::int FROM account"
        assert brought_back(here, count, "--before-xid", dropped) == (1002,)
        assert brought_back(here, count, "--before-xid", child) == (1000,)
        assert brought_back(here, "SELECT to_regclass('account')::text", "--to-xid", dropped) == (None,)
        refused = here.trigpoint("restore", "--before-xid", "4000000", "--dry-run", check=False)
        assert refused.returncode != 0
        assert "in neither the catalog nor the log" in refused.stderr
        printed = here.trigpoint("commits", "--around", began.strftime("%Y-%m-%d %H:%M:%S.%f UTC")).stdout
        assert dropped in printed
        assert by_name[elsewhere]["database"] == "other"
        assert {by_name[one]["database"] for one in (saved, dropped)} == {"postgres"}
        assert "the log that is kept ends there" in here.trigpoint("commits", "--around", "now", "--limit", "1").stdout
        assert here.stop() == 0


def let_ids_turn(here: Deployment, epoch: int) -> None:
    """Let the server go on as if it had given so many times 2^32 transaction ids."""
    here.cluster.stop()
    here.cluster.run("pg_resetwal", "-e", str(epoch), here.cluster.data)
    here.cluster.start()


def test_after_a_turn_of_the_ids_a_short_one_means_the_transaction_that_shows_it() -> None:
    with deployment(18, "directory") as here:
        let_ids_turn(here, 5)
        here.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        here.start()
        saved = committed(here, "INSERT INTO account VALUES (0)")
        shown = here.cluster.sql("SELECT xmin::text FROM account WHERE n = 0")[0][0]
        assert int(saved) - int(shown) == 5 << 32
        dropped = committed(here, "DROP TABLE account")
        committed(here, "CREATE TABLE later (v int)")
        here.settle()
        (found,) = here.ask("find", "--xid", shown)
        assert str(found["record"]["name"]) == saved
        assert found["where"] in {"point", "interval"}, "by the catalog, whose point it became"
        (found,) = here.ask("find", "--xid", str(int(dropped) - (5 << 32)))
        assert (str(found["record"]["name"]), found["where"]) == (dropped, "log")
        count = "SELECT count(*)::int FROM account"
        assert brought_back(here, count, "--to-xid", shown) == (1001,)
        assert brought_back(here, count, "--before-xid", str(int(dropped) - (5 << 32))) == (1001,)
        assert here.stop() == 0


def test_after_a_turn_of_the_ids_a_time_is_restored_where_no_stream_has_shown_a_commit_yet() -> None:
    with deployment(15, "directory", extra=RULES) as here:
        let_ids_turn(here, 5)
        here.cluster.sql("CREATE TABLE account AS SELECT n FROM generate_series(1, 1000) n")
        here.start()
        committed(here, "INSERT INTO account VALUES (0)")
        then = datetime.now(UTC)
        committed(here, "DROP TABLE account")
        here.settle()
        assert brought_back(here, "SELECT count(*)::int FROM account", "--to-time", then.isoformat()) == (1001,)
        assert here.stop() == 0


@pytest.mark.volume
def test_a_table_made_as_only_the_log_of_a_left_timeline_says_is_found_and_comes_back_by_what_is_printed() -> None:
    with spoken(16) as deployed:
        cluster = deployed.cluster
        deployed.start()
        tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        deployed.start()
        deployed.trigpoint("point")
        cluster.sql("DO $$ BEGIN FOR i IN 1..300 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
        made_at = datetime.now(UTC).isoformat()
        ((made,),) = cluster.sql("BEGIN; CREATE TABLE made (v int); SELECT pg_current_xact_id()::text; COMMIT")[-1:]
        tell(cluster, "three")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        put_back(cluster, copy)
        cluster.switch_timeline()
        deployed.start()
        told = tell(cluster, "drei", "vier")
        deployed.settle()
        (found,) = deployed.ask("find", "--xid", made)
        assert (found["where"], found["aside"], bool(found["base"])) == ("log", "--timeline 1", True), found
        around = ("commits", "--around", made_at, "--within", "5")
        listed = deployed.ask(*around)
        assert made not in [one["name"] for one in listed["commits"]]
        assert listed["others"] == [found["history"]]
        printed = deployed.trigpoint(*around).stdout
        assert f"--history {found['history']} lists it" in printed
        assert made in deployed.trigpoint(*around, "--history", found["history"]).stdout
        assert deployed.ask("find", "--xid", made, "--history", found["history"]) == [found]
        refused = deployed.trigpoint("restore", "--to-xid", made, check=False)
        assert "--timeline 1" in refused.stderr, refused.stderr
        report = deployed.ask("restore", "--to-xid", made, *found["aside"].split(), "--name", "found")
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            assert connection.execute("SELECT to_regclass('made')::text").fetchone() == ("made",)
        deployed.stop()
        (deployed.state / "journal" / "00000002.history").unlink()
        found, left = deployed.ask("find", "--xid", str(told[1].xid))
        assert (left["where"], left["aside"]) == ("log", "--timeline 1"), "one of the 300 bears its name"
        assert found["base"], "the snapshot says on what its timeline began"
        assert deployed.ask("restore", "--to-xid", str(told[1].xid), "--name", "again")["base"] == found["base"]
