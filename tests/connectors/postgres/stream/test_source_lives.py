"""An open that fails leaves what is known as it was: of which log, and how far it was seen.

A server that has become another one answers, and the slot cannot be made at once: a transaction holds it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.lives import Lives
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.stream.source import PostgresSource
from tests.connectors.postgres.reading import everything
from tests.fixtures.postgres import Cluster, running_cluster, running_standby
from tests.fixtures.volumes import plain_folder
from trigger.errors import SourceError
from trigger.position import Position

pytestmark = pytest.mark.server

SEGMENT_BYTES = 16 << 20
SLOT_SECONDS = 0.5
TRIES = 2


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture
def cluster(folder: Path) -> Iterator[Cluster]:
    with running_cluster(18, folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE t (v int)")
        yield made


@pytest.fixture
def folders(folder: Path) -> LogFolders:
    return LogFolders(folder / "journal", SEGMENT_BYTES)


def source_of(cluster: Cluster, folders: LogFolders) -> PostgresSource:
    lives = Lives(folders=folders)
    recognise, saw = lives.confirm, lives.saw
    return PostgresSource(
        cluster.conninfo, "postgres", recognise=recognise, saw=saw, slot_deadline_seconds=SLOT_SECONDS
    )


async def seen(cluster: Cluster, source: PostgresSource) -> Position:
    """Commit much and read it; gives how far the source is, which is closed."""
    await source.open(None)
    cluster.sql("INSERT INTO t SELECT generate_series(1, 200000)")
    commits = await everything(cluster, source)
    await source.close()
    return commits[-1].position


@contextlib.contextmanager
def transaction_of(cluster: Cluster) -> Iterator[None]:
    """Hold a transaction open, for whose end the making of a slot waits."""
    with cluster.connect() as connection, connection.transaction():
        connection.execute(b"INSERT INTO t VALUES (1)")
        yield


async def failed(cluster: Cluster, source: PostgresSource, after: Position) -> None:
    with transaction_of(cluster):
        for _ in range(TRIES):
            with pytest.raises(SourceError, match="was not made in time"):
                await source.open(after)


def test_an_older_copy_begins_one_new_life_however_often_the_stream_cannot_be_opened(
    cluster: Cluster, folder: Path, folders: LogFolders
) -> None:
    cluster.stop()
    subprocess.run(["cp", "-a", cluster.data, folder / "older"], check=True)
    cluster.start()

    async def run() -> None:
        source = source_of(cluster, folders)
        after = await seen(cluster, source)
        cluster.stop()
        shutil.rmtree(cluster.data)
        (folder / "older").rename(cluster.data)
        cluster.start()
        await failed(cluster, source, after)
        broken = await source.open(after)
        assert broken is not None
        assert broken.lineage.history.incarnation == folders.newest(after.history.system) == 1
        await source.remove()

    asyncio.run(run())


def test_a_failover_to_a_standby_that_lacks_some_is_none_of_an_older_copy_though_the_stream_cannot_be_opened_at_once(
    cluster: Cluster, folders: LogFolders
) -> None:
    async def run() -> None:
        with running_standby(cluster, streams=False) as standby:
            source = source_of(cluster, folders)
            after = await seen(cluster, source)
            cluster.stop()
            standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
            assert standby.flushed() < after.at
            source._dsn = f"{standby.conninfo} dbname=postgres"  # as behind an address that leads to the primary
            await failed(standby, source, after)
            broken = await source.open(after)
            assert broken is not None
            lineage = broken.lineage
            assert (lineage.history.branch, lineage.history.incarnation) == (2, 0)
            assert lineage.includes(Position(after.history, lineage.forks[-1][1])), "what both have is its past"
            await source.remove()

    asyncio.run(run())
