"""A restore in place is taken back only where what it put there still lies there, and nothing followed on it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fixtures.bank import Bank, quiet, two_points
from tests.fixtures.folders import NEW, OLD, CutError, all_of, cut_at, is_cluster, states, stopped_bank
from trigger import failpoint
from trigger.errors import RestoreError
from trigger.replay import Target
from trigger.restore.aside import Kind, aside, discard
from trigger.restore.inplace import prepare_resume, prepare_undo, restore_in_place
from trigger.restore.swap import Swap, noted, resume, stranger, swaps, undo, undoable

OTHER = "as somebody else put it there"


async def restored(it: Bank, target: Target, *, after: int = 0) -> Swap:
    it.world.skew += timedelta(seconds=after)
    _, swap = await restore_in_place(target, it.site, progress=quiet)
    return swap


@asynccontextmanager
async def put_back(folder: Path, times: int = 1) -> AsyncIterator[tuple[Bank, list[Swap]]]:
    """Give a bank that was restored in place so many times, a minute apart."""
    async with stopped_bank(folder) as it:
        target = await two_points(it)
        yield it, [await restored(it, target, after=60) for _ in range(times)]


def put_another(it: Bank, cluster: Callable[[Path], None]) -> None:
    """Put another state in the place of the volumes, by hand."""
    for volume in it.site.volumes:
        shutil.rmtree(volume.path)
        Path(volume.path).mkdir()
        (Path(volume.path) / "state").write_text(f"{volume.name} {OTHER}")
        cluster(Path(volume.path))


def upgraded(folder: Path) -> None:
    is_cluster(folder, 1, system="another")


def older_copy(folder: Path) -> None:
    is_cluster(folder, 1)


def promoted_standby(folder: Path) -> None:
    """Which took the same number, and left the one before elsewhere."""
    is_cluster(folder, 2, left_at=2000)


def no_cluster(folder: Path) -> None:
    assert folder.exists()


ANOTHER = [upgraded, older_copy, promoted_standby, no_cluster]


@pytest.mark.parametrize("another", ANOTHER)
def test_what_a_restore_in_place_did_not_put_there_is_not_undone_away(
    tmp_path: Path, another: Callable[[Path], None]
) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, (swap,)):
            assert await undoable("last", it.site) == swap
            assert await stranger(swap, it.site) == ""
            put_another(it, another)
            with pytest.raises(RestoreError, match=f"and not what the restore in place {swap.name}") as refused:
                await undo(swap.name, it.site)
            assert swap.lineage in refused.value.message, "what was expected"
            assert await stranger(swap, it.site) in refused.value.message, "what lies there"
            assert states(it) == all_of(OTHER)
            (one,) = await aside(it.site)
            assert (one.kind, one.undo) == (Kind.BEFORE, "")
            assert one.not_undone == refused.value.message

            assert all(volume.path in str(refused.value.hint) for volume in it.site.volumes), "what to do"
            for volume in it.site.volumes:
                Path(volume.path).rename(f"{volume.path}.mine")
            await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)
            assert await aside(it.site) == [], "what was moved away is nothing of ours"
            assert Path(f"{it.site.volumes[0].path}.mine", "state").exists()

    asyncio.run(story())


def test_a_volume_that_was_moved_away_by_itself_is_no_reason_to_take_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, (swap,)):
            first = it.site.volumes[0].path
            Path(first).rename(f"{first}.mine")
            with pytest.raises(RestoreError, match=f"nothing lies at {re.escape(first)}"):
                await undo(swap.name, it.site)
            assert (Path(it.site.volumes[1].path) / "state").read_text() == all_of(NEW)[1]

    asyncio.run(story())


@pytest.mark.parametrize(("another", "is_taken_back"), [(None, True), (upgraded, False), (older_copy, False)])
@pytest.mark.parametrize("record", ["of an earlier version", "lost"])
def test_where_it_was_not_noted_what_was_put_there_it_is_what_went_on_by_itself_from_the_old_state(
    tmp_path: Path, record: str, another: Callable[[Path], None] | None, is_taken_back: bool
) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, (swap,)):
            if record == "lost":
                shutil.rmtree(it.site.records_folder)
            else:
                written = it.site.records_folder / f"{swap.name}.swap"
                written.write_text(json.dumps(dict(json.loads(written.read_text()), lineage="")))
            if another is not None:
                put_another(it, another)
            if is_taken_back:
                await undo(swap.name, it.site)
                assert states(it) == all_of(OLD)
            else:
                with pytest.raises(RestoreError, match="nobody noted what that was"):
                    await undo(swap.name, it.site)
                assert states(it) == all_of(OTHER)

    asyncio.run(story())


@pytest.mark.parametrize("renames", [2, 3])
def test_what_came_into_the_place_of_one_that_was_cut_off_is_not_undone_away(tmp_path: Path, renames: int) -> None:
    """Behind so many renames the data is in its place, and the log is not."""

    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            with cut_at("after-rename", renames), pytest.raises(CutError):
                await restored(it, await two_points(it))
            (swap,) = await swaps(it.site)
            data = Path(it.site.volumes[0].path)
            is_cluster(data, 1, system="another")
            with pytest.raises(RestoreError, match=f"move {re.escape(str(data))} away by hand"):
                await undo(swap.name, it.site)
            data.rename(f"{data}.mine")
            await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


def test_restores_in_place_are_taken_back_the_newest_first(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path, 3) as (it, (first, second, third)):
            before = sorted(tmp_path.rglob("state"))
            for older in (first, second):
                with pytest.raises(RestoreError, match=f"{third.name} .* was put in place after {older.name}"):
                    await undo(older.name, it.site)
            assert sorted(tmp_path.rglob("state")) == before
            for swap in (third, second, first):
                await undo(swap.name, it.site)
            assert states(it) == all_of(OLD)
            assert [(one.name, one.kind) for one in await aside(it.site)] == [
                (swap.name, Kind.RESTORED) for swap in (first, second, third)
            ]

    asyncio.run(story())


@pytest.mark.parametrize("gone", ["taken back", "its old state deleted by hand", "its old state dropped"])
def test_the_last_one_is_the_newest_also_where_that_cannot_be_taken_back(tmp_path: Path, gone: str) -> None:
    async def story() -> None:
        async with put_back(tmp_path, 2) as (it, (first, second)):
            if gone == "taken back":
                await undo("last", it.site)
                why = f"{second.name} .* was taken back already"
            elif gone == "its old state dropped":
                await discard(second.name, it.site)
                why = f"not what the restore in place {first.name} .* put there"
            else:
                for kept in second.kept:
                    shutil.rmtree(kept)
                why = "the old state of .* is gone"
            before = sorted(tmp_path.rglob("state"))
            with pytest.raises(RestoreError, match=why):
                await undo("last", it.site)
            assert sorted(tmp_path.rglob("state")) == before
            if gone == "taken back":
                await undo(first.name, it.site)
                assert states(it) == all_of(OLD)

    asyncio.run(story())


def test_what_was_put_there_is_still_known_after_an_undoing_was_cut_off_and_taken_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, (swap,)):
            with cut_at("after-rename", 1), pytest.raises(CutError):
                await undo(swap.name, it.site)
            assert await resume(swap.name, it.site) == swap
            assert noted(it.site.records_folder) == [swap]
            await undo("last", it.site)
            assert states(it) == all_of(OLD)
            with pytest.raises(RestoreError, match="there is no restore in place called 20000101T000000Z"):
                await undo("20000101T000000Z", it.site)

    asyncio.run(story())


def everything(folder: Path) -> list[tuple[str, str]]:
    """Give every file below a folder with what it holds."""
    return [(str(path), path.read_text()) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4])
def test_what_a_plan_says_is_all_that_is_renamed_then_and_the_plan_changes_nothing(
    tmp_path: Path, renames: int
) -> None:
    """The restore in place was cut off behind so many renames; behind 0 it was done."""

    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            with cut_at("after-rename", renames), suppress(CutError):
                await restored(it, await two_points(it))
            for prepare, end, state in ((prepare_resume, resume, NEW), (prepare_undo, undo, OLD)):
                (swap,) = await swaps(it.site)
                before = everything(tmp_path)
                planned = await prepare(swap.name, it.site)
                assert everything(tmp_path) == before
                assert (planned.swap, planned.refused) == (swap, ())
                done: list[str] = []
                with counted(done):
                    await end(swap.name, it.site)
                assert len(done) == len(planned.renames)
                assert states(it) == all_of(state)

    asyncio.run(story())


@contextmanager
def counted(done: list[str]) -> Iterator[None]:
    """Note each rename of an exchange."""
    failpoint.hook = lambda name: done.append(name) if name == "after-rename" else None
    try:
        yield
    finally:
        failpoint.hook = None


def test_a_plan_names_all_that_is_in_the_way_of_an_exchange(tmp_path: Path) -> None:
    async def story() -> None:
        async with put_back(tmp_path) as (it, (swap,)):
            with pytest.raises(RestoreError, match="no restore in place was cut off"):
                await prepare_resume("last", it.site)
            it.world.at_work = {it.site.volumes[0].path}
            for place in swap.places:
                Path(place.restored).mkdir()
            planned = await prepare_undo("last", it.site)
            said = [finding.message for finding in planned.refused]
            assert said == [
                f"the server in {it.site.volumes[0].path} runs",
                *(f"{place.path} cannot be renamed: {place.restored} exists" for place in swap.places[::-1]),
            ]

    asyncio.run(story())
