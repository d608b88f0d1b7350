"""What every storage that keeps files must do where its disk does not give what stands on it, loses it, or keeps it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import pytest

from tests.conformance.storage_claims import TAG, A, B, C, every, silent
from tests.conformance.storage_rigs import FileRig, Rig, names
from trigger.errors import StorageError
from trigger.model import EPOCH, Cause, Mark, RecoveryPoint, Snapshot, State
from trigger.position import History, Position


def sealed(point: str, snapshots: Sequence[Snapshot]) -> RecoveryPoint:
    """Give a sealed point with these snapshots."""
    mark = Mark(Position(History("memory", "1", 1), 1))
    return RecoveryPoint(point, 1, State.SEALED, Cause.START, (mark,), EPOCH, snapshots=tuple(snapshots))


@every
async def what_was_taken_off_it_is_told_at_a_glance(rig: Rig) -> None:
    storage = rig.driver()
    points = [sealed(point, await storage.snapshot(rig.volumes, point, TAG)) for point in (A, B, C)]
    assert await storage.absent(points) == await storage.absent([]) == set()
    await storage.delete(A)
    rig.lose_a_volume(B)
    assert await rig.driver().absent(points) == {A, B}
    for point in (A, B):
        with pytest.raises(StorageError, match="no whole snapshot") as refused:
            await storage.clone(point, "copy", silent)
        assert "reconcile" not in refused.value.hint, "nothing of it can be mended"


async def what_cannot_be_read_is_not_taken_for_gone(rig: FileRig) -> None:
    storage = rig.driver()
    for point in (A, B):
        await storage.snapshot(rig.volumes, point, TAG)
    with rig.unreadable(A), contextlib.suppress(StorageError):
        shown = {found.point: found.snapshots for found in await rig.driver().tagged()}
        assert [kept.volume for kept in shown[A]] == names(rig.volumes), "as if a crash had left it half made"
    assert [(found.point, found.tag, found.complete) for found in await storage.tagged()] == [
        (A, TAG, True),
        (B, TAG, True),
    ]


async def what_came_back_without_a_file_is_not_whole(rig: FileRig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "folder/row", "one")
    for point in (A, B):
        await storage.snapshot(rig.volumes, point, TAG)
    assert await rig.driver().lack(A) == ""
    with rig.away(A):
        assert [found.point for found in await rig.driver().tagged()] == [B]
    assert await rig.driver().lack(A) == ""
    rig.lose(A, rig.volumes[0], "folder/row")
    whole = [found.point for found in await rig.driver().tagged() if found.complete]
    assert whole == [B] or "folder/row" in await rig.driver().lack(A), "and it would be sealed again"
    assert await rig.driver().lack(B) == ""


async def a_snapshot_without_a_file_gives_no_clone(rig: FileRig) -> None:
    storage = rig.driver()
    rig.write(rig.volumes[0], "folder/row", "one")
    await storage.snapshot(rig.volumes, A, TAG)
    rig.lose(A, rig.volumes[0], "folder/row")
    with pytest.raises(StorageError):
        await storage.clone(A, "copy", silent)
    assert await storage.clones() == []


async def a_point_that_goes_while_it_is_cloned_gives_a_whole_clone_or_none(rig: FileRig) -> None:
    storage, volume = rig.driver(), rig.volumes[0]
    rows = {f"row-{number:03}": "one" for number in range(100)}
    for key, value in rows.items():
        rig.write(volume, key, value)
    await storage.snapshot(rig.volumes[:1], A, TAG)
    cloning = asyncio.create_task(storage.clone(A, "copy", silent))
    while not await rig.driver().clones() and not cloning.done():  # noqa: ASYNC110 - as another process sees it
        await asyncio.sleep(0.001)
    await rig.driver().delete(A)
    try:
        clone = await cloning
    except StorageError:
        assert await storage.clones() == []
    else:
        assert rig.holds(clone, volume) == rows


async def a_clone_whose_removal_is_cut_off_is_whole_to_nobody_and_removed_by_the_next(rig: FileRig) -> None:
    storage = rig.driver()
    for volume in rig.volumes:
        rig.write(volume, "row", "one")
    await storage.snapshot(rig.volumes, A, TAG)
    clone = await storage.clone(A, "copy", silent, identity="first")
    with rig.removal_cut_off(), pytest.raises(StorageError):
        await storage.drop_clone("copy")
    for looked in (storage, rig.driver()):
        (left,) = await looked.clones()
        assert (left.name, left.point, left.identity, left.dropped) == ("copy", A, "first", True)
    with rig.removal_cut_off(), pytest.raises(StorageError):
        await storage.drop_clone("copy")
    assert [(left.name, left.dropped) for left in await storage.clones()] == [("copy", True)]
    assert not [path for _, path in clone.paths if path.exists()], "what knows the paths takes it for whole"
    with pytest.raises(StorageError):
        await storage.clone(A, "copy", silent)
    await rig.driver().drop_clone("copy")
    assert await storage.clones() == []
    again = await storage.clone(A, "copy", silent)
    assert (again.dropped, rig.holds(again, rig.volumes[0])) == (False, {"row": "one"})


LOSSES: list[Callable[[FileRig], Awaitable[None]]] = [
    what_cannot_be_read_is_not_taken_for_gone,
    what_came_back_without_a_file_is_not_whole,
    a_snapshot_without_a_file_gives_no_clone,
    a_point_that_goes_while_it_is_cloned_gives_a_whole_clone_or_none,
    a_clone_whose_removal_is_cut_off_is_whole_to_nobody_and_removed_by_the_next,
]
