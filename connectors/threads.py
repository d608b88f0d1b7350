"""Blocking calls in threads of their own, so that one that never comes back holds up nothing but itself.

A call into a frozen or dead filesystem cannot be ended from outside (it ignores even SIGKILL), and the pool behind
`asyncio.to_thread` would then run out of threads and be waited for at exit. The threads here are counted, and a
process may exit while some are stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
_LOOK_SECONDS = 0.5
"""How often a thread that waits for a loop looks whether there is one still."""


class Threads:
    """Runs blocking calls, at most `limit` at a time, those that are stuck included."""

    def __init__(self, name: str, limit: int = 16) -> None:
        self._name = name
        self._limit = limit
        self._guard = threading.Lock()
        self._busy = 0
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    async def run(self, call: Callable[[], T], *, alone: str | Sequence[str] = ()) -> T:
        """Give what `call` returns, or raise what it raises.

        A cancellation abandons the call, which goes on in its thread. Calls with the same `alone`, or one of several,
        run one after the other, also behind an abandoned one; whoever names several names them in one order.

        Raises:
            BlockingIOError: `limit` calls have not come back yet.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._guard:
            if self._busy >= self._limit:
                raise BlockingIOError(errno.EAGAIN, f"{self._busy} calls of {self._name} have not come back")
            self._busy += 1
            names = [name for name in ([alone] if isinstance(alone, str) else alone) if name]
            locks = [self._locks.setdefault(name, threading.Lock()) for name in names]

        def work() -> None:
            settle = self._outcome(call, locks, future)
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(settle)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return await future

    def _outcome(
        self, call: Callable[[], T], locks: Sequence[threading.Lock], future: asyncio.Future[T]
    ) -> Callable[[], None]:
        """Do the call, and give what tells the waiting task how it went."""
        try:
            with contextlib.ExitStack() as held:
                for lock in locks:
                    held.enter_context(lock)
                result = call()
        except BaseException as error:  # noqa: BLE001 - raised where the call was asked for
            raised = error
            return lambda: None if future.done() else future.set_exception(raised)
        finally:
            with self._guard:
                self._busy -= 1
        return lambda: None if future.done() else future.set_result(result)


def ask(loop: asyncio.AbstractEventLoop, question: Callable[[], Coroutine[Any, Any, T]], deadline_seconds: float) -> T:
    """Give what a coroutine of a loop gives, from a thread that `Threads` runs; raise what it raises.

    Raises:
        TimeoutError: no answer in time, or the loop has ended.
    """
    answer: Future[T] = Future()

    def begin() -> None:
        task = loop.create_task(question())
        task.add_done_callback(lambda done: _settle(done, answer))

    with contextlib.suppress(RuntimeError):  # the loop may be closed by now
        loop.call_soon_threadsafe(begin)
    until = time.monotonic() + deadline_seconds
    while not wait([answer], _LOOK_SECONDS).done and not loop.is_closed() and time.monotonic() < until:
        pass
    if not answer.done() or answer.cancelled():
        raise TimeoutError(f"no answer within {deadline_seconds:g} s")
    return answer.result()


def _settle(done: asyncio.Task[T], answer: Future[T]) -> None:
    if done.cancelled():
        answer.cancel()
    elif (error := done.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result())
