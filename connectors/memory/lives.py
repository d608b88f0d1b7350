"""Which life of its log a cluster is in: what is remembered of it, and compared with what the server has.

An older copy that was put back goes on under the same identity and uses the same places for other records. So whoever
connects compares: how far the log was seen, the last record that is held, the last commit that was seen. Where the
server has something else there, or has not come so far, the next incarnation begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field, replace
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
        self._found: set[History] = set()
        """In which the cluster was found."""

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
        self._found.add(lineage.history)
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
        reason = self._less_than_snapshots(held, present.branch) or self._other_commit(present)
        return reason or self._other_life(held, lineage)

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

    def _other_life(self, held: Held, lineage: Lineage) -> str:
        """Give why a timeline that is new to this life may be an earlier one's, or stand on one; "" for nothing.

        It is this one's where the log agrees with it at least as far as with any other, or where no other can be meant.
        """
        present, end = lineage.history, self._cluster.flushed_records
        if present in self._ends or present in self._found or held.entries.get(present.branch):
            return ""
        for branch, forks in held.forks.items():
            if dict(forks).get(present.branch, 0) > end:
                return f"the log ends at {end}, and timeline {branch} left it behind that"
        if not any(held.entries.values()) and not any(present.is_of_life(one) for one in self._ends):
            return ""  # nothing is known of this life but that it was begun
        for count, (history, _, left_at) in reversed([*enumerate(lineage.stretches())]):
            upto = min(left_at, end)
            mine = self._agrees(held, history, upto)
            if mine is None:
                return f"timeline {present.branch} has something else than {history} before {upto}"
            if (elder := self._elder(Lineage(history, lineage.forks[:count]), upto, mine)) is not None:
                return f"timeline {present.branch} may stand on {elder}, and not on {history}, before {upto}"
            if mine or self._reach(held, history):
                break
        return ""

    def _elder(self, past: Lineage, upto: int, mine: int) -> History | None:
        """Give the history of an earlier life that the log up to a place may as well be of, or is; `mine` as found."""
        present, lives = past.history, self._held[past.history.system]
        for incarnation in reversed(range(present.incarnation)):
            elder, held = replace(present, incarnation=incarnation), lives[incarnation]
            reach = self._reach(held, elder)
            if not reach or held.forks.get(elder.branch, past.forks) != past.forks:
                continue
            theirs = self._agrees(held, elder, upto)
            if theirs is not None and theirs > mine:
                return elder
            if theirs == mine == 0 and (reach >= upto or self._reach(self.held, present) < upto):
                return elder
        return None

    def _reach(self, held: Held, history: History) -> int:
        """Give how far a history is known; 0 for not at all."""
        log = held.entries.get(history.branch)
        return max(self._ends.get(history, 0), log[-1].end if log else 0)

    def _agrees(self, held: Held, history: History, upto: int) -> int | None:
        """Give up to where, at most `upto`, the log has what is known of a history; None where it has something else.

        0 where there is nothing to compare.
        """
        book, agreed = self._cluster.book, 0
        entry, commit = held.last_until(history.branch, upto), self._last.get(history)
        if entry is not None and entry.start >= book.first:
            if book.entry_at(history.branch, entry.start) != entry:
                return None
            agreed = entry.end
        if commit is not None and book.begin(history.branch) <= commit.start and commit.end <= upto:
            there = book.entry_at(history.branch, commit.start)
            if there is None or there.commit is None or there.commit.time_us != commit.time_us:
                return None
            agreed = max(agreed, commit.end)
        return agreed
