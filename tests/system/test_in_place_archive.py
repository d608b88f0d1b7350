"""A site that archives restores in place: its archive stays whole, and leads to what is there now by its own means."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.postgres import Cluster
from tests.fixtures.service import Deployment
from tests.fixtures.volumes import plain_folder, run
from tests.system.test_archive import Archive, archived
from tests.system.test_histories import spoken, tell
from trigger.errors import RestoreError

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


def words(cluster: Cluster) -> list[str]:
    return [row[0] for row in cluster.sql("SELECT word FROM said ORDER BY id")]


def say(cluster: Cluster, *said: str) -> str:
    """Commit one word after the other; gives the transaction id of the last."""
    for word in said:
        ((xid,),) = cluster.sql(f"INSERT INTO said (word) VALUES ('{word}') RETURNING pg_current_xact_id()::text")
    return str(xid)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def copied(here: Deployment) -> Path:
    """Give a cold copy of the cluster, as an operator's own backup."""
    backup = here.root / "backup"
    here.cluster.stop()
    run("cp", "-a", here.cluster.data, backup)
    here.cluster.start()
    return backup


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_archiver(cluster: Cluster) -> None:
    """Wait until all that was written by now is archived."""
    ((name,),) = cluster.sql("SELECT pg_walfile_name(pg_switch_wal())")
    question = f"SELECT last_archived_wal >= '{name}' FROM pg_stat_archiver"
    wait_until(lambda: cluster.sql(question) == [(True,)])


def planned(here: Deployment, *target: str) -> None:
    """Wait until there is a plan for a target."""
    here.wait_for(lambda: here.trigpoint("restore", *target, "--dry-run", check=False).returncode == 0, "a plan")


def recovered(here: Deployment, backup: Path, archive: Archive) -> list[str]:
    """Give what is there after an operator's own recovery to the end of the archive, in the place of the cluster."""
    here.cluster.stop()
    shutil.rmtree(here.cluster.data)
    run("cp", "-a", backup, here.cluster.data)
    (here.cluster.data / "recovery.signal").touch()
    here.cluster.configure({"restore_command": f"{archive.bring} %f %p", "archive_mode": "off"})
    here.cluster.start()
    wait_until(lambda: here.cluster.sql("SELECT pg_is_in_recovery()") == [(False,)])
    return words(here.cluster)


@pytest.mark.parametrize("major", [15, 18])
def test_after_a_restore_in_place_the_archive_is_added_to_and_leads_to_what_is_there(major: int) -> None:
    with archived(major) as (here, archive):
        cluster = here.cluster
        cluster.sql("CREATE TABLE said (id serial PRIMARY KEY, word text)")
        backup = copied(here)
        here.start()
        say(cluster, "one", "two")
        unwanted = say(cluster, "three")
        say(cluster, "four")
        wait_for_archiver(cluster)
        planned(here, "--before-xid", unwanted)
        before = archive.held()
        assert here.stop() == 0
        cluster.stop()
        here.trigpoint("restore", "--before-xid", unwanted, "--in-place", "--yes")
        cluster.start()
        assert words(cluster) == ["one", "two"]
        say(cluster, "five")
        wait_for_archiver(cluster)
        held = archive.held()
        assert {name: held[name] for name in before} == before, "nothing that was archived is another file now"
        assert "00000002.history" in held
        assert cluster.sql("SELECT last_failed_wal FROM pg_stat_archiver WHERE failed_count > 0") == []
        here.start()
        last = say(cluster, "six")
        wait_for_archiver(cluster)
        planned(here, "--to-xid", last)
        report = here.ask("restore", "--to-xid", last, "--name", "six")
        assert all(held for _, held, _ in report["checks"])
        here.trigpoint("clones", "drop", "--yes", "six")
        assert here.stop() == 0
        assert recovered(here, backup, archive) == ["one", "two", "five", "six"]


@pytest.mark.parametrize("major", [15, 18])
def test_what_production_had_not_archived_before_a_restore_in_place_is_archived_whole_after_it(major: int) -> None:
    with plain_folder() as folder, spoken(major, archive_mode="on") as here:
        cluster, archive = here.cluster, Archive(folder)
        cluster.configure({"archive_command": f"{archive.keep} %p %f"})
        cluster.sql("SELECT pg_reload_conf()")
        backup = copied(here)
        here.start()
        say(cluster, "one")
        wait_for_archiver(cluster)
        archive.write(archive.keep, "exit 1")
        for word in ("two", "three"):
            say(cluster, word)
            cluster.sql("SELECT pg_switch_wal()")
        here.settle()
        kept = say(cluster, "four")
        say(cluster, "unwanted")
        cluster.sql("SELECT pg_switch_wal()")
        say(cluster, "unwanted too")
        here.settle()
        assert here.stop() == 0
        cluster.stop()
        before = archive.held()
        log = cluster.data / "pg_wal"
        waiting = {file.stem: digest(log / file.stem) for file in (log / "archive_status").glob("*.ready")}
        assert len(waiting) >= 3
        here.trigpoint("restore", "--to-xid", kept, "--in-place", "--yes")
        archive.mend()
        cluster.start()
        say(cluster, "five")
        wait_for_archiver(cluster)
        held = archive.held()
        assert held.items() >= (before | waiting).items(), "as production had it, and nothing else under its name"
        numbers = [int(name[8:], 16) for name in held if len(name) == 24 and name.startswith("00000001")]
        assert sorted(numbers) == list(range(min(numbers), max(numbers) + 1))
        assert cluster.sql("SELECT failed_count FROM pg_stat_archiver") == [(0,)]
        assert not list((cluster.data / "pg_wal" / "archive_status").glob("*.ready"))
        assert recovered(here, backup, archive) == ["one", "two", "three", "four", "five"]


def test_a_restore_in_place_after_one_that_was_undone_takes_no_timeline_that_the_archive_has_met() -> None:
    with plain_folder() as folder, spoken(16, archive_mode="on") as here:
        cluster, archive = here.cluster, Archive(folder)
        cluster.configure({"archive_command": f"{archive.keep} %p %f"})
        cluster.sql("SELECT pg_reload_conf()")
        here.start()
        kept = tell(cluster, "one", "two")[-1]
        tell(cluster, "unwanted")
        here.settle()
        assert here.stop() == 0
        cluster.stop()
        here.trigpoint("restore", "--to-xid", str(kept.xid), "--in-place", "--yes")
        cluster.start()
        here.start()
        tell(cluster, "three")
        here.settle()
        wait_for_archiver(cluster)
        assert "00000002.history" in archive.held()
        assert here.stop() == 0
        cluster.stop()
        here.trigpoint("restore", "--undo", "last", "--yes")
        cluster.start()
        here.start()
        kept = tell(cluster, "four")[-1]
        here.settle()
        tell(cluster, "unwanted too")
        here.settle()
        assert here.stop() == 0
        cluster.stop()
        before = archive.held()
        here.trigpoint("restore", "--to-xid", str(kept.xid), "--in-place", "--yes")
        cluster.start()
        tell(cluster, "five")
        wait_for_archiver(cluster)
        held = archive.held()
        assert {name: held[name] for name in before} == before
        assert "00000003.history" in held
        assert cluster.sql("SELECT failed_count FROM pg_stat_archiver") == [(0,)]


def test_a_timeline_that_only_a_state_aside_was_in_is_taken_by_no_other_clone() -> None:
    """The service saw none of it: what was in place was looked at, archived by its server, and taken back."""
    with plain_folder() as folder, spoken(16, archive_mode="on") as here:
        cluster, archive = here.cluster, Archive(folder)
        cluster.configure({"archive_command": f"{archive.keep} %p %f"})
        cluster.sql("SELECT pg_reload_conf()")
        here.start()
        first, second, _ = (one.xid for one in tell(cluster, "one", "two", "three"))
        here.settle()
        here.ask("restore", "--to-xid", str(second), "--name", "spare")
        assert here.stop() == 0
        cluster.stop()
        here.trigpoint("restore", "--to-xid", str(first), "--in-place", "--yes")
        cluster.start()
        tell(cluster, "not this")
        wait_for_archiver(cluster)
        before = archive.held()
        assert "00000002.history" in before
        cluster.stop()
        refused = here.trigpoint("restore", "--in-place", "--from-clone", "spare", "--yes", check=False)
        assert refused.returncode == RestoreError.exit_code
        assert "timeline 2" in refused.stderr
        here.trigpoint("restore", "--undo", "last", "--yes")
        refused = here.trigpoint("restore", "--in-place", "--from-clone", "spare", "--yes", check=False)
        assert refused.returncode == RestoreError.exit_code
        assert "timeline 2" in refused.stderr
        here.trigpoint("restore", "--to-xid", str(second), "--in-place", "--yes")
        cluster.start()
        assert words(cluster) == ["one", "two"]
        tell(cluster, "four")
        wait_for_archiver(cluster)
        held = archive.held()
        assert {name: held[name] for name in before} == before
        assert "00000003.history" in held
        assert cluster.sql("SELECT failed_count FROM pg_stat_archiver") == [(0,)]
