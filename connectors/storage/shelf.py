"""How storages that live inside a filesystem lay out what they keep, so that it can be read without us.

    <folder>/lock                               held by the one who makes and removes points, and whose it is
    <folder>/trg-<point id>/point.json          the sidecar: tag, volumes, times; sealed with a digest
                            <volume>            the snapshot: a folder, or a subvolume
    <folder>/clones/<name>/clone.json           which point it came from, when, and its identity
                           <volume>             the writable copy
    <folder>/clones/.<name>.dropped             likewise, of a clone whose removal was begun

A sidecar is replaced by a rename of a flushed file, so it is the old one or the new one and never neither; one
that is damaged, or cannot be read, counts as missing. The snapshots beside it are shown all the same, as far as they
are whole by themselves, and with a new tag it is written anew. Where that cannot be looked at either, nothing of all
is shown: what a disk does not give may be there.

Nobody else may write the folder, or one above it: whoever may could put a link in the place of anything here, and
have us write where it leads. Points are closed to others, since what they hold belongs to the owner of the data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from connectors.storage import claims, sealed
from connectors.storage.glance import status
from connectors.storage.place import Place
from connectors.storage.removal import remove_copies, remove_tree
from connectors.storage.sidecar import Sidecar, sidecar_out, snapshot_in
from trigger.errors import StorageError
from trigger.failpoint import reached
from trigger.lock import lock
from trigger.model import Finding, RecoveryPoint, Severity, Snapshot, Space, Volume
from trigger.point_names import is_point_id, tag_name
from trigger.ports import Clone, Tagged
from trigger.trusted import require_no_link, sync_folder, why_not_ours

_VOLUME_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_CLONE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DROPPED = ".dropped"
_OUTER_POINTS = 2
"""The oldest and the newest one, which thinning leaves."""
_MENDING = "only its tag is damaged, which `trigpoint reconcile` writes anew"
_GONE = "if it was moved, put it back where it was; without it a restore starts from another point"
_NOT_A_FOLDER_REMEDY = "move it away, or mend the link and mount what it points to; or correct storage.folder"
_EACH_ITS_OWN = "each service needs a storage.folder of its own; two would remove what the other makes"
_GIVEN_UP = "; where that one is given up for good, move its catalog away"
_CLOSED_MODE = 0o710  # what a folder of ours has that was made under umask 027, when that was not minded
_FOLDER_MODE = 0o711  # a clone's server runs as the owner of the data and must reach it; nobody may list
_POINT_MODE = 0o700  # what is in it belongs to the owner of the data, who could change it, or put links there


class Shelf:
    """The folder of one storage: its names, sidecars and room. Everything here blocks; call it in a thread.

    Every call raises `StorageError` while the folder is away, if it was seen before, or a point of it is named.
    """

    def __init__(
        self,
        folder: Path,
        *,
        budget: int,
        wanted_free_bytes: int,
        driver: str = "",
        is_whole: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        self.folder = folder
        self._driver = driver
        self._is_whole = is_whole  # whether a snapshot is, by itself, without what the sidecar says; or raises
        self._budget = budget
        self._wanted_free_bytes = wanted_free_bytes
        self._needed_bytes = 0
        self._place = Place(folder)
        self._claim_wanted = False
        self._holder = ""
        self._claim: int | None = None
        self._claiming = threading.Lock()  # held while a filesystem is waited for, which may be for ever
        self._swapping = threading.Lock()  # held for an instant

    def claim(self, holder: str = "") -> None:
        """Hold the folder for this shelf from now on, or else from the next point on (`making`); see port `Storage`.

        It is put off where there is no folder, or nothing in it that was ever ours: its filesystem may not be mounted,
        and the claim would be left beneath. So it is where the filesystem is read-only, since nobody makes or removes
        anything there.

        Raises:
            StorageError: another holds it, or it can be no folder.
        """
        self._claim_wanted, self._holder = True, holder
        self._require_folder_possible()
        if not self._place.is_used():
            return
        try:
            self._take_claim()
        except OSError as error:
            if error.errno != errno.EROFS:
                raise

    def _take_claim(self) -> None:
        """Hold the folder where that is wanted and not so yet; raises `StorageError` where another holds it."""
        with self._claiming:  # the kernel refuses a second descriptor of our own, too
            if self._claim is not None or not self._claim_wanted:
                return
            held = lock(self._place.lock)
            taken = self.claimed_by_another(self._holder)
            if held is None or taken is not None:
                taken = taken or self._taken()
                if held is not None:
                    os.close(held)
                raise StorageError(taken.message, hint=taken.remedy, retryable=False)
            claims.note(held, self._holder)
            self._place.hold(held)
            self._keep(held)
            self._close_points()

    def claimed_by_another(self, holder: str) -> Finding | None:
        """Give whose the folder is, where it was claimed for another than `holder`; see port `Storage`."""
        other = claims.another(self._place.lock, holder)
        return self._taken(f": that of the catalog {other}", _GIVEN_UP) if other else None

    def _taken(self, whose: str = "", given_up: str = "") -> Finding:
        message = f"another trigpoint makes points in {self.folder}{whose}"
        return Finding(str(self.folder), Severity.REFUSED, message, f"{_EACH_ITS_OWN}{given_up}")

    def _keep(self, held: int) -> None:
        """Take what holds the folder for the claim, or let go of it where none is wanted any more."""
        with self._swapping:
            if self._claim_wanted:
                self._claim = held
                return
        os.close(held)

    def _close_points(self) -> None:
        """Close the points of earlier versions to others."""
        for point in self.points():
            with contextlib.suppress(OSError):  # a link, or a filesystem that cannot be written
                descriptor = os.open(self.point_folder(point), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    os.fchmod(descriptor, _POINT_MODE)
                finally:
                    os.close(descriptor)

    def require_ours(self, *inside: Path) -> None:
        """Raise `NotOursError` where somebody else decides what the folder is, or the ones `inside`."""
        for place in inside:
            require_no_link(place)
        for place in (self.folder, *inside):
            if (found := why_not_ours(place)) is not None:
                raise found

    def _require_folder_possible(self) -> None:
        if (refused := self.refused()) is not None:
            raise StorageError(refused.message, hint=refused.remedy, retryable=False)

    def refused(self) -> Finding | None:
        """Give what keeps the folder from being one of ours: a file or a broken link there or above it, or others."""
        places = (self.folder, *self.folder.parents)
        found = next(place for place in places if os.path.lexists(place))
        if found.is_dir():
            alien = why_not_ours(self.folder)
            return Finding(str(self.folder), Severity.REFUSED, alien.message, alien.remedy) if alien else None
        return Finding(str(self.folder), Severity.REFUSED, f"{found} is not a directory", _NOT_A_FOLDER_REMEDY)

    def close(self) -> None:
        """Let go of the claim, and want it no more; never waits for a filesystem that does not answer."""
        with self._swapping:
            self._claim_wanted = False
            held, self._claim = self._claim, None
        if held is not None:
            os.close(held)

    def point_folder(self, point: str) -> Path:
        """Give where a point's snapshots lie; raises `StorageError` for what is no point id."""
        if not is_point_id(point):
            raise StorageError(f"not a point id: {point!r}", retryable=False)
        return self.folder / tag_name(point)

    def present(self, point: str) -> Path | None:
        """Give where a point lies if there is anything, for a change; raises `NotOursError` where that is not ours."""
        folder = self.point_folder(point)
        self.require_ours(folder)
        return folder if self._place.is_there() and folder.exists() else None

    def make_point(self, point: str) -> Path:
        """Make the folder of a new point."""
        make_folder(self.folder)
        folder = self.point_folder(point)
        folder.mkdir(_POINT_MODE)
        return folder

    @property
    def clones_folder(self) -> Path:
        """Where all clones lie."""
        return self._place.clones

    def clone_folder(self, name: str) -> Path:
        """Give where a clone lies; raises `StorageError` for what is no clone's name."""
        if _CLONE_NAME.fullmatch(name) is None:
            hint = "a name has lower-case letters, digits and -, and at most 63 of them"
            raise StorageError(f"not a name for a clone: {name!r}", hint=hint, retryable=False)
        return self.clones_folder / name

    def points(self) -> list[str]:
        """Give the id of everything that bears one of our names, oldest first."""
        return self._place.points() if self._place.is_there() else []

    def read(self, point: str) -> Sidecar | None:
        """Give a point's sidecar; None where it is missing or damaged."""
        folder = self.point_folder(point)
        content = sealed.read(folder / "point.json")
        if content is None:
            return None
        try:
            snapshots = tuple(snapshot_in(folder, kept) for kept in content["snapshots"])
            return Sidecar(content["tag"], snapshots, tuple(content.get("beside", ())))
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, point: str, sidecar: Sidecar) -> None:
        """Write or replace a point's sidecar durably."""
        self.require_ours(self.point_folder(point))
        sealed.replace(self.point_folder(point) / "point.json", sidecar_out(sidecar))

    def write_ahead(self, point: str, sidecar: Sidecar) -> None:
        """Write a point's first sidecar; its content is durable, its name with the filesystem's next commit."""
        sealed.write_new(self.point_folder(point) / "point.json", sidecar_out(sidecar))

    def forget(self, point: str) -> None:
        """Remove a point's sidecar durably: from here on the point is unfinished."""
        folder = self.point_folder(point)
        self.require_ours(folder)
        (folder / "point.json").unlink(missing_ok=True)
        sync_folder(folder)

    def made_before(
        self, volumes: Sequence[Volume], point: str, look: Callable[[Snapshot], Snapshot | None]
    ) -> tuple[Snapshot, ...]:
        """Give the snapshots of a point that is there already; raises `StorageError` unless they are those, whole."""
        found = self.tagged(point, look)
        if not found.complete or [kept.volume for kept in found.snapshots] != [each.name for each in volumes]:
            message = f"{tag_name(point)} is there already, unfinished or of other volumes"
            raise StorageError(message, hint="delete the point first", retryable=False)
        return found.snapshots

    def retag(self, point: str, tag: str, beside: Sequence[str] = ()) -> None:
        """Replace the tag of a point, or write it anew; raises `StorageError` where there is no snapshot."""
        self._place.require_used()
        sidecar = self.read(point)
        snapshots = sidecar.snapshots if sidecar else self._untagged(point)
        if not snapshots:
            raise StorageError(f"no snapshot of {point} to tag", retryable=False)
        self.write(point, Sidecar(tag, snapshots, sidecar.beside if sidecar else tuple(beside)))

    def _untagged(self, point: str) -> tuple[Snapshot, ...]:
        """Give the snapshots of a point without a sidecar that are whole by themselves; their times are a guess."""
        folder = self.point_folder(point)
        try:
            made = datetime.fromtimestamp(folder.lstat().st_mtime, UTC)
            names = sorted(found.name for found in folder.iterdir() if _VOLUME_NAME.fullmatch(found.name))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        whole = (name for name in names if self._is_whole(folder / name))
        return tuple(Snapshot(name, self._driver, str(folder / name), made, made) for name in whole)

    def all_tagged(self, point: str | None, look: Callable[[Snapshot], Snapshot | None]) -> list[Tagged]:
        """Give what there is of each point, or of one alone; `look` as for `tagged`."""
        named = [] if point is None else [point]
        there = [one for one in named if self._place.is_there() and os.path.lexists(self.point_folder(one))]
        return [self.tagged(one, look) for one in (self.points() if point is None else there)]

    def tagged(self, point: str, look: Callable[[Snapshot], Snapshot | None]) -> Tagged:
        """Give what there is of one point; `look` gives a snapshot as it is, None if it is not there whole."""
        self._place.require_used()
        sidecar = self.read(point)
        if sidecar is None:
            return Tagged(point, None, self._untagged(point), complete=False)
        found = tuple(seen for kept in sidecar.snapshots if (seen := look(kept)) is not None)
        return Tagged(point, sidecar.tag, found, len(found) == len(sidecar.snapshots), sidecar.beside)

    def absent(self, points: Sequence[RecoveryPoint]) -> set[str]:
        """Give the ids of those of `points` of which a snapshot is not there, whatever else lies in its place."""
        places = [(point.id, self.point_folder(point.id) / kept.volume) for point in points for kept in point.snapshots]
        gone = {point for point, place in places if status(place) is None}
        self._place.is_there()  # asked last: what went away while each was looked for is not gone
        return gone

    def whole(self, point: str, look: Callable[[Snapshot], Snapshot | None]) -> Tagged:
        """Give what there is of a point, as `tagged`; raises `StorageError` where that is not known to be all of it."""
        found = self.tagged(point, look)
        if not found.complete:
            hint = _MENDING if found.tag is None and found.snapshots else _GONE
            raise StorageError(f"no whole snapshot of {point}", hint=hint, retryable=False)
        return found

    def begin_clone(
        self, name: str, point: str, volumes: Sequence[str], identity: str, beside: Sequence[str] = ()
    ) -> Clone:
        """Make the folder of a clone, with what says where it comes from and whose it is: both or neither.

        Raises:
            StorageError: the name is taken.
        """
        folder = self.clone_folder(name)
        self.require_ours(folder.parent)
        make_folder(folder.parent)
        if os.path.lexists(_dropped(folder)):
            hint = "drop it to its end first, or choose another name"
            raise StorageError(f"the clone {name} is being dropped", hint=hint, retryable=False)
        draft = self._fresh_draft(folder)
        _make_one(draft)
        content = {"point": point, "volumes": list(volumes), "created_at": datetime.now(UTC).isoformat()}
        sealed.replace(
            draft / "clone.json", content | {"identity": identity} | ({"beside": list(beside)} if beside else {})
        )
        try:
            draft.rename(folder)  # over none, or one in which nothing lies
        except OSError as error:
            self._fresh_draft(folder)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            hint = "drop it first, or choose another name"
            raise StorageError(f"the clone {name} exists already", hint=hint, retryable=False) from None
        return self._clone(folder, name)

    def _fresh_draft(self, folder: Path) -> Path:
        """Give where a clone's folder is made ready, with nothing there."""
        draft = folder.with_name(f".{folder.name}")
        remove_tree(draft)
        return draft

    def drop_clone(self, name: str, remove: Callable[[Path], None]) -> None:
        """Remove a clone, its copies by `remove`; before the first of it goes it bears the name of one that is dropped.

        Raises `NotOursError` where it is not ours. Doing it again goes on with it.
        """
        folder = self.clone_folder(name)
        dropped = _dropped(folder)
        self.require_ours(folder.parent, folder, dropped)
        self._place.is_there()
        self._fresh_draft(folder)
        remove_copies(dropped, remove)
        with contextlib.suppress(FileNotFoundError):  # nothing is there, or another began with it at this moment
            folder.rename(dropped)
            sync_folder(folder.parent)
            reached("after-drop-begun")
        remove_copies(dropped, remove)

    def clones(self) -> list[Clone]:
        """Give all clones, the unfinished too, and what is left of those that are dropped."""
        folder = self.clones_folder
        if not (self._place.is_there() and folder.exists()):
            return []
        clones = []
        for found in sorted(folder.iterdir()):
            name = found.name.removeprefix(".").removesuffix(_DROPPED)
            if _CLONE_NAME.fullmatch(name) and found.name in (name, f".{name}{_DROPPED}"):
                with contextlib.suppress(FileNotFoundError):  # it is being removed at this moment
                    clones.append(self._clone(found, name))
        return clones

    def _clone(self, folder: Path, name: str) -> Clone:
        content = sealed.read(folder / "clone.json") or {}
        volumes = content.get("volumes", [])
        since = content.get("created_at")
        created_at = datetime.fromisoformat(since) if since else datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        paths = tuple((volume, folder / volume) for volume in volumes)
        identity, dropped = content.get("identity", ""), folder.name != name
        beside = tuple(content.get("beside", ()))
        return Clone(name, content.get("point", ""), paths, created_at, identity, dropped, beside=beside)

    def space(self) -> Space:
        """Give the room that is left on the filesystem of the folder."""
        free, total = self._room()
        return Space(free, total, self._wanted_free_bytes, len(self.points()), self._budget, self._needed_bytes)

    def look(self) -> Iterator[Finding]:
        """Find out whether the folder can be written to, and has room; what thinning can mend is a warning only."""
        here, subject = nearest_existing(self.folder), str(self.folder)
        if not os.access(here, os.W_OK | os.X_OK):
            yield Finding(subject, Severity.REFUSED, f"{here} cannot be written to", "give it to the service's user")
        space = self.space()
        if space.free_bytes < space.wanted_free_bytes:
            message = f"{space.free_bytes} bytes are free, {space.wanted_free_bytes} are wanted"
            severity = Severity.WARNING if space.snapshots > _OUTER_POINTS else Severity.REFUSED
            yield Finding(subject, severity, message, "make room, or lower storage.keep_free; else older points go")

    def _room(self) -> tuple[int, int]:
        """Give the bytes that are free, and all there are."""
        room = os.statvfs(nearest_existing(self.folder))
        return room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize

    def require_free(self, more_bytes: int = 0) -> None:
        """Raise `StorageError` where `more_bytes` would leave less free than is wanted."""
        free, _ = self._room()
        if free - more_bytes < self._wanted_free_bytes:
            message = f"{self.folder}: {free} bytes are free, {self._wanted_free_bytes + more_bytes} are wanted"
            hint = "delete points, make the filesystem larger, or lower storage.keep_free"
            raise _NoRoomError(message, hint=hint)

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Let one more point be made inside the block; a claim that was put off is taken before.

        Where it finds no room, `space` wants more than there was: once what it made is removed, that looks like enough.

        Raises:
            StorageError: it would be too much, or another holds the folder.
        """
        self._place.is_there()
        free, _ = self._room()
        self._require_room()
        try:
            yield
            self._needed_bytes = 0
        except (OSError, _NoRoomError) as error:
            if isinstance(error, _NoRoomError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._needed_bytes = max(free - self._wanted_free_bytes, 0) + 1
            raise

    def _require_room(self) -> None:
        self.require_free()
        kept = len(self.points())
        if kept >= self._budget:
            message = f"{self.folder}: {kept} points are kept, the budget is {self._budget}"
            raise StorageError(message, hint="delete points, or raise storage.budget")
        self._require_folder_possible()
        if self._claim_wanted and self._claim is None:
            make_folder(self.folder)
            self._take_claim()


class _NoRoomError(StorageError):
    """There is less free than is wanted."""


def require_names(volumes: Sequence[Volume]) -> None:
    """Raise `StorageError` where a volume's name is not fit for a file name, or stands twice."""
    names = [volume.name for volume in volumes]
    for name in names:
        if _VOLUME_NAME.fullmatch(name) is None or names.count(name) > 1:
            hint = "a name stands once, with lower-case letters, digits, - and _, and at most 63 of them"
            raise StorageError(f"not a name for a volume: {name!r}", hint=hint, retryable=False)


def _dropped(folder: Path) -> Path:
    """Give where a clone lies once its removal was begun."""
    return folder.with_name(f".{folder.name}{_DROPPED}")


def make_folder(folder: Path) -> None:
    """Make a folder that a clone's server can pass through, with its parents."""
    if not folder.exists():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            _make_one(folder)
    elif stat.S_IMODE(folder.stat().st_mode) == _CLOSED_MODE and folder.stat().st_uid == os.geteuid():
        folder.chmod(_FOLDER_MODE)


def _make_one(folder: Path) -> None:
    folder.mkdir(_FOLDER_MODE)
    folder.chmod(_FOLDER_MODE)  # whatever our umask is


def nearest_existing(path: Path) -> Path:
    """Give `path`, or the nearest of its parents that is there."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` lies in `folder` or is it, symbolic links resolved."""
    return path.resolve().is_relative_to(folder.resolve())
