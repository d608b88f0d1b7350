"""The folders of clones' sockets, which nobody but the owner of the data and root may enter."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path

from connectors.databases.postgres.clone.isolation import Isolated, plain
from connectors.databases.postgres.log.files import give
from trigger.errors import RestoreError

_PATH_LIMIT = 107 - len("/.s.PGSQL.65535.lock")
_TRIES = 100
"""So often another clone's end may take away the folder that this one's is being made in."""


def path(sockets: Path, data: Path) -> Path:
    """Give the folder of the socket of the clone whose data directory is `data`, among those in `sockets`."""
    return sockets / hashlib.sha256(os.fsencode(data)).hexdigest()[:12]


def make(sockets: Path, isolated: Isolated) -> Path:
    """Make the folder of a clone's socket and give it.

    Raises:
        RestoreError: its path is too long for a socket, or somebody else made it.
    """
    made = plain(path(sockets, isolated.data), "the folder of sockets")
    if len(os.fsencode(made)) > _PATH_LIMIT:
        raise RestoreError(f"the folder of sockets {sockets} is too long for a socket's path")
    _make_in(sockets, made)
    for folder in (sockets, made):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid(), isolated.owner[0]):
            raise RestoreError(
                f"{folder} is not ours: it belongs to user id {found.st_uid}",
                hint="another user made it, who could pass off a server as the clone; remove it",
            )
    give(made, isolated.owner)
    made.chmod(0o700)
    return made


def remove(sockets: Path, data: Path) -> None:
    """Remove the folder of the socket of the clone whose data directory is `data`, and with the last one theirs."""
    shutil.rmtree(path(sockets, data), ignore_errors=True)
    for folder in (sockets, sockets.parent):
        with contextlib.suppress(OSError):  # another clone has its own there
            folder.rmdir()


def _make_in(sockets: Path, made: Path) -> None:
    for left in reversed(range(_TRIES)):
        try:
            _let_through(sockets)
            made.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            if not left:
                raise
        else:
            return


def _let_through(folder: Path) -> None:
    """Make a folder that others may enter, with its parents; one of ours that a umask had closed is opened again."""
    for one in [one for one in (*reversed(folder.parents), folder) if not one.exists()]:
        with contextlib.suppress(FileExistsError):
            one.mkdir()
            one.chmod(0o755)
    for one in (folder.parent, folder):
        found = one.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & stat.S_IXOTH:
            one.chmod(stat.S_IMODE(found.st_mode) | 0o011)
