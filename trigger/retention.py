"""Which snapshots may go: pure; what goes is decided here, done in `expire`.

Removing the snapshot of a point loses no commit as long as an earlier base stands and the journal holds the log
between: the commits are then replayed from further back. So thinning trades snapshots for replay time, within the
restore objective, and never gives up the oldest base (the beginning of what can be restored) or the newest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trigger.model import RecoveryPoint
from trigger.position import Position


def thin(
    points: Sequence[RecoveryPoint], most: int, replay_limit_bytes: int, pinned: Collection[str] = ()
) -> list[RecoveryPoint]:
    """Give the points whose snapshots should go so that at most `most` are left.

    Args:
        points: the sealed points, oldest first.
        most: how many snapshots may stay.
        replay_limit_bytes: the longest replay between the redo position of a base and the ceiling of the next one
            that is still within the restore objective.
        pinned: ids of points that must stay (clones hang on them, somebody is verifying them).

    Returns:
        Oldest first; fewer than asked for where nothing more can go without breaking the objective. A point goes
        only if both its neighbours stay in its own history, so that the log between them is one replay.
    """
    kept = list(points)
    goes: list[RecoveryPoint] = []
    while len(kept) > most:
        index = _least_missed(kept, replay_limit_bytes, pinned)
        if index is None:
            break
        goes.append(kept.pop(index))
    return sorted(goes, key=lambda point: point.number)


def _least_missed(kept: Sequence[RecoveryPoint], replay_limit_bytes: int, pinned: Collection[str]) -> int | None:
    """Give the index of the point whose going leaves the shortest replay; None where none may go."""
    best: tuple[int, int] | None = None
    for index in range(1, len(kept) - 1):
        replay = _replay_without(kept[index - 1], kept[index], kept[index + 1])
        if kept[index].id in pinned or replay is None or replay > replay_limit_bytes:
            continue
        if best is None or replay < best[0]:
            best = (replay, index)
    return None if best is None else best[1]


def _replay_without(before: RecoveryPoint, point: RecoveryPoint, after: RecoveryPoint) -> int | None:
    """Give the longest replay, in bytes, that commits around `point` need once it is gone; None across histories."""
    start, end = before.redo, after.ceiling
    if start is None or end is None or len(_histories(before, point, after)) != 1:
        return None
    return int(end.at) - int(start.at)


def _histories(*points: RecoveryPoint) -> set[object]:
    ends: list[Position | None] = [position for point in points for position in (point.floor, point.ceiling)]
    return {position.history for position in ends if position is not None}
