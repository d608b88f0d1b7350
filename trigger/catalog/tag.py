"""The tag: everything the catalog knows of a recovery point, as text kept with its snapshots.

A catalog that was lost is rebuilt from tags alone, so a tag holds the whole `RecoveryPoint` and its commits, and
any damage is noticed. The text is one line of ASCII JSON without spaces, keys sorted:

    tag       {"content": content, "sha256": 64 hexadecimal digits, "trigpoint_tag": 2}
    content   {"commits": [block …], "point": point}
    block     {"packed": base64 of `trigger.catalog.packing.Block.data`, "stream": string}
    point     one key for each field of `trigger.model.RecoveryPoint`, by its name
    mark      {"bracket": …, "ceiling": position, "floor": position, "redo": position}, one for each log
    position  [kind, system, branch, incarnation, place as a number]
    time      ISO 8601 with offset and microseconds       absent  null
    commit    [stream, name, start, end, microseconds since 1970, [marker …], outcome]
    name      [text, number or null]
    changes   {table: [inserted, updated, deleted, truncated]}
    proofs    flushes, snapshots, verification, and gaps: objects by field name

`sha256` is the digest of the content in exactly this form. A text that is not byte for byte what `encode` would
write (a line end behind it apart) is refused, so no flipped bit goes unseen, not even one in a space or an escape.
The digest protects against damage, not against somebody who wants to deceive.

What a tag lacks has its default, and what is not known here is kept and written again, so that keys can be added
without a new version. Version 1, which knew PostgreSQL alone, is read: its floor, ceiling, redo and bracket are one
mark. A version that is not known here is refused by number.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

from trigger.catalog.packing import pack, unpack_data
from trigger.errors import CatalogError, PositionError, StorageError
from trigger.model import (
    Bracket,
    Cause,
    Changes,
    CommitRecord,
    Flush,
    Gap,
    Mark,
    Outcome,
    RecoveryPoint,
    Snapshot,
    State,
    Verification,
)
from trigger.position import History, Name, Position

VERSION = 2
_KIND_OF_VERSION_1 = "postgres"

_HINT = "a tag is never edited by hand; the snapshots it belongs to may still be whole"
_NEWER = "run the newer Trigpoint that wrote it"
_NOTHING = object()


class NewerTagError(StorageError):
    """A newer Trigpoint wrote the tag, which may be whole."""

    retryable = False


def encode(point: RecoveryPoint, records: Sequence[CommitRecord] = ()) -> str:
    """Give the tag of `point` with the commits it protects, as one line of ASCII.

    Raises:
        CatalogError: the records of a stream are not in log order.
    """
    blocks = [{"stream": block.stream, "packed": base64.b64encode(block.data).decode()} for block in pack(records)]
    return _text(_merged({"point": _point_out(point), "commits": blocks}, point.unknown), VERSION)


def decode(text: str) -> tuple[RecoveryPoint, list[CommitRecord]]:
    """Give the point and the commits that a tag holds; the commits by stream and in log order.

    Raises:
        StorageError: the text is no tag, is damaged, or is of a version that this program does not know.
    """
    text = text.rstrip("\r\n")
    try:
        document = json.loads(text)
        version, content = document["trigpoint_tag"], document["content"]
        if isinstance(version, int) and version > VERSION:
            raise NewerTagError(
                _unread(text, f"its version is {version}, this program reads 1 to {VERSION}"), hint=_NEWER
            )
        if version not in range(1, VERSION + 1):
            raise _damaged(text, f"its version is {version!r}, this program reads 1 to {VERSION}")
        if _text(content, version) != text:
            raise _damaged(text, "its content does not match its digest")
        point = _point_in(_of_version_1(content["point"]) if version == 1 else content["point"])
        records = [
            record
            for block in content["commits"]
            for record in unpack_data(
                block["stream"], base64.b64decode(block["packed"], validate=True), point.floor.history
            )
        ]
        return _with_the_unknown(point, content if version > 1 else {}), records
    except StorageError:
        raise
    except (
        CatalogError,
        PositionError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise _damaged(text, f"{type(error).__name__}: {error}") from error


def _damaged(text: str, why: str) -> StorageError:
    return StorageError(_unread(text, why), hint=_HINT, retryable=False)


def _unread(text: str, why: str) -> str:
    return f"tag of {len(text)} characters cannot be read: {why}"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _text(content: object, version: int) -> str:
    canonical = _canonical(content)
    digest = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    return f'{{"content":{canonical},"sha256":"{digest}","trigpoint_tag":{version}}}'


def _of_version_1(value: Mapping[str, Any]) -> dict[str, Any]:
    """Give a point of version 1 as version 2 has it."""

    def place(text: str) -> int:
        return History(_KIND_OF_VERSION_1, "").parse_place(text)

    def position(old: Sequence[Any] | None) -> list[Any] | None:
        return [_KIND_OF_VERSION_1, old[0], old[1], 0, place(old[2])] if old else None

    def bracket(old: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if old is None:
            return None
        document = {key: old[key] for key in old if key not in ("start", "stop")}
        return {"start": position(old["start"]), "stop": position(old["stop"]), "document": document}

    def commit(old: Sequence[Any] | None) -> list[Any] | None:
        if old is None:
            return None
        stream, xid, start, end, *rest = old
        return [stream, ["", xid], place(start), place(end), *rest]

    mark = {key: position(value[key]) for key in ("floor", "ceiling", "redo")}
    moved = {"marks": [mark | {"bracket": bracket(value["bracket"])}], "commit": commit(value["commit"])}
    return {key: kept for key, kept in value.items() if key not in (*mark, "bracket")} | moved


def _residue(stored: Any, ours: Any) -> Any:
    """Give what of a stored value is not in ours: keys of objects, at any depth; `_NOTHING` for nothing."""
    if stored == ours:
        return _NOTHING
    if isinstance(stored, dict) and isinstance(ours, dict):
        found = {key: _residue(value, ours[key]) if key in ours else value for key, value in stored.items()}
    elif isinstance(stored, list) and isinstance(ours, list) and len(stored) == len(ours):
        found = {place: _residue(*both) for place, both in enumerate(zip(stored, ours, strict=True))}
    else:
        return _NOTHING
    return {key: value for key, value in found.items() if value is not _NOTHING} or _NOTHING


def _with_the_unknown(point: RecoveryPoint, content: Mapping[str, Any]) -> RecoveryPoint:
    """Give a point with what its tag says beside what is known here, at any depth."""
    blocks = [{"stream": "", "packed": ""} for _ in content.get("commits", ())]
    residue = _residue(content, {"point": _point_out(point), "commits": blocks})
    return point if residue is _NOTHING else replace(point, unknown=residue)


def _merged(ours: Any, residue: Any) -> Any:
    """Give our value with what `_residue` found put back."""
    if isinstance(ours, list):
        return [_merged(value, residue[place]) if place in residue else value for place, value in enumerate(ours)]
    if not isinstance(ours, dict):
        return ours
    known = {key: _merged(value, residue[key]) if key in residue else value for key, value in ours.items()}
    return known | {key: value for key, value in residue.items() if key not in ours}


def _point_out(point: RecoveryPoint) -> dict[str, Any]:
    return {
        "id": point.id,
        "number": point.number,
        "state": point.state,
        "cause": point.cause,
        "marks": [_mark_out(mark) for mark in point.marks],
        "opened_at": _time_out(point.opened_at),
        "commit": point.commit and _commit_out(point.commit),
        "rule": point.rule,
        "flushes": [_flush_out(flush) for flush in point.flushes],
        "snapshots": [_snapshot_out(snapshot) for snapshot in point.snapshots],
        "commits": point.commits,
        "tables": {table: list(changes) for table, changes in point.tables.items()},
        "sealed_at": point.sealed_at and _time_out(point.sealed_at),
        "note": point.note,
        "failure": point.failure,
        "gaps": [_gap_out(gap) for gap in point.gaps],
        "verification": point.verification and _verification_out(point.verification),
    }


def _point_in(value: Mapping[str, Any]) -> RecoveryPoint:
    marks = tuple(_mark_in(mark) for mark in value["marks"])
    return RecoveryPoint(
        id=value["id"],
        number=value["number"],
        state=State(value["state"]),
        cause=Cause(value["cause"]),
        marks=marks,
        opened_at=_time_in(value["opened_at"]),
        commit=_commit_in(commit, marks[0].floor.history) if (commit := value.get("commit")) else None,
        rule=value.get("rule", ""),
        flushes=tuple(_flush_in(flush) for flush in value.get("flushes", ())),
        snapshots=tuple(_snapshot_in(snapshot) for snapshot in value.get("snapshots", ())),
        commits=value.get("commits", 0),
        tables={table: Changes(*changes) for table, changes in value.get("tables", {}).items()},
        sealed_at=_time_in(sealed_at) if (sealed_at := value.get("sealed_at")) else None,
        note=value.get("note", ""),
        failure=value.get("failure", ""),
        gaps=tuple(_gap_in(gap) for gap in value.get("gaps", ())),
        verification=_verification_in(verification) if (verification := value.get("verification")) else None,
    )


def _mark_out(mark: Mark) -> dict[str, Any]:
    return {
        "floor": _position_out(mark.floor),
        "ceiling": mark.ceiling and _position_out(mark.ceiling),
        "redo": mark.redo and _position_out(mark.redo),
        "bracket": mark.bracket and _bracket_out(mark.bracket),
    }


def _mark_in(value: Mapping[str, Any]) -> Mark:
    bracket = value.get("bracket")
    return Mark(
        _position_in(value["floor"]),
        _maybe_position(value.get("ceiling")),
        _maybe_position(value.get("redo")),
        _bracket_in(bracket) if bracket else None,
    )


def _time_out(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time_in(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _position_out(position: Position) -> list[object]:
    history = position.history
    return [history.kind, history.system, history.branch, history.incarnation, int(position.at)]


def _position_in(value: Sequence[Any]) -> Position:
    *parts, at = value
    history = History(*parts)
    if not isinstance(at, int) or isinstance(at, bool):
        raise TypeError(f"{at!r} is no place")
    return Position(history, history.place(at))


def _maybe_position(value: Sequence[Any] | None) -> Position | None:
    return _position_in(value) if value else None


def _commit_out(commit: CommitRecord) -> list[object]:
    start, end = int(commit.start), int(commit.end)
    return [commit.stream, list(commit.name), start, end, commit.time_us, list(commit.markers), commit.outcome]


def _commit_in(value: Sequence[Any], history: History) -> CommitRecord:
    stream, name, start, end, time_us, markers, outcome = value
    places = history.place(start), history.place(end)
    return CommitRecord(stream, Name(*name), *places, time_us, tuple(markers), Outcome(outcome))


def _bracket_out(bracket: Bracket) -> dict[str, Any]:
    return {
        "start": _position_out(bracket.start),
        "stop": _position_out(bracket.stop),
        "document": dict(bracket.document),
        "filled_to": bracket.filled_to and _position_out(bracket.filled_to),
    }


def _bracket_in(value: Mapping[str, Any]) -> Bracket:
    return Bracket(
        _position_in(value["start"]),
        _position_in(value["stop"]),
        value.get("document", {}),
        _maybe_position(value.get("filled_to")),
    )


def _known(of: type[Flush | Snapshot], value: Mapping[str, Any]) -> dict[str, Any]:
    """Give those keys that are fields of ours, times as times; what else there is, `_residue` keeps."""
    mine = {field.name: value[field.name] for field in fields(of) if field.name in value}
    return mine | {key: _time_in(value[key]) for key in ("began_at", "ended_at")}


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
    return Flush(**_known(Flush, value))


def _snapshot_out(snapshot: Snapshot) -> dict[str, object]:
    return {
        "volume": snapshot.volume,
        "driver": snapshot.driver,
        "location": snapshot.location,
        "began_at": _time_out(snapshot.began_at),
        "ended_at": _time_out(snapshot.ended_at),
        "bytes_copied": snapshot.bytes_copied,
        "path": snapshot.path,
        **({"storage": snapshot.storage} if snapshot.storage else {}),
    }


def _snapshot_in(value: Mapping[str, Any]) -> Snapshot:
    return Snapshot(**_known(Snapshot, value))


def _gap_out(gap: Gap) -> dict[str, object]:
    return {
        "stream": gap.stream,
        "after": _position_out(gap.after),
        "until": _position_out(gap.until),
        "reason": gap.reason,
        "found_at": _time_out(gap.found_at),
    }


def _gap_in(value: Mapping[str, Any]) -> Gap:
    after, until = _position_in(value["after"]), _position_in(value["until"])
    return Gap(value["stream"], after, until, value["reason"], _time_in(value["found_at"]))


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
