"""How far the streams are behind the server, and which of them stands still.

A stream that is connected may give nothing all the same: a server holds commits back for standbys that are down, or is
at one transaction for an hour. So what was delivered is held against where the server's own log is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trigger.position import Position, distance

STILL_SECONDS = 25.0
"""How long a stream may give nothing while it is behind; the driver asks the server for its word every ten seconds."""


@dataclass(slots=True)
class _Seen:
    """What was seen of one stream."""

    through: Position | None
    moved_at: float
    """When that was seen to change last."""
    mark: Position | None
    """Where the server was when the stream had come past all the marks before."""
    marked_at: float


@dataclass(slots=True)
class Behind:
    """How far each stream is behind, by looks at it and at the server from time to time."""

    bytes: dict[str, int | None] = field(default_factory=dict)
    """By stream; None where it is not known."""
    still: frozenset[str] = frozenset()
    """The streams that stand still."""
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def look(
        self, now: float, server: Position | None, streams: Mapping[str, Position | None], connected: Mapping[str, bool]
    ) -> Iterator[tuple[str, str]]:
        """Note how things are at `now`; gives for each stream why it counts as standing still, "" where it does not.

        Args:
            now: the event loop's clock.
            server: up to where its log is durable; None where it does not say.
            streams: up to where each was delivered; None for one that has said nothing yet.
            connected: whether each is connected.
        """
        found = {}
        for name, through in streams.items():
            seen = self._seen.setdefault(name, _Seen(through, now, server, now))
            if through != seen.through or server is None:
                seen.through, seen.moved_at = through, now
            moved = server is not None and seen.mark is not None and server.history != seen.mark.history
            if seen.mark is None or moved or _passed(through, seen.mark):
                seen.mark, seen.marked_at = server, now
            self.bytes[name] = distance(server, through) if _same_log(server, through) and server and through else None
            seconds = now - max(seen.moved_at, seen.marked_at)
            found[name] = self._words(name, seconds, connected[name]) if seconds >= STILL_SECONDS else ""
        self.still = frozenset(name for name, why in found.items() if why)
        return iter(found.items())

    def _words(self, name: str, seconds: float, connected: bool) -> str:
        behind = self.bytes[name]
        much = "" if behind is None else f"; it is {behind} bytes of log behind"
        if not connected:
            return f"it is not open, and has given nothing for {seconds:.0f} s while the database's log went on{much}"
        return (
            f"it is open, but has given nothing for {seconds:.0f} s while the database's log went on{much}: the server"
            " holds commits back, is at one very large transaction, or there is no room for more commits until a point"
            " is taken"
        )


def _same_log(one: Position | None, other: Position | None) -> bool:
    return one is not None and other is not None and one.history.is_of_system(other.history)


def _passed(through: Position | None, mark: Position) -> bool:
    """Whether a stream has come to a place of the server's, or that is of a cluster that is no more."""
    if through is None:
        return False
    if not _same_log(through, mark):
        return True
    if through.history != mark.history:
        return through.history.age > mark.history.age
    return through.covers(mark)
