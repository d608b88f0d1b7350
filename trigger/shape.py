"""The one shape of our values: as JSON, for `--json`, control socket and records of clones; and as one line of text.

Names, markers and notes are what others wrote: they may hold anything, sequences that command a terminal and ends of
lines too. `plain` is what stands between them and whoever reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any
from unicodedata import category

from trigger.position import History, Name, Place, Position

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FOR_PEOPLE = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def plain(text: str) -> str:
    """Give `text` in one line that commands no terminal: what cannot be printed is an escape, as Python has it.

    That is every control character, ends of lines too, what turns the direction of writing or is not seen at all, and
    halves of characters. Blanks of every width, and letters of every script, are left.
    """
    return "".join(each if _is_seen(each) else _FOR_PEOPLE.get(each) or _escaped(each) for each in text)


def json_text(value: Any, *, indent: int | None = None, encoding: str = "utf-8") -> str:
    """Give `value` as JSON that commands no terminal either, can be written in an encoding, and means the same."""
    written = json.dumps(data(value), indent=indent, ensure_ascii=False)
    return "".join(
        each if each == "\n" or (_is_seen(each) and _fits(each, encoding)) else _as_json_escapes(each)
        for each in written
    )


def _is_seen(character: str) -> bool:
    return character.isprintable() or category(character) == "Zs"


def _fits(character: str, encoding: str) -> bool:
    try:
        return character.isascii() or bool(character.encode(encoding))
    except UnicodeEncodeError:
        return False


def _as_json_escapes(character: str) -> str:
    return json.dumps(character)[1:-1].replace("\x7f", "\\u007f")


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 1 << 8 else f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


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


def size(count: int | None) -> str | None:
    """Give a number of bytes for people: `512 B`, `1.5 GiB`; None stays None."""
    if count is None:
        return None
    number = float(count)
    for unit in _UNITS:
        if abs(number) < 1024 or unit == _UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")  # pragma: no cover
