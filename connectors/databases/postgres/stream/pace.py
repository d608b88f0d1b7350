"""When a stream is read at once, and when it is left to gather for a moment.

To wake up costs about ten times what a small transaction costs to decode (100 µs to 10 µs), and the processor that it
takes is taken from the writers. So where commits follow each other closely, more of them are read at a time; one that
comes after a pause is read at once. But never longer than a part of what the socket holds takes to arrive: a server
that finds it full stands still, and a backlog would come at the pace of our pauses.
"""

from __future__ import annotations

from dataclasses import dataclass

CLOSE_SECONDS = 0.0015
"""Below this mean time between two reads that gave something, pauses not counted, a stream is busy."""
GATHER_SECONDS = 0.003
"""How long a busy stream gathers; by so much a commit may be known later."""
SHORTEST_SECONDS = 0.001
"""The event loop's timers know no less; what a pause so short could gather is enough for one read as it is."""
SHARE_OF_SOCKET = 0.25
"""How much of what the socket holds may gather; the rest is for the times when it comes faster than it did."""
_MEMORY = 16
"""Over about how many reads the means are taken."""


@dataclass(slots=True)
class Pace:
    """The pace of one stream, by the event loop's clock.

    Args:
        holds_bytes: what the socket holds until the server finds it full, by the kernel's way of counting.
    """

    holds_bytes: float = 212_992.0
    _gave_at: float = 0.0
    _mean_seconds: float = 1.0
    _mean_spent_seconds: float = 1.0
    _mean_bytes: float = 0.0
    _emptied: bool = True

    def gave(self, now: float, *, taken_bytes: int, emptied: bool) -> None:
        """Note that a read gave something at `now`.

        Args:
            now: the loop's clock.
            taken_bytes: what was taken out of the socket since the read before, as the kernel counts it.
            emptied: whether nothing more had arrived by then.
        """
        waited = now - self.look_at
        self._mean_seconds += (min(waited, 1.0) - self._mean_seconds) / _MEMORY
        self._mean_spent_seconds += (min(now - self._gave_at, 1.0) - self._mean_spent_seconds) / _MEMORY
        self._mean_bytes += (taken_bytes - self._mean_bytes) / _MEMORY
        self._gave_at, self._emptied = now, emptied

    @property
    def look_at(self) -> float:
        """When the next read looks; a moment, so that reads that are cancelled again and again come to it too."""
        busy = self._emptied and self._mean_seconds < CLOSE_SECONDS
        return self._gave_at + (self._gather_seconds if busy else 0.0)

    @property
    def _gather_seconds(self) -> float:
        """How long it takes until so much has arrived that to wait for more would hold up the server."""
        share = SHARE_OF_SOCKET * self.holds_bytes
        if self._mean_bytes * GATHER_SECONDS <= share * self._mean_spent_seconds:
            return GATHER_SECONDS
        fills_seconds = share * self._mean_spent_seconds / self._mean_bytes
        return fills_seconds if fills_seconds >= SHORTEST_SECONDS else 0.0
