"""Exchange production's volumes for those of a proven clone, by renames, and be able to exchange them back.

Each volume is two renames: the old state to `<path>.before-<time>`, the clone's copy to `<path>`. They are written
down before the first; and since what exists tells which of them were done, a swap that was cut off anywhere can be
finished or undone, and both can be repeated. Nothing is copied and nothing is deleted.

The clone is known by its identity: by its name and its paths one that was made later could be taken for it. What was
put in place is known by the lineage that it goes on in: an upgraded cluster, another copy, or a standby that took over
may have been put there since, and must be neither undone away nor kept under the name of what was restored.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
import re
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trigger.errors import RestoreError, TrigpointError
from trigger.failpoint import reached
from trigger.host import make_passage
from trigger.lock import lock
from trigger.model import Finding, Severity, Volume
from trigger.ports import Clone
from trigger.position import Lineage
from trigger.restore import clone_records
from trigger.restore.clones import Site, remove, to_its_end
from trigger.restore.exchange import Place, Rename, backward, carry_out, forward, waiting
from trigger.restore.obstacles import require_at_rest
from trigger.trusted import sync_folder

UNRECORDED = "a state of which no record is left"
"""What a swap put in place that is known only by what lies beside the volumes."""
_DONE = "the restore in place {0} is done; trigpoint restore --undo {0} takes it back"
TIME = "%Y%m%dT%H%M%SZ"
"""How the time is written by which a swap is called."""
_ASIDE = "trigpoint aside lists what lies beside the volumes"
_KEPT = re.compile(r"\.before-(\d{8}T\d{6}Z)$")
_SWAP, _UNDONE = ".swap", ".undone"
"""How the files are called in which a swap is written down: one that stands or was cut off, and one taken back."""


@dataclass(frozen=True, slots=True)
class Swap:
    """A restore in place, done or cut off."""

    name: str
    """By which it is undone: the time it began, `20260501T120000Z`."""
    target: str
    clone: str
    """Which clone took the place; "" where that is not known."""
    places: tuple[Place, ...]
    finished: bool
    """Whether all of it is in place; not where it was cut off, nor where its undoing was."""
    undone: bool = False
    """Whether it was taken back; then only what had been in place may still be there."""
    identity: str = ""
    """What the clone bears; "" where an earlier version made it."""
    lineage: str = ""
    """In which what was put there goes on; "" where an earlier version put it there, or no record is left."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Where the old state lies, a path a volume."""
        return tuple(place.kept for place in self.places)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where it put something."""
        return tuple(place.path for place in self.places)

    @property
    def refusal(self) -> Finding:
        """What is said of one that was cut off, by what cannot be done before it is ended."""
        return Finding(
            self.name,
            Severity.REFUSED,
            f"the restore in place {self.name} ({self.target}) was cut off: volumes may lie in different states",
            f"end it: trigpoint restore --resume {self.name}, or --undo {self.name}",
        )

    def is_of(self, identity: str, created_at: datetime) -> bool:
        """Whether what bears the name of the clone is the clone itself, and not one that was made later.

        Where neither bears an identity an earlier version made both, and only the time, in whole seconds, tells.
        """
        if self.identity or identity:
            return self.identity == identity
        return created_at.replace(microsecond=0) <= datetime.strptime(self.name, TIME).replace(tzinfo=UTC)


async def swaps(site: Site) -> list[Swap]:
    """Give every swap that was begun and of which the old state is still there, the oldest first.

    Also of which no record is left, as after the loss of the state folder; see `unrecorded`.
    """
    return await asyncio.to_thread(_all, site.records_folder, site.volumes)


async def cut_off(site: Site) -> list[Swap]:
    """Give the swaps that were not finished, or whose undoing was not."""
    return [swap for swap in await swaps(site) if not swap.finished]


async def mixed(site: Site) -> list[Finding]:
    """Give the swaps that were cut off while volumes were exchanged: some may lie in another state than others."""
    found = await cut_off(site)
    return [swap.refusal for swap in found if any(os.path.lexists(path) for path in swap.kept)]


async def begin(swap: Swap, site: Site) -> Swap:
    """Write a swap down and finish it; a cancellation does not cut it off, and is told what became of it.

    Raises:
        TrigpointError, OSError: it could not be written down, and nothing has changed; or as for `resume`.
    """

    async def begun() -> Swap:
        await asyncio.to_thread(_write, site.records_folder, swap)
        reached("after-swap-intent")
        return await _resumed(swap.name, site)

    return await _to_its_end(begun(), swap.name, site, _DONE.format(swap.name))


async def resume(name: str, site: Site) -> Swap:
    """Finish a swap that was cut off, or whose undoing was; a finished one stays as it is. Cancelled as `begin` is.

    Raises:
        RestoreError: there is none, production runs, or the restored state is not there any more, and nothing has
            changed; or a rename failed, and it can be repeated or undone.
        StorageError: whose clone lies there cannot be told, and nothing has changed.
    """
    return await _to_its_end(_resumed(name, site), name, site, _DONE.format(name))


async def _resumed(name: str, site: Site) -> Swap:
    with places_held(site):
        swap = await resumable(name, site)
        await require_at_rest(site)
        await asyncio.to_thread(carry_out, await left_to_resume(swap, site))
        done = replace(swap, finished=True)
        await asyncio.to_thread(_write, site.records_folder, done)
        await _drop_shell(swap, site)
    return done


async def resumable(name: str, site: Site) -> Swap:
    """Give the swap that `resume` finishes, the newest that was cut off for `last`; nothing is changed.

    Raises:
        RestoreError: there is none, or the restored state is not there any more.
        StorageError: whose clone lies there cannot be told.
    """
    if name != "last":
        swap = _named(name, await swaps(site))
    elif left := await cut_off(site):
        swap = left[-1]
    else:
        raise RestoreError("no restore in place was cut off", hint=_ASIDE)
    _require_restored(swap, await _with_its_clone(swap, site))
    return swap


async def left_to_resume(swap: Swap, site: Site) -> list[Rename]:
    """Give the renames that finish a swap, in order."""
    return [one for place in await _with_its_clone(swap, site) for one in forward(place)]


def left_to_undo(swap: Swap) -> list[Rename]:
    """Give the renames that take a swap back, in order."""
    return [one for place in swap.places[::-1] for one in backward(place)]


async def undoable(name: str, site: Site) -> Swap:
    """Give the swap that `undo` takes back, the newest one for `last`; nothing is changed.

    Raises:
        RestoreError: there is none, it was taken back already, another one followed on it, the old state of a volume
            is not there any more, or what stands there is not what it put there.
    """
    known = await asyncio.to_thread(_known, site.records_folder, site.volumes)
    swap = _named(name, known)
    if swap.undone:
        raise RestoreError(
            f"the restore in place {swap.name} ({swap.target}) was taken back already",
            hint="an older one is taken back by its time: trigpoint aside lists them",
        )
    newer = [one for one in known if one.name > swap.name and _is_there(one)]
    if newer:
        raise RestoreError(
            f"{newer[-1].name} ({newer[-1].target}) was put in place after {swap.name}",
            hint=f"take that back first: trigpoint restore --undo {newer[-1].name}",
        )
    _require_kept(swap)
    there = [place.path for place in _put(swap)]
    if there and (found := await stranger(swap, site)):
        was = f"cluster {swap.lineage}" if swap.lineage else "nobody noted what that was"
        raise RestoreError(
            f"{found}, and not what the restore in place {swap.name} ({swap.target}) put there: {was}",
            hint=f"to have the old state in its place, move {', '.join(there)} away by hand, each to a name of its own,"
            f" and then: trigpoint restore --undo {swap.name}",
        )
    return swap


async def stranger(swap: Swap, site: Site) -> str:
    """Say what stands where a swap put something, and is not that; "" where what it put there does.

    Of one that was cut off only what was exchanged is looked at. Where it was not noted what it put there, that is
    taken for it which went on in a branch of its own from the cluster of the old state.
    """
    there = _put(swap)
    if len(there) < len(swap.places) and swap.finished:
        return f"nothing lies at {', '.join(place.path for place in swap.places if place not in there)}"
    found = await _lineage(swap, {place.path: place.path for place in there}, site)
    if found is None:
        return f"no cluster that can be read lies at {', '.join(swap.paths)}" if swap.finished else ""
    if swap.lineage:
        is_it = described(found) == swap.lineage
    else:
        before = await _lineage(swap, {place.path: place.kept for place in there}, site)
        own, old = found.history, before.history if before is not None else None
        is_it = old is not None and own.is_of_system(old) and own.branch != old.branch
    return "" if is_it else f"cluster {described(found)} lies at {', '.join(place.path for place in there)}"


def _put(swap: Swap) -> list[Place]:
    """Give the places where something lies that the swap put there, or somebody else since."""
    there = [place for place in swap.places if os.path.lexists(place.path)]
    return there if swap.finished else [place for place in there if os.path.lexists(place.kept)]


async def _lineage(swap: Swap, where: dict[str, str], site: Site) -> Lineage | None:
    """Give the lineage of what lies at some paths, by those of the volumes that they are of."""
    paths = tuple((volume.name, Path(where[volume.path])) for volume in site.volumes if volume.path in where)
    return await site.recovery.lineage(Clone(swap.name, "", paths, site.clock.now()), site.volumes)


def described(lineage: Lineage) -> str:
    """Write a lineage as far as it tells copies of one cluster apart: its history, and where the last one was left."""
    if not lineage.forks:
        return str(lineage.history)
    branch, left_at = lineage.forks[-1]
    return f"{lineage.history}, which left {lineage.branch(branch)} at {lineage.history.place(left_at)}"


async def undo(name: str, site: Site) -> Swap:
    """Put the old state back where it was; what had taken its place is kept as `<path>.restored-<time>`.

    Cancelled as `begin` is.

    Raises:
        RestoreError: it is refused, as `undoable` says, or production runs, and nothing has changed; or a rename
            failed, and it can be repeated.
    """
    return await _to_its_end(_undone(name, site), name, site, f"the restore in place {name} is taken back")


async def _undone(name: str, site: Site) -> Swap:
    with places_held(site):
        swap = await undoable(name, site)
        await require_at_rest(site)
        await asyncio.to_thread(carry_out, left_to_undo(swap))
        await asyncio.to_thread(_note_undone, swap, site.records_folder)
        await _drop_shell(swap, site)
    return swap


async def _to_its_end(work: Coroutine[Any, Any, Swap], name: str, site: Site, done: str) -> Swap:
    """Give what becomes of a swap by `work`, which no cancellation cuts off; its error says so where it is cut off."""

    async def ended() -> Swap:
        try:
            return await work
        except Exception as error:
            with contextlib.suppress(OSError):
                for left in [swap for swap in await cut_off(site) if swap.name == name]:
                    error.add_note(f"{left.refusal.message}; {left.refusal.remedy}")
            raise

    return await to_its_end(ended(), done)


@contextlib.contextmanager
def places_held(site: Site) -> Iterator[None]:
    """Hold the places of the volumes for one process; raises `RestoreError` where another one changes them."""
    make_passage(site.records_folder)
    held = lock(site.records_folder.with_suffix(".lock"))
    if held is None:
        raise RestoreError("another trigpoint exchanges or removes states", hint="wait until it has ended")
    try:
        yield
    finally:
        os.close(held)


def _note_undone(swap: Swap, records: Path) -> None:
    """Keep what is known of a swap that was taken back for as long as something of it lies aside."""
    if any(os.path.lexists(place.restored) for place in swap.places):
        _put_down(records, f"{swap.name}{_UNDONE}", replace(swap, finished=False, undone=True))
    (records / f"{swap.name}{_SWAP}").unlink(missing_ok=True)
    sync_folder(records)


async def _drop_shell(swap: Swap, site: Site) -> None:
    """Remove what is left of the clone; what cannot be removed stays on the list of clones."""
    with contextlib.suppress(TrigpointError):
        if not swap.clone:
            return
        there = [
            (found.identity, found.created_at) for found in await site.storage.clones() if found.name == swap.clone
        ]
        if (note := (await asyncio.to_thread(clone_records.written, site.records_folder)).get(swap.clone)) is not None:
            there.append((note.record.identity, note.record.created_at))
        if all(swap.is_of(*one) for one in there):
            await remove(swap.clone, site)


async def _with_its_clone(swap: Swap, site: Site) -> tuple[Place, ...]:
    """Give the places of a swap; without the clone's where that is gone, though another may bear its name now."""
    if any(os.path.lexists(place.clone) for place in swap.places):
        for found in await site.storage.clones():
            if found.name == swap.clone and swap.is_of(found.identity, found.created_at):
                return swap.places
    return tuple(replace(place, clone="") for place in swap.places)


def _named(name: str, known: Sequence[Swap]) -> Swap:
    """Give the swap of a name, the newest for `last`; raises `RestoreError`."""
    if name == "last" and known:
        return known[-1]
    if name == "last":
        message = "no restore in place is there to be taken back"
        raise RestoreError(message, hint=_ASIDE)
    for swap in known:
        if swap.name == name:
            return swap
    there = ", ".join(f"{one.name} ({one.target})" for one in known) or "none"
    raise RestoreError(f"there is no restore in place called {name}", hint=f"there are: {there}")


def _require_restored(swap: Swap, places: Sequence[Place]) -> None:
    """Refuse where a volume's restored state neither is in place nor can be put there; raises `RestoreError`."""
    for place, noted_of_it in zip(places, swap.places, strict=True):
        in_place = os.path.lexists(place.path) and (swap.finished or os.path.lexists(place.kept))
        if not in_place and waiting(place) is None:
            lost = noted_of_it.clone
            why = f"{lost} is another clone's now" if os.path.lexists(lost) else f"{lost} does not exist"
            raise RestoreError(
                f"the restored state of {place.path} is gone: {why}",
                hint=f"put the old state back: trigpoint restore --undo {swap.name}",
            )


def _require_kept(swap: Swap) -> None:
    """Refuse where a volume's old state was removed while the restored one is in place; raises `RestoreError`."""
    for place in swap.places:
        if swap.finished and not os.path.lexists(place.kept):
            raise RestoreError(
                f"the old state of {place.path} is gone: {place.kept} does not exist",
                hint="the restored state stays in place; what else was kept is of no use without it",
            )


def _write(folder: Path, swap: Swap) -> None:
    """Write a swap down durably; blocks on a small file."""
    _put_down(folder, f"{swap.name}{_SWAP}", swap)


def _put_down(folder: Path, name: str, swap: Swap) -> None:
    draft = folder / f".{name}"
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, json.dumps(asdict(swap), indent=1).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(folder / name)
    sync_folder(folder)


def noted(folder: Path) -> list[Swap]:
    """Give every swap that is written down, also of which nothing is there any more, the oldest first; blocks."""
    found = {path.stem: _read(path) for path in sorted(folder.glob(f"[0-9]*{_UNDONE}"))}
    found |= {path.stem: _read(path) for path in sorted(folder.glob(f"[0-9]*{_SWAP}"))}
    return [found[name] for name in sorted(found)]


def forget(folder: Path, name: str) -> None:
    """Remove what is written down of a swap; blocks on small files."""
    for suffix in (_SWAP, _UNDONE):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
    if folder.exists():
        sync_folder(folder)


def _read(path: Path) -> Swap:
    content = json.loads(path.read_text())
    places = tuple(Place(**place) for place in content["places"])
    finished = content["finished"] and not any(os.path.lexists(place.restored) for place in places)
    known = {field.name for field in fields(Swap)}
    read = content | {"places": places, "finished": finished}
    return Swap(**{name: value for name, value in read.items() if name in known})


def _all(folder: Path, volumes: Sequence[Volume]) -> list[Swap]:
    return [swap for swap in _known(folder, volumes) if _is_there(swap)]


def _known(folder: Path, volumes: Sequence[Volume]) -> list[Swap]:
    """Give every swap that is written down, or told by what lies beside the volumes, the oldest first."""
    return sorted([*noted(folder), *unrecorded(folder, volumes)], key=lambda swap: swap.name)


def _is_there(swap: Swap) -> bool:
    """Whether a swap was not taken back, and something of the old state is there, or it was cut off."""
    return not swap.undone and (not swap.finished or any(os.path.lexists(kept) for kept in swap.kept))


def unrecorded(folder: Path, volumes: Sequence[Volume]) -> list[Swap]:
    """Give the swaps of which no record is left, by what lies beside the volumes; blocks.

    Every volume must have something of such a swap there: of one that has nothing nobody can tell whether it was not
    exchanged yet, or its old state was removed.
    """
    recorded = {swap.name for swap in noted(folder)}
    roots = [Path(volume.path) for volume in volumes]
    beside = [entry for root in roots for entry in root.parent.glob(f"{glob.escape(root.name)}.before-*")]
    names = {match[1] for entry in beside if (match := _KEPT.search(entry.name))}
    found = []
    for name in sorted(names - recorded):
        places = tuple(Place.of(str(root), name) for root in roots)
        if all(_is_folder(place.kept) or _is_folder(place.restored) for place in places):
            is_finished = not any(os.path.lexists(place.restored) for place in places)
            found.append(Swap(name, UNRECORDED, "", places, is_finished))
    return found


def _is_folder(path: str) -> bool:
    return Path(path).is_dir() and not Path(path).is_symlink()
