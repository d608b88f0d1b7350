"""The catalog and the tags as version 1 had them, written by what of the code of 2026-11-22 did it.

A run that is upgraded in flight begins with a state that this writes: the newer program must go on with it. Version 1
knew PostgreSQL alone, one log, and no lives of it, so only a run of that kind can be put back into its form.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

from connectors.databases.postgres.lsn import Lsn
from connectors.memory import World
from trigger.catalog import tag
from trigger.catalog.packing import unpack_data
from trigger.model import CommitRecord, Outcome, RecoveryPoint
from trigger.position import History, Position

_OUTCOMES = (Outcome.PROTECTED, Outcome.COALESCED, Outcome.MISSED)
_UNSIGNED = (("B", 1 << 8), ("H", 1 << 16), ("I", 1 << 32), ("Q", 1 << 64))
_SIGNED = (("b", 1 << 7), ("h", 1 << 15), ("i", 1 << 31), ("q", 1 << 63))

TABLES = """
ALTER TABLE histories RENAME TO histories_2;
CREATE TABLE histories (
    id INTEGER NOT NULL, system TEXT NOT NULL, timeline BIGINT NOT NULL, PRIMARY KEY (id), UNIQUE (system, timeline));
INSERT INTO histories SELECT id, system, branch FROM histories_2;
ALTER TABLE gaps RENAME TO gaps_2;
DROP INDEX gaps_by_closing;
CREATE TABLE gaps (
    id INTEGER NOT NULL, stream TEXT NOT NULL, after_system TEXT NOT NULL, after_timeline BIGINT NOT NULL,
    after_lsn BIGINT NOT NULL, until_system TEXT NOT NULL, until_timeline BIGINT NOT NULL, until_lsn BIGINT NOT NULL,
    reason TEXT NOT NULL, found_at_us BIGINT NOT NULL, closed_by BIGINT NOT NULL, PRIMARY KEY (id));
CREATE INDEX gaps_by_closing ON gaps (closed_by);
INSERT INTO gaps SELECT gap.id, gap.stream, a.system, a.branch, gap.after_at, u.system, u.branch, gap.until_at,
    gap.reason, gap.found_at_us, gap.closed_by
    FROM gaps_2 AS gap JOIN histories_2 AS a ON a.id = gap.after_history JOIN histories_2 AS u ON u.id = until_history;
DROP TABLE gaps_2;
DROP TABLE histories_2;
ALTER TABLE blocks RENAME COLUMN number_level TO xid_level;
ALTER TABLE blocks RENAME COLUMN number_low TO xid_low;
ALTER TABLE blocks RENAME COLUMN number_high TO xid_high;
DROP INDEX blocks_by_number;
CREATE INDEX blocks_by_xid ON blocks (xid_level, xid_low, xid_high);
ALTER TABLE number_outliers RENAME COLUMN number TO xid;
ALTER TABLE number_outliers RENAME TO xid_outliers;
DELETE FROM schema_version;
INSERT INTO schema_version VALUES (1, '2026-11-22T00:00:00+00:00');
"""


def go_back(connection: sqlite3.Connection, world: World) -> None:
    """Put the catalog behind a connection, and the tags in a storage, into the form of version 1."""
    if connection.execute("SELECT max(version) FROM schema_version").fetchone() != (2,):
        return  # nobody has brought it to version 2 since
    if connection.execute("SELECT max(incarnation) FROM histories").fetchone() not in ((0,), (None,)):
        return  # version 1 would have mixed them
    texts = [text for (text,) in connection.execute("SELECT document FROM points").fetchall()]
    texts += [kept.tag for kept in world.kept.values() if kept.tag is not None]
    if any(mark.floor.history.incarnation for text in texts for mark in tag.decode(text)[0].marks):
        return  # likewise, of a point that is open: its history is noted when it is sealed
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA legacy_alter_table = ON")
    connection.execute("BEGIN")
    for key, stream, data in connection.execute(
        "SELECT blocks.id, streams.name, data FROM blocks JOIN streams ON streams.id = blocks.stream"
    ).fetchall():
        records = unpack_data(stream, data, History("postgres", ""))
        connection.execute("UPDATE blocks SET data = ? WHERE id = ?", (_packed(records), key))
    for number, document in connection.execute("SELECT number, document FROM points").fetchall():
        connection.execute("UPDATE points SET document = ? WHERE number = ?", (_retold(document), number))
    for statement in TABLES.split(";\n"):
        connection.execute(statement)
    connection.execute("COMMIT")
    connection.execute("PRAGMA legacy_alter_table = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    for kept in world.kept.values():
        kept.tag = _retold(kept.tag) if kept.tag is not None else None


def _retold(text: str) -> str:
    return encode(*tag.decode(text))


def encode(point: RecoveryPoint, records: Sequence[CommitRecord] = ()) -> str:
    """Give the tag of a point with its commits, as version 1 wrote it."""
    streams = groupby(records, key=lambda record: record.stream)
    blocks = [{"stream": name, "packed": base64.b64encode(_packed([*mine])).decode()} for name, mine in streams]
    content = json.dumps({"point": _point(point), "commits": blocks}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode("ascii")).hexdigest()
    return f'{{"content":{content},"sha256":"{digest}","trigpoint_tag":1}}'


def _point(point: RecoveryPoint) -> dict[str, Any]:
    """Give what version 1 kept of a point: what version 2 keeps, but for the marks and how places are written."""
    newer: dict[str, Any] = json.loads(tag.encode(replace(point, unknown={})))["content"]["point"]
    assert len(point.marks) == 1, "version 1 knew one log"
    del newer["marks"]
    bracket, commit = point.bracket, point.commit
    ends = {"start": _position(bracket.start), "stop": _position(bracket.stop)} if bracket else {}
    label = {"label": str(bracket.document.get("label", "")), "tablespace_map": ""} if bracket else {}
    return newer | {
        "floor": _position(point.floor),
        "ceiling": _position(point.ceiling),
        "redo": _position(point.redo),
        "bracket": ends | label or None,
        "commit": commit and _commit(commit),
    }


def _position(position: Position | None) -> list[object] | None:
    if position is None:
        return None
    assert position.history.incarnation == 0, "version 1 knew one life of a log"
    return [position.history.system, position.history.branch, str(Lsn(position.at))]


def _commit(commit: CommitRecord) -> list[object]:
    places = str(Lsn(commit.start)), str(Lsn(commit.end))
    return [commit.stream, commit.name.number, *places, commit.time_us, list(commit.markers), commit.outcome]


def _packed(records: Sequence[CommitRecord]) -> bytes:
    head, pairs = records[0], list(pairwise(records))
    xids = [record.name.number or 0 for record in records]
    marked = [place for place, record in enumerate(records) if record.markers]
    markers = json.dumps([records[place].markers for place in marked], separators=(",", ":")).encode()
    parts = [
        struct.pack("<IQQq", len(records), head.start, xids[0], head.time_us),
        _column([after.start - before.end for before, after in pairs]),
        _column([record.end - record.start for record in records]),
        _column([after - before for before, after in pairwise(xids)]),
        _column([after.time_us - before.time_us for before, after in pairs]),
        _column([_OUTCOMES.index(record.outcome) for record in records]),
        struct.pack("<I", len(marked)),
        _column(marked),
        markers if marked else b"",
    ]
    return b"\1" + zlib.compress(b"".join(parts), 6)


def _column(numbers: Sequence[int]) -> bytes:
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low >= 0:
        kind = next(kind for kind, limit in _UNSIGNED if high < limit)
    else:
        kind = next(kind for kind, limit in _SIGNED if -limit <= low and high < limit)
    return kind.encode() + struct.pack(f"<{len(numbers)}{kind}", *numbers)
