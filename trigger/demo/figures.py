"""What a demo measured: how long each step of each point took, and how often; nothing here does I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil

from trigger.model import RecoveryPoint, State


@dataclass(frozen=True, slots=True)
class Steps:
    """How long the steps of one point took, in milliseconds; they follow one another and add up to `total`.

    The clocks of database and service are one machine's.
    """

    wait: float
    """From the commit (its time is taken just before it is durable) to the flush."""
    flush: float
    snapshot: float
    """From the flush until the volume is cut: the log is durable up to the commit, the bracket begins, the cut."""
    tag: float
    """From the cut to the seal: the bracket ends, ceiling, tag, catalog."""
    total: float
    """From the commit to its sealed point."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the tail of a measured step."""

    p50: float
    p99: float


def steps(point: RecoveryPoint) -> Steps | None:
    """Give the steps of a sealed point that was taken for a commit; None for any other."""
    if point.commit is None or point.sealed_at is None or not point.flushes or not point.snapshots:
        return None
    committed = point.commit.time_us
    flushed_from = min(flush.began_at for flush in point.flushes)
    flushed = max(flush.ended_at for flush in point.flushes)
    cut = max(snapshot.ended_at for snapshot in point.snapshots)
    return Steps(
        wait=(_microseconds(flushed_from) - committed) / 1000,
        flush=_milliseconds(flushed_from, flushed),
        snapshot=_milliseconds(flushed, cut),
        tag=_milliseconds(cut, point.sealed_at),
        total=(_microseconds(point.sealed_at) - committed) / 1000,
    )


def spreads(points: Sequence[RecoveryPoint]) -> dict[str, Spread]:
    """Give p50 and p99 of each step over the sealed points of commits; nothing where there are none."""
    measured = [found for point in points if point.state is State.SEALED and (found := steps(point))]
    if not measured:
        return {}
    return {name: spread([getattr(found, name) for found in measured]) for name in Steps.__dataclass_fields__}


def spread(values: Sequence[float]) -> Spread:
    """Give the nearest-rank percentiles of at least one value."""
    ordered = sorted(values)
    return Spread(*(ordered[max(ceil(share * len(ordered)) - 1, 0)] for share in (0.5, 0.99)))


def _microseconds(moment: datetime) -> float:
    return moment.timestamp() * 1e6


def _milliseconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds() * 1000
