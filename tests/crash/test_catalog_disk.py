"""A catalog whose disk is full, read-only, or not ours any more says so, and goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.volumes import loop_volume
from tests.trigger.catalog.test_catalog import at, opened, proven, record, sealed, with_catalog
from trigger.catalog.catalog import Catalog
from trigger.errors import CatalogError
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


def test_points_are_given_up_on_a_full_disk_and_what_that_needed_is_laid_by_again_when_there_is_room() -> None:
    async def work(volume: Path) -> None:
        ballast, reserve = volume / "ballast", volume / "catalog.db.reserve"
        ballast.write_bytes(os.urandom(4 << 20))
        catalog = await Catalog.open(volume / "catalog.db")
        whole = reserve.stat().st_size
        done, _ = await seal_until_refused(catalog)
        with contextlib.suppress(OSError), (volume / "to the last byte").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        for point in done[:-1]:
            await catalog.change(point, State.EXPIRING)
            await catalog.change(point, State.EXPIRED)
        assert [point.number for point in await catalog.points(states={State.SEALED})] == [done[-1].number]
        assert reserve.stat().st_size < whole
        await catalog.close()
        ballast.unlink()
        await (await Catalog.open(volume / "catalog.db")).close()
        assert reserve.stat().st_size == whole

    with loop_volume("ext4", 24) as volume:
        asyncio.run(work(volume))


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
        assert "writable" in caught.value.hint or "read-write" in caught.value.hint
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
