"""What a catalog takes over from tags, and from the one before it."""

from __future__ import annotations

import dataclasses

from connectors.databases.postgres.lsn import Lsn
from tests.trigger.catalog.test_catalog import HISTORY, at, gap, opened, proven, record, with_catalog
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.model import Gap, Mark
from trigger.position import Position


def test_an_adopted_point_brings_the_gaps_that_it_closed_and_leaves_out_what_two_lives_of_the_log_share() -> None:
    again = dataclasses.replace(HISTORY, incarnation=1)
    tags: list[str] = []

    async def first(catalog: Catalog) -> list[Gap]:
        await catalog.record_gaps(gap(200))
        for number, history in ((1, HISTORY), (2, again)):
            draft = await opened(catalog, number)
            marks = (Mark(Position(history, draft.floor.at), Position(history, draft.floor.at)),)
            point = await catalog.seal(dataclasses.replace(proven(draft), marks=marks), [record(100)], {})
            await catalog.close_gaps(number)
            tags.append(tag.encode(dataclasses.replace(point, commits=1), [record(100)]))
        return await catalog.gaps()

    async def second(catalog: Catalog) -> list[Gap]:
        for each in tags:
            assert await catalog.adopt(*tag.decode(each))
        assert len(await catalog.find(place=100)) == 1
        assert [point.commits for point in await catalog.bases()] == [1, 0]
        return await catalog.gaps()

    gaps = with_catalog(first)
    assert [gap.closed_by for gap in gaps] == [1]
    assert with_catalog(second) == gaps


def test_what_another_catalog_knew_is_taken_over_once_and_leads_no_stream_back() -> None:
    later = dataclasses.replace(HISTORY, incarnation=1)

    async def work(catalog: Catalog) -> None:
        await catalog.settle("bank", Position(later, Lsn(50)))
        closed = dataclasses.replace(gap(300), closed_by=7)
        for _ in range(2):
            await catalog.take_over([gap(200), closed], {"bank": at(900), "shop": at(800)})
        assert await catalog.gaps() == [gap(200), closed]
        assert await catalog.all_settled() == {"bank": Position(later, Lsn(50)), "shop": at(800)}

    with_catalog(work)
