"""Read a source in a test: everything up to now, raw messages, and what PostgreSQL's own programs say of the same."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.copyboth import CopyBoth
from connectors.databases.postgres.stream.source import PostgresSource
from tests.fixtures.postgres import Cluster
from trigger.model import Commit
from trigger.position import Position

PATIENCE_SECONDS = 60.0
_COMMIT_RECORD = re.compile(
    r"rmgr: Transaction .* tx: +(\d+), lsn: ([0-9A-F/]+), .* desc: (COMMIT|COMMIT_PREPARED) (.*)"
)
_PREPARED_XID = re.compile(r"(\d+): ")


@contextlib.contextmanager
def fresh_database(cluster: Cluster) -> Iterator[str]:
    """Give the name of a new database of the test's own."""
    name = f"d{secrets.token_hex(4)}"
    cluster.sql(f"CREATE DATABASE {name}")
    yield name
    cluster.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextlib.asynccontextmanager
async def opened(cluster: Cluster, database: str, *, keep: bool = False) -> AsyncIterator[PostgresSource]:
    """Give an open source; its slot and publications go at the end, unless they are kept."""
    source = PostgresSource(cluster.conninfo, database)
    try:
        await source.open(None)
        yield source
    finally:
        if keep:
            await source.close()
        else:
            await source.remove()


async def everything(cluster: Cluster, source: PostgresSource) -> list[Commit]:
    """Give all commits up to now; fails where the stream does not come this far."""
    until = cluster.flushed()
    commits: list[Commit] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while source._through < until:  # a read would wait for more
            commits += (await source.read()).commits
    return commits


async def settled(cluster: Cluster, source: PostgresSource) -> tuple[list[Commit], Position]:
    """Give all commits up to now and how far they reach, acknowledged."""
    commits = await everything(cluster, source)
    through = source._lineage.at(Lsn(source._through))
    await source.acknowledge(through)
    return commits, through


async def raw_messages(cluster: Cluster, database: str, slot: str, options: str, until: Lsn) -> list[bytes]:
    """Give every message (XLogData and keepalives) that a slot sends up to `until`, as it was framed."""
    stream = await CopyBoth.connect(f"{cluster.conninfo} dbname={database}", 10)
    messages: list[bytes] = []
    try:
        await stream.start(f"START_REPLICATION SLOT {slot} LOGICAL 0/0 ({options})", 10)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not any(reaches(message, until) for message in messages[-2000:]):
                stream.drain(lambda message: messages.append(bytes(message)), 2000)
                stream.report(0, 0, reply=True)  # have it say how far it has come
                await stream.readable(0.2)
    finally:
        await stream.close()
    return messages


def reaches(message: bytes, until: Lsn) -> bool:
    """Whether a keepalive says that all log up to `until` has been sent."""
    return message[:1] == b"k" and int.from_bytes(message[1:9]) >= until


class CommitRecord(NamedTuple):
    """A commit record as pg_waldump shows it."""

    xid: int
    start: Lsn


def commit_records(cluster: Cluster, start: Lsn, end: Lsn) -> list[CommitRecord]:
    """Give the commit records in a stretch of log by pg_waldump, in order; not by any code of ours."""
    text = cluster.run("pg_waldump", "-p", cluster.data / "pg_wal", "-s", str(start), "-e", str(end)).stdout
    found = []
    for line in text.splitlines():
        match = _COMMIT_RECORD.match(line)
        if match is not None:
            prepared = _PREPARED_XID.match(match[4]) if match[3] == "COMMIT_PREPARED" else None
            found.append(CommitRecord(int(prepared[1] if prepared else match[1]), Lsn.parse(match[2])))
    return found


def record_starts(cluster: Cluster, start: Lsn, end: Lsn) -> set[Lsn]:
    """Give where records begin in a stretch of log, by pg_waldump."""
    text = cluster.run("pg_waldump", "-p", cluster.data / "pg_wal", "-s", str(start), "-e", str(end)).stdout
    return {Lsn.parse(match[1]) for match in re.finditer(r"lsn: ([0-9A-F]+/[0-9A-F]+),", text)}
