"""What production loses when an earlier state takes its place: counted by the catalog, and bounded by the log.

Where another cluster lies in the volumes than the state is of, as after an upgrade, it goes with all that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from trigger.model import Finding, Severity, System, from_microseconds
from trigger.ports import Clone
from trigger.position import LAST, History, Lineage, Position, distance
from trigger.replay import Target
from trigger.restore.clone_records import CloneRecord
from trigger.restore.clones import Site
from trigger.restore.histories import known_histories, past
from trigger.shape import data


@dataclass(frozen=True, slots=True)
class Replaced:
    """Another cluster that lies in the volumes, and the one that would take its place."""

    there: tuple[System, ...]
    comes: System

    def __str__(self) -> str:
        goes = ", ".join(map(str, self.there))
        return f"another cluster lies there: {goes} goes, with all that it holds, and {self.comes} takes its place"

    @property
    def refusal(self) -> Finding:
        """What is said where nobody said that this is meant."""
        return Finding(
            "cluster",
            Severity.REFUSED,
            str(self),
            "if that is meant, say so: --replace-cluster; --dry-run says what is lost",
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """What lies behind a state in production's present log."""

    behind: Position | None
    """Up to here all stays; null where nobody knows where the state stands, or nothing stays."""
    commits: int
    """How many commits behind it the catalog knows."""
    first_at: datetime | None
    """When the first of them was made."""
    last_at: datetime | None
    """When the last of them was made."""
    log_end: Position | None
    """So far the log goes that is kept; what no stream shows may be committed in it too, and anything behind it. Null
    where none is kept."""
    replaced: Replaced | None = None
    """Where another cluster lies there: all of that one is lost, and `commits` are its own."""

    def describe(self) -> list[str]:
        """Give it in sentences for people."""
        if self.replaced is not None:
            return [str(self.replaced), *self._described()]
        if self.behind is None:
            return ["nobody knows which commits will be lost: where this state stands was not noted"]
        return self._described()

    def _described(self) -> list[str]:
        if self.commits == 0:
            lines = ["no commit that the catalog knows will be lost"]
        elif self.commits == 1:
            lines = [f"one commit that the catalog knows will be lost, made {data(self.first_at)}"]
        else:
            times = f"made {data(self.first_at)} to {data(self.last_at)}"
            lines = [f"{self.commits} commits that the catalog knows will be lost, {times}"]
        if self.log_end is None:
            return [*lines, "others may be lost that it does not know: no log is kept in which they could be seen"]
        size = 0
        if self.behind is not None and self.log_end.history.is_of_life(self.behind.history):
            size = distance(self.log_end, self.behind)
        how_far = f"{self.log_end}, {size} bytes behind this state" if self.behind is not None else f"{self.log_end}"
        return [
            *lines,
            f"others may be lost that it does not know (DDL, for one): the log that is kept goes to {how_far}, and"
            " production may have written more",
        ]


async def replaced(system: str, site: Site, copy: Clone | None = None) -> Replaced | None:
    """Give which other cluster lies in the volumes than the one called `system`; None where that one does.

    What cannot be read there any more is known by the newest point.

    Args:
        system: what the state is of that would take the place.
        site: where the volumes are.
        copy: of that system, which says its version.
    """
    volumes = tuple((volume.name, Path(volume.path)) for volume in site.volumes)
    there = await site.recovery.systems(Clone("production", "", volumes, site.clock.now()))
    if not there and (latest := await site.catalog.latest()) is not None:
        there = [System(mark.floor.history.system, "") for mark in latest.marks]
    if not there or system in (one.name for one in there):
        return None
    comes = await site.recovery.systems(copy) if copy is not None else []
    return Replaced(tuple(there), next((one for one in comes if one.name == system), System(system, "")))


async def behind_replaced(found: Replaced, site: Site) -> Losses:
    """Give what is lost where another cluster takes production's place: all that is known of the one that is there."""
    names = {one.name for one in found.there}
    known = [one for one in await known_histories(site.catalog, site.journal) if one.system in names]
    newest = {one.system: one for one in sorted(known, key=lambda one: one.age)}.values()
    each = [await _behind(Position(history, 0), site) for history in newest]
    return Losses(
        None,
        sum(one.commits for one in each),
        min((one.first_at for one in each if one.first_at is not None), default=None),
        max((one.last_at for one in each if one.last_at is not None), default=None),
        next((one.log_end for one in each if one.log_end is not None), None),
        found,
    )


async def behind_target(target: Target, site: Site) -> Losses:
    """Give what is lost where the state of a target takes production's place."""
    return await _behind(Position(target.history, await _end_of(target, site)), site)


async def behind_clone(record: CloneRecord, site: Site) -> Losses:
    """Give what is lost where a clone takes production's place."""
    if not record.stands_at:
        return Losses(None, 0, None, None, None)
    history, _, at = record.stands_at.rpartition("@")
    latest = await site.catalog.latest()
    kind = latest.floor.history.kind if latest is not None else ""
    parsed = History.parse(history, kind)
    return await _behind(Position(parsed, parsed.parse_place(at)), site)


async def _end_of(target: Target, site: Site) -> int:
    """Give the first place at which a record that begins there is no part of a target, as far as is known."""
    if target.at is not None:
        return target.at + (1 if target.inclusive else 0)
    if target.commit is not None:
        return target.commit.start + 1
    return (await site.catalog.point(target.point)).floor.at if target.point else 0


async def _behind(position: Position, site: Site) -> Losses:
    """Give what lies at a position and behind it in the log that production has now."""
    present = await site.catalog.present(position.history) or position.history
    lineage = await past(present, site.journal)
    at = _shared(await past(position.history, site.journal), lineage, position.at)
    first = await site.catalog.commit_after(at - 1, lineage)
    last = await site.catalog.commit_before(LAST, lineage) if first is not None else None
    ends = [extent.end for extent in await site.journal.extents() if extent.history == present]
    return Losses(
        lineage.at(at),
        await site.catalog.count_from(at, lineage),
        from_microseconds(first.record.time_us) if first is not None else None,
        from_microseconds(last.record.time_us) if last is not None else None,
        Position(present, max(ends)) if ends else None,
    )


def _shared(mine: Lineage, present: Lineage, at: int) -> int:
    """Give how far the log up to `at` of one lineage is the past of the present one too."""
    for history, low, high in reversed(mine.stretches()):
        if low <= at and (shared := present.shared(Position(history, min(at, high)))) is not None:
            return shared
    return 0
