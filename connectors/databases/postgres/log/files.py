"""Ordinary files between two users, one of whom is root: read, filled and given away without following a link."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from trigger.trusted import NotOursError, naming, open_file, read_text, sync_folder

_FICLONE = 0x40049409
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def reading(path: Path, *, folder: int | None = None) -> Iterator[io.FileIO]:
    """Give an ordinary file to read, without a buffer; raises `NotOursError` for a link, a pipe or a device."""
    with io.FileIO(open_file(path, folder=folder)) as file:
        yield file


@contextlib.contextmanager
def entered(top: Path, below: Path = Path()) -> Iterator[int]:
    """Give a descriptor of the folder `below` in `top`, none of which, `top` included, may be a link.

    Raises:
        OSError: one is, or it is not there.
    """
    here = os.open(top, _FOLDER)
    try:
        place = top
        for name in below.parts:
            place /= name
            here, above = _step(here, name, place), here
            os.close(above)
        yield here
    finally:
        os.close(here)


def text_inside(top: Path, path: Path) -> str:
    """Give the text of the ordinary file `path` in `top`; see `read_text`. No folder on the way, nor `top`, is a link.

    Raises:
        NotOursError: it is a link, or no ordinary file.
        OSError: it is not there, or a folder on the way is a link.
    """
    with entered(top, path.parent) as folder:
        try:
            with naming(top / path):
                return read_text(Path(path.name), folder=folder)
        except NotOursError as error:
            raise NotOursError(f"in {top / path.parent}: {error.message}", error.remedy) from None


def _step(here: int, name: str, place: Path) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=here)
    except OSError as error:
        error.filename = str(place)
        raise


def flushed_size(path: Path) -> int:
    """Give the size of an ordinary file once all of it is on stable storage."""
    with reading(path) as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def take_place(new: Path, place: Path) -> None:
    """Put a file, which is on stable storage, in the place of another or of none, durably, as one changed just now."""
    os.utime(new, follow_symlinks=False)
    new.replace(place)
    sync_folder(place.parent)


def write_flushed(path: Path, text: str) -> None:
    """Write a small file, and put what it holds on stable storage; its name is the caller's business."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def give(path: Path, owner: tuple[int, int] | None) -> None:
    """Make `path` belong to (user, group); nothing where we are not root."""
    if owner is not None and os.geteuid() == 0:
        os.chown(path, *owner, follow_symlinks=False)


def give_open(descriptor: int, owner: tuple[int, int] | None) -> None:
    """Make what is open belong to (user, group); nothing where we are not root."""
    if owner is not None and os.geteuid() == 0:
        os.fchown(descriptor, *owner)


def put_new(
    name: str,
    folder: int,
    file: io.FileIO,
    owner: tuple[int, int] | None,
    require_room: Callable[[], None] = lambda: None,
) -> None:
    """Make a file of that name in an open folder, with what `file` holds (shared with it where that goes); give it.

    Before anything is copied, `require_room` is asked, which may raise.

    Raises:
        FileExistsError: there is one.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(open_file(Path(name), flags, folder=folder), "wb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, file.fileno())
        except OSError:
            require_room()
            shutil.copyfileobj(file, writing, 1 << 20)
        give_open(writing.fileno(), owner)
