"""Put a proven clone where production lies: one that is made for it, or one that is there already.

All that stands in the way is looked for before anything is done, and can be asked for alone (`prepare_in_place`). How
the volumes are exchanged, and exchanged back, is told in `trigger.restore.swap`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trigger.errors import NotFoundError, RestoreError
from trigger.failpoint import reached
from trigger.model import Finding, Severity
from trigger.ports import Clone, Progress
from trigger.position import History
from trigger.replay import Target
from trigger.restore.clone_records import CloneRecord, new_name
from trigger.restore.clones import CloneState, CloneStatus, Site, remove_after, status_of, whole
from trigger.restore.exchange import Place, Rename, blocked
from trigger.restore.histories import known_histories
from trigger.restore.losses import Losses, Replaced, behind_clone, behind_replaced, behind_target, replaced
from trigger.restore.obstacles import copy_of, immovable, misplaced, obstacles, require_at_rest, require_none
from trigger.restore.planner import Plan
from trigger.restore.restore import Report, prepare, require_room, restore
from trigger.restore.swap import (
    TIME,
    Swap,
    begin,
    cut_off,
    described,
    left_to_resume,
    left_to_undo,
    resumable,
    undoable,
)
from trigger.volumes import is_of, listed, volumes_of


@dataclass(frozen=True, slots=True)
class InPlacePlan:
    """How a state would be put in production's place, what would be lost by it, and what stands in the way."""

    plan: Plan
    """How it would be reached; its keys stand here, beside the others."""
    losses: Losses
    refused: tuple[Finding, ...]
    """All for which it would be refused as things are now."""

    SPREAD: ClassVar = "plan"


@dataclass(frozen=True, slots=True)
class ClonePlan:
    """What would be lost if a clone took production's place, and what stands in the way."""

    record: CloneRecord
    used: int | None
    """How many transactions it began by itself since it was proven, autovacuum's too; null where nobody can tell."""
    losses: Losses
    refused: tuple[Finding, ...]
    """All for which it would be refused as things are now."""


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """How a restore in place would be taken back, or finished, and what stands in the way."""

    swap: Swap
    renames: tuple[Rename, ...]
    """What would be renamed, in order."""
    refused: tuple[Finding, ...]
    """All for which it would be refused as things are now."""


async def prepare_undo(name: str, site: Site) -> SwapPlan:
    """Give how a restore in place would be taken back; nothing is changed. Raises as `undoable` does."""
    swap = await undoable(name, site)
    return await _planned(swap, left_to_undo(swap), site)


async def prepare_resume(name: str, site: Site) -> SwapPlan:
    """Give how a restore in place would be finished; nothing is changed. Raises as `resumable` does."""
    swap = await resumable(name, site)
    return await _planned(swap, await left_to_resume(swap, site), site)


async def _planned(swap: Swap, renames: Sequence[Rename], site: Site) -> SwapPlan:
    return SwapPlan(swap, tuple(renames), (*await site.recovery.at_work(site.volumes), *blocked(renames)))


async def prepare_in_place(target: Target, site: Site, *, replacing: bool = False) -> InPlacePlan:
    """Give how `target` would be put in production's place, with all that stands in the way; nothing is changed.

    Another cluster than the target's that lies there stands in the way too, unless the state is told to be `replacing`
    one.

    Raises:
        RestoreError: the target cannot be reached at all; the message has all else that stands in the way too.
    """
    refused = await _in_the_way(site)
    try:
        plan = await prepare(target, site)
    except RestoreError as error:
        require_none([_refusal("target", error), *refused])
        raise
    try:
        await require_room(plan, site)
    except RestoreError as error:
        refused.append(_refusal("room", error))
    refused += await misplaced(plan.base, site)
    if not is_of(plan.base, site.volumes):
        refused.append(_others(f"point {plan.base.number}", listed(volumes_of(plan.base, ())), site))
    found = await replaced(target.history.system, site, copy_of(plan.base, site.volumes))
    losses = await (behind_target(target, site) if found is None else behind_replaced(found, site))
    return InPlacePlan(plan, losses, (*refused, *_unasked(found, replacing=replacing)))


def _unasked(found: Replaced | None, *, replacing: bool) -> list[Finding]:
    return [] if found is None or replacing else [found.refusal]


def _refusal(subject: str, error: RestoreError) -> Finding:
    return Finding(subject, Severity.REFUSED, error.message, error.hint)


async def prepare_clone(name: str, site: Site, *, replacing: bool = False) -> ClonePlan:
    """Give what would be lost if the clone `name` took production's place, with all that stands in the way.

    Another cluster that lies there is as for `prepare_in_place`.

    Raises:
        RestoreError: there is no such clone, or it was never proven.
    """
    record, clone = await _proven(name, site)
    refused = [*await _in_the_way(site), *await _of_clone(record, clone, site)]
    found = await _replaced_by(record, clone, site)
    losses = await (behind_clone(record, site) if found is None else behind_replaced(found, site))
    refused += _unasked(found, replacing=replacing)
    return ClonePlan(record, await site.recovery.used(clone), losses, tuple(refused))


async def _replaced_by(record: CloneRecord, clone: Clone, site: Site) -> Replaced | None:
    """Give which other cluster a clone would take the place of; None where its own record does not say what it is."""
    system = record.history.rpartition("/")[0]
    return await replaced(system, site, clone) if system else None


async def restore_in_place(
    target: Target, site: Site, *, progress: Progress, replacing: bool = False
) -> tuple[Report, Swap]:
    """Bring `target` back beside production, prove it, and put it where production lies; its server stays down.

    The clone's server is stopped cleanly and gets production's configuration back, as it was in the snapshot. The
    cluster goes on, on a timeline of its own, when its owner starts it. For `replacing` see `prepare_in_place`.

    Raises:
        TrigpointError: something stands in the way, or the restore failed; nothing has changed then. Where a rename
            failed or the process died between two, `swaps` shows it unfinished, and `resume` or `undo` ends it.
    """
    found = await replaced(target.history.system, site)
    require_none([*await _in_the_way(site), *_unasked(found, replacing=replacing)])
    require_none(await misplaced((await prepare(target, site)).base, site))
    report = await restore(target, site, progress=progress, name=new_name("in-place"))
    try:
        swap = await _ready(report.name, report.target.description, site)
    except BaseException as error:
        await remove_after(error, report.name, site)
        raise
    progress("put in place", 0, len(swap.places))
    return report, await begin(swap, site)


async def put_in_place(
    name: str, site: Site, *, progress: Progress, replacing: bool = False
) -> tuple[CloneStatus, Swap]:
    """Put the clone `name`, as it is now, where production lies; gives what it was. It is no clone any more then.

    Its server is stopped, and it gets production's configuration back, as above. What it was proven to hold was looked
    at when it was made; what was written to it since goes with it.

    Raises:
        TrigpointError: there is no such clone, it was never proven, or something stands in the way; production has not
            changed then, and the call can be repeated. Else as for `restore_in_place`.
    """
    record, clone = await _proven(name, site)
    unasked = _unasked(await _replaced_by(record, clone, site), replacing=replacing)
    require_none([*await _in_the_way(site), *await _of_clone(record, clone, site), *unasked])
    status = await status_of(name, site)
    try:
        swap = await _ready(name, record.target, site)
    except asyncio.CancelledError as error:
        error.add_note(f"production is as it was, and clone {name} is there; its server may be stopped")
        raise
    progress("put in place", 0, len(swap.places))
    return status, await begin(swap, site)


async def _in_the_way(site: Site) -> list[Finding]:
    return [*(swap.refusal for swap in await cut_off(site)), *await obstacles(site)]


async def _proven(name: str, site: Site) -> tuple[CloneRecord, Clone]:
    """Give a clone that was proven; raises `RestoreError` for another."""
    status = await status_of(name, site)
    if status.record is None or status.state not in (CloneState.STOPPED, CloneState.RUNNING):
        raise RestoreError(
            f"clone {name} is {status.state}, so nobody knows what it holds",
            hint=f"drop it (trigpoint clones drop {name}), and restore in place without it",
        )
    return status.record, await whole(name, site)


async def _of_clone(record: CloneRecord, clone: Clone, site: Site) -> list[Finding]:
    """Give what keeps this clone from taking the place: where it lies, and which timeline it goes on on."""
    copies = dict(clone.paths)
    found = await _of_other_volumes(clone, site)
    for volume in site.volumes:
        if volume.name in copies:
            fixed = await asyncio.to_thread(immovable, copies[volume.name], Path(volume.path).parent)
            found += [fixed] if fixed is not None else []
    found += await site.recovery.unfit(clone, site.volumes)
    if not record.history:
        words = f"clone {clone.name} was made by an earlier version, which did not note its timeline"
        return [*found, Finding(clone.name, Severity.REFUSED, words, _ANEW)]
    known = await known_histories(site.catalog, site.journal)
    kinds = {history.kind for history in known}
    own = next((History.parse(record.history, kind) for kind in kinds), None)
    if own is not None and any(one.is_of_system(own) and one.branch == own.branch for one in known):
        words = f"clone {clone.name} goes on in {own}, and production has been there since the clone was made"
        found.append(Finding(clone.name, Severity.REFUSED, words, _ANEW))
    return found


async def _of_other_volumes(clone: Clone, site: Site) -> list[Finding]:
    """Give that a clone is a copy of other volumes than those in whose place it would be put."""
    base = None
    with suppress(NotFoundError):  # what expired long ago: the names of its volumes are known still
        base = await site.catalog.point(clone.point)
    alike = is_of(base, site.volumes) if base else {name for name, _ in clone.paths} == {v.name for v in site.volumes}
    theirs = listed(volumes_of(base, ())) if base else ", ".join(name for name, _ in clone.paths)
    return [] if alike else [_others(clone.name, theirs, site)]


def _others(what: str, theirs: str, site: Site) -> Finding:
    words = f"{what} is of the volumes {theirs}, and the configuration has {listed(site.volumes)}"
    return Finding(
        what, Severity.REFUSED, words, "let the configuration have those volumes; or restore beside and copy"
    )


_ANEW = "restore in place without it: a new clone has what is needed"


async def _ready(name: str, target: str, site: Site) -> Swap:
    """Stop a proven clone, make it fit to be production, and give the swap, checked but not begun."""
    clone = await whole(name, site)
    require_none(await _of_other_volumes(clone, site))
    copies = dict(clone.paths)
    began = site.clock.now().strftime(TIME)
    places = tuple(Place.of(volume.path, began, str(copies[volume.name])) for volume in site.volumes)
    for place in places:
        fixed = await asyncio.to_thread(immovable, Path(place.clone), Path(place.path).parent)
        require_none([fixed] if fixed is not None else [])
        for taken in (place.kept, place.restored):
            if os.path.lexists(taken):
                raise RestoreError(f"{taken} exists already", hint="move it away, or wait a second and try again")
    await require_at_rest(site)
    await site.recovery.stop(clone)
    lineage = await site.recovery.lineage(clone, site.volumes)
    await site.recovery.release(clone, site.volumes)
    reached("after-release")
    told = described(lineage) if lineage is not None else ""
    return Swap(began, target, name, places, finished=False, identity=clone.identity, lineage=told)
