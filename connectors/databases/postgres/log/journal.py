"""The journal of a PostgreSQL cluster: its write-ahead log, kept so that every commit can be replayed.

A folder for each life of the log (see `folders`) holds segments and timeline history files as PostgreSQL names them.
How they get there is the feed's business: `receiver` streams them, `archive` reads them from an archive that is there
already.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log import search
from connectors.databases.postgres.log.audit import Audit
from connectors.databases.postgres.log.files import entered, give, reading, take_place, write_flushed
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Staging
from connectors.databases.postgres.log.wal import PAGE_BYTES, history_timeline, holds_commit
from connectors.databases.postgres.log.waldump import WalDump
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import JournalError, PositionError, remedy
from trigger.model import CommitRecord, Extent, Finding, Logged, Severity
from trigger.ports import Copies, Progress
from trigger.position import History, Lineage, Name, Position
from trigger.replay import Replay

_GIVE_BACK = "mount the folder, and give it to us"
_MAKE_ROOM = (
    "make room on its filesystem, or give up what is too old: `trigpoint expire` lets go of the log that only older"
    " points need"
)


class Feed(Protocol):
    """What brings the log into the folder."""

    owner: tuple[int, int] | None
    """User and group id under which it writes into the folder; None for ours."""

    begun: bool
    """Whether, while it holds nothing yet, all log of the server is surely coming from a known place on."""

    async def run(self, segments: SegmentFolder) -> None:
        """Bring the log until cancelled, or until it belongs into another folder; raises `JournalError`."""
        ...

    def fetch(self, segments: SegmentFolder, name: str, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        """Try to bring one file by name, now, unless a sound one is there; whether it is by now.

        Nothing comes in that is not of the log that the folder keeps; where the server has to be asked for that, it
        is asked in `loop`. Blocks, and ends by a deadline of its own.
        """
        ...

    async def catch_up(self, segments: SegmentFolder) -> None:
        """Bring all of the log that is there by now and can be had without running; see port `Journal`."""
        ...

    def findings(self) -> list[Finding]:
        """Give what hinders the feed at present."""
        ...

    async def check(self, segment_bytes: int) -> list[Finding]:
        """Give what a pre-flight check has to say of the feed; see port `Journal`."""
        ...


async def _no_names() -> Mapping[int, str]:
    return {}


class PostgresJournal:
    """Port `Journal` over the folders of a log's lives and a feed.

    Args:
        folders: one for each life of the log.
        feed: what fills the present one.
        present: gives the history that the server is in, as far as is known.
        known: gives the history that was seen last, without asking the server; None for nothing.
        dump_for: gives `pg_waldump` for the log of a folder, for the audit; None where that version is not here.
        names: gives the names of the server's databases by oid; nothing where it does not answer.
    """

    replays = True

    def __init__(
        self,
        folders: LogFolders,
        feed: Feed,
        present: Callable[[], Awaitable[History]],
        dump_for: Callable[[SegmentFolder], WalDump | None],
        known: Callable[[], History | None] = lambda: None,
        names: Callable[[], Awaitable[Mapping[int, str]]] = _no_names,
    ) -> None:
        self._folders = folders
        self._feed = feed
        self._present = present
        self._dump_for = dump_for
        self._known = known
        self._names = names
        self._copies: Copies | None = None
        self._audits: dict[Path, Audit] = {}
        self._running: History | None = None
        self._file_bytes: dict[tuple[str, int], int] = {}

    def look_into(self, copies: Copies) -> None:
        """Take note of how snapshots are found; see port `Journal`."""
        self._copies = copies

    async def check(self) -> list[Finding]:
        """Give what a pre-flight check has to say of where the log is to come from, and go; changes nothing."""
        lack = await self.lacks_room()
        return [*await self._feed.check(self._folders.segment_bytes), *([lack] if lack else [])]

    async def run(self) -> None:
        """Keep the log until cancelled; where another life of it begins, in another folder from there on.

        What hinders it meanwhile (no connection, no room) is told by `audit` and tried again.

        Raises:
            JournalError: the folder cannot be made.
        """
        while True:
            history = await self._present()
            self._running = history
            segments = await self._folders.threads.run(partial(self._folders.of, history))
            await self._folders.threads.run(partial(segments.make, self._feed.owner))
            await self._audit_of(segments).begin()
            await self._feed.run(segments)

    async def begun(self) -> bool:
        """Whether it holds log, or an archive, which gives a segment when it is full, will give it from here on."""
        return self._feed.begun or bool(await self.extents())

    async def is_void(self) -> bool:
        """Whether `run` left its mark in the folder of no life of the log; see port `Journal`."""
        try:
            return await self._folders.threads.run(self._is_void)
        except OSError as error:
            raise JournalError(f"the journal folder cannot be looked into: {error}", hint=remedy(error)) from error

    def _is_void(self) -> bool:
        return not any(self._audit_of(segments).was_begun() for segments in self._folders.all())

    async def catch_up(self) -> None:
        """Bring what an archive has by now, as where the service does not run; see port `Journal`."""
        run, known = self._folders.threads.run, self._running or self._known()
        if known is not None:
            segments = await run(partial(self._folders.of, known))
            if await run(segments.path.is_dir):
                await self._feed.catch_up(segments)

    async def extents(self) -> list[Extent]:
        """Give what it holds without a hole, by history and place; damaged segments are not held."""
        return await self._folders.threads.run(self._extents)

    def _extents(self) -> list[Extent]:
        found = []
        for segments in self._folders.all():
            self._audit_of(segments).load()
            held = segments.extents()
            lives = {(extent.history.system, extent.history.incarnation) for extent in held}
            self._file_bytes |= dict.fromkeys(lives, segments.segment_bytes)
            found += held
        return found

    async def lineage(self, history: History) -> Lineage:
        """Give the past of `history` by its timeline history file, which an archive is asked for, then a snapshot.

        What a snapshot of the history has is put where the log is kept: a replay asks for it there.

        Raises:
            JournalError: nobody has it.
        """
        run = self._folders.threads.run
        try:
            return await run(partial(self._lineage, history, asyncio.get_running_loop()))
        except JournalError:
            place = await self._copies(history) if self._copies is not None else None
            if place is None or not await run(partial(self._take_from_copy, history, *place)):
                raise
            return await run(partial(self._folders.of(history).lineage, history))

    def _lineage(self, history: History, loop: asyncio.AbstractEventLoop) -> Lineage:
        segments = self._folders.of(history)
        try:
            return segments.lineage(history)
        except JournalError:
            if not (segments.path.is_dir() and self._fetch_into(segments, loop)(f"{history.branch:08X}.history")):
                raise
            return segments.lineage(history)

    def _take_from_copy(self, history: History, top: Path, below: Path) -> bool:
        """Put the history file that a snapshot has in the folder of the log; whether there is a sound one by now."""
        segments, name = self._folders.of(history), f"{history.branch:08X}.history"
        try:
            with entered(top, below) as log, reading(Path(name), folder=log) as file:
                text = file.read().decode()
            lsn.lineage(history, text)
            segments.make(self._feed.owner)
            draft = segments.path / f".{name}"
            write_flushed(draft, text)
            give(draft, self._feed.owner)
            take_place(draft, segments.path / name)
        except (OSError, ValueError, PositionError):
            return False
        return True

    async def commits(self, lineage: Lineage, begin: int, end: int, like: Name) -> AsyncGenerator[Logged, None]:
        """Give the commits of a stretch of a lineage, by the log itself; see port `Journal`."""
        run = self._folders.threads.run
        for history, low, high in lineage.stretches():
            segments = await run(partial(self._folders.of, history))
            dump = await run(partial(self._dump_for, segments))
            if dump is None:
                raise JournalError(
                    f"there is no pg_waldump for the log of {history}",
                    hint="install the programs of that version of PostgreSQL",
                )
            for extent in await run(segments.extents):
                first, last = max(low, begin, extent.start), min(high, end, extent.end)
                if extent.history == history and first < last:
                    async with aclosing(search.commits(segments, dump, history, first, last, like)) as found:
                        async for one in found:
                            yield one

    async def named(self, commits: Sequence[Logged]) -> list[Logged]:
        """Give commits with the names of their databases; of one that is dropped, or renamed unseen, with its oid."""
        found = await self._folders.threads.run(partial(self._databases_of, commits))
        names = await self._names() if any(found) else {}
        return [
            one._replace(database=names.get(oid, f"oid {oid}") if oid else "")
            for one, oid in zip(commits, found, strict=True)
        ]

    def _databases_of(self, commits: Sequence[Logged]) -> list[int]:
        folders = {history: self._folders.of(history) for history in {one.history for one in commits}}
        return [search.database_of(folders[one.history], one) for one in commits]

    def file_start(self, position: Position) -> int:
        """Give where the segment that holds a position begins; each life has segments of a size of its own."""
        life = position.history.system, position.history.incarnation
        return position.at - position.at % self._file_bytes.get(life, self._folders.segment_bytes)

    async def audit(self) -> list[Finding]:
        """Give all that is wrong with the segments by now, and what hinders the feed at present."""
        lack = await self.lacks_room()
        found = [*self._feed.findings(), *([lack] if lack else [])]
        try:
            folders = await self._folders.threads.run(self._folders.all)
        except OSError as error:
            message = f"the journal folder cannot be looked into: {error}"
            return [*found, Finding("audit", Severity.WARNING, message, _GIVE_BACK)]
        for segments in folders:
            try:
                found += await self._audit_of(segments).run()
            except (OSError, JournalError) as error:
                message = f"the segments in {segments.path} cannot be looked at: {error}"
                found.append(Finding("audit", Severity.WARNING, message, _GIVE_BACK))
        return found

    async def lacks_room(self) -> Finding | None:
        """Give that another segment finds no room, by the filesystem; see port `Journal`."""
        free, wanted = await self._folders.threads.run(self._folders.free_bytes), self._folders.segment_bytes
        if free is None or free >= wanted:
            return None
        message = f"{self._folders.path} has no room for more log: {free} bytes are free, a segment takes {wanted}"
        return Finding("journal", Severity.WARNING, message, _MAKE_ROOM)

    def _audit_of(self, segments: SegmentFolder) -> Audit:
        if segments.path not in self._audits:
            self._audits[segments.path] = Audit(segments, lambda: self._dump_for(segments))
        return self._audits[segments.path]

    async def stage(self, replay: Replay, folder: Path, progress: Progress) -> int:
        """Put into `folder` every file that a replay asks for; gives the bytes put there.

        For a place, or a time behind which a commit is known, these are the segments through the one that holds it and
        the one behind, else all that is held on the target's timeline; and every history file of all lives, so that a
        clone's own timeline gets a number that production never used.

        Raises:
            JournalError: part of the stretch is missing or damaged, and the message names the first such segment; or
                what has to be copied finds no room in `folder`.
        """
        try:
            loop = asyncio.get_running_loop()
            return await self._folders.threads.run(partial(self._stage, replay, folder, progress, loop))
        except OSError as error:
            raise JournalError(
                f"the log could not be staged in {folder}: {error}", hint="see that the folder can be written"
            ) from error

    def _stage(self, replay: Replay, folder: Path, progress: Progress, loop: asyncio.AbstractEventLoop) -> int:
        segments = self._folders.of(replay.target.history)
        self._audit_of(segments).load()
        lives = self._folders.of_system(replay.target.history.system)
        others = [life for life in lives if life is not segments]
        size = Staging(segments, self._fetch_into(segments, loop)).stage(replay, folder, progress, others)
        _require_commits(SegmentFolder(folder, segments.segment_bytes), replay)
        return size

    def _fetch_into(self, segments: SegmentFolder, loop: asyncio.AbstractEventLoop) -> Callable[[str], bool]:
        """Give what fetches a file: what an archive gives for a name is the log of the present life, if of any.

        Of a history file nobody says whose it is, and an archive may have an earlier life's.
        """
        known = self._running or self._known()
        if known is None or self._folders.of(known) is not segments:
            return segments.is_sound

        def fetch(name: str) -> bool:
            if segments.incarnation and history_timeline(name) is not None:
                return segments.is_sound(name)
            return self._feed.fetch(segments, name, loop)

        return fetch

    async def release(self, starts: Collection[Position]) -> int:
        """Delete the segments that no replay from any of `starts` can ask for; gives how many.

        History files stay: they are tiny.
        """
        released = 0
        for segments in await self._folders.threads.run(self._folders.all) if starts else ():
            audit = self._audit_of(segments)
            async with audit.between_segments:
                is_left = await self._folders.threads.run(partial(self._is_left, segments))
                released += await self._folders.threads.run(partial(_release, segments, audit, starts, is_left=is_left))
        return released

    def _is_left(self, segments: SegmentFolder) -> bool:
        """Whether the log that is kept at present goes into another folder; False where none is kept by us."""
        return self._running is not None and self._folders.of(self._running) is not segments


def _require_commits(staged: SegmentFolder, replay: Replay) -> None:
    """See that the log holds what the catalog has at the end of the state: the last look before another's is replayed.

    Raises:
        JournalError: something else is there.
    """
    target = replay.target
    for commit in (target.commit, *target.around):
        if commit is not None and commit.start >= replay.log_from.at:
            _require_commit(staged, commit, replay.until)


def _require_commit(staged: SegmentFolder, commit: CommitRecord, until: int) -> None:
    """See that the log holds a commit at its place, as far as it goes; at least up to `until` it has to.

    A record that lies in two segments is not looked at.
    """
    size = staged.segment_bytes
    held = [name for name in staged.names() if name.number == commit.start // size]
    if not held or commit.start // size != (commit.end - 1) // size:
        return
    name = max(held, key=lambda name: name.timeline)  # which a switch of the timeline lies in has a file of both
    page, begin = commit.start - commit.start % PAGE_BYTES, name.start(size)
    with staged.slices(name) as segment:
        pages = bytes(segment[page - begin : commit.end - begin])
    if holds_commit(pages, commit.start - page, commit) or (commit.end > until and staged.tail(name).end < commit.end):
        return
    raise JournalError(
        f"segment {name.text(size)} of the journal has something else at {Lsn(commit.start)} than commit {commit.name}",
        hint="that log is another one: see `trigpoint list --gaps`, and name the history by --history",
    )


def _release(segments: SegmentFolder, audit: Audit, starts: Collection[Position], *, is_left: bool) -> int:
    going = segments.unasked(starts, is_left=is_left)
    if going:
        with contextlib.suppress(JournalError):  # where the disk is full, what goes makes room for it
            audit.forget(going)
        segments.delete(going)
        audit.forget(going)
    return len(going)
