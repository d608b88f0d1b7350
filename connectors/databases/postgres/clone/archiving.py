"""What the archiver finds in the log of a clone that takes production's place: all that is not archived yet, whole.

Production may have been behind with its archive. What it still had to archive is in no other place once the clone is in
production's, and is needed there: by a recovery from a backup of before, to the state that is in place as well as to
the one that was given up.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone.isolation import is_segment
from connectors.databases.postgres.log.files import give_open, put_new, reading
from connectors.databases.postgres.log.wal import SegmentName, history_timeline, page_header
from trigger.errors import RestoreError
from trigger.trusted import open_file

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STATUS = "archive_status"
_READY = ".ready"
_ARCHIVED = re.compile(r"[0-9A-F]{8}\.history|[0-9A-F]{24}(\.partial|\.[0-9A-F]{8}\.backup)?")
_DRAFT = "xlogtemp.trigpoint"
"""PostgreSQL removes what is called so when it starts (RemoveTempXlogFiles)."""
_CHUNK_BYTES = 1 << 20


def tell(log: int, production: int | None, written: str, owner: tuple[int, int]) -> None:
    """Leave `archive_status` as PostgreSQL's own recovery does where archiving is on, which in a clone it is not.

    The history file and the finished segments of the clone's own timeline wait for the archiver: without the former a
    later recovery from the archive would follow the timeline that was given up (xlogarchive.c). What lies at or behind
    `written` is not finished, or was made in advance. Of earlier timelines all waits that production has not archived,
    and it is production's file that does: the clone's may be cut off where the clone left that timeline. The rest is
    done.

    Args:
        log: the clone's pg_wal.
        production: production's, None where it is gone; then what waited in the snapshot waits.
        written: the segment that the clone's server wrote last.
        owner: user and group id of the data.
    """
    own = _Own.of(log, written)
    with _status_of(log, owner) as status:
        snapshots = _unarchived(log)
        waiting = {name for name in snapshots if _timeline(name) != own.timeline}
        if production is not None and system_of(production) in ("", own.system):
            waiting = {name for name in _unarchived(production) if _timeline(name) != own.timeline}
            for name in waiting.copy():
                if not _take(name, production, log, own, owner) and name not in snapshots:
                    waiting.discard(name)
        names = [name for name in sorted(os.listdir(log)) if _is_file(name, log)]
        finished = [name for name in names if is_segment(name) and not (name[:8] == written[:8] and name >= written)]
        for name in {*finished, *(name for name in names if history_timeline(name) is not None), *waiting}:
            waits = _timeline(name) == own.timeline or name in waiting
            _mark(name, "ready" if waits else "done", status, owner)


@dataclass(frozen=True, slots=True)
class _Own:
    """The log of the clone."""

    timeline: int
    system: str
    segment_bytes: int
    forks: dict[int, int]
    """Where it left each of the timelines that led to its own."""

    @classmethod
    def of(cls, log: int, written: str) -> _Own:
        with reading(Path(written), folder=log) as file:
            header, size = page_header(file.read(64)), os.fstat(file.fileno()).st_size
        timeline = int(written[:8], 16)
        with reading(Path(f"{written[:8]}.history"), folder=log) as file:
            lineage = lsn.lineage(lsn.history("", timeline), file.read().decode(errors="replace"))
        return cls(timeline, header.system if header is not None else "", size, dict(lineage.forks))

    def part_of(self, name: str) -> int:
        """Give how many bytes of a file of earlier timelines are the clone's past too."""
        left = self.forks.get(_timeline(name))
        if left is None:
            return 0
        if (segment := SegmentName.parse(name, self.segment_bytes)) is None:
            return self.segment_bytes
        return min(max(left - segment.start(self.segment_bytes), 0), self.segment_bytes)


def _timeline(name: str) -> int:
    return int(name[:8], 16)


def _unarchived(log: int) -> set[str]:
    """Give the files that wait for the archiver."""
    try:
        status = os.open(_STATUS, _FOLDER, dir_fd=log)
    except FileNotFoundError:
        return set()
    try:
        return {name for name in _ready(status) if _ARCHIVED.fullmatch(name) and _is_file(name, log)}
    finally:
        os.close(status)


def _ready(status: int) -> list[str]:
    return [name.removesuffix(_READY) for name in os.listdir(status) if name.endswith(_READY)]


def system_of(log: int) -> str:
    """Give the cluster whose log it is; "" where no segment says it."""
    for name in sorted(filter(is_segment, os.listdir(log)), reverse=True):
        with contextlib.suppress(OSError), reading(Path(name), folder=log) as file:
            if (header := page_header(file.read(64))) is not None and header.system:
                return header.system
    return ""


def _take(name: str, production: int, log: int, own: _Own, owner: tuple[int, int]) -> bool:
    """Put production's file in the place of the clone's; False where it is another log than the clone's past."""
    with reading(Path(name), folder=production) as theirs:
        if is_segment(name) and os.fstat(theirs.fileno()).st_size != own.segment_bytes:
            return False
        if _is_file(name, log):
            with reading(Path(name), folder=log) as ours:
                if not _same(theirs.fileno(), ours.fileno(), own.part_of(name)):
                    return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_DRAFT, dir_fd=log)
        theirs.seek(0)
        put_new(_DRAFT, log, theirs, owner)
        os.rename(_DRAFT, name, src_dir_fd=log, dst_dir_fd=log)
    return True


def _same(one: int, other: int, count: int) -> bool:
    for at in range(0, count, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, count - at)
        if os.pread(one, size, at) != os.pread(other, size, at):
            return False
    return True


def _is_file(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _status_of(log: int, owner: tuple[int, int]) -> Iterator[int]:
    """Open `archive_status`, made and given away where it is not there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(_STATUS, 0o700, dir_fd=log)
    try:
        status = os.open(_STATUS, _FOLDER, dir_fd=log)
    except NotADirectoryError:
        raise RestoreError(
            f"{_STATUS} is a link or a file, which PostgreSQL makes none of", hint="see who put it there"
        ) from None
    try:
        give_open(status, owner)
        yield status
    finally:
        os.close(status)


def _mark(name: str, state: str, status: int, owner: tuple[int, int]) -> None:
    """Leave one word for the archiver about a file: `ready` where it has to be archived, else `done`."""
    for old in ("ready", "done"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{name}.{old}", dir_fd=status)
    file = open_file(Path(f"{name}.{state}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, folder=status)
    try:
        give_open(file, owner)
    finally:
        os.close(file)
