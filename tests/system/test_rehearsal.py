"""A rehearsal protects, restores and proves for real, before the first start and beside a service; nothing stays."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from connectors.databases.postgres.assembly import sockets_folder
from tests.fixtures.preloaded import CHECKOUT
from tests.fixtures.service import Deployment, deployment

pytestmark = [pytest.mark.server, pytest.mark.slow]


def made(here: Deployment) -> list[list[str]]:
    """Give what there is: slots and publications, entries of the state folder, entries beside the snapshots."""
    slots = here.cluster.sql("SELECT slot_name FROM pg_replication_slots")
    publications = here.cluster.sql("SELECT pubname FROM pg_publication")
    made = sorted(row[0] for row in [*slots, *publications])
    places = (here.state, here.root / "snapshots")
    return [made, *(sorted(one.name for one in place.glob("*")) for place in places)]


def idle(here: Deployment) -> list[str]:
    rows = here.cluster.sql("SELECT slot_name FROM pg_replication_slots WHERE NOT active ORDER BY slot_name")
    return [row[0] for row in rows]


@pytest.mark.parametrize(("major", "storage"), [(15, "directory"), (18, "btrfs")])
def test_a_rehearsal_before_the_first_start_proves_what_it_did_and_leaves_nothing(major: int, storage: str) -> None:
    with deployment(major, storage) as here:
        name = f"test-{secrets.token_hex(4)}"
        here.config.write_text(here.config.read_text().replace('name = "test"', f'name = "{name}"', 1))
        here.cluster.sql("CREATE TABLE t (v int PRIMARY KEY)")
        before = made(here)
        here.trigpoint("check")
        here.trigpoint("explain")
        assert not here.state.exists()
        done = here.ask("check", "--rehearse")["rehearsal"]
        assert done["verification"]["passed"]
        assert all(held for _, held, _ in done["verification"]["checks"])
        assert min(done["protected_seconds"], done["point_seconds"], done["proof_seconds"]) > 0
        assert made(here) == before
        assert not here.state.exists()
        assert not (here.root / "snapshots").exists()
        assert not list(sockets_folder(name).parent.glob(f"{name}*"))


def test_a_rehearsal_beside_a_running_service_takes_nothing_from_it() -> None:
    with deployment(16, "directory") as here:
        here.cluster.sql("CREATE TABLE t (v int PRIMARY KEY)")
        here.start()
        here.cluster.sql("INSERT INTO t VALUES (1)")
        here.settle()
        before = made(here)
        assert here.ask("check", "--rehearse")["rehearsal"]["verification"]["passed"]
        here.cluster.sql("INSERT INTO t VALUES (2)")
        here.settle()
        assert made(here)[0] == before[0]
        assert not (here.state / "rehearsal").exists()
        assert here.ask("list", "--gaps") == []
        assert here.stop() == 0


@pytest.mark.parametrize("released", [False, True])
def test_what_a_rehearsal_that_was_killed_left_goes_with_the_next_one_or_by_release(released: bool) -> None:
    with deployment(18, "directory") as here:
        here.trigpoint("check")
        before = made(here)
        command = [sys.executable, "-m", "trigger", "check", "--rehearse", "--config", str(here.config)]
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 60
        while "trigpoint_rehearsal_postgres" not in made(here)[0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        slots = ["trigpoint_rehearsal_journal", "trigpoint_rehearsal_postgres"]
        here.wait_for(lambda: idle(here) == slots, "the end of what read them")
        warned = [one["subject"] for one in here.ask("check") if "was killed" in one["message"]]
        assert warned == [f"slot {name}" for name in slots]
        if released:
            here.trigpoint("release", "--unused", "--yes")
            assert made(here)[0] == before[0]
            return
        assert "rehearsed: protected after" in here.trigpoint("check", "--rehearse").stdout
        assert made(here) == before


def test_a_rehearsal_that_was_killed_while_it_cleared_up_stands_in_the_way_of_none() -> None:
    with deployment(16, "directory") as here:
        here.trigpoint("check")
        before = made(here)
        killed = subprocess.run(
            [sys.executable, "-m", "trigger", "check", "--rehearse", "--config", str(here.config)],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TRIGPOINT_FAILPOINT": "rehearsal-cleared:kill"},
            capture_output=True,
            timeout=120,
        )
        assert killed.returncode == -signal.SIGKILL
        left = here.state / "rehearsal"
        assert (left / "catalog.sqlite").exists(), "which knows of points that are gone"
        assert (left / "journal.begun").exists()
        shutil.rmtree(left / "journal")
        assert "rehearsed: protected after" in here.trigpoint("check", "--rehearse").stdout
        assert made(here) == before


def test_a_rehearsal_that_is_refused_since_another_one_is_at_work_takes_nothing_from_it() -> None:
    with deployment(18, "directory", databases=("postgres", "rehearsal_2026")) as here:
        here.start()
        here.settle()
        assert here.stop() == 0
        command = [sys.executable, "-m", "trigger", "check", "--rehearse", "--json", "--config", str(here.config)]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while "trigpoint_rehearsal_postgres" not in made(here)[0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = here.trigpoint("check", "--rehearse", check=False)
        assert "another rehearsal works in" in second.stderr
        out, _ = first.communicate(timeout=120)
        assert first.returncode == 0, out
        assert "trigpoint_rehearsal_2026" in made(here)[0], "the service's own slot of a database that is called so"
        here.start()
        assert here.ask("list", "--gaps") == []
        assert here.stop() == 0


def entries(folder: Path) -> list[tuple[str, int]]:
    """Give all that lies in a folder, at any depth, and when each was changed."""
    return sorted((str(one), one.lstat().st_ctime_ns) for one in folder.rglob("*"))


@pytest.mark.parametrize("what", ["state", "snapshots"])
def test_what_another_service_keeps_in_the_folder_of_rehearsals_is_left_and_refused(what: str) -> None:
    """As a configuration of an earlier version may have it."""
    with deployment(16, "directory") as here, deployment(16, "directory") as other:
        kept = other.state if what == "state" else other.root / "snapshots"
        place = (here.state if what == "state" else here.root / "snapshots") / "rehearsal"
        other.start()
        other.settle()
        assert other.stop() == 0
        place.parent.mkdir(parents=True)
        kept.rename(place)
        before = entries(place)
        assert before
        refused = here.trigpoint("check", "--rehearse", check=False)
        assert refused.returncode == 2
        assert f"{place} is the folder of rehearsals, and what lies in it is of none" in refused.stderr
        assert entries(place) == before
        assert made(here)[0] == []


def test_snapshots_that_another_service_has_claimed_outlast_a_rehearsal_that_was_killed_there() -> None:
    with deployment(16, "directory") as here, deployment(16, "directory") as other:
        other.start()
        other.settle()
        assert other.stop() == 0
        place = here.root / "snapshots" / "rehearsal"
        place.parent.mkdir()
        (other.root / "snapshots").rename(place)
        (place / "of-a-rehearsal").touch()
        before = {path for path, _ in entries(place)}
        refused = here.trigpoint("check", "--rehearse", check=False)
        assert refused.returncode == 6
        assert f"another trigpoint makes points in {place}: that of the catalog {other.state}" in refused.stderr
        assert {path for path, _ in entries(place)} >= before
