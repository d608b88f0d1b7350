"""How much room a commit takes in the catalog, and how long it takes to find one among 10^6 and among 10^8.

Method. Blocks are those of a busy server with two databases: 1,000 commits each, two commits a millisecond, ids and
times up to 16 places and 2 ms out of order, one commit in a thousand that ran so long that its id lies a million
behind, one with a marker of its own, and one in 64,000 with a marker that all of these share. 64 blocks are
packed by `packing.pack`; the others are the same commits moved on in log, ids and time (the first commit in the
head of a block is absolute, all others are relative). The rows are those that `commit_index` writes, put in
by the thousand instead of by seals. Look-ups then go through `Catalog` as the service makes them, one call after the
other, for commits drawn at random (a seed is printed), each answer checked; the page cache is warm by what the
look-ups themselves read. Beside the wall time stands the processor's, which a busy machine does not stretch. *Rows* is
what the catalog does not do, at 10^6: a bare SQLite table with a row for each commit and indexes for id, time and
marker, asked for ids through `sqlite3` with nothing between.

Seals are real: `open_point` and `seal` with 1, 10 and 1,000 commits, each durable (synchronous=FULL) when it returns;
*bare* is two transactions of `sqlite3` alone, with the same settings, that write as many bytes as the tag and the
blocks have. What one block costs a look-up is its unpacking; *pickle* is `pickle.loads` of the same records.

    python -m benchmarks.catalog [--full] [--json FILE] [--folder FOLDER]

`--full` adds the 10^8; it needs 1.5 GB in the folder and some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pickle
import random
import sqlite3
import struct
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import insert

from benchmarks import record
from connectors.databases.postgres.lsn import Lsn
from trigger.catalog import tag
from trigger.catalog.catalog import Catalog, Found, make_engine
from trigger.catalog.commit_index import block_row, history_id, marker_digest
from trigger.catalog.packing import BLOCK_COMMITS, Block, pack, unpack
from trigger.catalog.schema import blocks, markers, number_outliers, streams
from trigger.model import Cause, Changes, CommitRecord, Flush, Mark, Outcome, RecoveryPoint, Snapshot, from_microseconds
from trigger.point_names import point_id
from trigger.position import History, Name, Position

HISTORY = History("postgres", "7391", 1)
START_US = 1_760_000_000_000_000
STREAMS = ("bank", "shop")
TEMPLATES = 64
SHARED = "payroll"
HEAD = struct.Struct("<IQQq")
LONG = 1_000_000
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def busy_server(chance: random.Random, stream: str, shared: bool) -> list[CommitRecord]:
    """A thousand commits as 16 clients make them, from position, id and time 0 (but for the long-running one)."""
    at, time_us, xid, records = 0, 0, 0, []
    for number in range(BLOCK_COMMITS):
        at += 8 * chance.randint(10, 150)
        time_us += int(chance.expovariate(1 / 500))
        xid += 1 + (chance.random() < 0.1)
        length = chance.choice((40, 48, 64, 232))
        late = LONG if number == 500 else chance.randint(0, 16)
        mine = ("job 00000000", *([SHARED] if shared else [])) if number == 700 else ()
        moment = time_us + chance.randint(-2_000, 2_000)
        outcome = Outcome.PROTECTED if number == BLOCK_COMMITS - 1 else Outcome.COALESCED
        records.append(
            CommitRecord(stream, Name("", xid + 2 * LONG - late), Lsn(at), Lsn(at + length), moment, mine, outcome)
        )
        at += length
    return records


class Stock:
    """Blocks without end, each the next stretch of the log of one of two databases."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.templates = [pack(busy_server(chance, STREAMS[n % 2], n == 0))[0] for n in range(TEMPLATES)]
        self.bodies = [zlib.decompress(block.data[1:]) for block in self.templates]
        self.span = max(int(block.last) for block in self.templates) + 8

    def block(self, number: int) -> Block:
        """Give block `number`; pairs of blocks, one of each database, share a stretch of ids and time."""
        block, body = self.templates[number % TEMPLATES], self.bodies[number % TEMPLATES]
        count, start, xid, time_us = HEAD.unpack_from(body)
        log, ids, moment = number * self.span, number * 1_200, START_US + number * BLOCK_COMMITS * 500
        head = HEAD.pack(count, start + log, xid + ids, time_us + moment)
        moved = (head + body[HEAD.size :]).replace(b"job 00000000", b"job %08d" % number)
        return block._replace(
            first=Lsn(block.first + log),
            last=Lsn(block.last + log),
            number_low=block.number_low + ids,
            number_high=block.number_high + ids,
            number_outliers=tuple(each + ids for each in block.number_outliers),
            time_low_us=block.time_low_us + moment,
            time_high_us=block.time_high_us + moment,
            data=block.data[:1] + zlib.compress(moved, 6),
        )


def fill(where: Path, stock: Stock, count: int) -> int:
    """Put `count` blocks into the catalog at `where`, where point 1 is; give their packed bytes."""
    engine, packed = make_engine(where), 0
    with engine.connect().execution_options(writes=True) as connection:
        with connection.begin():
            history = history_id(connection, HISTORY)
            keys = [connection.scalar(insert(streams).values(name=name).returning(streams.c.id)) for name in STREAMS]
        peaks = [0, 0]
        for first in range(0, count, 1000):
            with connection.begin():
                rows, outliers, digests = [], [], []
                for number in range(first, min(first + 1000, count)):
                    block, side = stock.block(number), number % 2
                    peaks[side] = max(peaks[side], block.time_high_us)
                    rows.append(
                        block_row(block)
                        | {"id": number + 1, "history": history, "stream": keys[side], "time_peak_us": peaks[side]}
                        | {"point": 1, "reason": None}
                    )
                    packed += len(block.data)
                    outliers += [{"number": each, "block": number + 1} for each in block.number_outliers]
                    words = [f"job {number:08d}", *([SHARED] if number % TEMPLATES == 0 else [])]
                    digests += [{"digest": marker_digest(word), "block": number + 1} for word in words]
                connection.execute(insert(blocks), rows)
                connection.execute(insert(number_outliers), outliers)
                connection.execute(insert(markers), digests)
    engine.dispose()
    return packed


async def timed(call: Callable[[CommitRecord], Awaitable[None]], records: Sequence[CommitRecord]) -> dict[str, float]:
    """Give p50, p99 and the longest of `call`, over `records`, in milliseconds; and the processor time of one."""
    taken = []
    processor = time.process_time()
    for one in records:
        began = time.perf_counter()
        await call(one)
        taken.append((time.perf_counter() - began) * 1000)
    cpu_ms = (time.process_time() - processor) * 1000 / len(records)
    return summary(taken) | {"cpu_ms": round(cpu_ms, 3)}


def summary(taken: Sequence[float]) -> dict[str, float]:
    """Give p50, p99 and the greatest."""
    ordered = sorted(taken)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50_ms": round(median(ordered), 3), "p99_ms": round(p99, 3), "max_ms": round(ordered[-1], 3)}


async def look_up(catalog: Catalog, stock: Stock, count: int, chance: random.Random, each: int) -> dict[str, Any]:
    """Look for commits drawn at random by each key and check what is found."""
    drawn = [(chance.randrange(count), chance.randrange(BLOCK_COMMITS)) for _ in range(each)]
    sample = [unpack(stock.block(number), HISTORY)[place] for number, place in drawn]
    slow = [unpack(stock.block(number), HISTORY)[500] for number, _ in drawn]
    marked = [unpack(stock.block(number), HISTORY)[700] for number, _ in drawn]

    async def holds(call: Awaitable[list[Found]], record: CommitRecord) -> None:
        assert record in [found.record for found in await call], record

    async def lsn(record: CommitRecord) -> None:
        await holds(catalog.find(place=record.start), record)

    async def xid(record: CommitRecord) -> None:
        await holds(catalog.find(name=record.name), record)

    async def xid_unknown(record: CommitRecord) -> None:
        assert await catalog.find(name=Name("", (record.name.number or 0) + (1 << 40))) == []

    async def time_of(record: CommitRecord) -> None:
        await holds(catalog.find(time=from_microseconds(record.time_us)), record)

    async def marker(record: CommitRecord) -> None:
        await holds(catalog.find(marker=record.markers[0]), record)

    async def marker_of_many(_record: CommitRecord) -> None:
        assert len(await catalog.find(marker=SHARED, limit=10)) == 10

    async def neighbours(record: CommitRecord) -> None:
        before = await catalog.commit_before(record.start, HISTORY)
        after = await catalog.commit_after(record.start, HISTORY)
        assert before is None or before.record.end <= record.start
        assert after is None or record.end <= after.record.start

    async def as_of(record: CommitRecord) -> None:
        found = await catalog.as_of(from_microseconds(record.time_us), HISTORY)
        assert found is None or found.record.time_us <= record.time_us

    return {
        "lsn": await timed(lsn, sample),
        "xid": await timed(xid, sample),
        "xid_long_running": await timed(xid, slow),
        "xid_unknown": await timed(xid_unknown, sample),
        "time": await timed(time_of, sample),
        "marker": await timed(marker, marked),
        "marker_of_many_newest_10": await timed(marker_of_many, sample[:50]),
        "before_and_after": await timed(neighbours, sample),
        "as_of": await timed(as_of, sample),
    }


async def one_size(folder: Path, stock: Stock, commits: int, chance: random.Random, each: int) -> dict[str, Any]:
    """Fill a catalog with `commits`, measure it, and remove it."""
    where, count = folder / f"catalog-{commits}.db", commits // BLOCK_COMMITS
    catalog = await Catalog.open(where)
    await catalog.open_point(
        id=point_id(NOW, 1), cause=Cause.DEMAND, marks=[Mark(Position(HISTORY, Lsn(1)))], opened_at=NOW
    )
    began = time.perf_counter()
    packed = await asyncio.to_thread(fill, where, stock, count)
    filled = time.perf_counter() - began
    totals = await catalog.totals()
    figures = {
        "commits": commits,
        "packed_bytes_a_commit": round(packed / commits, 2),
        "file_bytes_a_commit": round(totals.bytes / commits, 2),
        "fill_seconds": round(filled, 1),
        "look_up": await look_up(catalog, stock, count, chance, each),
    }
    await catalog.close()
    where.unlink()
    return figures


def rows_of_commits(folder: Path, stock: Stock, chance: random.Random, each: int) -> dict[str, Any]:
    """Keep 10^6 commits in a row each, and look for ids."""
    where = folder / "rows.db"
    connection = sqlite3.connect(where)
    connection.execute(
        "CREATE TABLE commits (start INTEGER PRIMARY KEY, stop INTEGER, stream INTEGER, xid INTEGER, time_us INTEGER,"
        " outcome INTEGER, point INTEGER, marker TEXT)"
    )
    for key in ("xid", "time_us", "marker"):
        connection.execute(f"CREATE INDEX by_{key} ON commits ({key})")
    for number in range(1000):
        rows = [
            (r.start, r.end, number % 2, r.name.number, r.time_us, 1, 1, r.markers[0] if r.markers else None)
            for r in unpack(stock.block(number), HISTORY)
        ]
        connection.executemany("INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    taken = []
    for _ in range(each):
        record = unpack(stock.block(chance.randrange(1000)), HISTORY)[chance.randrange(BLOCK_COMMITS)]
        began = time.perf_counter()
        found = connection.execute("SELECT * FROM commits WHERE xid = ?", (record.name.number,)).fetchall()
        taken.append((time.perf_counter() - began) * 1000)
        assert any(row[0] == record.start for row in found)
    connection.close()
    figures = {"file_bytes_a_commit": round(where.stat().st_size / 1_000_000, 2), "xid": summary(taken)}
    where.unlink()
    return figures


def proven(point: RecoveryPoint) -> RecoveryPoint:
    """Give `point` with what a real one has when it is sealed."""
    flush = Flush("local", "data", "254:1", "af3104cc19b2", NOW, NOW)
    snapshot = Snapshot("data", "btrfs", f"/srv/pg/.trigpoint/{point.name}", NOW, NOW)
    tables = {f"bank.public.{name}": Changes(5, 5, 0, 0) for name in ("accounts", "branches", "tellers", "history")}
    return dataclasses.replace(
        point,
        marks=(Mark(point.floor, point.floor, point.floor),),
        flushes=(flush,),
        snapshots=(snapshot,),
        sealed_at=NOW,
        tables=tables,
    )


async def seals(folder: Path, stock: Stock, commits: int, rounds: int) -> dict[str, Any]:
    """Seal `rounds` points with `commits` each, and write as much with bare SQLite in between."""
    catalog = await Catalog.open(folder / f"seals-{commits}.db")
    bare = sqlite3.connect(folder / f"bare-{commits}.db", isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        bare.execute(f"PRAGMA {pragma}")
    bare.execute("CREATE TABLE bare (id INTEGER PRIMARY KEY, data BLOB)")
    ours, theirs = [], []
    for number in range(rounds):
        records = unpack(stock.block(number), HISTORY)[:commits]
        floor = Position(HISTORY, records[-1].end)
        began = time.perf_counter()
        point = await catalog.open_point(
            id=point_id(NOW, number), cause=Cause.COMMIT, marks=[Mark(floor)], opened_at=NOW
        )
        point = await catalog.seal(proven(point), records, {records[0].stream: floor})
        ours.append((time.perf_counter() - began) * 1000)
        sizes = [1_000, len(tag.encode(point)) + sum(len(block.data) for block in pack(records))]
        began = time.perf_counter()
        for size in sizes:
            bare.execute("INSERT INTO bare (data) VALUES (?)", (bytes(size),))
        theirs.append((time.perf_counter() - began) * 1000)
    size = (await catalog.totals()).bytes
    await catalog.close()
    bare.close()
    ratio = median(ours) / median(theirs)
    return {
        "commits_a_point": commits,
        "open_and_seal": summary(ours),
        "bare": summary(theirs),
        "ratio_p50": round(ratio, 2),
        "file_bytes_a_point": round(size / rounds),
        "tag_bytes_without_commits": len(tag.encode(point)),
    }


def pack_and_unpack(stock: Stock) -> dict[str, float]:
    """Give how long one full block takes to pack and unpack, in milliseconds (the best of many), beside pickle."""
    block = stock.block(1)
    records = unpack(block, HISTORY)
    pickled = pickle.dumps(records)
    calls: dict[str, Callable[[], object]] = {
        "pack_ms": partial(pack, records),
        "unpack_ms": partial(unpack, block, HISTORY),
        "pickle_ms": partial(pickle.loads, pickled),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(50):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1000)
    best = {name: round(min(taken), 3) for name, taken in times.items()}
    return best | {"unpack_by_pickle": round(best["unpack_ms"] / best["pickle_ms"], 2)}


async def measure(folder: Path, seed: int, full: bool) -> dict[str, Any]:
    """Give all figures."""
    stock, chance = Stock(seed), random.Random(seed)
    figures: dict[str, Any] = {"block": pack_and_unpack(stock)}
    figures["seals"] = [await seals(folder, stock, commits, 200) for commits in (1, 10, BLOCK_COMMITS)]
    figures["rows_10^6"] = await asyncio.to_thread(rows_of_commits, folder, stock, chance, 300)
    figures["blocks_10^6"] = await one_size(folder, stock, 10**6, chance, 300)
    if full:
        figures["blocks_10^8"] = await one_size(folder, stock, 10**8, chance, 300)
    return figures


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also 10^8 commits")
    parser.add_argument("--folder", type=Path, help="where to make the catalogs; a temporary folder otherwise")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trigpoint-catalog-", dir=options.folder or "/var/tmp") as folder:
        figures = asyncio.run(measure(Path(folder), options.seed, options.full))
    print(json.dumps(figures, indent=2))
    settings = {"seed": options.seed, "full": options.full, "sqlite": sqlite3.sqlite_version}
    record.write(options.json, "catalog", settings, figures)


if __name__ == "__main__":
    main()
