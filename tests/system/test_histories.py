"""A log that goes on under the same identity and is not the same log; and what becomes of the history before.

An older copy of the cluster is put back (found at the place that is known, or written past it already), the log is
begun anew by `pg_resetwal`, the cluster is upgraded by `pg_upgrade`: every commit has its outcome or lies in a gap with
true bounds, nothing of one log is replayed over another, and what `find` promises, `restore` delivers.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.programs import as_owner, minimal_environment
from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.slots import QUICK

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


@dataclass(frozen=True)
class Told:
    """One commit that a test made, and all that was there behind it."""

    xid: int
    all: tuple[str, ...]


def tell(cluster: Cluster, *words: str) -> list[Told]:
    """Commit one word after the other."""
    told = []
    for word in words:
        ((xid,),) = cluster.sql(f"INSERT INTO said (word) VALUES ('{word}') RETURNING pg_current_xact_id()::text")
        rows = cluster.sql("SELECT word FROM said ORDER BY id")
        told.append(Told(int(xid), tuple(row[0] for row in rows)))
    return told


@contextmanager
def spoken(major: int, **settings: Any) -> Iterator[Deployment]:
    with deployment(major, extra=QUICK, initdb=["--wal-segsize=1"], **settings) as deployed:
        deployed.cluster.sql("CREATE TABLE said (id serial PRIMARY KEY, word text)")
        yield deployed


def copied(deployed: Deployment) -> Path:
    """Give a copy of the cluster, which is stopped for it and started again."""
    aside = deployed.root / "copy"
    deployed.cluster.stop()
    subprocess.run(["cp", "-a", "--reflink=auto", str(deployed.cluster.data), str(aside)], check=True)
    deployed.cluster.start()
    return aside


def put_back(cluster: Cluster, copy: Path) -> None:
    """Put the copy in the place of the cluster, which is stopped."""
    put_back_into(cluster.data, copy)


def put_back_into(folder: Path, copy: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    subprocess.run(["cp", "-a", "--reflink=auto", f"{copy}/.", str(folder)], check=True)


def assert_found_and_delivered(deployed: Deployment, told: Told) -> None:
    """Every place at which a transaction is found is restored by the very command that is printed, exactly."""
    found = deployed.ask("find", "--xid", str(told.xid))
    delivered = []
    for one in found:
        if one["record"]["stream"]:  # else another one of that name, which a new life's log alone has
            assert one["where"] in ("point", "interval"), one
        if one["base"] is None:  # it came between the copy and the first base of the new life
            assert "cannot be restored" in one["reason"], one
            continue
        command = ["restore", "--to-xid", str(told.xid), *one["aside"].split(), "--name", "found"]
        report = deployed.ask(*command)
        assert all(held for _, held, _ in report["checks"]), report["checks"]
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            rows = connection.execute("SELECT word FROM said ORDER BY id").fetchall()
        delivered.append(tuple(row[0] for row in rows))
        deployed.trigpoint("clones", "drop", "--yes", "found")
    assert told.all in delivered, found


def assert_each_has_one_outcome(deployed: Deployment, told: list[Told], history: str) -> None:
    for one in told:
        found = [place for place in deployed.ask("find", "--xid", str(one.xid)) if place["history"] == history]
        assert len(found) == 1, found
        assert found[0]["where"] in ("point", "interval"), found


def histories(deployed: Deployment) -> list[str]:
    """Give the histories of the sealed points, oldest first."""
    points = deployed.ask("list", "--state", "sealed", "--limit", "1000")
    return list(dict.fromkeys(point["floor"].partition("@")[0] for point in reversed(points)))


@pytest.mark.parametrize("major", [15, 18])
@pytest.mark.parametrize("written", [0, 400], ids=["noticed by its end", "written past what was known"])
def test_an_older_copy_that_is_put_back_begins_a_new_incarnation_and_nothing_is_mixed(major: int, written: int) -> None:
    with spoken(major) as deployed:
        cluster = deployed.cluster
        deployed.start()
        before = tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        deployed.start()
        lost = tell(cluster, "three", "four", "five")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        if written:
            cluster.sql(f"INSERT INTO said (word) SELECT repeat('x', 2000) FROM generate_series(1, {written})")
            cluster.sql("DELETE FROM said WHERE word LIKE 'xx%'")
        deployed.start()
        after = tell(cluster, "drei", "vier")
        deployed.settle()
        old, new = histories(deployed)
        assert new == f"{old}+1"
        status = deployed.status()
        assert status["ready"], status
        assert not status["troubles"], status
        settling = 2  # `settle` commits too, and one of its commits may be part of the copy
        assert status["totals"]["repeated"] <= len(before) + settling, "only what the copy has kept comes again"
        (gap,) = deployed.ask("list", "--gaps")
        assert gap["after"].partition("@")[0] == old
        assert gap["until"].partition("@")[0] == new
        assert gap["closed_by"]
        assert_each_has_one_outcome(deployed, before + lost, old)
        assert_each_has_one_outcome(deployed, after, new)
        for told in (before[1], lost[1], after[0]):
            assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def test_a_state_folder_of_before_an_incarnation_does_not_lead_back_into_the_log_that_was_left() -> None:
    with spoken(16) as deployed:
        cluster, aside = deployed.cluster, deployed.root / "state.before"
        deployed.start()
        before = tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        subprocess.run(["cp", "-a", str(deployed.state), str(aside)], check=True)
        deployed.start()
        lost = tell(cluster, "three", "four", "five")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        deployed.start()
        after = tell(cluster, "drei", "vier", "fünf")
        deployed.settle()
        old, new = histories(deployed)
        deployed.stop()
        put_back_into(deployed.state, aside)
        deployed.start()
        again = tell(cluster, "sechs")
        deployed.settle()
        assert histories(deployed)[-1] == new == f"{old}+1"
        for one in lost + after:
            for found in deployed.ask("find", "--xid", str(one.xid)):
                assert found["history"] != old or found["where"] == "point" or found["after"] is None, found
        assert_each_has_one_outcome(deployed, again, new)
        for told in (before[0], again[0]):
            assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def test_a_copy_put_back_while_the_service_runs_is_noticed_when_it_connects_again() -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        tell(cluster, "one")
        deployed.settle()
        copy = copied(deployed)
        lost = tell(cluster, "two", "three")
        deployed.settle()
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        after = tell(cluster, "zwei", "drei", "vier")
        deployed.wait_for(lambda: len(histories(deployed)) == 2, "the first point of the new life")
        deployed.settle()
        old, new = histories(deployed)
        assert new == f"{old}+1"
        assert_each_has_one_outcome(deployed, lost, old)
        later = tell(cluster, "fünf")
        deployed.settle()
        assert_each_has_one_outcome(deployed, later, new)
        assert_found_and_delivered(deployed, later[0])
        assert {one.xid for one in after} <= {one.xid for one in lost + after}
        assert deployed.stop() == 0


def test_a_volume_that_an_older_snapshot_of_itself_takes_the_place_of_while_the_service_runs_is_protected() -> None:
    with spoken(15) as deployed:
        cluster, aside = deployed.cluster, deployed.root / "aside"
        deployed.start()
        before = tell(cluster, "one")
        deployed.settle()
        cluster.stop()
        _btrfs("snapshot", cluster.data, aside)
        cluster.start()
        lost = tell(cluster, "two", "three")
        deployed.settle()
        deployed.wait_for(lambda: all(_is_kept(deployed, one) for one in lost), "the journal to have it all")
        cluster.stop()
        _btrfs("delete", cluster.data)
        _btrfs("snapshot", aside, cluster.data)
        cluster.start()
        deployed.wait_for(lambda: len(histories(deployed)) == 2, "the first point of the new life")
        after = tell(cluster, "zwei")
        deployed.settle()
        old, new = histories(deployed)
        assert new == f"{old}+1"
        assert_each_has_one_outcome(deployed, after, new)
        for told in (before[0], lost[0], after[0]):
            assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def _is_kept(deployed: Deployment, told: Told) -> bool:
    """Whether the log is there that a restore of it takes: who keeps it tries again after a while, once it was cut."""
    return all(one["base"] is not None for one in deployed.ask("find", "--xid", str(told.xid)))


def _btrfs(*words: str | Path) -> None:
    subprocess.run(["btrfs", "subvolume", *map(str, words)], check=True, capture_output=True)


def test_a_copy_that_holds_all_that_is_known_goes_on_in_the_same_history() -> None:
    """Nothing that we know of was lost, and nothing is made of it."""
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        tell(cluster, "unseen")
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        deployed.start()
        (told,) = tell(cluster, "three")
        deployed.settle()
        assert len(histories(deployed)) == 1
        assert deployed.ask("list", "--gaps") == []
        assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def test_no_replay_leads_over_a_log_that_pg_resetwal_began_anew() -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        before = tell(cluster, "one", "two", "three")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        cluster.run("pg_resetwal", "-D", str(cluster.data))
        cluster.start()
        deployed.start()
        after = tell(cluster, "four", "five")
        deployed.settle()
        assert deployed.status()["ready"]
        gaps = deployed.ask("list", "--gaps")
        assert gaps
        assert all(gap["closed_by"] for gap in gaps)
        for told in (before[1], after[0], after[1]):
            assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def test_a_timeline_number_that_pg_resetwal_made_up_begins_a_new_life_and_stays_it() -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        before = tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        cluster.run("pg_resetwal", "-l", "000000050000000000000040", "-D", str(cluster.data))
        cluster.start()
        deployed.start()
        after = tell(cluster, "three", "four")
        deployed.settle()
        old, new = histories(deployed)
        assert new == f"{old.partition('/')[0]}/5+1"
        assert deployed.stop() == 0
        deployed.start()
        later = tell(cluster, "five")
        deployed.settle()
        assert histories(deployed) == [old, new], "the next start knows the life that was begun"
        assert all(gap["closed_by"] for gap in deployed.ask("list", "--gaps"))
        for told in (before[1], after[1], later[0]):
            assert_found_and_delivered(deployed, told)
        status = deployed.status()
        assert status["ready"], status
        assert not status["troubles"], status
        assert deployed.stop() == 0


def test_after_pg_upgrade_the_old_cluster_s_commits_are_named_listed_and_restored() -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        before = tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        upgraded = _upgraded(deployed)
        try:
            deployed.start()
            after = tell(upgraded, "three")
            deployed.settle()
            old, new = histories(deployed)
            assert old.partition("/")[0] != new.partition("/")[0]
            assert_each_has_one_outcome(deployed, before, old)
            assert_found_and_delivered(deployed, after[0])
            found = deployed.ask("find", "--xid", str(before[0].xid))
            assert [one["aside"] for one in found] == [f"--history {old}"], found
            assert_found_and_delivered(deployed, before[0])
            deployed.trigpoint("restore", "--to-xid", str(before[0].xid), "--history", old, "--name", "old")
            assert deployed.stop() == 0
            upgraded.stop()
            assert_put_in_place_only_where_it_is_said(deployed, before[0], old, new)
        finally:
            deployed.stop()
            upgraded.destroy()


def assert_put_in_place_only_where_it_is_said(deployed: Deployment, told: Told, old: str, new: str) -> None:
    """The clone of another cluster is put in place where that is said in so many words, and taken back."""
    systems = [history.partition("/")[0] for history in (old, new)]
    words = f"another cluster lies there: PostgreSQL 16 ({systems[1]}) goes, with all that it holds, and PostgreSQL 15"
    for named in (("--from-clone", "old"), ("--to-xid", str(told.xid), "--history", old)):
        for how in ("--yes", "--dry-run"):
            refused = deployed.trigpoint("restore", "--in-place", how, *named, check=False)
            assert refused.returncode == 9
            assert f"{words} ({systems[0]}) takes its place" in refused.stderr + refused.stdout
    put = deployed.trigpoint("restore", "--in-place", "--yes", "--replace-cluster", "--from-clone", "old")
    assert words in put.stderr
    assert (deployed.cluster.data / "PG_VERSION").read_text().strip() == "15"
    undo = deployed.trigpoint("restore", "--undo", "last", "--yes")
    assert "is as it was before" in undo.stdout


def _upgraded(deployed: Deployment) -> Cluster:
    """Upgrade the stopped cluster to 16 in its place, and give it, started, with the configuration for it."""
    old = deployed.cluster
    new = Cluster(16, deployed.root / "upgraded")
    new.create("--wal-segsize=1")
    aside = deployed.root / "fifteen"
    aside.mkdir()
    put_back_into(aside, old.data)
    command = [
        new.programs.path("pg_upgrade"),
        f"--old-bindir={old.programs.folder}",
        f"--new-bindir={new.programs.folder}",
        f"--old-datadir={aside}",
        f"--new-datadir={new.data}",
        f"--socketdir={new.sockets}",
        "--username=postgres",
    ]
    environment = minimal_environment()
    done = subprocess.run(
        command, cwd=new.sockets, env=environment, text=True, capture_output=True, check=False, **as_owner(new.owner)
    )
    assert done.returncode == 0, done.stdout
    put_back_into(old.data, new.data)
    shutil.rmtree(aside)
    moved = Cluster(16, old.data, port=new.port, owner=old.owner)
    moved.sockets, moved.log = new.sockets, new.log
    moved.start()
    deployed.cluster = moved
    deployed.configure()
    return moved


def test_old_log_goes_history_by_history_once_no_kept_point_needs_it() -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        tell(cluster, "one")
        deployed.settle()
        _write_log(cluster, segments=4)
        cluster.switch_timeline()
        deployed.wait_for(lambda: deployed.status().get("ready"), "the stream on the new timeline")
        tell(cluster, "two")
        deployed.settle()
        _write_log(cluster, segments=4)
        point = deployed.ask("point", "--note", "the first to keep")["number"]
        held = _segments(deployed)
        assert {name[:8] for name in held} == {"00000001", "00000002"}
        deployed.trigpoint("expire", str(point), "--yes")
        left = _segments(deployed)
        whole = {name[:8] for name in left if (deployed.state / "journal" / name).exists()}
        assert whole <= {"00000002"}, left
        assert len(left) < len([name for name in held if name.startswith("00000002")])
        (told,) = tell(cluster, "three")
        deployed.settle()
        assert_found_and_delivered(deployed, told)
        assert deployed.stop() == 0


def _write_log(cluster: Cluster, segments: int) -> None:
    for _ in range(segments):
        cluster.sql("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000))")
        cluster.sql("SELECT pg_switch_wal()")
    cluster.sql("CHECKPOINT")


def _segments(deployed: Deployment) -> list[str]:
    names = (entry.name.removesuffix(".partial") for entry in (deployed.state / "journal").iterdir())
    return sorted(name for name in names if len(name) == 24)


@pytest.mark.parametrize("kept", [True, False], ids=["the old catalog can be read", "the old catalog is lost"])
def test_a_catalog_that_is_made_anew_says_the_same_of_two_lives_of_a_log(kept: bool) -> None:
    with spoken(15) as deployed:
        cluster = deployed.cluster
        deployed.start()
        before = tell(cluster, "one", "two")
        deployed.settle()
        deployed.stop()
        copy = copied(deployed)
        deployed.start()
        tell(cluster, "three")
        deployed.settle()
        deployed.stop()
        cluster.stop()
        put_back(cluster, copy)
        cluster.start()
        deployed.start()
        after = tell(cluster, "drei")
        deployed.settle()
        cluster.sql("CHECKPOINT")
        settled = cluster.sql("SELECT pg_current_wal_lsn()::text")[0][0]
        behind = f"SELECT confirmed_flush_lsn >= '{settled}' FROM pg_replication_slots WHERE slot_type = 'logical'"
        deployed.wait_for(lambda: cluster.sql(behind) == [(True,)], "the slot has gone on without a point")
        assert deployed.stop() == 0
        points, gaps = deployed.ask("list", "--limit", "1000"), deployed.ask("list", "--gaps")
        assert all(point["commits"] for point in points if point["cause"] == "commit"), points
        found = {told.xid: deployed.ask("find", "--xid", str(told.xid)) for told in before + after}
        if not kept:
            for path in deployed.state.glob("catalog.sqlite*"):
                path.unlink()
        rebuilt = deployed.ask("catalog", "rebuild")
        assert (rebuilt["lost_points"], rebuilt["changed_points"], rebuilt["lost_gaps"]) == ([], {}, [])
        assert deployed.ask("list", "--limit", "1000") == points
        assert deployed.ask("list", "--gaps") == gaps
        assert {xid: deployed.ask("find", "--xid", str(xid)) for xid in found} == found
        deployed.start()
        more = deployed.ask("list", "--gaps")[len(gaps) :]
        assert [("made anew" in gap["reason"]) for gap in more] == ([] if kept else [True])
        assert deployed.stop() == 0
