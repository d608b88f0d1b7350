"""Snapshots on btrfs: read-only subvolumes, one folder a point; atomic, at once, sharing all that is unchanged.

The sidecar with the tag is written before the cut: the snapshot call commits both in one transaction, and a
snapshot of a subvolume is there whole or not at all. So at any moment a crash leaves nothing, a sidecar without its
volumes (unfinished), or a whole point.

What was flushed before is in the snapshot, whole and in order. Of writes that were not flushed a later one may be in
it and an earlier one not, as after a power cut (seen on Linux 6.18); databases are made for that.

The filesystem is never frozen around the call: it would hang, and the snapshot would appear after the thaw.
A full btrfs still makes snapshots and stops the database a moment later, so room is asked for before each.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from connectors.storage import libbtrfsutil
from connectors.storage.refusals import as_storage_error
from connectors.storage.removal import remove_copies, remove_tree
from connectors.storage.sections import BtrfsOptions
from connectors.storage.shelf import (
    Shelf,
    is_inside,
    nearest_existing,
    require_names,
)
from connectors.storage.sidecar import Sidecar
from connectors.threads import Threads
from trigger.errors import StorageError
from trigger.model import Finding, Layout, RecoveryPoint, Severity, Snapshot, Space, Volume
from trigger.ports import Capability, Clone, ClonePlace, Progress, Tagged

_COUNTED_SECONDS = 5.0
_CLEANED_SECONDS = 60.0
"""How long after a deletion its room may not be counted yet, and how long it may be cleaned up: the kernel does that
after the next commit, which comes within 30 s."""
_DELETION_DENIED = "run as root, or mount the filesystem with user_subvol_rm_allowed"


def storage(section: BtrfsOptions, volumes: Sequence[Volume], layout: Layout) -> BtrfsStorage:  # noqa: ARG001 - of no use here
    """Give the storage of a section."""
    return BtrfsStorage(
        section.folder, volumes=volumes, budget=section.budget, wanted_free_bytes=int(section.keep_free)
    )


class BtrfsStorage:
    """Port `Storage` on a btrfs filesystem.

    Args:
        folder: where snapshots and clones are kept; on the filesystem of the volumes, and outside each of them.
        volumes: the group to be cut. Only a group of one volume is cut at one instant (`ATOMIC_GROUP`): btrfs has
            no call for several subvolumes.
        budget: how many points it bears; btrfs itself gets slower with each (4 ms with a few, 20 ms with 700).
        wanted_free_bytes: no snapshot is made while less is free. The kernel reports nothing free once room for
            metadata has run out.
    """

    name = "btrfs"

    def __init__(
        self, folder: Path, *, volumes: Sequence[Volume] = (), budget: int = 400, wanted_free_bytes: int = 1 << 30
    ) -> None:
        libbtrfsutil.load()
        capabilities = {Capability.ATOMIC, Capability.INSTANT_CLONE}
        if len(volumes) == 1:
            capabilities.add(Capability.ATOMIC_GROUP)
        self.capabilities = frozenset(capabilities)
        self._shelf = Shelf(
            folder, budget=budget, wanted_free_bytes=wanted_free_bytes, driver=self.name, is_whole=_is_whole
        )
        self._threads = Threads("btrfs")
        self._deleted_at = -math.inf

    def clone_place(self, kept: Snapshot) -> ClonePlace:  # noqa: ARG002 - the same for each
        """Give where clones lie, as subvolumes."""
        return ClonePlace(self._shelf.clones_folder, whole=True)

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what stands in the way of snapshots of `volumes`."""
        with as_storage_error("check of the btrfs storage"):
            return await self._threads.run(partial(self._check, volumes))

    def _check(self, volumes: Sequence[Volume]) -> list[Finding]:
        here, subject = nearest_existing(self._shelf.folder), str(self._shelf.folder)
        if (refused := self._shelf.refused()) is not None:
            return [refused]
        filesystem = libbtrfsutil.filesystem_id(here)
        if filesystem is None:
            remedy = "choose a folder on the btrfs that holds the volumes, or use storage directory"
            return [Finding(subject, Severity.REFUSED, f"{here} is not on btrfs", remedy)]
        findings = [finding for volume in volumes for finding in self._check_volume(volume, filesystem)]
        findings += self._shelf.look()
        if os.geteuid() != 0:
            message = "an ordinary user deletes subvolumes only where the filesystem allows it"
            findings.append(Finding(subject, Severity.NOTE, message, "mount it with user_subvol_rm_allowed"))
        return findings

    def _check_volume(self, volume: Volume, filesystem: object) -> list[Finding]:
        path = Path(volume.path)
        refused = partial(Finding, volume.name, Severity.REFUSED)
        if not path.is_dir():
            return [refused(f"{path} is not a directory", "name the root of a btrfs subvolume")]
        if not libbtrfsutil.is_subvolume(path):
            remedy = (
                f"stop the database, then: mv {path} {path}.old; btrfs subvolume create {path}; "
                f"cp -a --reflink=auto {path}.old/. {path}/; or use storage directory"
            )
            return [refused(f"{path} is not a btrfs subvolume", remedy)]
        if libbtrfsutil.filesystem_id(path) != filesystem:
            remedy = "choose a folder on the filesystem of the volume"
            return [refused(f"{path} and {self._shelf.folder} are on different filesystems", remedy)]
        if is_inside(self._shelf.folder, path):
            remedy = "choose a folder outside every volume"
            return [refused(f"the folder for snapshots, {self._shelf.folder}, lies inside {path}", remedy)]
        inner = libbtrfsutil.nested(path)
        if inner:
            remedy = "make it a plain directory, or a volume of its own outside"
            return [refused(f"{path} holds subvolumes that a snapshot leaves out: {', '.join(inner)}", remedy)]
        return [Finding(volume.name, Severity.OK, f"{path} is a btrfs subvolume")]

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
        """Cut every volume; durable on return. A cancelled call may still make the snapshot."""
        with as_storage_error(f"snapshot of {point}"):
            return await self._threads.run(partial(self._snapshot, volumes, point, tag, tuple(beside)), alone=point)

    def _snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, beside: tuple[str, ...]
    ) -> tuple[Snapshot, ...]:
        require_names(volumes)
        if self._shelf.present(point) is not None:
            return self._shelf.made_before(volumes, point, _look)
        with self._shelf.making():
            for volume in volumes:
                _require_whole_subvolume(Path(volume.path))
            folder = self._shelf.make_point(point)
            try:
                now = datetime.now(UTC)
                planned = [Snapshot(each.name, self.name, str(folder / each.name), now, now) for each in volumes]
                self._shelf.write_ahead(point, Sidecar(tag, tuple(planned), beside))  # the cut commits its name
                return tuple(_cut(Path(each.path), kept) for each, kept in zip(volumes, planned, strict=True))
            except BaseException:
                with contextlib.suppress(OSError):  # what is left is unfinished, and is shown as that
                    self._delete(point)
                raise

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
        """Remove the snapshots and the tag of a point, the tag first; their space comes back some time later."""
        with as_storage_error(f"deletion of {point}", denied=_DELETION_DENIED):
            await self._threads.run(partial(self._delete, point), alone=point)

    def _delete(self, point: str) -> None:
        if (folder := self._shelf.present(point)) is not None:
            self._shelf.forget(point)
            remove_copies(folder, _remove)
            self._deleted_at = time.monotonic()

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        """Make writable snapshots of a point's snapshots."""
        with as_storage_error(f"clone {name} of {point}"):
            making = partial(self._clone, point, name, identity, beside)
            clone = await self._threads.run(making, alone=(f"clone {name}", point))
        progress("clone", 1, 1)
        return clone

    def _clone(self, point: str, name: str, identity: str, beside: Sequence[str]) -> Clone:
        self._shelf.clone_folder(name)
        found = self._shelf.whole(point, _look)
        self._shelf.require_free()
        clone = self._shelf.begin_clone(name, point, [kept.volume for kept in found.snapshots], identity, beside)
        try:
            for kept, (_, path) in zip(found.snapshots, clone.paths, strict=True):
                libbtrfsutil.create_snapshot(Path(kept.location), path, read_only=False)
        except BaseException:
            with contextlib.suppress(OSError, StorageError):
                self._shelf.drop_clone(name, _remove)
            raise
        return clone

    async def lack(self, point: str) -> str:
        """Find nothing, where it can be looked at: what is shown was cut in one step, and is closed since."""
        with as_storage_error(f"look into {self._shelf.point_folder(point)}"):
            await self._threads.run(partial(self._shelf.tagged, point, _look))
        return ""

    async def clones(self) -> list[Clone]:
        """Give all clones."""
        with as_storage_error(f"look into {self._shelf.folder}"):
            return await self._threads.run(self._shelf.clones)

    async def drop_clone(self, name: str) -> None:
        """Remove a clone."""
        with as_storage_error(f"removal of the clone {name}", denied=_DELETION_DENIED):
            await self._threads.run(partial(self._shelf.drop_clone, name, _remove), alone=f"clone {name}")

    async def space(self) -> Space:
        """Give the room that is left."""
        with as_storage_error(f"room of {self._shelf.folder}"):
            return await self._threads.run(self._space)

    def _space(self) -> Space:
        space, since = self._shelf.space(), time.monotonic() - self._deleted_at
        if not space.short or since > _CLEANED_SECONDS:  # longer than that something else is cleaned, or held open
            return space
        cleaning = libbtrfsutil.is_cleaning(nearest_existing(self._shelf.folder))
        return replace(space, freeing=since < _COUNTED_SECONDS or cleaning is not False)

    async def close(self) -> None:
        """Let go of the claim."""
        self._shelf.close()


def _require_whole_subvolume(path: Path) -> None:
    """Raise `StorageError` where a snapshot of `path` would not hold all that lies below it."""
    if not libbtrfsutil.is_subvolume(path):
        hint = "run the check of the configuration; it prints the commands that make it one"
        raise StorageError(f"{path} is not a btrfs subvolume", hint=hint, retryable=False)
    inner = libbtrfsutil.nested(path)
    if inner:
        hint = "make it a plain directory, or a volume of its own outside"
        message = f"{path} holds subvolumes that a snapshot leaves out: {', '.join(inner)}"
        raise StorageError(message, hint=hint, retryable=False)


def _cut(source: Path, planned: Snapshot) -> Snapshot:
    libbtrfsutil.create_snapshot(source, Path(planned.location), read_only=True)
    made = _look(planned)
    if made is None:
        raise StorageError(f"{planned.location} was made and is not there")
    return made


def _look(kept: Snapshot) -> Snapshot | None:
    """Give a snapshot with the time of its cut by the filesystem's own word; None if it is not there whole."""
    path = Path(kept.location)
    try:
        if not libbtrfsutil.is_subvolume(path):
            return None
        made = libbtrfsutil.subvolume(path)
    except FileNotFoundError:
        return None
    return replace(kept, ended_at=max(kept.began_at, made.created_at)) if made.read_only else None


def _is_whole(path: Path) -> bool:
    """Whether a snapshot is there, which is cut in one step; raises `OSError` where that cannot be looked at."""
    try:
        return not path.is_symlink() and libbtrfsutil.is_subvolume(path) and libbtrfsutil.subvolume(path).read_only
    except FileNotFoundError:
        return False


def _remove(copy: Path) -> None:
    """Remove a subvolume with those in it, or a mere folder."""
    if libbtrfsutil.is_subvolume(copy):
        libbtrfsutil.delete_subvolume(copy, recursive=libbtrfsutil.nested(copy) != [])
    else:
        remove_tree(copy)
