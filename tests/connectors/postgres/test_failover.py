"""What is lost in a failover to which the slot was carried over lies in a gap: a real standby, from version 17 on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.database import Postgres
from tests.fixtures.postgres import Cluster, running_cluster, running_standby
from tests.fixtures.volumes import plain_folder
from trigger.ports import Source
from trigger.position import Position
from trigger.protect.window import Broken

pytestmark = pytest.mark.server

LIMIT_SECONDS = 60.0
HELD_SECONDS = 15.0
"""Longer than the server's word on what holds commits back is asked for once."""
SLOT = "trigpoint_postgres"


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        yield made


def test_what_the_primary_committed_behind_the_fork_lies_in_the_gap_of_the_failover(folder: Path) -> None:
    with pair_with_slots(folder) as (primary, standby):
        wait_until(lambda: slot_is_carried_over(primary, standby))
        seen = asyncio.run(last_seen(primary))
        primary.sql("INSERT INTO t VALUES (2)")
        kept = primary.flushed()
        wait_until(lambda: bool(standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{kept}'")[0][0]))
        standby.stop()
        primary.sql("INSERT INTO t VALUES (3)")
        lost = Position(seen.history, primary.flushed())
        primary.kill()
        standby.start()
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        ((after, until),) = asyncio.run(holes(standby, seen))
    assert seen < after < lost
    assert (until.history.branch, until.at) == (2, after.at)


def test_a_standby_that_goes_down_while_commits_wait_for_it_costs_no_slot_and_no_gap(folder: Path) -> None:
    """The server warns of it with the SQLSTATE that it also warns of a dropped publication with."""
    with pair_with_slots(folder) as (primary, standby):
        asyncio.run(held_and_given(primary, standby))


async def held_and_given(primary: Cluster, standby: Cluster) -> None:
    """Commit while the standby is down; the open stream names it as what holds, and gives all when it is back."""
    database = Postgres(primary.conninfo, ["postgres"], failover=True)
    (source,) = database.sources()
    try:
        assert await source.open(None) is None
        for value, down in ((2, False), (3, True)):
            if down:
                standby.stop()
            primary.sql(f"INSERT INTO t VALUES ({value})")
            written = primary.flushed()
            if down:
                assert not await ends(source, written, HELD_SECONDS), "the server has not waited for its standby"
                assert "synchronized_standby_slots: standby (nobody reads it)" in source.trouble
                standby.start()
            assert written in await ends(source, written, LIMIT_SECONDS)
    finally:
        await source.close()
        await database.close()


async def ends(source: Source, until: int, seconds: float) -> list[int]:
    """Give where the commits end that a stream gives within so many seconds, or until one ends there."""
    found = list[int]()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while until not in found:
                found += [commit.end for commit in (await source.read()).commits]
    return found


@contextlib.contextmanager
def pair_with_slots(folder: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """Give a primary with a slot of ours, which waits for its standby, and that, which carries its slots over."""
    with running_cluster(18, folder / "data") as primary:
        primary.sql("CREATE TABLE t (v int)")
        primary.sql("SELECT pg_create_physical_replication_slot('standby', true)")
        asyncio.run(last_seen(primary))
        primary.configure({"synchronized_standby_slots": "standby"})
        carried = {"primary_slot_name": "standby", "hot_standby_feedback": "on", "sync_replication_slots": "on"}
        with running_standby(primary, carried | {"synchronized_standby_slots": ""}) as standby:
            yield primary, standby


def slot_is_carried_over(primary: Cluster, standby: Cluster) -> bool:
    """Move the slot on the primary, for which a standby waits; gives whether it would survive a promotion."""
    primary.sql("INSERT INTO t VALUES (0)")
    primary.sql("SELECT pg_log_standby_snapshot()")
    primary.sql(f"SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())")
    query = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{SLOT}' AND synced AND NOT temporary"
    return bool(standby.sql(query)[0][0])


async def last_seen(primary: Cluster) -> Position:
    """Commit something; gives where its stream has seen it end, acknowledged."""
    database = Postgres(primary.conninfo, ["postgres"], failover=True)
    (source,) = database.sources()
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            begun = await source.open(None)
            assert begun is None
            through = (await source.read()).through
            primary.sql("INSERT INTO t VALUES (1)")
            commits = list[Position]()
            while not commits:
                commits += [one.position for one in (await source.read()).commits if one.end > through.at]
            await source.acknowledge(commits[-1])
    finally:
        await source.close()
        await database.close()
    return commits[-1]


async def holes(server: Cluster, after: Position) -> list[tuple[Position, Position]]:
    """Give the gaps of a stream that was delivered up to a place and comes to a server."""
    database = Postgres(server.conninfo, ["postgres"], failover=True)
    (source,) = database.sources()
    try:
        seen = await source.open(after)
        assert seen is not None
        assert seen.until == after, "all that the standby has is given"
        return list(Broken("postgres", after, seen).holes)
    finally:
        await source.close()
        await database.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
