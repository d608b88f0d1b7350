"""Names, page headers, the end of the records of a segment and what follows it, on log that this file writes itself."""

from __future__ import annotations

import struct
from copy import deepcopy
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.log import wal
from connectors.databases.postgres.log.wal import PAGE_BYTES, SegmentName, Tail, joins, page_faults, page_header, tail
from connectors.databases.postgres.lsn import Lsn
from tests.fixtures.postgres import MAJORS, Cluster
from tests.fixtures.volumes import plain_folder, run

SEGMENT_BYTES = 1 << 20
MAGIC = 0xD118
SYSTEM = 7_391_000_000_000_000_001
START = Lsn(5 * SEGMENT_BYTES)


class Log:
    """Writes segments as PostgreSQL does, one behind the other: records over pages, each page with its header."""

    def __init__(self, carried: int = 0, timeline: int = 1) -> None:
        self.bytes = bytearray(SEGMENT_BYTES)
        self.position = 0
        self.timeline = timeline
        self.previous = START - 64
        self.ends: list[tuple[int, int]] = []
        self._write(b"\x5a" * carried, carried)

    def record(self, length: int, *, manager: int = 10, info: int = 0) -> None:
        body = bytes((length + index) % 251 for index in range(length))
        begin = self._after_header(self.position)
        head = struct.pack("=IIQBB2x", 24 + length, 700, self.previous, info, manager)
        data = head + struct.pack("=I", wal.crc32c(head, wal.crc32c(body))) + body
        self._write(data, 0)
        self.previous = START + begin
        self.position = (self.position + 7) & ~7
        self.ends.append((begin, self.position))

    def _after_header(self, position: int) -> int:
        if position % PAGE_BYTES:
            return position
        return position + (24 if position % SEGMENT_BYTES else 40)

    def _write(self, data: bytes, carried: int) -> None:
        left = data
        first = True
        self.bytes.extend(bytes(max(0, self.position - len(self.bytes))))
        while left or (first and not self.position):
            if self.position % PAGE_BYTES == 0:
                self._header(len(left) if not first or carried else 0)
            room = PAGE_BYTES - self.position % PAGE_BYTES
            part, left = left[:room], left[room:]
            self.bytes[self.position : self.position + len(part)] = part
            self.position += len(part)
            first = False
        if carried:
            self.position = (self.position + 7) & ~7

    def _header(self, remaining: int) -> None:
        first = self.position % SEGMENT_BYTES == 0
        info = (1 if remaining else 0) | (2 if first else 0)
        head = struct.pack("=HHIQI4x", MAGIC, info, self.timeline, START + self.position, remaining)
        if first:
            head += struct.pack("=QII", SYSTEM, SEGMENT_BYTES, PAGE_BYTES)
        self.bytes[self.position : self.position + len(head)] = head
        self.position += len(head)

    def segments(self) -> list[bytes]:
        """Give the segments that it has begun."""
        parts = range(0, len(self.bytes), SEGMENT_BYTES)
        return [bytes(self.bytes[at : at + SEGMENT_BYTES]).ljust(SEGMENT_BYTES, b"\0") for at in parts]


def test_the_checksum_is_crc_32c() -> None:
    assert wal.crc32c(b"123456789") == 0xE3069283


@given(
    timeline=st.integers(1, 0xFFFFFFFF),
    number=st.integers(0, (1 << 44) - 1),
    size=st.sampled_from([1 << 20, 16 << 20, 1 << 30]),
)
def test_a_segment_name_says_what_it_was_made_from(timeline: int, number: int, size: int) -> None:
    number %= (1 << 64) // size
    name = SegmentName(timeline, number)
    assert SegmentName.parse(name.text(size), size) == name
    assert SegmentName.parse(name.text(size) + ".partial", size) == name._replace(partial=True)
    assert name.start(size) == number * size


def test_segments_are_named_as_postgresql_names_them() -> None:
    assert SegmentName(1, Lsn.parse("16/B374D848") // (16 << 20)).text(16 << 20) == "0000000100000016000000B3"


@pytest.mark.parametrize(
    "name",
    [
        "00000002.history",
        "0000000100000016000000B3.gz",
        "000000010000001600000",
        "0000000100000016000001B3",
        "audit.json",
    ],
)
def test_other_files_are_no_segments(name: str) -> None:
    assert SegmentName.parse(name, 16 << 20) is None


@settings(max_examples=40)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(7_000, 30_000)), min_size=1, max_size=40),
    carried=st.one_of(st.just(0), st.integers(1, 40_000)),
    cut=st.floats(0, 1),
)
def test_the_tail_is_the_last_record_that_is_wholly_there(lengths: list[int], carried: int, cut: float) -> None:
    log = Log(carried)
    for length in lengths:
        log.record(length)
    written = int(cut * log.position)
    data = bytes(log.bytes[:written]).ljust(SEGMENT_BYTES, b"\0")
    whole = [(begin, end) for begin, end in log.ends if not any(log.bytes[written:end])]
    found = tail(memoryview(data), START)
    if whole:
        assert found == Tail(Lsn(START + whole[-1][0]), Lsn(START + whole[-1][1]))
    else:
        assert found.last_record is None
        assert found.end <= START + log.ends[0][0]


def test_a_log_switch_ends_the_segment() -> None:
    log = Log()
    log.record(100)
    log.record(0, manager=0, info=0x40)
    assert tail(memoryview(bytes(log.bytes)), START).end == START + SEGMENT_BYTES


def test_a_half_written_record_of_zero_bytes_is_noticed_by_its_checksum() -> None:
    log = Log()
    log.record(100)
    end = log.position
    log.record(200)
    data = bytes(log.bytes[: end + 24]).ljust(SEGMENT_BYTES, b"\0")  # its header came through, its data did not
    assert tail(memoryview(data), START).end == START + end


def _faults(data: bytes | bytearray, timeline: int = 1, system: str = str(SYSTEM)) -> list[str]:
    name = SegmentName(timeline, START // SEGMENT_BYTES)
    return list(page_faults(memoryview(data), name, SEGMENT_BYTES, system))


def _full(timeline: int = 1) -> bytearray:
    log = Log(timeline=timeline)
    while log.position < SEGMENT_BYTES - 30_000:
        log.record(20_000)
    log.record(SEGMENT_BYTES - log.position - 24 - 24 * ((SEGMENT_BYTES - log.position) // PAGE_BYTES) - 8)
    return log.bytes


def test_a_sound_segment_has_no_faults() -> None:
    assert _faults(_full()) == []


def test_a_segment_copied_when_a_timeline_was_left_is_sound() -> None:
    assert _faults(_full(timeline=1), timeline=2) == []
    assert "timeline 3" in _faults(_full(timeline=3), timeline=2)[0]


def test_a_segment_of_another_cluster_is_named_foreign() -> None:
    assert "another cluster" in _faults(_full(), system="42")[0]


def test_a_page_at_the_wrong_place_is_found() -> None:
    data = _full()
    data[3 * PAGE_BYTES : 4 * PAGE_BYTES] = data[7 * PAGE_BYTES : 8 * PAGE_BYTES]
    assert _faults(data) == ["page 0/506000 says that it is page 0/50E000"]


def test_zeros_in_the_middle_of_a_segment_are_found() -> None:
    data = _full()
    data[3 * PAGE_BYTES : 4 * PAGE_BYTES] = bytes(PAGE_BYTES)
    assert _faults(data) == ["page 0/506000 has no valid header"]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_header_or_none(data: bytes) -> None:
    header = page_header(data)
    assert header is None or header.magic >> 8 == 0xD1


@cache
def nearly_full() -> Log:
    log = Log()
    while SEGMENT_BYTES - log.position > 30_000:
        log.record(20_000)
    return log


def two_segments(lengths: list[int], crossing: int) -> tuple[bytes, bytes, bool]:
    """Give a segment, the one behind it, and whether a record crosses over."""
    log = deepcopy(nearly_full())
    for length in [*lengths, crossing]:
        log.record(length)
    while log.ends[-1][0] < SEGMENT_BYTES:
        log.record(100)
    first, second = log.segments()
    return first, second, any(begin < SEGMENT_BYTES < end for begin, end in log.ends)


def joined(before: bytes, behind: bytes) -> bool:
    return joins(tail(memoryview(before), START), memoryview(behind), START + SEGMENT_BYTES)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(1_000, 9_000)), max_size=12),
    crossing=st.one_of(st.integers(0, 300), st.integers(30_000, 60_000)),
)
def test_a_segment_joins_the_one_before_whose_last_record_its_first_one_names(
    lengths: list[int], crossing: int
) -> None:
    before, behind, _ = two_segments(lengths, crossing)
    assert joined(before, behind)


@pytest.mark.parametrize("crossing", [30_500, 33_000, 100_000])
def test_a_segment_joins_the_one_before_over_a_record_that_lies_in_both(crossing: int) -> None:
    before, behind, crosses = two_segments([], crossing)
    assert crosses
    assert joined(before, behind)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([40], [48]),
        ([40], [2_000]),
        ([2_000], [40]),
    ],
)
def test_a_segment_of_another_log_at_the_same_place_does_not_join(ours: list[int], theirs: list[int]) -> None:
    before, behind, _ = two_segments(ours, 28_000)
    other_before, other_behind, _ = two_segments(theirs, 28_000)
    assert joined(before, behind)
    assert joined(other_before, other_behind)
    assert not joined(before, other_behind)
    assert not joined(other_before, behind)


def test_a_segment_that_ends_between_records_is_not_joined_by_one_that_begins_in_a_record() -> None:
    log = Log()
    log.record(100)
    log.record(0, manager=0, info=0x40)
    (switched,) = log.segments()
    _, behind, crosses = two_segments([], 31_000)
    assert crosses
    assert not joined(switched, behind)


def test_what_is_no_log_or_has_no_record_before_it_is_for_others_to_find() -> None:
    before, behind, _ = two_segments([], 31_000)
    assert joined(before, bytes(SEGMENT_BYTES))
    assert joins(Tail(None, START), memoryview(behind), START + SEGMENT_BYTES)


def written(cluster: Cluster, seed: float) -> dict[int, bytes]:
    """Give the whole segments of a running cluster after some load, which leaves records of every length in them."""
    cluster.sql(
        f"""
        SELECT setseed({seed});
        INSERT INTO t SELECT repeat(md5(random()::text), (random() * 80)::int) FROM generate_series(1, 12000);
        CHECKPOINT;
        UPDATE t SET v = v || '+' WHERE random() < 0.3;
        SELECT pg_switch_wal();
        """
    )
    end = cluster.flushed() // SEGMENT_BYTES
    names = (SegmentName.parse(file.name, SEGMENT_BYTES) for file in (cluster.data / "pg_wal").iterdir())
    return {
        name.number: (cluster.data / "pg_wal" / name.text(SEGMENT_BYTES)).read_bytes()
        for name in names
        if name is not None and name.number < end
    }


def follows(segments: dict[int, bytes], others: dict[int, bytes], number: int) -> bool:
    """Whether a segment of others joins the one before of ours."""
    start = number * SEGMENT_BYTES
    return joins(tail(segments[number - 1], Lsn(start - SEGMENT_BYTES)), others[number], start)


@pytest.mark.server
@pytest.mark.parametrize("major", MAJORS)
def test_the_segments_of_a_server_join_each_other_and_not_those_of_a_copy_of_it_that_went_another_way(
    major: int,
) -> None:
    with plain_folder() as folder:
        cluster, copy = Cluster(major, folder / "data"), folder / "copy"
        try:
            cluster.create("--wal-segsize=1", wal_keep_size="1GB", full_page_writes="on")
            cluster.start()
            cluster.sql("CREATE TABLE t (v text); ALTER TABLE t ALTER v SET STORAGE EXTERNAL")
            cluster.stop()
            fork = max(segment_numbers(cluster))
            run("cp", "-a", cluster.data, copy)
            ours = going_on(cluster, 0.25)
            cluster.data.rename(folder / "left")
            copy.rename(cluster.data)
            theirs = going_on(cluster, 0.75)
        finally:
            cluster.destroy()
    both = sorted(number for number in ours if number - 1 in ours and number in theirs and number - 1 in theirs)
    assert all(follows(each, each, number) for each in (ours, theirs) for number in each if number - 1 in each)
    apart = [number for number in both if ours[number - 1] != theirs[number - 1] and number > fork]
    joined_all_the_same = [number for number in apart if follows(ours, theirs, number)]
    assert len(apart) > 5
    assert len(joined_all_the_same) <= len(apart) // 4, "a record longer than a page hides some, not many"


def segment_numbers(cluster: Cluster) -> list[int]:
    names = (SegmentName.parse(file.name, SEGMENT_BYTES) for file in (cluster.data / "pg_wal").iterdir())
    return [name.number for name in names if name is not None]


def going_on(cluster: Cluster, seed: float) -> dict[int, bytes]:
    """Start a cluster, give what it writes, and stop it."""
    cluster.start()
    try:
        return written(cluster, seed)
    finally:
        cluster.stop()
