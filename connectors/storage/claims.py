"""Whose the folder of a storage is: noted in the file that is locked, so that it is known while its service is down.

A service is known by its catalog, the other half of what it keeps: one that is moved, or was lost, claims nothing more.
"""

from __future__ import annotations

import os
from pathlib import Path

from connectors.claimant import is_anothers
from trigger.trusted import NotOursError, open_file

_LONGEST = 4096
"""Bytes that a path has at most (PATH_MAX in the kernel's limits.h)."""


def another(file: Path, holder: str) -> str:
    """Give the catalog that a claim was noted for, where it is there and not `holder`; "" where that is not known."""
    try:
        descriptor = open_file(file)
    except (NotOursError, OSError):
        return ""
    try:
        noted = _noted(descriptor)
    finally:
        os.close(descriptor)
    return noted if is_anothers(noted, holder) else ""


def note(descriptor: int, holder: str) -> None:
    """Write durably into the file of a claim that is held, whose it is."""
    if not holder or _noted(descriptor) == holder:
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, os.fsencode(holder), 0)
    os.fsync(descriptor)


def _noted(descriptor: int) -> str:
    noted = os.fsdecode(os.pread(descriptor, _LONGEST, 0))
    return noted if noted.startswith("/") and "\0" not in noted else ""
