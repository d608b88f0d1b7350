"""Named places at which a test may crash, delay or fail the service; off unless the environment asks.

`TRIGPOINT_FAILPOINT=after-snapshot:kill` kills the process with SIGKILL the first time the point is reached,
`…:kill@3` the third time; `…:raise` raises `OSError(ENOSPC)` there instead. A name says what has just happened.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

hook: Callable[[str], None] | None = None
"""What `reached` calls instead of looking at the environment; the simulation sets it."""

_name, _, _action = os.environ.get("TRIGPOINT_FAILPOINT", "").partition(":")
_action, _, _countdown = _action.partition("@")
_left = int(_countdown or 1)


def reached(name: str) -> None:
    """Do what was asked to happen at the failpoint `name`; nothing unless asked."""
    global _left  # noqa: PLW0603 - one process, one armed failpoint
    if hook is not None:
        hook(name)
    if name != _name:
        return
    _left -= 1
    if _left == 0 and _action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if _left == 0 and _action == "raise":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
