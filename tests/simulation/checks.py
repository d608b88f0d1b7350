"""The checkers: judge what a run left behind against the promises P1, P2, P3 and P5 of `trigger/DESIGN.md`.

They know the truth (every commit, what each snapshot really holds) and take nothing from the code under test but the
records it wrote. P4's half that can be seen here, the order of catalog and acknowledge, is checked at every call.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from connectors.memory import SEGMENT_BYTES, Content, MemoryJournal, MemoryRecovery, MemoryStorage
from connectors.memory.cluster import FIRST_LSN
from tests.simulation.wire import Violation
from trigger.catalog import reconcile, tag
from trigger.catalog.catalog import Catalog, Found
from trigger.errors import JournalError, RestoreError
from trigger.model import (
    Changes,
    Commit,
    CommitRecord,
    Extent,
    Gap,
    Outcome,
    RecoveryPoint,
    State,
    StopKind,
    Target,
    Volume,
)
from trigger.position import Lineage, Lsn, Position
from trigger.restore import planner

if TYPE_CHECKING:
    from tests.simulation.run import Simulation

T = TypeVar("T")

EVERYTHING = 1_000_000


async def judge(simulation: Simulation) -> None:
    """Raise `Violation` for the first promise that is broken."""
    catalog = await Catalog.open(simulation.engine, run=_inline)
    storage = MemoryStorage(simulation.world, capabilities=simulation.story.capabilities)
    await reconcile.reconcile(catalog, storage)
    points = await catalog.points(newest_first=False)
    outcomes = await catalog.find(limit=EVERYTHING)
    check_completeness(simulation, points, outcomes, await catalog.gaps())
    check_points(simulation, points, outcomes)
    check_agreement(simulation, points)
    await check_second_pass(catalog, storage)
    await check_restores(simulation, points)


async def judge_pass(simulation: Simulation, stuck: Collection[str]) -> None:
    """Raise `Violation` where a pass of reconcile that has just ended left something to do but what it says is stuck.

    At the end of a run, where nothing goes wrong any more, nothing may be stuck.
    """
    catalog = await Catalog.open(simulation.engine, run=_inline)
    check_agreement(simulation, await catalog.points(), excused=simulation.lost_snapshots, stuck=stuck)


async def _inline(work: Callable[[], T]) -> T:
    return work()


def require(holds: bool, message: str) -> None:
    """Raise `Violation` with `message` unless it holds."""
    if not holds:
        raise Violation(message)


def describe(commit: Commit) -> str:
    """Give a commit in a few words."""
    return f"commit {commit.xid} of {commit.stream} at {commit.position}"


# ---- P1


def check_completeness(
    simulation: Simulation, points: Sequence[RecoveryPoint], outcomes: Sequence[Found], gaps: Sequence[Gap]
) -> None:
    """Every qualifying commit has exactly one outcome or lies in a gap; no gap says more than was lost."""
    truth = {commit.xid: commit for commit in _all_commits(simulation)}
    matters = simulation.story.rules.matters
    by_xid: dict[int, Found] = {}
    for found in outcomes:
        xid = found.record.xid
        require(xid not in by_xid, f"P1: transaction {xid} has two outcomes: {by_xid.get(xid)} and {found}")
        require(xid in truth, f"P1: {found} never was")
        require(matters(truth[xid]), f"P1: {found} does not qualify")
        _check_record(truth[xid], found)
        by_xid[xid] = found
    present = [commit for commit in simulation.truth() if commit.stream]  # no stream shows a mark of ours
    for commit in present:
        if matters(commit) and commit.end > simulation.covered_from[commit.stream]:
            _check_outcome(simulation, commit, by_xid.get(commit.xid), gaps)
    left = set(truth) - {commit.xid for commit in present}
    for commit in simulation.lives[-1].delivered:
        if commit.xid in left and matters(commit):
            require(commit.xid in by_xid, f"P1: {describe(commit)} was left behind by a failover, without a word")
    require(all(gap.closed_by for gap in gaps), f"a gap was never closed: {[gap for gap in gaps if not gap.closed_by]}")


def _check_outcome(simulation: Simulation, commit: Commit, found: Found | None, gaps: Sequence[Gap]) -> None:
    inside = [gap for gap in gaps if lies_in(simulation, commit, gap)]
    if found is None:
        require(bool(inside), f"P1: {describe(commit)} has no outcome and lies in no gap")
        return
    require(found.record.outcome is not Outcome.MISSED, f"P1: {describe(commit)} is missed, but it is there")
    require(not inside, f"P1: {describe(commit)} was seen, yet a gap claims it: {inside}")


def _check_record(commit: Commit, found: Found) -> None:
    record = found.record
    same = (record.stream, record.start, record.end, record.time_us, record.markers, found.history) == (
        commit.stream,
        commit.start,
        commit.end,
        commit.time_us,
        commit.markers,
        commit.history,
    )
    require(same, f"P1: the record of {describe(commit)} is wrong: {found}")


def lies_in(simulation: Simulation, commit: Commit, gap: Gap) -> bool:
    """Whether a commit lies behind the beginning of a gap and at or before its end."""
    if commit.stream != gap.stream:
        return False
    return is_past(simulation, commit, gap.until) and not is_past(simulation, commit, gap.after)


def is_past(simulation: Simulation, commit: Commit, place: Position) -> bool:
    """Whether a commit lies at or before a place, in its lineage."""
    lineage = simulation.cluster.lineage(place.history.timeline)
    if commit.history == place.history:
        return commit.end <= place.at
    return commit.history.timeline < place.history.timeline and lineage.includes(commit.position)


def _all_commits(simulation: Simulation) -> list[Commit]:
    """Give the commits of all timelines, the abandoned ones too."""
    return [entry.commit for log in simulation.cluster.logs.values() for entry in log if entry.commit is not None]


# ---- P3


def check_points(simulation: Simulation, points: Sequence[RecoveryPoint], outcomes: Sequence[Found]) -> None:
    """A sealed point holds at least its floor and at most its ceiling, and its commits are what it says."""
    of_point: dict[int, list[Found]] = {}
    for found in outcomes:
        if found.point is not None:
            of_point.setdefault(found.point, []).append(found)
    too_early = [said for life in simulation.lives for said in life.too_early]
    require(not too_early, f"P3: {too_early}")
    for point in points:
        mine = of_point.get(point.number, [])
        if point.state is State.SEALED:
            _check_snapshot(simulation, point)
        if point.state in (State.SEALED, State.EXPIRING, State.EXPIRED):
            _check_commits(simulation, point, mine)
        elif mine:
            lost = point.id in simulation.lost_snapshots
            require(lost, f"P3: point {point.number} is {point.state}, yet it protects {mine}")


def _check_snapshot(simulation: Simulation, point: RecoveryPoint) -> None:
    kept = simulation.world.kept.get(point.id)
    require(kept is not None and kept.complete, f"P3: sealed point {point.number} has no whole snapshot")
    assert kept is not None
    require(bool(point.flushes) and len(point.snapshots) == len(kept.cuts), f"P3: {point.number} lacks proofs")
    require(_ends_a_record(simulation, point.floor), f"P3: the floor of point {point.number} lies within a record")
    ceiling = point.ceiling
    require(ceiling is not None, f"P3: sealed point {point.number} has no ceiling")
    assert ceiling is not None
    highest = max(ceiling.at, point.bracket.stop.at) if point.bracket else ceiling.at
    for _, content in kept.cuts.values():
        holds = content.lineage.includes(point.floor) and content.upto >= point.floor.at
        require(holds, f"P3: the snapshot of point {point.number} ends at {content}, before its floor {point.floor}")
        require(
            content.upto <= highest and _leads_to(content, ceiling),
            f"P3: the snapshot of point {point.number} holds {content}, beyond its ceiling {ceiling}",
        )
        require(point.bracket is not None or not content.torn, f"P3: point {point.number} is torn, without a bracket")
    if kept.tag is not None:
        sealed, _ = tag.decode(kept.tag)
        require(sealed.state is State.SEALED, f"P5: point {point.number} is sealed, its tag says {sealed.state}")


def _ends_a_record(simulation: Simulation, place: Position) -> bool:
    cluster = simulation.cluster
    log, forks = cluster.logs[place.history.timeline], cluster.forks[place.history.timeline]
    index = bisect_left(log, place.at, key=lambda entry: entry.end)
    if index < len(log) and log[index].end == place.at:
        return True
    return place.at == (forks[-1][1] if forks else FIRST_LSN)


def _leads_to(content: Content, ceiling: Position) -> bool:
    return content.lineage.history == ceiling.history


def _check_commits(simulation: Simulation, point: RecoveryPoint, mine: Sequence[Found]) -> None:
    require(
        len(mine) == point.commits,
        f"P1: point {point.number} says that it protects {point.commits} commits, there are {len(mine)}",
    )
    protected = [found.record for found in mine if found.record.outcome is Outcome.PROTECTED]
    newest = max(mine, key=lambda found: found.record.end, default=None)
    require(
        protected == ([newest.record] if newest else []),
        f"P1: point {point.number} protects {protected}, its newest commit is {newest}",
    )
    for found in mine:
        require(
            is_past(simulation, _commit_of(simulation, found), point.floor),
            f"P3: point {point.number} with floor {point.floor} does not hold {found}",
        )
    totals: dict[str, Counter[str]] = {}
    for found in mine:
        commit = _commit_of(simulation, found)
        for table, changes in commit.tables.items():
            totals.setdefault(f"{commit.stream}.{table}", Counter()).update(Changes(*changes)._asdict())
    wanted = {name: Changes(**counted) for name, counted in totals.items()}
    require(wanted == dict(point.tables), f"point {point.number} changed {wanted}, it says {dict(point.tables)}")


def _commit_of(simulation: Simulation, found: Found) -> Commit:
    log = simulation.cluster.logs[found.history.timeline]
    return next(entry.commit for entry in log if entry.commit is not None and entry.commit.xid == found.record.xid)


# ---- P5


def check_agreement(
    simulation: Simulation,
    points: Sequence[RecoveryPoint],
    excused: Collection[str] = (),
    stuck: Collection[str] = (),
) -> None:
    """No orphan, no phantom, no open point after one pass.

    Excused are snapshots that went while it was made; stuck are those that the storage would not let go of.
    """
    by_id = {point.id: point for point in points}
    for point in points:
        going = point.state is State.EXPIRING and point.id not in stuck
        require(point.state is not State.OPEN and not going, f"P5: point {point.number} is still {point.state}")
        require(
            point.state is not State.SEALED or point.id in simulation.world.kept or point.id in excused,
            f"P5: point {point.number} is a phantom",
        )
        gone = point.state is State.FAILED and point.failure == reconcile.GONE
        require(
            not gone or point.id in simulation.lost_snapshots,
            f"P5: point {point.number} is said to be gone, but nobody took its snapshot",
        )
    for kept in simulation.world.kept:
        owner = by_id.get(kept)
        reported = owner is not None and owner.failure == reconcile.GONE
        sealed = owner is not None and owner.state is State.SEALED
        require(sealed or reported or kept in stuck, f"P5: the snapshot {kept} is an orphan of {owner}")


async def check_second_pass(catalog: Catalog, storage: MemoryStorage) -> None:
    """One pass is enough: a second finds nothing to do."""
    again = await reconcile.reconcile(catalog, storage)
    require(not again, f"P5: a second pass still found {again}")


# ---- P2


async def check_restores(simulation: Simulation, points: Sequence[RecoveryPoint]) -> None:
    """The planner's way to a random target brings back exactly that state; it refuses only where there is no way."""
    draw = random.Random(simulation.story.seed)
    commits = _all_commits(simulation)
    if not commits:
        return
    journal = MemoryJournal(simulation.world)
    extents = await journal.extents()
    for number in range(simulation.story.targets):
        target, wanted = _target(simulation, draw, draw.choice(commits))
        lineage = simulation.cluster.lineage(target.history.timeline)
        try:
            plan = planner.plan(target, points, extents, lineage, 1e6, segment_bytes=SEGMENT_BYTES)
        except RestoreError as refusal:
            await _check_refusal(simulation, points, target, wanted, refusal)
            continue
        try:
            got = await _restore(simulation, plan.base, plan.target, plan.log_from, f"clone-{number}")
        except (RestoreError, JournalError) as error:
            raise Violation(
                f"P2: {target.description}: the plan from point {plan.base.number} fails: {error}"
            ) from error
        _compare(target, plan.base, got, wanted)


def _target(simulation: Simulation, draw: random.Random, commit: Commit) -> tuple[Target, list[int]]:
    """Give a target and the transactions that its state holds."""
    inclusive = draw.random() < 0.7
    later = [t for t in simulation.cluster.logs if simulation.cluster.lineage(t).includes(commit.position)]
    timeline = draw.choice(sorted(later))
    limit = commit.end if inclusive else commit.start
    held = [other.xid for other in simulation.truth(timeline) if other.end <= limit]
    return _target_of(simulation, commit, inclusive, timeline), held


def _target_of(simulation: Simulation, commit: Commit, inclusive: bool, timeline: int) -> Target:
    """Give the state right after a commit, or right before it, on a timeline."""
    history = simulation.cluster.lineage(timeline).history
    record = CommitRecord(
        commit.stream, commit.xid, commit.start, commit.end, commit.time_us, commit.markers, Outcome.COALESCED
    )
    words = f"{'commit' if inclusive else 'before transaction'} {commit.xid} ({commit.start}) on timeline {timeline}"
    if inclusive:
        return Target(history, StopKind.LSN, commit.start, inclusive, words, commit=record)
    return Target(history, StopKind.LSN, commit.start, inclusive, words, reach=commit.end)  # seen whole, or not at all


def _compare(target: Target, base: RecoveryPoint, got: Sequence[int], wanted: Sequence[int]) -> None:
    more = sorted(set(got) - set(wanted))
    fewer = sorted(set(wanted) - set(got))
    require(
        list(got) == list(wanted),
        f"P2: {target.description} from point {base.number}: {more} too many, {fewer} too few",
    )


def check_thinning(
    simulation: Simulation, before: Sequence[RecoveryPoint], left: Sequence[RecoveryPoint], extents: Sequence[Extent]
) -> None:
    """What thinning took away is not missed: what could be restored with it can be restored from what is left.

    By the log that the journal held, and that it has not come to yet.
    """
    kept = {point.id for point in left}
    newest = simulation.cluster.lineage().history
    held = max((extent.end for extent in extents if extent.history == newest), default=Lsn(0))
    extents = [*extents, Extent(newest, held, max(held, simulation.cluster.flushed))]
    for gone in (point for point in before if point.id not in kept):
        for commit in _around(simulation, gone):
            for inclusive in (True, False):
                target = _target_of(simulation, commit, inclusive, commit.history.timeline)
                if _is_planned(simulation, target, before, extents):
                    still = _is_planned(simulation, target, left, extents)
                    require(still, f"P2: {target.description} was lost when point {gone.number} was thinned")


def _around(simulation: Simulation, point: RecoveryPoint) -> list[Commit]:
    """Give the last commit that a point holds, and the first that it does not."""
    assert point.ceiling is not None
    log = simulation.truth(point.ceiling.history.timeline)
    held = [commit for commit in log if is_past(simulation, commit, point.ceiling)]
    return [*held[-1:], *log[len(held) :][:1]]


def _is_planned(
    simulation: Simulation, target: Target, points: Sequence[RecoveryPoint], extents: Sequence[Extent]
) -> bool:
    lineage = simulation.cluster.lineage(target.history.timeline)
    try:
        planner.plan(target, points, extents, lineage, 1e6, segment_bytes=SEGMENT_BYTES)
    except RestoreError:
        return False
    return True


async def _restore(
    simulation: Simulation, base: RecoveryPoint, target: Target, log_from: Position, name: str
) -> list[int]:
    """Restore for real, in memory; gives the transactions that came back, in log order."""
    storage = MemoryStorage(simulation.world, capabilities=simulation.story.capabilities)
    folder = Path(f"/memory/log/{name}")
    clone = await storage.clone(base.id, name, _silent)
    try:
        if target.kind is not StopKind.END:
            await MemoryJournal(simulation.world).stage(log_from, target, folder, _silent)
        volumes = [Volume(volume, f"/{volume}") for volume, _ in clone.paths]
        recovery = MemoryRecovery(simulation.world)
        running = await recovery.start(clone, volumes, target, base.bracket, folder, _silent)
        return [commit.xid for commit in simulation.world.restored[running.clone].commits]
    finally:
        await storage.drop_clone(name)
        simulation.world.staged.pop(folder, None)


async def _check_refusal(
    simulation: Simulation,
    points: Sequence[RecoveryPoint],
    target: Target,
    wanted: Sequence[int],
    refusal: RestoreError,
) -> None:
    """Try every base by brute force: none may lead to the target."""
    for base in points:
        if base.state is not State.SEALED:
            continue
        for kind in (StopKind.LSN, StopKind.END):
            aimed = Target(target.history, kind, target.at, target.inclusive, target.description, commit=target.commit)
            if kind is StopKind.END and not _surely_ends_there(base, target):
                continue
            start = base.bracket.start if base.bracket else base.floor
            try:
                got = await _restore(simulation, base, aimed, start, "brute-force")
            except (RestoreError, JournalError):
                continue
            if got == list(wanted) and _is_certain(base, target, simulation.cluster.lineage(target.history.timeline)):
                raise Violation(
                    f"P2: {target.description} was refused ({refusal.message}), point {base.number} leads there"
                )


def _surely_ends_there(base: RecoveryPoint, target: Target) -> bool:
    end = target.commit.end if target.commit is not None else target.at
    return base.ceiling == base.floor and base.floor.at == end and base.bracket is None


def _is_certain(base: RecoveryPoint, target: Target, lineage: Lineage) -> bool:
    """Whether the records alone show that a base leads to the target; luck is no plan."""
    if _surely_ends_there(base, target):
        return True
    limit = base.bracket.stop if base.bracket else base.ceiling
    return limit is not None and limit.at <= target.at and lineage.includes(limit)


def _silent(step: str, done: int, total: int) -> None:
    """Report no progress."""


def counts(simulation: Simulation) -> dict[str, int]:
    """Give what happened in a run, counted."""
    return {
        "commits": len(_all_commits(simulation)),
        "lives": len(simulation.lives),
        "snapshots": len(simulation.world.kept),
        "events": len(simulation.log),
    }
