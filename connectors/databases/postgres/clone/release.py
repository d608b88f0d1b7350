"""Make a clone fit to take production's place: undo what `isolation` did to it, but for what must stay undone.

Its data directory still has production's own configuration, which its server never read; what `isolation` set aside
goes back, and the links that were pointed at the copy lead into production's volumes again. Slots stay gone, since
what they promised their clients is no longer true on the new timeline.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from connectors.databases.postgres.clone.inside import folder_of, part_of
from connectors.databases.postgres.clone.isolation import OWN_FOLDER, is_segment, links, log_of, require_no_link_to
from connectors.databases.postgres.log.files import give
from connectors.databases.postgres.log.wal import history_timeline
from trigger.errors import RestoreError
from trigger.model import Volume
from trigger.ports import Clone
from trigger.trusted import open_file

_STATUS = "archive_status"
_SETTINGS = "postgresql.auto.conf"
_LEFT_OVER = ("postmaster.opts", "recovery.signal", "backup_label.old", "tablespace_map.old")


def release(data: Path, clone: Clone, volumes: Sequence[Volume], written: str) -> None:
    """Give a stopped clone at `data` production's configuration and links back; blocks on file operations.

    `written` is the segment that its server wrote last.

    Doing it again, also after a half done try, gives the same: our folder in it, which holds what was set aside, goes
    last. Everything is on stable storage when it returns.

    Raises:
        RestoreError: its server may still run, a link leads neither into the clone nor into a volume, or a file
            cannot be written.
    """
    if (data / "postmaster.pid").exists():
        raise RestoreError(f"the clone at {data} still has a lock file", hint="stop its server first")
    require_no_link_to(data, clone)
    if (data / OWN_FOLDER).is_symlink():
        raise _leads_out(data / OWN_FOLDER, clone)
    try:
        owner = data.stat().st_uid, data.stat().st_gid
        for link, lead_back in _leading_back(data, clone, volumes):
            link.unlink()
            link.symlink_to(lead_back)
            give(link, owner)
        aside = data / OWN_FOLDER / f"production.{_SETTINGS}"
        if aside.exists():
            aside.replace(data / _SETTINGS)
        for name in _LEFT_OVER:
            (data / name).unlink(missing_ok=True)
        with log_of(data, clone, volumes) as log:
            _tell_archiver(log, written, owner)
        if (data / OWN_FOLDER).exists():
            shutil.rmtree(data / OWN_FOLDER)
    except OSError as error:
        raise RestoreError(f"the clone at {data} cannot be released: {error}") from error
    os.sync()  # the clone's server may have run without fsync; from here on this is production


def _tell_archiver(log: int, written: str, owner: tuple[int, int]) -> None:
    """Leave `archive_status` as PostgreSQL's own recovery does where archiving is on, which in a clone it is not.

    The log of earlier timelines is done: production has archived it, and what the clone has of it is cut off where the
    clone left it. The history file and the finished segments of the clone's own timeline wait for the archiver: without
    the former a later recovery from the archive would follow the timeline that was given up (xlogarchive.c). What lies
    at or behind `written` is not finished, or was made in advance.
    """
    names = sorted(name for name in os.listdir(log) if _is_file(name, log))
    segments = [name for name in names if is_segment(name) and not (name[:8] == written[:8] and name >= written)]
    own = int(written[:8], 16)
    with _status_of(log, owner) as status:
        for name in [*segments, *(name for name in names if history_timeline(name) is not None)]:
            _mark(name, "ready" if int(name[:8], 16) == own else "done", status, owner)


def _is_file(name: str, folder: int) -> bool:
    return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


@contextlib.contextmanager
def _status_of(log: int, owner: tuple[int, int]) -> Iterator[int]:
    """Open `archive_status`, made and given away where it is not there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(_STATUS, 0o700, dir_fd=log)
    try:
        status = os.open(_STATUS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=log)
    except NotADirectoryError:
        raise RestoreError(
            f"{_STATUS} is a link or a file, which PostgreSQL makes none of", hint="see who put it there"
        ) from None
    try:
        if os.geteuid() == 0:
            os.fchown(status, *owner)
        yield status
    finally:
        os.close(status)


def _mark(name: str, state: str, status: int, owner: tuple[int, int]) -> None:
    """Leave one word for the archiver about a file: `ready` where it has to be archived, else `done`."""
    for old in ("ready", "done"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{name}.{old}", dir_fd=status)
    file = open_file(Path(f"{name}.{state}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, folder=status)
    try:
        if os.geteuid() == 0:
            os.fchown(file, *owner)
    finally:
        os.close(file)


def _leading_back(data: Path, clone: Clone, volumes: Sequence[Volume]) -> list[tuple[Path, Path]]:
    """Give each link of the data directory, and where in production's volumes it has to lead.

    Raises:
        RestoreError: one leads out of the clone, by other links or `..` too.
    """
    places = {volume.name: Path(volume.path) for volume in volumes}
    below = [_in_clone(data / name, clone, volumes) for name in ("pg_tblspc", "base")]
    found = []
    for link in links(data, *below):
        part = part_of(link.readlink(), clone, volumes)
        if part is None or part.volume not in places or folder_of(part, clone) is None:
            raise _leads_out(link, clone)
        found.append((link, places[part.volume] / part.path))
    return found


def _in_clone(folder: Path, clone: Clone, volumes: Sequence[Volume]) -> Path:
    """Give the clone's own folder where a link in its place leads there, or back into production by now."""
    if not folder.is_symlink():
        return folder
    own = folder_of(part_of(folder.readlink(), clone, volumes), clone)
    if own is None:
        raise _leads_out(folder, clone)
    return own


def _leads_out(link: Path, clone: Clone) -> RestoreError:
    return RestoreError(
        f"a link of clone {clone.name} leads to {link.readlink()}, which is in none of its volumes",
        hint=f"see who put it at {link}",
    )
