"""The main path: commit -> qualify -> flush -> wait -> snapshot -> tag.

`protect` leaves a sealed recovery point behind every commit that qualifies; `take` makes one. Everything outside is
reached through ports and the catalog. A failpoint stands between any two steps: wherever the process dies, the intent
in the catalog and the tag in the storage let `reconcile` finish or undo what was begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from trigger.catalog import tag
from trigger.catalog.catalog import Catalog
from trigger.catalog.point_index import Missed
from trigger.catalog.reconcile import reconcile
from trigger.config.options import PointOptions
from trigger.errors import StorageError, TrigpointError
from trigger.failpoint import reached
from trigger.model import Cause, CommitRecord, Flush, Gap, Outcome, RecoveryPoint, State, Volume
from trigger.point_names import point_id
from trigger.ports import Agent, Capability, Clock, Storage
from trigger.protect.agenda import Agenda
from trigger.protect.logs import Finish, Logs, ceilings
from trigger.protect.qualify import Pending, Skip, Take, Wait, qualify
from trigger.protect.window import Collected, Window, record
from trigger.together import together
from trigger.volumes import at_their_places, is_of

log = logging.getLogger(__name__)

ABANDON_SECONDS = 60.0
"""How long the removal of what a failed round left may last; reconcile goes on with it."""
ATTEMPT_SECONDS = 600.0
"""How often a copy is tried although the last one found no room and no more is free since."""
SETTLE_SECONDS = 10.0
"""While nothing qualifies, how often the servers are told that they may forget what was seen."""


@dataclass(frozen=True, slots=True)
class Protected:
    """What is protected together, with everything that protects it."""

    logs: Logs
    volumes: Sequence[Volume]
    agents: Sequence[Agent]
    storage: Storage
    catalog: Catalog
    clock: Clock
    options: PointOptions
    flush_deadline_seconds: float
    random: random.Random = field(default_factory=random.SystemRandom)
    attempts: dict[str, float] = field(default_factory=dict)
    """By the storage's name when a copy was last tried that may find no room, by the loop's clock."""
    leftovers: list[str] = field(default_factory=list)
    """Points of which the storage would not let go; tried again once it takes a snapshot."""


async def agenda_of(cluster: Protected) -> Agenda:
    """Give what is due at a start.

    The newest sealed point is the base, if every database goes back to it, and it is of the volumes that there are now.
    """
    newest, base = await cluster.catalog.latest(), None
    if newest is not None and is_of(newest, cluster.volumes) and await cluster.logs.have_in_past(newest):
        base = newest
    gap = bool(await cluster.catalog.gaps(open_only=True))
    return Agenda(cluster.options, base, newest.number if newest else 0, open_gap=gap)


async def protect(cluster: Protected, window: Window, agenda: Agenda) -> None:
    """Leave a sealed recovery point behind every commit that qualifies; ends between two rounds when told to stop."""
    loop = asyncio.get_running_loop()
    settle_at = loop.time()
    untidy = False
    while not agenda.stopping:
        now = loop.time()
        agenda.heed(window.opens)
        try:
            if untidy:
                await tidy(cluster, window, agenda)
                untidy, agenda.trouble = False, ""
            await record_breaks(cluster, window, agenda)
            await leave_lost_base(cluster, window, agenda)
            oldest = window.oldest
            full = window.is_full and oldest is not None
            due = agenda.next(now, cluster.clock.now(), window.log_ends, window_is_full=full)
            match qualify(oldest, due, agenda.pace(now), cluster.options, now):
                case Skip() if now >= settle_at:
                    await settle_idle(cluster, window)
                    settle_at = now + SETTLE_SECONDS
                case Skip():
                    await window.more(min(settle_at, due.at) if due else settle_at)
                case Wait(until):
                    await window.more(until)
                case Take(cause):
                    agenda.began(now, cluster.clock.now())
                    await protect_pending(cluster, window, agenda, cause)
        except (TrigpointError, OSError) as error:
            pause = agenda.failed(loop.time(), None)
            agenda.trouble = str(error)
            log.error("not protected now, trying again in %.0f s: %s", pause, error)
            untidy = True  # what the failed call did or did not do is found out before anything new is begun
            await rest(window, agenda)


async def protect_pending(cluster: Protected, window: Window, agenda: Agenda, cause: Cause) -> None:
    """Take one point for everything that is pending, and settle it if it was sealed."""
    collected = await without_shared(cluster.catalog, window.collect())
    if cause is Cause.COMMIT and not collected.pending:
        await settle(cluster, window, collected)
        return
    note = agenda.note
    if cause is not Cause.COMMIT and collected.newest and await cluster.logs.has_left(collected.newest.commit):
        cause, note = Cause.COMMIT, ""  # what is of before a failover gets its own point; the present is the next one's
    point = await take(cluster, cause, collected, note)
    if point.state is State.SEALED:
        await cluster.catalog.close_gaps(point.number)
        reached("after-close-gaps")
        agenda.sealed(point)
        await window.settle(collected.settled)  # only now may the sources forget
        reached("after-settle")
    else:
        pause = agenda.failed(asyncio.get_running_loop().time(), point)
        agenda.trouble = f"point {point.number} failed: {point.failure}"
        log.error("point %d failed, trying again in %.0f s: %s", point.number, pause, point.failure)
    await clear_away(cluster)


async def without_shared(catalog: Catalog, collected: Collected) -> Collected:
    """Give what was collected without what comes again: a copy that was put back shares it with the life before.

    It has its outcome there, so it is no reason for a point, and belongs into no tag.
    """
    history = collected.newest.commit.history if collected.newest else None
    if history is None or not history.incarnation:
        return collected
    records = await catalog.apart(collected.records) if collected.is_large else collected.records()
    new = {(one.stream, one.start) for one in await catalog.new_in_this_life(records, history)}
    return replace(collected, pending=[p for p in collected.pending if (p.commit.stream, p.commit.start) in new])


async def take(cluster: Protected, cause: Cause, collected: Collected, note: str = "") -> RecoveryPoint:
    """Flush the hosts, snapshot the volumes, tag the result with the commit."""
    catalog, storage, logs = cluster.catalog, cluster.storage, cluster.logs
    point = await open_point(cluster, cause, collected.newest, note)  # intent first: a crash from here on is found
    reached("after-open")
    try:
        async with asyncio.timeout(cluster.options.round_seconds):
            flushes = await flush(cluster.agents, point, cluster.flush_deadline_seconds)
            reached("after-flush")
            covered = await logs.cover(point.marks)  # on disk, and still the same history
            await require_room(cluster)
            reached("after-cover")
            async with bracketed(logs, storage, point) as finish:
                cut = await storage.snapshot(cluster.volumes, point.id, tag.encode(point))
                reached("after-snapshot")
                brackets = await finish()
            marks = await ceilings(covered, brackets)
            reached("after-ceiling")
            point = replace(
                point,
                state=State.SEALED,
                marks=marks,
                flushes=flushes,
                snapshots=at_their_places(cut, cluster.volumes),
                sealed_at=cluster.clock.now(),
            )
            summing = partial(sum_up, point, collected)
            point, records, text = await catalog.apart(summing) if collected.is_large else summing()
            await storage.retag(point.id, text)
            reached("after-retag")
    except TimeoutError:
        return await abandon(cluster, point, f"not done within {cluster.options.round_seconds:g} s, which is the limit")
    except (TrigpointError, OSError) as error:
        return await abandon(cluster, point, str(error))
    sealed = await catalog.seal(point, records, collected.settled)
    reached("after-seal")
    return sealed


def sum_up(point: RecoveryPoint, collected: Collected) -> tuple[RecoveryPoint, list[CommitRecord], str]:
    """Give a point with what its commits changed, their records, and the tag of both."""
    records = collected.records()
    point = replace(point, commits=len(records), tables=collected.tables())
    return point, records, tag.encode(point, records)


async def open_point(cluster: Protected, cause: Cause, newest: Pending | None, note: str) -> RecoveryPoint:
    """Write the intent of a point into the catalog."""
    now = cluster.clock.now()
    return await cluster.catalog.open_point(
        id=point_id(now, cluster.random.getrandbits(80)),
        cause=cause,
        marks=await cluster.logs.floors(cause, newest.commit if newest else None),
        opened_at=now,
        commit=record(newest.commit, Outcome.PROTECTED) if newest else None,
        rule=newest.rule if newest else "",
        note=note,
    )


async def flush(agents: Sequence[Agent], point: RecoveryPoint, deadline_seconds: float) -> tuple[Flush, ...]:
    """Instruct every host to flush and wait for all of them, with one deadline; gives one proof a volume."""
    proofs = await together(agent.flush(point.id, deadline_seconds) for agent in agents)
    return tuple(proof for of_agent in proofs for proof in of_agent)


async def require_room(cluster: Protected) -> None:
    """Raise `StorageError` where a copy would find no room: its bracket costs a checkpoint and a segment of log.

    What a copy needs is known only from the last one that failed, and may be less by now: so it is tried now and then.
    """
    storage, now = cluster.storage, asyncio.get_running_loop().time()
    if Capability.ATOMIC_GROUP in storage.capabilities:
        return  # it costs nothing to try
    space = await storage.space()
    whose = f"storage {space.name}: " if space.name else ""
    if space.snapshots >= space.budget:
        raise StorageError(f"{whose}{space.snapshots} points are kept, the budget is {space.budget}", hint=_MAKE_ROOM)
    if not space.short:
        return
    wanted = space.wanted_free_bytes + space.needed_bytes
    tried = cluster.attempts.get(storage.name)
    if space.free_bytes < space.wanted_free_bytes or (tried is not None and now < tried + ATTEMPT_SECONDS):
        raise StorageError(f"{whose}{space.free_bytes} bytes are free, {wanted} are wanted", hint=_MAKE_ROOM)
    cluster.attempts[storage.name] = now


_MAKE_ROOM = "delete points, make the storage larger, or lower what it is to keep free"


@contextlib.asynccontextmanager
async def bracketed(logs: Logs, storage: Storage, point: RecoveryPoint) -> AsyncIterator[Finish]:
    """Hold the databases' backup brackets around the snapshot, unless the storage cuts everything at one instant."""
    if Capability.ATOMIC_GROUP in storage.capabilities:

        async def no_brackets() -> Sequence[None]:
            return [None] * len(point.marks)

        yield no_brackets
        return
    async with logs.bracketed(point.marks, point.name) as finish:
        yield finish


async def abandon(cluster: Protected, point: RecoveryPoint, reason: str) -> RecoveryPoint:
    """Give the point as failed in the catalog; what was half made is removed now, or as soon as that works."""
    try:
        async with asyncio.timeout(ABANDON_SECONDS):
            await cluster.storage.delete(point.id)
    except (StorageError, TimeoutError) as left:
        cluster.leftovers.append(point.id)
        log.warning("point %d: what was half made stays for now: %s", point.number, left)
    return await cluster.catalog.fail(point, reason)


async def clear_away(cluster: Protected) -> None:
    """Remove what failed points left behind; what still will not go is tried again with the next point."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ABANDON_SECONDS):
            for point in tuple(cluster.leftovers):
                with contextlib.suppress(StorageError):
                    await cluster.storage.delete(point)
                    cluster.leftovers.remove(point)


async def record_breaks(cluster: Protected, window: Window, agenda: Agenda) -> None:
    """Put every break of a stream into the catalog as a gap, and what was lost with it as missed."""
    while window.breaks:  # others may come while one is written down
        for agent in cluster.agents:  # the server is another one by now, maybe on volumes that took the place of others
            await agent.prepare(cluster.volumes)
        broken = window.breaks[0]
        lineage = window.come_to(broken.stream)
        lost = window.lost(broken, lineage)
        reason = f"not in the past of {lineage.history}: {broken.seen.reason}"
        missed = [
            Missed([record(pending.commit, Outcome.MISSED) for pending in left], reason, history)
            for history, left in itertools.groupby(lost, key=lambda pending: pending.commit.history)
        ]
        now = cluster.clock.now()
        found = [Gap(broken.stream, after, until, broken.seen.reason, now) for after, until in broken.holes]
        await cluster.catalog.record_gaps(*found, missed=missed, settled=window.settled_by(broken, lost))
        for gap in found:
            log.error("stream %s: gap from %s to %s: %s", gap.stream, gap.after, gap.until, gap.reason)
        window.forget(broken, lost)
        agenda.open_gap = True


async def leave_lost_base(cluster: Protected, window: Window, agenda: Agenda) -> None:
    """Give up the base where the cluster has gone on from before its ceiling: no commit from now on could use it.

    The streams may see no break then: they were delivered up to the fork, the base was cut a little further.
    """
    for stream, through in window.reached().items():
        mark = agenda.base.mark_in(through.history) if agenda.base else None
        if agenda.base is None or (mark and mark.ceiling and mark.ceiling.history == through.history):
            continue
        lineage = await cluster.logs.lineage(stream)
        mark = agenda.base.mark_in(lineage.history)  # which may be of a server that the stream has not come to yet
        if mark is None or mark.ceiling is None or not lineage.includes(mark.ceiling):
            log.warning("point %d is not in the past of %s: taking a new base", agenda.base.number, lineage.history)
            agenda.base = None


async def settle_idle(cluster: Protected, window: Window) -> None:
    """Note how far the streams were seen while nothing qualified, then let the servers forget it."""
    collected = window.collect()
    if not collected.pending:
        await settle(cluster, window, collected)


async def settle(cluster: Protected, window: Window, collected: Collected) -> None:
    """Note how far the streams go without a commit that needs an outcome, then let the servers forget it."""
    for stream, through in collected.settled.items():
        await cluster.catalog.settle(stream, through)
    await window.settle(collected.settled)


async def tidy(cluster: Protected, window: Window, agenda: Agenda) -> None:
    """After a failure: finish or undo what was begun, and settle what the catalog has the outcome of by now."""
    cluster.leftovers[:] = (await reconcile(cluster.catalog, cluster.storage)).stuck
    newest = await cluster.catalog.latest()
    if newest is not None and newest.number > agenda.sealed_number:  # of the round that failed
        await cluster.catalog.close_gaps(newest.number)
        agenda.sealed(newest)
    agenda.base = newest if newest is not None and is_of(newest, cluster.volumes) else None
    agenda.open_gap = bool(await cluster.catalog.gaps(open_only=True))
    settled = {stream: await cluster.catalog.settled(stream) for stream in window.connected()}
    await window.settle({stream: through for stream, through in settled.items() if through is not None})


async def rest(window: Window, agenda: Agenda) -> None:
    """Wait until a round may be tried again, whatever commits arrive meanwhile; a stop is not kept waiting."""
    while asyncio.get_running_loop().time() < agenda.not_before and not agenda.stopping:
        await window.more(agenda.not_before)
        agenda.heed(window.opens)
