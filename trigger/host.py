"""This host, as we find it: its mounts and subvolumes, folders that others may pass through, and durable names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BTRFS_ROOT_INODE = 256
"""The inode number of the root of every btrfs subvolume (BTRFS_FIRST_FREE_OBJECTID in the kernel's btrfs_tree.h)."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, as far as it matters here."""

    point: Path
    filesystem: str
    """`ext4`, `btrfs`, …"""


def mounts(mountinfo: str) -> list[Mount]:
    """Give the mounts in the text of /proc/self/mountinfo (proc(5)), in its order."""
    found = []
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if separator and len(fields) > 4 and kind:
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            found.append(Mount(Path(point), kind[0]))
    return found


def mount_of(path: Path, table: Sequence[Mount]) -> Mount:
    """Give the mount that `path` (real) lies on: the longest mount point above it, of equals the last."""
    above = [mount for mount in table if path.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point.parts), default=Mount(Path("/"), "unknown"))


def subvolume_of(path: Path) -> Path:
    """Give the root of the btrfs subvolume that `path` (existing, on btrfs) lies in."""
    for folder in (path, *path.parents):
        if folder.stat().st_ino == _BTRFS_ROOT_INODE:
            return folder
    return Path("/")


def read_mounts() -> list[Mount]:
    """Give the mounts that this process sees."""
    return mounts(Path("/proc/self/mountinfo").read_text(errors="replace"))


def free_bytes(path: Path) -> int:
    """Give how much is free on the filesystem that `path` lies on, or will lie on."""
    room = _room_at(path)
    return room.f_bavail * room.f_frsize


def size_bytes(path: Path) -> int:
    """Give how large the filesystem is that `path` lies on, or will lie on."""
    room = _room_at(path)
    return room.f_blocks * room.f_frsize


def _room_at(path: Path) -> os.statvfs_result:
    return os.statvfs(next(place for place in (path, *path.parents) if place.exists()))


def make_passage(folder: Path) -> None:
    """Make a folder that others may pass through and not look into; one that is there is left as it is.

    The servers of clones run as the owner of the data and must get through to the log that they replay.
    """
    for one in [one for one in (*reversed(folder.parents), folder) if not one.exists()]:
        with contextlib.suppress(FileExistsError):
            one.mkdir()
            one.chmod(0o711)  # whatever our umask is
