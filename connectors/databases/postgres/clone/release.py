"""Make a clone fit to take production's place: undo what `isolation` did to it, but for what must stay undone.

Its data directory still has production's own configuration, which its server never read; what `isolation` set aside
goes back, and the links that were pointed at the copy lead into production's volumes again. Slots stay gone, since
what they promised their clients is no longer true on the new timeline.

From the first link on its server would work in production's files. So before that it is no clone any more that can be
started, and none is started of which a link leads out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from connectors.databases.postgres.clone import archiving
from connectors.databases.postgres.clone.beside import production_log
from connectors.databases.postgres.clone.inside import folder_of, part_of
from connectors.databases.postgres.clone.isolation import OWN_FOLDER, held_data, links, log_of
from connectors.databases.postgres.clone.placement import Placement
from connectors.databases.postgres.clone.state import State
from connectors.databases.postgres.log.files import entered, give
from trigger.errors import RestoreError
from trigger.failpoint import reached
from trigger.model import Volume
from trigger.ports import Clone

_SETTINGS = "postgresql.auto.conf"
_LEFT_OVER = ("postmaster.opts", "recovery.signal", "backup_label.old", "tablespace_map.old")
_ONLY = "put it there (trigpoint restore --in-place --from-clone {0}), or drop it (trigpoint clones drop {0})"


def release(data: Path, clone: Clone, placement: Placement, volumes: Sequence[Volume], written: str) -> None:
    """Give a stopped clone at `data` production's configuration and links back; blocks on file operations.

    `placement` is production's, which is still where it was; `written` the segment that the clone's server wrote last.

    Doing it again, also after a half done try, gives the same: what it is started by goes first, and our folder in it,
    which holds what was set aside, last. Everything is on stable storage when it returns.

    Raises:
        RestoreError: its server may still run, a link leads neither into the clone nor into a volume, or a file
            cannot be written.
    """
    if (data / "postmaster.pid").exists():
        raise RestoreError(f"the clone at {data} still has a lock file", hint="stop its server first")
    with held_data(data, clone) as opened:
        here = opened.path
        if (here / OWN_FOLDER).is_symlink():
            raise _leads_out(here / OWN_FOLDER, clone)
        try:
            owner = here.stat().st_uid, here.stat().st_gid
            leading_back = _leading_back(here, clone, volumes)
            with log_of(data, clone, volumes) as log, _log_in(*production_log(placement, volumes)) as theirs:
                State.remove(here)
                for link, lead_back in leading_back:
                    link.unlink()
                    link.symlink_to(lead_back)
                    give(link, owner)
                    reached("after-link")
                aside = here / OWN_FOLDER / f"production.{_SETTINGS}"
                if aside.exists():
                    aside.replace(here / _SETTINGS)
                for name in _LEFT_OVER:
                    (here / name).unlink(missing_ok=True)
                archiving.tell(log, theirs, written, owner)
            if (here / OWN_FOLDER).exists():
                shutil.rmtree(here / OWN_FOLDER)
        except OSError as error:
            raise RestoreError(f"the clone at {data} cannot be released: {error}") from error
    os.sync()  # the clone's server may have run without fsync; from here on this is production


def require_startable(data: Path, clone: Clone) -> None:
    """Refuse a clone at `data` whose server would work in files that are not its own; blocks on reading its links.

    Raises:
        RestoreError: it was made ready to take production's place, be it in part; or a link leads out of it.
    """
    with held_data(data, clone) as opened:
        here = opened.path
        if not State.is_in(here):
            raise RestoreError(
                f"clone {clone.name} cannot be started: it was made ready to take production's place, or never came up",
                hint=_ONLY.format(clone.name),
            )
        try:
            for link in links(here, here / "pg_tblspc", here / "base"):
                if folder_of(part_of(link.readlink(), clone, ()), clone) is None:
                    raise RestoreError(
                        f"clone {clone.name} cannot be started: its {link.relative_to(here)} leads to"
                        f" {link.readlink()}, and its server would write into what is not its own",
                        hint=f"where it was to take production's place, {_ONLY.format(clone.name)}; else see who put"
                        " the link there",
                    )
        except OSError as error:
            raise RestoreError(f"clone {clone.name} cannot be started: {error}") from error


@contextlib.contextmanager
def _log_in(production: Path, below: Path) -> Iterator[int | None]:
    """Open production's pg_wal, None where it is gone; raises `RestoreError` where a link leads away from it."""
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(entered(production, below))
        except FileNotFoundError:
            log = None
        except NotADirectoryError as error:
            raise RestoreError(
                f"what production has not archived yet cannot be told: {error.filename} is no folder",
                hint="where pg_wal was moved, start the cluster and the service once, so that the place is known",
            ) from error
        yield log


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
