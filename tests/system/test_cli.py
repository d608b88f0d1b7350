"""The command line on a real cluster, from `init` to `catalog rebuild`, as a person or a script types it."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import server_owner
from tests.fixtures.postgres import running_cluster
from tests.fixtures.preloaded import CHECKOUT
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import loop_volume, plain_folder
from trigger.cli.json_reference import STATUS
from trigger.errors import PreflightError, StorageError

pytestmark = pytest.mark.server

RULES = """
[points]
min_interval_seconds = 0.3
catch_all_seconds = 3600
[[rules]]
name = "money"
tables = ["public.account"]
[[rules]]
name = "marked"
markers = ["close-*"]
"""


@pytest.fixture(scope="module")
def bank() -> Iterator[Deployment]:
    """A cluster with a service that has protected seven commits of the bank and one that is marked."""
    with deployment(15, "directory", extra=RULES) as deployed:
        deployed.cluster.sql("CREATE TABLE account (id int PRIMARY KEY, balance int); CREATE TABLE noise (id int)")
        deployed.start()
        for number in range(7):
            deployed.cluster.sql(f"INSERT INTO account VALUES ({number}, 100)")
            deployed.cluster.sql(f"INSERT INTO noise VALUES ({number})")
        deployed.cluster.sql("SELECT pg_logical_emit_message(true, 'trigpoint', 'close-of-day')")
        deployed.settle()
        yield deployed


def xid_of(deployed: Deployment, number: int) -> int:
    return int(deployed.cluster.sql(f"SELECT xmin::text FROM account WHERE id = {number}")[0][0])


def fails(deployed: Deployment, *command: str) -> subprocess.CompletedProcess[str]:
    done = deployed.trigpoint(*command, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done


# ------------------------------------------------------------------------------------------ before the first run


def test_init_writes_a_configuration_that_every_check_accepts(tmp_path: Path) -> None:
    with plain_folder() as folder, running_cluster(15, folder / "data") as cluster:
        written = folder / "trigpoint.toml"
        command = ("init", "--conninfo", cluster.conninfo, "--state-folder", str(folder / "state"), "-o", str(written))
        cluster.sql("CREATE DATABASE shop")
        done = typed(*command)
        assert done.returncode == 0, done.stderr
        assert "trigpoint check" in done.stdout
        assert written.stat().st_mode & 0o777 == 0o600
        assert 'databases = ["shop"]' in written.read_text()
        assert typed("config", "check", "-c", str(written)).returncode == 0
        checked = typed("check", "-c", str(written), "--json")
        assert checked.returncode == 0, checked.stdout
        assert {finding["severity"] for finding in json.loads(checked.stdout)} <= {"ok", "note", "warning"}
        assert typed(*command).returncode == 2
        assert typed(*command, "--force", "--database", "postgres").returncode == 0
        assert 'databases = ["postgres"]' in written.read_text()
        missing = typed(*command, "--force", "--database", "nowhere")
        assert missing.returncode == 2
        assert "there are: postgres, shop" in missing.stderr
        assert 'databases = ["shop"]' in json.loads(typed(*command[:-1], "-", "--json").stdout)["text"]


@pytest.mark.volume
def test_init_finds_a_btrfs_subvolume_and_tablespaces_outside() -> None:
    with loop_volume("btrfs") as mount, plain_folder() as folder:
        subprocess.run(["btrfs", "subvolume", "create", str(mount / "data")], check=True, capture_output=True)
        with running_cluster(15, mount / "data") as cluster:
            command = ("init", "--conninfo", cluster.conninfo, "--state-folder", str(folder / "state"), "-o", "-")
            assert f'driver = "btrfs"\n' in (text := typed(*command).stdout)  # noqa: F541
            assert f'folder = "{mount}/trigpoint-state"' in text, "called like the state folder"
            space = folder / "space"
            space.mkdir()
            os.chown(space, *cluster.owner)
            cluster.sql(f"CREATE TABLESPACE elsewhere LOCATION '{space}'")
            text = typed(*command).stdout
            assert 'driver = "directory"' in text
            assert f'path = "{space}"' in text
            cluster.sql("DROP TABLESPACE elsewhere")


def test_check_refuses_what_would_lose_commits_with_its_remedy() -> None:
    with deployment(15, "directory", fsync="off") as deployed:
        done = fails(deployed, "check")
        assert done.returncode == 3
        assert "refused  fsync: fsync is off" in done.stdout
        assert "-> ALTER SYSTEM SET fsync = on" in done.stdout
        assert "refused: the service would not start" in done.stdout
        started = fails(deployed, "run")
        assert started.returncode == 3
        assert "error: fsync" in started.stderr


def test_check_refuses_a_state_folder_that_a_link_puts_on_the_protected_volume() -> None:
    with deployment(15, "directory") as deployed:
        inside = deployed.cluster.data / "sneaky"
        inside.mkdir(mode=0o700)
        (deployed.state.parent / "link").symlink_to(inside)
        text = deployed.config.read_text().replace(f'"{deployed.state}"', f'"{deployed.state.parent}/link"', 1)
        deployed.config.write_text(text)
        done = fails(deployed, "check")
        assert done.returncode == 3
        assert "lies on the protected volume data" in done.stdout


def test_explain_says_what_is_not_seen(bank: Deployment) -> None:
    done = bank.trigpoint("explain")
    assert "DDL" in done.stdout
    assert {"note", "ok"} <= {finding["severity"] for finding in bank.ask("explain")}


# ------------------------------------------------------------------------------------------- looking at a service


def test_status_list_show_and_find_agree(bank: Deployment) -> None:
    status, points = bank.ask("status"), bank.ask("list")
    assert set(status) == set(STATUS)
    assert status["last_point"] == points[0]["number"]
    assert all(status["commits_by_rule"][rule] >= count for rule, count in {"money": 7, "marked": 1, "": 7}.items())
    (where,) = bank.ask("find", "--xid", str(xid_of(bank, 4)))
    assert where["where"] in ("point", "interval")
    shown = bank.ask("show", str(where["point"]))
    assert shown["point"]["number"] == where["point"]
    assert where["record"] in shown["commits"]
    (marked,) = bank.ask("find", "--marker", "close-of-day")
    assert marked["record"]["markers"] == ["close-of-day"]
    assert bank.ask("find", "--lsn", where["record"]["start"])[0]["record"] == where["record"]
    for ref in (shown["point"]["id"], f"trg-{shown['point']['id']}"):
        assert bank.ask("show", ref) == shown


def test_a_pipe_gets_plain_lines(bank: Deployment) -> None:
    lines = bank.trigpoint("list").stdout.splitlines()
    assert lines[0].split()[:4] == ["NUMBER", "STATE", "CAUSE", "OPENED"]
    assert all("\x1b" not in line and "│" not in line for line in lines)
    assert bank.trigpoint("list", "--limit", "1").stdout.count("\n") == 2
    assert bank.trigpoint("list", "--state", "failed").stdout == "there are no recovery points\n"
    assert bank.trigpoint("list", "--gaps").stdout == "there are no gaps\n"


def test_what_is_not_known_is_exit_code_11(bank: Deployment) -> None:
    done = fails(bank, "find", "--xid", "4000000")
    assert done.returncode == 11
    assert "was not committed" in done.stdout
    noise = int(bank.cluster.sql("SELECT xmin::text FROM noise LIMIT 1")[0][0])
    assert "lies in the log" in bank.trigpoint("find", "--xid", str(noise)).stdout
    assert fails(bank, "show", "999").returncode == 11
    assert fails(bank, "verify", "999").returncode == 11


def test_a_point_on_demand_carries_its_note(bank: Deployment) -> None:
    taken = bank.ask("point", "--note", "before the migration")
    assert (taken["state"], taken["cause"], taken["note"]) == ("sealed", "demand", "before the migration")
    assert bank.ask("list", "--limit", "1")[0]["id"] == taken["id"]


def test_only_one_service_works_in_a_state_folder(bank: Deployment) -> None:
    for command in (("run",), ("reconcile",), ("catalog", "rebuild")):
        done = fails(bank, *command)
        assert done.returncode == 2
        assert "the service works in" in done.stderr


def test_a_second_service_keeps_its_hands_off_the_storage_of_the_first(bank: Deployment, tmp_path: Path) -> None:
    before = bank.ask("list")
    other = tmp_path / "other.toml"
    other.write_text(bank.config.read_text().replace(str(bank.state), str(tmp_path / "state")))
    for command in (("run",), ("point",), ("reconcile",), ("catalog", "rebuild")):
        done = fails(bank, *command, "--config", str(other))
        refused = PreflightError if command[0] in {"run", "point"} else StorageError  # a start looks at all first
        assert done.returncode == refused.exit_code, done.stderr
        assert "another trigpoint makes points in" in " ".join(done.stderr.split())
    assert not list((tmp_path / "state").glob("catalog.sqlite.[!r]*")), "but for the reserve, which a start made"
    assert bank.ask("list") == before
    assert bank.ask("point")["state"] == "sealed"


def test_rules_are_tried_on_what_the_running_service_saw_last(bank: Deployment, tmp_path: Path) -> None:
    before = bank.ask("rules", "test")
    assert before["by_rule"]["money"] >= 7
    assert before["passed_over"] >= 7
    more = "DO $$ BEGIN FOR i IN 1..300 LOOP INSERT INTO noise VALUES (i); COMMIT; END LOOP; END $$"
    bank.cluster.sql(more)  # more commits than one answer of the service holds
    wait_until(lambda: bank.ask("rules", "test")["seen"] == before["seen"] + 300, "the commits that were just made")
    other = tmp_path / "other.toml"
    other.write_text(bank.config.read_text().replace("public.account", "public.noise"))
    record = tmp_path / "seen.jsonl"
    answer = bank.ask("rules", "test", "--last", "30", "--record", str(record), "--config", str(other))
    assert 307 <= answer["by_rule"]["money"] <= before["passed_over"] + 300
    ends = [Lsn.parse(row["end"]) for row in answer["commits"]]
    assert ends == sorted(set(ends))
    assert bank.ask("rules", "test", "--file", str(record), "--config", str(other)) == answer
    assert bank.ask("rules", "test", "--last", "0.01")["seen"] <= 300
    assert bank.ask("status")["commits_by_rule"][""] >= 307


def test_what_pgoutput_shows_can_be_watched_recorded_and_tried(bank: Deployment, tmp_path: Path) -> None:
    record = tmp_path / "seen.jsonl"
    watching = started(bank, "rules", "test", "--watch", "0.08", "--record", str(record), "--json")
    wait_until(lambda: slots(bank, "trigpoint_try_postgres"), "the slot of the watcher")
    for number in range(3):
        bank.cluster.sql(f"INSERT INTO account VALUES ({100 + number}, 1)")
        bank.cluster.sql("INSERT INTO noise VALUES (1)")
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == 0, err
    answer = json.loads(out)
    assert answer["seen"] == len(record.read_text().splitlines())
    assert answer["by_rule"] == {"money": 3}
    assert answer["passed_over"] == 3
    assert bank.ask("rules", "test", "--file", str(record)) == answer
    assert not slots(bank, "trigpoint_try_postgres")
    assert not bank.cluster.sql("SELECT 1 FROM pg_publication WHERE pubname LIKE 'trigpoint_try%'")


def test_ctrl_c_ends_a_watch_with_130_and_leaves_no_slot(bank: Deployment) -> None:
    watching = started(bank, "rules", "test", "--watch", "10")
    wait_until(lambda: slots(bank, "trigpoint_try_postgres"), "the slot of the watcher")
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert "Traceback" not in err
    assert not slots(bank, "trigpoint_try_postgres")


# ------------------------------------------------------------------------------------------------- bringing back


def test_a_state_is_planned_restored_listed_and_dropped(bank: Deployment) -> None:
    xid = xid_of(bank, 5)
    plan = bank.trigpoint("restore", "--to-xid", str(xid), "--dry-run").stdout
    assert f"commit {xid} of postgres" in plan
    assert bank.ask("clones", "list") == []
    report = bank.ask("restore", "--to-xid", str(xid), "--name", "look")
    assert report["name"] == "look"
    assert all(held for _, held, _ in report["checks"])
    assert count_in(report["conninfo"]) == 6
    assert [clone["state"] for clone in bank.ask("clones")] == ["running"]
    again = fails(bank, "restore", "--to-xid", str(xid), "--name", "look")
    assert again.returncode == 9
    assert "there is a clone look already" in again.stderr
    assert bank.trigpoint("clones", "drop", "--yes", "look").stdout == "dropped look\n"
    assert bank.ask("clones", "list") == []
    assert fails(bank, "clones", "drop", "--yes", "look").returncode == 9


def test_before_a_transaction_is_the_state_without_it(bank: Deployment) -> None:
    report = bank.ask("restore", "--before-xid", str(xid_of(bank, 5)), "--name", "before")
    assert count_in(report["conninfo"]) == 5
    bank.trigpoint("clones", "drop", "--yes", "before")


def test_a_target_that_cannot_be_reached_is_exit_code_9_with_the_reason(bank: Deployment) -> None:
    for target in (("--to-lsn", "0/28"), ("--to-xid", "4000000000"), ("--to-marker", "nothing")):
        done = fails(bank, "restore", *target)
        assert done.returncode in (8, 9), done.stderr
        assert done.stderr.startswith("error: ")


def test_ctrl_c_during_a_restore_leaves_no_clone(bank: Deployment) -> None:
    restoring = started(bank, "restore", "--to-xid", str(xid_of(bank, 3)), "--name", "cut")
    wait_until((bank.state / "clones" / "cut.intent").exists, "the clone that is being made")
    restoring.send_signal(signal.SIGINT)
    _, err = restoring.communicate(timeout=60)
    assert restoring.returncode == 130, err
    assert bank.ask("clones", "list") == []


def test_verify_stores_its_result_with_the_point(bank: Deployment) -> None:
    result = bank.ask("verify")
    assert result["passed"], result["checks"]
    assert bank.ask("list", "--limit", "1")[0]["verification"]["passed"]
    assert "passed" in bank.trigpoint("list", "--limit", "1").stdout


def test_a_restore_in_place_keeps_the_old_state_and_is_undone() -> None:
    with deployment(15, "directory", extra=RULES) as deployed:
        cluster = deployed.cluster
        cluster.sql("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        deployed.start()
        for number in range(4):
            cluster.sql(f"INSERT INTO account VALUES ({number}, 100)")
        deployed.settle()
        xid = str(xid_of(deployed, 2))
        refused = fails(deployed, "restore", "--before-xid", xid, "--in-place")
        assert refused.returncode == 2
        assert "give --yes" in refused.stderr
        served = fails(deployed, "restore", "--before-xid", xid, "--in-place", "--yes")
        assert served.returncode == 2
        assert "the service works in" in served.stderr
        assert deployed.stop() == 0
        running = fails(deployed, "restore", "--before-xid", xid, "--in-place", "--yes")
        assert running.returncode == 9
        assert "stop it first" in running.stderr
        cluster.stop()
        swap = deployed.ask("restore", "--before-xid", xid, "--in-place", "--yes")["swap"]
        cluster.start()
        assert cluster.sql("SELECT count(*) FROM account") == [(2,)]
        cluster.stop()
        assert f"trigpoint restore --undo {swap['name']}" in deployed.trigpoint("clones").stderr
        assert fails(deployed, "restore", "--undo", "20000101T000000Z", "--yes").returncode == 9
        done = deployed.trigpoint("restore", "--undo", "last", "--yes")
        assert f"{cluster.data} is as it was before" in done.stdout
        assert fails(deployed, "restore", "--undo", swap["name"], "--yes").returncode == 9
        cluster.start()
        assert cluster.sql("SELECT count(*) FROM account") == [(4,)]


# -------------------------------------------------------------------------------------------- without the service


def test_a_catalog_that_is_lost_comes_back_from_the_tags() -> None:
    with deployment(15, "directory", extra=RULES) as deployed:
        deployed.cluster.sql("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        first = deployed.ask("point", "--note", "without a service")
        assert (first["state"], first["note"]) == ("sealed", "without a service")
        deployed.start()
        for number in range(3):
            deployed.cluster.sql(f"INSERT INTO account VALUES ({number}, 100)")
        deployed.settle()
        assert deployed.stop() == 0
        before = deployed.ask("list")
        rebuilt = deployed.ask("catalog", "rebuild")
        assert rebuilt["changed_points"] == {}
        assert rebuilt["lost_points"] == []
        assert Path(rebuilt["set_aside"]).exists()
        assert deployed.ask("list") == before
        for path in deployed.state.glob("catalog.sqlite*"):
            path.unlink()
        assert fails(deployed, "list").returncode == 7
        assert deployed.ask("catalog", "rebuild")["set_aside"] is None
        assert deployed.ask("list") == before
        (deployed.state / "catalog.sqlite").write_bytes(b"not a catalog at all" * 1000)
        assert "not a catalog, or damaged" in fails(deployed, "list").stderr
        assert "not a catalog" in deployed.ask("catalog", "rebuild")["unreadable"]
        assert deployed.ask("list") == before
        assert deployed.trigpoint("reconcile").stdout.startswith("reconciled  catalog and storage agree")


def test_what_is_given_up_is_not_restored_any_more_and_its_log_goes_too() -> None:
    with deployment(15, "directory", extra=RULES, initdb=["--wal-segsize=1"]) as deployed:
        deployed.cluster.sql("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        deployed.start()
        xids, points = [], []
        for number in range(3):
            rows = deployed.cluster.sql(f"INSERT INTO account VALUES ({number}, 1) RETURNING xmin::text")
            deployed.settle()
            xids.append(rows[0][0])
            points.append(deployed.ask("point")["number"])
        said = deployed.ask("expire", str(points[1]), "--dry-run")
        assert points[0] in said["points"]
        assert points[1] not in said["points"]
        refused = fails(deployed, "expire", str(points[1]))
        assert refused.returncode == 2
        assert "--yes" in refused.stderr
        done = deployed.ask("expire", str(points[1]), "--yes")
        assert done["points"] == said["points"]
        assert done["segments"] > 0
        assert fails(deployed, "restore", "--to-xid", xids[0]).returncode == 9
        assert deployed.ask("find", "--xid", xids[0])[0]["record"]["xid"] == int(xids[0])
        deployed.ask("restore", "--to-xid", xids[2], "--name", "back")
        deployed.trigpoint("clones", "drop", "--yes", "back")
        assert deployed.status()["journal"] == []
        assert deployed.stop() == 0
        assert deployed.trigpoint("expire", str(points[1]), "--yes").stdout.startswith("expired  no point is older")
        assert fails(deployed, "expire", str(points[0]), "--yes").returncode == 7


def test_sigterm_ends_the_service_in_order_and_systemd_is_told_when_it_is_ready(tmp_path: Path) -> None:
    import socket

    with deployment(15, "directory") as deployed, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        deployed.start({"NOTIFY_SOCKET": str(tmp_path / "notify"), "JOURNAL_STREAM": "8:1"}, wait=False)
        assert systemd.recv(100) == b"READY=1"
        assert deployed.stop(signal.SIGTERM) == 0
        assert all(line.startswith("<") for line in deployed.log.read_text().splitlines())


def test_the_owner_of_the_data_needs_no_root() -> None:
    user = pwd.getpwuid(server_owner()[0]).pw_name
    with deployment(15, "directory") as deployed:
        for folder in (deployed.root, deployed.state.parent):
            os.chown(folder, *deployed.cluster.owner)
        deployed.config.chmod(0o644)
        as_user = ["setpriv", f"--reuid={user}", f"--regid={deployed.cluster.owner[1]}", "--clear-groups"]
        if os.geteuid() != 0:
            as_user = []  # the whole run is without root
        for command in (("check",), ("point",), ("list",)):
            done = subprocess.run(
                [*as_user, sys.executable, "-m", "trigger", *command],
                env=environment(deployed) | {"HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"},
                cwd="/",
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert "sealed" in done.stdout


def environment(deployed: Deployment) -> dict[str, str]:
    return dict(os.environ) | {"TRIGPOINT_CONFIG": str(deployed.config), "PYTHONPATH": str(CHECKOUT)}


def started(deployed: Deployment, *command: str) -> subprocess.Popen[str]:
    """Start a command that Ctrl-C reaches, also where this run is in the background of a shell that ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "trigger", *command],
        env=environment(deployed),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread runs here
    )


def typed(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trigger", *command],
        env=dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def slots(deployed: Deployment, name: str) -> list[Any]:
    return deployed.cluster.sql(f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{name}'")


def count_in(conninfo: str) -> int:
    import psycopg

    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        row = connection.execute("SELECT count(*) FROM account").fetchone()
    assert row is not None
    return int(row[0])


def wait_until(condition: Any, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@pytest.mark.server
@pytest.mark.slow
def test_release_lets_the_server_go_and_keeps_what_can_be_restored() -> None:
    with deployment(16, "directory") as deployed:
        cluster = deployed.cluster
        cluster.sql("CREATE TABLE t (id int PRIMARY KEY)")
        deployed.start()
        xid = cluster.sql("INSERT INTO t VALUES (1) RETURNING pg_current_xact_id()::text")[0][0]
        deployed.settle()
        refused = deployed.trigpoint("release", "--yes", check=False)
        assert refused.returncode == 2
        assert "the service works" in refused.stderr
        deployed.stop()
        dropped = deployed.ask("release", "--yes")["dropped"]
        assert sorted(dropped) == [
            "publication trigpoint in postgres",
            "publication trigpoint_keyed in postgres",
            "slot trigpoint_journal",
            "slot trigpoint_postgres",
        ]
        assert cluster.sql("SELECT count(*) FROM pg_replication_slots")[0][0] == 0
        assert deployed.ask("find", "--xid", xid)
        deployed.start()
        assert [gap["stream"] for gap in deployed.ask("list", "--gaps")] == ["postgres"]
