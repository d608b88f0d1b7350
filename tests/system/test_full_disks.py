"""Catalog, journal and storage, each on a volume of its own that fills up, turns read-only, or is taken away.

Whatever happens to one of them, the service says so, goes on with what it can, lets the server forget nothing that
the catalog does not have, and makes good for it as soon as it can. It runs as the owner of the data, not as root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import server_owner
from tests.fixtures import judge
from tests.fixtures.service import Deployment, deployment
from tests.fixtures.volumes import loop_volume, mount_again
from trigger.catalog.catalog import Catalog

pytestmark = [pytest.mark.server, pytest.mark.volume, pytest.mark.slow]

_COMMIT = (
    "BEGIN; INSERT INTO truth (what) VALUES ('disk');"
    " SELECT pg_logical_emit_message(true, 'trigpoint', repeat(md5(random()::text), 60)); COMMIT"
)
"""A commit whose record in the catalog does not pack well: 1,920 random characters."""


HELD_UP = "the journal is held up"


class House:
    """A deployment whose catalog, journal and storage lie on tiny volumes of their own."""

    def __init__(self, deployed: Deployment, volumes: dict[str, Path]) -> None:
        self.deployed = deployed
        self.volumes = volumes

    def commit(self, number: int = 1) -> None:
        """Commit, each time with much that the catalog has to keep."""
        with self.deployed.cluster.connect() as connection:
            for _ in range(number):
                connection.execute(_COMMIT.encode())

    def fill(self, what: str) -> None:
        """Leave no byte free on a volume, not even for root."""
        with (self.volumes[what] / "ballast").open("ab", buffering=0) as file:
            for size in (16 << 20, 1 << 20, 1 << 10):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)

    def make_room(self, what: str) -> None:
        (self.volumes[what] / "ballast").unlink()

    def leave(self, what: str, room_bytes: int) -> None:
        """Leave so much free on a volume."""
        self.fill(what)
        ballast = self.volumes[what] / "ballast"
        os.truncate(ballast, ballast.stat().st_size - room_bytes)

    def break_down(self, what: str) -> None:
        """Turn a volume read-only under its open files, as the kernel does after an error of the disk."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.volumes[what])], check=True, timeout=30)

    def mount_again(self, what: str) -> None:
        """Repair a volume: unmount it, and mount it as it is on its disk."""
        mount_again(self.volumes[what])

    def take_away(self, what: str) -> None:
        """Let root own a folder, and nobody else look into it."""
        folder = self.volumes[what] / "state"
        os.chown(folder, 0, 0)
        folder.chmod(0o700)

    def give_back(self, what: str) -> None:
        os.chown(self.volumes[what] / "state", *server_owner())

    def trouble(self) -> str:
        """Give what the status says is wrong, one line."""
        status = self.deployed.status()
        return "; ".join([*status.get("troubles", []), *(finding["message"] for finding in status.get("journal", []))])

    def wait_for_trouble(self, *words: str, committing: bool = True) -> None:
        """Commit until the status shows trouble with one of these words in it."""

        def shows() -> bool:
            if committing:
                self.commit(5)
            said = self.trouble()
            return any(word in said for word in words)

        self.deployed.wait_for(shows, f"trouble that says {words}")

    def require_nothing_forgotten(self) -> None:
        """See that the server kept every commit whose outcome the catalog does not have.

        What logical decoding cannot see may be forgotten, so only commits count: the first one without an outcome
        must not lie before what the server was told to forget.
        """
        confirmed = self.deployed.cluster.sql(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_type = 'logical'"
        )[0][0]

        async def settled() -> Lsn:
            catalog = await Catalog.open(self.volumes["catalog"] / "state" / "catalog.sqlite")
            try:
                found = await catalog.settled("postgres")
            finally:
                await catalog.close()
            assert found is not None
            return Lsn(found.at)

        assert Lsn.parse(confirmed) <= asyncio.run(settled())

    def require_all_well(self) -> None:
        """See that everything was made good: every commit has its one outcome, and nothing is left over."""
        deployed = self.deployed
        self.commit()
        deployed.settle()
        deployed.wait_for(lambda: not self.trouble(), f"a status without trouble (it was: {self.trouble()})", 30)
        assert deployed.stop() == 0
        left = judge.read(deployed)
        judge.assert_every_commit_has_one_outcome(left, judge.written_ids(deployed.cluster))
        judge.assert_nothing_is_left_over(deployed, left)
        judge.assert_bounds_hold(left)


FAULTS: dict[str, tuple[Callable[[House, str], None], Callable[[House, str], None]]] = {
    "full": (House.fill, House.make_room),
    "read-only": (House.break_down, House.mount_again),
    "not ours any more": (House.take_away, House.give_back),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    """A service of the owner of the data, which has three tiny volumes."""
    with contextlib.ExitStack() as stack:
        volumes = {
            what: stack.enter_context(loop_volume("ext4", megabytes))
            for what, megabytes in (("catalog", 16), ("journal", 1024), ("storage", 1024))
        }
        deployed = stack.enter_context(
            deployment(15, "directory", initdb=["--wal-segsize=1"], max_wal_size="32MB", min_wal_size="2MB")
        )
        uid, gid = server_owner()
        deployed.state.mkdir()
        for folder in (deployed.root, deployed.state, *volumes.values()):
            os.chown(folder, uid, gid)
        for mount in volumes.values():
            (mount / "state").mkdir()
            os.chown(mount / "state", uid, gid)
        (deployed.root / "snapshots").symlink_to(volumes["storage"] / "state")  # where the judge looks
        (deployed.state / "catalog.sqlite").symlink_to(volumes["catalog"] / "state" / "catalog.sqlite")
        if os.geteuid() == 0:
            user = pwd.getpwuid(uid).pw_name
            deployed.before = ("setpriv", f"--reuid={user}", f"--regid={gid}", "--clear-groups")
        deployed.configure(
            "[points]\nmin_interval_seconds = 0.2\nper_minute = 6000\nretry_seconds = 0.05\n"
            f'[catalog]\npath = "{volumes["catalog"] / "state" / "catalog.sqlite"}"\n'
            f'[journal]\nfolder = "{volumes["journal"] / "state"}"\n'
        )
        config = deployed.config.read_text()
        deployed.config.write_text(config.replace('keep_free = "16MiB"', 'keep_free = "0B"\nbudget = 8'))
        deployed.config.chmod(0o644)
        deployed.cluster.sql(judge.TRUTH_TABLE)
        yield House(deployed, volumes)


@pytest.fixture
def house(shared: House) -> Iterator[House]:
    """The house with its service running and all well."""
    shared.deployed.start()
    shared.commit()
    shared.deployed.settle()
    yield shared
    process = shared.deployed.process
    if process is not None and process.poll() is None:
        process.kill()
        process.wait(30)


def _newest_sealed(house: House) -> int:
    return int(house.deployed.status()["last_point"])


# ------------------------------------------------------------------------------------------------------- catalog


def test_a_catalog_whose_disk_is_full_acknowledges_nothing_and_makes_good_when_there_is_room(house: House) -> None:
    house.fill("catalog")
    house.wait_for_trouble("no room left")
    assert "no room left" in house.deployed.log.read_text()
    house.commit(10)
    house.require_nothing_forgotten()
    house.make_room("catalog")
    house.require_all_well()


def test_a_catalog_that_turns_read_only_acknowledges_nothing_and_makes_good_once_it_is_repaired(house: House) -> None:
    house.break_down("catalog")
    house.wait_for_trouble("its disk failed", "cannot be written")
    house.commit(10)
    confirmed = _confirmed(house)
    assert house.deployed.stop() == 0, "a service that cannot write its catalog ends when it is told to"
    assert _confirmed(house) == confirmed
    house.mount_again("catalog")
    house.require_nothing_forgotten()
    house.deployed.start()
    house.require_all_well()


def _confirmed(house: House) -> str:
    rows = house.deployed.cluster.sql(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_type = 'logical'"
    )
    return str(rows[0][0])


def test_a_catalog_that_may_not_be_written_is_refused_at_start_with_a_remedy(house: House) -> None:
    assert house.deployed.stop() == 0
    folder = house.volumes["catalog"] / "state"
    files = [folder, *folder.iterdir()]
    modes = [file.stat().st_mode for file in files]
    house.commit(3)
    for file in files[1:]:
        file.chmod(0o400)
    folder.chmod(0o500)
    refused = house.deployed.trigpoint("run", check=False)
    assert refused.returncode == 7, refused.stderr
    assert "catalog.sqlite" in refused.stderr
    assert "hint:" in refused.stderr
    for file, mode in zip(files, modes, strict=True):
        file.chmod(mode & 0o777)
    house.deployed.start()
    house.require_all_well()


# ------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("fault", FAULTS)
def test_a_storage_that_takes_nothing_fails_points_keeps_commits_and_makes_good(house: House, fault: str) -> None:
    hurt, heal = FAULTS[fault]
    hurt(house, "storage")
    if fault == "full":  # whatever its own points give back is taken by something else

        def thinning_gives_nothing() -> bool:
            house.fill("storage")
            house.commit()
            return "something else fills the storage" in house.trouble()

        house.deployed.wait_for(thinning_gives_nothing, "the end of thinning")
        house.fill("storage")
    house.wait_for_trouble("No space left", "are wanted", "Read-only file system", "Permission denied")
    house.commit(10)
    house.require_nothing_forgotten()
    assert house.deployed.status()["pending_commits"] >= 10
    assert house.deployed.stop() == 0
    if fault == "not ours any more":  # it cannot even be looked at
        refused = house.deployed.trigpoint("run", check=False)
        assert (refused.returncode, "Permission denied" in refused.stderr) == (6, True), refused.stderr
        heal(house, "storage")
        house.deployed.start()
    else:  # what cannot be removed keeps no service from starting
        house.deployed.start(wait=False)
        house.wait_for_trouble("No space left", "are wanted", "Read-only file system")
        heal(house, "storage")
    house.require_all_well()


def test_a_storage_that_its_own_points_fill_goes_on_with_fewer_of_them(house: House) -> None:
    cluster = house.deployed.cluster
    cluster.sql("CREATE TABLE large (id integer PRIMARY KEY, words text)")
    cluster.sql("INSERT INTO large SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 20000) i")
    house.commit()
    house.deployed.settle()
    house.leave("storage", 140 << 20)
    before, gone = _newest_sealed(house), len(_numbers(house, "expired"))
    for number in range(8):  # each copies the table anew, which is 27 MB
        cluster.sql("UPDATE large SET words = reverse(words)")
        cluster.sql("VACUUM large")
        _mark(house, f"filled-{number}")
        house.deployed.settle()
    assert _newest_sealed(house) >= before + 8
    assert len(_numbers(house, "expired")) > gone, "there was room for all: nothing was tried"
    house.make_room("storage")
    house.require_all_well()
    house.deployed.start()
    for number in (0, 3):  # points of which are gone
        _assert_comes_back(house, f"filled-{number}")
    cluster.sql("DROP TABLE large")


# ------------------------------------------------------------------------------------------------------- journal


@pytest.mark.parametrize("fault", FAULTS)
def test_a_journal_that_cannot_be_written_is_shown_points_go_on_and_no_log_is_lost(house: House, fault: str) -> None:
    hurt, heal = FAULTS[fault]
    hurt(house, "journal")
    _switch_segments(house)
    house.wait_for_trouble("No space left", "Read-only file system", "Permission denied", "permission denied")
    before = _newest_sealed(house)
    marker = f"during-{fault.replace(' ', '-')}"
    _mark(house, marker)
    house.deployed.wait_for(lambda: _newest_sealed(house) > before, "a point while there is no journal")
    house.deployed.wait_for(lambda: HELD_UP in "; ".join(house.deployed.status()["troubles"]), "the trouble")
    assert f"ERROR {HELD_UP}" in " ".join(house.deployed.log.read_text().split())
    if fault == "full":
        assert "has no room for more log" in " ".join(house.deployed.trigpoint("check", check=False).stdout.split())
        refused = house.deployed.trigpoint("restore", "--to-marker", marker, "--dry-run", check=False)
        assert "has no room for more log" in (words := " ".join(refused.stderr.split())), words
        assert "`trigpoint expire` lets go of" in words
        assert "has no room for more log" in house.deployed.trigpoint("find", "--marker", marker, check=False).stdout
    heal(house, "journal")
    _switch_segments(house)
    house.require_all_well()
    assert f"{HELD_UP}, and commits since then may not be restorable: over" in house.deployed.log.read_text()
    _assert_comes_back(house, marker)


def _mark(house: House, marker: str) -> None:
    """Commit with a marker."""
    house.deployed.cluster.sql(
        f"BEGIN; INSERT INTO truth (what) VALUES ('{marker}');"
        f" SELECT pg_logical_emit_message(true, 'trigpoint', '{marker}'); COMMIT"
    )


def _numbers(house: House, state: str) -> list[int]:
    """Give the numbers of the points in a state."""
    points = house.deployed.ask("list", "--state", state, "--limit", "1000")
    return [point["number"] for point in points]


def _switch_segments(house: House) -> None:
    for _ in range(3):
        house.commit()
        house.deployed.cluster.sql("SELECT pg_switch_wal()")


def _assert_comes_back(house: House, marker: str) -> None:
    """A commit made while the journal was hurt comes back exactly: the server had kept the log."""
    house.deployed.config.chmod(0o644)
    report = house.deployed.ask("restore", "--to-marker", marker, "--name", "back")
    try:
        with psycopg.connect(f"{report['conninfo']} dbname=postgres") as connection:
            last = connection.execute("SELECT what FROM truth ORDER BY id DESC LIMIT 1").fetchone()
    finally:
        house.deployed.trigpoint("clones", "drop", "--yes", "back")
    assert last == (marker,)
