"""`syncfs(2)`, which Python does not offer: everything that was written to a filesystem before goes to stable storage.

Since Linux 5.8 the call also reports an error of write-back that happened since the descriptor was opened (or that
nobody has seen yet), once for each open descriptor; so open it before the writes that it shall answer for.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def syncfs(descriptor: int) -> None:
    """Flush the filesystem that holds the open file; blocks without the interpreter's lock, raises `OSError`."""
    if _library().syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_folder(path: Path) -> int:
    """Give a descriptor of a folder, through which its filesystem can be flushed."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def flush(path: Path) -> None:
    """Flush the filesystem that holds the folder `path`."""
    descriptor = open_folder(path)
    try:
        syncfs(descriptor)
    finally:
        os.close(descriptor)
