"""The tag: everything the catalog knows of a recovery point, as text kept with its snapshots.

A catalog that was lost is rebuilt from tags alone, so a tag holds the whole `RecoveryPoint` and its commits, and
any damage is noticed. The text is one line of ASCII JSON without spaces, keys sorted:

    tag       {"content": content, "sha256": 64 hexadecimal digits, "trigpoint_tag": 1}
    content   {"commits": [block …], "point": point}
    block     {"packed": base64 of `trigger.catalog.packing.Block.data`, "stream": string}
    point     one key for each field of `trigger.model.RecoveryPoint`, by its name
    position  [system identifier, timeline, LSN]          LSN  "16/B374D848"
    time      ISO 8601 with offset and microseconds       absent  null
    commit    [stream, xid, start, end, microseconds since 1970, [marker …], outcome]
    changes   {table: [inserted, updated, deleted, truncated]}
    proofs    flushes, snapshots, bracket, verification: objects by field name

`sha256` is the digest of the content in exactly this form. A text that is not byte for byte what `encode` would
write (a line end behind it apart) is refused, so no flipped bit goes unseen, not even one in a space or an escape.
The digest protects against damage, not against somebody who wants to deceive. A later version adds keys or raises
`trigpoint_tag`; a version that is not known here is refused by number.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trigger.catalog.packing import pack, unpack_data
from trigger.errors import CatalogError, StorageError
from trigger.model import (
    Bracket,
    Cause,
    Changes,
    CommitRecord,
    Flush,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
)
from trigger.position import History, Lsn, Position

VERSION = 1

_HINT = "a tag is never edited by hand; the snapshots it belongs to may still be whole"


def encode(point: RecoveryPoint, records: Sequence[CommitRecord] = ()) -> str:
    """Give the tag of `point` with the commits it protects, as one line of ASCII.

    Raises:
        CatalogError: the records of a stream are not in log order.
    """
    blocks = [{"stream": block.stream, "packed": base64.b64encode(block.data).decode()} for block in pack(records)]
    return _text({"point": _point_out(point), "commits": blocks})


def decode(text: str) -> tuple[RecoveryPoint, list[CommitRecord]]:
    """Give the point and the commits that a tag holds; the commits by stream and in log order.

    Raises:
        StorageError: the text is no tag, is damaged, or is of a version that this program does not know.
    """
    text = text.rstrip("\r\n")
    try:
        document = json.loads(text)
        version, content = document["trigpoint_tag"], document["content"]
        if version != VERSION:
            raise _damaged(text, f"its version is {version!r}, this program reads {VERSION}")
        if _text(content) != text:
            raise _damaged(text, "its content does not match its digest")
        records = [
            record
            for block in content["commits"]
            for record in unpack_data(block["stream"], base64.b64decode(block["packed"], validate=True))
        ]
        return _point_in(content["point"]), records
    except StorageError:
        raise
    except (
        CatalogError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise _damaged(text, f"{type(error).__name__}: {error}") from error


def _damaged(text: str, why: str) -> StorageError:
    return StorageError(f"tag of {len(text)} characters cannot be read: {why}", hint=_HINT, retryable=False)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _text(content: object) -> str:
    canonical = _canonical(content)
    digest = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    return f'{{"content":{canonical},"sha256":"{digest}","trigpoint_tag":{VERSION}}}'


def _point_out(point: RecoveryPoint) -> dict[str, object]:
    return {
        "id": point.id,
        "number": point.number,
        "state": point.state,
        "cause": point.cause,
        "floor": _position_out(point.floor),
        "opened_at": _time_out(point.opened_at),
        "commit": point.commit and _commit_out(point.commit),
        "rule": point.rule,
        "ceiling": point.ceiling and _position_out(point.ceiling),
        "redo": point.redo and _position_out(point.redo),
        "bracket": point.bracket and _bracket_out(point.bracket),
        "flushes": [_flush_out(flush) for flush in point.flushes],
        "snapshots": [_snapshot_out(snapshot) for snapshot in point.snapshots],
        "commits": point.commits,
        "tables": {table: list(changes) for table, changes in point.tables.items()},
        "sealed_at": point.sealed_at and _time_out(point.sealed_at),
        "note": point.note,
        "failure": point.failure,
        "verification": point.verification and _verification_out(point.verification),
    }


def _point_in(value: Mapping[str, Any]) -> RecoveryPoint:
    return RecoveryPoint(
        id=value["id"],
        number=value["number"],
        state=State(value["state"]),
        cause=Cause(value["cause"]),
        floor=_position_in(value["floor"]),
        opened_at=_time_in(value["opened_at"]),
        commit=_commit_in(value["commit"]) if value["commit"] else None,
        rule=value["rule"],
        ceiling=_position_in(value["ceiling"]) if value["ceiling"] else None,
        redo=_position_in(value["redo"]) if value["redo"] else None,
        bracket=_bracket_in(value["bracket"]) if value["bracket"] else None,
        flushes=tuple(_flush_in(flush) for flush in value["flushes"]),
        snapshots=tuple(_snapshot_in(snapshot) for snapshot in value["snapshots"]),
        commits=value["commits"],
        tables={table: Changes(*changes) for table, changes in value["tables"].items()},
        sealed_at=_time_in(value["sealed_at"]) if value["sealed_at"] else None,
        note=value["note"],
        failure=value["failure"],
        verification=_verification_in(value["verification"]) if value["verification"] else None,
    )


def _time_out(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time_in(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _position_out(position: Position) -> list[object]:
    return [position.history.system, position.history.timeline, str(position.at)]


def _position_in(value: Sequence[Any]) -> Position:
    system, timeline, lsn = value
    return Position(History(system, timeline), Lsn.parse(lsn))


def _commit_out(commit: CommitRecord) -> list[object]:
    return [
        commit.stream,
        commit.xid,
        str(commit.start),
        str(commit.end),
        commit.time_us,
        list(commit.markers),
        commit.outcome,
    ]


def _commit_in(value: Sequence[Any]) -> CommitRecord:
    stream, xid, start, end, time_us, markers, outcome = value
    return CommitRecord(stream, xid, Lsn.parse(start), Lsn.parse(end), time_us, tuple(markers), Outcome(outcome))


def _bracket_out(bracket: Bracket) -> dict[str, object]:
    return {
        "start": _position_out(bracket.start),
        "stop": _position_out(bracket.stop),
        "label": bracket.label,
        "tablespace_map": bracket.tablespace_map,
    }


def _bracket_in(value: Mapping[str, Any]) -> Bracket:
    return Bracket(_position_in(value["start"]), _position_in(value["stop"]), value["label"], value["tablespace_map"])


def _flush_out(flush: Flush) -> dict[str, object]:
    return {
        "agent": flush.agent,
        "volume": flush.volume,
        "device": flush.device,
        "filesystem": flush.filesystem,
        "began_at": _time_out(flush.began_at),
        "ended_at": _time_out(flush.ended_at),
    }


def _flush_in(value: Mapping[str, Any]) -> Flush:
    times = {key: _time_in(value[key]) for key in ("began_at", "ended_at")}
    return Flush(**{**value, **times})


def _snapshot_out(snapshot: Snapshot) -> dict[str, object]:
    return {
        "volume": snapshot.volume,
        "driver": snapshot.driver,
        "location": snapshot.location,
        "began_at": _time_out(snapshot.began_at),
        "ended_at": _time_out(snapshot.ended_at),
        "bytes_copied": snapshot.bytes_copied,
    }


def _snapshot_in(value: Mapping[str, Any]) -> Snapshot:
    times = {key: _time_in(value[key]) for key in ("began_at", "ended_at")}
    return Snapshot(**{**value, **times})


def _verification_out(verification: Verification) -> dict[str, object]:
    return {
        "at": _time_out(verification.at),
        "passed": verification.passed,
        "target": verification.target,
        "checks": [list(check) for check in verification.checks],
    }


def _verification_in(value: Mapping[str, Any]) -> Verification:
    checks = tuple((what, held, seen) for what, held, seen in value["checks"])
    return Verification(_time_in(value["at"]), value["passed"], value["target"], checks)
