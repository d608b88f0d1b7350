"""One pass makes catalog and storage agree, whatever a crash left between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from connectors.memory import Kept, MemoryStorage, World
from tests.simulation.virtual import VirtualLoop, inline
from trigger.catalog import presence, reconcile, tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.reconcile import INTERRUPTED, Reconciliation
from trigger.errors import StorageError
from trigger.model import GONE, Cause, CommitRecord, Mark, Outcome, RecoveryPoint, Severity, State, Volume
from trigger.point_names import point_id
from trigger.position import History, Name, Position

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
VOLUMES = (Volume("data", "/data"),)
HISTORY = History("memory", "7001", 1)


def at(lsn: int) -> Position:
    return Position(HISTORY, lsn)


def record(lsn: int) -> CommitRecord:
    return CommitRecord("bank", Name("", lsn), lsn, lsn + 48, 1_000_000, (), Outcome.PROTECTED)


class Stage:
    """A catalog and a storage with points in every state a crash can leave."""

    def __init__(self, catalog: Catalog, world: World) -> None:
        self.catalog = catalog
        self.world = world
        self.storage = MemoryStorage(world)

    async def opened(self, number: int) -> RecoveryPoint:
        made = point_id(NOON, number)
        return await self.catalog.open_point(
            id=made, cause=Cause.COMMIT, marks=[Mark(at(number * 100 + 48))], opened_at=NOON
        )

    async def cut(self, point: RecoveryPoint) -> RecoveryPoint:
        """Make the snapshot; its tag says that the point is open."""
        snapshots = await self.storage.snapshot(VOLUMES, point.id, tag.encode(point))
        return replace(
            point,
            snapshots=snapshots,
            marks=(Mark(point.floor, point.floor),),
            sealed_at=NOON,
            state=State.SEALED,
            commits=1,
        )

    async def retagged(self, number: int) -> tuple[RecoveryPoint, list[CommitRecord]]:
        """Go as far as the sealed tag in the storage, which the catalog does not know of."""
        point, records = await self.cut(await self.opened(number)), [record(number * 100)]
        await self.storage.retag(point.id, tag.encode(point, records))
        return point, records

    async def sealed(self, number: int) -> RecoveryPoint:
        point, records = await self.retagged(number)
        return await self.catalog.seal(point, records, {"bank": at(number * 100 + 48)})

    async def reconcile(self) -> Reconciliation:
        """Make one pass; a second one must find nothing but what is left to the operator."""
        done = await reconcile.reconcile(self.catalog, self.storage)
        again = await reconcile.reconcile(self.catalog, self.storage)
        assert again == Reconciliation(strange=done.strange, incomplete=again.incomplete)
        assert set(again.incomplete) <= {*done.incomplete, *done.phantoms}
        return done

    async def state(self, point: RecoveryPoint) -> State:
        return (await self.catalog.point(point.id)).state


class Clinging(MemoryStorage):
    """A storage that does not let go of points as long as it clings."""

    clings = True

    async def delete(self, point: str) -> None:
        if self.clings:
            raise StorageError(f"{point}: Read-only file system")
        await super().delete(point)


def play(act: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await act(Stage(await Catalog.open(":memory:", run=inline), World()))

    VirtualLoop().run(main())


def test_where_both_agree_nothing_is_done() -> None:
    async def act(stage: Stage) -> None:
        await stage.sealed(1)
        assert not await stage.reconcile()

    play(act)


def test_the_log_says_in_words_and_counts_what_a_pass_did(caplog: pytest.LogCaptureFixture) -> None:
    async def act(stage: Stage) -> None:
        await stage.opened(1)
        for number in (2, 3):
            await stage.retagged(number)
        await stage.reconcile()

    play(act)
    said = [one.getMessage() for one in caplog.records if one.getMessage().startswith("reconciled")]
    assert said == ["reconciled: 2 points taken over from the storage; 1 point failed, since interrupted before sealed"]


def test_every_list_of_a_pass_has_its_words() -> None:
    lists = [each.name for each in fields(Reconciliation)]
    for name in lists:
        assert Reconciliation(**{name: ["a"]}).words().startswith("1 point ")


def test_an_intent_without_a_snapshot_is_failed() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.opened(1)
        assert (await stage.reconcile()).failed == [point.id]
        assert (await stage.catalog.point(1)).failure == INTERRUPTED

    play(act)


def test_a_snapshot_that_was_never_sealed_is_removed_with_its_intent() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.cut(await stage.opened(1))
        assert (await stage.reconcile()).failed == [point.id]
        assert await stage.state(point) is State.FAILED
        assert stage.world.kept == {}

    play(act)


def test_a_snapshot_without_its_tag_is_removed() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.opened(1)
        stage.world.kept[point.id] = Kept(("data",))
        await stage.reconcile()
        assert await stage.state(point) is State.FAILED
        assert stage.world.kept == {}

    play(act)


def test_what_the_storage_has_as_sealed_is_sealed_in_the_catalog_with_its_commits() -> None:
    async def act(stage: Stage) -> None:
        point, records = await stage.retagged(1)
        assert (await stage.reconcile()).adopted == [point.id]
        assert await stage.state(point) is State.SEALED
        assert await stage.catalog.commits_of(1) == records
        assert await stage.catalog.settled("bank") == at(148)

    play(act)


def test_a_sealed_tag_over_half_a_snapshot_is_not_adopted() -> None:
    async def act(stage: Stage) -> None:
        point, _ = await stage.retagged(1)
        stage.world.kept[point.id].cuts.clear()
        assert (await stage.reconcile()).failed == [point.id]
        assert await stage.state(point) is State.FAILED
        assert await stage.catalog.find(name=Name("", 100)) == []

    play(act)


@pytest.mark.parametrize("loss", ["whole", "part"])
def test_a_sealed_point_whose_snapshot_is_gone_is_failed_and_reported(loss: str) -> None:
    async def act(stage: Stage) -> None:
        point, _ = await stage.sealed(1), await stage.sealed(2)
        if loss == "whole":
            del stage.world.kept[point.id]
        else:
            stage.world.kept[point.id].cuts.clear()
        assert (await stage.reconcile()).phantoms == [point.id]
        assert (await stage.catalog.point(1)).failure == GONE

    play(act)


@pytest.mark.parametrize("tag_is_damaged", [False, True])
def test_a_snapshot_that_comes_back_after_it_was_gone_is_sealed_again(tag_is_damaged: bool) -> None:
    async def act(stage: Stage) -> None:
        point, _ = await stage.sealed(1), await stage.sealed(2)
        kept = stage.world.kept.pop(point.id)
        assert (await stage.reconcile()).phantoms == [point.id]
        stage.world.kept[point.id] = kept if not tag_is_damaged else replace(kept, tag=None)
        done = await stage.reconcile()
        assert (done.regained, done.mended) == ([point.id], [point.id] if tag_is_damaged else [])
        assert await stage.catalog.point(1) == point
        assert await stage.catalog.commits_of(1) == [record(100)]
        assert stage.world.kept[point.id].tag == kept.tag

    play(act)


def test_half_a_snapshot_that_comes_back_after_it_was_gone_is_left_to_the_operator() -> None:
    async def act(stage: Stage) -> None:
        point, _ = await stage.sealed(1), await stage.sealed(2)
        kept = stage.world.kept.pop(point.id)
        await stage.reconcile()
        kept.cuts.clear()
        stage.world.kept[point.id] = kept
        assert await stage.reconcile() == Reconciliation(incomplete=[point.id])
        assert point.id in stage.world.kept
        assert await stage.state(point) is State.FAILED

    play(act)


class Lacking(MemoryStorage):
    """A storage in which points lack something that shows only where it is looked for."""

    lacking = "base/5/16384 is not there"
    looked_at: tuple[str, ...] = ()

    async def lack(self, point: str) -> str:
        self.looked_at += (point,)
        if self.lacking == "unreadable":
            raise StorageError("base/5: Input/output error")
        return self.lacking


@pytest.mark.parametrize("lacking", [Lacking.lacking, "unreadable"])
def test_a_snapshot_that_seems_to_be_back_and_is_not_whole_is_sealed_again_once_it_is(
    lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(stage: Stage) -> None:
        stage.storage = storage = Lacking(stage.world)
        storage.lacking = lacking
        point, _ = await stage.sealed(1), await stage.sealed(2)
        kept = stage.world.kept.pop(point.id)
        await stage.reconcile()
        stage.world.kept[point.id] = kept
        assert await stage.reconcile() == Reconciliation(incomplete=[point.id])
        assert await stage.state(point) is State.FAILED
        assert point.id in stage.world.kept
        assert any("point 1 " in said and "base/5" in said for said in caplog.messages)
        storage.lacking = ""
        assert (await stage.reconcile()).regained == [point.id]
        assert set(storage.looked_at) == {point.id}, "to look at each would make every start slow"

    play(act)


@pytest.mark.parametrize("points", [1, 2])
def test_a_storage_that_shows_nothing_is_believed_by_the_operators_word_alone(points: int) -> None:
    async def act(stage: Stage) -> None:
        made = [await stage.sealed(number + 1) for number in range(points)]
        stage.world.kept.clear()
        finding = await presence.look(stage.catalog, stage.storage)
        assert finding is not None
        assert "--accept-loss" in finding.remedy
        with pytest.raises(StorageError, match="shows no snapshot at all") as refused:
            await reconcile.reconcile(stage.catalog, stage.storage)
        assert refused.value.message == finding.message
        assert [await stage.state(point) for point in made] == [State.SEALED] * points
        done = await reconcile.reconcile(stage.catalog, stage.storage, accept_loss=True)
        assert done.phantoms == [point.id for point in made]
        assert await presence.look(stage.catalog, stage.storage) is None

    play(act)


def test_the_snapshot_of_a_failed_point_is_removed() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.cut(await stage.opened(1))
        await stage.catalog.fail(point, "the flush failed")
        assert (await stage.reconcile()).removed == [point.id]
        assert stage.world.kept == {}

    play(act)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_removal_that_was_begun_is_finished(deleted: bool) -> None:
    async def act(stage: Stage) -> None:
        point = await stage.sealed(1)
        await stage.catalog.change(point, State.EXPIRING)
        if deleted:
            await stage.storage.delete(point.id)
        assert (await stage.reconcile()).expired == [point.id]
        assert await stage.state(point) is State.EXPIRED
        assert stage.world.kept == {}

    play(act)


async def stray(stage: Stage, number: int, change: Callable[[Stage, RecoveryPoint], Awaitable[None]]) -> RecoveryPoint:
    """Leave a snapshot in the storage that this catalog has never heard of."""
    other = Stage(await Catalog.open(":memory:", run=inline), stage.world)
    point = await other.sealed(number)
    await change(stage, point)
    return point


async def unchanged(_stage: Stage, _point: RecoveryPoint) -> None:
    """Leave it as it is."""


def test_a_sealed_stray_is_adopted_as_after_a_catalog_was_lost() -> None:
    async def act(stage: Stage) -> None:
        point = await stray(stage, 1, unchanged)
        assert (await stage.reconcile()).adopted == [point.id]
        assert await stage.catalog.commits_of(1) == [record(100)]
        assert await stage.catalog.settled("bank") == at(148)

    play(act)


@pytest.mark.parametrize("lost", [True, False])
def test_after_a_loss_a_stream_of_which_no_tag_has_a_commit_is_known_up_to_the_oldest_floor(lost: bool) -> None:
    async def act(stage: Stage) -> None:
        if not lost:
            await stage.sealed(1)
        for number in (2, 3):
            await stray(stage, number, unchanged)
        await reconcile.reconcile(stage.catalog, stage.storage, streams=["bank", "shop"])
        assert await stage.catalog.all_settled() == {"bank": at(348)} | ({"shop": at(248)} if lost else {})

    play(act)


def test_a_catalog_is_named_as_lost_where_it_knows_of_no_point_and_the_storage_has_some() -> None:
    async def act(stage: Stage) -> None:
        assert await reconcile.lost(stage.catalog, stage.storage) is None
        for number in (1, 2):
            await stray(stage, number, unchanged)
        found = await reconcile.lost(stage.catalog, stage.storage)
        assert found is not None
        assert found.severity is Severity.WARNING
        assert "knows of no point, and the storage has 2: it was lost, and with it failed" in found.message
        await stage.reconcile()
        assert await reconcile.lost(stage.catalog, stage.storage) is None

    play(act)


def test_a_catalog_whose_first_point_is_being_made_was_not_lost() -> None:
    async def act(stage: Stage) -> None:
        await stage.retagged(1)
        assert await reconcile.lost(stage.catalog, stage.storage) is None

    play(act)


def test_an_unsealed_stray_is_removed() -> None:
    async def reopen(stage: Stage, point: RecoveryPoint) -> None:
        await stage.storage.retag(point.id, tag.encode(replace(point, state=State.OPEN)))

    async def act(stage: Stage) -> None:
        point = await stray(stage, 1, reopen)
        assert (await stage.reconcile()).removed == [point.id]
        assert stage.world.kept == {}

    play(act)


def test_a_stray_of_another_cluster_or_with_a_damaged_tag_is_left_alone_and_named() -> None:
    async def of_another(stage: Stage, point: RecoveryPoint) -> None:
        elsewhere = Position(History("memory", "9999", 1), 1)
        await stage.storage.retag(point.id, tag.encode(replace(point, marks=(Mark(elsewhere, elsewhere),))))

    async def damaged(stage: Stage, point: RecoveryPoint) -> None:
        await stage.storage.retag(point.id, tag.encode(point)[:-3])

    async def act(stage: Stage) -> None:
        await stage.sealed(1)
        strange = [(await stray(stage, number, change)).id for number, change in ((2, of_another), (3, damaged))]
        assert (await stage.reconcile()).strange == strange
        assert set(strange) <= set(stage.world.kept)

    play(act)


def test_a_storage_that_does_not_let_go_keeps_no_pass_from_ending_and_the_next_one_makes_good() -> None:
    async def act(stage: Stage) -> None:
        stage.storage = clinging = Clinging(stage.world)
        interrupted = await stage.opened(1)
        await stage.cut(interrupted)
        expiring = await stage.catalog.change(await stage.sealed(2), State.EXPIRING)
        whole, _ = await stage.retagged(3)
        done = await reconcile.reconcile(stage.catalog, stage.storage)
        assert done.stuck == [interrupted.id, expiring.id]
        assert (done.adopted, done.failed, done.expired) == ([whole.id], [interrupted.id], [])
        assert await stage.state(expiring) is State.EXPIRING
        assert await stage.state(interrupted) is State.FAILED
        clinging.clings = False
        done = await stage.reconcile()
        assert (done.removed, done.expired, done.stuck) == ([interrupted.id], [expiring.id], [])
        assert set(stage.world.kept) == {whole.id}

    play(act)


class Unwritable(MemoryStorage):
    """A storage in which no tag can be written while it is broken."""

    broken = True

    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        if self.broken:
            raise StorageError(f"{point}: Input/output error")
        await super().retag(point, tag)


def test_a_damaged_tag_of_a_sealed_point_is_written_anew_from_the_catalog() -> None:
    async def act(stage: Stage) -> None:
        points = [await stage.sealed(number) for number in (1, 2)]
        before = stage.world.kept[points[0].id].tag
        stage.world.kept[points[0].id].tag = None
        done = await stage.reconcile()
        assert (done.mended, done.phantoms) == ([points[0].id], [])
        assert await stage.state(points[0]) is State.SEALED
        assert stage.world.kept[points[0].id].tag == before, "the commits in it, too"

    play(act)


def test_a_point_whose_tag_can_be_neither_read_nor_written_stays_and_is_mended_later() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.sealed(1)
        stage.world.kept[point.id].tag = None
        storage = Unwritable(stage.world)
        for _ in range(2):
            done = await reconcile.reconcile(stage.catalog, storage)
            assert (done.unreadable, done.mended, done.phantoms) == ([point.id], [], [])
            assert await stage.state(point) is State.SEALED
        storage.broken = False
        assert (await reconcile.reconcile(stage.catalog, storage)).mended == [point.id]
        assert not await reconcile.reconcile(stage.catalog, storage)

    play(act)


def test_a_point_without_its_tag_and_without_a_snapshot_is_a_phantom() -> None:
    async def act(stage: Stage) -> None:
        point = await stage.sealed(1)
        stage.world.kept[point.id] = Kept(("data",))
        assert (await reconcile.reconcile(stage.catalog, stage.storage)).phantoms == [point.id]
        assert await stage.state(point) is State.FAILED

    play(act)
