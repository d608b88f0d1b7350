"""The port of the time of day."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """The time of day, for labels; durations are measured with the event loop's monotonic clock."""

    def now(self) -> datetime:
        """Give the present time, aware UTC."""
        ...
