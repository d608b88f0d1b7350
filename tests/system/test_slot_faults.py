"""What can happen to a slot, and to a history, while the real service protects a cluster.

Whatever is lost to capture lies in exactly one recorded gap with exact bounds, an unconditional point closes it, it
is shown, and what is committed afterwards is protected and comes back exactly. Truth: each transaction writes its own
id, and the server says where its log stood before and after it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn
from tests.fixtures import judge
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment
from tests.fixtures.slots import QUICK, SLOT, Made, as_usual, assert_outcomes, commit, segmented, unwilling_application
from trigger.catalog.catalog import Catalog
from trigger.model import Cause, State
from trigger.position import Position

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    with segmented() as found:
        yield found


@pytest.fixture
def deployed(shared: Deployment) -> Iterator[Deployment]:
    with as_usual(shared) as found:
        yield found


def _settled(deployed: Deployment) -> Position:
    """Give how far the catalog says that the stream is settled."""

    async def ask() -> Position:
        catalog = await Catalog.open(deployed.state / "catalog.sqlite")
        try:
            found = await catalog.settled("postgres")
        finally:
            await catalog.close()
        assert found is not None
        return found

    return asyncio.run(ask())


def _confirmed(cluster: Cluster) -> Lsn:
    (row,) = cluster.sql(f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'")
    return Lsn.parse(row[0])


# ------------------------------------------------------------------------------- while the service does not run


def _drop(cluster: Cluster) -> list[Made]:
    unseen = commit(cluster)
    cluster.sql(f"SELECT pg_drop_replication_slot('{SLOT}')")
    return unseen + commit(cluster)


def _recreate(cluster: Cluster) -> list[Made]:
    unseen = _drop(cluster)
    cluster.sql(f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
    return unseen


def _advance(cluster: Cluster) -> list[Made]:
    unseen = commit(cluster)
    cluster.sql(f"SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_flush_lsn())")
    return unseen


def _lose(cluster: Cluster) -> list[Made]:
    """Let the server remove the log that both slots need, the stream's and the journal's."""
    unseen = commit(cluster)
    cluster.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '2MB'")
    cluster.sql("SELECT pg_reload_conf()")
    for _ in range(6):
        cluster.sql("SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 1000000))")
        cluster.sql("SELECT pg_switch_wal()")
    cluster.sql("CHECKPOINT")
    cluster.sql("ALTER SYSTEM RESET max_slot_wal_keep_size")
    cluster.sql("SELECT pg_reload_conf()")
    assert cluster.sql("SELECT DISTINCT wal_status FROM pg_replication_slots") == [("lost",)]
    return unseen + commit(cluster)


FAULTS: dict[str, tuple[Callable[[Cluster], list[Made]], str]] = {
    "dropped": (_drop, "the slot had been dropped"),
    "recreated by somebody else": (_recreate, "recreated or moved ahead"),
    "advanced": (_advance, "recreated or moved ahead"),
    "lost": (_lose, "invalidated by the server"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_slot_is_one_gap_with_exact_bounds_and_all_is_well_behind_it(
    deployed: Deployment, fault: str
) -> None:
    hurt, reason = FAULTS[fault]
    cluster = deployed.cluster
    deployed.start()
    seen = commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    unseen = hurt(cluster)
    begins = _confirmed(cluster) if fault in ("recreated by somebody else", "advanced") else None
    later = commit(cluster) if begins else []  # what the slot has again
    deployed.start()
    later += commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    until = judge.position(gap["until"])
    assert reason in gap["reason"]
    assert judge.position(gap["after"]) == settled
    assert begins in (None, until.at)
    assert seen[-1].after <= settled.at <= unseen[0].before
    assert unseen[-1].after <= until.at <= later[0].before
    _assert_closed(deployed, gap)
    assert_outcomes(deployed, seen + later, unseen)
    _assert_shown(deployed, gap, unseen[0], log_is_held=fault != "lost")
    _assert_comes_back(deployed, later[-2], {made.xid for made in seen + unseen + later[:-1]}, {later[-1].xid})
    assert deployed.stop() == 0


def _assert_closed(deployed: Deployment, gap: dict[str, Any]) -> None:
    """A point was taken because of the gap, and holds everything up to its end."""
    point = deployed.ask("show", str(gap["closed_by"]))["point"]
    assert (point["state"], point["cause"]) == (State.SEALED, Cause.GAP)
    floor, until = judge.position(point["floor"]), judge.position(gap["until"])
    assert floor.history.branch >= until.history.branch
    assert floor.at >= until.at
    assert deployed.status()["totals"]["open_gaps"] == 0
    assert f"gap from {gap['after']} to {gap['until']}: {gap['reason']}" in deployed.log.read_text()


def _assert_shown(deployed: Deployment, gap: dict[str, Any], lost: Made, *, log_is_held: bool = True) -> None:
    """What lies in the gap is said to, by place and by transaction, as far as the log is kept."""
    (found,) = deployed.ask("find", "--lsn", str(Lsn(lost.after - 8)))
    assert (found["where"], found["gap"]["reason"]) == ("gap", gap["reason"])
    if log_is_held:
        (by_xid,) = deployed.ask("find", "--xid", str(lost.xid))
        assert (by_xid["where"], by_xid["gap"]["reason"]) == ("gap", gap["reason"])
        assert by_xid["base"], "the log that is kept has it all the same"
    else:
        unknown = deployed.trigpoint("find", "--xid", str(lost.xid), check=False)
        assert unknown.returncode == 11
        assert "gaps" in unknown.stdout
    assert gap["reason"] in deployed.trigpoint("list", "--gaps").stdout


def _assert_comes_back(deployed: Deployment, made: Made, holds: set[int], lacks: set[int]) -> None:
    """An exact restore to one commit has what came before it and nothing that came after."""
    report = deployed.ask("restore", "--to-xid", str(made.xid), "--name", "back")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            held = {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")}
    finally:
        deployed.trigpoint("clones", "drop", "--yes", "back")
    assert holds <= held
    assert not lacks & held


def test_a_restore_into_log_that_was_lost_is_refused_and_says_what_is_missing(deployed: Deployment) -> None:
    gaps = [gap for gap in deployed.ask("list", "--gaps") if "invalidated" in gap["reason"]]
    inside = judge.position(gaps[-1]["until"]).at - (2 << 20)
    refused = deployed.trigpoint("restore", "--to-lsn", str(Lsn(inside)), "--dry-run", check=False)
    assert refused.returncode == 9
    assert "journal" in refused.stderr


# ------------------------------------------------------------------------------------- while the service runs


def test_a_slot_dropped_under_the_running_service_is_one_gap_that_is_shown_until_a_point_closes_it(
    deployed: Deployment,
) -> None:
    with unwilling_application() as (hooks, block):
        deployed.configure(f'{QUICK}[agent]\nhooks = "{hooks}"\n')
        deployed.start()
        known = len(deployed.ask("list", "--gaps"))
        seen = commit(deployed.cluster)
        deployed.settle()
        block.touch()  # from here on no point can be taken
        deployed.cluster.sql(
            f"SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = '{SLOT}';"
            f"SELECT pg_drop_replication_slot('{SLOT}'); INSERT INTO truth (what) VALUES ('unseen')"
        )
        lost_until = deployed.cluster.end_of_log()
        deployed.wait_for(lambda: len(deployed.ask("list", "--gaps")) > known, "the gap")
        assert deployed.status()["totals"]["open_gaps"] == 1
        assert "open gap in postgres" in deployed.trigpoint("list").stderr
        assert "OPEN" in deployed.trigpoint("list", "--gaps").stdout
        assert "no, the application said" in deployed.trigpoint("status").stdout
        later = commit(deployed.cluster)
        block.unlink()
        deployed.settle()
        (gap,) = deployed.ask("list", "--gaps")[known:]
        assert seen[-1].after <= judge.position(gap["after"]).at < lost_until
        assert lost_until <= judge.position(gap["until"]).at
        _assert_closed(deployed, gap)
        in_gap = [made for made in later if made.after <= judge.position(gap["until"]).at]
        assert_outcomes(deployed, seen + later[len(in_gap) :], in_gap)
        assert deployed.stop() == 0


# ------------------------------------------------------------------------------------ another history, at the end


def test_another_timeline_is_one_gap_and_commits_of_both_come_back(deployed: Deployment) -> None:
    cluster = deployed.cluster
    deployed.start()
    seen = commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    still_seen = commit(cluster)  # the slot has them, and the new timeline too
    cluster.switch_timeline()
    later = commit(cluster)
    deployed.start()
    later += commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    assert "the timeline changed from 1 to 2" in gap["reason"]
    after, until = judge.position(gap["after"]), judge.position(gap["until"])
    assert (after.history, until.history.branch) == (settled.history, 2)
    assert still_seen[-1].after <= after.at == until.at <= later[0].before, (
        "where the old one ended: the slot has the rest"
    )
    point = deployed.ask("show", str(gap["closed_by"]))["point"]  # of either timeline: nothing lies in this gap
    assert (point["state"], deployed.status()["totals"]["open_gaps"]) == (State.SEALED, 0)
    assert_outcomes(deployed, seen + still_seen + later, [])
    everything = {made.xid for made in seen + still_seen + later}
    _assert_comes_back(deployed, later[-2], everything - {later[-1].xid}, {later[-1].xid})
    _assert_comes_back(deployed, still_seen[0], {made.xid for made in seen}, {made.xid for made in still_seen[1:]})
    assert deployed.stop() == 0


def test_another_cluster_in_the_same_place_is_one_gap_and_its_commits_come_back(
    deployed: Deployment,
) -> None:
    cluster = deployed.cluster
    deployed.start()
    commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    _replace(cluster)
    unseen = commit(cluster)
    deployed.start()
    later = commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    until = judge.position(gap["until"])
    assert "the cluster was replaced" in gap["reason"]
    assert judge.position(gap["after"]) == settled
    assert until.history.system == cluster.sql("SELECT system_identifier::text FROM pg_control_system()")[0][0]
    assert unseen[-1].after <= until.at <= later[0].before
    point = deployed.ask("show", str(gap["closed_by"]))["point"]
    assert (point["state"], point["cause"]) == ("sealed", "gap")
    assert any((deployed.state / "journal" / f"{until.history.system}+0").iterdir()), "its log has a folder of its own"
    later += commit(cluster)
    deployed.settle()
    held = {xid for records in _newer(deployed, gap["closed_by"]) for xid in records}
    assert {made.xid for made in later} <= held
    assert not held & {made.xid for made in unseen} - {made.xid for made in later}
    assert deployed.stop() == 0
    _assert_comes_back(deployed, later[-2], {made.xid for made in unseen + later[:-1]}, {later[-1].xid})


def _replace(cluster: Cluster) -> None:
    """Make another cluster where this one was."""
    cluster.stop()
    for entry in cluster.data.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(cluster.sockets)
    cluster.create("--wal-segsize=1", max_slot_wal_keep_size="64MB", wal_sender_timeout="3s")
    cluster.start()
    cluster.sql(judge.TRUTH_TABLE)


def _newer(deployed: Deployment, number: int) -> list[set[int]]:
    """Give the transactions that points from `number` on hold; another cluster's ids are counted anew."""
    commits = judge.read(deployed).commits
    return [{judge.xid(record) for record in records} for point, records in commits.items() if point >= number]
