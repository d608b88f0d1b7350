"""Look at the commits of a cluster without protecting any: what `trigpoint rules test` tries rules on.

The last ones are known to the running service alone: a server shows a new slot only what is committed from then on.
The next ones are watched; the slots and publications for that are our own (`<prefix>_try`), apart from those of a
service that may be running, and go at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trigger.config.drivers import driver
from trigger.config.options import Options
from trigger.errors import SourceError
from trigger.model import Commit
from trigger.protect.commit_lines import read
from trigger.service.control import ask

ASK_SECONDS = 10.0
BOUND = 1_000_000
"""How many commits are looked at; memory is bounded, and rules are judged by fewer."""

_REMOVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a running service remembers of the commits that it saw last."""

    commits: Sequence[Commit]
    """In the order in which they came; those that no rule took are here too."""
    forgotten: int
    """How many it saw before these."""
    started_at: datetime
    """When the service was started."""


async def remembered(options: Options) -> Remembered:
    """Give what the running service remembers.

    Raises:
        NotRunningError: none runs.
    """
    commits: list[Commit] = []
    last = 0
    while True:
        answer = await ask(options.state_folder, {"do": "recent", "after": last}, ASK_SECONDS)
        commits += read(answer["commits"], "the service", options.database.databases[0], options.database.driver)
        if not answer["commits"]:
            return Remembered(commits, answer["forgotten"], datetime.fromisoformat(answer["started_at"]))
        last = answer["last"]


async def watch(options: Options, seconds: float, seen: Callable[[Commit], None]) -> int:
    """Give every commit of the next `seconds` to `seen`; gives how many there were, `BOUND` at most.

    A cancellation, as by Ctrl-C, removes slots and publications too.

    Raises:
        SourceError: the server refused, or the connection broke.
    """
    chosen = options.database
    database = driver("database", chosen.driver)(chosen, "_try")
    sources = database.sources()
    count = 0

    def take(commit: Commit) -> None:
        nonlocal count
        count += 1
        if count <= BOUND:
            seen(commit)

    try:
        for source in sources:
            await source.open(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
                for source in sources:
                    tasks.create_task(_follow(source, take))
    except* SourceError as group:
        raise group.exceptions[0] from None
    finally:
        await asyncio.shield(_remove(sources))
        await database.close()
    return min(count, BOUND)


async def _follow(source: Any, take: Callable[[Commit], None]) -> None:
    """Read for ever; what was read is acknowledged, so that the server keeps no log for us."""
    while True:
        batch = await source.read()
        for commit in batch.commits:
            take(commit)
        await source.acknowledge(batch.through)


async def _remove(sources: list[Any]) -> None:
    """Drop slots and publications; a slot that stayed would keep log for ever."""
    async with asyncio.timeout(_REMOVE_SECONDS):
        for source in sources:
            await source.remove()
