"""Wraps any port with seeded faults: delays, errors before the effect, lost replies, calls that never come back.

A caller that keeps the contracts of `trigger.ports` must live with every one of them: each can happen to the real
thing. The same seed and the same order of calls give the same faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, TypeVar, cast

from trigger.errors import TrigpointError
from trigger.model import Bracket

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Faults:
    """How often, as a share of all calls, and how badly."""

    fail_before: float = 0.0
    """The port's error is raised, and nothing was done."""
    fail_after: float = 0.0
    """It was done, and the port's error is raised: the reply was lost."""
    hang: float = 0.0
    """The call does not come back until it is cancelled; by a coin it was done or not."""
    delay_seconds: float = 0.0
    """Each call waits up to this long before, and again after."""
    spare: frozenset[str] = frozenset({"close", "run"})
    """Methods that are left alone: what must never raise, and what never returns."""


def faulty(
    port: P,
    error: type[TrigpointError],
    random: Random,
    faults: Faults,
    told: Callable[[str], None] = lambda _: None,
) -> P:
    """Give `port` with faults.

    Args:
        port: any driver; what is no coroutine of it passes through unchanged.
        error: the error of its port.
        random: where chance comes from.
        faults: how often and how badly.
        told: told each fault, as text, when it strikes.
    """
    return cast("P", _Faulty(port, error, random, faults, told))


class _Faulty:
    def __init__(
        self,
        port: object,
        error: type[TrigpointError],
        random: Random,
        faults: Faults,
        told: Callable[[str], None],
    ) -> None:
        self._port = port
        self._error = error
        self._random = random
        self._faults = faults
        self._told = told

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._port, name)
        if name == "bracket":
            return partial(self._bracket, value)
        if name in self._faults.spare or not inspect.iscoroutinefunction(value):
            return value
        return partial(self._call, name, value)

    async def _call(self, name: str, method: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        fate = self._fate(name)
        await self._delay()
        if fate == "hang" and self._random.random() < 0.5:
            await asyncio.get_running_loop().create_future()
        if fate == "fail before":
            raise self._error(f"{name} failed on purpose, before its effect", retryable=True)
        result = await method(*args, **options)
        if fate == "hang":
            await asyncio.get_running_loop().create_future()
        await self._delay()
        if fate == "fail after":
            raise self._error(f"{name} failed on purpose, after its effect", retryable=True)
        return result

    @contextlib.asynccontextmanager
    async def _bracket(self, method: Any, name: str) -> AsyncIterator[Callable[[], Awaitable[Bracket]]]:
        """Strike when the bracket begins, or when it ends; leaving it is spared."""
        fate = self._fate("bracket")
        await self._delay()
        if fate == "fail before":
            raise self._error("the bracket did not begin, on purpose", retryable=True)
        async with method(name) as stop:
            yield partial(self._call, "end of the bracket", stop)

    def _fate(self, name: str) -> str:
        faults, drawn = self._faults, self._random.random()
        for fate, share in (
            ("fail before", faults.fail_before),
            ("fail after", faults.fail_after),
            ("hang", faults.hang),
        ):
            if drawn < share:
                self._told(f"{type(self._port).__name__}.{name}: {fate}")
                return fate
            drawn -= share
        return ""

    async def _delay(self) -> None:
        if self._faults.delay_seconds:
            await asyncio.sleep(self._random.uniform(0, self._faults.delay_seconds))
