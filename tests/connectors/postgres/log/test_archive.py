"""An operator's `restore_command`: how long it may take, what its end means, and whose log it brings."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.proof import Compared
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn, history
from tests.connectors.postgres.log.test_wal import SEGMENT_BYTES, START, SYSTEM, two_segments
from tests.fixtures.volumes import plain_folder
from trigger.errors import DatabaseError
from trigger.model import Severity
from trigger.position import Lineage, Position

SEGMENT = "000000010000000000000001"


@pytest.fixture
def segments() -> Iterator[SegmentFolder]:
    with plain_folder() as folder:
        yield SegmentFolder(folder, 1 << 20, None)


class Server:
    """A server that says what it archived last, and that all is its log: one file is between us and the command."""

    def __init__(self, last: str = "") -> None:
        self.last = last

    async def redo(self) -> Position:
        raise AssertionError

    async def durable(self) -> Position:
        raise AssertionError

    async def lineage(self) -> Lineage:
        raise AssertionError

    async def compare(self, segments: SegmentFolder, name: SegmentName, file: Path) -> Compared:
        return Compared.SAME

    async def archived(self) -> str:
        if self.last == "unreachable":
            raise DatabaseError("no connection to the database")
        return self.last


def _reader(command: str, fetch_seconds: float = 20, last: str = "") -> ArchiveReader:
    return ArchiveReader(command, Server(last), fetch_seconds=fetch_seconds)


def asked(reader: ArchiveReader, segments: SegmentFolder, name: str) -> bool:
    """Have one file fetched while the server can be asked about it."""

    async def run() -> bool:
        return await segments.threads.run(partial(reader.fetch, segments, name, asyncio.get_running_loop()))

    return asyncio.run(run())


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
    assert not asked(reader, segments, SEGMENT)
    assert segments.names() == []
    archive.write_bytes(b"x" * (1 << 20))
    assert asked(reader, segments, SEGMENT)
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
    """A server that has come to the end of the second segment, and has the log that anybody has."""

    def __init__(self, lineage: Lineage) -> None:
        super().__init__()
        self.past = lineage

    async def redo(self) -> Position:
        return Position(self.past.history, Lsn(START))

    async def durable(self) -> Position:
        return Position(self.past.history, Lsn(START + 2 * SEGMENT_BYTES))

    async def lineage(self) -> Lineage:
        return self.past


NUMBER = START // SEGMENT_BYTES
FIRST = Lineage(history(str(SYSTEM), 1))


def followed(
    segments: SegmentFolder,
    archive: Path,
    until: Callable[[ArchiveReader], bool],
    present: Lineage = FIRST,
    server: Server | None = None,
) -> ArchiveReader:
    """Follow an archive until something is so; gives who did."""
    server = server or Ahead(present)
    reader = ArchiveReader(f"cp {archive}/%f %p", server, poll_seconds=0.02, late_seconds=0.2)

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
    for thread in threading.enumerate():  # a fetch that was abandoned goes on, and may bring what is archived later
        if thread.name == "journal":
            thread.join(20)
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


def put(folder: Path, segment: bytes, timeline: int, number: int) -> None:
    (folder / SegmentName(timeline, number).text(SEGMENT_BYTES)).write_bytes(segment)


def put_history(folder: Path, timeline: int, *forks: tuple[int, int]) -> None:
    lines = [f"{before}\t{Lsn(START + at)}\tno recovery target specified\n" for before, at in forks]
    (folder / f"{timeline:08X}.history").write_text("".join(lines))


def held(segments: SegmentFolder) -> list[tuple[int, int]]:
    return [(name.timeline, name.number - NUMBER) for name in segments.names() if not name.partial]


def lineage(timeline: int, *forks: tuple[int, int], incarnation: int = 0) -> Lineage:
    past = tuple((before, START + at) for before, at in forks)
    return Lineage(history(str(SYSTEM), timeline, incarnation), past)


@pytest.mark.parametrize("captured", [False, True], ids=["anew", "once led astray"])
def test_a_timeline_in_the_archive_that_the_server_has_left_or_never_was_on_is_not_followed(captured: bool) -> None:
    first, second, _ = two_segments([100], 200)
    present = lineage(1, incarnation=1)  # as after `restore --undo`, or a failback to the old primary
    with plain_folder() as folder, plain_folder() as archive:
        segments = SegmentFolder(folder, SEGMENT_BYTES, None, 1)
        put(archive, first, 1, NUMBER)
        put(archive, first, 2, NUMBER)
        put_history(archive, 2, (1, 500))
        if captured:
            put(folder, first, 1, NUMBER)
            put(folder, first, 2, NUMBER)
        reader = followed(segments, archive, lambda reader: bool(reader.findings()), present)
        (finding,) = reader.findings()
        missing = SegmentName(1, NUMBER + 1).text(SEGMENT_BYTES)
        assert f"the archive does not give segment {missing}, which the server has finished" in finding.message
        assert held(segments) == ([(1, 0), (2, 0)] if captured else [(1, 0)])
        put(archive, second, 1, NUMBER + 1)
        reader = followed(segments, archive, lambda _: (1, 1) in held(segments), present)
        assert reader.findings() == []


def test_a_timeline_that_the_server_went_over_to_is_followed_past_one_that_it_left(segments: SegmentFolder) -> None:
    first, second, _ = two_segments([100], 200)
    segments = SegmentFolder(segments.path, SEGMENT_BYTES, None)
    present = lineage(3, (1, 300))  # it went from timeline 1 to 2, was restored from before, and went from 1 to 3
    with plain_folder() as archive:
        put(segments.path, first, 1, NUMBER)
        put_history(archive, 2, (1, 500))
        put(archive, first, 2, NUMBER)
        reader = followed(segments, archive, lambda _: (2, 0) in held(segments), lineage(2, (1, 500)))
        put(archive, second, 2, NUMBER + 1)
        put(archive, first, 3, NUMBER)
        reader = followed(segments, archive, lambda reader: bool(reader.findings()), present)
        assert "00000003.history, which is needed first" in reader.findings()[0].message
        assert held(segments) == [(1, 0), (2, 0)]
        put_history(archive, 3, (1, 300))
        followed(segments, archive, lambda _: (3, 0) in held(segments), present)
        assert (held(segments), sorted(segments.histories())) == ([(1, 0), (2, 0), (3, 0)], [2, 3])


def test_a_history_file_of_another_life_in_the_archive_is_not_taken_for_the_servers_own_and_said(
    segments: SegmentFolder,
) -> None:
    first, _, _ = two_segments([100], 200)
    segments = SegmentFolder(segments.path, SEGMENT_BYTES, None)
    present = lineage(2, (1, 700))
    with plain_folder() as archive:
        put(segments.path, first, 1, NUMBER)
        put(archive, first, 2, NUMBER)
        put_history(archive, 2, (1, 500))
        reader = followed(segments, archive, lambda reader: bool(reader.findings()), present)
        assert "00000002.history, which is needed first: it has the log of another" in reader.findings()[0].message
        assert held(segments) == [(1, 0)]
        put_history(archive, 2, (1, 700))
        followed(segments, archive, lambda _: (2, 0) in held(segments), present)
        assert segments.lineage(history("", 2)).forks == present.forks
