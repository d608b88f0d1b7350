"""Where points were kept once, and neither catalog nor storage knows of one, the check refuses; else it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from connectors.memory import MemoryJournal, MemoryStorage, World
from tests.simulation.virtual import inline
from tests.trigger.catalog.test_reconcile import Stage
from trigger.catalog.catalog import Catalog
from trigger.errors import JournalError
from trigger.model import Severity
from trigger.service import kept
from trigger.service.upkeep import Upkeep


def options(state: Path, storage: str = "/srv/points") -> Any:
    return SimpleNamespace(state_folder=state, storage_folders=(Path(storage),))


async def empty() -> Stage:
    """Give a catalog and a storage as an operator finds them beneath a mount point."""
    return Stage(await Catalog.open(":memory:", run=inline), World())


def test_points_are_missed_only_where_there_were_some(tmp_path: Path) -> None:
    async def act() -> None:
        here, mounted, bare = options(tmp_path), await empty(), await empty()
        assert not await kept.note_points(here, mounted.catalog)
        assert await kept.missed_points(here, mounted.catalog, mounted.storage) is None, "a first start"
        await mounted.sealed(1)
        assert await kept.note_points(here, mounted.catalog)
        assert await kept.note_points(here, mounted.catalog)
        assert await kept.missed_points(here, mounted.catalog, mounted.storage) is None
        assert await kept.missed_points(here, mounted.catalog, MemoryStorage(World())) is None, "reconcile says it"
        assert await kept.missed_points(here, bare.catalog, mounted.storage) is None, "made anew"
        missing = await kept.missed_points(here, bare.catalog, bare.storage)
        assert missing is not None
        assert (missing.severity, missing.subject) == (Severity.REFUSED, "storage")
        assert missing.message.endswith("points were kept in /srv/points")
        assert "mount" in missing.remedy
        assert kept.BEGIN_ANEW in missing.remedy

    asyncio.run(act())


def test_points_are_noted_though_nobody_can_look_at_the_journal(tmp_path: Path) -> None:
    class Unseen(MemoryJournal):
        async def is_void(self) -> bool:
            raise JournalError("Input/output error")

    async def act() -> None:
        stage = await empty()
        await stage.sealed(1)
        parts: Any = SimpleNamespace(options=options(tmp_path), catalog=stage.catalog, journal=Unseen(stage.world))
        nothing = cast("Any", None)
        with pytest.raises(JournalError):
            await Upkeep(parts, nothing, nothing, nothing).note_kept()
        assert (tmp_path / "storage.begun").read_text() == "/srv/points"

    asyncio.run(act())


def test_who_knows_of_points_from_an_old_catalog_misses_them_without_a_note(tmp_path: Path) -> None:
    async def act() -> None:
        here, bare = options(tmp_path), await empty()
        assert await kept.missed_points(here, bare.catalog, bare.storage) is None
        missing = await kept.missed_points(here, bare.catalog, bare.storage, known=2, anyway="believe it")
        assert missing is not None
        assert missing.message == "the storage shows no snapshot at all, and in the catalog 2 points are sealed"
        assert missing.remedy == "mount the storage's filesystem; if it is really gone: believe it"

    asyncio.run(act())
