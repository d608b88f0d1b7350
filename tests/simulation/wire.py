"""The wire between the service and its ports: writes the event log, brings the weather, ends lives, checks order.

Everything that the service does to the world passes here. Once its life has ended nothing passes any more, so what a
dying service still does in its `finally` blocks has no effect, as after SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from tests.simulation.story import Weather
from trigger.errors import AgentError, CatalogError, DatabaseError, SourceError, StorageError, TrigpointError
from trigger.position import Position

T = TypeVar("T")

HANG_SECONDS = (20.0, 90.0)
SHORTEST_SECONDS = 0.0005
"""Every call takes a little, so that two of them never happen at one instant."""

ERRORS: dict[str, type[TrigpointError]] = {
    "source": SourceError,
    "database": DatabaseError,
    "agent": AgentError,
    "storage": StorageError,
    "catalog": CatalogError,
}


class Ended(BaseException):
    """The life of this service is over; nothing it does reaches the world any more."""


class Violation(AssertionError):  # noqa: N818 - a verdict, not an accident
    """The history breaks a promise."""


def require(holds: bool, message: str) -> None:
    """Raise `Violation` with `message` unless it holds."""
    if not holds:
        raise Violation(message)


class Wire:
    """Carries the calls of one life of the service.

    Args:
        log: where every call is written down.
        weather: what may befall a call.
        draw: the only source of chance.
        crash_at_call: (which, how often first): the life ends at this call, at a random stage of it; None: it does not.
    """

    def __init__(
        self, log: Callable[[str], None], weather: Weather, draw: random.Random, crash_at_call: tuple[str, int] | None
    ) -> None:
        self.log = log
        self.weather = weather
        self.alive = True
        self.end: Callable[[str], None] = lambda reason: None
        self.catalog_full = False
        self.before: dict[str, Callable[..., None]] = {}
        """Checks to be made before a call has any effect, by `port.name`."""
        self._draw = draw
        self._crash_at, self._calls_left = crash_at_call or ("", 0)

    def to(self, port: str, target: object) -> Any:
        """Give what stands for `target`, a driver of `port`, on the service's side."""
        return _Port(self, port, target)

    async def call(self, port: str, name: str, act: Callable[[], Awaitable[T]], *arguments: object) -> T:
        """Give what `act` gives, if the weather lets it."""
        self._require_life()
        label = f"{port}.{name}"
        if label in self.before:
            self.before[label](*arguments)
        stage = self._stage_of_death(label)
        if stage == "before":
            self.end(f"before {label}")
        await self._delay(port, name)
        self._require_life()
        if stage == "during":
            self._end_soon(f"during {label}", steps=self._draw.randint(0, 4))
        fate = self._fate()
        if fate in ("fail", "hang"):
            if fate == "hang":
                await asyncio.sleep(self._draw.uniform(*HANG_SECONDS))
                self._require_life()
            self.log(f"{label}{_short(arguments)} fails")
            raise ERRORS[port](f"{label}: simulated failure", retryable=True)
        try:
            result = await act()
        except (TrigpointError, OSError) as error:
            self.log(f"{label}{_short(arguments)} raises {error}")
            raise
        if not (name == "read" and port == "source"):
            self.log(f"{label}{_short(arguments)} gives {_brief(result)}")
        if stage == "after":
            self.end(f"after {label}")
        self._require_life()
        if fate == "lose":
            self.log(f"{label}: the answer is lost")
            raise ERRORS[port](f"{label}: simulated loss of the answer", retryable=True)
        return result

    async def run(self, work: Callable[[], T]) -> T:
        """What the catalog runs its work through: one call is one transaction."""
        name, writes = _name_of(work)

        async def act() -> T:
            if writes and self.catalog_full:
                raise CatalogError("catalog: simulated lack of room", retryable=True)
            return work()

        return await self.call("catalog", name, act)

    def spare(self) -> None:
        """Let this life end by no call any more."""
        self._calls_left = 0

    def reach(self, failpoint: str) -> None:
        """Let nothing of a dead life go on at a failpoint."""
        self._require_life()

    def _require_life(self) -> None:
        if not self.alive:
            raise Ended

    def _stage_of_death(self, label: str) -> str | None:
        if self._calls_left <= 0 or self._crash_at not in ("", label):
            return None
        self._calls_left -= 1
        return self._draw.choice(("before", "during", "after")) if self._calls_left == 0 else None

    def _end_soon(self, reason: str, steps: int) -> None:
        if steps == 0:
            self.end(reason)
        else:
            asyncio.get_running_loop().call_soon(self._end_soon, reason, steps - 1)

    async def _delay(self, port: str, name: str) -> None:
        if port == "catalog" and not self.weather.late:
            return
        seconds = SHORTEST_SECONDS
        if self.weather.late and self._draw.random() < self.weather.late:
            seconds = self._draw.uniform(0, self.weather.late_seconds)
        if (port, name) != ("source", "read"):
            await asyncio.sleep(seconds)

    def _fate(self) -> str:
        weather = self.weather
        if not (weather.fails_before or weather.fails_after or weather.hangs):
            return "go"
        chance = self._draw.random()
        for fate, share in (("fail", weather.fails_before), ("lose", weather.fails_after), ("hang", weather.hangs)):
            if chance < share:
                return fate
            chance -= share
        return "go"


class _Port:
    """A driver as the service sees it; attributes that are no calls pass as they are."""

    def __init__(self, wire: Wire, port: str, target: object) -> None:
        self._wire = wire
        self._port = port
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name == "recognise":  # which asks nobody
            return value
        if name == "bracket":
            return partial(_bracket, self._wire, value)
        if name == "close":
            return partial(_close, self._wire, value)
        if name == "acknowledge":
            return partial(self._acknowledge, value)
        return partial(self._call, name, value)

    async def _acknowledge(self, value: Callable[..., Awaitable[None]], through: Position) -> None:
        await self._wire.call("source", "acknowledge", partial(value, through), self._target.name, through)  # type: ignore[attr-defined]

    async def _call(self, name: str, value: Callable[..., Awaitable[T]], *arguments: object) -> T:
        return await self._wire.call(self._port, name, partial(value, *arguments), *arguments)


async def _close(wire: Wire, close: Callable[[], Awaitable[None]]) -> None:
    if wire.alive:
        await close()


@contextlib.asynccontextmanager
async def _bracket(wire: Wire, bracket: Callable[[str], Any], name: str) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    held = bracket(name)
    entered: list[Callable[[], Awaitable[Any]]] = []

    async def enter() -> None:
        entered.append(await held.__aenter__())

    try:
        await wire.call("database", "bracket", enter, name)
        yield lambda: wire.call("database", "end_bracket", entered[0])
    finally:
        if entered:
            await held.__aexit__(None, None, None)


def _name_of(work: Callable[[], Any]) -> tuple[str, bool]:
    """Give what a piece of the catalog's work is called, and whether it writes."""
    if not isinstance(work, partial) or not work.args:
        return getattr(work, "__name__", "work"), True
    inner = work.args[0]
    inner = inner.func if isinstance(inner, partial) else inner
    return getattr(inner, "__name__", "work"), bool(work.keywords.get("writes"))


def _short(arguments: tuple[object, ...]) -> str:
    return "(" + ", ".join(_brief(argument) for argument in arguments) + ")"


def _brief(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} items"
    if callable(value):
        return "a call"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
