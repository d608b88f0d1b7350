"""The timelines that copies of a cluster beside its volumes went on in, which no other clone may take.

What a restore in place brought back may have run, and its server may have archived a timeline of its own, without any
service that saw it; then it was taken back, and lies beside the volume. The next clone would find the same number free.
So the history files of all that lies there are shown to its server, which takes the first number that has none
(findNewestTimeLine); a clone that has its number already is refused.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from connectors.databases.postgres.clone.archiving import system_of
from connectors.databases.postgres.clone.placement import Placement, Spot
from connectors.databases.postgres.log.files import entered, put_new, reading
from connectors.databases.postgres.log.wal import history_timeline
from trigger.model import Volume


def production_log(placement: Placement, volumes: Sequence[Volume]) -> tuple[Path, Path]:
    """Give the volume that production's pg_wal lies in, and where in it."""
    spot = placement.wal or Spot(placement.data.volume, f"{placement.data.path}/pg_wal".lstrip("/"))
    return next(Path(volume.path).resolve() for volume in volumes if volume.name == spot.volume), Path(spot.path)


def timelines(placement: Placement, volumes: Sequence[Volume], system: str) -> dict[int, Path]:
    """Give each timeline of the cluster `system` that was begun in the volumes or beside them, and where."""
    return {timeline: place for place, _, timeline in _histories(placement, volumes, system)}


def show(placement: Placement, volumes: Sequence[Volume], system: str, staged: Path, owner: tuple[int, int]) -> None:
    """Put the history file of each such timeline into a folder of staged log, beside what the journal knows."""
    with entered(staged) as folder:
        for _, log, timeline in _histories(placement, volumes, system):
            name = f"{timeline:08X}.history"
            with contextlib.suppress(FileExistsError), reading(Path(name), folder=log) as file:
                put_new(name, folder, file, owner)


def _histories(placement: Placement, volumes: Sequence[Volume], system: str) -> Iterator[tuple[Path, int, int]]:
    """Give (a copy of the volume, its open log, a timeline); what cannot be entered without a link is left out."""
    volume, below = production_log(placement, volumes)
    beside = sorted(volume.parent.glob(f"{glob.escape(volume.name)}.*"))
    for place in (volume, *beside):
        with contextlib.suppress(OSError), entered(place, below) as log:
            if system_of(log) in ("", system):
                for name in sorted(os.listdir(log)):  # noqa: PTH208 - an open folder
                    if (timeline := history_timeline(name)) is not None:
                        yield place, log, timeline
