"""Hold a file for one process: the kernel's own lock, which ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock(path: Path) -> int | None:
    """Give a descriptor that holds `path` until it is closed; None where another one holds it. Never waits.

    The file is made where it is not there, readable by nobody else, and stays.

    Raises:
        OSError: it cannot be opened or made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
