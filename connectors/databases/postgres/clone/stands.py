"""Which cluster lies in a folder, by its files alone, whether a server works there or not.

The identifier tells a cluster that was made anew, as by `pg_upgrade`. Copies of one cluster have it in common; they are
told apart by the timeline that they go on in, and two that took the same number by where each left the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectors.databases.postgres import lsn
from connectors.databases.postgres.clone.isolation import log_of
from connectors.databases.postgres.control import Control
from trigger.errors import PositionError, RestoreError
from trigger.model import Volume
from trigger.ports import Clone
from trigger.position import Lineage
from trigger.trusted import read_text


def lineage_at(data: Path | None, copy: Clone, volumes: Sequence[Volume]) -> Lineage | None:
    """Give the lineage of the cluster at `data` in a copy, None where there is none that can be read; blocks."""
    if data is None:
        return None
    try:
        control = Control.read(data)
    except OSError:
        return None
    own = lsn.history(control.system, control.timeline)
    try:
        with log_of(data, copy, volumes) as log:
            return lsn.lineage(own, read_text(Path(f"{control.timeline:08X}.history"), folder=log))
    except (OSError, RestoreError, PositionError):  # the first timeline has no such file
        return Lineage(own)
