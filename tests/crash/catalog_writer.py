"""A process that writes to a catalog as fast as it can and says on standard output what it was promised.

A line is written after the call has returned: `sealed NUMBER COMMITS SETTLED`, `failed NUMBER`, `expired NUMBER`,
`missed XID`, `gap LSN`. Whoever kills the process at any moment may hold the catalog to every line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from datetime import UTC, datetime

from tests.trigger.catalog.test_catalog import HISTORY, at, opened, proven, record
from trigger.catalog.catalog import Catalog
from trigger.catalog.point_index import Missed
from trigger.model import Gap, Outcome, RecoveryPoint, State, Verification
from trigger.point_names import point_id

COMMITS = 25
STRIDE = 10_000
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def promise(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def seal(catalog: Catalog, turn: int) -> RecoveryPoint:
    first, through = turn * STRIDE, turn * STRIDE + 5_000
    records = [record(first + 20 * n, outcome=Outcome.COALESCED) for n in range(COMMITS)]
    records[0] = records[0]._replace(markers=(f"turn {turn}",))
    point = await opened(catalog, turn * 10, int(records[-1].end))
    point = await catalog.seal(proven(point), records, {"bank": at(through)})
    promise("sealed", point.number, COMMITS, through)
    return point


async def everything_else(catalog: Catalog, turn: int, point: RecoveryPoint) -> None:
    """Verify and expire the point, fail another one, adopt a third, miss a commit, record a gap and close it."""
    failed = await catalog.fail(await opened(catalog, turn * 10 + 1), "no room")
    promise("failed", failed.number)
    await catalog.record_gaps(missed=[Missed([record(turn * STRIDE + 7_000)], "left", HISTORY)])
    promise("missed", turn * STRIDE + 7_000)
    await catalog.record_gaps(Gap("bank", at(turn * STRIDE), at(turn * STRIDE + 1), "slot dropped", NOW))
    promise("gap", turn * STRIDE)
    stranger = dataclasses.replace(point, id=point_id(NOW, turn * 10 + 2), number=0)
    await catalog.adopt(stranger, [record(turn * STRIDE + 8_000, stream="shop")])
    await catalog.verified(point, Verification(NOW, True, "end", ()))
    await catalog.change(point, State.EXPIRING)
    await catalog.change(point, State.EXPIRED)
    promise("expired", point.number)
    await catalog.settle("idle", at(turn * STRIDE))


async def write(where: str, turn: int) -> None:
    catalog = await Catalog.open(where)
    while True:
        point = await seal(catalog, turn)
        if turn % 3 == 0:
            await everything_else(catalog, turn, point)
        turn += 1


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], int(sys.argv[2])))
