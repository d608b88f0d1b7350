"""Do something with the parts of a configuration, connected, and tidy up however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from trigger.cli import show
from trigger.errors import ConfigError

if TYPE_CHECKING:  # what reaches the database takes a while to load, and help and completion do without
    from trigger.config.options import Options
    from trigger.ports import Database
    from trigger.replay import Target
    from trigger.restore.target import Named
    from trigger.service.connect import Parts

T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def at(chosen: Options, act: Callable[[Parts], Awaitable[T]], *, by_itself: bool = False) -> T:
    """Give what `act` gives with the parts of a configuration.

    Ctrl-C, SIGTERM and a lost terminal cancel it and wait for its tidying up, however often they come; the exit code
    says which it was. What must be done `by_itself` is refused while a service runs.
    """

    from trigger.service.service import alone, opened

    ended_by: list[signal.Signals] = []

    async def connected() -> T:
        with _ended_by_signals(ended_by):
            async with (alone if by_itself else opened)(chosen, past=True) as parts:
                return await act(parts)

    try:
        return asyncio.run(connected())
    except (asyncio.CancelledError, OSError):  # the latter of a terminal that is gone
        if not ended_by:
            raise
    if ended_by[0] is signal.SIGINT:
        raise KeyboardInterrupt
    with contextlib.suppress(OSError):  # the terminal may be gone
        show.error(f"ended by {ended_by[0].name}; what was begun is tidied up", "")
    raise SystemExit(128 + ended_by[0])


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


@contextlib.contextmanager
def _ended_by_signals(ended_by: list[signal.Signals]) -> Iterator[None]:
    """Let signals that end a program cancel the task at hand until the block ends; which ones, is added to a list."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(number: signal.Signals) -> None:
        ended_by.append(number)
        task.cancel()

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has SIGHUP
    for number in heard:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            if ended_by:  # what comes now would only keep the exit code from being said
                signal.signal(number, signal.SIG_IGN)
