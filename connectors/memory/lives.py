"""Which life of its log a cluster is in: what is remembered of it, and compared with what the server has.

An older copy that was put back goes on under the same identity and uses the same places for other records. So whoever
connects compares: how far the log was seen, the last record that is held, the last commit that was seen. Where the
server has something else there, or has not come so far, the next incarnation begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from connectors.memory.book import Book, Entry, Forks
from connectors.memory.cluster import Cluster
from trigger.model import Commit, CommitRecord
from trigger.ports import Seen
from trigger.position import History, Lineage, Position


class Taken(NamedTuple):
    """A true log that was taken for the present one, and the timeline that it was on then."""

    book: Book
    timeline: int


@dataclass
class Held:
    """What outlives the service of one incarnation: the folder of the journal."""

    pieces: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """What the journal holds of each timeline, joined, by position."""
    entries: dict[int, list[Entry]] = field(default_factory=dict)
    """The records in it; where no log is kept, of each timeline the last one that was there when anything was said."""
    forks: dict[int, Forks] = field(default_factory=dict)
    """Where each timeline left its ancestors: the history files."""
    ceilings: dict[int, tuple[int, int]] = field(default_factory=dict)
    """How far snapshots may hold each timeline, and which start of the server that was in."""
    number: int = 0
    """How many lives of any log were known before it; nothing of ours looks at it."""
    taken: list[Taken] = field(default_factory=list)
    """What was taken for this one, in the order in which it was; nothing of ours looks at it."""

    def last_until(self, timeline: int, at: int) -> Entry | None:
        """Give the last record of a timeline that ends at or before a place."""
        log, index = self._ending_by(timeline, at)
        return log[index - 1] if index else None

    def leads_over(self, timeline: int, at: int) -> bool:
        """Whether a record of a timeline begins before a place and ends behind it."""
        log, index = self._ending_by(timeline, at)
        return index < len(log) and log[index].start < at

    def _ending_by(self, timeline: int, at: int) -> tuple[list[Entry], int]:
        log = self.entries.get(timeline, [])
        return log, bisect_right(log, at, key=lambda entry: entry.end)


class Lives:
    """Knows which incarnation of each system is the present one; shared by all that connect to one cluster.

    Args:
        cluster: what is connected to.
        held: what is held of each system, by incarnation; outlives this object.
    """

    def __init__(self, cluster: Cluster, held: dict[str, list[Held]]) -> None:
        self._cluster = cluster
        self._held = held
        self._ends: dict[History, int] = {}
        self._last: dict[History, Commit | CommitRecord] = {}

    def recognise(self, seen: Collection[Seen]) -> None:
        """Take note of what is known from before."""
        for position, commit in seen:
            history = position.history
            if history.kind != self._cluster.manner.kind:
                continue
            lives = self._held.setdefault(history.system, [])
            while len(lives) <= history.incarnation:
                self._begin(lives)
            self.saw(position, commit)

    def saw(self, position: Position, commit: Commit | CommitRecord | None = None) -> None:
        """Take note of how far a log has come, durably, and of its last commit."""
        history = position.history
        self._ends[history] = max(self._ends.get(history, 0), position.at)
        last = self._last.get(history)
        if commit is not None and (last is None or last.start < commit.start):
            self._last[history] = commit

    def remember(self) -> None:
        """Keep the last record that is flushed, durably, where no log is kept that has it; before its end is told."""
        cluster = self._cluster
        if cluster.manner.replays:
            return
        log = cluster.logs[cluster.timeline]
        index = bisect_right(log, cluster.flushed, key=lambda entry: entry.end)
        self.held.entries[cluster.timeline] = log[max(0, index - 1) : index]

    def ceiling(self, position: Position) -> None:
        """Take note of what snapshots may hold."""
        ceilings, branch = self.held.ceilings, position.history.branch
        ceilings[branch] = max(ceilings.get(branch, (0, 0)), (position.at, self._cluster.starts))

    @property
    def held(self) -> Held:
        """What is held of the present incarnation."""
        lives = self._held.setdefault(self._cluster.system, [])
        return lives[-1] if lives else self._begin(lives)

    def confirm(self) -> Lineage:
        """Give the present history and its past, a new one where the log is not the one that was known."""
        held, book = self.held, self._cluster.book
        if self._contradiction(held):
            was = book.copy()  # this one goes on from here as another one
            held.taken = [one._replace(book=was) if one.book is book else one for one in held.taken]
            held = self._begin(self._held[book.system])
        if held.taken[-1:] != [(book, self._cluster.timeline)]:
            held.taken.append(Taken(book, self._cluster.timeline))
        lineage = self.lineage()
        held.forks |= {branch: book.forks[branch] for branch in self._branches(lineage) if branch in book.forks}
        self.remember()
        return lineage

    def lineage(self) -> Lineage:
        """Give the present history and its past as they were known last."""
        incarnation = len(self._held.get(self._cluster.system, [None])) - 1
        return self._cluster.book.lineage(self._cluster.timeline, incarnation)

    def _begin(self, lives: list[Held]) -> Held:
        lives.append(Held(number=sum(map(len, self._held.values()))))
        return lives[-1]

    @staticmethod
    def _branches(lineage: Lineage) -> list[int]:
        return [history.branch for history, _, _ in lineage.stretches()]

    def _contradiction(self, held: Held) -> str:
        """Give what shows that the log of the server is another one than what was known; "" for nothing."""
        lineage, cluster = self.lineage(), self._cluster
        present = lineage.history
        for history, _, left_at in lineage.stretches():
            branch = history.branch
            forks = held.forks.get(branch)
            if forks is not None and branch in cluster.forks and forks != cluster.forks[branch]:
                return f"timeline {branch} has another past"
            if reason := self._other_record(held, branch, left_at):
                return reason
        if self._ends.get(present, 0) > cluster.flushed_records:
            return f"the log ends at {cluster.flushed_records}, and was at {self._ends[present]} before"
        return self._less_than_snapshots(held, present.branch) or self._other_commit(present)

    def _less_than_snapshots(self, held: Held, branch: int) -> str:
        """Give why snapshots may hold what the log has not: since the server started it was compared up to less."""
        ceiling, start = held.ceilings.get(branch, (0, 0))
        last = held.last_until(branch, ceiling)
        manner = self._cluster.manner
        compared = ceiling if not manner.replays else last.end if last is not None else manner.first
        if ceiling > self._cluster.inserted or (start != self._cluster.starts and compared < ceiling):
            return f"snapshots may hold the log up to {ceiling}, which cannot be compared"
        return ""

    def _other_record(self, held: Held, branch: int, left_at: int) -> str:
        """Give what shows that the last record that is held is not there."""
        record, book = held.last_until(branch, left_at), self._cluster.book
        if held.leads_over(branch, left_at):
            return f"timeline {branch} was left within a record, at {left_at}"
        if record is None:
            return ""
        if record.start < book.first:
            return f"the log has begun anew at {book.first}, behind all that is held"
        there = book.entry_at(branch, record.start)
        return "" if there == record else f"the log has another record at {record.start} than before"

    def _other_commit(self, present: History) -> str:
        commit, book = self._last.get(present), self._cluster.book
        if commit is None or book.first <= commit.start < book.begin(present.branch):
            return ""
        there = book.entry_at(present.branch, commit.start)
        same = there is not None and there.commit is not None and there.commit.time_us == commit.time_us
        return "" if same else f"the log has something else at {commit.start} than commit {commit.name}"
