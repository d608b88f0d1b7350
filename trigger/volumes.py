"""Which volumes a point is of: as they were called, and where they lay, when it was cut.

The configuration says how they are now. One is renamed, moved, added or taken out, and the points from before stay what
they are. Where a volume lay is not known of a point that an earlier version cut: then its name alone tells it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from trigger.model import RecoveryPoint, Snapshot, Volume


def at_their_places(snapshots: Sequence[Snapshot], volumes: Sequence[Volume]) -> tuple[Snapshot, ...]:
    """Give fresh snapshots of `volumes` with where each of these lies."""
    paths = {volume.name: volume.path for volume in volumes}
    return tuple(replace(snapshot, path=paths[snapshot.volume]) for snapshot in snapshots)


def volumes_of(point: RecoveryPoint, now: Sequence[Volume]) -> tuple[Volume, ...]:
    """Give the volumes of a point; where one lay that is not known of it is taken to be where it lies `now`.

    One whose place nobody knows is left out.
    """
    paths = {volume.name: volume.path for volume in now}
    known = ((kept.volume, kept.path or paths.get(kept.volume, "")) for kept in point.snapshots)
    return tuple(Volume(name, path) for name, path in known if path)


def is_of(point: RecoveryPoint, volumes: Sequence[Volume]) -> bool:
    """Whether a point is of just these volumes."""
    return _agree(_places(point), {volume.name: volume.path for volume in volumes})


def are_alike(one: RecoveryPoint, other: RecoveryPoint) -> bool:
    """Whether two points are of the same volumes."""
    return _agree(_places(one), _places(other))


def volumes_in(points: Iterable[RecoveryPoint]) -> set[str]:
    """Give the names of all volumes that any of some points is of."""
    return {kept.volume for point in points for kept in point.snapshots}


def of_volume(points: Iterable[RecoveryPoint], volume: str) -> list[RecoveryPoint]:
    """Give those of some points that are of a volume, with the snapshot of it alone."""
    found = ((point, tuple(kept for kept in point.snapshots if kept.volume == volume)) for point in points)
    return [replace(point, snapshots=kept) for point, kept in found if kept]


def listed(volumes: Sequence[Volume]) -> str:
    """Give volumes in words."""
    return ", ".join(f"{volume.name} ({volume.path})" for volume in volumes)


def _places(point: RecoveryPoint) -> dict[str, str]:
    return {kept.volume: kept.path for kept in point.snapshots}


def _agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return one.keys() == other.keys() and all(
        path in ("", other[name]) or not other[name] for name, path in one.items()
    )
