"""Where log was kept once and nothing lies, the check refuses; where none ever was, it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from connectors.memory import MemoryJournal, NoLog, World
from trigger.errors import JournalError
from trigger.model import Severity
from trigger.ports import Journal
from trigger.service import kept


class Shown(MemoryJournal):
    """A journal that says whether anything lies there, or cannot."""

    void: bool | None = True

    async def is_void(self) -> bool:
        if self.void is None:
            raise JournalError("the journal folder cannot be looked into", hint="mend the disk")
        return self.void


def options(state: Path, journal: str = "/srv/journal") -> Any:
    return SimpleNamespace(state_folder=state, journal_folder=Path(journal))


def test_log_is_missed_only_where_there_was_some(tmp_path: Path) -> None:
    async def act() -> None:
        journal, here = Shown(World()), options(tmp_path)
        assert not await kept.note_log(here, journal)
        assert await kept.missed_log(here, journal) is None, "a first start, or the state folder was lost with it"
        journal.void = False
        assert await kept.note_log(here, journal)
        assert await kept.note_log(here, journal)
        assert await kept.missed_log(here, journal) is None
        journal.void = True
        missing = await kept.missed_log(here, journal)
        assert missing is not None
        assert (missing.severity, missing.subject) == (Severity.REFUSED, "journal")
        assert missing.message == "no journal lies in /srv/journal, and log was kept there"
        assert "mount its filesystem" in missing.remedy
        moved = await kept.missed_log(options(tmp_path, "/new"), journal)
        assert moved is not None
        assert moved.message == "no journal lies in /new, and log was kept in /srv/journal"
        journal.void = None
        unseen = await kept.missed_log(here, journal)
        assert unseen is not None
        assert (unseen.severity, unseen.remedy) == (Severity.WARNING, "mend the disk")

    asyncio.run(act())


def test_a_disk_that_hangs_keeps_nobody_waiting_for_ever(tmp_path: Path, monkeypatch: Any) -> None:
    class Hanging(Shown):
        async def is_void(self) -> bool:
            await asyncio.Event().wait()
            return True

    async def act() -> None:
        journal = Shown(World())
        journal.void = False
        await kept.note_log(options(tmp_path), journal)
        monkeypatch.setattr(kept, "LOOK_SECONDS", 0.05)
        found = await kept.missed_log(options(tmp_path), Hanging(World()))
        assert found is not None
        assert (found.severity, "does not show" in found.message) == (Severity.WARNING, True)

    asyncio.run(act())


def test_the_journals_in_memory_say_so_too(tmp_path: Path) -> None:
    async def act() -> None:
        world, none = World(), NoLog()
        journal: Journal = MemoryJournal(world)
        assert await journal.is_void()
        running = asyncio.create_task(journal.run())
        world.cluster.commit("bank")
        world.cluster.flush()
        while not await journal.begun():  # noqa: ASYNC110 - another task
            await asyncio.sleep(0)
        running.cancel()
        assert not await journal.is_void()
        assert not await none.is_void(), "it misses nothing"
        assert await kept.note_log(options(tmp_path), none)
        assert await kept.missed_log(options(tmp_path), none) is None

    asyncio.run(act())
