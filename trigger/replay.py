"""What a restore brings back, and what leads there: the words between the planner, the journal and the recovery."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from trigger.model import Bracket, CommitRecord
from trigger.position import At, History, Position


@dataclass(frozen=True, slots=True)
class Target:
    """The state that a restore brings back: all commits at or before one place in a lineage, and no other.

    How a server is made to stop there is known to its recovery driver. Where the target is a time, it is the state
    before the first commit that is later; where it has neither place nor time, it is all that there is.
    """

    history: History
    """The history in which the place lies; a replay follows this branch."""
    at: At | None
    """The place; None where it is known only when the replay is there."""
    inclusive: bool
    """Whether the record that begins at `at` (or the commits made at `time`) belong to the state."""
    description: str
    """For people: `commit 7731 (0/1A2B3C8)`, `before transaction 7731`."""
    time: datetime | None = None
    commit: CommitRecord | None = None
    """The last commit that the state holds, as far as the catalog knows."""
    reach: At | None = None
    """So far the log must go: to the end of the first record that stays out, or of a commit that is later than a time;
    for the latest state to the end of the last commit that is known; what was cut ends there at the most. None where
    that is not known."""
    around: tuple[CommitRecord, ...] = ()
    """The commits that the catalog has right before and right behind the end of the state, where `commit` is none of
    them: a log that has something else at their places is another one."""
    point: str = ""
    """The id of the point whose snapshots are the state, as they were cut; "" where a replay leads to it."""
    later: At | None = None
    """Where the record of the first commit begins that is later than `time`; None where none is known."""

    SHOWN: ClassVar = ("kind",)
    """What is shown of it beside its fields."""

    @property
    def kind(self) -> str:
        """How a replay knows where to stop: a `place`, a `time`, `latest`, or `end` (what was cut, as it is)."""
        return "end" if self.point else "time" if self.time else "latest" if self.at is None else "place"

    @property
    def limit(self) -> At | None:
        """What holds log behind here may hold more than the state; None where no such place is known."""
        return self.later if self.time is not None else self.at

    @property
    def is_latest(self) -> bool:
        """Whether all that there is belongs to the state."""
        return self.at is None and self.time is None and not self.point


@dataclass(frozen=True, slots=True)
class Replay:
    """What leads a clone of a point's snapshots to a state."""

    target: Target
    log_from: Position
    """From here on the journal must give the log; what lies before is in the snapshots."""
    until: At
    """Up to here it must; what it holds behind is given too, as far as the target can want it."""
    bracket: Bracket | None = None
    """Of a copy that is not one instant; it is replayed to its stop in any case."""
    as_cut: bool = False
    """Whether the snapshots end at the target by themselves, and nothing is to be replayed beyond."""
    held_until: At = 0
    """So far the snapshots may hold log themselves: no replay stops before."""
    redo: Position | None = None
    """From here on the snapshots have to be replayed, or from behind: those that begin before are of something else.
    None where that is not known."""


@dataclass(frozen=True, slots=True)
class Following:
    """What is known to follow on a place in a history: what a clone that ends there must not have."""

    begin: At
    commit: CommitRecord | None
    """The first commit whose record begins there, or behind; None where the log that is held has none."""
    end: At
    """Up to here it was looked for, in log without a hole; with a commit, the end of that."""


Follows = Callable[[At], Awaitable[Following | None]]
"""Gives what follows on a place of a target's history; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Running:
    """A clone that is brought up; for most databases a server that accepts connections."""

    clone: str
    conninfo: str
    """How its clients reach it, in their own words; "" where nothing is to be connected to."""
    data_directory: Path
    history: History
    replayed: At
    """Where the replay ended."""
    last_commit_at: datetime | None
    """Commit time of the last transaction replayed, by the server's own clock."""
    notes: tuple[str, ...]
    """What a clone cannot have: slots gone, unlogged tables empty, sequences ahead, in-doubt transactions."""
    pid: int = 0
    """Of its server; 0 where there is none."""
