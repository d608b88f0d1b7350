"""The folders of clones' sockets, which nobody but the owner of the data and root may enter."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path

from connectors.databases.postgres.clone.isolation import Isolated, plain
from connectors.databases.postgres.log.files import give_open
from trigger.errors import RestoreError
from trigger.trusted import NotOursError, open_ours, why_not_ours

_PATH_LIMIT = 107 - len("/.s.PGSQL.65535.lock")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 100
"""So often another clone's end may take away the folder that this one's is being made in."""


def path(sockets: Path, data: Path) -> Path:
    """Give the folder of the socket of the clone whose data directory is `data`, among those in `sockets`."""
    return sockets / hashlib.sha256(os.fsencode(data)).hexdigest()[:12]


def make(sockets: Path, isolated: Isolated) -> Path:
    """Make the folder of a clone's socket and give it.

    Raises:
        RestoreError: its path is too long for a socket, or somebody else can change what lies there.
    """
    made = plain(path(sockets, isolated.data), "the folder of sockets")
    if len(os.fsencode(made)) > _PATH_LIMIT:
        raise RestoreError(f"the folder of sockets {sockets} is too long for a socket's path")
    try:
        if (refused := why_not_ours(sockets, isolated.owner[:1])) is not None:
            raise refused
        _make_in(sockets, made, isolated.owner)
    except NotOursError as error:
        hint = "whoever can change it could pass off a server as the clone: see who made it, and remove it"
        raise RestoreError(f"the clone's socket cannot lie in {sockets}: {error.message}", hint=hint) from None
    return made


def remove(sockets: Path, data: Path) -> None:
    """Remove the folder of the socket of the clone whose data directory is `data`, and with the last one theirs."""
    shutil.rmtree(path(sockets, data), ignore_errors=True)
    for folder in (sockets, sockets.parent):
        with contextlib.suppress(OSError):  # another clone has its own there
            folder.rmdir()


def _make_in(sockets: Path, made: Path, owner: tuple[int, int]) -> None:
    for left in reversed(range(_TRIES)):
        try:
            _let_through(sockets)
            _make_one(sockets, made, owner)
        except FileNotFoundError:
            if not left:
                raise
        else:
            return


def _make_one(sockets: Path, made: Path, owner: tuple[int, int]) -> None:
    """Make a clone's folder in one that is ours, by descriptors, and give it away."""
    with contextlib.ExitStack() as opened:
        above = open_ours(sockets, owner[:1])
        opened.callback(os.close, above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(made.name, 0o700, dir_fd=above)
        folder = os.open(made.name, _FOLDER, dir_fd=above)
        opened.callback(os.close, folder)
        if (found := os.fstat(folder).st_uid) not in (0, os.geteuid(), owner[0]):
            raise NotOursError(f"{made} belongs to user {found}", "see who made it, and remove it")
        give_open(folder, owner)
        os.fchmod(folder, 0o700)


def _let_through(folder: Path) -> None:
    """Make a folder that others may enter, with its parents; one of ours that a umask had closed is opened again."""
    missing = [one for one in (*reversed(folder.parents), folder) if not one.exists()]
    for one in missing:
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o755)
    for one in dict.fromkeys((*missing, folder.parent, folder)):
        with contextlib.suppress(NotADirectoryError, PermissionError):  # a link to where it lies; not ours to open
            opened = os.open(one, _FOLDER)
            try:
                found = os.fstat(opened)
                if found.st_uid == os.geteuid() and not found.st_mode & stat.S_IXOTH:
                    os.fchmod(opened, stat.S_IMODE(found.st_mode) | 0o011)
            finally:
                os.close(opened)
