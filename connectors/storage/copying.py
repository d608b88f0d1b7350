"""Copies a tree of files: shared where nothing changed, by reflink where that works, else byte for byte.

Everything here blocks; call it in a thread. Files that vanish, shrink or grow meanwhile are normal where the tree is
that of a running database, whose log repairs what the copy caught halfway; in a copy of it nothing may.

The owner of the tree may put a link in the place of any folder at any moment, also in an earlier copy of it. So each
step goes from an open folder to the next one by its name, and no link is followed: nothing is read, written or
shared outside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from trigger.model import to_microseconds
from trigger.trusted import open_file

_FICLONE = 0x40049409  # linux/fs.h
_BLOCK_BYTES = 8 << 20
_CLOCK_MARGIN_NS = 2_000_000_000
"""How near to a copy a time stamp is not trusted; two seconds is the coarsest clock of any filesystem (FAT)."""


class Seen(NamedTuple):
    """What a file looked like when it was copied."""

    size: int
    """How long the copy is: that of a file that grew or shrank meanwhile is as long as it came out."""
    modified_ns: int
    changed_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, now: os.stat_result) -> Seen:
        """Give what a file looks like by its status."""
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev)


@dataclass(frozen=True)
class Manifest:
    """What every file and link of a tree looked like when it was copied; lines of JSON, the time of the start first."""

    began_at: datetime
    files: dict[str, Seen]

    def write(self, path: Path) -> None:
        """Write it to `path`; not flushed."""
        with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(json.dumps(self.began_at.isoformat()) + "\n")
            file.writelines(json.dumps([name, *seen]) + "\n" for name, seen in self.files.items())

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """Read it from `path`; None where it is missing or damaged, and every file then counts as changed.

        Raises:
            OSError: it cannot be read, so that nobody knows what it says.
        """
        try:
            first, *lines = path.read_text().splitlines()
            rows = map(json.loads, lines)
            return cls(datetime.fromisoformat(json.loads(first)), {name: Seen(*row) for name, *row in rows})
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None

    def holds_unchanged(self, name: str, seen: Seen) -> bool:
        """Whether a file that looks like `seen` now is surely what was copied then."""
        trusted_before_ns = to_microseconds(self.began_at.astimezone(UTC)) * 1000 - _CLOCK_MARGIN_NS
        return self.files.get(name) == seen and max(seen.modified_ns, seen.changed_ns) < trusted_before_ns

    def missed(self, look: Callable[[str], Seen | None]) -> Iterator[str]:
        """Give the files that the copy does not have, or not whole; `look` gives what one looks like in it now.

        In lists of earlier versions the size is that of before the copy. One that grew or shrank meanwhile has another,
        and its time all the same, where the copy's filesystem keeps it.
        """
        for name, listed in self.files.items():
            now = look(name)
            if now is None or (now.size != listed.size and now.modified_ns != listed.modified_ns):
                yield name


@dataclass
class Copier:
    """Copies trees, and notes what it saw and how much it copied."""

    exclude: Sequence[str] = ()
    earlier: Path | None = None
    """An earlier copy of the same tree; its files may be shared by hard links."""
    known: Manifest | None = None
    """What the files looked like when `earlier` was made."""
    compare: bool = False
    """Compare content before a file is shared."""
    living: bool = True
    """Whether files may vanish from the tree meanwhile; from one that nobody writes to, none may."""
    require_room: Callable[[int], None] = lambda _: None
    """Raises where that many bytes more would be too much."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set from outside to end the copy at the next block."""
    told: Callable[[int], None] = lambda _: None
    """Told how many bytes are done, shared ones included."""
    seen: dict[str, Seen] = field(default_factory=dict)
    bytes_copied: int = 0
    bytes_done: int = 0
    _reflinks: bool = True

    def leaves_out(self, name: str) -> bool:
        """Whether a pattern matches the path `name` inside the tree."""
        last = name.rpartition("/")[2]
        return any(fnmatchcase(name if "/" in pattern else last, pattern) for pattern in self.exclude)

    def copy(self, source: Path, target: Path) -> None:
        """Copy the tree `source` to `target`, which must not be there.

        Raises:
            OSError: something cannot be read or written; `InterruptedError` where `stop` was set.
        """
        target.mkdir(0o700)
        with contextlib.ExitStack() as open_folders:
            place = _Place(
                _opened(source, open_folders),
                _opened(target, open_folders),
                _opened(self.earlier, open_folders) if self.earlier and self.earlier.is_dir() else None,
                "",
            )
            self._folder(place)

    def _folder(self, place: _Place) -> None:
        before = os.fstat(place.source)
        with os.scandir(place.source) as entries:  # all at once: what is renamed meanwhile may be listed twice
            listed = {entry.name: entry for entry in entries}
        for last, entry in listed.items():
            self._require_going_on()
            name = f"{place.inside}{last}"
            if not self.leaves_out(name):
                with contextlib.suppress(*[_Vanished] if self.living else []), _whole_name(name):
                    self._entry(entry, place, name)
        _keep_attributes(place.target, before)

    def _entry(self, entry: os.DirEntry[str], place: _Place, name: str) -> None:
        if entry.is_symlink():
            with _may_vanish():
                link = os.readlink(entry.name, dir_fd=place.source)
                before = entry.stat(follow_symlinks=False)
            os.symlink(link, entry.name, dir_fd=place.target)
            if os.geteuid() == 0:
                os.chown(entry.name, before.st_uid, before.st_gid, dir_fd=place.target, follow_symlinks=False)
            made = os.stat(entry.name, dir_fd=place.target, follow_symlinks=False)
            self.seen[name] = Seen.of(before)._replace(size=made.st_size)
            self.bytes_done += before.st_size
        elif entry.is_dir(follow_symlinks=False):
            with contextlib.ExitStack() as open_folders:
                with _may_vanish():
                    source = _opened(entry.name, open_folders, place.source)
                os.mkdir(entry.name, 0o700, dir_fd=place.target)
                target = _opened(entry.name, open_folders, place.target)
                earlier = _opened_if_there(entry.name, open_folders, place.earlier)
                self._folder(_Place(source, target, earlier, f"{name}/"))
        elif entry.is_file(follow_symlinks=False):
            with _may_vanish():
                source = os.open(entry.name, _READ | os.O_NONBLOCK, dir_fd=place.source)
            try:
                if stat.S_ISREG(os.fstat(source).st_mode):  # it was a file when it was looked at
                    self._file(source, place, entry.name)
            finally:
                os.close(source)

    def _file(self, source: int, place: _Place, last: str) -> None:
        name = f"{place.inside}{last}"
        before = os.fstat(source)
        seen = self.seen[name] = Seen.of(before)
        if not self._share(source, place, name, seen):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            copy = os.open(last, flags, 0o600, dir_fd=place.target)
            try:
                if not self._reflink(source, copy):
                    self._bytes(source, copy, before.st_size)
                _keep_attributes(copy, before)
                self.seen[name] = seen._replace(size=os.fstat(copy).st_size)
            finally:
                os.close(copy)
        self.bytes_done += before.st_size
        self.told(self.bytes_done)

    def _share(self, source: int, place: _Place, name: str, seen: Seen) -> bool:
        """Link the earlier copy of an unchanged file; gives whether that was right and possible."""
        if self.known is None or place.earlier is None or not self.known.holds_unchanged(name, seen):
            return False
        last = name.rpartition("/")[2]
        try:
            found = os.stat(last, dir_fd=place.earlier, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != seen.size:
                return False
            if self.compare and not _same_content(source, place.earlier, last):
                return False
            os.link(last, last, src_dir_fd=place.earlier, dst_dir_fd=place.target, follow_symlinks=False)
        except OSError:  # the earlier copy is being deleted, or has as many links as it may have
            return False
        return True

    def _reflink(self, source: int, copy: int) -> bool:
        if not self._reflinks:
            return False
        try:
            fcntl.ioctl(copy, _FICLONE, source)
        except OSError as error:
            if error.errno not in _CANNOT_REFLINK:
                raise
            self._reflinks = error.errno == errno.EINVAL  # that one is about this file only (no copy-on-write)
            return False
        return True

    def _bytes(self, source: int, copy: int, size: int) -> None:
        """Copy `size` bytes, holes as holes; fewer where the file shrank."""
        self.require_room(size)
        place = 0
        while place < size:
            data = _sought(source, place, os.SEEK_DATA)
            if data is None:
                break
            place, end = data, min(_sought(source, data, os.SEEK_HOLE) or 0, size)
            os.lseek(copy, min(place, size), os.SEEK_SET)
            while place < end:
                self._require_going_on()
                sent = os.sendfile(copy, source, place, min(_BLOCK_BYTES, end - place))
                if sent == 0:
                    os.ftruncate(copy, place)
                    return
                place += sent
                self.bytes_copied += sent
                self.told(self.bytes_done + place)
        os.ftruncate(copy, size)

    def _require_going_on(self) -> None:
        if self.stop.is_set():
            raise InterruptedError(errno.EINTR, "the copy was called off")


def _sought(source: int, place: int, what: int) -> int | None:
    """Give where the next data or hole of a file begins; None where the file has none, or ends before by now."""
    try:
        return os.lseek(source, place, what)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


_CANNOT_REFLINK = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF}
)


_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Place(NamedTuple):
    """A folder of the tree, of the copy and of an earlier copy, all open; and the path inside the tree so far."""

    source: int
    target: int
    earlier: int | None
    inside: str


def _opened(name: str | Path, stack: contextlib.ExitStack, folder: int | None = None) -> int:
    """Open a folder, in another open one or by its path, until the stack ends."""
    follow = os.O_DIRECTORY if folder is None else os.O_DIRECTORY | os.O_NOFOLLOW
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | follow, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor


def _opened_if_there(name: str, stack: contextlib.ExitStack, folder: int | None) -> int | None:
    if folder is not None:
        with contextlib.suppress(OSError):
            return _opened(name, stack, folder)
    return None


@contextlib.contextmanager
def _whole_name(name: str) -> Iterator[None]:
    """Let an error name the file by its path inside the tree."""
    try:
        yield
    except OSError as error:
        if error.filename and not str(error.filename).startswith(("/", name)):
            error.filename = name
        raise


class _Vanished(OSError):  # noqa: N818 - no error in a living tree: the database removed a file while it was looked at
    """A file of the source is there no more."""


@contextlib.contextmanager
def _may_vanish() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ESTALE):
            raise _Vanished(error.errno, error.strerror, error.filename) from error
        raise


def _keep_attributes(target: int, before: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.fchown(target, before.st_uid, before.st_gid)
    os.fchmod(target, stat.S_IMODE(before.st_mode))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def _same_content(source: int, folder: int, name: str) -> bool:
    place = 0
    with os.fdopen(os.open(name, _READ | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
        while True:
            ours, theirs = os.pread(source, 1 << 20, place), file.read(1 << 20)
            if ours != theirs:
                return False
            if not ours:
                return True
            place += len(ours)


def can_reflink(folder: Path) -> bool:
    """Whether the filesystem of `folder` can share blocks between files; tried with two files without a name."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        one = os.open(folder, flags, 0o600)
        try:
            other = os.open(folder, flags, 0o600)
            try:
                fcntl.ioctl(other, _FICLONE, one)
            finally:
                os.close(other)
        finally:
            os.close(one)
    except OSError:
        return False
    return True
