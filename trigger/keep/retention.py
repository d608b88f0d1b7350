"""Which snapshots may go: pure; what goes is decided here, done in `expire`.

Removing the snapshot of a point loses no commit where an earlier base stands and the journal holds the log between:
the commits are then replayed from further back. Where it does not, the snapshot stays, whatever else goes. So thinning
trades snapshots for replay time: within the restore objective while that will do, and beyond it where the storage bears
no more, since a storage that is full would protect nothing any more. It never gives up the oldest base (the beginning
of what can be restored) or the newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise

from trigger.model import Mark, RecoveryPoint
from trigger.position import History, distance

Leads = Callable[[RecoveryPoint, RecoveryPoint], bool]
"""Whether a replay from the first point brings back all that the second can; see `planner.HeldLog`."""
_NEAR = 32
"""How many neighbours are tried on each side: beyond them only other pasts would be passed over."""
Cost = Callable[[Sequence[RecoveryPoint], int], float]
"""What the going of the point at a place costs; infinite where it may not go."""


def thin(
    points: Sequence[RecoveryPoint],
    wanted: int,
    most: int,
    replay_limit_bytes: int,
    held: Leads,
    to_come: Leads,
    pinned: Collection[str] = (),
) -> list[RecoveryPoint]:
    """Give the points whose snapshots should go.

    Args:
        points: the sealed points, oldest first.
        wanted: how many snapshots should stay, if the restore objective allows that few.
        most: how many may stay in any case; beyond the objective the older ones make room, the older the more.
        replay_limit_bytes: the longest replay between the redo position of a base and the ceiling of the next one
            that is still within the restore objective.
        held: whether the log between two points is there, and the first in the past of the second.
        to_come: the same by log that the journal has not come to yet; asked only where there are too many without it.
        pinned: ids of points that must stay (clones hang on them, somebody is verifying them).

    Returns:
        Oldest first; fewer than asked for where nothing more can go. Within the objective a point goes only if both its
        neighbours stay in its own history, so that the log between them is one replay; beyond it if one stays that
        leads to it.
    """

    def within(kept: Sequence[RecoveryPoint], index: int) -> float:
        before, point, after = kept[index - 1 : index + 2]
        replay = _replay_without(before, point, after)
        return math.inf if replay is None or replay > replay_limit_bytes or not held(before, point) else replay

    kept = list(points)
    goes = _let_go(kept, wanted, pinned, within)
    for leads in (held, to_come):
        goes += _let_go(kept, most, pinned, partial(_replay_for_its_age, leads=leads))
    return sorted(goes, key=lambda point: point.number)


def longest_replay(points: Sequence[RecoveryPoint]) -> int:
    """Give the most bytes that the restore of a commit between two of `points` (oldest first) has to replay."""
    return max((_replay(before, after) or 0 for before, after in pairwise(points)), default=0)


def _let_go(kept: list[RecoveryPoint], most: int, pinned: Collection[str], cost: Cost) -> list[RecoveryPoint]:
    """Take the cheapest point out of `kept` until `most` are left or none may go; gives what was taken out."""

    def price(index: int) -> float:
        outer = not 0 < index < len(kept) - 1
        return math.inf if outer or kept[index].id in pinned else cost(kept, index)

    goes: list[RecoveryPoint] = []
    prices = [price(index) for index in range(len(kept))]
    while len(kept) > most:
        cheapest = min(prices, default=math.inf)
        if cheapest == math.inf:
            break
        index = prices.index(cheapest)
        goes.append(kept.pop(index))
        prices.pop(index)
        prices[index - 1], prices[index] = price(index - 1), price(index)  # no other has new neighbours
    return goes


def _replay_for_its_age(kept: Sequence[RecoveryPoint], index: int, leads: Leads) -> float:
    """Give the replay that is left by the going of a point, as a share of all the log that was written since.

    Where a point stands in several logs, the one that is worst off counts.
    """
    point, now = kept[index], kept[-1]
    before = next((one for one in reversed(kept[max(index - _NEAR, 0) : index]) if leads(one, point)), None)
    after = next((one for one in kept[index + 1 : index + 1 + _NEAR] if leads(point, one)), point)
    if before is None:
        return math.inf
    return max(_share(mark, before, after, now) for mark in point.marks)


def _share(mark: Mark, before: RecoveryPoint, after: RecoveryPoint, now: RecoveryPoint) -> float:
    """Give the replay between two points, in the log of a mark between them, as a share of that log since the mark."""
    log = mark.floor.history
    begin, end, present = before.mark_in(log), after.mark_in(log), now.mark_in(log)
    if begin is None or begin.redo is None or end is None or end.ceiling is None or mark.ceiling is None:
        return math.inf
    since = distance(present.ceiling, mark.ceiling) if present and present.ceiling else 0
    return distance(end.ceiling, begin.redo) / max(since, 1)


def _replay_without(before: RecoveryPoint, point: RecoveryPoint, after: RecoveryPoint) -> int | None:
    """Give the longest replay, in bytes, that commits around `point` need once it is gone; None across histories."""
    return _replay(before, after) if _histories(before) == _histories(point) else None


def _replay(before: RecoveryPoint, after: RecoveryPoint) -> int | None:
    """Give the longest replay from one point to another in any of their logs; None across histories."""
    if _histories(before) is None or _histories(before) != _histories(after):
        return None
    starts = {mark.floor.history: mark.redo for mark in before.marks}
    ends = [(mark.ceiling, starts[mark.floor.history]) for mark in after.marks]
    known = [distance(end, start) for end, start in ends if end and start]
    return max(known) if len(known) == len(ends) else None


def _histories(point: RecoveryPoint) -> set[History] | None:
    """Give the history of each log that a point stands in; None where one of them changed while it was taken."""
    within = all(mark.ceiling is None or mark.ceiling.history == mark.floor.history for mark in point.marks)
    return {mark.floor.history for mark in point.marks} if within else None
