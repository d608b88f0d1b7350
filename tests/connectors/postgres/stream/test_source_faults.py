"""What can happen to a slot, a server and a connection: nothing is lost in silence, and every gap has exact bounds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.source import PostgresSource
from tests.connectors.postgres.reading import everything, fresh_database, opened, settled
from tests.fixtures.postgres import MAJORS, Cluster, free_port, running_cluster
from tests.fixtures.volumes import plain_folder
from tests.fixtures.wire import Wire
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.ports import Break
from trigger.position import Position

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture(scope="module")
def cluster(major: int, folder: Path) -> Iterator[Cluster]:
    with running_cluster(major, folder / f"data-{major}", wal_sender_timeout="3s", max_wal_size="64MB") as made:
        yield made


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    with fresh_database(cluster) as name:
        cluster.sql("CREATE TABLE t (id serial PRIMARY KEY, v text)", name)
        yield name


async def insert(cluster: Cluster, database: str, number: int = 1) -> None:
    for _ in range(number):
        await asyncio.to_thread(cluster.sql, "INSERT INTO t (v) VALUES ('x')", database)


async def left_behind(cluster: Cluster, database: str) -> Position:
    """Let a source see one commit, settle it, and stop, as the service does; gives what it has settled."""
    async with opened(cluster, database, keep=True) as source:
        await insert(cluster, database)
        commits, through = await settled(cluster, source)
        assert len(commits) == 1
        return through


async def after_the_break(cluster: Cluster, database: str, after: Position) -> tuple[Break, list[Commit]]:
    """Open behind `after`, which must be a break; gives it, and what is seen of one more commit."""
    source = PostgresSource(cluster.conninfo, database)
    try:
        found = await source.open(after)
        assert found is not None
        await insert(cluster, database)
        return found, await everything(cluster, source)
    finally:
        await source.remove()


async def broken(source: PostgresSource) -> SourceError:
    """Read until it breaks, which it must; gives the error."""
    async with asyncio.timeout(20):
        while True:
            try:
                await source.read()
            except SourceError as error:
                return error


def slot_of(cluster: Cluster, database: str) -> tuple[str, Lsn]:
    ((name, confirmed),) = cluster.sql(
        f"SELECT slot_name, confirmed_flush_lsn::text FROM pg_replication_slots WHERE database = '{database}'"
    )
    return name, Lsn.parse(confirmed)


def test_a_slot_that_was_dropped_is_a_break_up_to_where_the_new_one_begins(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        cluster.sql(f"SELECT pg_drop_replication_slot('{slot_of(cluster, database)[0]}')")
        await insert(cluster, database)  # nobody will ever see it
        lost_until = cluster.flushed()
        found, commits = await after_the_break(cluster, database, after)
        assert found.reason == "the slot had been dropped"
        assert lost_until <= found.until.at <= commits[0].start
        assert len(commits) == 1

    asyncio.run(run())


def test_a_slot_that_somebody_made_anew_is_a_break_up_to_its_own_beginning(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        name, _ = slot_of(cluster, database)
        await insert(cluster, database)
        cluster.sql(f"SELECT pg_drop_replication_slot('{name}')", database)
        cluster.sql(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')", database)
        begins = slot_of(cluster, database)[1]
        await insert(cluster, database)  # this one the new slot still has
        found, commits = await after_the_break(cluster, database, after)
        assert "recreated or moved ahead" in found.reason
        assert (found.until.at, len(commits)) == (begins, 2)

    asyncio.run(run())


def test_a_slot_that_was_moved_ahead_is_a_break_up_to_there(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        await insert(cluster, database)
        cluster.sql(
            f"SELECT pg_replication_slot_advance('{slot_of(cluster, database)[0]}', pg_current_wal_lsn())", database
        )
        ahead = slot_of(cluster, database)[1]
        found, commits = await after_the_break(cluster, database, after)
        assert "moved ahead" in found.reason
        assert (found.until.at, len(commits)) == (ahead, 1)

    asyncio.run(run())


def test_a_slot_that_lost_its_log_is_made_anew_and_the_gap_ends_where_it_begins(
    cluster: Cluster, database: str
) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        cluster.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '16MB'")
        cluster.sql("SELECT pg_reload_conf()")
        try:
            for _ in range(5):
                cluster.sql("INSERT INTO t (v) SELECT repeat('x', 1000) FROM generate_series(1, 15000)", database)
                cluster.sql("SELECT pg_switch_wal(); CHECKPOINT")
            ((status,),) = cluster.sql(f"SELECT wal_status FROM pg_replication_slots WHERE database = '{database}'")
            assert status == "lost"
            lost_until = cluster.flushed()
            found, commits = await after_the_break(cluster, database, after)
        finally:
            cluster.sql("ALTER SYSTEM RESET max_slot_wal_keep_size")
            cluster.sql("SELECT pg_reload_conf()")
        assert "invalidated by the server" in found.reason
        assert lost_until <= found.until.at <= commits[0].start
        assert len(commits) == 1

    asyncio.run(run())


def test_a_publication_that_was_dropped_is_a_break_and_the_stream_goes_on(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        cluster.sql("DROP PUBLICATION trigpoint", database)
        await insert(cluster, database)
        found, commits = await after_the_break(cluster, database, after)
        assert found.reason == "the publication had been dropped"
        assert len(commits) == 1

    asyncio.run(run())


def test_a_publication_that_was_dropped_and_made_again_never_hides_a_commit(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        cluster.sql("DROP PUBLICATION trigpoint", database)
        await insert(cluster, database)  # decoded with a catalog in which there is no publication
        lost_until = cluster.flushed()
        cluster.sql("CREATE PUBLICATION trigpoint FOR ALL TABLES WITH (publish = 'insert, truncate')", database)
        source = PostgresSource(cluster.conninfo, database)
        try:
            assert await source.open(after) is None  # nothing to be seen of it yet
            with pytest.raises(SourceError):
                await everything(cluster, source)
            found = await source.open(after)
            assert found is not None
            assert found.until.at >= lost_until
            assert "publication" in found.reason
            await insert(cluster, database)
            assert len(await everything(cluster, source)) == 1
        finally:
            await source.remove()

    asyncio.run(run())


def test_another_cluster_at_the_same_address_is_a_break(cluster: Cluster, database: str, folder: Path) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        with running_cluster(cluster.major, folder / f"other-{cluster.major}") as other:
            other.sql(f"CREATE DATABASE {database}")
            other.sql("CREATE TABLE t (id serial PRIMARY KEY, v text)", database)
            found, commits = await after_the_break(other, database, after)
        assert "the cluster was replaced" in found.reason
        assert found.until.history.system != after.history.system
        assert len(commits) == 1
        await PostgresSource(cluster.conninfo, database).remove()

    asyncio.run(run())


def test_a_slot_of_that_name_that_is_not_ours_is_refused_and_left_alone(cluster: Cluster, database: str) -> None:
    source = PostgresSource(cluster.conninfo, database)
    cluster.sql(f"SELECT pg_create_physical_replication_slot('{source.slot}')")
    with pytest.raises(SourceError, match="is there, but for") as caught:
        asyncio.run(source.open(None))
    assert not caught.value.retryable
    cluster.sql(f"SELECT pg_drop_replication_slot('{source.slot}')")


def test_a_slot_that_another_process_holds_is_waited_for_and_its_holder_is_named(
    cluster: Cluster, database: str
) -> None:
    async def run() -> None:
        async with opened(cluster, database) as first:
            second = PostgresSource(cluster.conninfo, database, deadline_seconds=0.6)
            ((pid,),) = cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{first.slot}'")
            with pytest.raises(SourceError, match=str(pid)) as caught:
                await second.open(None)
            assert caught.value.retryable
            patient = PostgresSource(cluster.conninfo, database, deadline_seconds=10)
            opening = asyncio.create_task(patient.open(None))
            await asyncio.sleep(0.5)
            await first.close()
            await opening
            await insert(cluster, database)
            assert len(await everything(cluster, patient)) == 1
            await patient.close()
            await second.close()

    asyncio.run(run())


def test_a_stream_that_is_opened_names_the_transaction_that_its_slot_waits_for_to_whatever_role(
    cluster: Cluster, database: str
) -> None:
    cluster.sql("CREATE PUBLICATION trigpoint FOR ALL TABLES WITH (publish = 'insert, truncate')", database)
    cluster.sql("CREATE PUBLICATION trigpoint_keyed WITH (publish = 'update, delete')", database)
    cluster.sql("CREATE ROLE unprivileged LOGIN REPLICATION")
    dsn = cluster.conninfo.replace("user=postgres", "user=unprivileged")

    async def run() -> None:
        source = PostgresSource(dsn, database)
        with cluster.connect(database) as connection, connection.transaction():
            connection.execute("INSERT INTO t (v) VALUES ('x')")
            named = f"process {connection.info.backend_pid} (postgres)"
            with pytest.raises(SourceError, match=re.escape(named)):
                await PostgresSource(dsn, database, slot_deadline_seconds=0.1).open(None)
            opening = asyncio.create_task(source.open(None))
            async with asyncio.timeout(20):
                while named not in source.trouble:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.05)
        assert await opening is None
        assert source.trouble == ""
        await source.close()
        cluster.sql(f"SELECT pg_drop_replication_slot('{source.slot}')")

    try:
        asyncio.run(run())
    finally:
        cluster.sql("DROP ROLE unprivileged")


def test_a_silent_reader_that_beats_its_heart_is_not_cut_off(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        async with opened(cluster, database) as source:
            assert source.heartbeat_seconds <= 1
            for _ in range(10):  # 8 s without a read, wal_sender_timeout is 3 s
                await insert(cluster, database)
                await asyncio.sleep(source.heartbeat_seconds)
                await source.heartbeat()
            assert len(await everything(cluster, source)) == 10

    asyncio.run(run())


def test_a_reader_that_waits_stays_connected_by_itself(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        async with opened(cluster, database) as source:
            await everything(cluster, source)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    while True:
                        assert not (await source.read()).commits
            await insert(cluster, database)
            assert len(await everything(cluster, source)) == 1

    asyncio.run(run())


def test_after_a_crash_of_the_server_what_was_settled_is_not_given_again(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        async with opened(cluster, database) as source:
            await insert(cluster, database, 3)
            first, through = await settled(cluster, source)
            await insert(cluster, database, 2)
            unsettled = await everything(cluster, source)
            cluster.kill()  # the slot falls back to its last checkpoint
            assert (await broken(source)).retryable
            cluster.start()
            assert slot_of(cluster, database)[1] < through.at
            assert await source.open(through) is None
            await insert(cluster, database)
            again = await everything(cluster, source)
            assert [commit.name for commit in again[:-1]] == [commit.name for commit in unsettled]
            assert (len(first), len(again)) == (3, 3)

    asyncio.run(run())


def test_what_the_server_sends_twice_is_given_once_and_counted(cluster: Cluster, database: str) -> None:
    """A start position before `after` stands in for a server that ignores it, as the protocol allows it to."""

    async def run() -> None:
        async with opened(cluster, database) as source:
            await insert(cluster, database, 3)
            commits = await everything(cluster, source)
            await source.open(None)  # from the beginning of the slot
            source._after = commits[1].end
            assert [commit.name for commit in await everything(cluster, source)] == [commits[2].name]
            assert source.duplicates_suppressed == 2

    asyncio.run(run())


def test_a_server_that_has_gone_silent_is_noticed(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        source = PostgresSource(cluster.conninfo, database, silence_seconds=1.5)
        await source.open(None)
        ((pid,),) = cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{source.slot}'")
        os.kill(pid, signal.SIGSTOP)
        try:
            assert "silent" in (await broken(source)).message
        finally:
            os.kill(pid, signal.SIGCONT)
        await source.remove()

    asyncio.run(run())


def test_a_cut_wire_is_an_error_and_opening_again_waits_until_the_server_has_noticed(
    cluster: Cluster, database: str
) -> None:
    async def run() -> None:
        wire = Wire(cluster.port)
        source = PostgresSource(f"host=127.0.0.1 port={wire.port} user=postgres", database)
        await source.open(None)
        await insert(cluster, database)
        _, through = await settled(cluster, source)
        await insert(cluster, database)
        wire.cut(server_learns=False)
        wire.mend()
        assert (await broken(source)).retryable
        assert await source.open(through) is None  # C9: the old process holds the slot until wal_sender_timeout
        assert len(await everything(cluster, source)) == 1
        await source.remove()
        wire.close()

    asyncio.run(run())


def promoted_standby(cluster: Cluster, folder: Path) -> Cluster:
    """Give a standby of `cluster`, promoted: a new timeline, and no slot of ours."""
    standby = Cluster(cluster.major, folder / f"standby-{cluster.major}-{free_port()}")
    standby.sockets.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(standby.sockets, *standby.owner)
        os.chown(standby.data.parent, *standby.owner)
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres"]
    cluster.run("pg_basebackup", "-D", standby.data, "-X", "stream", "-R", "-c", "fast", *where)
    standby.configure({"port": str(standby.port), "unix_socket_directories": str(standby.sockets)})
    standby.start()
    target = cluster.flushed()
    while Lsn.parse(standby.sql("SELECT coalesce(pg_last_wal_replay_lsn()::text, '0/0')")[0][0]) < target:
        pass
    standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
    return standby


def test_a_promoted_standby_is_a_break_into_its_own_timeline(cluster: Cluster, database: str, folder: Path) -> None:
    async def run() -> None:
        after = await left_behind(cluster, database)
        standby = promoted_standby(cluster, folder)
        try:
            await insert(standby, database)
            lost_until = standby.flushed()
            found, commits = await after_the_break(standby, database, after)
        finally:
            standby.destroy()
        assert "the timeline changed from 1 to 2" in found.reason
        assert (found.until.history.system, found.until.history.branch) == (after.history.system, 2)
        assert lost_until <= found.until.at <= commits[0].start
        assert [commit.history.branch for commit in commits] == [2]
        await PostgresSource(cluster.conninfo, database).remove()

    asyncio.run(run())


def test_a_cluster_that_was_put_back_to_an_older_copy_is_a_break(cluster: Cluster, database: str, folder: Path) -> None:
    async def run() -> None:
        await left_behind(cluster, database)
        cluster.stop()
        copy = folder / "older-copy"
        shutil.copytree(cluster.data, copy)
        cluster.start()
        async with opened(cluster, database, keep=True) as source:
            await insert(cluster, database, 50)
            _, after = await settled(cluster, source)
        cluster.stop()
        shutil.rmtree(cluster.data)
        shutil.copytree(copy, cluster.data)
        if os.geteuid() == 0:
            for path in [cluster.data, *cluster.data.rglob("*")]:
                os.chown(path, *cluster.owner, follow_symlinks=False)
        shutil.rmtree(copy)
        cluster.start()
        found, commits = await after_the_break(cluster, database, after)
        assert "older copy" in found.reason
        assert found.until.at < after.at
        assert commits[-1].end < after.at  # at a place where another commit stood before
        assert all(commit.start >= found.until.at for commit in commits)

    asyncio.run(run())


def test_a_server_that_stops_is_not_held_up_by_commits_that_wait_for_a_point(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        async with opened(cluster, database, keep=True) as source:
            await insert(cluster, database)
            waiting = await everything(cluster, source)
            stopping = asyncio.create_task(asyncio.to_thread(cluster.stop))
            assert (await broken(source)).retryable
            await source.close()  # as whoever reads it does
            async with asyncio.timeout(20):
                await stopping
            cluster.start()
            assert await source.open(None) is None
            assert [commit.name for commit in await everything(cluster, source)] == [commit.name for commit in waiting]
        await source.remove()

    asyncio.run(run())


async def beat_for_ever(source: PostgresSource) -> None:
    async with asyncio.timeout(20):
        while True:
            await asyncio.sleep(source.heartbeat_seconds)
            await source.heartbeat()


def test_a_server_that_stops_is_not_held_up_by_a_reader_that_has_no_room(cluster: Cluster, database: str) -> None:
    async def run() -> None:
        async with opened(cluster, database) as source:
            await everything(cluster, source)
            await insert(cluster, database)
            stopping = asyncio.create_task(asyncio.to_thread(cluster.stop))
            with pytest.raises(SourceError, match="shutting down"):
                await beat_for_ever(source)
            await source.close()
            async with asyncio.timeout(20):
                await stopping
            cluster.start()

    asyncio.run(run())
