"""Hold a file for one process: the kernel's own lock, which ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from trigger.trusted import naming, open_file, open_ours


def lock(path: Path) -> int | None:
    """Give a descriptor that holds `path` until it is closed; None where another one holds it. Never waits.

    The file is made where it is not there, readable by nobody else, and stays.

    Raises:
        NotOursError: it is a link, or somebody else may write the folder that it lies in, or one above.
        OSError: it cannot be opened or made.
    """
    folder = open_ours(path.parent)
    try:
        with naming(path):
            descriptor = open_file(Path(path.name), os.O_RDWR | os.O_CREAT, folder=folder)
    finally:
        os.close(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
