"""Where somebody has put a link in the place of what a storage made, nothing is written, read or removed behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.storage import copying
from connectors.storage.btrfs import BtrfsStorage
from connectors.storage.copying import Copier, Manifest, Seen
from connectors.storage.directory import DirectoryStorage
from connectors.storage.libbtrfsutil import create_snapshot, is_subvolume
from tests.fixtures.volumes import loop_volume, run
from trigger.errors import StorageError
from trigger.model import EPOCH, Severity, Volume
from trigger.point_names import point_id, tag_name

A, B = (point_id(EPOCH, number) for number in (1, 2))
NOBODY = 65534


class House:
    """A volume with one point and one clone of it, and a folder elsewhere that looks like either."""

    def __init__(self, root: Path, driver: type[DirectoryStorage | BtrfsStorage]) -> None:
        self.root, self.folder, self.elsewhere = root, root / "storage", root / "elsewhere"
        if driver is BtrfsStorage:
            run("btrfs", "subvolume", "create", root / "data")
        else:
            (root / "data").mkdir()
        (root / "data" / "file").write_text("content")
        self.volume = Volume("data", str(root / "data"))
        self.storage = driver(self.folder, wanted_free_bytes=0)
        self.do(self.storage.snapshot([self.volume], A, "tag"))
        self.do(self.storage.clone(A, "one", lambda *_: None))

    def do(self, asked: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(asked)

    def replace_by_link(self, path: Path) -> Path:
        """Move what is at `path` elsewhere and put a link to it there; gives where it lies now."""
        self.elsewhere.mkdir()
        moved = path.rename(self.elsewhere / path.name)
        path.symlink_to(moved)
        return moved


@pytest.fixture(params=["directory", pytest.param("btrfs", marks=[pytest.mark.volume, pytest.mark.root])])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    if request.param == "directory":
        yield House(tmp_path, DirectoryStorage)
        return
    with loop_volume("btrfs", 256) as mount:
        yield House(mount, BtrfsStorage)


def seen(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }


def test_behind_a_link_in_the_place_of_a_point_nothing_is_changed(house: House) -> None:
    moved = house.replace_by_link(house.folder / tag_name(A))
    before = seen(moved)
    for asked in (
        lambda: house.storage.retag(A, "forged"),
        lambda: house.storage.delete(A),
        lambda: house.storage.snapshot([house.volume], A, "tag"),
    ):
        with pytest.raises(StorageError, match=f"{tag_name(A)} is a symbolic link") as raised:
            house.do(asked())
        assert raised.value.hint
        assert not raised.value.retryable
    assert seen(moved) == before


def test_a_link_to_nothing_is_neither_a_new_point_nor_no_point(house: House) -> None:
    (house.folder / tag_name(B)).symlink_to(house.root / "not-there")
    for asked in (lambda: house.storage.snapshot([house.volume], B, "tag"), lambda: house.storage.delete(B)):
        with pytest.raises(StorageError, match="is a symbolic link"):
            house.do(asked())
    assert not (house.root / "not-there").exists()


@pytest.mark.parametrize("level", ["clones", "clones/one"])
def test_behind_a_link_in_the_place_of_a_clone_nothing_is_made_or_removed(level: str, house: House) -> None:
    moved = house.replace_by_link(house.folder / level)
    before = seen(moved)
    with pytest.raises(StorageError, match="is a symbolic link"):
        house.do(house.storage.drop_clone("one"))
    if level == "clones":
        with pytest.raises(StorageError, match="is a symbolic link"):
            house.do(house.storage.clone(A, "two", lambda *_: None))
    assert seen(moved) == before


def test_behind_a_link_in_the_place_of_a_clone_that_is_being_dropped_nothing_is_removed(house: House) -> None:
    moved = house.replace_by_link(house.folder / "clones" / "one")
    (house.folder / "clones" / "one").rename(house.folder / "clones" / ".one.dropped")
    before = seen(moved)
    with pytest.raises(StorageError, match="is a symbolic link"):
        house.do(house.storage.drop_clone("one"))
    assert seen(moved) == before


@pytest.mark.parametrize("name", ["point.json", "point.new"])
def test_a_sidecar_that_is_a_link_is_replaced_and_what_it_leads_to_stays_as_it_is(name: str, house: House) -> None:
    victim, sidecar = house.root / "victim", house.folder / tag_name(A) / name
    shutil.copy(house.folder / tag_name(A) / "point.json", victim)
    before = victim.read_bytes()
    sidecar.unlink(missing_ok=True)
    sidecar.symlink_to(victim)
    (found,) = house.do(house.storage.tagged())
    if name == "point.json":
        assert (found.tag, found.complete) == (None, False), "it is read as if it were ours"
    else:
        house.do(house.storage.retag(A, "another"))
        (found,) = house.do(house.storage.tagged())
        assert (found.tag, found.complete) == ("another", True)
    assert victim.read_bytes() == before


@pytest.mark.root
@pytest.mark.parametrize("level", ["storage", "."])
@pytest.mark.parametrize("spoil", [lambda path: os.chown(path, NOBODY, NOBODY), lambda path: path.chmod(0o777)])
def test_where_others_decide_what_the_folder_is_nothing_is_claimed_made_or_removed(
    spoil: Callable[[Path], None], level: str, house: House
) -> None:
    spoil(house.root / level)
    before = seen(house.folder)
    for asked in (
        house.storage.claim,
        lambda: house.storage.snapshot([house.volume], B, "tag"),
        lambda: house.storage.retag(A, "another"),
        lambda: house.storage.delete(A),
        lambda: house.storage.clone(A, "two", lambda *_: None),
        lambda: house.storage.drop_clone("one"),
    ):
        with pytest.raises(StorageError, match=r"belongs to user 65534|can be written by others") as raised:
            house.do(asked())
        assert raised.value.hint
    assert seen(house.folder) == before
    refused = [f for f in house.do(house.storage.check([house.volume])) if f.severity is Severity.REFUSED]
    assert len(refused) == 1
    assert refused[0].remedy


@pytest.mark.root
def test_the_owner_of_the_data_cannot_reach_into_a_point_and_can_into_a_clone(house: House) -> None:
    assert (house.folder / tag_name(A)).stat().st_mode & 0o777 == 0o700
    for folder in (house.folder, house.folder / "clones", house.folder / "clones" / "one"):
        assert folder.stat().st_mode & 0o777 == 0o711


@pytest.mark.root
def test_points_of_earlier_versions_are_closed_when_the_storage_is_claimed(house: House) -> None:
    (house.folder / tag_name(A)).chmod(0o711)
    house.do(house.storage.claim())
    assert (house.folder / tag_name(A)).stat().st_mode & 0o777 == 0o700
    house.do(house.storage.close())


def test_a_strict_umask_keeps_no_clone_from_the_owner_of_the_data(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = House(tmp_path, DirectoryStorage)
    finally:
        os.umask(before)
    assert (made.folder / "clones" / "one").stat().st_mode & 0o777 == 0o711
    assert (made.folder).stat().st_mode & 0o777 == 0o711


@pytest.mark.volume
@pytest.mark.root
def test_a_clone_whose_subvolume_became_a_link_is_dropped_and_the_subvolume_behind_it_stays() -> None:
    with loop_volume("btrfs", 256) as mount:
        house = House(mount, BtrfsStorage)
        inside = house.folder / "clones" / "one" / "data"
        create_snapshot(inside, mount / "kept", read_only=False)
        run("btrfs", "subvolume", "delete", inside)
        inside.symlink_to(mount / "kept")
        house.do(house.storage.drop_clone("one"))
        assert is_subvolume(mount / "kept")
        assert (mount / "kept" / "file").read_text() == "content"


def test_a_folder_that_becomes_a_link_while_the_tree_is_copied_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the data swaps it in the moment between the look at an entry and the way into it."""
    source, secrets = tmp_path / "data", tmp_path / "secrets"
    for folder in (source / "base", secrets):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    opened = copying._opened

    def swapped(name: str | Path, *more: Any) -> int:
        if name == "base" and not (source / "base").is_symlink():
            (source / "base").rename(tmp_path / "away")
            (source / "base").symlink_to(secrets)
        return opened(name, *more)

    monkeypatch.setattr(copying, "_opened", swapped)
    Copier().copy(source, tmp_path / "copy")
    assert (source / "base").is_symlink(), "the swap did not happen"
    assert not list((tmp_path / "copy").rglob("file"))


def test_no_file_is_shared_from_behind_a_link_in_an_earlier_copy(tmp_path: Path) -> None:
    source, earlier, secrets = tmp_path / "data", tmp_path / "earlier", tmp_path / "secrets"
    for folder in (source / "base", earlier, secrets):
        folder.mkdir(parents=True)
    (source / "base" / "file").write_text("content")
    (secrets / "file").write_text("secret!")
    (earlier / "base").symlink_to(secrets)
    before = (source / "base" / "file").stat()
    like = Seen(before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev)
    known = Manifest(EPOCH.replace(year=2200), {"base/file": like})
    Copier(earlier=earlier, known=known, stop=threading.Event()).copy(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "base" / "file").read_text() == "content"
    assert (secrets / "file").stat().st_nlink == 1
