"""From the running service to restored, proven and put-back states of a real cluster, on both storages."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.fixtures.postgres import free_port
from tests.fixtures.preloaded import CHECKOUT
from tests.fixtures.service import Deployment, deployment
from trigger.config.options import load
from trigger.errors import RestoreError
from trigger.model import from_microseconds
from trigger.restore.inplace import restore_in_place
from trigger.restore.swap import swaps, undo
from trigger.restore.target import Named, resolve
from trigger.service.connect import Parts, connect

pytestmark = [pytest.mark.server, pytest.mark.slow]

COMMITS = 12


@pytest.fixture(scope="module", params=[pytest.param("btrfs", marks=pytest.mark.volume), "directory"])
def bank(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Give a bank of `COMMITS` payments, each with a marker, protected while they were made."""
    with deployment(15, str(request.param)) as here:
        here.cluster.sql("CREATE TABLE paid (n int PRIMARY KEY, xid xid8 DEFAULT pg_current_xact_id())")
        here.start()
        for number in range(COMMITS):
            here.cluster.sql(
                f"BEGIN; INSERT INTO paid VALUES ({number});"
                f" SELECT pg_logical_emit_message(true, 'trigpoint', 'payment-{number}'); COMMIT"
            )
        here.settle()
        yield here


def held(conninfo: str) -> list[int]:
    """Give the numbers of the payments in a clone, or in production."""
    with psycopg.connect(f"{conninfo} dbname=postgres") as connection:
        return [row[0] for row in connection.execute("SELECT n FROM paid ORDER BY n")]


def xid_of(here: Deployment, number: int) -> int:
    return int(here.cluster.sql(f"SELECT xid::text FROM paid WHERE n = {number}")[0][0])


def test_a_payment_comes_back_exactly_by_every_name_it_has(bank: Deployment) -> None:
    newest = bank.ask("list", "--limit", "1")[0]["number"]
    (found,) = bank.ask("find", "--marker", "payment-7")
    assert found["where"] in ("point", "interval")
    named = (
        ("--to-marker=payment-7", 8),
        (f"--to-xid={xid_of(bank, 4)}", 5),
        (f"--to-lsn={found['record']['end']}", 8),
        (f"--to-time={from_microseconds(found['record']['time_us']).isoformat()}", 8),
        (f"--to-time={datetime.now(UTC).isoformat()}", COMMITS),
        (f"--before-xid={xid_of(bank, 9)}", 9),
        (f"--to-point={newest}", COMMITS),
        ("--to-latest", COMMITS),
    )
    for option, count in named:
        began = time.monotonic()
        report = bank.ask("restore", option, "--name", "one")
        seconds = time.monotonic() - began
        assert held(report["conninfo"]) == list(range(count)), option
        assert report["checks"]
        assert all(held_true for _, held_true, _ in report["checks"])
        assert not list((bank.state / "staging").glob("*"))
        bank.trigpoint("clones", "drop", "--yes", "one")
        print(f"{bank.storage} {option}: {seconds:.2f} s, {report['seconds']}")
    assert bank.ask("clones", "list") == []
    assert not list((bank.root / "snapshots" / "clones").glob("*"))
    logs = list((bank.root / "snapshots").glob("trg-*/data/pg_wal"))
    assert logs
    assert (bank.storage == "directory") is not any(list(log.glob("0*")) for log in logs), "a copy holds no log"


def test_a_dry_run_prints_the_plan_or_why_not_and_makes_nothing(bank: Deployment) -> None:
    lines = bank.trigpoint("restore", "--to-marker", "payment-7", "--dry-run").stdout
    assert "point" in lines
    assert "estimate" in lines
    refused = bank.trigpoint("restore", "--to-lsn", "0/1", "--dry-run", check=False)
    assert refused.returncode == 9
    assert "no recovery point is early enough" in " ".join(refused.stderr.split())
    assert bank.ask("clones", "list") == []


def test_a_point_is_verified_in_a_sandbox_that_is_gone_afterwards(bank: Deployment) -> None:
    bank.configure(
        '[[verify.assertions]]\ndatabase = "postgres"\nsql = "select count(*) >= 1 from paid"\nexpect = "t"\n'
    )
    result = bank.ask("verify")
    assert result["passed"], result
    assert any("paid" in what for what, _, _ in result["checks"])
    assert bank.ask("clones", "list") == []
    assert bank.ask("list", "--limit", "1")[0]["verification"]["passed"]


@pytest.mark.parametrize("place", ["after-clone", "after-replay"])
def test_what_a_killed_restore_left_is_removed_by_the_service_with_its_server(bank: Deployment, place: str) -> None:
    kill_restore(bank, place)
    bank.wait_for(lambda: bank.ask("clones", "list") == [], "the removal of what was left")
    assert "removed clone one, which a restore left that was killed" in bank.log.read_text()
    assert not list((bank.state / "staging").glob("*"))
    assert not servers_in(bank.root / "snapshots")


@pytest.mark.volume
def test_what_a_killed_restore_left_stays_while_a_server_works_in_it_that_is_not_ours() -> None:
    with deployment(18) as here:
        here.start()
        here.ask("point")
        assert here.stop() == 0
        kill_restore(here, "after-clone", "--to-latest")
        data = here.root / "snapshots" / "clones" / "one" / "data"
        (data / "postmaster.pid").unlink(missing_ok=True)
        options = f"-c unix_socket_directories={here.cluster.sockets} -c port={free_port()}"
        here.cluster.run("pg_ctl", "-D", data, "-o", options, "-l", here.cluster.sockets / "other.log", "-w", "start")
        here.start()
        here.wait_for(lambda: any("unfinished clone" in why for why in here.status()["troubles"]), "the trouble")
        (left,) = here.ask("clones", "list")
        assert (left["name"], left["state"]) == ("one", "unfinished")
        assert servers_in(here.root / "snapshots")
        here.cluster.run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        here.wait_for(lambda: here.ask("clones", "list") == [], "the removal of what was left")
        here.wait_for(lambda: here.status()["troubles"] == [], "the end of the trouble")


def kill_restore(bank: Deployment, place: str, target: str = "--to-marker=payment-7") -> None:
    """Let a restore be killed on the way."""
    killed = subprocess.run(
        [sys.executable, "-m", "trigger", "restore", target, "--name", "one"],
        env=os.environ
        | {"TRIGPOINT_CONFIG": str(bank.config), "PYTHONPATH": str(CHECKOUT), "TRIGPOINT_FAILPOINT": f"{place}:kill"},
        capture_output=True,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", ["stopped in order", "killed with its socket folder, as by a reboot"])
def test_a_clone_comes_up_again_as_it_was_left(bank: Deployment, how: str) -> None:
    report = bank.ask("restore", "--to-marker", "payment-7", "--name", "one")
    with psycopg.connect(f"{report['conninfo']} dbname=postgres", autocommit=True) as connection:
        connection.execute("INSERT INTO paid VALUES (1000)")
    if how == "stopped in order":
        (clone,) = bank.ask("clones", "stop", "one")
    else:
        pid = int((Path(report["data_directory"]) / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(str(conninfo_to_dict(report["conninfo"])["host"]))
        bank.wait_for(lambda: not servers_in(bank.root / "snapshots"), "the end of the server's processes")
        (clone,) = bank.ask("clones", "list")
    assert (clone["name"], clone["state"]) == ("one", "stopped")
    (clone,) = bank.ask("clones", "start", "one")
    assert clone["state"] == "running"
    assert held(report["conninfo"]) == [*range(8), 1000]
    bank.trigpoint("clones", "drop", "--yes", "one")
    assert not servers_in(bank.root / "snapshots")


def test_a_clone_listens_over_tcp_only_where_it_was_asked_to_and_wants_a_password(bank: Deployment) -> None:
    bank.cluster.sql("CREATE ROLE auditor LOGIN PASSWORD 'seen by this test alone'")
    bank.ask("restore", "--to-point", str(bank.ask("point")["number"]), "--name", "one")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    place = ("clones", "start", "one", "--listen", f"127.0.0.1:{port}")
    refused = bank.trigpoint(*place, check=False)
    assert refused.returncode == RestoreError.exit_code
    assert "or its port is taken" in " ".join(refused.stderr.split())
    assert bank.ask("clones")[0]["state"] == "stopped"
    taken.close()
    (clone,) = bank.ask(*place)
    assert clone["state"] == "running"
    assert held(clone["record"]["conninfo"]) == list(range(COMMITS))
    over_tcp = {"host": "127.0.0.1", "port": port, "dbname": "postgres"}
    with psycopg.connect(**over_tcp, user="auditor", password="seen by this test alone") as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("127.0.0.1",)
    for user, password in (("auditor", "a guess"), ("postgres", ""), ("postgres", "a guess")):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(**over_tcp, user=user, password=password)
    bank.trigpoint("clones", "stop", "one")
    (clone,) = bank.ask("clones", "start", "one")
    assert held(clone["record"]["conninfo"]) == list(range(COMMITS))
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(**over_tcp, user="auditor", password="seen by this test alone")
    bank.trigpoint("clones", "drop", "--yes", "one")
    bank.cluster.sql("DROP ROLE auditor")


def servers_in(folder: Path) -> list[str]:
    """Give the processes whose working directory lies in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            work = (process / "cwd").readlink()
        except OSError:
            continue
        if work.is_relative_to(folder):
            found.append(f"{process.name}: {work}")
    return found


def test_a_points_own_snapshot_is_proven_where_the_restore_needs_an_older_one(bank: Deployment) -> None:
    """While others write, a snapshot holds more than its commit; the log of a bracketed copy always goes on."""
    noise = threading.Event()

    def write() -> None:
        with bank.cluster.connect() as connection:
            while not noise.is_set():
                connection.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 20000))")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        taken = bank.ask("point", "--note", "amid the noise")
        noise.set()
        writer.result(30)
    result = bank.ask("verify", str(taken["number"]))
    assert result["passed"], result
    (own,) = [seen for what, _, seen in result["checks"] if what == "its own snapshot comes up"]
    assert "at or behind its floor" in own
    assert bank.ask("clones", "list") == []


@pytest.mark.volume
def test_a_point_that_was_asked_for_is_that_moment_though_an_older_commit_still_waits_for_its_point() -> None:
    with deployment(18, extra="[points]\nmin_interval_seconds = 600\nmax_delay_seconds = 600\n") as here:
        here.cluster.sql("CREATE TABLE paid (n int PRIMARY KEY)")
        here.start()
        here.cluster.sql("INSERT INTO paid VALUES (1)")
        here.wait_for(lambda: here.status()["pending_commits"] == 1, "the payment in the window")
        here.cluster.sql("SET synchronous_commit = off; CREATE TABLE unseen (n int)")  # no stream shows it
        taken = here.ask("point", "--note", "before the upgrade")
        assert taken["commits"] == 1
        here.cluster.sql("INSERT INTO paid VALUES (2); DROP TABLE unseen")
        report = here.ask("restore", "--to-point", str(taken["number"]), "--name", "one")
        assert held(report["conninfo"]) == [1]
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            assert connection.execute("SELECT count(*) FROM unseen").fetchone() == (0,)
        result = here.ask("verify", str(taken["number"]))
        assert result["passed"], result


def test_production_is_put_back_in_place_and_the_accident_can_be_had_again(bank: Deployment) -> None:
    cluster = bank.cluster
    cluster.sql("ALTER SYSTEM SET work_mem = '5MB'")
    bank.settle()
    cluster.sql("DELETE FROM paid")
    bank.settle()
    bank.stop()
    cluster.stop()

    async def back(parts: Parts) -> Any:
        target = await resolve(Named(marker=f"payment-{COMMITS - 1}"), parts.catalog, parts.journal)
        return await restore_in_place(target, parts.site, progress=lambda *_: None)

    _, swap = with_parts(bank, back)
    cluster.start()
    assert held(cluster.conninfo) == list(range(COMMITS))
    assert cluster.sql("SELECT timeline_id FROM pg_control_checkpoint()")[0][0] == 2
    assert cluster.sql("SHOW port")[0][0] == str(cluster.port)
    cluster.sql("INSERT INTO paid VALUES (100)")
    cluster.stop()
    assert bank.ask("clones", "list") == []

    async def undone(parts: Parts) -> Any:
        assert [found.name for found in await swaps(parts.site)] == [swap.name]
        return await undo(swap.name, parts.site)

    with_parts(bank, undone)
    cluster.start()
    assert held(cluster.conninfo) == []
    assert cluster.sql("SHOW work_mem")[0][0] == "5MB"
    for place in swap.places:
        assert Path(place.restored).exists()
        remove_copy(place.restored)


def with_parts(here: Deployment, act: Callable[[Parts], Awaitable[Any]]) -> Any:
    async def acted() -> Any:
        parts = await connect(load(here.config))
        try:
            return await act(parts)
        finally:
            await parts.close()

    return asyncio.run(acted())


def remove_copy(path: str) -> None:
    done = subprocess.run(["btrfs", "subvolume", "delete", path], capture_output=True)
    if done.returncode != 0:
        shutil.rmtree(path)
