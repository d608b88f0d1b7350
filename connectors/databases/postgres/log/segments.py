"""A folder of write-ahead log segments and timeline history files: what it holds, and what of it may go.

All calls block on small file operations; the journals run them in `threads`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres import lsn
from connectors.databases.postgres.log.files import give, reading
from connectors.databases.postgres.log.remembered import Remembered
from connectors.databases.postgres.log.wal import (
    MAJORS,
    PageHeader,
    SegmentName,
    Slices,
    Tail,
    history_timeline,
    holds_record,
    joins,
    page_header,
    tail,
)
from connectors.databases.postgres.lsn import Lsn
from connectors.threads import Threads
from trigger.errors import JournalError, PositionError, remedy
from trigger.model import Extent
from trigger.position import LAST, History, Lineage, Position
from trigger.trusted import NotOursError, open_file, require_no_link, why_not_ours

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class FileBytes:
    """What `Slices` asks for: the bytes of an open file, read where they are asked for."""

    descriptor: int

    def __len__(self) -> int:
        return os.fstat(self.descriptor).st_size

    def __getitem__(self, part: slice, /) -> bytes:
        begin = part.start or 0
        return os.pread(self.descriptor, part.stop - begin, begin)


@contextlib.contextmanager
def slices_of(path: Path) -> Iterator[Slices]:
    """Give the bytes of a file, read where they are looked at; a mapping would count as memory of ours."""
    with reading(path) as file:
        yield FileBytes(file.fileno())


class _Held(NamedTuple):
    """What a segment holds that can be used."""

    system: str
    end: Lsn | None
    """None for nothing."""


_NOTHING = _Held("", None)
_LOOKS = 10
"""So often a folder is listed until it has not changed meanwhile; one that never holds still is taken as it is."""
MISSING = "missing"
"""What an audit says of a segment that is not there."""


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
        self._known = Remembered[_Held]()
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
        return self._names(self._listing())

    def _names(self, entries: Iterable[str]) -> list[SegmentName]:
        found: dict[tuple[int, int], SegmentName] = {}
        for entry in sorted(entries):
            name = SegmentName.parse(entry, self.segment_bytes)
            if name is not None and (not name.partial or (name.timeline, name.number) not in found):
                found[name.timeline, name.number] = name
        return sorted(found.values())

    def complete(self) -> dict[SegmentName, tuple[int, int]]:
        """Give of each complete segment, by timeline and number, its size and when it was written to last."""
        found, listing = {}, self._listing()
        for name in self._names(listing):
            if not name.partial:
                text = self._file_name(name)
                seen = (listing[text] / text).stat()
                found[name] = seen.st_size, seen.st_mtime_ns
        return found

    def file(self, name: SegmentName) -> Path:
        """Give the path of a segment, whether it is there or not."""
        text = self._file_name(name)
        return self.locate(text) or self.path / text

    def _file_name(self, name: SegmentName) -> str:
        return name.text(self.segment_bytes) + (".partial" if name.partial else "")

    def locate(self, name: str) -> Path | None:
        """Give the path of a file that is there, by name."""
        return next((found for folder in (self.path, self.aside) if (found := folder / name).exists()), None)

    def is_sound(self, name: str) -> bool:
        """Whether a file is there, by name; a segment whole, and not damaged as far as is known.

        One that was missing, and is there by now, is like any that no audit has looked at yet.
        """
        found = self.locate(name)
        if found is None or self.damaged.get(name, MISSING) != MISSING:
            return False
        return SegmentName.parse(name, self.segment_bytes) is None or found.stat().st_size == self.segment_bytes

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

    def neighbours(self, name: SegmentName) -> list[SegmentName]:
        """Give the sound segments right before and right behind one, of the log that leads to it and goes on from it.

        The first segment of a timeline goes on from one of the timeline that it left.
        """
        lineage = Lineage(lsn.history("", name.timeline))
        with contextlib.suppress(JournalError):
            lineage = self.lineage(lineage.history)
        before = name.start(self.segment_bytes) - 1
        owner = next((history.branch for history, low, high in lineage.stretches() if low <= before < high), 0)
        found = [SegmentName(owner, name.number - 1), SegmentName(name.timeline, name.number + 1)]
        return [one for one in found if self.is_sound(one.text(self.segment_bytes))]

    def joins(self, name: SegmentName, neighbour: SegmentName, file: Path) -> bool:
        """Whether one of two segments goes on where the other ends, as far as both can be read.

        Args:
            name: of the first segment.
            neighbour: held, right before or right behind it.
            file: where the first one lies.
        """
        held, last = self.file(neighbour), min(name.number, neighbour.number) * self.segment_bytes
        before, behind = (held, file) if neighbour.number < name.number else (file, held)
        try:
            with slices_of(before) as segment, slices_of(behind) as following:
                return joins(tail(segment, Lsn(last)), following, last + self.segment_bytes)
        except (OSError, ValueError):
            return True

    def major(self) -> int | None:
        """Give the major version of the server that wrote the newest segment; None where nothing says it."""
        return next((MAJORS.get(header.magic) for header in self._headers(newest_first=True)), None)

    def histories(self) -> dict[int, str]:
        """Give the text of every timeline history file by timeline."""
        found = {}
        for entry in sorted(self._listing()):
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
        """Give the stretches that are held without a hole, damaged segments left out.

        Of a segment that looks as it did when it was read nothing is read again.
        """
        found: list[Extent] = []
        known, self._known, listing = self._known, Remembered[_Held](), self._listing()
        for name in self._names(listing):
            text = self._file_name(name)
            system, end = self._held(name, listing[text] / text, known)
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

    def opened(self, timeline: int, number: int) -> io.FileIO:
        """Give a segment, complete or not, to read; it may get its full name, or be let go of, while it is open.

        Raises:
            JournalError: it is not there, or cannot be read.
        """
        text = SegmentName(timeline, number).text(self.segment_bytes)
        for partial in (False, True, False):  # the receiver may finish it between two looks
            try:
                return io.FileIO(open_file(self.file(SegmentName(timeline, number, partial))))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise JournalError(f"the log in {self.path} cannot be read: {error}", hint=remedy(error)) from error
        raise JournalError(
            f"segment {text} is not in the journal {self.path} any more",
            hint="where the journal let go of it meanwhile, ask again",
            retryable=True,
        )

    def holds_record(self, timeline: int, begin: int, end: int) -> bool:
        """Whether a whole record begins in a stretch, by what is here; one that lies in two segments does not count."""
        size = self.segment_bytes
        for name in self.names():
            if name.timeline == timeline and begin // size <= name.number <= (end - 1) // size:
                with self.slices(name) as segment:
                    if holds_record(segment, name.start(size), begin, end):
                        return True
        return False

    def slices(self, name: SegmentName) -> contextlib.AbstractContextManager[Slices]:
        """Give the bytes of a segment, read where they are looked at."""
        return slices_of(self.file(name))

    def _held(self, name: SegmentName, path: Path, known: Remembered[_Held]) -> _Held:
        """Give what a segment holds that can be used."""
        if path.name in self.damaged:
            return _NOTHING
        try:
            seen = path.lstat()
            held = known.get(path.name, seen) or self._read(name, path)
        except FileNotFoundError:  # completed, or released, in this moment
            whole = name._replace(partial=False)
            return self._held(whole, self.file(whole), known) if name.partial else _NOTHING
        except (NotOursError, ValueError):  # a link; re-made in this moment
            return _NOTHING
        self._known.put(path.name, seen, held)
        return held

    def _read(self, name: SegmentName, path: Path) -> _Held:
        start = name.start(self.segment_bytes)
        with reading(path) as file:
            whole = os.fstat(file.fileno()).st_size == self.segment_bytes
            header = page_header(file.read(64)) if whole else None
            if header is None or header.address != start:
                return _NOTHING
            end = tail(FileBytes(file.fileno()), start).end if name.partial else Lsn(start + self.segment_bytes)
        return _Held(sys.intern(header.system), end if end > start else None)

    def _listing(self) -> dict[str, Path]:
        """Give by the name of each file in which folder it lies.

        A folder is listed again where it changed meanwhile: a file that gets another name then may be in no list.
        """
        found: dict[str, Path] = {}
        for folder in (self.aside, self.path):
            with contextlib.suppress(FileNotFoundError):
                for _ in range(_LOOKS):
                    before = folder.stat().st_mtime_ns
                    with os.scandir(folder) as entries:
                        listed = dict.fromkeys((entry.name for entry in entries), folder)
                    if folder.stat().st_mtime_ns == before:
                        break
                found |= listed
        return found

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
