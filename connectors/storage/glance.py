"""What lies at a path, seen at a glance; and which points lack a snapshot, whatever else lies in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trigger.model import RecoveryPoint


def absent(points: Sequence[RecoveryPoint], folder_of: Callable[[str], Path]) -> set[str]:
    """Give the ids of those of `points` that lack a snapshot in the folder that `folder_of` gives for an id.

    Blocks; raises `OSError` where that cannot be looked at.
    """
    places = ((point.id, folder_of(point.id) / kept.volume) for point in points for kept in point.snapshots)
    return {point for point, place in places if status(place) is None}


def status(path: Path, *, follow: bool = False) -> os.stat_result | None:
    """Give the status of what lies at a path; None where nothing does.

    Raises `OSError` where that cannot be looked at, which the questions of `Path` take for no.
    """
    try:
        return path.stat(follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
