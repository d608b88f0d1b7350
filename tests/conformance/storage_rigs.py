"""The storages that the suite is run against: each a rig that can write to volumes and look into clones."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from connectors.memory import Kept, MemoryStorage, World
from connectors.storage import libbtrfsutil
from connectors.storage.btrfs import BtrfsStorage
from connectors.storage.directory import DirectoryStorage
from trigger.errors import StorageError
from trigger.model import Volume
from trigger.point_names import tag_name
from trigger.ports import Clone, Storage
from trigger.service.members import Members


class Rig(Protocol):
    """One storage under test, with two volumes to cut."""

    volumes: tuple[Volume, ...]

    def driver(self, *, budget: int = 50, wanted_free_bytes: int = 0) -> Storage:
        """Give the driver, built anew over whatever is stored."""
        ...

    def write(self, volume: Volume, key: str, value: str) -> None:
        """Write a value into a volume and let the host write it back."""
        ...

    def holds(self, clone: Clone, volume: Volume) -> dict[str, str]:
        """Give all values that a clone's copy of a volume holds."""
        ...

    def leave_unfinished(self, point: str) -> None:
        """Leave what a crash between the cuts leaves."""
        ...

    def damage_tag(self, point: str) -> None:
        """Flip something in the tag of a point."""
        ...

    def lose_a_volume(self, point: str) -> None:
        """Take the snapshot of one of the volumes of a point away, and nothing else."""
        ...


@dataclass
class FileRig:
    """A storage that keeps files."""

    root: Path
    build: Callable[..., Storage]
    make_volume: Callable[[Path], object] = Path.mkdir
    volumes: tuple[Volume, ...] = ()

    def __post_init__(self) -> None:
        self.volumes = tuple(Volume(name, str(self.root / name)) for name in ("data", "wal"))
        for volume in self.volumes:
            self.make_volume(Path(volume.path))

    @property
    def folder(self) -> Path:
        """Where the storage keeps what it keeps."""
        return self.root / "storage"

    def driver(self, *, budget: int = 50, wanted_free_bytes: int = 0, **options: Any) -> Storage:
        return self.build(self.folder, budget=budget, wanted_free_bytes=wanted_free_bytes, **options)

    def write(self, volume: Volume, key: str, value: str) -> None:
        path = Path(volume.path) / key
        path.parent.mkdir(exist_ok=True, parents=True)
        with path.open("r+" if path.exists() else "w") as file:
            file.write(value)

    def holds(self, clone: Clone, volume: Volume) -> dict[str, str]:
        root = dict(clone.paths)[volume.name]
        return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}

    def leave_unfinished(self, point: str) -> None:
        (self.folder / tag_name(point) / "data").mkdir(parents=True)

    def damage_tag(self, point: str) -> None:
        sidecar = self.folder / tag_name(point) / "point.json"
        sidecar.write_bytes(sidecar.read_bytes().replace(b"before", b"behind"))

    def lose_a_volume(self, point: str) -> None:
        copy = self.folder / tag_name(point) / "wal"
        if self.make_volume is make_subvolume:
            libbtrfsutil.delete_subvolume(copy, recursive=False)
        else:
            shutil.rmtree(copy)

    @contextlib.contextmanager
    def away(self, point: str) -> Iterator[None]:
        """Let nothing of a point be there for a while."""
        folder = self.folder / tag_name(point)
        folder.rename(self.root / "away")
        yield
        (self.root / "away").rename(folder)

    def lose(self, point: str, volume: Volume, key: str) -> None:
        """Lose a file of a snapshot; where the filesystem keeps it closed, it is opened for that."""
        kept = self.folder / tag_name(point) / volume.name
        if self.make_volume is make_subvolume:
            subprocess.run(["btrfs", "property", "set", str(kept), "ro", "false"], check=True, capture_output=True)
        (kept / key).unlink()

    @contextlib.contextmanager
    def unreadable(self, point: str) -> Iterator[None]:
        """Let nothing be read for a while of what stands beside the snapshots of a point, nor what btrfs says of it."""
        folder, asked = self.folder / tag_name(point), libbtrfsutil.is_subvolume

        def on_a_bad_sector(path: Path) -> bool:
            if path.parent == folder:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return asked(path)

        listed = [file for file in folder.iterdir() if file.suffix in (".json", ".manifest")]
        for file in listed:
            file.rename(self.root / file.name)
            file.mkdir()
        with patch.object(libbtrfsutil, "is_subvolume", on_a_bad_sector):
            yield
        for file in listed:
            file.rmdir()
            (self.root / file.name).rename(file)

    @contextlib.contextmanager
    def removal_cut_off(self) -> Iterator[None]:
        """Let no more go for a while than the files of one folder, or one subvolume."""
        delete = libbtrfsutil.delete_subvolume
        gone: list[Path] = []

        def one(path: Path, **options: bool) -> None:
            if gone:
                refuse(path)
            gone.append(path)
            delete(path, **options)

        def refuse(path: object, **_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        with patch.object(libbtrfsutil, "delete_subvolume", one), patch.object(os, "rmdir", refuse):
            yield

    @contextlib.contextmanager
    def unmounted(self, *beneath: str) -> Iterator[None]:
        """Take the storage away for a while, as what is not mounted; in its place lies an empty folder, or files."""
        aside = self.root / "mounted elsewhere"
        self.folder.rename(aside)
        if beneath:
            self.folder.mkdir()
            for name in filter(None, beneath):
                (self.folder / name).touch()
        yield
        for name in filter(None, beneath):
            (self.folder / name).unlink()
        if beneath:
            self.folder.rmdir()
        aside.rename(self.folder)


@dataclass
class MemoryRig:
    """The reference driver; a value is a marker of a commit."""

    world: World = field(default_factory=World)
    build: Callable[..., Storage] = MemoryStorage
    volumes: tuple[Volume, ...] = (Volume("data", "/data"), Volume("wal", "/wal"))

    def driver(self, *, budget: int = 50, wanted_free_bytes: int = 0) -> Storage:
        self.world.free_bytes = 1 << 30
        return self.build(self.world, budget=budget, wanted_free_bytes=wanted_free_bytes)

    def write(self, volume: Volume, key: str, value: str) -> None:
        self.world.cluster.commit(volume.name, markers=(key, value))
        self.world.cluster.write_back()

    def holds(self, clone: Clone, volume: Volume) -> dict[str, str]:
        content = self.world.clones[clone.name][1][volume.name]
        commits = self.world.cluster.commits(content)
        return {commit.markers[0]: commit.markers[1] for commit in commits if commit.stream == volume.name}

    def leave_unfinished(self, point: str) -> None:
        self.world.kept[point] = Kept(("data", "wal"))

    def damage_tag(self, point: str) -> None:
        self.world.kept[point].tag = None

    def lose_a_volume(self, point: str) -> None:
        del self.world.kept[point].cuts["wal"]


@dataclass
class MembersRig(FileRig):
    """Two storages, each with a volume of its own, as one."""

    join: Callable[..., Storage] = Members
    refused: tuple[tuple[int, str], ...] = ()
    """What the first (0) or the second (1) will not do."""
    dies: tuple[tuple[int, str], ...] = ()
    """In what the process ends, likewise."""
    reversed: bool = False
    """Whether the second is the first by now."""
    homes: dict[str, str] = field(default_factory=lambda: {"data": "first", "wal": "second"})

    @property
    def second(self) -> Path:
        """Where the second one keeps what it keeps."""
        return self.root / "second"

    def members(self, **options: Any) -> tuple[Storage, Storage]:
        """Give the two by themselves."""
        return super().driver(**options), DirectoryStorage(self.second, **{"wanted_free_bytes": 0, **options})

    def driver(self, **options: Any) -> Storage:
        first, second = self.members(**options)
        for one, method in self.refused:
            setattr((first, second)[one], method, _refuse)
        for one, method in self.dies:
            setattr((first, second)[one], method, _die)
        storages = {"second": second, "first": first} if self.reversed else {"first": first, "second": second}
        return self.join(storages, self.homes)

    def lose_a_volume(self, point: str) -> None:
        shutil.rmtree(self.second / tag_name(point) / "wal")

    @contextlib.contextmanager
    def second_away(self) -> Iterator[None]:
        """Let the second not be mounted for a while; whoever looks then never saw it."""
        self.second.rename(self.root / "unmounted")
        yield
        (self.root / "unmounted").rename(self.second)

    @contextlib.contextmanager
    def member_away(self, point: str) -> Iterator[None]:
        """Let all that the second keeps of a point be elsewhere for a while."""
        folder, aside = self.second / tag_name(point), self.root / "aside"
        folder.rename(aside)
        yield
        aside.rename(folder)


class Killed(BaseException):
    """The process is gone."""


async def _die(*_: object, **__: object) -> None:
    raise Killed


async def _refuse(*_: object, **__: object) -> None:
    raise StorageError("it will not")


def make_subvolume(path: Path) -> None:
    subprocess.run(["btrfs", "subvolume", "create", str(path)], check=True, capture_output=True)


def directory(root: Path, build: Callable[..., Storage] = DirectoryStorage) -> FileRig:
    return FileRig(root, build)


def btrfs(root: Path, build: Callable[..., Storage] = BtrfsStorage) -> FileRig:
    return FileRig(root, build, make_subvolume)


def members(root: Path, join: Callable[..., Storage] = Members) -> MembersRig:
    return MembersRig(root, DirectoryStorage, join=join)


def members_of_two_kinds(root: Path, join: Callable[..., Storage] = Members) -> MembersRig:
    return MembersRig(root, BtrfsStorage, make_subvolume, join=join)


def names(volumes: Sequence[Volume]) -> list[str]:
    return [volume.name for volume in volumes]
