"""In which line of a TOML text a key stands, so that a message can point at it; pure, and no second parser.

`tomllib` has checked the text already, so only keys, table headers and the ends of strings and arrays are followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

Place = tuple[int | str, ...]
"""Keys and indices from the root, as pydantic names the place of a mistake: `("rules", 0, "expression")`."""

_HEADER = re.compile(r"\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_TOKEN = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*"|\'[^\']*\'|[\[\]{}#]')


def line_of(text: str, place: Place) -> int | None:
    """Give the line (from 1) of `place` in `text`, or of the nearest table around it; None where neither is there."""
    lines = dict(_places(text))
    for length in range(len(place), 0, -1):
        if place[:length] in lines:
            return lines[place[:length]]
    return None


def _places(text: str) -> Iterator[tuple[Place, int]]:
    """Give every table and key with its line; the first line of a place wins by being given last."""
    table: Place = ()
    counts: dict[Place, int] = {}
    found: list[tuple[Place, int]] = []
    state = _State("", 0)
    for number, line in enumerate(text.splitlines(), 1):
        inside = state.quote or state.depth
        header = None if inside else _HEADER.match(line)
        if header is not None:
            table = _table(_parts(header[2]), counts, starts_item=header[1] == "[[")
            found.append((table, number))
            continue
        key = None if inside else _KEY.match(line)
        if key is not None:
            found.append((table + _parts(key[1]), number))
        state = _after(line, state)
    return reversed(found)


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _table(parts: tuple[str, ...], counts: dict[Place, int], *, starts_item: bool) -> Place:
    """Give the place that a header opens; every array of tables on the way stands at its last item."""
    place: Place = ()
    for index, part in enumerate(parts):
        place = (*place, part)
        if starts_item and index == len(parts) - 1:
            counts[place] = counts.get(place, -1) + 1
        if place in counts:
            place = (*place, counts[place])
    return place


class _State(NamedTuple):
    quote: str
    """The quotes of the multi-line string that is open, or ""."""
    depth: int
    """How many arrays and inline tables are open."""


def _after(line: str, state: _State) -> _State:
    """Give what is still open at the end of `line`."""
    quote, depth = state
    at = 0
    while at < len(line):
        if quote:
            end = line.find(quote, at)
            if end < 0:
                return _State(quote, depth)
            quote, at = "", end + 3
            continue
        token = _TOKEN.search(line, at)
        if token is None or token[0] == "#":
            break
        at = token.end()
        if token[0] in ('"""', "'''"):
            quote = token[0]
        depth += (token[0] in "[{") - (token[0] in "]}")
    return _State(quote, depth)
