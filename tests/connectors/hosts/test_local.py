from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from unittest.mock import patch

import pytest

from connectors.hosts import local
from connectors.hosts.local import LocalAgent
from connectors.syncfs import syncfs
from tests.conformance.storage_rigs import make_subvolume
from tests.fixtures.volumes import loop_volume
from trigger.errors import AgentError
from trigger.model import EPOCH, Flush, Volume
from trigger.point_names import point_id

POINT = point_id(EPOCH, 1)


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Volume, ...]:
    volumes = tuple(Volume(name, str(tmp_path / name)) for name in ("data", "wal"))
    for volume in volumes:
        Path(volume.path).mkdir()
    return volumes


async def flush(volumes: tuple[Volume, ...], state: Path, *, rounds: int = 1) -> list[tuple[Flush, ...]]:
    agent = LocalAgent("host", state_folder=state)
    await agent.prepare(volumes)
    try:
        return [await agent.flush(POINT, 10) for _ in range(rounds)]
    finally:
        await agent.close()


def counted(volumes: tuple[Volume, ...], state: Path) -> tuple[int, tuple[Flush, ...]]:
    calls: list[int] = []

    def counting(descriptor: int) -> None:
        calls.append(descriptor)
        syncfs(descriptor)

    with patch.object(local, "syncfs", counting):
        (flushes,) = asyncio.run(flush(volumes, state))
    return len(calls), flushes


def test_two_volumes_on_one_filesystem_are_flushed_once(two_folders: tuple[Volume, ...], tmp_path: Path) -> None:
    calls, flushes = counted(two_folders, tmp_path)
    assert calls == 1
    device = Path(two_folders[0].path).stat().st_dev
    assert [flush.device for flush in flushes] == [f"{os.major(device)}:{os.minor(device)}"] * 2
    filesystem = f"{os.statvfs(two_folders[0].path).f_fsid:x}"
    assert [flush.filesystem for flush in flushes] == [filesystem] * 2


@pytest.mark.volume
def test_two_subvolumes_of_one_btrfs_are_flushed_once_and_named_apart(tmp_path: Path) -> None:
    with loop_volume("btrfs", 256) as mount:
        volumes = tuple(Volume(name, str(mount / name)) for name in ("data", "wal"))
        for volume in volumes:
            make_subvolume(Path(volume.path))
        calls, flushes = counted(volumes, tmp_path)
        assert calls == 1
        assert flushes[0].device == flushes[1].device
        assert flushes[0].filesystem != flushes[1].filesystem


@pytest.mark.volume
def test_volumes_on_two_filesystems_are_flushed_side_by_side(two_folders: tuple[Volume, ...], tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=5)

    def meeting(descriptor: int) -> None:
        both.wait()
        syncfs(descriptor)

    with loop_volume("ext4", 64) as mount, patch.object(local, "syncfs", meeting):
        volumes = (Volume("other", str(mount)), two_folders[0])
        (flushes,) = asyncio.run(flush(volumes, tmp_path))
    assert [flush.volume for flush in flushes] == ["other", "data"]
    assert flushes[0].device != flushes[1].device


def test_an_error_that_is_told_once_is_written_down_with_its_volume(
    two_folders: tuple[Volume, ...], tmp_path: Path
) -> None:
    calls = iter([None, OSError(5, "Input/output error"), None, None])

    def once(descriptor: int) -> None:
        if error := next(calls):
            raise error
        syncfs(descriptor)

    with patch.object(local, "syncfs", once), pytest.raises(AgentError, match="Input/output error"):
        asyncio.run(flush(two_folders, tmp_path, rounds=2))
    noted = json.loads((tmp_path / "poisoned-wal.json").read_text())
    assert noted["volume"] == "wal"
    assert "Input/output error" in noted["error"]
    with pytest.raises(AgentError, match="is poisoned") as raised:
        asyncio.run(flush(two_folders, tmp_path))
    assert "trigpoint clear" in raised.value.hint


def test_a_note_that_cannot_be_read_still_poisons(two_folders: tuple[Volume, ...], tmp_path: Path) -> None:
    (tmp_path / "poisoned-data.json").write_text("{")
    with pytest.raises(AgentError, match="data is poisoned"):
        asyncio.run(flush(two_folders, tmp_path))


def test_an_error_counts_although_nobody_waited_for_it_any_more(
    two_folders: tuple[Volume, ...], tmp_path: Path
) -> None:
    go_on = threading.Event()

    def late(_: int) -> None:
        go_on.wait(5)
        raise OSError(5, "Input/output error")

    async def abandon() -> None:
        agent = LocalAgent("host", state_folder=tmp_path)
        await agent.prepare(two_folders)
        with patch.object(local, "syncfs", late):
            with pytest.raises(AgentError, match=r"waiting for data \(syncfs\), wal \(syncfs\)"):
                await agent.flush(POINT, 0.1)
            go_on.set()
            await asyncio.sleep(0.1)
        with pytest.raises(AgentError, match="is poisoned"):
            await agent.flush(POINT, 10)
        await agent.close()

    asyncio.run(abandon())


def test_a_stuck_flush_takes_one_thread_whatever_is_tried_and_the_process_may_end(
    two_folders: tuple[Volume, ...], tmp_path: Path
) -> None:
    go_on = threading.Event()
    inside: list[int] = []

    def stuck(descriptor: int) -> None:
        inside.append(descriptor)
        go_on.wait(10)

    async def insist() -> None:
        agent = LocalAgent("host", state_folder=tmp_path)
        await agent.prepare(two_folders)
        for _ in range(5):
            with pytest.raises(AgentError, match="was not flushed within"):
                await agent.flush(POINT, 0.05)
        await agent.close()
        assert len(inside) == 1
        os.fstat(inside[0])  # still open: a thread is inside
        go_on.set()
        await asyncio.sleep(0.1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(inside[0])

    with patch.object(local, "syncfs", stuck):
        asyncio.run(insist())


def test_descriptors_are_let_go_by_a_second_prepare_and_by_close(
    two_folders: tuple[Volume, ...], tmp_path: Path
) -> None:
    async def prepare_often() -> None:
        agent = LocalAgent("host", state_folder=tmp_path)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            await agent.prepare(two_folders)
            await agent.flush(POINT, 10)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
        await agent.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    asyncio.run(prepare_often())


def test_an_error_that_comes_before_a_second_prepare_is_told_by_it(
    two_folders: tuple[Volume, ...], tmp_path: Path
) -> None:
    calls = iter([None, OSError(5, "Input/output error")])

    def once(descriptor: int) -> None:
        os.fstat(descriptor)
        if error := next(calls):
            raise error

    async def prepare_twice() -> None:
        agent = LocalAgent("host", state_folder=tmp_path)
        await agent.prepare(two_folders)
        await agent.flush(POINT, 10)
        await agent.prepare(two_folders)
        with pytest.raises(AgentError, match="is poisoned"):
            await agent.flush(POINT, 10)
        await agent.close()

    with patch.object(local, "syncfs", once):
        asyncio.run(prepare_twice())
