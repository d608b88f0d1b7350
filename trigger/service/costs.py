"""What points cost in a day, where each is taken inside the database's backup bracket: known before the first is taken.

The bracket begins with a checkpoint and ends the segment of the log that is being written at its beginning and at its
end; both lie in the journal, whole, for as long as an older point stands. So there points are to be rare.
"""

from __future__ import annotations

import math

from trigger.config.options import PointOptions
from trigger.model import Finding, Severity
from trigger.shape import size

SEGMENTS_A_POINT = 2
DAY_SECONDS = 86_400
DAYS_TO_LAST = 7
SHARE_OF_ROOM = 0.25
"""A week's points may end this share of the free room's worth of log, by the interval that is proposed."""
INTERVALS_SECONDS = (60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 14_400, 21_600)
"""What may be proposed; the last one also where there is too little room for it."""


def proposed_interval_seconds(segment_bytes: int, free_bytes: int) -> int:
    """Give how far apart points inside the bracket should be, by the room for the journal."""
    least = DAYS_TO_LAST * DAY_SECONDS * SEGMENTS_A_POINT * segment_bytes / max(free_bytes * SHARE_OF_ROOM, 1)
    return next((each for each in INTERVALS_SECONDS if each >= least), INTERVALS_SECONDS[-1])


def points_a_day(options: PointOptions) -> int:
    """Give how many points a day may have at most."""
    apart = max(options.min_interval_seconds, 60 / options.per_minute)
    return math.ceil(DAY_SECONDS / apart)


def look(options: PointOptions, segment_bytes: int, free_bytes: int, *, bracketed: bool) -> Finding:
    """Say what a day of points costs at most; a warning where the journal's room does not last a week of it."""
    count = points_a_day(options)
    if not bracketed:
        message = f"up to {count} a day; each is cut at one instant, shares what did not change, and ends no log"
        return Finding("points", Severity.OK, message)
    day_bytes = count * SEGMENTS_A_POINT * segment_bytes
    message = (
        f"up to {count} a day, each inside the backup bracket, which makes a checkpoint and ends {SEGMENTS_A_POINT}"
        f" segments of log: {size(day_bytes)} a day in the journal's folder, where {size(free_bytes)} are free; what"
        " changed is copied besides"
    )
    if day_bytes * DAYS_TO_LAST <= free_bytes:
        return Finding("points", Severity.NOTE, message)
    wanted = proposed_interval_seconds(segment_bytes, free_bytes)
    remedy = (
        f"let points be rarer: points.min_interval_seconds = {wanted} (and max_delay_seconds not less); every commit"
        " between them stays restorable from the journal"
    )
    return Finding("points", Severity.WARNING, message, remedy)
