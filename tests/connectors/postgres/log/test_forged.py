"""No user of the database puts a record into its log by a text that looks like the line of one.

Server, log and reader are real. What the log has is told by its bytes: which records are commits, and where they begin.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log import search, wal
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.log.waldump import Ended, EndOfLogError, Stretch, WalDump, parse_ended
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import Programs
from tests.fixtures.postgres import Cluster
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError
from trigger.position import Name

pytestmark = pytest.mark.server

SEGMENT_BYTES = 1 << 20
_HEAD = "rmgr: Transaction len (rec/tot):     34/    34, tx:        {xid}, lsn: {lsn}, prev 0/0, "
_TIME = "2026-11-26 19:00:00.1 UTC"


@dataclass
class Past:
    """What was done in a cluster."""

    cluster: Cluster
    commits: list[int] = field(default_factory=list)
    """The transactions that were committed by the test, in order."""
    room: str = ""
    """Where a tablespace was made."""

    def commit(self, text: str = "INSERT INTO t VALUES (1)") -> int:
        with self.cluster.connect() as connection:
            connection.autocommit = False
            ((xid,),) = connection.execute("SELECT pg_current_xact_id()::text::int")
            connection.execute(text.encode())
            connection.commit()
        self.commits.append(xid)
        return int(xid)

    def prepare(self, *gids: str, end: LiteralString = "ROLLBACK") -> None:
        """Prepare transactions under these ids, as a role that may do nothing else, and end them."""
        with self.cluster.connect() as connection:
            connection.execute("SET ROLE app")
            for gid in gids:
                connection.execute("BEGIN")
                connection.execute("SELECT pg_current_xact_id()")
                prepared = psycopg.sql.Literal(gid)
                connection.execute(psycopg.sql.SQL("PREPARE TRANSACTION {}").format(prepared))
                connection.execute(psycopg.sql.SQL(end + " PREPARED {}").format(prepared))

    def soon(self) -> str:
        ((place,),) = self.cluster.sql("SELECT (pg_current_wal_insert_lsn() + 64)::text")
        return str(place)


def _live(past: Past) -> None:
    first = past.commit()
    for said in (f"COMMIT {_TIME}", f"ABORT {_TIME}", f"COMMIT_PREPARED {first}: {_TIME}"):
        line = _HEAD.format(xid=first, lsn=past.soon()) + f"desc: {said}"
        past.prepare(f"x\n{line}\nx", f"{line}: {_TIME}\n", f"a desc: {said}", f"x\n desc: {said}; subxacts: 9\n\n\n")
        past.commit()
    past.prepare(
        "x\npg_waldump: error: error in WAL record at 0/1: x", "pg_waldump: error: error in WAL record at 0/1: x"
    )
    with past.cluster.connect() as connection:
        for name in ('x\nrmgr: a tx: 1, lsn: 0/0, desc: CREATE 9 "/srv"', "x\nrmgr: a tx: 1, lsn: 0/0, desc: DROP 7"):
            connection.execute("SELECT pg_create_restore_point(%s)", [name])
    past.cluster.sql(f"CREATE TABLESPACE room LOCATION '{past.room}'")
    past.commit()
    for length in range(1, 160, 4):  # records with texts that begin anywhere on a page, and go on on the next
        line = _HEAD.format(xid=first, lsn=past.soon()) + f"desc: COMMIT {_TIME}\n"
        past.prepare(*(f"{number}{line}{'x' * length}"[:190] for number in range(4)))
    for turn in range(12):  # and in the next segment
        ((left,),) = past.cluster.sql(
            f"SELECT {SEGMENT_BYTES} - (pg_current_wal_insert_lsn() - '0/0') % {SEGMENT_BYTES}"
        )
        fill = max(int(left) - 3000 - 56 * turn, 0)
        past.cluster.sql(f"SELECT pg_logical_emit_message(false, E'a\\n{line[:60]}', repeat('x', {fill}))")
        past.prepare(*(f"{number}\n{line}{'x' * number}" for number in range(12)))
    past.commit()


@pytest.fixture(scope="module", params=[15, 18])
def past(request: pytest.FixtureRequest) -> Iterator[Past]:
    with plain_folder() as folder:
        cluster = Cluster(request.param, folder / "data")
        try:
            cluster.create("--wal-segsize=1", fsync="off", wal_keep_size="1GB")
            cluster.start()
            cluster.sql("CREATE TABLE t (v int); CREATE ROLE app LOGIN")
            room = folder / 'a\nrmgr: "b'
            room.mkdir()
            os.chown(room, *cluster.owner)
            made = Past(cluster, room=str(room))
            _live(made)
            yield made
        finally:
            cluster.destroy()


@dataclass(frozen=True)
class Log:
    """The log of a cluster up to now, whole, and where its records begin by its bytes."""

    stretch: Stretch
    commits: list[Lsn]
    aborts: list[Lsn]
    prepares: list[Lsn]
    crossing: int
    """How many records of prepared transactions lie in two segments."""


def _read(cluster: Cluster) -> Log:
    folder, end = cluster.data / "pg_wal", cluster.flushed()
    numbers = sorted(name.number for file in folder.iterdir() if (name := SegmentName.parse(file.name, SEGMENT_BYTES)))
    first, last = numbers[0], (end - 1) // SEGMENT_BYTES
    start = first * SEGMENT_BYTES
    pages = b"".join((folder / SegmentName(1, one).text(SEGMENT_BYTES)).read_bytes() for one in range(first, last + 1))
    found: dict[int, list[Lsn]] = {0x00: [], 0x10: [], 0x20: [], 0x30: [], 0x40: []}
    crossing = 0
    for begin, behind, record in wal.records(pages[: end - start]):
        if record[17] == 1 and (kind := record[16] & 0x70) in found and wal.checksum_holds(record):
            found[kind].append(Lsn(start + begin))
            crossing += kind == 0x10 and begin // SEGMENT_BYTES < behind // SEGMENT_BYTES
    stretch = Stretch(folder, 1, SEGMENT_BYTES, Lsn(start), Lsn(end))
    return Log(stretch, sorted(found[0] + found[0x30]), sorted(found[0x20] + found[0x40]), found[0x10], crossing)


@pytest.fixture(scope="module")
def log(past: Past) -> Log:
    return _read(past.cluster)


@pytest.fixture
def dump(past: Past) -> WalDump:
    return WalDump(past.cluster.programs)


def test_the_log_has_the_commits_that_were_made_and_no_others(past: Past, log: Log, dump: WalDump) -> None:
    found = asyncio.run(dump.commits(log.stretch, 10**6))
    assert [commit.start for commit in found] == log.commits
    assert [commit.xid for commit in found if commit.xid in past.commits] == past.commits
    assert log.crossing, "a text has to be read from two segments"


def test_the_ends_of_transactions_are_those_of_the_log(log: Log, dump: WalDump) -> None:
    async def run() -> list[Ended | None]:
        async with aclosing(dump.transactions(log.stretch)) as lines:
            return [parse_ended(line) async for line in lines]

    found = [one for one in asyncio.run(run()) if one is not None]
    assert [one.start for one in found] == sorted(log.commits + log.aborts + log.prepares)
    assert [one.start for one in found if one.time is None] == log.prepares
    assert [one.start for one in found if not one.stays] == log.aborts


def test_a_search_finds_the_commits_of_the_log(past: Past, log: Log, dump: WalDump) -> None:
    async def run() -> list[tuple[int, int]]:
        segments, history = SegmentFolder(log.stretch.folder, SEGMENT_BYTES), lsn.history("1", 1)
        found = search.commits(segments, dump, history, log.stretch.start, log.stretch.end, Name("", past.commits[0]))
        return [(one.start, one.more_children + len(one.children)) async for one in found]

    assert asyncio.run(run()) == [(start, 0) for start in log.commits]


def test_what_a_replay_would_do_is_what_the_log_has(past: Past, log: Log, dump: WalDump) -> None:
    found = asyncio.run(dump.preview(log.stretch))
    assert [made.location for made in found.tablespaces] == [past.room]
    assert found.removals == []


def test_where_a_log_ends_is_not_told_by_a_text(past: Past, log: Log, tmp_path: Path) -> None:
    """A reader that fails without a word says nothing of the log, whatever words stand in it."""
    program = tmp_path / "pg_waldump"
    program.write_text(f'#!/bin/sh\n{past.cluster.programs.path("pg_waldump")} "$@"\nexit 1\n')
    program.chmod(0o755)
    with pytest.raises(JournalError, match="failed with exit code 1;") as raised:
        asyncio.run(WalDump(Programs(tmp_path, past.cluster.major)).commits(log.stretch, 10**6))
    assert not isinstance(raised.value, EndOfLogError)


@pytest.mark.parametrize("wrong", ["length", "record", "folder"])
def test_a_text_that_is_not_in_the_log_any_more_is_no_text(log: Log, tmp_path: Path, wrong: str) -> None:
    folder, at, length = log.stretch.folder, log.prepares[0], 300
    if wrong == "record":
        at, length = log.commits[0], 34
    if wrong == "folder":
        folder = tmp_path
    stretch = Stretch(folder, 1, SEGMENT_BYTES, log.stretch.start, log.stretch.end)
    with pytest.raises(JournalError, match=str(at)):
        stretch.text_at(at, length)
