"""What was lost of our own state is named for what it is, and made anew, without the server and without the folder."""

from __future__ import annotations

import shutil

import psycopg
import pytest

from tests.fixtures.service import deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_a_lost_state_folder_is_made_anew_from_the_storage_while_the_server_is_down() -> None:
    with deployment(15, "directory", databases=("postgres", "quiet")) as here:
        journal = here.root / "journal"
        here.configure(f'[journal]\nfolder = "{journal}"\n')
        here.cluster.sql("CREATE TABLE t (n int)")
        here.start()
        here.cluster.sql("INSERT INTO t VALUES (1)")
        here.settle()
        number = here.ask("point")["number"]
        here.cluster.sql("INSERT INTO t VALUES (2)")
        here.settle()
        known = [one["number"] for one in here.ask("list")]
        oldest = here.ask("show", "1")["point"]["floor"].rpartition("@")[2]
        gone_on = f"SELECT bool_and(confirmed_flush_lsn > '{oldest}') FROM pg_replication_slots WHERE NOT temporary"
        here.wait_for(lambda: here.cluster.sql(gone_on) == [(True,)], "the server has let go of what was settled")
        assert here.stop() == 0
        shutil.rmtree(here.state)
        checked = here.trigpoint("check").stdout
        assert f"warning  catalog: {here.state / 'catalog.sqlite'} knows of no point, and the storage has" in checked
        assert not (here.state / "catalog.sqlite").exists()
        here.cluster.stop()

        for command in (
            ("list",),
            ("show", "1"),
            ("restore", "--to-point", str(number), "--dry-run"),
            ("find", "--xid", "1"),
            ("expire", str(number), "--yes"),
        ):
            lost = here.trigpoint(*command, check=False)
            assert lost.returncode == 7, lost.stderr
            assert "catalog rebuild" in lost.stderr
        (here.state / "catalog.sqlite").touch(0o600)
        for command in (("list",), ("list", "--gaps"), ("show", "1")):
            assert "it was lost" in here.trigpoint(*command, check=False).stderr
        here.trigpoint("catalog", "rebuild")
        assert (here.root / "snapshots" / "lock").read_text() == str(here.state / "catalog.sqlite")
        assert [one["number"] for one in here.ask("list")] == known
        report = here.ask("restore", "--to-point", str(number), "--name", "back")
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            assert clone.execute("SELECT n FROM t").fetchall() == [(1,)]
        here.trigpoint("clones", "drop", "--yes", "back")
        here.cluster.start()
        here.start()
        first = [gap for gap in here.ask("list", "--gaps") if gap["stream"] == "quiet"]
        assert [gap["after"].endswith(f"@{oldest}") for gap in first] == [True], "no tag knows of a commit there"
        assert here.stop() == 0
        (here.state / "catalog.sqlite").unlink()
        here.start()
        assert "knows of no point" in here.log.read_text()
        assert [gap["stream"] for gap in here.ask("list", "--gaps")].count("quiet") == 2


def test_points_that_catalog_and_storage_show_no_more_are_missed_and_nothing_begins_anew_in_their_place() -> None:
    """As where both lie on a filesystem that is not mounted: beneath its mount point all looks like a first start."""
    with deployment(15, "directory") as here:
        disk = here.root / "disk"
        (disk / "snapshots").mkdir(parents=True)
        here.configure(f'[catalog]\npath = "{disk / "catalog.sqlite"}"\n')
        here.config.write_text(here.config.read_text().replace(str(here.root / "snapshots"), str(disk / "snapshots")))
        here.start()
        here.cluster.sql("CREATE TABLE t (n int)")
        here.settle()
        here.wait_for((here.state / "storage.begun").exists, "noted")
        assert here.stop() == 0
        known = [one["number"] for one in here.ask("list")]

        (disk / "snapshots").rename(disk / "away")
        rebuilt = here.trigpoint("catalog", "rebuild", check=False)
        assert f"in the catalog {len(known)} points are sealed" in " ".join(rebuilt.stderr.split()), "and it is there"
        assert "knows of a point" not in rebuilt.stderr
        assert [one["number"] for one in here.ask("list")] == known
        (disk / "away").rename(disk / "snapshots")

        disk.rename(here.root / "away")
        (disk / "snapshots").mkdir(parents=True)
        checked = here.trigpoint("check", check=False)
        assert checked.returncode == 3
        words = f"neither catalog nor storage knows of a point, and points were kept in {disk / 'snapshots'}"
        assert f"refused  storage: {words}" in checked.stdout
        here.start(wait=False)
        assert here.process is not None
        assert here.process.wait(60) == 3
        for command in (("catalog", "rebuild"), ("catalog", "rebuild", "--accept-loss")):
            anew = here.trigpoint(*command, check=False)
            assert anew.returncode == 0 if "--accept-loss" in command else words in anew.stderr
        assert here.trigpoint("check", check=False).returncode == 3

        shutil.rmtree(disk)
        (here.root / "away").rename(disk)
        here.start()
        report = here.ask("restore", "--to-point", str(known[0]), "--name", "back")
        assert all(held for _, held, _ in report["checks"])


@pytest.mark.volume
@pytest.mark.parametrize("log_is_lost", [True, False])
def test_a_later_timeline_comes_back_by_what_its_snapshots_know_of_the_past(log_is_lost: bool) -> None:
    with deployment(18) as here:
        journal = here.state / "journal" if log_is_lost else here.root / "journal"
        here.configure(f'[journal]\nfolder = "{journal}"\n')
        here.cluster.sql("CREATE TABLE t (n int)")
        here.start()
        ((wanted,),) = here.cluster.sql("INSERT INTO t VALUES (1) RETURNING pg_current_xact_id()::text")
        here.cluster.sql("INSERT INTO t VALUES (2)")
        here.settle()
        assert here.stop() == 0
        here.cluster.stop()
        here.trigpoint("restore", "--to-xid", str(wanted), "--in-place", "--yes")
        here.cluster.start()
        here.start()
        ((later,),) = here.cluster.sql("INSERT INTO t VALUES (3) RETURNING pg_current_xact_id()::text")
        here.settle()
        point = here.ask("point")
        assert any(one["history"].endswith("/2") for one in here.ask("find", "--xid", str(later)))
        here.cluster.sql("INSERT INTO t VALUES (4)")
        here.settle()
        assert here.stop() == 0
        here.cluster.stop()
        shutil.rmtree(here.state)

        here.trigpoint("catalog", "rebuild")
        for file in journal.glob("*.history"):
            file.unlink()
        target = ("--to-point", str(point["number"])) if log_is_lost else ("--to-xid", str(later))
        report = here.ask("restore", *target, "--name", "back")
        assert report["history"].endswith("/3"), "a timeline that production never had"
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as clone:
            assert clone.execute("SELECT n FROM t ORDER BY n").fetchall() == [(1,), (3,)]
        here.trigpoint("clones", "drop", "--yes", "back")

        (old,) = here.ask("aside")
        assert (old["kind"], old["undo"]) == ("before", f"trigpoint restore --undo {old['name']}")
        resumed = here.trigpoint("restore", "--resume", "last", check=False)
        assert "no restore in place was cut off" in resumed.stderr
        here.trigpoint("restore", "--undo", "last", "--yes")
        here.cluster.start()
        assert here.cluster.sql("SELECT n FROM t ORDER BY n") == [(1,), (2,)]
