"""Where a replay stops: right behind the last commit of the state, where what comes next would take files away.

DROP DATABASE and DROP TABLESPACE remove their folders by a record of their own, before that of their commit. A replay
to a place or a time between the two holds a database without its files. No commit lies between, so the state is the one
behind the last commit, and a replay that stops there has the files.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

from connectors.databases.postgres.clone import replayed
from connectors.databases.postgres.clone.isolation import Stop
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.waldump import Stretch, WalDump, parse_ended
from connectors.databases.postgres.lsn import Lsn
from trigger.replay import Replay, Target

_LAST_COMMIT = re.compile(r"last completed transaction was at log time ([0-9: .-]+)\+00")


async def before_removals(
    dump: WalDump, read: Sequence[Stretch], replay: Replay, removals: Sequence[Lsn]
) -> Stop | None:
    """Give where to stop so that no folder goes whose DROP is not part of the state; None where none would.

    Args:
        dump, read, replay: as `tablespaces.refuse_new_ones` has them.
        removals: where the records begin by which folders go.
    """
    target, held = replay.target, Lsn(replay.held_until)
    ahead = [one for one in removals if one >= held]
    if not ahead or replay.as_cut or target.is_latest or (target.at is not None and target.inclusive):
        return None
    last, beyond = Lsn(0), None
    async with aclosing(replayed.ends(dump, read)) as ends:
        async for one in ends:
            if replayed.is_beyond(one, target):
                beyond = one.start
                break
            if one.stays:
                last = max(last, one.start)
    limit = beyond if target.at is None else Lsn(target.at)
    if not [one for one in ahead if one > last and (limit is None or one < limit)]:
        return None
    return Stop(last, True) if last >= held else Stop(held, False)


async def time_of(dump: WalDump, staged: Path, target: Target, stop: Stop | None) -> datetime | None:
    """Give the time of the last commit of a replay that was told to stop right behind it, of which a server tells none.

    None where it was told otherwise, or the staged log has no such record.
    """
    inclusive = target.inclusive and not target.point if stop is None else stop.inclusive
    at = target.at if stop is None else stop.at
    if at is None or not inclusive:
        return None
    stretch = await asyncio.to_thread(_from, staged, target.history.branch, Lsn(at))
    if stretch is None:
        return None
    async with aclosing(dump.transactions(stretch, one=True)) as lines:
        async for line in lines:
            ended = parse_ended(line)
            return ended.time if ended is not None and ended.start == at else None
    return None


def told_by(words: str) -> str:
    """Give the time of the last commit of a replay as the server's own words have it, in ISO-8601; "" without any."""
    found = _LAST_COMMIT.findall(words)
    return f"{found[-1]}+00:00" if found else ""


def _from(staged: Path, timeline: int, at: Lsn) -> Stretch | None:
    """Give the staged log from a place on, as far as it goes; None where it is not there."""
    segment_bytes = replayed.segment_size(staged)
    end = SegmentFolder(staged, segment_bytes).end_of_run(timeline, at) if segment_bytes else None
    return Stretch(staged, timeline, segment_bytes, at, end) if segment_bytes and end is not None else None
