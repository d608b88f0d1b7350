"""A restore may begin, in a process of its own, while snapshots are removed one after the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from connectors.memory import MemoryStorage
from tests.simulation.virtual import inline
from tests.trigger.keep.test_expire import FAR, POINTS, Shelves, _filled, play
from trigger.keep.room import Room
from trigger.model import State


class Cloned(MemoryStorage):
    """A storage in which a clone of a point is begun while the first one of others is removed."""

    of = ""

    async def delete(self, point: str) -> None:
        await super().delete(point)
        of, self.of = self.of, ""
        if of:
            await self.clone(of, "begun", lambda *_: None)


async def _thin(room: Room) -> None:
    assert len(await room.make(FAR)) == 5


async def _give_up(room: Room) -> None:
    said = await room.give_up_before(8)
    assert (said.points, said.kept) == ((1, 2, 3, 5, 6, 7), (4,))


@pytest.mark.parametrize("removal", [_thin, _give_up])
def test_a_point_stays_of_which_a_clone_was_begun_since_it_was_decided_what_goes(
    removal: Callable[[Room], Awaitable[None]],
) -> None:
    async def act(shelves: Shelves) -> None:
        storage = Cloned(shelves.world, budget=POINTS)
        points = await _filled(20)(shelves)
        storage.of = points[3].id
        await removal(Room(shelves.catalog, storage, shelves.journal, inline))
        assert await shelves.numbers(State.EXPIRING) == []
        assert 4 in await shelves.numbers()
        assert points[3].id in shelves.world.kept

    play(act)
