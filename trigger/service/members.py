"""Several storages as one: a point has a member in each that keeps one of its volumes.

Each bears the whole tag, and the names of the volumes that the others keep, so that nobody takes a part for the whole:
a point is complete when all of its members are, and say the same. What is cut off between two of them is shown as
unfinished, and removed or mended as in one storage. A volume may be moved to another storage, and a storage added, or
left without a volume: what was cut before stays where it is, and is found there.

No two storages are cut at one instant, so the database's own bracket is held around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from trigger.errors import StorageError
from trigger.failpoint import reached
from trigger.model import Finding, RecoveryPoint, Snapshot, Space, Volume
from trigger.ports import Capability, Clone, ClonePlace, Progress, Storage, Tagged
from trigger.together import together
from trigger.volumes import of_volume, volumes_in

T = TypeVar("T")

_MENDING = "its tags do not agree, which `trigpoint reconcile` mends where every volume is there"
_GONE = "mount the filesystem of every storage; without all of its volumes a restore starts from another point"


class Members:
    """Port `Storage` over several.

    Args:
        storages: by name; clones are made, and removed, in their order.
        homes: by volume the name of the storage that keeps it from now on.
    """

    def __init__(self, storages: Mapping[str, Storage], homes: Mapping[str, str]) -> None:
        self._storages = storages
        self._homes = homes
        common = frozenset.intersection(*(one.capabilities for one in storages.values()))
        self._in_use = [name for name in storages if name in homes.values()]
        self.name = "+".join(dict.fromkeys(one.name for one in storages.values()))
        self.capabilities = common - {Capability.ATOMIC_GROUP}

    def clone_place(self, kept: Snapshot) -> ClonePlace | None:
        """Give where the storage of a snapshot puts its clones; None for one that was cut into a storage alone."""
        home = self._storages.get(kept.storage)
        return home.clone_place(kept) if home is not None else None

    def _shares(self, volumes: Sequence[Volume]) -> dict[str, list[Volume]]:
        """Give by storage the volumes that it keeps; one that keeps none is left out."""
        shares: dict[str, list[Volume]] = {name: [] for name in self._storages}
        for volume in volumes:
            shares[self._homes[volume.name]].append(volume)
        return {name: share for name, share in shares.items() if share}

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what stands in the way of snapshots of `volumes`, each in its storage."""
        shares = self._shares(volumes)

        async def look(name: str, share: Sequence[Volume]) -> list[Finding]:
            with self._one(name) as one:
                return await one.check(share)

        found = await together(look(name, share) for name, share in shares.items())
        return [finding for findings in found for finding in findings]

    async def claimed_by_another(self, holder: str) -> Finding | None:
        """Give what `claim` would refuse `holder` for in the first storage that is another's."""
        found = await self._ask_all(lambda one: one.claimed_by_another(holder))
        return next(filter(None, found), None)

    async def claim(self, holder: str = "") -> None:
        """Hold every storage; where one is another's, those before it are held until `close`."""
        for name in self._storages:
            with self._one(name) as one:
                await one.claim(holder)

    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        """Cut every volume in its storage, all side by side; where one fails, the others are given up."""
        shares = self._shares(volumes)
        there = [found for _, found in await self._shown(shares, point)]
        if there and not _joined(there).complete:
            message = f"{point} is there already, unfinished"
            raise StorageError(message, hint="delete the point first", retryable=False)
        names = [*(volume.name for volume in volumes), *beside]

        async def cut(name: str, share: Sequence[Volume]) -> tuple[Snapshot, ...]:
            others = [other for other in names if other not in [volume.name for volume in share]]
            with self._one(name) as one:
                made = await one.snapshot(share, point, tag, beside=others)
            reached("after-member-cut")
            return tuple(replace(snapshot, storage=name) for snapshot in made)

        made = await together(cut(name, share) for name, share in shares.items())
        found = {snapshot.volume: snapshot for snapshots in made for snapshot in snapshots}
        return tuple(found[volume.name] for volume in volumes)

    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        """Replace the tag of every member of a point; between the first and the last they do not agree."""
        parts = await self._parts(point)
        if not parts:
            raise StorageError(f"no snapshot of {point} to tag", retryable=False)
        volumes = _volumes_of([found for _, found in parts]).union(beside)

        async def write(name: str, found: Tagged) -> None:
            others = sorted(volumes.difference(kept.volume for kept in found.snapshots))
            with self._one(name) as one:
                await one.retag(point, tag, beside=others)
            reached("after-member-tagged")

        await together(write(name, found) for name, found in parts)

    async def _ask_all(self, call: Callable[[Storage], Awaitable[T]], names: Iterable[str] = ()) -> list[T]:
        """Give what every storage gives, or those of some names, asked side by side."""

        async def ask(name: str) -> T:
            with self._one(name) as one:
                return await call(one)

        return await together(map(ask, names or self._storages))

    @contextlib.contextmanager
    def _one(self, name: str) -> Iterator[Storage]:
        """Give one storage; its errors inside the block say which it is."""
        try:
            yield self._storages[name]
        except StorageError as error:
            raise type(error)(f"storage {name}: {error.message}", hint=error.hint, retryable=error.retryable) from error

    async def _parts(self, point: str | None = None) -> list[tuple[str, Tagged]]:
        """Give what each storage shows, with its name; of a point that those have whole that keep volumes, theirs."""
        parts = await self._shown(self._in_use, point) if point is not None else []
        if parts and _joined([found for _, found in parts]).complete:
            return parts
        return await self._shown(self._storages, point)

    async def _shown(self, names: Collection[str], point: str | None) -> list[tuple[str, Tagged]]:
        """Give what some storages show, each with its name."""
        shown = await self._ask_all(lambda one: one.tagged(point), names)
        return [(name, _in(name, found)) for name, tagged in zip(names, shown, strict=True) for found in tagged]

    async def tagged(self, point: str | None = None) -> list[Tagged]:
        """Give every point, or one, with what all storages show of it; without a tag where they do not say the same."""
        parts: dict[str, list[Tagged]] = {}
        for _, found in await self._parts(point):
            parts.setdefault(found.point, []).append(found)
        return [_joined(parts[one]) for one in sorted(parts)]

    async def lack(self, point: str) -> str:
        """Give what is missing in each member of a point."""
        parts = await self._parts(point)
        lacks = await self._ask_all(lambda one: one.lack(point), [name for name, _ in parts]) if parts else []
        return "; ".join(filter(None, lacks))

    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        """Give the ids of those of `points` of which a snapshot is in none of the storages."""
        gone: set[str] = set()
        for volume in volumes_in(points):
            gone |= await self._nowhere(of_volume(points, volume))
        return gone

    async def _nowhere(self, points: Sequence[RecoveryPoint]) -> set[str]:
        return set.intersection(*await self._ask_all(lambda one: one.absent(points)))

    async def delete(self, point: str) -> None:
        """Remove every member of a point; where one stays, the others go all the same."""
        await self._each(lambda one: one.delete(point))

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        """Make a copy of every member, one storage after the other; each knows what was to be made before it."""
        parts = await self._parts(point)
        if not (parts and (whole := _joined([found for _, found in parts])).complete):
            hint = _MENDING if parts and whole.tag is None else _GONE
            raise StorageError(f"no whole snapshot of {point}", hint=hint, retryable=False)
        if any(clone.name == name for clone in await self.clones()):
            hint = "drop it first, or choose another name"
            raise StorageError(f"the clone {name} exists already", hint=hint, retryable=False)
        made: list[Clone] = []
        before = list(beside)
        try:
            for home, found in parts:
                with self._one(home) as one:
                    made.append(await one.clone(point, name, progress, identity=identity, beside=tuple(before)))
                reached("after-member-cloned")
                before += [kept.volume for kept in found.snapshots]
        except BaseException:
            for home, _ in parts[: len(made)]:  # the one that failed has left nothing, or what was there before
                with contextlib.suppress(StorageError):
                    await self._storages[home].drop_clone(name)
            raise
        return _whole(made)

    async def clones(self) -> list[Clone]:
        """Give all clones; as dropped one of which a copy is gone that was made before another."""
        parts: dict[str, list[Clone]] = {}
        for clones in await self._ask_all(lambda one: one.clones()):
            for clone in clones:
                parts.setdefault(clone.name, []).append(clone)
        return [_whole(parts[name]) for name in sorted(parts)]

    async def drop_clone(self, name: str) -> None:
        """Remove every copy of a clone, in the order in which they were made, whatever the storages' order is now."""
        shown = await self._ask_all(lambda one: one.clones())
        each = zip(self._storages, shown, strict=True)
        copies = {home: clone for home, clones in each for clone in clones if clone.name == name}
        await self._require_all(list(copies.values()))
        made = {home: len(clone.beside) for home, clone in copies.items()}
        await self._each(lambda one: one.drop_clone(name), sorted(self._storages, key=lambda home: made.get(home, 0)))

    async def _require_all(self, parts: Sequence[Clone]) -> None:
        """Refuse where a copy of a clone may lie in a storage that is away; raises `StorageError`."""
        if not parts or parts[0].dropped:
            return
        wanted = _volumes_of([found for _, found in await self._parts(parts[0].point)])
        lacking = wanted - {volume for part in parts for volume, _ in part.paths}
        silent = (await self.space()).silent if lacking else ()
        if silent:
            message = f"storage {silent[0]} shows nothing, and a copy of {', '.join(sorted(lacking))} may lie there"
            raise StorageError(message, hint="mount its filesystem, and do it again")

    async def _each(self, remove: Callable[[Storage], Awaitable[None]], order: Iterable[str] = ()) -> None:
        """Remove something in one storage after the other; raises the first error when all were tried."""
        errors: list[StorageError] = []
        for name in order or self._storages:
            try:
                with self._one(name) as one:
                    await remove(one)
                reached("after-member-removed")
            except StorageError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def space(self) -> Space:
        """Give the room of the storage that is nearest to having none, and the budget of the one that is fullest.

        Of those that keep volumes now: what another one lacks hinders no new point.
        """
        spaces = dict(zip(self._in_use, await self._ask_all(lambda one: one.space(), self._in_use), strict=True))
        others = {name: await self._space_of(name) for name in self._storages if name not in spaces}
        name = min(
            spaces, key=lambda one: (not spaces[one].short, spaces[one].free_bytes - spaces[one].wanted_free_bytes)
        )
        fullest = max(spaces.values(), key=lambda one: one.snapshots / one.budget)
        counts = {one: space.snapshots if space is not None else 0 for one, space in (spaces | others).items()}
        return replace(
            spaces[name],
            snapshots=fullest.snapshots,
            budget=fullest.budget,
            name=name,
            storages=tuple(self._storages),
            silent=tuple(one for one in self._storages if not counts[one]),
        )

    async def _space_of(self, name: str) -> Space | None:
        """Give the room of a storage that keeps no volume now; None while it cannot be looked at."""
        with contextlib.suppress(StorageError):
            return await self._storages[name].space()
        return None

    async def close(self) -> None:
        """Let go of every claim."""
        for one in self._storages.values():
            await one.close()


def _in(name: str, found: Tagged) -> Tagged:
    """Give what a storage shows, its snapshots with its name."""
    return replace(found, snapshots=tuple(replace(kept, storage=name) for kept in found.snapshots))


def _volumes_of(parts: Sequence[Tagged]) -> set[str]:
    """Give the volumes of a point, by what is shown of it."""
    return {name for part in parts for name in (*part.beside, *(kept.volume for kept in part.snapshots))}


def _joined(parts: Sequence[Tagged]) -> Tagged:
    """Give what several storages show of a point as one."""
    snapshots = tuple(kept for part in parts for kept in part.snapshots)
    shown = {kept.volume for kept in snapshots}
    tags = {part.tag for part in parts}
    agreed = next(iter(tags)) if len(tags) == 1 else None
    beside = {other for part in parts for other in part.beside}
    complete = agreed is not None and beside <= shown and all(part.complete for part in parts)
    return Tagged(parts[0].point, agreed, snapshots, complete)


def _whole(parts: Sequence[Clone]) -> Clone:
    """Give the copies of a clone in several storages as one."""
    paths = tuple(path for part in parts for path in part.paths)
    before = {other for part in parts for other in part.beside}
    dropped = any(part.dropped for part in parts) or not before <= {volume for volume, _ in paths}
    return replace(parts[0], paths=paths, dropped=dropped, beside=())
