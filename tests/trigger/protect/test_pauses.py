"""How long the main path waits after a failure, for a budget, or for a round at hand; and what ends that."""

from __future__ import annotations

import asyncio

from tests.trigger.protect.stage import Stage
from trigger.errors import CatalogError, SourceError
from trigger.model import Outcome, State
from trigger.protect.window import LAST_BACKOFF_SECONDS

BOUND_OF_THE_STAGE = 20


def test_a_pause_after_an_error_is_not_cut_short_by_arriving_commits() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before open_point", *[CatalogError("full", retryable=True)] * 3)
        began = stage.loop.time()
        for _ in range(60):
            stage.cluster.commit("bank")
            await asyncio.sleep(1)
        sealed = (await stage.points())[-1]
        assert sealed.state is State.SEALED
        assert stage.turns["before open_point"] == []
        assert stage.agenda.pace(stage.loop.time()).not_before - began < 5 + 10 + 20 + 5

    Stage(retry_seconds=5).play(act)


def test_a_server_that_is_back_is_protected_within_a_first_pause() -> None:
    async def act(stage: Stage) -> None:
        stage.cluster.crash()
        stage.agenda.retry()
        answer = stage.agenda.ask("while it is down")
        stage.window.wake()
        await asyncio.sleep(300)
        stage.cluster.restart()
        commit = stage.cluster.commit("bank")
        await asyncio.sleep(LAST_BACKOFF_SECONDS + 5 + 1)
        assert (await stage.outcomes())[commit.name] is Outcome.PROTECTED
        assert answer.done()

    Stage(retry_seconds=5).play(act)


def test_a_stream_that_opens_and_breaks_again_is_opened_less_and_less_often() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before read", *[SourceError("the connection is gone", retryable=True)] * 5000)
        stage.cluster.commit("bank")
        await asyncio.sleep(300)
        assert 20 <= stage.window.opens <= 300 / LAST_BACKOFF_SECONDS + 10

    Stage().play(act)


def test_what_somebody_asks_for_is_tried_at_once_however_long_the_pause_is() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before open_point", *[CatalogError("full", retryable=True)] * 4)
        stage.cluster.commit("bank")
        await asyncio.sleep(5 + 10 + 20 + 2)
        assert stage.turns["before open_point"] == []
        answer = stage.agenda.ask("now")
        stage.window.wake()
        async with asyncio.timeout(1):
            assert (await answer).state is State.SEALED

    Stage(retry_seconds=5).play(act)


def test_a_window_that_is_full_gets_its_point_whatever_the_budgets_say() -> None:
    async def act(stage: Stage) -> None:
        for _ in range(BOUND_OF_THE_STAGE + 1):
            stage.cluster.commit("bank")
        await asyncio.sleep(1)
        (_, point) = await stage.points()
        assert point.commits == BOUND_OF_THE_STAGE + 1

    Stage(min_interval_seconds=100, max_delay_seconds=200, bound=BOUND_OF_THE_STAGE).play(act)


def test_a_stop_waits_for_the_round_at_hand_and_begins_no_other() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before flush", lambda: asyncio.sleep(5))
        stage.cluster.commit("bank")
        await asyncio.sleep(1)
        stage.cluster.commit("bank")
        await stage.stop(within_seconds=6)
        assert [point.state for point in await stage.points()] == [State.SEALED, State.SEALED]
        assert len(stage.window) == 1

    Stage().play(act)


def test_a_stop_does_not_wait_for_a_pause() -> None:
    async def act(stage: Stage) -> None:
        stage.when("before open_point", CatalogError("full", retryable=True))
        stage.cluster.commit("bank")
        await asyncio.sleep(1)
        await stage.stop(within_seconds=0.1)

    Stage(retry_seconds=500).play(act)
