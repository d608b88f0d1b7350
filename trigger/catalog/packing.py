"""Qualifying commits packed into blocks: about ten bytes each, nothing lost.

The catalog and the tags keep commits by the block, never one by one. A block holds up to `BLOCK_COMMITS` commits of
one stream in log order and says what the catalog needs to find one of them again without unpacking: the stretch of
log, the range of commit times, and the range in which its transaction ids lie.

A name of a commit is a number behind some text (`position.Name`); most names of a block have one text. The numbers do
not rise in the order of commits: a transaction that ran for an hour commits among ids that are a million higher. So the
range of a block is that of its numbers inside the outer Tukey fences (three interquartile ranges around the middle
half), and the few outside are listed one by one in `number_outliers`.

Form of `Block.data`, version 2; integers are little-endian:

    byte 0       the version, 2
    the rest     zlib (RFC 1950, with its checksum) of:
      u32        number of commits n
      u64 u64    start of the first commit record, number in the name of the first commit (0 for none)
      i64        time of the first commit, microseconds since 1970
      columns    one byte for the kind (B H I Q: unsigned of 1, 2, 4, 8 bytes; b h i q: signed), then its numbers:
                 n-1  start, less the end of the commit before
                 n    end, less start
                 n-1  number in the name, less the one before (modulo 2^64, as signed)
                 n-1  time, less the one before
                 n    outcome: 0 protected, 1 coalesced, 2 missed
      u32        number of commits that carry markers m
      column     m    their places in the block, from 0
      column     n    which of the texts below stands before the number
      JSON       ASCII: [texts, markers]: each text as [text, whether a number follows]; an array of strings for each of
                 the m

Version 1 knew PostgreSQL's transaction ids alone: no column of texts, and for JSON the markers only, where m is not 0.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from operator import add
from typing import NamedTuple

from trigger.errors import CatalogError, DamagedError
from trigger.model import CommitRecord, Outcome
from trigger.position import History, Name

BLOCK_COMMITS = 1000
"""Most commits in one block; one is opened in about a quarter of a millisecond."""
BLOCK_MARKER_CHARACTERS = 1 << 20
"""A block is closed early where its markers grow beyond this."""

_VERSION = 2
_VERSIONS = (1, 2)
_HEAD = struct.Struct("<IQQq")
_UNSIGNED = (("B", 1 << 8), ("H", 1 << 16), ("I", 1 << 32), ("Q", 1 << 64))
_SIGNED = (("b", 1 << 7), ("h", 1 << 15), ("i", 1 << 31), ("q", 1 << 63))
_WIDTH = {"B": 1, "H": 2, "I": 4, "Q": 8, "b": 1, "h": 2, "i": 4, "q": 8}
_OUTCOMES = (Outcome.PROTECTED, Outcome.COALESCED, Outcome.MISSED)
_OUTCOME_CODES = {outcome: code for code, outcome in enumerate(_OUTCOMES)}
_U64 = (1 << 64) - 1
_TIME_LIMIT_US = 1 << 62  # any two times differ by what fits in a signed column


class Block(NamedTuple):
    """Commits of one stream in log order, packed; the other fields say what is inside."""

    stream: str
    first: int
    """Where the first commit record begins."""
    last: int
    """Where the last commit record ends."""
    number_low: int
    number_high: int
    """Both inclusive; every number in a name lies between them or is one of `number_outliers`."""
    number_outliers: tuple[int, ...]
    whole_names: tuple[str, ...]
    """The names in which no number stands."""
    time_low_us: int
    time_high_us: int
    """Both inclusive; commit times are not in order."""
    commits: int
    data: bytes


def pack(records: Sequence[CommitRecord]) -> list[Block]:
    """Give `records` as blocks, by stream (in order of first appearance) and in log order.

    Raises:
        CatalogError: the records of a stream are not in log order, or two of them overlap.
    """
    streams: dict[str, list[CommitRecord]] = {}
    for record in records:
        streams.setdefault(record.stream, []).append(record)
    for mine in streams.values():
        _require_log_order(mine)
    return [_block(run) for mine in streams.values() for run in _runs(mine)]


class Contents:
    """What a block holds, by column; a `CommitRecord` is made only of the commits that somebody asks for.

    All columns are in log order; `starts` and `ends` rise, `numbers` and `times_us` need not.
    """

    __slots__ = ("_codes", "_markers", "_texts", "_which", "ends", "numbers", "starts", "stream", "times_us")

    def __init__(self, stream: str, body: bytes, version: int) -> None:
        count, start, number, time_us = _HEAD.unpack_from(body)
        gaps, at = _read_column(body, _HEAD.size, count - 1)
        lengths, at = _read_column(body, at, count)
        number_steps, at = _read_column(body, at, count - 1)
        time_steps, at = _read_column(body, at, count - 1)
        self._codes, at = _read_column(body, at, count)
        (marked_count,) = struct.unpack_from("<I", body, at)
        marked, at = _read_column(body, at + 4, marked_count)
        if version == 1:
            self._which, self._texts = (0,) * count, [("", True)]
            markers = json.loads(body[at:]) if marked_count else ()
        else:
            self._which, at = _read_column(body, at, count)
            texts, markers = json.loads(body[at:])
            self._texts = [(str(text), bool(numbered)) for text, numbered in texts]
        self._markers = {place: tuple(mine) for place, mine in zip(marked, markers, strict=True)}
        self.stream = stream
        steps = map(add, lengths, gaps)  # as long as the gaps: the last length leads to no further start
        self.starts = list(accumulate(steps, initial=start))
        self.ends = list(map(add, self.starts, lengths))
        self.numbers = [number & _U64 for number in accumulate(number_steps, initial=number)]
        self.times_us = list(accumulate(time_steps, initial=time_us))
        if max(self._codes) >= len(_OUTCOMES) or max(self._which) >= len(self._texts):
            raise ValueError(f"outcome {max(self._codes)}, text {max(self._which)} of {len(self._texts)}")

    def __len__(self) -> int:
        return len(self.starts)

    def marked(self, marker: str) -> list[int]:
        """Give the places of the commits that carry `marker`."""
        return [place for place, mine in self._markers.items() if marker in mine]

    def name(self, place: int) -> Name:
        """Give what the commit at `place` is called."""
        text, numbered = self._texts[self._which[place]]
        return Name(text, self.numbers[place] if numbered else None)

    def record(self, place: int, history: History) -> CommitRecord:
        """Give the commit at `place`, counted from 0, of a block in `history`."""
        return CommitRecord(
            self.stream,
            self.name(place),
            history.place(self.starts[place]),
            history.place(self.ends[place]),
            self.times_us[place],
            self._markers.get(place, ()),
            _OUTCOMES[self._codes[place]],
        )


def unpack(block: Block, history: History) -> list[CommitRecord]:
    """Give the commits of `block` in log order; raises `CatalogError` where its data are damaged."""
    return unpack_data(block.stream, block.data, history)


def unpack_data(stream: str, data: bytes, history: History) -> list[CommitRecord]:
    """Give the commits that `data` of a block of `stream` hold, in log order; raises as `open_data`."""
    contents = open_data(stream, data)
    return [contents.record(place, history) for place in range(len(contents))]


def open_data(stream: str, data: bytes) -> Contents:
    """Give what `data` of a block of `stream` hold, by column.

    Raises:
        CatalogError: the data are damaged, or of a version that this program does not know.
    """
    version = data[0] if data else 0
    if version not in _VERSIONS:
        raise CatalogError(
            f"block of commits has version {version or 'none'}, this program reads {', '.join(map(str, _VERSIONS))}",
            hint="a newer Trigpoint wrote it, or it is damaged",
        )
    try:
        return Contents(stream, zlib.decompress(memoryview(data)[1:]), version)
    except (zlib.error, struct.error, ValueError, LookupError, TypeError) as error:
        raise DamagedError(
            f"block of {len(data)} bytes of commits of stream {stream!r} is damaged: {error}",
            hint="rebuild the catalog from the tags: trigpoint catalog rebuild",
        ) from error


def _require_log_order(records: Sequence[CommitRecord]) -> None:
    for record in records:
        in_range = 0 <= record.start <= record.end <= _U64 and 0 <= (record.name.number or 0) <= _U64
        if not in_range or abs(record.time_us) >= _TIME_LIMIT_US:
            raise CatalogError(f"not a commit record: {record}")
    for before, after in pairwise(records):
        if after.start < before.end or after.start == before.start:
            raise CatalogError(
                f"commits of stream {after.stream!r} are not in log order: {after.start} behind {before.end}"
            )


def _runs(records: Sequence[CommitRecord]) -> Iterator[Sequence[CommitRecord]]:
    begin, characters = 0, 0
    for place, record in enumerate(records):
        if record.markers:
            characters += sum(map(len, record.markers))
        if place - begin == BLOCK_COMMITS or (characters > BLOCK_MARKER_CHARACTERS and place > begin):
            yield records[begin:place]
            begin, characters = place, sum(map(len, record.markers))
    yield records[begin:]


def _block(records: Sequence[CommitRecord]) -> Block:
    numbers = [record.name.number for record in records if record.name.number is not None]
    low, high, outliers = _number_range(numbers) if numbers else (0, 0, ())
    times = [record.time_us for record in records]
    return Block(
        stream=records[0].stream,
        first=records[0].start,
        last=records[-1].end,
        number_low=low,
        number_high=high,
        number_outliers=outliers,
        whole_names=tuple(record.name.text for record in records if record.name.number is None),
        time_low_us=min(times),
        time_high_us=max(times),
        commits=len(records),
        data=_pack_body(records),
    )


def _number_range(numbers: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
    """Give the lowest and the highest number inside Tukey's outer fences, and those outside them."""
    ordered = sorted(numbers)
    lower, upper = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    reach = 3 * (upper - lower)
    inside = [number for number in ordered if lower - reach <= number <= upper + reach]
    outside = [number for number in ordered if not lower - reach <= number <= upper + reach]
    return inside[0], inside[-1], tuple(outside)


def _pack_body(records: Sequence[CommitRecord]) -> bytes:
    head = records[0]
    pairs = list(pairwise(records))
    marked = [place for place, record in enumerate(records) if record.markers]
    numbers = [record.name.number or 0 for record in records]
    texts = [(record.name.text, record.name.number is not None) for record in records]
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    parts = [
        _HEAD.pack(len(records), head.start, numbers[0], head.time_us),
        _column([after.start - before.end for before, after in pairs]),
        _column([int(record.end) - record.start for record in records]),
        _column([_as_signed(after - before) for before, after in pairwise(numbers)]),
        _column([after.time_us - before.time_us for before, after in pairs]),
        _column([_OUTCOME_CODES[record.outcome] for record in records]),
        struct.pack("<I", len(marked)),
        _column(marked),
        _column([places[text] for text in texts]),
        json.dumps([list(places), [records[place].markers for place in marked]], separators=(",", ":")).encode(),
    ]
    return bytes([_VERSION]) + zlib.compress(b"".join(parts), 6)


def _as_signed(difference: int) -> int:
    """Give `difference` of two unsigned 64-bit numbers, modulo 2^64, as the signed number nearest to zero."""
    return ((difference + (1 << 63)) & _U64) - (1 << 63)


def _column(numbers: Sequence[int]) -> bytes:
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low >= 0:
        kind = next(kind for kind, limit in _UNSIGNED if high < limit)
    else:
        kind = next(kind for kind, limit in _SIGNED if -limit <= low and high < limit)
    return kind.encode() + struct.pack(f"<{len(numbers)}{kind}", *numbers)


def _read_column(body: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    kind = chr(body[at])
    end = at + 1 + count * _WIDTH[kind]
    return struct.unpack_from(f"<{count}{kind}", body, at + 1), end
