"""When a stream is read at once, and when it is left to gather for a moment.

To wake up costs about ten times what a small transaction costs to decode (100 µs to 10 µs), and the processor that it
takes is taken from the writers. So where commits follow each other closely, more of them are read at a time; one that
comes after a pause is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

CLOSE_SECONDS = 0.0015
"""Below this mean time between two reads that gave something, pauses not counted, a stream is busy."""
GATHER_SECONDS = 0.003
"""How long a busy stream gathers; by so much a commit may be known later."""
_MEMORY = 16
"""Over about how many reads the mean is taken."""


@dataclass(slots=True)
class Pace:
    """The pace of one stream, by the event loop's clock."""

    _gave_at: float = 0.0
    _mean_seconds: float = 1.0
    _emptied: bool = True

    def gave(self, now: float, *, emptied: bool) -> None:
        """Note that a read gave something at `now`; `emptied` where nothing more had arrived by then."""
        waited = now - self.look_at
        self._mean_seconds += (min(waited, 1.0) - self._mean_seconds) / _MEMORY
        self._gave_at, self._emptied = now, emptied

    @property
    def look_at(self) -> float:
        """When the next read looks; a moment, so that reads that are cancelled again and again come to it too."""
        busy = self._emptied and self._mean_seconds < CLOSE_SECONDS
        return self._gave_at + (GATHER_SECONDS if busy else 0.0)
