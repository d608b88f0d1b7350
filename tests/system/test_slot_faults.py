"""What can happen to a slot, a history, a server and a wire while the real service protects a cluster.

Whatever is lost to capture lies in exactly one recorded gap with exact bounds, an unconditional point closes it, it
is shown, and what is committed afterwards is protected and comes back exactly. What is not lost has one outcome.
Truth: each transaction writes its own id, and the server says where its log stood before and after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.wire import wire
from trigger.catalog import Catalog
from trigger.model import Cause, State
from trigger.position import Lsn, Position

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

_QUICK = "[points]\nmin_interval_seconds = 0.1\nper_minute = 6000\nretry_seconds = 0.3\n"
_SLOT = "trigpoint_postgres"


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """A service on a cluster whose log has segments of 1 MB, so that little of it is soon too much."""
    with deployment(
        15,
        extra=_QUICK,
        initdb=["--wal-segsize=1"],
        max_slot_wal_keep_size="64MB",
        min_wal_size="2MB",
        max_wal_size="64MB",
        wal_sender_timeout="3s",
    ) as found:
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found


@pytest.fixture
def deployed(shared: Deployment) -> Iterator[Deployment]:
    """The deployment that all share, as each test expects it: no service runs, the configuration is the usual one."""
    shared.configure(_QUICK)
    yield shared
    if shared.process is not None and shared.process.poll() is None:
        shared.process.kill()
        shared.process.wait(30)


@dataclass(frozen=True)
class Made:
    """One commit: its transaction, and where the log stood before and after it."""

    xid: int
    before: Lsn
    after: Lsn


def _end_of_log(cluster: Cluster) -> Lsn:
    return Lsn.parse(cluster.sql("SELECT pg_current_wal_insert_lsn()::text")[0][0])


def _commit(cluster: Cluster, number: int = 3) -> list[Made]:
    made = []
    with cluster.connect() as connection:
        for _ in range(number):
            before = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            row = connection.execute("INSERT INTO truth (what) VALUES ('fault') RETURNING xid::text").fetchone()
            after = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert before is not None
            assert row is not None
            assert after is not None
            made.append(Made(int(row[0]), Lsn.parse(before[0]), Lsn.parse(after[0])))
    return made


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
    (row,) = cluster.sql(f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{_SLOT}'")
    return Lsn.parse(row[0])


# ------------------------------------------------------------------------------- while the service does not run


def _drop(cluster: Cluster) -> list[Made]:
    unseen = _commit(cluster)
    cluster.sql(f"SELECT pg_drop_replication_slot('{_SLOT}')")
    return unseen + _commit(cluster)


def _recreate(cluster: Cluster) -> list[Made]:
    unseen = _drop(cluster)
    cluster.sql(f"SELECT pg_create_logical_replication_slot('{_SLOT}', 'pgoutput')")
    return unseen


def _advance(cluster: Cluster) -> list[Made]:
    unseen = _commit(cluster)
    cluster.sql(f"SELECT pg_replication_slot_advance('{_SLOT}', pg_current_wal_flush_lsn())")
    return unseen


def _lose(cluster: Cluster) -> list[Made]:
    """Let the server remove the log that both slots need, the stream's and the journal's."""
    unseen = _commit(cluster)
    cluster.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '2MB'")
    cluster.sql("SELECT pg_reload_conf()")
    for _ in range(6):
        cluster.sql("SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 1000000))")
        cluster.sql("SELECT pg_switch_wal()")
    cluster.sql("CHECKPOINT")
    cluster.sql("ALTER SYSTEM RESET max_slot_wal_keep_size")
    cluster.sql("SELECT pg_reload_conf()")
    assert cluster.sql("SELECT DISTINCT wal_status FROM pg_replication_slots") == [("lost",)]
    return unseen + _commit(cluster)


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
    seen = _commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    unseen = hurt(cluster)
    begins = _confirmed(cluster) if fault in ("recreated by somebody else", "advanced") else None
    later = _commit(cluster) if begins else []  # what the slot has again
    deployed.start()
    later += _commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    until = Position.parse(gap["until"])
    assert reason in gap["reason"]
    assert Position.parse(gap["after"]) == settled
    assert begins in (None, until.at)
    assert seen[-1].after <= settled.at <= unseen[0].before
    assert unseen[-1].after <= until.at <= later[0].before
    _assert_closed(deployed, gap)
    _assert_outcomes(deployed, seen + later, unseen)
    _assert_shown(deployed, gap, unseen[0])
    _assert_comes_back(deployed, later[-2], {made.xid for made in seen + unseen + later[:-1]}, {later[-1].xid})
    assert deployed.stop() == 0


def _assert_closed(deployed: Deployment, gap: dict[str, Any]) -> None:
    """A point was taken because of the gap, and holds everything up to its end."""
    point = deployed.ask("show", str(gap["closed_by"]))["point"]
    assert (point["state"], point["cause"]) == (State.SEALED, Cause.GAP)
    floor, until = Position.parse(point["floor"]), Position.parse(gap["until"])
    assert floor.history.timeline >= until.history.timeline
    assert floor.at >= until.at
    assert deployed.status()["totals"]["open_gaps"] == 0
    assert f"gap from {gap['after']} to {gap['until']}: {gap['reason']}" in deployed.log.read_text()


def _assert_outcomes(deployed: Deployment, seen: list[Made], unseen: list[Made]) -> None:
    outcomes = judge.read(deployed).outcomes
    assert [outcomes[made.xid] for made in seen] == [1] * len(seen)
    assert [outcomes[made.xid] for made in unseen] == [0] * len(unseen)


def _assert_shown(deployed: Deployment, gap: dict[str, Any], lost: Made) -> None:
    """What lies in the gap is said to, by place and by transaction."""
    (found,) = deployed.ask("find", "--lsn", str(Lsn(lost.after - 8)))
    assert (found["where"], found["gap"]["reason"]) == ("gap", gap["reason"])
    by_xid = deployed.trigpoint("find", "--xid", str(lost.xid), check=False)
    assert by_xid.returncode == 11
    assert "gaps" in by_xid.stdout
    assert gap["reason"] in deployed.trigpoint("list", "--gaps").stdout


def _assert_comes_back(deployed: Deployment, made: Made, holds: set[int], lacks: set[int]) -> None:
    """An exact restore to one commit has what came before it and nothing that came after."""
    report = deployed.ask("restore", "--to-xid", str(made.xid), "--name", "back")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            held = {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")}
    finally:
        deployed.trigpoint("clones", "drop", "back")
    assert holds <= held
    assert not lacks & held


def test_a_restore_into_log_that_was_lost_is_refused_and_says_what_is_missing(deployed: Deployment) -> None:
    gaps = [gap for gap in deployed.ask("list", "--gaps") if "invalidated" in gap["reason"]]
    inside = Position.parse(gaps[-1]["until"]).at - (2 << 20)
    refused = deployed.trigpoint("restore", "--to-lsn", str(Lsn(inside)), "--dry-run", check=False)
    assert refused.returncode == 9
    assert "journal" in refused.stderr


# ------------------------------------------------------------------------------------- while the service runs


def test_a_slot_dropped_under_the_running_service_is_one_gap_that_is_shown_until_a_point_closes_it(
    deployed: Deployment,
) -> None:
    with _unwilling_application() as (hooks, block):
        deployed.configure(f'{_QUICK}[agent]\nhooks = "{hooks}"\n')
        deployed.start()
        known = len(deployed.ask("list", "--gaps"))
        seen = _commit(deployed.cluster)
        deployed.settle()
        block.touch()  # from here on no point can be taken
        deployed.cluster.sql(
            f"SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = '{_SLOT}';"
            f"SELECT pg_drop_replication_slot('{_SLOT}'); INSERT INTO truth (what) VALUES ('unseen')"
        )
        lost_until = _end_of_log(deployed.cluster)
        deployed.wait_for(lambda: len(deployed.ask("list", "--gaps")) > known, "the gap")
        assert deployed.status()["totals"]["open_gaps"] == 1
        assert "open gap in postgres" in deployed.trigpoint("list").stderr
        assert "OPEN" in deployed.trigpoint("list", "--gaps").stdout
        assert "no, the application said" in deployed.trigpoint("status").stdout
        later = _commit(deployed.cluster)
        block.unlink()
        deployed.settle()
        (gap,) = deployed.ask("list", "--gaps")[known:]
        assert seen[-1].after <= Position.parse(gap["after"]).at < lost_until
        assert lost_until <= Position.parse(gap["until"]).at
        _assert_closed(deployed, gap)
        in_gap = [made for made in later if made.after <= Position.parse(gap["until"]).at]
        _assert_outcomes(deployed, seen + later[len(in_gap) :], in_gap)
        assert deployed.stop() == 0


@contextlib.contextmanager
def _unwilling_application(seconds: int = 0) -> Iterator[tuple[Path, Path]]:
    """Give a file of hooks, and a file: while that is there, the hook says no, or first takes some seconds."""
    folder = Path(tempfile.mkdtemp(prefix="trg-hooks-", dir="/run"))
    try:
        program, block = folder / "flush", folder / "block"
        then = f"sleep {seconds}" if seconds else "echo 'no, the application said'; exit 1"
        program.write_text(f"#!/bin/sh\n[ -e {block} ] || exit 0\n{then}\n")
        program.chmod(stat.S_IRWXU)
        (folder / "hooks.toml").write_text(f'[hooks.flush]\ncommand = ["{program}"]\ndeadline_seconds = 20\n')
        yield folder / "hooks.toml", block
    finally:
        shutil.rmtree(folder)


def test_a_slot_that_comes_near_its_bound_is_shown_before_it_is_lost(deployed: Deployment) -> None:
    deployed.start()
    snapshots = deployed.root / "snapshots"
    subprocess.run(["chattr", "+i", str(snapshots)], check=True, timeout=30)  # no point can be made
    try:
        made = _commit(deployed.cluster)
        for _ in range(45):  # of 64 MB
            deployed.cluster.sql("SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 1000000))")
        deployed.wait_for(
            lambda: f"of log for {_SLOT} and will drop it" in str(deployed.status()["troubles"]), "a word"
        )
        (slot,) = [one for one in deployed.status()["retained"] if one["reader"] == _SLOT]
        assert slot["bytes"] > slot["left_bytes"] > 0
        assert _SLOT in deployed.trigpoint("status").stdout
    finally:
        subprocess.run(["chattr", "-i", str(snapshots)], check=True, timeout=30)
    deployed.settle()
    _assert_outcomes(deployed, made, [])
    deployed.wait_for(lambda: deployed.status()["troubles"] == [], "no trouble any more")
    assert deployed.stop() == 0


def test_a_storage_that_is_slower_than_the_server_s_patience_does_not_lose_the_stream(deployed: Deployment) -> None:
    with _unwilling_application(seconds=8) as (hooks, block):  # wal_sender_timeout is 3 s
        deployed.configure(f'{_QUICK}[agent]\nhooks = "{hooks}"\ndeadline_seconds = 30\n')
        deployed.start()
        deployed.settle()
        pid = deployed.cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{_SLOT}'")
        block.touch()
        made = _commit(deployed.cluster)
        began = time.monotonic()
        deployed.wait_for(lambda: judge.read(deployed).outcomes[made[0].xid] == 1, "the slow point")
        assert time.monotonic() - began > 5
        block.unlink()
        made += _commit(deployed.cluster)
        deployed.settle()
        assert (
            deployed.cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{_SLOT}'") == pid
        ), "the server has hung up meanwhile"
        _assert_outcomes(deployed, made, [])
        assert deployed.stop() == 0


@contextlib.contextmanager
def _under_load(deployed: Deployment) -> Iterator[None]:
    load = Load(deployed)
    try:
        yield
    finally:
        load.end()


def _loaded_ids(deployed: Deployment, first: int) -> set[int]:
    return {xid for xid in judge.written_ids(deployed.cluster) if xid >= first}


def test_a_wire_that_is_cut_and_one_that_goes_deaf_lose_nothing_and_repeat_nothing(deployed: Deployment) -> None:
    with wire(deployed.cluster.port) as between:
        config = deployed.config.read_text().replace(
            f'conninfo = "{deployed.cluster.conninfo}"',
            f'conninfo = "host=127.0.0.1 port={between.port} user=postgres"\ndeadline_seconds = 2',
        )
        deployed.config.write_text(config)
        deployed.start()
        known = len(deployed.ask("list", "--gaps"))
        first = _commit(deployed.cluster, 1)[0].xid
        with _under_load(deployed):
            time.sleep(1)
            between.cut()
            time.sleep(1)
            between.mend()
            time.sleep(2)
            between.cut(server_learns=False)  # C9: the server's process holds the slot until its timeout
            between.mend()
            time.sleep(1)
            between.deafen()  # longer than the server's patience, and than ours
            time.sleep(6)
            assert deployed.status(), "a deaf server must not make the service deaf"
            between.mend()
            time.sleep(1)
        deployed.settle()
        said = deployed.log.read_text()
        assert "trying again" in said
        outcomes, written = judge.read(deployed).outcomes, _loaded_ids(deployed, first)
        assert len(written) > 50
        assert {outcomes[xid] for xid in written} == {1}
        assert len(deployed.ask("list", "--gaps")) == known
        assert deployed.stop() == 0


def test_a_server_killed_and_restarted_under_load_loses_nothing_and_repeats_nothing(deployed: Deployment) -> None:
    deployed.start()
    known, first = len(deployed.ask("list", "--gaps")), _commit(deployed.cluster, 1)[0].xid
    for end in (deployed.cluster.kill, deployed.cluster.stop):
        with _under_load_that_may_break(deployed):
            time.sleep(1)
            end()
        deployed.cluster.start()
        _commit(deployed.cluster)
    deployed.settle()
    outcomes, written = judge.read(deployed).outcomes, _loaded_ids(deployed, first)
    assert len(written) > 20
    assert {outcomes[xid] for xid in written} == {1}
    assert len(deployed.ask("list", "--gaps")) == known
    assert deployed.stop() == 0


@contextlib.contextmanager
def _under_load_that_may_break(deployed: Deployment) -> Iterator[None]:
    """Commit until the server goes away, from a process of its own: pgbench ends by itself when it does."""
    cluster = deployed.cluster
    script = cluster.sockets / "insert.sql"
    script.write_text("INSERT INTO truth (what) VALUES ('load');\n")
    where = ["-h", str(cluster.sockets), "-p", str(cluster.port), "-U", "postgres"]
    load = subprocess.Popen(
        [cluster.programs.path("pgbench"), *where, "-n", "-f", script, "-c", "2", "-R", "200", "-T", "60", "postgres"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        load.terminate()
        load.wait(30)


def test_a_killed_service_finds_its_slot_still_held_and_waits_for_it(deployed: Deployment) -> None:
    with wire(deployed.cluster.port) as between:
        config = deployed.config.read_text().replace(
            deployed.cluster.conninfo, f"host=127.0.0.1 port={between.port} user=postgres"
        )
        deployed.config.write_text(config)
        deployed.start()
        known = len(deployed.ask("list", "--gaps"))
        made = _commit(deployed.cluster)
        between.cut(server_learns=False)
        assert deployed.stop(signal.SIGKILL) == -signal.SIGKILL
        between.mend()
        assert deployed.cluster.sql(f"SELECT active FROM pg_replication_slots WHERE slot_name = '{_SLOT}'") == [(True,)]
        deployed.start()
        made += _commit(deployed.cluster)
        deployed.settle()
        _assert_outcomes(deployed, made, [])
        assert len(deployed.ask("list", "--gaps")) == known
        assert deployed.stop() == 0


def test_a_second_service_on_the_same_slot_is_told_so_and_takes_nothing_from_the_first(deployed: Deployment) -> None:
    second = Deployment(deployed.cluster, deployed.root / "second", deployed.state.parent / "second" / "state", "btrfs")
    for folder in (second.root, second.state.parent):
        folder.mkdir()
    second.configure(_QUICK)
    deployed.start()
    second.start(wait=False)
    try:
        made = _commit(deployed.cluster)
        second.wait_for(second.status, "a second service that answers")
        second.wait_for(lambda: "held by another process" in " ".join(second.status()["troubles"]), "the trouble", 90)
        made += _commit(deployed.cluster)
        deployed.settle()
        _assert_outcomes(deployed, made, [])
        assert not second.status()["ready"]
        assert not any(second.status()["commits_by_rule"].values())
    finally:
        assert second.stop() == 0
    assert deployed.stop() == 0


# ------------------------------------------------------------------------------------ another history, at the end


def test_another_timeline_is_one_gap_and_commits_of_both_come_back(deployed: Deployment) -> None:
    cluster = deployed.cluster
    deployed.start()
    seen = _commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    still_seen = _commit(cluster)  # the slot has them, and the new timeline too
    cluster.switch_timeline()
    later = _commit(cluster)
    deployed.start()
    later += _commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    assert "the timeline changed from 1 to 2" in gap["reason"]
    assert Position.parse(gap["after"]) == settled
    assert Position.parse(gap["until"]).at <= still_seen[0].before
    _assert_closed(deployed, gap)
    _assert_outcomes(deployed, seen + still_seen + later, [])
    everything = {made.xid for made in seen + still_seen + later}
    _assert_comes_back(deployed, later[-2], everything - {later[-1].xid}, {later[-1].xid})
    _assert_comes_back(deployed, still_seen[0], {made.xid for made in seen}, {made.xid for made in still_seen[1:]})
    assert deployed.stop() == 0


def test_another_cluster_in_the_same_place_is_one_gap_and_its_commits_come_back(
    deployed: Deployment,
) -> None:
    cluster = deployed.cluster
    deployed.start()
    _commit(cluster)
    deployed.settle()
    assert deployed.stop() == 0
    settled, known = _settled(deployed), len(deployed.ask("list", "--gaps"))
    _replace(cluster)
    unseen = _commit(cluster)
    deployed.start()
    later = _commit(cluster)
    deployed.settle()
    (gap,) = deployed.ask("list", "--gaps")[known:]
    until = Position.parse(gap["until"])
    assert "the cluster was replaced" in gap["reason"]
    assert Position.parse(gap["after"]) == settled
    assert until.history.system == cluster.sql("SELECT system_identifier::text FROM pg_control_system()")[0][0]
    assert unseen[-1].after <= until.at <= later[0].before
    point = deployed.ask("show", str(gap["closed_by"]))["point"]
    assert (point["state"], point["cause"]) == ("sealed", "gap")
    assert f"holds the log of cluster {settled.history.system}" in deployed.trigpoint("status").stdout
    assert deployed.stop() == 0
    deployed.configure(f'{_QUICK}[journal]\nfolder = "{deployed.state / "journal-of-the-new-one"}"\n')
    deployed.start()
    later += _commit(cluster)
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
    return [{record.xid for record in records} for point, records in commits.items() if point >= number]
