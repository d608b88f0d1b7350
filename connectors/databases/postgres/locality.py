"""Whether the server that answers is the one whose files lie here.

An address may lead to another server from one connection to the next: it moves, names several hosts, or a proxy stands
behind it. After a failover that server has our cluster's identifier, and its data at the same path of its own host;
snapshots of what lies here would then be called by its commits, and hold none of them.

A server's control file tells. What it says of it is read there at that moment (`get_controlfile`, controldata_utils.c),
and is what stands in the file here, or the two are not one. It bears the time of its last write, which each checkpoint
and each change of state is, so that what came of one cluster has it in common no more; a standby that has just written
the very checkpoint of its primary is in another state. The lock file's start of the server is not compared: it is
another moment than the one that the server names, before it by all that a start takes.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

from connectors.databases.postgres.log.files import reading
from connectors.databases.postgres.lsn import Lsn
from connectors.threads import Threads
from trigger.errors import DatabaseError, SourceError
from trigger.model import Finding, Severity

log = logging.getLogger(__name__)

CONTROL: LiteralString = (
    "SELECT system_identifier::text, extract(epoch FROM pg_control_last_modified)::bigint, checkpoint_lsn::text,"
    " redo_lsn::text, timeline_id, NOT pg_is_in_recovery() FROM pg_control_system(), pg_control_checkpoint()"
)
"""What `Control.told` is told; anybody may ask it."""
_CONTROL_FILE = Path("global") / "pg_control"
_BEGINNING = struct.Struct("QIIiqQQI")
"""Of `ControlFileData` (pg_control.h), the same in versions 15 to 18: identifier, two versions, state, time of the last
write, checkpoint, and of that one's copy redo and timeline."""
_IN_PRODUCTION = 6
_IDENTIFIERS = 1 << 64
_TRIES = 5
_AGAIN_SECONDS = 0.05
"""How often it is looked again, and how long after: the server may write the file between the two looks."""
_HINT = (
    "does the address lead to another host, after a failover say, or to another server? protect a server on its own"
    " host; what is committed meanwhile waits for a point"
)


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

    @classmethod
    def told(cls, answer: tuple[Any, ...]) -> Control:
        """Give what a server answers to `CONTROL`, which has no unsigned numbers."""
        system, written_at, checkpoint, redo, timeline, is_in_production = answer
        identifier = str(int(system) % _IDENTIFIERS)
        return cls(identifier, written_at, Lsn.parse(checkpoint), Lsn.parse(redo), timeline, is_in_production)

    @classmethod
    def read(cls, data: Path) -> Control:
        """Give what stands in the control file of a data directory.

        Raises:
            OSError: it is not there, is none, or may not be read.
        """
        with reading(data / _CONTROL_FILE) as file:
            beginning = file.read(_BEGINNING.size)
        if len(beginning) < _BEGINNING.size:
            raise OSError(f"{data / _CONTROL_FILE} is cut short")
        system, _, _, state, written_at, checkpoint, redo, timeline = _BEGINNING.unpack(beginning)
        return cls(str(system), written_at, Lsn(checkpoint), Lsn(redo), timeline, state == _IN_PRODUCTION)

    def __str__(self) -> str:
        state = "in production" if self.is_in_production else "not in production"
        written = datetime.fromtimestamp(self.written_at, UTC).strftime("%F %T UTC")
        return f"checkpoint {self.checkpoint} of timeline {self.timeline}, was written at {written}, and is {state}"


class Locality:
    """Holds servers against the files that lie here.

    Args:
        threads: in which files are read.
        deadline_seconds: bound of one look.

    Attributes:
        data: the data directory that is protected; None until that is known.
    """

    def __init__(self, threads: Threads, deadline_seconds: float) -> None:
        self.data: Path | None = None
        self._threads = threads
        self._deadline_seconds = deadline_seconds
        self._untold = ""

    async def require(self, ask: Callable[[], Awaitable[tuple[Any, ...]]], data: Path | None = None) -> Control:
        """Give what a server says of its control file, which is the one in the data directory.

        Args:
            ask: asks it for `CONTROL`, on the connection that is meant.
            data: where it has to lie; in `data` of the instance by default, anywhere where that is not known.

        Raises:
            DatabaseError: the file there is another one's, or there is none.
        """
        place = data or self.data
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(_AGAIN_SECONDS)
            said = Control.told(await ask())
            found = await self._look(place) if place else None
            if found is None or found == said:
                return said
        assert found is not None
        if found.system != said.system:
            raise DatabaseError(_another(place, found.system, said.system), hint=_HINT)
        raise DatabaseError(
            f"{place} is not where the server that answers keeps its data: the control file there has {found};"
            f" its own has {said}",
            hint=_HINT,
        )

    async def refuse_another(self, system: str) -> None:
        """Refuse the server of a cluster whose files surely do not lie here.

        Raises:
            SourceError: those of another cluster do.
        """
        try:
            found = await self._look(self.data) if self.data else None
        except DatabaseError:
            return  # each point says so
        if found is not None and found.system != system:
            raise SourceError(_another(self.data, found.system, system), hint=_HINT)

    def require_protected(self, data: Path) -> None:
        """Refuse a data directory beside the protected one; raises `DatabaseError`."""
        if self.data is not None and data != self.data:
            raise DatabaseError(
                f"the server that answers keeps its data in {data}, and {self.data} is protected",
                hint="was it moved? then start the service again; else let the address lead to the protected one",
            )

    def findings(self) -> list[Finding]:
        """Give what a pre-flight check has to say of what cannot be told."""
        remedy = "run the service as root, or as the user that the data belong to"
        return [Finding("locality", Severity.WARNING, self._untold, remedy)] if self._untold else []

    async def _look(self, data: Path) -> Control | None:
        """Give what stands in the control file of a data directory; None where we may not look."""
        try:
            async with asyncio.timeout(self._deadline_seconds):
                found = await self._threads.run(partial(Control.read, data))
        except PermissionError as error:
            untold = f"it cannot be told whether the server that answers keeps its data in {data}: {error}"
            if untold != self._untold:
                log.warning("%s", untold)
            self._untold = untold
            return None
        except TimeoutError:
            raise DatabaseError(f"{data} was not read within {self._deadline_seconds:g} s") from None
        except OSError as error:
            raise DatabaseError(
                f"the data of no server lie in {data}: {error}", hint="is the volume mounted there?"
            ) from error
        self._untold = ""
        return found


def _another(place: Path | None, found: str, said: str) -> str:
    return f"in {place} lie the files of cluster {found}, and cluster {said} answers"
