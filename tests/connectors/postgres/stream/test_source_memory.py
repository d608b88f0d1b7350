"""What a source holds in memory: bounded, whatever one transaction or a backlog brings."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.stream.source import PostgresSource
from tests.fixtures.memory import peak_megabytes
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

pytestmark = [pytest.mark.server, pytest.mark.slow]
ROOT = Path(__file__).parents[4]
LIMIT_MEGABYTES = 150
ROWS = 5_000_000
BACKLOG = 100_000


@pytest.fixture
def major() -> int:
    return MAJORS[-1]


@pytest.fixture
def cluster(major: int) -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(major, folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE t (v int)")
        yield made


async def read_until(dsn: str, until: int) -> dict[str, float]:
    """Read a source to its end as a process of its own; gives what it saw and the most memory it ever held."""
    source = PostgresSource(dsn, "postgres")
    await source.open(None)
    commits = rows = largest = through = 0
    while through < until:
        batch = await source.read()
        commits += len(batch.commits)
        rows += sum(commit.rows for commit in batch.commits)
        largest = max(largest, len(batch.commits))
        through = batch.through.at
        await source.acknowledge(batch.through)
    await source.close()
    return {"commits": commits, "rows": rows, "largest": largest, "megabytes": peak_megabytes()}


def read_alone(cluster: Cluster) -> dict[str, float]:
    arguments = [sys.executable, "-m", "tests.connectors.postgres.stream.test_source_memory"]
    arguments += [cluster.conninfo, str(int(cluster.flushed()))]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=ROOT, timeout=250)
    found: dict[str, float] = json.loads(done.stdout)
    return found


async def make_slot(cluster: Cluster) -> None:
    source = PostgresSource(cluster.conninfo, "postgres")
    await source.open(None)
    await source.close()


def test_a_transaction_of_five_million_rows_is_read_in_bounded_memory(cluster: Cluster) -> None:
    asyncio.run(make_slot(cluster))
    cluster.sql(f"INSERT INTO t SELECT generate_series(1, {ROWS})")
    found = read_alone(cluster)
    assert (found["commits"], found["rows"]) == (1, ROWS)
    assert found["megabytes"] < LIMIT_MEGABYTES


def test_a_backlog_of_a_hundred_thousand_commits_is_read_in_bounded_memory(cluster: Cluster) -> None:
    asyncio.run(make_slot(cluster))
    cluster.sql(
        f"DO $$ BEGIN FOR n IN 1..{BACKLOG} LOOP INSERT INTO t VALUES (n); COMMIT; END LOOP; END $$",
    )
    found = read_alone(cluster)
    assert (found["commits"], found["rows"]) == (BACKLOG, BACKLOG)
    assert found["megabytes"] < LIMIT_MEGABYTES
    assert found["largest"] <= 1_000


PARTITIONS, WIDE_COMMITS = 5_000, 300


def test_a_backlog_of_commits_over_thousands_of_partitions_is_read_in_bounded_memory(cluster: Cluster) -> None:
    cluster.sql("CREATE TABLE wide (p int, n int) PARTITION BY LIST (p)")
    cluster.sql(
        f"DO $$ BEGIN FOR n IN 1..{PARTITIONS} LOOP"
        "   EXECUTE format('CREATE TABLE wide_%s PARTITION OF wide FOR VALUES IN (%s)', n, n);"
        "   IF n % 500 = 0 THEN COMMIT; END IF; END LOOP; END $$"
    )
    asyncio.run(make_slot(cluster))
    cluster.sql(
        f"DO $$ BEGIN FOR n IN 1..{WIDE_COMMITS} LOOP"
        f"   INSERT INTO wide SELECT p, n FROM generate_series(1, {PARTITIONS}) p;"
        "   INSERT INTO wide SELECT 1, g FROM generate_series(1, n) g;"
        "   COMMIT; END LOOP; END $$"
    )
    found = read_alone(cluster)
    rows = WIDE_COMMITS * PARTITIONS + WIDE_COMMITS * (WIDE_COMMITS + 1) // 2
    assert (found["commits"], found["rows"]) == (WIDE_COMMITS, rows)
    assert found["megabytes"] < LIMIT_MEGABYTES


SAVEPOINTS = 400_000


@pytest.fixture(params=MAJORS)
def any_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(request.param, folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE guarded (v text)")
        yield made


def test_a_transaction_of_very_many_savepoints_comes_streamed_in_time_and_in_bounded_memory(
    any_cluster: Cluster,
) -> None:
    """Version 15 takes a quarter of an hour and more for it where it is not streamed."""
    asyncio.run(make_slot(any_cluster))
    any_cluster.sql(
        f"DO $$ BEGIN FOR n IN 1..{SAVEPOINTS} LOOP BEGIN"
        "   INSERT INTO guarded VALUES (repeat('x', 300));"  # more than the server holds in memory
        "   IF n % 10 = 0 THEN RAISE division_by_zero; END IF;"
        "   EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$"
    )
    began = time.monotonic()
    found = read_alone(any_cluster)
    assert (found["commits"], found["rows"]) == (1, SAVEPOINTS * 9 // 10)
    assert found["megabytes"] < LIMIT_MEGABYTES
    assert time.monotonic() - began < 100


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read_until(sys.argv[1], int(sys.argv[2])))))
