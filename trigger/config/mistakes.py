"""What is wrong with a configuration, in words that point at its line and say what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic_core import ErrorDetails

from trigger.config import drivers
from trigger.config.sections import Section
from trigger.config.toml_lines import Place, line_of


def place_in(path: Path, message: str) -> str:
    """Give `file:line: ` of the option that `message` begins with (`rules.0.expression …`); the line if it is known."""
    place = _named_place(message)
    line = line_of(path.read_text(encoding="utf-8"), place) if place else None
    return f"{path}:{line}: " if line else f"{path}: "


def _named_place(message: str) -> Place:
    named = re.match(r"[a-z_]+(?:\.[a-z_0-9]+)*(?=[: ])", message)
    return tuple(int(part) if part.isdigit() else part for part in named[0].split(".")) if named else ()


def explain(text: str, name: str, mistake: ErrorDetails, options: type[Section]) -> str:
    """Give `file:line: place: what is wrong`; the line is left out where the file does not have the place.

    Args:
        text: of the file.
        name: of the file.
        mistake: as pydantic tells it.
        options: what the text was read as.
    """
    place, message = mistake["loc"], _message(mistake, options)
    if not place and (place := _named_place(message)):
        message = message.partition(": ")[2]
    line = line_of(text, place)
    where = f"{name}:{line}" if line else name
    return f"{where}: {'.'.join(map(str, place))}: {message}" if place else f"{where}: {message}"


def say(mistake: ErrorDetails, section: type[Section]) -> str:
    """Give `place: what is wrong` for a mistake in what was read as `section`."""
    return f"{'.'.join(map(str, mistake['loc']))}: {_message(mistake, section)}"


def _message(mistake: ErrorDetails, options: type[Section]) -> str:
    """Give what is wrong in words that do not ask for a knowledge of pydantic; never a value that may be a secret."""
    kind, place, context = mistake["type"], mistake["loc"], mistake.get("ctx", {})
    if kind == "extra_forbidden":
        if chosen := _chosen_with(place):
            return f"there is such a key with {chosen} only"
        section = _section_at(options, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), drivers.keys(section) if section else (), n=1)
        return "there is no such key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return (
            f"is needed with {chosen}, and not there" if (chosen := _chosen_with(place)) else "is needed and not there"
        )
    dotted = ".".join(map(str, place))
    wanted = {
        "literal_error": f"must be {context.get('expected')}",
        "string_pattern_mismatch": "must be lower-case letters, digits and -, beginning with a letter or digit, "
        "40 at most"
        if "-]" in str(context.get("pattern"))
        else f"must match {context.get('pattern')}",
        "greater_than": f"must be more than {context.get('gt', 0):g}",
        "greater_than_equal": f"must be {context.get('ge', 0):g} or more",
        "less_than_equal": f"must be {context.get('le', 0):g} or less",
        "finite_number": "must be a finite number",
        "too_short": "must not be empty",
        "string_too_short": "must not be empty",
        "string_too_long": f"must have {context.get('max_length')} characters at most",
        "byte_size": 'must be a number of bytes or a text such as "10GiB"',
        "byte_size_unit": 'must be a number of bytes or a text such as "10GiB"',
        "string_type": "must be text in quotes",
        "path_type": "must be text in quotes",
        "float_type": "must be a number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "list_type": f"must be a list of tables, each under [[{dotted}]]"
        if isinstance(mistake["input"], dict)
        else "must be a list in [ ]",
        "none_required": "must not be there beside [[storages]], which take its place",
        "tuple_type": f"must be a list of tables, each under [[{dotted}]]",
        "model_type": f"must be a table, such as [{dotted}]",
    }.get(kind, mistake["msg"].removeprefix("Value error, "))
    value = mistake["input"]
    shown = isinstance(value, str | int | float) and kind not in _SAYS_IT_ALL and not _is_secret(options, place)
    return f"{wanted}, not {json.dumps(value)[:80]}" if shown else wanted


_SAYS_IT_ALL = ("value_error", "too_short", "string_too_short")
"""Mistakes whose message shows the value already, or has none to show."""


def _chosen_with(place: Place) -> str:
    """Give which drivers have the option at `place`, where not all that bring its table do: `journal.driver = "x"`."""
    match place:
        case (str(table), str(key)) if table in drivers.TABLES:
            having, chosen_by = drivers.having(table, key), drivers.TABLES[table].chosen_by
        case ("storages", int(number), str(key)):
            having, chosen_by = drivers.having("storage", key), f"storages.{number}.driver"
        case _:
            return ""
    return f"{chosen_by} = {' or '.join(map(json.dumps, having))}" if having else ""


def _is_secret(options: type[Section], place: Place) -> bool:
    """Whether what stands at `place`, or in it, may be a secret by the word of its section."""
    for length in range(1, len(place) + 1):
        section = _section_at(options, place[: length - 1])
        field = section.model_fields.get(str(place[length - 1])) if section else None
        if field is not None and not field.repr:
            return True
    return False


def _section_at(options: type[Section], place: Place) -> type[Section] | None:
    """Give the section at `place`; None where there is none, or several that it could be."""
    section, below = options, [options]
    for part in place:
        if isinstance(part, int):
            below = below[part : part + 1] if len(below) > 1 else below  # several storages, each with its own
        else:
            field = section.model_fields.get(part)
            below = list(_sections_in(field.annotation)) if field else []
        if len(below) == 1:
            section = below[0]
    return section if len(below) == 1 else None


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
