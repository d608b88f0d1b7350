"""What a source gives of a running server: which commits, with which facts, in step with PostgreSQL's own programs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream import pgoutput
from connectors.databases.postgres.stream.source import PostgresSource
from tests.connectors.postgres.reading import commit_records, everything, fresh_database, opened, settled
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.errors import SourceError
from trigger.model import Changes, Commit, to_microseconds
from trigger.position import Name, Position

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def cluster(major: int) -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(major, folder / "data", logical_decoding_work_mem="64kB") as made:
        yield made


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    with fresh_database(cluster) as name:
        yield name


def play(cluster: Cluster, database: str, script: str) -> list[Commit]:
    """Run statements one by one while a source is open, and give what it saw; the part before `---` runs first."""
    before, _, after = script.rpartition("---")
    for statement in filter(str.strip, before.split(";\n")):
        cluster.sql(statement, database)

    async def run() -> list[Commit]:
        async with opened(cluster, database) as source:
            for statement in filter(str.strip, after.split(";\n")):
                await asyncio.to_thread(cluster.sql, statement, database)
            return await everything(cluster, source)

    return asyncio.run(run())


def test_a_commit_bears_every_fact_that_the_server_knows_of_it(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (id int PRIMARY KEY)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            start = cluster.flushed()
            with cluster.connect(database) as connection, connection.transaction():
                connection.execute("INSERT INTO t SELECT generate_series(1, 3)")
                connection.execute("UPDATE t SET id = 10 WHERE id = 1")
                connection.execute("DELETE FROM t WHERE id = 2")
                connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', 'the größte')")
                connection.execute("SELECT pg_logical_emit_message(true, 'other', 'not ours')")
                row = connection.execute("SELECT pg_current_xact_id()::text").fetchone()
            (commit,) = await everything(cluster, source)
            (record,) = commit_records(cluster, start, cluster.flushed())
            system, timeline = cluster.sql(
                "SELECT system_identifier::text, timeline_id FROM pg_control_system(), pg_control_checkpoint()"
            )[0]
            assert row is not None
            assert (commit.name, commit.start) == (Name("", int(row[0])), record.start)
            assert commit.start < commit.end <= cluster.flushed()
            assert (commit.history.system, commit.history.branch, commit.stream) == (system, timeline, database)
            assert commit.tables == {"public.t": Changes(inserted=3, updated=1, deleted=1)}
            assert commit.markers == ("the größte",)
            assert abs(commit.time_us / 1e6 - time.time()) < 30

    asyncio.run(run())


def test_the_commit_time_is_the_servers_own_to_the_microsecond(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (v int)", database)
    cluster.configure({"track_commit_timestamp": "on"})
    cluster.restart()

    async def run() -> None:
        async with opened(cluster, database) as source:
            cluster.sql("INSERT INTO t VALUES (1)", database)
            (commit,) = await everything(cluster, source)
            ((at,),) = cluster.sql(f"SELECT pg_xact_commit_timestamp('{commit.name}'::xid)", database)
            assert commit.time_us == to_microseconds(at)

    asyncio.run(run())


def test_a_large_transaction_that_is_streamed_counts_only_what_was_not_rolled_back(
    cluster: Cluster, database: str
) -> None:
    script = (
        """
        CREATE TABLE t (v text);
        CREATE TABLE u (id int PRIMARY KEY, v text)
        ---
        BEGIN;
          INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 2000);
          SAVEPOINT a; INSERT INTO u SELECT g, repeat('y', 500) FROM generate_series(1, 2000) g; ROLLBACK TO a;
          SAVEPOINT b; INSERT INTO u SELECT g, repeat('y', 500) FROM generate_series(1, 2000) g;
          SAVEPOINT c; UPDATE u SET v = v || 'z' WHERE id <= 1000; ROLLBACK TO c;
          SAVEPOINT d; DELETE FROM u WHERE id <= 100; RELEASE d;
        COMMIT
    """.replace("BEGIN;\n", "BEGIN; ")
        .replace(";\n          ", "; ")
        .replace(";\n        COMMIT", "; COMMIT")
    )
    (commit,) = play(cluster, database, script)
    assert commit.tables == {"public.t": Changes(inserted=2000), "public.u": Changes(inserted=2000, deleted=100)}


def test_a_large_transaction_that_is_streamed_and_aborted_gives_nothing(cluster: Cluster, database: str) -> None:
    script = """
        CREATE TABLE t (v text)
        ---
        BEGIN; INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 5000); ROLLBACK;
        INSERT INTO t VALUES ('after')
    """
    (commit,) = play(cluster, database, script)
    assert commit.tables == {"public.t": Changes(inserted=1)}


def test_a_prepared_transaction_is_a_commit_when_it_is_committed_and_not_before(
    cluster: Cluster, database: str
) -> None:
    cluster.sql("CREATE TABLE t (v text)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            big = "INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 2000)"
            cluster.sql(f"BEGIN; {big}; PREPARE TRANSACTION 'yes-{database}'", database)
            cluster.sql(f"BEGIN; {big}; PREPARE TRANSACTION 'no-{database}'", database)
            cluster.sql("INSERT INTO t VALUES ('between')", database)
            between, through = await settled(cluster, source)  # acknowledges past both prepares
            assert [commit.rows for commit in between] == [1]
            await source.open(through)
            cluster.sql(f"ROLLBACK PREPARED 'no-{database}'", database)
            cluster.sql(f"COMMIT PREPARED 'yes-{database}'", database)
            assert [commit.rows for commit in await everything(cluster, source)] == [2000]

    asyncio.run(run())


def test_a_commit_that_came_through_an_origin_names_it(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (v text)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            with cluster.connect(database) as connection:
                connection.execute("SELECT pg_replication_origin_create(%s)", [f"far {database}"])
                connection.execute("SELECT pg_replication_origin_session_setup(%s)", [f"far {database}"])
                connection.execute("INSERT INTO t VALUES ('small')")
                connection.execute("INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 2000)")
                connection.execute("SELECT pg_replication_origin_session_reset()")
                connection.execute("INSERT INTO t VALUES ('local')")
            commits = await everything(cluster, source)
            assert [commit.origin for commit in commits] == [f"far {database}", f"far {database}", ""]
        cluster.sql(f"SELECT pg_replication_origin_drop('far {database}')", database)

    asyncio.run(run())


def test_of_pgbench_and_a_mixed_load_every_commit_record_is_given_exactly_once(cluster: Cluster, database: str) -> None:
    cluster.run(
        "pgbench",
        "-i",
        "-q",
        "-s",
        "1",
        "-h",
        str(cluster.sockets),
        "-p",
        str(cluster.port),
        "-U",
        "postgres",
        database,
    )
    cluster.sql("CREATE TABLE mixed (id serial PRIMARY KEY, v text)", database)

    def load() -> None:
        for number in range(30):
            cluster.sql(
                "BEGIN; INSERT INTO mixed (v) VALUES ('a'); SAVEPOINT s; DELETE FROM mixed; ROLLBACK TO s; COMMIT",
                database,
            )
            cluster.sql("BEGIN; INSERT INTO mixed (v) VALUES ('gone'); ROLLBACK", database)
            cluster.sql(f"BEGIN; UPDATE mixed SET v = 'b'; PREPARE TRANSACTION '{database}{number}'", database)
            cluster.sql(f"{'COMMIT' if number % 2 else 'ROLLBACK'} PREPARED '{database}{number}'", database)
            cluster.sql("INSERT INTO mixed (v) SELECT repeat('x', 300) FROM generate_series(1, 500)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            start = cluster.flushed()
            bench = [
                "-n",
                "-c",
                "4",
                "-T",
                "3",
                "-h",
                str(cluster.sockets),
                "-p",
                str(cluster.port),
                "-U",
                "postgres",
                database,
            ]
            await asyncio.gather(asyncio.to_thread(cluster.run, "pgbench", *bench), asyncio.to_thread(load))
            truth = commit_records(cluster, start, cluster.flushed())
            commits = await everything(cluster, source)
            assert len(truth) > 300
            assert [((commit.name.number or 0) & 0xFFFFFFFF, commit.start) for commit in commits] == truth
            for one, following in pairwise(commits):
                assert one.start < one.end <= following.start

    asyncio.run(run())


def test_an_idle_database_beside_a_busy_one_lets_the_server_forget(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE busy (v text)")

    async def run() -> None:
        async with opened(cluster, database) as source:
            cluster.sql("INSERT INTO busy SELECT repeat('x', 900) FROM generate_series(1, 20000)")
            target = cluster.flushed()
            commits, through = await settled(cluster, source)
            assert (commits, through.at >= target) == ([], True)
            confirmed = f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{source.slot}'"
            deadline = time.monotonic() + 10
            while Lsn.parse(cluster.sql(confirmed)[0][0]) < target:
                assert time.monotonic() < deadline

    asyncio.run(run())
    cluster.sql("DROP TABLE busy")


def test_no_update_or_delete_of_an_application_ever_fails_because_of_us(cluster: Cluster, database: str) -> None:
    shapes = (
        "CREATE TABLE keyed (id int PRIMARY KEY, v int)",
        "CREATE TABLE bare (id int, v int)",
        "CREATE TABLE whole (id int, v int); ALTER TABLE whole REPLICA IDENTITY FULL",
        "CREATE TABLE none (id int PRIMARY KEY, v int); ALTER TABLE none REPLICA IDENTITY NOTHING",
        "CREATE TABLE late_key (id int PRIMARY KEY DEFERRABLE, v int)",
        "CREATE TABLE computed (id int, v int, w int GENERATED ALWAYS AS (v + 1) STORED);"
        " ALTER TABLE computed REPLICA IDENTITY FULL",
        "CREATE TABLE parted (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);"
        " CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (50);"
        " CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (50) TO (100)",
        "CREATE TABLE bare_parted (id int, v int) PARTITION BY RANGE (id);"
        " CREATE TABLE bare_parted_1 PARTITION OF bare_parted FOR VALUES FROM (0) TO (100)",
        "CREATE UNLOGGED TABLE unlogged (id int, v int)",
        'CREATE SCHEMA "Odd ""one"; CREATE TABLE "Odd ""one"."Ta;ble" (id int PRIMARY KEY, v int)',
    )
    names = (
        "keyed",
        "bare",
        "whole",
        "none",
        "late_key",
        "computed",
        "parted",
        "bare_parted",
        "unlogged",
        '"Odd ""one"."Ta;ble"',
    )

    def write(names: tuple[str, ...]) -> None:
        for name in names:
            cluster.sql(f"INSERT INTO {name} (id, v) VALUES (1, 1), (60, 1), (61, 2)", database)
            cluster.sql(f"UPDATE {name} SET v = 5 WHERE id = 1", database)
            cluster.sql(f"DELETE FROM {name} WHERE id = 60", database)
            cluster.sql(f"TRUNCATE {name}", database)

    async def run() -> None:
        for shape in shapes[:5]:
            cluster.sql(shape, database)
        async with opened(cluster, database) as source:
            write(names[:5])
            for shape in shapes[5:]:  # made while we watch
                cluster.sql(shape, database)
            write(names[5:])
            await everything(cluster, source)
            await asyncio.sleep(1.1)
            cluster.sql("INSERT INTO keyed VALUES (99, 1)", database)
            await everything(cluster, source)  # by now the new tables have been looked at
            write(names)
            commits = await everything(cluster, source)
            assert not source.trouble
            updated = {name for commit in commits for name, changes in commit.tables.items() if changes.updated}
            seen = {"public.keyed", "public.whole", "public.parted_1", 'Odd "one.Ta;ble'}
            assert updated == seen | ({"public.computed"} if cluster.major < 18 else set())

    asyncio.run(run())


def test_a_new_partition_can_be_written_whatever_its_parent_has_and_whether_we_look_or_not(
    cluster: Cluster, database: str
) -> None:
    """Also where an earlier version published parents, with all that would ever be a partition of them."""
    full = "ALTER TABLE events REPLICA IDENTITY FULL; ALTER TABLE events_1 REPLICA IDENTITY FULL"

    def updated(commits: list[Commit]) -> set[str]:
        return {name for commit in commits for name, changes in commit.tables.items() if changes.updated}

    async def run() -> None:
        cluster.sql("CREATE TABLE events (id int, v int) PARTITION BY RANGE (id)", database)
        cluster.sql(f"CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (50); {full}", database)
        async with opened(cluster, database, keep=True):
            pass
        cluster.sql("ALTER PUBLICATION trigpoint_keyed ADD TABLE events", database)
        async with opened(cluster, database, keep=True) as source:
            await everything(cluster, source)
        cluster.sql("CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (50) TO (100)", database)
        cluster.sql("INSERT INTO events VALUES (1, 1), (60, 1)", database)
        cluster.sql("UPDATE events SET v = 2; DELETE FROM events WHERE id = 60", database)  # while nobody looks
        async with opened(cluster, database) as source:
            assert updated(await everything(cluster, source)) == {"public.events_1"}
            cluster.sql("UPDATE events SET v = 3; INSERT INTO events VALUES (61, 1)", database)
            assert updated(await everything(cluster, source)) == {"public.events_1"}
        published = cluster.sql("SELECT tablename FROM pg_publication_tables WHERE pubname LIKE '%keyed'", database)
        assert published in ([], [("events_1",)])

    asyncio.run(run())


def test_a_read_that_is_cancelled_loses_nothing(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (v int)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            writer = asyncio.create_task(asyncio.to_thread(write_rows, cluster, database, 300))
            commits: list[Commit] = []
            while not writer.done() or not commits or commits[-1].markers != ("last",):
                try:
                    async with asyncio.timeout(0.0005):
                        commits += (await source.read()).commits
                except TimeoutError:
                    continue
            await writer
            assert len(commits) == 301

    asyncio.run(run())


def write_rows(cluster: Cluster, database: str, number: int) -> None:
    with cluster.connect(database) as connection:
        for value in range(number):
            connection.execute("INSERT INTO t VALUES (%s)", [value])
        connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', 'last')")


def test_removing_leaves_nothing_of_ours_in_the_cluster(cluster: Cluster, database: str) -> None:
    async def run() -> list[str]:
        async with opened(cluster, database, keep=True):
            pass
        source = PostgresSource(cluster.conninfo, database)
        gone = await source.remove()
        assert await source.remove() == []
        return gone

    assert len(asyncio.run(run())) == 3
    assert cluster.sql("SELECT count(*) FROM pg_publication", database) == [(0,)]
    assert cluster.sql(f"SELECT count(*) FROM pg_replication_slots WHERE database = '{database}'") == [(0,)]


def test_after_damage_nothing_more_is_given_until_the_stream_is_opened_anew(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (v int)", database)

    async def run() -> None:
        async with opened(cluster, database) as source:
            cluster.sql("INSERT INTO t VALUES (1)", database)
            commits, through = await settled(cluster, source)
            source._decoder._relations.clear()  # as if its description had been lost
            source._decoder._named.clear()
            cluster.sql("INSERT INTO t VALUES (2)", database)
            with pytest.raises(SourceError, match="cannot be understood") as caught:
                await everything(cluster, source)
            assert not caught.value.retryable
            cluster.sql("INSERT INTO t VALUES (3)", database)
            with pytest.raises(SourceError, match="not open"):
                await source.read()
            assert await source.open(through) is None
            assert (len(commits), len(await everything(cluster, source))) == (1, 2)

    asyncio.run(run())


def test_a_marker_in_a_savepoint_that_was_rolled_back_is_never_given(cluster: Cluster, database: str) -> None:
    cluster.sql("CREATE TABLE t (v text)", database)
    big = "INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 2000)"

    async def run() -> None:
        async with opened(cluster, database) as source:
            with cluster.connect(database) as connection, connection.transaction():
                connection.execute(big)
                connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', 'kept')")
                connection.execute("SAVEPOINT a")
                connection.execute("SELECT pg_logical_emit_message(true, 'trigpoint', 'rolled back')")
                connection.execute(big)
                await asyncio.sleep(0.5)  # streamed by now
                connection.execute("ROLLBACK TO a")
                connection.execute(big)
            with pytest.raises(SourceError, match="savepoint") as caught:
                await everything(cluster, source)
            assert caught.value.retryable
            await source.open(None)
            (commit,) = await everything(cluster, source)
            assert (commit.markers, commit.rows) == (("kept",), 4000)

    asyncio.run(run())


def test_a_stream_that_described_very_many_tables_is_opened_anew_and_loses_and_repeats_nothing(
    cluster: Cluster, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgoutput, "RELATIONS_LIMIT", 3)

    async def run() -> None:
        async with opened(cluster, database) as source:
            commits: list[Commit] = []
            through: Position | None = None
            again = 0
            for n in range(10):
                cluster.sql(f"CREATE TABLE t{n} (v int)", database)
                cluster.sql(f"INSERT INTO t{n} VALUES (1)", database)
                until = cluster.flushed()
                while through is None or through.at < until:
                    try:
                        batch = await source.read()
                        commits, through = [*commits, *batch.commits], batch.through
                    except SourceError:
                        await source.close()
                        assert await source.open(through) is None
                        again += 1
            assert [list(one.tables) for one in commits if one.tables] == [[f"public.t{n}"] for n in range(10)]
            assert again >= 1

    asyncio.run(run())
