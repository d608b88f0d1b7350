"""What the server lets users choose (names, lengths, bytes, encodings) never ends a stream, and is told as it is."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Iterator

import pytest

from connectors.databases.postgres.encoding import _CODECS
from connectors.databases.postgres.preflight import check_database
from connectors.databases.postgres.stream.pgoutput import MARKER_BYTES_LIMIT
from connectors.databases.postgres.stream.source import PostgresSource
from tests.connectors.postgres.reading import everything, fresh_database, opened
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.model import Changes, Severity

pytestmark = pytest.mark.server

WORDS = (
    "größe",
    "żółw",
    "ħaġra",
    "таблица",
    "πίνακας",
    "שולחן",
    "جدول",
    "mājas",
    "şişe",
    "ตาราง",
    "bảng",
    "表",
    "테이블",
)
BY_BYTES = {"EUC_TW": b"\xc4\xe3", "MULE_INTERNAL": b"\x81\xf6"}
"""A character of the encodings that Python has no codec for."""


@pytest.fixture(scope="module", params=MAJORS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with (
        plain_folder() as folder,
        running_cluster(request.param, folder / "data", logical_decoding_work_mem="64kB", fsync="off") as made,
    ):
        yield made


@contextlib.contextmanager
def encoded_database(cluster: Cluster, encoding: str) -> Iterator[str]:
    """Give the name of a new database with this encoding."""
    name = f"e{secrets.token_hex(4)}"
    cluster.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    yield name
    cluster.sql(f"DROP DATABASE {name} WITH (FORCE)")


def run_raw(cluster: Cluster, database: str, *statements: bytes) -> None:
    """Run statements byte for byte: nothing is converted on the way to the server."""
    with cluster.connect(database, client_encoding="SQL_ASCII") as connection:
        for statement in statements:
            connection.execute(statement)


def word_in(encoding: str) -> str:
    """Give a word beyond ASCII that can be written in this encoding."""
    codec = _CODECS[encoding]
    for word in WORDS:
        with contextlib.suppress(UnicodeEncodeError):
            word.encode(codec)
            return word
    raise AssertionError(encoding)


async def name_and_marker(cluster: Cluster, database: str, word: bytes) -> tuple[list[str], list[str]]:
    """Give the tables and markers that a source tells of an insert, and of an update that only maintenance shows."""
    run_raw(cluster, database, b'CREATE TABLE "%s" (id int PRIMARY KEY)' % word)
    async with opened(cluster, database) as source:
        run_raw(
            cluster,
            database,
            b"BEGIN; INSERT INTO \"%s\" VALUES (1); SELECT pg_logical_emit_message(true, 'trigpoint', '%s'); COMMIT"
            % (word, word),
            b'UPDATE "%s" SET id = 2' % word,
        )
        commits = await everything(cluster, source)
        assert [sum(one.rows for one in commits), source.trouble] == [2, ""]
    return [name for one in commits for name in one.tables], [marker for one in commits for marker in one.markers]


@pytest.mark.parametrize("encoding", list(_CODECS))
def test_names_and_markers_are_told_as_they_are_in_every_encoding(cluster: Cluster, encoding: str) -> None:
    word = word_in(encoding)
    with encoded_database(cluster, encoding) as database:
        tables, markers = asyncio.run(name_and_marker(cluster, database, word.encode(_CODECS[encoding])))
    assert tables == [f"public.{word}"] * 2
    assert markers == [word]


@pytest.mark.parametrize("encoding", list(BY_BYTES))
def test_names_in_an_encoding_that_nobody_here_can_read_stay_different_and_whole(
    cluster: Cluster, encoding: str
) -> None:
    word = BY_BYTES[encoding]
    with encoded_database(cluster, encoding) as database:
        tables, markers = asyncio.run(name_and_marker(cluster, database, word))
    written = "".join(f"\\x{byte:02x}" for byte in word)
    assert tables == [f"public.{written}"] * 2
    assert markers == [written]


@pytest.mark.parametrize(
    ("encoding", "word"),
    [("SQL_ASCII", b"gr\xf6\xdfe\xff"), ("WIN1252", b"\x81\x8d"), ("LATIN9", b"\x80\xff"), ("WIN874", b"\xdb\xfc")],
)
def test_bytes_that_no_client_could_be_sent_are_told_as_numbers_or_as_they_are(
    cluster: Cluster, encoding: str, word: bytes
) -> None:
    with encoded_database(cluster, encoding) as database:
        tables, markers = asyncio.run(name_and_marker(cluster, database, word))
    told = word.decode(_CODECS[encoding], "backslashreplace")
    assert tables == [f"public.{told}"] * 2
    assert markers == [told]


def test_a_check_of_a_database_whose_names_are_not_of_its_encoding_goes_through(cluster: Cluster) -> None:
    async def run() -> None:
        with encoded_database(cluster, "SQL_ASCII") as database:
            run_raw(cluster, database, b'CREATE TABLE "gr\xf6\xdfe" (id int)')
            async with opened(cluster, database) as source:
                dsn = f"{cluster.conninfo} dbname={database}"
                findings = await check_database(dsn, source, 10)
            assert any("public.gr\\xf6\\xdfe" in one.message for one in findings)
            assert not [one for one in findings if one.severity is Severity.REFUSED]

    asyncio.run(run())


def test_a_database_whose_names_cannot_be_read_is_said_so_by_the_check(cluster: Cluster) -> None:
    async def run() -> None:
        with encoded_database(cluster, "EUC_TW") as database:
            source = PostgresSource(cluster.conninfo, database)
            findings = await check_database(f"{cluster.conninfo} dbname={database}", source, 10)
            assert ["EUC_TW" in one.message for one in findings] == [True]

    asyncio.run(run())


LENGTHS = (0, 1, 1_023, 1_024, 1_025, 70_000, 3_000_000)


def test_a_message_with_a_name_of_any_length_ends_no_stream(cluster: Cluster) -> None:
    async def run() -> None:
        with fresh_database(cluster) as database:
            cluster.sql("CREATE TABLE t (v text)", database)
            async with opened(cluster, database) as source:
                for length in LENGTHS:
                    for transactional in ("false", "true"):
                        cluster.sql(
                            "BEGIN; INSERT INTO t VALUES ('x');"
                            f" SELECT pg_logical_emit_message({transactional}, repeat('x', {length}), '');"
                            f" SELECT pg_logical_emit_message({transactional}, 'trigpoint' || repeat('x', {length}),"
                            f" repeat('ö', {length})); COMMIT",
                            database,
                        )
                commits = await everything(cluster, source)
            assert [one.tables for one in commits] == [{"public.t": Changes(1)}] * (2 * len(LENGTHS))
            assert [one.markers for one in commits if one.markers] == [("",)]

    asyncio.run(run())


def test_a_message_with_a_name_of_any_length_ends_no_stream_of_a_large_transaction(cluster: Cluster) -> None:
    async def run() -> None:
        with fresh_database(cluster) as database:
            cluster.sql("CREATE TABLE t (v text)", database)
            async with opened(cluster, database) as source:
                emitted = "; ".join(
                    f"SELECT pg_logical_emit_message(true, repeat('x', {length}), '')" for length in LENGTHS
                )
                large = "INSERT INTO t SELECT repeat('x', 7000) FROM generate_series(1, 40)"
                cluster.sql(f"BEGIN; {large}; {emitted}; {large}; COMMIT", database)
                commits = await everything(cluster, source)
            assert [(one.tables, one.markers) for one in commits] == [({"public.t": Changes(80)}, ())]

    asyncio.run(run())


def test_a_marker_is_cut_between_characters_and_may_hold_any_bytes(cluster: Cluster) -> None:
    async def run() -> None:
        with fresh_database(cluster) as database:
            async with opened(cluster, database) as source:
                for content in (
                    f"'x' || repeat('ö', {MARKER_BYTES_LIMIT})",
                    r"'\x00ff41'::bytea",
                    r"'\xeda080'::bytea",
                    "''",
                ):
                    cluster.sql(f"SELECT pg_logical_emit_message(true, 'trigpoint', {content})", database)
                commits = await everything(cluster, source)
        assert [one.markers_cut for one in commits] == [True, False, False, False]
        markers = [one.markers[0] for one in commits]
        assert markers[0] == "x" + "ö" * ((MARKER_BYTES_LIMIT - 1) // 2)
        assert markers[1:] == ["\0\\xffA", "\\xed\\xa0\\x80", ""]

    asyncio.run(run())


def test_an_origin_and_a_prepared_transaction_may_be_called_whatever_the_server_takes(cluster: Cluster) -> None:
    length = 500 if cluster.major >= 18 else 2_000  # 18 takes 512 bytes
    names = [f"ö{'o' * length}", "gr''ün", "a b\tc\nd", "x"]

    async def run() -> None:
        with fresh_database(cluster) as database:
            cluster.sql("CREATE TABLE t (v text)", database)
            async with opened(cluster, database) as source:
                for name in names:
                    cluster.sql(f"SELECT pg_replication_origin_create('{name}')")
                    cluster.sql(
                        f"SELECT pg_replication_origin_session_setup('{name}'); INSERT INTO t VALUES ('x')", database
                    )
                for gid in ("g" * 199, "ü" * 99, "a b\tc\nd"):
                    cluster.sql(f"BEGIN; INSERT INTO t VALUES ('p'); PREPARE TRANSACTION '{gid}'", database)
                    cluster.sql(f"COMMIT PREPARED '{gid}'", database)
                commits = await everything(cluster, source)
            assert [one.origin for one in commits] == [name.replace("''", "'") for name in names] + [""] * 3
            for name in names:
                cluster.sql(f"SELECT pg_replication_origin_drop('{name}')")

    asyncio.run(run())


def odd_name(chance: random.Random) -> str:
    """Give a name of a schema, table, column, type or label: anything but a zero byte, 63 bytes at the most."""
    letters = "aZ0 .\"'\\%$;-/\t\n\r\x01\x1b\x7föß漢😀\u200b\u202e\ufeff"
    name = "".join(chance.choices(letters, k=chance.randrange(1, 30)))
    return name.encode()[:63].decode(errors="ignore") or "x"


def test_tables_columns_and_types_may_be_called_whatever_the_server_takes(cluster: Cluster) -> None:
    chance = random.Random(20261126)
    wanted = []

    def statements() -> Iterator[bytes]:
        for number in range(40):
            schema, table, column, kind, label = (f"{number}{odd_name(chance)}" for _ in range(5))
            quoted = ['"' + name.replace('"', '""') + '"' for name in (schema, table, column, kind)]
            where, what, field, of = (name.encode() for name in quoted)
            text = "'" + label.replace("'", "''") + "'"
            yield b"CREATE SCHEMA " + where
            yield b"CREATE TYPE %s.%s AS ENUM (%s)" % (where, of, text.encode())
            yield b"CREATE TABLE %s.%s (%s int PRIMARY KEY, m %s.%s)" % (where, what, field, where, of)
            yield b"INSERT INTO %s.%s VALUES (1, %s)" % (where, what, text.encode())
            wanted.append(f"{cut(schema)}.{cut(table)}")

    async def run() -> None:
        with fresh_database(cluster) as database:
            async with opened(cluster, database) as source:
                run_raw(cluster, database, *statements())
                commits = await everything(cluster, source)
        assert [list(one.tables) for one in commits] == [[name] for name in wanted]

    asyncio.run(run())


def cut(name: str) -> str:
    """Give a name as the server keeps it: 63 bytes, whole characters."""
    return name.encode()[:63].decode(errors="ignore")
