"""The port of a database as a whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from trigger.model import Bracket, CommitRecord, Finding, Layout, Retained, Volume
from trigger.position import Lineage, Position


class Seen(NamedTuple):
    """What is known from before of one history."""

    position: Position
    """How far it went."""
    commit: CommitRecord | None
    """The last commit of it that is known."""


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

    def claim(self, holder: str) -> None:
        """Note in the database, with all that is made in it from now on, for whose catalog that is.

        What another one's made is not taken: a stream on it does not open, and `remove` refuses. Without a claim
        nothing is noted, and nothing is another's.
        """
        ...

    async def claimed_by_another(self, holder: str) -> Finding | None:
        """Give what bears the names of ours in the database and is of another catalog than `holder`; None for nothing.

        Changes nothing, and holds while the other's service is down too, until its catalog is gone from where it was.
        Raises `DatabaseError`.
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
        """Give a position at or after everything that a snapshot finished before this call can hold.

        For PostgreSQL the insert position: log that was written but not yet flushed may be in a snapshot too.
        """
        ...

    async def redo(self) -> Position | None:
        """Give from where on a snapshot that is cut now is replayed.

        For PostgreSQL the redo position of the last completed checkpoint. None where nothing is replayed.

        Raises:
            DatabaseError: no answer; or by one that does not keep its files where `lies_at` said, so that a snapshot
                of them would not be of it.
        """
        ...

    def bracket(self, name: str) -> AbstractAsyncContextManager[Callable[[], Awaitable[Bracket]]]:
        """Hold the database's backup bracket; for storages that do not cut all volumes at one instant.

        Gives a function that ends the bracket and returns its proof. Leaving the block without having called it
        abandons the bracket. Only one is held at a time in one process. Raises `DatabaseError` as `redo` does.
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
        """Give everything that a pre-flight check of settings, roles, slots and paths has to say.

        Args:
            volumes: what the cluster lies on.
            bracketed: whether every snapshot is taken inside a backup bracket.
            seen: the streams that the catalog knows; one whose database is gone is a warning, not refused.
        """
        ...

    async def explain(self) -> list[Finding]:
        """Give what a source of this database cannot see, and what is done about it."""
        ...

    async def remove(self, *, unused: bool = False) -> list[str]:
        """Drop all that was made in the cluster, so that it keeps nothing for us any more; gives the names of it.

        With `unused` only what no stream and no journal of now has a use for, as of a database that is not configured
        any more; a service may run meanwhile.

        Raises:
            SourceError, DatabaseError: part of it is in use, or the server refused; what came before is gone.
        """
        ...

    async def layout(self) -> Layout:
        """Give where the cluster lies and who owns it.

        Raises:
            DatabaseError: no answer, or what lies there on this host is not what the database that answers keeps; once
                `lies_at` was called also where it keeps its files elsewhere.
        """
        ...

    def lies_at(self, layout: Layout) -> None:
        """Take note of where the files lie that snapshots are made of.

        Called once, before a point is taken. Whatever answers after that may be another database, or a copy of this
        one on another host: `redo` and `bracket` refuse it on the very connection on which they ask. Where it cannot
        be told, because the files may not be read, nothing is refused, and `check` says so.
        """
        ...

    def recall(self, document: Mapping[str, Any]) -> Layout:
        """Give the layout that was kept as a JSON object, by this version or an earlier one; raises `ConfigError`."""
        ...

    async def close(self) -> None:
        """Disconnect. Never raises."""
        ...
