from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from connectors.storage.copying import Copier, Manifest, Seen, can_reflink
from connectors.storage.directory import DirectoryStorage
from tests.fixtures.volumes import loop_volume
from trigger.errors import StorageError
from trigger.model import EPOCH, Severity, Snapshot, Volume
from trigger.point_names import point_id, tag_name
from trigger.ports import Capability

POINTS = [point_id(EPOCH, number) for number in range(10)]
LONG_AGO = 1_600_000_000_000_000_000


class House:
    """A volume, and a storage for it."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root, self.source = root, root / "data"
        self.source.mkdir()
        self.volume = Volume("data", str(self.source))
        self.storage = DirectoryStorage(root / "storage", **({"wanted_free_bytes": 0} | options))

    def cut(self, number: int) -> Snapshot:
        (made,) = asyncio.run(self.storage.snapshot([self.volume], POINTS[number], "tag"))
        return made

    def kept(self, number: int, name: str) -> Path:
        return self.root / "storage" / tag_name(POINTS[number]) / "data" / name


def age(manifest_of: Path) -> None:
    """Let a snapshot have begun an hour later than it did, so that the files in it count as long untouched."""
    manifest = Manifest.read(manifest_of)
    assert manifest is not None
    Manifest(manifest.began_at + timedelta(hours=1), manifest.files).write(manifest_of)


SEEN = Seen(8192, LONG_AGO, LONG_AGO, 7, 1)
BEGAN = datetime.fromtimestamp(LONG_AGO / 1e9, UTC) + timedelta(seconds=2.001)


def test_a_file_untouched_since_well_before_the_last_snapshot_is_unchanged() -> None:
    assert Manifest(BEGAN, {"a": SEEN}).holds_unchanged("a", SEEN)


@pytest.mark.parametrize("field", Seen._fields)
def test_a_file_that_differs_in_anything_counts_as_changed(field: str) -> None:
    known = SEEN._replace(**{field: getattr(SEEN, field) - 1})
    assert not Manifest(BEGAN, {"a": known}).holds_unchanged("a", SEEN)


@pytest.mark.parametrize("field", ["modified_ns", "changed_ns"])
def test_a_file_touched_near_or_after_the_last_snapshot_counts_as_changed(field: str) -> None:
    for later in (2_000_000, 1_000_000_000, 3_600_000_000_000):
        seen = SEEN._replace(**{field: LONG_AGO + later})
        assert not Manifest(BEGAN, {"a": seen}).holds_unchanged("a", seen)


def test_a_file_that_was_not_there_counts_as_changed() -> None:
    assert not Manifest(BEGAN, {"b": SEEN}).holds_unchanged("a", SEEN)


def test_only_what_changed_is_copied_and_the_rest_is_shared(tmp_path: Path) -> None:
    house = House(tmp_path)
    for name in ("still", "moving"):
        (house.source / name).write_bytes(os.urandom(100_000))
    assert house.cut(0).bytes_copied == 200_000
    assert house.cut(1).bytes_copied == 200_000, "files touched a moment ago are not trusted"
    age(house.kept(1, "still").parents[1] / "data.manifest")
    (house.source / "moving").write_bytes(os.urandom(100_000))
    made = house.cut(2)
    assert made.bytes_copied == 100_000
    assert house.kept(2, "still").samefile(house.kept(1, "still"))
    assert not house.kept(2, "moving").samefile(house.kept(1, "moving"))
    for name in ("still", "moving"):
        assert house.kept(2, name).read_bytes() == (house.source / name).read_bytes()


def test_each_snapshot_is_complete_when_all_others_are_deleted(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.source / "file").write_text("content")
    for number in range(4):
        house.cut(number)
        age(tmp_path / "storage" / tag_name(POINTS[number]) / "data.manifest")
    assert house.kept(3, "file").stat().st_nlink == 4
    for number in range(3):
        asyncio.run(house.storage.delete(POINTS[number]))
    assert house.kept(3, "file").read_text() == "content"
    assert house.kept(3, "file").stat().st_nlink == 1


def test_a_damaged_or_missing_manifest_means_that_all_is_copied(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.source / "file").write_bytes(bytes(range(100)))
    for number, damage in enumerate(["", "{", '"2026-01-01"\n[1]\n', None]):
        house.cut(number)
        manifest = tmp_path / "storage" / tag_name(POINTS[number]) / "data.manifest"
        age(manifest)
        if damage is None:
            manifest.unlink()
        else:
            manifest.write_text(damage)
    assert house.cut(9).bytes_copied == 100


def test_paranoid_sees_a_change_that_time_stamps_do_not_show(tmp_path: Path) -> None:
    results = []
    for paranoid in (False, True):
        root = tmp_path / str(paranoid)
        root.mkdir()
        house = House(root, paranoid=paranoid)
        (house.source / "file").write_text("one")
        house.cut(0)
        manifest_path = root / "storage" / tag_name(POINTS[0]) / "data.manifest"
        (house.source / "file").write_text("two")
        seen = (house.source / "file").stat()
        lie = Seen(seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev)
        Manifest(datetime.now(UTC) + timedelta(hours=1), {"file": lie}).write(manifest_path)
        house.cut(1)
        results.append(house.kept(1, "file").read_text())
    assert results == ["one", "two"]


def test_sockets_and_pipes_are_left_out(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.source / "file").write_text("content")
    os.mkfifo(house.source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(house.source / "socket"))
        house.cut(0)
    assert [path.name for path in house.kept(0, "file").parent.iterdir()] == ["file"]


def test_what_is_excluded_is_left_out_by_name_or_by_path(tmp_path: Path) -> None:
    house = House(tmp_path, exclude={"data": ["postmaster.*", "pgsql_tmp*", "pg_wal/*"], "other": ["base"]})
    for name in ("postmaster.pid", "base/1/pgsql_tmp", "base/1/2", "pg_wal/000", "base/pg_wal/000"):
        (house.source / name).parent.mkdir(parents=True, exist_ok=True)
        (house.source / name).write_text("content")
    house.cut(0)
    root = house.kept(0, "")
    found = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert found == {"base", "base/1", "base/1/2", "base/pg_wal", "base/pg_wal/000", "pg_wal"}


def test_a_storage_inside_its_volume_is_refused_unless_it_leaves_itself_out(tmp_path: Path) -> None:
    source = tmp_path / "data"
    (source / "inner").mkdir(parents=True)
    (source / "file").write_text("content")
    volume = Volume("data", str(source))
    inside = DirectoryStorage(source / "inner" / "storage", wanted_free_bytes=0)
    (finding,) = asyncio.run(inside.check([volume]))
    assert finding.severity is Severity.REFUSED
    assert "lies inside" in finding.message
    with pytest.raises(StorageError, match="lies inside"):
        asyncio.run(inside.snapshot([volume], POINTS[0], "tag"))
    for pattern in ("inner", "inner/storage", "sto*"):
        apart = DirectoryStorage(source / "inner" / "storage", wanted_free_bytes=0, exclude={"data": [pattern]})
        (finding,) = asyncio.run(apart.check([volume]))
        assert finding.severity is Severity.OK
        point = POINTS[len(pattern)] if len(pattern) < 10 else POINTS[0]
        (made,) = asyncio.run(apart.snapshot([volume], point, "tag"))
        assert (Path(made.location) / "file").read_text() == "content"
        assert not (Path(made.location) / "inner" / "storage").exists()


def test_files_that_vanish_shrink_and_grow_meanwhile_are_normal(tmp_path: Path) -> None:
    house = House(tmp_path)
    stop = threading.Event()

    def stir() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            folder = house.source / f"folder-{number % 7}"
            folder.mkdir(exist_ok=True)
            path = folder / f"file-{number % 50}"
            path.write_bytes(b"x" * (number * 7919 % 300_000))
            os.truncate(path, number % 1000)
            if number % 3 == 0:
                path.unlink()
            if number % 5 == 0:
                for found in folder.iterdir():
                    found.unlink()
                folder.rmdir()

    (house.source / "still").write_text("still")
    writer = threading.Thread(target=stir)
    writer.start()
    try:
        for number in range(9):
            house.cut(number)
    finally:
        stop.set()
        writer.join()
    for number in range(9):
        assert house.kept(number, "still").read_text() == "still"


@pytest.mark.parametrize("left", [0, 4096, 150_000])
@pytest.mark.parametrize("before", ["SEEK_DATA", "SEEK_HOLE", "sendfile"])
def test_a_file_that_is_cut_at_any_moment_of_its_copy_fails_no_snapshot(
    before: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path)
    content = os.urandom(200_000)
    (house.source / "cut").write_bytes(content)
    (house.source / "other").write_bytes(content)
    seek, send = os.lseek, os.sendfile
    cuts: list[str] = []

    def cut(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == house.source / "cut" and not cuts:
            cuts.append(before)
            os.truncate(house.source / "cut", left)

    def seeking(descriptor: int, place: int, how: int) -> int:
        if before != "sendfile" and how == getattr(os, before):
            cut(descriptor)
        return seek(descriptor, place, how)

    def sending(copy: int, source: int, *more: Any) -> int:
        if before == "sendfile":
            cut(source)
        return send(copy, source, *more)

    monkeypatch.setattr(Copier, "_reflink", lambda *_: False)
    monkeypatch.setattr(os, "lseek", seeking)
    monkeypatch.setattr(os, "sendfile", sending)
    house.cut(0)
    assert cuts == [before]
    copied = house.kept(0, "cut").read_bytes()
    assert len(copied) <= 200_000
    assert copied[:left] == content[:left]
    assert house.kept(0, "other").read_bytes() == content


def test_a_folder_that_is_removed_at_any_moment_of_its_copy_fails_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by DROP DATABASE; there are more files than one call to the kernel lists."""
    house = House(tmp_path)
    for folder in ("dropped", "other"):
        (house.source / folder).mkdir()
        for number in range(3000):
            (house.source / folder / f"{number}").touch()
    entry_of, seen = Copier._entry, list[str]()

    def dropping(copier: Copier, entry: os.DirEntry[str], place: Any, name: str) -> None:
        entry_of(copier, entry, place, name)
        if name.startswith("dropped/") and not seen:
            seen.append(name)
            shutil.rmtree(house.source / "dropped")

    monkeypatch.setattr(Copier, "_entry", dropping)
    house.cut(0)
    assert seen
    assert len(list(house.kept(0, "other").iterdir())) == 3000


def test_a_name_that_a_folder_lists_twice_fails_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some filesystems do where a file is replaced by a rename while the folder is listed (readdir(3p))."""
    house = House(tmp_path)
    for name in ("pg_filenode.map", "1247"):
        (house.source / name).write_text("content")
    scandir = os.scandir

    @contextlib.contextmanager
    def twice(folder: int) -> Iterator[Any]:
        with scandir(folder) as entries:
            listed = list(entries)
            yield iter(listed + listed)

    monkeypatch.setattr(os, "scandir", twice)
    house.cut(0)
    monkeypatch.undo()
    assert sorted(path.name for path in house.kept(0, "").iterdir()) == ["1247", "pg_filenode.map"]


def test_a_cancelled_snapshot_stops_soon_and_leaves_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    for number in range(300):
        (house.source / f"file-{number}").write_bytes(b"x" * 100_000)

    async def cancel() -> None:
        task = asyncio.create_task(house.storage.snapshot([house.volume], POINTS[0], "tag"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await house.storage.delete(POINTS[0])
        assert await house.storage.tagged() == []
        await asyncio.sleep(0.2)
        assert not any(thread.name == "directory" for thread in threading.enumerate())

    asyncio.run(cancel())
    assert not (tmp_path / "storage" / tag_name(POINTS[0])).exists()


def test_a_clone_tells_its_progress_and_is_refused_without_room(tmp_path: Path) -> None:
    house = House(tmp_path)
    for number in range(5):
        (house.source / f"file-{number}").write_bytes(b"x" * 50_000)
    house.cut(0)
    told: list[tuple[str, int, int]] = []

    async def clone() -> None:
        await house.storage.clone(POINTS[0], "copy", lambda *step: told.append(step))
        await asyncio.sleep(0)

    asyncio.run(clone())
    assert told[-1] == ("clone", 250_000, 250_000)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    greedy = DirectoryStorage(tmp_path / "storage", wanted_free_bytes=1 << 60)
    with pytest.raises(StorageError, match="are wanted"):
        asyncio.run(greedy.clone(POINTS[0], "other", lambda *_: None))
    assert [found.name for found in asyncio.run(greedy.clones())] == ["copy"]


def test_a_clone_is_there_with_its_identity_or_not_at_all(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.cut(0)
    clones = tmp_path / "storage" / "clones"

    def clone() -> None:
        asyncio.run(house.storage.clone(POINTS[0], "copy", lambda *_: None, identity="ours"))

    for name in ("connectors.storage.sealed.write_new", "pathlib.Path.rename"):
        with patch(name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            clone()  # as if killed there
        assert asyncio.run(house.storage.clones()) == []
        assert [left.name for left in clones.iterdir()] == [".copy"]
    clone()
    assert [found.identity for found in asyncio.run(house.storage.clones())] == ["ours"]
    with patch("pathlib.Path.rename", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        clone()
    asyncio.run(house.storage.drop_clone("copy"))
    assert not list(clones.iterdir())


@pytest.mark.volume
def test_nothing_is_copied_that_would_leave_too_little_free(tmp_path: Path) -> None:
    with loop_volume("ext4", 128) as mount:
        house = House(tmp_path)
        (house.source / "large").write_bytes(b"x" * (40 << 20))
        room = os.statvfs(mount)
        free = room.f_bavail * room.f_frsize
        house.storage = DirectoryStorage(mount / "storage", wanted_free_bytes=free - (20 << 20))
        with pytest.raises(StorageError, match="are wanted") as raised:
            house.cut(0)
        assert raised.value.retryable
        assert not (mount / "storage" / tag_name(POINTS[0])).exists()
        space = asyncio.run(house.storage.space())
        assert space.needed_bytes > 20 << 20
        assert space.short, "what was copied is removed again, so that it looks as if there were room"
        (house.source / "large").write_bytes(b"x" * (10 << 20))
        house.cut(0)
        assert not asyncio.run(house.storage.space()).short


@pytest.mark.volume
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_full_disk_is_an_error_and_never_a_point(kind: str, tmp_path: Path) -> None:
    megabytes = 320 if kind == "xfs" else 128
    with loop_volume(kind, megabytes) as mount:
        house = House(tmp_path)
        (house.source / "large").write_bytes(b"x" * (megabytes << 20))
        house.storage = DirectoryStorage(mount / "storage", wanted_free_bytes=0)
        with pytest.raises(StorageError), patch("connectors.storage.shelf.Shelf.require_free"):
            house.cut(0)
        assert [found for found in asyncio.run(house.storage.tagged()) if found.complete] == []
        assert asyncio.run(house.storage.space()).short, "there is room again, but not enough"
        (house.source / "large").unlink()
        (house.source / "small").write_text("content")
        asyncio.run(house.storage.delete(POINTS[0]))
        os.sync()  # only then has btrfs the room again
        house.cut(0)
        (found,) = asyncio.run(house.storage.tagged())
        assert found.complete


@pytest.mark.volume
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_the_filesystem_can_changed_files_share_their_blocks(kind: str) -> None:
    with loop_volume(kind, 512) as mount:
        assert can_reflink(mount)
        house = House(mount)
        assert house.storage.capabilities == {Capability.INSTANT_CLONE}
        (house.source / "large").write_bytes(os.urandom(100 << 20))
        os.sync()
        before = os.statvfs(mount).f_bfree * os.statvfs(mount).f_frsize
        assert [house.cut(number).bytes_copied for number in range(5)] == [0] * 5
        asyncio.run(house.storage.clone(POINTS[0], "copy", lambda *_: None))
        os.sync()
        assert before - os.statvfs(mount).f_bfree * os.statvfs(mount).f_frsize < 30 << 20
        (finding,) = asyncio.run(house.storage.check([house.volume]))
        assert "share their blocks" in finding.message


@pytest.mark.volume
def test_where_the_filesystem_cannot_reflink_the_storage_says_so() -> None:
    with loop_volume("ext4", 64) as mount:
        assert not can_reflink(mount)
        house = House(mount)
        assert house.storage.capabilities == frozenset()
        (finding,) = asyncio.run(house.storage.check([house.volume]))
        assert "are copied" in finding.message


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from unittest.mock import patch
from connectors.storage import directory
from connectors.storage.directory import DirectoryStorage
from trigger.model import Volume
step, root, point = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
storage = DirectoryStorage(Path(root) / "storage", wanted_free_bytes=0)
with patch(step, kill):
    asyncio.run(storage.snapshot([Volume("data", root + "/data"), Volume("wal", root + "/data")], point, "tag"))
"""


@pytest.mark.parametrize(
    "step",
    [
        "connectors.storage.directory.flush",
        "connectors.storage.directory.Manifest.write",
        "connectors.storage.copying.Copier._bytes",
        "connectors.storage.directory.syncfs",
        "connectors.storage.sealed.write_new",
        "connectors.storage.shelf.Path.replace",
    ],
)
def test_killed_at_any_step_a_snapshot_is_unfinished_and_can_be_deleted(step: str, tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.source / "file").write_text("content")
    house.cut(0)
    done = subprocess.run([sys.executable, "-c", KILLED, step, str(tmp_path), POINTS[1]], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    whole, unfinished = asyncio.run(house.storage.tagged())
    assert (whole.point, whole.complete) == (POINTS[0], True)
    assert (unfinished.point, unfinished.complete) == (POINTS[1], False)
    with pytest.raises(StorageError, match="unfinished"):
        house.cut(1)
    asyncio.run(house.storage.delete(POINTS[1]))
    assert house.cut(1).volume == "data"


def test_a_file_that_may_not_be_read_fails_the_snapshot_and_is_named(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.source / "secret").write_text("content")
    denied = PermissionError(13, "Permission denied", str(house.source / "secret"))
    with patch.object(Copier, "_entry", side_effect=denied), pytest.raises(StorageError) as raised:
        house.cut(0)
    assert str(house.source / "secret") in raised.value.message
    assert not raised.value.retryable
    assert not (tmp_path / "storage" / tag_name(POINTS[0])).exists()


def test_a_folder_that_goes_away_is_an_error_and_is_not_made_anew(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.cut(0)
    asyncio.run(house.storage.tagged())
    (tmp_path / "storage").rename(tmp_path / "unmounted")
    for call in (
        house.storage.tagged,
        house.storage.space,
        lambda: house.storage.snapshot([house.volume], POINTS[1], ""),
    ):
        with pytest.raises(StorageError, match="is gone"):
            asyncio.run(call())
    assert not (tmp_path / "storage").exists()
    (tmp_path / "unmounted").rename(tmp_path / "storage")
    assert [found.complete for found in asyncio.run(house.storage.tagged())] == [True]
