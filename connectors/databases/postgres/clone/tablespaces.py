"""Refuse a replay that would make a tablespace: the server would empty that folder of production first (R11).

Looked for in the log of the snapshot itself, and in what is staged from the journal, by PostgreSQL's `pg_waldump`.
"""

from __future__ import annotations

from collections.abc import Sequence

from connectors.databases.postgres.clone import replayed
from connectors.databases.postgres.log.waldump import CreatedTablespace, Preview, Stretch, WalDump
from trigger.errors import RestoreError
from trigger.replay import Replay


async def refuse_new_ones(dump: WalDump, read: Sequence[Stretch], replay: Replay) -> Preview:
    """Raise `RestoreError` where a replay, which reads these stretches of log, would make a tablespace.

    Gives what the same log says of other things, in order, so that it is read but once; where a tablespace is made in
    it, it is read again for where a replay to a time stops.
    """
    seen, target = Preview([], [], {}, []), replay.target
    for stretch in read:
        here = await dump.preview(stretch)
        seen.tablespaces.extend(here.tablespaces)
        seen.parameters.extend(here.parameters)
        seen.shrunk.update(here.shrunk)
        seen.removals.extend(here.removals)
    if seen.tablespaces:
        limit = target.at if target.at is not None else await replayed.stop_of_time(dump, read, target)
        for made in seen.tablespaces:
            if limit is None or made.start <= limit:
                raise _refused(made, replay)
    seen.parameters.sort(key=lambda one: one.start)
    return seen


def _refused(made: CreatedTablespace, replay: Replay) -> RestoreError:
    return RestoreError(
        f"the log up to {replay.target.description} makes tablespace {made.oid} at {made.location}, and a replay would"
        " empty that folder of production",
        hint="run CHECKPOINT, take a point, and restore from that one or a later one",
    )
