"""A restore in place that a signal ends, or its undoing: it comes to its end, and else is named with what ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.bank import quiet, two_points
from tests.fixtures.folders import NEW, OLD, all_of, states, stopped_bank
from tests.trigger.restore.test_restore_in_place import CUTS
from trigger import failpoint
from trigger.errors import StorageError
from trigger.restore.aside import discard
from trigger.restore.clones import CloneState, Site, clones
from trigger.restore.inplace import put_in_place, restore_in_place
from trigger.restore.restore import restore
from trigger.restore.swap import Swap, resume, swaps, undo


@contextmanager
def cancelled_at(
    place: str, count: int = 1, *, times: int = 1, besides: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Cancel the task at hand so often at a failpoint, whichever thread comes to it, and do something besides."""
    loop, task, left = asyncio.get_running_loop(), asyncio.current_task(), [count]
    assert task is not None

    def cancel(name: str) -> None:
        if name != place:
            return
        left[0] -= 1
        if left[0] == 0:
            besides()
            for _ in range(times):
                loop.call_soon_threadsafe(task.cancel)
                time.sleep(0.01)

    failpoint.hook = cancel
    try:
        yield
    finally:
        failpoint.hook = None


async def ended(act: Awaitable[object]) -> str:
    """Give what is said of an act that is cancelled."""
    with pytest.raises(asyncio.CancelledError) as raised:
        await act
    task = asyncio.current_task()
    while task is not None and task.uncancel():
        pass
    return "; ".join(getattr(raised.value, "__notes__", ()))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("place", "count"), CUTS)
def test_a_swap_that_was_begun_goes_to_its_end_and_says_so(tmp_path: Path, place: str, count: int, times: int) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            with cancelled_at(place, count, times=times):
                said = await ended(restore_in_place(target, it.site, progress=quiet))
            assert states(it) == all_of(NEW)
            (done,) = await swaps(it.site)
            assert done.finished
            takes_back = f"trigpoint restore --undo {done.name} takes it back"
            assert said == f"the restore in place {done.name} is done; {takes_back}"
            assert not await clones(it.site)

    asyncio.run(story())


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize(("end", "state", "told"), [(undo, OLD, "is taken back"), (resume, NEW, "is done")])
def test_what_ends_a_restore_in_place_goes_to_its_end_itself(
    tmp_path: Path, end: Callable[[str, Site], Awaitable[Swap]], state: str, told: str, renames: int
) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            _, done = await restore_in_place(await two_points(it), it.site, progress=quiet)
            if end is resume:
                await in_the_way(it.site, done, undo)
            with cancelled_at("after-rename", renames):
                said = await ended(end(done.name, it.site))
            assert f"the restore in place {done.name} {told}" in said
            assert states(it) == all_of(state)
            assert [swap.finished for swap in await swaps(it.site)] == ([True] if end is resume else [])

    asyncio.run(story())


async def in_the_way(site: Site, swap: Swap, act: Callable[[str, Site], Awaitable[Swap]]) -> str:
    """Cancel the undoing of a swap while a folder lies in its way; gives what is said, with the folder gone again."""
    blocked = Path(swap.places[0].restored)
    with cancelled_at("after-rename", 2, besides=blocked.mkdir):
        said = await ended(act(swap.name, site))
    blocked.rmdir()
    return said


def test_a_swap_that_is_cut_off_all_the_same_is_named_with_what_ends_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            _, done = await restore_in_place(await two_points(it), it.site, progress=quiet)
            said = await in_the_way(it.site, done, undo)
            assert f"{done.places[0].restored} exists" in said
            assert "was cut off: volumes may lie in different states" in said
            assert f"trigpoint restore --resume {done.name}, or --undo {done.name}" in said
            await undo(done.name, it.site)
            assert states(it) == all_of(OLD)

    asyncio.run(story())


def cancelled_in_release(site: Site) -> None:
    """Let the task be cancelled that makes a clone fit to take the place."""

    async def cancelled(*_: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    site.recovery.release = cancelled  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("fails", [None, OSError(5, "Input/output error"), StorageError("no answer")], ids=str)
def test_what_was_ended_before_the_swap_is_removed_or_named(tmp_path: Path, fails: Exception | None) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            target = await two_points(it)
            drop = it.site.storage.drop_clone

            async def broken(name: str) -> None:
                if fails is not None:
                    raise fails
                await drop(name)

            it.site.storage.drop_clone = broken  # type: ignore[method-assign]
            cancelled_in_release(it.site)
            said = await ended(restore_in_place(target, it.site, progress=quiet))
            assert states(it) == all_of(OLD)
            left = [clone.name for clone in await clones(it.site)]
            if fails is None:
                assert not left
                assert "is removed" in said
            else:
                assert f"clone {left[0]} was left behind ({fails}); remove it with: trigpoint clones drop" in said

    asyncio.run(story())


def test_a_clone_that_was_there_stays_where_its_way_into_the_place_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            await restore(await two_points(it), it.site, progress=quiet, name="early")
            cancelled_in_release(it.site)
            said = await ended(put_in_place("early", it.site, progress=quiet))
            assert "clone early is there" in said
            assert states(it) == all_of(OLD)
            assert [(clone.name, clone.state) for clone in await clones(it.site)] == [("early", CloneState.STOPPED)]

    asyncio.run(story())


def test_an_error_of_a_removal_that_was_to_come_to_its_end_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with stopped_bank(tmp_path) as it:
            _, done = await restore_in_place(await two_points(it), it.site, progress=quiet)
            with cancelled_at("after-aside-rename"):
                assert await ended(discard(done.name, it.site)) == f"what lay aside of {done.name} is removed"

    asyncio.run(story())
