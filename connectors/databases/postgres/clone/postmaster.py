"""The server process of a data directory: find it, end it, with no more than its lock file and `/proc`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from connectors.databases.postgres.clone.isolation import OWN_FOLDER
from connectors.databases.postgres.log.files import text_inside
from trigger.errors import RestoreError

_POLL_SECONDS = 0.01
_READY_LINE = 7  # of postmaster.pid, where the server writes its state (LOCK_FILE_LINE_PM_STATUS)


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A postmaster by its lock file."""

    pid: int
    status: str
    """`starting`, `standby`, `ready` or `stopping`, as `pg_ctl` reads it; "" where it has not said so yet."""


def find(data: Path) -> Postmaster | None:
    """Give the postmaster of a data directory if it lives: its lock file may be left over, and its pid another's."""
    try:
        lines = text_inside(data, Path("postmaster.pid")).splitlines()
        pid = int(lines[0])
        if not Path(f"/proc/{pid}/cwd").samefile(data):
            return None
    except (OSError, ValueError, IndexError):
        return None
    return Postmaster(pid, lines[_READY_LINE].strip() if len(lines) > _READY_LINE else "")


def is_ours(data: Path) -> bool:
    """Whether the postmaster of a data directory lives and was started by us, as its command line says."""
    server = find(data)
    return server is not None and server.pid in _started(data)


async def end(data: Path, how: signal.Signals, seconds: float = 60.0) -> None:
    """End the server of a data directory and wait until it is gone; at once where it takes too long.

    A server that has only just been started is found too, by its command line: it has no lock file yet.
    """
    clock = asyncio.get_running_loop().time
    for attempt in (how, signal.SIGQUIT):
        asked: set[int] = set()
        deadline = clock() + seconds
        while found := await asyncio.to_thread(_processes, data):
            for pid in found - asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, attempt)
            asked |= found
            if clock() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        else:
            return
    raise RestoreError(f"the server of {data} did not end within {2 * seconds:g} s")


def forget_the_dead(data: Path) -> None:
    """Remove the lock file that a killed server left behind: its pid may be another's by now, after a reboot say.

    A server that lives, or a process of one that died, works in the data directory; then the file stays, and the
    server that is started next refuses it in its own words.
    """
    for process in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if process.samefile(data):
                return
    (data / "postmaster.pid").unlink(missing_ok=True)


def _processes(data: Path) -> set[int]:
    """Give the postmaster of a data directory, and whatever is about to become it."""
    server = find(data)
    return _started(data) | ({server.pid} if server else set())


def _started(data: Path) -> set[int]:
    """Give the processes that were started with the configuration that we wrote for a data directory."""
    found = set()
    configuration = os.fsencode(data / OWN_FOLDER / "postgresql.conf")
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes()
            program = words.partition(b"\0")[0].rpartition(b"/")[2]
            if program in (b"postgres", b"setsid") and configuration in words:
                found.add(int(entry.parent.name))
    return found
