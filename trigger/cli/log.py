"""Look into the log itself: what was committed around a time, whether any stream showed it or not."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from trigger.cli import show
from trigger.cli.arguments import Config, InHistory, Json, options, time
from trigger.errors import CatalogError
from trigger.model import from_microseconds

if TYPE_CHECKING:  # what reads the log takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.model import Logged
    from trigger.restore.log_search import Around, Read

_CHILDREN = 50
"""So many savepoints of one commit are printed; with --json all that are kept."""


def commits(
    when: Annotated[str, typer.Option("--around", help="A time, ISO-8601 or as PostgreSQL's log prints it; or now.")],
    within: Annotated[
        float, typer.Option("--within", min=0.001, max=86400, help="So many seconds before and after it.")
    ] = 60,
    limit: Annotated[
        int, typer.Option("--limit", "-l", min=1, max=10_000, help="How many, those nearest to the time.")
    ] = 1000,
    history: InHistory = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List what was committed around a time, by the log that is kept: DDL and other databases too.

    What is listed is named to `restore` by its transaction id: --before-xid brings back the state right before it.
    Below it stands which log was read: what was committed where that does not reach to is not listed. It is that of
    the present history, or with --history of another, such as one that a restore in place has left.
    """
    middle, chosen = time(when), options(config)
    found = asyncio.run(_commits(chosen, middle, timedelta(seconds=within), limit, history))
    if as_json:
        show.print_json(found)
        return
    show.table(
        ("time", "database", "transaction", "place", "history", "savepoints", "what its record says"),
        [
            (
                show.moment(from_microseconds(one.time_us), digits=6),
                one.database,
                one.name,
                one.history.place(one.start),
                one.history,
                _children(one),
                one.did,
            )
            for one in found.commits
        ],
        empty=f"nothing was committed within {within:g} s of {show.moment(middle)} in the log that was read",
    )
    show.more(found.more, "commits")
    show.say()
    show.facts([*(("log read", line) for line in _read(found)), *(("not read", line) for line in _others(found))])


def _children(one: Logged) -> str:
    """Give the names of savepoints; no more than fit a table, and how many others there are."""
    more = one.more_children + max(len(one.children) - _CHILDREN, 0)
    return ", ".join(map(str, one.children[:_CHILDREN])) + (f" and {more} more" if more else "")


def _read(found: Around) -> list[str]:
    """Give which log was read, and where that cannot tell what was committed, for people."""
    if not found.read:
        return [f"none of that time is kept of {found.history}"]
    lines = [_stretch(one) for one in found.read]
    if not found.from_before:
        lines[0] = f"{lines[0]}; what was committed before it is not in the log that is kept of {found.history}"
    if not found.until_behind:
        lines[-1] = f"{lines[-1]}; the log that is kept ends there, and has nothing of what is committed later"
    return lines


def _others(found: Around) -> list[str]:
    """Give what else is held that may be of that time, with the option that lists it."""
    return [f"log of {one} is held too, and may be of that time: --history {one} lists it" for one in found.others]


def _stretch(one: Read) -> str:
    words = f"{one.begin.place} to {one.end.place} of {one.begin.history}"
    if one.first_us is None or one.last_us is None:
        return f"{words}, which has no commit"
    first, last = (show.moment(from_microseconds(each), digits=6) for each in (one.first_us, one.last_us))
    back = ", between which stamps go back" if one.last_us < one.first_us else ""
    return f"{words}, with commits from {first} to {last}{back}"


async def _commits(chosen: Options, middle: datetime, aside: timedelta, limit: int, history: str | None) -> Around:
    from trigger.restore.histories import meant
    from trigger.restore.log_search import around
    from trigger.service.connect import opened

    async with opened(chosen, past=True) as parts:
        if await parts.catalog.latest() is None:
            raise CatalogError(
                "there is no sealed recovery point yet", hint="`trigpoint run` takes the first at its start"
            )
        await parts.journal.catch_up()
        lineage = await parts.journal.lineage(await meant(history, parts.catalog, parts.journal))
        return await around(middle, aside, limit, lineage, parts.catalog, parts.journal)
