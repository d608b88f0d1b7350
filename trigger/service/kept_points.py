"""Whether the points are there that were: where some were kept once, catalog or storage knows of one ever after."""

from __future__ import annotations

import asyncio
from pathlib import Path

from trigger.catalog.catalog import Catalog
from trigger.config.options import Options
from trigger.model import Finding, Severity, State
from trigger.ports import Storage
from trigger.trusted import read_text, replace_file

_REMEDY = "mount the filesystems of storage and catalog; if they are really gone: {}"
BEGIN_ANEW = "trigpoint run --force"


def _file(options: Options) -> Path:
    """Give the file that says in which folder points were sealed; where the state folder is lost, nobody misses any."""
    return options.state_folder / "storage.begun"


def _noted(options: Options) -> str:
    try:
        return read_text(_file(options))
    except OSError:
        return ""


async def note(options: Options, catalog: Catalog) -> bool:
    """Note durably that points are kept where they are, once one is sealed; gives whether that is so.

    Raises:
        CatalogError: the catalog cannot be read.
        OSError: it cannot be written.
    """
    if not await catalog.points(states={State.SEALED}, limit=1):
        return False
    if await asyncio.to_thread(_noted, options) != (folder := str(options.storage.folder)):
        await asyncio.to_thread(replace_file, _file(options), folder)
    return True


async def look(
    options: Options, catalog: Catalog, storage: Storage, *, known: bool = False, anyway: str = BEGIN_ANEW
) -> Finding | None:
    """Give what stands in the way where points were kept and none is shown; None for nothing. Changes nothing.

    A catalog that lies where the snapshots do goes away with them: then everything looks as before a first start, and
    the journal's log would be let go of behind a new first base.

    Args:
        options: where they were.
        catalog: where it knows of a point, `reconcile` holds it against the storage.
        storage: is asked for all that it shows.
        known: that points were kept is known from elsewhere.
        anyway: the command that believes that they are gone.

    Raises:
        CatalogError, StorageError: one of the two cannot be read.
    """
    noted = await asyncio.to_thread(_noted, options)
    totals = await catalog.totals()
    if not (noted or known) or any(totals.points.values()) or totals.pruned or await storage.tagged():
        return None
    where = noted or str(options.storage.folder)
    words = f"neither catalog nor storage knows of a point, and points were kept in {where}"
    return Finding("storage", Severity.REFUSED, words, _REMEDY.format(anyway))
