"""An operator's `restore_command`: how long it may take, and what its end means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.archive import ArchiveReader
from connectors.databases.postgres.segments import SegmentFolder
from tests.fixtures.volumes import plain_folder
from trigger.position import Position

SEGMENT = "000000010000000000000001"


@pytest.fixture
def segments() -> Iterator[SegmentFolder]:
    with plain_folder() as folder:
        yield SegmentFolder(folder, 1 << 20, None)


async def _unasked() -> Position:
    raise AssertionError("nobody asks the server for one file")


def _reader(command: str, fetch_seconds: float = 20) -> ArchiveReader:
    return ArchiveReader(command, _unasked, _unasked, fetch_seconds=fetch_seconds)


def test_a_command_that_hangs_is_ended_in_time_with_all_that_it_started(segments: SegmentFolder) -> None:
    began = time.monotonic()
    assert not _reader("sleep 60 & echo $! > child; wait; : %f %p", fetch_seconds=0.5).fetch(segments, SEGMENT)
    child = Path("/proc") / (segments.path / "child").read_text().strip() / "cmdline"
    while child.exists() and child.read_bytes():  # a zombie has none
        assert time.monotonic() - began < 10, "what the command started goes on"


def test_a_segment_that_is_not_whole_yet_is_not_taken(segments: SegmentFolder) -> None:
    archive = segments.path / "archive"
    archive.write_bytes(b"x" * 1000)
    reader = _reader(f"cp {archive} %p; : %f")
    assert not reader.fetch(segments, SEGMENT)
    assert segments.names() == []
    archive.write_bytes(b"x" * (1 << 20))
    assert reader.fetch(segments, SEGMENT)
    assert len(segments.names()) == 1
    assert sorted(file.name for file in segments.path.iterdir()) == [SEGMENT, "archive"]


def test_a_failure_that_leaves_half_a_file_leaves_nothing(segments: SegmentFolder) -> None:
    assert not _reader("head -c 1000 /dev/zero > %p; exit 1; : %f").fetch(segments, SEGMENT)
    assert list(segments.path.iterdir()) == []
