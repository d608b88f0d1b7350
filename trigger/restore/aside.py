"""What restores in place and their undoing left beside the volumes: list it, and remove it for good.

`<volume>.before-<time>` is the old state, `<volume>.restored-<time>` one that was taken back. They are found by what
lies there, with or without a record. What is removed is renamed to `<volume>.removed-<time>` first, all of it, so that
half a state is never taken for a whole one; what a killed removal left is listed, and removed by the same call.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from trigger.errors import RestoreError
from trigger.failpoint import reached
from trigger.model import Finding, Severity, Volume
from trigger.restore.clones import Site, to_its_end
from trigger.restore.obstacles import require_none
from trigger.restore.swap import TIME, Swap, forget, noted, places_held, swaps, undoable
from trigger.trusted import sync_folder

_MEASURING_SECONDS = 20.0
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Kind(StrEnum):
    """Why a state lies aside."""

    BEFORE = "before"
    """It was there before a restore in place, which can be undone as long as it is kept."""
    RESTORED = "restored"
    """A restore in place had put it there, and was undone."""
    REMOVED = "removed"
    """It is being removed, or its removal was cut off."""


@dataclass(frozen=True, slots=True)
class Aside:
    """A state that lies beside the volumes, of all of them or of those that still have it."""

    name: str
    """The time of the restore in place that left it: `20260501T120000Z`."""
    kind: Kind
    target: str
    """What that restore brought back; "" where no record of it is there."""
    age: timedelta
    """How long ago that restore began."""
    bytes: int | None
    """What its files take, snapshots that share it included; null where counting takes too long."""
    paths: tuple[str, ...]
    needed: str
    """Why it may not be removed now; "" where it may."""
    undo: str
    """The command that puts it back in its place; "" where none can."""
    not_undone: str
    """Why none can; "" where one does, and of what was not there before."""


async def aside(site: Site) -> list[Aside]:
    """Give all that lies aside, the oldest first; nothing is changed."""
    records = {swap.name: swap for swap in await asyncio.to_thread(noted, site.records_folder)}
    begun = {swap.name: swap for swap in await swaps(site)}
    found = await asyncio.to_thread(_found, site.volumes, list(records.values()))
    by_then = asyncio.get_running_loop().time() + _MEASURING_SECONDS
    listed = []
    for (name, kind), paths in sorted(found.items()):
        swap = records.get(name)
        needed = await _needed(name, paths, swap or begun.get(name), site)
        began = datetime.strptime(name, TIME).replace(tzinfo=UTC)
        left = by_then - asyncio.get_running_loop().time()
        size = await asyncio.to_thread(_bytes, paths, left)
        words = "; ".join(finding.message for finding in needed)
        target = swap.target if swap is not None else ""
        refusal = await _not_undone(name, site) if kind is Kind.BEFORE else ""
        undo = f"trigpoint restore --undo {name}" if kind is Kind.BEFORE and not refusal else ""
        age = site.clock.now() - began
        listed.append(Aside(name, kind, target, age, size, tuple(map(str, paths)), words, undo, refusal))
    return listed


async def _not_undone(name: str, site: Site) -> str:
    """Say why an old state cannot be put back as things are; "" where it can."""
    if name not in {swap.name for swap in await swaps(site)}:
        return "the old state is not there of every volume"
    try:
        await undoable(name, site)
    except RestoreError as error:
        return error.message
    return ""


async def discard(name: str, site: Site) -> list[Path]:
    """Remove what the restore in place `name` left aside, for good; gives what was removed.

    Raises:
        RestoreError: nothing of that name is there, or it is needed still, and nothing has changed; or a file could
            not be removed, and it can be repeated.
    """
    with places_held(site):
        known = [*await asyncio.to_thread(noted, site.records_folder), *await swaps(site)]
        swap = next((one for one in known if one.name == name), None)
        found = await asyncio.to_thread(_found, site.volumes, [swap] if swap is not None else [])
        paths = [path for (of, _), each in found.items() if of == name for path in each]
        if not paths:
            raise RestoreError(f"nothing called {name} lies aside", hint="trigpoint aside lists what does")
        require_none(await _needed(name, paths, swap, site))
        removal = asyncio.to_thread(_remove, name, paths, site.records_folder)
        await to_its_end(removal, f"what lay aside of {name} is removed")
    return paths


def _found(volumes: tuple[Volume, ...], records: list[Swap]) -> dict[tuple[str, Kind], list[Path]]:
    """Give by name and kind what lies beside the volumes, of now and of the records."""
    found: dict[tuple[str, Kind], list[Path]] = defaultdict(list)
    roots = [volume.path for volume in volumes] + [place.path for swap in records for place in swap.places]
    for root in map(Path, dict.fromkeys(roots)):
        pattern = re.compile(rf"{re.escape(root.name)}\.({'|'.join(Kind)})-(\d{{8}}T\d{{6}}Z)")
        for entry in sorted(root.parent.iterdir()) if root.parent.is_dir() else ():
            if (match := pattern.fullmatch(entry.name)) and entry.is_dir() and not entry.is_symlink():
                found[match[2], Kind(match[1])].append(entry)
    return found


async def _needed(name: str, paths: list[Path], swap: Swap | None, site: Site) -> list[Finding]:
    """Give why something that lies aside may not be removed."""
    found = await site.recovery.at_work([Volume(name, str(path)) for path in paths])
    if swap is not None and not (swap.finished or swap.undone):
        words = f"the restore in place {name} was cut off and needs it"
        found.append(_refused(words, f"end it first: trigpoint restore --resume {name}, or --undo {name}"))
    for volume in site.volumes:
        if not os.path.lexists(volume.path):
            words = f"{volume.path} is not there, and what lies aside may be all that there is of it"
            found.append(_refused(words, "put a state back in its place first"))
        elif any(Path(os.path.realpath(volume.path)).is_relative_to(path) for path in paths):
            found.append(_refused(f"{volume.path} leads into it", "see who put a link there"))
    mounts = await asyncio.to_thread(lambda: list(_mounts()))
    for path in paths:
        if (inside := next((mount for mount in mounts if mount.is_relative_to(path.resolve())), None)) is not None:
            found.append(_refused(f"a filesystem is mounted at {inside}", "unmount it first"))
    return found


def _refused(message: str, remedy: str) -> Finding:
    return Finding("aside", Severity.REFUSED, message, remedy)


def _mounts() -> Iterator[Path]:
    """Give where filesystems are mounted (proc_pid_mountinfo(5)); blanks and the like are in octal there."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield Path(_ESCAPED.sub(lambda found: chr(int(found[1], 8)), line.split()[4]))


def _remove(name: str, paths: list[Path], records: Path) -> None:
    doomed = [path.with_name(re.sub(r"\.\w+-(\w+)$", rf".{Kind.REMOVED}-\1", path.name)) for path in paths]
    try:
        for path, gone in zip(paths, doomed, strict=True):
            if path != gone:
                if gone.exists():
                    shutil.rmtree(gone)
                path.rename(gone)
                sync_folder(path.parent)
        reached("after-aside-rename")
        for gone in dict.fromkeys(doomed):
            if gone.exists():
                shutil.rmtree(gone)  # the root of a btrfs subvolume goes with rmdir too, since Linux 4.18
                sync_folder(gone.parent)
    except OSError as error:
        raise RestoreError(
            f"{error.filename} cannot be removed: {error.strerror}", hint="what is left is listed by trigpoint aside"
        ) from error
    forget(records, name)


def _bytes(paths: list[Path], seconds: float) -> int | None:
    """Give what all files below some folders take; None where counting takes longer."""
    total, by_then = 0, time.monotonic() + seconds
    folders = list(map(str, paths))
    while folders:
        if time.monotonic() > by_then:
            return None
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # it is being removed
            continue
        except PermissionError:
            return None
    return total
