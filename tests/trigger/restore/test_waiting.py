"""What the database has already, and the journal a moment later, is waited for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fixtures.bank import Bank, run
from trigger.errors import RestoreError
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
