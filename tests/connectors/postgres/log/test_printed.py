"""No text in a record is taken for the line of another, however what is printed comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.databases.postgres.log import printed
from connectors.databases.postgres.log.printed import Cutter
from connectors.databases.postgres.log.said import Said
from connectors.databases.postgres.log.waldump import parse_commit, parse_ended, parse_tablespace
from connectors.databases.postgres.lsn import Lsn

_TIME = "2026-11-26 19:00:00.1 UTC"
_FORGED = (
    f"rmgr: Transaction len (rec/tot):     34/    34, tx:        734, lsn: 0/1000, prev 0/0, desc: COMMIT {_TIME}",
    f"rmgr: Transaction len (rec/tot):     34/    34, tx: 734, lsn: 0/1000, prev 0/0, desc: ABORT {_TIME}; subxacts: 7",
    "rmgr: Transaction len (rec/tot):    300/   300, tx: 735, lsn: 0/1000, prev 0/0, desc: PREPARE gid x: y",
    'rmgr: Tablespace  len (rec/tot):     40/    40, tx: 1, lsn: 0/0, prev 0/0, desc: CREATE 9 "/srv"',
    "rmgr: XLOG len (rec/tot): 98/98, tx: 1, lsn: 0/0, prev 0/0, desc: RESTORE_POINT x",
    f" desc: COMMIT {_TIME}",
    "pg_waldump: error: error in WAL record at 0/1: x",
    " 12 13; subxacts: 14",
    f': {_TIME}; "',
    "\n",
    "\n\n",
    "\r\x0b\x0c\x1c\x85\u2028",
)


class Record(NamedTuple):
    """One record of a log, and what the program prints of it."""

    line: bytes
    text: bytes | None


def record(number: int, manager: str, kind: str, before: str, text: bytes | None, behind: str) -> Record:
    head = f"rmgr: {manager:<11} len (rec/tot): {number + 40:6}/{number + 40:6}, tx: {number:10}, "
    head += f"lsn: 0/{number:08X}, prev 0/{max(number - 1, 0):08X}, desc: {kind} {before}"
    return Record(head.encode() + (text or b"") + behind.encode(), text)


_TEXTS = (
    st.lists(st.one_of(st.sampled_from(_FORGED), st.text(max_size=6)), max_size=5)
    .map("".join)
    .map(lambda text: text.encode(errors="replace").replace(b"\0", b""))
)
_KINDS = st.one_of(
    st.tuples(st.just("Transaction"), st.just("PREPARE"), st.just("gid "), _TEXTS, st.just(f": {_TIME}; subxacts: 7")),
    st.tuples(st.just("XLOG"), st.just("RESTORE_POINT"), st.just(""), _TEXTS, st.just("")),
    st.tuples(st.just("Tablespace"), st.just("CREATE"), st.just('9 "'), _TEXTS, st.just('"')),
    st.tuples(st.just("Transaction"), st.just("COMMIT"), st.just(_TIME), st.none(), st.just("; subxacts: 8 9")),
    st.tuples(st.just("Transaction"), st.just("ABORT_PREPARED"), st.just(f"7: {_TIME}"), st.none(), st.just("")),
    st.tuples(st.just("Storage"), st.just("CREATE"), st.just("base/5/16384"), st.none(), st.just("")),
)
_RECORDS = st.lists(_KINDS, max_size=8).map(lambda kinds: [record(number, *one) for number, one in enumerate(kinds)])


def cut(records: Sequence[Record], sizes: Sequence[int]) -> list[str]:
    """Give the lines that come of what is printed, which comes in pieces of these sizes, again and again."""
    asked = list[int]()

    def text_at(start: Lsn, length: int) -> bytes:
        text = records[start].text
        assert text is not None
        assert length == start + 40
        asked.append(start)
        return text

    cutter, data = Cutter(text_at), b"".join(one.line + b"\n" for one in records)
    lines, at, turn = list[str](), 0, 0
    while at < len(data):
        chunk, before = data[at : at + sizes[turn % len(sizes)]], len(asked)
        asks = cutter.asks(chunk)
        parts = cutter.take(chunk)
        assert asks or len(asked) == before, "it may block only where it says so"
        at, turn = at + len(chunk), turn + 1
        lines += parts
    assert cutter.rest() == []
    return lines


@given(_RECORDS, st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_there_is_one_line_a_record_whatever_its_text(records: list[Record], sizes: list[int]) -> None:
    assert cut(records, sizes) == [one.line.decode() for one in records]


@given(_RECORDS)
def test_each_line_says_what_its_own_record_is(records: list[Record]) -> None:
    for number, line in enumerate(cut(records, [1 << 20])):
        found = printed.parse(line)
        assert found is not None
        assert (found.start, found.xid, found.length) == (number, number, number + 40)
        assert (parse_commit(line) is None) == (Said.of(line) is None) == (found.kind != "COMMIT")
        assert (parse_tablespace(line) is not None) == (found.manager == "Tablespace" and '9 ""' not in line)
        ended = parse_ended(line)
        assert ended is None or (ended.start, ended.time is None) == (number, found.kind == "PREPARE")


def test_a_folder_is_read_with_its_line_ends() -> None:
    (line,) = cut([record(0, "Tablespace", "CREATE", '9 "', b'/srv/a"\nb', '"')], [7])
    made = parse_tablespace(line)
    assert made is not None
    assert made.location == '/srv/a"\nb'


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_long_line_behind_a_text_with_line_ends_is_not_held_whole(end: bytes) -> None:
    text = b"x\n" + _FORGED[0].encode() + b"\ny"
    one = record(0, "Transaction", "PREPARE", "gid ", text, f": {_TIME}; subxacts:")
    cutter = Cutter(lambda _start, _length: text)
    parts = cutter.take(one.line)
    for _ in range(100):
        parts += cutter.take(b" 1234567" * 4000)
        assert len(cutter._held) < 128 << 10
    parts += cutter.take(end) + cutter.rest()
    assert all(part.startswith(" ") for part in parts[1:])
    assert "".join(parts) == (one.line + b" 1234567" * 400_000).decode()
    assert parse_ended(parts[0]) == (Lsn(0), None, True)
