"""What a source holds in memory: bounded, whatever one transaction or a backlog brings."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
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


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read_until(sys.argv[1], int(sys.argv[2])))))
