"""What every source must do: claims about the port, run against each driver and against broken ones."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.conformance.source_rigs import SourceRig
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.ports import Break, Source
from trigger.position import Position

CLAIMS: list[Callable[[SourceRig], Awaitable[None]]] = []


def claim(function: Callable[[SourceRig], Awaitable[None]]) -> Callable[[SourceRig], Awaitable[None]]:
    CLAIMS.append(function)
    return function


async def read_until(source: Source, marker: str) -> tuple[list[Commit], Position]:
    """Give all commits up to the one that bears `marker`, and how far the stream is by then."""
    commits: list[Commit] = []
    async with asyncio.timeout(20):
        while not any(marker in commit.markers for commit in commits):
            batch = await source.read()
            assert not commits or not batch.commits or batch.commits[0].end > commits[-1].end
            assert all(commit.position <= batch.through for commit in batch.commits)
            commits += batch.commits
    return commits, batch.through


def markers(commits: list[Commit]) -> list[str]:
    return [marker for commit in commits for marker in commit.markers]


async def settled(rig: SourceRig) -> Position:
    """Open for the first time, read and acknowledge one commit, and leave; gives the settled position."""
    source = rig.driver()
    assert await source.open(None) is None
    rig.commit("settled")
    commits, _ = await read_until(source, "settled")
    await source.acknowledge(commits[-1].position)
    await source.close()
    return commits[-1].position


@claim
async def commits_come_once_each_in_the_order_of_the_log(rig: SourceRig) -> None:
    source = rig.driver()
    assert await source.open(None) is None
    for number in range(30):
        rig.commit(f"m{number}")
        rig.commit_elsewhere()
    commits, through = await read_until(source, "m29")
    await source.close()
    assert markers(commits) == [f"m{number}" for number in range(30)]
    assert len({commit.name for commit in commits}) == 30
    assert all(commit.start < commit.end for commit in commits)
    assert all(earlier.end <= later.start for earlier, later in itertools.pairwise(commits))
    assert {commit.stream for commit in commits} == {source.name}
    assert through.covers(commits[-1].position)


@claim
async def a_stream_opened_for_the_first_time_says_at_once_where_it_begins(rig: SourceRig) -> None:
    source = rig.driver()
    assert await source.open(None) is None
    async with asyncio.timeout(2):  # an idle server says nothing for much longer
        commits, begin = await source.read()
    assert commits == ()
    rig.commit("first")
    (first,), _ = await read_until(source, "first")
    await source.close()
    assert first.position >= begin


@claim
async def a_restart_resumes_behind_what_was_settled(rig: SourceRig) -> None:
    after = await settled(rig)
    rig.commit("while away")
    source = rig.driver()
    assert await source.open(after) is None
    rig.commit("back")
    commits, _ = await read_until(source, "back")
    await source.close()
    assert markers(commits) == ["while away", "back"]


@claim
async def what_was_not_acknowledged_comes_again(rig: SourceRig) -> None:
    after = await settled(rig)
    rig.commit("last")
    for _ in range(2):
        source = rig.driver()
        assert await source.open(after) is None
        commits, _through = await read_until(source, "last")
        assert markers(commits) == ["last"]
        await source.close()


@claim
async def a_stream_that_is_opened_again_behind_what_was_delivered_tells_the_server_of_what_was_settled_alone(
    rig: SourceRig,
) -> None:
    """Its caller has no outcome yet for what it resumes behind: after a crash it must come again."""
    after = await settled(rig)
    rig.commit("pending")
    source = rig.driver()
    assert await source.open(after) is None
    commits, _ = await read_until(source, "pending")
    await source.close()
    again = rig.driver()
    assert await again.open(commits[-1].position) is None
    rig.commit("next")
    await read_until(again, "next")
    await again.heartbeat()
    await again.close()
    anew = rig.driver()
    assert await anew.open(after) is None
    commits, _ = await read_until(anew, "next")
    await anew.close()
    assert markers(commits) == ["pending", "next"]


@claim
async def a_cancelled_read_loses_nothing(rig: SourceRig) -> None:
    source = rig.driver()
    assert await source.open(None) is None
    seen: list[str] = []
    for number in range(20):
        reading = asyncio.create_task(source.read())
        await asyncio.sleep(0.001 * (number % 4))
        rig.commit(f"m{number}")
        await asyncio.sleep(0.001 * (number % 3))
        reading.cancel()
        for result in await asyncio.gather(reading, return_exceptions=True):
            if not isinstance(result, BaseException):
                seen += markers(list(result.commits))
    rig.commit("end")
    commits, _ = await read_until(source, "end")
    await source.close()
    assert seen + markers(commits) == [*(f"m{number}" for number in range(20)), "end"]


@claim
async def a_cut_connection_is_a_retryable_error_and_no_break(rig: SourceRig) -> None:
    after = await settled(rig)
    source = rig.driver()
    assert await source.open(after) is None
    rig.cut_connections()
    rig.commit("one")
    with pytest.raises(SourceError) as raised:
        await read_until(source, "never")
    assert raised.value.retryable
    assert await source.open(after) is None
    commits, _ = await read_until(source, "one")
    assert markers(commits) == ["one"]
    await source.close()


async def _break_after(rig: SourceRig, hurt: Callable[[], None]) -> None:
    after = await settled(rig)
    rig.commit("lost")
    hurt()
    source = rig.driver()
    found = await source.open(after)
    assert found is not None
    assert found.reason
    assert found.until > after
    rig.commit("seen")
    commits, _ = await read_until(source, "seen")
    await source.close()
    assert markers(commits) == ["seen"]
    assert commits[-1].position > found.until


@claim
async def a_slot_that_was_dropped_is_a_break(rig: SourceRig) -> None:
    await _break_after(rig, rig.drop_slot)


@claim
async def a_slot_that_somebody_made_anew_is_a_break(rig: SourceRig) -> None:
    await _break_after(rig, rig.recreate_slot)


@claim
async def a_slot_that_was_moved_ahead_is_a_break(rig: SourceRig) -> None:
    await _break_after(rig, rig.advance_slot)


@claim
async def after_a_crash_of_the_server_nothing_is_lost_and_nothing_settled_comes_again(rig: SourceRig) -> None:
    after = await settled(rig)
    rig.commit("before")
    rig.crash()
    source = rig.driver()
    assert await source.open(after) is None
    rig.commit("behind")
    commits, _ = await read_until(source, "behind")
    await source.close()
    assert markers(commits) == ["before", "behind"]


@claim
async def a_failover_is_a_break_that_tells_where_each_branch_that_was_left_ended(rig: SourceRig) -> None:
    after = await settled(rig)
    rig.commit("kept")
    rig.promote()
    source = rig.driver()
    found = await source.open(after)
    assert found is not None
    if found.until.history.is_of_system(after.history):  # else it is another server, and all of the old one is behind
        assert found.lineage is not None
        ends = found.lineage.ends_since(after)
        assert len(ends) == 1
        end, begins = ends[0]
        assert (end.history, end.at) == (after.history, begins.at)
        assert end > after
        rig.commit("new")
        commits: list[Commit] = []
        async with asyncio.timeout(20):
            while not commits or commits[-1].markers != ("new",):
                commits += (await source.read()).commits
        assert commits[-1].position > begins
        assert found.until <= after or markers(commits) == ["new"], "what is not given again lies in the gap"
    await source.close()


async def _gone_back(rig: SourceRig, copy: Any, after: Position) -> Break:
    """Have the server leave its history, see a commit in the new one, put a copy back; gives the break that is told."""
    rig.promote()
    source = rig.driver()
    await source.open(after)
    rig.commit("elsewhere")
    commits, _ = await read_until(source, "elsewhere")
    left = commits[-1].position
    assert left.history != after.history
    await source.acknowledge(left)
    await source.close()
    rig.put_back(copy)
    source = rig.driver()
    found = await source.open(left)
    assert found is not None
    assert found.reason
    rig.commit("back")
    commits, _ = await read_until(source, "back")
    await source.close()
    assert commits[-1].history == found.until.history
    return found


@claim
async def a_server_that_goes_back_to_what_it_left_goes_on_there_where_it_has_all_that_is_known(rig: SourceRig) -> None:
    after = await settled(rig)
    found = await _gone_back(rig, rig.copy(), after)
    assert found.until.history == after.history


@claim
async def a_server_that_goes_back_to_what_it_left_and_lacks_what_is_known_is_another_life(rig: SourceRig) -> None:
    copy = rig.copy()
    after = await settled(rig)
    found = await _gone_back(rig, copy, after)
    assert found.until.history == replace(after.history, incarnation=after.history.incarnation + 1)


@claim
async def a_stream_without_commits_goes_on_beside_a_busy_one(rig: SourceRig) -> None:
    source = rig.driver()
    assert await source.open(None) is None
    rig.commit("one")
    commits, through = await read_until(source, "one")
    async with asyncio.timeout(20):
        while not through > commits[-1].position:
            rig.commit_elsewhere()
            batch = await source.read()
            assert list(batch.commits) == []
            through = batch.through
    await source.acknowledge(through)
    await source.close()


@claim
async def a_closed_source_is_closed_and_can_be_opened_again(rig: SourceRig) -> None:
    source = rig.driver()
    await source.close()
    assert await source.open(None) is None
    await source.close()
    await source.close()
    with pytest.raises(SourceError):
        async with asyncio.timeout(5):
            await source.read()
    assert await source.open(None) is None
    rig.commit("one")
    assert markers((await read_until(source, "one"))[0]) == ["one"]
    await source.close()
