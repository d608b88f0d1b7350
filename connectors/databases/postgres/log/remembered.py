"""What was read of files, remembered as long as they look the same."""

from __future__ import annotations

import os
import struct
import time
from typing import Generic, TypeVar

T = TypeVar("T")

_LOOK = struct.Struct("=QQqq")
_CLOCK_MARGIN_NS = 2_000_000_000
"""How near to now a time stamp is not trusted: what is written a moment later would bear the same one. Two seconds is
the coarsest clock of any filesystem (FAT)."""


class Remembered(Generic[T]):
    """What was read of files, by name."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[bytes, T]] = {}

    def get(self, name: str, seen: os.stat_result) -> T | None:
        """Give what was read of a file where it looks now as it did then; None where it does not, or never was."""
        look, value = self._read.get(name, (b"", None))
        return value if look == _look(seen) else None

    def put(self, name: str, seen: os.stat_result, value: T) -> None:
        """Remember what was read of a file that looked so right before; nothing of one that was written to just now."""
        if time.time_ns() - max(seen.st_mtime_ns, seen.st_ctime_ns) > _CLOCK_MARGIN_NS:
            self._read[name] = _look(seen), value


def _look(seen: os.stat_result) -> bytes:
    """Give inode, size and times: of the latter programs can set the first, and not the second."""
    return _LOOK.pack(seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
