"""What Trigpoint talks about: commits, proofs of flush, snapshots, recovery points, gaps, restore targets.

Everything here is immutable and does no I/O. Times are aware UTC and are labels; order is by position only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trigger.point_names import tag_name
from trigger.position import At, History, Name, Position

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Address(NamedTuple):
    """Where a server listens over TCP: an IP address of this host, or one that means several, and a port."""

    host: str
    port: int


class Changes(NamedTuple):
    """How many rows of one table a commit inserted, updated and deleted, and how often it truncated the table."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    truncated: int = 0

    @property
    def rows(self) -> int:
        """Rows changed; a TRUNCATE counts none, since the log does not say how many went."""
        return self.inserted + self.updated + self.deleted


ORDINARY_TABLES = 8
ORDINARY_MARKER_CHARACTERS = 128
"""A commit that brings so much beside itself counts for two, one that brings a hundred times as much for a hundred."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed transaction, as a source reports it.

    `start` and `end` are where its commit record begins and ends in the log. They are not interchangeable: a
    restore that includes the commit stops at `start` inclusively, a source is acknowledged with `end`.
    """

    stream: str
    """The source that reported it; for PostgreSQL the name of the database."""
    history: History
    start: At
    end: At
    name: Name
    """What people call it: for PostgreSQL its full transaction id."""
    time_us: int
    """Commit time by the database's clock, in microseconds since 1970 (UTC)."""
    tables: Mapping[str, Changes] = field(default_factory=dict)
    """Changes by qualified table name (`schema.table`), as far as the source can see them."""
    markers: tuple[str, ...] = ()
    """What the application wrote into the transaction for us to see."""
    origin: str = ""
    """What it was replicated from; "" for a commit made here."""
    markers_cut: bool = False
    """Whether it has more markers, or longer ones, than its source keeps."""

    @property
    def position(self) -> Position:
        """Where the commit is complete: the end of its record, in its history."""
        return Position(self.history, self.end)

    @property
    def time(self) -> datetime:
        """Commit time by the database's clock."""
        return from_microseconds(self.time_us)

    @property
    def rows(self) -> int:
        """Rows changed in all tables."""
        return sum(changes.rows for changes in self.tables.values())

    @property
    def weight(self) -> int:
        """For how many ordinary commits it counts, by the memory that it takes."""
        characters = sum(map(len, self.markers)) + 8 * len(self.markers)
        return 1 + len(self.tables) // ORDINARY_TABLES + characters // ORDINARY_MARKER_CHARACTERS


def from_microseconds(time_us: int) -> datetime:
    """Give the aware UTC time that lies `time_us` microseconds after 1970."""
    return EPOCH + timedelta(microseconds=time_us)


def to_microseconds(time: datetime) -> int:
    """Give `time` (aware) in whole microseconds since 1970."""
    return (time - EPOCH) // timedelta(microseconds=1)


class Outcome(StrEnum):
    """What became of a qualifying commit; each has exactly one."""

    PROTECTED = "protected"
    """A point was taken for this very commit."""
    COALESCED = "coalesced"
    """A point taken for a later commit holds it; an exact restore replays to it from the base before."""
    MISSED = "missed"
    """No point holds it; the reason is recorded."""


class CommitRecord(NamedTuple):
    """What the catalog keeps of one qualifying commit."""

    stream: str
    name: Name
    start: At
    end: At
    time_us: int
    markers: tuple[str, ...]
    outcome: Outcome


class Logged(NamedTuple):
    """A commit as the log itself has it, whether any stream showed it or not."""

    history: History
    name: Name
    start: At
    end: At
    time_us: int
    children: tuple[Name, ...]
    """What people may call it besides: for PostgreSQL the ids of its savepoints."""
    did: str
    """What its record says of what was done, in words; "" where it says no more than that it was committed."""
    database: str = ""
    """In which database it was made; "" where that was not asked for, or nobody knows."""
    more_children: int = 0
    """How many `children` it has besides those that are listed."""

    @property
    def record(self) -> CommitRecord:
        """What a catalog would keep of it; nobody has an outcome for it."""
        return CommitRecord("", self.name, self.start, self.end, self.time_us, (), Outcome.MISSED)


class Cause(StrEnum):
    """Why a recovery point was taken."""

    COMMIT = "commit"
    START = "start"
    INTERVAL = "interval"
    CRON = "cron"
    DEMAND = "demand"
    REPLAY = "replay"
    """The log since the last base had grown to what can just be replayed within the restore objective."""
    GAP = "gap"
    """Commits may have gone unseen; an unconditional point closes the gap."""
    CATCH_ALL = "catch-all"
    """The log had moved without visible commits (DDL, sequences, large objects, other databases)."""


class State(StrEnum):
    """The life of a recovery point."""

    OPEN = "open"
    SEALED = "sealed"
    EXPIRING = "expiring"
    EXPIRED = "expired"
    FAILED = "failed"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.OPEN: frozenset({State.SEALED, State.FAILED}),
    State.SEALED: frozenset({State.EXPIRING, State.FAILED}),
    State.EXPIRING: frozenset({State.EXPIRED}),
    State.EXPIRED: frozenset(),
    State.FAILED: frozenset({State.SEALED}),
}
"""Every legal change of state; anything else is an error of the program.

Only what was sealed before it failed, since its snapshot was gone, is sealed again."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory tree that the storage can cut at one moment: a subvolume, a filesystem, or a plain directory."""

    name: str
    path: str


class System(NamedTuple):
    """A cluster or server whose files lie somewhere."""

    name: str
    """Its own identity, as histories have it."""
    version: str
    """Of which product and version, in people's words: `PostgreSQL 16`; "" where nothing says it."""

    def __str__(self) -> str:
        return f"{self.version} ({self.name})" if self.version else self.name


@dataclass(frozen=True, slots=True)
class Flush:
    """The proof that everything written to a volume before `began_at` is on stable storage."""

    agent: str
    volume: str
    device: str
    """`major:minor` of the filesystem that was flushed."""
    filesystem: str
    """The filesystem's id (`statfs` f_fsid, hexadecimal), so that a wrong mount is noticed."""
    began_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One volume as it was at one moment, kept by a storage driver."""

    volume: str
    driver: str
    location: str
    """Where the driver keeps it; a path for drivers inside a filesystem."""
    began_at: datetime
    ended_at: datetime
    bytes_copied: int = 0
    """What had to be copied; 0 where the storage shares unchanged blocks."""
    path: str = ""
    """Where the volume lay; "" where an earlier version cut it."""
    storage: str = ""
    """Which of several storages keeps it, by its name; "" where there was one alone."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """What the database gave for a copy that is not one instant, and its limits.

    A restore of such a snapshot must replay the log from `start`, and is a state of the database from `stop` on.
    """

    start: Position
    stop: Position
    document: Mapping[str, Any] = field(default_factory=dict)
    """What only the driver reads, as JSON has it; for PostgreSQL the backup label and the map of tablespaces."""
    filled_to: Position | None = None
    """Up to where its end itself filled the log, so that this is no reason for another point; None for nowhere."""

    SPREAD: ClassVar = "document"
    """The field whose keys are shown beside the others."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of restoring a point and looking at it."""

    at: datetime
    passed: bool
    target: str
    checks: tuple[tuple[str, bool, str], ...]
    """(what was checked, whether it held, what was seen)."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a point stands in one log, which is what is replayed together: a cluster, a server, a topic.

    The snapshots hold everything up to `floor`, and nothing that begins at or behind `ceiling`.
    """

    floor: Position
    ceiling: Position | None = None
    redo: Position | None = None
    """Where a restore of the snapshots begins to replay this log (for PostgreSQL the redo position of the last
    checkpoint before)."""
    bracket: Bracket | None = None

    @property
    def log_from(self) -> Position:
        """From where on the journal must have the log.

        An atomic snapshot's own log ends somewhere between floor and ceiling; of a bracketed copy no log is trusted.
        """
        return self.bracket.start if self.bracket else self.floor

    @property
    def replay_from(self) -> Position:
        """Where a replay begins, as far as that is known."""
        return self.bracket.start if self.bracket else self.redo or self.floor

    @property
    def holds_at_most(self) -> int:
        """The place at or before which everything lies that the snapshots may hold."""
        ceiling = self.ceiling.at if self.ceiling else self.floor.at
        return max(ceiling, self.bracket.stop.at) if self.bracket else ceiling

    @property
    def is_exact(self) -> bool:
        """Whether it is known to the last record what the snapshots hold, so that they are a state of their own.

        Only an atomic one can be: the log of a bracketed copy ends behind the record that closes the bracket.
        """
        return self.bracket is None and self.ceiling == self.floor

    @property
    def positions(self) -> tuple[Position, ...]:
        """All places that the snapshots are known by; a lineage that has the mark in its past includes each."""
        known = (self.floor, self.ceiling, *((self.bracket.start, self.bracket.stop) if self.bracket else ()))
        return tuple(position for position in known if position is not None)


GONE = "its snapshot is gone from the storage"
"""The failure of a point that was sealed, and why a sealed one is no base."""


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """A commit (or a moment), the proofs that it was on disk, and the snapshots that hold it.

    A restore to a commit starts from a point whose ceiling, in the commit's own log, is at or before the start of
    that commit's record.
    """

    id: str
    number: int
    """Counts up from 1 in one catalog; what people say."""
    state: State
    cause: Cause
    marks: tuple[Mark, ...]
    """Where it stands in each log whose database lies in its snapshots; first in the log of its own commit."""
    opened_at: datetime
    commit: CommitRecord | None = None
    """The commit it was taken for; None for a point that was not taken for one."""
    rule: str = ""
    """The rule that took the commit."""
    flushes: tuple[Flush, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    commits: int = 0
    """How many qualifying commits it protects, the coalesced ones included."""
    tables: Mapping[str, Changes] = field(default_factory=dict)
    """What those commits changed, by `stream.schema.table`."""
    sealed_at: datetime | None = None
    note: str = ""
    """Free text of whoever asked for it."""
    failure: str = ""
    """Why it failed; "" otherwise."""
    gaps: tuple[Gap, ...] = ()
    """The gaps that were open when it was; once sealed it closes them."""
    verification: Verification | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """What a tag says beside that, as a later version may; kept as it was."""

    SHOWN: ClassVar = ("floor", "ceiling", "redo", "bracket")
    """What is shown of it beside its fields."""

    @property
    def name(self) -> str:
        """The name of its snapshots in every storage."""
        return tag_name(self.id)

    @property
    def floor(self) -> Position:
        """The floor in the log of its own commit."""
        return self.marks[0].floor

    @property
    def ceiling(self) -> Position | None:
        """The ceiling in the log of its own commit; None before it is known."""
        return self.marks[0].ceiling

    @property
    def redo(self) -> Position | None:
        """Where a replay of that log begins."""
        return self.marks[0].redo

    @property
    def bracket(self) -> Bracket | None:
        """The proof of a copy that is not one instant, in that log."""
        return self.marks[0].bracket

    def mark_in(self, history: History) -> Mark | None:
        """Give where it stands in the log that a history belongs to; None where it does not hold that database."""
        return next((mark for mark in self.marks if mark.floor.history.is_of_system(history)), None)


@dataclass(frozen=True, slots=True)
class Gap:
    """An interval of the log in which qualifying commits may have gone unprotected."""

    stream: str
    after: Position
    """The last position known to be settled."""
    until: Position
    """The first position from which commits are seen again; it may lie in another history."""
    reason: str
    found_at: datetime
    closed_by: int = 0
    """The number of the unconditional point taken because of it; 0 while there is none."""


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a pre-flight check saw: what, how bad, and the remedy."""

    subject: str
    severity: Severity
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Retained:
    """Log that the database keeps for one reader of ours, because that has not let go of it."""

    reader: str
    """For PostgreSQL the name of a slot: of a stream, or of the journal."""
    bytes: int
    left_bytes: int | None
    """How much more it may become before the database drops it; None where nothing bounds it but the disk."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a database's files lie, every path real (no symbolic link in it)."""

    places: Mapping[str, Path]
    """By what lies there (`data`, `wal`, `tablespace-16400`); the whole of them makes the database."""
    log: Path
    """Where the log lies. A copy made inside the bracket need not hold it: a restore takes it from the journal."""
    config_files: tuple[Path, ...]
    """Configuration files outside those places."""
    owner: int
    """The user id that owns the data, under which the servers of clones run."""
    group: int
    log_file_bytes: int = 0
    """The size of one file of the log, of which a bracket fills some; 0 where there are none."""
    driver: Mapping[str, Any] = field(default_factory=dict)
    """What only the driver reads, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Space:
    """How much room a storage has."""

    free_bytes: int
    total_bytes: int
    wanted_free_bytes: int
    """No snapshot is made while less is free: it would succeed, and the database stop."""
    snapshots: int
    budget: int
    """How many snapshots the storage bears."""
    needed_bytes: int = 0
    """What a snapshot that found no room wants at the least besides `wanted_free_bytes`; 0 once one is made."""
    freeing: bool = False
    """Whether what was deleted still gives room back."""
    name: str = ""
    """Of several storages the one that this is said of."""
    storages: tuple[str, ...] = ()
    """The names of all of them."""
    silent: tuple[str, ...] = ()
    """Those of them that show nothing at all: they are new, or away."""

    @property
    def short(self) -> bool:
        """Whether no further snapshot will find room, as far as is known, unless others are deleted."""
        return self.free_bytes < self.wanted_free_bytes + self.needed_bytes and not self.freeing


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of log that the journal holds without a hole."""

    history: History
    start: At
    end: At
