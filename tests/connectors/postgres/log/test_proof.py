"""Whether two logs are one, by the end of a segment; and what of an archive becomes a segment of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from connectors.databases.postgres.log.archive import ArchiveReader
from connectors.databases.postgres.log.proof import Compared, Piece, end_of, goes_on
from connectors.databases.postgres.log.segments import SegmentFolder
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName
from connectors.databases.postgres.lsn import Lsn
from tests.connectors.postgres.log.test_archive import FIRST, NUMBER, Ahead, asked, followed, put, put_history
from tests.connectors.postgres.log.test_wal import SEGMENT_BYTES, START, Log, two_segments
from tests.fixtures.volumes import plain_folder
from trigger.errors import DatabaseError
from trigger.position import Position

NAMES = [SegmentName(1, NUMBER + step) for step in range(3)]
TEXTS = [name.text(SEGMENT_BYTES) for name in NAMES]
COUNT = 4 * PAGE_BYTES
OURS, OTHER = two_segments([40], 28_000)[:2], two_segments([2_000], 28_000)[:2]
CLOSED = two_segments([], 30_500)[:2]
"""Of which a record lies in both, and ends soon."""


def log_of(*lengths: int) -> bytes:
    """Give a segment with records of these lengths, whose contents follow from their lengths."""
    log = Log()
    for length in lengths:
        log.record(length)
    return log.segments()[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "segment"


def piece(file: Path, segment: bytes, limit: int | None = None) -> Piece:
    file.write_bytes(segment)
    found = end_of(file, START, COUNT) if limit is None else end_of(file, START, COUNT, START + limit)
    assert found is not None
    return found


def theirs(of: Piece, segment: bytes) -> bytes:
    """Give what a server has where a piece is."""
    begin = of.at - START
    return segment[begin : begin + of.count]


SOME = [200, 3_000, 200, 9_000, 200, 20_000, 100, 100]


@pytest.mark.parametrize("at", [4, 5, 7], ids=["a record before", "a long one", "the last"])
def test_a_record_that_is_another_is_another_log_though_the_last_one_be_the_same(file: Path, at: int) -> None:
    """What ends a segment may be the same in two lives: a switch to the next one, say, has no time."""
    ours = piece(file, log_of(*SOME))
    assert ours.compare(theirs(ours, log_of(*SOME))) is Compared.SAME
    other = Log()
    for index, length in enumerate(SOME):
        other.record(length, manager=11 if index == at else 10)
    assert ours.compare(theirs(ours, other.segments()[0])) is Compared.OTHER


def test_what_does_not_pass_its_checksum_speaks_against_no_log(file: Path) -> None:
    ours = log_of(*SOME)
    damaged = bytearray(ours)
    damaged[-len(ours) + 60] ^= 1
    found = piece(file, bytes(damaged))
    assert found.at == START, "the damage is in it"
    assert found.compare(theirs(found, ours)) is Compared.SAME


def test_log_that_is_not_there_or_not_all_says_nothing(file: Path) -> None:
    ours = piece(file, log_of(*SOME))
    assert ours.compare(None) is Compared.UNKNOWN
    assert ours.compare(theirs(ours, log_of(*SOME))[:-1]) is Compared.UNKNOWN


def test_log_behind_a_limit_is_not_compared_and_a_record_that_lies_over_it_is(file: Path) -> None:
    log = Log()
    for length in SOME[:4]:
        log.record(length)
    limit = log.position
    before = bytes(log.segments()[0])
    for length in SOME[4:]:
        log.record(length)
    ours = log.segments()[0]
    found = piece(file, ours, limit)
    assert found.at + found.count == START + limit
    assert found.compare(theirs(found, before)) is Compared.SAME, "as where a timeline was left there"
    amid = piece(file, ours, limit + 48)
    ended = Log()
    for length in (*SOME[:4], 16, 1_000):
        ended.record(length)
    assert amid.compare(theirs(amid, ended.segments()[0])) is Compared.OTHER
    assert end_of(file, START, COUNT, START) is None


def page_behind() -> bytes:
    """Give the first page of the segment behind `CLOSED`."""
    return CLOSED[1][:PAGE_BYTES]


def test_log_that_the_server_has_removed_is_told_by_what_it_has_behind_it(file: Path) -> None:
    for segment, verdict in ((CLOSED[0], Compared.SAME), (OTHER[0], Compared.OTHER)):
        file.write_bytes(segment)
        assert goes_on(file, START, page_behind()) is verdict
    assert goes_on(file, START, None) is Compared.UNKNOWN
    assert goes_on(file, START, page_behind()[:48]) is Compared.UNKNOWN, "no record begins there yet"


# ---- what comes in


class Knowing(Ahead):
    """A server that gives a verdict on each segment, and looks where the file lies that it is asked about."""

    def __init__(self, verdict: Callable[[SegmentName], Compared | Exception]) -> None:
        super().__init__(FIRST)
        self.verdict = verdict
        self.redo_at: int = START
        self.seen: list[SegmentName] = []

    async def redo(self) -> Position:
        return Position(self.past.history, Lsn(self.redo_at))

    async def compare(self, segments: SegmentFolder, name: SegmentName, file: Path) -> Compared:
        assert not (segments.path / name.text(SEGMENT_BYTES)).exists(), "nothing has its name before it is proven"
        assert file.stat().st_size == SEGMENT_BYTES
        self.seen.append(name)
        said = self.verdict(name)
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture
def segments() -> Iterator[SegmentFolder]:
    with plain_folder() as folder:
        yield SegmentFolder(folder, SEGMENT_BYTES, None)


@pytest.fixture
def archive() -> Iterator[Path]:
    with plain_folder() as folder:
        for name, segment in zip(NAMES, OURS, strict=False):
            put(folder, segment, name.timeline, name.number)
        yield folder


def taken(
    segments: SegmentFolder, archive: Path, said: Compared | Exception, which: int = 1, incarnation: int = 0
) -> bool:
    segments = SegmentFolder(segments.path, SEGMENT_BYTES, None, incarnation)
    came = asked(ArchiveReader(f"cp {archive}/%f %p", Knowing(lambda _: said)), segments, TEXTS[which])
    assert came == (segments.path / TEXTS[which]).exists()
    assert not list(segments.path.glob("fetching*"))
    return came


GONE = DatabaseError("no connection to the database")


@pytest.mark.parametrize("incarnation", [0, 1])
@pytest.mark.parametrize("held", [None, 0], ids=["nothing held", "behind what is held"])
def test_a_segment_is_taken_that_is_the_servers_or_joins_one_that_was_taken(
    segments: SegmentFolder, archive: Path, held: int | None, incarnation: int
) -> None:
    def comes(said: Compared | Exception) -> bool:
        (segments.path / TEXTS[1]).unlink(missing_ok=True)
        return taken(segments, archive, said, 1, incarnation)

    if held is not None:
        put(segments.path, OURS[held], 1, NUMBER + held)
    assert comes(Compared.SAME)
    assert not comes(Compared.OTHER)
    assert comes(Compared.UNKNOWN) == (held is not None)
    assert comes(GONE) == (held is not None and not incarnation), "an archive has an earlier life's log by that name"


@pytest.mark.parametrize("said", [Compared.SAME, Compared.UNKNOWN, GONE])
def test_a_segment_that_does_not_join_its_neighbours_is_not_taken_whatever_is_said_of_it(
    segments: SegmentFolder, archive: Path, said: Compared | Exception
) -> None:
    put(segments.path, OURS[1], 1, NUMBER + 1)
    assert taken(segments, archive, said, 0), "before one that is held"
    (segments.path / TEXTS[0]).unlink()
    put(archive, OTHER[0], 1, NUMBER)
    assert not taken(segments, archive, said, 0)
    (segments.path / TEXTS[1]).unlink()
    put(segments.path, OTHER[0], 1, NUMBER)
    assert not taken(segments, archive, said, 1)


def test_the_first_segment_of_a_timeline_joins_the_one_before_it_on_the_timeline_that_was_left(
    segments: SegmentFolder, archive: Path
) -> None:
    name = SegmentName(2, NUMBER + 1)
    put_history(segments.path, 2, (1, SEGMENT_BYTES + 300))
    put(archive, OURS[1], 2, NUMBER + 1)
    for held, comes in ((OURS[0], True), (OTHER[0], False)):
        put(segments.path, held, 1, NUMBER)
        assert segments.neighbours(name) == NAMES[:1]
        reader = ArchiveReader(f"cp {archive}/%f %p", Knowing(lambda _: Compared.UNKNOWN))
        assert asked(reader, segments, name.text(SEGMENT_BYTES)) == comes
        segments.delete([name])
    put_history(segments.path, 2, (1, 300))
    assert segments.neighbours(name) == [], "the one before is the new timeline's own"


def test_where_the_server_has_removed_the_first_it_goes_on_at_what_it_has_and_fetches_the_first_then(
    segments: SegmentFolder, archive: Path
) -> None:
    segments.mark(NAMES[0]._replace(partial=True), None)
    server = Knowing(lambda name: Compared.SAME if name == NAMES[1] else Compared.UNKNOWN)
    server.redo_at = START + 2 * SEGMENT_BYTES
    followed(segments, archive, lambda _: segments.file(NAMES[0]).exists(), server=server)
    assert [name for name in segments.names() if not name.partial] == NAMES[:2]
    assert server.seen[0] == NAMES[0]


def test_the_log_of_an_earlier_life_is_said_with_what_to_do_about_it(segments: SegmentFolder, archive: Path) -> None:
    server = Knowing(lambda _: Compared.OTHER)
    reader = followed(segments, archive, lambda reader: bool(reader.findings()), server=server)
    (finding,) = reader.findings()
    assert "the log of another life of the cluster under that name" in finding.message
    assert "move what the archive has of the earlier life to another place" in finding.remedy
    assert not any(file.stat().st_size for file in segments.path.iterdir())


def test_a_server_that_does_not_answer_is_not_asked_of_every_segment(segments: SegmentFolder, archive: Path) -> None:
    server = Knowing(lambda _: GONE)
    reader = ArchiveReader(f"cp {archive}/%f %p", server)
    for _ in range(3):
        assert not asked(reader, segments, TEXTS[0])
    assert server.seen == NAMES[:1]
