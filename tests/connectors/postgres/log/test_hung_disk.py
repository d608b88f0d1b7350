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
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import find_programs
from connectors.hosts.hooks import Hook, run_hook
from trigger.position import History, Position
from trigger.service.detached import Detached

SEGMENT_BYTES = 1 << 20
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
    return journal_of(tmp_path / "journal")


def journal_of(path: Path) -> PostgresJournal:
    async def present() -> History:
        return lsn.history("7", 1)

    def dump_for(segments: SegmentFolder) -> WalDump:
        return WalDump(find_programs(segments.major() or 15))

    return PostgresJournal(LogFolders(path, SEGMENT_BYTES), cast("Any", Feed()), present, dump_for)


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


@pytest.mark.server
@pytest.mark.parametrize("call", ["complete", "_listing", "locate", "file", "major", "slices"])
def test_an_audit_asks_the_disk_for_nothing_in_the_event_loop(
    call: str, tmp_path: Path, mended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers to everything but one call, so that an audit comes as far as that."""
    path = tmp_path / "journal"
    path.mkdir()
    for number in (1, 2, 3):
        (path / SegmentName(1, number).text(SEGMENT_BYTES)).write_bytes(bytes(SEGMENT_BYTES))
    asked = threading.Event()

    def hangs(*_: Any, **__: Any) -> None:
        asked.set()
        mended.wait(2 * PROMPT_SECONDS)

    async def main() -> None:
        journal = journal_of(path)
        monkeypatch.setattr(SegmentFolder, call, hangs)
        audit = asyncio.create_task(journal.audit())
        slowest, last = 0.0, time.monotonic()
        while not asked.is_set() or time.monotonic() - last < 0.1:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - began)
            last = last if asked.is_set() else time.monotonic()
        assert slowest < PROMPT_SECONDS
        mended.set()
        audit.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await audit

    asyncio.run(main())


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
