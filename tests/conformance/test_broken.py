"""The suites catch drivers that break a promise: each of these does, in a way that real drivers have done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from connectors.hosts import local as local_module
from connectors.hosts.local import LocalAgent
from connectors.storage.copying import Copier, Manifest, Seen
from connectors.storage.directory import DirectoryStorage
from connectors.storage.removal import remove_tree
from connectors.syncfs import flush
from tests.conformance import (
    agent_claims,
    members_claims,
    storage_claims,
    storage_errors_claims,
    storage_unmounted_claims,
)
from tests.conformance.agent_rigs import LocalAgentRig
from tests.conformance.storage_rigs import directory, members
from tests.fixtures.volumes import failing_volume
from trigger.errors import AgentError, StorageError
from trigger.lock import lock
from trigger.model import Flush, RecoveryPoint, Snapshot, Volume
from trigger.point_names import tag_name
from trigger.ports import Capability, Clone, Progress, Tagged
from trigger.service.members import Members

CAUGHT = (AssertionError, pytest.fail.Exception, KeyError)
"""A claim that does not hold, an error that should have come, an error that is not the port's."""


class ForgetsTheTag(DirectoryStorage):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        return [replace(found, tag=None) for found in await super().tagged(point)]


class KeepsTheTagInItsHead(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        made = await super().snapshot(volumes, point, "", beside=beside)
        self._tags = getattr(self, "_tags", {}) | {point: tag}
        return made

    async def tagged(self, point: str | None = None) -> list[Tagged]:
        tags: dict[str, str] = getattr(self, "_tags", {})
        return [replace(found, tag=tags.get(found.point)) for found in await super().tagged(point)]


class TakesAReadErrorForNothing(DirectoryStorage):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        try:
            return await super().tagged(point)
        except StorageError:
            return [Tagged(point, None, (), complete=False) for point in self._shelf.points()]


class BelievesWhatCameBack(DirectoryStorage):
    async def lack(self, point: str) -> str:
        found = next(found for found in await self.tagged() if found.point == point)
        return "" if found.complete else "not every volume is there"


class ClonesWhatIsLeft(DirectoryStorage):
    def _copy_whole(self, kept: Path, listed: Manifest, target: Path, copier: Copier, point: str) -> None:
        copier.living = True
        with patch.object(copier, "told", lambda _: time.sleep(0.005)):
            copier.copy(kept, target)


class TakesAFolderForWholeSnapshots(DirectoryStorage):
    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        return {point.id for point in points if not self._shelf.point_folder(point.id).exists()}


class CutsAgainWhenRepeated(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        await self.delete(point)
        return await super().snapshot(volumes, point, tag, beside=beside)


class CallsTheUnfinishedComplete(DirectoryStorage):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        return [replace(found, complete=True) for found in await super().tagged(point)]


class ClonesByHardLink(DirectoryStorage):
    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        clone = await super().clone(point, name, progress, identity=identity, beside=beside)
        for volume, path in clone.paths:
            shutil.rmtree(path)
            kept = self._shelf.point_folder(point) / volume
            shutil.copytree(kept, path, copy_function=os.link, symlinks=True)
        return clone


class ClaimsForAnybody(DirectoryStorage):
    async def claim(self, holder: str = "") -> None:
        self._shelf.folder.mkdir(exist_ok=True)


class ForgetsToClaimWhatIsNotThereYet(DirectoryStorage):
    async def claim(self, holder: str = "") -> None:
        if self._shelf.folder.exists():
            await super().claim(holder)


class ClaimsOncePerSnapshot(DirectoryStorage):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._shelf._take_claim = self._lock_again  # type: ignore[method-assign]

    def _lock_again(self) -> None:
        held = lock(self._shelf.folder / "lock")
        if held is None:
            raise StorageError("another one holds it", retryable=False)
        time.sleep(0.2)
        self._shelf._claim = held


class KeepsItsClaim(DirectoryStorage):
    async def close(self) -> None:
        """Leave it to the end of the process."""


class OverwritesAClone(DirectoryStorage):
    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        await self.drop_clone(name)
        return await super().clone(point, name, progress, identity=identity, beside=beside)


class ForgetsWhoseACloneIs(DirectoryStorage):
    async def clones(self) -> list[Clone]:
        return [replace(found, identity="") for found in await super().clones()]


class LeavesAFailedClone(DirectoryStorage):
    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        if not self._shelf.point_folder(point).exists():
            self._shelf.begin_clone(name, point, [], identity)
        return await super().clone(point, name, progress, identity=identity, beside=beside)


class RemovesACloneWhereItLies(DirectoryStorage):
    async def drop_clone(self, name: str) -> None:
        try:
            remove_tree(self._shelf.clone_folder(name))
        except OSError as error:
            raise StorageError(str(error)) from error


class DeletesWhatBeginsLikeOurs(DirectoryStorage):
    async def delete(self, point: str) -> None:
        for found in self._shelf.folder.glob(f"{tag_name(point)}*"):
            shutil.rmtree(found)


class ListsWhatBeginsLikeOurs(DirectoryStorage):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        folders = self._shelf.folder.glob("trg-*")
        return [Tagged(folder.name[4:], None, (), complete=False) for folder in folders]


class TrustsTheModificationTime(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        def holds_unchanged(self: Manifest, name: str, seen: Seen) -> bool:
            known = self.files.get(name)
            return known is not None and (known.size, known.modified_ns) == (seen.size, seen.modified_ns)

        with patch.object(Manifest, "holds_unchanged", holds_unchanged):
            return await super().snapshot(volumes, point, tag, beside=beside)


class SharesWithTheSource(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        def copy(self: Copier, source: Path, target: Path) -> None:
            shutil.copytree(source, target, copy_function=os.link, symlinks=True)

        with patch.object(Copier, "copy", copy):
            return await super().snapshot(volumes, point, tag, beside=beside)


class ForgetsTheSecondVolume(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        return await super().snapshot(volumes[:1], point, tag, beside=beside)


class TakesNoNoticeOfRoom(DirectoryStorage):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._shelf._require_room = lambda: None  # type: ignore[method-assign]
        self._shelf.require_free = lambda more_bytes=0: None  # type: ignore[method-assign]


class ClaimsToBeAtomic(DirectoryStorage):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.capabilities = self.capabilities | {Capability.ATOMIC}


class RaisesWhatItLikes(DirectoryStorage):
    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        if self._shelf.read(point) is None:
            raise KeyError(point)
        await super().retag(point, tag)


class TakesWhatIsAwayForDeleted(DirectoryStorage):
    async def delete(self, point: str) -> None:
        if self._shelf.point_folder(point).exists():
            await super().delete(point)


class TakesWhatIsAwayForGone(DirectoryStorage):
    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        with patch.object(self._shelf._place, "is_there"):
            return self._shelf.absent(points)


class TakesAnyFolderForItsOwn(DirectoryStorage):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._shelf._place.is_there = folder.exists  # type: ignore[method-assign]


class HoldsUpTheLoop(DirectoryStorage):
    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        time.sleep(0.6)  # noqa: ASYNC251 - that is the point
        return await super().snapshot(volumes, point, tag, beside=beside)


BROKEN_STORAGES: list[tuple[type[DirectoryStorage], Callable[[Any], Awaitable[None]]]] = [
    (ForgetsTheTag, storage_claims.a_tag_comes_back_as_it_was_given_from_the_storage_alone),
    (KeepsTheTagInItsHead, storage_claims.a_tag_comes_back_as_it_was_given_from_the_storage_alone),
    (TakesAReadErrorForNothing, storage_errors_claims.what_cannot_be_read_is_not_taken_for_gone),
    (BelievesWhatCameBack, storage_errors_claims.what_came_back_without_a_file_is_not_whole),
    (ClonesWhatIsLeft, storage_errors_claims.a_snapshot_without_a_file_gives_no_clone),
    (ClonesWhatIsLeft, storage_errors_claims.a_point_that_goes_while_it_is_cloned_gives_a_whole_clone_or_none),
    (TakesAFolderForWholeSnapshots, storage_errors_claims.what_was_taken_off_it_is_told_at_a_glance),
    (CutsAgainWhenRepeated, storage_claims.the_same_point_twice_is_the_same_snapshot),
    (CallsTheUnfinishedComplete, storage_claims.what_a_crash_left_is_shown_as_unfinished_and_deleted),
    (ClonesByHardLink, storage_claims.what_is_written_to_a_clone_reaches_neither_snapshot_nor_volume),
    (ClaimsForAnybody, storage_claims.a_claim_is_held_by_one_until_it_lets_go),
    (ForgetsToClaimWhatIsNotThereYet, storage_claims.of_two_that_claim_a_storage_without_a_point_only_one_makes_points),
    (ClaimsOncePerSnapshot, storage_claims.snapshots_side_by_side_do_not_contend_for_their_own_claim),
    (KeepsItsClaim, storage_claims.a_claim_is_held_by_one_until_it_lets_go),
    (OverwritesAClone, storage_claims.the_name_of_a_clone_is_taken_once),
    (ForgetsWhoseACloneIs, storage_claims.a_clone_bears_the_identity_that_it_was_made_with),
    (LeavesAFailedClone, storage_claims.a_clone_that_fails_leaves_nothing_behind),
    (
        RemovesACloneWhereItLies,
        storage_errors_claims.a_clone_whose_removal_is_cut_off_is_whole_to_nobody_and_removed_by_the_next,
    ),
    (DeletesWhatBeginsLikeOurs, storage_claims.what_is_not_ours_is_neither_listed_nor_deleted),
    (ListsWhatBeginsLikeOurs, storage_claims.what_is_not_ours_is_neither_listed_nor_deleted),
    (TrustsTheModificationTime, storage_claims.a_change_that_hides_its_time_is_in_the_next_snapshot),
    (SharesWithTheSource, storage_claims.a_snapshot_holds_what_was_written_before_it_and_nothing_after),
    (ForgetsTheSecondVolume, storage_claims.every_volume_has_a_snapshot_of_its_own),
    (TakesNoNoticeOfRoom, storage_claims.no_snapshot_is_made_beyond_the_budget),
    (TakesNoNoticeOfRoom, storage_claims.no_snapshot_is_made_while_too_little_is_free),
    (ClaimsToBeAtomic, storage_claims.an_atomic_snapshot_holds_no_write_without_those_flushed_before_it),
    (RaisesWhatItLikes, storage_claims.a_tag_without_a_snapshot_is_refused),
    (TakesWhatIsAwayForDeleted, storage_unmounted_claims.what_is_away_is_not_taken_for_empty),
    (TakesWhatIsAwayForGone, storage_unmounted_claims.what_is_away_is_not_taken_for_empty),
    (TakesAnyFolderForItsOwn, storage_unmounted_claims.what_is_away_is_not_taken_for_empty),
    (HoldsUpTheLoop, storage_claims.the_loop_goes_on_while_a_snapshot_is_made),
]


@pytest.mark.parametrize(
    ("driver", "claim"), BROKEN_STORAGES, ids=[f"{d.__name__}-{c.__name__}" for d, c in BROKEN_STORAGES]
)
def test_the_suite_catches_a_storage_that(
    driver: type[DirectoryStorage], claim: Callable[[Any], Awaitable[None]], tmp_path: Path
) -> None:
    with pytest.raises(CAUGHT):
        asyncio.run(_run(claim, directory(tmp_path, driver)))


class ReportsBeforeItFlushed(LocalAgent):
    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        with patch.object(local_module, "syncfs", lambda _: None):
            return await super().flush(point, deadline_seconds)


class SwallowsTheError(LocalAgent):
    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        try:
            return await super().flush(point, deadline_seconds)
        except AgentError:
            for volume in self.poisoned:
                await self.clear(volume)
            return await super().flush(point, deadline_seconds)


class ForgetsTheErrorOverARestart(LocalAgent):
    async def prepare(self, volumes: Sequence[Volume]) -> None:
        for volume in volumes:
            await self.clear(volume.name)
        await super().prepare(volumes)


class OpensItsDescriptorTooLate(LocalAgent):
    async def prepare(self, volumes: Sequence[Volume]) -> None:
        self._wanted = volumes
        await super().prepare(volumes)

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        if self._filesystems is not None:
            with contextlib.suppress(OSError):
                flush(Path(self._wanted[0].path))  # somebody else asks, and is told of the error
            await self.close()
            await super().prepare(self._wanted)
        return await super().flush(point, deadline_seconds)


class BelievesAFrozenFilesystem(LocalAgent):
    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        with patch.object(local_module, "_require_writable", lambda *_: None):
            return await super().flush(point, deadline_seconds)


class TrustsThePath(LocalAgent):
    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        with patch.object(local_module, "_require_same", lambda *_: None):
            return await super().flush(point, deadline_seconds)


BROKEN_AGENTS: list[tuple[type[LocalAgent], Callable[[Any], Awaitable[None]]]] = [
    (ReportsBeforeItFlushed, agent_claims.what_was_written_before_the_flush_survives_a_power_cut_after_it),
    (SwallowsTheError, agent_claims.a_write_back_error_fails_every_flush_until_it_is_cleared),
    (OpensItsDescriptorTooLate, agent_claims.a_write_back_error_fails_every_flush_until_it_is_cleared),
    (ForgetsTheErrorOverARestart, agent_claims.a_write_back_error_fails_every_flush_until_it_is_cleared),
    (BelievesAFrozenFilesystem, agent_claims.a_frozen_filesystem_is_no_success_and_holds_up_nothing),
    (BelievesAFrozenFilesystem, agent_claims.a_read_only_filesystem_is_no_success),
    (TrustsThePath, agent_claims.a_volume_that_was_mounted_over_is_not_flushed_as_the_old_one),
]


@pytest.mark.volume
@pytest.mark.parametrize(
    ("driver", "claim"), BROKEN_AGENTS, ids=[f"{d.__name__}-{c.__name__}" for d, c in BROKEN_AGENTS]
)
def test_the_suite_catches_an_agent_that(driver: type[LocalAgent], claim: Callable[[Any], Awaitable[None]]) -> None:
    with failing_volume() as disk, pytest.raises(CAUGHT):
        asyncio.run(_run(claim, LocalAgentRig(disk, driver)))


class TakesAPartForTheWhole(Members):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        return [replace(found, complete=bool(found.tag)) for found in await super().tagged(point)]


class ForgetsAMember(Members):
    async def _parts(self, point: str | None = None) -> list[tuple[str, Tagged]]:
        return (await super()._parts(point))[:1]


class BelievesTheFirstTag(Members):
    async def tagged(self, point: str | None = None) -> list[Tagged]:
        (first, *_) = self._storages.values()
        tags = {found.point: found.tag for found in await first.tagged(point)}
        return [replace(found, tag=tags.get(found.point)) for found in await super().tagged(point)]


class StopsAtTheFirstThatStays(Members):
    async def delete(self, point: str) -> None:
        for name in self._storages:
            with self._one(name) as one:
                await one.delete(point)


class LeavesTheFirstClone(Members):
    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        with patch.object(DirectoryStorage, "drop_clone"):
            return await super().clone(point, name, progress, identity=identity, beside=beside)


class ShowsWhatIsLeftOfAClone(Members):
    async def clones(self) -> list[Clone]:
        return [replace(clone, dropped=False) for clone in await super().clones()]


class DropsInTheOrderOfTheDay(Members):
    async def drop_clone(self, name: str) -> None:
        await self._each(lambda one: one.drop_clone(name))


BROKEN_MEMBERS: list[tuple[type[Members], Callable[[Any], Awaitable[None]]]] = [
    (TakesAPartForTheWhole, members_claims.a_point_without_one_of_its_members_is_not_complete_and_gives_no_clone),
    (TakesAPartForTheWhole, members_claims.a_snapshot_that_is_cut_off_between_two_members_is_unfinished_and_goes),
    (TakesAPartForTheWhole, members_claims.a_removal_that_is_cut_off_between_two_members_leaves_nothing_whole),
    (ForgetsAMember, storage_claims.a_new_tag_replaces_the_old_and_nothing_else),
    (BelievesTheFirstTag, members_claims.members_whose_tags_differ_have_none_until_it_is_written_anew),
    (StopsAtTheFirstThatStays, members_claims.a_member_that_will_not_go_keeps_no_other_from_going),
    (LeavesTheFirstClone, members_claims.a_clone_that_fails_in_one_storage_is_left_in_none),
    (
        DropsInTheOrderOfTheDay,
        members_claims.the_copies_of_a_clone_go_in_the_order_in_which_they_were_made_whatever_order_the_storages_have_now,
    ),
    (
        ShowsWhatIsLeftOfAClone,
        members_claims.a_removal_of_a_clone_that_is_cut_off_between_two_storages_is_shown_as_one,
    ),
]


@pytest.mark.parametrize(
    ("join", "claim"), BROKEN_MEMBERS, ids=[f"{d.__name__}-{c.__name__}" for d, c in BROKEN_MEMBERS]
)
def test_the_suite_catches_several_storages_that(
    join: type[Members], claim: Callable[[Any], Awaitable[None]], tmp_path: Path
) -> None:
    with pytest.raises(CAUGHT):
        asyncio.run(_run(claim, members(tmp_path, join)))


async def _run(claim: Callable[[Any], Awaitable[None]], rig: object) -> None:
    async with asyncio.timeout(60):
        await claim(rig)
