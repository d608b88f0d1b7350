"""A storage in a folder is claimed where it lies, never beneath the mount point of what is not mounted yet."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.storage import shelf as shelf_module
from connectors.storage.btrfs import BtrfsStorage
from connectors.storage.directory import DirectoryStorage
from connectors.storage.shelf import Shelf
from tests.fixtures.volumes import loop_volume
from trigger.errors import StorageError
from trigger.lock import lock
from trigger.model import EPOCH, Severity, Volume
from trigger.point_names import point_id, tag_name

A, B = (point_id(EPOCH, number) for number in (1, 2))
ANOTHER = "another trigpoint makes points in"


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    (tmp_path / "data").mkdir()
    return Volume("data", str(tmp_path / "data"))


def storage_in(folder: Path) -> DirectoryStorage:
    return DirectoryStorage(folder, wanted_free_bytes=0)


def shelf_in(folder: Path, budget: int = 9) -> Shelf:
    return Shelf(folder, budget=budget, wanted_free_bytes=0)


def remount(mount: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", mount], check=True, timeout=30)


@contextlib.contextmanager
def not_mounted(mount: Path) -> Iterator[None]:
    subprocess.run(["umount", "--lazy", mount], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "loop", mount.with_name("image"), mount], check=True, timeout=30)


def test_a_claim_makes_no_folder_and_the_first_snapshot_makes_and_holds_it(tmp_path: Path, volume: Volume) -> None:
    folder = tmp_path / "mount" / "storage"
    first, second = storage_in(folder), storage_in(folder)

    async def main() -> None:
        await first.claim()
        await second.claim()
        assert not (tmp_path / "mount").exists()
        await first.snapshot([volume], A, "tag")
        for refused in (second.snapshot([volume], B, "tag"), second.claim()):
            with pytest.raises(StorageError, match=ANOTHER) as raised:
                await refused
            assert raised.value.hint
            assert not raised.value.retryable
        assert [found.point for found in await second.tagged()] == [A]
        await first.close()
        await second.snapshot([volume], B, "tag")
        await second.close()

    asyncio.run(main())


def test_what_is_mounted_after_the_claim_is_held_there_and_nothing_lies_beneath(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path / "mount" / "storage")
    shelf.claim()
    (tmp_path / "mount" / "storage").mkdir(parents=True)  # as by a mount
    with shelf.making():
        pass
    assert lock(tmp_path / "mount" / "storage" / "lock") is None
    shelf.close()


def test_nothing_is_left_in_an_empty_folder_where_a_filesystem_may_be_mounted_later(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    shelf = shelf_in(tmp_path / "storage")
    shelf.claim()
    assert list((tmp_path / "storage").iterdir()) == []
    with shelf.making():
        pass
    assert lock(tmp_path / "storage" / "lock") is None
    shelf.close()


def test_points_that_nobody_held_are_claimed_at_once(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    (tmp_path / tag_name(A)).mkdir()
    shelf.claim()
    assert lock(tmp_path / "lock") is None
    shelf.close()


def test_no_folder_is_made_for_a_claim_where_there_is_no_room_for_a_point(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path / "storage", budget=0)
    shelf.claim()
    with pytest.raises(StorageError, match="the budget is 0"), shelf.making():
        pass
    assert not (tmp_path / "storage").exists()


def test_a_storage_that_was_there_and_is_gone_is_not_made_anew_for_its_claim(tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    shelf = shelf_in(folder)
    shelf.claim()
    folder.mkdir()
    assert shelf.points() == []
    folder.rmdir()
    with pytest.raises(StorageError, match="is gone"), shelf.making():
        pass
    assert not folder.exists()


@pytest.mark.volume
def test_nothing_is_deleted_from_a_claimed_storage_while_it_is_not_mounted(volume: Volume) -> None:
    with loop_volume("ext4", 64) as mount:
        storage, another = storage_in(mount), storage_in(mount)

        async def main() -> None:
            await storage.claim()
            for point in (A, B):
                await storage.snapshot([volume], point, "tag")
            with not_mounted(mount):
                for call in (
                    partial(storage.delete, A),
                    storage.space,
                    partial(another.clone, A, "copy", lambda *_: None),
                ):
                    with pytest.raises(StorageError, match=f"kept in {mount} is gone; mount its filesystem again"):
                        await call()
                assert list(mount.iterdir()) == []
            await storage.delete(A)
            assert [found.point for found in await another.tagged()] == [B]
            await storage.close()

        asyncio.run(main())


def test_a_storage_stays_its_services_while_that_is_down_until_its_catalog_is_gone(
    tmp_path: Path, volume: Volume
) -> None:
    folder, ours, other = tmp_path / "storage", tmp_path / "ours.sqlite", tmp_path / "other.sqlite"
    (tmp_path / "alias").symlink_to(tmp_path)
    ours.touch()

    async def main() -> None:
        first, second = storage_in(folder), storage_in(folder)
        assert await second.claimed_by_another(str(other)) is None
        await first.claim(str(ours))
        await first.snapshot([volume], A, "tag")
        for _ in range(2):
            found = await second.claimed_by_another(str(other))
            assert found is not None
            assert found.message == f"{ANOTHER} {folder}: that of the catalog {ours}"
            with pytest.raises(StorageError, match=ANOTHER) as raised:
                await second.claim(str(other))
            assert (raised.value.hint, raised.value.retryable) == (found.remedy, False)
            await first.close()
        for same in (ours, tmp_path / "alias" / "ours.sqlite"):
            assert await second.claimed_by_another(str(same)) is None
        ours.unlink()
        assert await second.claimed_by_another(str(other)) is None
        await second.claim(str(other))
        other.touch()
        assert await first.claimed_by_another(str(ours)) is not None
        await second.close()

    asyncio.run(main())


@pytest.mark.parametrize("left", [b"", b"\0" * 4096, b"\xff/nowhere", b"/" + b"x" * 9000])
def test_what_a_claim_cut_short_left_claims_nothing(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "lock").write_bytes(left)
    shelf = shelf_in(tmp_path)
    assert shelf.claimed_by_another(str(tmp_path / "catalog")) is None
    shelf.claim(str(tmp_path / "catalog"))
    shelf.close()


def test_without_a_claim_none_is_taken_and_after_the_end_none_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "storage"
    unclaimed, ended = shelf_in(folder), shelf_in(folder)
    ended.claim()
    ended.close()
    for shelf in (unclaimed, ended):
        with shelf.making():
            assert not folder.exists()


def test_the_end_does_not_wait_for_a_claim_that_hangs_and_no_such_claim_is_held_later(tmp_path: Path) -> None:
    begun, mended = threading.Event(), threading.Event()
    shelf = shelf_in(tmp_path)
    (tmp_path / "lock").touch()

    def slow(path: Path) -> int | None:
        begun.set()
        assert mended.wait(10)
        return lock(path)

    with patch.object(shelf_module, "lock", slow):
        hanging = threading.Thread(target=shelf.claim)
        hanging.start()
        assert begun.wait(10)
        shelf.close()
        mended.set()
        hanging.join(10)
    other = shelf_in(tmp_path)
    other.claim()
    other.close()


@pytest.mark.volume
def test_a_read_only_storage_is_claimed_once_it_can_be_written(volume: Volume) -> None:
    with loop_volume("ext4", 64) as mount:
        first, second = storage_in(mount), storage_in(mount)

        async def main() -> None:
            (mount / "lock").touch()
            await asyncio.to_thread(remount, mount, "ro")
            for storage in (first, second):
                await storage.claim()
            with pytest.raises(StorageError, match="Read-only") as raised:
                await first.snapshot([volume], A, "tag")
            assert raised.value.retryable
            await asyncio.to_thread(remount, mount, "rw")
            await first.snapshot([volume], A, "tag")
            with pytest.raises(StorageError, match=ANOTHER):
                await second.snapshot([volume], B, "tag")
            assert [found.point for found in await second.tagged()] == [A]
            await first.close()
            await second.close()

        asyncio.run(main())


def _file(path: Path) -> Path:
    path.write_text("content")
    return path


def _below_a_file(path: Path) -> Path:
    return _file(path) / "storage"


def _dangling(path: Path) -> Path:
    path.symlink_to("not-mounted/storage")
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("driver", [DirectoryStorage, BtrfsStorage])
@pytest.mark.parametrize("make", [_file, _below_a_file, _dangling, _loop])
def test_what_can_be_no_folder_is_refused_with_a_remedy(
    make: Callable[[Path], Path], driver: type[DirectoryStorage | BtrfsStorage], tmp_path: Path, volume: Volume
) -> None:
    storage = driver(make(tmp_path / "in-the-way"), wanted_free_bytes=0)
    message = f"{tmp_path / 'in-the-way'} is not a directory"

    async def main() -> None:
        (refused,) = [found for found in await storage.check([volume]) if found.severity is Severity.REFUSED]
        assert refused.message == message
        assert refused.remedy
        with pytest.raises(StorageError) as raised:
            await storage.claim()
        assert (raised.value.message, raised.value.retryable) == (message, False)
        assert raised.value.hint

    before = sorted(tmp_path.rglob("*"))
    asyncio.run(main())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path, volume: Volume) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    storage = storage_in(tmp_path / "link")
    asyncio.run(storage.claim())
    asyncio.run(storage.snapshot([volume], A, "tag"))
    assert lock(target / "lock") is None
    assert all(found.severity is Severity.OK for found in asyncio.run(storage.check([volume])))
    asyncio.run(storage.close())
