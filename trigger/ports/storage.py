"""The port of what makes snapshots, and what it tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from trigger.model import Finding, RecoveryPoint, Snapshot, Space, Volume
from trigger.ports.progress import Progress


class Capability(StrEnum):
    """What a storage can do; differences are data, never `isinstance`."""

    ATOMIC = "atomic"
    """The snapshot of one volume is one instant."""
    ATOMIC_GROUP = "atomic-group"
    """The snapshots of all volumes together are one instant."""
    INSTANT_CLONE = "instant-clone"
    """A clone shares blocks with its snapshot, whatever the size."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """What a storage found that bears one of our names."""

    point: str
    tag: str | None
    """The text of the tag; None where it is missing or cannot be read."""
    snapshots: tuple[Snapshot, ...]
    """Those that are there, whole; without a tag those that are it by themselves, as far as the storage can tell."""
    complete: bool
    """Whether every volume that was to be cut here is there, whole, with its tag."""
    beside: tuple[str, ...] = ()
    """The other volumes of the point, which another storage keeps."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A writable copy of a point's snapshots."""

    name: str
    point: str
    paths: tuple[tuple[str, Path], ...]
    """(volume, where its copy lies)."""
    created_at: datetime
    identity: str = ""
    """What it was made with, which tells it from any other of its name; "" for one of an earlier version."""
    dropped: bool = False
    """Whether its removal was begun, and goes on or was cut off: what is left of it is not whole."""
    volumes: tuple[Volume, ...] = ()
    """What it is a copy of, as it was called and where it lay when it was cut, where that is known of its point."""
    beside: tuple[str, ...] = ()
    """The volumes of its point of which another storage has made the copy before."""


class ClonePlace(NamedTuple):
    """Where on this host the copy of a volume will lie in a clone."""

    folder: Path
    """Below which it is made."""
    whole: bool
    """Whether it is a volume of its own, and no mere folder."""


class Storage(Protocol):
    """Makes, tags, lists, clones and deletes snapshots of a fixed group of volumes, addressed by point id.

    Every snapshot bears its tag in the storage itself, so that a catalog can be rebuilt from storage alone.

    A storage that is away, such as a filesystem that is not mounted, is never taken for an empty one: once it was
    there, every call but `check` and the claims raises `StorageError` until it is back, and whoever asks for the tag or
    a clone of a point is refused so in any case, since somebody knows that there was one.
    """

    name: str
    capabilities: frozenset[Capability]

    def clone_place(self, kept: Snapshot) -> ClonePlace | None:
        """Give where the copy of a snapshot will lie in a clone; None where that shows only when one is made."""
        ...

    async def check(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what stands in the way of snapshots of `volumes`; changes nothing."""
        ...

    async def claimed_by_another(self, holder: str) -> Finding | None:
        """Give what `claim` would refuse `holder` for, by whom the storage was claimed; None for nothing.

        Changes nothing, and holds while the other's service is down too, as far as the storage can keep it in mind.
        """
        ...

    async def claim(self, holder: str = "") -> None:
        """Hold the storage, so that nobody else makes or removes points in it, until `close` or the process ends.

        Repeating it is no error. Who only looks, clones and drops clones needs no claim. Where there is nothing yet to
        hold, or it cannot be written, the claim is taken with the next snapshot that makes a point, which then raises
        where another one holds it.

        Args:
            holder: the file of the catalog that the points are of, which tells services apart; "" tells nothing.

        Raises:
            StorageError: another one holds it, or it was claimed for another one whose catalog is still there; not
                retryable.
        """
        ...

    async def snapshot(
        self, volumes: Sequence[Volume], point: str, tag: str, *, beside: Sequence[str] = ()
    ) -> tuple[Snapshot, ...]:
        """Cut every volume and keep the result under `point`, with `tag` (JSON text) beside it.

        What other volumes the point has, which another storage keeps, is noted as `beside`; see `Tagged`.

        Repeating the call for a point whose snapshot is complete gives the same snapshots and cuts nothing. What an
        unfinished call left behind is shown by `tagged` with `complete=False`, and `delete` removes it.

        Raises:
            StorageError: nothing usable was made.
        """
        ...

    async def retag(self, point: str, tag: str, *, beside: Sequence[str] = ()) -> None:
        """Replace the tag of a point durably and at once (the old one or the new one, never neither).

        Where it is missing or cannot be read, and the snapshots are whole, it is written anew, for those that `tagged`
        shows, with what the point has `beside` them.

        Raises:
            StorageError: there is no snapshot, or it cannot be written.
        """
        ...

    async def tagged(self, point: str | None = None) -> list[Tagged]:
        """Give everything that bears one of our names, whole or not, by point id; of one point alone, if it is named.

        Raises:
            StorageError: part of it cannot be looked at; that is never taken for gone, or for half made.
        """
        ...

    async def lack(self, point: str) -> str:
        """Give what is missing, or damaged, in the snapshots that `tagged` shows of a point; "" for nothing.

        Here each is looked at closely, as far as the storage can tell what belongs to it, and that may last; `tagged`
        believes what stands beside them.

        Raises:
            StorageError: that cannot be looked at.
        """
        ...

    async def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        """Give the ids of those of `points` of which a snapshot is not there, at a glance: none is looked into.

        So it may be asked often; only `tagged` says whether what is there is whole.

        Raises:
            StorageError: that cannot be looked at, which is never taken for gone.
        """
        ...

    async def delete(self, point: str) -> None:
        """Remove the snapshots and the tag of a point; nothing to remove is no error."""
        ...

    async def clone(
        self, point: str, name: str, progress: Progress, *, identity: str = "", beside: Sequence[str] = ()
    ) -> Clone:
        """Make a writable copy of a point's snapshots under `name` (made by us: lower-case letters, digits, `-`).

        It is in `clones`, for every process, before the first byte is copied, and bears `identity` from that moment on,
        so that whoever made it tells it from one that was there before, or came later under the same name. It holds all
        that the snapshots held: where some of that is missing, or the point is removed meanwhile, there is no clone.

        It need not be on stable storage yet: what a restore makes of it is synced as a whole at the end. `beside` is
        noted with it; see `Clone`.

        Raises:
            StorageError: no such point, it is not whole or went meanwhile, the name is taken, or no room; nothing is
                left behind.
        """
        ...

    async def clones(self) -> list[Clone]:
        """Give all clones, the unfinished too; as dropped what is left of one that `drop_clone` did not end with."""
        ...

    async def drop_clone(self, name: str) -> None:
        """Remove a clone with all it holds; nothing to remove is no error.

        Durably before the first of it goes nothing lies where its copies were, and `clones` shows it as dropped, to
        everybody, until all of it is gone; its name is taken as long. Repeating the call goes on with it.
        """
        ...

    async def space(self) -> Space:
        """Give the room that is left."""
        ...

    async def close(self) -> None:
        """Let go of the claim, if there is one. Never raises."""
        ...
