"""Room on the disk of a SQLite catalog that is kept for the one thing that helps when it is full: giving points up.

Catalog and journal often share a disk. What gives up old points, and the log that only they needed, has to note it
first; where not a page can be written, the remedy would be shut in with the trouble. So a file of some megabytes lies
beside the catalog, and is cut shorter, piece by piece, by what needs it. Half of it is kept for an operator: what gives
points up by itself, while something goes on to fill the disk, must not leave him nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

PIECE_BYTES = 1 << 20
"""More than the largest step of giving points up writes; less than a segment of log, which would take it else."""
PIECES = 8
KEPT_PIECES = 4
"""Only for an operator who gives points up; as much as SQLite's log grows before it begins anew."""

_is_an_operators = ContextVar("is_an_operators", default=False)
"""A word of the task at hand: what the service does beside an operator's call is not his."""


@contextlib.contextmanager
def for_an_operator() -> Iterator[None]:
    """Let all of a reserve be given for what is written inside the block, and for nothing that goes on beside it."""
    token = _is_an_operators.set(True)
    try:
        yield
    finally:
        _is_an_operators.reset(token)


class Reserve:
    """The reserve of the catalog in `file`; there is none without one.

    On a filesystem that promises no room to a file that is allocated (with compression, say) it is of no use, and does
    no harm.
    """

    def __init__(self, file: Path | None) -> None:
        self._catalog = file

    def fill(self) -> None:
        """Make it whole, if there is the room, and as much again; never raises."""
        with contextlib.suppress(OSError), self._opened(os.O_CREAT) as descriptor:
            disk, size = os.fstatvfs(descriptor), os.fstat(descriptor).st_size
            lacking = PIECES * PIECE_BYTES - size
            if lacking > 0 and disk.f_bavail * disk.f_frsize >= 2 * lacking:
                os.posix_fallocate(descriptor, 0, PIECES * PIECE_BYTES)

    def give_piece(self, *, makes_room: bool) -> bool:
        """Give a piece back to the disk, for what `makes_room` or for an operator; False where none is left for it."""
        is_an_operators = _is_an_operators.get()
        if not (makes_room or is_an_operators):
            return False
        kept = 0 if is_an_operators else KEPT_PIECES * PIECE_BYTES
        with contextlib.suppress(OSError), self._opened() as descriptor:
            left = os.fstat(descriptor).st_size
            if left > kept:
                os.ftruncate(descriptor, max(kept, left - PIECE_BYTES))
                return True
        return False

    @contextlib.contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        """Give its descriptor; a file that root makes belongs to whom the catalog belongs to."""
        if self._catalog is None:
            raise FileNotFoundError
        path = self._catalog.with_name(f"{self._catalog.name}.reserve")
        descriptor = os.open(path, flags | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if flags and os.geteuid() == 0:
                owner = self._catalog.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            yield descriptor
        finally:
            os.close(descriptor)
