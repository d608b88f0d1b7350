"""The service: everything that runs for one cluster, in one task group; the only place that starts tasks.

Order at start: lock, pre-flight, catalog, reconcile, journal, then the streams and the main path. Order at the end:
the round at hand is finished (or given up after a grace), then the streams, the journal and the connections go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from trigger.catalog.reconcile import reconcile
from trigger.catalog.reserve import for_an_operator
from trigger.config.options import Options
from trigger.errors import JournalError, PreflightError, RestoreError, TrigpointError
from trigger.keep.expire import GivenUp
from trigger.keep.room import Room
from trigger.model import Cause, RecoveryPoint, Retained, Severity, State
from trigger.ports import Journal
from trigger.protect import commit_lines
from trigger.protect.agenda import Agenda
from trigger.protect.pipeline import Protected, agenda_of, protect, take
from trigger.protect.qualify import Rules
from trigger.protect.window import Collected, Window
from trigger.restore.restore import prepare
from trigger.restore.target import Named, resolve
from trigger.service.connect import Parts, SystemClock, alone, check, keep_layout, layout_files
from trigger.service.control import serve
from trigger.service.detached import Detached
from trigger.service.ending import Ending
from trigger.service.upkeep import Upkeep
from trigger.shape import data

log = logging.getLogger(__name__)
T = TypeVar("T")

POINT_SECONDS = 30.0
"""How long whoever asked for a point waits for a word while none can be taken."""
GRACE_SECONDS = 30.0
"""How long a stop waits for the round at hand."""
JOURNAL_RETRY_SECONDS = 5.0
ASKING_SECONDS = 3.0
"""How long the status waits for the word of the catalog, the storage and the database, each."""
NOTE_CHARACTERS = 1000
RECENT_AT_ONCE = 200
"""How many commits one answer holds: putting them into words keeps the streams waiting."""
JOURNAL_START_SECONDS = 20.0
LOG_SECONDS = 10.0
"""How long the log of a point is waited for that is taken without a service."""
STREAMS_START_SECONDS = 60.0
IN_PASSING_SECONDS = 15.0
"""How long a stream may fail to open before nothing waits for it: a service that was killed may hold it so long."""


@dataclass(slots=True)
class Service:
    """One running service: its parts, its window and its agenda."""

    parts: Parts
    cluster: Protected
    window: Window
    agenda: Agenda
    upkeep: Upkeep
    started_at: datetime
    stop_asked: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """End after the round at hand."""
        log.info("stopping after the round at hand")
        self.agenda.stopping = True
        self.stop_asked.set()
        self.window.wake()

    async def point(self, note: str) -> RecoveryPoint:
        """Take a point now; gives it sealed or failed.

        Raises:
            TrigpointError: for so long nothing was protected that whoever asked should know why; it is tried on.
        """
        answer = self.agenda.ask(note)
        self.window.wake()
        while not (await asyncio.wait((answer,), timeout=POINT_SECONDS))[0]:
            if why := self.agenda.trouble:
                raise TrigpointError(
                    f"no point could be taken within {POINT_SECONDS:g} s: {why}",
                    hint="it is tried on: trigpoint status",
                )
        return answer.result()

    @property
    def protects(self) -> bool:
        """Whether what is committed from now on can be restored: a base stands, and no stream has left its log."""
        agenda = self.agenda
        return agenda.base is not None and not (agenda.open_gap or agenda.wants_base or self.window.breaks)

    async def status(self) -> dict[str, Any]:
        """Give what an operator wants to know first, as JSON values; what cannot be read is null, and said why."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.upkeep.watch_streams(), ASKING_SECONDS)
        troubles = list(self.troubles())
        totals = await _or_trouble("catalog", self.parts.catalog.totals(), troubles)
        space = await _or_trouble("storage", self.parts.storage.space(), troubles)
        retained = await _or_trouble("database", self.parts.database.retained(), troubles)
        troubles += [
            _nearly_lost(one) for one in retained or () if one.left_bytes is not None and one.left_bytes < one.bytes
        ]
        waiting_since, log_ends, base = self.window.waiting_since, self.window.log_ends, self.agenda.base
        now = asyncio.get_running_loop().time()
        return {
            "name": self.parts.options.name,
            "ready": self.protects and all(self.window.connected().values()) and not self.upkeep.behind.still,
            "started_at": data(self.started_at),
            "now": data(self.cluster.clock.now()),
            "streams": dict(self.window.connected()),
            "log_end": data(log_ends[0] if log_ends else None),
            "log_ends": data(log_ends),
            "behind_bytes": dict(self.upkeep.behind.bytes),
            "pending_commits": len(self.window),
            "oldest_pending_seconds": 0.0 if waiting_since is None else now - waiting_since,
            "commits_by_rule": dict(self.window.tally.as_dict()),
            "last_point": base.number if base else None,
            "last_sealed_at": data(base.sealed_at) if base else None,
            "log_since_last_point_bytes": sum(map(self.agenda.log_since_base, log_ends)),
            "replay_bytes": max(map(self.agenda.replay_bytes, log_ends), default=0),
            "replay_limit_bytes": self.agenda.replay_limit_bytes,
            "journal": [data(finding) for finding in self.upkeep.last_audit if finding.severity is not Severity.OK],
            "troubles": troubles,
            "totals": data(totals),
            "space": data(space),
            "retained": data(retained),
        }

    def troubles(self) -> Iterator[str]:
        """Give what keeps commits from being protected, or from being restored exactly, at present."""
        if self.agenda.trouble:
            yield self.agenda.trouble
        for name, why in self.window.troubles().items():
            yield f"stream {name}: {why}"
        yield from (f"{what}: {why}" for what, why in self.upkeep.troubles.items())

    def recent(self, request: dict[str, Any]) -> dict[str, Any]:
        """Give the next of the commits that were seen last, as lines, behind the one of the number in a request."""
        after, remembered = request.get("after"), self.window.recent
        commits, last = remembered.behind(after if isinstance(after, int) else 0, RECENT_AT_ONCE)
        return {
            "commits": [commit_lines.write(commit) for commit in commits],
            "last": last,
            "forgotten": remembered.forgotten,
            "started_at": data(self.started_at),
        }

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Give the answer to one request of the command line."""
        match request.get("do"):
            case "point":
                return {"point": data(await self.point(_note(request)))}
            case "expire":
                return {"expired": data(await give_up(self.upkeep.room, request))}
            case "status":
                return {"status": await self.status()}
            case "recent":
                return self.recent(request)
            case other:
                raise TrigpointError(f"there is no request {other!r}")


def _note(request: dict[str, Any]) -> str:
    """Give the note in a request, cut where it is too long to be kept."""
    return str(request.get("note", ""))[:NOTE_CHARACTERS]


async def _or_trouble(of: str, asked: Awaitable[T], troubles: list[str]) -> T | None:
    """Give what was asked for; where it cannot be had, or not soon, give None, and add why to `troubles`."""
    try:
        async with asyncio.timeout(ASKING_SECONDS):
            return await asked
    except TimeoutError:
        troubles.append(f"the {of} did not answer within {ASKING_SECONDS:g} s")
    except (TrigpointError, OSError) as error:
        troubles.append(str(error))
    return None


def _nearly_lost(one: Retained) -> str:
    left = one.left_bytes or 0
    when = f"will drop it after {left} more" if left > 0 else "drops it at the next checkpoint"
    return (
        f"the database keeps {one.bytes} bytes of log for {one.reader} and {when}: what is in it then becomes a gap, or"
        " cannot be restored exactly; see what keeps points from being taken, or raise max_slot_wal_keep_size"
    )


async def run(
    options: Options, ending: Ending, *, force: bool = False, ready: Callable[[Service], None] | None = None
) -> None:
    """Protect the cluster until told to stop; what ends it before anything is protected cancels it.

    Args:
        options: the configuration.
        ending: what a signal does; the round at hand is finished first, once there is one.
        force: go on where the pre-flight check refuses; what it said is logged.
        ready: called once with the service when commits are protected: streams open, a base sealed.

    Raises:
        TrigpointError: what no waiting can help, of whatever part it came.
    """
    asyncio.get_running_loop().set_default_executor(Detached())
    async with alone(options) as parts:
        await preflight(parts, force=force)
        service = await begin(parts)
        ending.act = service.stop
        await work(service, ready)
        await leave_nothing_undone(parts)


async def leave_nothing_undone(parts: Parts) -> None:
    """Finish what a stop has cut short, such as a removal by thinning; what cannot be is left to the next start."""
    try:
        async with asyncio.timeout(GRACE_SECONDS):
            await reconcile(parts.catalog, parts.storage)
    except (TrigpointError, OSError) as error:
        log.warning("not reconciled at the end, the next start does it: %s", error)


async def preflight(parts: Parts, *, force: bool) -> None:
    """Look at everything that must hold before a point may be promised; raises `PreflightError` where it does not."""
    findings = await check(parts)
    refused = [finding for finding in findings if finding.severity is Severity.REFUSED]
    for finding in findings:
        if finding.severity in (Severity.WARNING, Severity.REFUSED):
            log.warning("%s: %s; %s", finding.subject, finding.message, finding.remedy)
    if refused and not force:
        raise PreflightError(
            "; ".join(f"{finding.subject}: {finding.message}" for finding in refused),
            hint="; ".join(dict.fromkeys(finding.remedy for finding in refused if finding.remedy))
            or "see `trigpoint check`",
        )


async def begin(parts: Parts) -> Service:
    """Give the service with what a crash left behind finished or undone, its streams not yet open."""
    options, clock = parts.options, SystemClock()
    names = [source.name for source in parts.sources]
    stuck = (await reconcile(parts.catalog, parts.storage, streams=names)).stuck
    parts.database.recognise(await parts.catalog.seen())  # what was adopted may be of a later life
    for agent in parts.agents:
        await agent.prepare(parts.volumes)
    cluster = Protected(
        parts.logs,
        parts.volumes,
        parts.agents,
        parts.storage,
        parts.catalog,
        clock,
        options.points,
        options.agent.deadline_seconds,
        leftovers=stuck,
    )
    settled = {name: await parts.catalog.settled(name) for name in names}
    window = Window(parts.sources, settled, Rules(options.rules).judge)
    agenda = await agenda_of(cluster)
    return Service(parts, cluster, window, agenda, Upkeep(parts, window, agenda, _room(parts)), clock.now())


async def work(service: Service, ready: Callable[[Service], None] | None = None) -> None:
    """Run everything until the main path ends; raises the first error that no waiting can help."""
    parts, window = service.parts, service.window
    try:
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(_keep_journal(service), name="journal")]
            await _journal_begun(service)
            background += [tasks.create_task(window.follow(source.name), name=source.name) for source in parts.sources]
            background += [tasks.create_task(act, name=name) for name, act in service.upkeep.acts()]
            background.append(tasks.create_task(serve(parts.options.state_folder, service.answer), name="control"))
            await _streams_open(service)
            main = tasks.create_task(protect(service.cluster, window, service.agenda), name="protect")
            background.append(tasks.create_task(_give_up_after_grace(service, main), name="grace"))
            background.append(tasks.create_task(_announce(service, ready), name="announce"))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([main])
            for task in background:
                task.cancel()
    except* TrigpointError as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[TrigpointError]) -> TrigpointError:
    """Give the first error of a group, however deep."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _give_up_after_grace(service: Service, main: asyncio.Task[None]) -> None:
    """Cancel the main path where a stop has waited long enough for the round at hand."""
    await service.stop_asked.wait()
    await asyncio.sleep(GRACE_SECONDS)
    log.warning("the round at hand did not end within %.0f s: it is given up; the next start undoes it", GRACE_SECONDS)
    main.cancel()


async def _keep_journal(service: Service) -> None:
    """Keep the journal; where it cannot go on, say so loudly and try again, since points still have their worth."""
    what = "the journal is not kept"
    while True:
        runs = asyncio.get_running_loop().call_later(JOURNAL_RETRY_SECONDS, service.upkeep.troubles.pop, what, None)
        try:
            await service.parts.journal.run()
        except (JournalError, OSError) as error:
            service.upkeep.troubles[what] = str(error)
            log.error("%s: commits between points cannot be restored exactly: %s", what, error)
        finally:
            runs.cancel()
        await asyncio.sleep(JOURNAL_RETRY_SECONDS)


async def _journal_begun(service: Service) -> None:
    """Wait until the journal has begun, so that the first base is followed by log; not for ever, nor past a stop."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(JOURNAL_START_SECONDS):
            while not service.agenda.stopping and not await _has_begun(service.parts.journal):  # noqa: ASYNC110 - a folder that another program fills
                await asyncio.sleep(0.05)
            return
    log.error("the journal has not begun within %.0f s; points are taken all the same", JOURNAL_START_SECONDS)


async def _has_begun(journal: Journal) -> bool:
    try:
        return await journal.begun()
    except (JournalError, OSError):  # shown by its audit
        return False


async def _streams_open(service: Service) -> None:
    """Wait until every stream says where it stands: the first point then settles them all; likewise.

    One that cannot be opened, as of a database that was dropped, is waited for no longer than it may be so in passing.
    """
    loop = asyncio.get_running_loop()
    began, window = loop.time(), service.window
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STREAMS_START_SECONDS):
            while not service.agenda.stopping and not window.begun:
                if loop.time() - began > IN_PASSING_SECONDS and window.begun_but_for_troubles:
                    break
                await window.more(loop.time() + 1)
            else:
                return
    missing = "; ".join(f"stream {name}: {why}" for name, why in window.troubles().items())
    log.error("not every stream is open after %.0f s; points are taken all the same: %s", loop.time() - began, missing)


async def _announce(service: Service, ready: Callable[[Service], None] | None) -> None:
    """Say once that commits are protected from now on: the streams are open and a base stands."""
    while (base := service.agenda.base) is None or not service.protects:
        await service.window.more(asyncio.get_running_loop().time() + 1)
    await _keep_layout(service.parts)
    log.info("protecting %s: the newest base is point %d", service.parts.options.name, base.number)
    if ready is not None:
        ready(service)


async def _keep_layout(parts: Parts) -> None:
    """Keep the layout beside the snapshots too, whose folder may have come with the first of them."""
    with contextlib.suppress(OSError):  # the watch over the places tries it again, and shows it
        await asyncio.to_thread(keep_layout, parts.layout, layout_files(parts.options))


async def give_up(room: Room, request: dict[str, Any]) -> GivenUp:
    """Give up every point older than the one called `before` in a request; see `expire.give_up_before`."""
    return await room.give_up_before(request.get("before", ""), dry_run=bool(request.get("dry_run")))


def _room(parts: Parts) -> Room:
    return Room(parts.catalog, parts.storage, parts.journal)


async def answer_alone(options: Options, request: dict[str, Any]) -> dict[str, Any]:
    """Give the answer that a running service would give to a request, where none runs.

    Raises:
        TrigpointError: it cannot be done; or it is one that only a running service answers.
    """
    async with alone(options, past=request.get("do") == "expire") as parts:
        match request.get("do"):
            case "point":
                return {"point": data(await _take_one(parts, _note(request)))}
            case "expire":
                if not request.get("dry_run"):  # which changes nothing
                    with for_an_operator():
                        await reconcile(parts.catalog, parts.storage)
                return {"expired": data(await give_up(_room(parts), request))}
            case other:
                raise TrigpointError(f"only a running service answers {other!r}", hint="start it: trigpoint run")


async def _take_one(parts: Parts, note: str) -> RecoveryPoint:
    """Take one point of what is there now, with the log that leads to it; gives it sealed or failed.

    Where no log leads to it, as before any point or behind a hole, it is the base that another one is taken behind.
    """
    await preflight(parts, force=False)
    service = await begin(parts)
    keeping = asyncio.create_task(_keep_journal(service), name="journal")
    try:
        await _journal_begun(service)
        for _ in range(2):
            point = await take(service.cluster, Cause.DEMAND, Collected((), {}), note)
            if point.state is not State.SEALED or await _is_led_to(point, parts):
                break
        else:
            log.warning("point %d is sealed, and no log leads to it: --to-point will refuse it", point.number)
    except asyncio.CancelledError as error:
        error.add_note("a point that was begun is not done: the next start settles it, and so does trigpoint reconcile")
        raise
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
    await _keep_layout(parts)
    return point


async def _is_led_to(point: RecoveryPoint, parts: Parts) -> bool:
    """Wait until the log is kept that leads to a point, which says so where that lasts; gives whether any can come."""
    if not parts.journal.replays:
        return True
    try:
        target = await resolve(Named(point=point.number), parts.catalog, parts.journal)
        await prepare(target, parts.site, wait_seconds=LOG_SECONDS)
    except RestoreError as error:
        if not error.retryable:
            return False
        log.warning("point %d is sealed, and its log is not kept yet: %s", point.number, error)
    return True
