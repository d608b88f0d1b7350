"""What a set of rules and budgets would have done with given commits: the real `qualify` over recorded times.

Pure: time is what the commits say. A service that has a sealed point already is assumed, so no point is taken at
start; points by interval and cron are taken as in service, a catch-all where the commits bear positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from trigger.config.options import PointOptions
from trigger.model import Cause, Commit, Mark, Outcome, RecoveryPoint, State
from trigger.position import Position
from trigger.protect.agenda import Agenda
from trigger.protect.qualify import Due, Pending, Rules, Take, Wait, qualify


@dataclass(frozen=True, slots=True)
class Verdict:
    """What would have become of one commit."""

    commit: Commit
    rule: str | None
    """The rule that takes it (with `!` where the rule threw); None where it does not qualify."""
    outcome: Outcome | None = None
    """None for a commit that does not qualify."""
    point: int | None = None
    """The number of the rehearsed point that holds it."""
    waited_seconds: float | None = None
    """From its arrival to the beginning of that point."""


@dataclass(frozen=True, slots=True)
class RehearsedPoint:
    """A point that would have been taken."""

    number: int
    cause: Cause
    began_at: datetime
    commits: int
    """How many qualifying commits it holds."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The whole answer: one verdict a commit, in log order, and the points."""

    verdicts: tuple[Verdict, ...]
    points: tuple[RehearsedPoint, ...]
    rule_errors: int
    """How often an expression threw; each time the commit was protected."""

    def count(self, outcome: Outcome | None) -> int:
        """Give how many commits had `outcome`; None for those that do not qualify."""
        return sum(verdict.outcome is outcome for verdict in self.verdicts)

    def by_rule(self) -> dict[str, int]:
        """Give how many commits each rule took, the busiest first."""
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            if verdict.rule is not None:
                counts[verdict.rule] = counts.get(verdict.rule, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def rehearse(
    commits: Sequence[Commit], rules: Rules, options: PointOptions, *, round_seconds: float = 0.0
) -> Rehearsal:
    """Give what would have been done with `commits`.

    Args:
        commits: in any order; they arrive at their commit times.
        rules: what to try.
        options: intervals and budgets.
        round_seconds: how long one round is taken to last; what arrives meanwhile waits for the next.
    """
    if not commits:
        return Rehearsal((), (), 0)
    before = rules.errors
    stage = _Stage(sorted(commits, key=lambda commit: (commit.time_us, commit.end)), options, round_seconds)
    stage.play(rules)
    return Rehearsal(tuple(stage.verdicts), tuple(stage.points), rules.errors - before)


@dataclass(slots=True)
class _Stage:
    commits: Sequence[Commit]
    options: PointOptions
    round_seconds: float
    now: float = 0.0
    """Seconds since the first commit."""
    arrived: int = 0
    """How many commits have arrived."""
    pending: list[tuple[int, Pending]] = field(default_factory=list)
    """(index, commit) of what waits for a point."""
    verdicts: list[Verdict] = field(default_factory=list)
    points: list[RehearsedPoint] = field(default_factory=list)

    def play(self, rules: Rules) -> None:
        """Let time pass until every commit has arrived and has an outcome."""
        agenda = Agenda(self.options, self._base())
        while True:
            self._receive(rules)
            if self.arrived == len(self.commits) and not self.pending:
                return
            due = agenda.next(self.now, self._wall(), self._log_ends())
            oldest = self.pending[0][1] if self.pending else None
            match qualify(oldest, due, agenda.pace(self.now), self.options, self.now):
                case Take(cause):
                    agenda.began(self.now, self._wall())
                    agenda.sealed(self._take(cause))
                    self.now += self.round_seconds
                case Wait(until):
                    self._pass(until)
                case _:
                    self._pass(due.at if isinstance(due, Due) else None)

    def _arrival(self, index: int) -> float:
        return (self.commits[index].time_us - self.commits[0].time_us) / 1e6

    def _wall(self) -> datetime:
        return self.commits[0].time + timedelta(seconds=self.now)

    def _log_ends(self) -> list[Position]:
        last = self.commits[self.arrived - 1]
        return [last.position] if last.end else []

    def _receive(self, rules: Rules) -> None:
        """Judge every commit that has arrived by now."""
        while self.arrived < len(self.commits) and self._arrival(self.arrived) <= self.now:
            commit = self.commits[self.arrived]
            rule = rules.judge(commit)
            self.verdicts.append(Verdict(commit, rule))
            if rule is not None:
                self.pending.append((self.arrived, Pending(commit, rule, self._arrival(self.arrived))))
            self.arrived += 1

    def _take(self, cause: Cause) -> RecoveryPoint:
        """Give every pending commit its outcome: the newest is protected, the others are coalesced."""
        number = len(self.points) + 1
        for index, pending in self.pending:
            newest = index == self.pending[-1][0]
            outcome = Outcome.PROTECTED if newest else Outcome.COALESCED
            waited = self.now - pending.arrived
            self.verdicts[index] = Verdict(pending.commit, pending.rule, outcome, number, waited)
        self.points.append(RehearsedPoint(number, cause, self._wall(), len(self.pending)))
        self.pending.clear()
        return self._base(number)

    def _base(self, number: int = 0) -> RecoveryPoint:
        """Give what stands for the newest sealed point."""
        at = self.commits[max(self.arrived - 1, 0)].position
        marks, moment = (Mark(at, at if at.at else None),), self._wall()
        return RecoveryPoint("", number, State.SEALED, Cause.COMMIT, marks, moment, sealed_at=moment)

    def _pass(self, until: float | None) -> None:
        """Move on to `until` or to the next arrival, whichever comes first."""
        moments = [] if until is None else [until]
        if self.arrived < len(self.commits):
            moments.append(self._arrival(self.arrived))
        self.now = max(self.now, min(moments))
