"""The clones that restores made: list them, stop and start their servers, drop them with all they have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import look
from trigger.errors import RestoreError, TrigpointError
from trigger.model import Address, Severity, Volume
from trigger.ports import Clock, Clone, Journal, Recovery, Storage
from trigger.restore import clone_records
from trigger.restore.clone_records import CloneRecord, Written, clone_name

log = logging.getLogger(__name__)

T = TypeVar("T")

CLEANUP_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Site:
    """Everything that a restore works with."""

    catalog: Catalog
    storage: Storage
    journal: Journal
    recovery: Recovery
    volumes: tuple[Volume, ...]
    clock: Clock
    records_folder: Path
    """Where it is written down which clones there are."""
    staging_folder: Path
    """Where the log for replays is put, a folder a clone; the owner of the data must be able to reach it."""
    replay_bytes_per_second: float = 50e6

    def staged_log(self, name: str) -> Path:
        """Give the folder of the log that the clone `name` is brought up with."""
        return self.staging_folder / clone_name(name)


class CloneState(StrEnum):
    """How a clone is."""

    RESTORING = "restoring"
    """A living process is making it."""
    RUNNING = "running"
    STOPPED = "stopped"
    UNFINISHED = "unfinished"
    """Whoever made it died on the way, or nothing is written about it; it can only be dropped.

    What is written down goes by itself while the service runs; see `leftovers`."""
    DROPPED = "being dropped"
    """Its removal was begun, and goes on or was cut off; `drop` goes on with it."""
    GONE = "gone"
    """It is written down, and the storage does not have it."""


@dataclass(frozen=True, slots=True)
class CloneStatus:
    """One clone, as it is now."""

    name: str
    state: CloneState
    age: timedelta
    created_at: datetime
    point: str
    """The id of the point it is a copy of; "" where it is gone."""
    record: CloneRecord | None


async def clones(site: Site) -> list[CloneStatus]:
    """Give every clone that the storage or the records know, the oldest first."""
    there = {clone.name: clone for clone in await site.storage.clones()}
    written = await asyncio.to_thread(clone_records.written, site.records_folder)
    now = site.clock.now()
    found = []
    for name in there.keys() | written.keys():
        clone, note = there.get(name), written.get(name)
        created_at = note.record.created_at if note else there[name].created_at
        state = await _state(clone, note, site.recovery)
        record = note.record if note and _is_about(note, clone) else None
        found.append(CloneStatus(name, state, now - created_at, created_at, clone.point if clone else "", record))
    return sorted(found, key=lambda status: (status.created_at, status.name))


async def _state(clone: Clone | None, note: Written | None, recovery: Recovery) -> CloneState:
    if note is not None and note.busy:
        return CloneState.RESTORING
    if clone is not None and clone.dropped:
        return CloneState.DROPPED
    if note is None or not note.finished or not _is_about(note, clone):
        return CloneState.UNFINISHED
    if clone is None:
        return CloneState.GONE
    return CloneState.RUNNING if await recovery.running(clone) else CloneState.STOPPED


def _is_about(note: Written, clone: Clone | None) -> bool:
    """Whether a record is about the clone of its name in the storage, if there is one, and not about another."""
    return note.busy or clone is None or clone.identity == note.record.identity


async def status_of(name: str, site: Site) -> CloneStatus:
    """Give one clone as it is now; raises `RestoreError` where there is none, or a living process is making it.

    Likewise where it seems gone since the storage shows nothing at all: mostly that is not mounted.
    """
    status = next((status for status in await clones(site) if status.name == clone_name(name)), None)
    if status is None:
        raise RestoreError(f"there is no clone {name}", hint="trigpoint clones lists them")
    if status.state is CloneState.RESTORING:
        raise RestoreError(f"clone {name} is being made", hint="stop that restore (Ctrl-C); it cleans up by itself")
    away = await look(site.catalog, site.storage) if status.state is CloneState.GONE else None
    if away is not None and away.severity is Severity.REFUSED:
        raise RestoreError(away.message, hint=away.remedy)
    return status


async def start(name: str, site: Site, listen: Address | None = None) -> CloneStatus:
    """Start the server of a stopped clone, as it was left; one that runs stays as it is.

    With `listen` it can be reached over TCP there too, and one that runs is started anew for that.

    Raises:
        RestoreError: there is no such clone, it was never finished, or its server does not come up.
    """
    status = await status_of(name, site)
    if status.record is None or status.state not in (CloneState.STOPPED, CloneState.RUNNING):
        raise RestoreError(f"clone {name} is {status.state}", hint=f"trigpoint clones drop {name}")
    if status.state is CloneState.RUNNING:
        if listen is None:
            return status
        await stop(name, site)
    running = await site.recovery.resume(await whole(name, site), listen)
    record = replace(status.record, conninfo=running.conninfo)
    await asyncio.to_thread(clone_records.finish, site.records_folder, record)
    return await status_of(name, site)


async def stop(name: str, site: Site) -> CloneStatus:
    """Stop the server of a clone, which keeps what it holds; one that does not run stays as it is.

    Raises:
        RestoreError: there is no such clone, or it does not stop.
    """
    if (await status_of(name, site)).state is CloneState.RUNNING:
        await site.recovery.stop(await whole(name, site))
    return await status_of(name, site)


async def whole(name: str, site: Site) -> Clone:
    """Give a clone by its name; raises `RestoreError` where the storage has none, or drops it."""
    for clone in await site.storage.clones():
        if clone.name == name and not clone.dropped:
            return clone
    raise RestoreError(f"the clone {name} is gone from the storage")


async def drop(name: str, site: Site) -> None:
    """Stop a clone's server and remove all that there is of it.

    Raises:
        RestoreError: there is no such clone, or a living process is making it.
    """
    await status_of(name, site)
    await to_its_end(remove(name, site), f"clone {name} is dropped")


def is_of(clone: Clone, record: CloneRecord) -> bool:
    """Whether a clone is the one that was to be made by `record`, not one that was there before under that name.

    Where neither bears an identity, an earlier version made both, and the times are all that there is to go by.
    """
    if clone.identity or record.identity:
        return clone.identity == record.identity
    return clone.created_at >= record.created_at


async def remove(name: str, site: Site, *, of: CloneRecord | None = None) -> None:
    """Stop a clone's server, drop the clone, remove the staged log, and forget it, in this order; may be repeated.

    Args:
        name: the clone's.
        site: where it is.
        of: what was written down before it was made. Where the storage has another one under that name, that was
            there before, and is left alone: only what is written down goes then; but what is being dropped goes on to.
            None for whatever bears the name.

    Raises:
        TrigpointError: a step failed or took too long; what is left stays written down, so that it is found.
    """
    try:
        async with asyncio.timeout(CLEANUP_SECONDS):
            there = next((clone for clone in await site.storage.clones() if clone.name == name), None)
            if there is None or there.dropped or of is None or is_of(there, of):
                if there is not None:
                    await site.recovery.stop(there)
                await site.storage.drop_clone(name)
                await asyncio.to_thread(clone_records.remove_folder, site.staged_log(name))
            await asyncio.to_thread(clone_records.forget, site.records_folder, name)
    except TimeoutError:
        raise RestoreError(
            f"clone {name} was not removed within {CLEANUP_SECONDS:g} s", hint=f"trigpoint clones drop {name}"
        ) from None


async def remove_after(error: BaseException, name: str, site: Site, *, of: CloneRecord | None = None) -> None:
    """Remove a clone, as `remove` does, however often we are cancelled; `error` is told what became of it.

    Raises nothing of its own: what could not be removed stays written down.
    """
    await to_its_end(_remove_after(error, name, site, of))


async def _remove_after(error: BaseException, name: str, site: Site, of: CloneRecord | None) -> None:
    try:
        await remove(name, site, of=of)
    except (TrigpointError, OSError) as left:
        log.warning("clone %s was not removed after its failure: %s", name, left)
        error.add_note(f"clone {name} was left behind ({left}); remove it with: trigpoint clones drop {name}")
    else:
        error.add_note(f"what was begun of clone {name} is removed")


async def to_its_end(work: Coroutine[Any, Any, T], done: str = "") -> T:
    """Give what `work` gives, and wait for it however often we are cancelled.

    A cancellation goes on when it has ended, and is told how: `done` where all went well, else by its error.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except Exception:  # noqa: BLE001 - it is raised below, by its own name
            break
    if cancelled is None:
        return task.result()
    if (failed := task.exception()) is not None:
        cancelled.add_note("; ".join((str(failed) or type(failed).__name__, *getattr(failed, "__notes__", ()))))
    elif done:
        cancelled.add_note(done)
    raise cancelled
