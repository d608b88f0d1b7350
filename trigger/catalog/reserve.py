"""Room on the disk of a SQLite catalog that is kept for the one thing that helps when it is full: giving points up.

Catalog and journal often share a disk. What gives up old points, and the log that only they needed, has to note it
first; where not a page can be written, the remedy would be shut in with the trouble. So a file of some megabytes lies
beside the catalog, and is cut shorter, piece by piece, by what needs it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 1 << 20
"""More than the largest step of giving points up writes; less than a segment of log, which would take it else."""
PIECES = 4


class Reserve:
    """The reserve of the catalog in `file`.

    On a filesystem that promises no room to a file that is allocated (with compression, say) it is of no use, and does
    no harm.
    """

    def __init__(self, file: Path) -> None:
        self._catalog = file
        self._path = file.with_name(f"{file.name}.reserve")

    def fill(self) -> None:
        """Make it whole, if there is the room, and as much again; never raises."""
        with contextlib.suppress(OSError), self._opened(os.O_CREAT) as descriptor:
            disk, size = os.fstatvfs(descriptor), os.fstat(descriptor).st_size
            lacking = PIECES * PIECE_BYTES - size
            if lacking > 0 and disk.f_bavail * disk.f_frsize >= 2 * lacking:
                os.posix_fallocate(descriptor, 0, PIECES * PIECE_BYTES)

    def give_piece(self) -> bool:
        """Give one piece back to the disk; False where there is none left."""
        with contextlib.suppress(OSError), self._opened() as descriptor:
            left = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, max(0, left - PIECE_BYTES))
            return left > 0
        return False

    @contextlib.contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        """Give its descriptor; a file that root makes belongs to whom the catalog belongs to."""
        descriptor = os.open(self._path, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if flags and os.geteuid() == 0:
                owner = self._catalog.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            yield descriptor
        finally:
            os.close(descriptor)
