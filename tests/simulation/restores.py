"""P2: what is brought back is exactly the state that was; what is promised is delivered, what goes is not missed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from connectors.memory import MemoryRecovery, MemoryStorage
from tests.simulation.truth import Key
from tests.simulation.wire import Violation, require
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog, Found
from trigger.errors import JournalError, RestoreError
from trigger.model import (
    Commit,
    CommitRecord,
    Extent,
    Outcome,
    RecoveryPoint,
    State,
    Volume,
)
from trigger.position import History, Lineage, Position
from trigger.replay import Replay, Target
from trigger.restore import locate, planner
from trigger.restore.target import Named, resolve

if TYPE_CHECKING:
    from tests.simulation.run import Simulation

PROMISES = 4
"""How many commits are looked for at the end of a run, and brought back where that is said to be possible."""


async def check_restores(simulation: Simulation, points: Sequence[RecoveryPoint]) -> None:
    """The planner's way to a random target brings back exactly that state; it refuses only where there is no way."""
    draw = random.Random(simulation.story.seed)
    truth = simulation.truth.commits()
    if not simulation.journal.replays:
        for point in (point for point in points if point.state is State.SEALED):
            await _check_as_cut(simulation, point, planner.plan(planner.own(point), points, (), _alone(point), 1e6))
        return
    extents = await simulation.journal.extents()
    for number in range(simulation.story.targets if truth else 0):
        target, wanted = await _target(simulation, draw, draw.choice(sorted(truth, key=str)))
        lineage = simulation.truth.lineage(target.history)
        try:
            plan = planner.plan(target, points, extents, lineage, 1e6, file_start=simulation.journal.file_start)
        except RestoreError as refusal:
            await _check_refusal(simulation, points, target, wanted, refusal)
            continue
        await _check_plan(simulation, plan, wanted, f"clone-{number}")


def _alone(point: RecoveryPoint) -> Lineage:
    return Lineage(point.floor.history)


async def _check_plan(simulation: Simulation, plan: planner.Plan, wanted: Sequence[Commit], name: str) -> None:
    """A plan starts from a base of the target's own log, and leads to the state that was wanted."""
    target, ceiling = plan.target, plan.mark.ceiling
    lives = {(one.history.incarnation, one.history.system) for one in (plan.mark.floor, ceiling) if one}
    same = lives == {(target.history.incarnation, target.history.system)}
    require(same, f"P2: {target.description}: point {plan.base.number} is of another life of the log, {ceiling}")
    try:
        got = await _restore(simulation, plan.base, plan.replay, name)
    except (RestoreError, JournalError) as error:
        raise Violation(f"P2: {target.description}: the plan from point {plan.base.number} fails: {error}") from error
    _compare(target, plan.base, got, wanted)


async def _check_as_cut(simulation: Simulation, point: RecoveryPoint, plan: planner.Plan) -> None:
    """A point of a source without a log comes back as it was cut, with all commits that it says it has."""
    try:
        got = await _restore(simulation, plan.base, plan.replay, f"cut-{point.number}")
    except (RestoreError, JournalError) as error:
        raise Violation(f"P2: point {point.number} does not come back: {error}") from error
    told, kept = [_told(commit) for commit in got], simulation.world.kept[point.id]
    cut = max((content for _, content in kept.cuts.values()), key=lambda one: one.upto)
    mine = {(str(record.name), record.start, record.time_us) for record in tag.decode(kept.tag or "")[1]}
    require(
        mine <= {*told} and told == [*map(_told, cut.commits())], f"P2: point {point.number} comes back with {told}"
    )


async def _target(simulation: Simulation, draw: random.Random, key: Key) -> tuple[Target, list[Commit]]:
    """Give a target, in a history of which somebody could know, and the commits that its state holds."""
    commit = simulation.truth.commits()[key]
    inclusive = draw.random() < 0.7
    position = Position(key.history, commit.end)
    later = [one for one in simulation.truth.branches(key.history) if simulation.truth.includes(one, position)]
    history = draw.choice([one for one in later if await _is_known(simulation, one)] or [key.history])
    limit = commit.end if inclusive else commit.start
    return target_of(commit, inclusive, history), simulation.truth.state(history, limit)


async def _is_known(simulation: Simulation, history: History) -> bool:
    """Whether the past of a history is kept: of a server that came and went while nobody looked, it is not."""
    try:
        await simulation.journal.lineage(history)
    except JournalError:
        return False
    return True


def target_of(commit: Commit, inclusive: bool, history: History) -> Target:
    """Give the state right after a commit, or right before it, in a history."""
    record = CommitRecord(
        commit.stream, commit.name, commit.start, commit.end, commit.time_us, commit.markers, Outcome.COALESCED
    )
    words = f"{'commit' if inclusive else 'before transaction'} {commit.name} ({commit.start}) in {history}"
    if inclusive:
        return Target(history, commit.start, inclusive, words, commit=record)
    return Target(history, commit.start, inclusive, words, reach=commit.end)  # seen whole, or not at all


def _told(commit: Commit) -> tuple[str, int, int]:
    return str(commit.name), commit.start, commit.time_us


def _compare(target: Target, base: RecoveryPoint, got: Sequence[Commit], wanted: Sequence[Commit]) -> None:
    mine, theirs = [*map(_told, got)], [*map(_told, wanted)]
    more = sorted(set(mine) - set(theirs))
    fewer = sorted(set(theirs) - set(mine))
    require(mine == theirs, f"P2: {target.description} from point {base.number}: {more} too many, {fewer} too few")


async def _restore(simulation: Simulation, base: RecoveryPoint, replay: Replay, name: str) -> list[Commit]:
    """Restore for real, in memory; gives the commits that came back, in log order."""
    storage = MemoryStorage(simulation.world, capabilities=simulation.story.capabilities)
    folder = Path(f"/memory/log/{name}")
    clone = await storage.clone(base.id, name, _silent)
    try:
        await simulation.journal.stage(replay, folder, _silent)
        volumes = [Volume(volume, f"/{volume}") for volume, _ in clone.paths]
        running = await MemoryRecovery(simulation.world).start(clone, volumes, replay, folder, _silent)
        return simulation.world.restored.pop(running.clone).commits
    finally:
        await storage.drop_clone(name)
        simulation.world.staged.pop(folder, None)


async def _check_refusal(
    simulation: Simulation,
    points: Sequence[RecoveryPoint],
    target: Target,
    wanted: Sequence[Commit],
    refusal: RestoreError,
) -> None:
    """Try every base by brute force: none may lead to the target."""
    for base in points:
        mark = base.mark_in(target.history)
        if base.state is not State.SEALED or mark is None:
            continue
        for as_cut in (False, True):
            if as_cut and not _surely_ends_there(base, target):
                continue
            until = mark.log_from.at if as_cut else target.commit.end if target.commit else target.at or 0
            replay = Replay(target, mark.log_from, until, mark.bracket, as_cut)
            try:
                got = await _restore(simulation, base, replay, "brute-force")
            except (RestoreError, JournalError):
                continue
            exact = [*map(_told, got)] == [*map(_told, wanted)]
            if exact and _is_certain(base, target, simulation.truth.lineage(target.history)):
                raise Violation(
                    f"P2: {target.description} was refused ({refusal.message}), point {base.number} leads there"
                )


def _surely_ends_there(base: RecoveryPoint, target: Target) -> bool:
    mark, end = base.mark_in(target.history), target.commit.end if target.commit is not None else target.at
    if mark is None or mark.floor.history.incarnation != target.history.incarnation:
        return False
    return mark.ceiling == mark.floor and mark.floor.at == end and mark.bracket is None


def _is_certain(base: RecoveryPoint, target: Target, lineage: Lineage) -> bool:
    """Whether the records alone show that a base leads to the target; luck is no plan."""
    if _surely_ends_there(base, target):
        return True
    mark = base.mark_in(target.history)
    assert mark is not None
    limit = mark.bracket.stop if mark.bracket else mark.ceiling
    return limit is not None and limit.at <= (target.at or 0) and lineage.includes(limit)


# ---- what is promised


async def check_promises(simulation: Simulation, catalog: Catalog, outcomes: Sequence[Found]) -> None:
    """What `find` says can be brought back comes back by what it says; without a log it says nothing of the kind."""
    draw = random.Random(simulation.story.seed ^ 0x9047)
    asked = draw.sample(sorted(outcomes, key=str), min(PROMISES, len(outcomes)))
    for number, found in enumerate(asked):
        there = await locate.locate(catalog, simulation.journal, name=found.record.name, stream=found.record.stream)
        mine = [one for one in there if one.record == found.record and one.history == found.history]
        require(len(mine) == 1, f"find tells {len(mine)} times of {found}")
        if not simulation.journal.replays:
            said = mine[0].base is None and "no log is kept" in mine[0].reason
            require(said, f"P2: {found} is promised, and there is no log: {mine[0]}")
            await _check_taken_for(simulation, catalog, found)
        elif mine[0].base is not None:
            simulation.promises += 1
            target = await _resolved(simulation, catalog, mine[0])
            wanted = simulation.truth.state(found.history, found.record.end)
            points, extents = await catalog.bases(), await simulation.journal.extents()
            lineage = await simulation.journal.lineage(target.history)
            try:
                plan = planner.plan(target, points, extents, lineage, 1e6, file_start=simulation.journal.file_start)
            except RestoreError as refusal:
                raise Violation(f"P2: find promises {found} from point {mine[0].base}: {refusal}") from refusal
            require(plan.base.number == mine[0].base, f"P2: find promises point {mine[0].base} for {found}")
            await _check_plan(simulation, plan, wanted, f"promised-{number}")


async def _resolved(simulation: Simulation, catalog: Catalog, told: locate.Location) -> Target:
    """Give the target that a person who names a commit gets, by the option that `find` gives for its history."""
    record, option = told.record, told.aside.rpartition(" ")[2] or None
    assert record is not None
    assert told.history is not None
    try:
        return await resolve(Named(name=record.name, stream=record.stream, history=option), catalog, simulation.journal)
    except RestoreError as refusal:
        if "names" in refusal.message:  # an older copy counts on where it was: two commits bear one name
            return Target(told.history, record.start, True, f"commit {record.name}", commit=record)
        raise Violation(f"P2: find knows {told} by {option}, a restore does not: {refusal}") from refusal


async def _check_taken_for(simulation: Simulation, catalog: Catalog, found: Found) -> None:
    """Without a log a commit can be named for a restore where a point was taken for it, and else not."""
    named = Named(name=found.record.name, stream=found.record.stream)
    try:
        target = await resolve(named, catalog, simulation.journal)
    except RestoreError as refusal:
        gone = found.point is None or (await catalog.point(found.point)).state is not State.SEALED
        twins = await catalog.find(name=found.record.name, stream=found.record.stream)
        excused = gone or len(twins) > 1 or found.record.outcome is not Outcome.PROTECTED
        require(excused, f"P2: {found} was taken a point for, and is refused: {refusal}")
    else:
        require(bool(target.point), f"P2: without a log {found} is reached by {target}")


# ---- what goes


def check_thinning(
    simulation: Simulation, before: Sequence[RecoveryPoint], left: Sequence[RecoveryPoint], extents: Sequence[Extent]
) -> None:
    """What thinning took away is not missed: what could be restored with it can be restored from what is left.

    By the log that the journal held, and that it has not come to yet.
    """
    kept = {point.id for point in left}
    for cluster in simulation.world.clusters:
        newest = simulation.truth.present(cluster)
        if newest is not None:
            first = simulation.journal.file_start(Position(newest, cluster.book.first))
            held = max((extent.end for extent in extents if extent.history == newest), default=first)
            extents = [*extents, Extent(newest, held, max(held, cluster.flushed))]
    for gone in (point for point in before if point.id not in kept):
        for target in _around(simulation, gone):
            if _is_planned(simulation, target, before, extents):
                still = _is_planned(simulation, target, left, extents)
                require(still, f"P2: {target.description} was lost when point {gone.number} was thinned")


def check_release(
    simulation: Simulation, bases: Sequence[RecoveryPoint], before: Sequence[Extent], after: Sequence[Extent]
) -> None:
    """Log that was let go of is not missed: what could be restored from the bases that are kept still can be."""
    for base in bases:
        for target in _around(simulation, base):
            if _is_planned(simulation, target, bases, before):
                still = _is_planned(simulation, target, bases, after)
                require(still, f"P2: {target.description} was lost when old log was let go of")


def _around(simulation: Simulation, point: RecoveryPoint) -> list[Target]:
    """Give the states around the last commit that a point holds, and around the first that it does not, in each log."""
    found: list[Target] = []
    for mark in point.marks:
        assert mark.ceiling is not None
        history, truth = mark.ceiling.history, simulation.truth.commits()
        lineage = simulation.truth.lineage(history)
        log = [(key, commit) for key, commit in truth.items() if lineage.includes(Position(key.history, commit.end))]
        log = sorted((one for one in log if one[0].history.is_of_system(history)), key=lambda one: one[1].end)
        held = sum(commit.end <= mark.ceiling.at for _, commit in log)
        for key, commit in [*log[max(held - 1, 0) : held], *log[held : held + 1]]:
            found += [target_of(commit, inclusive, key.history) for inclusive in (True, False)]
    return found


def _is_planned(
    simulation: Simulation, target: Target, points: Sequence[RecoveryPoint], extents: Sequence[Extent]
) -> bool:
    lineage = simulation.truth.lineage(target.history)
    try:
        planner.plan(target, points, extents, lineage, 1e6, file_start=simulation.journal.file_start)
    except RestoreError:
        return False
    return True


def _silent(step: str, done: int, total: int) -> None:
    """Report no progress."""
