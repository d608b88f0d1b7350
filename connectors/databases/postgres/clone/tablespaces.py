"""Refuse a replay that would make a tablespace: the server would empty that folder of production first (R11).

Looked for in the log of the snapshot itself, and in what is staged from the journal, by PostgreSQL's `pg_waldump`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from connectors.databases.postgres.clone import isolation
from connectors.databases.postgres.clone.isolation import Isolated
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import Preview, Stretch, WalDump
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import RestoreError
from trigger.replay import Replay

_WHOLE_RECORD_BYTES = 1 << 14
"""So far behind a place any record has ended that is looked for and begins before it: pg_waldump gives whole ones."""


async def refuse_new_ones(dump: WalDump, isolated: Isolated, staged: Path, redo: int, replay: Replay) -> Preview:
    """Raise `RestoreError` where a replay from `redo` on would make a tablespace.

    Gives what the same log says of other things, in order, so that it is read but once.
    """
    seen = Preview([], [], {}, [])
    segment_bytes = await asyncio.to_thread(segment_size, isolated.data / "pg_wal", staged)
    if segment_bytes is None:
        return seen
    for folder in (isolated.data / "pg_wal", staged):
        for stretch in await asyncio.to_thread(stretches, folder, segment_bytes, redo, replay):
            here = await dump.preview(stretch)
            seen.parameters.extend(here.parameters)
            seen.shrunk.update(here.shrunk)
            seen.removals.extend(here.removals)
            for made in here.tablespaces:
                if replay.target.at is not None and made.start > replay.target.at:
                    continue
                raise RestoreError(
                    f"the log up to {replay.target.description} makes tablespace {made.oid} at {made.location}, and"
                    " a replay would empty that folder of production",
                    hint="run CHECKPOINT, take a point, and restore from that one or a later one",
                )
    seen.parameters.sort(key=lambda one: one.start)
    return seen


def segment_size(*folders: Path) -> int | None:
    """Give the segment size by the size of a segment file; None where there is none."""
    sizes = (
        entry.stat().st_size for folder in folders for entry in folder.iterdir() if isolation.is_segment(entry.name)
    )
    return next(sizes, None)


def stretches(folder: Path, segment_bytes: int, redo: int, replay: Replay) -> list[Stretch]:
    """Give what of the log in a folder a replay from `redo` on can read: of each timeline what has no hole."""
    target = replay.target
    if replay.as_cut and folder.name != "pg_wal":
        return []
    held: dict[int, list[int]] = {}
    for name in SegmentFolder(folder, segment_bytes).names():
        if name.number >= redo // segment_bytes:
            held.setdefault(name.timeline, []).append(name.number)
    found: list[Stretch] = []
    for timeline, first, last in ((timeline, *run) for timeline, numbers in held.items() for run in _runs(numbers)):
        start, end = Lsn(max(redo, first * segment_bytes)), Lsn((last + 1) * segment_bytes)
        if not replay.as_cut and target.at is not None and timeline == target.history.branch:
            end = min(end, Lsn(target.at + _WHOLE_RECORD_BYTES))
        if start < end:
            found.append(Stretch(folder, timeline, segment_bytes, start, end))
    return found


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give the first and the last of all that follow on each other."""
    ordered = sorted(numbers)
    for _, run in groupby(enumerate(ordered), key=lambda one: one[1] - one[0]):
        run_numbers = [number for _, number in run]
        yield run_numbers[0], run_numbers[-1]
