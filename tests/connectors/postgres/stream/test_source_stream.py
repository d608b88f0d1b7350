"""The raw stream against PostgreSQL's own reader, byte for byte; what each kind of commit shows (LAB 14); xid wrap."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.preflight import BLIND_SPOTS, LIMITS, blind_spots
from tests.connectors.postgres.reading import commit_records, everything, fresh_database, opened
from tests.connectors.postgres.stream.streams import GOLDEN, Variant, decode, fill, record, slot_of, variants
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

pytestmark = pytest.mark.server
HEADER_BYTES = 25


@pytest.fixture(scope="module", params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


@pytest.fixture(scope="module")
def cluster(major: int, folder: Path) -> Iterator[Cluster]:
    with running_cluster(major, folder / f"data-{major}", logical_decoding_work_mem="64kB") as made:
        yield made


def by_pg_recvlogical(cluster: Cluster, database: str, variant: Variant, until: Lsn, file: Path) -> bytes:
    options = [word for option in variant.options.split(", ") for word in ("-o", option.replace(" '", "=").strip("'"))]
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres", "-d", database]
    slot = slot_of(f"{variant.name}-copy")
    cluster.run(
        "pg_recvlogical",
        *where,
        "--slot",
        slot,
        "--start",
        "--endpos",
        str(until),
        "-s",
        "1",
        "-f",
        file,
        "-n",
        *options,
    )
    return file.read_bytes()


def test_the_stream_is_the_one_that_pg_recvlogical_gets_and_every_protocol_tells_the_same(cluster: Cluster) -> None:
    with fresh_database(cluster) as database:
        before = cluster.flushed()
        until = fill(cluster, database)
        truth = {(record.xid, record.start) for record in commit_records(cluster, before, until)}
        told = []
        for variant in variants(cluster.major):
            messages = asyncio.run(record(cluster, database, variant, until))
            file = cluster.sockets / f"{variant.name}.out"
            file.touch()
            file.chmod(0o666)
            theirs = by_pg_recvlogical(cluster, database, variant, until, file)
            assert b"".join(m[HEADER_BYTES:] + b"\n" for m in messages if m[:1] == b"w") == theirs
            told.append(decode(variant, messages))
            for name in (variant.name, f"{variant.name}-copy"):
                cluster.sql(f"SELECT pg_drop_replication_slot('{slot_of(name)}')", database)
    assert len(told[0]) == 11
    assert {(commit.xid, commit.start) for commit in told[0]} <= truth
    assert all(commits == told[0] for commits in told)


KINDS = {
    "insert, COPY, CREATE TABLE AS": ("INSERT INTO k VALUES (10)", "CREATE TABLE made AS SELECT 1 AS id"),
    "update, delete": ("UPDATE k SET v = 1 WHERE id = 1", "DELETE FROM k WHERE id = 2"),
    "truncate": ("TRUNCATE emptied",),
    "commit prepared": ("COMMIT PREPARED '{database}'",),
    "pg_logical_emit_message(true, …)": ("SELECT pg_logical_emit_message(true, 'trigpoint', 'm')",),
    "update, delete without replica identity": ("UPDATE bare SET v = 1", "DELETE FROM bare"),
    "update, delete on a new table": ("UPDATE new SET id = 2", "DELETE FROM new"),
    "DDL, GRANT": (
        "CREATE TABLE empty ()",
        "ALTER TABLE empty ADD v int",
        "GRANT SELECT ON k TO PUBLIC",
        "DROP TABLE empty",
    ),
    "sequence (nextval, setval)": ("SELECT nextval('s')", "SELECT setval('s', 100)"),
    "large object": ("SELECT lo_from_bytea(0, 'x')",),
    "refresh of a materialized view, rewrite of a table": (
        "REFRESH MATERIALIZED VIEW seen",
        "ALTER TABLE k ALTER v TYPE bigint",
        "VACUUM FULL k",
    ),
    "row locks (SELECT … FOR UPDATE)": ("SELECT * FROM k FOR UPDATE",),
    "unlogged and temporary table": ("INSERT INTO quick VALUES (1)", "CREATE TEMP TABLE short AS SELECT 1"),
    "pg_logical_emit_message(false, …), NOTIFY": (
        "SELECT pg_logical_emit_message(false, 'trigpoint', 'm')",
        "NOTIFY somebody",
    ),
    "databases that are not named": ("CREATE DATABASE {database}_other", "DROP DATABASE {database}_other"),
}
MADE_BEFORE = (
    "CREATE TABLE k (id int PRIMARY KEY, v int); INSERT INTO k VALUES (1), (2), (3)",
    "CREATE TABLE bare (id int, v int); INSERT INTO bare VALUES (1)",
    "CREATE TABLE gone (id int)",
    "CREATE TABLE emptied (id int)",
    "CREATE UNLOGGED TABLE quick (id int)",
    "CREATE SEQUENCE s",
    "CREATE MATERIALIZED VIEW seen AS SELECT id FROM k",
)


def shown(cluster: Cluster, database: str) -> dict[str, str]:
    """Run each kind of statement alone, and give what a source shows of it."""
    for statement in MADE_BEFORE:
        cluster.sql(statement, database)

    async def run() -> dict[str, str]:
        found = {}
        async with opened(cluster, database) as source:
            source._maintained_at = math.inf  # so that the new table stays new
            cluster.sql("CREATE TABLE new (id int PRIMARY KEY); INSERT INTO new VALUES (1)", database)
            await everything(cluster, source)
            cluster.sql(f"BEGIN; INSERT INTO gone VALUES (2); PREPARE TRANSACTION '{database}'", database)
            for statement in (one for statements in KINDS.values() for one in statements):
                cluster.sql(statement.format(database=database), database)
                commits = await everything(cluster, source)
                seen = [[dict(commit.tables), list(commit.markers)] for commit in commits]
                found[statement] = json.dumps(seen) if seen else "nothing"
        return found

    return asyncio.run(run())


def test_what_a_stream_shows_of_each_kind_of_commit_is_as_recorded_and_as_explained(cluster: Cluster) -> None:
    with fresh_database(cluster) as database:
        found = shown(cluster, database)
    assert found == json.loads((GOLDEN / "lab14.json").read_text())[str(cluster.major)]
    assert [what for what, _, _ in BLIND_SPOTS] == list(KINDS)
    for what, explained, _ in BLIND_SPOTS:
        wrote = [found[statement] != "nothing" for statement in KINDS[what]]
        assert wrote == [explained == "seen"] * len(wrote), what
    assert len(blind_spots(cluster.major)) == len(BLIND_SPOTS) + len(LIMITS)


def test_a_transaction_id_keeps_its_epoch_across_the_wrap_at_two_to_the_32(major: int, folder: Path) -> None:
    near_the_wrap, epoch = 2**32 - 40, 5
    with running_cluster(major, folder / f"wrap-{major}") as cluster:
        cluster.sql("CREATE TABLE t (v text)")
        for database in ("postgres", "template1"):
            cluster.sql("VACUUM (FREEZE)", database)
        cluster.stop()
        cluster.run("pg_resetwal", "-e", str(epoch), "-x", str(near_the_wrap), "-u", "4000000000", cluster.data)
        segment = cluster.data / "pg_xact" / f"{near_the_wrap // (4 * 8192 * 32):04X}"
        segment.write_bytes(bytes(262144))
        segment.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(segment, *cluster.owner)
        cluster.start()

        async def run() -> tuple[list[int], list[int]]:
            async with opened(cluster, "postgres") as source:
                wrote = await asyncio.to_thread(write_and_tell, cluster, 80)
                return wrote, [commit.name.number or 0 for commit in await everything(cluster, source)]

        wrote, told = asyncio.run(run())
        assert told == wrote
        assert told[0] < (epoch + 1) << 32 < told[-1]


def write_and_tell(cluster: Cluster, number: int) -> list[int]:
    told = []
    with cluster.connect() as connection:
        for _ in range(number):
            row = connection.execute("INSERT INTO t VALUES ('x') RETURNING pg_current_xact_id()::text").fetchone()
            assert row is not None
            told.append(int(row[0]))
    return told


def test_amid_one_large_transaction_the_server_is_asked_how_far_it_is(cluster: Cluster) -> None:
    """It says so by itself only when it has caught up, or half of `wal_sender_timeout` is over."""

    async def run() -> None:
        reports: list[tuple[int, bool]] = []
        with fresh_database(cluster) as database, cluster.connect(database) as writer:
            writer.execute("CREATE TABLE t (v int)")
            async with opened(cluster, database) as source:
                writer.execute("BEGIN; INSERT INTO t SELECT generate_series(1, 300000)")
                await source.open(None)
                stream, source.heartbeat_seconds = source._connected(), 0.01
                report = stream.report

                def noted(received: int, settled: int, *, reply: bool) -> None:
                    reports.append((received, reply))
                    report(received, settled, reply=reply)

                stream.report = noted  # type: ignore[method-assign]  # what leaves is looked at, and leaves
                assert not await everything(cluster, source)
                writer.execute("ROLLBACK")
        assert len(reports) > 10
        assert all(reply for (before, _), (received, reply) in itertools.pairwise(reports) if received == before)

    asyncio.run(run())
