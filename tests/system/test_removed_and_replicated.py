"""States right before a DROP DATABASE, and as of a time on a subscriber, come back whole and are proven."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import Stretch, WalDump
from connectors.databases.postgres.lsn import Lsn
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.restores import SEGMENT_BYTES
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import plain_folder

pytestmark = [pytest.mark.server, pytest.mark.slow]


def moment(here: Deployment) -> datetime:
    """Give a time of the server's between two commits."""
    time.sleep(0.02)
    (row,) = here.cluster.sql("SELECT clock_timestamp()")
    time.sleep(0.02)
    found: datetime = row[0]
    return found.astimezone(UTC)


def brought_back(here: Deployment, *target: str, database: str, question: str) -> tuple[Any, Any]:
    """Give the report of a restore and the answer of its clone; every check must hold."""
    deadline = time.monotonic() + 30
    while (planned := here.trigpoint("restore", *target, "--dry-run", check=False)).returncode != 0:
        assert time.monotonic() < deadline, (target, planned.stderr)
    report = here.ask("restore", *target, "--name", "back")
    try:
        assert all(held for _, held, _ in report["checks"]), report["checks"]
        with psycopg.connect(f"{report['conninfo']} dbname={database}") as clone:
            return report, clone.execute(question.encode()).fetchone()
    finally:
        here.trigpoint("clones", "drop", "--yes", "back")


def removal(here: Deployment) -> str:
    """Give a place between the record by which the files of the database went and the commit of its DROP."""
    dump = WalDump(here.cluster.programs, here.cluster.owner)
    files = here.cluster.data / "pg_wal"
    begin = min(file.name for file in files.glob("0000*") if len(file.name) == 24)
    start = Lsn(int(begin[16:], 16) * SEGMENT_BYTES)
    end = SegmentFolder(files, SEGMENT_BYTES).end_of_run(1, start)
    assert end is not None
    stretch = Stretch(files, 1, SEGMENT_BYTES, start, end)
    return str(Lsn(asyncio.run(dump.preview(stretch)).removals[-1] + 8))


@pytest.mark.parametrize(("major", "storage"), [(15, "directory"), pytest.param(18, "btrfs", marks=pytest.mark.volume)])
def test_a_database_is_whole_in_every_state_before_its_drop(major: int, storage: str) -> None:
    with deployment(major, storage) as here:
        here.cluster.sql("CREATE DATABASE old")
        here.cluster.sql("CREATE TABLE kept AS SELECT n FROM generate_series(1, 1000) n", "old")
        here.start()
        here.cluster.sql("INSERT INTO kept VALUES (0)", "old")
        written = here.cluster.sql("SELECT xmin::text, pg_current_wal_insert_lsn()::text FROM kept WHERE n = 0", "old")
        before = moment(here)
        here.cluster.sql("DROP DATABASE old")
        here.cluster.sql("CREATE TABLE later (n int)")
        here.settle()
        around = ("commits", "--around", before.isoformat(), "--within", "60")
        ((made,),) = here.cluster.sql("SELECT xmin::text::int FROM pg_class WHERE relname = 'later'")
        logged = {int(one["name"]): one for one in here.ask(*around)["commits"]}
        dropped = max(xid for xid in logged if xid < made)
        asked = {"database": "old", "question": "SELECT count(*)::int FROM kept"}
        for target in (
            ("--before-xid", str(dropped)),
            ("--to-time", before.isoformat()),
            ("--to-lsn", removal(here)),
            ("--to-xid", written[0][0]),
        ):
            report, found = brought_back(here, *target, **asked)
            assert found == (1001,), target
            stamp = datetime.fromisoformat(report["last_commit_at"])
            assert round(stamp.timestamp() * 1e6) == logged[int(written[0][0])]["time_us"], target
        assert here.stop() == 0


@pytest.fixture(params=[15, 18])
def subscribed(request: pytest.FixtureRequest) -> Iterator[tuple[Deployment, Cluster]]:
    """Give a service for a subscriber, and the publisher that it follows."""
    with (
        plain_folder() as folder,
        running_cluster(request.param, folder / "publisher") as publisher,
        deployment(request.param, "directory") as here,
    ):
        for cluster in (publisher, here.cluster):
            cluster.sql("CREATE TABLE t (n int PRIMARY KEY)")
        publisher.sql("CREATE PUBLICATION feed FOR TABLE t")
        here.cluster.sql(f"CREATE SUBSCRIPTION feed CONNECTION '{publisher.conninfo} dbname=postgres' PUBLICATION feed")
        here.wait_for(lambda: here.cluster.sql("SELECT srsubstate FROM pg_subscription_rel") == [("r",)], "the copy")
        here.start()
        yield here, publisher


def test_a_time_on_a_subscriber_is_that_of_its_own_clock(subscribed: tuple[Deployment, Cluster]) -> None:
    here, publisher = subscribed
    here.cluster.sql("ALTER SUBSCRIPTION feed DISABLE")
    publisher.sql("INSERT INTO t VALUES (1)")
    between = moment(here)  # the origin has committed, and nobody here has it
    here.cluster.sql("CREATE TABLE marker (n int)")
    here.cluster.sql("ALTER SUBSCRIPTION feed ENABLE")
    here.wait_for(lambda: here.cluster.sql("SELECT n FROM t") == [(1,)], "what was replicated")
    after = moment(here)
    here.cluster.sql("CREATE TABLE later (n int)")
    here.settle()
    asked = {"database": "postgres", "question": "SELECT count(*)::int FROM t"}
    assert brought_back(here, "--to-time", between.isoformat(), **asked)[1] == (0,)
    assert brought_back(here, "--to-time", after.isoformat(), **asked)[1] == (1,)
    assert here.stop() == 0
