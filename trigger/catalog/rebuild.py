"""Make the catalog anew from the tags in the storage, and say what only the old one knew.

The new file is made beside the old one, and takes its place in one step, once it holds all and is durable; the old
one is set aside then, never removed. A tag holds the gaps that its point closed. How far each stream is settled moves
on without a tag, and a gap may stand open: both are taken over from the old file. What then is in neither is listed:
failed and expired points, missed commits, results of verifications; where the old file is damaged, that is said
instead. One that is whole, and cannot be read for another reason, is no reason to give up what it knows: that is
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from trigger.catalog.catalog import Catalog
from trigger.catalog.reconcile import Reconciliation
from trigger.catalog.schema import translated
from trigger.catalog.sqlite import connect_to
from trigger.errors import CatalogError, DamagedError
from trigger.failpoint import reached
from trigger.model import Gap, Outcome, RecoveryPoint, State
from trigger.position import Position
from trigger.trusted import sync_folder

log = logging.getLogger(__name__)

_COMPANIONS = ("-wal", "-shm", "-journal")
"""What belongs to one SQLite file beside itself (sqlite.org/tempfiles.html); the last one before it is in WAL mode."""

_NAMED_ASIDE = re.compile(r"\.\d{8}T\d{6}")


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


Fill = Callable[[Path, Known], Awaitable[tuple[Reconciliation, Known]]]
"""Makes a catalog in a file, out of what the old one knew too; gives what was adopted, and what the new one knows."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did, and what it could not bring back."""

    set_aside: Path | None
    """Where the old file lies now; None where there was none."""
    unreadable: str
    """In which way the old file is damaged; "" where it could be read, or there was none."""
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
    """Make the catalog at `path` anew, beside the old one, and let it take that one's place once it is whole.

    Args:
        path: the catalog's file; nothing else may write to it.
        now: names the file that is set aside.
        fill: makes a catalog in the file that it is given, which is not there by then, adopts into it what the storage
            has, and takes over what it is given.

    Raises:
        CatalogError, StorageError: the new one could not be made; the old one is where it was. So too where that can be
            read by others, or later, and by us now cannot: what only it knows would be lost.
    """
    aside = path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%S}")
    if aside.exists():
        raise CatalogError(f"{aside} is there already", hint="try again in a second")
    beside = path.with_name(f"{path.name}.new")
    _remove_leftovers(path, beside)
    old, unreadable = await _known_of_old(path)
    try:
        done, new = await fill(beside, old)
        await asyncio.to_thread(_make_whole, beside)
        set_aside = aside if path.exists() else None
        if set_aside is not None and not unreadable:
            await asyncio.to_thread(_make_whole, path)
        reached("catalog-made-anew")
        _change_places(beside, path, aside, whole=not unreadable)
    except BaseException as error:
        error.add_note(_put_back(path, aside, beside))
        raise
    await asyncio.to_thread(sync_folder, path.parent)
    return Rebuilt(
        set_aside=set_aside,
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
    """Give what the old catalog knew, and in which way it is damaged where it is."""
    nothing = Known({}, (), 0)
    if not path.exists():
        return nothing, ""
    try:
        catalog = await Catalog.open(path)
        try:
            return await known(catalog), ""
        finally:
            await catalog.close()
    except DamagedError as error:
        return nothing, error.message
    except CatalogError as error:
        without = f"to do without what only it knows, move {path} away, with its -wal and -shm, and run this again"
        raise CatalogError(
            error.message, hint="; ".join(filter(None, (error.hint, without))), retryable=error.retryable
        ) from error


def _make_whole(file: Path) -> None:
    """Let a SQLite file hold all by itself, durably; raises `CatalogError` where another process keeps it from that."""
    with translated(str(file)):
        with contextlib.closing(connect_to(file)) as connection:
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise CatalogError("another process reads it", hint="wait until that has ended", retryable=True)


def _change_places(new: Path, path: Path, aside: Path, *, whole: bool) -> None:
    """Put a new catalog in the place of the old one, which is called `aside` from then on.

    However far that comes, an old one that is `whole` keeps its place until the new one takes it. Any other goes first:
    without its log it might be read, as it was earlier.
    """
    if path.exists():
        os.link(path, aside) if whole else path.rename(aside)
    for companion in _COMPANIONS:
        _move(path, aside, companion)
    reached("catalog-set-aside")
    new.rename(path)


def _move(source: Path, target: Path, companion: str) -> None:
    """Rename what belongs to one catalog to what belongs to another; nothing to rename is no error."""
    part = source.with_name(source.name + companion)
    if part.exists():
        part.rename(target.with_name(target.name + companion))


def _put_back(path: Path, aside: Path, beside: Path) -> str:
    """Give what was set aside its place again, and remove what was made beside it.

    Never raises, but says where the old one is.
    """
    try:
        for companion in _COMPANIONS:
            _move(aside, path, companion)
        if aside.exists():
            aside.rename(path)
            aside.unlink(missing_ok=True)  # to rename one name of a file to another one of it does nothing
    except OSError as error:
        where = f"the old catalog lies at {aside}, and could not be put back"
        log.error("%s: %s", where, error)
        return f"{where}: {error}"
    with contextlib.suppress(OSError):  # the next rebuild does it
        _remove(beside)
    return "the old catalog is in its place" if path.exists() else "the new catalog is removed"


def _remove_leftovers(path: Path, beside: Path) -> None:
    """Remove what a rebuild that was killed left: a half made catalog, or another name of the one that is there."""
    _remove(beside)
    for name in path.parent.iterdir():
        if _NAMED_ASIDE.fullmatch(name.name.removeprefix(path.name)) and path.exists() and name.samefile(path):
            name.unlink()


def _remove(file: Path) -> None:
    for companion in ("", *_COMPANIONS):
        file.with_name(file.name + companion).unlink(missing_ok=True)


def _changes(old: Known, new: Known) -> list[tuple[int, tuple[str, ...]]]:
    found = []
    for key, before in old.points.items():
        after = new.points.get(key)
        if after is None or after == before:
            continue
        names = [field.name for field in dataclasses.fields(RecoveryPoint)]
        found.append((before.number, tuple(n for n in names if getattr(before, n) != getattr(after, n))))
    return found
