"""A clone reaches nothing of production, whatever production was configured to do; and says what it cannot have."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from connectors.databases.postgres.clone.placement import Placement, Spot
from connectors.databases.postgres.clone.recovery import PostgresRecovery
from connectors.databases.postgres.lsn import history
from connectors.databases.postgres.programs import Programs
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.restores import Cut, Ground, at_commit, ground, load, silent
from tests.fixtures.volumes import loop_volume
from trigger.errors import RestoreError
from trigger.model import Bracket, Volume
from trigger.ports import Clone
from trigger.replay import Target

pytestmark = [pytest.mark.server, pytest.mark.volume]


@pytest.fixture
def folder() -> Iterator[Path]:
    with loop_volume("btrfs", 4096) as made:
        yield made


def btrfs(*arguments: str | Path) -> None:
    subprocess.run(["btrfs", "-q", *map(str, arguments)], check=True)


def _the_end(cut: Cut) -> Target:
    return Target(cut.floor.history, None, True, "the snapshot", point="point")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
    return {str(file): hashlib.md5(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("major", [15, 16, 18])
def test_a_clone_of_a_busy_production_touches_nothing_of_it(folder: Path, major: int) -> None:
    archive = folder / "archive"
    archive.mkdir()
    archive.chmod(0o777)
    with (
        running_cluster(major, folder / "publisher" / "data") as publisher,
        ground(
            major,
            folder,
            btrfs=True,
            archive_mode="on",
            archive_command=f"cp %p {archive}/%f",
            synchronous_standby_names="nobody",
            synchronous_commit="local",
        ) as here,
    ):
        asyncio.run(_touches_nothing(here, publisher, archive))


USED_BY = "SELECT slot_name, active_pid FROM pg_replication_slots"
"""How far it is changes by itself: production, which uses it, says so now and then."""


async def _touches_nothing(here: Ground, publisher: Cluster, archive: Path) -> None:
    _tie_to_the_world(here, publisher)
    before_slots = here.cluster.sql(
        "SELECT slot_name, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots ORDER BY 1"
    )
    async with here.journaling():
        cut = here.cut()
        here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
        end = here.durable()
        await here.journal_reaches(end)
        commit = next(one for one in await here.commits(cut.ceiling))
        here.cluster.sql("SELECT pg_switch_wal()")
    await asyncio.sleep(0.5)
    publisher_slots = publisher.sql(USED_BY)
    archived = _checksums(archive)
    clone, running, _ = await here.restore(cut, at_commit(cut.floor.history, commit), throwaway=False)

    with psycopg.connect(f"{running.conninfo} dbname=postgres", autocommit=True) as connection:
        connection.execute("SET statement_timeout = '10s'; SET synchronous_commit = on")
        connection.execute("CREATE TABLE written_here AS SELECT 1; SELECT pg_switch_wal(); CHECKPOINT")  # LAB 12, 13
        value = connection.execute("SELECT nextval('numbers')").fetchone()
        slots = connection.execute("SELECT count(*) FROM pg_replication_slots").fetchone()
        enabled = connection.execute("SELECT subenabled, subslotname FROM pg_subscription").fetchall()
        unlogged = connection.execute("SELECT count(*) FROM scratch").fetchone()
        listening = connection.execute("SELECT current_setting('listen_addresses')").fetchone()
    assert running.history.branch == cut.floor.history.branch + 1
    assert (slots, enabled, unlogged, listening) == ((0,), [(False, None)] * 2, (0,), ("",))
    assert value is not None
    notes = "\n".join(running.notes)
    for said in ("keeper", "doubtful", "public.scratch", "feed", "sequences", "elsewhere"):
        assert said in notes, f"{said} is not in the notes:\n{notes}"
    assert "feed in database postgres (slot feed on its publisher)" in notes
    assert "apart in database postgres, feed" in notes, "it had no slot"
    assert _not_owned_by(running.data_directory, here.cluster.owner[0]) == []
    await asyncio.sleep(1.0)
    assert {name: _checksums(archive).get(name) for name in archived} == archived
    assert not any(Path(name).name.startswith("00000002") for name in _checksums(archive))
    assert publisher.sql(USED_BY) == publisher_slots
    after = here.cluster.sql(
        "SELECT slot_name, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_type = 'logical'"
    )
    assert {row[0]: row[2] for row in after} == {row[0]: row[2] for row in before_slots}

    another = PostgresRecovery(here.placement, lambda _: here.programs, here.cluster.sockets / "c")
    assert await another.running(clone) == running
    await another.stop(clone)
    await another.stop(clone)
    assert await another.running(clone) is None
    assert _servers_in(running.data_directory) == []


def _tie_to_the_world(here: Ground, publisher: Cluster) -> None:
    """Give production a slot, a subscription, a prepared transaction, a foreign server and ALTER SYSTEM settings."""
    publisher.sql("CREATE TABLE feed (i int); CREATE PUBLICATION feed FOR TABLE feed")
    here.cluster.sql("SELECT pg_create_logical_replication_slot('keeper', 'pgoutput')")
    here.cluster.sql("CREATE TABLE feed (i int)")
    here.cluster.sql(f"CREATE SUBSCRIPTION feed CONNECTION '{publisher.conninfo} dbname=postgres' PUBLICATION feed")
    unconnected = "CONNECTION '' PUBLICATION feed WITH (connect = false, slot_name = NONE)"
    here.cluster.sql(f"CREATE SUBSCRIPTION apart {unconnected}")
    here.cluster.sql("CREATE UNLOGGED TABLE scratch AS SELECT 1")
    here.cluster.sql("CREATE SEQUENCE numbers")
    here.cluster.sql("SELECT nextval('numbers')")
    here.cluster.sql("CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing")
    here.cluster.sql("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
    here.cluster.sql("ALTER SYSTEM SET listen_addresses = '*'")
    here.cluster.sql("BEGIN; INSERT INTO ledger VALUES (pg_current_xact_id()); PREPARE TRANSACTION 'doubtful'")


def _not_owned_by(folder: Path, owner: int) -> list[str]:
    """Give what does not belong to the owner, or is open to others (R18)."""
    entries = [folder, *folder.rglob("*")]
    return [
        str(one) for one in entries if one.lstat().st_uid != owner or (one.is_file() and one.stat().st_mode & 0o007)
    ]


def test_the_files_of_a_copied_lock_and_label_do_not_matter(folder: Path) -> None:
    async def run(here: Ground) -> None:
        cut = here.cut()
        target = _the_end(cut)
        (here.folder / "empty").mkdir()
        clone = here.clone(cut)
        data = clone.paths[0][1] / "data"
        assert (data / "postmaster.pid").exists()  # of production, which runs (R12)
        (data / "standby.signal").touch()
        running = await here.recovery.start(clone, here.volumes, cut.replay(target), here.folder / "empty", silent)
        assert running.pid != int((here.cluster.data / "postmaster.pid").read_text().split()[0])
        assert await here.recovery.query(running, "postgres", "SELECT pg_is_in_recovery()::text") == "false"

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_nothing_leaves_a_clone_that_has_a_network_of_its_own(folder: Path) -> None:
    """The clone is brought up where every packet is counted: none is sent, although production has a subscription."""
    with (
        running_cluster(18, folder / "publisher" / "data") as publisher,
        ground(18, folder, btrfs=True) as here,
    ):
        publisher.sql("CREATE TABLE feed (i int); CREATE PUBLICATION feed FOR TABLE feed")
        here.cluster.sql("CREATE TABLE feed (i int)")
        tcp = f"host=127.0.0.1 port={publisher.port} user=postgres dbname=postgres"
        here.cluster.sql(f"CREATE SUBSCRIPTION feed CONNECTION '{tcp}' PUBLICATION feed")
        cut = here.cut()
        (folder / "empty").mkdir()
        clone = here.clone(cut)
        script = textwrap.dedent(f"""
            import asyncio, subprocess, time
            from datetime import UTC, datetime
            from pathlib import Path
            from connectors.databases.postgres.clone.placement import Placement, Spot
            from connectors.databases.postgres.programs import Programs
            from connectors.databases.postgres.clone.recovery import PostgresRecovery
            from connectors.databases.postgres.lsn import history
            from trigger.model import Volume
            from trigger.replay import Replay, Target
            from trigger.ports import Clone
            from trigger.position import Position

            async def main():
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                recovery = PostgresRecovery(
                    Placement(Spot("main", "data"), None, ()),
                    lambda major: Programs(Path({str(here.programs.folder)!r}), major),
                    Path({str(here.cluster.sockets / "n")!r}),
                )
                clone = Clone("alone", "point", (("main", Path({str(clone.paths[0][1])!r})),), datetime.now(UTC))
                own = history({cut.floor.history.system!r}, 1)
                target = Target(own, None, True, "the snapshot", point="point")
                replay = Replay(target, Position(own, 0), 0, as_cut=True)
                running = await recovery.start(
                    clone, [Volume("main", {str(here.volume)!r})], replay, Path({str(folder / "empty")!r}),
                    lambda *_: None,
                )
                await asyncio.sleep(3)
                print([line.split()[10] for line in Path("/proc/net/dev").read_text().splitlines()[2:]])
                await recovery.stop(clone)

            asyncio.run(main())
            """)
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[4],
        )
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.strip()) <= set("['0', ]"), f"packets were sent: {done.stdout}"


def test_tablespaces_and_a_separate_pg_wal_are_the_clones_own(folder: Path) -> None:
    wal, space = folder / "log", folder / "space"
    for volume in (wal, space):
        btrfs("subvolume", "create", volume)

    async def run(here: Ground) -> None:
        os.chown(space, *here.cluster.owner)
        here.cluster.sql(f"CREATE TABLESPACE fast LOCATION '{space}'")
        oid = here.cluster.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")[0][0]
        here.cluster.sql("CREATE TABLE quick TABLESPACE fast AS SELECT 1 AS i; CHECKPOINT")
        here.placement = Placement(Spot("main", "data"), Spot("log", "pg_wal"), ((oid, Spot("space", "")),))
        here.recovery = PostgresRecovery(here.placement, lambda _: here.programs, here.cluster.sockets / "c")
        volumes = [*here.volumes, Volume("log", str(wal)), Volume("space", str(space))]
        cut = here.cut()  # with the two below one instant, since nobody writes
        for name, source in (("main", cut.path), ("log", wal), ("space", space)):
            btrfs("subvolume", "snapshot", source, folder / f"c-{name}")
        copies = [(name, folder / f"c-{name}") for name in ("main", "log", "space")]
        clone = Clone("whole", "point", tuple(copies), datetime.now(UTC))
        here.clones.append(clone)
        (folder / "empty").mkdir()
        running = await here.recovery.start(clone, volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
        before = _checksums(space)
        assert await here.recovery.query(running, "postgres", "SELECT i FROM quick") == "1"
        await here.recovery.query(running, "postgres", "UPDATE quick SET i = 2; CHECKPOINT")
        assert _checksums(space) == before
        assert (running.data_directory / "pg_wal").resolve() == folder / "c-log" / "pg_wal"
        await here.recovery.stop(clone)

        partly = Clone("partly", "point", tuple(copies[:1]), clone.created_at)
        with pytest.raises(RestoreError, match="the clone has no copy of"):
            await here.recovery.start(partly, volumes, cut.replay(_the_end(cut)), folder / "empty", silent)

    with ground(16, folder, btrfs=True, wal=wal / "pg_wal") as here:
        asyncio.run(run(here))


def test_a_replay_that_would_empty_a_tablespace_of_production_is_refused(folder: Path) -> None:
    space = folder / "space"
    space.mkdir()

    async def run(here: Ground) -> None:
        os.chown(space, *here.cluster.owner)
        async with here.journaling():
            cut = here.cut()
            here.cluster.sql(f"CREATE TABLESPACE fast LOCATION '{space}'")
            here.cluster.sql("CREATE TABLE quick TABLESPACE fast AS SELECT 1 AS i")
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            end = here.durable()
            await here.journal_reaches(end)
            before = _checksums(space)
            commits = await here.commits(cut.ceiling)
            with pytest.raises(RestoreError, match="would empty that folder of production"):
                await here.restore(cut, at_commit(end.history, commits[-1]))
            assert _checksums(space) == before
            late = here.clone(here.cut())  # its own log makes the tablespace too, until a checkpoint
            copies = (*late.paths, ("space", folder / "copy"))
            shutil.copytree(space, folder / "copy")
            volumes = [*here.volumes, Volume("space", str(space))]
            mapped = Clone(late.name, late.point, copies, late.created_at)
            (folder / "empty").mkdir()
            with pytest.raises(RestoreError, match="would empty that folder of production"):
                await here.recovery.start(mapped, volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
            assert _checksums(space) == before

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_copy_that_is_not_one_instant_does_not_start_without_its_label(folder: Path) -> None:
    async def run(here: Ground) -> None:
        async with here.journaling():
            with load(here.cluster):
                cut = await asyncio.to_thread(here.copy_in_bracket)
            await here.journal_reaches(here.durable())
            assert cut.bracket is not None
            commit = (await here.commits(cut.ceiling))[1]
            blank = Cut(cut.path, cut.floor, cut.ceiling, Bracket(cut.bracket.start, cut.bracket.stop, {"label": ""}))
            with pytest.raises(RestoreError, match="the backup label of point point is missing"):
                await here.restore(blank, at_commit(cut.floor.history, commit))

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_start_that_is_cancelled_leaves_no_server(folder: Path) -> None:
    async def run(here: Ground) -> None:
        cut = here.cut()
        (folder / "empty").mkdir()

        async def started_within(seconds: float) -> tuple[Clone, float | None]:
            """Give the clone, and how long its start took; None where it was cancelled."""
            clone, began = here.clone(cut), time.monotonic()
            start = here.recovery.start(clone, here.volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
            try:
                await asyncio.wait_for(start, seconds)
            except TimeoutError:
                return clone, None
            return clone, time.monotonic() - began

        clone, whole = await started_within(60)
        assert whole is not None
        await here.drop(clone)
        for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            clone, took = await started_within(whole * share)
            while took is not None:  # the machine is as much faster by now
                await here.drop(clone)
                whole = took
                clone, took = await started_within(whole * share)
            assert await here.recovery.running(clone) is None
            await asyncio.sleep(0.3)  # for one that would come up late
            assert not _servers_in(clone.paths[0][1])
            await here.drop(clone)

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def _servers_in(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_what_the_owner_of_the_data_cannot_reach_is_said_before_anything_starts(folder: Path) -> None:
    async def run(here: Ground) -> None:
        cut = here.cut()
        clone = here.clone(cut)
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        (closed / "bin").mkdir()
        for name in ("postgres", "pg_controldata"):
            (closed / "bin" / name).symlink_to(here.programs.path(name))
        recovery = PostgresRecovery(here.placement, lambda major: Programs(closed / "bin", major), folder / "s")
        (folder / "empty").mkdir()
        with pytest.raises(RestoreError, match="cannot run"):
            await recovery.start(clone, here.volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
        (closed / "00000002.history").write_text("1\t0/3000000\tno reason\n")
        with pytest.raises(RestoreError, match="cannot read"):
            await here.recovery.start(clone, here.volumes, cut.replay(_the_end(cut)), closed, silent)

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_missing_segment_ends_in_the_servers_own_words_and_no_server(folder: Path) -> None:
    async def run(here: Ground) -> None:
        async with here.journaling():
            cut = here.cut()
            here.cluster.sql("SELECT pg_switch_wal()")
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            await here.journal_reaches(here.durable())
        commit = (await here.commits(cut.ceiling))[-1]
        clone = here.clone(cut)
        (folder / "empty").mkdir()
        target = at_commit(cut.floor.history, commit)
        with pytest.raises(RestoreError, match="recovery ended before configured recovery target was reached"):
            await here.recovery.start(clone, here.volumes, cut.replay(target), folder / "empty", silent)
        async with asyncio.timeout(5):  # it has said its last words, and is ending
            while _servers_in(clone.paths[0][1]):  # noqa: ASYNC110 - a program that ends by itself
                await asyncio.sleep(0.05)

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_clone_of_another_cluster_is_refused(folder: Path) -> None:
    async def run(here: Ground) -> None:
        cut = here.cut()
        target = Target(history("42", 1), None, True, "elsewhere", point="point")
        (folder / "empty").mkdir()
        with pytest.raises(RestoreError, match="the target in cluster 42"):
            await here.recovery.start(here.clone(cut), here.volumes, cut.replay(target), folder / "empty", silent)

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_path_that_a_shell_could_misread_is_no_more_than_a_path(folder: Path) -> None:
    odd = folder / 'od\'d "$(touch hurt)"; touch hurt %f \\ \n ü'
    odd.mkdir()

    async def run(here: Ground) -> None:
        async with here.journaling():
            cut = here.cut()
            here.cluster.sql("SELECT pg_switch_wal()")
            here.cluster.sql("INSERT INTO ledger VALUES (pg_current_xact_id())")
            await here.journal_reaches(end := here.durable())
        commit = (await here.commits(cut.ceiling))[-2]
        here.folder = odd  # where clones lie, and the log for them
        clone, running, _ = await here.restore(cut, at_commit(end.history, commit), throwaway=False)
        assert await here.ledger(running) == {commit.xid}
        await here.recovery.stop(clone)
        again = await here.recovery.resume(clone)
        assert await here.ledger(again) == {commit.xid}
        assert not [file for place in (folder, running.data_directory, Path("/")) for file in place.glob("hurt*")]
        await here.drop(clone)

    with ground(15, folder, btrfs=True) as here:
        asyncio.run(run(here))


def test_a_data_directory_with_a_space_in_its_name_comes_back(folder: Path) -> None:
    async def run(here: Ground) -> None:
        cut = here.cut()
        (folder / "empty").mkdir()
        clone = here.clone(cut)
        running = await here.recovery.start(clone, here.volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
        assert running.data_directory.name == "pg data"
        held = [held async for _, held, _ in here.recovery.inspect(running, _the_end(cut), folder / "empty", deep=True)]
        assert held
        assert all(held)
        await here.drop(clone)

    with ground(18, folder, btrfs=True, name="pg data") as here:
        asyncio.run(run(here))


@pytest.mark.parametrize("mask", [0o027, 0o077])
def test_whatever_our_umask_is_the_server_of_a_clone_reaches_its_socket(folder: Path, mask: int) -> None:
    async def run(here: Ground, sockets: Path) -> None:
        cut = here.cut()
        (folder / "empty").mkdir(exist_ok=True)
        os.chown(folder / "empty", *here.cluster.owner)
        here.recovery = PostgresRecovery(here.placement, lambda _: here.programs, sockets)
        clone = here.clone(cut)
        running = await here.recovery.start(clone, here.volumes, cut.replay(_the_end(cut)), folder / "empty", silent)
        assert await here.recovery.query(running, "postgres", "SELECT 1") == "1"
        await here.drop(clone)

    with ground(15, folder, btrfs=True) as here:
        closed = here.cluster.sockets / "closed"
        closed.mkdir(mode=0o700)  # as it was left by an earlier start
        before = os.umask(mask)
        try:
            for sockets in (here.cluster.sockets / "a" / "b", closed):
                asyncio.run(run(here, sockets))
        finally:
            os.umask(before)
