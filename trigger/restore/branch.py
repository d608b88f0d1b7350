"""Along which branch a replay goes: the log of one place may be held in the files of a later branch alone.

A branch that was left in the middle of a file is not finished, and its last file never whole: an archive gets none. The
next branch begins with a copy of what was written of that file, and goes on in it. So what a server committed right
before it crashed, or was taken over from, lies under the name of the branch after.
"""

from __future__ import annotations

from collections.abc import Sequence

from trigger.model import Extent
from trigger.position import History, Lineage, Position


def followed(last: Position, lineage: Lineage, extents: Sequence[Extent]) -> History:
    """Give the branch of a lineage whose files lead a replay to a place.

    That is the place's own as long as its own files are held, since what lies behind the place is there too, abandoned
    or not, and proves the stop; else the next one whose files are; the lineage's last one where none is held yet.

    Args:
        last: the last unit of log that the replay has to read; it lies in the lineage.
        lineage: of the history that is wanted.
        extents: what the journal holds.
    """
    histories = [history for history, _, _ in lineage.stretches()]
    own = histories.index(last.history)
    held = {extent.history for extent in extents if extent.start <= last.at < extent.end}
    return next((history for history in histories[own:] if history in held), lineage.history)
