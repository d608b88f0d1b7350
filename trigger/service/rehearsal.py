"""Do once, apart from all that is kept, what a configuration promises: protect, restore, prove; and leave nothing.

A rehearsal has a state folder, snapshots, slots and publications of its own. So it can be held before the first start
and beside a running service, and what it passes works: every program, right and connection of the real thing was used.

Its folders lie in those of the service. That they are called so proves nothing: each bears a mark from before anything
else lies in it until nothing else does, and where there is none, nothing is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger.config.options import REHEARSAL, CatalogOptions, Options
from trigger.errors import ConfigError, TrigpointError
from trigger.failpoint import reached
from trigger.host import make_passage
from trigger.model import RecoveryPoint, Severity, State, Verification
from trigger.ports import Progress
from trigger.restore.clones import to_its_end
from trigger.restore.verify import verify
from trigger.service.connect import Parts, connect
from trigger.service.control import LOCK, only_one
from trigger.service.service import Service, begin, preflight, work
from trigger.trusted import sync_folder

SUFFIX = "_rehearsal"
"""What the slots and publications of a rehearsal bear behind the prefix of the service's own."""
_MARK = "of-a-rehearsal"
_MARKED = "Made by trigpoint check --rehearse. The next one removes all that lies in this folder.\n"
READY_SECONDS = 120.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How a rehearsal went."""

    protected_seconds: float
    """From the start until commits were protected: journal, streams and the first point."""
    point_seconds: float
    """How long a point took then."""
    proof_seconds: float
    """How long it took to restore that point, to look at all of it, and to throw the clone away."""
    verification: Verification


async def rehearse(options: Options, progress: Progress) -> Rehearsal:
    """Give how it went to protect what `options` name, to take a point, to restore it and to prove it.

    What was made for it is gone when this ends, on an error and on a cancellation too; what a kill leaves is removed
    before the next rehearsal begins. It costs what a first start costs: a checkpoint and, where the storage copies, a
    copy of the volumes.

    Raises:
        ConfigError: in a folder that it would have as its own lies something else, which is left as it is.
        TrigpointError: it could not be done; the error is that of the part which failed.
    """
    apart = _apart(options)
    clock = asyncio.get_running_loop().time
    async with _no_folders_left(apart), _of_its_own(apart) as parts:
        await preflight(parts, force=False)
        for folder in apart.storage_folders:
            await asyncio.to_thread(_mark, folder)
        began = clock()
        progress("protect", 0, 0)
        async with _at_work(await begin(parts)) as service:
            protected = clock()
            progress("take a point", 0, 0)
            point = await service.point("rehearsal")
            taken = clock()
            if point.state is not State.SEALED:
                raise TrigpointError(f"the point of the rehearsal failed: {point.failure}")
            verification = await _proven(point, parts, progress)
        return Rehearsal(protected - began, taken - protected, clock() - taken, verification)


@contextlib.asynccontextmanager
async def _of_its_own(apart: Options) -> AsyncIterator[Parts]:
    """Hold the parts of a rehearsal in folders of its own, rid of what one that was killed had left.

    What is made with them is removed at the end.
    """
    await asyncio.to_thread(_require_own, apart.state_folder, LOCK)
    for folder in apart.storage_folders:
        await asyncio.to_thread(_require_own, folder)
    with only_one(apart.state_folder, passing="another rehearsal"):
        killed = await asyncio.to_thread(_forget_killed, apart)
        parts = await connect(apart, suffix=SUFFIX)
        try:
            async with _gone_at_the_end(parts):
                if killed:
                    await _clear(parts)
                yield parts
        finally:
            await parts.close()


def _require_own(folder: Path, *besides: str) -> None:
    """Raise `ConfigError` where anything but what is called `besides` lies in a folder that bears no mark."""
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found.difference(besides) and _MARK not in found:
        raise ConfigError(
            f"{folder} is the folder of rehearsals, and what lies in it is of none",
            hint="move it away, or, if a rehearsal of an earlier version was killed, remove it;"
            " a service that keeps it there needs another folder",
        )


def _mark(folder: Path, *besides: str) -> None:
    """Make a folder a rehearsal's own; raises `ConfigError` as `_require_own`."""
    _require_own(folder, *besides)
    make_passage(folder)
    (folder / _MARK).write_text(_MARKED)  # that it is there counts, whatever it says: so it is there at once
    sync_folder(folder)


def _is_marked(folder: Path) -> bool:
    return (folder / _MARK).exists()


def _forget_killed(apart: Options) -> bool:
    """Take the state folder, and remove what a rehearsal that was killed knew; gives whether there was one.

    Its catalog and notes would miss snapshots and log that it had removed already. What it made is still found where it
    is: in the cluster, and in the storage.
    """
    killed = any(map(_is_marked, (apart.state_folder, *apart.storage_folders)))
    _mark(apart.state_folder, LOCK)
    _empty(apart.state_folder, LOCK)
    return killed


def _apart(options: Options) -> Options:
    """Give options whose state and snapshots lie apart from those of the service."""

    def moved(section: Any) -> Any:
        return section.model_copy(update={"folder": section.folder / REHEARSAL})

    storages = [moved(section) for section in options.storages]
    return options.model_copy(
        update={
            "name": f"{options.name}-{REHEARSAL}",
            "state_folder": options.state_folder / REHEARSAL,
            "catalog": CatalogOptions(),
            "journal": options.journal.model_copy(update={"folder": None}),
            **({"storages": storages} if storages else {"storage": moved(options.storage)}),
        }
    )


async def _proven(point: RecoveryPoint, parts: Parts, progress: Progress) -> Verification:
    chosen = parts.options.verify
    return await verify(
        point,
        parts.site,
        assertions=chosen.assertions,
        progress=progress,
        deadline_seconds=chosen.deadline_seconds,
    )


@contextlib.asynccontextmanager
async def _at_work(service: Service) -> AsyncIterator[Service]:
    """Let a service work while the block runs, from when all that it is to protect is protected."""
    working = asyncio.create_task(work(service))
    waiting = asyncio.create_task(_all_protected(service))
    try:
        await asyncio.wait((working, waiting), timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        if not waiting.done():
            why = _missing(service) or "see `trigpoint check`"
            raise TrigpointError(f"not all was protected within {READY_SECONDS:g} s: {why}")
        yield service
    finally:
        waiting.cancel()
        service.stop()
        await asyncio.wait((working,))
    await working


async def _all_protected(service: Service) -> None:
    """Wait until a base stands, every stream is open, and nothing is in trouble."""
    while service.agenda.base is None or _missing(service):  # noqa: ASYNC110 - of many things
        await asyncio.sleep(_POLL_SECONDS)


def _missing(service: Service) -> str:
    """Give what of a service's work is not done, for people; "" where all is.

    What a stream that is open complains of, such as a list that its role may not keep, is the check's to say.
    """
    found = [one.message for one in service.upkeep.last_audit if one.severity is not Severity.OK]
    found += [f"{what}: {why}" for what, why in service.upkeep.troubles.items()]
    found += [service.agenda.trouble] if service.agenda.trouble else []
    why_not = service.window.troubles()
    closed = [name for name, there in service.window.connected().items() if not there]
    found += [f"stream {name} is not open: {why_not.get(name, 'no word from it yet')}" for name in closed]
    return "; ".join(found)


@contextlib.asynccontextmanager
async def _no_folders_left(apart: Options) -> AsyncIterator[None]:
    """Remove at the end the folders that were made above ours, unless something lies in them by then."""
    above = (*apart.state_folder.parents, *(above for folder in apart.storage_folders for above in folder.parents))
    made = await asyncio.to_thread(lambda: [folder for folder in above if not folder.exists()])
    try:
        yield
    finally:
        await to_its_end(asyncio.to_thread(_remove_empty, made))


@contextlib.asynccontextmanager
async def _gone_at_the_end(parts: Parts) -> AsyncIterator[None]:
    """Remove at the end what was made in the cluster, in the storage, and in folders of its own, while it is ours."""
    try:
        yield
    finally:
        await to_its_end(_end(parts), "what the rehearsal made is removed")


async def _end(parts: Parts) -> None:
    await _clear(parts)
    reached("rehearsal-cleared")
    await asyncio.to_thread(_remove, parts.options)


async def _clear(parts: Parts) -> None:
    """Remove what a rehearsal made in the cluster and in the storage; slots first, for which the server keeps log.

    What cannot go is told, and goes next time; so does a storage that another holds, or that was claimed for another.
    """
    try:
        await parts.database.remove()
    finally:
        if await asyncio.to_thread(lambda: all(map(_is_marked, parts.options.storage_folders))):
            await parts.storage.claim(str(parts.options.catalog_path))
            await _clear_storage(parts)


async def _clear_storage(parts: Parts) -> None:
    for clone in await parts.storage.clones():
        await parts.recovery.stop(clone)
        await parts.storage.drop_clone(clone.name)
    for found in await parts.storage.tagged():
        await parts.storage.delete(found.point)


def _remove(apart: Options) -> None:
    """Remove both folders as far as they are marked; the mark goes when nothing else lies there, but for the lock."""
    for folder, lock in (*((folder, ()) for folder in apart.storage_folders), (apart.state_folder, (LOCK,))):
        if _is_marked(folder):
            _empty(folder, *lock)
            (folder / _MARK).unlink()
            shutil.rmtree(folder)


def _empty(folder: Path, *besides: str) -> None:
    """Remove all that lies in a folder, but its mark and what is called `besides`."""
    for entry in folder.iterdir():
        if entry.name in (_MARK, *besides):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
