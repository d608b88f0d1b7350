"""The main path, step by step: what a round does, in which order, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from connectors.memory import MemoryDatabase
from tests.trigger.protect.stage import Stage
from trigger.catalog.reconcile import reconcile
from trigger.errors import AgentError, CatalogError, DatabaseError, StorageError
from trigger.model import Cause, Mark, Outcome, State, Volume
from trigger.ports import Capability
from trigger.protect.logs import Logs
from trigger.protect.pipeline import agenda_of, tidy
from trigger.volumes import is_of


def test_the_first_point_is_taken_at_start_and_the_next_for_a_commit() -> None:
    async def act(stage: Stage) -> None:
        commit = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        first, second = await stage.points()
        assert (first.cause, first.commit, first.rule) == (Cause.START, None, "")
        assert (second.cause, second.floor, second.rule) == (Cause.COMMIT, commit.position, "all")
        assert second.commit is not None
        assert second.commit.name == commit.name
        assert await stage.outcomes() == {commit.name: Outcome.PROTECTED}

    Stage().play(act)


def test_a_point_of_other_volumes_is_no_base_neither_at_a_start_nor_after_a_round_that_failed() -> None:
    async def act(stage: Stage) -> None:
        first = (await stage.points())[-1]
        assert [(kept.volume, kept.path) for kept in first.snapshots] == [("data", "/data")]
        assert (await agenda_of(stage.protected)).base == first
        data, more = Volume("data", "/data"), Volume("more", "/more")
        for volumes in ((data, more), (Volume("pgdata", "/data"),), (Volume("data", "/moved"),)):
            other = replace(stage.protected, volumes=volumes)
            assert (await agenda_of(other)).base is None
            await tidy(other, stage.window, stage.agenda)
            assert stage.agenda.base is None
        by_an_earlier_version = tuple(replace(kept, path="") for kept in first.snapshots)
        assert is_of(replace(first, snapshots=by_an_earlier_version), (Volume("data", "/moved"),))

    Stage().play(act)


def test_a_round_flushes_then_looks_then_cuts_then_reads_the_ceiling_then_tags_then_seals_then_acknowledges() -> None:
    async def act(stage: Stage) -> None:
        stage.calls.clear()
        stage.cluster.commit("bank")
        await asyncio.sleep(1)
        steps = [call for call in stage.calls if call not in ("read", "heartbeat")]
        assert steps == [
            "open_point",
            "flush",
            "durable",
            "redo",
            "snapshot",
            "ceiling",
            "retag",
            "seal",
            "close_gaps",
            "acknowledge",
        ]

    Stage().play(act)


def test_a_copy_that_is_not_one_instant_is_made_inside_the_bracket_whose_end_is_its_ceiling() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.commit("bank")
        await asyncio.sleep(1)
        for point in await stage.points():
            assert point.state is State.SEALED
            assert point.bracket is not None
            assert point.ceiling == point.bracket.stop
            assert point.redo == point.bracket.start
            assert point.redo < point.ceiling

    Stage(capabilities=frozenset({Capability.ATOMIC})).play(act)


def test_commits_that_arrive_during_a_round_share_the_next_point() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before flush", lambda: asyncio.sleep(2))
        made = [stage.cluster.commit("bank")]
        await asyncio.sleep(1)
        made += [stage.cluster.commit("bank") for _ in range(3)]
        await asyncio.sleep(3)
        assert [point.commits for point in await stage.points()] == [0, 1, 3]
        assert list((await stage.outcomes()).values()) == [
            Outcome.PROTECTED,
            Outcome.COALESCED,
            Outcome.COALESCED,
            Outcome.PROTECTED,
        ]

    Stage().play(act)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("flush", AgentError("the disk failed")),
        ("durable", DatabaseError("no answer")),
        ("redo", DatabaseError("no answer")),
        ("snapshot", StorageError("no room")),
        ("snapshot", OSError(28, "no space left on device")),
        ("ceiling", DatabaseError("no answer")),
        ("retag", StorageError("read-only")),
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_round_that_fails_leaves_nothing_behind_and_its_commits_to_the_next(
    step: str, error: Exception, moment: str
) -> None:
    async def act(stage: Stage) -> None:
        stage.when(f"{moment} {step}", error)
        commit = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        _, failed = await stage.points()
        assert failed.state is State.FAILED
        assert str(error) in failed.failure
        assert failed.id not in stage.world.kept
        assert stage.calls[-1] == "fail"
        await asyncio.sleep(10)
        assert (await stage.points())[-1].state is State.SEALED
        assert await stage.outcomes() == {commit.name: Outcome.PROTECTED}

    Stage().play(act)


@pytest.mark.parametrize("step", ["open_point", "seal", "close_gaps"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_answer_of_the_catalog_that_was_lost_costs_no_commit_its_one_outcome(step: str, moment: str) -> None:
    async def act(stage: Stage) -> None:
        stage.when(f"{moment} {step}", CatalogError("no answer", retryable=True))
        commit = stage.cluster.commit("bank")
        await asyncio.sleep(30)
        assert await stage.outcomes() == {commit.name: Outcome.PROTECTED}
        states = [point.state for point in await stage.points()]
        assert set(states) <= {State.SEALED, State.FAILED}
        assert len(stage.world.kept) == states.count(State.SEALED)
        assert stage.cluster.slots["bank"].confirmed >= commit.end
        assert len(stage.window) == 0

    Stage().play(act)


def test_a_snapshot_that_could_not_be_removed_is_removed_by_the_next_pass() -> None:
    async def act(stage: Stage) -> None:
        stage.when("after snapshot", StorageError("the answer was lost"))
        stage.when("before delete", StorageError("busy"))
        stage.when("before open_point", stage.cluster.flush, CatalogError("no answer", retryable=True))
        stage.cluster.commit("bank")
        await asyncio.sleep(60)
        sealed = {point.id for point in await stage.points() if point.state is State.SEALED}
        assert set(stage.world.kept) == sealed

    Stage().play(act)


def test_a_commit_that_the_log_on_disk_does_not_cover_is_no_floor() -> None:
    async def act(stage: Stage) -> None:
        logs = Logs({"bank": MemoryDatabase(stage.world)})
        on_disk = stage.cluster.commit("bank")
        in_memory = stage.cluster.commit("bank", synchronous=False)
        (covered,) = await logs.cover([Mark(on_disk.position)])
        assert covered.durable.at == on_disk.end
        with pytest.raises(DatabaseError, match="does not cover"):
            await logs.cover([Mark(in_memory.position)])

    Stage().play(act)


def test_a_history_that_changes_during_the_round_fails_it() -> None:
    async def act(stage: Stage) -> None:
        stage.when("after snapshot", lambda: stage.cluster.promote(keep_slots=True))
        commit = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        failed = (await stage.points())[1]
        assert failed.state is State.FAILED
        assert "the history changed during the round" in failed.failure
        await asyncio.sleep(20)
        assert await stage.outcomes() == {commit.name: Outcome.PROTECTED}

    Stage().play(act)


def test_a_server_that_was_in_another_history_while_it_was_cut_and_is_back_fails_the_round() -> None:
    async def act(stage: Stage) -> None:
        commit = stage.cluster.commit("bank")
        copy = stage.cluster.copy()
        stage.when("before snapshot", lambda: stage.cluster.promote(keep_slots=True))
        stage.when("after snapshot", lambda: stage.cluster.put_back(copy))
        await asyncio.sleep(1)
        failed = (await stage.points())[1]
        assert failed.state is State.FAILED
        assert "it may have changed and changed back" in failed.failure
        await asyncio.sleep(20)
        assert await stage.outcomes() == {commit.name: Outcome.PROTECTED}

    Stage().play(act)


def test_an_idle_stream_is_settled_in_the_catalog_and_then_acknowledged() -> None:
    async def act(stage: Stage) -> None:
        stage.window._judge = lambda _: None
        commit = stage.cluster.commit("bank")
        stage.calls.clear()
        await asyncio.sleep(15)
        order = [call for call in stage.calls if call in ("settle", "acknowledge")]
        assert order[:2] == ["settle", "acknowledge"]
        settled = await stage.catalog.settled("bank")
        assert settled is not None
        assert settled >= commit.position
        assert stage.cluster.slots["bank"].confirmed >= commit.end

    Stage().play(act)


def test_whoever_asks_for_a_point_gets_it_even_where_an_answer_was_lost() -> None:
    async def act(stage: Stage) -> None:
        stage.when("after seal", CatalogError("no answer", retryable=True))
        answer = stage.agenda.ask("before the upgrade")
        stage.window.wake()
        async with asyncio.timeout(30):
            point = await answer
        assert point.state is State.SEALED
        assert point.note == "before the upgrade"

    Stage().play(act)


def test_a_point_that_is_asked_for_holds_what_is_there_though_an_older_commit_waits_for_its_point() -> None:
    async def act(stage: Stage) -> None:
        waiting = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        stage.cluster.write_ahead(1000)  # what no stream shows, and nobody flushed
        asked_at = stage.cluster.inserted
        answer = stage.agenda.ask("before the upgrade")
        stage.window.wake()
        async with asyncio.timeout(30):
            point = await answer
        assert point.commit is not None
        assert (point.cause, point.commit.name, point.floor.at) == (Cause.DEMAND, waiting.name, asked_at)
        assert await stage.outcomes() == {waiting.name: Outcome.PROTECTED}

    Stage(min_interval_seconds=500, max_delay_seconds=500).play(act)


def test_a_point_that_is_asked_for_after_a_failover_holds_what_is_there_though_a_commit_of_before_waits() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before flush", AgentError("busy"))
        kept = stage.cluster.commit("bank")
        await asyncio.sleep(0.5)
        stage.cluster.promote(kept.end, keep_slots=True)
        stage.cluster.write_ahead(5000)  # what no stream shows
        asked_at, present = stage.cluster.inserted, stage.cluster.lineage().history
        answer = stage.agenda.ask("before the upgrade")
        stage.window.wake()
        async with asyncio.timeout(30):
            point = await answer
        assert (point.cause, point.floor.history, point.note) == (Cause.DEMAND, present, "before the upgrade")
        assert point.floor.at >= asked_at
        before = (await stage.points())[-2]
        assert (before.cause, before.floor, before.note) == (Cause.COMMIT, kept.position, "")
        assert await stage.outcomes() == {kept.name: Outcome.PROTECTED}

    Stage().play(act)


@pytest.mark.parametrize("moment", ["before record_end", "after open_point", "before durable"])
def test_a_failover_in_the_round_that_was_asked_for_leaves_it_no_point_of_before(moment: str) -> None:
    async def act(stage: Stage) -> None:
        waiting = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        stage.cluster.write_ahead(1000)
        asked_at = stage.cluster.inserted
        stage.cluster.flush()
        stage.when(moment, lambda: stage.cluster.promote(asked_at, keep_slots=True))
        answer = stage.agenda.ask("before the upgrade")
        stage.window.wake()
        async with asyncio.timeout(60):
            point = await answer
        assert point.state is State.SEALED
        assert (point.cause, point.floor.at >= asked_at) == (Cause.DEMAND, True)
        await asyncio.sleep(30)
        assert await stage.outcomes() == {waiting.name: Outcome.PROTECTED}

    Stage(min_interval_seconds=500, max_delay_seconds=500).play(act)


def test_whoever_asks_is_never_answered_with_a_point_of_before() -> None:
    async def act(stage: Stage) -> None:
        (old,) = await stage.points()
        stage.agenda.base = None  # as where a history has left it behind
        stage.when("before open_point", CatalogError("no room"))
        answer = stage.agenda.ask("before the migration")
        stage.window.wake()
        assert (await answer).number > old.number

    Stage().play(act)


def test_a_base_that_has_to_be_there_is_tried_until_it_is_whatever_rounds_fail_before() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before snapshot", StorageError("read-only"))
        answer = stage.agenda.ask("the journal is damaged", insists=True)
        asked = stage.agenda.ask("before the upgrade")
        stage.window.wake()
        assert (await asked).state is State.FAILED
        assert stage.agenda.wants_base
        async with asyncio.timeout(60):
            point = await answer
        assert (point.state, point.cause, point.note) == (State.SEALED, Cause.DEMAND, "the journal is damaged")
        assert not stage.agenda.wants_base

    Stage().play(act)


def test_a_cancelled_round_is_undone_by_the_next_start() -> None:
    async def act(stage: Stage) -> None:
        stage.when("after snapshot", lambda: asyncio.sleep(60))
        stage.cluster.commit("bank")
        await asyncio.sleep(1)
        stage.main.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stage.main
        assert [point.state for point in await stage.points()] == [State.SEALED, State.OPEN]
        await reconcile(stage.catalog, stage.storage)
        assert [point.state for point in await stage.points()] == [State.SEALED, State.FAILED]
        assert len(stage.world.kept) == 1

    Stage().play(act)
