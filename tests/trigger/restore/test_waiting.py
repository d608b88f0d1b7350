"""What the database has already, and the journal a moment later, is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.bank import Bank, run
from trigger.errors import RestoreError
from trigger.model import Logged
from trigger.ports import Journal
from trigger.position import Name
from trigger.restore import target
from trigger.restore.restore import prepare
from trigger.restore.target import Named, resolve


def test_a_target_a_moment_ahead_of_the_journal_is_waited_for(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        wanted = it.commit()
        it.commit()
        await it.point()
        whole = it.world.journal[1]
        it.world.journal[1] = [(whole[0][0], wanted.start)]
        target = await it.resolve(Named(name=wanted.name))
        with pytest.raises(RestoreError, match="future of the journal"):
            await prepare(target, it.site, wait_seconds=0)
        waiting = asyncio.create_task(prepare(target, it.site))
        await asyncio.sleep(0.1)
        it.world.journal[1] = whole
        assert (await waiting).target.commit == target.commit

    run(tmp_path, story)


def test_a_commit_that_is_in_no_log_that_is_kept_yet_is_waited_for_while_the_database_has_more(tmp_path: Path) -> None:
    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        it.pending.clear()
        wanted = it.commit()
        await it.journaled()
        whole = it.world.journal[1]
        it.world.journal[1] = [(whole[0][0], wanted.start)]
        with pytest.raises(RestoreError, match=f"{wanted.name} is in neither the catalog nor the log"):
            await resolve(Named(name=wanted.name), it.catalog, it.site.journal)
        waiting = asyncio.create_task(it.resolve(Named(name=wanted.name)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        it.world.journal[1] = whole
        assert (await waiting).at == wanted.start

    run(tmp_path, story)


class Slow:
    """A journal that takes its time to be searched."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    async def commits(self, *arguments: Any) -> AsyncIterator[Logged]:
        await asyncio.sleep(0.15)
        async for one in self._journal.commits(*arguments):
            yield one


def test_a_name_that_is_nowhere_is_refused_in_time_also_while_the_journal_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "JOURNAL_WAIT_SECONDS", 0.5)

    async def story(it: Bank) -> None:
        it.commit()
        await it.point()
        it.pending.clear()
        it.commit()
        await it.journaled()
        ((start, end),) = it.world.journal[1]
        it.world.journal[1] = [(start, end - 1000)]

        async def catch_up() -> None:
            for at in range(end - 1000, end):
                it.world.journal[1] = [(start, at)]
                await asyncio.sleep(0.05)

        growing = asyncio.create_task(catch_up())
        slow: Any = Slow(it.site.journal)
        async with asyncio.timeout(5):
            with pytest.raises(RestoreError, match="is in neither the catalog nor the log"):
                await resolve(Named(name=Name("", 999999)), it.catalog, slow, it.database)
        assert not growing.done()
        growing.cancel()

    run(tmp_path, story)
