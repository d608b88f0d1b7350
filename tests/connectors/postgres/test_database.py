"""The cluster as a whole: positions, lineage, the backup bracket, layout, and what the pre-flight check finds."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from connectors.databases.postgres import places
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.lsn import Lsn
from tests.connectors.postgres.reading import fresh_database, record_starts
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.errors import ConfigError, DatabaseError
from trigger.model import Finding, Severity, Volume

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def cluster(major: int) -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(major, folder / "data") as made:
        yield made


def with_database(cluster: Cluster, act: Callable[[Postgres], Awaitable[None]], *databases: str) -> None:
    async def run() -> None:
        database = Postgres(cluster.conninfo, databases or ["postgres"])
        try:
            await act(database)
        finally:
            await database.close()

    asyncio.run(run())


def volumes(cluster: Cluster) -> list[Volume]:
    return [Volume("data", str(cluster.data))]


def of(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if re.fullmatch(subject, finding.subject)]


def refusals(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is Severity.REFUSED]


def test_durable_covers_what_was_committed_and_ceiling_covers_durable(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        cluster.sql("CREATE TABLE IF NOT EXISTS t (v int); INSERT INTO t VALUES (1)")
        committed = cluster.flushed()
        durable = await database.durable()
        ceiling = await database.ceiling()
        assert committed <= durable.at <= ceiling.at
        assert (await database.lineage()).history == durable.history == ceiling.history
        await database.checkpoint()
        assert durable.at <= (await database.redo()).at

    with_database(cluster, act)


def test_a_session_is_another_one_once_the_connection_broke(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        await database.durable()
        first = database.session
        await database.ceiling()
        assert database.session == first
        ours = "usename = current_user AND pid <> pg_backend_pid()"
        cluster.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {ours}")
        await database.ceiling()
        assert database.session != first

    with_database(cluster, act)


def test_a_record_ends_at_record_end_and_is_durable_whatever_others_write(cluster: Cluster) -> None:
    """The flushed position would not do: it is often in the middle of a record of theirs."""
    stop = threading.Event()

    def write(size: int) -> None:
        with cluster.connect() as connection:
            while not stop.wait(0.002):
                connection.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', %s))", (size,))

    async def act(database: Postgres) -> None:
        ends = []
        with ThreadPoolExecutor(3) as pool:
            writers = [pool.submit(write, size) for size in (1, 20_000, 100_001)]
            try:
                for _ in range(40):
                    seen = cluster.end_of_log()
                    ends.append(await database.record_end())
                    assert cluster.flushed() >= ends[-1].at >= seen - SEGMENT_HEADER
            finally:
                stop.set()
            for writer in writers:
                writer.result(30)
        assert_records_end_at(cluster, [end.at for end in ends])

    with_database(cluster, act)


def test_a_record_that_fills_its_page_ends_where_the_page_does_and_nothing_is_written_to_find_out(
    cluster: Cluster,
) -> None:
    async def act(database: Postgres) -> None:
        for of_segment in (False, True):
            behind = fill_segment(cluster) if of_segment else fill_page(cluster)
            end = (await database.record_end()).at
            assert end % (SEGMENT if of_segment else PAGE) == 0
            assert cluster.end_of_log() == behind > end
            assert_records_end_at(cluster, [end])

    with_database(cluster, act)


PAGE, SEGMENT, PAGE_HEADER, SEGMENT_HEADER = 8192, 16 << 20, 24, 40


def fill_page(cluster: Cluster) -> Lsn:
    """Write a record whose last byte is the last of its page; gives the insert position, behind the next header."""
    message = "SELECT pg_logical_emit_message(true, '', repeat('x', %d))"
    for _ in range(20):
        left = PAGE - cluster.end_of_log() % PAGE
        cluster.sql(message % (left + PAGE // 2))
        before = cluster.end_of_log()
        cluster.sql(message % 1000)
        overhead = cluster.end_of_log() - before - 1000
        cluster.sql(message % (PAGE - cluster.end_of_log() % PAGE - overhead))
        if (at := cluster.end_of_log()) % PAGE == PAGE_HEADER:
            return at
    raise AssertionError("no record came to end where a page does")


def fill_segment(cluster: Cluster) -> Lsn:
    """Leave the rest of a segment empty; gives the insert position, behind the header of the next."""
    cluster.sql("SELECT pg_switch_wal()")
    at = cluster.end_of_log()
    assert at % SEGMENT == SEGMENT_HEADER
    return at


def assert_records_end_at(cluster: Cluster, ends: list[int]) -> None:
    """A record ends where the next one begins, or the page does in front of which the next one begins: pg_waldump's."""
    cluster.sql("SELECT pg_logical_emit_message(true, '', '')")
    begins = record_starts(cluster, Lsn(min(ends) // SEGMENT * SEGMENT), cluster.flushed())
    for place in ends:
        header = 0 if place % PAGE else PAGE_HEADER if place % SEGMENT else SEGMENT_HEADER
        assert place + header in begins, f"{place} is in the middle of a record"


def test_ceiling_covers_log_that_was_written_but_is_not_durable_yet(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        with cluster.connect() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS t (v int)")
            connection.execute("SET synchronous_commit = off")
            connection.execute("INSERT INTO t SELECT generate_series(1, 100)")
            row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert row is not None
            assert (await database.ceiling()).at >= Lsn.parse(row[0])

    with_database(cluster, act)


def test_a_server_that_was_restarted_is_found_again_and_one_that_is_down_is_a_clear_error(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        before = await database.durable()
        cluster.restart()
        assert (await database.durable()).covers(before)
        cluster.stop()
        with pytest.raises(DatabaseError) as caught:
            await database.durable()
        assert caught.value.retryable
        cluster.start()
        assert (await database.durable()).covers(before)

    with_database(cluster, act)


def test_a_mark_lies_behind_what_was_committed_without_a_flush_and_no_stream_shows_it(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        cluster.sql("CREATE TABLE IF NOT EXISTS t (v int); CREATE PUBLICATION everything FOR ALL TABLES")
        cluster.sql("SELECT pg_create_logical_replication_slot('watching', 'pgoutput')")
        try:
            cluster.sql("SET synchronous_commit = off; INSERT INTO t VALUES (1)")
            behind = cluster.end_of_log()
            mark = await database.mark()
            assert mark.at > behind
            assert cluster.flushed() >= mark.at
            assert changes(cluster) == 4  # of the insert: Begin, Relation, Insert, Commit
        finally:
            cluster.sql("SELECT pg_drop_replication_slot('watching')")
            cluster.sql("DROP PUBLICATION everything")

    with_database(cluster, act)


def test_a_mark_is_made_where_sessions_may_only_read_by_default(cluster: Cluster) -> None:
    async def run() -> None:
        database = Postgres(f"{cluster.conninfo} options='-c default_transaction_read_only=on'", ["postgres"])
        before = cluster.end_of_log()
        assert (await database.mark()).at > before
        await database.close()

    asyncio.run(run())


def changes(cluster: Cluster) -> int:
    """Give how many messages pgoutput has for the slot `watching`."""
    options = "'proto_version', '3', 'publication_names', 'everything'"
    query = f"SELECT count(*) FROM pg_logical_slot_peek_binary_changes('watching', NULL, NULL, {options})"
    return int(cluster.sql(query)[0][0])


def test_what_the_server_keeps_for_each_of_our_readers_is_known(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        assert await database.retained() == []
        cluster.sql("SELECT pg_create_logical_replication_slot('trigpoint_postgres', 'pgoutput')")
        cluster.sql("SELECT pg_create_physical_replication_slot('trigpoint_journal', true)")
        cluster.sql("SELECT pg_create_physical_replication_slot('somebody_else', true)")
        try:
            cluster.sql("SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 1000000))")
            kept = await database.retained()
            assert [one.reader for one in kept] == ["trigpoint_journal", "trigpoint_postgres"]
            assert all(one.bytes > 1_000_000 for one in kept)
            for bound, known in (("-1", False), ("64MB", True)):
                cluster.sql(f"ALTER SYSTEM SET max_slot_wal_keep_size = '{bound}'")
                cluster.sql("SELECT pg_reload_conf()")
                async with asyncio.timeout(10):
                    while any((one.left_bytes is not None) is not known for one in await database.retained()):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            assert all(0 < (one.left_bytes or 0) < 128 << 20 for one in await database.retained())
        finally:
            cluster.sql("ALTER SYSTEM RESET max_slot_wal_keep_size")
            cluster.sql("SELECT pg_reload_conf()")
            cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")

    with_database(cluster, act)


def test_a_question_that_hangs_ends_at_its_deadline(cluster: Cluster) -> None:
    async def run() -> None:
        database = Postgres(cluster.conninfo, ["postgres"], deadline_seconds=0.5)
        began = time.monotonic()
        with pytest.raises(DatabaseError):
            await database._ask("SELECT pg_sleep(30)")
        assert time.monotonic() - began < 5
        await database.durable()
        await database.close()

    asyncio.run(run())


def test_the_bracket_gives_a_label_that_a_restore_can_start_with(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        async with database.bracket("a point") as finish:
            cluster.sql("CREATE TABLE IF NOT EXISTS t (v int); INSERT INTO t VALUES (1)")
            bracket = await finish()
        assert f"START WAL LOCATION: {bracket.start.place} " in bracket.document["label"]
        assert "LABEL: a point\n" in bracket.document["label"]
        assert bracket.start < bracket.stop
        assert bracket.filled_to is not None
        assert bracket.filled_to.history == bracket.stop.history
        assert bracket.filled_to.at == -(-bracket.stop.at // SEGMENT) * SEGMENT

    with_database(cluster, act)


def test_a_bracket_that_is_left_early_holds_nothing_on_the_server(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        with pytest.raises(RuntimeError, match="early"):
            await leave_early(database)
        async with database.bracket("another") as finish:
            assert "LABEL: another\n" in (await finish()).document["label"]

    with_database(cluster, act)


async def leave_early(database: Postgres) -> None:
    async with database.bracket("abandoned"):
        raise RuntimeError("early")


def test_the_layout_names_every_place_where_the_cluster_lies(cluster: Cluster, major: int) -> None:
    async def act(database: Postgres) -> None:
        layout = await database.layout()
        assert places.major(layout) == major
        assert (places.data_directory(layout), layout.log) == (cluster.data, cluster.data / "pg_wal")
        assert (places.tablespaces(layout), layout.config_files) == ({}, ())
        assert (layout.owner, layout.group, layout.log_file_bytes) == (*cluster.owner, 16 << 20)

    with_database(cluster, act)


def test_a_cluster_that_is_fit_gets_no_refusal_and_checking_changes_nothing(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        findings = await database.check(volumes(cluster))
        assert refusals(findings) == []
        assert cluster.sql("SELECT count(*) FROM pg_replication_slots") == [(0,)]
        assert cluster.sql("SELECT count(*) FROM pg_publication") == [(0,)]

    with_database(cluster, act)


def test_whatever_lies_on_no_volume_is_refused(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        refused = refusals(await database.check([Volume("elsewhere", "/proc")]))
        assert {finding.subject for finding in refused} == {"data directory", "pg_wal"}

    with_database(cluster, act)


def test_a_table_whose_updates_cannot_be_seen_is_named_with_the_remedy(cluster: Cluster) -> None:
    with fresh_database(cluster) as name:
        cluster.sql("CREATE TABLE bare (v int); CREATE TABLE keyed (id int PRIMARY KEY)", name)

        async def act(database: Postgres) -> None:
            (finding,) = of(await database.check(volumes(cluster)), f"tables in {name}")
            assert finding.severity is Severity.WARNING
            assert "public.bare" in finding.message
            assert "keyed" not in finding.message
            assert "REPLICA IDENTITY FULL" in finding.remedy
            cluster.sql("CREATE PUBLICATION trigpoint FOR ALL TABLES", name)
            (finding,) = of(await database.check(volumes(cluster)), f"tables in {name}")
            assert finding.severity is Severity.REFUSED

        with_database(cluster, act, name)


def test_a_transaction_in_doubt_is_named_before_it_keeps_a_slot_from_being_made(cluster: Cluster) -> None:
    async def act(database: Postgres) -> None:
        cluster.sql("CREATE TABLE IF NOT EXISTS t (v int)")
        cluster.sql("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'doubt'")
        try:
            (finding,) = of(await database.check(volumes(cluster)), "prepared transactions")
            assert finding.severity is Severity.REFUSED
            assert "doubt" in finding.message
        finally:
            cluster.sql("ROLLBACK PREPARED 'doubt'")

    with_database(cluster, act)


def test_a_transaction_that_stays_open_is_named_until_the_slots_are_made(cluster: Cluster) -> None:
    cluster.sql("CREATE TABLE IF NOT EXISTS t (v int)")

    async def act(database: Postgres) -> None:
        (source,) = database.sources()
        with cluster.connect() as connection, connection.transaction():
            connection.execute("INSERT INTO t VALUES (1)")
            await asyncio.sleep(1.0)
            (before,) = of(await database.check(volumes(cluster)), "running transactions")
            opening = asyncio.create_task(source.open(None))
            async with asyncio.timeout(20):
                while not cluster.sql("SELECT slot_name FROM pg_replication_slots"):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.05)
            assert of(await database.check(volumes(cluster)), "running transactions") == [before]
            assert before.severity is Severity.WARNING
            assert f"process {connection.info.backend_pid} (postgres)" in before.message
        await opening
        await source.close()
        with cluster.connect() as connection, connection.transaction():
            connection.execute("INSERT INTO t VALUES (1)")
            await asyncio.sleep(1.0)
            assert not of(await database.check(volumes(cluster)), "running transactions")
        await source.remove()

    with_database(cluster, act)


def test_a_role_without_rights_and_a_database_that_is_not_there_are_refused(cluster: Cluster) -> None:
    cluster.sql("DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN")

    async def run() -> None:
        database = Postgres(
            cluster.conninfo.replace("user=postgres", "user=weak dbname=postgres"), ["nowhere", "postgres"]
        )
        subjects = {finding.subject for finding in refusals(await database.check(volumes(cluster)))}
        await database.close()
        assert {"role", "database nowhere", "database postgres"} <= subjects

    asyncio.run(run())


def test_a_cluster_whose_settings_are_unfit_is_refused_with_each_reason(major: int) -> None:
    settings = {"wal_level": "replica", "fsync": "off", "full_page_writes": "off", "max_slot_wal_keep_size": "-1"}
    settings |= {"synchronous_standby_names": "FIRST 1 (other, trigpoint_postgres)", "max_wal_senders": "2"}
    with plain_folder() as folder, running_cluster(major, folder / "data", **settings) as cluster:

        async def act(database: Postgres) -> None:
            findings = await database.check(volumes(cluster))
            refused = {finding.subject for finding in refusals(findings)}
            assert refused >= {"wal_level", "fsync", "full_page_writes", "synchronous_standby_names", "max_wal_senders"}
            assert all(finding.remedy for finding in refusals(findings))
            (keep,) = of(findings, "max_slot_wal_keep_size")
            assert keep.severity is Severity.WARNING

        with_database(cluster, act)


def test_tablespaces_and_a_log_kept_elsewhere_are_found_by_the_check(major: int) -> None:
    with plain_folder() as folder:
        space, wal = folder / "space", folder / "wal"
        space.mkdir()
        with running_cluster(major, folder / "data", wal=wal) as cluster:
            if os.geteuid() == 0:
                os.chown(space, *cluster.owner)
            cluster.sql(f"CREATE TABLESPACE far LOCATION '{space}'")

            async def act(database: Postgres) -> None:
                layout = await database.layout()
                assert (layout.log, list(places.tablespaces(layout).values())) == (wal, [space])
                refused = {finding.subject for finding in refusals(await database.check(volumes(cluster)))}
                assert refused == {"pg_wal", f"tablespace {next(iter(places.tablespaces(layout)))}"}
                assert refusals(await database.check([Volume("all", str(folder))])) == []

            with_database(cluster, act)


def test_the_lineage_of_a_promoted_server_holds_where_it_left_its_past(major: int) -> None:
    with plain_folder() as folder, running_cluster(major, folder / "data") as cluster:

        async def act(database: Postgres) -> None:
            before = await database.durable()
            cluster.stop()
            (cluster.data / "standby.signal").touch(mode=0o666)
            cluster.start()
            cluster.run("pg_ctl", "-D", cluster.data, "-w", "promote")
            lineage = await database.lineage()
            assert lineage.history.branch == 2
            assert [timeline for timeline, _ in lineage.forks] == [1]
            assert lineage.includes(before)
            assert lineage.forks[0][1] >= before.at
            assert (await database.durable()).history == lineage.history

        with_database(cluster, act)


def test_a_connection_string_that_is_none_and_no_databases_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="not a connection string"):
        Postgres("nonsense", ["postgres"])
    with pytest.raises(ConfigError, match="no database"):
        Postgres("host=/tmp", [])
