"""Bring a state back beside the running cluster: plan, clone, stage the log, replay, prove.

The plan can be printed and nothing done. What is done either ends in a proven clone, or leaves nothing behind: a
server that was started is stopped, the clone dropped, the staged log removed, also on a cancellation. What a SIGKILL
leaves behind is shown by `clones` as unfinished and goes with `drop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from trigger import clone_records
from trigger.catalog import Catalog
from trigger.clone_records import CloneRecord, Written, clone_name, new_name
from trigger.errors import RestoreError, StorageError, TrigpointError
from trigger.failpoint import reached
from trigger.model import State, Target, Volume
from trigger.planner import WAL_SEGMENT_BYTES, Plan, plan
from trigger.ports import Clock, Clone, Journal, Progress, Recovery, Running, Storage
from trigger.position import History, Lsn

log = logging.getLogger(__name__)

JOURNAL_WAIT_SECONDS = 5.0
"""How long a target just behind the journal's end is waited for: the journal is a moment behind the database."""
CLEANUP_SECONDS = 120.0
_POLL_SECONDS = 0.05
_ROOM_BYTES = 64 << 20
"""What must be left where the log is staged, and where the clone writes."""


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
    segment_bytes: int = WAL_SEGMENT_BYTES
    replay_bytes_per_second: float = 50e6

    def staged_log(self, name: str) -> Path:
        """Give the folder of the log that the clone `name` is brought up with."""
        return self.staging_folder / clone_name(name)


@dataclass(frozen=True, slots=True)
class Report:
    """A restore that was done and proven."""

    name: str
    target: Target
    base: int
    """The number of the point it started from."""
    conninfo: str
    data_directory: Path
    history: History
    """The clone's own, on a timeline that production never had."""
    replayed: Lsn
    last_commit_at: datetime | None
    log_bytes: int
    """What the journal gave."""
    replay_bytes: int
    seconds: dict[str, float]
    """How long each step took, in order: clone, stage, replay, prove."""
    checks: tuple[tuple[str, bool, str], ...]
    notes: tuple[str, ...]
    """What a clone cannot have."""


@dataclass(slots=True)
class Raised:
    """A clone whose server is up, not yet proven."""

    plan: Plan
    clone: Clone
    running: Running
    log_folder: Path
    log_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


async def prepare(target: Target, site: Site, *, wait_seconds: float = JOURNAL_WAIT_SECONDS) -> Plan:
    """Give the plan for `target` and change nothing; what `--dry-run` prints.

    A target that the journal has not come to yet is waited for, no longer than `wait_seconds`.

    Raises:
        RestoreError: the target cannot be reached; the message says precisely why not.
        JournalError, CatalogError: the journal or the catalog cannot be read.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    while True:
        lineage = await site.journal.lineage(target.history)
        bases, extents = await site.catalog.bases(), await site.journal.extents()
        try:
            return plan(target, bases, extents, lineage, site.replay_bytes_per_second, segment_bytes=site.segment_bytes)
        except RestoreError as error:
            if not error.retryable or loop.time() >= deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)


async def restore(target: Target, site: Site, *, progress: Progress, name: str = "") -> Report:
    """Bring `target` back in a clone beside the running cluster, prove it, and leave its server running.

    Args:
        target: what `trigger.target.resolve` gave.
        site: where, and with what.
        progress: told about every step that may last.
        name: what the clone is called; by default `trg-clone-` and eight digits.

    Raises:
        TrigpointError: it cannot be done or was not proven; nothing is left behind. So after a cancellation.
    """
    name = clone_name(name) if name else new_name("clone")
    while True:
        found = await prepare(target, site)
        await require_room(found, site)
        try:
            return await _restored(found, site, name, progress)
        except StorageError:
            if not await _expired(found, site):
                raise
            log.info("point %d expired while it was to be cloned; planning anew", found.base.number)


async def _restored(found: Plan, site: Site, name: str, progress: Progress) -> Report:
    async with raised(found, site, name, progress) as up:
        checks = await prove(up, site)
        await asyncio.to_thread(clone_records.remove_folder, up.log_folder)  # replayed; the clone goes on without it
        await asyncio.to_thread(clone_records.finish, site.records_folder, _record(up, site))
    return _report(up, checks)


async def _expired(found: Plan, site: Site) -> bool:
    """Whether the base went away between the plan and the clone; the next plan has another, so this ends."""
    return (await site.catalog.point(found.base.id)).state is not State.SEALED


@contextlib.asynccontextmanager
async def raised(
    found: Plan, site: Site, name: str, progress: Progress, *, throwaway: bool = False
) -> AsyncIterator[Raised]:
    """Give the clone that `found` plans, up and running; if the block fails, everything of it is removed.

    The block has to call `clone_records.finish` to keep the clone, or to drop it.
    """
    record = CloneRecord(name, found.target.description, found.base.number, site.clock.now())
    with clone_records.intent(site.records_folder, record):
        try:
            reached("after-intent")
            yield await _bring_up(found, site, name, progress, throwaway=throwaway)
        except BaseException as error:
            await to_its_end(_remove_after(error, name, site))
            raise


async def _bring_up(found: Plan, site: Site, name: str, progress: Progress, *, throwaway: bool) -> Raised:
    watch = _Watch()
    clone = await site.storage.clone(found.base.id, name, progress)
    watch.lap("clone")
    reached("after-clone")
    folder = site.staged_log(name)
    await asyncio.to_thread(clone_records.make_folder, folder)
    staged = await site.journal.stage(found.log_from, found.target, folder, progress)
    watch.lap("stage")
    reached("after-stage")
    running = await site.recovery.start(
        clone, site.volumes, found.target, found.base.bracket, folder, progress, throwaway=throwaway
    )
    watch.lap("replay")
    reached("after-replay")
    return Raised(found, clone, running, folder, staged, watch.seconds)


async def prove(up: Raised, site: Site) -> tuple[tuple[str, bool, str], ...]:
    """Give the quick checks of a clone, all of which held: the target's commit is there, the next one is not.

    Raises:
        RestoreError: one did not hold, or there was none.
    """
    watch = _Watch()
    checks = tuple([c async for c in site.recovery.inspect(up.running, up.plan.target, up.log_folder, deep=False)])
    up.seconds |= {"prove": watch.lap("prove")}
    wrong = [f"{what}: {seen}" for what, held, seen in checks if not held]
    if wrong or not checks:
        raise RestoreError(
            f"the clone is not {up.plan.target.description}: {'; '.join(wrong) or 'nothing could be checked'}",
            hint="this must not happen; keep the journal and the points as they are, and report it",
        )
    return checks


async def require_room(found: Plan, site: Site) -> None:
    """Refuse a restore for which there is no room; raises `RestoreError`."""
    space = await site.storage.space()
    left = space.free_bytes - space.wanted_free_bytes
    if left < found.replay_bytes + _ROOM_BYTES:
        raise RestoreError(
            f"the storage has {max(left, 0)} bytes to give, a replay of {found.replay_bytes} bytes may need more",
            hint="drop clones (trigpoint clones) or snapshots, or grow the storage",
        )
    if (free := await asyncio.to_thread(clone_records.free_bytes, site.staging_folder)) < found.log_bytes + _ROOM_BYTES:
        raise RestoreError(
            f"{site.staging_folder} has {free} bytes free, the log takes {found.log_bytes}",
            hint="make room there, or put the state folder elsewhere",
        )


class CloneState(StrEnum):
    """How a clone is."""

    RESTORING = "restoring"
    """A living process is making it."""
    RUNNING = "running"
    STOPPED = "stopped"
    UNFINISHED = "unfinished"
    """Whoever made it died on the way, or nothing is written about it; it can only be dropped."""
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
        record = note.record if note else None
        found.append(CloneStatus(name, state, now - created_at, created_at, clone.point if clone else "", record))
    return sorted(found, key=lambda status: (status.created_at, status.name))


async def _state(clone: Clone | None, note: Written | None, recovery: Recovery) -> CloneState:
    if note is not None and note.busy:
        return CloneState.RESTORING
    if note is None or not note.finished:
        return CloneState.UNFINISHED
    if clone is None:
        return CloneState.GONE
    return CloneState.RUNNING if await recovery.running(clone) else CloneState.STOPPED


async def status_of(name: str, site: Site) -> CloneStatus:
    """Give one clone as it is now; raises `RestoreError` where there is none, or a living process is making it."""
    status = next((status for status in await clones(site) if status.name == clone_name(name)), None)
    if status is None:
        raise RestoreError(f"there is no clone {name}", hint="trigpoint clones lists them")
    if status.state is CloneState.RESTORING:
        raise RestoreError(f"clone {name} is being made", hint="stop that restore (Ctrl-C); it cleans up by itself")
    return status


async def start(name: str, site: Site) -> CloneStatus:
    """Start the server of a stopped clone, as it was left; one that runs stays as it is.

    Raises:
        RestoreError: there is no such clone, it was never finished, or its server does not come up.
    """
    status = await status_of(name, site)
    if status.state is CloneState.STOPPED:
        await site.recovery.resume(await _whole(name, site))
    elif status.state is not CloneState.RUNNING:
        raise RestoreError(f"clone {name} is {status.state}", hint=f"trigpoint clones drop {name}")
    return await status_of(name, site)


async def stop(name: str, site: Site) -> CloneStatus:
    """Stop the server of a clone, which keeps what it holds; one that does not run stays as it is.

    Raises:
        RestoreError: there is no such clone, or it does not stop.
    """
    if (await status_of(name, site)).state is CloneState.RUNNING:
        await site.recovery.stop(await _whole(name, site))
    return await status_of(name, site)


async def _whole(name: str, site: Site) -> Clone:
    return next(clone for clone in await site.storage.clones() if clone.name == name)


async def drop(name: str, site: Site) -> None:
    """Stop a clone's server and remove all that there is of it.

    Raises:
        RestoreError: there is no such clone, or a living process is making it.
    """
    await status_of(name, site)
    await to_its_end(remove(name, site))


async def remove(name: str, site: Site) -> None:
    """Stop a clone's server, drop the clone, remove the staged log, and forget it, in this order; may be repeated.

    Raises:
        TrigpointError: a step failed or took too long; what is left stays written down, so that it is found.
    """
    try:
        async with asyncio.timeout(CLEANUP_SECONDS):
            for clone in await site.storage.clones():
                if clone.name == name:
                    await site.recovery.stop(clone)
            await site.storage.drop_clone(name)
            await asyncio.to_thread(clone_records.remove_folder, site.staged_log(name))
            await asyncio.to_thread(clone_records.forget, site.records_folder, name)
    except TimeoutError:
        raise RestoreError(
            f"clone {name} was not removed within {CLEANUP_SECONDS:g} s", hint=f"trigpoint clones drop {name}"
        ) from None


async def _remove_after(error: BaseException, name: str, site: Site) -> None:
    try:
        await remove(name, site)
    except (TrigpointError, OSError) as left:
        log.warning("clone %s was not removed after its failure: %s", name, left)
        error.add_note(f"clone {name} was left behind ({left}); remove it with: trigpoint clones drop {name}")


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work` to end however often we are cancelled; then let the cancellation, or its error, go on."""
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
    if cancelled is not None:
        raise cancelled
    task.result()


class _Watch:
    """Durations of steps, by the loop's monotonic clock."""

    def __init__(self) -> None:
        self._last = asyncio.get_running_loop().time()
        self.seconds: dict[str, float] = {}

    def lap(self, step: str) -> float:
        now = asyncio.get_running_loop().time()
        self.seconds[step], self._last = now - self._last, now
        return self.seconds[step]


def _report(up: Raised, checks: tuple[tuple[str, bool, str], ...]) -> Report:
    return Report(
        name=up.clone.name,
        target=up.plan.target,
        base=up.plan.base.number,
        conninfo=up.running.conninfo,
        data_directory=up.running.data_directory,
        history=up.running.history,
        replayed=up.running.replayed,
        last_commit_at=up.running.last_commit_at,
        log_bytes=up.log_bytes,
        replay_bytes=up.plan.replay_bytes,
        seconds=up.seconds,
        checks=checks,
        notes=up.running.notes,
    )


def _record(up: Raised, site: Site) -> CloneRecord:
    return CloneRecord(
        name=up.clone.name,
        target=up.plan.target.description,
        base=up.plan.base.number,
        created_at=site.clock.now(),
        conninfo=up.running.conninfo,
        data_directory=str(up.running.data_directory),
        notes=up.running.notes,
    )
