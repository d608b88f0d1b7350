"""Bring a state back beside the running cluster: plan, clone, stage the log, replay, prove.

The plan can be printed and nothing done. What is done either ends in a proven clone, or leaves nothing behind: a
server that was started is stopped, the clone dropped, the staged log removed, also on a cancellation. What a SIGKILL
leaves behind is shown by `clones` as unfinished; the service removes it, and so does `drop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from trigger.catalog.presence import away, is_gone
from trigger.errors import RestoreError, StorageError
from trigger.failpoint import reached
from trigger.model import GONE
from trigger.ports import Clone, Journal, Progress
from trigger.position import At, History, Position
from trigger.replay import Running, Target
from trigger.restore import clone_records, log_search
from trigger.restore.bases import planned
from trigger.restore.clone_records import CloneRecord, clone_name, new_name
from trigger.restore.clones import Site, remove_after
from trigger.restore.obstacles import left_out
from trigger.restore.planner import Plan, plan
from trigger.restore.target import JOURNAL_WAIT_SECONDS, POLL_SECONDS, is_left
from trigger.volumes import volumes_of

log = logging.getLogger(__name__)

_ROOM_BYTES = 64 << 20
"""What must be left where the log is staged, and where the clone writes."""


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
    replayed: At
    last_commit_at: datetime | None
    log_bytes: int
    """What the journal gave."""
    replay_bytes: int
    seconds: dict[str, float]
    """How long each step took, in order: clone, stage, replay, prove."""
    checks: tuple[tuple[str, bool, str], ...]
    notes: tuple[str, ...]
    """Which nearer points were left out since their snapshots are gone, and what a clone cannot have."""


@dataclass(slots=True)
class Raised:
    """A clone whose server is up, not yet proven."""

    plan: Plan
    clone: Clone
    running: Running
    log_folder: Path
    log_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


async def prepare(
    target: Target, site: Site, *, wait_seconds: float = JOURNAL_WAIT_SECONDS, without: Collection[str] = ()
) -> Plan:
    """Give the plan for `target` and change nothing; what `--dry-run` prints.

    A target that the journal has not come to yet is waited for, no longer than `wait_seconds`. What starts from a
    point whose snapshot the storage does not show, or from one `without` which it is to go (ids), is no plan.

    Raises:
        RestoreError: the target cannot be reached, or what it starts from does not hold all of the cluster; the message
            says precisely why not.
        JournalError, CatalogError: the journal or the catalog cannot be read.
        StorageError: the storage cannot be looked at, or shows nothing at all.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_seconds
    while True:
        lineage, file_start = await site.journal.lineage(target.history), site.journal.file_start
        bases, extents = await site.catalog.bases(), await site.journal.extents()
        left = await is_left(target, site.catalog, site.journal)
        gone = dict.fromkeys((await away(bases, site.catalog, site.storage)).union(without), GONE)
        plan_from = partial(
            plan,
            target,
            extents=extents,
            lineage=lineage,
            replay_bytes_per_second=site.replay_bytes_per_second,
            file_start=file_start,
            left=left,
        )
        whole = partial(left_out, recovery=site.recovery, volumes=site.volumes)
        try:
            return await planned(plan_from, bases, gone, whole, site.catalog, site.storage)
        except RestoreError as error:
            if not error.retryable:
                raise
            if loop.time() >= deadline:
                raise await _held_up(error, site.journal) from error
        await asyncio.sleep(POLL_SECONDS)


async def _held_up(error: RestoreError, journal: Journal) -> RestoreError:
    """Give the refusal of a target that the journal may still come to, with what keeps it from that."""
    lack = await journal.lacks_room()
    if lack is None:
        return error
    hint = f"{lack.message}; {lack.remedy}. Then {error.hint}"
    return RestoreError(error.message, hint=hint, retryable=True)


async def restore(target: Target, site: Site, *, progress: Progress, name: str = "") -> Report:
    """Bring `target` back in a clone beside the running cluster, prove it, and leave its server running.

    Args:
        target: what `trigger.restore.target.resolve` gave.
        site: where, and with what.
        progress: told about every step that may last.
        name: what the clone is called; by default `trg-clone-` and eight digits.

    Raises:
        TrigpointError: it cannot be done or was not proven; nothing is left behind. So after a cancellation.
    """
    name = clone_name(name) if name else new_name("clone")
    lost: list[str] = []
    while True:
        found = await prepare(target, site, without=lost)
        await require_room(found, site)
        try:
            return await _restored(found, site, name, progress)
        except StorageError:
            if not await is_gone(found.base, site.catalog, site.storage):
                raise
            lost.append(found.base.id)
            log.warning("point %d went while it was to be cloned; planning anew", found.base.number)


async def _restored(found: Plan, site: Site, name: str, progress: Progress) -> Report:
    async with raised(found, site, name, progress) as up:
        progress("prove", 0, 0)
        checks = await prove(up, site)
        await asyncio.to_thread(clone_records.remove_folder, up.log_folder)  # replayed; the clone goes on without it
        await asyncio.to_thread(clone_records.finish, site.records_folder, _record(up, site, checks))
    return _report(up, checks)


@contextlib.asynccontextmanager
async def raised(
    found: Plan, site: Site, name: str, progress: Progress, *, throwaway: bool = False
) -> AsyncIterator[Raised]:
    """Give the clone that `found` plans, up and running; if the block fails, everything of it, and nothing else, goes.

    The block has to call `clone_records.finish` to keep the clone, or to drop it.
    """
    identity = clone_records.new_identity()
    record = CloneRecord(name, found.target.description, found.base.number, site.clock.now(), identity=identity)
    with clone_records.intent(site.records_folder, record):
        try:
            reached("after-intent")
            yield await _bring_up(found, site, record, progress, throwaway=throwaway)
        except BaseException as error:
            await remove_after(error, name, site, of=record)
            raise


async def _bring_up(found: Plan, site: Site, record: CloneRecord, progress: Progress, *, throwaway: bool) -> Raised:
    watch = _Watch()
    clone = await site.storage.clone(found.base.id, record.name, progress, identity=record.identity)
    clone = replace(clone, volumes=volumes_of(found.base, site.volumes))
    watch.lap("clone")
    reached("after-clone")
    folder = site.staged_log(record.name)
    await asyncio.to_thread(clone_records.make_folder, folder)
    staged = await site.journal.stage(found.replay, folder, progress)
    watch.lap("stage")
    reached("after-stage")
    running = await site.recovery.start(clone, site.volumes, found.replay, folder, progress, throwaway=throwaway)
    watch.lap("replay")
    reached("after-replay")
    return Raised(found, clone, running, folder, staged, watch.seconds)


async def prove(up: Raised, site: Site) -> tuple[tuple[str, bool, str], ...]:
    """Give the quick checks of a clone, all of which held: the target's commit is there, the next one is not.

    Raises:
        RestoreError: one did not hold, or there was none.
    """
    watch = _Watch()
    checks = tuple([check async for check in inspected(up, site, deep=False)])
    up.seconds |= {"prove": watch.lap("prove")}
    wrong = [f"{what}: {seen}" for what, held, seen in checks if not held]
    if wrong or not checks:
        raise RestoreError(
            f"the clone is not {up.plan.target.description}: {'; '.join(wrong) or 'nothing could be checked'}",
            hint="this must not happen; keep the journal and the points as they are, and report it",
        )
    return checks


def inspected(up: Raised, site: Site, *, deep: bool) -> AsyncIterator[tuple[str, bool, str]]:
    """Give (what was checked, whether it held, what was seen), one a check; what follows is read where it is kept."""
    target = up.plan.target
    follows = partial(log_search.following, history=target.history, catalog=site.catalog, journal=site.journal)
    return site.recovery.inspect(up.running, target, up.log_folder, deep=deep, follows=follows)


async def require_room(found: Plan, site: Site) -> None:
    """Refuse a restore for which there is no room; raises `RestoreError`."""
    space = await site.storage.space()
    left = space.free_bytes - space.wanted_free_bytes
    if left < found.replay_bytes + _ROOM_BYTES:
        raise RestoreError(
            f"the storage has {max(left, 0)} bytes to give, a replay of {found.replay_bytes} bytes may need"
            f" {found.replay_bytes + _ROOM_BYTES}",
            hint="drop clones (trigpoint clones) or snapshots, or grow the storage",
        )
    if (free := await asyncio.to_thread(clone_records.free_bytes, site.staging_folder)) < found.log_bytes + _ROOM_BYTES:
        raise RestoreError(
            f"{site.staging_folder} has {free} bytes free, and {found.log_bytes + _ROOM_BYTES} are asked for: for"
            f" {found.log_bytes} of log, and as a reserve",
            hint="make room there, or put the state folder elsewhere",
        )


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
        notes=(*up.plan.beside, *up.plan.without, *up.running.notes),
    )


def _record(up: Raised, site: Site, checks: tuple[tuple[str, bool, str], ...]) -> CloneRecord:
    return CloneRecord(
        name=up.clone.name,
        target=up.plan.target.description,
        base=up.plan.base.number,
        created_at=site.clock.now(),
        conninfo=up.running.conninfo,
        data_directory=str(up.running.data_directory),
        notes=(*up.plan.beside, *up.plan.without, *up.running.notes),
        history=str(up.running.history),
        stands_at=str(Position(up.plan.target.history, up.running.replayed)),
        checks=checks,
        identity=up.clone.identity,
    )
