"""Where in its volumes a cluster lies, and where in a copy of volumes that were others then."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from connectors.databases.postgres import places
from connectors.databases.postgres.clone.inside import Part, folder_of
from trigger.errors import PreflightError, RestoreError
from trigger.model import Layout, Volume
from trigger.ports import Clone


class Spot(NamedTuple):
    """A folder by its volume and its path inside it ("" for the volume itself)."""

    volume: str
    path: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where in its volumes a cluster lies; all that a restore must know when production is gone."""

    data: Spot
    wal: Spot | None
    """None where pg_wal lies inside the data directory."""
    tablespaces: tuple[tuple[int, Spot], ...]
    """By oid."""
    path: Path = Path()
    """The whole path of the data directory, without which it is found in copies of the present volumes alone."""

    @classmethod
    def of(cls, layout: Layout, volumes: Sequence[Volume]) -> Self:
        """Give the placement of a cluster, without the tablespaces that lie in none of the volumes.

        Such a one may be there for an hour, and must not stand in the way of the commits from before it.

        Raises:
            PreflightError: the data directory or the log lies in none of the volumes.
        """
        data = places.data_directory(layout)
        inside = layout.log.is_relative_to(data)
        spots = ((oid, _spot(path, volumes)) for oid, path in places.tablespaces(layout).items())
        return cls(
            data=_required(data, volumes, "the data directory"),
            wal=None if inside else _required(layout.log, volumes, "pg_wal"),
            tablespaces=tuple((oid, spot) for oid, spot in spots if spot is not None),
            path=data,
        )

    def data_in(self, copy: Clone) -> Path | None:
        """Give where the data directory lies in a copy; None where there is none in it. Blocks.

        Its volume may have had another name when it was cut, and begun at another folder. What is the path inside it
        is an end of the whole path all the same.
        """
        copies = dict(copy.paths)
        usual = copies[self.data.volume] / self.data.path if self.data.volume in copies else None
        if usual is not None and _is_cluster(usual):
            return usual
        ends = [Path(*self.path.parts[start:]) for start in range(1, len(self.path.parts) + 1)]
        parts = [folder_of(Part(volume, end), copy) for volume in copies for end in ends]
        return next((part for part in parts if part is not None and _is_cluster(part)), None)

    def cluster_in(self, clone: Clone) -> Path:
        """Give where the data directory lies in a clone; raises `RestoreError` where there is none in it."""
        if (data := self.data_in(clone)) is not None:
            return data
        names = ", ".join(name for name, _ in clone.paths) or "none"
        raise RestoreError(
            f"there is no PostgreSQL cluster in clone {clone.name}, whose volumes are: {names}",
            hint="the data directory moved since the snapshot, or a nested subvolume was not cut with it",
        )


def _is_cluster(folder: Path) -> bool:
    """Whether a data directory lies there, or what is left of one in which a server works."""
    return any(os.path.isfile(folder / name) for name in ("PG_VERSION", "postmaster.pid"))  # noqa: PTH113 - as for entering


def _required(path: Path, volumes: Sequence[Volume], what: str) -> Spot:
    if (found := _spot(path, volumes)) is not None:
        return found
    raise PreflightError(
        f"{what} at {path} lies in none of the volumes {', '.join(volume.path for volume in volumes)}",
        hint="add its filesystem or subvolume to the volumes, so that it is in every snapshot",
    )


def _spot(path: Path, volumes: Sequence[Volume]) -> Spot | None:
    volume = volume_of(path, volumes)
    if volume is None:
        return None
    inside = str(path.relative_to(Path(volume.path).resolve()))
    return Spot(volume.name, "" if inside == "." else inside)


def volume_of(path: Path, volumes: Sequence[Volume]) -> Volume | None:
    """Give the innermost volume that holds `path` (real paths), None where none does."""
    holding = [volume for volume in volumes if path.is_relative_to(Path(volume.path).resolve())]
    return max(holding, key=lambda volume: len(Path(volume.path).resolve().parts), default=None)
