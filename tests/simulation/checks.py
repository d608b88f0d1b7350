"""The checkers: judge what a run left behind against the promises P1, P3 and P5 of `trigger/DESIGN.md`; P2: `restores`.

They know the truth (every commit, what each snapshot really holds) and take nothing from the code under test but the
records it wrote. P4's half that can be seen here, the order of catalog and acknowledge, is checked at every call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from connectors.memory import Content, MemoryStorage
from tests.simulation import restores
from tests.simulation.truth import Key
from tests.simulation.wire import Violation, require
from trigger.catalog import reconcile, tag
from trigger.catalog.catalog import Catalog, Found
from trigger.model import GONE, Changes, Commit, CommitRecord, Gap, Mark, Outcome, RecoveryPoint, State
from trigger.ports import Break
from trigger.position import History, Position

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
    check_completeness(simulation, outcomes, await catalog.gaps())
    check_points(simulation, points, outcomes)
    check_agreement(simulation, points)
    await check_second_pass(simulation, catalog, storage)
    await restores.check_restores(simulation, points)
    await restores.check_promises(simulation, catalog, outcomes)


async def judge_pass(simulation: Simulation, stuck: Collection[str]) -> None:
    """Raise `Violation` where a pass of reconcile that has just ended left something to do but what it says is stuck.

    At the end of a run, where nothing goes wrong any more, nothing may be stuck.
    """
    catalog = await Catalog.open(simulation.engine, run=_inline)
    check_agreement(simulation, await catalog.points(), excused=simulation.lost_snapshots, stuck=stuck)


async def _inline(work: Callable[[], T]) -> T:
    return work()


def describe(commit: Commit) -> str:
    """Give a commit in a few words."""
    return f"commit {commit.name} of {commit.stream} at {commit.position}"


# ---- P1


def check_completeness(simulation: Simulation, outcomes: Sequence[Found], gaps: Sequence[Gap]) -> None:
    """Every qualifying commit has exactly one outcome or lies in a gap; no gap says more than was lost."""
    truth, matters = simulation.truth.commits(), simulation.story.rules.matters
    found_at: dict[Key, Found] = {}
    for found in outcomes:
        key = Key(found.history, found.record.start)
        require(key not in found_at, f"P1: {key} has two outcomes: {found_at.get(key)} and {found}")
        require(key in truth, f"P1: {found} never was")
        require(matters(truth[key]), f"P1: {found} does not qualify")
        _check_record(truth[key], found)
        found_at[key] = found
    known = {id(truth[key]): found for key, found in found_at.items()}
    present = [one for cluster in simulation.world.clusters for one in simulation.truth.of_present(cluster)]
    for at, commit in present:
        covered = commit.stream and id(commit) not in simulation.not_ours[commit.stream]  # no stream shows our marks
        if covered and matters(commit):
            _check_outcome(simulation, at, commit, known.get(id(commit)), found_at, gaps)
    _check_lost(simulation, {id(commit) for _, commit in present}, found_at, gaps)
    require(all(gap.closed_by for gap in gaps), f"a gap was never closed: {[gap for gap in gaps if not gap.closed_by]}")


def _check_outcome(
    simulation: Simulation,
    at: Key | None,
    commit: Commit,
    known: Found | None,
    found_at: Mapping[Key, Found],
    gaps: Sequence[Gap],
) -> None:
    """A commit that is there was protected, or a gap says that it may not be.

    One that a copy shares with the log before it may be known by its place in that one alone, as protected.
    """
    inside = [gap for gap in gaps if at and simulation.truth.claims(gap, commit.stream, at.history, commit.end)]
    here = found_at.get(at) if at else None
    if here is not None:
        missed = here.record.outcome is Outcome.MISSED and not _was_left(here, gaps)
        require(not missed, f"P1: {describe(commit)} is missed, but it is there")
        seen = [gap for gap in inside if not simulation.truth.is_come_back(gap, here.history, commit.end)]
        require(not seen, f"P1: {describe(commit)} was seen, yet a gap claims it: {seen}")
    elif known is None or (at is not None and known.record.outcome is Outcome.MISSED):
        before = [gap for gap in gaps if _claims_anywhere(simulation, gap, commit)]
        require(bool(inside or before), f"P1: {describe(commit)} has no outcome and lies in no gap")


def _was_left(found: Found, gaps: Sequence[Gap]) -> bool:
    """Whether a stream had left the history of a commit, so that it was given up, before the server came back to it."""
    mine = [gap for gap in gaps if gap.stream == found.record.stream and gap.after.history == found.history]
    return any(gap.until.history != found.history for gap in mine)


def _claims_anywhere(simulation: Simulation, gap: Gap, commit: Commit) -> bool:
    places = [key for key, one in simulation.truth.commits().items() if one is commit]
    if not places:  # made in a log that was gone before anybody looked
        return gap.stream == commit.stream
    return simulation.truth.came_and_went(gap, commit) or any(
        simulation.truth.claims(gap, commit.stream, key.history, commit.end) for key in places
    )


def _check_lost(
    simulation: Simulation, present: Collection[int], found_at: Mapping[Key, Found], gaps: Sequence[Gap]
) -> None:
    """What was seen and left behind, or was flushed in a life of the log that has ended, is accounted for."""
    matters = simulation.story.rules.matters
    truth = simulation.truth.commits()
    known = {id(truth[key]) for key in found_at}
    for commit in simulation.lives[-1].delivered:
        true = id(truth.get(Key(commit.history, commit.start)))
        if true not in present and matters(commit):
            has = Key(commit.history, commit.start) in found_at or true in known
            require(has, f"P1: {describe(commit)} was left behind, without a word")
    for key, commit in simulation.truth.flushed_and_lost():
        was_open = (commit.stream, key.history.system, key.history.incarnation) in simulation.truth.opened
        ours = was_open and id(commit) not in simulation.not_ours[commit.stream] and matters(commit)
        if ours and id(commit) not in present and id(commit) not in known:
            inside = any(simulation.truth.claims(gap, commit.stream, key.history, commit.end) for gap in gaps)
            inside = inside or any(simulation.truth.came_up_since(gap, commit.stream, key.history) for gap in gaps)
            inside = inside or any(simulation.truth.came_and_went(gap, commit) for gap in gaps)
            require(inside, f"P1: {describe(commit)} of {key.history} was lost with its log and lies in no gap")


def check_break(simulation: Simulation, stream: str, after: Position, broken: Break) -> None:
    """A gap ends where the server begins again: it takes in nothing new that the slot of its stream still gives."""
    cluster, truth = simulation.of(stream), simulation.truth
    for at, commit in truth.of_present(cluster):
        given = commit.stream == stream and cluster.slots[stream].confirmed < commit.end <= broken.until.at
        if at and given and not truth.is_past(at.history, commit.end, after):
            raise Violation(f"P1: the gap from {after} to {broken.until} takes in {describe(commit)}, which is given")


def _check_record(commit: Commit, found: Found) -> None:
    record = found.record
    same = (record.stream, record.name, record.start, record.end, record.time_us, record.markers) == (
        commit.stream,
        commit.name,
        commit.start,
        commit.end,
        commit.time_us,
        commit.markers,
    )
    require(same and _raw(found.history) == commit.history, f"P1: the record of {describe(commit)} is wrong: {found}")


def _raw(history: History) -> History:
    """Give a history as the files of a cluster have it, which know nothing of lives."""
    return replace(history, incarnation=0)


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
    logs = len(simulation.world.clusters)
    require(len(point.marks) == logs, f"P3: point {point.number} has {len(point.marks)} marks in {logs} logs")
    for mark in point.marks:
        contents = [content for _, content in kept.cuts.values() if _is_of(content, mark)]
        require(bool(contents), f"P3: the snapshot of point {point.number} holds nothing of {mark.floor.history}")
        _check_mark(simulation, point, mark, contents)
    if kept.tag is not None:
        sealed, _ = tag.decode(kept.tag)
        require(sealed.state is State.SEALED, f"P5: point {point.number} is sealed, its tag says {sealed.state}")


def _is_of(content: Content, mark: Mark) -> bool:
    return content.lineage.history.is_of_system(mark.floor.history)


def _check_mark(simulation: Simulation, point: RecoveryPoint, mark: Mark, contents: Sequence[Content]) -> None:
    require(_ends_a_record(simulation, mark.floor), f"P3: the floor of point {point.number} lies within a record")
    ceiling = mark.ceiling
    require(ceiling is not None, f"P3: sealed point {point.number} has no ceiling")
    assert ceiling is not None
    highest = max(ceiling.at, mark.bracket.stop.at) if mark.bracket else ceiling.at
    floor = Position(_raw(mark.floor.history), mark.floor.at)
    for content in contents:
        holds = content.lineage.includes(floor) and content.upto >= floor.at
        require(holds, f"P3: the snapshot of point {point.number} ends at {content}, before its floor {mark.floor}")
        require(
            content.upto <= highest and content.lineage.history == _raw(ceiling.history),
            f"P3: the snapshot of point {point.number} holds {content}, beyond its ceiling {ceiling}",
        )
        require(mark.bracket is not None or not content.torn, f"P3: point {point.number} is torn, without a bracket")


def _ends_a_record(simulation: Simulation, place: Position) -> bool:
    book = simulation.truth.book(place.history, place.at)
    assert book is not None
    log = book.logs[place.history.branch]
    index = bisect_left(log, place.at, key=lambda entry: entry.end)
    if index < len(log) and log[index].end == place.at:
        return True
    return place.at == book.begin(place.history.branch)


def _check_commits(simulation: Simulation, point: RecoveryPoint, mine: Sequence[Found]) -> None:
    """The commits of a point are those of its tag, but for what comes again: a copy shares it with the log before."""
    require(
        len(mine) == point.commits,
        f"P1: point {point.number} says that it protects {point.commits} commits, there are {len(mine)}",
    )
    for found in mine:
        require(
            simulation.truth.is_past(found.history, found.record.end, point.floor),
            f"P3: point {point.number} with floor {point.floor} does not hold {found}",
        )
    kept = simulation.world.kept.get(point.id)
    truth = simulation.truth.commits()
    commits = [truth[Key(found.history, found.record.start)] for found in mine]
    told = commits
    if kept is not None and kept.tag is not None:
        told = [commit for record in tag.decode(kept.tag)[1] if (commit := _meant(simulation, point, record))]
        require({*map(id, commits)} <= {*map(id, told)}, f"P5: the tag of point {point.number} lacks some of {mine}")
        twice = len(told) - len(commits)
        require(not twice or _may_come_again(simulation), f"P1: {twice} commits of point {point.number} are another's")
    last = max(told, key=lambda commit: commit.end, default=None)
    protected = [found.record.start for found in mine if found.record.outcome is Outcome.PROTECTED]
    wanted = [last.start] if last and any(last is commit for commit in commits) else []
    require(protected == wanted, f"P1: point {point.number} protects {protected}, its newest commit is {last}")
    if kept is not None or not _may_come_again(simulation):
        _check_tables(point, told)


def _may_come_again(simulation: Simulation) -> bool:
    """Whether a point may hold commits that were known already; which ones, its tag alone says."""
    lives = simulation.world.held.values()
    return bool(simulation.truth.lost) or any(len(of_system) > 1 for of_system in lives)


def _meant(simulation: Simulation, point: RecoveryPoint, record: CommitRecord) -> Commit | None:
    """Give the commit that a tag means."""
    truth = simulation.truth.commits()
    branches = simulation.truth.branches(point.floor.history)
    there = [truth.get(Key(history, record.start)) for history in branches]
    return next(
        (c for c in there if c and (c.name, c.time_us, c.stream) == (record.name, record.time_us, record.stream)), None
    )


def _check_tables(point: RecoveryPoint, commits: Sequence[Commit]) -> None:
    totals: dict[str, Counter[str]] = {}
    for commit in commits:
        for table, changes in commit.tables.items():
            totals.setdefault(f"{commit.stream}.{table}", Counter()).update(Changes(*changes)._asdict())
    wanted = {name: Changes(**counted) for name, counted in totals.items()}
    require(wanted == dict(point.tables), f"point {point.number} changed {wanted}, it says {dict(point.tables)}")


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
        gone = point.state is State.FAILED and point.failure == GONE
        require(
            not gone or point.id in simulation.lost_snapshots,
            f"P5: point {point.number} is said to be gone, but nobody took its snapshot",
        )
    for kept in simulation.world.kept:
        owner = by_id.get(kept)
        reported = owner is not None and owner.failure == GONE
        sealed = owner is not None and owner.state is State.SEALED
        require(sealed or reported or kept in stuck, f"P5: the snapshot {kept} is an orphan of {owner}")


async def check_second_pass(simulation: Simulation, catalog: Catalog, storage: MemoryStorage) -> None:
    """One pass is enough: a second finds nothing to do, and says what is left of snapshots that were taken in part."""
    again = await reconcile.reconcile(catalog, storage)
    lost = [point for point in again.incomplete if point in simulation.lost_snapshots]
    require(again == reconcile.Reconciliation(incomplete=lost), f"P5: a second pass still found {again}")


def counts(simulation: Simulation) -> dict[str, int]:
    """Give what happened in a run, counted."""
    return {
        "commits": len(simulation.truth.commits()),
        "lives": len(simulation.lives),
        "snapshots": len(simulation.world.kept),
        "incarnations": sum(len(lives) for lives in simulation.world.held.values()),
        "promises": simulation.promises,
        "events": len(simulation.log),
    }
