"""What stands beside the snapshots of a point, and its form as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from trigger.model import Snapshot


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What stands beside the snapshots of a point."""

    tag: str
    snapshots: tuple[Snapshot, ...]
    beside: tuple[str, ...] = ()
    """The volumes of the point that another storage keeps."""


def sidecar_out(sidecar: Sidecar) -> dict[str, Any]:
    """Give what a sidecar says as JSON has it."""
    beside = {"beside": list(sidecar.beside)} if sidecar.beside else {}
    return {"tag": sidecar.tag, "snapshots": [_snapshot_out(kept) for kept in sidecar.snapshots], **beside}


def _snapshot_out(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "volume": snapshot.volume,
        "driver": snapshot.driver,
        "began_at": snapshot.began_at.isoformat(),
        "ended_at": snapshot.ended_at.isoformat(),
        "bytes_copied": snapshot.bytes_copied,
    }


def snapshot_in(folder: Path, value: dict[str, Any]) -> Snapshot:
    """Read one snapshot; its place follows from its name, so that a storage may be mounted somewhere else."""
    return Snapshot(
        value["volume"],
        value["driver"],
        str(folder / value["volume"]),
        datetime.fromisoformat(value["began_at"]),
        datetime.fromisoformat(value["ended_at"]),
        value["bytes_copied"],
    )
