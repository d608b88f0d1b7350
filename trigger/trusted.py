"""Folders on this host that nobody but ourselves and root can put something else in the place of.

Whoever may write a folder decides what its names mean: a file of ours there becomes a link to any other, and as root
we would write that. So a folder is reached step by step, by descriptors, from the root of the filesystem: each step
belongs to root or to us and is written by nobody else, or is one like `/tmp`, in which (sticky) everybody keeps his
own. Links on the way are followed only where they belong to root or to us.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEXT_BYTES = 1 << 24
_MOST_LINKS = 40
"""What the kernel follows too before it says ELOOP (path_resolution(7))."""


class NotOursError(PermissionError):
    """Somebody else decides what lies at a path; `message` says where and why, `remedy` what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(errno.EPERM, message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


def open_ours(path: Path, also: Collection[int] = ()) -> int:
    """Give a descriptor of the folder `path`, which only we and root can change, with all that leads to it.

    Args:
        path: the folder.
        also: ids of users who may, besides.

    Raises:
        NotOursError: somebody else may write it or a folder above it.
        OSError: it is not there, or is no folder.
    """
    step = _reach(path, also=also)
    try:
        with naming(path):
            return os.open(".", _FOLDER, dir_fd=step)
    finally:
        os.close(step)


def why_not_ours(path: Path, also: Collection[int] = ()) -> NotOursError | None:
    """Give what makes `path`, or as much of it as is there, somebody else's to change; None where nothing does.

    Users whose id is in `also` may change it too.
    """
    for place in (path, *path.parents):
        try:
            os.close(_reach(place, last=place == path, also=also))
        except NotOursError as error:
            return error
        except FileNotFoundError:
            continue
        except OSError:  # a file, a link to nothing, not to be reached: said by whoever needs the folder
            return None
        return None
    return None


def require_no_link(path: Path) -> None:
    """Raise `NotOursError` where `path` is a symbolic link; nothing there is no error."""
    if path.is_symlink():
        raise _link(path)


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600, *, folder: int | None = None) -> int:
    """Give a descriptor of an ordinary file: no link is followed, and no pipe or device waited for.

    Args:
        path: the file; with `folder` its name in the folder of that descriptor.
        flags: as for `os.open`.
        mode: for a file that is made.
        folder: where `path` begins.

    Raises:
        NotOursError: it is a link, or no ordinary file.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _link(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotOursError(f"{path} is no ordinary file", "somebody put it there: look who, and remove it")
    return descriptor


def read_text(path: Path, *, folder: int | None = None) -> str:
    """Give the text of an ordinary file that somebody else may have put there, of a long one its last 16 MiB.

    Args:
        path: the file; with `folder` its name in the folder of that descriptor.
        folder: where `path` begins.

    Raises:
        NotOursError, OSError: as for `open_file`.
    """
    with os.fdopen(open_file(path, folder=folder), "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _TEXT_BYTES, 0))
        return file.read(_TEXT_BYTES).decode(errors="replace")


def sync_folder(folder: Path) -> None:
    """Make what was named, renamed or removed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system inside the block say what it is about: calls by descriptor do not know."""
    try:
        yield
    except NotOursError:
        raise
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, durably, for nobody else's eyes; root gives it to the folder's owner.

    Raises:
        OSError: it cannot be written.
    """
    with naming(path):
        _replace(path, text)


def _replace(path: Path, text: str) -> None:
    folder = os.open(path.parent, _FOLDER & ~os.O_NOFOLLOW)
    draft = Path(f".{path.name}.{os.getpid()}")

    def drop_draft() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=folder)

    try:
        drop_draft()
        with os.fdopen(open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder=folder), "w") as file:
            owner = os.fstat(folder)
            if os.geteuid() == 0:
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        drop_draft()  # where there was no room for it
        os.close(folder)


def _link(path: Path) -> NotOursError:
    return NotOursError(f"{path} is a symbolic link", "somebody put it there: look who, and remove it")


def _reach(path: Path, *, last: bool = True, also: Collection[int] = ()) -> int:
    """Give a descriptor for steps from the folder `path`; see `open_ours`. Not `last`: names of ours may follow."""
    owners = {0, os.geteuid(), *also}
    whole = path.absolute()
    left = list(reversed(whole.parts[1:]))
    here, place, links = os.open("/", _STEP), Path("/"), 0
    try:
        while left:
            _require_ours(place, os.fstat(here), owners, last=False)
            name = left.pop()
            following = _step(here, place, name)
            try:
                seen = os.fstat(following)
                if stat.S_ISLNK(seen.st_mode):
                    links += 1
                    target = _followed(place / name, seen, following, links)
                    left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
                    if target.is_absolute():
                        os.close(here)
                        here, place = os.open("/", _STEP), Path("/")
                    continue
                if not stat.S_ISDIR(seen.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place / name))
                here, following, place = following, here, _joined(place, name)
            finally:
                os.close(following)
        _require_ours(place, os.fstat(here), owners, last=last)
    except BaseException:
        os.close(here)
        raise
    return here


def _step(here: int, place: Path, name: str) -> int:
    try:
        return os.open(name, _STEP, dir_fd=here)
    except OSError as error:
        error.filename = str(place / name)
        raise


def _joined(place: Path, name: str) -> Path:
    return place.parent if name == ".." else place / name


def _followed(link: Path, seen: os.stat_result, descriptor: int, links: int) -> Path:
    """Give where a link leads; raises `NotOursError` for somebody else's."""
    if seen.st_uid not in (0, os.geteuid()):
        raise NotOursError(f"the link {link} belongs to user {seen.st_uid}", f"remove it, or chown -h 0 {link}")
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link))
    return Path(os.readlink("", dir_fd=descriptor))


def _require_ours(place: Path, seen: os.stat_result, owners: Collection[int], *, last: bool) -> None:
    """Raise `NotOursError` where somebody else may change the names in a folder; in the last one even his own."""
    if seen.st_uid not in owners:
        whose = "root's" if os.geteuid() == 0 else "ours or root's"
        raise NotOursError(
            f"{place} belongs to user {seen.st_uid}, who decides what lies in it",
            f"choose a place whose folders are {whose}, or chown {place}; or run this as user {seen.st_uid}",
        )
    if seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (last or not seen.st_mode & stat.S_ISVTX):
        mode = f"{stat.S_IMODE(seen.st_mode):04o}"
        raise NotOursError(f"{place} can be written by others (mode {mode})", f"chmod go-w {place}, or choose another")
