"""Each life of the log has a folder of its own: what is held there, let go of, and fetched into it."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.folders import LogFolders
from connectors.databases.postgres.log.journal import Feed, PostgresJournal
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.staging import Staging
from connectors.databases.postgres.log.wal import SegmentName
from connectors.databases.postgres.lsn import Lsn, history
from tests.connectors.postgres.log.test_archive import Server
from tests.fixtures.restores import silent
from tests.fixtures.volumes import plain_folder
from trigger.errors import JournalError
from trigger.model import Extent, Finding
from trigger.position import History, Position
from trigger.replay import Replay, Target

SMALL, LARGE = 1 << 20, 4 << 20
OLD, NEW, NEWEST = (history("111", 1, incarnation) for incarnation in range(3))


@pytest.fixture
def folder() -> Iterator[Path]:
    with plain_folder() as made:
        (made / "journal").mkdir()
        (made / "archive").mkdir()
        yield made


class Idle:
    """A feed that brings nothing."""

    def __init__(self) -> None:
        self.owner: tuple[int, int] | None = None
        self.begun = False
        self.at_work = asyncio.Event()

    async def run(self, segments: SegmentFolder) -> None:
        self.at_work.set()
        await asyncio.Event().wait()

    async def catch_up(self, segments: SegmentFolder) -> None:
        """Bring nothing."""

    def fetch(self, segments: SegmentFolder, name: str, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        return False

    def findings(self) -> list[Finding]:
        return []

    async def check(self, segment_bytes: int) -> list[Finding]:
        return []


def put(folder: Path, system: int, *numbers: int, size: int = SMALL, fill: bytes = b"\0", timeline: int = 1) -> None:
    """Put segments without a record into a folder."""
    for number in numbers:
        head = struct.pack("=HHIQI4xQII", 0xD110, 2, timeline, number * size, 0, system, size, 8192)
        (folder / SegmentName(timeline, number).text(size)).write_bytes(head + fill * (size - len(head)))


def begun(folders: LogFolders, life: History, *numbers: int) -> SegmentFolder:
    made = folders.of(life)
    made.make(None)
    put(made.path, int(life.system), *numbers)
    return made


def journal(folders: LogFolders, feed: Feed, present: History) -> PostgresJournal:
    async def now() -> History:
        return present

    return PostgresJournal(folders, feed, now, lambda _: None)


@contextlib.asynccontextmanager
async def kept(folders: LogFolders, present: History) -> AsyncIterator[PostgresJournal]:
    """Give a journal that is kept, the server being in a history."""
    feed = Idle()
    made = journal(folders, feed, present)
    task = asyncio.create_task(made.run())
    try:
        await feed.at_work.wait()
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def numbers(segments: SegmentFolder) -> list[int]:
    return [name.number for name in segments.names()]


def at(life: History, segment: int, size: int = SMALL) -> Position:
    return Position(life, Lsn(segment * size + 100))


def test_once_a_journal_was_kept_its_folder_is_void_only_where_that_is_gone(folder: Path) -> None:
    async def run() -> None:
        for place in (folder / "journal", folder / "mount" / "journal"):
            folders = LogFolders(place, SMALL)
            assert await journal(folders, Idle(), OLD).is_void()
            async with kept(folders, OLD) as made:
                assert not await made.is_void(), "no log has come yet, as from an archive"
                assert await made.extents() == []
            assert not await journal(LogFolders(place, SMALL), Idle(), OLD).is_void()
            place.rename(folder / f"{place.parent.name}-elsewhere")
            assert await made.is_void(), "what it lies on is not mounted, nor its mount point there"
            place.mkdir()
            (place / "lost+found").mkdir()
            assert await made.is_void(), "another disk is"
        place.rename(folder / "away")
        place.write_text("")
        with pytest.raises(JournalError, match=str(place)):
            await made.is_void()

    asyncio.run(run())


def test_what_a_look_or_a_restore_puts_where_no_log_is_kept_makes_no_journal_of_it(folder: Path) -> None:
    (folder / "archive" / "00000002.history").write_text("1\t0/100\tno recovery target specified\n")
    (folder / "snapshot" / "pg_wal").mkdir(parents=True)
    (folder / "snapshot" / "pg_wal" / "00000003.history").write_text("1\t0/100\tno recovery target specified\n")

    reader = ArchiveReader(f"cp {folder}/archive/%f %p", Server())

    async def present() -> History:
        return OLD

    async def copies(_: History) -> tuple[Path, Path] | None:
        return folder / "snapshot", Path("pg_wal")

    async def run() -> None:
        folders = LogFolders(folder / "journal", SMALL)
        unmounted = PostgresJournal(folders, reader, present, lambda _: None, lambda: OLD)
        unmounted.look_into(copies)
        for timeline in (2, 3):
            assert (await unmounted.lineage(history("111", timeline))).forks == ((1, 0x100),)
        assert {found.name for found in (folder / "journal").iterdir()} == {"00000002.history", "00000003.history"}
        assert await unmounted.is_void()
        put(folder / "journal", 111, 4)  # as for a replay
        assert await unmounted.is_void()

    asyncio.run(run())


def test_the_log_of_the_present_life_stays_while_its_first_base_is_made(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    folders = LogFolders(folder / "journal", SMALL)
    new = begun(folders, NEW, *range(4, 12))

    async def run() -> None:
        async with kept(folders, NEW) as made:
            assert await made.release([at(OLD, 2)]) == 1
        assert numbers(folders.of(OLD)) == [2, 3, 4, 5]
        assert numbers(new) == list(range(4, 12))

    asyncio.run(run())


def test_the_log_of_a_new_life_stays_where_nobody_knows_yet_which_life_the_server_is_in(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    folders = LogFolders(folder / "journal", SMALL)
    new = begun(folders, NEW, *range(4, 12))
    assert asyncio.run(journal(folders, Idle(), NEW).release([at(OLD, 2)])) == 1
    assert numbers(new) == list(range(4, 12))


def test_what_a_left_life_holds_and_no_start_asks_for_goes_but_for_its_newest_segment(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    folders = LogFolders(folder / "journal", SMALL)
    left, newest = begun(folders, NEW, *range(4, 12)), begun(folders, NEWEST, *range(3, 9))

    async def run() -> None:
        async with kept(folders, NEWEST) as made:
            assert await made.release([at(OLD, 3)]) == 2 + 7
            assert (numbers(folders.of(OLD)), numbers(left), numbers(newest)) == ([3, 4, 5], [11], [*range(3, 9)])
            assert await made.release([at(NEWEST, 5)]) == 2 + 2
            assert (numbers(folders.of(OLD)), numbers(left), numbers(newest)) == ([5], [11], [5, 6, 7, 8])

    asyncio.run(run())


def test_what_the_starts_of_several_lives_ask_for_stays_in_each_of_them(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    folders = LogFolders(folder / "journal", SMALL)
    left, newest = begun(folders, NEW, *range(4, 12)), begun(folders, NEWEST, *range(3, 9))

    async def run() -> None:
        async with kept(folders, NEWEST) as made:
            assert await made.release([at(OLD, 2), at(OLD, 4), at(NEW, 6), at(NEWEST, 8)]) == 1 + 2 + 5
        assert (numbers(folders.of(OLD)), numbers(left), numbers(newest)) == ([2, 3, 4, 5], [*range(6, 12)], [8])

    asyncio.run(run())


def staged(made: PostgresJournal, folder: Path, life: History, until: int, first: int = 2) -> None:
    """Stage what is needed to go from a segment to the end of what is held, at least to a place."""
    latest = Target(life, None, False, "the latest of it")
    asyncio.run(made.stage(Replay(latest, Position(life, Lsn(first * SMALL)), until), folder / "staged", silent))


def test_a_restore_of_an_earlier_life_does_not_take_the_log_of_the_present_one_from_the_archive(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    put(folder / "archive", 111, *range(3, 9), fill=b"N")
    folders = LogFolders(folder / "journal", SMALL)
    begun(folders, NEW)
    made = journal(folders, ArchiveReader(f"cp {folder}/archive/%f %p", Server()), NEW)
    staged(made, folder, OLD, 6 * SMALL)
    assert asyncio.run(made.extents()) == [Extent(OLD, Lsn(SMALL), Lsn(6 * SMALL))]
    assert numbers(SegmentFolder(folder / "staged", SMALL)) == [2, 3, 4, 5]
    folders.of(OLD).file(SegmentName(1, 4)).unlink()
    with pytest.raises(JournalError, match="000000010000000000000004 is not in the journal"):
        staged(made, folder, OLD, 6 * SMALL)
    assert numbers(folders.of(OLD)) == [1, 2, 3, 5]


def left_in_segment_4(folder: Path) -> SegmentFolder:
    """Give a log whose first timeline was left in the middle of a segment, which both timelines have."""
    put(folder / "journal", 111, 2, 3, 4)
    put(folder / "journal", 111, 4, 5, timeline=2)
    (folder / "journal" / "00000002.history").write_text(f"1\t{Lsn(4 * SMALL + 600)}\tno reason\n")
    return SegmentFolder(folder / "journal", SMALL)


def through_the_fork(segments: SegmentFolder, folder: Path) -> int:
    latest = Target(history("111", 2), None, False, "the latest of it")
    return Staging(segments).stage(Replay(latest, Position(OLD, Lsn(2 * SMALL)), 6 * SMALL), folder / "staged", silent)


def test_damage_in_the_file_of_the_timeline_that_was_left_stops_no_replay_that_reads_the_newer_one(
    folder: Path,
) -> None:
    segments = left_in_segment_4(folder)
    older = SegmentName(1, 4).text(SMALL)
    segments.damaged[older] = "page 0/4002000 has no valid header"
    through_the_fork(segments, folder)
    staged = {entry.name for entry in (folder / "staged").iterdir()}
    assert SegmentName(2, 4).text(SMALL) in staged
    assert older not in staged


@pytest.mark.parametrize("name", [SegmentName(2, 4), SegmentName(1, 3)], ids=["the newer one", "the only one"])
def test_damage_in_the_file_that_a_replay_reads_is_said(folder: Path, name: SegmentName) -> None:
    segments = left_in_segment_4(folder)
    segments.damaged[name.text(SMALL)] = "page 0/4002000 has no valid header"
    with pytest.raises(JournalError, match=f"segment {name.text(SMALL)} of the journal is damaged"):
        through_the_fork(segments, folder)


def test_damage_in_the_older_file_is_said_where_the_newer_one_is_not_there(folder: Path) -> None:
    segments = left_in_segment_4(folder)
    segments.file(SegmentName(2, 4)).unlink()
    older = SegmentName(1, 4).text(SMALL)
    segments.damaged[older] = "page 0/4002000 has no valid header"
    with pytest.raises(JournalError, match=f"segment {older} of the journal is damaged"):
        through_the_fork(segments, folder)


def test_a_replay_meets_every_timeline_that_any_life_of_the_cluster_had(folder: Path) -> None:
    put(folder / "journal", 111, *range(1, 6))
    folders = LogFolders(folder / "journal", SMALL)
    lives = (folders.of(OLD), begun(folders, NEW, *range(4, 8)), begun(folders, NEWEST, *range(4, 8)))
    begun(folders, history("222", 1), 4).path.joinpath("00000007.history").write_text("another cluster's")
    for number, (life, timelines) in enumerate(zip(lives, ((2, 3), (2, 4), (4,)), strict=True)):
        for timeline in timelines:
            (life.path / f"{timeline:08X}.history").write_text(f"1\t0/{number + 1}00000\tlife {number}\n")
    staged(journal(folders, Idle(), NEWEST), folder, NEW, 8 * SMALL, first=4)
    found = {entry.name: entry.read_text().split()[-1] for entry in (folder / "staged").glob("*.history")}
    assert found == {"00000002.history": "1", "00000003.history": "0", "00000004.history": "1"}


def test_the_log_of_a_cluster_with_segments_of_another_size_is_held_and_let_go_of_by_its_own_size(folder: Path) -> None:
    before, after = history("111", 1), history("222", 1)
    put(folder / "journal", 111, *range(1, 12), size=LARGE)
    folders = LogFolders(folder / "journal", SMALL)
    old, new = folders.of(before), begun(folders, after, *range(20, 30))
    assert (old.segment_bytes, new.segment_bytes) == (LARGE, SMALL)
    assert old.path != new.path

    async def run() -> None:
        async with kept(folders, after) as made:
            assert await made.extents() == [
                Extent(before, Lsn(LARGE), Lsn(12 * LARGE)),
                Extent(after, Lsn(20 * SMALL), Lsn(30 * SMALL)),
            ]
            assert await made.release([at(before, 5, LARGE), at(after, 23)]) == 4 + 3
            assert (numbers(old), numbers(new)) == ([*range(5, 12)], [*range(23, 30)])
            again = LogFolders(folder / "journal", SMALL)
            assert [each.segment_bytes for each in again.all()] == [LARGE, SMALL]
            replay = Replay(Target(before, None, False, "latest"), at(before, 5, LARGE), 12 * LARGE)
            assert await made.stage(replay, folder / "staged", silent) == 7 * LARGE

    asyncio.run(run())


def test_two_clusters_in_one_folder_as_once_they_could_lie_there_are_held_and_none_of_it_goes(folder: Path) -> None:
    before, after = history("111", 1), history("222", 1)
    put(folder / "journal", 111, *range(1, 6))
    put(folder / "journal", 222, *range(7, 11))
    folders = LogFolders(folder / "journal", SMALL)
    assert folders.of(before).path == folders.of(after).path == folder / "journal"

    async def run() -> None:
        async with kept(folders, after) as made:
            assert await made.release([at(before, 2), at(after, 8)]) == 0
            assert await made.extents() == [
                Extent(before, Lsn(SMALL), Lsn(6 * SMALL)),
                Extent(after, Lsn(7 * SMALL), Lsn(11 * SMALL)),
            ]

    asyncio.run(run())


def test_a_life_without_a_folder_is_not_looked_at(folder: Path) -> None:
    folders = LogFolders(folder / "journal", SMALL)
    folders.of(NEW)
    assert [each.path for each in folders.all()] == [folder / "journal"]
    folders.begin(NEW, None, "")
    assert [each.path for each in folders.all()] == [folder / "journal", folder / "journal" / "111+1"]


def test_each_life_has_files_of_its_own_size(folder: Path) -> None:
    """After an upgrade to larger segments a replay of the old log still begins at a file of the old size."""
    put(folder / "journal", 111, *range(1, 4))
    folders = LogFolders(folder / "journal", LARGE)
    other = history("222", 1)
    new = folders.of(other)
    new.make(None)
    put(new.path, 222, 2, size=LARGE)

    async def run() -> None:
        kept = journal(folders, Idle(), other)
        await kept.extents()
        for life, size in ((OLD, SMALL), (other, LARGE)):
            assert kept.file_start(Position(life, Lsn(7 * SMALL + 5))) == 7 * SMALL // size * size

    asyncio.run(run())


def test_the_history_file_that_a_lineage_needs_is_fetched_from_the_archive(folder: Path) -> None:
    put(folder / "journal", 111, 1)
    (folder / "archive" / "00000002.history").write_text("1\t0/100\tno recovery target specified\n")
    folders = LogFolders(folder / "journal", SMALL)
    reader = ArchiveReader(f"cp {folder / 'archive'}/%f %p", Server())

    async def present() -> History:
        return OLD

    made = PostgresJournal(folders, reader, present, lambda _: None, lambda: OLD)
    assert asyncio.run(made.lineage(history("111", 2))).forks == ((1, 0x100),)
    with pytest.raises(JournalError, match="is not in"):
        asyncio.run(made.lineage(history("111", 3)))
