"""The one shape of our values as JSON: what `--json`, the control socket and records of clones have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from trigger.position import History, Name, Place, Position


def data(value: Any) -> Any:
    """Give `value` as JSON has it.

    Positions, histories, places, names and paths become text; times ISO-8601 in UTC with a `Z`; durations seconds;
    dataclasses and named tuples objects with the names of their fields; bytes stay numbers. Anything else is a
    `TypeError`.
    """
    match value:
        case Place() | Position() | History() | Name() | Path():
            return str(value)
        case Enum():
            return value.value
        case None | bool() | int() | float() | str():
            return value
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(data(key)): data(item) for key, item in value.items()}
        case tuple() if hasattr(value, "_asdict"):
            return _fields(value._asdict())
        case list() | tuple() | set() | frozenset():
            return [data(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        spread = getattr(value, "SPREAD", "")
        names = [field.name for field in dataclasses.fields(value) if field.name != spread]
        names += getattr(value, "SHOWN", ())
        shaped = _fields({name: getattr(value, name) for name in names})
        return shaped | data(getattr(value, spread, {}))
    raise TypeError(f"no JSON shape for {type(value).__name__}")


def _fields(found: Mapping[str, Any]) -> dict[str, Any]:
    shaped = {name: data(item) for name, item in found.items()}
    name = found.get("name")
    if isinstance(name, Name) and name.is_number:
        shaped["xid"] = name.number  # as readers of version 0.1 know it
    return shaped
