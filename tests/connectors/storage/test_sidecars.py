"""A sidecar that rots costs no point: what lies beside it is still found, and no other point is held up by it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from connectors.storage import sealed
from connectors.storage.directory import DirectoryStorage
from tests.fixtures.volumes import flip_bit
from trigger.errors import StorageError
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id, tag_name
from trigger.ports import Tagged
from trigger.trusted import open_file

A, B = (point_id(EPOCH, number) for number in (1, 2))


class House:
    """A storage with two points of two volumes."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "storage"
        for name in ("data", "wal"):
            (root / name / "deep").mkdir(parents=True)
            (root / name / "deep" / "file").write_text(name)
        self.volumes = [Volume(name, str(root / name)) for name in ("data", "wal")]
        self.storage = DirectoryStorage(self.folder, wanted_free_bytes=0)
        for point in (A, B):
            asyncio.run(self.storage.snapshot(self.volumes, point, f"tag of {point}"))

    @property
    def sidecar(self) -> Path:
        return self.folder / tag_name(A) / "point.json"

    def found(self) -> list[Tagged]:
        return asyncio.run(self.storage.tagged())


def flipped(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("rot", [flipped, no_text, nested, empty, gone])
def test_whatever_rots_in_a_sidecar_its_snapshots_are_shown_and_get_a_new_one(
    rot: Callable[[Path], None], tmp_path: Path
) -> None:
    house = House(tmp_path)
    rot(house.sidecar)
    damaged, whole = house.found()
    assert (damaged.tag, damaged.complete) == (None, False)
    assert [kept.volume for kept in damaged.snapshots] == ["data", "wal"]
    assert (whole.tag, whole.complete) == (f"tag of {B}", True)
    asyncio.run(house.storage.retag(A, "anew"))
    mended, _ = house.found()
    assert (mended.tag, mended.complete, len(mended.snapshots)) == ("anew", True, 2)


def test_a_sidecar_that_cannot_be_read_keeps_no_other_point_from_being_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path)
    opened = open_file

    def on_a_bad_sector(path: Path, *more: Any, **options: Any) -> int:
        if path == house.sidecar:
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr(sealed, "open_file", on_a_bad_sector)
    damaged, whole = house.found()
    assert (damaged.tag, len(damaged.snapshots)) == (None, 2)
    assert (whole.tag, whole.complete) == (f"tag of {B}", True)


def test_a_folder_in_the_place_of_a_sidecar_harms_no_other_point_and_is_not_removed(tmp_path: Path) -> None:
    house = House(tmp_path)
    a_folder(house.sidecar)
    assert [found.complete for found in house.found()] == [False, True]
    with pytest.raises(StorageError, match="Is a directory"):
        asyncio.run(house.storage.retag(A, "anew"))
    assert [found.complete for found in house.found()] == [False, True]


@pytest.mark.parametrize("left", ["data/deep/file", "data/deep", "data", "data.manifest"])
def test_without_its_sidecar_a_copy_that_lacks_anything_is_not_taken_for_whole(left: str, tmp_path: Path) -> None:
    """As where a removal was cut short, which begins with the sidecar."""
    house = House(tmp_path)
    house.sidecar.unlink()
    lost = house.folder / tag_name(A) / left
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    damaged, _ = house.found()
    assert [kept.volume for kept in damaged.snapshots] == ["wal"]


def test_where_neither_sidecar_nor_list_can_be_read_nothing_is_shown_and_the_error_says_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, read_text = House(tmp_path), Path.read_text
    house.sidecar.unlink()

    def on_a_bad_sector(path: Path, *more: Any, **options: Any) -> str:
        if path.parent == house.sidecar.parent:
            raise OSError(5, "Input/output error", str(path))
        return read_text(path, *more, **options)

    monkeypatch.setattr(Path, "read_text", on_a_bad_sector)
    with pytest.raises(StorageError, match=r"Input/output error \(.*data\.manifest\)") as raised:
        house.found()
    assert "kernel's log" in raised.value.hint


def test_a_point_that_cannot_be_read_keeps_no_new_one_from_being_made(tmp_path: Path) -> None:
    house, new = House(tmp_path), point_id(EPOCH, 3)
    newest = house.folder / tag_name(B)
    for name in ("data.manifest", "wal.manifest"):
        a_folder(newest / name)
    asyncio.run(house.storage.snapshot(house.volumes, new, "tag"))
    a_folder(newest / "point.json")
    asyncio.run(house.storage.snapshot(house.volumes, point_id(EPOCH, 4), "tag"))
