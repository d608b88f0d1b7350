"""What lies aside is listed with what it is, and only what nobody needs is removed: whole, also after a kill."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fixtures.bank import Bank, quiet, two_points
from tests.fixtures.folders import NEW, OLD, CutError, all_of, cut_at, states, stopped_bank
from tests.fixtures.volumes import loop_volume, run
from tests.trigger.restore.test_restore_in_place import CUTS, cut_off
from trigger.errors import RestoreError
from trigger.model import Volume
from trigger.restore.aside import Kind, aside, discard
from trigger.restore.inplace import restore_in_place
from trigger.restore.swap import Swap, resume, swaps, undo


@asynccontextmanager
async def put_back(folder: Path) -> AsyncIterator[tuple[Bank, Swap]]:
    """Give a bank that was restored in place."""
    async with stopped_bank(folder) as it:
        _, swap = await restore_in_place(await two_points(it), it.site, progress=quiet)
        yield it, swap


async def kinds(it: Bank) -> list[tuple[str, Kind]]:
    return [(one.name, one.kind) for one in await aside(it.site)]


def test_what_lies_aside_is_listed_with_the_restore_that_left_it_and_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            Path(swap.kept[0], "large").write_bytes(bytes(range(256)) * 4096)
            it.world.skew += timedelta(seconds=90)
            (one,) = await aside(it.site)
            assert (one.name, one.kind, one.target, one.paths) == (swap.name, Kind.BEFORE, swap.target, swap.kept)
            assert timedelta(seconds=90) <= one.age < timedelta(seconds=92)
            assert one.bytes is not None
            assert one.bytes >= 1 << 20
            assert one.needed == ""
            assert await discard(swap.name, it.site) == list(map(Path, swap.kept))
            assert await aside(it.site) == []
            assert await swaps(it.site) == []
            assert states(it) == all_of(NEW)
            assert not list(it.site.records_folder.glob("*"))
            with pytest.raises(RestoreError, match="nothing called"):
                await discard(swap.name, it.site)

    asyncio.run(story())


def test_what_was_taken_back_is_listed_until_it_is_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            await undo(swap.name, it.site)
            (one,) = await aside(it.site)
            assert (one.name, one.kind, one.target) == (swap.name, Kind.RESTORED, swap.target)
            await discard(swap.name, it.site)
            assert await aside(it.site) == []
            assert states(it) == all_of(OLD)
            assert not list(it.site.records_folder.glob("*"))

    asyncio.run(story())


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4])
def test_an_old_state_of_which_no_record_is_left_is_put_back_by_what_lies_there(tmp_path: Path, cut: int) -> None:
    """The undoing is cut off after so many renames, and its record lost too; 0 is nowhere."""

    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            shutil.rmtree(it.site.records_folder)
            (one,) = await aside(it.site)
            assert (one.kind, one.target, one.undo) == (Kind.BEFORE, "", f"trigpoint restore --undo {swap.name}")
            if cut:
                with cut_at("after-rename", cut), pytest.raises(CutError):
                    await undo(swap.name, it.site)
                shutil.rmtree(it.site.records_folder, ignore_errors=True)
            if await swaps(it.site):  # all but the last rename leave an old state aside
                await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)
            assert await kinds(it) == [(swap.name, Kind.RESTORED)]
            assert await swaps(it.site) == []
            await discard(swap.name, it.site)
            assert await aside(it.site) == []

    asyncio.run(story())


@pytest.mark.parametrize("recorded", [True, False])
def test_an_old_state_that_is_not_there_of_every_volume_is_not_put_back(tmp_path: Path, recorded: bool) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            shutil.rmtree(swap.kept[1])
            if not recorded:
                shutil.rmtree(it.site.records_folder)
            (one,) = await aside(it.site)
            assert (one.kind, one.undo) == (Kind.BEFORE, "")
            with pytest.raises(RestoreError, match=r"is gone|there is no restore in place"):
                await undo(swap.name, it.site)
            assert states(it) == all_of(NEW)

    asyncio.run(story())


@pytest.mark.parametrize(("place", "count"), CUTS[1:])
def test_what_a_restore_in_place_that_was_cut_off_needs_stays(tmp_path: Path, place: str, count: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            swap = await cut_off(it, place, count)
            (one,) = await aside(it.site)
            assert "was cut off and needs it" in one.needed
            with pytest.raises(RestoreError, match="was cut off and needs it"):
                await discard(swap.name, it.site)
            await resume(swap.name, it.site)
            assert states(it) == all_of(NEW)
            with cut_at("after-rename", 1), pytest.raises(CutError):
                await undo(swap.name, it.site)
            with pytest.raises(RestoreError, match="was cut off and needs it"):
                await discard(swap.name, it.site)
            await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


def test_the_last_state_of_a_volume_and_one_in_use_stay_whatever_is_written_down(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            shutil.rmtree(it.site.records_folder)
            kept = Path(swap.kept[0])
            it.world.at_work.add(str(kept))
            with pytest.raises(RestoreError, match=r"data.before-.* runs"):
                await discard(swap.name, it.site)
            it.world.at_work.clear()
            shutil.rmtree(tmp_path / "data")
            with pytest.raises(RestoreError, match="data is not there"):
                await discard(swap.name, it.site)
            (tmp_path / "data").symlink_to(kept)
            with pytest.raises(RestoreError, match="data leads into it"):
                await discard(swap.name, it.site)
            assert (kept / "state").read_text() == f"data {OLD}"

    asyncio.run(story())


@pytest.mark.volume
def test_what_a_filesystem_is_mounted_in_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            mount = Path(swap.kept[0], "a mount")
            mount.mkdir()
            run("mount", "-t", "tmpfs", "tmpfs", mount)
            try:
                (mount / "precious").touch()
                with pytest.raises(RestoreError, match="a filesystem is mounted at"):
                    await discard(swap.name, it.site)
                assert (mount / "precious").exists()
            finally:
                run("umount", mount)
            await discard(swap.name, it.site)

    asyncio.run(story())


def test_a_removal_that_was_cut_off_leaves_nothing_that_could_be_put_back_and_is_repeated(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            with cut_at("after-aside-rename", 1), pytest.raises(CutError):
                await discard(swap.name, it.site)
            assert await kinds(it) == [(swap.name, Kind.REMOVED)]
            assert await swaps(it.site) == []
            with pytest.raises(RestoreError, match=r"the old state of .* is gone"):
                await undo(swap.name, it.site)
            await discard(swap.name, it.site)
            assert await aside(it.site) == []
            assert states(it) == all_of(NEW)

    asyncio.run(story())


def test_an_undo_is_refused_where_half_of_the_old_state_is_being_removed(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            Path(swap.kept[1]).rename(swap.kept[1].replace(".before-", ".removed-"))
            with pytest.raises(RestoreError, match=r"the old state of .* is gone"):
                await undo(swap.name, it.site)
            assert await kinds(it) == [(swap.name, Kind.BEFORE), (swap.name, Kind.REMOVED)]
            await discard(swap.name, it.site)
            assert await aside(it.site) == []
            assert states(it) == all_of(NEW)

    asyncio.run(story())


def test_nothing_beside_the_volumes_is_touched_but_what_bears_our_name(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, swap):
            others = ["data.before-upgrade", f"other.before-{swap.name}", f"data.before-{swap.name}.old", "data.old"]
            for name in others:
                (tmp_path / name).mkdir()
            (tmp_path / "data.restored-20200101T000000Z").symlink_to(tmp_path / "data.old")
            assert await kinds(it) == [(swap.name, Kind.BEFORE)]
            await discard(swap.name, it.site)
            assert all((tmp_path / name).is_dir() for name in others)

    asyncio.run(story())


@pytest.mark.volume
def test_a_subvolume_that_lies_aside_is_removed_with_what_it_holds(tmp_path: Path) -> None:
    async def story() -> None:
        with loop_volume("btrfs", 256) as mount:
            async with stopped_bank(tmp_path) as it:
                volumes = (Volume("data", str(mount / "data")),)
                for name in ("data", "data.before-20260501T120000Z"):
                    run("btrfs", "-q", "subvolume", "create", mount / name)
                    (mount / name / "base").mkdir()
                    (mount / name / "base" / "1").write_text("rows")
                site = replace(it.site, volumes=volumes)
                (one,) = await aside(site)
                assert one.target == ""
                await discard(one.name, site)
                assert sorted(path.name for path in mount.iterdir()) == ["data"]

    asyncio.run(story())
