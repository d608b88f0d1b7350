"""The log that a journal holds along a lineage, as stretches, and the first hole in one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from trigger.model import Extent
from trigger.position import History, Lineage, Position

FileStart = Callable[[Position], int]
"""Gives where the file of the log that holds a position begins; see `ports.Journal.file_start`."""


def unfiled(position: Position) -> int:
    """Give the place itself: the start of its file in a log that has no files."""
    return position.at


class Stretch(NamedTuple):
    """Bytes of log from `start` up to, not including, `end`."""

    start: int
    end: int


def stretches(extents: Sequence[Extent], lineage: Lineage, file_start: FileStart) -> list[Stretch]:
    """Give the stretches of log along `lineage` that the journal holds, joined, in order.

    A branch's first file begins at a file boundary, with a copy of what its parent wrote there; so the journal may
    hold the shared bytes in either.
    """
    owned = {h: Stretch(file_start(Position(h, begin)), end) for h, begin, end in lineage.stretches()}
    joined: list[Stretch] = []
    for start, end in sorted(_owned_parts(extents, owned)):
        if joined and start <= joined[-1].end:
            joined[-1] = Stretch(joined[-1].start, max(end, joined[-1].end))
        else:
            joined.append(Stretch(start, end))
    return joined


def last_held(held: Sequence[Stretch]) -> int:
    """Give where what is held ends; 0 where nothing is."""
    return held[-1].end if held else 0


def first_hole(held: Sequence[Stretch], wanted: Stretch) -> Stretch | None:
    """Give the first stretch of `wanted` that is not in `held` (ordered, joined)."""
    at, index = wanted.start, bisect_right(held, wanted.start, key=lambda stretch: stretch.end)
    if index < len(held) and held[index].start <= at:
        at, index = held[index].end, index + 1
    if at >= wanted.end:
        return None
    return Stretch(at, min(held[index].start, wanted.end) if index < len(held) else wanted.end)


def _owned_parts(extents: Sequence[Extent], owned: Mapping[History, Stretch]) -> Iterable[Stretch]:
    for extent in extents:
        whole = owned.get(extent.history)
        if whole is None:
            continue
        start, end = max(extent.start, whole.start), min(extent.end, whole.end)
        if start < end:
            yield Stretch(start, end)
