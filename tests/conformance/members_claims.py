"""What several storages must do as one, besides what each of them does: nobody takes a part for the whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.conformance.storage_claims import TAG, A, B, silent
from tests.conformance.storage_rigs import Killed, MembersRig, names
from trigger.errors import StorageError
from trigger.ports import Storage

MEMBERS: list[Callable[[MembersRig], Awaitable[None]]] = []


def claim(one: Callable[[MembersRig], Awaitable[None]]) -> Callable[[MembersRig], Awaitable[None]]:
    MEMBERS.append(one)
    return one


async def shown(storage: Storage) -> list[tuple[str, str | None, bool]]:
    return [(found.point, found.tag, found.complete) for found in await storage.tagged()]


@claim
async def every_member_bears_the_tag_and_the_names_of_the_others(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    first, second = rig.members()
    ((of_data,), (of_wal,)) = await first.tagged(), await second.tagged()
    assert (of_data.tag, of_data.beside) == (TAG, ("wal",))
    assert (of_wal.tag, of_wal.beside) == (TAG, ("data",))


@claim
async def a_point_without_one_of_its_members_is_not_complete_and_gives_no_clone(rig: MembersRig) -> None:
    storage = rig.driver()
    await storage.snapshot(rig.volumes, A, TAG)
    with rig.member_away(A):
        assert await shown(rig.driver()) == [(A, TAG, False)]
        with pytest.raises(StorageError, match="no whole snapshot"):
            await rig.driver().clone(A, "copy", silent)
        with pytest.raises(StorageError, match="unfinished"):
            await rig.driver().snapshot(rig.volumes, A, TAG)
        assert await rig.driver().clones() == []
    assert await shown(rig.driver()) == [(A, TAG, True)]
    assert names(rig.volumes) == [volume for volume, _ in (await rig.driver().clone(A, "copy", silent)).paths]


@claim
async def a_snapshot_that_is_cut_off_between_two_members_is_unfinished_and_goes(rig: MembersRig) -> None:
    first, _ = rig.members()
    await first.snapshot(rig.volumes[:1], A, TAG, beside=["wal"])
    storage = rig.driver()
    assert await shown(storage) == [(A, TAG, False)]
    await storage.delete(A)
    assert await shown(storage) == []


@claim
async def members_whose_tags_differ_have_none_until_it_is_written_anew(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    first, _ = rig.members()
    await first.retag(A, "sealed")
    (found,) = await rig.driver().tagged()
    assert (found.tag, found.complete, [kept.volume for kept in found.snapshots]) == (None, False, names(rig.volumes))
    await rig.driver().retag(A, "anew")
    assert await shown(rig.driver()) == [(A, "anew", True)]


@claim
async def a_removal_that_is_cut_off_between_two_members_leaves_nothing_whole(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    first, _ = rig.members()
    await first.delete(A)
    assert await shown(rig.driver()) == [(A, TAG, False)]
    await rig.driver().delete(A)
    assert await shown(rig.driver()) == []


@claim
async def a_member_that_will_not_go_keeps_no_other_from_going(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    first, second = rig.members()
    rig.refused = ((0, "delete"),)
    storage = rig.driver()
    with pytest.raises(StorageError, match="storage first: it will not"):
        await storage.delete(A)
    assert [len(await one.tagged()) for one in (first, second)] == [1, 0]


@claim
async def a_clone_that_fails_in_one_storage_is_left_in_none(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    _, second = rig.members()
    await second.clone(A, "other", silent)
    rig.refused = ((1, "clone"),)
    storage = rig.driver()
    with pytest.raises(StorageError, match="storage second: it will not"):
        await storage.clone(A, "copy", silent)
    assert [clone.name for clone in await storage.clones()] == ["other"]
    with pytest.raises(StorageError, match="exists already"):
        await storage.clone(A, "other", silent)
    assert [clone.name for clone in await second.clones()] == ["other"]


@claim
async def a_removal_of_a_clone_that_is_cut_off_between_two_storages_is_shown_as_one(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    await rig.driver().clone(A, "copy", silent, identity="it")
    first, _ = rig.members()
    assert [(clone.name, clone.identity, clone.dropped) for clone in await rig.driver().clones()] == [
        ("copy", "it", False)
    ]
    await first.drop_clone("copy")
    assert [(clone.name, clone.identity, clone.dropped) for clone in await rig.driver().clones()] == [
        ("copy", "it", True)
    ]
    await rig.driver().drop_clone("copy")
    assert await rig.driver().clones() == []


@claim
async def the_copies_of_a_clone_go_in_the_order_in_which_they_were_made_whatever_order_the_storages_have_now(
    rig: MembersRig,
) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    await rig.driver().clone(A, "copy", silent)
    rig.reversed, rig.dies = True, ((0, "drop_clone"),)
    with pytest.raises(Killed):
        await rig.driver().drop_clone("copy")
    assert [len(await one.clones()) for one in rig.members()] == [1, 1], "else the first would look like a whole one"
    rig.dies = ()
    await rig.driver().drop_clone("copy")
    assert await rig.driver().clones() == []


@claim
async def what_was_cut_before_there_was_a_second_storage_is_whole(rig: MembersRig) -> None:
    first, _ = rig.members()
    await first.snapshot(rig.volumes, A, TAG)
    storage = rig.driver()
    assert await shown(storage) == [(A, TAG, True)]
    assert [volume for volume, _ in (await storage.clone(A, "copy", silent)).paths] == names(rig.volumes)
    await storage.snapshot(rig.volumes, B, TAG)
    assert await shown(storage) == [(A, TAG, True), (B, TAG, True)]


@claim
async def a_tag_that_is_written_anew_keeps_the_names_of_the_other_members(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    rig.damage_tag(A)
    await rig.driver().retag(A, "anew")
    with rig.member_away(A):
        assert await shown(rig.driver()) == [(A, "anew", False)]
        with pytest.raises(StorageError, match="no whole snapshot"):
            await rig.driver().clone(A, "copy", silent)
    assert await shown(rig.driver()) == [(A, "anew", True)]


@claim
async def a_clone_of_which_a_copy_lies_in_a_storage_that_is_away_is_not_removed_in_part(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    await rig.driver().clone(A, "copy", silent)
    with rig.second_away():
        with pytest.raises(StorageError, match="storage second shows nothing, and a copy of wal may lie there"):
            await rig.driver().drop_clone("copy")
        assert [clone.dropped for clone in await rig.driver().clones()] == [False]
    await rig.driver().drop_clone("copy")
    assert await rig.driver().clones() == []


@claim
async def a_storage_that_keeps_no_volume_hinders_nothing_by_its_room_its_budget_or_its_absence(rig: MembersRig) -> None:
    await rig.driver().snapshot(rig.volumes, A, TAG)
    rig.homes = {"data": "first", "wal": "first"}
    moved = rig.driver()
    with rig.second_away():
        moved = rig.driver()
        await moved.snapshot(rig.volumes, B, TAG)
        await moved.retag(B, "sealed")
        space = await moved.space()
        assert (space.name, space.snapshots, space.silent) == ("first", 2, ("second",))
    assert await shown(moved) == [(A, TAG, True), (B, "sealed", True)]
