"""Restores over the reference drivers: the real planner, catalog and main path, PostgreSQL's rules in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from connectors.memory import MemoryRecovery, MemoryStorage, World
from tests.fixtures.bank import Bank, Breaking, nothing_left, quiet, run, two_points
from trigger.catalog.reconcile import reconcile
from trigger.errors import JournalError, RestoreError, StorageError
from trigger.keep.expire import expire
from trigger.model import Cause, Volume
from trigger.ports import Capability, Clone, Progress
from trigger.position import Name
from trigger.restore.clones import Site, drop
from trigger.restore.locate import locate
from trigger.restore.obstacles import left_out
from trigger.restore.restore import prepare, restore
from trigger.restore.target import Named, resolve


def test_every_commit_of_a_history_comes_back_exactly(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        draw = random.Random(5)
        commits = []
        for number in range(40):
            if number % 10 == 7:
                it.world.cluster.checkpoint()
            commits.append(it.commit(data_bytes=draw.choice([0, 0, 200])))
            if number == 0 or draw.random() < 0.3:
                await it.point()
        await it.point()
        for commit in commits[1:]:
            target = await it.resolve(Named(name=commit.name))
            report = await restore(target, it.site, progress=quiet, name="one")
            assert it.held("one") == it.at_or_before(commit)
            assert report.checks
            assert all(held for _, held, _ in report.checks)
            before = await restore(await it.resolve(Named(before=commit.name)), it.site, progress=quiet, name="two")
            assert it.held("two") == it.at_or_before(commit)[:-1]
            assert set(before.seconds) == {"clone", "stage", "replay", "prove"}
            for name in ("one", "two"):
                await drop(name, it.site)
        assert nothing_left(it)

    run(tmp_path, story)


class LosesWhileItClones(MemoryStorage):
    """A storage that loses a snapshot after a plan was made with it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.world = world
        self.loses: list[str] = []

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        for lost in self.loses:
            self.world.kept.pop(lost, None)
        return await super().clone(point, name, progress, identity=identity, beside=beside)


@pytest.mark.parametrize("late", [False, True])
def test_a_restore_goes_on_without_a_base_whose_snapshot_is_gone_and_says_so(late: bool, tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        points = []
        for _ in range(3):
            it.commit()
            points.append(await it.point())
        wanted = it.commit()
        it.commit()
        await it.point()
        assert isinstance(it.site.storage, LosesWhileItClones)
        if late:
            it.site.storage.loses = [point.id for point in points[1:]]
        else:
            it.world.kept.pop(points[2].id)
        target = await it.resolve(Named(name=wanted.name))
        report = await restore(target, it.site, progress=quiet, name="one")
        assert report.base == points[0 if late else 1].number
        assert it.held("one") == it.at_or_before(wanted)
        left_out = points[1:] if late else points[2:]
        gone = "is nearer, and left out: its snapshot is gone from the storage"
        assert list(report.notes[: len(left_out)]) == [f"point {one.number} {gone}" for one in reversed(left_out)]
        it.world.kept.clear()
        for asked in (prepare(target, it.site), restore(target, it.site, progress=quiet)):
            with pytest.raises(StorageError, match="shows no snapshot at all"):
                await asked

    run(tmp_path, story, LosesWhileItClones)


def test_a_refusal_names_a_point_that_had_failed_as_gone_and_would_do_now_that_it_is_back(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        lost = await it.point()
        wanted = it.commit()
        it.commit()
        await it.point()
        away = it.world.kept.pop(lost.id)
        await reconcile(it.catalog, it.site.storage)
        target = await it.resolve(Named(name=wanted.name))
        back = f"it could be done from point {lost.number}, which failed as gone and lies in the storage again"
        for again in (False, True):
            it.world.kept |= {lost.id: away} if again else {}
            with pytest.raises(RestoreError, match="early enough") as refused:
                await prepare(target, it.site)
            (found,) = await locate(it.catalog, it.site.journal, name=wanted.name, storage=it.site.storage)
            for said in (refused.value.message, found.reason):
                assert (back in said) == again
        with pytest.raises(RestoreError, match="its snapshot is gone") as refused:
            await it.resolve(Named(point=lost.id))
        assert "trigpoint reconcile" in refused.value.hint
        await reconcile(it.catalog, it.site.storage)
        assert (await prepare(target, it.site)).base.number == lost.number


def test_in_place_of_a_base_that_lacks_part_of_the_cluster_one_of_other_volumes_serves_and_both_are_named(
    tmp_path: Path,
) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        whole = await it.point()
        it.protected = replace(it.protected, volumes=(Volume("data", "/memory/elsewhere"),))
        it.commit()
        lacking = [await it.point(), await it.point()]
        wanted = it.commit()
        it.commit()
        await it.point()
        it.world.outside |= {(point.id, "pg_tblspc/16400") for point in lacking}
        report = await restore(await it.resolve(Named(name=wanted.name)), it.site, progress=quiet, name="one")
        assert report.base == whole.number
        assert it.held("one") == it.at_or_before(wanted)
        why = "is nearer, and left out: its snapshots do not hold all of the cluster: pg_tblspc/16400 lies outside"
        assert list(report.notes) == [f"point {point.number} {why}" for point in reversed(lacking)]
        look = partial(left_out, recovery=it.site.recovery, volumes=it.site.volumes)
        (found,) = await locate(it.site.catalog, it.site.journal, name=wanted.name, left_out=look)
        assert found.base == whole.number
        assert why in found.reason

    run(tmp_path, story)


def test_a_copy_that_is_not_one_instant_comes_back_exactly_too(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        copied = await it.point()
        assert copied.bracket
        wanted = it.commit()
        it.commit()
        await it.point()
        report = await restore(await it.resolve(Named(name=wanted.name)), it.site, progress=quiet, name="one")
        assert (report.base, it.held("one")) == (copied.number, it.at_or_before(wanted))

    run(tmp_path, story, lambda world: MemoryStorage(world, capabilities=frozenset()))


def test_a_point_on_a_quiet_database_is_restored_without_any_replay(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        wanted = it.commit()
        point = await it.point()
        plan = await prepare(await it.resolve(Named(point=point.number)), it.site)
        assert (plan.base.number, plan.as_cut) == (point.number, True)
        await restore(plan.target, it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(wanted)

    run(tmp_path, story)


def test_a_commit_is_restored_across_a_timeline_switch_and_on_the_abandoned_end(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        kept, fork = it.commit(), it.world.cluster.flushed
        lost = it.commit("lost")
        await it.point()
        it.world.cluster.promote(fork)
        newer = it.commit()
        await it.point()
        for commit in (kept, newer):
            await restore(await it.resolve(Named(name=commit.name)), it.site, progress=quiet, name="one")
            assert it.held("one") == it.at_or_before(commit)
            await drop("one", it.site)
        with pytest.raises(RestoreError, match=r"committed in 7001/1, which is not in the past of 7001/2"):
            await it.resolve(Named(marker="lost"))
        target = await it.resolve(Named(marker="lost", history="1"))
        await restore(target, it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(lost)

    run(tmp_path, story)


def test_a_place_that_is_the_end_of_one_commit_and_the_start_of_the_next_is_refused(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        first, second = it.commit(), it.commit(data_bytes=0)
        await it.point()
        assert first.end == second.start
        with pytest.raises(RestoreError) as refusal:
            await it.resolve(Named(place=str(first.end)))
        assert refusal.value.hint.endswith(f"--to-xid {first.name} or --to-xid {second.name}")
        for lsn, commit in ((first.start, first), (second.end, second)):
            target = await it.resolve(Named(place=str(lsn)))
            assert (target.at, target.inclusive) == (commit.start, True)

    run(tmp_path, story)


def test_any_other_place_means_the_state_before_the_first_record_at_or_behind_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        first = it.commit()
        it.world.cluster.write_ahead(64)
        second = it.commit()
        await it.point()
        for lsn in (first.end + 1, second.start - 8):
            target = await it.resolve(Named(place=str(lsn)))
            assert not target.inclusive
            assert str(first.name) in target.description
            await restore(target, it.site, progress=quiet, name="one")
            assert it.held("one") == it.at_or_before(first)
            await drop("one", it.site)

    run(tmp_path, story)


def test_a_time_brings_back_everything_before_the_first_later_commit(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        commits = [it.commit() for _ in range(4)]
        await it.point()
        for commit, slack in ((commits[1], 0), (commits[2], 500)):
            target = await it.resolve(Named(time=commit.time + timedelta(milliseconds=slack)))
            assert f"{commit.name} of bank" in target.description
            await restore(target, it.site, progress=quiet, name="one")
            assert it.held("one") == it.at_or_before(commit)
            await drop("one", it.site)

    run(tmp_path, story)


def test_the_latest_state_holds_what_was_committed_after_the_last_point_too(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        last = [it.commit() for _ in range(3)][-1]
        await it.journaled()
        await restore(await it.resolve(Named(latest=True)), it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(last)

    run(tmp_path, story)


def test_a_time_behind_the_last_commit_is_all_of_the_log_where_the_database_makes_a_later_one(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        last = [it.commit() for _ in range(3)][-1]
        await it.journaled()
        named = Named(time=last.time + timedelta(seconds=5))
        it.seconds[0] += 10
        unasked = await resolve(named, it.catalog, it.site.journal)
        with pytest.raises(RestoreError, match="ended before"):
            await restore(unasked, it.site, progress=quiet, name="one")
        await restore(await it.resolve(named), it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(last)

    run(tmp_path, story)


def test_a_point_that_was_taken_for_no_commit_is_the_state_at_its_floor(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        last = it.commit()
        it.pending.clear()  # it does not qualify
        point = await it.point(Cause.DEMAND)
        assert point.commit is None
        it.commit()
        await it.point()
        await restore(await it.resolve(Named(point=point.number)), it.site, progress=quiet, name="one")
        assert it.held("one") == it.at_or_before(last)

    run(tmp_path, story)


def test_a_name_that_nothing_or_several_things_bear_is_refused_with_what_to_say_instead(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        with pytest.raises(RestoreError, match="no sealed recovery point to start from"):
            await it.resolve(Named(name=Name("", 1)))
        first = it.commit("payday")
        await it.point()
        second = it.commit("payday")
        await it.point()
        with pytest.raises(RestoreError, match=rf"names 2 commits.*{first.name} of bank.*{second.name} of bank"):
            await it.resolve(Named(marker="payday"))
        for unseen in (Named(marker="no day"), Named(name=Name("", 1), stream="bank")):
            with pytest.raises(RestoreError, match="is not in the catalog") as refused:
                await it.resolve(unseen)
            assert "log that is kept" not in str(refused.value), "nobody looked there"
        with pytest.raises(RestoreError, match="transaction 1 is in neither the catalog nor the log"):
            await it.resolve(Named(name=Name("", 1)))
        with pytest.raises(RestoreError, match="exactly one target"):
            await it.resolve(Named(name=Name("", 1), place="3"))

    run(tmp_path, story)


def with_port(site: Site, port: str, driver: Any) -> Site:
    changed: dict[str, Any] = {port: driver}
    return replace(site, **changed)


STEPS = [("storage", "clone"), ("journal", "stage"), ("recovery", "start")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("port", "call"), STEPS)
def test_a_failed_restore_leaves_nothing_behind_and_says_why(tmp_path: Path, port: str, call: str, after: bool) -> None:
    async def fail() -> None:
        raise {"storage": StorageError, "journal": JournalError, "recovery": RestoreError}[port]("the disk is gone")

    async def story(it: Bank) -> None:
        target = await two_points(it)
        site = with_port(it.site, port, Breaking(getattr(it.site, port), call, fail, after=after))
        with pytest.raises((StorageError, JournalError, RestoreError), match="the disk is gone"):
            await restore(target, site, progress=quiet)
        assert nothing_left(it)

    run(tmp_path, story)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("port", "call"), STEPS)
def test_a_cancelled_restore_leaves_nothing_behind(tmp_path: Path, port: str, call: str, after: bool) -> None:
    async def story(it: Bank) -> None:
        stuck = asyncio.Event()

        async def wait() -> None:
            stuck.set()
            await asyncio.sleep(60)

        target = await two_points(it)
        site = with_port(it.site, port, Breaking(getattr(it.site, port), call, wait, after=after))
        task = asyncio.create_task(restore(target, site, progress=quiet))
        await stuck.wait()
        for _ in range(3):  # an impatient operator
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert nothing_left(it)

    run(tmp_path, story)


def test_a_base_that_expires_between_plan_and_clone_gives_way_to_an_older_one(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        older = await it.point()
        it.commit()
        newer = await it.point()
        wanted = it.commit()
        it.commit(data_bytes=0)
        await it.point()

        class Thinned:
            """Loses the newest base at the moment in which it is to be cloned."""

            def __getattr__(self, name: str) -> Any:
                return getattr(it.site.storage, name)

            async def clone(self, point: str, name: str, progress: Any, *, identity: str) -> Any:
                if point == newer.id:
                    await expire(it.catalog, it.site.storage, newer)
                return await it.site.storage.clone(point, name, progress, identity=identity)

        target = await it.resolve(Named(name=wanted.name))
        report = await restore(target, with_port(it.site, "storage", Thinned()), progress=quiet, name="one")
        assert (report.base, it.held("one")) == (older.number, it.at_or_before(wanted))

    run(tmp_path, story)


def test_a_clone_that_is_not_the_target_is_refused_and_removed(tmp_path: Path) -> None:
    class OneTooMany:
        """Stops at the end of the commit record, inclusively, as a naive restore does (LAB 22)."""

        def __init__(self, world: World) -> None:
            self._real: Any = MemoryRecovery(world)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        async def start(self, *arguments: Any, **named: Any) -> Any:
            replay = arguments[2]
            beyond = replace(replay, target=replace(replay.target, at=replay.target.commit.end))
            return await self._real.start(*arguments[:2], beyond, *arguments[3:], **named)

    async def story(it: Bank) -> None:
        target = await two_points(it)
        with pytest.raises(RestoreError, match="the clone is not commit"):
            await restore(target, with_port(it.site, "recovery", OneTooMany(it.world)), progress=quiet)
        assert nothing_left(it)

    run(tmp_path, story)


def test_a_clone_that_nobody_could_look_into_is_not_called_restored(tmp_path: Path) -> None:
    class Blind(MemoryRecovery):
        async def inspect(self, *arguments: Any, **named: Any) -> Any:
            nothing: tuple[tuple[str, bool, str], ...] = ()
            for check in nothing:
                yield check

    async def story(it: Bank) -> None:
        target = await two_points(it)
        with pytest.raises(RestoreError, match="nothing could be checked"):
            await restore(target, replace(it.site, recovery=Blind(it.world)), progress=quiet)

    run(tmp_path, story)


def test_a_restore_without_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        target = await two_points(it)
        it.world.free_bytes = 2 << 20
        with pytest.raises(RestoreError, match="the storage has 1048576 bytes to give"):
            await restore(target, it.site, progress=quiet)
        assert nothing_left(it)

    run(tmp_path, story)


def test_the_capabilities_of_the_reference_storage_are_what_these_tests_rely_on() -> None:
    assert Capability.ATOMIC_GROUP in MemoryStorage(World()).capabilities


def test_a_state_that_does_not_end_with_a_commit_of_the_catalog_is_told_by_those_around_it(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        before, unseen, after = it.commit(), it.world.cluster.commit(""), it.commit()
        await it.point()
        quiet_point = await it.point(Cause.DEMAND)
        for named in (
            Named(before=after.name),
            Named(before=unseen.name),
            Named(name=unseen.name),
            Named(place=str(after.start - 4)),
        ):
            target = await it.resolve(named)
            assert [record.name for record in target.around] == [before.name, after.name]
        for named in (Named(name=before.name), Named(place=str(before.start)), Named(latest=True)):
            assert (await it.resolve(named)).around == ()
        last = await it.resolve(Named(point=quiet_point.number))
        assert [record.name for record in last.around] == [after.name]

    run(tmp_path, story)
