"""Keep room in the storage: `retention` decides which snapshots go, `expire` does it; here it is seen when they must.

Room is short where the budget of snapshots is nearly used up, or where there are too few bytes for another one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from trigger.catalog.catalog import Catalog
from trigger.catalog.presence import away
from trigger.errors import JournalError, StorageError
from trigger.keep.expire import GivenUp, expire, give_up_before, is_cloned, release_log
from trigger.keep.retention import Leads, thin
from trigger.model import Extent, RecoveryPoint, Space, State
from trigger.ports import Journal, Storage
from trigger.position import History, Lineage
from trigger.restore.planner import HeldLog
from trigger.volumes import are_alike

THIN_FROM = 0.9
THIN_TO = 0.7
"""Shares of the storage's budget: thinning begins above the first and ends at the second; where the restore objective
does not allow that, it ends at the first. Where the storage is short of bytes, the first is the share of the snapshots
that may stay this time."""
LOOK_SECONDS = 5.0
LOOK_SHARE = 0.01
LOOK_DEADLINE_SECONDS = 30.0
"""How often the journal is looked into at most, how much of the time that may take, since it grows with its history,
and how long one look may last."""
LEAST_PAUSE_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 3600.0
"""How long no more snapshots go for want of bytes after some went and gave nothing back; twice as long each time."""


Apart = Callable[[Callable[[], list[RecoveryPoint]]], Awaitable[list[RecoveryPoint]]]
"""Gives what a piece of work gives that may last, while the event loop turns on."""


class KnownLog:
    """What is known of the log in the journal; while it cannot be looked at, what was seen last counts."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.extents: Sequence[Extent] = ()
        """What the journal held when it was looked at last."""
        self._lineages: dict[History, Lineage] = {}
        self._look_at = 0.0
        self.unseen_from: int | None = None
        """Up to which point it is not known what log there was, while none was ever seen; None before a first pass."""

    def look_again(self) -> None:
        """Let the next look be a new one: what the journal holds has changed."""
        self._look_at = 0.0

    async def look(self) -> None:
        """See what log there is, and the past of its histories, unless that was done just now."""
        clock = asyncio.get_running_loop().time
        if (began := clock()) < self._look_at:
            return
        self._look_at = next_at = began + LOOK_SECONDS
        with suppress(JournalError, OSError):  # a deadline that has passed is one of the latter
            async with asyncio.timeout(LOOK_DEADLINE_SECONDS):
                found = await self._journal.extents()
                self.extents = found or self.extents  # a folder that is not mounted is empty
                await self._learn({extent.history for extent in self.extents})
        if self._look_at == next_at:  # nobody asked for another look meanwhile
            self._look_at = clock() + max(LOOK_SECONDS, (clock() - began) / LOOK_SHARE)

    async def _learn(self, histories: Collection[History]) -> None:
        for history in set(histories) - set(self._lineages):
            with suppress(JournalError):  # a past that is not known counts as none
                self._lineages[history] = await self._journal.lineage(history)

    def leads(self, bases: Sequence[RecoveryPoint]) -> tuple[Leads, Leads]:
        """Give whether a replay leads from one of `bases` to another: by the log that is held; by what may yet come.

        It must in every log that the other stands in, and both be of the same volumes. Log comes only to the newest
        history, behind all that is held. While none was ever seen, nobody knows where that is: it counts as coming from
        the newest point on that there was at first.
        """
        from_number = 0 if self.extents else self.unseen_from or 0
        logs = {history: self._log(history) for history in {one for base in bases for one in _histories(base)}}
        newest = _histories(bases[-1]) if bases else []

        def held(base: RecoveryPoint, point: RecoveryPoint) -> bool:
            return are_alike(base, point) and all(logs[h].leads(base, point) for h in _histories(point))

        def to_come(base: RecoveryPoint, point: RecoveryPoint) -> bool:
            late = base.number >= from_number
            leads = (logs[h].leads(base, point, to_come=late and h in newest) for h in _histories(point))
            return are_alike(base, point) and all(leads)

        return held, to_come

    def _log(self, history: History) -> HeldLog:
        return HeldLog(self.extents, self._lineages.get(history, Lineage(history)), self._journal.file_start)


def _histories(point: RecoveryPoint) -> list[History]:
    return [(mark.ceiling or mark.floor).history for mark in point.marks]


def _is_crowded(space: Space) -> bool:
    return space.snapshots > space.budget * THIN_FROM


class Room:
    """Keeps room in one storage; only one pass, or one giving up, at a time."""

    def __init__(self, catalog: Catalog, storage: Storage, journal: Journal, apart: Apart = asyncio.to_thread) -> None:
        self._catalog = catalog
        self._storage = storage
        self._journal = journal
        self._apart = apart
        self.known_log = KnownLog(journal)
        self.lacking = False
        """Whether the storage had too few bytes for another snapshot when it was last looked at."""
        self.eased = False
        """Whether the last pass made room, or found some where there was none: what waits for it may be tried again."""
        self.trouble = ""
        """What kept the last pass from making room; "" for nothing."""
        self._free_before: int | None = None
        self._pause_seconds = 0.0
        self._again_at = -math.inf
        self._judged: tuple[object, ...] | None = None
        """Of what it was found last that nothing may go."""
        self._one_at_a_time = asyncio.Lock()

    async def make(self, replay_limit_bytes: int) -> list[RecoveryPoint]:
        """Give the points whose snapshots were removed: as was begun before, or since the storage is nearly used up.

        A point of which there is a clone stays, and one to which no log leads from an earlier one.
        """
        async with self._one_at_a_time:
            lacked, self.trouble, self.eased = self.lacking, "", False
            gone = await self._make(replay_limit_bytes)
            self.eased = bool(gone) or (lacked and not self.lacking)
            return gone

    async def _make(self, replay_limit_bytes: int) -> list[RecoveryPoint]:
        if self.known_log.unseen_from is None:
            newest = await self._catalog.latest()
            self.known_log.unseen_from = newest.number if newest else 0
        gone = await self._expire(await self._catalog.points(states={State.EXPIRING}, newest_first=False))
        await self.known_log.look()
        space = await self._storage.space()
        if not self._is_needed(space):
            return gone
        bases = await self._catalog.bases()
        gone_by_itself = await away(bases, self._catalog, self._storage)
        bases = [base for base in bases if base.id not in gone_by_itself]  # what leads from them is not had by now
        wanted, most = self._wanted(space, len(bases))
        pinned = {clone.point for clone in await self._storage.clones()}
        judged = [base.id for base in bases], wanted, most, replay_limit_bytes, pinned, self.known_log.extents
        if judged == self._judged:  # nothing may go, as a moment ago
            return gone
        held, to_come = self.known_log.leads(bases)
        going = await self._apart(lambda: thin(bases, wanted, most, replay_limit_bytes, held, to_come, pinned))
        self._judged = None if going else judged
        thinned = await self._expire(going)
        if space.short and thinned:
            self._free_before = space.free_bytes
        return gone + thinned

    async def _expire(self, points: Sequence[RecoveryPoint]) -> list[RecoveryPoint]:
        """Give those of `points` that are expired now; of the others it is told why not, and the next pass goes on."""
        gone: list[RecoveryPoint] = []
        for point in points:
            try:
                if point.state is State.SEALED and await is_cloned(self._storage, point):
                    continue  # a restore began meanwhile
                gone.append(await expire(self._catalog, self._storage, point))
            except StorageError as error:
                self.trouble = str(error)
        return gone

    def _is_needed(self, space: Space) -> bool:
        self.lacking = space.short or space.freeing
        if not self.lacking:
            self._free_before, self._pause_seconds, self._again_at = None, 0.0, -math.inf
        return space.short or _is_crowded(space)

    def _wanted(self, space: Space, bases: int) -> tuple[int, int]:
        """Give how many of so many bases should stay, and how many may stay in any case."""
        wanted = most = bases
        if _is_crowded(space):
            others = max(space.snapshots - bases, 0)  # half made, strange, or not to be got rid of
            wanted, most = (max(int(space.budget * share) - others, 0) for share in (THIN_TO, THIN_FROM))
        if space.short and self._tenth_is_due(space):  # what a removal gives is known only when it is done
            most = min(most, int(bases * THIN_FROM))
            wanted = min(wanted, most)
        return wanted, most

    def _tenth_is_due(self, space: Space) -> bool:
        """Whether more may go for want of bytes, by what the last ones that went have given back."""
        now = asyncio.get_running_loop().time()
        if self._free_before is not None:
            gained = space.free_bytes > self._free_before
            longer = min(max(2 * self._pause_seconds, LEAST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
            self._pause_seconds = 0.0 if gained else longer
            self._again_at, self._free_before = now + self._pause_seconds, None
        if now < self._again_at:
            self.trouble = (
                f"fewer bytes are free than the {space.wanted_free_bytes + space.needed_bytes} that are wanted, and"
                " removing snapshots gave nothing back: something else fills the storage; make room there"
            )
        return now >= self._again_at

    async def give_up_before(self, first: str | int, *, dry_run: bool = False) -> GivenUp:
        """Give up every point older than the one called `first`, and the log that only they needed.

        Raises: as `expire.give_up_before`; and `JournalError` where the log cannot be let go of, which can wait.
        """
        async with self._one_at_a_time:  # what it is called is read in here: thinning may just have taken it
            point = await self._catalog.point(first)
            given_up = await give_up_before(point, self._catalog, self._storage, dry_run=dry_run)
        segments = 0 if dry_run else await release_log(self._catalog, self._journal)
        return replace(given_up, segments=segments)
