"""How a point is called everywhere: by an id that sorts by time, and by that in the storage."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_POINT_ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def point_id(now: datetime, randomness: int) -> str:
    """Give a new point id: a ULID in lower case, `now` in its first 48 bits and 80 bits of `randomness` behind."""
    number = ((now - _EPOCH) // timedelta(milliseconds=1) << 80) | (randomness & ((1 << 80) - 1))
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def is_point_id(text: str) -> bool:
    """Whether `text` has the form of a point id."""
    return _POINT_ID.fullmatch(text) is not None


def tag_name(point: str) -> str:
    """Give the name under which a storage keeps the snapshot of a point: `trg-<id>`, legal everywhere."""
    return f"trg-{point}"
