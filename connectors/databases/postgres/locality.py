"""Whether the server that answers is the one whose files lie here.

An address may lead to another server from one connection to the next: it moves, names several hosts, or a proxy stands
behind it. After a failover that server has our cluster's identifier, and its data at the same path of its own host;
snapshots of what lies here would then be called by its commits, and hold none of them.

A server's control file tells. What it says of it is read there at that moment (`get_controlfile`, controldata_utils.c),
and is what stands in the file here, or the two are not one. It bears the time of its last write, which each checkpoint
and each change of state is, so that what came of one cluster has it in common no more; a standby that has just written
the very checkpoint of its primary is in another state, and one that was promoted and has not written a checkpoint of
its own since bears up to where it recovered. The lock file's start of the server is not compared: it is another moment
than the one that the server names, before it by all that a start takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from connectors.databases.postgres.control import Control
from connectors.threads import Threads
from trigger.errors import DatabaseError, SourceError
from trigger.model import Finding, Severity

log = logging.getLogger(__name__)

_WITHIN_SECONDS = 2.0
_AGAIN_SECONDS = 0.05
"""How long it is looked again, and how long after: the server may write the file between two looks, and a busy machine
may let much time pass there, checkpoint after checkpoint."""
_HINT = (
    "does the address lead to another host, after a failover say, or to another server? protect a server on its own"
    " host; what is committed meanwhile waits for a point"
)


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
        place, before = data or self.data, None
        until = asyncio.get_running_loop().time() + _WITHIN_SECONDS
        while True:
            said = Control.told(await ask())
            found = await self._look(place) if place else None
            if found is None or said in (found, before):
                return said
            if found.system != said.system:
                raise DatabaseError(_another(place, found.system, said.system), hint=_HINT)
            if asyncio.get_running_loop().time() > until:
                break
            before = found
            await asyncio.sleep(_AGAIN_SECONDS)
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
