"""What lies at a path, seen at a glance."""

from __future__ import annotations

import os
from pathlib import Path


def status(path: Path, *, follow: bool = False) -> os.stat_result | None:
    """Give the status of what lies at a path; None where nothing does.

    Raises `OSError` where that cannot be looked at, which the questions of `Path` take for no.
    """
    try:
        return path.stat(follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
