"""What every agent must do: claims about the port, run against each driver and against broken ones."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable

import pytest

from tests.conformance.agent_rigs import AgentRig, LocalAgentRig
from tests.fixtures.volumes import run
from trigger.errors import AgentError
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id

EVERY: list[Callable[[AgentRig], Awaitable[None]]] = []
LOCAL: list[Callable[[LocalAgentRig], Awaitable[None]]] = []

A, B = (point_id(EPOCH, number) for number in (1, 2))


def every(claim: Callable[[AgentRig], Awaitable[None]]) -> Callable[[AgentRig], Awaitable[None]]:
    EVERY.append(claim)
    return claim


def local(claim: Callable[[LocalAgentRig], Awaitable[None]]) -> Callable[[LocalAgentRig], Awaitable[None]]:
    LOCAL.append(claim)
    return claim


@every
async def a_flush_gives_one_proof_for_each_volume_in_order(rig: AgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    flushes = await agent.flush(A, 10)
    await agent.close()
    assert [flush.volume for flush in flushes] == [volume.name for volume in rig.volumes]
    for flush in flushes:
        assert flush.agent == agent.name
        assert flush.began_at <= flush.ended_at
        assert re.fullmatch(r"[0-9]+:[0-9]+", flush.device)
        assert re.fullmatch(r"[0-9a-f]+", flush.filesystem)


@every
async def what_was_written_before_the_flush_survives_a_power_cut_after_it(rig: AgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    for text in ("one", "two"):
        rig.write(text)
        assert rig.on_disk() != text
        await agent.flush(A, 10)
        assert rig.on_disk() == text
    await agent.close()


@every
async def a_flush_before_prepare_or_after_close_is_refused(rig: AgentRig) -> None:
    agent = rig.driver()
    with pytest.raises(AgentError):
        await agent.flush(A, 1)
    await agent.prepare(rig.volumes)
    await agent.close()
    await agent.close()
    with pytest.raises(AgentError):
        await agent.flush(A, 1)


@every
async def a_write_back_error_fails_every_flush_until_it_is_cleared(rig: AgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    await agent.flush(A, 10)
    rig.break_writes()
    for _ in range(3):
        with pytest.raises(AgentError) as raised:
            await agent.flush(B, 10)
        assert not raised.value.retryable
    await agent.close()
    restarted = rig.driver()
    await restarted.prepare(rig.volumes)
    with pytest.raises(AgentError):
        await restarted.flush(B, 10)
    for volume in rig.volumes:
        await restarted.clear(volume.name)
    await restarted.close()
    again = rig.driver()
    await again.prepare(rig.volumes)
    await again.flush(B, 10)
    await again.close()


@every
async def a_cancelled_flush_can_be_repeated(rig: AgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    for delay in (0, 0, 0.0002, 0.001):
        task = asyncio.create_task(agent.flush(A, 10))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(await agent.flush(A, 10)) == len(rig.volumes)
    await agent.close()


@local
async def a_volume_that_is_not_there_is_refused_by_prepare(rig: LocalAgentRig) -> None:
    agent = rig.driver()
    with pytest.raises(AgentError):
        await agent.prepare([*rig.volumes, Volume("gone", str(rig.disk.folder / "gone"))])
    with pytest.raises(AgentError):
        await agent.flush(A, 1)
    await agent.close()


@local
async def a_frozen_filesystem_is_no_success_and_holds_up_nothing(rig: LocalAgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    loop = asyncio.get_running_loop()
    run("fsfreeze", "--freeze", rig.disk.mount)
    try:
        for _ in range(3):
            before = loop.time()
            with pytest.raises(AgentError):
                await agent.flush(A, 0.2)
            assert loop.time() - before < 1
    finally:
        run("fsfreeze", "--unfreeze", rig.disk.mount)
    rig.write("thawed")
    await agent.flush(B, 10)
    assert rig.on_disk() == "thawed"
    await agent.close()


@local
async def a_volume_that_was_mounted_over_is_not_flushed_as_the_old_one(rig: LocalAgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    run("mount", "-t", "tmpfs", "none", rig.volumes[-1].path)
    try:
        with pytest.raises(AgentError):
            await agent.flush(A, 10)
    finally:
        run("umount", rig.volumes[-1].path)
    await agent.flush(A, 10)
    await agent.close()


@local
async def a_read_only_filesystem_is_no_success(rig: LocalAgentRig) -> None:
    agent = rig.driver()
    await agent.prepare(rig.volumes)
    run("mount", "-o", "remount,ro", rig.disk.mount)
    try:
        with pytest.raises(AgentError):
            await agent.flush(A, 10)
    finally:
        run("mount", "-o", "remount,rw", rig.disk.mount)
    with contextlib.suppress(AgentError):
        await agent.flush(A, 10)
    await agent.close()
