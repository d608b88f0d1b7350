"""Snapshots in plain folders, on any filesystem and without root; each is complete in itself.

A file that has not changed since the previous snapshot is a hard link to the copy there; any other is copied, by
reflink where the filesystem can. Files of snapshots are never written to, and clones are copies of their own.

A file counts as unchanged if size, modification time, change time, inode and device are what they were when the
previous snapshot copied it, and neither time lies at or after two seconds before that snapshot began: times come
from a coarse clock, so a file that was touched near the copy may have been touched behind it, too. The change time
cannot be set by programs. The source is flushed first, so that a write through a memory mapping gets a new time
stamp afterwards. `paranoid` compares the content of what seems unchanged.

The copy is not one instant: the database's own backup bracket must be held around it. Owners, modes and times are
kept where the system permits; extended attributes are not. Sockets and other special files are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from glob import escape
from pathlib import Path

from connectors.storage.copying import Copier, Manifest, Seen, can_reflink
from connectors.storage.glance import status
from connectors.storage.refusals import as_storage_error
from connectors.storage.removal import remove_tree
from connectors.storage.sections import DirectoryOptions
from connectors.storage.shelf import (
    Shelf,
    is_inside,
    nearest_existing,
    require_names,
)
from connectors.storage.sidecar import Sidecar
from connectors.syncfs import flush, open_folder, syncfs
from connectors.threads import Threads
from trigger.errors import StorageError
from trigger.model import Finding, Layout, RecoveryPoint, Severity, Snapshot, Space, Volume
from trigger.ports import Capability, Clone, ClonePlace, Progress, Tagged


def storage(section: DirectoryOptions, volumes: Sequence[Volume], layout: Layout) -> DirectoryStorage:
    """Give the storage of a section; the log is left out, which comes back from the journal."""
    return DirectoryStorage(
        section.folder,
        budget=section.budget,
        wanted_free_bytes=int(section.keep_free),
        paranoid=section.paranoid,
        exclude=_log_in(volumes, layout),
    )


def _log_in(volumes: Sequence[Volume], layout: Layout) -> dict[str, list[str]]:
    """Give by volume the pattern of the log that lies in it."""
    roots = {volume.name: Path(volume.path).resolve() for volume in volumes}
    return {
        name: ["/".join((*map(escape, layout.log.relative_to(root).parts), "*"))]
        for name, root in roots.items()
        if layout.log.is_relative_to(root)
    }


class DirectoryStorage:
    """Port `Storage` in a folder.

    Args:
        folder: where snapshots and clones are kept, outside of every volume.
        budget: how many points it bears.
        wanted_free_bytes: nothing is copied that would leave less than this free.
        paranoid: compare the content of files that seem unchanged.
        exclude: by volume patterns (`fnmatch`) of what is left out: one with a `/` is matched against the path inside
            the volume, one without against the name. What a left-out folder holds is left out, too.
    """

    name = "directory"

    def __init__(
        self,
        folder: Path,
        *,
        budget: int = 200,
        wanted_free_bytes: int = 1 << 30,
        paranoid: bool = False,
        exclude: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        reflinks = can_reflink(nearest_existing(folder))
        self.capabilities = frozenset({Capability.INSTANT_CLONE} if reflinks else ())
        self._shelf = Shelf(
            folder, budget=budget, wanted_free_bytes=wanted_free_bytes, driver=self.name, is_whole=_is_whole
        )
        self._paranoid = paranoid
        self._exclude = exclude or {}
        self._threads = Threads("directory")

    def clone_place(self, kept: Snapshot) -> ClonePlace:  # noqa: ARG002 - the same for each
        """Give where clones lie, as mere folders."""
        return ClonePlace(self._shelf.clones_folder, whole=False)

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what stands in the way of snapshots of `volumes`."""
        with as_storage_error("check of the directory storage"):
            return await self._threads.run(lambda: list(self._check(volumes)))

    def _check(self, volumes: Sequence[Volume]) -> Iterator[Finding]:
        here = nearest_existing(self._shelf.folder)
        if (refused := self._shelf.refused()) is not None:
            yield refused
            return
        for volume in volumes:
            path = Path(volume.path)
            if not path.is_dir():
                yield Finding(volume.name, Severity.REFUSED, f"{path} is not a directory", "correct its path")
            elif is_inside(self._shelf.folder, path) and not self._leaves_out_itself(volume):
                message = f"the folder for snapshots, {self._shelf.folder}, lies inside {path}"
                yield Finding(volume.name, Severity.REFUSED, message, "choose a folder outside every volume")
            else:
                shares = Capability.INSTANT_CLONE in self.capabilities and path.stat().st_dev == here.stat().st_dev
                how = "changed files share their blocks" if shares else "changed files are copied"
                yield Finding(volume.name, Severity.OK, f"{path}: {how}")
        yield from self._shelf.look()

    def _leaves_out_itself(self, volume: Volume) -> bool:
        inside = self._shelf.folder.resolve().relative_to(Path(volume.path).resolve())
        levels = [str(level) for level in (inside, *inside.parents) if level.parts]
        return any(Copier(exclude=self._exclude.get(volume.name, ())).leaves_out(level) for level in levels)

    async def claim(self, holder: str = "") -> None:
        """Hold the folder, by a lock on a file in it; where nothing is in it yet, from the first snapshot on."""
        with as_storage_error(f"claim of {self._shelf.folder}"):
            await self._threads.run(partial(self._shelf.claim, holder))

    async def claimed_by_another(self, holder: str) -> Finding | None:
        """Give whose the folder is, where it was claimed for another."""
        return await self._threads.run(partial(self._shelf.claimed_by_another, holder))

    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        """Copy every volume; durable on return. A cancelled call stops at the next block and cleans up."""
        stop, sidecar = threading.Event(), Sidecar(tag, (), tuple(beside))
        with as_storage_error(f"snapshot of {point}"), _stopping(stop):
            return await self._threads.run(partial(self._snapshot, volumes, point, sidecar, stop), alone=point)

    def _snapshot(
        self, volumes: Sequence[Volume], point: str, sidecar: Sidecar, stop: threading.Event
    ) -> tuple[Snapshot, ...]:
        require_names(volumes)
        if self._shelf.present(point) is not None:
            return self._shelf.made_before(volumes, point, _look)
        for volume in volumes:
            if is_inside(self._shelf.folder, Path(volume.path)) and not self._leaves_out_itself(volume):
                message = f"the folder for snapshots, {self._shelf.folder}, lies inside {volume.path}"
                raise StorageError(message, hint="choose a folder outside every volume", retryable=False)
        with self._shelf.making():
            earlier = self._newest_whole()
            folder = self._shelf.make_point(point)
            try:
                with _flushed(folder):
                    made = tuple(self._copy(volume, folder, earlier, stop) for volume in volumes)
                self._shelf.write(point, replace(sidecar, snapshots=made))  # the last thing: from here on it is whole
                return made
            except BaseException:
                with contextlib.suppress(OSError):  # what is left is unfinished, and is shown as that
                    remove_tree(folder)
                raise

    def _newest_whole(self) -> Path | None:
        """Give the folder of the newest whole point, whose copies may be shared."""
        for point in reversed(self._shelf.points()):
            with contextlib.suppress(OSError):  # what cannot be read is not shared
                if self._shelf.tagged(point, _look).complete:
                    return self._shelf.point_folder(point)
        return None

    def _copy(self, volume: Volume, folder: Path, earlier: Path | None, stop: threading.Event) -> Snapshot:
        """Copy one volume and note what each file looked like, for the next snapshot to compare."""
        source = Path(volume.path)
        began_at = datetime.now(UTC)
        flush(source)
        copier = Copier(
            exclude=self._exclude.get(volume.name, ()),
            earlier=earlier / volume.name if earlier else None,
            known=_listed(earlier / volume.name) if earlier else None,
            compare=self._paranoid,
            require_room=self._shelf.require_free,
            stop=stop,
        )
        copier.copy(source, folder / volume.name)
        Manifest(began_at, copier.seen).write(_manifest_of(folder / volume.name))
        location = str(folder / volume.name)
        return Snapshot(volume.name, self.name, location, began_at, datetime.now(UTC), copier.bytes_copied)

    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        """Replace the tag of a point."""
        with as_storage_error(f"tag of {point}"):
            await self._threads.run(partial(self._shelf.retag, point, tag, beside), alone=point)

    async def tagged(self, point: str | None = None) -> list[Tagged]:
        """Give everything that bears one of our names, or what there is of one point."""
        with as_storage_error(f"look into {self._shelf.folder}"):
            return await self._threads.run(partial(self._shelf.all_tagged, point, _look))

    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        """Give the ids of those of `points` of which a snapshot is not there, at a glance."""
        with as_storage_error(f"look into {self._shelf.folder}"):
            return await self._threads.run(partial(self._shelf.absent, points))

    async def delete(self, point: str) -> None:
        """Remove the copies and the tag of a point, the tag first."""
        with as_storage_error(f"deletion of {point}"):
            await self._threads.run(partial(self._delete, point), alone=point)

    def _delete(self, point: str) -> None:
        if (folder := self._shelf.present(point)) is not None:
            self._shelf.forget(point)
            remove_tree(folder)

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        """Copy a point's snapshots. A cancelled call stops at the next block and cleans up."""
        stop = threading.Event()
        loop = asyncio.get_running_loop()

        def told(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, "clone", done, total)

        with as_storage_error(f"clone {name} of {point}"), _stopping(stop):
            making = partial(self._clone, point, name, identity, beside, told, stop)
            return await self._threads.run(making, alone=(f"clone {name}", point))

    def _clone(
        self,
        point: str,
        name: str,
        identity: str,
        beside: Sequence[str],
        told: Callable[[int, int], None],
        stop: threading.Event,
    ) -> Clone:
        self._shelf.clone_folder(name)
        found = self._shelf.whole(point, _look)
        lists = [(Path(kept.location), _required_list(Path(kept.location))) for kept in found.snapshots]
        total = sum(seen.size for _, listed in lists for seen in listed.files.values())
        shares = Capability.INSTANT_CLONE in self.capabilities
        self._shelf.require_free(0 if shares else total)
        if stop.is_set():  # whoever asked for it may have removed it already
            raise StorageError(f"clone {name} was given up before it was begun")
        clone = self._shelf.begin_clone(name, point, [kept.volume for kept in found.snapshots], identity, beside)
        try:
            copier = Copier(stop=stop, told=lambda done: told(done, total), living=False)
            for (kept, listed), (_, path) in zip(lists, clone.paths, strict=True):
                self._copy_whole(kept, listed, path, copier, point)
        except BaseException:
            with contextlib.suppress(OSError, StorageError):
                self._shelf.drop_clone(name, remove_tree)  # in order: somebody may look whose it is at this moment
            raise
        return clone

    def _copy_whole(self, kept: Path, listed: Manifest, target: Path, copier: Copier, point: str) -> None:
        """Copy a snapshot with all that its list names; raises `StorageError` where it lacks that, or is removed.

        A removal takes the sidecar first, so a point that has it after the copy had all its files until then.
        """
        copier.seen = {}
        try:
            copier.copy(kept, target)
            missed = next(listed.missed(copier.seen.get), "")
        finally:  # whatever failed, it did so because of that
            if not self._shelf.tagged(point, _look).complete:
                raise StorageError(f"point {point} went, or cannot be read any more, while it was copied")
        if missed:
            raise _not_whole(_without(kept, missed), kept)

    async def lack(self, point: str) -> str:
        """Give the first file that a point's copies do not have, or not whole, by the lists beside them."""
        with as_storage_error(f"look into {self._shelf.point_folder(point)}"):
            return await self._threads.run(partial(self._lack, point))

    def _lack(self, point: str) -> str:
        shown = self._shelf.tagged(point, _look).snapshots
        return next(filter(None, (_lack(Path(kept.location)) for kept in shown)), "")

    async def clones(self) -> list[Clone]:
        """Give all clones."""
        with as_storage_error(f"look into {self._shelf.folder}"):
            return await self._threads.run(self._shelf.clones)

    async def drop_clone(self, name: str) -> None:
        """Remove a clone."""
        with as_storage_error(f"removal of the clone {name}"):
            await self._threads.run(partial(self._shelf.drop_clone, name, remove_tree), alone=f"clone {name}")

    async def space(self) -> Space:
        """Give the room that is left."""
        with as_storage_error(f"room of {self._shelf.folder}"):
            return await self._threads.run(self._shelf.space)

    async def close(self) -> None:
        """Let go of the claim."""
        self._shelf.close()


def _look(kept: Snapshot) -> Snapshot | None:
    """Give a snapshot if it is there; the sidecar is written last, so what it names was whole."""
    root = status(Path(kept.location), follow=True)
    return kept if root is not None and stat.S_ISDIR(root.st_mode) else None


def _is_whole(copy: Path) -> bool:
    """Whether a copy has all that the list beside it names; raises `OSError` where that cannot be looked at."""
    return not _lack(copy)


def _lack(copy: Path) -> str:
    """Give what a copy does not have of what the list beside it names, which is written when the copy is done.

    Raises `OSError` where that cannot be looked at.
    """
    listed = Manifest.read(_manifest_of(copy))
    if listed is None:
        return _without_list(copy)
    if (root := status(copy)) is None or not stat.S_ISDIR(root.st_mode):
        return f"{copy} is not there"
    missed = next(listed.missed(lambda name: Seen.of(now) if (now := status(copy / name)) else None), "")
    return _without(copy, missed) if missed else ""


def _without(copy: Path, missed: str) -> str:
    return f"{copy / missed} is not there, or not as it was copied"


def _without_list(copy: Path) -> str:
    return f"the list of its files, {_manifest_of(copy)}, is missing or damaged"


def _required_list(copy: Path) -> Manifest:
    """Give the list beside a copy, without which nobody knows whether it is whole; raises `StorageError`."""
    if (listed := Manifest.read(_manifest_of(copy))) is None:
        raise _not_whole(_without_list(copy), copy)
    return listed


def _not_whole(why: str, copy: Path) -> StorageError:
    hint = f"bring that back, or move {copy.parent} away and run `trigpoint reconcile`: restores begin before it then"
    return StorageError(f"the snapshot is not whole: {why}", hint=hint, retryable=False)


def _manifest_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.manifest")


def _listed(copy: Path) -> Manifest | None:
    """Give what every file of a copy looked like; None where that is not known, for whatever reason."""
    try:
        return Manifest.read(_manifest_of(copy))
    except OSError:
        return None


@contextlib.contextmanager
def _flushed(folder: Path) -> Iterator[None]:
    """Flush what was written to the filesystem of `folder` inside the block, its write-back errors included."""
    descriptor = open_folder(folder)
    try:
        yield
        syncfs(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Set `stop` when the block is left early, so that the thread that works for it comes to an end."""
    try:
        yield
    except BaseException:
        stop.set()
        raise
