"""The log that a replay reads: first what lies in the snapshot, then what was staged; and where it stops there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from itertools import groupby
from pathlib import Path

from connectors.databases.postgres.clone.isolation import is_segment
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import Ended, Stretch, WalDump, parse_ended
from connectors.databases.postgres.lsn import Lsn
from trigger.replay import Replay, Target

_WHOLE_RECORD_BYTES = 1 << 14
"""So far behind a place any record has ended that is looked for and begins before it: pg_waldump gives whole ones."""


def segment_size(*folders: Path) -> int | None:
    """Give the segment size by the size of a segment file; None where there is none."""
    sizes = (entry.stat().st_size for folder in folders for entry in folder.iterdir() if is_segment(entry.name))
    return next(sizes, None)


async def stretches(own: Path, staged: Path, redo: int, replay: Replay) -> list[Stretch]:
    """Give the log that a replay from `redo` on can read, in order: of each timeline what has no hole.

    Args:
        own: the snapshot's pg_wal.
        staged: what leads on from there.
        redo, replay: from where, and to which target.

    Raises:
        JournalError: the past of the target's timeline is not there.
    """
    return await asyncio.to_thread(_stretches, own, staged, redo, replay)


def _stretches(own: Path, staged: Path, redo: int, replay: Replay) -> list[Stretch]:
    segment_bytes = segment_size(own, staged)
    if segment_bytes is None:
        return []
    lineage = SegmentFolder(staged, segment_bytes).lineage(replay.target.history)
    ends = {history.branch: end for history, _, end in lineage.stretches()}
    if not replay.as_cut and replay.target.at is not None:
        ends[replay.target.history.branch] = replay.target.at + _WHOLE_RECORD_BYTES
    folders = (own,) if replay.as_cut else (own, staged)
    return [one for folder in folders for one in _in(folder, segment_bytes, redo, ends)]


def _in(folder: Path, segment_bytes: int, redo: int, ends: Mapping[int, int]) -> Iterator[Stretch]:
    """Give what a folder has of timelines that lead to a target, each up to its end, oldest first."""
    held: dict[int, list[int]] = {}
    for name in SegmentFolder(folder, segment_bytes).names():
        if name.number >= redo // segment_bytes:
            held.setdefault(name.timeline, []).append(name.number)
    for timeline in sorted(held.keys() & ends.keys()):
        for first, last in _runs(held[timeline]):
            start, end = max(redo, first * segment_bytes), min(ends[timeline], (last + 1) * segment_bytes)
            if start < end:
                yield Stretch(folder, timeline, segment_bytes, Lsn(start), Lsn(end))


def is_beyond(one: Ended, target: Target) -> bool:
    """Whether a replay stops before a record, as PostgreSQL judges it (`recoveryStopsBefore` in xlogrecovery.c)."""
    if target.at is not None:
        return one.start >= target.at
    assert target.time is not None
    return one.time is not None and (one.time > target.time if target.inclusive else one.time >= target.time)


async def ends(dump: WalDump, read: Iterable[Stretch]) -> AsyncGenerator[Ended, None]:
    """Give the ends of transactions in stretches of log, in order."""
    for stretch in read:
        async with aclosing(dump.transactions(stretch)) as lines:
            async for line in lines:
                if (ended := parse_ended(line)) is not None:
                    yield ended


async def stop_of_time(dump: WalDump, read: Iterable[Stretch], target: Target) -> Lsn | None:
    """Give where the record begins before which a replay to a time stops; None where there is none, or no time."""
    if target.at is not None or target.time is None:
        return None
    async with aclosing(ends(dump, read)) as ended:
        async for one in ended:
            if is_beyond(one, target):
                return one.start
    return None


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give the first and the last of all that follow on each other."""
    ordered = sorted(numbers)
    for _, run in groupby(enumerate(ordered), key=lambda one: one[1] - one[0]):
        run_numbers = [number for _, number in run]
        yield run_numbers[0], run_numbers[-1]
