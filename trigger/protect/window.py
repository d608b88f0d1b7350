"""The commits that were received and have no outcome yet: one bounded window over all streams of a cluster.

`follow` reads one source for ever and reconnects; the pipeline looks at the window (`oldest`, `breaks`), collects
what is pending, and settles it once the catalog has its outcome. Nothing is acknowledged to a source before that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trigger.errors import SourceError
from trigger.model import Changes, Commit, CommitRecord, Outcome
from trigger.ports import Break, Source
from trigger.position import History, Lineage, Position
from trigger.protect.qualify import Pending, Tally
from trigger.protect.recent import Recent

log = logging.getLogger(__name__)

LARGE = 200
"""Beyond so many commits, by weight, what is made of all of them is made off the event loop: it takes a second for a
hundred thousand."""
BOUND = 100_000
"""How many commits may wait in one window; beyond that the sources are not read, and the servers keep their log."""
NEWS_SECONDS = 1.0
"""How long nobody hears of what no rule takes: to wake the pipeline for it costs more than to decode it."""
FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 15.0


class Broken(NamedTuple):
    """A break of a stream that the catalog does not know of yet."""

    stream: str
    after: Position
    seen: Break

    @property
    def holes(self) -> Sequence[tuple[Position, Position]]:
        """(after, until) of each gap: from what was delivered to where it goes on, and behind the end of each branch.

        Where a server that takes over goes on with all that was delivered, what the one before had later is lost.
        """
        until, ends = self.seen.until, self.seen.lineage.ends_since(self.after)
        whole = () if ends and self.after == until else ((self.after, until),)
        return (*whole, *(one for one in ends if one[0].history.age >= until.history.age))


@dataclass(frozen=True, slots=True)
class Collected:
    """What was pending at one moment, and what may be settled once it has an outcome."""

    pending: Sequence[Pending]
    """In log order, all of one history."""
    settled: Mapping[str, Position]
    """By stream: everything up to there is in `pending`, or did not qualify."""

    @property
    def newest(self) -> Pending | None:
        """The pending commit that ends last in the log; None where nothing is pending."""
        return self.pending[-1] if self.pending else None

    @property
    def is_large(self) -> bool:
        """Whether records, tables and a tag of it take so long that the event loop must not be kept by them."""
        return len(self.pending) > LARGE or sum(p.commit.weight for p in self.pending) > LARGE

    def records(self) -> list[CommitRecord]:
        """Give a record of each pending commit: the newest is protected, the others are coalesced into its point."""
        newest = self.newest
        return [record(p.commit, Outcome.PROTECTED if p is newest else Outcome.COALESCED) for p in self.pending]

    def tables(self) -> dict[str, Changes]:
        """Give what the pending commits changed, added up by `stream.schema.table`."""
        totals: dict[str, Changes] = {}
        for pending in self.pending:
            for table, changes in pending.commit.tables.items():
                name = f"{pending.commit.stream}.{table}"
                before = totals.get(name)
                totals[name] = changes if before is None else Changes(*map(sum, zip(before, changes, strict=True)))
        return totals


def record(commit: Commit, outcome: Outcome) -> CommitRecord:
    """Give what the catalog keeps of `commit`."""
    return CommitRecord(commit.stream, commit.name, commit.start, commit.end, commit.time_us, commit.markers, outcome)


@dataclass(slots=True)
class _Stream:
    source: Source
    through: Position | None
    """Everything up to here was delivered to the window; what comes again at or before it is a repetition."""
    pending: deque[Pending] = field(default_factory=deque)
    weight: int = 0
    """For how many ordinary commits those that are pending count."""
    connected: bool = False
    trouble: str = ""
    """Why it is not connected."""

    def has(self, position: Position) -> bool:
        """Whether what ends at `position` was delivered already."""
        return self.through is not None and _at_or_before(position, self.through)

    def keep(self, pending: Pending) -> None:
        """Let a commit wait."""
        self.pending.append(pending)
        self.weight += pending.commit.weight

    def settle(self, through: Position) -> None:
        """Let go of the commits up to `through` in its history: what is settled never says more than that of others.

        A server may have come to a history before another one, after it, or both.
        """
        while self.pending and _is_up_to(self.pending[0].commit.position, through):
            self.weight -= self.pending.popleft().commit.weight

    def forget(self, gone: Iterable[Pending]) -> None:
        """Let go of some commits, wherever they stand."""
        ids = set(map(id, gone))
        self.pending = deque(p for p in self.pending if id(p) not in ids)
        self.weight = sum(p.commit.weight for p in self.pending)


class Window:
    """A bounded window over the sources of one cluster.

    Args:
        sources: one a stream.
        settled: by stream, the position whose commits have an outcome already.
        judge: gives the rule that takes a commit, or None.
        bound: how many ordinary commits may wait; one with many tables or long markers counts for several.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        settled: Mapping[str, Position | None],
        judge: Callable[[Commit], str | None],
        bound: int = BOUND,
    ) -> None:
        self._streams = {s.name: _Stream(s, settled.get(s.name)) for s in sources}
        self._judge = judge
        self._bound = bound
        self._changed = asyncio.Event()
        self._tells_later: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._breaks: list[Broken] = []
        self.opens = 0
        """How often a stream was opened."""
        self.tally = Tally()
        self.recent = Recent()

    # What the pipeline sees

    @property
    def oldest(self) -> Pending | None:
        """The commit that waits longest of those that `collect` can give; None where there is none."""
        return min((s.pending[0] for s in self._giving() if s.pending), key=lambda p: p.arrived, default=None)

    @property
    def waiting_since(self) -> float | None:
        """When the first of all that wait arrived, by the loop's clock, also one that waits for its stream."""
        return min((s.pending[0].arrived for s in self._streams.values() if s.pending), default=None)

    @property
    def breaks(self) -> Sequence[Broken]:
        """Breaks that no gap was recorded for yet."""
        return tuple(self._breaks)

    @property
    def log_ends(self) -> Sequence[Position]:
        """The furthest position that any stream of a database has reached, for each of them that has spoken."""
        ends: dict[tuple[str, str], Position] = {}
        for through in self.reached().values():
            key = (through.history.kind, through.history.system)
            ends[key] = max(ends.get(key, through), through, key=lambda p: (p.history.age, p.at))
        return tuple(ends.values())

    def reached(self) -> Mapping[str, Position]:
        """Give by stream how far it was delivered; not of those that have not spoken yet."""
        return {name: s.through for name, s in self._streams.items() if s.through is not None}

    def __len__(self) -> int:
        return sum(len(stream.pending) for stream in self._streams.values())

    def collect(self) -> Collected:
        """Give all that is pending now in one history, in log order; it stays in the window until `settle`.

        A round is of one history, since one point is: the earliest of the log whose commit waits longest. Where a
        stream has gone on to a new history, what is pending there waits for the next round. A stream whose break has no
        gap in the catalog yet gives nothing: to settle what lies behind the break would hide what was lost in it. Nor
        does one that is not connected while another one of its log has gone on to a later history: nobody has said yet
        what of it is part of that.
        """
        streams = self._giving()
        history = _earliest_of_oldest([s.pending[0] for s in streams if s.pending])
        pending: list[Pending] = []
        settled: dict[str, Position] = {}
        for stream in streams:
            mine = list(itertools.takewhile(lambda p: p.commit.history == history, stream.pending))
            pending += mine
            through, last = stream.through, mine[-1].commit.position if mine else None
            if len(mine) < len(stream.pending) or (last and through and through.history != last.history):
                through = last  # more waits behind, or the stream has gone on to the next history
            if through is not None:
                settled[stream.source.name] = through
        return Collected(sorted(pending, key=lambda p: p.commit.end), settled)

    def _giving(self) -> list[_Stream]:
        broken = {one.stream for one in self._breaks}
        return [s for name, s in self._streams.items() if name not in broken and not self._is_left_behind(s)]

    def _is_left_behind(self, stream: _Stream) -> bool:
        if stream.connected or not stream.pending:
            return False
        mine = stream.pending[0].commit.history
        others = [other.through.history for other in self._streams.values() if other.connected and other.through]
        return any(other.is_of_system(mine) and other.age > mine.age for other in others)

    async def more(self, until: float | None) -> None:
        """Wait until something has changed since the last call, or the loop's clock shows `until`."""
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    def wake(self) -> None:
        """Make `more` return: something has changed, in the window or outside."""
        self._changed.set()
        if self._tells_later is not None:
            self._tells_later.cancel()
            self._tells_later = None

    def _wake_later(self) -> None:
        """Make `more` return within `NEWS_SECONDS`, for all that changes until then."""
        if self._tells_later is None and not self._changed.is_set():
            self._tells_later = asyncio.get_running_loop().call_later(NEWS_SECONDS, self.wake)

    async def settle(self, settled: Mapping[str, Position]) -> None:
        """Drop the commits up to `settled`, whose outcome the catalog has, and let the sources forget them."""
        for name, through in settled.items():
            stream = self._streams[name]
            stream.settle(through)
            if stream.connected and not any(broken.stream == name for broken in self._breaks):
                try:
                    await stream.source.acknowledge(through)
                except SourceError as error:
                    log.warning("stream %s: not acknowledged, will be repeated: %s", name, error)
        if not self.is_full:
            self._room.set()

    def come_to(self, stream: str) -> Lineage:
        """Give the lineage that a broken stream goes on in by now; the server may have gone on to yet another one."""
        return next(one.seen.lineage for one in reversed(self._breaks) if one.stream == stream)

    def lost(self, broken: Broken, lineage: Lineage) -> list[Pending]:
        """Give the pending commits of a broken stream that `lineage` does not hold."""
        return [p for p in self._streams[broken.stream].pending if not lineage.includes(p.commit.position)]

    def settled_by(self, broken: Broken, lost: Iterable[Pending]) -> Mapping[str, Position]:
        """Give what a gap settles together with what was `lost`: all up to its end, if nothing still waits there.

        Who opens the stream next begins there, and so tells of what was behind it where that is lost with its log.
        """
        until, gone = broken.seen.until, set(map(id, lost))
        first = next((p.commit for p in self._streams[broken.stream].pending if id(p) not in gone), None)
        waits = first is not None and (first.history != until.history or first.end <= until.at)
        return {} if waits else {broken.stream: until}

    def forget(self, broken: Broken, lost: Iterable[Pending]) -> None:
        """Let go of a break, and of what was lost with it: the catalog has both."""
        self._streams[broken.stream].forget(lost)
        self._breaks.remove(broken)

    @property
    def begun(self) -> bool:
        """Whether every stream is connected and has said where it stands, so that a point can settle it."""
        return all(stream.connected and stream.through is not None for stream in self._streams.values())

    @property
    def begun_but_for_troubles(self) -> bool:
        """Whether every stream has said where it stands, but for those of which it is known why they are not open."""
        return all((s.connected and s.through is not None) or s.trouble for s in self._streams.values())

    def connected(self) -> Mapping[str, bool]:
        """Give by stream whether it is connected."""
        return {name: stream.connected for name, stream in self._streams.items()}

    def delivered(self) -> Mapping[str, Position | None]:
        """Give by stream up to where it was delivered; None for one that has said nothing yet."""
        return {name: stream.through for name, stream in self._streams.items()}

    def troubles(self) -> Mapping[str, str]:
        """Give by stream why it is not connected, or what its source says is not in order."""
        found = {name: stream.trouble or stream.source.trouble for name, stream in self._streams.items()}
        return {name: trouble for name, trouble in found.items() if trouble}

    # What the sources do

    async def follow(self, name: str) -> None:
        """Read the source `name` until cancelled; reconnects by itself, raises what no waiting can help."""
        stream, loop = self._streams[name], asyncio.get_running_loop()
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            began = loop.time()
            try:
                await self._open(stream)
                while True:
                    await self._wait_for_room(stream)
                    self._receive(stream, *await stream.source.read())
            except SourceError as error:
                if not error.retryable:
                    raise
                if stream.connected and loop.time() - began > LAST_BACKOFF_SECONDS:
                    backoff = FIRST_BACKOFF_SECONDS  # it held for a while: this is another trouble
                stream.trouble = str(error)
                log.warning("stream %s: %s; trying again in %.1f s", name, error, backoff)
            finally:
                stream.connected = False
                await stream.source.close()
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)

    async def _open(self, stream: _Stream) -> None:
        """Connect behind what was delivered; a break is put down for the pipeline."""
        seen = await stream.source.open(stream.through)
        stream.connected, stream.trouble = True, ""
        self.opens += 1
        self.wake()
        if seen is not None:
            after = stream.through if stream.through is not None else seen.until
            stream.forget(p for p in stream.pending if _comes_again(p.commit.position, seen))
            self._breaks.append(Broken(stream.source.name, after, seen))
            stream.through = seen.until

    @property
    def is_full(self) -> bool:
        """Whether so much waits that nothing more is read until a point is taken."""
        return sum(stream.weight for stream in self._streams.values()) >= self._bound

    async def _wait_for_room(self, stream: _Stream) -> None:
        while self.is_full:
            self._room.clear()
            try:
                async with asyncio.timeout(stream.source.heartbeat_seconds):
                    await self._room.wait()
            except TimeoutError:
                await stream.source.heartbeat()

    def _receive(self, stream: _Stream, commits: Sequence[Commit], through: Position) -> None:
        """Judge what has arrived; what no rule takes is counted, remembered for a while, and does not wait."""
        now = asyncio.get_running_loop().time()
        awaited = stream.through is None  # its first word
        for commit in commits:
            if stream.has(commit.position):
                continue
            self.recent.saw(commit)
            rule = self._judge(commit)
            self.tally.count(rule)
            if rule is not None:
                stream.keep(Pending(commit, rule, now))
                awaited = True
        if not stream.has(through):
            stream.through = through
        if awaited:
            self.wake()
        else:
            self._wake_later()


def _earliest_of_oldest(heads: Sequence[Pending]) -> History | None:
    """Give the earliest history among the heads of that log in which one has waited longest."""
    oldest = min(heads, key=lambda head: head.arrived, default=None)
    if oldest is None:
        return None
    histories = [head.commit.history for head in heads]
    return min((one for one in histories if one.is_of_system(oldest.commit.history)), key=lambda one: one.age)


def _comes_again(position: Position, seen: Break) -> bool:
    """Whether a stream that a break put back delivers what ends at `position` once more: not behind a branch's end."""
    return seen.lineage.includes(position) and not _at_or_before(position, seen.until)


def _is_up_to(position: Position, through: Position) -> bool:
    return position.history == through.history and position.at <= through.at


def _at_or_before(position: Position, through: Position) -> bool:
    """Whether `position` was delivered by then; an earlier history lies before a later one of the same database."""
    if position.history == through.history:
        return position.at <= through.at
    return position.history.is_of_system(through.history) and position.history.age < through.history.age
