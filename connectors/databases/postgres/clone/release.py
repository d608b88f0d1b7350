"""Make a clone fit to take production's place: undo what `isolation` did to it, but for what must stay undone.

Its data directory still has production's own configuration, which its server never read; what `isolation` set aside
goes back, and the links that were pointed at the copy lead into production's volumes again. Slots stay gone, since
what they promised their clients is no longer true on the new timeline.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from connectors.databases.postgres.clone.isolation import OWN_FOLDER, is_segment
from connectors.databases.postgres.log.files import give
from connectors.databases.postgres.log.wal import history_timeline
from trigger.errors import RestoreError
from trigger.model import Volume
from trigger.ports import Clone

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
    try:
        owner = data.stat().st_uid, data.stat().st_gid
        for link in _links(data):
            lead_back = _in_production(link.readlink(), clone, volumes)
            link.unlink()
            link.symlink_to(lead_back)
            give(link, owner)
        aside = data / OWN_FOLDER / f"production.{_SETTINGS}"
        if aside.exists():
            aside.replace(data / _SETTINGS)
        for name in _LEFT_OVER:
            (data / name).unlink(missing_ok=True)
        _tell_archiver(_log_of(data, clone, volumes), written, owner)
        if (data / OWN_FOLDER).exists():
            shutil.rmtree(data / OWN_FOLDER)
    except OSError as error:
        raise RestoreError(f"the clone at {data} cannot be released: {error}") from error
    os.sync()  # the clone's server may have run without fsync; from here on this is production


def _log_of(data: Path, clone: Clone, volumes: Sequence[Volume]) -> Path:
    """Give where the clone's log lies now, whose link leads into production's volumes by now if it is one."""
    log = data / "pg_wal"
    if not log.is_symlink():
        return log
    copies, target = dict(clone.paths), log.readlink()
    for volume in volumes:
        if target.is_relative_to(volume.path) and volume.name in copies:
            return copies[volume.name] / target.relative_to(volume.path)
    return log


def _tell_archiver(log: Path, written: str, owner: tuple[int, int]) -> None:
    """Leave `archive_status` as PostgreSQL's own recovery does where archiving is on, which in a clone it is not.

    The log of earlier timelines is done: production has archived it, and what the clone has of it is cut off where the
    clone left it. The history file and the finished segments of the clone's own timeline wait for the archiver: without
    the former a later recovery from the archive would follow the timeline that was given up (xlogarchive.c). What lies
    at or behind `written` is not finished, or was made in advance.
    """
    names = sorted(entry.name for entry in log.iterdir() if entry.is_file())
    segments = [name for name in names if is_segment(name) and not (name[:8] == written[:8] and name >= written)]
    own = int(written[:8], 16)
    status = log / "archive_status"
    if status.is_symlink():
        raise RestoreError(f"{status} is a link, which PostgreSQL makes none of", hint="see who put it there")
    status.mkdir(mode=0o700, exist_ok=True)
    give(status, owner)
    for name in [*segments, *(name for name in names if history_timeline(name) is not None)]:
        waits = int(name[:8], 16) == own
        there, other = (status / f"{name}.{state}" for state in (("ready", "done") if waits else ("done", "ready")))
        other.unlink(missing_ok=True)
        os.close(os.open(there, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        give(there, owner)


def _links(data: Path) -> Iterator[Path]:
    for link in (data / "pg_wal", *sorted((data / "pg_tblspc").iterdir())):
        if link.is_symlink():
            yield link


def _in_production(path: Path, clone: Clone, volumes: Sequence[Volume]) -> Path:
    """Give the place in production's volumes that answers to a place in the clone, or is one already."""
    places = {volume.name: Path(volume.path) for volume in volumes}
    for volume, copy in clone.paths:
        if path.is_relative_to(copy) and volume in places:
            return places[volume] / path.relative_to(copy)
    for place in places.values():
        if path.is_relative_to(place):
            return path
    raise RestoreError(f"a link of clone {clone.name} leads to {path}, which is in none of its volumes")
