"""A catalog whose disk is full, read-only, or not ours any more says so, and goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import pwd
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from connectors.memory import MemoryJournal, MemoryStorage, World
from tests.fixtures.volumes import loop_volume
from tests.trigger.catalog.test_catalog import at, opened, proven, record, sealed, with_catalog
from trigger.catalog.catalog import Catalog
from trigger.catalog.reserve import KEPT_PIECES, PIECE_BYTES, for_an_operator
from trigger.errors import CatalogError
from trigger.keep.room import Room
from trigger.model import RecoveryPoint, State

pytestmark = pytest.mark.volume


async def seal_until_refused(catalog: Catalog) -> tuple[list[RecoveryPoint], CatalogError]:
    """Seal points with commits that do not pack well, until one is refused."""
    done: list[RecoveryPoint] = []
    for number in range(1, 2_000):
        records = [record(number * 100_000 + 100 * n, markers=(os.urandom(200).hex(),)) for n in range(50)]
        try:
            done.append(await sealed(catalog, number, records))
        except CatalogError as error:
            return done, error
    raise AssertionError("the disk did not fill")


def test_a_full_disk_refuses_a_seal_whole_and_the_next_one_succeeds_when_there_is_room() -> None:
    async def work(volume: Path) -> None:
        ballast = volume / "ballast"
        ballast.write_bytes(os.urandom(2 << 20))
        catalog = await Catalog.open(volume / "catalog.db")
        done, error = await seal_until_refused(catalog)
        assert "no room left" in error.message
        assert str(volume / "catalog.db") in error.message
        assert error.retryable
        assert "free some space" in error.hint
        assert len(done) > 3
        last = done[-1]
        assert await catalog.settled("bank") == at(int(last.floor.at))
        assert [p.number for p in await catalog.points(states={State.SEALED})] == [p.number for p in reversed(done)]
        ballast.unlink()
        point = await opened(catalog, 5_000)
        again = await catalog.seal(proven(point), [record(1 << 40)], {"bank": at((1 << 40) + 8)})
        await catalog.close()
        catalog = await Catalog.open(volume / "catalog.db")
        assert await catalog.latest() == again
        for each in done:
            assert len(await catalog.commits_of(each.number)) == each.commits == 50
        await catalog.close()

    with loop_volume("ext4", 8) as volume:
        asyncio.run(work(volume))


def fill(volume: Path) -> None:
    """Leave no byte free."""
    with (volume / "to the last byte").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(os.urandom(size))
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())


async def give_up(catalog: Catalog, point: RecoveryPoint) -> None:
    await catalog.change(point, State.EXPIRING)
    await catalog.change(point, State.EXPIRED)


def test_points_are_given_up_on_a_full_disk_and_what_that_needed_is_laid_by_again_when_there_is_room() -> None:
    async def work(volume: Path) -> None:
        ballast, reserve = volume / "ballast", volume / "catalog.db.reserve"
        catalog = await Catalog.open(volume / "catalog.db")
        whole = reserve.stat().st_size
        ballast.write_bytes(os.urandom(20 << 20))
        done, _ = await seal_until_refused(catalog)
        fill(volume)
        for point in done[:-1]:
            await give_up(catalog, point)
        assert [point.number for point in await catalog.points(states={State.SEALED})] == [done[-1].number]
        assert 0 < reserve.stat().st_size < whole
        ballast.unlink()
        await catalog.give_back(1)
        assert reserve.stat().st_size == whole
        await catalog.close()

    with loop_volume("ext4", 40) as volume:
        asyncio.run(work(volume))


class Slow(MemoryStorage):
    """One that shows every point, and takes its time to remove one."""

    def __init__(self) -> None:
        super().__init__(World(), budget=50)
        self.removing, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        return set()

    async def delete(self, point: str) -> None:
        self.removing.set()
        await self.may_go_on.wait()


def test_what_goes_on_while_an_operator_gives_points_up_gets_nothing_of_what_is_kept_for_him() -> None:
    async def work(volume: Path) -> None:
        reserve, storage = volume / "catalog.db.reserve", Slow()
        catalog = await Catalog.open(volume / "catalog.db")
        for number in range(1, 4):
            await sealed(catalog, number, [record(number * 1000)])
        other = await opened(catalog, 9_000)
        os.truncate(reserve, KEPT_PIECES * PIECE_BYTES)  # as thinning leaves it
        giving_up = asyncio.create_task(Room(catalog, storage, MemoryJournal(World())).give_up_before(3))
        await storage.removing.wait()
        fill(volume)
        left = reserve.stat().st_size
        with pytest.raises(CatalogError, match="no room left"):
            await catalog.fail(other, os.urandom(1 << 20).hex())
        assert reserve.stat().st_size == left
        storage.may_go_on.set()
        assert (await giving_up).points == (1, 2)
        assert [point.number for point in await catalog.points(states={State.EXPIRED})] == [2, 1]
        await catalog.close()

    with loop_volume("ext4", 40) as volume:
        asyncio.run(work(volume))


def busy_until_killed(where: Path, pipe: Connection) -> None:
    """Seal, give up and look, whatever comes of it; tells that it began, and what fails for anything but room."""

    async def work() -> None:
        catalog = await Catalog.open(where)
        points = [await sealed(catalog, number, [record(number * 1000)]) for number in range(1, 30)]
        pipe.send("begun")
        for number in itertools.count(100):
            for act in (
                sealed(catalog, number, [record(number * 1000)]),
                catalog.change(points[number % len(points)], State.EXPIRING),
                catalog.points(limit=3),
            ):
                try:
                    await act
                except CatalogError as error:
                    if "no room left" not in error.message:
                        pipe.send(error.message)
            await asyncio.sleep(0.02)

    asyncio.run(work())


@pytest.mark.parametrize(("kind", "megabytes"), [("ext4", 40), ("btrfs", 256)])
def test_a_disk_that_fills_ends_nobody_and_a_catalog_whose_process_was_killed_there_can_be_read(
    kind: str, megabytes: int
) -> None:
    with loop_volume(kind, megabytes) as volume:
        where, reserve = volume / "catalog.db", volume / "catalog.db.reserve"
        ours, its = multiprocessing.Pipe()
        other = multiprocessing.get_context("fork").Process(target=busy_until_killed, args=(where, its))
        other.start()
        try:
            assert ours.poll(60)
            assert ours.recv() == "begun"
            for _ in range(8):
                fill(volume)
                time.sleep(0.2)
            assert other.is_alive(), f"it ended with {other.exitcode}"
            assert not ours.poll(), ours.recv()
        finally:
            other.kill()
            other.join(30)
        left = reserve.stat().st_size

        async def look_and_give_up() -> None:
            fill(volume)
            catalog = await Catalog.open(where)
            assert len(await catalog.points()) >= 29
            assert reserve.stat().st_size == left, "who only looks needs none of it"
            last = await catalog.latest()
            assert last is not None
            with for_an_operator():
                await give_up(catalog, last)
            os.truncate(reserve, 0)
            fill(volume)
            assert (await catalog.point(last.number)).state is State.EXPIRED
            with pytest.raises(CatalogError, match="no room left"):
                await catalog.fail(await opened(catalog, 9_000), os.urandom(1 << 20).hex())
            await catalog.close()

        asyncio.run(look_and_give_up())


def test_two_processes_work_with_a_catalog_where_each_has_it_to_itself() -> None:
    async def work(where: Path) -> None:
        catalogs = [await Catalog.open(where) for _ in range(2)]
        for number in range(1, 30):
            await sealed(catalogs[number % 2], number, [record(number * 1000)])
            assert [len(await catalog.points()) for catalog in catalogs] == [number, number]
        assert not Path(f"{where}-shm").exists()
        for catalog in catalogs:
            await catalog.close()

    with loop_volume("btrfs", 128) as volume:
        asyncio.run(work(volume / "catalog.db"))


def _look(where: Path, seconds: float) -> tuple[int, int]:
    """Look into a catalog again and again; gives how often that was, and how often it was not let."""

    async def work() -> tuple[int, int]:
        good = bad = 0
        end = time.monotonic() + seconds
        catalog = await Catalog.open(where)
        while time.monotonic() < end:
            try:
                await catalog.points(limit=3)
                good += 1
            except CatalogError:
                bad += 1
        await catalog.close()
        return good, bad

    return asyncio.run(work())


def test_processes_that_wait_at_once_for_a_catalog_that_is_had_alone_do_not_keep_each_other_from_it() -> None:
    async def nothing(_catalog: Catalog) -> None:
        pass

    with loop_volume("btrfs", 128) as volume, ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as others:
        with_catalog(nothing, where := volume / "catalog.db")
        counts = list(others.map(_look, [where] * 4, [6.0] * 4))
    assert all(good > 10 and not bad for good, bad in counts), counts


def test_a_catalog_that_is_had_alone_on_a_filesystem_mounted_read_only_says_what_it_wants() -> None:
    async def seal_one(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    with loop_volume("btrfs", 128) as volume:
        with_catalog(seal_one, volume / "catalog.db")
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True, timeout=30)
        with pytest.raises(CatalogError, match="cannot be locked") as caught:
            with_catalog(seal_one, volume / "catalog.db")
        assert "read-write" in caught.value.hint


def test_a_new_catalog_on_a_full_disk_is_refused() -> None:
    async def nothing(_catalog: Catalog) -> None:
        pass

    with loop_volume("ext4", 8) as volume:
        with contextlib.suppress(OSError), (volume / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(CatalogError, match=r"no room left|No space left") as caught:
            with_catalog(nothing, volume / "catalog.db")
        assert caught.value.retryable


def test_a_catalog_on_a_filesystem_mounted_read_only_is_refused_with_a_remedy() -> None:
    async def seal_one(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    async def seal_two(catalog: Catalog) -> None:
        await sealed(catalog, 2, [record(200)])

    with loop_volume("ext4", 8) as volume:
        with_catalog(seal_one, volume / "catalog.db")
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True, timeout=30)
        with pytest.raises(CatalogError) as caught:
            with_catalog(seal_two, volume / "catalog.db")
        assert "cannot be" in caught.value.message
        assert "its filesystem is read-only" in caught.value.hint or "read-write" in caught.value.hint
        subprocess.run(["mount", "-o", "remount,rw", str(volume)], check=True, timeout=30)
        with_catalog(seal_two, volume / "catalog.db")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    nobody = pwd.getpwnam("nobody")
    os.setegid(nobody.pw_gid)
    os.seteuid(nobody.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize(("of_folder", "of_file"), [(0o700, 0o400), (0o500, 0o600), (0o000, 0o600), (0o700, 0o000)])
def test_a_catalog_that_the_service_lost_the_right_to_is_refused_with_a_remedy(of_folder: int, of_file: int) -> None:
    async def seal_one(catalog: Catalog) -> None:
        await sealed(catalog, 1, [record(100)])

    async def seal_two(catalog: Catalog) -> None:
        await sealed(catalog, 2, [record(200)])

    with loop_volume("ext4", 8) as volume, as_nobody_owns(volume / "state") as folder:
        where = folder / "catalog.db"
        with as_nobody():
            with_catalog(seal_one, where)
        where.chmod(of_file)
        folder.chmod(of_folder)
        with as_nobody(), pytest.raises(CatalogError) as caught:
            with_catalog(seal_two, where)
        assert str(where) in caught.value.message
        assert "writable" in caught.value.hint or "right" in caught.value.hint
        assert not caught.value.retryable
        folder.chmod(0o700)
        for file in folder.iterdir():  # SQLite gives the files beside it the mode of the catalog
            file.chmod(0o600)
        with as_nobody():
            with_catalog(seal_two, where)


@contextlib.contextmanager
def as_nobody_owns(folder: Path) -> Iterator[Path]:
    nobody = pwd.getpwnam("nobody")
    folder.mkdir(mode=0o700)
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    yield folder
