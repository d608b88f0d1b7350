"""Look into the log itself: what was committed around a time, whether any stream showed it or not."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, Json, options, time
from trigger.errors import CatalogError
from trigger.model import from_microseconds

if TYPE_CHECKING:  # what reads the log takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.model import Logged


def commits(
    when: Annotated[str, typer.Option("--around", help="A time, ISO-8601 or as PostgreSQL's log prints it.")],
    within: Annotated[
        float, typer.Option("--within", min=0.001, max=86400, help="So many seconds before and after it.")
    ] = 60,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List what was committed around a time, by the log that is kept: DDL and other databases too.

    What is listed is named to `restore` by its transaction id: --before-xid brings back the state right before it.
    """
    chosen = options(config)
    found = asyncio.run(_commits(chosen, when, within))
    if as_json:
        show.print_json(found)
        return
    show.table(
        ("time", "transaction", "place", "history", "savepoints", "what its record says"),
        [
            (
                show.moment(from_microseconds(one.time_us), digits=6),
                one.name,
                one.history.place(one.start),
                one.history,
                ", ".join(map(str, one.children)),
                one.did,
            )
            for one in found
        ],
        empty=f"nothing was committed within {within:g} s of {when} in the log that is kept",
    )


async def _commits(chosen: Options, when: str, within: float) -> list[Logged]:
    from trigger.restore.log_search import around
    from trigger.service.service import opened

    middle, aside = time(when), timedelta(seconds=within)
    async with opened(chosen, past=True) as parts:
        latest = await parts.catalog.latest()
        if latest is None or latest.ceiling is None:
            raise CatalogError(
                "there is no sealed recovery point yet", hint="`trigpoint run` takes the first at its start"
            )
        lineage = await parts.journal.lineage(latest.ceiling.history)
        return await around(middle - aside, middle + aside, lineage, parts.catalog, parts.journal)
