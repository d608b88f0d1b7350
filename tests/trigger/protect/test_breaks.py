"""The main path where a stream breaks: what was lost is missed, the gap is recorded and closed, a new base is taken."""

from __future__ import annotations

import asyncio

import pytest

from tests.trigger.protect.stage import Stage
from trigger.errors import AgentError
from trigger.model import Cause, Outcome


def test_a_commit_that_a_failover_left_behind_is_missed_and_its_gap_is_recorded_and_closed() -> None:
    async def act(stage: Stage) -> None:
        kept = stage.cluster.commit("bank")
        await asyncio.sleep(1)
        stage.when("before flush", lambda: stage.cluster.promote(kept.end, keep_slots=True))
        left = stage.cluster.commit("bank")
        await asyncio.sleep(30)
        assert await stage.outcomes() == {kept.name: Outcome.PROTECTED, left.name: Outcome.MISSED}
        (gap,) = await stage.catalog.gaps()
        assert gap.after == left.position
        assert gap.closed_by > 0
        assert (await stage.catalog.point(gap.closed_by)).cause is Cause.GAP

    Stage().play(act)


@pytest.mark.parametrize("waits", [False, True])
def test_a_gap_settles_its_stream_up_to_its_end_unless_a_commit_still_waits_before(waits: bool) -> None:
    async def act(stage: Stage) -> None:
        kept = stage.cluster.commit("bank")
        if waits:
            stage.when("before flush", AgentError("busy"))
        else:
            await asyncio.sleep(1)
        stage.cluster.commit("bank", synchronous=False)
        await asyncio.sleep(0.5)
        stage.when("before open_point", asyncio.Event().wait)  # whoever is killed here has recorded the gap alone
        stage.cluster.promote(kept.end, keep_slots=True)
        await asyncio.sleep(30)
        (gap,) = await stage.catalog.gaps()
        assert gap.until.history != kept.history
        assert (await stage.catalog.settled("bank") == gap.until) is not waits

    Stage().play(act)


def test_what_a_failover_left_behind_does_not_take_the_outcome_of_what_it_kept() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before flush", AgentError("busy"))
        kept, left = stage.cluster.commit("bank"), stage.cluster.commit("bank")
        await asyncio.sleep(0.5)
        stage.cluster.promote(kept.end, keep_slots=True)
        await asyncio.sleep(30)
        assert await stage.outcomes() == {kept.name: Outcome.PROTECTED, left.name: Outcome.MISSED}

    Stage().play(act)


def test_a_base_that_a_failover_left_behind_is_replaced_though_the_stream_lacks_nothing_that_was_delivered() -> None:
    async def act(stage: Stage) -> None:
        seen = stage.cluster.commit("bank")
        stage.when("before snapshot", lambda: stage.cluster.commit("bank", synchronous=False))
        await asyncio.sleep(1)
        base = (await stage.points())[-1]
        assert base.ceiling is not None
        assert base.ceiling > seen.position
        stage.cluster.promote(seen.end, keep_slots=True)
        await asyncio.sleep(5)
        (gap,) = await stage.catalog.gaps()
        assert (gap.after, gap.until.at) == (seen.position, seen.end)
        newest = (await stage.points())[-1]
        assert newest.cause is Cause.GAP
        assert newest.ceiling is not None
        assert stage.cluster.lineage().includes(newest.ceiling)

    Stage().play(act)


def test_breaks_of_all_streams_are_recorded_before_anything_is_taken() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before record_gaps", lambda: asyncio.sleep(2))
        for stream in stage.streams:
            stage.cluster.commit(stream)
        await asyncio.sleep(1)
        stage.calls.clear()
        for stream in stage.streams:
            stage.cluster.write_ahead(100)
            stage.cluster.flush()
            stage.cluster.recreate_slot(stream)
            await asyncio.sleep(0.5)
        await asyncio.sleep(10)
        calls = [call for call in stage.calls if call in ("record_gaps", "open_point")]
        assert calls[:3] == ["record_gaps", "record_gaps", "open_point"]
        assert {gap.closed_by > 0 for gap in await stage.catalog.gaps()} == {True}

    Stage("bank", "shop").play(act)
