"""Several databases of one cluster under the real service: a stream each, one pipeline for all.

A commit belongs to the stream of its own database, while log, points and restores are of the whole cluster. Truth: in
each database a table in which every transaction writes its own id, and the order of the server's log by `pg_waldump`.
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn
from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.slots import commit
from trigger.model import Cause, Changes, Outcome, State

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

BANK, SHOP = DATABASES = ("bank", "shop")
POINTS = "[points]\nmin_interval_seconds = 0.5\nper_minute = 6000\nretry_seconds = 0.3\n"


@contextlib.contextmanager
def two_databases(major: int, extra: str = POINTS) -> Iterator[Deployment]:
    """Give a service for two databases, with a truth table in each."""
    with deployment(major, extra=extra, databases=DATABASES, wal_keep_size="4GB") as found:
        for name in DATABASES:
            found.cluster.sql(judge.TRUTH_TABLE, name)
        yield found


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """One history for all who only look at it: both databases under load at once, then at rest."""
    with two_databases(18) as found:
        found.start()
        loads = [Load(found, database=name) for name in DATABASES]
        first = found.status()["last_point"]
        found.wait_for(lambda: found.status()["last_point"] >= first + 3, "points amid the load")
        for load in loads:
            load.end()
        settle(found)
        yield found


@pytest.fixture(scope="module")
def logged(shared: Deployment) -> dict[int, Lsn]:
    """Where each transaction of the two truth tables committed, by `pg_waldump`."""
    everything = judge.logged_commits(shared.cluster, _first_segment(shared.cluster))
    written = set().union(*written_by(shared.cluster).values())
    return {xid: start for xid, start in everything.items() if xid in written}


def _first_segment(cluster: Cluster) -> Lsn:
    names = [file.name for file in (cluster.data / "pg_wal").iterdir() if len(file.name) == 24]
    return Lsn(int(min(names)[16:], 16) << 24)


def settle(deployed: Deployment) -> None:
    """Wait until every stream's commits made so far have their outcome: each stream keeps its order."""
    marker = f"settled-{secrets.token_hex(4)}"
    for name in DATABASES:
        deployed.cluster.sql(f"SELECT pg_logical_emit_message(true, 'trigpoint', '{marker}')", name)

    def known() -> bool:
        found = deployed.trigpoint("find", "--marker", marker, "--json", check=False)
        return found.returncode == 0 and len(json.loads(found.stdout)) == len(DATABASES)

    deployed.wait_for(known, "an outcome for the last commit of each database")


def written_by(cluster: Cluster) -> dict[str, set[int]]:
    return {name: judge.written_ids(cluster, name) for name in DATABASES}


def held_by(conninfo: str) -> dict[str, set[int]]:
    """Give the transactions that each database of a clone holds."""
    held = {}
    for name in DATABASES:
        with psycopg.connect(f"{conninfo} dbname={name}") as connection:
            held[name] = {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")}
    return held


def assert_outcomes_per_stream(left: judge.Left, written: dict[str, set[int]]) -> None:
    """Each transaction has exactly one outcome, in the stream of its own database."""
    outcomes = [(r.stream, judge.xid(r)) for records in left.commits.values() for r in records]
    truth = {(name, xid) for name, xids in written.items() for xid in xids}
    assert len(outcomes) == len(set(outcomes))
    assert truth <= set(outcomes)
    strangers = {(stream, xid) for stream, xid in set(outcomes) - truth if xid in set().union(*written.values())}
    assert not strangers, f"in the stream of another database: {sorted(strangers)[:5]}"


def test_commits_of_two_databases_at_once_each_have_one_outcome_in_their_own_stream(
    shared: Deployment, logged: dict[int, Lsn]
) -> None:
    written, left = written_by(shared.cluster), judge.read(shared)
    assert all(len(xids) > 20 for xids in written.values())
    judge.assert_every_commit_has_one_outcome(left, set().union(*written.values()))
    judge.assert_bounds_hold(left)
    assert_outcomes_per_stream(left, written)
    assert {xid: left.starts[xid] for xid in logged} == logged
    assert shared.status()["streams"] == dict.fromkeys(DATABASES, True)


def test_one_point_holds_commits_of_both_databases_of_which_the_newest_is_protected(shared: Deployment) -> None:
    left = judge.read(shared)
    of_both = [number for number, records in left.commits.items() if {r.stream for r in records} == set(DATABASES)]
    assert of_both
    for number in of_both:
        records = sorted(left.commits[number], key=lambda r: r.start)
        outcomes = [r.outcome for r in records]
        assert outcomes == [Outcome.COALESCED] * (len(records) - 1) + [Outcome.PROTECTED]
        point = next(point for point in left.points if point.number == number)
        assert point.commit is not None
        assert (point.commit.stream, point.commit.name) == (records[-1].stream, records[-1].name)
        for name in DATABASES:
            rows = sum(r.stream == name and not r.markers for r in records)
            assert point.tables.get(f"{name}.public.truth", Changes()).inserted == rows


def test_a_restore_to_a_commit_of_one_database_holds_those_of_the_other_that_lie_before_it(
    shared: Deployment, logged: dict[int, Lsn]
) -> None:
    written, order = written_by(shared.cluster), sorted(logged, key=lambda xid: logged[xid])
    turns = [
        place for place in range(20, len(order) - 1) if _of(written, order[place]) != _of(written, order[place + 1])
    ]
    assert len(turns) > 10, "the two loads were interleaved"
    place = random.choice(turns)
    for xid in order[place : place + 2]:  # the two neighbours belong to different databases
        for option, until in (("--to-xid", logged[xid]), ("--before-xid", Lsn(logged[xid] - 1))):
            report = shared.ask("restore", option, str(xid), "--name", "back")
            held = held_by(report["conninfo"])
            shared.trigpoint("clones", "drop", "--yes", "back")
            wanted = {name: {x for x in xids if logged[x] <= until} for name, xids in written.items()}
            assert held == wanted, f"{option} {xid} of {_of(written, xid)}"


def _of(written: dict[str, set[int]], xid: int) -> str:
    return next(name for name, xids in written.items() if xid in xids)


def _confirmed(cluster: Cluster, name: str) -> Lsn:
    (row,) = cluster.sql(
        f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 'trigpoint_{name}'"
    )
    return Lsn.parse(row[0])


WORK = {
    "commits": "INSERT INTO truth (what) SELECT 'busy' FROM generate_series(1, 1000)",
    "DDL": "CREATE TABLE IF NOT EXISTS made (n int); DROP TABLE made",
}


@pytest.mark.parametrize("work", WORK)
def test_the_slot_of_an_idle_database_advances_beside_a_busy_one(shared: Deployment, work: str) -> None:
    cluster = shared.cluster
    before = {name: _confirmed(cluster, name) for name in DATABASES}
    cluster.sql(WORK[work], BANK)
    target = cluster.end_of_log()
    assert before[SHOP] < target
    shared.wait_for(lambda: _confirmed(cluster, SHOP) >= target, "the idle database's slot behind the busy one's work")
    shared.wait_for(lambda: _confirmed(cluster, BANK) >= target, "the busy database's own slot")


def test_a_database_that_is_gone_leaves_the_others_protected_and_is_named() -> None:
    """A newline in a database's name makes no line of its own in the log."""
    odd = "line\n2026 INFO break"
    with deployment(15, "directory", databases=("bank", "shop", odd)) as here:
        here.cluster.sql("CREATE TABLE t (v int PRIMARY KEY)", "bank")
        here.start()
        here.settle()
        assert here.stop() == 0
        for name in ("shop", odd):
            here.cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE plugin <> ''")
            here.cluster.sql(f'DROP DATABASE "{name}"')
        warned = {one["subject"]: one["severity"] for one in here.ask("check")}
        assert warned["database shop"] == warned[f"database {odd}"] == "warning"
        here.start(wait=False)
        here.wait_for(lambda: here.status().get("last_sealed_at"), "a point", 90)
        here.wait_for(lambda: any(one.startswith("stream shop") for one in here.status()["troubles"]), "a trouble")
        streams = {"bank": True, "shop": False, odd: False}
        here.wait_for(lambda: here.status()["streams"] == streams, "the stream of the one that is there")
        assert not here.status()["ready"]
        here.cluster.sql("INSERT INTO t VALUES (1)", "bank")
        assert here.ask("point")["state"] == "sealed"
        (row,) = here.cluster.sql("SELECT xmin::text FROM t", "bank")
        here.wait_for(lambda: here.trigpoint("find", "--xid", row[0], check=False).returncode == 0, "its outcome")
        assert here.stop() == 0
        lines = here.log.read_text().splitlines()
        assert any("break" in line for line in lines)
        assert not [line for line in lines if line.strip().startswith("2026 INFO break")]
        here.trigpoint("release", "--yes")
        assert here.cluster.sql("SELECT count(*) FROM pg_replication_slots") == [(0,)]


def test_a_slot_dropped_under_the_service_is_a_gap_of_its_own_stream_and_the_other_loses_nothing() -> None:
    with two_databases(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        first = cluster.end_of_log()
        load = Load(deployed, database=BANK)
        seen = commit(cluster, database=SHOP)
        deployed.wait_for(lambda: _confirmed(cluster, SHOP) >= seen[-1].after, "the first commits settled")
        cluster.sql(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
            " WHERE slot_name = 'trigpoint_shop'; SELECT pg_drop_replication_slot('trigpoint_shop');"
            " INSERT INTO truth (what) VALUES ('unseen')",
            SHOP,
        )
        lost_until = cluster.end_of_log()
        deployed.wait_for(lambda: deployed.ask("list", "--gaps"), "the gap")
        deployed.wait_for(lambda: deployed.status()["ready"], "the stream open again")
        load.end()
        later = commit(cluster, database=SHOP)
        settle(deployed)
        (gap,) = deployed.ask("list", "--gaps")
        after, until = judge.position(gap["after"]).at, judge.position(gap["until"]).at
        assert (gap["stream"], gap["reason"]) == (SHOP, "the slot had been dropped")
        assert seen[-1].after <= after < lost_until <= until <= later[0].before
        point = deployed.ask("show", str(gap["closed_by"]))["point"]
        assert (point["state"], point["cause"]) == (State.SEALED, Cause.GAP)
        assert judge.position(point["floor"]).at >= until
        logged = judge.logged_commits(cluster, first)
        _assert_lost_in_the_gap_alone(deployed, logged, after, until)
        _assert_both_come_back(deployed, later[-1].xid)


def _assert_lost_in_the_gap_alone(deployed: Deployment, logged: dict[int, Lsn], after: int, until: int) -> None:
    """One outcome for every commit, but for those of the broken stream whose records lie in its gap."""
    written, left = written_by(deployed.cluster), judge.read(deployed)
    lost = {xid for xid in written[SHOP] if after <= logged[xid] < until}
    amid = {xid for xid in written[BANK] if after <= logged[xid] < until}
    assert len(lost) == 1
    assert amid, "the other database committed while the stream was broken"
    assert_outcomes_per_stream(left, {BANK: written[BANK], SHOP: written[SHOP] - lost})
    assert not lost & set(left.outcomes)
    assert left.missed == 0


def _assert_both_come_back(deployed: Deployment, xid: int) -> None:
    """What was lost to the record is not lost to a restore: the log has it."""
    report = deployed.ask("restore", "--to-xid", str(xid), "--name", "back")
    assert held_by(report["conninfo"]) == written_by(deployed.cluster)
    deployed.trigpoint("clones", "drop", "--yes", "back")


@pytest.mark.parametrize(
    "command",
    [
        ("find", "--time", "now"),
        ("find", "--xid", "3"),
        ("restore", "--to-latest", "--dry-run"),
        ("restore", "--to-xid", "3", "--name", "none"),
        ("restore", "--to-marker", "none", "--in-place", "--dry-run"),
    ],
)
def test_a_database_that_nothing_knows_is_refused_with_those_that_are_known(
    shared: Deployment, command: tuple[str, ...]
) -> None:
    refused = shared.trigpoint(*command, "--database", "nosuch", check=False)
    assert refused.returncode == 2, refused.stdout
    assert "no database 'nosuch' is configured, and the catalog knows of none" in refused.stderr
    assert "there are: bank, shop" in refused.stderr


def test_a_database_that_was_taken_out_of_the_configuration_is_known_by_its_commits(shared: Deployment) -> None:
    try:
        replace(shared, databases=(SHOP,)).configure()
        for command in (("find", "--time", "now"), ("restore", "--to-latest", "--dry-run")):
            shared.trigpoint(*command, "--database", BANK)
    finally:
        shared.configure()
