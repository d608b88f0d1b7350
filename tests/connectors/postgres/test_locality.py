"""A server that answers is held against the files that lie here: another host's, a standby's, another cluster's.

The address is that of one server, and the files are those of the other, as after a failover to another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres import places
from connectors.databases.postgres.control import CONTROL, Control
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import server_owner
from tests.fixtures.another_host import on_another_host, promoted, standby_beside
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster, running_standby
from tests.fixtures.volumes import plain_folder
from trigger.errors import DatabaseError, SourceError
from trigger.model import Layout, Severity, Volume

pytestmark = pytest.mark.server

CHECKPOINTS = 40
LIMIT_SECONDS = 30.0


@pytest.fixture(params=MAJORS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(int(request.param), folder / "data", fsync="off") as made:
        made.sql("CREATE TABLE t (v int)")
        yield made


def asked(cluster: Cluster, act: Callable[[Postgres], Awaitable[None]]) -> None:
    async def run() -> None:
        database = Postgres(cluster.conninfo, ["postgres"])
        try:
            await act(database)
        finally:
            await database.close()

    asyncio.run(run())


def layout_of(cluster: Cluster) -> Layout:
    return places.layout(cluster.major * 10_000, cluster.data, cluster.data / "pg_wal", {}, (), cluster.owner, 16 << 20)


def replayed(standby: Cluster, end: Lsn) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'")[0][0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def refused(database: Postgres, words: str) -> None:
    """No point can be made of what lies here, by whichever storage; the log is told all the same."""
    with pytest.raises(DatabaseError, match=words) as error:
        await database.redo()
    assert "protect a server on its own host" in error.value.hint
    with pytest.raises(DatabaseError, match=words):
        async with database.bracket("a point"):
            pass
    with pytest.raises(DatabaseError):
        await database.layout()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_standby_that_was_promoted_elsewhere_is_not_the_server_of_the_files_that_were_left(
    mode: str, cluster: Cluster
) -> None:
    async def act(database: Postgres) -> None:
        database.lies_at(layout_of(cluster))
        await refused(database, f"{cluster.data} is not where the server that answers keeps its data")
        assert (await database.durable()).history.branch == 2, "its log is known"

    with running_standby(cluster, streams=False) as standby:
        cluster.stop(mode)
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        asked(standby, act)


def test_what_a_standby_was_promoted_from_is_told_from_it_before_its_first_checkpoint_in_the_same_second_too(
    cluster: Cluster,
) -> None:
    """Until then both have the very same checkpoint, and the files bear times of whole seconds."""
    with running_standby(cluster, streams=False) as standby:
        cluster.stop("immediate")
        ((checkpointer,),) = standby.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
        os.kill(checkpointer, signal.SIGSTOP)
        try:
            standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
            said, left = Control.told(standby.sql(CONTROL)[0]), Control.read(cluster.data)
            assert said == Control.read(standby.data)
            assert said.checkpoint == left.checkpoint
            assert said != left._replace(written_at=said.written_at)
        finally:
            os.kill(checkpointer, signal.SIGCONT)


def test_a_server_of_which_a_standby_lies_here_is_not_the_server_of_its_files(cluster: Cluster) -> None:
    """As where the primary of before follows the one that took over; both have the very same checkpoint."""
    with running_standby(cluster, streams=True) as standby:

        async def act(database: Postgres) -> None:
            database.lies_at(layout_of(standby))
            cluster.sql("CHECKPOINT")
            await asyncio.to_thread(replayed, standby, cluster.flushed())
            standby.sql("CHECKPOINT")
            assert Control.read(standby.data).checkpoint == Control.read(cluster.data).checkpoint
            await refused(database, "not in production")

        asked(cluster, act)


def test_another_cluster_is_refused_by_its_identifier_before_anything_is_made_in_it(cluster: Cluster) -> None:
    with plain_folder() as folder, running_cluster(cluster.major, folder / "data", fsync="off") as other:

        async def act(database: Postgres) -> None:
            database.lies_at(layout_of(cluster))
            words = f"in {cluster.data} lie the files of cluster [0-9]+, and cluster [0-9]+ answers"
            await refused(database, words)
            (source,) = database.sources()
            with pytest.raises(SourceError, match=words):
                await source.open(None)
            assert other.sql("SELECT slot_name FROM pg_replication_slots") == []
            assert other.sql("SELECT pubname FROM pg_publication") == []

        asked(other, act)


@pytest.mark.root
def test_the_layout_is_not_of_a_server_whose_path_is_another_ones_here(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        assert cluster.sql("SHOW data_directory") == [(str(cluster.data),)]
        with pytest.raises(DatabaseError, match="is not where the server that answers keeps its data"):
            await database.layout()
        found = await database.check([Volume("data", str(cluster.data))])
        assert any("is not where the server" in one.message for one in found if one.severity is Severity.REFUSED)

    another = standby_beside(cluster)
    cluster.stop("immediate")
    with on_another_host(cluster, another):
        promoted(cluster)
        asked(cluster, act)


# ---- the server's own files


def test_a_server_is_that_of_its_files_however_often_it_starts_and_whatever_it_writes_meanwhile(
    cluster: Cluster, tmp_path: Path
) -> None:
    async def act(database: Postgres) -> None:
        database.lies_at(await database.layout())
        for how in (cluster.stop, cluster.kill):
            how()
            cluster.start()
            await database.redo()
        stop = threading.Event()

        def checkpoints() -> None:
            while not stop.is_set():
                cluster.sql("INSERT INTO t VALUES (1); CHECKPOINT")

        writer = asyncio.create_task(asyncio.to_thread(checkpoints))
        try:
            for _ in range(CHECKPOINTS):
                assert await database.redo() <= await database.ceiling()
            async with database.bracket("a point") as finish:
                await finish()
        finally:
            stop.set()
            await writer

    asked(cluster, act)


def test_a_data_directory_that_is_reached_by_another_path_here_is_the_servers(cluster: Cluster) -> None:
    """In a container the path is another one; on this host a link may lead from it to where the files lie."""

    async def act(database: Postgres) -> None:
        database.lies_at(await database.layout())
        await database.redo()
        assert places.data_directory(await database.layout()) == there

    there = cluster.data.parent / "there"
    cluster.stop()
    cluster.data.rename(there)
    cluster.data.symlink_to(there)
    cluster.start()
    try:
        asked(cluster, act)
    finally:
        cluster.stop()
        cluster.data.unlink()
        there.rename(cluster.data)


def test_where_no_cluster_lies_no_point_is_made(cluster: Cluster, tmp_path: Path) -> None:
    async def act(database: Postgres) -> None:
        database.lies_at(places.layout(150000, tmp_path, tmp_path / "pg_wal", {}, (), cluster.owner, 16 << 20))
        with pytest.raises(DatabaseError, match="the data of no server lie in"):
            await database.redo()
        await database.durable()

    asked(cluster, act)


@pytest.mark.root
def test_where_the_files_may_not_be_read_that_is_said_and_nothing_is_refused(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        database.lies_at(await database.layout())
        with as_nobody():
            await database.redo()
            async with database.bracket("a point") as finish:
                await finish()
        (said,) = database._locality.findings()
        assert said.severity is Severity.WARNING
        assert f"it cannot be told whether the server that answers keeps its data in {cluster.data}" in said.message
        await database.redo()
        assert database._locality.findings() == []

    asked(cluster, act)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Have none of root's rights, nor those of the owner of the data."""
    nobody = 65534
    assert nobody not in server_owner()
    os.setegid(nobody)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
