"""The histories that there are: which are known, what a person calls them, what past each has, and what lies beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trigger.catalog.catalog import Catalog
from trigger.errors import JournalError, RestoreError
from trigger.model import RecoveryPoint
from trigger.ports import Journal
from trigger.position import LAST, History, Lineage, Position


async def known_histories(catalog: Catalog, journal: Journal) -> set[History]:
    """Give every history that a commit, a point or a piece of log is known of."""
    marks = [mark for base in await catalog.bases() for mark in base.marks]
    return {
        *(seen.position.history for seen in await catalog.seen()),
        *(position.history for mark in marks for position in mark.positions),
        *(extent.history for extent in await journal.extents()),
    }


async def meant(history: str | None, catalog: Catalog, journal: Journal, present: History | None = None) -> History:
    """Give the history that a person means: whole, or as its branch alone; the present one for None.

    That is the one of the newest point, in its first log if `present` is None.

    Raises:
        RestoreError: there is no point, or nothing is known of that history; the hint lists those that there are.
        PositionError: it is none.
        CatalogError, JournalError: they cannot be read.
    """
    latest = await catalog.latest()
    if latest is None or latest.ceiling is None:
        raise RestoreError(
            "there is no sealed recovery point to start from", hint="trigpoint run takes the first at its start"
        )
    present = present or latest.ceiling.history
    if history is None:
        return present
    known = await known_histories(catalog, journal)
    wanted = next((one for one in known if str(one) == history), None)  # of whatever kind
    if wanted is None:
        by_branch = is_branch(history)
        wanted = Lineage(present).branch(int(history)) if by_branch else History.parse(history, present.kind)
    if wanted not in known:
        there = ", ".join(map(str, sorted(known, key=lambda one: (one.system, one.age))))
        raise RestoreError(f"nothing is known of the history {wanted}", hint=f"there are: {there}")
    return wanted


def is_branch(history: str) -> bool:
    """Whether a history was named by its branch alone."""
    return history.isascii() and history.isdigit() and str(int(history)) == history


def naming(history: History, present: History) -> str:
    """Give the option by which a history is named beside the present one; "" for that itself."""
    if history == present:
        return ""
    beside = history == Lineage(present).branch(history.branch)
    return f"--timeline {history.branch}" if beside else f"--history {history}"


def options(histories: Iterable[History]) -> str:
    """Give the options by which histories are named whole, for people."""
    return ", ".join(f"--history {one}" for one in histories)


async def past(history: History, journal: Journal) -> Lineage:
    """Give the past of a history; of one whose history file nobody kept, the history alone."""
    try:
        return await journal.lineage(history)
    except JournalError:
        return Lineage(history)


def newest_first(histories: Iterable[History]) -> list[History]:
    """Give each history once, those that began last first."""
    return sorted(set(histories), key=lambda one: (one.age, one.system), reverse=True)


def based_beside(bases: Iterable[RecoveryPoint], lineage: Lineage) -> list[History]:
    """Give the histories of a lineage's database that points were cut in, as far as they are not in its past."""
    floors = [mark.floor for base in bases if (mark := base.mark_in(lineage.history)) is not None]
    return newest_first(floor.history for floor in floors if not lineage.includes(floor))


def begins_apart(lineage: Lineage, others: Sequence[Lineage]) -> int:
    """Give from where on the log of a lineage has its own name, and is part of none of the others."""
    own = lineage.stretches()[-1][1]  # what lies before has the name of an earlier branch
    return max([own, *(one.shared(Position(lineage.history, LAST)) or 0 for one in others)])
