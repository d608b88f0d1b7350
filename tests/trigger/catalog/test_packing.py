"""Blocks of commits: lossless, small, quick to open, and never read wrong when damaged."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from itertools import groupby, pairwise
from operator import attrgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.databases.postgres.lsn import Lsn
from trigger.catalog.packing import BLOCK_COMMITS, BLOCK_MARKER_CHARACTERS, Block, pack, unpack, unpack_data
from trigger.errors import CatalogError
from trigger.model import CommitRecord, Outcome
from trigger.position import History, Name, Place

U64 = (1 << 64) - 1
HISTORY = History("postgres", "7391", 1)
BLOCK_OF_0_1_0 = "AXicY2IAghslm8WAlLEcAwQIrDf96s3G4CThZGCQ9M9zQRsjgxMjAyNQxokhOlqpILGyKD8nRyk2FgBxQg2s"

edges = st.sampled_from([0, 1, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 63, U64])
ids = st.builds(Name, st.just(""), edges | st.integers(0, U64))
names = (
    ids
    | st.builds(Name, st.sampled_from(["0-1-", "0-2-", "payroll ", "Lager – "]), edges | st.integers(0, U64))
    | st.text(max_size=20).map(Name.parse)
)
facts = st.tuples(
    ids | names,  # what a commit is called
    st.integers(-(1 << 62) + 1, (1 << 62) - 1) | st.just(1_760_000_000_000_000),
    st.lists(st.text(max_size=20), max_size=3).map(tuple),
    st.sampled_from(Outcome),
)


@st.composite
def legal_records(draw: st.DrawFn, streams: tuple[str, ...] = ("bank", "Lager – ünï")) -> list[CommitRecord]:
    """Records of several streams, each in log order, from anywhere in the log."""
    records = []
    for stream in streams:
        steps = draw(st.lists(st.tuples(st.integers(0, 1 << 34), st.integers(1, 1 << 16), facts), max_size=12))
        at = draw(st.sampled_from([0, 0x16B374D848, U64 - (1 << 38)]))
        for gap, length, (name, time_us, markers, outcome) in steps:
            records.append(CommitRecord(stream, name, Lsn(at + gap), Lsn(at + gap + length), time_us, markers, outcome))
            at += gap + length
    return records


def busy_server(count: int, *, seed: int = 1, wal_bytes: int = 600, apart_us: int = 500) -> list[CommitRecord]:
    """Commits as 16 clients of a busy server make them: ids and times slightly out of order, records aligned."""
    chance = random.Random(seed)
    at, time_us, xid, records = 0x16B374D848, 1_760_000_000_000_000, 900_000, []
    for number in range(count):
        at += 8 * chance.randint(1, wal_bytes // 4)
        time_us += int(chance.expovariate(1 / apart_us))
        xid += 1 + (chance.random() < 0.1)
        length = chance.choice((40, 48, 64, 232))
        outcome = Outcome.PROTECTED if number == count - 1 else Outcome.COALESCED
        record = CommitRecord(
            "bank",
            Name("", xid - chance.randint(0, 16)),
            Lsn(at),
            Lsn(at + length),
            time_us - chance.randint(0, 200),
            (),
            outcome,
        )
        records.append(record)
        at += length
    return records


@given(legal_records())
def test_what_is_packed_comes_back_whole(records: list[CommitRecord]) -> None:
    assert [record for block in pack(records) for record in unpack(block, HISTORY)] == records


@given(legal_records())
def test_a_block_says_what_is_in_it(records: list[CommitRecord]) -> None:
    for block in pack(records):
        inside = unpack(block, HISTORY)
        assert {record.stream for record in inside} == {block.stream}
        assert (block.first, block.last) == (inside[0].start, inside[-1].end)
        assert block.commits == len(inside) <= BLOCK_COMMITS
        assert block.time_low_us == min(record.time_us for record in inside)
        assert block.time_high_us == max(record.time_us for record in inside)
        numbers = [r.name.number for r in inside if r.name.number is not None]
        outside = [number for number in numbers if not block.number_low <= number <= block.number_high]
        assert sorted(outside) == sorted(block.number_outliers)
        assert block.whole_names == tuple(r.name.text for r in inside if r.name.number is None)


@given(st.lists(names, min_size=1, max_size=40), st.integers(1, 1 << 40))
def test_names_of_any_text_in_one_block_come_back_as_they_were(called: list[Name], begin: int) -> None:
    records = [
        CommitRecord("bank", name, Lsn(begin + 100 * place), Lsn(begin + 100 * place + 50), 0, (), Outcome.COALESCED)
        for place, name in enumerate(called)
    ]
    (block,) = pack(records)
    assert [record.name for record in unpack(block, HISTORY)] == called
    assert [str(record.name) for record in unpack(block, HISTORY)] == list(map(str, called))
    assert block.whole_names == tuple(name.text for name in called if name.number is None)
    inside = [name.number for name in called if name.number is not None]
    assert all(block.number_low <= n <= block.number_high or n in block.number_outliers for n in inside)


def test_places_of_an_unpacked_commit_are_in_the_form_of_their_history() -> None:
    records = [record._replace(start=Lsn(record.start), end=Lsn(record.end)) for record in busy_server(3)]
    (block,) = pack(records)
    elsewhere = unpack(block, History("a kind of which no driver is loaded", "7391"))
    assert {type(at) for record in elsewhere for at in (record.start, record.end)} == {Place}
    assert elsewhere == records


def version_1(records: list[CommitRecord]) -> bytes:
    """Give the data of a block as version 0.1.0 wrote it, by the form that its own text describes."""

    def column(kind: str, numbers: list[int]) -> bytes:
        return kind.encode() + struct.pack(f"<{len(numbers)}{kind}", *numbers)

    head, pairs = records[0], list(pairwise(records))
    assert head.name.number is not None
    marked = [place for place, record in enumerate(records) if record.markers]
    codes = [Outcome.PROTECTED, Outcome.COALESCED, Outcome.MISSED]
    numbers = [record.name.number or 0 for record in records]
    parts = [
        struct.pack("<IQQq", len(records), head.start, head.name.number, head.time_us),
        column("Q", [after.start - before.end for before, after in pairs]),
        column("I", [record.end - record.start for record in records]),
        column("q", [((after - before + (1 << 63)) & U64) - (1 << 63) for before, after in pairwise(numbers)]),
        column("q", [after.time_us - before.time_us for before, after in pairs]),
        column("B", [codes.index(record.outcome) for record in records]),
        struct.pack("<I", len(marked)),
        column("H", marked),
        json.dumps([records[place].markers for place in marked]).encode() if marked else b"",
    ]
    return b"\x01" + zlib.compress(b"".join(parts))


@given(legal_records(("bank",)))
def test_a_block_of_version_1_is_read(records: list[CommitRecord]) -> None:
    mine = [r._replace(name=Name("", r.name.number or 0)) for r in records if abs(r.time_us) < 1 << 61]
    if mine:
        assert unpack_data("bank", version_1(mine), HISTORY) == mine


def test_a_block_that_version_0_1_0_wrote_is_read() -> None:
    packed = base64.b64decode(BLOCK_OF_0_1_0)
    assert unpack_data("bank", packed, HISTORY) == [
        CommitRecord(
            "bank",
            Name("", 7731),
            Lsn.parse("16/B374D800"),
            Lsn.parse("16/B374D830"),
            1_772_366_400_000_000,
            ("payroll",),
            Outcome.COALESCED,
        ),
        CommitRecord(
            "bank",
            Name("", 7729),
            Lsn.parse("16/B374D848"),
            Lsn.parse("16/B374D878"),
            1_772_366_400_100_000,
            (),
            Outcome.PROTECTED,
        ),
    ]


def test_positions_of_an_unpacked_commit_are_positions() -> None:
    (block,) = pack(busy_server(3))
    assert {type(at) for record in unpack(block, HISTORY) for at in (record.start, record.end)} == {Lsn}


def test_many_commits_become_full_blocks_in_log_order() -> None:
    records = busy_server(2 * BLOCK_COMMITS + 17)
    blocks = pack(records)
    assert [block.commits for block in blocks] == [BLOCK_COMMITS, BLOCK_COMMITS, 17]
    assert all(before.last <= after.first for before, after in pairwise(blocks))
    assert [record for block in blocks for record in unpack(block, HISTORY)] == records


def test_huge_markers_close_a_block_early() -> None:
    big = "x" * (BLOCK_MARKER_CHARACTERS // 3)
    records = [record._replace(markers=(big,)) for record in busy_server(10)]
    blocks = pack(records)
    assert [block.commits for block in blocks] == [3, 3, 3, 1]
    assert [record for block in blocks for record in unpack(block, HISTORY)] == records


def test_a_commit_of_a_busy_server_takes_less_than_ten_bytes() -> None:
    for wal_bytes, apart_us in ((600, 500), (6_000, 1_000), (100_000, 100_000)):
        (block,) = pack(busy_server(BLOCK_COMMITS, wal_bytes=wal_bytes, apart_us=apart_us))
        assert len(block.data) < 10 * BLOCK_COMMITS


def test_a_transaction_that_ran_for_an_hour_does_not_widen_the_range_of_its_block() -> None:
    records = busy_server(BLOCK_COMMITS)
    records[500] = records[500]._replace(name=Name("", 77))
    (block,) = pack(records)
    assert block.number_outliers == (77,)
    assert block.number_high - block.number_low < 2 * BLOCK_COMMITS


@pytest.mark.parametrize(
    "spoil",
    [
        lambda records: [records[1], records[0]],
        lambda records: [records[0], records[0]],
        lambda records: [records[0], records[1]._replace(start=Lsn(records[0].end - 1))],
        lambda records: [records[0]._replace(end=Lsn(records[0].start - 1))],
        lambda records: [records[0]._replace(name=Name("", -1))],
        lambda records: [records[0]._replace(name=Name("", U64 + 1))],
        lambda records: [records[0]._replace(time_us=1 << 62)],
    ],
    ids=["backwards", "twice", "overlapping", "inside-out", "negative-xid", "huge-xid", "huge-time"],
)
def test_records_that_cannot_be_are_refused(spoil: object) -> None:
    assert callable(spoil)
    with pytest.raises(CatalogError):
        pack(spoil(busy_server(2)))


def test_streams_may_be_mixed_and_stay_in_their_own_order() -> None:
    records = [record._replace(stream="ab"[place % 2]) for place, record in enumerate(busy_server(20))]
    blocks = pack(records)
    assert [block.stream for block in blocks] == ["a", "b"]
    by_stream = [
        list(mine) for _, mine in groupby(sorted(records, key=attrgetter("stream", "start")), attrgetter("stream"))
    ]
    assert [unpack(block, HISTORY) for block in blocks] == by_stream


def damaged(block: Block) -> list[bytes]:
    data = block.data
    cut = [data[:length] for length in range(len(data))]
    return cut + [
        data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :] for place in range(len(data))
    ]


def test_no_damage_to_a_block_is_read_as_other_commits() -> None:
    (block,) = pack([record._replace(markers=("payroll",)) for record in busy_server(40)])
    pieces, refused = damaged(block), 0
    for data in pieces:
        try:
            assert unpack_data("bank", data, HISTORY) == unpack(block, HISTORY)
        except CatalogError:
            refused += 1
    assert refused >= len(pieces) - 3  # zlib's header has a few bits that mean nothing


@settings(max_examples=200)
@given(st.binary(max_size=60), st.sampled_from([b"\x01", b"\x02"]))
def test_noise_is_a_typed_error(noise: bytes, version: bytes) -> None:
    with pytest.raises(CatalogError):
        unpack_data("bank", version + noise, HISTORY)


def test_a_block_of_a_later_version_is_refused_by_number() -> None:
    with pytest.raises(CatalogError, match=r"version 3, this program reads 1, 2\b"):
        unpack_data("bank", b"\x03" + pack(busy_server(1))[0].data[1:], HISTORY)
