"""Put a proven clone where production lies, keep the old state beside it, and be able to put that back.

Each volume is two renames: the old state to `<path>.before-<time>`, the clone's copy to `<path>`. They are written
down before the first; and since what exists tells which of them were done, a swap that was cut off anywhere can be
finished or undone, and both can be repeated. Nothing is copied and nothing is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trigger.errors import RestoreError, TrigpointError
from trigger.failpoint import reached
from trigger.model import Volume
from trigger.ports import Clone, Progress
from trigger.replay import Target
from trigger.restore.clone_records import new_name, sync_folder
from trigger.restore.clones import Site, remove, to_its_end
from trigger.restore.restore import Report, restore

_SUBVOLUME_INODE = 256  # of the root of every btrfs subvolume (BTRFS_FIRST_FREE_OBJECTID)
_LOCK_FILE = "postmaster.pid"
_LOCK_FILE_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Place:
    """The four paths of one volume."""

    path: str
    """Where production lies."""
    kept: str
    """Where the old state is kept."""
    clone: str
    """Where the clone's copy is until it takes the place."""
    restored: str
    """Where the restored state goes when the swap is undone."""


@dataclass(frozen=True, slots=True)
class Swap:
    """A restore in place, done or cut off."""

    name: str
    """By which it is undone: the time it began, `20260501T120000Z`."""
    target: str
    clone: str
    places: tuple[Place, ...]
    finished: bool
    """Whether all of it is in place; not where it was cut off, nor where its undoing was."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Where the old state lies, a path a volume."""
        return tuple(place.kept for place in self.places)


async def restore_in_place(target: Target, site: Site, *, progress: Progress) -> tuple[Report, Swap]:
    """Bring `target` back beside production, prove it, and put it where production lies; its server stays down.

    The clone's server is stopped cleanly and gets production's configuration back, as it was in the snapshot. The
    cluster goes on, on a timeline of its own, when its owner starts it.

    Raises:
        TrigpointError: production runs, the volumes cannot be renamed, or the restore failed; nothing has changed
            then. Where a rename failed or the process died between two, `swaps` shows it unfinished, and `resume` or
            `undo` ends it.
    """
    require_stopped(site.volumes)
    _require_apart(site.volumes)
    for volume in site.volumes:
        _require_renamable(Path(volume.path), Path(volume.path).parent)
    report = await restore(target, site, progress=progress, name=new_name("in-place"))
    try:
        swap = await _ready(report, site)
    except BaseException:
        await to_its_end(remove(report.name, site))
        raise
    progress("put in place", 0, len(swap.places))
    await asyncio.to_thread(_write, site.records_folder, swap)
    reached("after-swap-intent")
    return report, await resume(swap.name, site)


async def _ready(report: Report, site: Site) -> Swap:
    """Stop the proven clone, make it fit to be production, and give the swap, checked but not begun."""
    clone = await _clone(report.name, site)
    await site.recovery.stop(clone)
    await site.recovery.release(clone, site.volumes)
    copies = dict(clone.paths)
    began = site.clock.now()
    name = f"{began:%Y%m%dT%H%M%SZ}"
    places = tuple(
        Place(volume.path, f"{volume.path}.before-{name}", str(copies[volume.name]), f"{volume.path}.restored-{name}")
        for volume in site.volumes
    )
    for place in places:
        _require_renamable(Path(place.clone), Path(place.path).parent)
        for taken in (place.kept, place.restored):
            if os.path.lexists(taken):
                raise RestoreError(f"{taken} exists already", hint="move it away, or wait a second and try again")
    require_stopped(site.volumes)
    return Swap(name, report.target.description, report.name, places, finished=False)


async def _clone(name: str, site: Site) -> Clone:
    for clone in await site.storage.clones():
        if clone.name == name:
            return clone
    raise RestoreError(f"the clone {name} is gone from the storage")


async def swaps(site: Site) -> list[Swap]:
    """Give every swap that was begun and of which the old state is still there, the oldest first."""
    return await asyncio.to_thread(_all, site.records_folder)


async def resume(name: str, site: Site) -> Swap:
    """Finish a swap that was cut off, or whose undoing was; a finished one stays as it is.

    Raises:
        RestoreError: there is none, production runs, or the restored state is not there any more, and nothing has
            changed; or a rename failed, and it can be repeated or undone.
    """
    swap = await _swap(name, site)
    require_stopped(site.volumes)
    _require_restored(swap)
    await to_its_end(asyncio.to_thread(_each, swap.places, _forward))
    done = Swap(swap.name, swap.target, swap.clone, swap.places, finished=True)
    await asyncio.to_thread(_write, site.records_folder, done)
    await _drop_shell(swap, site)
    return done


async def undo(name: str, site: Site) -> Swap:
    """Put the old state back where it was; what had taken its place is kept as `<path>.restored-<time>`.

    Raises:
        RestoreError: there is no such swap, production runs, or the old state of a volume is not there any more, and
            nothing has changed; or a rename failed, and it can be repeated.
    """
    swap = await _swap(name, site)
    require_stopped(site.volumes)
    _require_kept(swap)
    await to_its_end(asyncio.to_thread(_each, swap.places[::-1], _backward))
    await asyncio.to_thread((site.records_folder / f"{name}.swap").unlink, missing_ok=True)
    await _drop_shell(swap, site)
    return swap


async def _drop_shell(swap: Swap, site: Site) -> None:
    """Remove what is left of the clone; what cannot be removed stays on the list of clones."""
    with contextlib.suppress(TrigpointError):
        await remove(swap.clone, site)


async def _swap(name: str, site: Site) -> Swap:
    for swap in await swaps(site):
        if swap.name == name:
            return swap
    raise RestoreError(f"there is no restore in place called {name}", hint="its name is the time it began")


def _require_restored(swap: Swap) -> None:
    """Refuse where a volume's restored state neither is in place nor can be put there; raises `RestoreError`."""
    for place in swap.places:
        in_place = os.path.lexists(place.path) and (swap.finished or os.path.lexists(place.kept))
        if not in_place and _aside(place) is None:
            raise RestoreError(
                f"the restored state of {place.path} is gone: {place.clone} does not exist",
                hint=f"put the old state back: trigpoint restore --undo {swap.name}",
            )


def _require_kept(swap: Swap) -> None:
    """Refuse where a volume's old state was removed while the restored one is in place; raises `RestoreError`."""
    for place in swap.places:
        if swap.finished and not os.path.lexists(place.kept):
            raise RestoreError(
                f"the old state of {place.path} is gone: {place.kept} does not exist",
                hint="the restored state stays in place; what else was kept is of no use without it",
            )


def _aside(place: Place) -> str | None:
    """Give where a volume's restored state waits: in the clone, or where the undoing put it; None if it does not."""
    return next((path for path in (place.clone, place.restored) if os.path.lexists(path)), None)


def _forward(place: Place) -> None:
    """Put one volume's restored state in place; what exists tells what was done already."""
    restored = _aside(place)
    if restored is None:
        return
    if not os.path.lexists(place.kept):
        _rename(place.path, place.kept)
    _rename(restored, place.path)


def _backward(place: Place) -> None:
    """Put one volume's old state back; what exists tells what was done already."""
    if not os.path.lexists(place.kept):
        return
    if os.path.lexists(place.path):
        _rename(place.path, place.restored)
    _rename(place.kept, place.path)


def _each(places: Sequence[Place], act: Callable[[Place], None]) -> None:
    for place in places:
        act(place)


def _rename(source: str, destination: str) -> None:
    """Rename durably; raises `RestoreError` where something is in the way."""
    if os.path.lexists(destination):
        raise RestoreError(f"{source} cannot be renamed: {destination} exists", hint="move it away and try again")
    try:
        os.rename(source, destination)  # noqa: PTH104 - the words of the system call
        for folder in {os.path.dirname(source), os.path.dirname(destination)}:  # noqa: PTH120
            sync_folder(Path(folder))
    except OSError as error:
        raise RestoreError(f"{source} cannot be renamed to {destination}: {error.strerror}") from error
    reached("after-rename")


def require_stopped(volumes: Sequence[Volume]) -> None:
    """Refuse where a server works in one of the volumes; raises `RestoreError`.

    A server's working directory is its data directory, so a lock file whose process works elsewhere is a leftover.
    """
    for volume in volumes:
        for lock in _lock_files(Path(volume.path), _LOCK_FILE_DEPTH):
            if (pid := _works_in(lock)) is not None:
                raise RestoreError(
                    f"the server in {lock.parent} runs (process {pid})",
                    hint="stop it first: a restore in place takes its files away",
                )


def _lock_files(folder: Path, depth: int) -> Iterator[Path]:
    """Give the lock files of servers at most `depth` folders down; in a data directory nobody else has one."""
    if (folder / _LOCK_FILE).exists():
        yield folder / _LOCK_FILE
    if depth == 0 or (folder / "PG_VERSION").exists():
        return
    with contextlib.suppress(PermissionError, FileNotFoundError):
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                yield from _lock_files(entry, depth - 1)


def _works_in(lock: Path) -> int | None:
    """Give the process that holds a lock file if it lives; one that may not be looked at counts as living."""
    try:
        pid = int(lock.read_text().split()[0])
        return pid if Path(f"/proc/{pid}/cwd").samefile(lock.parent) else None
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None
    except PermissionError:
        return pid


def _require_apart(volumes: Sequence[Volume]) -> None:
    """Refuse volumes that lie in each other; raises `RestoreError`."""
    for inner in volumes:
        for outer in volumes:
            if inner != outer and Path(inner.path).is_relative_to(outer.path):
                raise RestoreError(
                    f"volume {inner.name} ({inner.path}) lies in volume {outer.name} ({outer.path})",
                    hint="they cannot be renamed one by one; restore beside and copy",
                )


def _require_renamable(source: Path, folder: Path) -> None:
    """Refuse where `source` cannot be renamed into `folder`; raises `RestoreError` with the remedy."""
    try:
        mount, status, there = _mount(source), source.lstat(), folder.stat()
        mounts = {mount, _mount(source.parent), _mount(folder)}
    except OSError as error:
        raise RestoreError(f"{source} cannot be looked at: {error.strerror}") from error
    if mount != _mount(source.parent):
        raise RestoreError(
            f"{source} is a mount point, which cannot be renamed",
            hint="mount the filesystem one level higher and let the volume be a folder or subvolume in it; or restore"
            " beside and copy",
        )
    is_subvolume = status.st_ino == _SUBVOLUME_INODE and status.st_dev != source.parent.stat().st_dev
    if len(mounts) > 1 or (status.st_dev != there.st_dev and not is_subvolume):
        raise RestoreError(
            f"{source} lies on another filesystem (or subvolume) than {folder} and cannot be renamed into it",
            hint="put storage.folder on the filesystem of the volumes; or restore beside and copy",
        )


def _mount(path: Path) -> str:
    """Give the id of the mount that `path` itself is reached through; two mounts of one filesystem differ too."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next(line.split()[1] for line in lines if line.startswith("mnt_id:"))


def _write(folder: Path, swap: Swap) -> None:
    draft = folder / f".{swap.name}.swap"
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, json.dumps(asdict(swap), indent=1).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(folder / f"{swap.name}.swap")
    sync_folder(folder)


def _all(folder: Path) -> list[Swap]:
    found = []
    for path in sorted(folder.glob("[0-9]*.swap")):
        content = json.loads(path.read_text())
        places = tuple(Place(**place) for place in content["places"])
        finished = content["finished"] and not any(os.path.lexists(place.restored) for place in places)
        swap = Swap(**content | {"places": places, "finished": finished})
        if not swap.finished or any(os.path.lexists(kept) for kept in swap.kept):
            found.append(swap)
    return found
