"""Make the catalog anew from the tags in the storage, and say what only the old one knew.

The old file is set aside, never removed; where the new one cannot be made, it comes back to its place. A tag holds the
gaps that its point closed. How far each stream is settled moves on without a tag, and a gap may stand open: both are
taken over from the old file. What then is in neither is listed: failed and expired points, missed commits, results of
verifications; where the old file cannot be read any more, that is said instead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from trigger.catalog.catalog import Catalog
from trigger.catalog.reconcile import Reconciliation
from trigger.catalog.reserve import Reserve
from trigger.errors import CatalogError
from trigger.model import Gap, Outcome, RecoveryPoint, State
from trigger.position import Position

log = logging.getLogger(__name__)

_COMPANIONS = ("", "-wal", "-shm")
"""What belongs to one SQLite file in WAL mode (sqlite.org/tempfiles.html)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What one catalog knew."""

    points: Mapping[str, RecoveryPoint]
    gaps: Sequence[Gap]
    missed: int
    """How many commits no point holds."""
    settled: Mapping[str, Position] = field(default_factory=dict)
    """By stream up to where every commit has its outcome."""
    pruned: int = 0
    """How many points expired so long ago that only their numbers and commits are known."""


Fill = Callable[[Known], Awaitable[tuple[Reconciliation, Known]]]
"""Makes a catalog anew, beside what the old one knew; gives what was adopted, and what the new one knows."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did, and what it could not bring back."""

    set_aside: Path | None
    """Where the old file lies now; None where there was none."""
    unreadable: str
    """Why the old file could not be read; "" where it could, or there was none."""
    done: Reconciliation
    sealed: int
    """How many points the new catalog has."""
    lost_points: tuple[RecoveryPoint, ...]
    """Points that only the old catalog knew: failed ones, expired ones."""
    changed_points: Mapping[int, tuple[str, ...]]
    """By number the fields in which a point differs from what the old catalog knew, its verification for one."""
    lost_gaps: tuple[Gap, ...]
    lost_missed: int
    lost_pruned: int
    """Of how many points that expired long ago the numbers and commits are not known any more."""


async def rebuild(path: Path, now: datetime, fill: Fill) -> Rebuilt:
    """Set the catalog at `path` aside and make it anew.

    Args:
        path: the catalog's file; nothing else may have it open.
        now: names the file that is set aside.
        fill: opens a catalog at `path`, which is not there by then, adopts into it what the storage has, and takes
            over what it is given.

    Raises:
        CatalogError, StorageError: the new one could not be made; the old one is where it was.
    """
    old, unreadable = await _known_of_old(path)
    aside = set_aside(path, now) if path.exists() else None
    try:
        done, new = await fill(old)
    except BaseException as error:
        error.add_note(_put_back(path, aside))
        raise
    return Rebuilt(
        set_aside=aside,
        unreadable=unreadable,
        done=done,
        sealed=sum(point.state is State.SEALED for point in new.points.values()),
        lost_points=tuple(point for key, point in old.points.items() if key not in new.points),
        changed_points=dict(_changes(old, new)),
        lost_gaps=tuple(gap for gap in old.gaps if gap not in new.gaps),
        lost_missed=max(0, old.missed - new.missed),
        lost_pruned=max(0, old.pruned - new.pruned),
    )


async def take_over(catalog: Catalog, old: Known) -> None:
    """Put into a catalog what an older one knew beside its points, and tags do not say."""
    await catalog.take_over(old.gaps, old.settled)


async def known(catalog: Catalog) -> Known:
    """Give what a catalog knows that tags may not."""
    points = {point.id: point for point in await catalog.points(newest_first=False)}
    totals = await catalog.totals()
    missed = totals.commits.get(Outcome.MISSED, 0)
    return Known(points, await catalog.gaps(), missed, await catalog.all_settled(), totals.pruned)


async def _known_of_old(path: Path) -> tuple[Known, str]:
    """Give what the old catalog knew, and why it cannot be read where it cannot."""
    nothing = Known({}, (), 0)
    if not path.exists():
        return nothing, ""
    try:
        catalog = await Catalog.open(path)
        try:
            return await known(catalog), ""
        finally:
            await catalog.close()
    except CatalogError as error:
        return nothing, error.message


def set_aside(path: Path, now: datetime) -> Path:
    """Rename a catalog with what belongs to it, and give its new name."""
    aside = path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%S}")
    if aside.exists():
        raise CatalogError(f"{aside} is there already", hint="try again in a second")
    for companion in _COMPANIONS:
        _move(path, aside, companion)
    return aside


def _move(source: Path, target: Path, companion: str) -> None:
    """Rename what belongs to one catalog to what belongs to another; nothing to rename is no error."""
    part = source.with_name(source.name + companion)
    if part.exists():
        part.rename(target.with_name(target.name + companion))


def _put_back(path: Path, aside: Path | None) -> str:
    """Remove what was made at `path`, and put what was set aside there; never raises, but says where the old one is."""
    done = "the old catalog is back in its place" if aside else "the new catalog is removed"
    try:
        for companion in _COMPANIONS:
            path.with_name(path.name + companion).unlink(missing_ok=True)
        if aside is None:
            Reserve(path).drop()
        else:
            for companion in reversed(_COMPANIONS):  # the catalog itself last: it is there whole, or not there
                _move(aside, path, companion)
    except OSError as error:
        where = (
            f"the old catalog lies at {aside}, and could not be put back" if aside else f"{path} could not be removed"
        )
        log.error("%s: %s", where, error)
        done = f"{where}: {error}"
    return done


def _changes(old: Known, new: Known) -> list[tuple[int, tuple[str, ...]]]:
    found = []
    for key, before in old.points.items():
        after = new.points.get(key)
        if after is None or after == before:
            continue
        names = [field.name for field in dataclasses.fields(RecoveryPoint)]
        found.append((before.number, tuple(n for n in names if getattr(before, n) != getattr(after, n))))
    return found
