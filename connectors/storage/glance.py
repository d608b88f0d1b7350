"""Which points lack a snapshot, seen at a glance: whether something lies in its place, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trigger.model import RecoveryPoint


def absent(points: Sequence[RecoveryPoint], folder_of: Callable[[str], Path]) -> set[str]:
    """Give the ids of those of `points` that lack a snapshot in the folder that `folder_of` gives for an id.

    Blocks; raises `OSError` where that cannot be looked at.
    """
    places = ((point.id, folder_of(point.id) / kept.volume) for point in points for kept in point.snapshots)
    return {point for point, place in places if not _lies_at(place)}


def _lies_at(place: Path) -> bool:
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
