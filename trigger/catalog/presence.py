"""Whether the storage shows what the catalog promises: the snapshots of sealed points. Nothing is changed by it.

They may go while nobody looks, by hand or with a filesystem. A storage that shows none of them at all is more likely
not mounted than emptied, and nobody is told then that they are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trigger.catalog.catalog import Catalog
from trigger.errors import StorageError
from trigger.model import GONE, Finding, RecoveryPoint, Severity, Space, State
from trigger.ports import Storage, Tagged
from trigger.volumes import of_volume, volumes_in

AT_ONCE = 100
"""How many points a watch looks at: reading them from the catalog takes ten milliseconds, for which a seal waits."""
_NAMED = 5
_NOTHING = "{} shows no snapshot at all, and in the catalog {} sealed"
MOUNT = "mount the storage's filesystem; if it is really gone: trigpoint reconcile --accept-loss"
TAKES_BACK = "`trigpoint reconcile`, or a start of the service, takes back those that are whole"
"""What of points that failed as gone lies in the storage again."""
_KEEP = (
    "let it stand in [[storages]] under that name, with or without a volume; if it is really gone:"
    " trigpoint reconcile --accept-loss (storage {})"
)
_BACK = (
    "put back what was moved, and it serves again, but where the service was stopped or started since, or failed at a"
    f" point: {TAKES_BACK}. What is gone for good is given up then, and its commits are restored from the points before"
)


async def silence(sealed: Sequence[RecoveryPoint], storage: Storage) -> StorageError | None:
    """Give the error for a storage, or one of several, that shows nothing though sealed points have snapshots there.

    So it is for one that the configuration does not have any more.

    Raises:
        StorageError: it cannot be looked at.
    """
    if not sealed:
        return None
    space = await storage.space()
    if not space.snapshots and len(space.silent) == len(space.storages):
        return StorageError(nothing_of(len(sealed)), hint=MOUNT)
    lost = lost_storages(sealed, space)
    if missing := sorted(lost.difference(space.storages)):
        words = f"the configuration has no storage {missing[0]}, and points have a part there"
        return StorageError(words, hint=_KEEP.format(missing[0]))
    silent = [name for name in space.silent if name in lost]
    if not silent and space.silent and await _unseen(sealed, storage):
        silent = list(space.silent)
    return StorageError(nothing_of(len(sealed), f"storage {silent[0]}"), hint=MOUNT) if silent else None


def storages_of(points: Collection[RecoveryPoint]) -> set[str]:
    """Give the names of those of several storages in which any of some points has a part."""
    return {kept.storage for point in points for kept in point.snapshots} - {""}


def lost_storages(sealed: Sequence[RecoveryPoint], space: Space) -> set[str]:
    """Give those of several storages that show nothing, or are not there any more, and have parts of sealed points."""
    return {name for name in storages_of(sealed) if name in space.silent or name not in space.storages}


async def _unseen(points: Sequence[RecoveryPoint], storage: Storage) -> bool:
    """Whether there is a volume of which none of the snapshots is there that were cut into a storage alone."""
    for volume in volumes_in(points):
        of_it = [one for one in of_volume(points, volume) if not one.snapshots[0].storage]
        if of_it and len(await storage.absent(of_it)) == len(of_it):
            return True
    return False


def nothing_of(sealed: int, who: str = "the storage") -> str:
    """Give in words that a storage shows none of so many sealed points."""
    return _NOTHING.format(who, "one point is" if sealed == 1 else f"{sealed} points are")


def is_whole(found: Tagged, point: RecoveryPoint) -> bool:
    """Whether the storage shows every snapshot of a point, whole; its tag may be damaged."""
    shown = {kept.volume for kept in found.snapshots}
    return (found.complete or found.tag is None) and {kept.volume for kept in point.snapshots} <= shown


async def missing(points: Sequence[RecoveryPoint], catalog: Catalog, storage: Storage) -> set[str]:
    """Give the ids of those of `points` of which a snapshot is gone, though they are sealed still.

    Raises:
        StorageError: it cannot be looked at.
    """
    absent = await storage.absent(points)
    return {point.id for point in await catalog.having(absent) if point.state is State.SEALED} if absent else set()


async def away(bases: Sequence[RecoveryPoint], catalog: Catalog, storage: Storage) -> set[str]:
    """Give what `missing` gives of all sealed points.

    Raises:
        StorageError: it cannot be looked at, or shows nothing at all.
    """
    found = await missing(bases, catalog, storage)
    if found and (silent := await silence(bases, storage)) is not None:
        raise silent
    return found


async def back(catalog: Catalog, storage: Storage) -> list[RecoveryPoint]:
    """Give the points that failed as gone, and of which the storage shows every snapshot again; reads each tag for it.

    Raises:
        StorageError: it cannot be looked at.
    """
    there = {found.point: found for found in await storage.tagged()}
    known = await catalog.having(there)
    return [point for point in known if point.failure == GONE and is_whole(there[point.id], point)]


async def look_back(catalog: Catalog, storage: Storage) -> Finding | None:
    """Give which points failed as gone and lie in the storage again: nothing is restored from them. None for none.

    Raises:
        StorageError: it cannot be looked at.
    """
    if not (found := await back(catalog, storage)):
        return None
    lies = "lies" if len(found) == 1 else "lie"
    message = f"{_named([point.number for point in found])} failed as gone, and {lies} in the storage again"
    return Finding("storage", Severity.WARNING, message, TAKES_BACK)


async def is_gone(point: RecoveryPoint, catalog: Catalog, storage: Storage) -> bool:
    """Whether a point of which no clone could be made is none to restore from: expired, or not whole any more.

    What the storage does not let be looked at is not taken for gone. Raises `CatalogError`.
    """
    if (await catalog.point(point.id)).state is not State.SEALED:
        return True
    try:
        shown = [is_whole(found, point) for found in await storage.tagged(point.id)]
        return not any(shown) or bool(await storage.lack(point.id))
    except StorageError:
        return False


async def look(catalog: Catalog, storage: Storage) -> Finding | None:
    """Give which sealed points the storage does not show; refused where a start would be. None where all are there.

    Of a storage that cannot be read it says nothing.
    """
    bases = await catalog.bases()
    try:
        if (silent := await silence(bases, storage)) is not None:
            return Finding("storage", Severity.REFUSED, silent.message, silent.hint)
        gone = await missing(bases, catalog, storage)
    except StorageError:
        return None
    if not gone:
        return None
    return Finding("storage", Severity.WARNING, words([point.number for point in bases if point.id in gone]), _BACK)


def words(numbers: Collection[int]) -> str:
    """Give in words that the snapshots of some points are gone; never a list that grows with them."""
    return f"of {_named(numbers)} a snapshot is gone from the storage"


def _named(numbers: Collection[int]) -> str:
    named = ", ".join(map(str, sorted(numbers)[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{'point' if len(numbers) == 1 else 'points'} {named}{more}"


class Watch:
    """Looks again and again which sealed points the storage shows, `AT_ONCE` at a time, the newest first."""

    def __init__(self) -> None:
        self._below: int | None = None
        self._turn = 0
        self._gone: dict[int, int] = {}
        """The numbers of those that are gone, and in which turn that was seen last."""

    @property
    def gone(self) -> Collection[int]:
        """The numbers of the points that were gone when they were looked at last."""
        return self._gone.keys()

    @property
    def trouble(self) -> str:
        """What is gone, and what to do; "" for nothing."""
        return f"{words(self.gone)}; {_BACK}" if self._gone else ""

    async def look(self, catalog: Catalog, storage: Storage) -> None:
        """Look at the next ones.

        Raises:
            StorageError: it cannot be looked at, or shows nothing at all.
            CatalogError: the catalog cannot be read.
        """
        page = await catalog.points(states={State.SEALED}, limit=AT_ONCE, before_number=self._below)
        gone = await missing(page, catalog, storage)
        if gone and (silent := await silence(await catalog.bases(), storage)) is not None:
            raise silent
        for point in page:
            self._gone.pop(point.number, None)
        self._gone |= {point.number: self._turn for point in page if point.id in gone}
        self._below = page[-1].number if len(page) == AT_ONCE else None
        if self._below is None:  # a turn is done: what was not seen again in it is sealed no more
            self._gone = {number: turn for number, turn in self._gone.items() if turn == self._turn}
            self._turn += 1
