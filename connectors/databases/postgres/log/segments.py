"""A folder of write-ahead log segments and timeline history files: what it holds, staging from it, thinning it.

All calls block on small file operations; the journals run them in `threads`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.files import give, put_new, reading
from connectors.databases.postgres.log.wal import (
    MAJORS,
    PageHeader,
    SegmentName,
    Slices,
    Tail,
    history_timeline,
    joins,
    page_header,
    tail,
)
from connectors.databases.postgres.lsn import Lsn
from connectors.threads import Threads
from trigger.errors import JournalError, PositionError, remedy
from trigger.model import Extent
from trigger.ports import Progress
from trigger.position import LAST, History, Lineage, Position
from trigger.replay import Replay, Target
from trigger.trusted import NotOursError, open_file, require_no_link, why_not_ours

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class Needed:
    """One segment of a replay: on which timelines it may lie, newest first, and up to where it has to be held."""

    number: int
    timelines: tuple[int, ...]
    until: Lsn | None
    """None where the replay can do without it."""


@dataclass(frozen=True, slots=True)
class _Read:
    """The bytes of an open file, read where they are asked for."""

    descriptor: int

    def __len__(self) -> int:
        return os.fstat(self.descriptor).st_size

    def __getitem__(self, part: slice, /) -> bytes:
        begin = part.start or 0
        return os.pread(self.descriptor, part.stop - begin, begin)


class SegmentFolder:
    """Segments and history files as PostgreSQL names them, in one folder.

    Args:
        path: the folder; made where it is missing.
        segment_bytes: the cluster's WAL segment size.
        owner: user and group id of the data, who must be able to read what is staged; ignored where we are not root.
        incarnation: of the histories whose log it is.
    """

    def __init__(
        self, path: Path, segment_bytes: int, owner: tuple[int, int] | None = None, incarnation: int = 0
    ) -> None:
        self.path = path
        self.aside = path / "left"
        self.segment_bytes = segment_bytes
        self.incarnation = incarnation
        self.owner = owner
        self.threads = Threads("journal", limit=24)
        """Where calls of it run: a disk that hangs holds up the journal, and nothing else of the process."""
        self.top = path
        """The journal's own folder, in which this one lies where it is another."""
        self._system = ""
        self.damaged: dict[str, str] = {}
        """Segments in which the audit found damage, and what; they are not held."""

    def make(self, writer: tuple[int, int] | None) -> None:
        """Make the folder, for (user, group) who write into it, or for us; closed to everybody else."""
        try:
            for above in (self.top.parent, self.top.resolve().parent):  # a link of ours may lead to another disk
                if (alien := why_not_ours(above)) is not None:
                    raise alien
            if self.path != self.top:  # who writes the log may write the top too
                require_no_link(self.path)
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            give(self.path, writer)
        except NotOursError as error:
            raise JournalError(f"no journal is kept in {self.path}: {error.message}", hint=error.remedy) from error
        except OSError as error:
            message = f"the journal folder {self.path} cannot be made: {error.strerror}"
            raise JournalError(message, hint=remedy(error)) from error

    def names(self) -> list[SegmentName]:
        """Give the segments by timeline and number; a complete one hides a partial one of the same stretch."""
        found: dict[tuple[int, int], SegmentName] = {}
        for entry in self._entries():
            name = SegmentName.parse(entry, self.segment_bytes)
            if name is not None and (not name.partial or (name.timeline, name.number) not in found):
                found[name.timeline, name.number] = name
        return sorted(found.values())

    def file(self, name: SegmentName) -> Path:
        """Give the path of a segment, whether it is there or not."""
        text = self._file_name(name)
        return self.locate(text) or self.path / text

    def _file_name(self, name: SegmentName) -> str:
        return name.text(self.segment_bytes) + (".partial" if name.partial else "")

    def locate(self, name: str) -> Path | None:
        """Give the path of a file that is there, by name."""
        return next((found for folder in (self.path, self.aside) if (found := folder / name).exists()), None)

    def set_aside(self, name: SegmentName) -> None:
        """Move a segment out of the sight of a program that resumes behind the newest file; it is still held."""
        self.aside.mkdir(mode=0o700, exist_ok=True)
        status = self.path.stat()
        aside = os.open(self.aside, _FOLDER)
        try:
            if os.geteuid() == 0:
                os.fchown(aside, status.st_uid, status.st_gid)
            os.rename(self.file(name), self.file(name).name, dst_dir_fd=aside)
        finally:
            os.close(aside)

    def bring_back(self, timeline: int) -> None:
        """Move what was set aside of a timeline into that program's sight again, where it sees no such file."""
        with contextlib.suppress(FileNotFoundError):
            for name in self._parsed(self.aside):
                file = self.aside / self._file_name(name)
                if name.timeline == timeline and not (self.path / file.name).exists():
                    file.rename(self.path / file.name)

    def in_sight(self) -> list[SegmentName]:
        """Give the segments that such a program sees, complete and partial ones, in no order."""
        return self._parsed(self.path)

    def _parsed(self, folder: Path) -> list[SegmentName]:
        found = (SegmentName.parse(entry.name, self.segment_bytes) for entry in folder.iterdir())
        return [name for name in found if name is not None]

    def system(self) -> str:
        """Give the system identifier of the cluster whose log this is; "" where nothing says it yet."""
        if not self._system:
            self._system = next((header.system for header in self._headers(newest_first=True) if header.system), "")
        return self._system

    def oldest_system(self) -> str:
        """Give the system identifier that the oldest segment bears: once, another cluster's could lie here too."""
        return next((header.system for header in self._headers(newest_first=False) if header.system), "")

    def _headers(self, *, newest_first: bool) -> Iterator[PageHeader]:
        for name in self.names()[:: -1 if newest_first else 1]:
            with contextlib.suppress(OSError), reading(self.file(name)) as file:
                if (header := page_header(file.read(64))) is not None:
                    yield header

    def joins(self, name: SegmentName) -> bool:
        """Whether a segment goes on where the complete one before it ends, as far as both are here."""
        before = SegmentName(name.timeline, name.number - 1)
        try:
            with self.slices(name) as segment:
                return joins(self.tail(before), segment, name.start(self.segment_bytes))
        except (OSError, ValueError):
            return True

    def major(self) -> int | None:
        """Give the major version of the server that wrote the newest segment; None where nothing says it."""
        return next((MAJORS.get(header.magic) for header in self._headers(newest_first=True)), None)

    def histories(self) -> dict[int, str]:
        """Give the text of every timeline history file by timeline."""
        found = {}
        for entry in self._entries():
            timeline = history_timeline(entry)
            if timeline is not None:
                with contextlib.suppress(FileNotFoundError), reading(self.locate(entry) or self.path / entry) as file:
                    found[timeline] = file.read().decode(errors="replace")
        return found

    def lineage(self, history: History) -> Lineage:
        """Give the past of a history by its history file; raises `JournalError` where that is not held, or damaged."""
        if history.branch == 1:
            return Lineage(history)
        text = self.histories().get(history.branch)
        if text is None:
            raise JournalError(
                f"{history.branch:08X}.history is not in {self.path}",
                hint="if the server is or was on that timeline, fetch the file from its pg_wal or from an archive",
            )
        try:
            return lsn.lineage(history, text)
        except PositionError as error:
            raise JournalError(
                f"{history.branch:08X}.history in {self.path} is damaged: {error.message}",
                hint="fetch it from the server's pg_wal",
            ) from error

    def extents(self) -> list[Extent]:
        """Give the stretches that are held without a hole, damaged segments left out."""
        found: list[Extent] = []
        for name in self.names():
            system, end = self._held(name)
            if end is None:
                continue
            history, start = lsn.history(system, name.timeline, self.incarnation), name.start(self.segment_bytes)
            if found and found[-1].history == history and found[-1].end == start:
                found[-1] = Extent(history, found[-1].start, end)
            else:
                found.append(Extent(history, start, end))
        return found

    def tail(self, name: SegmentName) -> Tail:
        """Give where the complete records of a segment end."""
        with self.slices(name) as segment:
            return tail(segment, name.start(self.segment_bytes))

    @contextlib.contextmanager
    def slices(self, name: SegmentName) -> Iterator[Slices]:
        """Give the bytes of a segment, read where they are looked at; a mapping would count as memory of ours."""
        with reading(self.file(name)) as file:
            yield _Read(file.fileno())

    def _held(self, name: SegmentName) -> tuple[str, Lsn | None]:
        """Give the system identifier of a segment and where what it holds ends; None for nothing usable."""
        if self.file(name).name in self.damaged:
            return "", None
        start = name.start(self.segment_bytes)
        try:
            with reading(self.file(name)) as file:
                whole = os.fstat(file.fileno()).st_size == self.segment_bytes
                header = page_header(file.read(64)) if whole else None
            if header is None or header.address != start:
                return "", None
            end = self.tail(name).end if name.partial else Lsn(start + self.segment_bytes)
        except (FileNotFoundError, NotOursError, ValueError):  # released, completed or re-made in this moment; a link
            return "", None
        return header.system, end if end > start else None

    def _entries(self) -> list[str]:
        found: set[str] = set()
        for folder in (self.path, self.aside):
            with contextlib.suppress(FileNotFoundError):
                found.update(entry.name for entry in folder.iterdir())
        return sorted(found)

    def stage(
        self,
        replay: Replay,
        folder: Path,
        progress: Progress,
        fetch: Callable[[str], bool] = lambda _: False,
        others: Sequence[SegmentFolder] = (),
    ) -> int:
        """Put the files that a replay asks for into `folder`; gives the bytes.

        Args:
            replay: to a place it wants the segments through the one behind that; to a time or the end all that is held.
            folder: made where it is missing; complete segments are linked or cloned where possible, a partial one
                is copied under its full name.
            progress: told in bytes.
            fetch: asked for a file by name where the folder does not have it; true if it has it now.
            others: the folders of other lives of the same cluster.

        Raises:
            JournalError: a segment is missing or damaged; the message names the first.
        """
        start, history = replay.log_from, replay.target.history
        lineage = self._lineage_with(history, fetch)
        if not lineage.includes(start):
            raise JournalError(f"{start} is not in the past of {history}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stage = os.open(folder, _FOLDER)
        try:
            if self.owner is not None and os.geteuid() == 0:
                os.fchown(stage, *self.owner)
            self._stage_histories(stage, others)
            needed = self._needed(lineage, replay, fetch)
            for count, segment in enumerate(needed):
                if not self._stage_one(segment, stage, fetch) and segment.until:
                    raise self._missing(segment)
                progress("stage the log", (count + 1) * self.segment_bytes, len(needed) * self.segment_bytes)
        finally:
            os.close(stage)
        return sum(entry.stat().st_size for entry in folder.iterdir())

    def _stage_histories(self, stage: int, others: Sequence[SegmentFolder]) -> None:
        """Put the history files into the open folder `stage`, and of each timeline that only `others` know theirs.

        The latter are there for their numbers: a new timeline takes the first that has no file, and the archive and
        the server's clients may have met it in the other life.
        """
        put: set[int] = set()
        for folder in (self, *others):
            for timeline in sorted(folder.histories().keys() - put):
                held = folder.locate(f"{timeline:08X}.history")
                if held is not None:
                    self._put(held, stage, held.name)
                    put.add(timeline)

    def end_of_run(self, timeline: int, at: Lsn) -> Lsn | None:
        """Give where the segments end that follow on each other from the one with `at` on; None where it is not there.

        Without an end pg_waldump waits five seconds for a segment that does not come (`WALDumpOpenSegment`).
        """
        numbers = {name.number for name in self.names() if name.timeline == timeline}
        number = at // self.segment_bytes
        if number not in numbers:
            return None
        while number + 1 in numbers:
            number += 1
        return Lsn((number + 1) * self.segment_bytes)

    def stage_behind(self, target: Target, folder: Path, fetch: Callable[[str], bool], count: int) -> int:
        """Put up to `count` more segments behind those that were staged for `target` into `folder`; gives how many.

        They are for the proof alone, so none that is missing, damaged or finds no room is an error.
        """
        timeline, at = target.history.branch, target.at or 0
        there = [name.number for name in SegmentFolder(folder, self.segment_bytes).names() if name.timeline == timeline]
        first = max(there, default=at // self.segment_bytes) + 1
        stage = os.open(folder, _FOLDER)
        try:
            for number in range(first, first + count):
                try:
                    if not self._stage_one(Needed(number, (timeline,), None), stage, fetch):
                        return number - first
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(SegmentName(timeline, number).text(self.segment_bytes), dir_fd=stage)
                    return number - first
        finally:
            os.close(stage)
        return count

    def _lineage_with(self, history: History, fetch: Callable[[str], bool]) -> Lineage:
        if history.branch > 1:
            wanted = f"{history.branch:08X}.history"
            _ = self.locate(wanted) or fetch(wanted)
        return self.lineage(history)

    def _needed(self, lineage: Lineage, replay: Replay, fetch: Callable[[str], bool]) -> list[Needed]:
        """Give the segments of a replay in order.

        PostgreSQL looks for a segment on the newest timeline first that had begun by then (`XLogFileReadAnyTLI`): the
        segment in which a timeline was left exists on both, and the newer file holds the older one's part too.
        """
        start, until = replay.log_from.at, replay.until
        first = start // self.segment_bytes
        required = range(first, (until - 1) // self.segment_bytes + 1 if until > start else first)
        last = max(first, required.stop)
        if replay.target.at is None:
            timeline = lineage.history.branch
            last = max([last, *(name.number for name in self.names() if name.timeline == timeline)])
            while fetch(SegmentName(timeline, last + 1).text(self.segment_bytes)):  # an archive may have more by now
                last += 1
        return [
            Needed(
                number,
                self._owners(lineage, number),
                Lsn(min(until, (number + 1) * self.segment_bytes)) if number in required else None,
            )
            for number in range(first, last + 1)
        ]

    def _owners(self, lineage: Lineage, number: int) -> tuple[int, ...]:
        """Give the timelines on which a segment of a lineage may lie, newest first."""
        owners, begin = [], 0
        for timeline, left_at in (*lineage.forks, (lineage.history.branch, None)):
            if begin <= number and (left_at is None or number <= left_at // self.segment_bytes):
                owners.append(timeline)
            begin = left_at // self.segment_bytes if left_at is not None else 0
        return tuple(reversed(owners))

    def _stage_one(self, needed: Needed, stage: int, fetch: Callable[[str], bool]) -> bool:
        """Put every file of a segment that is held into the open folder `stage`; whether the newest one was.

        Damage in an older timeline's file is none to a replay that has a newer one: PostgreSQL reads that.
        """
        newest = put = False
        for index, timeline in enumerate(needed.timelines):
            for partial in (False, True):
                name = SegmentName(timeline, needed.number, partial)
                source = self.file(name)
                if source.name in self.damaged and source.exists():  # what was lost may come again, unfinished at first
                    if needed.until is None or put:
                        continue  # the replay stops before it, or reads the newer one
                    raise JournalError(
                        f"segment {source.name} of the journal is damaged: {self.damaged[source.name]}",
                        hint="restore from a point after it, or put a sound copy in its place and audit again",
                    )
                if (source.exists() or fetch(source.name)) and source.stat().st_size == self.segment_bytes:
                    self._put(source, stage, name.text(self.segment_bytes), copy=partial)
                    put = True
                    if index == 0:
                        self._require_reaches(name, needed.until)
                        newest = True
                    break
        return newest

    def _require_reaches(self, name: SegmentName, until: Lsn | None) -> None:
        """Refuse an unfinished segment that ends before what the replay needs of it."""
        if name.partial and until is not None and (end := self.tail(name).end) < until:
            raise JournalError(
                f"the journal ends at {end} in segment {self.file(name).name}, before {until}",
                hint="wait until it has received the log up to there, or see in `trigpoint status` why it does not",
                retryable=True,
            )

    def _missing(self, needed: Needed) -> JournalError:
        name = SegmentName(needed.timelines[0], needed.number).text(self.segment_bytes)
        return JournalError(
            f"segment {name} is not in the journal {self.path}",
            hint="the log has a hole there; restore to a commit before it, or to a point after it",
        )

    def _put(self, source: Path, stage: int, name: str, *, copy: bool = False) -> None:
        """Link, clone or copy one file into an open folder, so that the owner of the data, whose it is, can read it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=stage)
        with reading(source) as file:
            if not copy:
                self._let_owner_read(file.fileno())
                try:
                    os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=stage)  # that very file, by any name
                    return
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
            put_new(name, stage, file, self.owner)

    def _let_owner_read(self, source: int) -> None:
        """Let the owner of the data read, by group, a segment that somebody else wrote; never write it."""
        writer = os.fstat(source).st_uid
        if self.owner is not None and os.geteuid() == 0 and self.owner[0] not in (0, writer):
            os.fchown(source, -1, self.owner[1])
            os.fchmod(source, 0o640)

    def mark(self, name: SegmentName, owner: tuple[int, int] | None) -> None:
        """Leave an empty file in the place of a segment, for whoever begins there."""
        file = open_file(self.file(name), os.O_WRONLY | os.O_CREAT)
        try:
            if owner is not None and os.geteuid() == 0:
                os.fchown(file, *owner)
        finally:
            os.close(file)

    def unasked(self, starts: Collection[Position], *, is_left: bool) -> list[SegmentName]:
        """Give the complete segments that no replay from any of `starts` can ask for.

        A segment of a timeline is asked for from a start on that timeline, or on one that led to it, unless it lies
        wholly before. A timeline that no start asks for goes only where it is surely left (`is_left`: the server is in
        another life of its log): its first base may just be made. Where the past of a timeline is not known, or another
        cluster's log lies here too, all stays, and the newest segment always: who follows an archive goes on behind it.
        """
        names, going, system = self.names(), list[SegmentName](), self.system()
        if system != self.oldest_system():
            return []
        for timeline in {name.timeline for name in names}:
            history = lsn.history(system, timeline, self.incarnation)
            try:
                past = self.lineage(history)
            except JournalError:
                continue
            asked = [start.at for start in starts if past.includes(start)]
            later = any(start.history.is_of_system(history) and start.history.age > history.age for start in starts)
            if asked or later or is_left:
                limit = min(asked, default=LAST) // self.segment_bytes
                going += [name for name in names if name.timeline == timeline and name.number < limit]
        return [name for name in going if not name.partial and name != names[-1]]

    def delete(self, names: Sequence[SegmentName]) -> None:
        """Delete segments; what is gone already is no error."""
        for name in names:
            self.file(name).unlink(missing_ok=True)
            self.damaged.pop(self.file(name).name, None)
