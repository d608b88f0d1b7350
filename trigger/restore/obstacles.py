"""What keeps a clone from taking production's place: all of it, so that it can be said before anything is done."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from trigger.errors import RestoreError
from trigger.model import Finding, RecoveryPoint, Severity, Volume
from trigger.ports import Clone, ClonePlace, Recovery
from trigger.restore.clones import Site
from trigger.volumes import volumes_of

_SUBVOLUME_INODE = 256  # of the root of every btrfs subvolume (BTRFS_FIRST_FREE_OBJECTID)
_BESIDE = "restore beside and copy"


async def obstacles(site: Site) -> list[Finding]:
    """Give what keeps the clones that the storage makes from taking the place of the volumes; nothing is changed."""
    return [*await site.recovery.at_work(site.volumes), *await asyncio.to_thread(_of_places, site)]


async def left_out(point: RecoveryPoint, recovery: Recovery, volumes: Sequence[Volume]) -> list[Finding]:
    """Give what of the cluster the snapshots of a point do not hold, for which no clone of them comes up."""
    return await recovery.outside(copy_of(point, volumes), volumes)


def copy_of(point: RecoveryPoint, now: Sequence[Volume]) -> Clone:
    """Give the snapshots of a point as a copy of the volumes that may be looked into; these are as given `now`."""
    paths = tuple((snapshot.volume, Path(snapshot.location)) for snapshot in point.snapshots)
    return Clone(f"point {point.number}", point.id, paths, point.opened_at, volumes=volumes_of(point, now))


async def require_at_rest(site: Site) -> None:
    """Refuse where a server works in one of the volumes; raises `RestoreError`."""
    require_none(await site.recovery.at_work(site.volumes))


def require_none(found: Sequence[Finding]) -> None:
    """Raise all that was found as one `RestoreError`."""
    if found:
        remedies = dict.fromkeys(finding.remedy for finding in found if finding.remedy)
        raise RestoreError("; ".join(finding.message for finding in found), hint="; ".join(remedies))


def _of_places(site: Site) -> list[Finding]:
    found = nested(site.volumes)
    for volume in site.volumes:
        path = Path(volume.path)
        fixed = immovable(path, path.parent)
        found += [fixed] if fixed is not None else []
    return found


async def misplaced(base: RecoveryPoint, site: Site) -> list[Finding]:
    """Give which copies of a point's snapshots could not be renamed to where the volumes lie; nothing is changed."""
    paths = {volume.name: Path(volume.path) for volume in site.volumes}
    places = [(site.storage.clone_place(kept), paths.get(kept.volume)) for kept in base.snapshots]
    looks = [(place, path.parent) for place, path in places if place is not None and path is not None]
    found = await asyncio.to_thread(lambda: [_elsewhere(place, folder) for place, folder in looks])
    return [finding for finding in found if finding is not None]


def _refused(subject: Path, message: str, remedy: str = "") -> Finding:
    return Finding(str(subject), Severity.REFUSED, message, remedy)


def nested(volumes: Sequence[Volume]) -> list[Finding]:
    """Give the volumes that lie in each other, which cannot be renamed one by one."""
    return [
        _refused(
            Path(inner.path),
            f"volume {inner.name} ({inner.path}) lies in volume {outer.name} ({outer.path})",
            f"they cannot be renamed one by one; {_BESIDE}",
        )
        for inner in volumes
        for outer in volumes
        if inner != outer and Path(inner.path).is_relative_to(outer.path)
    ]


def immovable(source: Path, folder: Path) -> Finding | None:
    """Give why `source` cannot be renamed into `folder`, with the remedy; None where it can."""
    try:
        mount, status, there = _mount(source), source.lstat(), folder.stat()
        mounts = {mount, _mount(source.parent), _mount(folder)}
        device_above = source.parent.stat().st_dev
    except OSError as error:
        return _refused(source, f"{source} cannot be looked at: {error.strerror}")
    if mount != _mount(source.parent):
        return _refused(
            source,
            f"{source} is a mount point, which cannot be renamed",
            f"mount the filesystem one level higher and let the volume be a folder or subvolume in it; or {_BESIDE}",
        )
    is_subvolume = status.st_ino == _SUBVOLUME_INODE and status.st_dev != device_above
    if len(mounts) > 1 or (status.st_dev != there.st_dev and not is_subvolume):
        return _other_filesystem(source, folder)
    return None


def _elsewhere(place: ClonePlace, folder: Path) -> Finding | None:
    """Give why what will be made in a place of clones cannot be renamed into `folder`; None where it can.

    What is a volume of its own can be renamed wherever one mount of its filesystem reaches.
    """
    clones = place.folder
    here = next(one for one in (clones, *clones.parents) if one.exists())
    try:
        same = _mount(here) == _mount(folder) and (place.whole or here.stat().st_dev == folder.stat().st_dev)
    except OSError as error:
        return _refused(clones, f"{clones} cannot be looked at: {error.strerror}")
    return None if same else _other_filesystem(clones, folder)


def _other_filesystem(source: Path, folder: Path) -> Finding:
    return _refused(
        source,
        f"{source} lies on another filesystem (or subvolume) than {folder} and cannot be renamed into it",
        f"put storage.folder on the filesystem of the volumes; or {_BESIDE}",
    )


def _mount(path: Path) -> str:
    """Give the id of the mount that `path` itself is reached through; two mounts of one filesystem differ too."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
