"""Programs of the operator that run before and after a flush: named by id in a file that only root can write.

    [hooks.queue-to-disk]
    command = ["/usr/local/sbin/queue-to-disk", "--all"]
    when = "before"                  # or "after"
    deadline_seconds = 10

Nothing that comes from outside decides what is run or with which arguments; a hook is told the point's id in
`TRIGPOINT_POINT` and nothing else. File and programs are refused unless they and every folder above them belong to
root (where the agent does not run as root: or to its own user) and can be written by nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from connectors.threads import Threads
from trigger.errors import AgentError

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KEYS = {"command", "when", "deadline_seconds"}
_MOST_SECONDS = 3600
_OUTPUT_BYTES = 64 << 10
_LAST_LINES = 6
_LINE_CHARACTERS = 300
_REAP_SECONDS = 2.0
_FILE_BYTES = 1 << 20
_THREADS = Threads("hooks")


@dataclass(frozen=True, slots=True)
class Hook:
    """One program of the operator."""

    id: str
    command: tuple[str, ...]
    when: Literal["before", "after"]
    deadline_seconds: float


def read_hooks(path: Path) -> list[Hook]:
    """Give the hooks of a file, in its order; blocks.

    Raises:
        AgentError: the file is not there, may be changed by others, or says something that is not understood.
    """
    require_trusted(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _require_owner(path, os.fstat(descriptor))
            text = os.read(descriptor, _FILE_BYTES).decode()
        finally:
            os.close(descriptor)
        document = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise _refused(f"the hooks in {path} cannot be read: {error}") from error
    unknown = set(document) - {"hooks"}
    if unknown or not isinstance(document.get("hooks", {}), dict):
        raise _refused(f"{path} holds {', '.join(sorted(unknown)) or 'hooks that are no table'}; expected [hooks.<id>]")
    return [_hook(path, name, value) for name, value in document.get("hooks", {}).items()]


def _hook(path: Path, name: str, value: Any) -> Hook:
    where = f"{path}: hook {name!r}"
    if _ID.fullmatch(name) is None:
        raise _refused(f"{where}: an id has lower-case letters, digits and -, and at most 63 of them")
    if not isinstance(value, dict) or set(value) - _KEYS:
        raise _refused(f"{where}: expected the keys {', '.join(sorted(_KEYS))}")
    command, when, deadline = value.get("command"), value.get("when", "before"), value.get("deadline_seconds", 10)
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise _refused(f"{where}: command is a list of strings, the program first")
    if not command[0].startswith("/") or any("\0" in word for word in command):
        raise _refused(f"{where}: the program is named by its whole path, not {command[0]!r}")
    if when not in ("before", "after"):
        raise _refused(f"{where}: when is before or after, not {when!r}")
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline <= _MOST_SECONDS:
        raise _refused(f"{where}: deadline_seconds lies above 0 and is at most {_MOST_SECONDS}, not {deadline!r}")
    require_trusted(Path(command[0]).resolve())
    return Hook(name, tuple(command), when, float(deadline))


def require_trusted(path: Path) -> None:
    """Raise `AgentError` unless only root (or our own user) can change `path` or anything above it; blocks."""
    for part in (path, *path.parents):
        try:
            seen = part.lstat()
        except OSError as error:
            raise _refused(f"{part} cannot be looked at: {error.strerror}") from error
        if stat.S_ISLNK(seen.st_mode):
            raise _refused(f"{part} is a symbolic link")
        _require_owner(part, seen)


def _require_owner(path: Path, seen: os.stat_result) -> None:
    if seen.st_uid not in (0, os.geteuid()):
        raise _refused(f"{path} belongs to user {seen.st_uid}")
    if seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refused(f"{path} can be written by others (mode {stat.S_IMODE(seen.st_mode):04o})")


def _refused(message: str) -> AgentError:
    hint = "hooks and all folders above them belong to root and are written by nobody else: chown root, chmod go-w"
    return AgentError(message, hint=hint, retryable=False)


async def run_hook(hook: Hook, point: str) -> None:
    """Run one hook to its end; what it leaves in its session is killed.

    Raises:
        AgentError: it did not start, did not end in time, or said no; the message ends with its last lines. A
            cancellation kills it too.
    """
    program = Path(hook.command[0]).resolve()
    await _THREADS.run(partial(require_trusted, program))
    with _captured() as (pipe, output):
        process = await _started(hook, program, point, pipe)
        ended = await _ended(process, hook.deadline_seconds)
    words = f": {last}" if (last := _last_lines(output)) else ""
    if not ended:
        raise AgentError(f"hook {hook.id} did not end within {hook.deadline_seconds:g} s{words}")
    if process.returncode != 0:
        raise AgentError(f"hook {hook.id} failed with exit code {process.returncode}{words}")


async def _started(hook: Hook, program: Path, point: str, pipe: int) -> asyncio.subprocess.Process:
    """Give the running program; a cancellation while it starts waits for it, and kills it."""
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            program,
            *hook.command[1:],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C", "TRIGPOINT_POINT": point},
            cwd="/",
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except OSError as error:
        raise AgentError(f"hook {hook.id} did not start: {error.strerror}", retryable=False) from error
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            await _ended(await starting, 0)
        raise


async def _ended(process: asyncio.subprocess.Process, deadline_seconds: float) -> bool:
    """Whether the program ended by itself in time; its whole session is gone afterwards, as far as it can be."""
    try:
        async with asyncio.timeout(deadline_seconds):
            await process.wait()
    except TimeoutError:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # one that waits for a dead disk does not even die
            async with asyncio.timeout(_REAP_SECONDS):
                await process.wait()
    return True


@contextlib.contextmanager
def _captured() -> Iterator[tuple[int, bytearray]]:
    """Give a pipe for a program to write to, and the last of what it wrote.

    A pipe of our own, and not asyncio's: a daemon that the program leaves behind may keep it open for ever.
    """
    loop, output = asyncio.get_running_loop(), bytearray()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def take() -> None:
        with contextlib.suppress(BlockingIOError):
            output.extend(os.read(reading, _OUTPUT_BYTES))
            del output[:-_OUTPUT_BYTES]

    loop.add_reader(reading, take)
    try:
        yield writing, output
        take()
    finally:
        loop.remove_reader(reading)
        os.close(writing)
        os.close(reading)


def _last_lines(output: bytearray) -> str:
    lines = output.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
    return " | ".join(line.strip()[:_LINE_CHARACTERS] for line in lines)
