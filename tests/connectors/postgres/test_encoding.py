"""Every name that a cluster shares is text that leads back to its bytes, and every path is the filesystem's."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import secrets
from collections.abc import Iterator

import psycopg
import pytest

from connectors.databases.postgres import places
from connectors.databases.postgres.connection import connect, database_of, role_of
from connectors.databases.postgres.database import Postgres
from connectors.databases.postgres.encoding import shared_bytes, shared_text
from tests.fixtures.postgres import Cluster
from tests.fixtures.volumes import plain_folder
from trigger.model import Layout

FOLDER = os.fsdecode(b"da t\xc3\xa4'v%h \xe4")
PARTS = (b"a", b" ", b"\\", b"x", b"xe4", b"x5c", b"xE4", b"\xe4", b"\xc3\xa4", b"\xff", b'"', b"'", b"\n")


def test_every_name_leads_back_to_its_bytes_and_no_two_are_told_the_same() -> None:
    names = {b"".join(parts) for count in range(5) for parts in itertools.product(PARTS, repeat=count)}
    told = {name: shared_text(name) for name in names}
    assert {name: shared_bytes(text) for name, text in told.items()} == {name: name for name in names}
    assert len(set(told.values())) == len(names)


def test_a_name_in_utf8_is_told_as_it_is() -> None:
    for name in ("bank", "größe 表", "C:\\data", "a'b\"c"):
        assert shared_text(name.encode()) == name


@pytest.fixture(scope="module", params=["LATIN1", "SQL_ASCII"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with plain_folder() as folder:
        made = Cluster(15, folder / FOLDER)
        try:
            made.create("--encoding", request.param)
            made.start()
            yield made
        finally:
            made.destroy()


@pytest.mark.server
def test_the_files_of_a_cluster_are_found_from_a_database_of_any_encoding(cluster: Cluster) -> None:
    space = cluster.data.parent / os.fsdecode(b"sp\xe4ce \xc3\xa4")
    space.mkdir()
    if os.geteuid() == 0:
        os.chown(space, *cluster.owner)
    with cluster.connect(client_encoding="SQL_ASCII") as connection:
        connection.execute(b"CREATE TABLESPACE beside LOCATION '%s'" % os.fsencode(space))
    names = [f"{encoding.lower()}_{secrets.token_hex(3)}" for encoding in ("LATIN1", "UTF8", "SQL_ASCII", "EUC_TW")]
    for name in names:
        encoding = name.rpartition("_")[0]
        cluster.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")

    async def layout(name: str) -> Layout:
        database = Postgres(cluster.conninfo, [name])
        try:
            return await database.layout()
        finally:
            await database.close()

    found = [asyncio.run(layout(name)) for name in names]
    assert {places.data_directory(one) for one in found} == {cluster.data}
    assert [list(places.tablespaces(one).values()) for one in found] == [[space]] * len(names)


@pytest.mark.server
@pytest.mark.parametrize("name", [b"neu \xe4", "neu ä".encode(), b"\\xe4", b"it's \\", b"a=b"])
def test_a_database_and_a_role_are_reached_by_the_name_that_is_told_of_them(cluster: Cluster, name: bytes) -> None:
    with cluster.connect(client_encoding="SQL_ASCII") as connection:
        connection.execute(b'CREATE DATABASE "%s"' % name)
        connection.execute(b'CREATE ROLE "%s" LOGIN' % name)

    async def reached() -> tuple[str, str]:
        dsn = psycopg.conninfo.make_conninfo(cluster.conninfo, dbname=shared_text(name), user=shared_text(name))
        async with await connect(dsn) as connection:
            return database_of(connection), role_of(connection)

    assert asyncio.run(reached()) == (shared_text(name), shared_text(name))


@pytest.mark.server
def test_a_refusal_says_which_host_and_database_it_is_about(cluster: Cluster) -> None:
    gone = f"gone \\xe4 {secrets.token_hex(3)}"

    async def refused(**parameters: str) -> None:
        async with await connect(psycopg.conninfo.make_conninfo(cluster.conninfo, **parameters)):
            pass

    with pytest.raises(psycopg.OperationalError, match=re.escape(f'database "{gone}"')):
        asyncio.run(refused(dbname=gone))
    with pytest.raises(psycopg.OperationalError, match=r"(?s)/nowhere/a.*/nowhere/b"):
        asyncio.run(refused(host="/nowhere/a,/nowhere/b", dbname="postgres"))
    asyncio.run(refused(host=f"/nowhere,{cluster.sockets}", dbname="postgres"))
