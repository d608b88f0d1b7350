"""What can happen to a stream while the real service reads it, and costs no commit: each has one outcome in the end.

A storage that is slow, a wire that is cut or goes deaf, a server that is killed, a service that is killed, a second
one on the same slot, a slot that comes near its bound.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.fixtures import judge
from tests.fixtures.loading import Load
from tests.fixtures.service import Deployment
from tests.fixtures.slots import QUICK, SLOT, as_usual, assert_outcomes, commit, segmented, unwilling_application
from tests.fixtures.wire import wire

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    with segmented() as found:
        yield found


@pytest.fixture
def deployed(shared: Deployment) -> Iterator[Deployment]:
    with as_usual(shared) as found:
        yield found


def test_a_storage_that_is_slower_than_the_server_s_patience_does_not_lose_the_stream(deployed: Deployment) -> None:
    with unwilling_application(seconds=8) as (hooks, block):  # wal_sender_timeout is 3 s
        deployed.configure(f'{QUICK}[agent]\nhooks = "{hooks}"\ndeadline_seconds = 30\n')
        deployed.start()
        deployed.settle()
        pid = deployed.cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{SLOT}'")
        block.touch()
        made = commit(deployed.cluster)
        began = time.monotonic()
        deployed.wait_for(lambda: judge.read(deployed).outcomes[made[0].xid] == 1, "the slow point")
        assert time.monotonic() - began > 5
        block.unlink()
        made += commit(deployed.cluster)
        deployed.settle()
        assert deployed.cluster.sql(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{SLOT}'") == pid, (
            "the server has hung up meanwhile"
        )
        assert_outcomes(deployed, made, [])
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
        first = commit(deployed.cluster, 1)[0].xid
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
    known, first = len(deployed.ask("list", "--gaps")), commit(deployed.cluster, 1)[0].xid
    for end in (deployed.cluster.kill, deployed.cluster.stop):
        with _under_load_that_may_break(deployed):
            time.sleep(1)
            end()
        deployed.cluster.start()
        commit(deployed.cluster)
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
        made = commit(deployed.cluster)
        between.cut(server_learns=False)
        assert deployed.stop(signal.SIGKILL) == -signal.SIGKILL
        between.mend()
        assert deployed.cluster.sql(f"SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'") == [(True,)]
        deployed.start()
        made += commit(deployed.cluster)
        deployed.settle()
        assert_outcomes(deployed, made, [])
        assert len(deployed.ask("list", "--gaps")) == known
        assert deployed.stop() == 0


def test_a_second_service_on_the_same_slot_is_told_so_and_takes_nothing_from_the_first(deployed: Deployment) -> None:
    second = Deployment(deployed.cluster, deployed.root / "second", deployed.state.parent / "second" / "state", "btrfs")
    for folder in (second.root, second.state.parent):
        folder.mkdir()
    second.configure(QUICK)
    deployed.start()
    made = commit(deployed.cluster)
    for _ in range(2):
        refused = second.trigpoint("run", check=False)
        assert refused.returncode == 3, refused.stderr
        assert "are those of another trigpoint" in " ".join(refused.stderr.split())
        made += commit(deployed.cluster)
        deployed.settle()
    assert_outcomes(deployed, made, [])
    assert deployed.stop() == 0


def test_a_slot_that_another_program_holds_is_a_trouble_until_it_lets_go(deployed: Deployment) -> None:
    dsn = f"{deployed.cluster.conninfo} dbname=postgres"
    holder = subprocess.Popen(
        [
            deployed.cluster.programs.path("pg_recvlogical"),
            *("--start", f"--slot={SLOT}", f"--dbname={dsn}", "--file=-", "--no-loop"),
            *("--option=proto_version=1", "--option=publication_names=trigpoint"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        active = f"SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
        deployed.wait_for(lambda: deployed.cluster.sql(active) == [(True,)], "the other program at work")
        deployed.start(wait=False)
        deployed.wait_for(deployed.status, "a service that answers")
        deployed.wait_for(lambda: "held by another process" in " ".join(deployed.status()["troubles"]), "a word", 90)
    finally:
        holder.terminate()
        holder.wait(30)
    made = commit(deployed.cluster)
    deployed.settle()
    assert_outcomes(deployed, made, [])
    assert deployed.stop() == 0


def test_a_slot_that_comes_near_its_bound_is_shown_before_it_is_lost(deployed: Deployment) -> None:
    deployed.start()
    snapshots = deployed.root / "snapshots"
    subprocess.run(["chattr", "+i", str(snapshots)], check=True, timeout=30)  # no point can be made
    try:
        made = commit(deployed.cluster)
        for _ in range(45):  # of 64 MB
            deployed.cluster.sql("SELECT pg_logical_emit_message(false, 'ballast', repeat('x', 1000000))")
        deployed.wait_for(lambda: f"of log for {SLOT} and will drop it" in str(deployed.status()["troubles"]), "a word")
        (slot,) = [one for one in deployed.status()["retained"] if one["reader"] == SLOT]
        assert slot["bytes"] > slot["left_bytes"] > 0
        assert SLOT in deployed.trigpoint("status").stdout
    finally:
        subprocess.run(["chattr", "-i", str(snapshots)], check=True, timeout=30)
    deployed.settle()
    assert_outcomes(deployed, made, [])
    deployed.wait_for(lambda: deployed.status()["troubles"] == [], "no trouble any more")
    assert deployed.stop() == 0
