"""What restores left that were killed: removed once nobody works on it any more."""

from __future__ import annotations

import asyncio

from trigger.errors import TrigpointError
from trigger.restore import clone_records
from trigger.restore.clones import Site, is_of, remove, to_its_end
from trigger.restore.obstacles import require_none


async def clear(site: Site) -> tuple[list[str], list[str]]:
    """Remove what restores left that were killed, with its servers; gives the names of it, and why others stay.

    Only what is written down and made by no living process goes, and only where no server works in it but its own. A
    clone under that name that the killed one did not make stays.
    """
    gone, stay = [], []
    written = await asyncio.to_thread(clone_records.written, site.records_folder)
    for name in [name for name, note in written.items() if not (note.finished or note.busy)]:
        with clone_records.abandoned(site.records_folder, name) as record:
            if record is None:
                continue
            try:
                clone = next((clone for clone in await site.storage.clones() if clone.name == name), None)
                if clone is not None and is_of(clone, record):
                    require_none(await site.recovery.strangers(clone))
                await to_its_end(remove(name, site, of=record))
                gone.append(name)
            except TrigpointError as error:
                stay.append(f"clone {name}, which a restore left that was killed: {error}")
    return gone, stay
