"""Where a cluster may lie: on a filesystem that shares blocks or on one that does not, and on several volumes at once.

Exactness is judged by the log: `pg_waldump` says in which order the transactions of a load committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn
from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import loop_volume, plain_folder
from trigger.errors import RestoreError

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

OFTEN = "[points]\nmin_interval_seconds = 0.3\nper_minute = 6000\n"
POINTS_UNDER_LOAD = 3


def load_until_points_were_taken(here: Deployment) -> dict[int, Lsn]:
    """Commit while points are taken; give where each transaction of the load committed."""
    first, before = here.cluster.end_of_log(), here.status()["last_point"]
    load = Load(here)
    try:
        here.wait_for(
            lambda: here.status().get("last_point", 0) >= before + POINTS_UNDER_LOAD, "points while others commit"
        )
    finally:
        load.end()
    here.settle()
    written = judge.written_ids(here.cluster)
    return {xid: at for xid, at in judge.logged_commits(here.cluster, first).items() if xid in written}


def neighbours(commits: dict[int, Lsn]) -> list[int]:
    """Give two transactions in the middle of a load that are next to each other in the log."""
    in_order = sorted(commits, key=lambda xid: commits[xid])
    middle = len(in_order) // 2
    return in_order[middle : middle + 2]


def require_exact(here: Deployment, commits: dict[int, Lsn], xid: int) -> None:
    """Restore to one transaction: all at or before it in the log are there, and no other."""
    report = here.ask("restore", "--to-xid", str(xid), "--name", "one")
    with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
        held = {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")}
    here.trigpoint("clones", "drop", "--yes", "one")
    assert held == {other for other, at in commits.items() if at <= commits[xid]}


def bytes_copied(here: Deployment) -> list[int]:
    """Give for each sealed point how many bytes its snapshots copied."""
    points = here.ask("list", "--state", "sealed", "--limit", "100")
    shown = [here.ask("show", str(point["number"]))["point"] for point in points]
    return [sum(snapshot["bytes_copied"] for snapshot in point["snapshots"]) for point in shown]


@pytest.mark.parametrize(("filesystem", "major", "shares"), [("xfs", 15, True), ("ext4", 18, False)])
def test_adjacent_commits_of_a_load_come_back_exactly_from_copies_on_any_filesystem(
    filesystem: str, major: int, shares: bool
) -> None:
    with deployment(major, "directory", filesystem, extra=OFTEN, wal_keep_size="1GB") as here:
        here.cluster.sql(judge.TRUTH_TABLE)
        checked = {finding["subject"]: finding["message"] for finding in here.ask("check")}
        assert checked["data"].endswith("share their blocks" if shares else "changed files are copied")
        here.start()
        commits = load_until_points_were_taken(here)
        for xid in neighbours(commits):
            require_exact(here, commits, xid)
        result = here.ask("verify")
        assert result["passed"], result["checks"]
        copied = bytes_copied(here)
        assert len(copied) > POINTS_UNDER_LOAD
        assert all((count == 0) is shares for count in copied), copied
        assert here.stop() == 0
        judge.assert_every_commit_has_one_outcome(judge.read(here), set(commits))


# ------------------------------------------------------------------------------------------------ several volumes


@pytest.fixture
def spread(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Give a cluster with its log and a tablespace outside of its data directory, each on a volume of its own."""
    storage, second_filesystem = request.param
    filesystem = "btrfs" if storage == "btrfs" else "xfs"
    with (
        deployment(15, storage, filesystem, wal_keep_size="1GB") as here,
        loop_volume(second_filesystem, 4096) if second_filesystem else contextlib.nullcontext(here.root) as folder,
    ):
        try:
            yield spread_out(here, folder)
        finally:
            here.cluster.stop()


spread_over = partial(pytest.mark.parametrize, "spread", indirect=True, ids=str)


def spread_out(here: Deployment, folder: Path) -> Deployment:
    """Move the log of the cluster to `folder/log`, and make a table in `folder/space`."""
    log, space, cluster = folder / "log", folder / "space", here.cluster
    for volume in (log, space):
        if here.storage == "btrfs":
            subprocess.run(["btrfs", "-q", "subvolume", "create", str(volume)], check=True)
        volume.mkdir(exist_ok=True)
        os.chown(volume, *cluster.owner)
    cluster.stop()
    shutil.copytree(cluster.data / "pg_wal", log / "pg_wal")
    for entry in (log / "pg_wal", *(log / "pg_wal").rglob("*")):
        os.chown(entry, *cluster.owner)
    shutil.rmtree(cluster.data / "pg_wal")
    (cluster.data / "pg_wal").symlink_to(log / "pg_wal")
    cluster.start()
    cluster.sql(f"CREATE TABLESPACE fast LOCATION '{space}'")
    cluster.sql(f"{judge.TRUTH_TABLE} TABLESPACE fast")
    cluster.sql("CREATE TABLE beside (id int PRIMARY KEY)")
    volumes = "".join(f'[[volumes]]\nname = "{path.name}"\npath = "{path}"\n' for path in (log, space))
    here.configure(OFTEN + volumes)
    return here


@spread_over([("btrfs", None), ("directory", "ext4")])
def test_commits_in_a_tablespace_come_back_exactly_with_the_log_on_another_volume(spread: Deployment) -> None:
    spread.start()
    commits = load_until_points_were_taken(spread)
    first, second = neighbours(commits)
    for xid in (first, second):
        require_exact(spread, commits, xid)
    report = spread.ask("restore", "--to-xid", str(first), "--name", "two")
    data = Path(report["data_directory"])
    for link in (data / "pg_wal", *(data / "pg_tblspc").iterdir()):
        assert link.resolve().is_relative_to(spread.root / "snapshots" / "clones" / "two")
    spread.trigpoint("clones", "drop", "--yes", "two")
    result = spread.ask("verify")
    assert result["passed"], result["checks"]


@spread_over([("btrfs", None), ("directory", None)])
def test_volumes_of_one_filesystem_are_put_back_in_place_together_and_undone_together(spread: Deployment) -> None:
    cluster = spread.cluster
    xid = second_of_four(spread)
    swap = spread.ask("restore", "--to-xid", xid, "--in-place", "--yes")["swap"]
    assert len(swap["places"]) == 3
    cluster.start()
    assert held(spread) == (2, 2)
    links = [cluster.data / "pg_wal", *(cluster.data / "pg_tblspc").iterdir()]
    assert {link.readlink() for link in links} == {spread.root / "log" / "pg_wal", spread.root / "space"}
    spread.start()
    cluster.sql("INSERT INTO truth (what) VALUES ('after')")
    spread.settle()
    result = spread.ask("verify")
    assert result["passed"], result["checks"]
    assert spread.stop() == 0
    cluster.stop()
    spread.trigpoint("restore", "--undo", swap["name"], "--yes")
    cluster.start()
    assert held(spread) == (4, 4)
    assert {link.readlink() for link in links} == {spread.root / "log" / "pg_wal", spread.root / "space"}


@spread_over([("directory", "ext4")])
def test_volumes_that_no_rename_reaches_are_not_put_in_place_and_nothing_is_touched(spread: Deployment) -> None:
    xid = second_of_four(spread)
    refused = spread.trigpoint("restore", "--to-xid", xid, "--in-place", "--yes", check=False)
    assert refused.returncode == RestoreError.exit_code
    words = " ".join(refused.stderr.split())
    assert "lies on another filesystem" in words
    assert "put storage.folder on the filesystem of the volumes; or restore beside and copy" in words
    assert spread.ask("clones", "list") == []
    spread.cluster.start()
    assert held(spread) == (4, 4)


def second_of_four(here: Deployment) -> str:
    """Commit four rows into the tablespace and beside it, stop all, and give the second one's transaction."""
    here.start()
    for number in range(4):
        here.cluster.sql(
            f"BEGIN; INSERT INTO truth (what) VALUES ('{number}'); INSERT INTO beside VALUES ({number}); COMMIT"
        )
    here.settle()
    xid = here.cluster.sql("SELECT xid::text FROM truth WHERE what = '1'")[0][0]
    assert here.stop() == 0
    here.cluster.stop()
    return str(xid)


def held(here: Deployment) -> tuple[Any, Any]:
    """Give how many rows are in the tablespace, and how many beside it."""
    return here.cluster.sql("SELECT (SELECT count(*) FROM truth), (SELECT count(*) FROM beside)")[0][:2]


def test_a_tablespace_that_is_made_on_no_volume_is_a_trouble_until_it_is_gone_and_hides_no_earlier_commit() -> None:
    with deployment(16) as here, plain_folder() as elsewhere:
        shutil.chown(elsewhere, here.cluster.data.owner())
        here.start()
        assert here.status()["troubles"] == []
        before = here.ask("point")["number"]
        here.cluster.sql(f"CREATE TABLESPACE elsewhere LOCATION '{elsewhere}'")
        here.wait_for(lambda: f"in no point: {elsewhere}; move it" in str(here.status()["troubles"]), "the trouble")
        oid = here.cluster.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere'")[0][0]
        assert f"{elsewhere} lies on no volume" in here.trigpoint("check", check=False).stdout
        here.ask("point")
        here.cluster.sql("SELECT pg_logical_emit_message(true, 'trigpoint', 'aft')")
        after = here.ask("point")["number"]
        report = here.ask("restore", "--to-point", str(before), "--name", "before")
        assert all(held for _, held, _ in report["checks"])
        refused = here.trigpoint("restore", "--to-point", str(after), check=False)
        assert refused.returncode == RestoreError.exit_code
        words = " ".join(refused.stderr.split())
        assert f"pg_tblspc/{oid} of the cluster leads to {elsewhere}, which the clone has no copy of" in words
        assert "restore a commit from before it was there" in words
        for target in (("--to-point", str(after)), ("--to-marker", "aft")):
            planned = here.trigpoint("restore", *target, "--dry-run", check=False)
            assert planned.returncode == RestoreError.exit_code
            assert "which the clone has no copy of" in " ".join(planned.stderr.split())
        (found,) = here.ask("find", "--marker", "aft")
        assert found["base"] is None
        assert f"it cannot be restored: pg_tblspc/{oid} of the cluster leads to {elsewhere}" in found["reason"]
        assert [clone["name"] for clone in here.ask("clones")] == ["before"]
        here.trigpoint("clones", "drop", "--yes", "before")
        here.cluster.sql("DROP TABLESPACE elsewhere")
        here.wait_for(lambda: here.status()["troubles"] == [], "no trouble any more")
        assert here.stop() == 0
