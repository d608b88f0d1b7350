"""A restore in place, on real folders: exact, kept, undone, and cut off at every rename."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fixtures.bank import Bank, quiet, two_points
from tests.fixtures.folders import NEW, OLD, CutError, all_of, cut_at, states, stopped_bank
from tests.fixtures.volumes import loop_volume
from trigger.errors import RestoreError
from trigger.model import Volume
from trigger.restore import obstacles, swap
from trigger.restore.clones import CloneState, Site, clones, drop
from trigger.restore.exchange import Place, carry_out, forward
from trigger.restore.inplace import prepare_clone, prepare_in_place, put_in_place, restore_in_place
from trigger.restore.restore import restore
from trigger.restore.swap import resume, swaps, undo


def test_the_restored_state_takes_the_place_and_the_old_one_is_kept_and_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            report, swap = await restore_in_place(await two_points(it), it.site, progress=quiet)
            assert report.checks
            assert states(it) == all_of(NEW)
            assert [(Path(kept) / "state").read_text() for kept in swap.kept] == all_of(OLD)
            assert await swaps(it.site) == [swap]
            assert not await clones(it.site)
            assert not it.world.restored
            assert await resume(swap.name, it.site) == swap
            undone = await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)
            assert [(Path(place.restored) / "state").read_text() for place in undone.places] == all_of(NEW)
            assert not await swaps(it.site)

    asyncio.run(story())


async def cut_off(it: Bank, place: str, count: int) -> swap.Swap:
    """Begin a restore in place that is cut off; gives what is known of it then."""
    target = await two_points(it)
    with cut_at(place, count), pytest.raises(CutError):
        await restore_in_place(target, it.site, progress=quiet)
    (swap,) = await swaps(it.site)
    return swap


CUTS = [("after-swap-intent", 1), *(("after-rename", count) for count in range(1, 5))]


@pytest.mark.parametrize("cuts_of_undo", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize(("place", "count"), CUTS)
def test_a_swap_that_was_cut_off_anywhere_can_be_finished_or_undone(
    tmp_path: Path, place: str, count: int, cuts_of_undo: int | None
) -> None:
    """None finishes it; else it is undone, and the undoing is cut off after so many renames, and repeated."""

    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            swap = await cut_off(it, place, count)
            assert not swap.finished
            if cuts_of_undo is None:
                await resume(swap.name, it.site)
                assert states(it) == all_of(NEW)
                assert [(Path(kept) / "state").read_text() for kept in swap.kept] == all_of(OLD)
                assert not await clones(it.site)
                return
            with cut_at("after-rename", cuts_of_undo), contextlib.suppress(CutError):
                await undo(swap.name, it.site)
            for left in await swaps(it.site):
                await undo(left.name, it.site)
            assert states(it) == all_of(OLD)
            assert not any(Path(kept).exists() for kept in swap.kept)
            assert not await clones(it.site)

    asyncio.run(story())


@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_an_undo_that_was_cut_off_is_finished_or_taken_back_itself(tmp_path: Path, renames: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            _, done = await restore_in_place(await two_points(it), it.site, progress=quiet)
            for end, state in ((resume, NEW), (undo, OLD)):
                with cut_at("after-rename", renames), pytest.raises(CutError):
                    await undo(done.name, it.site)
                assert await swaps(it.site) == [replace(done, finished=False)]
                await end(done.name, it.site)
                assert states(it) == all_of(state)
                assert await swaps(it.site) == ([done] if state is NEW else [])
            assert not list(it.site.records_folder.glob("*.swap"))

    asyncio.run(story())


@pytest.mark.parametrize(("place", "count"), CUTS[:-1])
def test_a_swap_whose_clone_is_gone_takes_nothing_away_and_can_be_undone(
    tmp_path: Path, place: str, count: int
) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            swap = await cut_off(it, place, count)
            await drop(swap.clone, it.site)
            before = sorted(tmp_path.rglob("state"))
            with pytest.raises(RestoreError, match=r"the restored state of .* is gone"):
                await resume(swap.name, it.site)
            assert sorted(tmp_path.rglob("state")) == before
            await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


@pytest.mark.parametrize("removed", [0, 1])
def test_a_finished_swap_stays_where_the_old_state_of_one_volume_was_removed(tmp_path: Path, removed: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            _, swap = await restore_in_place(await two_points(it), it.site, progress=quiet)
            shutil.rmtree(swap.kept[removed])
            with pytest.raises(RestoreError, match=f"the old state of {swap.places[removed].path} is gone"):
                await undo(swap.name, it.site)
            assert states(it) == all_of(NEW)
            assert await resume(swap.name, it.site) == swap
            assert states(it) == all_of(NEW)

    asyncio.run(story())


def test_a_restore_in_place_is_refused_while_a_server_works_there(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            it.world.at_work.add(str(tmp_path / "wal"))
            with pytest.raises(RestoreError, match="wal runs"):
                await restore_in_place(target, it.site, progress=quiet)
            assert states(it) == all_of(OLD)
            assert not await swaps(it.site)
            it.world.at_work.clear()
            _, swap = await restore_in_place(target, it.site, progress=quiet)
            it.world.at_work.add(str(tmp_path / "wal"))
            for end in (undo, resume):
                with pytest.raises(RestoreError, match="wal runs"):
                    await end(swap.name, it.site)
            assert states(it) == all_of(NEW)

    asyncio.run(story())


def test_all_that_stands_in_the_way_is_said_at_once_with_what_would_be_lost(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            (tmp_path / "data" / "inner").mkdir()
            nested = (*it.site.volumes, Volume("inner", str(tmp_path / "data" / "inner")))
            site = replace(it.site, volumes=nested)
            it.world.at_work.add(str(tmp_path / "wal"))
            it.world.free_bytes = 2 << 20
            planned = await prepare_in_place(target, site)
            said = " ".join(finding.message for finding in planned.refused)
            for words in ("wal runs", "inner", "lies in volume data", "the storage has"):
                assert words in said
            assert planned.losses.commits > 0
            with pytest.raises(RestoreError, match=r"wal runs.*lies in volume data"):
                await restore_in_place(target, site, progress=quiet)
            with pytest.raises(RestoreError, match=r"journal.*wal runs"):
                await prepare_in_place(replace(target, at=1 << 40, commit=None), site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


@pytest.mark.parametrize(("place", "count"), CUTS)
def test_a_second_restore_in_place_is_refused_until_the_first_has_ended(tmp_path: Path, place: str, count: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            swap = await cut_off(it, place, count)
            there = sorted(tmp_path.rglob("state"))
            with pytest.raises(RestoreError, match=f"the restore in place {swap.name} .* was cut off"):
                await restore_in_place(await two_points(it), it.site, progress=quiet)
            assert sorted(tmp_path.rglob("state")) == there

    asyncio.run(story())


def test_a_clone_that_is_there_takes_the_place_as_it_is_and_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            await restore(await two_points(it), it.site, progress=quiet, name="early")
            assert (await prepare_clone("early", it.site)).refused == ()
            it.world.at_work.add(str(tmp_path / "data"))
            with pytest.raises(RestoreError, match="data runs"):
                await put_in_place("early", it.site, progress=quiet)
            assert [clone.state for clone in await clones(it.site)] == [CloneState.RUNNING], "it is as it was"
            it.world.at_work.clear()
            status, swap = await put_in_place("early", it.site, progress=quiet)
            assert (status.name, swap.clone) == ("early", "early")
            assert states(it) == all_of(NEW)
            assert not await clones(it.site)
            await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


@pytest.mark.parametrize(("place", "count"), [("after-release", 1), *CUTS])
def test_a_clone_cut_off_on_its_way_into_the_place_is_not_lost(tmp_path: Path, place: str, count: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            await restore(await two_points(it), it.site, progress=quiet, name="early")
            with cut_at(place, count), pytest.raises(CutError):
                await put_in_place("early", it.site, progress=quiet)
            if place == "after-release":
                await put_in_place("early", it.site, progress=quiet)
            else:
                (left,) = await swaps(it.site)
                await resume(left.name, it.site)
            assert states(it) == all_of(NEW)
            assert not await clones(it.site)

    asyncio.run(story())


@pytest.mark.parametrize("by", ["this version", "an earlier one"])
def test_an_undo_leaves_a_later_clone_of_the_same_name_alone(tmp_path: Path, by: str) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            await restore(target, it.site, progress=quiet, name="early")
            _, done = await put_in_place("early", it.site, progress=quiet)
            if by == "an earlier one":
                without_identity(tmp_path / "records" / f"{done.name}.swap")
            await restore(target, it.site, progress=quiet, name="early")
            await undo(done.name, it.site)
            assert states(it) == all_of(OLD)
            assert [(clone.name, clone.state) for clone in await clones(it.site)] == [("early", CloneState.RUNNING)]

    asyncio.run(story())


@pytest.mark.parametrize("by", ["this version", "an earlier one"])
@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_an_undo_that_was_cut_off_takes_up_its_own_state_and_no_later_clone(tmp_path: Path, cuts: int, by: str) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            await restore(target, it.site, progress=quiet, name="early")
            _, done = await put_in_place("early", it.site, progress=quiet)
            with cut_at("after-rename", cuts), pytest.raises(CutError):
                await undo(done.name, it.site)
            if by == "an earlier one":
                without_identity(tmp_path / "records" / f"{done.name}.swap")
            await restore(target, it.site, progress=quiet, name="early")
            later = tmp_path / "clones" / "early"
            for volume in it.site.volumes:
                (later / volume.name / "state").write_text("later")
            await resume(done.name, it.site)
            assert states(it) == all_of(NEW)
            assert [(later / volume.name / "state").read_text() for volume in it.site.volumes] == ["later", "later"]
            assert [(clone.name, clone.state) for clone in await clones(it.site)] == [("early", CloneState.RUNNING)]

    asyncio.run(story())


@pytest.mark.parametrize("by", ["this version", "an earlier one"])
@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_a_swap_does_not_go_on_with_a_later_clone_of_the_same_name(tmp_path: Path, cuts: int, by: str) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            await restore(target, it.site, progress=quiet, name="early")
            with cut_at("after-rename" if cuts else "after-swap-intent", max(cuts, 1)), pytest.raises(CutError):
                await put_in_place("early", it.site, progress=quiet)
            (left,) = await swaps(it.site)
            if by == "an earlier one":
                without_identity(tmp_path / "records" / f"{left.name}.swap")
            await drop("early", it.site)
            await restore(target, it.site, progress=quiet, name="early")
            there = sorted(tmp_path.rglob("state"))
            with pytest.raises(RestoreError, match=r"the restored state of .* is gone: .* is another clone's now"):
                await resume(left.name, it.site)
            assert sorted(tmp_path.rglob("state")) == there
            await undo(left.name, it.site)
            assert states(it) == all_of(OLD)
            assert [(clone.name, clone.state) for clone in await clones(it.site)] == [("early", CloneState.RUNNING)]

    asyncio.run(story())


@pytest.mark.parametrize("is_later", [False, True])
@pytest.mark.parametrize("end", [resume, undo])
def test_of_a_swap_and_a_clone_of_an_earlier_version_the_times_tell(
    tmp_path: Path, end: Callable[[str, Site], Awaitable[swap.Swap]], is_later: bool
) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            await restore(await two_points(it), it.site, progress=quiet, name="early")
            with cut_at("after-swap-intent", 1), pytest.raises(CutError):
                await put_in_place("early", it.site, progress=quiet)
            (left,) = await swaps(it.site)
            without_identity(tmp_path / "records" / f"{left.name}.swap")
            without_identity(tmp_path / "records" / "early.json")
            clone, content = it.world.clones["early"]
            made = clone.created_at + timedelta(hours=1 if is_later else 0)
            it.world.clones["early"] = replace(clone, identity="", created_at=made), content
            if end is resume and is_later:
                with pytest.raises(RestoreError, match="is another clone's now"):
                    await end(left.name, it.site)
            else:
                await end(left.name, it.site)
                assert states(it) == all_of(NEW if end is resume else OLD)
            assert [clone.name for clone in await clones(it.site)] == (["early"] if is_later else [])

    asyncio.run(story())


def without_identity(record: Path) -> None:
    """Leave what an earlier version wrote."""
    content = json.loads(record.read_text())
    del content["identity"]
    record.write_text(json.dumps(content))


@pytest.mark.parametrize("why", ["production has been there since", "earlier version", "nobody knows what it holds"])
def test_a_clone_that_could_not_go_on_as_production_is_refused(tmp_path: Path, why: str) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            await restore(await two_points(it), it.site, progress=quiet, name="early")
            record = tmp_path / "records" / "early.json"
            if why.startswith("earlier"):
                old = json.loads(record.read_text())
                del old["history"], old["stands_at"], old["checks"]
                record.write_text(json.dumps(old | {"of_a_later_version": 1}))
            elif why.startswith("production"):
                it.world.cluster.promote(it.world.cluster.flushed)
                it.commit()
                await it.point()
            else:
                record.unlink()
            with pytest.raises(RestoreError, match=why):
                await put_in_place("early", it.site, progress=quiet)
            assert states(it) == all_of(OLD)
            assert [clone.name for clone in await clones(it.site)] == ["early"]

    asyncio.run(story())


@pytest.mark.parametrize("changed", ["name", "path"])
def test_what_is_of_other_volumes_than_there_are_now_is_not_put_in_place(tmp_path: Path, changed: str) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            await restore(target, it.site, progress=quiet, name="early")
            first, *others = it.site.volumes
            now = replace(first, name="other") if changed == "name" else replace(first, path=str(tmp_path / "moved"))
            (tmp_path / "moved").mkdir()
            site = replace(it.site, volumes=(now, *others))
            plans = (await prepare_in_place(target, site), await prepare_clone("early", site))
            assert [sum("is of the volumes" in one.message for one in plan.refused) for plan in plans] == [1, 1]
            for asked in (restore_in_place(target, site, progress=quiet), put_in_place("early", site, progress=quiet)):
                with pytest.raises(RestoreError, match="is of the volumes"):
                    await asked
            assert states(it) == all_of(OLD)
            assert [clone.name for clone in await clones(it.site)] == ["early"]

    asyncio.run(story())


def test_a_failed_restore_changes_nothing_in_place(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            it.world.free_bytes = 2 << 20
            with pytest.raises(RestoreError, match="storage has"):
                await restore_in_place(target, it.site, progress=quiet)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


def test_volumes_that_lie_in_each_other_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            (tmp_path / "data" / "inner").mkdir()
            nested = (*it.site.volumes, Volume("inner", str(tmp_path / "data" / "inner")))
            with pytest.raises(RestoreError, match=r"volume inner .* lies in volume data"):
                await restore_in_place(target, replace(it.site, volumes=nested), progress=quiet)

    asyncio.run(story())


@pytest.mark.volume
def test_what_cannot_be_renamed_is_refused_before_and_the_clone_is_gone(tmp_path: Path) -> None:
    async def story() -> None:
        with loop_volume("ext4", 64) as elsewhere:
            async with stopped_bank(tmp_path, elsewhere / "clones") as it:
                target = await two_points(it)
                with pytest.raises(RestoreError, match="another filesystem"):
                    await restore_in_place(target, it.site, progress=quiet)
                assert states(it) == all_of(OLD)
                assert not await clones(it.site)
                assert not any((elsewhere / "clones").glob("*"))
                mounted = replace(it.site, volumes=(Volume("data", str(elsewhere)),))
                with pytest.raises(RestoreError, match="is a mount point"):
                    await restore_in_place(target, mounted, progress=quiet)

    asyncio.run(story())


@pytest.mark.volume
def test_a_btrfs_subvolume_takes_the_place_of_another(tmp_path: Path) -> None:
    with loop_volume("btrfs", 256) as mount:
        for name in ("data", "copy"):
            subprocess.run(["btrfs", "-q", "subvolume", "create", str(mount / name)], check=True)
            (mount / name / "state").write_text(name)
        (mount / "clones").mkdir()
        (mount / "copy").rename(mount / "clones" / "copy")
        assert obstacles.immovable(mount / "clones" / "copy", mount) is None
        paths = (str(mount / name) for name in ("data", "data.before", "clones/copy", "data.restored"))
        carry_out(forward(Place(*paths)))
        assert (mount / "data" / "state").read_text() == "copy"
        assert (mount / "data.before" / "state").read_text() == "data"
