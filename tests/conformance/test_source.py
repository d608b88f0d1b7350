"""Every source keeps every claim of the port; and broken ones are caught."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from connectors.memory import MemorySource, World
from connectors.memory.manner import ANNOUNCED, BINLOG, MEMORY, Manner
from tests.conformance import source_claims
from tests.conformance.source_claims import CLAIMS
from tests.conformance.source_rigs import MemorySourceRig, PostgresSourceRig, SourceRig
from tests.fixtures.postgres import Cluster, running_cluster
from tests.fixtures.volumes import plain_folder
from trigger.ports import Batch, Break
from trigger.position import Lineage, Position

Claim = Callable[[SourceRig], Awaitable[None]]
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with plain_folder() as folder, running_cluster(16, Path(folder) / "data") as running:
        yield running


@pytest.mark.parametrize("manner", [MEMORY, BINLOG, ANNOUNCED], ids=lambda manner: manner.kind)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_the_source_in_memory_keeps_every_claim(claim: Claim, manner: Manner) -> None:
    asyncio.run(_run(claim, MemorySourceRig(world=World(manners=(manner,)))))


@pytest.mark.server
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_the_source_of_postgres_keeps_every_claim(claim: Claim, cluster: Cluster) -> None:
    asyncio.run(_run(claim, PostgresSourceRig(cluster, f"bank{next(_numbers)}")))


class SeesNoBreak(MemorySource):
    async def open(self, after: Position | None) -> Break | None:
        await super().open(after)
        return None


class ForgetsWhatWasLeft(MemorySource):
    async def open(self, after: Position | None) -> Break | None:
        found = await super().open(after)
        return found and found._replace(lineage=Lineage(found.until.history))


class SaysNothingUntilThereIsLog(MemorySource):
    async def open(self, after: Position | None) -> Break | None:
        found = await super().open(after)
        self._says_where_it_begins = False
        return found


class GivesSettledCommitsAgain(MemorySource):
    async def open(self, after: Position | None) -> Break | None:
        found = await super().open(after)
        if after is not None:
            self._read_until = type(after.at)(1 << 24)
        return found


class LosesWhatACancelledReadHad(MemorySource):
    async def read(self) -> Batch:
        batch = await super().read()
        await asyncio.sleep(0.002)
        return batch


class ForgetsBeforeItIsTold(MemorySource):
    async def read(self) -> Batch:
        batch = await super().read()
        await self.acknowledge(batch.through)
        return batch


class WaitsForItsOwnCommits(MemorySource):
    async def read(self) -> Batch:
        while not (batch := await super().read()).commits:
            pass
        return batch


class ReadsOnWhenClosed(MemorySource):
    async def close(self) -> None:
        pass


BROKEN: list[tuple[type[MemorySource], Claim]] = [
    (SeesNoBreak, source_claims.a_slot_that_was_dropped_is_a_break),
    (SeesNoBreak, source_claims.a_slot_that_somebody_made_anew_is_a_break),
    (SeesNoBreak, source_claims.a_slot_that_was_moved_ahead_is_a_break),
    (ForgetsWhatWasLeft, source_claims.a_failover_is_a_break_that_tells_where_each_branch_that_was_left_ended),
    (SaysNothingUntilThereIsLog, source_claims.a_stream_opened_for_the_first_time_says_at_once_where_it_begins),
    (GivesSettledCommitsAgain, source_claims.a_restart_resumes_behind_what_was_settled),
    (LosesWhatACancelledReadHad, source_claims.a_cancelled_read_loses_nothing),
    (ForgetsBeforeItIsTold, source_claims.what_was_not_acknowledged_comes_again),
    (WaitsForItsOwnCommits, source_claims.a_stream_without_commits_goes_on_beside_a_busy_one),
    (ReadsOnWhenClosed, source_claims.a_closed_source_is_closed_and_can_be_opened_again),
]


@pytest.mark.parametrize(("driver", "claim"), BROKEN, ids=[f"{d.__name__}-{c.__name__}" for d, c in BROKEN])
def test_the_suite_catches_a_source_that(driver: type[MemorySource], claim: Claim) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, TimeoutError)):
        asyncio.run(_run(claim, MemorySourceRig(driver), seconds=3))


async def _run(claim: Claim, rig: SourceRig, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        await claim(rig)
