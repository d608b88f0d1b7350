"""Whether the files of a stopped server hold all that its catalogs speak of; read as they lie, page by page.

The server keeps no list of sizes: a table that lost its end, or a page that became zeros, is a shorter table to it, and
to amcheck. So each file is held against all that speaks of it: its size against `relpages`, which only VACUUM, ANALYZE
and a build write; its pages against the visibility map, whose bits go when a page goes; and its rows against the
entries of its indexes, which VACUUM removes before the rows they point to. What holds of pages is in bufpage.h,
itemid.h, itup.h, nbtree.h, hash.h, gist.h and visibilitymapdefs.h, and is the same from 15 to 18.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.log.files import reading
from trigger.errors import RestoreError

_CHUNK_BYTES = 1 << 20
_HEADER = struct.Struct("<HHHHH")  # flags, lower, upper, special, size and version: from byte 10 of a page on
_HEADER_AT, _ITEMS_AT = 10, 24
_VALID_FLAGS = 0x0007
_ITEM = struct.Struct("<HHHH")  # block (high, low), offset, and what else an entry of an index says of itself
_SEQUENCE_MAGIC = 0x1717
_WITH_FIRST_PAGE = frozenset({"btree", "hash", "gin", "gist", "spgist", "brin"})
_NOWHERE = 0xFFFFFFFF
_NEIGHBOURS = {"btree": (0, 4), "hash": (4,), "gist": (8,), "gin": (0,)}
"""By kind of index where in the end of a page (its special space) the numbers of neighbours stand."""
FOLLOWED = frozenset({"btree", "hash", "gist"})
"""The kinds of index whose entries are held against the rows of their table."""


class Relation(NamedTuple):
    """One table, index, sequence or the like, as its database's catalog tells of it."""

    database: str
    name: str
    kind: str
    """`pg_class.relkind`."""
    method: str
    """The access method, "" for a sequence."""
    is_unlogged: bool
    known_pages: int
    """`pg_class.relpages`."""
    path: str
    """Of its main fork, from the data directory on."""
    table: str
    """Of an index that was built to its end the path of its table, else ""."""

    def __str__(self) -> str:
        return f"{self.name} in {self.database}"


@dataclass(slots=True)
class Look:
    """What was seen in the files of a cluster."""

    faults: list[str]
    relations: int = 0
    bytes: int = 0
    entries: int = 0
    """Of indexes, each of which points to a row that is there."""


class _Rows:
    """What the pages of a table say of how many rows they have room for."""

    def __init__(self) -> None:
        self.places = array("H")
        self.zeros: set[int] = set()
        """The pages of zeros, which nothing was written to yet, or which were lost."""

    def add(self, page: bytes) -> None:
        """Take the next page in."""
        _, lower, upper, _, _ = _HEADER.unpack_from(page, _HEADER_AT)
        if not upper:
            self.zeros.add(len(self.places))
        self.places.append(min(max(0, lower - _ITEMS_AT) // 4, 0xFFFF))

    def lacks(self, block: int, row: int) -> bool:
        """Whether there is no such row."""
        return block >= len(self.places) or row > self.places[block]


class _Pages(NamedTuple):
    """How the files of a cluster are divided."""

    data: Path
    block_bytes: int
    segment_blocks: int
    over: threading.Event


def look(
    data: Path, relations: Sequence[Relation], block_bytes: int, segment_blocks: int, over: threading.Event
) -> Look:
    """Read every file of `relations` and give what is wrong; blocks for as long as that lasts, or until `over` is set.

    Raises:
        RestoreError: it was ended by `over`.
    """
    pages, seen = _Pages(data, block_bytes, segment_blocks, over), Look([])
    indexes: dict[str, list[Relation]] = {}
    for one in relations:
        if one.table:
            indexes.setdefault(one.table, []).append(one)
    for one in relations:
        seen.relations += 1
        try:
            if one.kind == "i":
                seen.faults += _whole(one, pages, seen) + _links(one, pages)
            else:
                seen.faults += _table(one, indexes.get(one.path, []), pages, seen)
        except OSError as error:
            seen.faults.append(f"{one}: {error.filename or one.path} cannot be read: {error.strerror}")
    return seen


def _table(one: Relation, indexes: Sequence[Relation], pages: _Pages, seen: Look) -> list[str]:
    """Give what is wrong with a table (or a sequence), and with the way from its indexes to it."""
    rows = _Rows()
    faults = _whole(one, pages, seen, rows)
    if one.method == "heap" and not one.is_unlogged:
        faults += _beyond_the_map(one, rows, pages)
        for index in indexes:
            if index.method in FOLLOWED and (pages.data / index.path).exists():
                faults += _led_nowhere(index, one, rows, pages, seen)
    return faults


def _whole(one: Relation, pages: _Pages, seen: Look, rows: _Rows | None = None) -> list[str]:
    """Give what is wrong with the files of one relation by themselves; what its pages have room for goes to `rows`."""
    if not (pages.data / one.path).exists():
        return [f"{one}: its file {one.path} is gone"]
    faults = []
    blocks = _blocks(one.path, pages)
    if not blocks and (one.kind == "S" or (one.table and one.method in _WITH_FIRST_PAGE)):
        faults.append(f"{one}: its file {one.path} is empty")
    if blocks < one.known_pages and not one.is_unlogged and one.method in {"heap"} | _WITH_FIRST_PAGE:
        faults.append(
            f"{one}: its file {one.path} has {blocks} pages, and had {one.known_pages} by the catalog (where these were"
            " loaded with other statistics: ANALYZE it in production, and take a point)"
        )
    if one.is_unlogged and not (pages.data / f"{one.path}_init").exists():
        faults.append(f"{one}: its file {one.path}_init is gone")
    for fork in ("", "_fsm", "_vm", "_init"):
        path = one.path + fork
        if (pages.data / path).exists():
            faults += [f"{one}: {what}" for what in _torn(path, pages)]
            seen.bytes += _blocks(path, pages) * pages.block_bytes
            broken = []
            for number, page in _each(path, pages):
                if not _is_sound(page):
                    broken.append(number)
                if rows is not None and not fork:
                    rows.add(page)
            if broken:
                faults.append(f"{one}: {path} has {len(broken)} pages with a broken header, the first {broken[0]}")
    if one.kind == "S" and blocks and not faults:
        faults += _no_sequence(one, pages)
    return faults


def _is_sound(page: bytes) -> bool:
    """Whether a page is one that the server would take (`PageIsVerified`): all zeros, or with a plausible header."""
    flags, lower, upper, special, version = _HEADER.unpack_from(page, _HEADER_AT)
    if not upper and not any(page):
        return True
    ordered = _ITEMS_AT <= lower <= upper <= special <= len(page)
    return ordered and not flags & ~_VALID_FLAGS and version & 0xFF00 == len(page) & 0xFF00 and special % 8 == 0


def _no_sequence(one: Relation, pages: _Pages) -> list[str]:
    page = next(iter(_each(one.path, pages)))[1]
    special = _HEADER.unpack_from(page, _HEADER_AT)[3]
    if special + 4 <= len(page) and struct.unpack_from("<I", page, special)[0] == _SEQUENCE_MAGIC:
        return []
    return [f"{one}: {one.path} holds no sequence"]


def _links(index: Relation, pages: _Pages) -> list[str]:
    """Give whether pages of an index have neighbours that are not there, or are zeros."""
    if index.method not in _NEIGHBOURS or not (pages.data / index.path).exists():
        return []
    led, zeros, number = set(), set(), -1
    for number, page in _each(index.path, pages):
        special = _HEADER.unpack_from(page, _HEADER_AT)[3]
        if not special:
            zeros.add(number)
        for place in _NEIGHBOURS[index.method] if _ITEMS_AT <= special <= len(page) - 8 else ():
            led.add(struct.unpack_from("<I", page, special + place)[0])
    led -= {0, _NOWHERE}  # page 0 is nobody's neighbour
    lost = {block for block in led if block > number or block in zeros}
    if not lost:
        return []
    return [f"{index}: {len(lost)} of its pages, the first {min(lost)}, are not in {index.path} any more"]


def _beyond_the_map(one: Relation, rows: _Rows, pages: _Pages) -> list[str]:
    """Give where the visibility map speaks of pages that are not there, or are empty: they were lost."""
    path = f"{one.path}_vm"
    if not (pages.data / path).exists():
        return []
    lost = []
    for number, page in _each(path, pages):
        first = number * (pages.block_bytes - _ITEMS_AT) * 4
        for place, bits in enumerate(page[_ITEMS_AT:]):
            for turn in range(4) if bits else ():
                block = first + place * 4 + turn
                if bits >> (2 * turn) & 3 and (block >= len(rows.places) or block in rows.zeros):
                    lost.append(block)
    if not lost:
        return []
    return [f"{one}: {len(lost)} of its pages, the first {lost[0]}, are in the visibility map, and not in {one.path}"]


def _led_nowhere(index: Relation, table: Relation, rows: _Rows, pages: _Pages, seen: Look) -> list[str]:
    """Give whether entries of an index point to rows of which the table has no trace."""
    lost: set[tuple[int, int]] = set()
    for _, page in _each(index.path, pages):
        found = _entries(index.method, page)
        seen.entries += len(found)
        lost.update((block, row) for block, row in found if rows.lacks(block, row))
    if not lost:
        return []
    first = min(lost)
    return [
        f"{table}: index {index.name} points to {len(lost)} rows that are not there, the first in page {first[0]};"
        f" {table.path} has {len(rows.places)} pages"
    ]


def _entries(method: str, page: bytes) -> list[tuple[int, int]]:
    """Give (page, row) of every entry for a row in a page of an index."""
    _, lower, upper, special, _ = _HEADER.unpack_from(page, _HEADER_AT)
    if not upper or not _ITEMS_AT <= lower <= upper <= special <= len(page) - 8:
        return []
    first = _first_entry(method, page, special)
    if first is None:
        return []
    found = []
    for item in struct.unpack_from(f"<{(lower - _ITEMS_AT) // 4}I", page, _ITEMS_AT)[first:]:
        at = item & 0x7FFF
        if item & 0x18000 and at + 8 <= len(page):
            high, low, row, more = _ITEM.unpack_from(page, at)
            if method == "btree" and more & 0x2000:  # a list of rows with the same key (posting list, nbtree.h)
                found += _listed(page, at + low, row & 0x0FFF)
            else:
                found.append((high << 16 | low, row))
    return found


def _listed(page: bytes, at: int, count: int) -> list[tuple[int, int]]:
    if at + 6 * count > len(page):
        return []
    return [(high << 16 | low, row) for high, low, row in struct.iter_unpack("<HHH", page[at : at + 6 * count])]


def _first_entry(method: str, page: bytes, special: int) -> int | None:
    """Give which item of a page is the first that stands for a row; None where none does."""
    if method == "btree" and special + 16 == len(page):
        _, following, level, flags = struct.unpack_from("<IIIH", page, special)
        is_leaf = flags & 0x1 and not flags & (0x4 | 0x8 | 0x10) and level == 0  # deleted, metapage, half dead
        return (1 if following else 0) if is_leaf else None  # the first of a page that has a right neighbour is a bound
    if method == "hash" and special + 16 == len(page):
        flags, kind = struct.unpack_from("<HH", page, special + 12)
        return 0 if kind == 0xFF80 and flags & 0x3 else None  # bucket and overflow pages
    if method == "gist" and special + 16 == len(page):
        flags, kind = struct.unpack_from("<HH", page, special + 12)
        return 0 if kind == 0xFF81 and flags & 0x1 and not flags & 0x2 else None  # leaves that are not deleted
    return None


def _segments(path: str, pages: _Pages) -> Iterator[Path]:
    """Give the files of a fork in order; the first is there."""
    yield pages.data / path
    number = 1
    while (file := pages.data / f"{path}.{number}").exists():
        yield file
        number += 1


def _blocks(path: str, pages: _Pages) -> int:
    """Give how many pages a fork has, as the server counts them: to the first file that is not full."""
    total = 0
    for file in _segments(path, pages):
        blocks = file.stat().st_size // pages.block_bytes
        total += blocks
        if blocks < pages.segment_blocks:
            break
    return total


def _torn(path: str, pages: _Pages) -> list[str]:
    """Give what is wrong with the sizes of a fork's files: all are full, then one is not, then all are empty."""
    faults, ended = [], False
    files = list(_segments(path, pages))
    for file in files:
        size = file.stat().st_size
        if size % pages.block_bytes:
            faults.append(f"{file.relative_to(pages.data)} ends inside a page")
        if ended and size:
            faults.append(f"{file.relative_to(pages.data)} comes behind a file that is not full")
        ended = ended or size < pages.segment_blocks * pages.block_bytes
    name = (pages.data / path).name
    there = [entry for entry in (pages.data / path).parent.glob(f"{name}.*") if entry.suffix[1:].isdigit()]
    if len(there) >= len(files):
        faults.append(f"a file before {max(there).name} is gone")
    return faults


def _each(path: str, pages: _Pages) -> Iterator[tuple[int, bytes]]:
    """Give every page of a fork with its number."""
    number, left = 0, _blocks(path, pages)
    for file in _segments(path, pages):
        here = min(left, pages.segment_blocks)
        left -= here
        with reading(file) as opened:
            while here:
                if pages.over.is_set():
                    raise RestoreError("the look at the files was ended before its end")
                chunk = opened.read(min(here * pages.block_bytes, _CHUNK_BYTES))
                if len(chunk) < pages.block_bytes:
                    return
                for at in range(0, len(chunk) - pages.block_bytes + 1, pages.block_bytes):
                    yield number, chunk[at : at + pages.block_bytes]
                    number += 1
                    here -= 1
