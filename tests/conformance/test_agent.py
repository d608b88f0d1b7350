"""Every agent keeps every claim of the port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.conformance.agent_claims import EVERY, LOCAL
from tests.conformance.agent_rigs import LocalAgentRig, MemoryAgentRig
from tests.fixtures.volumes import failing_volume


@pytest.mark.parametrize("claim", EVERY, ids=lambda claim: claim.__name__)
def test_the_agent_in_memory_keeps_every_claim(claim: Callable[[Any], Awaitable[None]]) -> None:
    asyncio.run(_run(claim, MemoryAgentRig()))


@pytest.mark.volume
@pytest.mark.parametrize("claim", [*EVERY, *LOCAL], ids=lambda claim: claim.__name__)
def test_the_local_agent_keeps_every_claim(claim: Callable[[Any], Awaitable[None]]) -> None:
    with failing_volume() as disk:
        asyncio.run(_run(claim, LocalAgentRig(disk)))


async def _run(claim: Callable[[Any], Awaitable[None]], rig: object) -> None:
    async with asyncio.timeout(60):
        await claim(rig)
