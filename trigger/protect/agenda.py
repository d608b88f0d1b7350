"""The reasons other than a commit to take a point: start, gap, demand, interval, cron, replay debt, catch-all.

Keeps what was taken so far and says what is due next; nothing here waits or does I/O. Moments are the event loop's
monotonic seconds; only cron looks at the time of day.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cronsim import CronSim

from trigger.config.options import PointOptions
from trigger.model import Cause, Mark, RecoveryPoint, State
from trigger.position import Position, distance
from trigger.protect.qualify import Due, Pace

IDLE_NOISE_BYTES = 512
"""A server that does nothing still writes a little log now and then (running-transaction records); less than this
since the last point is not worth one."""

CHECKPOINT_SHARE = 0.5
REPLAY_SHARE = 0.75
"""Shares of the replay limit at which a checkpoint is asked for, and at which a point is due."""

LONGEST_RETRY_SECONDS = 600.0


@dataclass(slots=True)
class Demand:
    """Somebody asked for a point; `answer` gets it, sealed or failed, or sealed only where that one insists."""

    note: str
    answer: asyncio.Future[RecoveryPoint]
    insists: bool = False


@dataclass(slots=True)
class Agenda:
    """What is due besides commits.

    Args:
        options: intervals, schedules and limits.
        base: the newest sealed point of the present lineage; None makes a start point due at once.
    """

    options: PointOptions
    base: RecoveryPoint | None
    sealed_number: int = 0
    """The number of the newest point that was sealed, whatever became of its history; of `base`, if not given."""
    demands: deque[Demand] = field(default_factory=deque)
    open_gap: bool = False
    stopping: bool = False
    """Set when the service is to end after the round at hand."""
    trouble: str = ""
    """Why nothing is protected at present, for people; "" while all is well."""
    redos: Sequence[Position] = ()
    """Where a replay of each log would begin if it were cut now; kept up to date by whoever watches the checkpoints."""
    _in_round: list[Demand] = field(default_factory=list)
    _rounds: deque[float] = field(default_factory=deque)
    _began: tuple[float, datetime] | None = None
    """When the round at hand began, by both clocks."""
    _last: float | None = None
    """When the last round began that ended well; before it the first look at the agenda."""
    not_before: float = 0.0
    """No round begins before, since the last ones failed; the event loop's clock."""
    _failures: int = 0
    _failed_at: float = 0.0
    _opens: int = 0
    _cron_after: datetime | None = None

    def __post_init__(self) -> None:
        if self.base is not None:
            self.sealed_number = max(self.sealed_number, self.base.number)

    def pace(self, now: float) -> Pace:
        """Give what budgets need to know."""
        while self._rounds and self._rounds[0] <= now - 60 and len(self._rounds) > 1:
            self._rounds.popleft()
        recent = [began for began in self._rounds if began > now - 60]
        return Pace(self._rounds[-1] if self._rounds else None, recent, self.not_before)

    def next(
        self, now: float, wall: datetime, log_ends: Sequence[Position], *, window_is_full: bool = False
    ) -> Due | None:
        """Give what is due first, already or later; None where nothing is planned.

        A window that is full is urgent: nothing is read any more until a point is taken.
        """
        urgent = self._urgent(now) or (Due(Cause.COMMIT, now, urgent=True) if window_is_full else None)
        planned = self._planned(now, wall, log_ends)
        return urgent or self._unbased(now) or min(planned, key=lambda due: due.at, default=None)

    def _urgent(self, now: float) -> Due | None:
        if self.demands or self._in_round:  # the latter where a round ended without a word on its point
            return Due(Cause.DEMAND, now, urgent=True)
        return None

    def _unbased(self, now: float) -> Due | None:
        """Give what is due for want of a base: of any at once, of one behind a gap within the budget.

        A stream that breaks on and on would get a point each time.
        """
        if self.open_gap:
            return Due(Cause.GAP, now, urgent=self.base is None)
        return Due(Cause.START, now, urgent=True) if self.base is None else None

    def _planned(self, now: float, wall: datetime, log_ends: Sequence[Position]) -> Iterator[Due]:
        if self._last is None:
            self._last = now
        if self.options.interval_seconds is not None:
            yield Due(Cause.INTERVAL, self._last + self.options.interval_seconds)
        if self.options.cron is not None:
            yield Due(Cause.CRON, now + self._seconds_to_cron(wall))
        moved = any(self.log_since_base(end) > IDLE_NOISE_BYTES for end in log_ends)
        if self.options.catch_all_seconds is not None and moved:
            yield Due(Cause.CATCH_ALL, self._last + self.options.catch_all_seconds)
        if any(self._replay_is_long(end) for end in log_ends):
            yield Due(Cause.REPLAY, now)

    def log_since_base(self, log_end: Position) -> int:
        """Give the bytes of one log behind the newest base.

        What the end of its own bracket left unused of a file of the log is none of them: each point would be a reason
        for the next one.
        """
        mark = self._mark(log_end)
        if mark is None or mark.ceiling is None:
            return 0
        filled_to = mark.bracket.filled_to if mark.bracket else None
        return distance(log_end, filled_to or mark.ceiling)

    def _mark(self, log_end: Position) -> Mark | None:
        """Give where the newest base stands in a log."""
        return self.base.mark_in(log_end.history) if self.base else None

    def _redo(self, log_end: Position) -> Position | None:
        """Give where a replay of a log would begin if it were cut now."""
        return next((redo for redo in self.redos if redo.history.is_of_system(log_end.history)), None)

    def _seconds_to_cron(self, wall: datetime) -> float:
        if self._cron_after is None or self._cron_after > wall:
            self._cron_after = wall  # first look, or the clock was set back
        due: datetime = next(CronSim(self.options.cron or "", self._cron_after))
        return float((due - wall).total_seconds())

    def _replay_is_long(self, log_end: Position) -> bool:
        mark, redo = self._mark(log_end), self._redo(log_end)
        if mark is None or mark.redo is None or redo is None or distance(redo, mark.redo) == 0:
            return False  # a point taken now would not make the replay shorter
        return self.replay_bytes(log_end) > self.replay_limit_bytes * REPLAY_SHARE

    def replay_bytes(self, log_end: Position) -> int:
        """Give how much a restore to the end of a log replays from the newest base."""
        mark = self._mark(log_end)
        return distance(log_end, mark.redo) if mark and mark.redo else 0

    @property
    def replay_limit_bytes(self) -> int:
        """How much log can be replayed within the restore objective."""
        return int(self.options.restore_objective_seconds * self.options.replay_bytes_per_second)

    def wants_checkpoint(self, log_end: Position) -> bool:
        """Whether what a log has had since the last checkpoint would make replays too long."""
        redo = self._redo(log_end)
        return redo is not None and distance(log_end, redo) > self.replay_limit_bytes * CHECKPOINT_SHARE

    def began(self, now: float, wall: datetime) -> None:
        """Note that a round begins."""
        self._rounds.append(now)
        self._began = (now, wall)
        self._in_round.extend(self.demands)
        self.demands.clear()

    def sealed(self, point: RecoveryPoint) -> None:
        """Note that a round ended well."""
        self.base, self.sealed_number = point, point.number
        self._failures = 0
        self._know_redos(point)
        if self._began is not None:  # a schedule is met by a point, not by an attempt
            self._last, self._cron_after = self._began
        self.open_gap = False
        self.trouble = ""
        if point.cause is not Cause.COMMIT:  # that one holds its commit, and not surely what was there when one asked
            self._answer(point)

    def _know_redos(self, point: RecoveryPoint) -> None:
        """Take over where replays begin as a point has just seen it.

        What was seen before it may be of a log that is no more, and lie further on: that asked for one point after
        the other.
        """
        fresh = [mark.redo for mark in point.marks if mark.redo is not None]
        others = [redo for redo in self.redos if not any(redo.history.is_of_system(own.history) for own in fresh)]
        self.redos = [*fresh, *others]

    def failed(self, now: float, point: RecoveryPoint | None) -> float:
        """Note that a round failed, with the failed point if there is one; gives the seconds until the next."""
        pause: float = min(self.options.retry_seconds * 2**self._failures, LONGEST_RETRY_SECONDS)
        self._failures = min(self._failures + 1, 10)
        self._failed_at, self.not_before = now, now + pause
        if point is not None:
            self._answer(point)
        return pause

    def retry(self) -> None:
        """Note that what made rounds fail may be gone: the next one need not wait, and pauses begin small again."""
        self.not_before, self._failures = 0.0, 0

    def heed(self, opens: int) -> None:
        """Note how often streams have been opened: with a server that is back, no more than a first pause is due.

        That much is, since one that comes and goes would be met by a round each time.
        """
        if opens != self._opens:
            self._opens, self._failures = opens, 0
            self.not_before = min(self.not_before, self._failed_at + self.options.retry_seconds)

    def ask(self, note: str, *, insists: bool = False) -> asyncio.Future[RecoveryPoint]:
        """Put a demand on the agenda, which is tried at once; gives where the answer will be.

        One that `insists` stays on it until a point is sealed, however many rounds fail before.
        """
        self.retry()
        demand = Demand(note, asyncio.get_running_loop().create_future(), insists)
        self.demands.append(demand)
        return demand.answer

    @property
    def wants_base(self) -> bool:
        """Whether a point has to be there before what is committed can be restored: one was insisted on."""
        return any(demand.insists for demand in (*self.demands, *self._in_round))

    @property
    def note(self) -> str:
        """What those who asked for the present round had to say."""
        return "; ".join(demand.note for demand in self._in_round if demand.note)

    def _answer(self, point: RecoveryPoint) -> None:
        """Give the point to everybody who had asked before its round began; a failed one is none to who insists."""
        asked, self._in_round = self._in_round, []
        for demand in asked:
            if demand.insists and point.state is not State.SEALED:
                self.demands.append(demand)
            elif not demand.answer.done():
                demand.answer.set_result(point)
