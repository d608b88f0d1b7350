"""Commits as JSON lines: what `trigpoint rules test` reads and records.

One object a line. Only `time` is needed:

    {"database": "bank", "time": "2026-03-01T12:00:05.250Z", "name": "7731", "start": "0/1A2B3C8", "end": "0/1A2B3F8",
     "tables": {"public.accounts": {"inserted": 0, "updated": 2, "deleted": 0, "truncated": 0}},
     "markers": ["payroll"], "origin": "", "markers_cut": false}

`time` is ISO-8601 with a zone; `start` and `end` are places as the kind of database writes them. What earlier
versions wrote as `xid`, a number, is a name too. Counts that are left out are 0.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from trigger.errors import ConfigError, PositionError
from trigger.model import Changes, Commit, to_microseconds
from trigger.position import History, Name

KEYS = ("database", "time", "name", "xid", "start", "end", "tables", "markers", "origin", "markers_cut")


def read(lines: Iterable[str], name: str, database: str, kind: str) -> Iterator[Commit]:
    """Give the commits in `lines`; blank lines are passed over.

    Args:
        lines: the text.
        name: stands in messages, with the number of the line.
        database: whose commits they are where a line does not say.
        kind: of which kind of database they are, which says how places are written.

    Raises:
        ConfigError: a line is not a commit; the message says which and why.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _commit(json.loads(line), database, kind)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        except (TypeError, ValueError, PositionError, OverflowError) as error:
            words = error.message if isinstance(error, PositionError) else str(error)
            raise ConfigError(f"{name}:{number}: {words}", hint="`trigpoint rules test --help` shows a line") from None


def write(commit: Commit) -> str:
    """Give the line for `commit`, without the newline."""
    return json.dumps(
        {
            "database": commit.stream,
            "time": commit.time.isoformat().replace("+00:00", "Z"),
            "name": str(commit.name),
            "start": str(commit.history.place(commit.start)),
            "end": str(commit.history.place(commit.end)),
            "tables": {table: changes._asdict() for table, changes in commit.tables.items()},
            "markers": list(commit.markers),
            "origin": commit.origin,
            "markers_cut": commit.markers_cut,
        },
        ensure_ascii=False,
    )


def _commit(value: Any, database: str, kind: str) -> Commit:
    facts = _object(value, "a commit", KEYS)
    if "time" not in facts:
        raise ValueError("time is needed and not there")
    history = History(kind, "")
    start = history.parse_place(facts["start"]) if _text(facts, "start", "") else history.place(0)
    return Commit(
        stream=_text(facts, "database", database),
        history=history,
        start=start,
        end=history.parse_place(facts["end"]) if _text(facts, "end", "") else start,
        name=Name.parse(_text(facts, "name", "")) if "name" in facts else Name.parse(str(_count(facts, "xid"))),
        time_us=to_microseconds(_time(_text(facts, "time", ""))),
        tables={name: _changes(name, counts) for name, counts in _object(facts.get("tables", {}), "tables").items()},
        markers=tuple(_markers(facts.get("markers", []))),
        origin=_text(facts, "origin", ""),
        markers_cut=_whether(facts, "markers_cut"),
    )


def _object(value: Any, what: str, keys: tuple[str, ...] = ()) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be an object, not {json.dumps(value)[:60]}")
    for key in value if keys else ():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            raise ValueError(f"{what} has no {key}" + (f"; did you mean {near[0]}?" if near else ""))
    return value


def _text(facts: Mapping[str, Any], key: str, default: str) -> str:
    value = facts.get(key, default)
    if not isinstance(value, str):
        raise TypeError(f"{key} must be text, not {json.dumps(value)[:60]}")
    return value


def _count(facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a whole number that is not negative, not {json.dumps(value)[:60]}")
    return value


def _whether(facts: Mapping[str, Any], key: str) -> bool:
    value = facts.get(key, False)
    if not isinstance(value, bool):
        raise TypeError(f"{key} must be true or false, not {json.dumps(value)[:60]}")
    return value


def _changes(table: str, value: Any) -> Changes:
    counts = _object(value, f"tables.{table}", Changes._fields)
    return Changes(*(_count(counts, name) for name in Changes._fields))


def _markers(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(marker, str) for marker in value):
        raise ValueError(f"markers must be a list of texts, not {json.dumps(value)[:60]}")
    return value


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"time {text!r} is not ISO-8601") from None
    if time.tzinfo is None:
        raise ValueError(f"time {text!r} has no zone; add Z for UTC")
    return time.astimezone(UTC)  # what lies before year 1 in UTC is an OverflowError here, not later
