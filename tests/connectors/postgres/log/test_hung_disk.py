"""A disk of the journal that does not answer holds up the journal, and nothing else of the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.journal import PostgresJournal
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.lsn import Lsn
from connectors.hosts.hooks import Hook, run_hook
from trigger.position import History, Position
from trigger.service.detached import Detached

MANY = 60
"""More calls than any pool has threads."""
PROMPT_SECONDS = 5.0


class Feed:
    """A feed of nothing."""

    owner = None

    def findings(self) -> list[Any]:
        return []


@pytest.fixture
def mended() -> Iterator[threading.Event]:
    """Set at the end, so that no thread of a test is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def journal(tmp_path: Path, mended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> PostgresJournal:
    """A journal in a folder that answers nothing before it is mended."""

    def hangs(*_: Any, **__: Any) -> None:
        mended.wait(60)

    for name in ("extents", "names", "make", "histories", "unasked"):
        monkeypatch.setattr(SegmentFolder, name, hangs)

    async def present() -> History:
        return lsn.history("7", 1)

    folders = LogFolders(tmp_path / "journal", 1 << 20)
    return PostgresJournal(folders, cast("Any", Feed()), present, lambda _: None)


async def given_up(asked: Callable[[], Awaitable[Any]]) -> None:
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(0.01):
            await asked()


@pytest.mark.parametrize("call", ["extents", "lineage", "audit", "release", "run"])
def test_while_the_journal_hangs_hooks_run_names_are_looked_up_and_the_process_ends(
    call: str, journal: PostgresJournal
) -> None:
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "extents": journal.extents,
        "lineage": partial(journal.lineage, lsn.history("7", 2)),
        "audit": journal.audit,
        "release": partial(journal.release, [Position(lsn.history("7", 1), Lsn(1 << 30))]),
        "run": journal.run,
    }

    async def main() -> None:
        for _ in range(MANY):
            await given_up(asked[call])
        async with asyncio.timeout(PROMPT_SECONDS):
            if os.geteuid() == 0:
                await run_hook(Hook("nothing", ("/bin/true",), "before", 5.0), "point")
            await asyncio.get_running_loop().getaddrinfo("localhost", 5432)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 2 * PROMPT_SECONDS, "the end waited for the disk"


def test_what_the_service_itself_asks_of_a_dead_disk_holds_up_neither_others_nor_its_end(
    mended: threading.Event,
) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(Detached())
        hanging = [asyncio.create_task(asyncio.to_thread(mended.wait, 60)) for _ in range(MANY)]
        async with asyncio.timeout(PROMPT_SECONDS):
            assert await asyncio.to_thread(sum, [1, 2]) == 3
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(divmod, 1, 0)
        for task in hanging:
            task.cancel()

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 2 * PROMPT_SECONDS
