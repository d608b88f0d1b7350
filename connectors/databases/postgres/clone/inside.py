"""Ways inside a copy of a cluster on which root follows no link: all that lies there is its owner's to change."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.log.files import entered
from trigger.model import Volume
from trigger.ports import Clone


class Part(NamedTuple):
    """A place in a volume, wherever that or a copy of it lies."""

    volume: str
    path: Path
    """From the top of the volume on; "." for that."""


def part_of(path: Path, clone: Clone, volumes: Sequence[Volume]) -> Part | None:
    """Give what a path of production, or of the clone itself, means; None where the clone has no copy of it.

    Only words are looked at, so that a path with `..` may mean anything, and is none.
    """
    if ".." in path.parts:
        return None
    copies = dict(clone.paths)
    for volume, copy in copies.items():
        if path.is_relative_to(copy):
            return Part(volume, path.relative_to(copy))
    for one in sorted(clone.volumes or volumes, key=lambda volume: len(volume.path), reverse=True):
        for root in (Path(one.path), Path(os.path.realpath(one.path))):
            if path.is_relative_to(root) and one.name in copies:
                return Part(one.name, path.relative_to(root))
    return None


def folder_of(part: Part | None, clone: Clone) -> Path | None:
    """Give the clone's folder for a part of a volume; None where there is none, or a link is on the way to it."""
    try:
        with held(part, clone) as folder:
            return folder.place
    except OSError:
        return None


class Held(NamedTuple):
    """A folder of a clone that is held open, so that no link which is put on the way to it leads anywhere else."""

    opened: int
    place: Path
    """Where it is for everybody else."""

    @property
    def path(self) -> Path:
        """A path to it that holds in this process, for as long as it is held."""
        return Path(f"/proc/self/fd/{self.opened}")


@contextlib.contextmanager
def held(part: Part | None, clone: Clone) -> Iterator[Held]:
    """Hold the clone's folder for a part of a volume.

    Raises:
        OSError: there is none, or a link is on the way to it.
    """
    copy = dict(clone.paths).get(part.volume) if part else None
    if part is None or copy is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with entered(copy, part.path) as opened:
        yield Held(opened, copy / part.path)


def empty(folder: int, which: Callable[[str], bool] = lambda _: True) -> None:
    """Remove from an open folder the entries with such names, and nothing that a link among them leads to."""
    for name in filter(which, os.listdir(folder)):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
