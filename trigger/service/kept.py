"""Whether what was kept once still lies there, at every later start: the journal's log, and points.

Beneath the mount point of a filesystem that is not mounted all looks as before a first start. Two notes in the state
folder say that it is none; where that is lost itself, nobody misses anything.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import nothing_of
from trigger.config.options import Options
from trigger.errors import JournalError
from trigger.model import Finding, Severity, State
from trigger.ports import Journal, Storage
from trigger.trusted import read_text, replace_file

LOOK_SECONDS = 10.0
"""How long a disk may take to show whether anything lies on it."""
BEGIN_ANEW = "trigpoint run --force"
"""What believes that something is really gone."""
_LOG, _POINTS = "journal.begun", "storage.begun"
_NO_LOG = f"mount its filesystem, or bring all of the journal there; if that is really gone: {BEGIN_ANEW}"
_NO_POINTS = "mount the filesystems of storage and catalog; if they are really gone: {}"
_NO_SNAPSHOTS = "mount the storage's filesystem; if it is really gone: {}"


async def note_log(options: Options, journal: Journal) -> bool:
    """Note durably that the journal is kept where it is, once it lies there; gives whether that is so.

    Raises:
        JournalError: nobody can look there.
        OSError: it cannot be written.
    """
    return not await journal.is_void() and await _note(options, _LOG, options.journal_folder)


async def note_points(options: Options, catalog: Catalog) -> bool:
    """Note durably that points are kept where they are, once one is sealed; gives whether that is so.

    Raises:
        CatalogError: the catalog cannot be read.
        OSError: it cannot be written.
    """
    sealed = await catalog.points(states={State.SEALED}, limit=1)
    return bool(sealed) and await _note(options, _POINTS, *options.storage_folders)


async def missed_log(options: Options, journal: Journal) -> Finding | None:
    """Give what stands in the way where log was kept and no journal lies there; None for nothing. Changes nothing."""
    if not (noted := await _noted(options, _LOG)):
        return None
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            void = await journal.is_void()
    except TimeoutError:
        message = f"{options.journal_folder} does not show within {LOOK_SECONDS:g} s what lies there"
        return Finding("journal", Severity.WARNING, message, "see what its disk does")
    except JournalError as error:
        return Finding("journal", Severity.WARNING, error.message, error.hint)
    if not void:
        return None
    there = "there" if noted == str(options.journal_folder) else f"in {noted}"
    message = f"no journal lies in {options.journal_folder}, and log was kept {there}"
    return Finding("journal", Severity.REFUSED, message, _NO_LOG)


async def missed_points(
    options: Options, catalog: Catalog, storage: Storage, *, known: int = 0, anyway: str = BEGIN_ANEW
) -> Finding | None:
    """Give what stands in the way where points were kept and none is shown; None for nothing. Changes nothing.

    A catalog that lies where the snapshots do goes away with them; what would begin anew then lets go of all log behind
    a first base of its own.

    Args:
        options: where they were.
        catalog: where it knows of a point, `reconcile` holds it against the storage.
        storage: is asked for all that it shows.
        known: so many are sealed in the catalog in whose place this one will be put.
        anyway: the command that believes that they are gone.

    Raises:
        CatalogError, StorageError: one of the two cannot be read.
    """
    noted = await _noted(options, _POINTS)
    totals = await catalog.totals()
    if not (noted or known) or any(totals.points.values()) or totals.pruned or await storage.tagged():
        return None
    if known:
        return Finding("storage", Severity.REFUSED, nothing_of(known), _NO_SNAPSHOTS.format(anyway))
    words = f"neither catalog nor storage knows of a point, and points were kept in {noted}"
    return Finding("storage", Severity.REFUSED, words, _NO_POINTS.format(anyway))


async def _note(options: Options, name: str, *folders: Path) -> bool:
    if await _noted(options, name) != (listed := ", ".join(map(str, folders))):
        await asyncio.to_thread(replace_file, options.state_folder / name, listed)
    return True


async def _noted(options: Options, name: str) -> str:
    """Give the folders that a note names; "" where there is none."""
    try:
        return await asyncio.to_thread(read_text, options.state_folder / name)
    except OSError:
        return ""
