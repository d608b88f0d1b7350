"""The folder of a storage, told by its lock from any other: what is not mounted is never taken for empty.

Where a filesystem is mounted no longer, its folder is gone, or an empty one lies in its place, or what somebody left
beneath. Whoever goes on there finds no point, no clone, and another room.
"""

from __future__ import annotations

import os
from pathlib import Path

from trigger.errors import StorageError
from trigger.point_names import is_point_id, tag_name

_PREFIX = tag_name("")
_MOUNT = "mount its filesystem again"


class Place:
    """The folder of one storage, as it was when it was first seen. Everything here blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"
        """The file that is held by the one who makes and removes points; it stays for ever."""
        self.clones = folder / "clones"
        """Where all clones lie."""
        self._was_there = self._was_locked = False
        self._held: tuple[int, int] | None = None

    def hold(self, descriptor: int) -> None:
        """Take the folder in which a lock is held now, and says whose it is, for the one."""
        self._held = _which(os.fstat(descriptor))

    def is_there(self) -> bool:
        """Whether the folder is there; in it need not be anything yet.

        Raises:
            StorageError: it was there before, and is gone, or another one than is held lies in its place: what it keeps
                would seem lost, and new points would be made on whatever filesystem lies beneath.
        """
        held = self._held  # asked first, as the others: somebody may make the folder between two looks
        was_there, was_locked = self._was_there, self._was_locked or held is not None
        try:
            found = _which(self.lock.lstat())
        except (FileNotFoundError, NotADirectoryError):
            found = None
        is_there = found is not None or self.folder.exists()
        if (was_there and not is_there) or (was_locked and found is None):
            raise self._gone()
        if held is not None and found != held:
            hint = f"{_MOUNT}; where this is it, start the service anew"
            raise StorageError(f"{self.folder} is another folder than it was", hint=hint)
        self._was_there |= is_there
        self._was_locked |= found is not None
        return is_there

    def is_used(self) -> bool:
        """Whether anything lies in the folder that was ever ours."""
        return self.folder.exists() and (self.lock.exists() or self.clones.exists() or any(self.points()))

    def require_used(self) -> None:
        """Raise `StorageError` where nothing of ours lies in the folder, though somebody knows a point in it."""
        if not (self.is_there() and self.is_used()):
            raise self._gone()

    def points(self) -> list[str]:
        """Give the id of everything in the folder that bears one of our names, oldest first."""
        names = (found.name for found in self.folder.iterdir() if found.name.startswith(_PREFIX))
        return sorted(name[len(_PREFIX) :] for name in names if is_point_id(name[len(_PREFIX) :]))

    def _gone(self) -> StorageError:
        what = f"what was kept in {self.folder}" if self.folder.exists() else f"{self.folder}"
        return StorageError(f"{what} is gone", hint=_MOUNT)


def _which(seen: os.stat_result) -> tuple[int, int]:
    """Give which file a status is of: by its number and when it was written, since mounting may change the device."""
    return seen.st_ino, seen.st_mtime_ns
