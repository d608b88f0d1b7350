"""Staging: the files of the log that a replay asks for, put into a folder of a clone's own.

They are linked or cloned where that goes; what the folder lacks, or holds cut short or damaged, is asked for elsewhere.
All calls block on file operations; the journal runs them in `threads`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres.log.files import put_new, reading
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import JournalError
from trigger.ports import Progress
from trigger.position import History, Lineage
from trigger.replay import Replay

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESERVE_BYTES = 64 << 20
"""What is left where log is copied to: the catalog lies there too."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class Needed:
    """One segment of a replay: on which timelines it may lie, newest first, and up to where it has to be held."""

    number: int
    timelines: tuple[int, ...]
    until: Lsn | None
    """None where the replay can do without it."""


class Staging:
    """Puts log from a folder of segments into others.

    Args:
        segments: what is held.
        fetch: asked for a file by name which the folder does not have whole; true if it has it now.
    """

    def __init__(self, segments: SegmentFolder, fetch: Callable[[str], bool] = lambda _: False) -> None:
        self._segments = segments
        self._segment_bytes = segments.segment_bytes
        self._fetch = fetch
        self._ahead_bytes = 0

    def stage(
        self,
        replay: Replay,
        folder: Path,
        progress: Progress,
        others: Sequence[SegmentFolder] = (),
    ) -> int:
        """Put the files that a replay asks for into `folder`; gives the bytes.

        Args:
            replay: to what has a place, or a time behind which a commit is known, it wants the segments through the one
                behind that; else all that is held.
            folder: made where it is missing; complete segments are linked or cloned where possible, a partial one
                is copied under its full name.
            progress: told in bytes.
            others: the folders of other lives of the same cluster.

        Raises:
            JournalError: a segment is missing or damaged, and the message names the first; or what has to be copied,
                since it can be neither linked nor cloned, finds no room.
        """
        start, history = replay.log_from, replay.target.history
        lineage = self._lineage_with(history)
        if not lineage.includes(start):
            raise JournalError(f"{start} is not in the past of {history}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stage = os.open(folder, _FOLDER)
        try:
            if self._segments.owner is not None and os.geteuid() == 0:
                os.fchown(stage, *self._segments.owner)
            self._stage_histories(stage, others)
            needed = self._needed(lineage, replay)
            for count, segment in enumerate(needed):
                self._ahead_bytes = (len(needed) - count) * self._segment_bytes
                if not self._stage_one(segment, stage) and segment.until:
                    raise self._missing(segment)
                progress("stage the log", (count + 1) * self._segment_bytes, len(needed) * self._segment_bytes)
        finally:
            os.close(stage)
        return sum(entry.stat().st_size for entry in folder.iterdir())

    def _stage_histories(self, stage: int, others: Sequence[SegmentFolder]) -> None:
        """Put the history files into the open folder `stage`, and of each timeline that only `others` know theirs.

        The latter are there for their numbers: a new timeline takes the first that has no file, and the archive and
        the server's clients may have met it in the other life.
        """
        put: set[int] = set()
        for folder in (self._segments, *others):
            for timeline in sorted(folder.histories().keys() - put):
                held = folder.locate(f"{timeline:08X}.history")
                if held is not None:
                    self._put(held, stage, held.name)
                    put.add(timeline)

    def _lineage_with(self, history: History) -> Lineage:
        if history.branch > 1:
            wanted = f"{history.branch:08X}.history"
            _ = self._segments.locate(wanted) or self._fetch(wanted)
        return self._segments.lineage(history)

    def _needed(self, lineage: Lineage, replay: Replay) -> list[Needed]:
        """Give the segments of a replay in order.

        PostgreSQL looks for a segment on the newest timeline first that had begun by then (`XLogFileReadAnyTLI`): the
        segment in which a timeline was left exists on both, and the newer file holds the older one's part too.
        """
        start, until = replay.log_from.at, replay.until
        first = start // self._segment_bytes
        required = range(first, (until - 1) // self._segment_bytes + 1 if until > start else first)
        last = max(first, required.stop, ((replay.target.reach or 0) - 1) // self._segment_bytes + 1)
        if replay.target.is_latest or (replay.target.time is not None and replay.target.reach is None):
            timeline = lineage.history.branch
            last = max([last, *(name.number for name in self._segments.names() if name.timeline == timeline)])
            while self._fetch(
                SegmentName(timeline, last + 1).text(self._segment_bytes)
            ):  # an archive may have more by now
                last += 1
        return [
            Needed(
                number,
                self._owners(lineage, number),
                Lsn(min(until, (number + 1) * self._segment_bytes)) if number in required else None,
            )
            for number in range(first, last + 1)
        ]

    def _owners(self, lineage: Lineage, number: int) -> tuple[int, ...]:
        """Give the timelines on which a segment of a lineage may lie, newest first."""
        owners, begin = [], 0
        for timeline, left_at in (*lineage.forks, (lineage.history.branch, None)):
            if begin <= number and (left_at is None or number <= left_at // self._segment_bytes):
                owners.append(timeline)
            begin = left_at // self._segment_bytes if left_at is not None else 0
        return tuple(reversed(owners))

    def _stage_one(self, needed: Needed, stage: int) -> bool:
        """Put every file of a segment that is held into the open folder `stage`; whether the newest one was.

        Damage in an older timeline's file is none to a replay that has a newer one: PostgreSQL reads that.
        """
        newest = put = False
        for index, timeline in enumerate(needed.timelines):
            for partial in (False, True, False):  # the receiver may finish it between two looks
                name = SegmentName(timeline, needed.number, partial)
                try:
                    there = self._stage_file(name, needed, stage, may_lack=put)
                    if there and index == 0:
                        self._require_reaches(name, needed.until)
                        newest = True
                except FileNotFoundError:
                    there = False
                if there:
                    put = True
                    break
        return newest

    def _stage_file(self, name: SegmentName, needed: Needed, stage: int, *, may_lack: bool) -> bool:
        """Put one file of a segment into `stage`; whether it was there, whole."""
        source = self._segments.file(name)
        if not self._segments.is_sound(source.name) and not self._fetch(source.name):
            if needed.until is not None and not may_lack:  # else the replay stops before it, or reads the newer one
                self._require_undamaged(source)
            return False
        source = self._segments.file(name)  # which may have been fetched just now
        if source.stat().st_size != self._segment_bytes:
            return False
        self._put(source, stage, name.text(self._segment_bytes), copy=name.partial)
        return True

    def _require_undamaged(self, source: Path) -> None:
        """Refuse a file that is there, and that the audit found damaged; what was lost may come again unfinished."""
        why = self._segments.damaged.get(source.name)
        if why is not None and source.exists():
            raise JournalError(
                f"segment {source.name} of the journal is damaged: {why}",
                hint="restore from a point after it, or put a sound copy in its place and audit again",
            )

    def _require_reaches(self, name: SegmentName, until: Lsn | None) -> None:
        """Refuse an unfinished segment that ends before what the replay needs of it."""
        if name.partial and until is not None and (end := self._segments.tail(name).end) < until:
            raise JournalError(
                f"the journal ends at {end} in segment {self._segments.file(name).name}, before {until}",
                hint="wait until it has received the log up to there, or see in `trigpoint status` why it does not",
                retryable=True,
            )

    def _missing(self, needed: Needed) -> JournalError:
        name = SegmentName(needed.timelines[0], needed.number)
        text, found = name.text(self._segment_bytes), self._segments.file(name)
        lacks = f"is not in the journal {self._segments.path}"
        if found.exists():
            lacks = f"is cut short in the journal {self._segments.path}: {found.stat().st_size} of its bytes are there"
        return JournalError(
            f"segment {text} {lacks}",
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
            put_new(name, stage, file, self._segments.owner, lambda: self._require_room(stage))

    def _require_room(self, stage: int) -> None:
        """Refuse to copy where all that is still to come, were it copied, would leave too little room."""
        found = os.fstatvfs(stage)
        free, asked = found.f_bavail * found.f_frsize, self._ahead_bytes + _RESERVE_BYTES
        if free < asked:
            raise JournalError(
                f"{Path(f'/proc/self/fd/{stage}').readlink()} has {free} bytes free, and {asked} are asked for: for"
                f" {self._ahead_bytes} of log that has to be copied there, and as a reserve",
                hint="make room there; where journal and state folder share a filesystem nothing has to be copied",
            )

    def _let_owner_read(self, source: int) -> None:
        """Let the owner of the data read, by group, a segment that somebody else wrote; never write it."""
        writer = os.fstat(source).st_uid
        if self._segments.owner is not None and os.geteuid() == 0 and self._segments.owner[0] not in (0, writer):
            os.fchown(source, -1, self._segments.owner[1])
            os.fchmod(source, 0o640)
