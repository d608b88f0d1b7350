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

from connectors.databases.postgres.clone.isolation import OWN_FOLDER
from connectors.databases.postgres.log.segments import give
from trigger.errors import RestoreError
from trigger.model import Volume
from trigger.ports import Clone

_SETTINGS = "postgresql.auto.conf"
_LEFT_OVER = ("postmaster.opts", "recovery.signal", "backup_label.old", "tablespace_map.old")


def release(data: Path, clone: Clone, volumes: Sequence[Volume]) -> None:
    """Give a stopped clone at `data` production's configuration and links back; blocks on file operations.

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
        if (data / OWN_FOLDER).exists():
            shutil.rmtree(data / OWN_FOLDER)
    except OSError as error:
        raise RestoreError(f"the clone at {data} cannot be released: {error}") from error
    os.sync()  # the clone's server may have run without fsync; from here on this is production


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
