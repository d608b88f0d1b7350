"""Do something with the parts of a configuration, connected, and tidy up however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from trigger.cli import show
from trigger.errors import ConfigError

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.ports import Database
    from trigger.replay import Target
    from trigger.restore.target import Named
    from trigger.service.connect import Parts
    from trigger.service.ending import Ending

T = TypeVar("T")


def at(chosen: Options, act: Callable[[Parts], Awaitable[T]], *, by_itself: bool = False) -> T:
    """Give what `act` gives with the parts of a configuration.

    Signals end it in order, as `until_ended` says. What must be done `by_itself` is refused while a service runs.
    """
    from trigger.service.connect import alone, opened

    async def connected() -> T:
        async with (alone if by_itself else opened)(chosen, past=True) as parts:
            return await act(parts)

    return in_order(connected())


def in_order(work: Coroutine[Any, Any, T]) -> T:
    """Give what `work` gives, as `asyncio.run` does; signals end it as `until_ended` says."""
    return until_ended(lambda _ending: work)


def until_ended(act: Callable[[Ending], Awaitable[T]]) -> T:
    """Give what `act` gives, in an event loop of its own, which signals end in order.

    Ctrl-C, SIGTERM and a lost terminal cancel it, or do what it put into its `Ending`, and its tidying up is waited
    for, however often they come. Where it was cancelled the exit code says by which, and what is said of what was
    begun is what those say who tidied it up, or could not: in the notes of the cancellation.
    """
    from trigger.service.ending import ended_by_signals

    signals: list[signal.Signals] = []

    async def heard() -> T:
        with ended_by_signals(signals) as ending:
            return await act(ending)

    try:
        return asyncio.run(heard())
    except (asyncio.CancelledError, OSError) as error:  # the latter of a terminal that is gone
        if not signals:
            raise
        own = [str(error)] if isinstance(error, OSError) else []
        told = "; ".join((f"ended by {signals[0].name}", *_noted(error), *own))
    with contextlib.suppress(OSError):  # the terminal may be gone
        show.error(told, "")
    raise SystemExit(128 + signals[0])


def _noted(error: BaseException) -> Iterator[str]:
    """Give the notes of an error and of those amid which it was raised, as one signal comes amid what another began."""
    if error.__context__ is not None:
        yield from _noted(error.__context__)
    yield from getattr(error, "__notes__", ())


async def require_known(database: str | None, parts: Parts) -> None:
    """Refuse the name of a database that neither the configuration nor the catalog knows; raises `ConfigError`.

    What is in the log of any other, and no stream shows, bears no name of a database there.
    """
    known = {*(source.name for source in parts.sources), *await parts.catalog.streams()}
    if database is not None and database not in known:
        raise ConfigError(
            f"no database {database!r} is configured, and the catalog knows of none",
            hint=f"there are: {', '.join(sorted(known))}; what others wrote to the log is named without --database",
        )


async def meant(named: Named, parts: Parts, database: Database | None, *, only_look: bool = False) -> Target:
    """Give the target that `named` means; see `resolve`. Raises `ConfigError` too, where it names no known database."""
    from trigger.restore.target import resolve

    await require_known(named.stream, parts)
    return await resolve(named, parts.catalog, parts.journal, database, only_look=only_look)
