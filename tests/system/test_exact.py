"""P2: random commits are brought back, and each clone holds exactly the commits at or before its own in the log.

The model is not ours: every transaction writes its own id into a table, and the server's log, read by `pg_waldump`,
says in which order they committed. One history has it all: a plain load, commits made while the service was down,
and a switch to another timeline. Adjacent commits are tried in pairs, one commit too many being the classic mistake.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn, transaction
from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.postgres import MAJORS
from tests.fixtures.service import Deployment, deployment
from trigger.config.options import load
from trigger.restore.clones import drop
from trigger.restore.restore import restore
from trigger.restore.target import Named, resolve
from trigger.service.connect import Parts, connect


@dataclass
class Past:
    """What the server's log says: where each transaction of the truth table committed."""

    starts: dict[int, Lsn] = field(default_factory=dict)

    def at(self, xid: int) -> set[int]:
        """Give the transactions that a state exactly at `xid` holds."""
        return {other for other, start in self.starts.items() if start <= self.starts[xid]}


def _commit_for(deployed: Deployment, seconds: float) -> None:
    load_ = Load(deployed)
    time.sleep(seconds)
    load_.end()


def _live_through_it(deployed: Deployment) -> Past:
    """Make the history: a load, a load while the service is down, a switch of the timeline, a load."""
    cluster, past = deployed.cluster, Past()
    deployed.start()
    first = cluster.end_of_log()
    _commit_for(deployed, 2)
    deployed.stop()
    _commit_for(deployed, 1)
    deployed.start()
    _commit_for(deployed, 1)
    deployed.settle()
    past.starts |= judge.logged_commits(cluster, first)
    switched = cluster.end_of_log()
    cluster.switch_timeline()
    deployed.wait_for(lambda: deployed.status().get("ready"), "the stream on the new timeline")
    _commit_for(deployed, 2)
    deployed.settle()
    past.starts |= judge.logged_commits(cluster, switched, timeline=2)
    written = judge.written_ids(cluster)
    past.starts = {xid: start for xid, start in past.starts.items() if xid in written}
    assert set(past.starts) == written
    return past


def _chosen(past: Past, known: set[int], count: int) -> list[int]:
    """Give about `count` transactions, half of them each with its neighbour in the log; never the very first."""
    in_order = [xid for xid in sorted(past.starts, key=lambda xid: past.starts[xid]) if xid in known]
    places = random.sample(range(len(in_order) - 1), min(count // 2 + 1, len(in_order) - 1))
    return [xid for place in places for xid in in_order[place : place + 2]][:count]


async def _assert_exact(parts: Parts, past: Past, xid: int) -> None:
    """Restore to one transaction, compare what the clone holds with the model, and drop it."""
    target = await resolve(Named(name=transaction(xid)), parts.catalog, parts.journal)
    report = await restore(target, parts.site, progress=lambda _step, _done, _total: None)
    try:
        async with await psycopg.AsyncConnection.connect(f"{report.conninfo} dbname=postgres") as connection:
            rows = await (await connection.execute("SELECT xid::text FROM truth")).fetchall()
        held = {int(row[0]) for row in rows}
        too_few, too_many = past.at(xid) - held, held - past.at(xid)
        assert not too_few, f"restored to {xid}, without {sorted(too_few)[:5]} (and {len(too_few)} in all)"
        assert not too_many, f"restored to {xid}, with {sorted(too_many)[:5]} (and {len(too_many)} in all)"
    finally:
        await drop(report.name, parts.site)


def _assert_all_exact(deployed: Deployment, count: int) -> None:
    past = _live_through_it(deployed)
    known = set(judge.read(deployed).outcomes)
    assert set(past.starts) <= known

    async def all_of_them() -> None:
        parts = await connect(load(deployed.config))
        try:
            for xid in _chosen(past, known, count):
                await _assert_exact(parts, past, xid)
        finally:
            await parts.close()

    asyncio.run(all_of_them())
    print(f"{count} of {count} restores exact, {deployed.storage}, PostgreSQL {deployed.cluster.major}")


@pytest.fixture(params=[(major, "btrfs") for major in MAJORS] + [(16, "directory")], ids=str)
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A service that takes points often, on each version and both storages."""
    major, storage = request.param
    points = "[points]\nmin_interval_seconds = 0.3\nper_minute = 6000\n"
    with deployment(major, storage, extra=points, wal_keep_size="4GB") as found:
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.slow
def test_random_commits_come_back_with_all_before_them_and_none_after(deployed: Deployment) -> None:
    _assert_all_exact(deployed, 6)


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_five_hundred_random_commits_come_back_with_all_before_them_and_none_after(deployed: Deployment) -> None:
    _assert_all_exact(deployed, 125)
