"""Hold the storage against the catalog: at start, after a failure, and on demand.

One pass leaves no orphan (a snapshot that no point knows), no phantom (a sealed point without its snapshot), no
duplicate, and no open point: P5. What it decides follows from two facts alone: an intent stands in the catalog before
anything is made, and a sealed tag stands in the storage before the catalog says so.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import partial

from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import TAKES_BACK, is_whole, lost_storages, silence, storages_of
from trigger.errors import StorageError, TrigpointError
from trigger.model import GONE, CommitRecord, Finding, RecoveryPoint, Severity, State
from trigger.ports import Storage, Tagged

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted before it was sealed"
LARGE = 200
"""A tag of more commits is read and written off the event loop: it takes half a second for a hundred thousand."""
_LEAST_CHARACTERS = 8
"""So little of a tag may a commit take."""

_WORDS = {
    "adopted": "taken over from the storage",
    "failed": "failed, since interrupted before sealed",
    "removed": "half made or forgotten, removed from the storage",
    "mended": "with a damaged tag, which was written anew",
    "unreadable": "with a damaged tag, which could not be written anew",
    "phantoms": "failed, since gone from the storage",
    "regained": "sealed again, since back in the storage",
    "incomplete": "in the storage, sealed by their tags, but not whole, left alone (the log says what is missing)",
    "expired": "removed as was begun",
    "strange": "of another cluster or with an unreadable tag, left alone (`trigpoint reconcile` names them)",
    "stuck": "that the storage does not let go of, tried again",
}
"""What a pass did to the points in a list of `Reconciliation`, for people."""


@dataclass(slots=True)
class Reconciliation:
    """What one pass did."""

    adopted: list[str] = field(default_factory=list)
    """Sealed in the storage, not yet in the catalog: now sealed there too."""
    failed: list[str] = field(default_factory=list)
    """Open in the catalog, not sealed in the storage: now failed, and removed."""
    removed: list[str] = field(default_factory=list)
    """In the storage, half made, of a point that failed or never was: removed."""
    mended: list[str] = field(default_factory=list)
    """Sealed, whole in the storage, and only their tag was damaged there: written anew from the catalog."""
    unreadable: list[str] = field(default_factory=list)
    """Likewise, but the tag could not be written either: they stay, and it is tried again with the next pass."""
    phantoms: list[str] = field(default_factory=list)
    """Sealed in the catalog, gone from the storage: now failed, loudly."""
    regained: list[str] = field(default_factory=list)
    """Had failed as gone from the storage, and are whole there again: sealed again, with their commits."""
    incomplete: list[str] = field(default_factory=list)
    """Had failed likewise, or are not known, and part of them is there: left alone until the rest is."""
    expired: list[str] = field(default_factory=list)
    """Were being removed: now gone."""
    strange: list[str] = field(default_factory=list)
    """Bear one of our names, but their tag cannot be read or is of another cluster: left alone, for the operator."""
    stuck: list[str] = field(default_factory=list)
    """Should have gone, but the storage would not let go of them: tried again with the next point, or the next pass."""

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def words(self) -> str:
        """Give how many points were dealt with in which way, for people; never a list that grows with them."""
        counted = ((len(getattr(self, name)), what) for name, what in _WORDS.items())
        return "; ".join(f"{count} {'point' if count == 1 else 'points'} {what}" for count, what in counted if count)


ONLY_IT_KNEW = "failed and expired points, missed commits, open gaps, results of verifications"
"""What no tag says, and a catalog that was lost takes with it."""
_ANEW = (
    "if it lies on a filesystem that is not mounted, mount that; else `trigpoint catalog rebuild` makes it anew from"
    " their tags, also while the cluster is down, and so does a start. What lies behind what tags know of a stream is"
    " read again then, or becomes a gap where the server has let go of it"
)


async def lost(catalog: Catalog, storage: Storage) -> Finding | None:
    """Give that a catalog was lost, or does not believe its storage, where no point is sealed and the storage has some.

    Raises:
        StorageError: the storage cannot be read.
    """
    if await catalog.points(states={State.OPEN, State.SEALED}, limit=1):
        return None
    there = {found.point for found in await storage.tagged()}
    known = await catalog.having(there)
    if back := [point for point in known if point.failure == GONE]:
        words = f"in {catalog.place} no point is sealed, and the storage has {len(back)} that failed as gone from it"
        return Finding("catalog", Severity.WARNING, words, TAKES_BACK)
    if strays := there - {point.id for point in known}:
        words = f"{catalog.place} knows of no point, and the storage has {len(strays)}: it was lost"
        return Finding("catalog", Severity.WARNING, f"{words}, and with it {ONLY_IT_KNEW}", _ANEW)
    return None


async def reconcile(
    catalog: Catalog, storage: Storage, *, accept_loss: bool = False, streams: Collection[str] = ()
) -> Reconciliation:
    """Make catalog and storage agree; gives what was done. May be repeated.

    Args:
        catalog: is brought to what the storage really has.
        storage: is claimed, and rid of what the catalog knows to be half made.
        accept_loss: believe a storage that shows nothing at all, although points are sealed; where that is one of
            several, what the others keep of its points goes too.
        streams: those that are protected. Where the catalog knows of no point at all it was lost, and nobody can say
            any more what was in a stream of which no tag has a commit: it is known up to the floor of the oldest point.

    Raises:
        StorageError: another one holds the storage, or it was claimed for another catalog; or it cannot be read, or
            shows nothing: more likely it is not mounted than emptied, and every point would be given up for good.
        CatalogError: the catalog cannot be read or written.
    """
    done = Reconciliation()
    await storage.claim(str(catalog.place or ""))
    begun = () if await catalog.points(limit=1) else streams
    in_storage = {tagged.point: tagged for tagged in await storage.tagged()}
    in_catalog = {point.id: point for point in await _concerned(catalog, in_storage)}
    pruned = await catalog.pruned_among(in_storage.keys() - in_catalog.keys())  # they expired long ago
    strays = [found for point, found in in_storage.items() if point not in in_catalog and point not in pruned]
    sealed = [point for point in in_catalog.values() if point.state is State.SEALED]
    sealed += [point for stray in strays if (point := await _sealed_stray(catalog, stray)) is not None]
    if not accept_loss and (silent := await silence(sealed, storage)) is not None:
        raise silent
    lost = lost_storages(sealed, await storage.space()) if accept_loss else set()
    for point in sorted(in_catalog.values(), key=lambda point: point.number):
        await _settle_point(catalog, storage, point, in_storage.get(point.id), done)
    for point_id in (*sorted(pruned), *(point.id for point in sealed if lost.intersection(storages_of([point])))):
        if in_storage.pop(point_id, None) is not None and await _remove(storage, point_id, done):
            done.removed.append(point_id)
    systems = {point.floor.history.system for point in in_catalog.values()}
    for _, stray in sorted(in_storage.items()):  # oldest first: a later life of a log does not repeat an earlier one
        if stray.point not in in_catalog:
            await _settle_stray(catalog, storage, stray, systems, begun, done)
    if done:
        log.warning("reconciled: %s", done.words())
    return done


async def _sealed_stray(catalog: Catalog, stray: Tagged) -> RecoveryPoint | None:
    """Give the point of a snapshot that the catalog does not know, where its tag says that it is sealed."""
    try:
        point, _ = await _decoded(catalog, stray.tag or "")
    except TrigpointError:
        return None
    return point if point.state is State.SEALED else None


async def _concerned(catalog: Catalog, in_storage: Collection[str]) -> list[RecoveryPoint]:
    """Give the points that should have a snapshot, and those that have one; never all that ever were."""
    living = await catalog.points(states={State.OPEN, State.SEALED, State.EXPIRING})
    ended = await catalog.having(set(in_storage) - {point.id for point in living})
    return [*living, *ended]


async def _settle_point(
    catalog: Catalog, storage: Storage, point: RecoveryPoint, found: Tagged | None, done: Reconciliation
) -> None:
    """Bring one point of the catalog to a state that agrees with what the storage has of it."""
    match point.state:
        case State.OPEN:
            sealed = await _sealed(catalog, found)
            if sealed is not None:
                await catalog.seal(sealed[0], sealed[1], {})
                done.adopted.append(point.id)
            else:
                await _remove(storage, point.id, done)
                await catalog.fail(point, INTERRUPTED)
                done.failed.append(point.id)
        case State.SEALED if found is None or not (found.complete and is_whole(found, point)):
            if found is not None and is_whole(found, point):
                await _mend(catalog, storage, point, done)
            else:
                await catalog.fail(point, GONE)
                done.phantoms.append(point.id)
        case State.EXPIRING if await _remove(storage, point.id, done):
            await catalog.change(point, State.EXPIRED)
            done.expired.append(point.id)
        case State.FAILED if point.failure == GONE and found is not None:
            if why := await _lack(storage, point, found):
                log.warning("point %d is back in the storage, and not whole: %s", point.number, why)
                done.incomplete.append(point.id)
            else:
                done.regained.append(point.id)
                await _settle_point(catalog, storage, await catalog.regain(point), found, done)
        case State.FAILED | State.EXPIRED if found is not None:
            if await _remove(storage, point.id, done):
                done.removed.append(point.id)


async def _lack(storage: Storage, point: RecoveryPoint, found: Tagged) -> str:
    """Give what is missing of a point that was gone, looked at closely: whoever brings it back may not be done yet."""
    if not is_whole(found, point):
        return "not every volume is there, whole"
    try:
        return await storage.lack(point.id)
    except StorageError as error:
        return str(error)


async def _mend(catalog: Catalog, storage: Storage, point: RecoveryPoint, done: Reconciliation) -> None:
    """Write the damaged tag of a sealed point anew: the catalog holds all that it said."""
    try:
        commits = await catalog.commits_of(point.number)
        writing = partial(tag.encode, point, commits)
        await storage.retag(point.id, await catalog.apart(writing) if len(commits) > LARGE else writing())
    except StorageError as error:
        log.error("point %d: its tag in the storage is damaged, and not mended for now: %s", point.number, error)
        done.unreadable.append(point.id)
    else:
        done.mended.append(point.id)


async def _settle_stray(
    catalog: Catalog,
    storage: Storage,
    stray: Tagged,
    systems: set[str],
    streams: Collection[str],
    done: Reconciliation,
) -> None:
    """Adopt, remove or leave alone a snapshot that the catalog does not know."""
    try:
        point, records = await _decoded(catalog, stray.tag or "")
    except TrigpointError:
        done.strange.append(stray.point)
        return
    if systems and point.floor.history.system not in systems:
        done.strange.append(stray.point)
    elif point.state is State.SEALED and stray.complete and is_whole(stray, point):
        if await catalog.adopt(point, records, streams):
            done.adopted.append(stray.point)
    elif point.state is State.SEALED:  # the rest of it may be elsewhere, or on its way back
        log.warning("point %s is sealed by its tag, and not whole in the storage: it is left alone", stray.point)
        done.incomplete.append(stray.point)
    elif await _remove(storage, stray.point, done):
        done.removed.append(stray.point)


async def _remove(storage: Storage, point: str, done: Reconciliation) -> bool:
    """Whether the storage has let go of a point; one that stays must not keep commits from being protected."""
    try:
        await storage.delete(point)
    except StorageError as error:
        log.warning("point %s stays in the storage for now: %s", point, error)
        done.stuck.append(point)
        return False
    return True


async def _sealed(catalog: Catalog, found: Tagged | None) -> tuple[RecoveryPoint, list[CommitRecord]] | None:
    """Give the sealed point that a whole snapshot bears, or None."""
    if found is None or not found.complete or found.tag is None:
        return None
    try:
        point, records = await _decoded(catalog, found.tag)
    except TrigpointError:
        return None
    return (point, records) if point.state is State.SEALED and is_whole(found, point) else None


async def _decoded(catalog: Catalog, text: str) -> tuple[RecoveryPoint, list[CommitRecord]]:
    reading = partial(tag.decode, text)
    return await catalog.apart(reading) if len(text) > LARGE * _LEAST_CHARACTERS else reading()
