"""An operator's `restore_command`: how long it may take, what its end means, and whose log it brings."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn, history
from tests.connectors.postgres.log.test_wal import SEGMENT_BYTES, START, SYSTEM, two_segments
from tests.fixtures.volumes import plain_folder
from trigger.errors import DatabaseError
from trigger.model import Severity
from trigger.position import Position

SEGMENT = "000000010000000000000001"


@pytest.fixture
def segments() -> Iterator[SegmentFolder]:
    with plain_folder() as folder:
        yield SegmentFolder(folder, 1 << 20, None)


class Server:
    """A server that says what it archived last, and is asked nothing else: one file is between us and the command."""

    def __init__(self, last: str = "") -> None:
        self.last = last

    async def redo(self) -> Position:
        raise AssertionError

    async def durable(self) -> Position:
        raise AssertionError

    async def differs(self, segments: SegmentFolder, name: SegmentName) -> bool:
        raise AssertionError

    async def archived(self) -> str:
        if self.last == "unreachable":
            raise DatabaseError("no connection to the database")
        return self.last


def _reader(command: str, fetch_seconds: float = 20, last: str = "") -> ArchiveReader:
    return ArchiveReader(command, Server(last), fetch_seconds=fetch_seconds)


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


@pytest.mark.parametrize(
    ("command", "last", "severity", "words"),
    [
        ("cp {archive} %p; : %f", SEGMENT, Severity.OK, f"brings {SEGMENT}"),
        ("cp {archive} %p; : %f", f"{SEGMENT}.00000028.backup", Severity.OK, f"brings {SEGMENT}"),
        ("cp /nowhere/%f %p", SEGMENT, Severity.WARNING, f"does not bring {SEGMENT}, which the server archived last"),
        ("/nowhere %f %p", SEGMENT, Severity.WARNING, "exit code 127"),
        ("head -c 1000 {archive} > %p; : %f", SEGMENT, Severity.WARNING, "gave 1000 of 1048576 bytes"),
        ("cp {archive} %p; : %f", "", Severity.WARNING, "the server has archived no segment"),
        ("cp {archive} %p; : %f", "00000002.history", Severity.WARNING, "the server has archived no segment"),
        ("cp {archive} %p; : %f", "unreachable", Severity.NOTE, "the server does not answer"),
    ],
)
def test_a_check_tries_the_command_on_what_the_server_archived_last(
    segments: SegmentFolder, command: str, last: str, severity: Severity, words: str
) -> None:
    archive = segments.path / "archive"
    archive.write_bytes(b"x" * (1 << 20))
    reader = _reader(command.format(archive=archive), last=last)
    (finding,) = asyncio.run(reader.check(1 << 20))
    assert (finding.subject, finding.severity) == ("restore_command", severity)
    assert words in finding.message
    assert bool(finding.remedy) is (severity is Severity.WARNING)
    assert list(segments.path.iterdir()) == [archive]
    assert reader.findings() == []


class Ahead(Server):
    """A server that has come to the end of the second segment, in the first life of its log."""

    async def durable(self) -> Position:
        return Position(history(str(SYSTEM), 1), Lsn(START + 2 * SEGMENT_BYTES))


NUMBER = START // SEGMENT_BYTES


def followed(segments: SegmentFolder, archive: Path, until: Callable[[ArchiveReader], bool]) -> ArchiveReader:
    """Follow an archive until something is so; gives who did."""
    reader = ArchiveReader(f"cp {archive}/%f %p", Ahead(), poll_seconds=0.02)

    async def work() -> None:
        task = asyncio.create_task(reader.run(segments))
        try:
            async with asyncio.timeout(20):
                while not task.done() and not until(reader):  # noqa: ASYNC110 - files that a command makes
                    await asyncio.sleep(0.02)
            assert not task.done(), "it has ended"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(work())
    return reader


def test_a_segment_of_another_log_behind_ours_is_not_taken_and_said_and_ours_is_once_it_comes(
    segments: SegmentFolder,
) -> None:
    ours, other = two_segments([40], 28_000), two_segments([2_000], 28_000)
    name, text = SegmentName(1, NUMBER + 1), SegmentName(1, NUMBER + 1).text(SEGMENT_BYTES)
    segments.file(SegmentName(1, NUMBER)).write_bytes(ours[0])
    with plain_folder() as archive:
        (archive / text).write_bytes(other[1])
        reader = followed(segments, archive, lambda reader: bool(reader.findings()))
        (finding,) = reader.findings()
        assert "the log of another life of the cluster under that name" in finding.message
        assert segments.names() == [SegmentName(1, NUMBER)]
        assert [extent.end for extent in segments.extents()] == [Lsn(START + SEGMENT_BYTES)]
        (archive / text).write_bytes(ours[1])
        reader = followed(segments, archive, lambda _: segments.file(name).exists())
        assert segments.file(name).read_bytes() == ours[1]
