"""P1 against PostgreSQL's own log: under a mixed load every visible commit has one outcome, at the place that
`pg_waldump` gives.

The load: pgbench with its own transactions, subtransactions, prepared and streamed transactions, aborts of all of
these, and DDL, GRANT and sequence calls between. Each visible transaction writes its own id into a table; what does
not commit leaves nothing there, and what logical decoding cannot see writes nothing there.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures import judge
from tests.fixtures.postgres import MAJORS, Cluster
from tests.fixtures.service import Deployment, deployment

_MARK = b"INSERT INTO truth (what) VALUES ('load')"
_PGBENCH = "BEGIN; UPDATE account SET amount = amount + 1 WHERE id = 1 + random() * 900; {}; COMMIT;\n"
Connection = psycopg.Connection[tuple[Any, ...]]


def _plain(connection: Connection) -> None:
    connection.execute(_MARK)


def _subtransactions(connection: Connection) -> None:
    with connection.transaction():
        connection.execute(_MARK)
        for index in range(4):
            with contextlib.suppress(psycopg.errors.DivisionByZero), connection.transaction():
                connection.execute("UPDATE account SET amount = 0 WHERE id = 1")
                if index % 2:
                    connection.execute("SELECT 1 / 0")


def _aborted(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute(_MARK)


def _streamed(connection: Connection, *, keep: bool = True) -> None:
    with connection.transaction(force_rollback=not keep):
        connection.execute(_MARK)
        connection.execute("INSERT INTO bulk SELECT n, repeat('x', 100) FROM generate_series(1, 3000) n")


def _streamed_and_aborted(connection: Connection) -> None:
    _streamed(connection, keep=False)


def _prepared(connection: Connection, end: bytes = b"COMMIT") -> None:
    gid = f"gid{random.getrandbits(60)}".encode()
    connection.execute(b"BEGIN")
    connection.execute(_MARK)
    connection.execute(b"PREPARE TRANSACTION '" + gid + b"'")
    time.sleep(random.uniform(0, 0.1))
    connection.execute(end + b" PREPARED '" + gid + b"'")


def _prepared_and_rolled_back(connection: Connection) -> None:
    _prepared(connection, b"ROLLBACK")


_ONE_DDL_AT_A_TIME = threading.Lock()
"""Two sessions that make, or grant on, the same table at once get errors from PostgreSQL."""


def _invisible(connection: Connection) -> None:
    statement = random.choice(
        (
            b"CREATE TABLE IF NOT EXISTS made (id int)",
            b"DROP TABLE IF EXISTS made",
            b"GRANT SELECT ON account TO PUBLIC",
            b"SELECT nextval('counter')",
            b"SELECT lo_unlink(lo_create(0))",
        )
    )
    with _ONE_DDL_AT_A_TIME:
        connection.execute(statement)


def _truncated(connection: Connection) -> None:
    with connection.transaction():
        connection.execute(_MARK)
        connection.execute(b"TRUNCATE bulk")


_KINDS: tuple[Callable[[Connection], None], ...] = (
    _plain,
    _subtransactions,
    _aborted,
    _streamed,
    _streamed_and_aborted,
    _prepared,
    _prepared_and_rolled_back,
    _invisible,
    _truncated,
)


@pytest.fixture(params=MAJORS)
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """A service that takes points often, on each version; the server streams transactions early."""
    with deployment(
        request.param,
        "btrfs",
        extra="[points]\nmin_interval_seconds = 0.2\nper_minute = 6000\n",
        logical_decoding_work_mem="64kB",
        wal_keep_size="20GB",
        megabytes=60_000,
    ) as found:
        cluster = found.cluster
        cluster.sql(judge.TRUTH_TABLE)
        cluster.sql("CREATE TABLE account (id int PRIMARY KEY, amount bigint NOT NULL)")
        cluster.sql("INSERT INTO account SELECT n, 0 FROM generate_series(1, 1000) n")
        cluster.sql("CREATE TABLE bulk (id int, words text)")
        cluster.sql("CREATE SEQUENCE counter")
        yield found


def _pgbench(cluster: Cluster, seconds: int) -> None:
    script = cluster.sockets / "script.sql"
    script.write_text(_PGBENCH.format(_MARK.decode()))
    where: list[str | Path] = ["-h", cluster.sockets, "-p", str(cluster.port), "-U", "postgres"]
    cluster.run("pgbench", *where, "-n", "-f", script, "-c", "3", "-T", str(seconds), "postgres", seconds=seconds + 120)


def _mix(cluster: Cluster, over: threading.Event, errors: list[BaseException]) -> None:
    try:
        with cluster.connect() as connection:
            while not over.is_set():
                random.choice(_KINDS)(connection)
    except BaseException as error:
        errors.append(error)


def _load(cluster: Cluster, seconds: int) -> None:
    """Run everything at once for a while; an unexpected error of the load fails the test."""
    over, errors = threading.Event(), list[BaseException]()
    mixers = [threading.Thread(target=_mix, args=(cluster, over, errors)) for _ in range(2)]
    for thread in mixers:
        thread.start()
    try:
        _pgbench(cluster, seconds)
    finally:
        over.set()
        for thread in mixers:
            thread.join(60)
    assert not errors, errors


def _assert_truth(deployed: Deployment, seconds: int) -> None:
    deployed.start()
    first = deployed.cluster.end_of_log()
    _load(deployed.cluster, seconds)
    deployed.settle(120)
    logged = judge.logged_commits(deployed.cluster, first)
    assert deployed.stop() == 0
    left = judge.read(deployed)
    truth = judge.written_ids(deployed.cluster)
    assert len(truth) > 200 * seconds / 5
    judge.assert_every_commit_has_one_outcome(left, truth)
    judge.assert_bounds_hold(left)
    strangers = set(left.starts) - set(logged)
    assert not strangers, f"in the catalog, but never committed: {sorted(strangers)[:5]}"
    misplaced = {xid: (left.starts[xid], logged[xid]) for xid in truth if left.starts[xid] != logged[xid]}
    assert not misplaced, f"(ours, pg_waldump's): {dict(list(misplaced.items())[:5])}"
    print(f"{len(truth)} commits in {seconds} s, each with its one outcome, PostgreSQL {deployed.cluster.major}")


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.slow
def test_every_visible_commit_of_a_mixed_load_has_one_outcome_at_the_place_in_the_log(deployed: Deployment) -> None:
    _assert_truth(deployed, seconds=5)


@pytest.mark.server
@pytest.mark.volume
@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_every_visible_commit_of_ten_minutes_of_mixed_load_has_one_outcome(deployed: Deployment) -> None:
    _assert_truth(deployed, seconds=600)
