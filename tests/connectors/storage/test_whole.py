"""What is copied out of a snapshot is held against the list of its files, and the point looked at again behind it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.storage.copying import Copier, Manifest
from connectors.storage.directory import DirectoryStorage
from tests.connectors.storage.test_directory import POINTS, House
from tests.fixtures.volumes import loop_volume
from trigger.errors import StorageError
from trigger.point_names import tag_name

FILES = [f"file-{number}" for number in range(5)]


def house(root: Path) -> House:
    """Give one with a snapshot of five files in a folder, and a link."""
    made = House(root)
    (made.source / "folder").mkdir()
    for name in FILES:
        (made.source / "folder" / name).write_text("content")
    (made.source / "link").symlink_to("folder")
    made.cut(0)
    return made


def clone(storage: DirectoryStorage) -> None:
    asyncio.run(storage.clone(POINTS[0], "copy", lambda *_: None))


def _removed(storage: DirectoryStorage) -> None:
    asyncio.run(storage.delete(POINTS[0]))


def _begun(storage: DirectoryStorage) -> None:
    storage._shelf.forget(POINTS[0])


@pytest.mark.parametrize("removal", [_removed, _begun])
@pytest.mark.parametrize("behind", [0, 4])
def test_a_point_that_another_process_removes_while_it_is_copied_gives_no_clone(
    removal: Callable[[DirectoryStorage], None], behind: int, tmp_path: Path
) -> None:
    storage, copied = house(tmp_path).storage, 0
    another = DirectoryStorage(tmp_path / "storage", wanted_free_bytes=0)
    real = Copier._file

    def file(self: Copier, source: int, place: object, last: str) -> None:
        nonlocal copied
        real(self, source, place, last)  # type: ignore[arg-type]
        if copied == behind:
            removal(another)
        copied += 1

    with patch.object(Copier, "_file", file), pytest.raises(StorageError, match="went") as refused:
        clone(storage)
    assert POINTS[0] in refused.value.message
    assert refused.value.retryable
    assert asyncio.run(storage.clones()) == []


def _gone(kept: Path) -> str:
    (kept / "folder" / FILES[3]).unlink()
    return FILES[3]


def _cut_short(kept: Path) -> str:
    (kept / "folder" / FILES[2]).write_text("con")
    return FILES[2]


def _without_a_link(kept: Path) -> str:
    (kept / "link").unlink()
    return "link"


def _without_a_folder(kept: Path) -> str:
    for name in FILES:
        (kept / "folder" / name).unlink()
    (kept / "folder").rmdir()
    return "folder/file-"


def _without_its_list(kept: Path) -> str:
    kept.parent.joinpath("data.manifest").unlink()
    return "data.manifest"


@pytest.mark.parametrize("loss", [_gone, _cut_short, _without_a_link, _without_a_folder, _without_its_list])
def test_a_snapshot_that_is_not_whole_any_more_says_so_and_gives_no_clone(
    loss: Callable[[Path], str], tmp_path: Path
) -> None:
    made = house(tmp_path)
    assert asyncio.run(made.storage.lack(POINTS[0])) == ""
    lost = loss(made.kept(0, ""))
    assert lost in asyncio.run(made.storage.lack(POINTS[0]))
    with pytest.raises(StorageError, match=lost) as refused:
        clone(made.storage)
    assert "trigpoint reconcile" in refused.value.hint
    assert asyncio.run(made.storage.clones()) == []


def require_whole_when_it_changes(root: Path, bytes_now: int) -> None:
    """A file that had 5,000 bytes and has `bytes_now` when it is copied is in a whole snapshot, and in the clone."""
    made = House(root)
    (made.source / "file").write_bytes(b"x" * 5_000)

    def share(self: Copier, source: int, copy: int) -> bool:
        """As where blocks are shared: what is there at that instant."""
        os.truncate(made.source / "file", bytes_now)
        os.sendfile(copy, source, 0, 10_000)
        return True

    with patch.object(Copier, "_reflink", share):
        made.cut(0)
    assert made.kept(0, "file").stat().st_size == bytes_now
    assert asyncio.run(made.storage.lack(POINTS[0])) == ""
    clone(made.storage)
    copy = root / "storage" / "clones" / "copy" / "data" / "file"
    assert copy.read_bytes() == made.kept(0, "file").read_bytes()


@pytest.mark.parametrize("bytes_now", [0, 3, 9_000])
def test_a_file_that_the_database_cut_short_or_extended_while_it_was_copied_is_whole(
    bytes_now: int, tmp_path: Path
) -> None:
    require_whole_when_it_changes(tmp_path, bytes_now)


@pytest.mark.volume
@pytest.mark.parametrize("bytes_now", [0, 3, 9_000])
def test_such_a_file_is_whole_on_a_filesystem_that_keeps_whole_seconds(bytes_now: int, tmp_path: Path) -> None:
    with loop_volume("ext4", 16, "loop", "-I", "128") as volume:
        (tmp_path / "storage").symlink_to(volume)
        require_whole_when_it_changes(tmp_path, bytes_now)


@pytest.mark.volume
def test_what_is_lost_of_a_copy_that_was_cut_short_is_said_on_a_filesystem_that_keeps_whole_seconds(
    tmp_path: Path,
) -> None:
    with loop_volume("ext4", 16, "loop", "-I", "128") as volume:
        (tmp_path / "storage").symlink_to(volume)
        require_whole_when_it_changes(tmp_path, 3)
        storage = DirectoryStorage(tmp_path / "storage", wanted_free_bytes=0)
        kept = tmp_path / "storage" / tag_name(POINTS[0]) / "data" / "file"
        kept.write_text("xx")
        assert "file" in asyncio.run(storage.lack(POINTS[0]))


def test_a_list_that_names_sizes_of_before_the_copy_is_believed_by_the_time(tmp_path: Path) -> None:
    """So does that of an earlier version."""
    made = house(tmp_path)
    file = made.kept(0, f"folder/{FILES[0]}")
    beside = made.kept(0, "").with_name("data.manifest")
    listed = Manifest.read(beside)
    assert listed is not None
    seen = listed.files[f"folder/{FILES[0]}"]
    Manifest(listed.began_at, {**listed.files, f"folder/{FILES[0]}": seen._replace(size=5_000)}).write(beside)
    assert asyncio.run(made.storage.lack(POINTS[0])) == ""
    clone(made.storage)
    os.utime(file)
    assert FILES[0] in asyncio.run(made.storage.lack(POINTS[0]))


def test_what_vanishes_from_production_is_no_loss(tmp_path: Path) -> None:
    made = House(tmp_path)
    for name in FILES:
        (made.source / name).write_text("content")
    real = Copier._file

    def file(self: Copier, source: int, place: object, last: str) -> None:
        real(self, source, place, last)  # type: ignore[arg-type]
        for name in set(FILES) - {last}:
            (made.source / name).unlink(missing_ok=True)

    with patch.object(Copier, "_file", file):
        made.cut(0)
    assert asyncio.run(made.storage.lack(POINTS[0])) == ""
    clone(made.storage)
