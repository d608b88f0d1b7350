"""The port of a stream of commits, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from trigger.model import Commit
from trigger.position import Lineage, Position


class Batch(NamedTuple):
    """What one read of a source gave."""

    commits: Sequence[Commit]
    """Complete commits in log order; may be empty."""
    through: Position
    """Every commit of this stream that ends at or before here has been delivered by now."""


class Break(NamedTuple):
    """Why a source cannot go on where it was left."""

    until: Position
    """From here on commits are seen again: where the stream goes on, or what of the settled is its past too."""
    reason: str
    lineage: Lineage
    """In which the stream goes on: what a branch that it leaves had behind its end is given by nobody."""


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
    """What of a connected stream is not in order, or what its opening waits for; empty where all is in order."""

    async def close(self) -> None:
        """Disconnect; the slot stays. Never raises."""
        ...
