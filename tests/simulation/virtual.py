"""An event loop whose clock jumps: where nothing is ready, time moves on to the next timer at once.

It has no selector, no threads and no signals, so the order in which callbacks run follows from the program alone.
Whoever waits for the outside world, or for something that can never happen, is told so at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class DeadlockError(Exception):
    """Nothing is ready and no timer runs: whoever waits now waits for ever."""


class RealWaitError(Exception):
    """Something asked for a thread, a socket or a signal; in virtual time there are none."""


class _Selector:
    """What the base loop takes for its selector: instead of waiting, it moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[object]:
        if timeout is None:
            raise DeadlockError(f"nothing can happen any more at {self._loop.time():.6f} s")
        if timeout > 0:
            self._loop.advance()
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop with virtual time.

    Args:
        now: what its clock shows at the beginning, in seconds.
    """

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, now: float = 0.0) -> None:
        super().__init__()
        self._now = now
        self._clock_resolution = 1e-6  # far above the rounding of a time of years
        self._selector = _Selector(self)
        self.set_debug(False)

    def time(self) -> float:
        """Give the virtual time in seconds."""
        return self._now

    def advance(self) -> None:
        """Move the clock to the next timer."""
        self._now = max(self._now, self._scheduled[0].when())

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end and close the loop; tasks that it left behind are an error of the test."""
        try:
            result = self.run_until_complete(main)
            left = asyncio.all_tasks(self)
            if left:
                raise AssertionError(f"left behind: {sorted(task.get_name() for task in left)}")
            return result
        finally:
            self.close()

    def _process_events(self, _events: list[object]) -> None:
        """Nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who could be woken."""

    def run_in_executor(self, *_: object) -> NoReturn:
        """Refuse threads."""
        raise RealWaitError("a thread was asked for in virtual time")

    def call_soon_threadsafe(self, callback: Callable[..., object], *_: object, **__: object) -> NoReturn:
        """Refuse what comes from threads."""
        raise RealWaitError(f"{callback} was called from a thread")


async def inline(work: Callable[[], T]) -> T:
    """Give what `work` gives, which is done in a thread where time is real."""
    return work()
