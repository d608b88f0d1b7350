"""A restore in place says before what it would lose and be refused for, and takes a clone that is there already."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures.postgres import free_port, running_cluster
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import plain_folder
from trigger.errors import ConfigError, PreflightError, RestoreError

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

TIMES = "SELECT n, pg_xact_commit_timestamp(xmin) FROM paid WHERE n <= 2 ORDER BY n"
SETTLED = 1
"""How many commits `settle` makes itself."""
APART = ("unshare", "--pid", "--fork", "--mount-proc")
"""What lets a program see no process but its own, as in a container."""


def pay(here: Deployment, *numbers: int) -> str:
    """Commit one payment after the other; gives the transaction id of the last."""
    for number in numbers:
        ((xid,),) = here.cluster.sql(f"INSERT INTO paid VALUES ({number}) RETURNING pg_current_xact_id()::text")
    return str(xid)


def held(conninfo: str) -> list[int]:
    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        return [row[0] for row in connection.execute("SELECT n FROM paid ORDER BY n")]


def stop(here: Deployment) -> None:
    assert here.stop() == 0
    here.cluster.stop()


def refused(here: Deployment, *arguments: str) -> str:
    """Give what a command is refused with."""
    done = here.trigpoint(*arguments, check=False)
    assert done.returncode == RestoreError.exit_code, done.stderr
    return " ".join(f"{done.stdout} {done.stderr}".split())


def planned(here: Deployment, *target: str) -> dict[str, Any]:
    """Give what a restore in place would mean, whether it would be refused or not."""
    done = here.trigpoint("restore", "--in-place", "--dry-run", "--json", *target, check=False)
    found = dict(json.loads(done.stdout))
    assert (done.returncode == 0) is (not found["refused"]), done.stderr
    return found


@contextmanager
def a_bank(major: int, storage: str) -> Iterator[Deployment]:
    with deployment(major, storage, track_commit_timestamp="on") as here:
        here.cluster.sql("CREATE TABLE paid (n int PRIMARY KEY)")
        here.start()
        yield here


@pytest.mark.parametrize("storage", ["btrfs", "directory"])
def test_what_would_be_lost_and_all_it_would_be_refused_for_is_said_before_anything_is_done(storage: str) -> None:
    with a_bank(15, storage) as here:
        wanted = pay(here, 1, 2)
        pay(here, 3, 4, 5)
        here.cluster.sql("CREATE TABLE unseen ()")
        here.settle()
        found = planned(here, "--to-xid", wanted)
        said = " ".join(finding["message"] for finding in found["refused"])
        assert f"the server in {here.cluster.data} runs" in said
        assert here.process is not None
        assert f"the service works in {here.state} (process {here.process.pid})" in said
        assert found["losses"]["commits"] == 3 + SETTLED
        assert found["base"]
        stop(here)
        found = planned(here, "--to-xid", wanted)
        assert found["refused"] == []
        assert planned(here, "--before-xid", wanted)["losses"]["commits"] == 4 + SETTLED
        assert planned(here, "--to-latest")["losses"]["commits"] == 0
        words = here.trigpoint("restore", "--to-xid", wanted, "--in-place", "--dry-run").stdout
        assert f"{3 + SETTLED} commits that the catalog knows will be lost" in words
        assert f"the log that is kept goes to {found['losses']['log_end']}" in words
        assert found["losses"]["log_end"] > found["losses"]["behind"]
        assert here.ask("clones") == []
        done = here.trigpoint("restore", "--to-xid", wanted, "--in-place", "--yes")
        assert f"{3 + SETTLED} commits that the catalog knows will be lost" in done.stderr
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2]


@contextmanager
def promoted_in_place(here: Deployment, kept: Path) -> Iterator[str]:
    """Put a standby of the old state, which took over, where production lies; gives its history, of the same number."""
    data = here.cluster.data
    data.rename(f"{data}.mine")
    subprocess.run(["cp", "-a", kept, data], check=True)
    (data / "standby.signal").touch()
    here.cluster.start()
    here.cluster.run("pg_ctl", "-D", data, "-w", "promote")
    here.cluster.sql("CHECKPOINT")
    ((history,),) = here.cluster.sql(
        "SELECT concat(system_identifier, '/', timeline_id) FROM pg_control_system(), pg_control_checkpoint()"
    )
    here.cluster.stop()
    yield str(history)
    shutil.rmtree(data)
    Path(f"{data}.mine").rename(data)


@pytest.mark.parametrize("major", [15, 18])
def test_a_clone_that_was_proven_while_production_ran_takes_its_place_and_is_undone(major: int) -> None:
    with a_bank(major, "btrfs") as here:
        wanted = pay(here, 1, 2)
        pay(here, 3)
        here.settle()
        times = here.cluster.sql(TIMES)
        report = here.ask("restore", "--to-xid", wanted, "--name", "early")
        here.ask("restore", "--to-xid", wanted, "--name", "spare")
        pay(here, 4)
        here.settle()
        with psycopg.connect(f"{report['conninfo']} dbname=postgres", autocommit=True) as connection:
            connection.execute("INSERT INTO paid VALUES (100)")
        put = ("restore", "--in-place", "--from-clone", "early")
        assert f"the server in {here.cluster.data} runs" in refused(here, *put, "--dry-run")
        stop(here)
        words = here.trigpoint(*put, "--dry-run").stdout
        assert f"{2 + 2 * SETTLED} commits that the catalog knows will be lost" in words
        assert "transactions were begun in the clone itself since" in words
        assert held(report["conninfo"]) == [1, 2, 100], "nothing has happened to it"
        swap = here.ask(*put, "--yes")["swap"]
        assert [clone["name"] for clone in here.ask("clones")] == ["spare"]
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2, 100]
        assert here.cluster.sql(TIMES) == times
        assert here.cluster.sql("SHOW port") == [(str(here.cluster.port),)]
        here.start()
        pay(here, 5)
        here.settle()
        assert here.ask("verify")["passed"]
        stop(here)
        other = refused(here, "restore", "--in-place", "--from-clone", "spare", "--yes")
        assert "production has been there since the clone was made" in other
        assert here.trigpoint("restore", "--undo", "last", check=False).returncode == ConfigError.exit_code, "unasked"
        with promoted_in_place(here, Path(swap["places"][0]["kept"])) as other:
            assert "stands there no more" in here.trigpoint("clones").stderr
            assert swap["lineage"].startswith(f"{other}, which left"), "both took the same number"
            undone = refused(here, "restore", "--undo", "last", "--yes")
            assert f"not what the restore in place {swap['name']}" in undone
            assert swap["lineage"] in undone
            assert here.ask("aside")[0]["undo"] == ""
        assert "stands in place of production" in here.trigpoint("clones").stderr
        here.trigpoint("restore", "--undo", "last", "--yes")
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2, 3, 4]
        (left,) = here.ask("aside")
        assert (left["name"], left["kind"], left["target"]) == (swap["name"], "restored", swap["target"])
        assert left["bytes"] > 1 << 20
        here.start()
        here.trigpoint("aside", "drop", "--yes", swap["name"])
        assert here.ask("aside") == []
        assert sorted(path.name for path in here.root.iterdir()) == ["pg", "snapshots"]
        assert held(here.cluster.conninfo) == [1, 2, 3, 4]


def test_what_lies_aside_is_not_removed_while_a_server_works_in_it_or_a_restore_in_place_needs_it() -> None:
    with a_bank(15, "directory") as here:
        wanted = pay(here, 1, 2)
        pay(here, 3)
        here.settle()
        assert here.stop() == 0
        here.cluster.kill()
        leftover = here.cluster.data / "postmaster.pid"
        leftover.write_text(f"99999999\n{here.cluster.data}\n1\n{here.cluster.port}\n{here.cluster.sockets}\n")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRIGPOINT_FAILPOINT", "after-rename:kill@1")
            killed = here.trigpoint("restore", "--to-xid", wanted, "--in-place", "--yes", check=False)
        assert killed.returncode == -signal.SIGKILL
        (left,) = here.ask("aside")
        assert "was cut off and needs it" in refused(here, "aside", "drop", "--yes", left["name"])
        here.trigpoint("restore", "--resume", "last")
        (old,) = (Path(path) for path in left["paths"])
        (old / "postmaster.pid").unlink()
        here.cluster.run("pg_ctl", "-D", old, "-l", here.cluster.log, "-o", f"-p {free_port()}", "-w", "start")
        assert f"the server in {old} runs" in refused(here, "aside", "drop", "--yes", left["name"])
        here.cluster.run("pg_ctl", "-D", old, "-w", "stop")
        here.cluster.run("pg_ctl", "-D", old, "-l", here.cluster.log, "-w", "start")
        astray = here.trigpoint("aside", check=False)
        assert astray.returncode == PreflightError.exit_code, "what answers at the connection is not what is protected"
        here.cluster.run("pg_ctl", "-D", old, "-w", "stop")
        assert here.ask("aside"), "where production lies was not forgotten for it"
        (old / "postmaster.pid").write_text(f"99999999\n{here.cluster.data}\n1\n{here.cluster.port}\n\n127.0.0.1\n")
        here.cluster.start()
        here.trigpoint("aside", "drop", "--yes", left["name"])  # production answers where its leftover says
        assert not old.exists()
        assert held(here.cluster.conninfo) == [1, 2]


def test_a_clone_that_was_killed_on_its_way_into_the_place_is_put_there_by_a_second_try() -> None:
    with a_bank(16, "directory") as here:
        wanted = pay(here, 1, 2)
        pay(here, 3)
        here.settle()
        here.ask("restore", "--to-xid", wanted, "--name", "early")
        here.trigpoint("clones", "stop", "early")
        stop(here)
        put = ("restore", "--in-place", "--from-clone", "early", "--yes")
        for place in ("after-release", "after-rename"):
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("TRIGPOINT_FAILPOINT", f"{place}:kill@1")
                assert here.trigpoint(*put, check=False).returncode == -signal.SIGKILL
        assert "was cut off" in refused(here, *put)
        here.trigpoint("restore", "--resume", "last")
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2]


def test_beside_undo_and_resume_a_dry_run_renames_nothing_and_says_what_would_go_where() -> None:
    with a_bank(15, "directory") as here:
        wanted = pay(here, 1, 2)
        pay(here, 3)
        here.settle()
        stop(here)
        put, data = ("restore", "--in-place", "--to-xid", wanted, "--yes"), str(here.cluster.data)
        (place,) = here.ask(*put)["swap"]["places"]
        taken_back = [(data, place["restored"]), (place["kept"], data)]
        before = sorted(here.root.iterdir())
        words = here.trigpoint("restore", "--undo", "last", "--dry-run").stdout
        assert [f"rename    {one} to {other}" in words for one, other in taken_back] == [True, True]
        planned = here.ask("restore", "--undo", "last", "--dry-run", "--yes")
        assert [tuple(one.values()) for one in planned["renames"]] == taken_back
        assert planned["refused"] == []
        here.cluster.start()
        assert f"the server in {data} runs" in refused(here, "restore", "--undo", "last", "--dry-run", "--yes")
        here.cluster.stop()
        unasked = here.trigpoint("restore", "--undo", "last", check=False)
        assert unasked.returncode == ConfigError.exit_code
        assert "--dry-run says what would go where" in unasked.stderr
        assert sorted(here.root.iterdir()) == before
        here.trigpoint("restore", "--undo", "last", "--yes")
        assert "taken back already" in refused(here, "restore", "--undo", "last", "--dry-run")
        here.trigpoint("aside", "drop", "--yes", planned["swap"]["name"])
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRIGPOINT_FAILPOINT", "after-rename:kill@1")
            assert here.trigpoint(*put, check=False).returncode == -signal.SIGKILL
        before = sorted(here.root.iterdir())
        (left,) = here.ask("restore", "--resume", "last", "--dry-run")["renames"]
        assert left["destination"] == data
        assert len(here.ask("restore", "--undo", "last", "--dry-run")["renames"]) == 1
        assert sorted(here.root.iterdir()) == before
        here.trigpoint("restore", "--resume", "last")
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2]


@contextmanager
def served_apart(here: Deployment) -> Iterator[None]:
    """Let the server run where it sees no process but its own, as in a container, until the block ends."""
    uid, gid = here.cluster.owner
    as_owner = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups")
    server = (here.cluster.programs.path("postgres"), "-D", str(here.cluster.data))
    with (here.root / "server.log").open("w") as log:
        process = subprocess.Popen([*APART, *as_owner, *server], stdout=log, stderr=log, cwd="/")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                here.cluster.sql("SELECT 1")
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield
    finally:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        for pid in map(int, children.stdout.split()):
            os.kill(pid, signal.SIGINT)
        process.wait(60)


def test_a_server_whose_processes_are_not_seen_is_not_taken_away_from() -> None:
    with a_bank(18, "directory") as here:
        wanted = pay(here, 1, 2)
        pay(here, 3)
        here.settle()
        here.ask("restore", "--to-xid", wanted, "--name", "early")
        assert here.stop() == 0
        by_target = ("restore", "--to-xid", wanted, "--in-place", "--yes")
        by_clone = ("restore", "--in-place", "--from-clone", "early", "--yes")
        here.before = APART
        for command in (by_target, by_clone):
            assert "may run where its processes are not seen" in refused(here, *command)
        here.before = ()
        here.cluster.stop()
        with served_apart(here):
            for command in (by_target, by_clone):
                assert f"the server in {here.cluster.data} runs" in refused(here, *command)
            here.before = APART
            assert "may run where its processes are not seen" in refused(here, *by_target)
            here.before = ()
            assert held(here.cluster.conninfo) == [1, 2, 3]
        (here.cluster.data / "postmaster.pid").write_text(f"99999999\n{here.cluster.data}\n1\n{here.cluster.port}\n")
        swap = here.ask(*by_target)["swap"]  # the lock file of the dead, at whose place nobody answers, is no server
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2]
        undone = refused(here, "restore", "--undo", swap["name"], "--yes")
        assert f"the server in {here.cluster.data} runs" in undone


def test_the_publisher_of_a_subscription_is_said_to_be_ahead_of_what_was_put_back_and_is() -> None:
    with plain_folder() as folder, running_cluster(15, folder / "publisher") as publisher, a_bank(15, "btrfs") as here:
        publisher.sql("CREATE TABLE paid (n int PRIMARY KEY); CREATE PUBLICATION feed FOR TABLE paid")
        here.cluster.sql(f"CREATE SUBSCRIPTION feed CONNECTION '{publisher.conninfo} dbname=postgres' PUBLICATION feed")

        def fed(*numbers: int) -> str:
            publisher.sql(f"INSERT INTO paid VALUES {', '.join(f'({number})' for number in numbers)}")
            question = f"SELECT xmin::text FROM paid WHERE n = {numbers[-1]}"
            here.wait_for(lambda: here.cluster.sql(question), "what was published")
            return str(here.cluster.sql(question)[0][0])

        state = "SELECT srsubstate::text FROM pg_subscription_rel"
        here.wait_for(lambda: here.cluster.sql(state) == [("r",)], "the first copy to be over")
        wanted = fed(1, 2)
        fed(3)
        here.settle()
        sent = publisher.sql("SELECT pg_current_wal_lsn()::text")[0][0]
        taken = f"SELECT confirmed_flush_lsn >= '{sent}' FROM pg_replication_slots"
        here.wait_for(lambda: publisher.sql(taken) == [(True,)], "the publisher to know what was taken")
        stop(here)
        done = here.trigpoint("restore", "--to-xid", wanted, "--in-place", "--yes")
        words = " ".join(done.stdout.split())
        assert (
            "feed in database postgres (slot feed on its publisher); in production's place each has to be made" in words
        )
        here.cluster.start()
        assert held(here.cluster.conninfo) == [1, 2]
        here.cluster.sql("ALTER SUBSCRIPTION feed SET (slot_name = 'feed')")
        here.cluster.sql("ALTER SUBSCRIPTION feed ENABLE")
        fed(4)
        assert held(here.cluster.conninfo) == [1, 2, 4], "as was said"
