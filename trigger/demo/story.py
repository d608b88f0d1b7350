"""What happens in a demo, in order: ground, bank, service, load, accident, restore, proof."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.databases.postgres.programs import Programs
from trigger.catalog.catalog import Catalog
from trigger.demo import server, service
from trigger.demo.bank import ACCOUNTS, CLERKS, Accident, Bank, read_books, transaction_status
from trigger.demo.figures import Spread, spreads
from trigger.demo.place import Place, dismantle, prepare
from trigger.demo.proof import Check, Evidence, checks
from trigger.demo.screen import Screen
from trigger.errors import TrigpointError
from trigger.model import RecoveryPoint, State
from trigger.restore.clones import to_its_end

_POLL_SECONDS = 0.2
_AFTERMATH_SECONDS = 1.0
"""How long the bank works on after the accident, so that there is something that must not come back."""
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked of a demo."""

    folder: Path | None
    seconds: float
    storage: str
    keep: bool


@dataclass(frozen=True, slots=True)
class Told:
    """What a demo found."""

    place: Place
    programs: Programs
    accident: Accident
    restore: dict[str, Any]
    restore_seconds: float
    checks: tuple[Check, ...]
    points: int
    spreads: dict[str, Spread]
    commits: int
    commits_per_second: float

    @property
    def proven(self) -> bool:
        """Whether everything held that must."""
        return all(check.held for check in self.checks)


async def play(wishes: Wishes, screen: Screen) -> Told:
    """Play the demo and give what was found; nothing of it is left behind unless it is to be kept.

    Raises:
        TrigpointError: it could not be played to its end.
    """
    place, why = await prepare(wishes.folder, wishes.storage)
    removed = f"{place.folder} is removed, with all that ran in it"
    try:
        told = await _play(place, why, wishes.seconds, screen)
    except BaseException as error:
        await to_its_end(end(place.folder), removed)
        error.add_note(removed)
        raise
    if not wishes.keep:
        await to_its_end(end(place.folder), removed)
    return told


async def end(folder: Path) -> None:
    """End everything of the demo in `folder` and remove it."""
    place = Place(folder, "", (0, 0))
    if place.config.exists():
        with contextlib.suppress(TrigpointError):  # what is not dropped in order is killed and removed all the same
            await service.drop_clones(place)
    await dismantle(folder)


async def _play(place: Place, why: str, seconds: float, screen: Screen) -> Told:
    loop = asyncio.get_running_loop()
    screen.chapter(
        "A PostgreSQL of its own", f"in {place.folder}, snapshots by {place.storage}" + (f" ({why})" if why else "")
    )
    programs = await server.programs_for(place)
    await server.start(place, programs)
    bank = Bank(server.conninfo(place))
    await bank.open()
    service.write_config(place, programs)

    screen.chapter("Trigpoint protects it", "trigpoint run")
    async with service.started(place), _catalog(place) as catalog:
        screen.chapter("A bank at work", f"{ACCOUNTS} accounts, {CLERKS} clerks, and a payroll that is marked")
        work = asyncio.create_task(bank.work())
        began = loop.time()
        try:
            await _watch(catalog, bank, work, seconds, screen)
            screen.chapter("The accident", "DELETE FROM account;   -- and no WHERE, committed")
            accident = await bank.accident()
            screen.line(f"{accident.rows} accounts gone in transaction {accident.xid}", "red")
            await asyncio.sleep(_AFTERMATH_SECONDS)
        finally:
            bank.close()
            await work
        rate = bank.commits / (loop.time() - began)
        await _outcomes(place)  # a slow storage may still be busy with the point that holds the accident

        screen.chapter("Back to the commit right before it", f"trigpoint restore --before-xid {accident.xid}")
        before = loop.time()
        restored = await service.restore_before(place, accident.xid)
        restore_seconds = loop.time() - before
        screen.line(
            f"done in {restore_seconds:.1f} s, from point {restored['base']}; its server runs beside production"
        )

        screen.chapter("The proof", "by the bank's own books")
        evidence = await _look(place, bank, accident, str(restored["conninfo"]))
        found = checks(accident, evidence)
        for check in found:
            screen.check(check.claim, check.seen, held=check.held)
        points = await catalog.points(states={State.SEALED})
    return Told(
        place, programs, accident, restored, restore_seconds, found, len(points), spreads(points), bank.commits, rate
    )


@contextlib.asynccontextmanager
async def _catalog(place: Place) -> AsyncIterator[Catalog]:
    """Give the service's catalog, to read what it writes."""
    catalog = await Catalog.open(place.state / "catalog.sqlite")
    try:
        yield catalog
    finally:
        await catalog.close()


async def _watch(catalog: Catalog, bank: Bank, work: asyncio.Task[None], seconds: float, screen: Screen) -> None:
    """Show every point as it is taken, for `seconds`."""
    loop = asyncio.get_running_loop()
    began, shown = loop.time(), 0
    with screen.watching():
        while (passed := loop.time() - began) < seconds:
            for point in await _points_behind(catalog, shown):
                shown = point.number
                screen.point(point, await catalog.commits_of(point.number))
            screen.pulse(f"{bank.commits} commits, {bank.commits / max(passed, 0.1):.0f} a second; {shown} points")
            await asyncio.wait([work], timeout=_POLL_SECONDS)
            if work.done():
                await work
                raise TrigpointError("the bank closed by itself")


async def _points_behind(catalog: Catalog, number: int) -> list[RecoveryPoint]:
    """Give the points behind `number` up to the first that is still being made, the oldest first."""
    newest = await catalog.points(limit=20)
    behind = sorted((point for point in newest if point.number > number), key=lambda point: point.number)
    unfinished = next((index for index, point in enumerate(behind) if point.state is State.OPEN), len(behind))
    return behind[:unfinished]


async def _look(place: Place, bank: Bank, accident: Accident, clone: str) -> Evidence:
    """Give what clone, production and catalog say once the service has caught up."""
    outcomes = await _outcomes(place)
    return Evidence(
        clone=await read_books(clone),
        production=await read_books(bank.conninfo),
        accident_in_clone=await transaction_status(clone, accident.xid),
        accident_in_production=await transaction_status(bank.conninfo, accident.xid),
        last_transfer_in_clone=await transaction_status(clone, accident.last_transfer_xid),
        commits_made=bank.commits,
        commits_recorded=outcomes,
    )


async def _outcomes(place: Place) -> dict[str, int]:
    """Give how many commits have which outcome, once none waits for its point any more."""
    async with asyncio.timeout(_SETTLE_SECONDS):
        while True:
            found = await service.status(place)
            if found and not found["pending_commits"]:
                return dict(found["totals"]["commits"])
            await asyncio.sleep(_POLL_SECONDS)
