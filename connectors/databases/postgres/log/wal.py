"""What the bytes of a write-ahead log segment say: names, page headers, where the records end. No I/O.

Layouts are those of PostgreSQL's `access/xlog_internal.h` and `access/xlogrecord.h`, unchanged in size from version
11 on: a page header of 24 bytes (40 on the first page of a segment), records of a 24-byte header plus data, aligned
to 8. The log is written in the server's byte order, which has to be ours.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from connectors.databases.postgres.lsn import Lsn
from trigger.model import Commit, CommitRecord

PAGE_BYTES = 8192
"""XLOG_BLCKSZ of every packaged server; the long page header says it, and another value is a finding."""

MAJORS = {0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}
"""The major version by the number on each page (XLOG_PAGE_MAGIC in access/xlog_internal.h of each)."""

_SHORT = struct.Struct("=HHIQI4x")
_LONG = struct.Struct("=QII")
_RECORD = struct.Struct("=IIQBB2xI")
_CONTINUES = 0x0001
_LONG_HEADER = 0x0002
_GIVES_UP = 0x0008
_RECORD_LIMIT = 1020 << 20  # XLogRecordMaxSize
_RMGR_XLOG, _XLOG_SWITCH = 0, 0x40
_RMGR_XACT, _XACT_OPCODES, _XACT_COMMIT, _XACT_COMMIT_PREPARED = 1, 0x70, 0x00, 0x30  # access/xact.h
_XACT_HAS_INFO, _XINFO_HAS_DBINFO, _XINFO_HAS_ORIGIN = 0x80, 1 << 0, 1 << 5
_TEXTS = {(_RMGR_XLOG, 0x70): 8, (_RMGR_XACT, 0x10): 72, (5, 0x00): 4}
"""Where a text begins in the main data of `xl_restore_point`, `xl_xact_prepare` and `xl_tblspc_create_rec`, by resource
manager and opcode; the same in versions 15 to 18."""
TEXT_BYTES = 2048
"""So much of the beginning of such a record has the whole text, which has at most MAXPGPATH (1024)."""
_SHORT_DATA = 255
_MORE_HEADERS = {253: 2, 252: 4}
"""Headers that may stand before that of the main data, with their lengths: the origin, the top-level transaction."""
_POSTGRES_EPOCH_US = 946_684_800_000_000
_SEGMENT_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(\.partial)?")
_HISTORY_NAME = re.compile(r"([0-9A-F]{8})\.history")


class SegmentName(NamedTuple):
    """Which stretch of which timeline a segment file holds; `number` counts segments from the start of the log."""

    timeline: int
    number: int
    partial: bool = False

    @classmethod
    def parse(cls, name: str, segment_bytes: int) -> SegmentName | None:
        """Give what the file name says; None where it is not the name of a segment."""
        match = _SEGMENT_NAME.fullmatch(name)
        if match is None:
            return None
        per_id = (1 << 32) // segment_bytes
        low = int(match[3], 16)
        if low >= per_id:
            return None
        return cls(int(match[1], 16), int(match[2], 16) * per_id + low, match[4] is not None)

    def text(self, segment_bytes: int) -> str:
        """Give the file's name as PostgreSQL writes it, without `.partial`."""
        high, low = divmod(self.number, (1 << 32) // segment_bytes)
        return f"{self.timeline:08X}{high:08X}{low:08X}"

    def start(self, segment_bytes: int) -> Lsn:
        """Give the position of the segment's first byte."""
        return Lsn(self.number * segment_bytes)


def history_timeline(name: str) -> int | None:
    """Give the timeline of a history file's name (`00000002.history`); None where it is not one."""
    match = _HISTORY_NAME.fullmatch(name)
    return int(match[1], 16) if match else None


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The header of one page; the last three are known on the first page of a segment only."""

    magic: int
    timeline: int
    address: Lsn
    remaining_bytes: int
    """How much of the record that was left unfinished on the page before follows here; 0 for none."""
    header_bytes: int
    gives_up: bool = False
    """Whether a record that was left unfinished is given up here: its end was lost in a crash."""
    system: str = ""
    segment_bytes: int = 0
    page_bytes: int = 0


def page_header(page: bytes | memoryview) -> PageHeader | None:
    """Give the header at the start of `page` (40 bytes suffice); None where no page of WAL begins there."""
    if len(page) < _SHORT.size + _LONG.size:
        return None
    magic, info, timeline, address, remaining = _SHORT.unpack_from(page)
    if magic >> 8 != 0xD1:
        return None
    remaining, gives_up = remaining if info & _CONTINUES else 0, bool(info & _GIVES_UP)
    if not info & _LONG_HEADER:
        return PageHeader(magic, timeline, Lsn(address), remaining, _SHORT.size, gives_up)
    system, segment, block = _LONG.unpack_from(page, _SHORT.size)
    size = _SHORT.size + _LONG.size
    return PageHeader(magic, timeline, Lsn(address), remaining, size, gives_up, str(system), segment, block)


class Slices(Protocol):
    """Bytes of which slices can be had, such as a file's."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview:
        """Give the bytes of a slice without a step."""
        ...


def page_faults(segment: Slices, name: SegmentName, segment_bytes: int, system: str) -> Iterator[str]:
    """Give what is wrong with the page headers of a whole segment, in words; nothing where all is well.

    The pages behind a log switch are zero up to the end of the segment. A segment made when a timeline was left
    starts with pages of the timeline before, so a page may name an older timeline than the file, never a newer one.
    """
    first = page_header(segment[:64])
    start = name.start(segment_bytes)
    if first is None or not first.page_bytes:
        yield "does not begin with a page of write-ahead log"
        return
    if system and first.system != system:
        yield f"belongs to another cluster: system identifier {first.system}, not {system}"
    if first.segment_bytes != segment_bytes or first.page_bytes != PAGE_BYTES:
        yield f"has segments of {first.segment_bytes} and pages of {first.page_bytes} bytes"
        return
    timeline = first.timeline
    for offset in range(0, segment_bytes, PAGE_BYTES):
        header = page_header(segment[offset : offset + 64])
        address = Lsn(start + offset)
        if header is None:
            pages = range(offset, segment_bytes, PAGE_BYTES)
            if any(bytes(segment[at : at + PAGE_BYTES]).strip(b"\0") for at in pages):
                yield f"page {address} has no valid header"
            return
        if header.address != address:
            yield f"page {address} says that it is page {header.address}"
            return
        if header.magic != first.magic or not timeline <= header.timeline <= name.timeline:
            yield f"page {address} is of timeline {header.timeline} and format {header.magic:#06x}"
            return
        timeline = header.timeline


class Tail(NamedTuple):
    """Where the complete records of a segment end."""

    last_record: Lsn | None
    """Where the last complete record that begins in the segment begins; None where there is none."""
    end: Lsn
    """Behind it; where the next record begins, or would begin."""


def tail(segment: Slices, start: Lsn) -> Tail:
    """Find the end of the complete records in a segment that was written from its start and may be unfinished.

    Only the end is looked at: the last written page is found by bisection, the records are followed from the last
    page on which one begins, and the last of them must pass its checksum, since it may be half written. A record
    that began in the segment before and fills all of this one leaves `end` at `start`.

    Args:
        segment: the file's bytes, zero where nothing has been written yet.
        start: the position of its first byte.
    """
    pages = _written_pages(segment, start)
    for page in range(pages - 1, -1, -1):
        position = _first_record(segment, page)
        if position is None:
            continue
        found = _follow(segment, start, pages * PAGE_BYTES, position)
        if found.last_record is not None or page == 0:
            return found
    return Tail(None, start)


def _written_pages(segment: Slices, start: Lsn) -> int:
    low, high = 0, len(segment) // PAGE_BYTES
    while low < high:
        middle = (low + high) // 2
        header = page_header(segment[middle * PAGE_BYTES : middle * PAGE_BYTES + 64])
        if header is not None and header.address == start + middle * PAGE_BYTES:
            low = middle + 1
        else:
            high = middle
    return low


def _first_record(segment: Slices, page: int) -> int | None:
    """Give the offset at which the first record of a page begins; None where one from before fills the page."""
    offset = page * PAGE_BYTES
    header = page_header(segment[offset : offset + 64])
    if header is None:
        return None
    position = header.header_bytes + _aligned(header.remaining_bytes)
    return offset + position if position < PAGE_BYTES else None


def _follow(segment: Slices, start: Lsn, limit: int, position: int) -> Tail:
    """Follow the records from `position` (an offset) up to the last complete one before `limit`."""
    records: list[tuple[int, int, bytes]] = []
    while (head := _collect(segment, position, _RECORD.size, limit)) is not None:
        total, _, previous, info, manager, _ = _RECORD.unpack(head[0])
        if not _RECORD.size <= total <= _RECORD_LIMIT or (records and previous != start + records[-1][0]):
            break
        if (body := _collect(segment, position, total, limit)) is None:
            break
        records.append((position, body[1], body[0]))
        position = _aligned(body[1])
        if manager == _RMGR_XLOG and info & 0xF0 == _XLOG_SWITCH:
            position = len(segment)
            records[-1] = (records[-1][0], position, body[0])
    while records and not checksum_holds(records[-1][2]):
        position = records.pop()[0]
    return Tail(Lsn(start + records[-1][0]) if records else None, Lsn(start + position))


def is_filled(segment: Slices) -> bool:
    """Whether one record fills a segment whole: it began before, ends behind, and no other begins here."""
    left = 0
    for offset in range(0, len(segment), PAGE_BYTES):
        header = page_header(segment[offset : offset + 64])
        if header is None or (offset and header.remaining_bytes != left):
            return False
        left = header.remaining_bytes - (PAGE_BYTES - header.header_bytes)
        if left <= 0:
            return False
    return True


def records(pages: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Give of each whole record where it begins and ends, and its bytes; behind damage it goes on with the next page.

    `pages` are log from the start of a page on.
    """
    for page in range(0, len(pages), PAGE_BYTES):
        position = _first_record(pages, page // PAGE_BYTES)
        while position is not None and position < page + PAGE_BYTES:
            head = _collect(pages, position, _RECORD.size, len(pages))
            total = _RECORD.unpack(head[0])[0] if head is not None else 0
            body = _collect(pages, position, total, len(pages)) if _RECORD.size <= total <= len(pages) else None
            if body is None:
                break
            yield position, body[1], body[0]
            position = _aligned(body[1])


def holds_record(segment: Slices, start: int, begin: int, end: int) -> bool:
    """Whether a record that is whole, and passes its checksum, begins in a segment from `begin` on and ends by `end`.

    Behind damage it goes on with the next page. `start` is the position of the segment's first byte.
    """
    limit = min(len(segment), end - start)
    for page in range(max(begin - start, 0) // PAGE_BYTES, -(-limit // PAGE_BYTES)):
        header = page_header(segment[page * PAGE_BYTES : page * PAGE_BYTES + 64])
        is_ours = header is not None and header.address == start + page * PAGE_BYTES
        position = _first_record(segment, page) if is_ours else None
        while position is not None and position < (page + 1) * PAGE_BYTES:
            head = _collect(segment, position, _RECORD.size, limit)
            total = _RECORD.unpack(head[0])[0] if head is not None else 0
            body = _collect(segment, position, total, limit) if _RECORD.size <= total <= limit else None
            if body is None:
                break
            if start + position >= begin and checksum_holds(body[0]):
                return True
            position = _aligned(body[1])
    return False


def _collect(segment: Slices, position: int, count: int, limit: int) -> tuple[bytes, int] | None:
    """Give `count` bytes of records from an offset on, leaping page headers, and the offset behind them."""
    parts = []
    while count:
        if position >= limit:
            return None
        if position % PAGE_BYTES == 0:
            flags = int.from_bytes(segment[position + 2 : position + 4], sys.byteorder)
            position += _SHORT.size + (_LONG.size if flags & _LONG_HEADER else 0)
        length = min(count, PAGE_BYTES - position % PAGE_BYTES)
        parts.append(bytes(segment[position : position + length]))
        position += length
        count -= length
    return b"".join(parts), position


def behind(start: int, length: int, segment_bytes: int) -> int:
    """Give where the record behind one of `length` bytes may begin, which begins at `start`, leaping page headers."""
    at, left = start, _aligned(length)
    while left > (room := PAGE_BYTES - at % PAGE_BYTES):
        at, left = at + room, left - room
        at += _SHORT.size + (0 if at % segment_bytes else _LONG.size)
    return at + left


def joins(before: Tail, following: Slices, start: int) -> bool:
    """Whether a segment goes on where the complete one before it ends: its first record names the last one there.

    Args:
        before: of the segment before.
        following: the beginning of the segment, a page at the least.
        start: where it begins.
    """
    header = page_header(following[:64])
    if header is None or header.address != start or before.last_record is None:
        return True  # that is somebody else's finding
    crosses = before.end < start and not header.gives_up  # the last record there begins at its end, and goes on here
    if crosses != (header.remaining_bytes > 0):
        return False
    first = _first_record(following, 0)
    head = _collect(following, first, _RECORD.size, min(len(following), PAGE_BYTES)) if first is not None else None
    if head is None:
        return True
    total, _, previous, *_ = _RECORD.unpack(head[0])
    behind_header = _SHORT.size if before.end % PAGE_BYTES == 0 else 0
    return bool(total == 0 or previous == (before.end + behind_header if crosses else before.last_record))


class CommitStamp(NamedTuple):
    """What a commit record says of its transaction."""

    xid: int
    """32 bits; for COMMIT PREPARED 0, which stands elsewhere in the record."""
    time_us: int
    """By the database's clock, in microseconds since 1970."""
    from_elsewhere: bool
    """Whether it was replicated from another database, whose clock logical decoding gives instead."""
    database: int = 0
    """The oid of the database that it was made in, which with `wal_level = logical` each says; 0 where it does not."""

    def fits(self, xid: int, time_us: int) -> bool:
        """Whether it is the record of a transaction with this id (64 bits) and time."""
        if self.from_elsewhere:
            return self.xid in (0, xid & 0xFFFFFFFF)
        return self.time_us == time_us


def holds_commit(pages: bytes, at: int, commit: Commit | CommitRecord) -> bool:
    """Whether the record of a commit begins at an offset; see `commit_stamp`."""
    stamp = commit_stamp(pages, at)
    return stamp is not None and stamp.fits(commit.name.number or 0, commit.time_us)


def commit_stamp(pages: bytes, at: int) -> CommitStamp | None:
    """Give what the commit record at an offset says; None where none begins there, or it is not whole.

    Args:
        pages: log from the start of a page on.
        at: where the record begins.
    """
    head = _collect(pages, at, _RECORD.size, len(pages))
    if head is None:
        return None
    total, xid, _, info, manager, _ = _RECORD.unpack(head[0])
    if manager != _RMGR_XACT or info & _XACT_OPCODES not in (_XACT_COMMIT, _XACT_COMMIT_PREPARED):
        return None
    body = _collect(pages, at, total, len(pages)) if _RECORD.size <= total <= len(pages) else None
    if body is None or not checksum_holds(body[0]):
        return None
    data = body[0][_main_data(body[0]) :]
    (stamp,) = struct.unpack_from("=q", data)
    (flags,) = struct.unpack_from("=I", data, 8) if info & _XACT_HAS_INFO else (0,)
    (database,) = struct.unpack_from("=I", data, 12) if flags & _XINFO_HAS_DBINFO else (0,)
    return CommitStamp(xid, stamp + _POSTGRES_EPOCH_US, bool(flags & _XINFO_HAS_ORIGIN), database)


def text_of(pages: bytes, at: int, length: int) -> bytes | None:
    """Give the text from outside that the record at an offset has; None where none of that length with one is there.

    That is the id of a prepared transaction, the name of a restore point, or the folder of a new tablespace.

    Args:
        pages: log from the start of a page on, with `TEXT_BYTES` of the record, or all of it.
        at: where the record begins.
        length: of the whole record.
    """
    head = _collect(pages, at, min(length, TEXT_BYTES), len(pages)) if length >= _RECORD.size else None
    if head is None:
        return None
    total, _, _, info, manager, _ = _RECORD.unpack_from(head[0])
    offset = _TEXTS.get((manager, info & (_XACT_OPCODES if manager == _RMGR_XACT else 0xF0)))
    if total != length or offset is None:
        return None
    text, end, _ = head[0][_main_data(head[0]) + offset :].partition(b"\0")
    return text if end else None


def _main_data(record: bytes) -> int:
    """Give where the main data of a record without blocks begins: behind its headers, see access/xlogrecord.h."""
    at = _RECORD.size
    while record[at] in _MORE_HEADERS:
        at += 1 + _MORE_HEADERS[record[at]]
    return at + (2 if record[at] == _SHORT_DATA else 5)


def _aligned(count: int) -> int:
    return (count + 7) & ~7


def checksum_holds(record: bytes) -> bool:
    """Whether a whole record passes its CRC-32C, which covers its data first and then its header."""
    header = record[: _RECORD.size]
    return crc32c(header[:-4], crc32c(record[_RECORD.size :])) == int(_RECORD.unpack(header)[5])


def _table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - eight steps of one division
        entries.append(value)
    return tuple(entries)


_CRC_TABLE = _table()


def crc32c(data: bytes, crc: int = 0) -> int:
    """Give the checksum (CRC-32C) that PostgreSQL puts on records and control file; `crc` is of what is before."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
