"""What really happened: every commit of every life of every log, whatever the service makes of it.

A commit is named by where it lies: its history, as the drivers count lives, and the start of its record. One commit may
lie in two histories (a copy that was put back shares its beginning with what was before), so commits are told apart by
the object that stands for them. Which true log a history means is known from what the drivers took for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from connectors.memory import Cluster, World
from connectors.memory.book import Book
from connectors.memory.lives import Held
from trigger.model import Commit, Gap
from trigger.ports import Break
from trigger.position import LAST, History, Lineage, Position


class Key(NamedTuple):
    """Where a commit lies."""

    history: History
    start: int


class Lost(NamedTuple):
    """A log, or a timeline of it, that the cluster has left for another, with how far that was flushed."""

    cluster: Cluster
    book: Book
    timeline: int
    flushed: int


class Part(NamedTuple):
    """A log that was taken for a timeline, and up to where."""

    book: Book
    upto: int


class Truth:
    """The truth about a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.lost: list[Lost] = []
        self.opened: set[tuple[str, str, int]] = set()
        """Which streams were open in which lives of which systems."""
        self._stays: dict[str, list[set[History]]] = {}
        """By stream the histories that each of its stays at a server led over, in order."""
        self._stays_before: dict[tuple[str, Position], int] = {}
        """How many stays of a stream came before the first that began with a break behind a place."""
        self._given_from: dict[str, list[tuple[int, Position]]] = {}
        """By stream which of its stays began with a break, and from where on it was given again then."""
        self._lost_by: dict[str, int] = {}
        """How much had been lost when a stream was opened last."""
        self._unseen: dict[tuple[str, Position], set[Lost]] = {}
        """What came up and went while a stream was away, by it and where it had been."""

    def leaves(self, cluster: Cluster) -> None:
        """Note that a cluster is about to leave its log for another."""
        self.lost.append(Lost(cluster, cluster.book, cluster.timeline, cluster.flushed))

    def is_open(
        self, stream: str, cluster: Cluster, history: History, after: Position | None, broken: Break | None
    ) -> None:
        """Note that a stream of a cluster was opened in a history, with a break from `after` where there was one."""
        self.opened.add((stream, history.system, history.incarnation))
        stays = self._stays.setdefault(stream, [])
        lost = [one for one in self.lost if one.cluster is cluster]
        lost_by, self._lost_by[stream] = self._lost_by.get(stream, 0), len(lost)
        if after is not None and broken is not None:
            unseen = lost[lost_by + 1 :]  # the first of them it was at
            self._unseen.setdefault((stream, after), set()).update(unseen)
            for begin in (after, *(end for end, _ in broken.lineage.ends_since(after))):
                self._stays_before.setdefault((stream, begin), len(stays))
        stays.append({one for one, _, _ in self.lineage(history).stretches()})
        if broken is not None:
            self._given_from.setdefault(stream, []).append((len(stays) - 1, broken.until))

    def is_back(self, stream: str, history: History, written: Collection[tuple[str, int]]) -> None:
        """Note that a stream goes on in a history without a break: of later lives nobody knows but by what is written.

        The service was killed before a gap told of them, and the server is back: as if nobody had looked meanwhile.
        """
        known = {(stream, *life) for life in written}
        later = {one for one in self.opened if one[0] == stream and self._is_later(one, history)}
        self.opened -= later - known

    def _is_later(self, opened: tuple[str, str, int], history: History) -> bool:
        _, system, incarnation = opened
        return self._number(replace(history, system=system, incarnation=incarnation)) > self._number(history)

    # ---- histories and logs

    def book(self, history: History, at: int) -> Book | None:
        """Give the true log of a history, which may have begun anew behind a place; None for one nobody took so."""
        held = self._world.held_of(history)
        parts = [part for part in _parts(held, history.branch) if part.book.first <= at] if held else []
        parts = [part for part in parts if at <= part.upto] or parts
        return parts[-1].book if parts else None

    def incarnation_of(self, book: Book) -> int | None:
        """Give which life of its system a log was taken for last; None where nobody has looked, or another came."""
        for incarnation, held in enumerate(self._world.held.get(book.system, [])):
            if held.taken and held.taken[-1].book is book:
                return incarnation
        return None

    def lineage(self, history: History) -> Lineage:
        """Give the past of a history."""
        book = self.book(history, 1 << 62)
        return Lineage(history, _forks_of(book, history.branch) if book else ())

    def branches(self, history: History) -> list[History]:
        """Give every branch of the life of a log, as far as it was looked at."""
        held = self._world.held_of(history)
        branches = {branch for book, _ in held.taken for branch in book.forks} if held else set()
        return [replace(history, branch=branch) for branch in sorted(branches)]

    def present(self, cluster: Cluster) -> History | None:
        """Give the present history of a cluster as the drivers count; None where they have not seen it yet."""
        incarnation = self.incarnation_of(cluster.book)
        return None if incarnation is None else cluster.book.history(cluster.timeline, incarnation)

    def includes(self, history: History, position: Position) -> bool:
        """Whether a position is in the past of a history."""
        return self.lineage(history).includes(position)

    # ---- commits

    def commits(self) -> dict[Key, Commit]:
        """Give every commit of every log that the drivers took for a history."""
        found: dict[Key, Commit] = {}
        for lives in self._world.held.values():
            for incarnation, held in enumerate(lives):
                for timeline in sorted({timeline for book, _ in held.taken for timeline in book.logs}):
                    found |= _commits_of(_parts(held, timeline), timeline, incarnation)
        return found

    def of_present(self, cluster: Cluster) -> list[tuple[Key | None, Commit]]:
        """Give every commit that the cluster's data hold now, oldest first, with where it lies in the present log."""
        found: list[tuple[Key | None, Commit]] = [(None, commit) for commit in cluster.book.inherited]
        incarnation = self.incarnation_of(cluster.book)
        for entry in cluster.book.entries(cluster.lineage()):
            if (commit := entry.commit) is not None:
                history = cluster.book.history(commit.history.branch, incarnation or 0)
                found.append((Key(history, commit.start), commit))
        return found

    def flushed_and_lost(self) -> Iterator[tuple[Key, Commit]]:
        """Give the commits of logs and timelines that were left which were flushed."""
        for _, book, timeline, flushed in self.lost:
            incarnation = self.incarnation_of(book)
            present = any(cluster.book is book and cluster.timeline == timeline for cluster in self._world.clusters)
            if incarnation is None or present:
                continue
            for entry in book.entries(book.lineage(timeline)):
                commit = entry.commit
                if commit is None or entry.end > flushed:
                    continue
                yield Key(book.history(commit.history.branch, incarnation), entry.start), commit

    def state(self, history: History, at: int) -> list[Commit]:
        """Give what the data hold at a place of a history."""
        book = self.book(history, at)
        if book is not None:
            return book.commits(book.lineage(history.branch), at)
        lineage = self.lineage(history)  # the log has begun anew since: the place is known of an ancestor alone
        branch = next(branch for branch, left_at in reversed(lineage.forks) if at <= left_at)
        return self.state(lineage.branch(branch), at)

    # ---- places

    def is_past(self, history: History, end: int, place: Position) -> bool:
        """Whether what ends there lies at or before a place, in the lineage of the place."""
        if history == place.history:
            return end <= place.at
        return history.branch < place.history.branch and self.includes(place.history, Position(history, end))

    def claims(self, gap: Gap, stream: str, history: History, end: int) -> bool:
        """Whether a gap says of a commit that it may have gone unseen.

        Within one life of a log these are those behind its beginning and at or before its end, and all behind its
        beginning that are on no way to its end; otherwise those behind its beginning in the one life, at or before its
        end in the other, and all in lives between.
        """
        after, until = gap.after, gap.until
        if stream != gap.stream:
            return False
        if _life(after.history) == _life(until.history):
            if _life(history) != _life(until.history) or self.is_past(history, end, after):
                return False
            return self.is_past(history, end, until) or self._is_off_the_way(history, end, gap)
        if _life(history) == _life(after.history):
            return not self.is_past(history, end, after)
        if _life(history) == _life(until.history):
            return self.is_past(history, end, until)
        return self._number(after.history) < self._number(history) < self._number(until.history)

    def _is_off_the_way(self, history: History, end: int, gap: Gap) -> bool:
        """Whether what lies behind a gap's beginning is of a branch that was left since."""
        after, until = gap.after, gap.until
        passed_by = self.lineage(history).shared(after) is not None and not self.includes(history, until)
        left = history == after.history and not self.includes(until.history, Position(history, end))
        return passed_by or left

    def came_up_since(self, gap: Gap, stream: str, history: History) -> bool:
        """Whether a life of a log came up, and went, after a stream was lost that is seen again by a gap's end."""
        return stream == gap.stream and self._number(gap.after.history) < self._number(history)

    def came_and_went(self, gap: Gap, commit: Commit) -> bool:
        """Whether a commit was made in a log that was there only while its stream was away, as a gap says.

        Which may have been taken for one of before that its server had left.
        """
        logs = self._unseen.get((gap.stream, gap.after), ()) if commit.stream == gap.stream else ()
        return any(entry.commit is commit for log in logs for entry in log.book.entries(log.book.lineage(log.timeline)))

    def _number(self, history: History) -> int:
        held = self._world.held_of(history)
        return held.number if held else -1

    def is_come_back(self, gap: Gap, history: History, end: int) -> bool:
        """Whether a gap claims of a history what was seen at another stay there.

        It lies between two servers, and claims all of them and of those that came and went between; or the server had
        left that history for the one in which the gap begins; or it went back since to what it had left then, or the
        gap begins right where it had come back to: the slot may be one of before.
        """
        if gap.after.history.system != gap.until.history.system:
            return True
        stays, before = self._stays[gap.stream], self._stays_before[gap.stream, gap.after]
        was_left = history != gap.after.history and any(history in stay for stay in stays[:before])
        went_on = self._is_off_the_way(history, end, gap) and any(history in stay for stay in stays[before + 1 :])
        returns = [
            (stay, until)
            for stay, until in self._given_from.get(gap.stream, [])
            if stay and not stays[stay - 1] <= stays[stay]
        ]
        back = any(
            until.history == history and until.at < end and (stay > before or (stay < before and until == gap.after))
            for stay, until in returns
        )
        return was_left or went_on or back


def _forks_of(book: Book, branch: int) -> tuple[tuple[int, int], ...]:
    """Give the past of a branch; of one before a log began anew, by that of its descendant."""
    if branch in book.forks:
        return book.forks[branch]
    past = next((forks for forks in book.forks.values() if any(one == branch for one, _ in forks)), ())
    return tuple(itertools.takewhile(lambda fork: fork[0] != branch, past))


def _parts(held: Held, timeline: int) -> list[Part]:
    """Give what logs were taken for a timeline of a life of a log, in the order in which they were.

    A later one is what was meant by it as far as it goes: one that left the timeline says nothing of what lay behind.
    """
    parts = []
    for book, present in held.taken:
        left = [left_at for branch, left_at in book.forks[present] if branch == timeline]
        parts += [Part(book, upto) for upto in ([LAST] if present == timeline else left)]
    return parts or [Part(book, LAST) for book, _ in held.taken if timeline in book.forks]  # it came and went unseen


def _commits_of(parts: Sequence[Part], timeline: int, incarnation: int) -> dict[Key, Commit]:
    found: dict[Key, Commit] = {}
    for book, upto in parts:
        history = book.history(timeline, incarnation)
        found = {key: commit for key, commit in found.items() if not book.first <= key.start < upto}
        there = [entry for entry in book.logs.get(timeline, ()) if entry.end <= upto]
        found |= {Key(history, entry.start): entry.commit for entry in there if entry.commit is not None}
    return found


def _life(history: History) -> tuple[str, str, int]:
    return history.kind, history.system, history.incarnation
