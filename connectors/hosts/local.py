"""The agent of the host that the service itself runs on: `syncfs` of every volume's filesystem, and hooks.

What the flush can prove, and what it cannot:

- A write-back error that happened since `prepare` (or that nobody has seen before) fails the flush. The kernel tells
  it once for each open descriptor, so the descriptors stay open between rounds, and what was told is written down:
  the volume stays poisoned, over a restart too, until an operator has looked and called `clear`.
- A frozen filesystem answers `syncfs` with success at once, so it is asked first whether it takes writes: removing an
  extended attribute of a namespace that no filesystem has waits while it is frozen, is refused while it is
  read-only, and changes nothing. A freeze that comes later is no harm: it writes everything out itself.
- A call into a dead filesystem never comes back. It runs in a thread of its own, one a filesystem at most.
- A disk that says "written" and loses it is beyond what any program can see.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from connectors.hosts.hooks import Hook, read_hooks, run_hook
from connectors.hosts.sections import LocalOptions
from connectors.syncfs import open_folder, syncfs
from connectors.threads import Threads
from trigger.errors import AgentError
from trigger.model import Flush, Volume

_PREPARE_SECONDS = 30.0
_WRITE_BACK_ERRORS = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EUCLEAN})
_POLL_SECONDS = 0.01
_NO_SUCH_NAMESPACE = "trigpoint.frozen"


@dataclass
class _Filesystem:
    """One filesystem that holds volumes, and the descriptor that it is flushed through."""

    device: str
    descriptor: int
    volumes: list[_Mounted] = field(default_factory=list)
    doing: str = ""
    """What a thread is waiting for; "" while none is."""
    closing: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Close the descriptor, or leave that to the thread that is still inside."""
        with self._guard:
            self.closing = True
            if not self.doing:
                os.close(self.descriptor)

    def left(self) -> None:
        """Say that the thread has come back."""
        with self._guard:
            self.doing = ""
            if self.closing:
                os.close(self.descriptor)


@dataclass(frozen=True)
class _Mounted:
    """One volume as it was found by `prepare`."""

    name: str
    path: str
    identity: tuple[int, int]
    """(device, inode) of its root."""
    filesystem_id: str


def agent(section: LocalOptions, name: str, state_folder: Path) -> LocalAgent:
    """Give the agent of this host, which is called `name`."""
    return LocalAgent(name, state_folder=state_folder, hooks=section.hooks)


class LocalAgent:
    """Port `Agent` on this host.

    Args:
        name: what the flushes are signed with.
        state_folder: where a poisoned volume is written down; not on a volume.
        hooks: the file of `connectors.hosts.hooks`; None for no hooks.
    """

    def __init__(self, name: str, *, state_folder: Path, hooks: Path | None = None) -> None:
        self.name = name
        self._state_folder = state_folder
        self._hooks_file = hooks
        self._hooks: list[Hook] = []
        self._filesystems: dict[str, _Filesystem] | None = None
        self._order: list[str] = []
        self._poisoned: dict[str, str] = {}
        self._threads = Threads(f"flush of {name}", limit=32)

    async def prepare(self, volumes: Sequence[Volume]) -> None:
        """Open every volume's filesystem and read the hooks; a second call takes the place of the first.

        What the descriptors of before have not told yet of a filesystem that still is one of ours is asked for first.
        """
        before, self._filesystems = self._filesystems or {}, None
        self._order = [volume.name for volume in volumes]
        try:
            async with asyncio.timeout(_PREPARE_SECONDS):
                self._filesystems = await self._threads.run(partial(self._open, volumes, before))
        except TimeoutError:
            raise AgentError(f"{self.name}: the volumes did not open within {_PREPARE_SECONDS:g} s") from None
        except OSError as error:
            message = f"{self.name}: {error.filename or 'a volume'} cannot be opened: {error.strerror}"
            raise AgentError(message, hint="mount it, and let the agent's user read it", retryable=False) from error
        finally:
            for filesystem in before.values():
                filesystem.close()

    def _open(self, volumes: Sequence[Volume], before: dict[str, _Filesystem]) -> dict[str, _Filesystem]:
        if self._hooks_file is not None:
            self._hooks = read_hooks(self._hooks_file)
        self._poisoned = {volume.name: words for volume in volumes if (words := self._read_poison(volume.name))}
        opened: dict[str, _Filesystem] = {}
        try:
            for volume in volumes:
                descriptor = open_folder(Path(volume.path))
                device = _device(descriptor)
                seen = os.fstat(descriptor)
                fsid = f"{os.fstatvfs(descriptor).f_fsid:x}"
                mounted = _Mounted(volume.name, volume.path, (seen.st_dev, seen.st_ino), fsid)
                if device in opened:
                    os.close(descriptor)
                else:
                    opened[device] = _Filesystem(device, descriptor)
                opened[device].volumes.append(mounted)
        except BaseException:
            for filesystem in opened.values():
                os.close(filesystem.descriptor)
            raise
        for device in opened.keys() & before.keys():
            self._ask_last(before[device])
        return opened

    def _ask_last(self, filesystem: _Filesystem) -> None:
        """Have a descriptor that goes tell of write-back errors that the one in its place was opened too late for."""
        if not filesystem.doing:  # else a thread is asking
            filesystem.doing = "syncfs"
            try:
                syncfs(filesystem.descriptor)
            except OSError as error:
                self._poison(filesystem, error)
            finally:
                filesystem.left()

    async def flush(self, point: str, deadline_seconds: float) -> tuple[Flush, ...]:
        """Run the hooks, flush every filesystem once, and give one proof a volume, in the order of `prepare`.

        The hooks of `after` run whatever became of the flush once those of `before` were begun, each within its own
        deadline; a cancellation waits for them.
        """
        filesystems = self._filesystems
        if filesystems is None:
            raise AgentError(f"{self.name}: flush of {point} before prepare", retryable=False)
        self._require_clean()
        try:
            flushes = await self._flush_all(filesystems, point, deadline_seconds)
        except BaseException as error:
            try:
                await self._run_hooks("after", point)
            except AgentError as also:
                error.add_note(also.message)
            raise
        await self._run_hooks("after", point)
        return tuple(sorted(flushes, key=lambda flush: self._order.index(flush.volume)))

    async def _flush_all(self, filesystems: dict[str, _Filesystem], point: str, deadline_seconds: float) -> list[Flush]:
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._run_hooks("before", point)
                groups = await asyncio.gather(*map(self._flush, filesystems.values()))
        except TimeoutError:
            raise self._too_late(filesystems, point, deadline_seconds) from None
        return [flush for group in groups for flush in group]

    def _too_late(self, filesystems: dict[str, _Filesystem], point: str, deadline_seconds: float) -> AgentError:
        waiting = [
            f"{mounted.name} ({filesystem.doing})"
            for filesystem in filesystems.values()
            for mounted in filesystem.volumes
            if filesystem.doing
        ]
        what = ", ".join(waiting) or "a hook"
        message = f"{self.name}: {point} was not flushed within {deadline_seconds:g} s: waiting for {what}"
        return AgentError(message, hint="look whether the filesystem is frozen, or its device stuck")

    def _require_clean(self) -> None:
        if self._poisoned:
            name, words = next(iter(self._poisoned.items()))
            hint = "look at the kernel's log and at the data, then run: trigpoint clear"
            raise AgentError(f"{self.name}: volume {name} is poisoned: {words}", hint=hint, retryable=False)

    async def _run_hooks(self, when: str, point: str) -> None:
        """Run the hooks of one side in the order of the file; each of `after` although one before it failed."""
        errors: list[AgentError] = []
        for hook in self._hooks:
            if hook.when == when:
                try:
                    await run_hook(hook, point)
                except AgentError as error:
                    if when == "before":
                        raise
                    errors.append(error)
        if errors:
            raise AgentError("; ".join(error.message for error in errors), hint=errors[0].hint)

    async def _flush(self, filesystem: _Filesystem) -> list[Flush]:
        while filesystem.doing:  # noqa: ASYNC110 - a thread that an abandoned call left behind sets no event
            await asyncio.sleep(_POLL_SECONDS)
        filesystem.doing = "it was asked whether it takes writes"
        try:
            return await self._threads.run(partial(self._flush_blocking, filesystem))
        except BlockingIOError as error:  # raised before any thread was started
            filesystem.doing = ""
            hint = "look whether a filesystem is frozen, or its device stuck"
            raise AgentError(f"{self.name}: {error.strerror}", hint=hint) from error

    def _flush_blocking(self, filesystem: _Filesystem) -> list[Flush]:
        began_at = datetime.now(UTC)
        try:
            for mounted in filesystem.volumes:
                _require_same(mounted, self.name)
            _require_writable(filesystem, self.name)
            filesystem.doing = "syncfs"
            syncfs(filesystem.descriptor)
        except OSError as error:
            raise self._poison(filesystem, error) from error
        finally:
            filesystem.left()
        ended_at = datetime.now(UTC)
        return [
            Flush(self.name, mounted.name, filesystem.device, mounted.filesystem_id, began_at, ended_at)
            for mounted in filesystem.volumes
        ]

    def _poison(self, filesystem: _Filesystem, error: OSError) -> AgentError:
        """Write down that a filesystem lost writes, for each of its volumes; the kernel will not say it again."""
        words = f"write-back on {filesystem.device} failed: {error.strerror}"
        if error.errno not in _WRITE_BACK_ERRORS:
            return AgentError(f"{self.name}: {words}")
        names = [mounted.name for mounted in filesystem.volumes]
        for name in names:
            self._poisoned[name] = words
            with contextlib.suppress(OSError):  # the memory of this process still knows
                self._write_poison(name, words)
        hint = "look at the kernel's log and at the data, then run: trigpoint clear"
        return AgentError(f"{self.name}: {words} ({', '.join(names)})", hint=hint, retryable=False)

    def _poison_file(self, volume: str) -> Path:
        return self._state_folder / f"poisoned-{re.sub('[^a-z0-9_-]', '_', volume)}.json"

    def _write_poison(self, volume: str, words: str) -> None:
        path = self._poison_file(volume)
        fresh = path.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(json.dumps({"volume": volume, "error": words, "at": datetime.now(UTC).isoformat()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = open_folder(self._state_folder)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_poison(self, volume: str) -> str:
        try:
            text = self._poison_file(volume).read_text()
        except FileNotFoundError:
            return ""
        try:
            return str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            return "written down, but the note cannot be read"

    @property
    def poisoned(self) -> dict[str, str]:
        """The poisoned volumes, each with what happened."""
        return dict(self._poisoned)

    async def clear(self, volume: str) -> None:
        """Trust a volume again, by the word of an operator who has looked at the data."""
        await self._threads.run(partial(self._poison_file(volume).unlink, missing_ok=True))
        self._poisoned.pop(volume, None)

    async def close(self) -> None:
        """Let go of the volumes; one that a stuck thread still holds is closed when that comes back."""
        filesystems, self._filesystems = self._filesystems or {}, None
        for filesystem in filesystems.values():
            filesystem.close()


def _require_same(mounted: _Mounted, agent: str) -> None:
    """Raise where the path of a volume leads somewhere else by now: unmounted, mounted over, or moved."""
    try:
        seen = Path(mounted.path).stat()
        identity = seen.st_dev, seen.st_ino
    except FileNotFoundError:
        identity = None
    if identity != mounted.identity:
        message = f"{agent}: {mounted.path} is not the filesystem any more that it was when {mounted.name} was opened"
        raise AgentError(message, hint="mount it again, and start the service anew", retryable=False)


def _require_writable(filesystem: _Filesystem, agent: str) -> None:
    """Wait while the filesystem is frozen; raise where it is read-only."""
    try:
        os.removexattr(filesystem.descriptor, _NO_SUCH_NAMESPACE)
    except OSError as error:
        if error.errno == errno.EROFS:
            message = f"{agent}: {filesystem.device} is read-only; the kernel does that after errors"
            raise AgentError(message, hint="look at the kernel's log", retryable=False) from error


def _device(descriptor: int) -> str:
    """Give `major:minor` of the filesystem behind a descriptor, by the mount that it was opened through.

    The device number of a file will not do: on btrfs each subvolume has one of its own.
    """
    with contextlib.suppress(OSError, StopIteration):
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        mount = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
        return next(words[2] for words in lines if words[0] == mount)
    device = os.fstat(descriptor).st_dev
    return f"{os.major(device)}:{os.minor(device)}"
