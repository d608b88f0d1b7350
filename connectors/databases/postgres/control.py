"""What a server's control file says, as it lies there and as the server tells of it."""

from __future__ import annotations

import io
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

from connectors.databases.postgres.log.files import reading
from connectors.databases.postgres.lsn import Lsn

CONTROL: LiteralString = (
    "SELECT system_identifier::text, extract(epoch FROM pg_control_last_modified)::bigint, checkpoint_lsn::text,"
    " redo_lsn::text, timeline_id, NOT pg_is_in_recovery(), min_recovery_end_lsn::text"
    " FROM pg_control_system(), pg_control_checkpoint(), pg_control_recovery()"
)
"""What `Control.told` is told; anybody may ask it."""
_CONTROL_FILE = Path("global") / "pg_control"
_BEGINNING = struct.Struct("QIIiqQQI84xQ")
"""Of `ControlFileData` (pg_control.h), the same in versions 15 to 18: identifier, two versions, state, time of the last
write, checkpoint, of that one's copy redo and timeline, and behind the rest of it the least end of recovery."""
_IN_PRODUCTION = 6
_IDENTIFIERS = 1 << 64


class Control(NamedTuple):
    """What is compared of a control file."""

    system: str
    written_at: int
    """In seconds since 1970."""
    checkpoint: Lsn
    redo: Lsn
    timeline: int
    is_in_production: bool
    """Whether its server neither recovers nor was shut down."""
    recovers_to: Lsn
    """Up to where a recovery has to come; 0 in production. Of a server that was promoted it tells until its next
    checkpoint, when in the same second that of before began with the very checkpoint that this one recovered from."""

    @classmethod
    def told(cls, answer: tuple[Any, ...]) -> Control:
        """Give what a server answers to `CONTROL`, which has no unsigned numbers."""
        system, written_at, checkpoint, redo, timeline, is_in_production, recovers_to = answer
        identifier = str(int(system) % _IDENTIFIERS)
        at, begins, least = (Lsn.parse(place) for place in (checkpoint, redo, recovers_to))
        return cls(identifier, written_at, at, begins, timeline, is_in_production, least)

    @classmethod
    def read(cls, data: Path) -> Control:
        """Give what stands in the control file of a data directory.

        Raises:
            OSError: it is not there, is none, or may not be read.
        """
        with reading(data / _CONTROL_FILE) as file:
            return cls.of(data, file)

    @classmethod
    def of(cls, data: Path, file: io.FileIO) -> Control:
        """Give what stands in the open control file of a data directory; raises `OSError` as `read` does."""
        beginning = file.read(_BEGINNING.size)
        if len(beginning) < _BEGINNING.size:
            raise OSError(f"{data / _CONTROL_FILE} is cut short")
        system, _, _, state, written_at, checkpoint, redo, timeline, recovers_to = _BEGINNING.unpack(beginning)
        is_in_production = state == _IN_PRODUCTION
        return cls(str(system), written_at, Lsn(checkpoint), Lsn(redo), timeline, is_in_production, Lsn(recovers_to))

    def __str__(self) -> str:
        state = "in production" if self.is_in_production else "not in production"
        state += f", recovered to {self.recovers_to} at least" if self.recovers_to else ""
        written = datetime.fromtimestamp(self.written_at, UTC).strftime("%F %T UTC")
        return f"checkpoint {self.checkpoint} of timeline {self.timeline}, was written at {written}, and is {state}"
