"""What the decoder makes of messages: hand-built ones, and streams recorded from real servers."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import Counter
from struct import pack

import pytest

from connectors.databases.postgres.stream.pgoutput import (
    MARKER_BYTES_LIMIT,
    MARKERS_LIMIT,
    Committed,
    Decoder,
    UnstreamableError,
)
from tests.connectors.postgres.stream.streams import GOLDEN, VARIANTS, decode, read
from trigger.errors import SourceError
from trigger.model import Changes

EPOCH_US = 946_684_800_000_000
TIME = 700_000_000_000_000


def framed(body: bytes, at: int = 0) -> memoryview:
    return memoryview(pack("!cQQq", b"w", at, at, TIME) + body)


def alive(end: int, *, reply: bool = False) -> memoryview:
    return memoryview(pack("!cQqB", b"k", end, TIME, reply))


def begin(xid: int, start: int) -> memoryview:
    return framed(pack("!cQqI", b"B", start, TIME, xid))


def commit(start: int, end: int) -> memoryview:
    return framed(pack("!cBQQq", b"C", 0, start, end, TIME), end)


def relation(number: int, name: str, xid: int | None = None) -> memoryview:
    prefix = b"" if xid is None else pack("!I", xid)
    schema, table = name.split(".")
    return framed(b"R" + prefix + pack("!I", number) + f"{schema}\0{table}\0d".encode() + b"\0\0")


def row(kind: str, number: int, xid: int | None = None) -> memoryview:
    prefix = b"" if xid is None else pack("!I", xid)
    return framed(kind.encode() + prefix + pack("!I", number) + b"N\0\1t\0\0\0\1x")


def message(
    text: bytes, prefix: str = "trigpoint", *, transactional: bool = True, xid: int | None = None
) -> memoryview:
    head = b"M" + (b"" if xid is None else pack("!I", xid))
    return framed(head + pack("!BQ", transactional, 5) + prefix.encode() + b"\0" + pack("!I", len(text)) + text)


def stream_start(xid: int, *, first: bool = True) -> memoryview:
    return framed(pack("!cIB", b"S", xid, first))


STREAM_STOP = framed(b"E")


def stream_commit(xid: int, start: int, end: int) -> memoryview:
    return framed(pack("!cIBQQq", b"c", xid, 0, start, end, TIME), end)


def stream_abort(xid: int, subxid: int, *, parallel: bool = False) -> memoryview:
    return framed(pack("!cII", b"A", xid, subxid) + (pack("!Qq", 9, TIME) if parallel else b""))


def prepared(kind: str, xid: int, start: int, end: int, gid: str = "g") -> memoryview:
    flags = b"" if kind == "b" else b"\0"
    return framed(kind.encode() + flags + pack("!QQqI", start, end, TIME, xid) + gid.encode() + b"\0", end)


def fed(*messages: memoryview, decoder: Decoder | None = None) -> Decoder:
    decoder = decoder or Decoder()
    for one in messages:
        decoder.feed(one)
    return decoder


def refused(*messages: memoryview) -> SourceError:
    """Feed messages of which the last must be refused."""
    decoder = fed(*messages[:-1])
    with pytest.raises(SourceError) as caught:
        decoder.feed(messages[-1])
    assert not caught.value.retryable
    return caught.value


def test_a_transaction_is_given_at_its_commit_and_not_before() -> None:
    decoder = fed(begin(7, 100), relation(1, "public.t"), row("I", 1), row("U", 1), row("D", 1), row("D", 1))
    assert not decoder.commits
    fed(commit(100, 140), decoder=decoder)
    assert decoder.commits == [Committed(7, 100, 140, TIME + EPOCH_US, {"public.t": Changes(1, 1, 2)}, (), "", False)]
    assert decoder.through == 140


def test_a_table_of_the_system_catalogue_is_named_with_its_schema() -> None:
    decoder = fed(begin(7, 100), relation(1, ".pg_class"), row("I", 1), commit(100, 140))
    assert list(decoder.commits[0].tables) == ["pg_catalog.pg_class"]


def test_only_transactional_messages_with_our_prefix_are_markers() -> None:
    decoder = fed(
        message(b"outside", transactional=False),
        begin(7, 100),
        message("grün".encode()),
        message(b"x", prefix="trigpointer"),
        message(b"no", transactional=False),
        message(b"\xff"),
        commit(100, 140),
    )
    assert decoder.commits[0].markers == ("grün", "\\xff")


def test_markers_of_one_transaction_cannot_fill_the_memory() -> None:
    decoder = fed(begin(7, 100))
    for _ in range(MARKERS_LIMIT + 10):
        decoder.feed(message(b"m" * (MARKER_BYTES_LIMIT + 10)))
    fed(commit(100, 140), decoder=decoder)
    assert len(decoder.commits[0].markers) == MARKERS_LIMIT
    assert {len(marker) for marker in decoder.commits[0].markers} == {MARKER_BYTES_LIMIT}


@pytest.mark.parametrize(
    ("markers", "size", "is_cut"),
    [
        (MARKERS_LIMIT, 1, False),
        (MARKERS_LIMIT + 1, 1, True),
        (1, MARKER_BYTES_LIMIT, False),
        (1, MARKER_BYTES_LIMIT + 1, True),
    ],
)
def test_that_markers_are_not_all_kept_is_told(markers: int, size: int, *, is_cut: bool) -> None:
    decoder = fed(begin(7, 100), *[message(b"m" * size)] * markers, commit(100, 140), begin(8, 200), commit(200, 240))
    assert [one.markers_cut for one in decoder.commits] == [is_cut, False]


def test_a_keepalive_says_how_far_everything_was_sent_but_not_amid_a_commit() -> None:
    decoder = fed(alive(90))
    assert (decoder.through, decoder.reply_wanted) == (90, False)
    fed(begin(7, 100), alive(500, reply=True), decoder=decoder)
    assert (decoder.through, decoder.reply_wanted) == (90, True)
    fed(commit(100, 140), alive(120), decoder=decoder)
    assert decoder.through == 140


@pytest.mark.parametrize("parallel", [False, True])
def test_of_a_streamed_transaction_aborted_subtransactions_do_not_count(*, parallel: bool) -> None:
    decoder = fed(
        stream_start(7),
        relation(1, "public.t", 7),
        row("I", 1, 7),
        row("I", 1, 8),
        row("I", 1, 9),
        STREAM_STOP,
        begin(20, 50),
        commit(50, 60),
        stream_abort(7, 8, parallel=parallel),
        stream_start(7, first=False),
        row("D", 1, 9),
        message(b"m", xid=7),
        STREAM_STOP,
        stream_commit(7, 100, 140),
        decoder=Decoder(parallel=parallel),
    )
    assert [one.xid for one in decoder.commits] == [20, 7]
    assert decoder.commits[1].tables == {"public.t": Changes(inserted=2, deleted=1)}
    assert decoder.commits[1].markers == ("m",)


def test_a_marker_that_may_have_been_rolled_back_is_not_guessed_at() -> None:
    decoder = fed(stream_start(7), row("I", 1, 8), message(b"m", xid=7), STREAM_STOP)
    with pytest.raises(UnstreamableError) as caught:
        decoder.feed(stream_abort(7, 8))
    assert caught.value.retryable


def test_a_streamed_transaction_with_countless_subtransactions_is_not_held_in_memory() -> None:
    decoder = fed(stream_start(7), decoder=Decoder(held_bytes_limit=100_000))
    for xid in range(8, 10_008):
        decoder.feed(row("I", 1, xid))
    with pytest.raises(UnstreamableError) as caught:
        decoder.feed(STREAM_STOP)
    assert caught.value.retryable


def test_many_streamed_transactions_at_once_are_not_held_in_memory() -> None:
    decoder = Decoder(held_bytes_limit=100_000)
    begun = [(stream_start(xid), message(b"m" * 500, xid=xid), row("I", 1, xid), STREAM_STOP) for xid in range(1_000)]
    with pytest.raises(UnstreamableError):
        fed(*itertools.chain.from_iterable(begun), decoder=decoder)


def test_a_hundred_thousand_subtransactions_are_told_exactly_in_little_memory() -> None:
    number, kept_each = 100_000, 10
    decoder = fed(stream_start(7), relation(1, "public.t", 7), relation(2, "public.u", 7), row("U", 2, 7))
    tracemalloc.start()
    for xid in range(8, number + 8):
        decoder.feed(row("I", 1, xid))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20 * number
    fed(STREAM_STOP, decoder=decoder)
    for xid in range(8, number + 8):
        if xid % kept_each:
            decoder.feed(stream_abort(7, xid))
    fed(stream_commit(7, 100, 140), decoder=decoder)
    assert decoder.commits[0].tables == {"public.u": Changes(0, 1), "public.t": Changes(number // kept_each)}


def test_aborted_subtransactions_make_room_for_others() -> None:
    decoder = fed(stream_start(7), relation(1, "public.t", 7), STREAM_STOP, decoder=Decoder(held_bytes_limit=30_000))
    rounds, each = 20, 1_000
    for number in range(rounds):
        fed(stream_start(7, first=False), decoder=decoder)
        xids = range(8 + number * each, 8 + (number + 1) * each)
        for xid in xids:
            decoder.feed(row("I", 1, xid))
        fed(STREAM_STOP, decoder=decoder)
        for xid in xids[:-1]:
            decoder.feed(stream_abort(7, xid))
    fed(stream_commit(7, 100, 140), decoder=decoder)
    assert decoder.commits[0].tables == {"public.t": Changes(rounds)}


def test_commits_over_very_many_tables_are_not_remembered_one_by_one() -> None:
    tables, commits = 2_000, 60
    decoder = fed(begin(1, 1), *(relation(number, f"public.partition_{number}") for number in range(tables)))
    fed(commit(1, 2), decoder=decoder)
    decoder.commits.clear()
    tracemalloc.start()
    for one in range(1, commits + 1):
        touched = (*range(tables), *[7] * one)
        fed(begin(one, one * 10), *(row("I", number) for number in touched), decoder=decoder)
        fed(commit(one * 10, one * 10 + 5), decoder=decoder)
        assert decoder.commits.pop().tables["public.partition_7"] == Changes(one + 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10_000_000


def subtransactions_at_random(chance: random.Random) -> tuple[list[memoryview], dict[str, Changes]]:
    """Give a streamed transaction in which subtransactions go on, and are aborted, in any order, and what is left."""
    alive: dict[int, Counter[tuple[int, str]]] = {7: Counter()}
    messages = [stream_start(7), *(relation(number, f"public.t{number}", 7) for number in range(5)), STREAM_STOP]
    following = 8
    for _ in range(chance.randrange(2, 12)):
        messages.append(stream_start(7, first=False))
        for _ in range(chance.randrange(20)):
            if chance.random() < 0.5:
                alive[following] = Counter()
                following += 1
            xid, kind, table = chance.choice(list(alive)), chance.choice("IUD"), chance.randrange(5)
            alive[xid][table, kind] += 1
            messages.append(row(kind, table, xid))
        messages.append(STREAM_STOP)
        for xid in chance.sample(list(alive)[1:], len(alive) // 3):
            del alive[xid]
            messages.append(stream_abort(7, xid))
    total = sum(alive.values(), Counter())
    left = {
        f"public.t{table}": Changes(*(total[table, kind] for kind in "IUD"))
        for table in range(5)
        if any(total[table, kind] for kind in "IUD")
    }
    return messages, left


@pytest.mark.parametrize("seed", range(200))
def test_what_is_left_of_subtransactions_is_told_in_whatever_order_they_go_on_and_are_aborted(seed: int) -> None:
    messages, left = subtransactions_at_random(random.Random(seed))
    decoder = fed(*messages, stream_commit(7, 100, 140))
    assert decoder.commits[0].tables == left


def test_a_streamed_transaction_that_is_aborted_leaves_nothing() -> None:
    decoder = fed(stream_start(7), relation(1, "public.t", 7), row("I", 1, 7), STREAM_STOP, stream_abort(7, 7))
    assert not decoder.commits
    assert not decoder._streams


def test_a_prepared_transaction_is_given_at_commit_prepared_only() -> None:
    decoder = fed(prepared("b", 7, 100, 140), relation(1, "a.t"), row("I", 1), prepared("P", 7, 100, 140))
    assert not decoder.commits
    fed(prepared("K", 7, 200, 240), decoder=decoder)
    assert decoder.commits == [Committed(7, 200, 240, TIME + EPOCH_US, {"a.t": Changes(1)}, (), "", False)]


def test_a_prepared_transaction_that_is_rolled_back_leaves_nothing() -> None:
    gone = framed(b"r\0" + pack("!QQqqI", 140, 240, TIME, TIME, 7) + b"g\0")
    decoder = fed(stream_start(7), STREAM_STOP, prepared("p", 7, 100, 140), gone)
    assert not decoder.commits
    assert not decoder._prepared


@pytest.mark.parametrize(
    "messages",
    [
        [row("I", 1)],
        [begin(7, 100), begin(8, 200)],
        [commit(100, 140)],
        [begin(7, 100), commit(101, 140)],
        [begin(7, 100), commit(100, 100)],
        [begin(7, 100), framed(pack("!cBQQq", b"C", 0, 100, 140, TIME), 141)],
        [begin(7, 100), framed(pack("!cBQQq", b"C", 1, 100, 140, TIME), 140)],
        [begin(7, 100), framed(pack("!cBQQq", b"C", 0, 100, 140, TIME + 1), 140)],
        [begin(7, 100), commit(100, 140), begin(8, 90), commit(90, 130)],
        [begin(7, 100), row("I", 1), commit(100, 140)],
        [STREAM_STOP],
        [stream_start(7), begin(8, 100)],
        [stream_start(7), commit(100, 140)],
        [stream_start(7), STREAM_STOP, stream_start(7)],
        [stream_start(7, first=False)],
        [stream_commit(7, 100, 140)],
        [stream_abort(7, 7)],
        [stream_start(7), STREAM_STOP, stream_abort(7, 8, parallel=True)],
        [prepared("b", 7, 100, 140), prepared("P", 8, 100, 140)],
        [prepared("b", 7, 100, 140), commit(100, 140)],
        [begin(7, 100), framed(b"T" + pack("!IBI", 2, 0, 1))],
        [begin(7, 100), framed(b"M" + pack("!BQ", 1, 0) + b"trigpoint\0" + pack("!I", 4_000_000_000))],
        [begin(7, 100), framed(b"R" + pack("!I", 1) + b"no end")],
        [framed(b"?")],
        [framed(b"")],
        [memoryview(b"")],
        [memoryview(b"x")],
        [memoryview(bytes(alive(5)) + b"!")],
    ],
    ids=lambda messages: "+".join(bytes(one[25:26]).decode() or "?" for one in messages),
)
def test_what_does_not_fit_the_protocol_is_one_error_that_no_retry_heals(messages: list[memoryview]) -> None:
    refused(*messages)


def test_recorded_streams_of_one_server_tell_the_same_in_every_protocol() -> None:
    for major in (15, 16, 18):
        told = [
            decode(variant, read(path))
            for variant in VARIANTS
            if (path := GOLDEN / f"{major}-{variant.name}.gz").exists()
        ]
        assert len(told) == (3 if major == 15 else 5)
        assert len(told[0]) == 11
        assert all(one == told[0] for one in told)
        assert told[0][4].tables == {"public.t": Changes(inserted=24, deleted=1)}
        assert told[0][4].markers == ("big",)
        assert [one.origin for one in told[0] if one.origin] == ["far away"]
