"""How folders of a storage are removed; what is not there, or is removed by another meanwhile, is no error."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Remove a folder with all it holds."""
    while os.path.lexists(folder):
        with contextlib.suppress(FileNotFoundError):  # each time it comes as far as another has
            shutil.rmtree(folder)


def remove_copies(folder: Path, remove: Callable[[Path], None]) -> None:
    """Remove a folder, by `remove` the copies of volumes in it first: what says whose it is goes last."""
    with contextlib.suppress(FileNotFoundError):
        for found in list(folder.iterdir()):
            if found.is_dir() and not found.is_symlink():
                with contextlib.suppress(FileNotFoundError):
                    remove(found)
    remove_tree(folder)
