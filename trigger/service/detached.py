"""Threads that nobody waits for: a call that never comes back holds up neither the others nor the end.

The event loop's own pool has a few threads for everything, looking up names of hosts too, and is waited for at the end:
a folder on a dead disk would take it whole, and the service could only be killed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Detached(ThreadPoolExecutor):
    """A thread for each call, as `loop.set_default_executor` takes it; whoever calls bounds how many there are."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Begin a call in a thread of its own; gives what will hold its result."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where the call was asked for
                future.set_exception(error)

        threading.Thread(target=work, name="detached", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for nobody."""
