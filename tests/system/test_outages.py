"""The journal's program dies, its segments rot, snapshots vanish, the storage is not there, the budget is used up.

What is gone is said to be gone, and by name; what does not need it still comes back exactly. One deployment lives
through all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures import judge
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import failing_volume, flip_bit
from trigger.errors import RestoreError
from trigger.model import State
from trigger.service.control import ask

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

_BUDGET = 30
_QUICK = "[points]\nmin_interval_seconds = 0\nper_minute = 6000\nretry_seconds = 0.2\n"
_POINTS = f"budget = {_BUDGET}\n{_QUICK}"


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """A service whose storage bears few snapshots, on a cluster whose log has segments of 1 MB."""
    with deployment(16, extra=_POINTS, initdb=["--wal-segsize=1"], max_wal_size="64MB", min_wal_size="2MB") as found:
        found.cluster.sql(judge.TRUTH_TABLE)
        yield found


@pytest.fixture
def deployed(shared: Deployment) -> Iterator[Deployment]:
    """The deployment with its service running, the configuration as usual."""
    shared.configure(_POINTS)
    shared.start()
    yield shared
    if shared.process is not None and shared.process.poll() is None:
        shared.process.kill()
        shared.process.wait(30)


def _commit(deployed: Deployment, number: int = 1) -> list[int]:
    """Commit one after the other, and give the transactions; several have a point each."""
    made = []
    with deployed.cluster.connect() as connection:
        for _ in range(number):
            newest = _newest(deployed) if number > 1 else None
            row = connection.execute("INSERT INTO truth (what) VALUES ('outage') RETURNING xid::text").fetchone()
            assert row is not None
            made.append(int(row[0]))
            if number > 1:
                deployed.wait_for(lambda before=newest: _newest(deployed) != before, "the point of one commit")
    return made


def _newest(deployed: Deployment) -> int | None:
    """Give the newest sealed point, as the service itself says, without a process for every question."""
    newest = asyncio.run(ask(deployed.state, {"do": "status"}, 10))["status"]["last_point"]
    return None if newest is None else int(newest)


def _switch_segment(deployed: Deployment, times: int = 1) -> None:
    for _ in range(times):
        deployed.cluster.sql("SELECT pg_logical_emit_message(true, 'ballast', repeat('x', 100))")
        deployed.cluster.sql("SELECT pg_switch_wal()")


def _holds(conninfo: str) -> set[int]:
    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        return {int(row[0]) for row in connection.execute("SELECT xid::text FROM truth")}


def _assert_comes_back(deployed: Deployment, xid: int) -> None:
    """An exact restore to one transaction holds what was committed up to it, one after the other, and nothing else."""
    report = deployed.ask("restore", "--to-xid", str(xid), "--name", "back")
    try:
        assert _holds(report["conninfo"]) == {one for one in judge.written_ids(deployed.cluster) if one <= xid}
    finally:
        deployed.trigpoint("clones", "drop", "--yes", "back")


def _journal(deployed: Deployment) -> Path:
    return deployed.state / "journal"


def _findings(deployed: Deployment) -> dict[str, str]:
    return {finding["subject"]: finding["message"] for finding in deployed.status()["journal"]}


# ------------------------------------------------------------------------------------------------------- journal


def test_a_commit_that_only_the_log_tells_of_is_waited_for_while_its_log_is_on_the_way(deployed: Deployment) -> None:
    receiver = deployed.running_receiver()
    os.kill(receiver, signal.SIGSTOP)
    goes_on = threading.Timer(3, os.kill, (receiver, signal.SIGCONT))
    goes_on.start()
    try:
        with deployed.cluster.connect() as connection, connection.transaction():
            connection.execute("CREATE TABLE late (i int)")  # what no stream shows
            row = connection.execute("SELECT txid_current()").fetchone()
        assert row is not None
        report = deployed.ask("restore", "--to-xid", str(row[0]), "--name", "late")
        assert f"commit {row[0]} in the log" in report["target"]["description"]
    finally:
        goes_on.cancel()
        os.kill(receiver, signal.SIGCONT)
    deployed.trigpoint("clones", "drop", "--yes", "late")


def test_a_killed_receiver_is_started_again_and_no_log_is_missing(deployed: Deployment) -> None:
    before = deployed.running_receiver()
    os.kill(before, signal.SIGKILL)
    made = _commit(deployed, 3)
    _switch_segment(deployed, 2)
    deployed.wait_for(lambda: deployed.receiver() not in (None, before), "another receiver")
    made += _commit(deployed, 3)
    deployed.settle()
    _assert_comes_back(deployed, made[2])
    _assert_comes_back(deployed, made[-1])
    assert deployed.stop() == 0


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_segment_is_found_shown_over_a_restart_and_refused_where_it_is_needed(
    deployed: Deployment, damage: str
) -> None:
    before = _commit(deployed)[0]
    deployed.settle()
    _switch_segment(deployed)
    _commit(deployed)  # the base of the next one lies before the segment in which both are
    deployed.trigpoint("point", "--note", "before the damage")
    start = deployed.cluster.end_of_log()
    _switch_segment(deployed)
    name = deployed.cluster.sql("SELECT pg_walfile_name(pg_switch_wal())")[0][0]
    inside = deployed.cluster.end_of_log() - (1 << 19)
    _switch_segment(deployed)
    victim = _journal(deployed) / name
    deployed.wait_for(victim.exists, "the segment in the journal")
    sound = victim.read_bytes()
    newest = deployed.status()["last_point"]
    victim.unlink() if damage == "missing" else flip_bit(
        victim, 100
    )  # of the first record's data, behind the page's header
    deployed.wait_for(lambda: name in _findings(deployed), "the damage in the status")
    deployed.wait_for(lambda: deployed.status()["last_point"] > newest, "a new base behind the damage")
    assert deployed.stop() == 0
    deployed.start()
    deployed.wait_for(lambda: name in _findings(deployed), "the damage in the status of another service")
    assert name in deployed.trigpoint("status").stdout
    after = _commit(deployed)[0]
    deployed.settle()
    _assert_comes_back(deployed, before)
    _assert_comes_back(deployed, after)
    assert start < inside
    _put_back(victim, sound, deployed)
    deployed.wait_for(lambda: name not in _findings(deployed), "a status without the damage that was mended")
    assert deployed.stop() == 0


def _put_back(file: Path, content: bytes, deployed: Deployment) -> None:
    file.write_bytes(content)
    os.chown(file, *deployed.cluster.owner)


def test_what_lies_behind_damage_is_never_left_out_of_the_present_or_the_latest_state_in_silence(
    deployed: Deployment,
) -> None:
    deployed.configure(f"{_POINTS}[[rules]]\nname = 'none'\nmarkers = ['never']\n")
    assert deployed.stop() == 0
    deployed.start()  # no commit gets a point from here on, so that the damage lies behind the newest base
    _switch_segment(deployed)
    deployed.trigpoint("point", "--note", "the base")
    _commit(deployed)
    place = deployed.cluster.end_of_log()
    deployed.cluster.sql("SELECT pg_logical_emit_message(true, 'ballast', repeat('x', 100000))")
    name = deployed.cluster.sql(f"SELECT pg_walfile_name('{place}')")[0][0]
    partial = _journal(deployed) / f"{name}.partial"
    deployed.wait_for(lambda: _written(partial) > place % (1 << 20) + 100_000, "the log in the journal")
    with partial.open("r+b") as file:
        file.seek(place % (1 << 20))
        file.write(b"\xff" * 64)
    for target in ("--to-latest", f"--to-time={datetime.now(UTC).isoformat()}"):
        refused = deployed.trigpoint("restore", target, "--name", "now", check=False)
        assert refused.returncode == RestoreError.exit_code, (target, refused.stdout)
        assert "damaged" in " ".join(refused.stderr.split())
    assert deployed.ask("clones", "list") == []
    assert deployed.stop() == 0


def _written(segment: Path) -> int:
    """Give how far a segment that is still written holds log."""
    return len(segment.read_bytes().rstrip(b"\0"))


def test_a_restore_that_needs_a_lost_segment_is_refused_by_its_name(deployed: Deployment) -> None:
    deployed.configure(f"{_POINTS}[[rules]]\nname = 'none'\nmarkers = ['never']\n")
    assert deployed.stop() == 0
    deployed.start()  # no commit gets a point from here on, so that there is much to replay
    deployed.trigpoint("point", "--note", "the base")
    _switch_segment(deployed)
    _commit(deployed)
    name = deployed.cluster.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")[0][0]
    _switch_segment(deployed)
    _commit(deployed)
    place = deployed.cluster.sql("SELECT pg_current_wal_insert_lsn()::text")[0][0]
    _commit(deployed)
    _switch_segment(deployed)
    victim = _journal(deployed) / name
    deployed.wait_for(victim.exists, "the segment in the journal")
    sound = victim.read_bytes()
    victim.unlink()
    refused = deployed.trigpoint("restore", "--to-lsn", place, check=False)
    assert refused.returncode in (8, 9), refused.stderr
    assert "missing" in refused.stderr or name in refused.stderr
    assert deployed.ask("clones", "list") == []
    _put_back(victim, sound, deployed)
    deployed.wait_for(lambda: not _findings(deployed), "a whole journal")
    report = deployed.ask("restore", "--to-lsn", place, "--name", "back")
    assert report["name"] == "back"
    deployed.trigpoint("clones", "drop", "--yes", "back")
    assert deployed.stop() == 0


# ------------------------------------------------------------------------------------------------------- storage


def _sealed(deployed: Deployment) -> list[dict[str, Any]]:
    return list(deployed.ask("list", "--state", "sealed", "--limit", "500"))


def test_a_snapshot_deleted_behind_our_back_is_a_phantom_and_its_commit_still_comes_back(deployed: Deployment) -> None:
    _commit(deployed, 4)
    deployed.settle()
    assert deployed.stop() == 0
    lost = next(point for point in _sealed(deployed)[1:] if point["commit"])
    for snapshot in lost["snapshots"]:
        subprocess.run(["btrfs", "subvolume", "delete", snapshot["location"]], check=True, capture_output=True)
        shutil.rmtree(Path(snapshot["location"]).parent)
    said = len(deployed.log.read_text())
    deployed.start()
    news = deployed.log.read_text()[said:]
    assert "since gone from the storage" in news
    point = deployed.ask("show", str(lost["number"]))["point"]
    assert (point["state"], point["failure"]) == ("failed", "its snapshot is gone from the storage")
    _assert_comes_back(deployed, lost["commit"]["xid"])
    assert deployed.stop() == 0


def test_a_snapshot_that_goes_while_the_service_runs_is_shown_and_promised_to_nobody(deployed: Deployment) -> None:
    _, wanted = _commit(deployed, 2)
    deployed.settle()
    plan = deployed.ask("restore", "--to-xid", str(wanted), "--dry-run")["base"]
    number, before = plan["number"], [finding["message"] for finding in deployed.ask("check")]
    folder, elsewhere = deployed.root / "snapshots" / f"trg-{plan['id']}", deployed.root / "moved"
    folder.rename(elsewhere)
    gone = f"of point {number} a snapshot is gone from the storage"
    deployed.wait_for(lambda: any(gone in one for one in deployed.status()["troubles"]), "the trouble")
    assert [finding["message"] for finding in deployed.ask("check") if finding["message"] not in before] == [gone]
    (found,) = deployed.ask("find", "--xid", str(wanted))
    assert found["base"] not in (None, number)
    said = deployed.trigpoint("restore", "--to-xid", str(wanted), "--dry-run").stdout
    assert f"not       point {number}: its snapshot is gone from the storage" in said
    report = deployed.ask("restore", "--to-xid", str(wanted), "--name", "without")
    assert report["base"] == found["base"]
    assert f"point {number} is nearer, and left out: its snapshot is gone from the storage" in report["notes"]
    assert max(_holds(report["conninfo"])) == wanted
    deployed.trigpoint("clones", "drop", "--yes", "without")
    elsewhere.rename(folder)
    deployed.wait_for(lambda: not any(gone in one for one in deployed.status()["troubles"]), "the end of the trouble")
    assert deployed.ask("restore", "--to-xid", str(wanted), "--dry-run")["base"]["number"] == number
    assert deployed.stop() == 0


def test_what_was_put_back_once_the_service_had_stopped_is_named_and_serves_after_a_reconcile(
    deployed: Deployment,
) -> None:
    _, wanted = _commit(deployed, 2)
    deployed.settle()
    lost = deployed.ask("restore", "--to-xid", str(wanted), "--dry-run")["base"]
    folder, elsewhere = deployed.root / "snapshots" / f"trg-{lost['id']}", deployed.root / "moved"
    folder.rename(elsewhere)
    assert deployed.stop() == 0
    elsewhere.rename(folder)
    told = [(one["message"], one["remedy"]) for one in deployed.ask("check") if "failed as gone" in one["message"]]
    assert [message for message, _ in told] == [f"point {lost['number']} failed as gone, and lies in the storage again"]
    assert told[0][1].startswith("`trigpoint reconcile`")
    assert deployed.ask("restore", "--to-xid", str(wanted), "--dry-run")["base"]["number"] != lost["number"]
    deployed.trigpoint("reconcile")
    assert deployed.ask("restore", "--to-xid", str(wanted), "--dry-run")["base"]["number"] == lost["number"]


def test_a_storage_that_is_not_mounted_is_refused_at_start_and_no_point_is_given_up(deployed: Deployment) -> None:
    made = _commit(deployed)[0]
    deployed.settle()
    before = _sealed(deployed)
    folder, elsewhere = deployed.root / "snapshots", deployed.root / "elsewhere"
    folder.rename(elsewhere)
    folder.mkdir()  # a mount point with nothing mounted on it
    for refusing, hint in (
        (
            ["expire", str(before[0]["number"]), "--yes"],
            f"what was kept in {folder} is gone hint: mount its filesystem",
        ),
        (["restore", "--to-xid", str(made)], "hint: mount the storage's filesystem"),  # by a process that never saw it
    ):
        refused = deployed.trigpoint(*refusing, check=False)
        assert refused.returncode == 6, refused.stdout
        assert hint in " ".join(refused.stderr.split())
    assert any(f"what was kept in {folder} is gone" in trouble for trouble in deployed.status()["troubles"])
    assert deployed.stop() == 0
    assert _sealed(deployed) == before
    for command in ("check", "run", "run"):
        refused = deployed.trigpoint(command, check=False)
        words = " ".join((refused.stdout + refused.stderr).split())
        assert refused.returncode == 3, words
        assert "shows no snapshot at all" in words
        assert "mount the storage's filesystem" in words
    refused = deployed.trigpoint("run", "--force", check=False)
    assert refused.returncode == 6, refused.stderr
    assert "shows no snapshot at all" in refused.stderr
    assert _sealed(deployed) == before
    folder.rmdir()
    elsewhere.rename(folder)
    deployed.start()
    _assert_comes_back(deployed, made)
    assert deployed.stop() == 0


def test_a_journal_that_is_not_mounted_is_refused_at_start_and_none_is_begun_beneath(deployed: Deployment) -> None:
    made = _commit(deployed)[0]
    deployed.settle()
    assert deployed.stop() == 0
    folder, elsewhere = _journal(deployed), deployed.state / "elsewhere"
    folder.rename(elsewhere)
    folder.mkdir()  # a mount point with nothing mounted on it
    for command in ("check", "run"):
        refused = deployed.trigpoint(command, check=False)
        words = " ".join((refused.stdout + refused.stderr).split())
        assert refused.returncode == 3, words
        assert f"no journal lies in {folder}, and log was kept there" in words
        assert "mount its filesystem" in words
    assert list(folder.iterdir()) == []
    folder.rmdir()
    elsewhere.rename(folder)
    deployed.start()
    _assert_comes_back(deployed, made)
    assert deployed.stop() == 0


def test_a_small_budget_thins_points_and_every_commit_still_comes_back(deployed: Deployment) -> None:
    report = deployed.ask("restore", "--to-xid", str(_settled_commit(deployed)), "--name", "pin")
    pinned = report["base"]
    made = _commit(deployed, _BUDGET * 2)
    deployed.settle()
    deployed.wait_for(lambda: deployed.status()["space"]["snapshots"] <= _BUDGET * 0.9, "room made")
    expired = {point["number"] for point in deployed.ask("list", "--state", "expired", "--limit", "500")}
    assert len(expired) > _BUDGET / 2
    assert pinned not in expired, "a clone hangs on it"
    held = judge.read(deployed).commits
    thinned = [
        judge.xid(record) for number in sorted(expired) for record in held.get(number, []) if judge.xid(record) in made
    ]
    assert len(thinned) >= 2
    for xid in thinned[:: max(1, len(thinned) // 3)]:
        _assert_comes_back(deployed, xid)
    assert _holds(report["conninfo"])
    deployed.trigpoint("clones", "drop", "--yes", "pin")
    assert _oldest_segment(deployed) <= min(_log_from(point) for point in _sealed(deployed))
    assert deployed.stop() == 0
    judge.assert_nothing_is_left_over(deployed, judge.read(deployed))


def _settled_commit(deployed: Deployment) -> int:
    made = _commit(deployed)[0]
    deployed.settle()
    return made


def _oldest_segment(deployed: Deployment) -> int:
    names = sorted(
        file.name[16:24] for file in _journal(deployed).iterdir() if len(file.name.removesuffix(".partial")) == 24
    )
    return int(names[0], 16) << 20


def _log_from(point: dict[str, Any]) -> int:
    return judge.position(point["redo"] or point["floor"]).at


# --------------------------------------------------------------------------------------------------------- agent


@contextlib.contextmanager
def _with_files(files: Path) -> Iterator[Deployment]:
    """A service that protects a second volume too, on which another program keeps files."""
    extra = f'{_QUICK}[[volumes]]\nname = "files"\npath = "{files}"\n'
    with deployment(15, "directory", extra=extra) as found:
        found.cluster.sql(judge.TRUTH_TABLE)
        found.start()
        yield found


def test_an_error_of_the_disk_poisons_its_volume_over_restarts_until_an_operator_clears_it() -> None:
    with failing_volume() as disk, _with_files(disk.mount) as deployed:
        before = len(judge.read(deployed).points)
        lost = disk.overflow()
        made: list[int] = []
        for _ in range(2):
            made += _commit(deployed)
            deployed.wait_for(lambda: any("is poisoned" in one for one in deployed.status()["troubles"]), "the trouble")
            assert [point for point in judge.read(deployed).points[before:] if point.state is State.SEALED] == []
            assert deployed.stop() == 0
            deployed.start(wait=False)
            deployed.wait_for(deployed.status, "a service that answers")
        said = deployed.log.read_text()
        # the last error that the kernel noted: of the data the disk's own, of a block of metadata this one
        assert re.search(r"write-back on \S+ failed: (Input/output error|No space left on device)", said)
        assert "trigpoint clear" in said
        assert deployed.stop() == 0
        disk.repair()
        lost.unlink()
        deployed.trigpoint("clear", "files")
        deployed.start()
        deployed.settle()
        outcomes = judge.read(deployed).outcomes
        assert [outcomes[xid] for xid in made] == [1, 1]
        assert deployed.stop() == 0
