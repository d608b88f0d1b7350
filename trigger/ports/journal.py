"""The port of a database's log, kept so that it can be replayed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from trigger.model import Extent, Finding, Logged
from trigger.ports.progress import Progress
from trigger.position import At, History, Lineage, Name, Position
from trigger.replay import Replay

Copies = Callable[[History], Awaitable[tuple[Path, Path] | None]]
"""Gives (a snapshot on this host, where in it the log lies), the newest that was cut in a history; None for none."""


class Journal(Protocol):
    """The database's log, kept continuously so that every commit between two snapshots can be replayed."""

    replays: bool
    """Whether anything can be replayed. Without it (a source that only triggers has no log) points are brought back as
    they were cut, and nothing else is."""

    def look_into(self, copies: Copies) -> None:
        """Take note of how snapshots are found, since one may alone hold what its history began on.

        Called once, before anything else is asked; nothing is looked up by it.
        """
        ...

    async def check(self) -> list[Finding]:
        """Give what a pre-flight check has to say of where the log is to come from; changes nothing."""
        ...

    async def run(self) -> None:
        """Keep the log until cancelled; raises `JournalError` where that is no longer possible."""
        ...

    async def begun(self) -> bool:
        """Whether the first base can be taken: it holds log, or what it is read from will give all from here on.

        Raises `JournalError` where that cannot be told.
        """
        ...

    async def is_void(self) -> bool:
        """Whether nothing that `run` keeps lies where it is kept: it never ran, or its filesystem is not mounted.

        Once `run` was at work something lies there, log or not; what is put there for a restore, or for a look at the
        past, does not count. Raises `JournalError` where that cannot be looked at.
        """
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
        """Look at what is new since the last audit; gives all that is wrong: missing, truncated, foreign, flipped.

        Log that is held no more is refused; a warning is what keeps log from coming, or from being looked at, by now.
        """
        ...

    async def lacks_room(self) -> Finding | None:
        """Give that no more log finds room where it is kept, and the remedy; None while it does, or nobody knows.

        Nothing that runs is asked: it is told beside a journal that runs elsewhere, and where none does.
        """
        ...

    async def stage(self, replay: Replay, folder: Path, progress: Progress) -> int:
        """Put into `folder` every file that a replay asks for, and no more; gives the bytes.

        Raises `JournalError` where part of the stretch is not held, and the message names the first missing segment;
        or where it finds no room.
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

        What no stream shows too. `like` is a name near those there: a log may say less. Where it is one of very many
        that a commit may be called by, it is among those that are listed. Raises `JournalError`.
        """
        ...

    async def named(self, commits: Sequence[Logged]) -> list[Logged]:
        """Give commits of the log with the database that each was made in, as far as that can be known."""
        ...

    def file_start(self, position: Position) -> int:
        """Give where the file of the log that holds a position begins; its own place where there are no files.

        Two histories may have files of another size. Asks nobody: by what the last `extents` found.
        """
        ...
