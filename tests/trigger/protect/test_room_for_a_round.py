"""A round that cannot find room ends before the database's backup bracket, which costs a checkpoint and log."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

from tests.trigger.protect.stage import Stage
from trigger.model import Space, State
from trigger.ports import Capability
from trigger.protect.pipeline import ATTEMPT_SECONDS

COPIES = frozenset({Capability.ATOMIC})
"""What a storage can do that needs the bracket."""


def count_brackets(stage: Stage) -> list[str]:
    """Give a list to which the name of each bracket is added as it is begun."""
    database = cast("Any", stage.protected.logs.databases[0])._port
    begin, begun = database.bracket, list[str]()

    def counted(name: str) -> Any:
        begun.append(name)
        return begin(name)

    database.bracket = counted
    return begun


def shows(stage: Stage, **space: Any) -> None:
    """Let the storage say this of its room from now on."""
    asked = stage.storage.space

    async def said() -> Space:
        return replace(await asked(), **space)

    stage.storage.space = said  # type: ignore[method-assign]


def test_without_room_or_budget_no_bracket_is_begun_and_the_commit_waits_for_the_point() -> None:
    for space in ({"free_bytes": 10, "wanted_free_bytes": 20}, {"snapshots": 50, "budget": 50}):

        async def act(stage: Stage, space: dict[str, Any] = space) -> None:
            begun, asked = count_brackets(stage), stage.storage.space
            shows(stage, **space)
            commit = stage.cluster.commit("bank")
            await asyncio.sleep(60)
            failed = (await stage.points())[-1]
            assert failed.state is State.FAILED
            assert "wanted" in failed.failure or "the budget is 50" in failed.failure
            assert begun == []
            stage.storage.space = asked  # type: ignore[method-assign]
            await asyncio.sleep(700)
            assert (await stage.points())[-1].state is State.SEALED
            assert commit.name in await stage.outcomes()

        Stage(capabilities=COPIES).play(act)


def test_what_found_no_room_is_tried_again_now_and_then_and_at_once_where_there_is_more() -> None:
    async def act(stage: Stage) -> None:
        begun, asked = count_brackets(stage), stage.storage.space
        shows(stage, free_bytes=100, wanted_free_bytes=20, needed_bytes=81)
        taken = len([point for point in await stage.points() if point.state is State.SEALED])
        for _ in range(20):
            stage.cluster.commit("bank")
            await asyncio.sleep(ATTEMPT_SECONDS / 4)
        assert 2 <= len(begun) <= 9, "it may need less by now, and it is no use to try every time"
        stage.storage.space = asked  # type: ignore[method-assign]
        stage.cluster.commit("bank")
        await asyncio.sleep(700)
        assert len([point for point in await stage.points() if point.state is State.SEALED]) > taken

    Stage(capabilities=COPIES).play(act)
