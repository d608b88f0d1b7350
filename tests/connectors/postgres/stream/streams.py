"""Recorded replication streams: which variants there are, the load that fills them, and the golden files of them.

`python -m tests.connectors.postgres.stream.streams` records them anew from the servers at hand into `golden/`: one file
a version and variant, gzip over frames of (length in 4 bytes, message).
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from psycopg.errors import ObjectInUse

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.stream.pgoutput import Committed, Decoder
from tests.connectors.postgres.reading import raw_messages
from tests.fixtures.postgres import MAJORS, Cluster, running_cluster
from tests.fixtures.volumes import plain_folder

GOLDEN = Path(__file__).parent / "golden"
BIG = "INSERT INTO t SELECT g, repeat('x', 7000) FROM generate_series({0}, {0} + 11) g"  # more than 64 kB: streamed


class Variant(NamedTuple):
    """One way to ask for a stream."""

    name: str
    protocol: int
    streaming: str
    two_phase: bool = False

    @property
    def options(self) -> str:
        streaming = "" if self.streaming == "off" else f", streaming '{self.streaming}'"
        return f"proto_version '{self.protocol}', publication_names 'every', messages 'true'{streaming}"

    @property
    def decoder(self) -> Decoder:
        return Decoder(parallel=self.streaming == "parallel")


VARIANTS = (
    Variant("plain", 1, "off"),
    Variant("streamed", 2, "on"),
    Variant("prepared", 3, "on", two_phase=True),
    Variant("plain-4", 4, "off"),
    Variant("parallel", 4, "parallel", two_phase=True),
)

PREPARATION = (
    "CREATE TABLE t (id int PRIMARY KEY, v text)",
    "ALTER TABLE t ALTER v SET STORAGE EXTERNAL, REPLICA IDENTITY FULL",
    "CREATE TABLE u (id serial PRIMARY KEY, v text)",
    "CREATE TYPE mood AS ENUM ('fine')",
    "CREATE TABLE typed (m mood)",
    "CREATE PUBLICATION every FOR ALL TABLES",
)
LOAD = (
    "BEGIN; INSERT INTO t VALUES (1, 'a'), (2, 'b'); UPDATE t SET id = 3 WHERE id = 2; DELETE FROM t WHERE id = 3;"
    " COMMIT",
    "BEGIN; INSERT INTO u (v) VALUES ('x'); SELECT pg_logical_emit_message(true, 'trigpoint', 'über'); COMMIT",
    "SELECT pg_logical_emit_message(true, 'trigpoint', 'alone')",
    "SELECT pg_logical_emit_message(false, 'trigpoint', 'outside')",
    "INSERT INTO typed VALUES ('fine')",
    f"BEGIN; {BIG.format(100)}; SAVEPOINT a; {BIG.format(200)}; UPDATE u SET v = 'y'; ROLLBACK TO a;"
    f" SAVEPOINT b; {BIG.format(300)}; RELEASE b; DELETE FROM t WHERE id = 305;"
    " SELECT pg_logical_emit_message(true, 'trigpoint', 'big'); COMMIT",
    f"BEGIN; {BIG.format(400)}; {BIG.format(500)}; ROLLBACK",
    "BEGIN; INSERT INTO u (v) VALUES ('p'); PREPARE TRANSACTION 'small one'",
    f"BEGIN; {BIG.format(600)}; PREPARE TRANSACTION 'big one'",
    "BEGIN; INSERT INTO u (v) VALUES ('q'); PREPARE TRANSACTION 'never'",
    "INSERT INTO u (v) VALUES ('between')",
    "COMMIT PREPARED 'big one'",
    "ROLLBACK PREPARED 'never'",
    "COMMIT PREPARED 'small one'",
    "SELECT pg_replication_origin_create('far away')",
    f"SELECT pg_replication_origin_session_setup('far away'); INSERT INTO u (v) VALUES ('o'); {BIG.format(700)}",
    "SELECT pg_replication_origin_drop('far away')",
    "ALTER TABLE u ADD w int; INSERT INTO u (v, w) VALUES ('r', 1)",
    "TRUNCATE t, u",
)


def variants(major: int) -> list[Variant]:
    return [variant for variant in VARIANTS if major >= 16 or variant.protocol < 4]


def fill(cluster: Cluster, database: str) -> Lsn:
    """Make a slot for each variant (and a copy for a second reader) and run the load; gives where it ends."""
    for statement in PREPARATION:
        cluster.sql(statement, database)
    for variant in variants(cluster.major):
        for name in (variant.name, f"{variant.name}-copy"):
            slot = slot_of(name)
            phases = "true" if variant.two_phase else "false"
            cluster.sql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', false, {phases})", database)
    for statement in LOAD:
        _run_when_free(cluster, statement, database)
    cluster.sql("SELECT pg_switch_wal()")
    return cluster.flushed()


def _run_when_free(cluster: Cluster, statement: str, database: str) -> None:
    """Run a statement as soon as the session before it has let go of what it needs: an origin, after its end."""
    deadline = time.monotonic() + 10
    while True:
        try:
            cluster.sql(statement, database)
            return
        except ObjectInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def slot_of(name: str) -> str:
    return f"s_{name.replace('-', '_')}"


async def record(cluster: Cluster, database: str, variant: Variant, until: Lsn) -> list[bytes]:
    return await raw_messages(cluster, database, slot_of(variant.name), variant.options, until)


def decode(variant: Variant, messages: list[bytes]) -> list[Committed]:
    decoder = variant.decoder
    for message in messages:
        decoder.feed(memoryview(message))
    return decoder.commits


def write(path: Path, messages: list[bytes]) -> None:
    content = b"".join(len(message).to_bytes(4) + message for message in messages)
    path.write_bytes(gzip.compress(content, mtime=0))


def read(path: Path) -> list[bytes]:
    return list(_frames(gzip.decompress(path.read_bytes())))


def _frames(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        yield content[at + 4 : at + 4 + length]
        at += 4 + length


def main() -> None:
    """Record every variant of every version into `golden/`."""
    for major in MAJORS:
        with (
            plain_folder() as folder,
            running_cluster(major, folder / "data", logical_decoding_work_mem="64kB") as cluster,
        ):
            until = fill(cluster, "postgres")
            for variant in variants(major):
                messages = asyncio.run(record(cluster, "postgres", variant, until))
                write(GOLDEN / f"{major}-{variant.name}.gz", messages)
                print(f"{major} {variant.name}: {len(messages)} messages, {len(decode(variant, messages))} commits")


if __name__ == "__main__":
    main()
