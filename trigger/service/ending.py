"""The signals that end a program: heard from its first act to its last, so that each ending is an orderly one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Ending:
    """What a signal that ends a program does."""

    act: Callable[[], object]


@contextlib.contextmanager
def ended_by_signals(came: list[signal.Signals]) -> Iterator[Ending]:
    """Let SIGINT, SIGTERM and SIGHUP cancel the task at hand until the block ends, or do what it made of the `Ending`.

    They are added to `came`. One that is ignored, as SIGHUP is by nohup, stays so. After the first, the others are
    ignored behind the block too: they would only keep the program from saying its exit code.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    ending = Ending(task.cancel)

    def end(number: signal.Signals) -> None:
        came.append(number)
        ending.act()

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        loop.add_signal_handler(number, end, number)
    try:
        yield ending
    finally:
        for number in heard:
            loop.remove_signal_handler(number)
            if came:
                signal.signal(number, signal.SIG_IGN)
