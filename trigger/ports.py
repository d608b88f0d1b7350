"""What the service needs of the world, as Protocols; drivers in `connectors` implement them.

Contracts that hold for every port:

- A call may be cancelled at any await. A cancelled call may or may not have had its effect; calling it again with
  the same arguments is safe.
- Blocking work runs in threads; the event loop is never held for longer than a few milliseconds.
- Drivers do not retry, log or count. They raise the error of their port, with a hint, and say whether it is
  retryable; the service decides.
- Names, paths and ids are validated where they are made (`trigger.model`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trigger.model import (
    Address,
    Bracket,
    Commit,
    CommitRecord,
    Extent,
    Finding,
    Flush,
    Layout,
    Logged,
    Retained,
    Snapshot,
    Space,
    Volume,
)
from trigger.position import At, History, Lineage, Name, Position
from trigger.replay import Replay, Running, Target


class Clock(Protocol):
    """The time of day, for labels; durations are measured with the event loop's monotonic clock."""

    def now(self) -> datetime:
        """Give the present time, aware UTC."""
        ...


class Batch(NamedTuple):
    """What one read of a source gave: complete commits in log order, perhaps none."""

    commits: Sequence[Commit]
    through: Position
    """Every commit of this stream that ends at or before here has been delivered by now."""


class Break(NamedTuple):
    """Why a source cannot go on where it was left."""

    until: Position
    """From here on commits are seen again: where the stream goes on, or what of the settled is its past too."""
    reason: str
    ends: tuple[tuple[Position, Position], ...] = ()
    """(end, where the next one begins) of each branch that was left since: nobody gives what it had behind its end."""


class Source(Protocol):
    """One stream of commits of a database (for PostgreSQL: one logical slot in one database).

    Its places are those of the database's log, where one is kept as a journal; a source that only triggers has a
    history of its own, by whatever rises with its commits. At every `open` it looks, by something that cannot repeat,
    whether that is the same history still: else positions bear a new incarnation. Without a journal, whose last record
    it could compare, it keeps that itself, durably, before it gives a place behind it.

    The stream delivers each commit at least once, in log order, however often the connection breaks. The server
    forgets nothing before it was acknowledged.
    """

    name: str

    async def open(self, after: Position | None) -> Break | None:
        """Connect and resume behind `after`, the last settled position; None the first time.

        Gives None where the stream goes on without a hole (or starts for the first time), else the break: what was
        kept for us was lost, dropped, recreated or moved ahead, or the history is another one. The stream is then open
        behind the break. Opening again after an error is how a caller reconnects.

        Raises:
            SourceError: no connection, or the server refused; `retryable` says whether waiting can help.
        """
        ...

    async def read(self) -> Batch:
        """Wait until something has arrived and give all of it, up to a bound of the driver's own.

        A cancelled read loses nothing. Commits that end at or before `after` of the last `open` are not delivered.
        The first read of a stream opened with None says at once where it begins, however idle the server is.

        Raises:
            SourceError: the connection broke (retryable), or the stream cannot be understood (not retryable).
        """
        ...

    async def acknowledge(self, through: Position) -> None:
        """Let the server forget everything up to `through`; must not run ahead of what the catalog has."""
        ...

    async def heartbeat(self) -> None:
        """Tell the server that we are alive; called at least every `heartbeat_seconds` while nobody reads."""
        ...

    heartbeat_seconds: float
    trouble: str
    """What of a connected stream is not in order, for the operator; empty where all is."""

    async def close(self) -> None:
        """Disconnect; the slot stays. Never raises."""
        ...


class Seen(NamedTuple):
    """How far a history went, and its last commit, as far as is known from before."""

    position: Position
    commit: CommitRecord | None


class Database(Protocol):
    """A database whose commits are protected, as a whole."""

    kind: str
    """What its histories are of; see `History.kind`."""
    session: int
    """Another one whenever it had to connect again: who asked twice in one session asked one start of the server."""

    def recognise(self, seen: Collection[Seen]) -> None:
        """Take note of what is known from before of each history, of this database and of others.

        Called once, before anything else is asked. The driver goes on in the newest incarnation among them, unless
        its own memory has a newer one, or the database itself turns out to be another.
        """
        ...

    async def lineage(self) -> Lineage:
        """Give the present history and its past; raises `DatabaseError`."""
        ...

    async def durable(self) -> Position:
        """Give the position up to which the log is on stable storage; raises `DatabaseError`."""
        ...

    async def record_end(self) -> Position:
        """Give the end of a record, durable and behind all that is visible; commits as `mark` does to make it so."""
        ...

    async def ceiling(self) -> Position:
        """Give where nothing that a finished snapshot holds lies behind: the insert position, not the flushed one."""
        ...

    async def redo(self) -> Position | None:
        """Give from where on a snapshot that is cut now is replayed; raises `DatabaseError`.

        For PostgreSQL the redo position of the last completed checkpoint. None where nothing is replayed.
        """
        ...

    def bracket(self, name: str) -> AbstractAsyncContextManager[Callable[[], Awaitable[Bracket]]]:
        """Hold the database's backup bracket; for storages that do not cut all volumes at one instant.

        Gives a function that ends the bracket and returns its proof. Leaving the block without having called it
        abandons the bracket. Only one is held at a time in one process.
        """
        ...

    async def mark(self) -> Position:
        """Commit a transaction of ours that changes nothing; gives a durable position behind it.

        By it a replay sees that it has passed the present time: every commit that was visible before it lies before
        it in the log, and has an earlier time. Raises `DatabaseError`.
        """
        ...

    async def retained(self) -> list[Retained]:
        """Give how much log is kept for each reader of ours; raises `DatabaseError`."""
        ...

    async def checkpoint(self) -> None:
        """Let what is cut from now on be replayed from about here; long, never called on the critical path."""
        ...

    async def check(
        self, volumes: Sequence[Volume], *, bracketed: bool = False, seen: Collection[str] = ()
    ) -> list[Finding]:
        """Give all that a pre-flight check says; `seen` before were these streams, of which one that is gone may be."""
        ...

    async def explain(self) -> list[Finding]:
        """Give what a source of this database cannot see, and what is done about it."""
        ...

    async def remove(self, *, unused: bool = False) -> list[str]:
        """Drop all that was made in the cluster, so that it keeps nothing for us any more; gives the names of it.

        With `unused` only what no stream of now has a use for, as of a database that is not configured any more; a
        service may run meanwhile.

        Raises:
            SourceError, DatabaseError: part of it is in use, or the server refused; what came before is gone.
        """
        ...

    async def layout(self) -> Layout:
        """Give where the cluster lies and who owns it; raises `DatabaseError`."""
        ...

    def recall(self, document: Mapping[str, Any]) -> Layout:
        """Give the layout that was kept as a JSON object, by this version or an earlier one; raises `ConfigError`."""
        ...

    async def close(self) -> None:
        """Disconnect. Never raises."""
        ...


class Agent(Protocol):
    """A host's client, which flushes what the host still holds in memory."""

    name: str

    async def prepare(self, volumes: Sequence[Volume]) -> None:
        """Open, before any round, what has to be for an earlier error of write-back to be seen; raises `AgentError`."""
        ...

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        """Write everything of the prepared volumes to stable storage; one proof a volume.

        An error of write-back, even an old one that nobody has seen yet, fails the flush and poisons the volume:
        every later flush fails too, until an operator has looked and cleared it.

        Raises:
            AgentError: not flushed, or not within `deadline_seconds`.
        """
        ...

    async def clear(self, volume: str) -> None:
        """Trust a poisoned volume again, on an operator's word; one that is not poisoned is no error."""
        ...

    async def close(self) -> None:
        """Let go of the volumes. Never raises."""
        ...


class Capability(StrEnum):
    """What a storage can do; differences are data, never `isinstance`."""

    ATOMIC = "atomic"
    """The snapshot of one volume is one instant."""
    ATOMIC_GROUP = "atomic-group"
    """The snapshots of all volumes together are one instant."""
    INSTANT_CLONE = "instant-clone"
    """A clone shares blocks with its snapshot, whatever the size."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """What a storage found that bears one of our names."""

    point: str
    tag: str | None
    """The text of the tag; None where it is missing or cannot be read."""
    snapshots: tuple[Snapshot, ...]
    """Those that are there, whole; without a tag those that are it by themselves, as far as the storage can tell."""
    complete: bool
    """Whether every volume that the tag names is there, whole."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A writable copy of a point's snapshots; `paths` say of each volume where its copy lies."""

    name: str
    point: str
    paths: tuple[tuple[str, Path], ...]
    created_at: datetime


class Storage(Protocol):
    """Makes, tags, lists, clones and deletes snapshots of a fixed group of volumes, addressed by point id.

    Every snapshot bears its tag in the storage itself, so that a catalog can be rebuilt from storage alone.
    """

    name: str
    capabilities: frozenset[Capability]
    clones_folder: Path | None
    """Below which folder of this host clones are made; None where that shows only when one is."""

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what stands in the way of snapshots of `volumes`; changes nothing."""
        ...

    async def claim(self) -> None:
        """Hold the storage, so that nobody else makes or removes points in it, until `close` or the process ends.

        Repeating it is no error. Who only looks, clones and drops clones needs no claim. Where there is nothing yet to
        hold, or it cannot be written, the claim is taken with the next snapshot that makes a point, which then raises
        where another one holds it. Raises `StorageError`, not retryable, where another one holds it.
        """
        ...

    async def snapshot(self, volumes: Sequence[Volume], point: str, tag: str) -> tuple[Snapshot, ...]:
        """Cut every volume and keep the result under `point`, with `tag` (JSON text) beside it.

        Repeating the call for a point whose snapshot is complete gives the same snapshots and cuts nothing. What an
        unfinished call left behind is shown by `tagged` with `complete=False`, and `delete` removes it. Raises
        `StorageError` where nothing usable was made.
        """
        ...

    async def retag(self, point: str, tag: str) -> None:
        """Replace the tag of a point durably and at once (the old one or the new one, never neither).

        Where it is missing or cannot be read, and the snapshots are whole, it is written anew, for those that `tagged`
        shows. Raises `StorageError` where there is no snapshot, or it cannot be written.
        """
        ...

    async def tagged(self) -> list[Tagged]:
        """Give everything that bears one of our names, whole or not, by point id."""
        ...

    async def delete(self, point: str) -> None:
        """Remove the snapshots and the tag of a point; nothing to remove is no error."""
        ...

    async def clone(self, point: str, name: str, progress: Progress) -> Clone:
        """Make a writable copy of a point's snapshots under `name` (made by us: lower-case letters, digits, `-`).

        It need not be on stable storage yet: what a restore makes of it is synced as a whole at the end. Raises
        `StorageError` where there is no such point, the name is taken, or no room; nothing is left behind.
        """
        ...

    async def clones(self) -> list[Clone]:
        """Give all clones, the unfinished too."""
        ...

    async def drop_clone(self, name: str) -> None:
        """Remove a clone with all it holds; nothing to remove is no error."""
        ...

    async def space(self) -> Space:
        """Give the room that is left."""
        ...

    async def close(self) -> None:
        """Let go of the claim, if there is one. Never raises."""
        ...


class Progress(Protocol):
    """Told how far a long piece of work has come."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` bytes (0 where unknown) of `step` are done."""
        ...


class Journal(Protocol):
    """The database's log, kept continuously so that every commit between two snapshots can be replayed."""

    replays: bool
    """Whether anything can be replayed; without it (a source that only triggers) points come back as they were cut."""

    async def check(self) -> list[Finding]:
        """Give what a pre-flight check has to say of where the log is to come from; changes nothing."""
        ...

    async def run(self) -> None:
        """Keep the log until cancelled; raises `JournalError` where that is no longer possible."""
        ...

    async def catch_up(self) -> None:
        """Bring the log that can be had by now, since `run` may be at work in no process; beside one it is harmless."""
        ...

    async def extents(self) -> list[Extent]:
        """Give what it holds, by history and place; neighbouring stretches of one history are joined."""
        ...

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history`, also of one that the database itself has left; raises `JournalError`."""
        ...

    async def audit(self) -> list[Finding]:
        """Look at what is new since the last audit; gives all that is wrong: missing, truncated, foreign, flipped."""
        ...

    async def stage(self, replay: Replay, folder: Path, progress: Progress) -> int:
        """Put into `folder` every file that a replay asks for, and what proves where it ended; gives the bytes.

        Raises `JournalError` where part of the stretch is not held; the message names the first missing segment.
        """
        ...

    async def release(self, starts: Collection[Position]) -> int:
        """Delete the files of the log that no replay from any of `starts` can ask for; gives how many.

        A file of a history is asked for by a start in that history, or in its past, that does not lie behind it. The
        newest file stays in any case, and all of them where there are no starts.
        """
        ...

    def commits(self, lineage: Lineage, begin: At, end: At, like: Name) -> AsyncGenerator[Logged, None]:
        """Give the commits whose records begin from `begin` up to `end`, in order, by the log itself, all of it read.

        What no stream shows too. `like` is a name near those there: a log may say less. Raises `JournalError`.
        """
        ...

    def file_start(self, position: Position) -> int:
        """Give where the file of the log that holds a position begins; its own place where there are no files.

        Two histories may have files of another size. Asks nobody: by what the last `extents` found.
        """
        ...


class Recovery(Protocol):
    """Turns a clone of a cluster's volumes into a running, isolated server at a target."""

    async def start(
        self,
        clone: Clone,
        volumes: Sequence[Volume],
        replay: Replay,
        log_folder: Path,
        progress: Progress,
        *,
        throwaway: bool = False,
    ) -> Running:
        """Isolate the clone, replay what lies in `log_folder`, let it go on in a history of its own, and wait.

        `throwaway` trades the clone's own crash safety for speed; for sandboxes of `verify`. Raises `RestoreError`
        where it did not reach the target; the message holds the server's own last words.
        """
        ...

    def inspect(
        self, running: Running, target: Target, log_folder: Path, *, deep: bool
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """Give (what was checked, whether it held, what was seen), one a check.

        The target's commit is there; the next commit record in the log behind it (read from `log_folder` by a
        program that is not ours) is not; with `deep` also structures and pages are clean. A check that had nothing to
        look at is not given. `deep` is for sandboxes, which it changes: nobody may use one afterwards but `query`.
        """
        ...

    async def query(self, running: Running, database: str, sql: str) -> str:
        """Give the first column of the first row of `sql` as text; raises `RestoreError`."""
        ...

    async def stop(self, clone: Clone) -> None:
        """Stop the server of a clone; one that does not run is no error."""
        ...

    async def resume(self, clone: Clone, listen: Address | None = None) -> Running:
        """Start the stopped server of a clone as it was left; with `listen` it is reached there too, with a password.

        Raises `RestoreError` where it was never brought up, or does not come up.
        """
        ...

    async def running(self, clone: Clone) -> Running | None:
        """Give the server of a clone if it runs."""
        ...

    async def used(self, clone: Clone) -> int | None:
        """Give how many transactions a clone began since it was brought up, unasked ones too; None if none can tell."""
        ...

    async def unfit(self, clone: Clone, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what keeps a clone from going on as the cluster in `volumes`: another copy went on under its branch."""
        ...

    async def at_work(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give the servers that work in one of the volumes, also where their processes are not seen; never raises."""
        ...

    async def release(self, clone: Clone, volumes: Sequence[Volume]) -> None:
        """Make a stopped clone fit to take the place of the cluster it was made of.

        It gets back the configuration, and the links into `volumes`, as its snapshot had them, and what isolated it
        is taken away; so it works only where the volumes lie. Repeating the call changes nothing. Raises
        `RestoreError` where its server still runs, or what was put aside is not there.
        """
        ...
