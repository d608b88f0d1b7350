from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.storage import libbtrfsutil
from connectors.storage.btrfs import BtrfsStorage
from tests.conformance.storage_rigs import make_subvolume
from tests.fixtures.volumes import loop_volume
from trigger.errors import StorageError
from trigger.model import EPOCH, Finding, Severity, Volume
from trigger.point_names import point_id
from trigger.ports import Capability

pytestmark = pytest.mark.volume
POINTS = [point_id(EPOCH, number) for number in range(10)]


@pytest.fixture(scope="module")
def filesystem() -> Iterator[Path]:
    with loop_volume("btrfs", 1024) as mount:
        yield mount


@pytest.fixture
def root(filesystem: Path, request: pytest.FixtureRequest) -> Path:
    folder = filesystem / str(abs(hash(request.node.name)))
    folder.mkdir()
    return folder


@pytest.fixture
def volume(root: Path) -> Volume:
    make_subvolume(root / "data")
    return Volume("data", str(root / "data"))


def storage_in(root: Path, *volumes: Volume) -> BtrfsStorage:
    return BtrfsStorage(root / "storage", volumes=volumes, wanted_free_bytes=0)


def refused(storage: BtrfsStorage, *volumes: Volume) -> Finding:
    (finding,) = [f for f in asyncio.run(storage.check(volumes)) if f.severity is Severity.REFUSED]
    assert finding.remedy
    return finding


def test_a_group_of_one_volume_is_one_instant_and_a_larger_one_is_not(root: Path, volume: Volume) -> None:
    assert storage_in(root, volume).capabilities == frozenset(Capability)
    for volumes in ((), (volume, Volume("wal", str(root / "wal")))):
        assert storage_in(root, *volumes).capabilities == {Capability.ATOMIC, Capability.INSTANT_CLONE}


def test_a_nested_subvolume_is_refused_by_name_by_check_and_by_snapshot(root: Path, volume: Volume) -> None:
    (root / "data" / "deep").mkdir()
    make_subvolume(root / "data" / "deep" / "pg_wal")
    storage = storage_in(root, volume)
    assert "deep/pg_wal" in refused(storage, volume).message
    with pytest.raises(StorageError, match="deep/pg_wal"):
        asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
    assert asyncio.run(storage.tagged()) == []


def test_a_plain_directory_is_refused_with_the_commands_that_help(root: Path) -> None:
    (root / "plain").mkdir()
    plain = Volume("data", str(root / "plain"))
    assert "btrfs subvolume create" in refused(storage_in(root, plain), plain).remedy
    with pytest.raises(StorageError, match="is not a btrfs subvolume"):
        asyncio.run(storage_in(root, plain).snapshot([plain], POINTS[0], "tag"))
    assert asyncio.run(storage_in(root, plain).tagged()) == []


def test_a_folder_inside_the_volume_is_refused(root: Path, volume: Volume) -> None:
    storage = BtrfsStorage(root / "data" / "storage", volumes=[volume], wanted_free_bytes=0)
    assert "lies inside" in refused(storage, volume).message


def test_a_folder_on_another_filesystem_is_refused(volume: Volume, tmp_path: Path) -> None:
    assert "is not on btrfs" in refused(storage_in(tmp_path, volume), volume).message
    with loop_volume("btrfs", 128) as other:
        assert "on different filesystems" in refused(storage_in(other, volume), volume).message
        with pytest.raises(StorageError):
            asyncio.run(storage_in(other, volume).snapshot([volume], POINTS[0], "tag"))
        assert asyncio.run(storage_in(other, volume).tagged()) == []


def test_a_snapshot_is_read_only_and_its_time_is_the_cut(root: Path, volume: Volume) -> None:
    (made,) = asyncio.run(storage_in(root, volume).snapshot([volume], POINTS[0], "tag"))
    assert libbtrfsutil.subvolume(Path(made.location)).read_only
    assert libbtrfsutil.subvolume(Path(made.location)).parent_uuid == libbtrfsutil.subvolume(root / "data").uuid
    assert (made.ended_at - made.began_at).total_seconds() < 5
    with pytest.raises(OSError, match="Read-only file system"):
        (Path(made.location) / "file").touch()


def test_a_copy_in_the_place_of_a_snapshot_is_not_taken_for_one(root: Path, volume: Volume) -> None:
    storage = storage_in(root, volume)
    (made,) = asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
    libbtrfsutil.delete_subvolume(Path(made.location), recursive=False)
    Path(made.location).mkdir()
    (found,) = asyncio.run(storage.tagged())
    assert (found.complete, found.tag) == (False, "tag")
    Path(made.location).rmdir()
    libbtrfsutil.create_snapshot(root / "data", Path(made.location), read_only=False)
    (found,) = asyncio.run(storage.tagged())
    assert not found.complete, "a writable subvolume may have changed since"


def test_a_clone_with_subvolumes_of_its_own_is_dropped_whole(root: Path, volume: Volume) -> None:
    storage = storage_in(root, volume)
    asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
    clone = asyncio.run(storage.clone(POINTS[0], "copy", lambda *_: None))
    make_subvolume(clone.paths[0][1] / "inner")
    asyncio.run(storage.drop_clone("copy"))
    assert asyncio.run(storage.clones()) == []
    assert not clone.paths[0][1].exists()


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb") as file:
        while True:
            file.write(b"x" * (1 << 20))
    os.sync()


def test_no_snapshot_is_made_on_a_filesystem_that_is_nearly_full(tmp_path: Path) -> None:
    with loop_volume("btrfs", 256) as mount:
        make_subvolume(mount / "data")
        volume = Volume("data", str(mount / "data"))
        storage = BtrfsStorage(mount / "storage", volumes=[volume], wanted_free_bytes=32 << 20)
        asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
        _fill(mount / "data" / "large")
        with pytest.raises(StorageError, match="are wanted"):
            asyncio.run(storage.snapshot([volume], POINTS[1], "tag"))
        assert "bytes are free" in refused(storage, volume).message
        assert [found.point for found in asyncio.run(storage.tagged())] == [POINTS[0]]
        assert asyncio.run(storage.space()).short


def test_while_what_was_deleted_still_gives_room_back_a_storage_is_not_called_short(tmp_path: Path) -> None:
    with loop_volume("btrfs", 256) as mount:
        make_subvolume(mount / "data")
        volume = Volume("data", str(mount / "data"))
        (mount / "data" / "large").write_bytes(b"x" * (100 << 20))
        storage = BtrfsStorage(mount / "storage", volumes=[volume], wanted_free_bytes=0)
        asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
        free = asyncio.run(storage.space()).free_bytes
        (mount / "data" / "large").unlink()
        os.sync()
        storage = BtrfsStorage(mount / "storage", volumes=[volume], wanted_free_bytes=free + (50 << 20))
        assert asyncio.run(storage.space()).short
        asyncio.run(storage.delete(POINTS[0]))
        given = asyncio.run(storage.space())
        assert not given.short
        assert given.freeing or given.free_bytes > given.wanted_free_bytes
        subprocess.run(["btrfs", "subvolume", "sync", str(mount)], check=True, timeout=60)
        os.sync()
        left = asyncio.run(storage.space())
        assert not left.freeing
        assert left.free_bytes > left.wanted_free_bytes


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from unittest.mock import patch
from connectors.storage import libbtrfsutil
from connectors.storage.btrfs import BtrfsStorage
from trigger.model import Volume
step, when, root, point = sys.argv[1:]
real = libbtrfsutil.create_snapshot
def create(*arguments, **options):
    if when == "after":
        real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
volume = Volume("data", root + "/data")
storage = BtrfsStorage(Path(root) / "storage", volumes=[volume], wanted_free_bytes=0)
with patch(step, create):
    asyncio.run(storage.snapshot([volume], point, "tag"))
"""


@pytest.mark.parametrize(
    ("step", "when", "whole"),
    [
        ("connectors.storage.sealed.write_new", "before", False),
        ("connectors.storage.libbtrfsutil.create_snapshot", "before", False),
        ("connectors.storage.libbtrfsutil.create_snapshot", "after", True),
    ],
)
def test_killed_at_any_step_a_point_is_whole_or_unfinished(
    step: str, when: str, whole: bool, root: Path, volume: Volume
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, step, when, root, POINTS[0]], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    storage = storage_in(root, volume)
    (found,) = asyncio.run(storage.tagged())
    assert found.complete is whole
    if whole:
        assert found.snapshots == asyncio.run(storage.snapshot([volume], POINTS[0], "another"))
    asyncio.run(storage.delete(POINTS[0]))
    assert asyncio.run(storage.tagged()) == []
    assert list((root / "storage").iterdir()) == []


def test_a_cut_that_fails_leaves_nothing_and_says_why(root: Path, volume: Volume) -> None:
    storage = storage_in(root, volume)
    denied = PermissionError(1, "Could not create snapshot: Operation not permitted", "/x")
    with patch.object(libbtrfsutil, "create_snapshot", side_effect=denied), pytest.raises(StorageError) as raised:
        asyncio.run(storage.snapshot([volume], POINTS[0], "tag"))
    assert "Operation not permitted (/x)" in raised.value.message
    assert asyncio.run(storage.tagged()) == []


async def _make_and_drop_points(root: Path) -> list[str]:
    volume, said = Volume("data", str(root / "data")), []
    storage = storage_in(root, volume)
    await storage.snapshot([volume], POINTS[0], "tag")
    clone = await storage.clone(POINTS[0], "copy", lambda *_: None)
    (clone.paths[0][1] / "new").touch()
    said.append(str([found.complete for found in await storage.tagged()]))
    said.append(str([finding.severity.value for finding in await storage.check([volume])]))
    for drop in (storage.drop_clone("copy"), storage.delete(POINTS[0])):
        try:
            await drop
        except StorageError as error:
            said.append(str(error))
    return [*said, f"{len(await storage.tagged())} points, {len(await storage.clones())} clones"]


def _as_nobody(work: Callable[[], list[str]]) -> list[str]:
    """Give what `work` says in a process of user nobody (a fork: that user may not reach our interpreter)."""
    nobody = pwd.getpwnam("nobody")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            text = "\n".join(work())
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)  # what it says fits into the pipe
    said = os.read(reading, 1 << 16).decode()
    os.close(reading)
    return said.splitlines()


@pytest.mark.parametrize("allowed", [True, False])
def test_an_ordinary_user_makes_points_of_his_own_subvolume(allowed: bool) -> None:
    nobody = pwd.getpwnam("nobody")
    with loop_volume("btrfs", 256) as mount:
        if allowed:
            subprocess.run(["mount", "-o", "remount,user_subvol_rm_allowed", mount], check=True)
        make_subvolume(mount / "data")
        (mount / "data" / "file").write_text("content")
        for path in (mount, mount / "data", mount / "data" / "file"):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        said = _as_nobody(lambda: asyncio.run(_make_and_drop_points(mount)))
    assert said[:2] == ["[True]", "['ok', 'note']"]
    if allowed:
        assert said[2:] == ["0 points, 0 clones"]
    else:
        assert "Operation not permitted" in said[2]
        assert "user_subvol_rm_allowed" in said[3]
