from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from connectors.faulty import Faults, faulty
from connectors.memory import MemoryDatabase, MemoryStorage, World
from trigger.errors import DatabaseError, StorageError
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id
from trigger.ports import Capability, Database, Storage

VOLUMES = [Volume("data", "/data")]


async def _take(seed: int, faults: Faults, count: int = 300) -> tuple[list[str], Counter[str], World]:
    world, told = World(), list[str]()
    storage: Storage = faulty(MemoryStorage(world, budget=9999), StorageError, Random(seed), faults, told.append)
    seen: Counter[str] = Counter()
    for number in range(count):
        try:
            async with asyncio.timeout(0.02 if faults.hang else 20):  # what does not hang has time
                await storage.snapshot(VOLUMES, point_id(EPOCH, number), "tag")
            seen["made"] += 1
        except StorageError as error:
            seen["after" if "after" in error.message else "before"] += 1
        except TimeoutError:
            seen["hung"] += 1
    return told, seen, world


def test_the_same_seed_gives_the_same_faults() -> None:
    faults = Faults(fail_before=0.1, fail_after=0.1)
    first, second = (asyncio.run(_take(7, faults))[0] for _ in range(2))
    assert first == second
    assert asyncio.run(_take(8, faults))[0] != first


def test_a_lost_reply_has_had_its_effect_and_an_early_error_has_not() -> None:
    _, seen, world = asyncio.run(_take(1, Faults(fail_before=0.2, fail_after=0.2)))
    assert seen["before"] > 30
    assert seen["after"] > 30
    assert len(world.kept) == seen["made"] + seen["after"]


def test_a_hanging_call_ends_when_it_is_cancelled() -> None:
    _, seen, world = asyncio.run(_take(2, Faults(hang=0.2), count=50))
    assert seen["hung"] > 3
    assert seen["made"] < len(world.kept) < 50


def test_what_is_no_coroutine_passes_through() -> None:
    storage: Storage = faulty(MemoryStorage(World()), StorageError, Random(1), Faults(fail_before=1))
    assert storage.name == "memory"
    assert Capability.ATOMIC in storage.capabilities


def test_a_bracket_fails_at_its_begin_or_at_its_end() -> None:
    async def bracket(faults: Faults) -> None:
        database: Database = faulty(MemoryDatabase(World()), DatabaseError, Random(1), faults)
        async with database.bracket("point") as stop:
            await stop()

    asyncio.run(bracket(Faults()))
    for faults in (Faults(fail_before=1), Faults(fail_after=1)):
        with pytest.raises(DatabaseError):
            asyncio.run(bracket(faults))
