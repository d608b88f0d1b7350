"""The log of one life of a cluster, over all its timelines; what snapshots and restores are judged by."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from connectors.memory.manner import Manner
from trigger.model import Commit
from trigger.position import History, Lineage

Forks = tuple[tuple[int, int], ...]


class Entry(NamedTuple):
    """One record of the log; `commit` is None for a record that commits nothing."""

    start: int
    end: int
    commit: Commit | None
    serial: int
    """What a checksum stands for: no two records ever have the same, wherever they lie."""


class Book:
    """The log of one life of a cluster: all timelines, and what the data held before the log began.

    Args:
        manner: how it counts.
        system: the identity of the server.
        first: where the log begins.
        branch: the timeline that it begins with, and where that one left its ancestors.
        inherited: the commits that are in the data and not in this log, oldest first.
    """

    def __init__(
        self,
        manner: Manner,
        system: str,
        first: int,
        branch: tuple[int, Forks],
        inherited: Sequence[Commit] = (),
    ) -> None:
        self.manner = manner
        self.system = system
        self.first = first
        self.inherited = tuple(inherited)
        self.forks: dict[int, Forks] = dict([branch])
        self.logs: dict[int, list[Entry]] = {branch[0]: []}

    def copy(self) -> Self:
        """Give a book of its own with the same records."""
        twin = type(self)(self.manner, self.system, self.first, (self.manner.first_branch, ()), self.inherited)
        twin.forks, twin.logs = dict(self.forks), {timeline: [*log] for timeline, log in self.logs.items()}
        return twin

    def history(self, timeline: int, incarnation: int = 0) -> History:
        """Give the history of a timeline."""
        return History(self.manner.kind, self.system, timeline, incarnation)

    def lineage(self, timeline: int, incarnation: int = 0) -> Lineage:
        """Give the past of a timeline."""
        return Lineage(self.history(timeline, incarnation), self.forks[timeline])

    def begin(self, timeline: int) -> int:
        """Give where a timeline begins."""
        forks = self.forks[timeline]
        return max(self.first, forks[-1][1] if forks else 0)

    def end_before(self, timeline: int, at: int) -> int:
        """Give the end of the last record of a timeline that ends at or before a place; its beginning for none."""
        log = self.logs[timeline]
        index = bisect_right(log, at, key=lambda entry: entry.end)
        return log[index - 1].end if index else self.begin(timeline)

    def entry_at(self, timeline: int, start: int) -> Entry | None:
        """Give the record that begins at a place of a timeline; None where none does."""
        log = self.logs.get(timeline, [])
        index = bisect_left(log, start, key=lambda one: one.start)
        return log[index] if index < len(log) and log[index].start == start else None

    def entries(self, lineage: Lineage, after: int = 0) -> Iterator[Entry]:
        """Give the records of a lineage that end behind `after`, oldest first."""
        for timeline, left_at in (*lineage.forks, (lineage.history.branch, None)):
            log = self.logs.get(timeline, [])
            for entry in log[bisect_right(log, after, key=lambda entry: entry.end) :]:
                if left_at is not None and entry.end > left_at:
                    break
                yield entry

    def commits(self, lineage: Lineage, upto: int) -> list[Commit]:
        """Give every commit that the data hold at a place, oldest first."""
        found = list(self.inherited)
        for entry in self.entries(lineage):
            if entry.end > upto:
                break
            if entry.commit is not None:
                found.append(entry.commit)
        return found


class Content(NamedTuple):
    """What a cut of one volume holds: the log of `lineage` up to `upto`, and where its last checkpoint began.

    Files do not say which incarnation of a log they are of, so the lineage is that of the first.
    """

    book: Book
    lineage: Lineage
    upto: int
    redo: int
    torn: bool = False
    """Whether the log moved while it was copied; then it needs the database's bracket to become one state."""

    def commits(self) -> list[Commit]:
        """Give every commit that it holds, oldest first."""
        return self.book.commits(self.lineage, self.upto)
